//! A bit of the log of the receiver's RocksDB flips while it is down: what is lost is named, and replication goes on by itself.
//! `BLOCKFERRY_SEED` replays; the seed is printed first.

#![allow(
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking and prints its seed"
)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use blockferry_tests::images::{self, Random};
use blockferry_tests::pair::{Pair, wait_for};

const FLIPS: u32 = 12;

fn start_sender(pair: &Pair, image: &Path) -> Child {
    let log = File::options().create(true).append(true).open(pair.file("sender.log")).expect("a log");
    let mut command = pair.sender_command(&[("disk", image)]);
    // Slow, so that most batches are small ones, which go through the log.
    command.args(["--epoch-size", "2MiB", "--rate-limit", "6MiB/s"]).stdout(Stdio::null()).stderr(log);
    command.spawn().expect("the sender starts")
}

/// Log files with something in them.
fn logs(pair: &Pair) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(pair.data.join("stage/db")).expect("the stage is there");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let mut logs: Vec<_> = paths.filter(|path| path.extension().is_some_and(|ending| ending == "log")).collect();
    logs.retain(|path| std::fs::metadata(path).is_ok_and(|found| found.len() > 0));
    logs.sort();
    logs
}

fn named(pair: &Pair) -> usize {
    pair.log().matches("stage log ").count()
}

#[test]
fn a_flipped_bit_of_the_stages_log_is_named_and_replication_goes_on_by_itself() {
    let seed = std::env::var("BLOCKFERRY_SEED").ok().and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from_le_bytes(common::rng::random().expect("randomness")));
    println!("BLOCKFERRY_SEED={seed}");
    let mut random = Random(seed);
    let mut pair = Pair::start();
    let image = pair.file("disk.img");
    images::build(&image, 48);
    let mut flips = 0;
    while flips < FLIPS {
        let opened = pair.log().matches("a sender has opened the volume").count();
        let mut sender = start_sender(&pair, &image);
        wait_for("the volume to be opened", || {
            (pair.log().matches("a sender has opened the volume").count() > opened).then_some(())
        });
        let status = loop {
            let until = Instant::now() + Duration::from_millis(300 + random.below(700));
            let ended = loop {
                if let Some(status) = sender.try_wait().expect("a child can be asked") {
                    break Some(status);
                }
                if flips < FLIPS && Instant::now() >= until {
                    break None;
                }
                std::thread::sleep(Duration::from_millis(2));
            };
            if let Some(status) = ended {
                break status;
            }
            pair.kill_receiver();
            let logs = logs(&pair);
            if !logs.is_empty() {
                let path = &logs[random.below(logs.len() as u64) as usize];
                let mut bytes = std::fs::read(path).expect("readable");
                let at = random.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << random.below(8);
                std::fs::write(path, bytes).expect("writable");
                flips += 1;
            }
            pair.start_receiver();
        };
        let log = std::fs::read_to_string(pair.file("sender.log")).unwrap_or_default();
        assert!(status.success(), "the sender ended with {status}:\n{log}");
        let lost = log.matches("lost what it had staged").count();
        assert!(lost == 0 || named(&pair) > 0, "something was lost and nothing was named:\n{log}");
        pair.restores_to("disk", "latest", &image);
        let _ = images::churn(&image, 4000, random.number());
    }
    println!("{flips} bits flipped, {} times named", named(&pair));
    assert!(named(&pair) > 0, "no flip met anything that was acknowledged");
}
