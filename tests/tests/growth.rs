//! Volumes whose disks grow, shrink, or move to other machines and state directories, with real binaries.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use blockferry_tests::images;
use blockferry_tests::pair::{Pair, check, check_fails, program, wait_for};

fn resize(image: &Path, bytes: u64) {
    File::options().write(true).open(image).expect("there").set_len(bytes).expect("it can be resized");
}

fn write(image: &Path, bytes: &[u8], at: u64) {
    File::options().write(true).open(image).expect("there").write_all_at(bytes, at).expect("written");
}

fn tool(pair: &Pair, command: &str) -> Command {
    let mut tool = program("blockferry-sender");
    tool.arg(command).arg("--state-dir").arg(&pair.state);
    tool
}

#[test]
fn a_disk_that_grew_is_replicated_without_being_sent_again_and_every_point_keeps_its_size() {
    let pair = Pair::start();
    let (image, small) = (pair.file("disk.img"), pair.file("small.img"));
    images::build(&image, 48);
    // The smaller disk ends within a page.
    let before = (48 << 20) - 1234;
    resize(&image, before);
    let first = pair.run_once("disk", &image);
    assert!(first.number("bytes_changed") >= before - 4096);
    std::fs::copy(&image, &small).expect("copied");

    resize(&image, 72 << 20);
    write(&image, b"behind the old end", before);
    write(&image, b"far behind it", 60 << 20);
    write(&image, b"and before it", 4096);
    let grown = pair.run_once("disk", &image);
    assert_eq!(grown.number("bytes_read"), 72 << 20);
    // What is new and three pages; zeros are stated, which costs next to nothing.
    assert!(grown.number("bytes_changed") <= (24 << 20) + 4 * 4096, "{grown:?}");
    assert!(grown.number("bytes_sent") < 1 << 20, "{} sent", grown.number("bytes_sent"));
    let third = pair.run_once("disk", &image);
    assert_eq!((third.number("bytes_changed"), third.number("records_sent")), (0, 0));

    let points = pair.points("disk");
    assert_eq!(points.len(), 3);
    let id = |at: usize| points[at]["id"].as_str().expect("an id").to_owned();
    pair.restores_to("disk", &id(0), &small);
    pair.restores_to("disk", &id(1), &image);
    pair.restores_to("disk", "latest", &image);
    let verify = pair.operator_command("verify").args(["--volume", "disk", "--key-file"]).arg(pair.key_file()).output();
    check("verify", &verify.expect("it runs"));
}

#[test]
fn a_disk_that_grew_while_closes_were_on_their_way_loses_nothing() {
    let mut pair = Pair::start();
    let image = pair.file("disk.img");
    images::build(&image, 32);
    let _ = pair.run_once("disk", &image);
    images::churn(&image, 400, 3);
    // Killed in the middle, once and again: epochs of the smaller disk stay staged, journaled, or half sent.
    for turn in 0..3 {
        let mut sender =
            pair.sender_command(&[("disk", &image)]).args(["--epoch-size", "1MiB"]).spawn().expect("it runs");
        let before = pair.receiver_metric("blockferry_receiver_received_bytes_total");
        wait_for("records of this run, or its end", || {
            let ended = sender.try_wait().expect("a child can be asked").is_some();
            (ended || pair.receiver_metric("blockferry_receiver_received_bytes_total") > before).then_some(())
        });
        let _ = sender.kill();
        sender.wait().expect("a child can be waited for");
        images::churn(&image, 100, 7 + turn);
    }
    resize(&image, 40 << 20);
    pair.kill_receiver();
    pair.start_receiver();
    let _ = pair.run_once("disk", &image);
    pair.restores_to("disk", "latest", &image);
}

#[test]
fn a_disk_that_shrank_is_refused_by_name_and_its_points_stay() {
    let pair = Pair::start();
    let (image, whole) = (pair.file("disk.img"), pair.file("whole.img"));
    images::build(&image, 16);
    std::fs::copy(&image, &whole).expect("copied");
    let _ = pair.run_once("disk", &image);
    resize(&image, 12 << 20);
    let output = pair.sender_command(&[("disk", &image)]).output().expect("it runs");
    check_fails("shrunk", &output, 1, &["volume disk", "disk.img", "size"]);
    pair.restores_to("disk", "latest", &whole);
}

#[test]
fn a_rolled_back_state_is_refused_until_it_is_adopted() {
    let pair = Pair::start();
    let image = pair.file("disk.img");
    images::build(&image, 16);
    let _ = pair.run_once("disk", &image);
    let copy = pair.file("copy");
    check("cp", &Command::new("cp").arg("-a").arg(&pair.state).arg(&copy).output().expect("it runs"));
    images::churn(&image, 50, 3);
    let _ = pair.run_once("disk", &image);
    // The copy knows less than the store.
    std::fs::rename(&pair.state, pair.file("original")).expect("moved");
    std::fs::rename(&copy, &pair.state).expect("moved");
    images::churn(&image, 50, 4);
    let output = pair.sender_command(&[("disk", &image)]).output().expect("it runs");
    check_fails("diverged", &output, 1, &["disk", "adopt"]);
    let adopted = tool(&pair, "adopt").args(["--volume", "disk"]).output().expect("it runs");
    check("adopt", &adopted);
    let _ = pair.run_once("disk", &image);
    pair.restores_to("disk", "latest", &image);
    assert_eq!(pair.points("disk").len(), 3, "the history goes on");
    // Now the original is the one that is behind.
    std::fs::rename(&pair.state, pair.file("adopted")).expect("moved");
    std::fs::rename(pair.file("original"), &pair.state).expect("moved");
    let output = pair.sender_command(&[("disk", &image)]).output().expect("it runs");
    check_fails("diverged", &output, 1, &["disk", "adopt"]);
}

#[test]
fn a_detached_volume_leaves_nothing_on_the_machine_and_everything_in_the_store() {
    let pair = Pair::start();
    let (image, other) = (pair.file("disk.img"), pair.file("other.img"));
    images::build(&image, 16);
    images::build(&other, 16);
    let _ = pair.run_once("disk", &image);
    let _ = pair.run_once("other", &other);
    let status = tool(&pair, "status").arg("--json").output().expect("it runs");
    check("status", &status);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).expect("JSON");
    assert_eq!(status["running"], false);
    assert_eq!(status["volumes"]["disk"]["path"], image.display().to_string());

    let missing = tool(&pair, "detach").args(["--volume", "none"]).output().expect("it runs");
    check_fails("no such volume", &missing, 1, &["none", "disk"]);
    check("detach", &tool(&pair, "detach").args(["--volume", "disk"]).output().expect("it runs"));
    let left = std::fs::read_dir(pair.state.join("volumes")).expect("there").count();
    assert_eq!(left, 1, "only the other volume's state is left");
    check("detach", &tool(&pair, "detach").arg("--all").output().expect("it runs"));
    assert_eq!(std::fs::read_dir(pair.state.join("volumes")).expect("there").count(), 0);
    pair.restores_to("disk", "latest", &image);

    // Its name is taken in the store; adopting goes on with it.
    let output = pair.sender_command(&[("disk", &image)]).output().expect("it runs");
    check_fails("no state", &output, 1, &["disk", "adopt"]);
    let adopt = format!("disk={}", image.display());
    check("adopt", &tool(&pair, "adopt").args(["--volume", &adopt]).output().expect("it runs"));
    images::churn(&image, 50, 4);
    let _ = pair.run_once("disk", &image);
    pair.restores_to("disk", "latest", &image);
}

#[test]
fn preflight_finds_the_receiver_and_says_what_is_missing() {
    let pair = Pair::start();
    let image = pair.file("disk.img");
    images::build(&image, 16);
    let volume = format!("disk={}", image.display());
    let output = tool(&pair, "preflight").args(["--json", "--volume", &volume]).output().expect("it runs");
    assert!(matches!(output.status.code(), Some(0 | 3)), "{output:?}");
    let findings: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let of = |subject: &str| -> Vec<&serde_json::Value> {
        findings.as_array().expect("an array").iter().filter(|finding| finding["subject"] == subject).collect()
    };
    assert_eq!(of("receiver").len(), 2, "TCP and UDP: {findings}");
    assert!(of("receiver").iter().chain(&of("volume disk")).all(|finding| finding["level"] == "ok"), "{findings}");
    let missing = format!("disk={}", pair.file("missing.img").display());
    let output = tool(&pair, "preflight").args(["--volume", &missing, "-i", "127.0.0.1:1"]).output().expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("missing.img") && text.contains("127.0.0.1:1") && text.contains("next:"), "{text}");
}
