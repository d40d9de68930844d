//! Memory while everything stands still: the kernel enforces 128 MiB on either end while writes go on and nothing leaves.

#![allow(clippy::panic, clippy::print_stdout, reason = "a test fails by panicking and prints what it measured")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use blockferry_tests::cgroup::{MemoryGroup, vm_hwm};
use blockferry_tests::conformance::drive::{self, scaled};
use blockferry_tests::conformance::history::History;
use blockferry_tests::conformance::target::Target;
use blockferry_tests::conformance::writer::{Habits, Writer, initialise};
use blockferry_tests::mounts::Tmpfs;
use blockferry_tests::nbd::NbdTarget;
use blockferry_tests::pair::Pair;
use blockferry_tests::protected::{Protected, signal_process};
use rustix::process::Signal;

const MIB: u64 = 1 << 20;
const LIMIT: u64 = 128 * MIB;
const DISK: u64 = 256 * MIB;

/// What stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Still {
    Receiver,
    Store,
}

fn stand_still(still: Still) {
    let _ = drive::seed();
    let dir = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let receiver_flags = ["--memory-budget", "128MiB", "--stage-capacity", "1GiB"];
    let mut pair = Pair::start_at(dir, None, None, Some(MemoryGroup::create(LIMIT)), &receiver_flags);
    let (disk, socket) = (pair.file("disk.img"), pair.file("nbd.sock"));
    initialise(&disk, DISK);
    let volume = format!("disk={},capture=nbd,listen={}", disk.display(), socket.display());
    let mut sender = Protected::prepare(&pair, &[&volume], &["--memory-budget", "128MiB"]);
    sender.group = Some(MemoryGroup::create(LIMIT));
    sender.restart();
    let history = Arc::new(History::default());
    drive::ask(&mut sender, "disk", &history);

    let nbd = Arc::new(NbdTarget::new(socket, "disk", 4));
    let target: Arc<dyn Target> = Arc::clone(&nbd) as Arc<dyn Target>;
    // Far more than the budget within the time that things stand still.
    let habits = Habits { pause_max: Duration::from_micros(800), ..Habits::new(DISK, 5) };
    let writer = Writer::start(&habits, &target, &history, 0);
    let store = pair.store.clone();
    let away = pair.file("store-away");
    let full = (still == Still::Store).then(|| {
        // A store that takes nothing: full, where it was.
        std::fs::rename(&store, &away).expect("it can be moved");
        let full = Tmpfs::mount(&store, MIB);
        full.fill();
        full
    });
    if still == Still::Receiver {
        signal_process(pair.receiver_pid(), Signal::STOP);
    }
    let until = Instant::now() + Duration::from_secs(u64::from(scaled(20, 120)));
    let mut slowest = Duration::ZERO;
    while Instant::now() < until {
        std::thread::sleep(Duration::from_millis(100));
        sender.assert_running();
        slowest = slowest.max(nbd.slowest());
    }
    let written = history.log().writes.len();
    if still == Still::Receiver {
        signal_process(pair.receiver_pid(), Signal::CONT);
    }
    if let Some(full) = full {
        drop(full);
        std::fs::remove_dir(&store).expect("the mount point is empty");
        std::fs::rename(&away, &store).expect("it can be moved back");
    }
    writer.rest(&history);
    slowest = slowest.max(nbd.slowest());
    let (_, id) = drive::ask(&mut sender, "disk", &history);
    pair.restores_to("disk", &id, &disk);
    let (sender_peak, receiver_peak) = (vm_hwm(sender.pid()), vm_hwm(pair.receiver_pid()));
    println!(
        "{still:?} stood still: {written} writes, the slowest {slowest:?}; peaks {} MiB (sender), {} MiB (receiver)",
        sender_peak / MIB,
        receiver_peak / MIB
    );
    assert!(sender_peak <= LIMIT && receiver_peak <= LIMIT, "the budget is of the process");
    let killed = sender.group.as_ref().map_or(0, MemoryGroup::oom_kills);
    assert_eq!((killed, pair.receiver_group.as_ref().map_or(0, MemoryGroup::oom_kills)), (0, 0));
    assert!(slowest < Duration::from_secs(2), "a write took {slowest:?}");
    assert_eq!(pair.stop_receiver(), Some(143));
}

#[test]
fn with_the_receiver_stopped_memory_stays_within_the_budget_and_writes_go_on() {
    stand_still(Still::Receiver);
}

#[test]
fn with_the_store_taking_nothing_memory_stays_within_the_budget_and_writes_go_on() {
    stand_still(Still::Store);
}
