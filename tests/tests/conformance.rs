//! The conformance suite over every capture mode, with real processes: a writer with numbered writes, points at random moments,
//! SIGKILLs and restarts of either end, and an oracle over every point that was asked for. Write B without write A, where A
//! completed before B was submitted, is in no point; the last point equals the disk.
//!
//! `BLOCKFERRY_LONG=1` (`make test-long`) makes 1,000 points instead of 50, `BLOCKFERRY_SEED` replays.

#![allow(clippy::panic, reason = "a test fails by panicking")]

use std::cell::Cell;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockferry_tests::conformance::drive::{self, Scenario};
use blockferry_tests::conformance::target::{Cached, Direct, Target};
use blockferry_tests::conformance::writer::{Habits, initialise};
use blockferry_tests::loops::{LoopDevice, Mounted};
use blockferry_tests::nbd::NbdTarget;
use blockferry_tests::pair::{Pair, check};
use blockferry_tests::protected::Protected;

const MIB: u64 = 1 << 20;

#[test]
fn scan_of_an_image_file_that_rests_keeps_the_promise() {
    let seed = drive::seed();
    let mut pair = Pair::start();
    let disk = pair.file("disk.img");
    initialise(&disk, 24 * MIB);
    let volume = format!("disk={},capture=scan", disk.display());
    let mut sender = Protected::start(&pair, &[&volume], &["--point-interval", "1h"]);
    let scenario = Scenario {
        volume: "disk",
        disk: &disk,
        habits: Habits::new(24 * MIB, seed),
        cuts: drive::scaled(50, 1000),
        rests: true,
        others_max: 10,
        open: &|| Arc::new(Cached::open(&disk)),
        at_rest: &|| {},
        restored: &drive::whole,
    };
    let account = drive::run(&scenario, &mut pair, &mut sender, seed);
    assert!(account.judged > scenario.cuts / 2, "most points promise something: {account:?}");
}

#[test]
fn nbd_with_many_writers_keeps_the_promise() {
    let seed = drive::seed();
    let mut pair = Pair::start();
    let (disk, socket) = (pair.file("disk.img"), pair.file("nbd.sock"));
    initialise(&disk, 32 * MIB);
    let volume = format!("disk={},capture=nbd,listen={}", disk.display(), socket.display());
    let mut sender = Protected::start(&pair, &[&volume], &["--epoch-interval", "200ms"]);
    let target: Arc<dyn Target> = Arc::new(NbdTarget::new(socket, "disk", 3));
    let scenario = Scenario {
        volume: "disk",
        disk: &disk,
        habits: Habits::new(32 * MIB, seed),
        cuts: drive::scaled(50, 1000),
        rests: false,
        others_max: 30,
        open: &|| Arc::clone(&target),
        at_rest: &|| {},
        restored: &drive::whole,
    };
    let account = drive::run(&scenario, &mut pair, &mut sender, seed);
    assert!(account.fuzzy == 0 && account.judged > scenario.cuts, "every point promises something: {account:?}");
}

#[test]
fn nbd_that_is_overloaded_keeps_the_promise_when_it_caught_up() {
    let seed = drive::seed();
    let mut pair = Pair::start();
    let (disk, socket) = (pair.file("disk.img"), pair.file("nbd.sock"));
    initialise(&disk, 16 * MIB);
    let volume = format!("disk={},capture=nbd,listen={}", disk.display(), socket.display());
    // A rate that the writer is far above, and hardly any memory to keep what can't leave.
    let flags = ["--epoch-interval", "200ms", "--rate-limit", "2MiB/s", "--memory-budget", "64MiB"];
    let mut sender = Protected::start(&pair, &[&volume], &flags);
    let target: Arc<dyn Target> = Arc::new(NbdTarget::new(socket, "disk", 2));
    let mut habits = Habits::new(16 * MIB, seed);
    habits.pause_max /= 4;
    let scenario = Scenario {
        volume: "disk",
        disk: &disk,
        habits,
        cuts: 0,
        rests: false,
        others_max: 30,
        open: &|| Arc::clone(&target),
        at_rest: &|| {},
        restored: &drive::whole,
    };
    let mut overloaded_since: Option<Instant> = None;
    drive::run_until(&scenario, &mut pair, &mut sender, seed, &mut |sender| {
        let overloads = sender.status().and_then(|status| drive::find(&status, "overloads")?.as_u64());
        if overloads.is_some_and(|count| count > 0) {
            overloaded_since.get_or_insert_with(Instant::now);
        }
        overloaded_since.is_some_and(|since| since.elapsed() > Duration::from_secs(5))
    });
}

/// A volume `disk` on this device in ebpf mode.
fn tracked(pair: &Pair, device: &LoopDevice) -> Protected {
    let volume = format!("disk={},capture=ebpf", device.device.display());
    Protected::start(pair, &[&volume], &["--point-interval", "1h", "--freeze-limit", "2s"])
}

#[test]
fn ebpf_on_a_device_that_is_written_raw_ends_equal_and_tells_no_lie() {
    let seed = drive::seed();
    let mut pair = Pair::start();
    let backing = pair.file("backing.img");
    initialise(&backing, 32 * MIB);
    let device = LoopDevice::attach(&backing, true);
    let mut sender = tracked(&pair, &device);
    let path = device.device.clone();
    let scenario = Scenario {
        volume: "disk",
        disk: &path,
        habits: Habits::new(32 * MIB, seed),
        // Nobody can hold back raw writers: points are weak while they write, and true when they rest.
        rests: true,
        cuts: drive::scaled(50, 1000),
        others_max: 10,
        open: &|| Arc::new(Direct::open(&path)),
        at_rest: &|| {},
        restored: &drive::whole,
    };
    drive::run(&scenario, &mut pair, &mut sender, seed);
    end(&mut sender);
}

/// Ends protection: nothing of it stays in the kernel.
fn end(sender: &mut Protected) {
    sender.stop();
    check("detach", &sender.tool("detach").arg("--all").output().expect("it runs"));
}

#[test]
fn ebpf_on_a_device_with_a_mounted_file_system_keeps_the_promise() {
    let seed = drive::seed();
    let mut pair = Pair::start();
    let backing = pair.file("backing.img");
    std::fs::File::create(&backing).and_then(|file| file.set_len(64 * MIB)).expect("sparse files");
    let device = LoopDevice::attach(&backing, true);
    device.format("mkfs.ext4", &["-q", "-F", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"]);
    let mounted = device.mount(&pair.file("mnt"), "");
    let (file, mounted) = (mounted.path().join("written"), Cell::new(Some(mounted)));
    initialise(&file, 32 * MIB);
    let mut sender = tracked(&pair, &device);
    let path = device.device.clone();
    let scenario = Scenario {
        volume: "disk",
        disk: &path,
        habits: Habits::new(32 * MIB, seed),
        rests: false,
        cuts: drive::scaled(50, 1000),
        others_max: 10,
        open: &|| Arc::new(Direct::open(&file)),
        // A mounted file system writes by itself, to its superblock at each thaw to begin with.
        at_rest: &|| drop(mounted.take()),
        restored: &in_ext4,
    };
    let account = drive::run(&scenario, &mut pair, &mut sender, seed);
    assert!(account.judged > scenario.cuts, "every point that was asked for promises something: {account:?}");
    end(&mut sender);
}

/// Mounts a restored ext4 (its journal replayed where it was not frozen), and judges the writer's file in it.
fn in_ext4(image: &Path, judge: &mut dyn FnMut(&mut dyn Read)) {
    let scratch = tempfile::tempdir_in("/var/tmp").expect("a directory");
    {
        let mounted = Mounted::mount(image, &scratch.path().join("mnt"), "loop");
        judge(&mut std::fs::File::open(mounted.path().join("written")).expect("it is in every point"));
    }
    let output = Command::new("e2fsck").args(["-f", "-n"]).arg(image).output().expect("e2fsprogs is installed");
    check("e2fsck of a restored point", &output);
}
