//! The source's machine loses its power on the nbd path: the disk and the sender's state lie on a disk that forgets what was
//! not synced. A write that reached the medium, answered or not, has to be in the write-intent log: after the resume the
//! replica equals the disk.

#![allow(clippy::panic, clippy::print_stdout, reason = "a test fails by panicking and prints what it measured")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use blockferry_tests::conformance::drive::{self, scaled};
use blockferry_tests::conformance::history::History;
use blockferry_tests::images::{self, PAGE, Random};
use blockferry_tests::lossy::{LossyDisk, Unsynced};
use blockferry_tests::nbd::{Command, Connection, FUA};
use blockferry_tests::pair::{Pair, wait_for};
use blockferry_tests::protected::Protected;

const DISK_MIB: u64 = 96;

/// Writes random pages on two connections until a request fails: a client on a machine whose power is gone.
fn write_until_dark(
    socket: &std::path::Path,
    seed: u64,
    lanes: u64,
    written: &Arc<AtomicU64>,
    stop: &Arc<AtomicBool>,
) -> Vec<std::thread::JoinHandle<()>> {
    let connection = Arc::new(wait_for("the export", || Connection::open(socket, "disk").ok()));
    let lanes = (0..lanes).map(|lane| {
        let (connection, written, stop) = (Arc::clone(&connection), Arc::clone(written), Arc::clone(stop));
        std::thread::spawn(move || {
            let mut random = Random(seed ^ (lane << 40));
            // Few regions are active, and others become active for one write: both ends of the log's life.
            while !stop.load(Ordering::Relaxed) {
                let pages = (DISK_MIB << 20) / PAGE as u64;
                let page = if random.below(4) == 0 { random.below(pages) } else { random.below(pages / 16) };
                let content = random.page();
                let flags = if random.below(16) == 0 { FUA } else { 0 };
                let offset = page * PAGE as u64;
                if connection.request(Command::Write, flags, offset, PAGE, &content).is_err() {
                    return;
                }
                written.fetch_add(1, Ordering::Relaxed);
                if random.below(64) == 0 && connection.request(Command::Flush, 0, 0, 0, &[]).is_err() {
                    return;
                }
            }
        })
    });
    lanes.collect()
}

/// Writes, and pages that were not synced when the power went, that all cuts together must have met.
const WRITES_MIN: u64 = 500;
const UNSYNCED_MIN: usize = 100;

#[test]
fn after_a_power_cut_of_the_source_the_replica_equals_the_disk() {
    let mut random = Random(drive::seed());
    let dir = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let mut lossy = LossyDisk::create(&dir.path().join("power"), 768 << 20);
    let state = lossy.path().join("state");
    let disk = lossy.path().join("disk.img");
    std::fs::File::create(&disk).and_then(|file| file.set_len(DISK_MIB << 20)).expect("room");
    let _ = images::churn(&disk, DISK_MIB * 128, 1);
    let pair = Pair::start_at(dir, None, Some(state), None, &[]);
    let socket = pair.file("nbd.sock");
    let volume = format!("disk={},capture=nbd,listen={}", disk.display(), socket.display());
    let mut sender = Protected::start(&pair, &[&volume], &["--epoch-interval", "200ms"]);
    drive::ask(&mut sender, "disk", &History::default());
    let cuts = scaled(8, 20);
    let (mut rolled, mut writes, mut cut) = (0, 0, 0);
    // How much a cut finds unsynced is the machine's affair: cuts go on until they met enough of it.
    while cut < cuts || ((writes <= WRITES_MIN || rolled <= UNSYNCED_MIN) && cut < 8 * cuts) {
        cut += 1;
        let (written, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let lanes = write_until_dark(&socket, random.number(), 6, &written, &stop);
        std::thread::sleep(Duration::from_millis(200 + random.below(1200)));
        if random.below(2) == 0 {
            lossy.write_back();
        }
        lossy.cut_power();
        sender.kill();
        stop.store(true, Ordering::Relaxed);
        lanes.into_iter().for_each(|lane| lane.join().expect("it ended"));
        writes += written.load(Ordering::Relaxed);
        rolled += lossy.unsynced_pages();
        lossy.restore_power(Unsynced::Dice(random.number()));
        sender.restart();
        let (_, id) = drive::ask(&mut sender, "disk", &History::default());
        pair.restores_to("disk", &id, &disk);
        println!("cut {cut}: {writes} writes so far, {rolled} unsynced pages rolled for");
    }
    assert!(
        writes > WRITES_MIN && rolled > UNSYNCED_MIN,
        "the cuts were of a disk at work: {writes} writes, {rolled} unsynced"
    );
    sender.stop();
    drop(pair);
    lossy.check();
}
