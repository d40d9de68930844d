//! Drills with the real tool: file systems of every kind on partitioned disks, sound ones, torn ones, broken ones.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use blockferry_tests::loops::LoopDevice;
use blockferry_tests::pair::{Pair, check, check_fails, wait_for};
use blockferry_tests::protected::signal_process;
use rustix::process::Signal;
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn drill(pair: &Pair, volume: &str) -> Output {
    let mut command = pair.operator_command("drill");
    command
        .args(["--volume", volume, "--json", "--scratch"])
        .arg(pair.dir.path())
        .arg("--key-file")
        .arg(pair.key_file());
    command.output().expect("it runs")
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

/// Nothing of a drill is left: neither its folder nor a loop device nor a mount.
fn nothing_is_left(pair: &Pair) {
    let names = std::fs::read_dir(pair.dir.path()).expect("a folder").map(|entry| entry.expect("an entry").file_name());
    let left: Vec<_> = names.filter(|name| name.to_string_lossy().starts_with("blockferry-drill")).collect();
    assert!(left.is_empty(), "{left:?}");
    let folder = pair.dir.path().to_string_lossy().into_owned();
    let loops = Command::new("losetup").arg("--list").output().expect("util-linux is installed");
    let loops = String::from_utf8_lossy(&loops.stdout).into_owned();
    assert!(!loops.contains(&format!("{folder}/blockferry-drill")), "{loops}");
    assert!(
        !std::fs::read_to_string("/proc/mounts").expect("readable").contains(&format!("{folder}/blockferry-drill"))
    );
}

fn proof(pair: &Pair, volume: &str) -> String {
    let points = pair.points(volume);
    let newest = points.last().expect("a point");
    assert_eq!(newest["proof_time"].is_string(), newest["proof"] != "committed");
    newest["proof"].as_str().expect("a word").to_owned()
}

/// A disk with an MBR and partitions of these MiB.
fn partitioned(path: &Path, sizes: &[u64]) -> Vec<(u64, u64)> {
    let total: u64 = sizes.iter().sum::<u64>() + 1;
    let file = std::fs::File::create(path).expect("writable");
    file.set_len(total * MIB).expect("sized");
    let mut table = vec![0; 512];
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    let (mut at, mut parts) = (MIB, Vec::new());
    for (number, size) in sizes.iter().enumerate() {
        let entry = &mut table[446 + number * 16..][..16];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&u32::try_from(at / 512).expect("small").to_le_bytes());
        entry[12..16].copy_from_slice(&u32::try_from(size * MIB / 512).expect("small").to_le_bytes());
        parts.push((at, size * MIB));
        at += size * MIB;
    }
    file.write_all_at(&table, 0).expect("writable");
    parts
}

/// Makes a file system in a file of its own and copies it into its partition.
fn format(pair: &Pair, disk: &Path, place: (u64, u64), mkfs: &str, flags: &[&str]) -> PathBuf {
    let image = pair.file(&format!("{mkfs}.part"));
    std::fs::File::create(&image).expect("writable").set_len(place.1).expect("sized");
    check(mkfs, &Command::new(mkfs).args(flags).arg(&image).output().expect("make test-deps installs it"));
    {
        let device = LoopDevice::attach(&image, false);
        if mkfs != "mkswap" {
            let mounted = device.mount(&pair.file("mnt"), "");
            for number in 0..20 {
                let folder = mounted.path().join(format!("folder {number}"));
                std::fs::create_dir(&folder).expect("room");
                std::fs::write(folder.join("file"), vec![number; 5000]).expect("room");
            }
        }
    }
    insert(disk, place.0, &image);
    image
}

fn insert(disk: &Path, at: u64, image: &Path) {
    let bytes = std::fs::read(image).expect("readable");
    let file = std::fs::File::options().write(true).open(disk).expect("there");
    file.write_all_at(&bytes, at).expect("writable");
    file.sync_all().expect("synced");
}

#[test]
fn a_disk_with_file_systems_of_several_kinds_is_checked_and_one_that_is_broken_is_named() {
    let pair = Pair::start();
    let disk = pair.file("disk.img");
    let parts = partitioned(&disk, &[24, 320, 128, 4]);
    format(&pair, &disk, parts[0], "mkfs.ext4", &["-q", "-F"]);
    format(&pair, &disk, parts[1], "mkfs.xfs", &["-q", "-f"]);
    format(&pair, &disk, parts[2], "mkfs.btrfs", &["-q", "-f"]);
    format(&pair, &disk, parts[3], "mkswap", &["-q"]);
    let _ = pair.run_once("disk", &disk);
    let output = drill(&pair, "disk");
    check("drill", &output);
    let found = report(&output);
    let kinds: Vec<_> =
        found["parts"].as_array().expect("parts").iter().map(|part| (&part["kind"], &part["state"])).collect();
    assert_eq!(
        format!("{kinds:?}"),
        format!(
            "{:?}",
            [("ext4", "sound"), ("xfs", "sound"), ("btrfs", "sound"), ("swap", "skipped")]
                .map(|(kind, state)| (Value::from(kind), Value::from(state)))
        )
    );
    assert_eq!(found["parts"][1]["names"], 40, "{found}");
    assert_eq!((found["proof"].as_str(), proof(&pair, "disk").as_str()), (Some("checked"), "checked"));
    nothing_is_left(&pair);

    // The first partition's inodes are overwritten.
    let broken = pair.file("broken");
    std::fs::write(&broken, vec![0xa5; 400 << 10]).expect("writable");
    insert(&disk, parts[0].0 + (200 << 10), &broken);
    let _ = pair.run_once("disk", &disk);
    let output = drill(&pair, "disk");
    check_fails("drill", &output, 1, &["machine/disk", "partition 1 (ext4)"]);
    assert_eq!(report(&output)["proof"], "opened");
    assert_eq!(proof(&pair, "disk"), "opened");
    nothing_is_left(&pair);
}

#[test]
fn a_journal_that_was_not_played_back_is_no_fault_and_what_nobody_knows_is_no_proof() {
    let pair = Pair::start();
    let (torn, noise) = (pair.file("torn.img"), pair.file("noise.img"));
    // A copy of a mounted file system, as a crash-consistent point is one: its journal has work to do.
    std::fs::File::create(&torn).expect("writable").set_len(32 * MIB).expect("sized");
    check("mkfs", &Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&torn).output().expect("installed"));
    let copy = pair.file("copy.img");
    {
        let device = LoopDevice::attach(&torn, false);
        let mounted = device.mount(&pair.file("mnt"), "");
        let open = std::fs::File::create(mounted.path().join("deleted while it is open")).expect("room");
        open.write_all_at(&[7; 100_000], 0).expect("room");
        std::fs::remove_file(mounted.path().join("deleted while it is open")).expect("there");
        (0..50).for_each(|n| std::fs::write(mounted.path().join(n.to_string()), [n; 3000]).expect("room"));
        open.sync_all().expect("synced");
        check(
            "blockdev",
            &Command::new("blockdev").arg("--flushbufs").arg(&device.device).output().expect("installed"),
        );
        let mut from = std::fs::File::open(&device.device).expect("readable");
        std::io::copy(&mut from, &mut std::fs::File::create(&copy).expect("writable")).expect("room");
    }
    let info = Command::new("dumpe2fs").arg("-h").arg(&copy).output().expect("installed");
    assert!(String::from_utf8_lossy(&info.stdout).contains("needs_recovery"), "the copy is not torn");
    let _ = pair.run_once("torn", &copy);
    let output = drill(&pair, "torn");
    check("drill", &output);
    assert_eq!(report(&output)["parts"][0]["state"], "sound");
    assert_eq!(proof(&pair, "torn"), "checked");

    std::fs::write(&noise, vec![0x5a; 3 * 1024 * 1024]).expect("writable");
    let _ = pair.run_once("noise", &noise);
    let output = drill(&pair, "noise");
    check_fails("drill", &output, 3, &["machine/noise", "no file system was recognised"]);
    assert_eq!(proof(&pair, "noise"), "opened");
    nothing_is_left(&pair);
}

/// A program of this name for the drill, found before the system's: it notes its process id and then sleeps.
fn sleeper(pair: &Pair, name: &str) -> (PathBuf, PathBuf) {
    let (folder, note) = (pair.file(&format!("sleeping-{name}")), pair.file(&format!("{name}.pid")));
    std::fs::create_dir(&folder).expect("room");
    let script = format!("#!/bin/sh\necho $$ > {0}.new && mv {0}.new {0}\nexec sleep 600\n", note.display());
    std::fs::write(folder.join(name), script).expect("room");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.join(name), executable).expect("ours");
    (folder, note)
}

/// Starts a drill that comes as far as `program`, and sends it a signal there; its exit code.
fn interrupted(pair: &Pair, program: &str, signal: Signal) -> Option<i32> {
    let (folder, note) = sleeper(pair, program);
    let mut command = pair.operator_command("drill");
    command.args(["--volume", "disk", "--scratch"]).arg(pair.dir.path()).arg("--key-file").arg(pair.key_file());
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{path}", folder.display()));
    let mut drill = command.spawn().expect("it starts");
    let sleeping: u32 = wait_for("the drill to come so far", || std::fs::read_to_string(&note).ok())
        .trim()
        .parse()
        .expect("a process id");
    signal_process(drill.id(), signal);
    let status = wait_for("the drill to end", || drill.try_wait().expect("a child can be asked"));
    // It has no parent any more where the drill was killed.
    if std::path::Path::new(&format!("/proc/{sleeping}")).exists() {
        signal_process(sleeping, Signal::KILL);
    }
    status.code()
}

#[test]
fn a_drill_that_is_told_to_end_leaves_nothing_and_what_a_killed_one_leaves_goes_with_the_next() {
    let pair = Pair::start();
    let disk = pair.file("disk.img");
    std::fs::File::create(&disk).expect("writable").set_len(16 * MIB).expect("sized");
    check("mkfs", &Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&disk).output().expect("installed"));
    let _ = pair.run_once("disk", &disk);

    assert_eq!(interrupted(&pair, "e2fsck", Signal::TERM), Some(143));
    nothing_is_left(&pair);
    assert_eq!(proof(&pair, "disk"), "committed", "what was interrupted proves nothing");

    // Killed while the file system is mounted: folder, mount and loop device stay.
    assert_eq!(interrupted(&pair, "umount", Signal::KILL), None);
    let mounts = || std::fs::read_to_string("/proc/mounts").expect("readable");
    let folder = format!("{}/blockferry-drill", pair.dir.path().display());
    assert!(mounts().contains(&folder), "it was killed too early to leave a mount");
    let output = drill(&pair, "disk");
    check("drill", &output);
    nothing_is_left(&pair);
    assert_eq!(proof(&pair, "disk"), "checked");
}
