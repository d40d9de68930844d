//! A receiver on a disk that loses its power: nothing that was acknowledged may be missing afterwards. First, that the disk of
//! these tests really forgets.

#![allow(clippy::panic, clippy::print_stdout, reason = "a test fails by panicking and prints its seed")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use blockferry_tests::images::{self, PAGE, Random};
use blockferry_tests::lossy::{LossyDisk, Unsynced};
use blockferry_tests::pair::{Pair, Summary, check};

const CUTS: u32 = 20;

/// The seed of a run, printed so that a failure can be run again with `BLOCKFERRY_SEED`.
fn seed() -> u64 {
    let given = std::env::var("BLOCKFERRY_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| u64::from_le_bytes(common::rng::random().expect("randomness")));
    println!("BLOCKFERRY_SEED={seed}");
    seed
}

fn lossy(mib: u64) -> (tempfile::TempDir, LossyDisk) {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let disk = LossyDisk::create(&dir.path().join("mount"), mib << 20);
    (dir, disk)
}

#[test]
fn what_was_synced_survives_a_power_cut_and_what_was_not_is_gone() {
    let (_dir, mut disk) = lossy(64);
    let write = |name: &str, sync: bool| {
        let mut file = File::create(disk.path().join(name)).expect("a file");
        file.write_all(&[7; 100_000]).expect("room");
        if sync {
            file.sync_all().expect("the disk has power");
        }
    };
    write("synced", true);
    write("unsynced", false);
    disk.cut_power();
    disk.restore_power(Unsynced::Lost);
    let mut content = Vec::new();
    File::open(disk.path().join("synced")).expect("it survived").read_to_end(&mut content).expect("readable");
    assert_eq!(content, [7; 100_000]);
    let lost = std::fs::read(disk.path().join("unsynced")).unwrap_or_default();
    assert_ne!(lost, [7; 100_000], "nobody synced it");
    disk.check();
}

/// Pages of an overwrite that reached the disk's cache with `O_DIRECT` and were not flushed: how many are new, and how many are
/// neither old nor new, after a power cut.
fn overwritten(unsynced: Unsynced) -> (usize, usize) {
    const PAGES: usize = 256;
    let (_dir, mut disk) = lossy(64);
    let path = disk.path().join("file");
    let mut file = File::create(&path).expect("a file");
    file.write_all(&[1; PAGES * PAGE]).expect("room");
    file.sync_all().expect("the disk has power");
    drop(file); // an open file would keep the mount
    let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).expect("a small flag");
    let file = File::options().write(true).custom_flags(direct).open(&path).expect("it is there");
    let buffer = vec![2_u8; 2 * PAGE];
    let aligned = buffer.as_ptr().align_offset(PAGE);
    for page in 0..PAGES {
        file.write_all_at(&buffer[aligned..aligned + PAGE], (page * PAGE) as u64).expect("the disk has power");
    }
    assert!(disk.unsynced_pages() >= PAGES, "the disk has them in its cache");
    disk.cut_power();
    assert!(file.sync_all().is_err(), "no sync is confirmed without power");
    drop(file);
    disk.restore_power(unsynced);
    let content = std::fs::read(&path).expect("it is there");
    assert_eq!(content.len(), PAGES * PAGE);
    let all = |value: u8| content.chunks(PAGE).filter(|page| page.iter().all(|byte| *byte == value)).count();
    let (old, new) = (all(1), all(2));
    disk.check();
    (new, PAGES - old - new)
}

#[test]
fn an_overwrite_in_the_disks_cache_is_lost() {
    assert_eq!(overwritten(Unsynced::Lost), (0, 0));
}

#[test]
fn the_dice_leave_an_overwrite_done_in_part_and_torn() {
    let (new, torn) = overwritten(Unsynced::Dice(42));
    assert!(new > 32 && new < 224 && torn > 0, "{new} new, {torn} torn");
    assert_eq!(overwritten(Unsynced::Dice(42)), (new, torn), "the same seed gives the same disk");
}

#[test]
fn a_disk_may_have_written_all_but_some_of_its_cache() {
    let (new, torn) = overwritten(Unsynced::MostlyKept(42));
    assert!(new > 192 && new < 256 && torn == 0, "{new} new, {torn} torn");
}

fn start_sender(pair: &Pair, image: &std::path::Path) -> Child {
    let log = File::options().create(true).append(true).open(pair.file("sender.log")).expect("a log");
    let mut command = pair.sender_command(&[("disk", image)]);
    // Small epochs, so that closes are in flight whenever the power goes, and a rate that lets it go in the middle of a pass.
    command
        .args(["--epoch-size", "2MiB", "--rate-limit", "24MiB/s"])
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .expect("the sender starts")
}

/// Whose disk loses its power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    /// The receiver's data directory: stage and identity.
    Receiver,
    /// The store, a directory of the receiver's machine.
    Store,
    /// The sender's state directory.
    Sender,
}

/// Times that the receiver has let a sender open a volume. Before it did, a sender that is to make one point gives up where no
/// receiver answers; afterwards it goes on.
fn opened(pair: &Pair) -> usize {
    pair.log().matches("a sender has opened the volume").count()
}

/// Replicates an image again and again while `victim` loses its power `cuts` times; each point must restore, and at the end
/// each record of each point must open.
fn cut_and_compare(victim: Victim, cuts: u32) {
    let mut random = Random(seed());
    let dir = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let place = match victim {
        Victim::Receiver => "power",
        Victim::Store => "store",
        Victim::Sender => "sender",
    };
    let mut disk = LossyDisk::create(&dir.path().join(place), 3 << 30);
    let data = (victim == Victim::Receiver).then(|| disk.path().join("receiver"));
    let mut pair = Pair::start_in(dir, data, &["--stage-capacity", "1GiB"]);
    let image = pair.file("disk.img");
    images::build(&image, 96);
    let (mut done, mut in_flight, mut rolled) = (0, 0, 0);
    while done < cuts {
        let before = opened(&pair);
        let mut child = start_sender(&pair, &image);
        let summary = loop {
            let until = Instant::now() + Duration::from_millis(random.below(700));
            let ended = loop {
                if let Some(status) = child.try_wait().expect("a child can be asked") {
                    break Some(status);
                }
                if done < cuts && Instant::now() >= until && (victim == Victim::Sender || opened(&pair) > before) {
                    break None;
                }
                std::thread::sleep(Duration::from_millis(2));
            };
            if let Some(status) = ended {
                let log = std::fs::read_to_string(pair.file("sender.log")).unwrap_or_default();
                assert!(status.success(), "the sender ended with {status}:\n{log}");
                // A sender keeps a record until it is acknowledged, and notices if one that was is not there any more.
                assert!(!log.contains("lost what it had staged"), "after {done} power cuts:\n{log}");
                let output = child.wait_with_output().expect("it ended").stdout;
                break Summary(serde_json::from_slice(&output).expect("one JSON object"));
            }
            // At any moment, or between a write and its flush.
            let (pages, patience) = match random.below(3) {
                0 => (0, Duration::ZERO),
                1 => (1, Duration::from_millis(500)),
                _ => (1 + usize::try_from(random.below(32)).expect("small"), Duration::from_millis(500)),
            };
            if random.below(2) == 0 {
                disk.write_back();
            }
            let unsynced_pages = disk.cut_power_in_flight(pages, patience);
            in_flight += u32::from(unsynced_pages > 0);
            rolled += unsynced_pages;
            let unsynced = match random.below(4) {
                0 => Unsynced::Lost,
                1 => Unsynced::MostlyKept(random.number()),
                _ => Unsynced::Dice(random.number()),
            };
            if victim == Victim::Sender {
                child.kill().expect("a child can be killed");
                child.wait().expect("a child can be waited for");
                disk.restore_power(unsynced);
                child = start_sender(&pair, &image);
            } else {
                pair.kill_receiver();
                disk.restore_power(unsynced);
                pair.start_receiver();
            }
            done += 1;
        };
        assert_eq!(summary.number("records_resent"), 0, "records that were staged travelled twice: {}", summary.0);
        pair.restores_to("disk", "latest", &image);
        let _ = images::churn(&image, 4000, random.number());
    }
    println!("{done} power cuts, {in_flight} between a write and its flush, {rolled} unsynced pages rolled for");
    // The store's disk is idle most of the time; there it may happen by chance, and what is lost is the page cache alone.
    assert!(victim == Victim::Store || in_flight > 0, "the power never went while the disk had anything to forget");
    let mut verify = pair.operator_command("verify");
    verify.args(["--volume", "disk", "--point", "all"]).arg("--key-file").arg(pair.key_file());
    check("verify", &verify.output().expect("it runs"));
    pair.stop_receiver();
    disk.check();
}

#[test]
fn twenty_power_cuts_of_the_receiver_lose_nothing_that_was_acknowledged() {
    cut_and_compare(Victim::Receiver, CUTS);
}

#[test]
fn power_cuts_of_the_store_lose_nothing_that_was_committed() {
    cut_and_compare(Victim::Store, CUTS / 2);
}

#[test]
fn power_cuts_of_the_sender_leave_no_hash_that_lies() {
    cut_and_compare(Victim::Sender, CUTS / 2);
}
