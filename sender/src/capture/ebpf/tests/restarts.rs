//! Tracking outlives the sender, is believed only of the same disk, and ends without a trace.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::*;
use crate::capture::ebpf::libbpf::{Map, map_exists};

/// Set in the process that is to be killed: device, pins, state.
const CHILD: &str = "BLOCKFERRY_TEST_TRACKER_CHILD";

#[test]
fn pages_written_while_no_sender_runs_are_found_with_those_saved_and_not_forgotten() {
    let disk = Disk::new(32 * MIB);
    let mut tracker = disk.tracked();
    let file = open_direct(&disk.device);
    write_direct(&file, 0, 4096, 1);
    let committed = tracker.swap().expect("swapped").sequence;
    tracker.forget(committed).expect("forgotten");
    write_direct(&file, 10 * 4096, 4096, 1);
    tracker.swap().expect("swapped");
    write_direct(&file, 20 * 4096, 4096, 1);
    drop(tracker);
    write_direct(&file, 30 * 4096, 4096, 1);
    let (mut tracker, adopted) = disk.attach();
    let mut expected = range(tracker.geometry(), 10, 11);
    expected.extend(&range(tracker.geometry(), 20, 21));
    expected.extend(&range(tracker.geometry(), 30, 31));
    assert_eq!(adopted, Adopted::Pins(expected.clone()));
    assert!(tracker.swap().expect("swapped").pages.is_empty());
    // What was adopted is still owed after another restart, until it is forgotten.
    let sequence = tracker.sequence();
    drop(tracker);
    let (mut tracker, adopted) = disk.attach();
    assert_eq!(adopted, Adopted::Pins(expected));
    assert!(tracker.sequence() >= sequence.min(1));
    tracker.forget(tracker.sequence()).expect("forgotten");
    drop(tracker);
    let (tracker, adopted) = disk.attach();
    assert_eq!(adopted, Adopted::Pins(PageSet::empty(tracker.geometry())));
    tracker.detach().expect("detached");
}

#[test]
fn a_first_replication_that_did_not_end_is_owed_whole_unless_the_rest_was_kept() {
    let disk = Disk::new(8 * MIB);
    let (tracker, adopted) = disk.attach();
    assert_eq!(adopted, Adopted::Fresh);
    let geometry = tracker.geometry();
    drop(tracker);
    let (mut tracker, adopted) = disk.attach();
    assert_eq!(adopted, Adopted::Pins(PageSet::full(geometry)));
    let rest = range(geometry, 100, 300);
    let kept = tracker.keep(&rest).expect("kept");
    tracker.forget(kept - 1).expect("forgotten");
    drop(tracker);
    assert_eq!(disk.attach().1, Adopted::Pins(rest));
}

#[test]
fn a_sender_that_died_between_the_halves_of_a_swap_finds_the_pages_of_both_buffers() {
    let disk = Disk::new(16 * MIB);
    let mut tracker = disk.tracked();
    let file = open_direct(&disk.device);
    write_direct(&file, 4096, 4096, 1);
    assert_eq!(tracker.switch().expect("switched").pages.len(), 1);
    assert!(matches!(tracker.switch(), Err(TrackerError::Unsettled)));
    write_direct(&file, 8192, 4096, 1);
    drop(tracker);
    let (tracker, adopted) = disk.attach();
    assert_eq!(adopted, Adopted::Pins(range(tracker.geometry(), 1, 3)));
    tracker.detach().expect("detached");
}

#[test]
fn a_set_that_can_t_be_saved_is_not_cleared_and_comes_with_the_next_swap() {
    let disk = Disk::new(16 * MIB);
    let mut tracker = disk.tracked();
    let file = open_direct(&disk.device);
    write_direct(&file, 4096, 4096, 1);
    let away = disk.folder.path().join("away");
    std::fs::rename(disk.state(), &away).expect("moved");
    assert!(matches!(tracker.swap(), Err(TrackerError::State { .. })));
    assert!(matches!(tracker.swap(), Err(TrackerError::State { .. })));
    write_direct(&file, 3 * 4096, 4096, 1);
    std::fs::rename(&away, disk.state()).expect("moved back");
    let mut expected = range(tracker.geometry(), 1, 2);
    expected.extend(&range(tracker.geometry(), 3, 4));
    assert_eq!(tracker.swap().expect("swapped").pages, expected);
    drop(tracker);
    assert_eq!(disk.attach().1, Adopted::Pins(expected));
}

#[test]
fn a_saved_set_that_is_damaged_counts_as_all_pages() {
    let disk = Disk::new(16 * MIB);
    let mut tracker = disk.tracked();
    write_direct(&open_direct(&disk.device), 4096, 4096, 1);
    tracker.swap().expect("swapped");
    let geometry = tracker.geometry();
    drop(tracker);
    let entries = std::fs::read_dir(disk.state()).expect("listed").map(|entry| entry.expect("an entry").path());
    let [path] = entries.collect::<Vec<_>>().try_into().expect("one set is saved");
    let mut bytes = std::fs::read(&path).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).expect("written");
    assert_eq!(disk.attach().1, Adopted::Pins(PageSet::full(geometry)));
}

#[test]
fn saved_sets_without_the_kernel_s_marks_mean_verify() {
    let disk = Disk::new(16 * MIB);
    let mut tracker = disk.tracked();
    write_direct(&open_direct(&disk.device), 4096, 4096, 1);
    tracker.swap().expect("swapped");
    drop(tracker);
    // What a restart of the machine leaves.
    for number in pins::generations(&disk.pins).expect("listed") {
        Generation::remove(&disk.pins.join(number.to_string())).expect("removed");
    }
    let (_, adopted) = disk.attach();
    assert!(matches!(&adopted, Adopted::Mismatch(reason) if reason.contains("marks are gone")), "{adopted:?}");
}

#[test]
fn another_file_behind_the_same_loop_device_is_noticed_while_tracking_and_after() {
    let disk = Disk::new(16 * MIB);
    let mut tracker = disk.tracked();
    let device = disk.device.to_str().expect("UTF-8");
    let other = disk.folder.path().join("other");
    File::create(&other).and_then(|file| file.set_len(16 * MIB)).expect("a file");
    run("losetup", &["--detach", device]);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !Command::new("losetup").arg(device).arg(&other).status().expect("losetup runs").success() {
        assert!(Instant::now() < deadline, "the loop device stays busy");
        std::thread::sleep(Duration::from_millis(20));
    }
    let error = tracker.swap().expect_err("another disk");
    assert!(error.to_string().contains("disk sequence number"), "{error}");
    drop(tracker);
    let (tracker, adopted) = disk.attach();
    assert!(matches!(&adopted, Adopted::Mismatch(reason) if reason.contains("disk sequence number")), "{adopted:?}");
    tracker.detach().expect("detached");
}

#[test]
fn a_disk_that_grew_is_another_disk() {
    let disk = Disk::new(16 * MIB);
    let mut tracker = disk.tracked();
    OpenOptions::new().write(true).open(disk.file()).and_then(|file| file.set_len(24 * MIB)).expect("grown");
    run("losetup", &["--set-capacity", disk.device.to_str().expect("UTF-8")]);
    let error = tracker.swap().expect_err("another size");
    assert!(error.to_string().contains("16777216") && error.to_string().contains("25165824"), "{error}");
    drop(tracker);
    let (tracker, adopted) = disk.attach();
    assert!(matches!(&adopted, Adopted::Mismatch(reason) if reason.contains("size in bytes")), "{adopted:?}");
    assert_eq!(tracker.geometry().disk_bytes(), 24 * MIB);
}

#[test]
fn programs_of_another_release_are_replaced_without_losing_a_mark() {
    let disk = Disk::new(16 * MIB);
    let tracker = disk.tracked();
    let file = open_direct(&disk.device);
    let folder = tracker.generation.folder().to_owned();
    drop(tracker);
    let map = Map::open(&folder.join("identity")).expect("pinned");
    let text = String::from_utf8(map.get().expect("read")).expect("text").replace("program=", "program=0");
    map.set(&text.as_bytes()[..1024]).expect("written");
    write_direct(&file, 4096, 4096, 1);
    let (mut tracker, adopted) = disk.attach();
    assert_eq!(adopted, Adopted::Pins(range(tracker.geometry(), 1, 2)));
    assert!(!folder.exists(), "the older pins are gone");
    write_direct(&file, 8192, 4096, 1);
    assert_eq!(tracker.swap().expect("swapped").pages, range(tracker.geometry(), 2, 3));
    tracker.detach().expect("detached");
}

#[test]
fn pins_of_an_attach_that_did_not_end_are_not_believed() {
    let disk = Disk::new(16 * MIB);
    let tracker = disk.tracked();
    std::fs::remove_file(tracker.generation.folder().join("rq_complete_1")).expect("a pin");
    drop(tracker);
    let (mut tracker, adopted) = disk.attach();
    assert!(matches!(&adopted, Adopted::Mismatch(reason) if reason.contains("incomplete")), "{adopted:?}");
    write_direct(&open_direct(&disk.device), 4096, 4096, 1);
    assert!(contains(&tracker.swap().expect("swapped").pages, 1));
    tracker.detach().expect("detached");
}

#[test]
fn the_end_of_protection_leaves_no_pin_program_map_or_file() {
    let disk = Disk::new(16 * MIB);
    let mut tracker = disk.tracked();
    write_direct(&open_direct(&disk.device), 4096, 4096, 1);
    tracker.swap().expect("swapped");
    let ids: Vec<u32> = ["first", "second", "active", "counts", "identity"]
        .map(|name| Map::open(&tracker.generation.folder().join(name)).expect("pinned").info().expect("known").id)
        .to_vec();
    assert!(disk.pins.exists() && disk.state().exists());
    tracker.detach().expect("detached");
    assert!(!disk.pins.exists() && !disk.state().exists());
    // The kernel frees what nobody holds any more after a grace period. The maps are held by the programs too.
    let deadline = Instant::now() + Duration::from_secs(20);
    while ids.iter().any(|id| map_exists(*id)) {
        assert!(Instant::now() < deadline, "maps are still there");
        std::thread::sleep(Duration::from_millis(10));
    }
    remove_pins(&disk.pins, &disk.state()).expect("nothing to remove is no error");
}

/// Not a test of its own: the process that the next test kills.
#[test]
fn child_that_swaps_until_it_is_killed() {
    let Some(arguments) = std::env::var_os(CHILD) else { return };
    let arguments = arguments.into_string().expect("UTF-8");
    let [device, pins, state]: [&Path; 3] =
        arguments.split('|').map(Path::new).collect::<Vec<_>>().try_into().expect("three paths");
    let device = DeviceId::of(device).expect("a device");
    let (mut tracker, _) = Tracker::attach(&device, pins, state).expect("attached");
    println!("attached");
    loop {
        tracker.swap().expect("swapped");
        println!("swapped");
    }
}

#[test]
fn a_sender_killed_at_any_moment_loses_no_page() {
    let disk = Disk::new(16 * MIB);
    let mut tracker = disk.tracked();
    let geometry = tracker.geometry();
    let file = open_direct(&disk.device);
    let mut numbers = Numbers::new();
    for round in 0..8_u64 {
        tracker.forget(tracker.sequence()).expect("forgotten");
        drop(tracker);
        let arguments =
            [&disk.device, &disk.pins, &disk.state()].map(|path| path.to_str().expect("UTF-8").to_owned()).join("|");
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "capture::ebpf::tests::restarts::child_that_swaps_until_it_is_killed", "--nocapture"])
            .env(CHILD, arguments)
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut wait_for = |what: &str| loop {
            let line = lines.next().expect("the child lives").expect("read");
            if line.contains(what) {
                break;
            }
        };
        wait_for("attached");
        let mut written = PageSet::empty(geometry);
        for step in 0..60 + numbers.below(60) {
            let page = numbers.below(geometry.pages());
            write_direct(&file, page * 4096, 4096, u8::try_from(round + 1).expect("small"));
            written.extend(&range(geometry, page, page + 1));
            if step % 20 == 0 {
                wait_for("swapped");
            }
        }
        child.kill().expect("killed");
        let page = numbers.below(geometry.pages());
        write_direct(&file, page * 4096, 4096, 200);
        written.extend(&range(geometry, page, page + 1));
        child.wait().expect("dead");
        let (next, adopted) = disk.attach();
        assert_eq!(adopted, Adopted::Pins(written), "round {round}");
        tracker = next;
    }
    tracker.detach().expect("detached");
}
