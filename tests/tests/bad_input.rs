//! Bad input gets one error that names the thing and the next step, the right exit code, and leaves nothing half-done.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use blockferry_tests::images;
use blockferry_tests::mounts::Tmpfs;
use blockferry_tests::pair::{Pair, check, check_fails, program};

/// A pair with an image of 16 MiB that has one recovery point.
fn pair_with_point() -> (Pair, PathBuf) {
    let pair = Pair::start();
    let image = pair.file("disk.img");
    images::build(&image, 16);
    let _ = pair.run_once("disk", &image);
    (pair, image)
}

/// All objects of the store, relative to it.
fn objects(store: &Path) -> Vec<PathBuf> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).expect("readable") {
            let path = entry.expect("readable").path();
            if path.is_dir() { walk(&path, found) } else { found.push(path) }
        }
    }
    let mut found = Vec::new();
    walk(&store.join("v1"), &mut found);
    found.sort();
    found.iter().map(|path| path.strip_prefix(store).expect("inside").to_owned()).collect()
}

fn flip(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).expect("it is there");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("long enough");
    file.write_all_at(&[byte[0] ^ 0x10], offset).expect("writable");
}

#[test]
fn a_missing_or_too_small_source_is_named() {
    let pair = Pair::start();
    let missing = pair.file("nothing.img");
    let output = pair.sender_command(&[("disk", &missing)]).output().expect("it runs");
    check_fails("missing source", &output, 1, &["nothing.img"]);
    let small = pair.file("small.img");
    std::fs::write(&small, [1; 100]).expect("writable");
    let output = pair.sender_command(&[("disk", &small)]).output().expect("it runs");
    check_fails("small source", &output, 1, &["small.img", "100"]);
    assert!(pair.points_of_all().is_empty(), "a volume was made for a source that can't be read");
}

#[test]
fn a_volume_that_changed_size_is_refused_and_keeps_its_points() {
    let (pair, image) = pair_with_point();
    let file = File::options().write(true).open(&image).expect("it is there");
    file.set_len(15 << 20).expect("it can shrink");
    let output = pair.sender_command(&[("disk", &image)]).output().expect("it runs");
    check_fails("changed size", &output, 1, &["disk", "size"]);
    assert_eq!(pair.points("disk").len(), 1);
}

#[test]
fn a_wrong_or_corrupt_key_file_writes_nothing() {
    let (pair, _) = pair_with_point();
    let target = pair.file("target.img");
    let other = pair.file("other");
    let passphrase = pair.passphrase(&[]);
    check("register", &pair.register(&other, &passphrase, "other").output().expect("it runs"));
    let restore = |key: &Path| {
        let mut command = pair.operator_command("restore");
        command.args(["--volume", "disk"]).arg("--key-file").arg(key).arg("--to").arg(&target);
        command.output().expect("it runs")
    };
    check_fails("another machine's key", &restore(&other.join("blockferry.key")), 1, &["key file"]);
    let corrupt = pair.file("corrupt.key");
    std::fs::copy(pair.key_file(), &corrupt).expect("it can be copied");
    flip(&corrupt, 70);
    check_fails("corrupt key", &restore(&corrupt), 1, &["corrupt.key"]);
    check_fails("missing key", &restore(&pair.file("no.key")), 1, &["no.key"]);
    let left: Vec<_> = std::fs::read_dir(pair.dir.path())
        .expect("readable")
        .map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains("target"))
        .collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

#[test]
fn a_state_file_of_another_version_is_refused_by_its_number() {
    let (pair, image) = pair_with_point();
    let volumes = pair.state.join("volumes");
    let volume = std::fs::read_dir(volumes).expect("there").next().expect("one").expect("readable").path();
    let hashes = volume.join("hashes");
    let file = File::options().write(true).open(&hashes).expect("it is there");
    // Both copies of the header: the version stands after the magic.
    for slot in [0, 4096] {
        file.write_all_at(&9_u16.to_le_bytes(), slot + 8).expect("writable");
    }
    let output = pair.sender_command(&[("disk", &image)]).output().expect("it runs");
    check_fails("another version", &output, 1, &["hashes", "version 9"]);
}

#[test]
fn an_unknown_flag_is_a_usage_error() {
    for name in ["blockferry-sender", "blockferry-receiver", "blockferry"] {
        let output = program(name).arg("--no-such-flag").output().expect("it runs");
        assert_eq!(output.status.code(), Some(2), "{name}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("--no-such-flag"), "{name}");
    }
}

#[test]
fn a_store_without_credentials_or_that_cannot_be_written_is_named() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let run = |store: &str| {
        let mut command = program("blockferry-receiver");
        command.args(["run", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--store", store]);
        command.arg("--data-dir").arg(dir.path().join("data"));
        for (variable, _) in std::env::vars_os().filter(|(name, _)| {
            let name = name.to_string_lossy();
            ["AWS_", "AZURE_", "GOOGLE_"].iter().any(|prefix| name.starts_with(prefix))
        }) {
            command.env_remove(variable);
        }
        command.output().expect("it runs")
    };
    check_fails("s3 without credentials", &run("s3://bucket/prefix"), 1, &["AWS_"]);
    check_fails("unknown scheme", &run("ftp://host/x"), 1, &["ftp"]);
    let mount = Tmpfs::mount(&dir.path().join("store"), 1 << 20);
    mount.read_only();
    let url = format!("file://{}", dir.path().join("store").display());
    check_fails("read-only store", &run(&url), 1, &["store", "read-write"]);
}

#[test]
fn a_read_only_or_full_state_directory_is_named() {
    let mut pair = Pair::start();
    let image = pair.file("disk.img");
    images::build(&image, 16);
    let _ = pair.run_once("disk", &image);
    let small = pair.file("small-state");
    let mount = Tmpfs::mount(&small, 1 << 20);
    check(
        "cp",
        &std::process::Command::new("cp").arg("-a").arg(pair.state.join(".")).arg(&small).output().expect("cp runs"),
    );
    pair.state = small;
    let _ = images::churn(&image, 500, 3);
    mount.fill();
    let output = pair.sender_command(&[("disk", &image)]).output().expect("it runs");
    check_fails("full state directory", &output, 1, &["small-state"]);
    mount.free();
    // Nothing half-done: with room again the run succeeds, and the point is right.
    let _ = pair.run_once("disk", &image);
    pair.restores_to("disk", "latest", &image);
    let _ = images::churn(&image, 50, 4);
    mount.read_only();
    let output = pair.sender_command(&[("disk", &image)]).output().expect("it runs");
    check_fails("read-only state directory", &output, 1, &["small-state"]);
}

#[test]
fn a_full_or_read_only_stage_directory_is_named() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let data = dir.path().join("data");
    let mount = Tmpfs::mount(&data, 64 << 20);
    mount.fill();
    let run = || {
        let mut command = program("blockferry-receiver");
        command.args(["run", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]);
        command.arg("--store").arg(format!("file://{}", dir.path().join("store").display()));
        command.arg("--data-dir").arg(&data).output().expect("it runs")
    };
    check_fails("full data directory", &run(), 1, &["data"]);
    mount.free();
    mount.read_only();
    check_fails("read-only data directory", &run(), 1, &["data"]);
}

#[test]
fn a_budget_under_the_minimum_is_a_usage_error_that_names_it() {
    let pair = Pair::start();
    let image = pair.file("disk.img");
    let mut sender = program("blockferry-sender");
    sender.args(["run", "--once", "--memory-budget", "10MiB"]).arg("--state-dir").arg(&pair.state);
    let output = sender.arg("--volume").arg(format!("disk={}", image.display())).output().expect("it runs");
    check_fails("sender budget", &output, 2, &["10", "64", "--memory-budget"]);
    let mut receiver = program("blockferry-receiver");
    receiver.args(["run", "--memory-budget", "100MiB", "--store", "file:///nowhere", "--data-dir", "/nowhere"]);
    check_fails("receiver budget", &receiver.output().expect("it runs"), 2, &["100", "128", "--memory-budget"]);
}

#[test]
fn a_port_that_is_taken_is_named() {
    let pair = Pair::start();
    let data = pair.file("second");
    std::fs::create_dir_all(&data).expect("a directory");
    std::fs::copy(pair.data.join("authority.key"), data.join("authority.key")).expect("it can be copied");
    let run = |listen: &str, metrics: &str| {
        let mut command = program("blockferry-receiver");
        command.args(["run", "--listen", listen, "--metrics-listen", metrics, "--store", &pair.store_url()]);
        command.arg("--data-dir").arg(&data).output().expect("it runs")
    };
    check_fails("taken port", &run(pair.listen(), "127.0.0.1:0"), 1, &[pair.listen(), "--listen"]);
    check_fails("taken metrics port", &run("127.0.0.1:0", pair.listen()), 1, &[pair.listen(), "--metrics-listen"]);
}

#[test]
fn a_passphrase_file_with_a_line_too_many_is_refused() {
    let pair = Pair::start();
    let passphrase = pair.passphrase(&[]);
    let mut text = std::fs::read_to_string(&passphrase).expect("readable");
    text.push_str("one more\n");
    std::fs::write(&passphrase, text).expect("writable");
    let state = pair.file("second");
    let output = pair.register(&state, &passphrase, "second").output().expect("it runs");
    check_fails("line too many", &output, 1, &["passphrase"]);
    assert!(!state.join("blockferry.key").exists(), "a key file was made for nothing");
}

#[test]
fn a_flipped_byte_in_any_object_of_the_store_makes_verify_name_it() {
    let (mut pair, image) = pair_with_point();
    let _ = images::churn(&image, 100, 1);
    let _ = pair.run_once("disk", &image);
    assert_eq!(pair.stop_receiver(), Some(143));
    let verify = || pair.operator_command("verify").args(["--volume", "disk"]).output().expect("it runs");
    check("verify of the untouched store", &verify());
    let found = objects(&pair.store);
    assert!(found.len() >= 7, "too few objects to be the whole store: {found:?}");
    for object in found {
        let path = pair.store.join(&object);
        let size = std::fs::metadata(&path).expect("there").len();
        for offset in [0, size / 3, size / 2, size - 1] {
            flip(&path, offset);
            let what = format!("byte {offset} of {}", object.display());
            check_fails(&what, &verify(), 1, &[&object.to_string_lossy()]);
            flip(&path, offset);
        }
    }
    check("verify of the mended store", &verify());
}

#[test]
fn a_missing_or_truncated_object_is_named() {
    let (mut pair, image) = pair_with_point();
    let _ = images::churn(&image, 100, 1);
    let _ = pair.run_once("disk", &image);
    assert_eq!(pair.stop_receiver(), Some(143));
    let verify = || pair.operator_command("verify").args(["--volume", "disk"]).output().expect("it runs");
    let of_volume = |object: &PathBuf| {
        let name = object.to_string_lossy();
        name.contains("/segments/") || name.contains("/log/")
    };
    for object in objects(&pair.store).into_iter().filter(of_volume) {
        let path = pair.store.join(&object);
        let bytes = std::fs::read(&path).expect("readable");
        std::fs::write(&path, &bytes[..bytes.len() - 1]).expect("writable");
        check_fails("truncated", &verify(), 1, &[&object.to_string_lossy()]);
        // The newest log entry may go unseen: nothing after it names it. `--expect-head` is for that.
        let newest = object.to_string_lossy().contains("/log/") && !later_log_exists(&pair.store, &object);
        if !newest {
            std::fs::remove_file(&path).expect("removable");
            check_fails("missing", &verify(), 1, &[&object.to_string_lossy()]);
        }
        std::fs::write(&path, &bytes).expect("writable");
    }
    check("verify of the mended store", &verify());
}

fn later_log_exists(store: &Path, object: &Path) -> bool {
    let folder = store.join(object).parent().expect("a folder").to_owned();
    std::fs::read_dir(folder)
        .expect("readable")
        .any(|entry| entry.expect("readable").file_name() > *object.file_name().expect("a name"))
}

#[test]
fn restore_never_overwrites_without_force() {
    let (pair, image) = pair_with_point();
    let target = pair.file("target.img");
    std::fs::write(&target, b"precious").expect("writable");
    let output = pair.restore_command("disk", "latest", &target).output().expect("it runs");
    check_fails("existing file", &output, 1, &["target.img", "--force"]);
    assert_eq!(std::fs::read(&target).expect("readable"), b"precious");
    check("--force", &pair.restore_command("disk", "latest", &target).arg("--force").output().expect("it runs"));
    blockferry_tests::pair::assert_same_content(&target, &image);
}
