//! The open format: a reader written by `docs/formats` alone restores the same bytes as the operator's tool.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use blockferry_tests::images::{PAGE, Random};
use blockferry_tests::pair::{Pair, assert_same_content, check, program};
use blockferry_tests::servers::tools_dir;

/// An odd size, so that the last page is partial.
const DISK: u64 = (9 << 20) + 12_345;

fn reader() -> Command {
    // The Makefile installs there what the reader needs beside the standard library.
    let python = tools_dir().join("venv/bin/python3");
    let tests = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").expect("cargo says where the crate lies"));
    let mut command = Command::new(python);
    command.arg("-B").arg(tests.join("reader/restore.py"));
    command
}

fn read(pair: &Pair, volume: &str, key_file: &Path, to: &Path, point: &str) -> Output {
    let mut command = reader();
    command.arg(&pair.store).arg(volume).arg(key_file).arg(to).arg(point);
    command.output().expect("make test-deps installs it")
}

/// Rewrites a few pages of the disk: noise, text, zeros, and whole blocks of zeros.
fn change(disk: &Path, seed: u64) {
    let file = std::fs::File::options().write(true).open(disk).expect("there");
    let mut random = Random(seed);
    for _ in 0..24 {
        let at = random.below(DISK / PAGE as u64) * PAGE as u64;
        let bytes = match random.below(4) {
            0 => vec![0; PAGE],
            1 => vec![0; 300_000],
            _ => random.page(),
        };
        let room = usize::try_from(DISK - at).expect("small");
        file.write_all_at(&bytes[..bytes.len().min(room)], at).expect("writable");
    }
    file.sync_all().expect("synced");
}

#[test]
fn every_point_is_restored_by_a_stranger_who_knows_the_formats_only() {
    let pair = Pair::start();
    let disk = pair.file("disk.img");
    let mut random = Random(7);
    // Noise, then text, then zeros, and one last partial page.
    let mut content: Vec<u8> = (0..(3 << 20) / 8).flat_map(|_| random.number().to_le_bytes()).collect();
    (0..512).for_each(|number| content.extend(format!("{number:08} text ").into_bytes().iter().cycle().take(PAGE)));
    content.resize(usize::try_from(DISK).expect("small"), 0);
    content.extend_from_slice(b"the end");
    content.drain(..7);
    std::fs::write(&disk, content).expect("writable");
    for seed in 0..4 {
        let _ = pair.run_once("disk", &disk);
        change(&disk, seed);
    }
    assert_eq!(reads_all_points(&pair).len(), 4);
    refuses_what_was_altered(&pair);
}

/// Every point that is offered comes out as the tool restores it; their ids.
fn reads_all_points(pair: &Pair) -> Vec<String> {
    let points = pair.points("disk");
    let ids: Vec<String> = points.iter().map(|point| point["id"].as_str().expect("an id").to_owned()).collect();
    for id in &ids {
        let (theirs, ours) = (pair.file("theirs.img"), pair.file("ours.img"));
        check("restore.py", &read(pair, "machine/disk", &pair.key_file(), &theirs, &id[..16]));
        check("restore", &pair.restore_command("disk", id, &ours).output().expect("it runs"));
        assert_same_content(&theirs, &ours);
        std::fs::remove_file(&theirs).expect("there");
        std::fs::remove_file(&ours).expect("there");
    }
    ids
}

fn prune(pair: &Pair, more: &[&str]) -> serde_json::Value {
    let mut command = pair.operator_command("prune");
    let output = command.args(["--grace", "0s", "--json"]).args(more).output().expect("it runs");
    check("prune", &output);
    let rows: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    rows[0].clone()
}

#[test]
fn a_volume_that_was_collected_is_read_by_a_stranger_too() {
    let pair = Pair::start();
    let disk = pair.file("disk.img");
    let mut random = Random(21);
    for seed in 0..7 {
        // Most of the disk anew each time, so that a collection has something to give up and to write anew.
        let mut content: Vec<u8> = (0..DISK / 8 / 4 * 3).flat_map(|_| random.number().to_le_bytes()).collect();
        content.resize(usize::try_from(DISK).expect("small"), 0);
        if seed % 2 == 1 {
            content = std::fs::read(&disk).expect("there");
        }
        std::fs::write(&disk, content).expect("writable");
        change(&disk, seed);
        let _ = pair.run_once("disk", &disk);
    }
    let before = reads_all_points(&pair);
    assert_eq!(before.len(), 7);
    let mut policy = program("blockferry");
    policy.args(["policy", "set", "--store", &pair.store_url(), "--volume", "disk", "latest 3"]);
    check("policy set", &policy.output().expect("it runs"));
    let done = prune(&pair, &[]);
    assert!(done["points_expired"] == 4 && done["segments_rewritten"].as_u64() > Some(0), "{done}");
    // First with the old segments still there, then without.
    assert_eq!(reads_all_points(&pair), before[4..]);
    assert!(prune(&pair, &[])["objects_deleted"].as_u64() > Some(0));
    assert_eq!(reads_all_points(&pair), before[4..]);
    let to = pair.file("expired.img");
    let output = read(&pair, "disk", &pair.key_file(), &to, &before[0][..16]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("0 points fit"), "{said}");
    refuses_what_was_altered(&pair);
}

/// A byte anywhere in what the newest point needs, and the reader refuses as the tool does.
fn refuses_what_was_altered(pair: &Pair) {
    let volume =
        std::fs::read_dir(pair.store.join("v1/volumes")).expect("a folder").next().expect("one").expect("one").path();
    let to = pair.file("altered.img");
    for folder in ["log", "segments"] {
        for entry in std::fs::read_dir(volume.join(folder)).expect("a folder") {
            let path = entry.expect("an entry").path();
            let good = std::fs::read(&path).expect("readable");
            let mut bad = good.clone();
            bad[good.len() / 2] ^= 1;
            std::fs::write(&path, &bad).expect("writable");
            let output = read(pair, "disk", &pair.key_file(), &to, "");
            std::fs::write(&path, &good).expect("writable");
            // An old record that no page of the newest point comes from is not opened.
            if output.status.success() && folder == "segments" {
                assert_same_content(&to, &restored(pair));
            } else {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(!output.status.success() && said.contains("restore.py: "), "{}: {said}", path.display());
            }
            let _ = std::fs::remove_file(&to);
        }
    }
}

fn restored(pair: &Pair) -> PathBuf {
    let to = pair.file("newest.img");
    if !to.exists() {
        check("restore", &pair.restore_command("disk", "latest", &to).output().expect("it runs"));
    }
    to
}
