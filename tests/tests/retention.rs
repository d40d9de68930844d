//! Points expire and storage is collected, with real processes: prunes that are killed, beside a sender, a receiver and restores.

use std::path::PathBuf;
use std::process::{Child, Stdio};

use blockferry_tests::images::{self, Random};
use blockferry_tests::pair::{Pair, check, program};
use serde_json::Value;

fn set_policy(pair: &Pair, text: &str) {
    let mut command = program("blockferry");
    command.args(["policy", "set", "--store", &pair.store_url(), "--volume", "disk", text]);
    check("policy set", &command.output().expect("it runs"));
}

fn prune(pair: &Pair, grace: &str) -> Value {
    let output = pair.operator_command("prune").args(["--grace", grace, "--json"]).output().expect("it runs");
    check("prune", &output);
    let rows: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    rows[0].clone()
}

fn ids(pair: &Pair) -> Vec<String> {
    pair.points("disk").iter().map(|point| point["id"].as_str().expect("an id").to_owned()).collect()
}

fn verify(pair: &Pair) {
    let mut command = pair.operator_command("verify");
    command.args(["--volume", "disk"]).arg("--key-file").arg(pair.key_file());
    check("verify with the key", &command.output().expect("it runs"));
}

/// A point of each state of a disk, and a copy of each state: all of it written anew each time, or some pages.
fn history(pair: &Pair, points: u64, anew: bool) -> Vec<(String, PathBuf)> {
    let image = pair.file("disk.img");
    images::build(&image, 32);
    (0..points)
        .map(|number| {
            if anew {
                let mut random = Random(number);
                let pages: Vec<u8> = (0..(32 << 20) / images::PAGE).flat_map(|_| random.page()).collect();
                std::fs::write(&image, pages).expect("there is room");
            } else if number > 0 {
                let _ = images::churn(&image, 1500, number);
            }
            let _ = pair.run_once("disk", &image);
            let copy = pair.file(&format!("state-{number}.img"));
            let _ = std::fs::copy(&image, &copy).expect("there is room");
            (ids(pair).pop().expect("a point"), copy)
        })
        .collect()
}

#[test]
fn expired_points_free_their_room_and_the_others_restore_as_they_were() {
    let pair = Pair::start();
    let states = history(&pair, 6, true);
    let before = prune(&pair, "0s");
    assert_eq!((&before["points_kept"], &before["points_expired"]), (&6.into(), &0.into()), "no policy: all stay");
    set_policy(&pair, "latest 2");
    let output = pair.operator_command("prune").args(["--dry-run", "--json"]).output().expect("it runs");
    check("prune --dry-run", &output);
    assert_eq!(ids(&pair).len(), 6, "a dry run changes nothing");
    let done = prune(&pair, "0s");
    assert_eq!((&done["points_kept"], &done["points_expired"]), (&2.into(), &4.into()), "{done}");
    // What it replaced goes with the next one, whose grace has passed.
    let after = prune(&pair, "0s");
    assert!(after["objects_deleted"].as_u64() > Some(0), "{after}");
    let stored = |row: &Value| row["bytes_stored"].as_u64().expect("a number");
    assert!(stored(&prune(&pair, "0s")) < stored(&before), "{after} was {before}");
    assert_eq!(ids(&pair), [states[4].0.clone(), states[5].0.clone()]);
    for (id, state) in &states[4..] {
        pair.restores_to("disk", id, state);
    }
    verify(&pair);
    // An expired one is not offered, by id neither.
    let target = pair.file("expired.img");
    let output = pair.restore_command("disk", &states[0].0, &target).output().expect("it runs");
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    // The sender goes on where it was.
    let image = pair.file("disk.img");
    let _ = images::churn(&image, 300, 99);
    let more = pair.run_once("disk", &image);
    assert!(more.number("bytes_sent") < 8 << 20, "only what differs travels: {}", more.0);
    pair.restores_to("disk", "latest", &image);
    verify(&pair);
}

#[test]
fn prunes_that_are_killed_beside_a_running_sender_and_restores_lose_nothing() {
    let pair = Pair::start();
    let states = history(&pair, 3, false);
    set_policy(&pair, "latest 3");
    let mut dice = Random(11);
    let image = pair.file("disk.img");
    let start = || -> Child {
        let mut command = pair.operator_command("prune");
        // The grace protects the restores that run meanwhile; expiring and rewriting do not wait for it.
        command.args(["--grace", "1h"]).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().expect("it starts")
    };
    let mut newest = states.last().expect("states").clone();
    for round in 0..8 {
        let _ = images::churn(&image, 1200, 1000 + round);
        let mut prunes = [start(), start()];
        let target = pair.file(&format!("target-{round}.img"));
        let restore = pair.restore_command("disk", &newest.0, &target).spawn().expect("it starts");
        // One dies somewhere, the other one goes through.
        std::thread::sleep(std::time::Duration::from_millis(dice.below(120)));
        prunes[0].kill().expect("ours");
        let _ = pair.run_once("disk", &image);
        let restored = restore.wait_with_output().expect("it ends");
        assert!(restored.status.success(), "a restore that runs meanwhile goes through");
        blockferry_tests::pair::assert_same_content(&target, &newest.1);
        std::fs::remove_file(&target).expect("ours");
        for prune in &mut prunes {
            let _ = prune.wait().expect("it ends");
        }
        let copy = pair.file(&format!("later-{round}.img"));
        let _ = std::fs::copy(&image, &copy).expect("there is room");
        newest = (ids(&pair).pop().expect("a point"), copy);
    }
    let last = prune(&pair, "1h");
    assert!(last["points_kept"].as_u64() == Some(3), "{last}");
    pair.restores_to("disk", "latest", &image);
    verify(&pair);
    // With its time come, what was given up goes, and all that is offered is still whole.
    let _ = prune(&pair, "0s");
    let _ = prune(&pair, "0s");
    verify(&pair);
    pair.restores_to("disk", &newest.0, &newest.1);
}
