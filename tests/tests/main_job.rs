//! The main job with real binaries: several disks in one sender, devices as sources and targets, drains, addresses.

use std::process::Command;

use blockferry_tests::images;
use blockferry_tests::pair::{Pair, assert_same_content, check, check_fails, http_get, program, wait_for};

#[test]
fn several_disks_replicate_in_one_run_and_restore_identical() {
    let pair = Pair::start();
    let (a, b) = (pair.file("a.img"), pair.file("b.img"));
    images::build(&a, 48);
    images::build(&b, 16);
    // An odd size: the last page is partial.
    std::fs::File::options().write(true).open(&b).expect("there").set_len((16 << 20) - 1234).expect("it can shrink");
    let output = pair.sender_command(&[("a", &a), ("b", &b)]).output().expect("it runs");
    check("run --once", &output);
    let lines = String::from_utf8_lossy(&output.stdout).into_owned();
    let volumes: Vec<serde_json::Value> =
        serde_json::Deserializer::from_str(&lines).into_iter().map(|value| value.expect("JSON")).collect();
    assert_eq!(volumes.len(), 2, "{lines}");
    pair.restores_to("a", "latest", &a);
    pair.restores_to("machine/b", "latest", &b);
    check("verify", &pair.operator_command("verify").args(["--volume", "a"]).output().expect("it runs"));
    let verify =
        pair.operator_command("verify").args(["--volume", "b"]).arg("--key-file").arg(pair.key_file()).output();
    check("verify with the key", &verify.expect("it runs"));
}

#[test]
fn only_the_pages_that_differ_travel() {
    let pair = Pair::start();
    let image = pair.file("disk.img");
    images::build(&image, 64);
    let first = pair.run_once("disk", &image);
    assert!(first.number("bytes_read") >= 64 << 20);
    let changed = images::churn(&image, 160, 5);
    let second = pair.run_once("disk", &image);
    assert_eq!(second.number("bytes_changed"), changed);
    assert!(
        second.number("bytes_sent") * 10 <= changed * 14,
        "{} sent for {changed} changed",
        second.number("bytes_sent")
    );
    let third = pair.run_once("disk", &image);
    assert_eq!((third.number("bytes_changed"), third.number("records_sent")), (0, 0));
    let points = pair.points("disk");
    assert_eq!(points.len(), 3, "a quiet disk still gets its point");
    assert!(points.iter().all(|point| point["consistency"] == "crash"), "{points:?}");
    pair.restores_to("disk", "latest", &image);
}

#[test]
fn a_point_read_while_the_image_is_open_for_writing_is_fuzzy_and_not_latest() {
    let pair = Pair::start();
    let image = pair.file("disk.img");
    images::build(&image, 16);
    let writer = std::fs::File::options().write(true).open(&image).expect("there");
    let output = pair.sender_command(&[("disk", &image)]).output().expect("it runs");
    assert_eq!(output.status.code(), Some(3), "weaker than asked for: {}", String::from_utf8_lossy(&output.stderr));
    drop(writer);
    assert_eq!(pair.points("disk")[0]["consistency"], "fuzzy");
    let target = pair.file("target.img");
    let output = pair.restore_command("disk", "latest", &target).output().expect("it runs");
    check_fails("latest", &output, 1, &["fuzzy"]);
    let id = pair.points("disk")[0]["id"].as_str().expect("an id").to_owned();
    pair.restores_to("disk", &id, &image);
}

#[test]
fn a_loop_device_replicates_and_restores_onto_another() {
    let pair = Pair::start();
    let (image, other) = (pair.file("disk.img"), pair.file("other.img"));
    images::build(&image, 32);
    std::fs::File::create(&other).expect("a file").set_len(32 << 20).expect("sized");
    let attach = |file: &std::path::Path| {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().expect("util-linux");
        check("losetup (tests need root and loop devices)", &output);
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    let (source, target) = (attach(&image), attach(&other));
    let _ = pair.run_once("disk", source.as_ref());
    assert_eq!(pair.points("disk")[0]["consistency"], "crash");
    let restore = pair.restore_command("disk", "latest", target.as_ref()).output().expect("it runs");
    for device in [&source, &target] {
        check("losetup -d", &Command::new("losetup").args(["-d", device]).output().expect("util-linux"));
    }
    check("restore onto an empty device", &restore);
    assert_same_content(&other, &image);
}

#[test]
fn a_clean_shutdown_drains_and_the_store_alone_is_enough() {
    let mut pair = Pair::start();
    let image = pair.file("disk.img");
    images::build(&image, 32);
    let _ = pair.run_once("disk", &image);
    assert_eq!(pair.stop_receiver(), Some(143), "128 + SIGTERM");
    std::fs::remove_dir_all(&pair.data).expect("the receiver's directory can go");
    pair.restores_to("disk", "latest", &image);
}

#[test]
fn a_continuous_run_makes_points_and_ends_on_sigterm() {
    let pair = Pair::start();
    let image = pair.file("disk.img");
    images::build(&image, 16);
    let mut command = program("blockferry-sender");
    command.args(["run", "--point-interval", "50ms", "--metrics-listen", "127.0.0.1:0", "--memory-budget", "128MiB"]);
    command.arg("--state-dir").arg(&pair.state).arg("--volume").arg(format!("disk={}", image.display()));
    let mut child = command.spawn().expect("the sender starts");
    wait_for("a point", || (!pair.points_of_all().is_empty()).then_some(()));
    images::churn(&image, 10, 1);
    // A pass that met the changes while they were made gives a fuzzy point, which is not the latest.
    let crash = |point: &serde_json::Value| point["consistency"] == "crash";
    wait_for("a point of what changed", || {
        (pair.points_of_all().iter().filter(|&point| crash(point)).count() >= 2).then_some(())
    });
    blockferry_tests::pair::terminate(&child);
    let status = wait_for("the sender's end", || child.try_wait().expect("a child can be asked"));
    assert_eq!(status.code(), Some(143));
    pair.restores_to("disk", "latest", &image);
}

#[test]
fn a_receiver_is_reached_by_name_and_over_ipv6() {
    for listen in ["localhost", "[::1]"] {
        let pair = Pair::start_in(
            tempfile::tempdir_in("/var/tmp").expect("a temporary directory"),
            None,
            if listen == "[::1]" { &["--listen", "[::1]:0"] } else { &[] },
        );
        let port = pair.listen().rsplit(':').next().expect("a port").to_owned();
        let passphrase = pair.passphrase(&[]);
        let state = pair.file("named");
        let mut register = program("blockferry-sender");
        register.args(["register", "--name", "named", "-i", &format!("{listen}:{port}")]);
        let output = register.arg("-P").arg(passphrase).arg("--state-dir").arg(&state).output().expect("it runs");
        check("register", &output);
        let image = pair.file("disk.img");
        images::build(&image, 16);
        let mut run = program("blockferry-sender");
        run.args(["run", "--once", "--metrics-listen", "127.0.0.1:0"]).arg("--state-dir").arg(&state);
        let output = run.arg("--volume").arg(format!("disk={}", image.display())).output().expect("it runs");
        check("run --once", &output);
        pair.restores_with(&state.join("blockferry.key"), "named/disk", "latest", &image);
    }
}

#[test]
fn metrics_and_health_answer_on_both_ends_and_promtool_finds_no_fault() {
    let pair = Pair::start();
    let image = pair.file("disk.img");
    images::build(&image, 16);
    let _ = pair.run_once("disk", &image);
    let address = pair.metrics_address();
    assert_eq!(http_get(address, "/healthz").expect("answered").trim(), "ok");
    assert!(http_get(address, "/readyz").is_ok());
    let metrics = http_get(address, "/metrics").expect("answered");
    for name in [
        "blockferry_receiver_received_bytes_total",
        "blockferry_receiver_stage_used_bytes",
        "blockferry_receiver_committed_bytes_total",
        "blockferry_receiver_points_total",
    ] {
        assert!(metrics.contains(name), "{name} is missing:\n{metrics}");
    }
    check_with_promtool(&metrics);
    // The sender's, while it runs.
    let mut command = program("blockferry-sender");
    command.args(["run", "--point-interval", "1h", "--metrics-listen", "127.0.0.1:0", "--log-format", "json"]);
    command.arg("--state-dir").arg(&pair.state).arg("--volume").arg(format!("disk={}", image.display()));
    let log = pair.file("sender.log");
    let mut child = command.stderr(std::fs::File::create(&log).expect("a file")).spawn().expect("the sender starts");
    let address = wait_for("the sender's metrics endpoint", || {
        let text = std::fs::read_to_string(&log).ok()?;
        let line = text.lines().find(|line| line.contains("metrics endpoint open"))?;
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        line.pointer("/fields/address").or_else(|| line.get("address"))?.as_str().map(str::to_owned)
    });
    let metrics = wait_for("the sender's point", || {
        let text = http_get(&address, "/metrics").ok()?;
        text.contains("blockferry_sender_rpo_seconds{").then_some(text)
    });
    for name in [
        "blockferry_sender_memory_budget_bytes",
        "blockferry_sender_memory_used_bytes",
        "blockferry_sender_source_read_bytes_total",
        "blockferry_sender_captured_bytes_total",
        "blockferry_sender_sent_bytes_total",
    ] {
        assert!(metrics.contains(name), "{name} is missing:\n{metrics}");
    }
    check_with_promtool(&metrics);
    child.kill().expect("a child can be killed");
    child.wait().expect("a child can be waited for");
}

fn check_with_promtool(metrics: &str) {
    use std::io::Write;
    use std::process::Stdio;
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = promtool.spawn().expect("promtool is installed by make deps");
    child.stdin.take().expect("piped").write_all(metrics.as_bytes()).expect("it reads");
    check("promtool check metrics", &child.wait_with_output().expect("it ends"));
}
