//! Resident memory stays within `--memory-budget`, at both ends, in control groups where the kernel kills what goes beyond: a
//! volume of a GiB, many volumes at once, and a store that stands still until the stage is full.

#![allow(clippy::panic, clippy::print_stdout, reason = "a test fails by panicking and prints what it measured")]

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use blockferry_tests::cgroup::{MemoryGroup, vm_hwm};
use blockferry_tests::images::{self, PAGE, Random};
use blockferry_tests::lossy::LossyDisk;
use blockferry_tests::pair::{Pair, wait_for};

const MIB: u64 = 1 << 20;
/// What a group has beyond its process's budget: page cache and the kernel's own buffers count there too.
const GROUP_EXTRA: u64 = 64 * MIB;
/// Budget of the receivers: the smallest there is.
const RECEIVER: u64 = 128 * MIB;
/// Part of a receiver's budget that its peak stays below, in percent: an allocator's mood must not be what decides.
const HEADROOM_PERCENT: u64 = 90;

/// A receiver with the smallest budget, in a group of its own.
fn receiver(dir: tempfile::TempDir) -> Pair {
    let group = MemoryGroup::create(RECEIVER + GROUP_EXTRA);
    Pair::start_at(dir, None, None, Some(group), &["--memory-budget", "128MiB", "--stage-capacity", "1GiB"])
}

/// A sender of these volumes with a budget of `mib` MiB, in `group`.
fn start_sender(pair: &Pair, group: &MemoryGroup, mib: u64, images: &[(String, PathBuf)]) -> Child {
    let volumes: Vec<(&str, &Path)> = images.iter().map(|(name, path)| (name.as_str(), path.as_path())).collect();
    let plain = pair.sender_command_within(&format!("{mib}MiB"), &volumes);
    let log = File::options().create(true).append(true).open(pair.file("sender.log")).expect("a log");
    group.command(&plain).stdout(Stdio::null()).stderr(log).spawn().expect("the sender starts")
}

/// Waits for the sender's success; the peak of its resident memory as last seen.
fn finish(pair: &Pair, mut sender: Child) -> u64 {
    let mut peak = 0;
    let status = wait_for("the sender", || {
        // Still there: nobody has waited for it.
        let status = std::fs::read_to_string(format!("/proc/{}/status", sender.id())).unwrap_or_default();
        if status.contains("VmHWM:") {
            peak = peak.max(vm_hwm(sender.id()));
        }
        sender.try_wait().expect("a child can be asked")
    });
    let log = std::fs::read_to_string(pair.file("sender.log")).unwrap_or_default();
    assert!(status.success(), "the sender ended with {status}:\n{log}");
    peak
}

fn check_receiver(pair: &Pair, what: &str) {
    let peak = vm_hwm(pair.receiver_pid());
    println!("{what}: the receiver's resident memory peaked at {} MiB of {}", peak / MIB, RECEIVER / MIB);
    let kills = pair.receiver_group.as_ref().expect("it is in one").oom_kills();
    assert_eq!(kills, 0, "{what}: the kernel killed for want of memory");
    assert!(peak * 100 <= RECEIVER * HEADROOM_PERCENT, "{what}: {} MiB of {}", peak / MIB, RECEIVER / MIB);
}

/// An image of noise, which does not compress: what is sent is as long as what is read.
fn noise(path: &Path, mib: u64, seed: u64) {
    let mut random = Random(seed);
    let mut file = BufWriter::new(File::create(path).expect("the image can be made"));
    for _ in 0..mib * MIB / 8 {
        file.write_all(&random.number().to_le_bytes()).expect("there is room");
    }
    file.into_inner().expect("flushed").sync_all().expect("synced");
}

#[test]
fn a_gib_and_its_changes_stay_within_small_budgets_at_both_ends() {
    let pair = receiver(tempfile::tempdir_in("/var/tmp").expect("a temporary directory"));
    let image = pair.file("disk.img");
    images::build(&image, 1024);
    for (pass, mib) in [("full", 64), ("full", 128), ("changes", 64), ("changes", 128)] {
        if pass == "changes" {
            images::churn(&image, 1024 * MIB / PAGE as u64 / 20, mib);
        }
        let name = format!("disk-{mib}");
        let group = MemoryGroup::create(mib * MIB + GROUP_EXTRA);
        let peak = finish(&pair, start_sender(&pair, &group, mib, &[(name.clone(), image.clone())]));
        println!("{pass}: the sender's resident memory peaked at {} MiB of {mib}", peak / MIB);
        assert_eq!(group.oom_kills(), 0, "the kernel killed the sender for want of memory");
        assert!(peak > 0 && peak <= mib * MIB, "{pass}: {} MiB of {mib}", peak / MIB);
        check_receiver(&pair, pass);
        pair.restores_to(&name, "latest", &image);
    }
}

#[test]
fn eight_volumes_at_once_stay_within_the_budgets_at_both_ends() {
    let pair = receiver(tempfile::tempdir_in("/var/tmp").expect("a temporary directory"));
    let images: Vec<_> = (0..8).map(|number| (format!("disk-{number}"), pair.file(&format!("{number}.img")))).collect();
    for (number, (_, path)) in images.iter().enumerate() {
        noise(path, 96, number as u64 + 1);
    }
    let group = MemoryGroup::create(128 * MIB + GROUP_EXTRA);
    let run = |what: &str| {
        let peak = finish(&pair, start_sender(&pair, &group, 128, &images));
        println!("{what}: the sender's resident memory peaked at {} MiB of 128", peak / MIB);
        assert_eq!(group.oom_kills(), 0, "the kernel killed the sender for want of memory");
        assert!(peak > 0 && peak <= 128 * MIB, "{what}: {} MiB of 128", peak / MIB);
        check_receiver(&pair, what);
    };
    run("eight at once");
    for (_, path) in &images {
        images::churn(path, 96 * MIB / PAGE as u64 / 20, 3);
    }
    run("changes of eight at once");
    for (name, path) in &images {
        pair.restores_to(name, "latest", path);
    }
}

#[test]
fn a_store_that_stands_still_until_the_stage_is_full_costs_no_more_than_the_budget() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let disk = LossyDisk::create(&dir.path().join("store"), 2 << 30);
    let pair = receiver(dir);
    let images: Vec<_> = (0..3).map(|number| (format!("disk-{number}"), pair.file(&format!("{number}.img")))).collect();
    for (number, (_, path)) in images.iter().enumerate() {
        noise(path, 224, number as u64 + 1);
    }
    let group = MemoryGroup::create(512 * MIB);
    let sender = start_sender(&pair, &group, 128, &images);
    wait_for("the volumes to be opened", || {
        (pair.log().matches("a sender has opened the volume").count() >= images.len()).then_some(())
    });
    {
        let _stalled = disk.stall();
        wait_for("the stage to be full", || {
            let full = pair.receiver_metric("blockferry_receiver_stage_intake_open") == 0.0;
            (full && pair.receiver_metric("blockferry_receiver_stage_used_bytes") > 0.0).then_some(())
        });
        check_receiver(&pair, "a full stage before a store that stands still");
    }
    finish(&pair, sender);
    check_receiver(&pair, "catching up");
    for (name, path) in &images {
        pair.restores_to(name, "latest", path);
    }
}
