//! Twenty SIGKILLs at random moments of either end: the restored image is identical, and nothing that was acknowledged in a
//! closed epoch travelled twice. `BLOCKFERRY_SEED` replays; the seed is printed first.

#![allow(
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    clippy::map_entry,
    reason = "a test fails by panicking and prints its seed"
)]

use std::collections::HashMap;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use blockferry_tests::images::{self, Random};
use blockferry_tests::pair::{Pair, Summary};
use catalog::store::Store;
use catalog::volume::history::History;
use catalog::volume::{header, segment};

const KILLS: u32 = 20;

/// Epochs small enough that a pass has many, and a rate that lets kills fall into the middle of it.
const FLAGS: [&str; 6] = ["--epoch-size", "2MiB", "--rate-limit", "24MiB/s", "--seal-threads", "2"];

fn seed() -> u64 {
    let seed = std::env::var("BLOCKFERRY_SEED").ok().and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from_le_bytes(common::rng::random().expect("randomness")));
    println!("BLOCKFERRY_SEED={seed}");
    seed
}

fn start_sender(pair: &Pair, image: &std::path::Path) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(pair.file("sender.log")).expect("a log");
    let mut command = pair.sender_command(&[("disk", image)]);
    command.args(FLAGS).stdout(Stdio::piped()).stderr(log).spawn().expect("the sender starts")
}

/// Pages that each epoch committed after `after` points holds, by epoch: none may be in two epochs of one quiet pass.
fn pages_sent_twice(pair: &Pair, first_epoch: u64) -> (u64, u64) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let store = Store::open(&pair.store_url()).await.expect("the store opens");
        let header = header::find(&store, "disk").await.expect("the volume is there").header;
        let history = History::read(&store, &header).await.expect("the log reads");
        let mut seen: HashMap<u64, u64> = HashMap::new();
        let (mut pages, mut twice) = (0, 0);
        for epoch in history.epochs.iter().filter(|epoch| epoch.close.statement().epoch.0 >= first_epoch) {
            for &number in &epoch.segments {
                let reference = &history.segments[number as usize];
                let index = segment::read_index(&store, reference).await.expect("the index reads");
                let number = epoch.close.statement().epoch;
                for entry in index.groups.iter().filter(|group| group.epoch == number).flat_map(|group| &group.entries)
                {
                    for block in entry.meta.block.0..entry.meta.block.0 + u64::from(entry.meta.block_count) {
                        let mask = seen.entry(block).or_default();
                        twice += u64::from((*mask & entry.meta.pages().0).count_ones());
                        pages += u64::from(entry.meta.pages().count());
                        *mask |= entry.meta.pages().0;
                    }
                }
            }
        }
        (pages, twice)
    })
}

#[test]
fn twenty_kills_of_either_end_lose_nothing_and_resend_nothing_of_a_closed_epoch() {
    let mut random = Random(seed());
    let mut pair = Pair::start();
    let image = pair.file("disk.img");
    images::build(&image, 96);
    let (mut kills, mut receiver_kills, mut points) = (0, 0, 0);
    while kills < KILLS {
        let newest = pair.points_of_all();
        let first_epoch = newest.last().map_or(1, |point| point["epoch"].as_u64().expect("a number") + 1);
        let mut child = start_sender(&pair, &image);
        // Over this pass the image stands still, so every page may travel in one committed epoch at most.
        let summary = loop {
            let wait = Duration::from_millis(random.below(900));
            let until = Instant::now() + wait;
            let ended = loop {
                if let Some(status) = child.try_wait().expect("a child can be asked") {
                    break Some(status);
                }
                if kills < KILLS && Instant::now() >= until {
                    break None;
                }
                std::thread::sleep(Duration::from_millis(2));
            };
            match ended {
                Some(status) => {
                    let log = || std::fs::read_to_string(pair.file("sender.log")).unwrap_or_default();
                    assert!(status.success(), "the sender ended with {status}:\n{}", log());
                    let output = child.wait_with_output().expect("it ended").stdout;
                    break Summary(serde_json::from_slice(&output).expect("one JSON object"));
                }
                None if random.below(2) == 0 => {
                    pair.kill_receiver();
                    kills += 1;
                    receiver_kills += 1;
                    pair.start_receiver();
                }
                None => {
                    child.kill().expect("a child can be killed");
                    child.wait().expect("a child can be waited for");
                    kills += 1;
                    child = start_sender(&pair, &image);
                }
            }
        };
        points += 1;
        assert_eq!(summary.number("records_resent"), 0, "records that were staged travelled twice: {}", summary.0);
        let (pages, twice) = pages_sent_twice(&pair, first_epoch);
        assert_eq!(twice, 0, "{twice} of {pages} pages of closed epochs travelled twice");
        pair.restores_to("disk", "latest", &image);
        let _ = images::churn(&image, 4000, random.number());
    }
    println!("{kills} kills, {receiver_kills} of them of the receiver, over {points} points");
    // A kill between a point's close and its report makes the run that follows add another.
    assert!(pair.points("disk").len() >= points, "each run made a point");
}
