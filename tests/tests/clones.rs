//! A copy of the sender's state directory, and one rolled back to an earlier copy: refused by name, and brought back by `adopt`.

#![allow(clippy::panic, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;

use blockferry_tests::conformance::drive;
use blockferry_tests::conformance::history::History;
use blockferry_tests::images;
use blockferry_tests::pair::{Pair, check, check_fails, wait_for};
use blockferry_tests::protected::Protected;

fn copy(from: &Path, to: &Path) {
    check("cp", &Command::new("cp").arg("-a").arg(from).arg(to).output().expect("coreutils are installed"));
}

/// How a state directory came to be an old one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Old {
    /// Copied, and the copy used while the first one goes on.
    Cloned,
    /// Put back to an earlier copy.
    RolledBack,
}

fn refused_until_adopted(capture: &str, old: Old) {
    let mut pair = Pair::start();
    let image = pair.file("disk.img");
    images::build(&image, 32);
    let listen = if capture == "nbd" { format!(",listen={}", pair.file("nbd.sock").display()) } else { String::new() };
    let volume = format!("disk={},capture={capture}{listen}", image.display());
    let copied: PathBuf = pair.file("copied");

    // Two lives of the original, with a copy of its state made between them.
    let mut sender = Protected::start(&pair, &[&volume], &[]);
    drive::ask(&mut sender, "disk", &History::default());
    sender.stop();
    copy(&pair.state, &copied);
    let _ = images::churn(&image, 500, 1);
    sender.restart();
    drive::ask(&mut sender, "disk", &History::default());
    sender.stop();

    let original = pair.state.clone();
    if old == Old::RolledBack {
        std::fs::rename(&original, pair.file("newest")).expect("it can be moved");
        std::fs::rename(&copied, &original).expect("it can be moved");
    } else {
        pair.state = copied;
    }
    let _ = images::churn(&image, 500, 2);
    let points = pair.points("disk").len();
    let mut copy = Protected::start(&pair, &[&volume], &[]);
    let refusal = wait_for("the refusal", || {
        let log = copy.log();
        log.lines().find(|line| line.contains("disk") && line.contains("adopt")).map(str::to_owned)
    });
    assert!(refusal.contains("clone") || refusal.contains("copy") || refusal.contains("rolled back"), "{refusal}");
    copy.kill();
    let once = pair.sender_command(&[]).arg("--volume").arg(volume.split(",capture").next().expect("a path")).output();
    check_fails("a run of the copy", &once.expect("it runs"), 1, &["disk", "adopt"]);
    assert_eq!(pair.points("disk").len(), points, "the copy made no point");

    check("adopt", &copy.tool("adopt").args(["--volume", "disk"]).output().expect("it runs"));
    copy.restart();
    let (_, id) = drive::ask(&mut copy, "disk", &History::default());
    pair.restores_to("disk", &id, &image);
    copy.stop();

    if old == Old::Cloned {
        // Now it is the original that is behind.
        pair.state = original;
        let once = pair.sender_command(&[("disk", &image)]).output().expect("it runs");
        check_fails("a run of the original", &once, 1, &["disk", "adopt"]);
    }
}

#[test]
fn a_clone_is_refused_by_name_until_it_is_adopted() {
    refused_until_adopted("nbd", Old::Cloned);
}

#[test]
fn a_state_that_was_rolled_back_is_refused_by_name_until_it_is_adopted() {
    refused_until_adopted("scan", Old::RolledBack);
}
