//! Retired and deleted volumes with a real sender and receiver: the sender is refused by name, and goes on once it may.

#![allow(clippy::panic, reason = "a test fails by panicking")]

use std::path::PathBuf;
use std::process::Output;

use blockferry_tests::images;
use blockferry_tests::pair::{Pair, check};

struct World {
    pair: Pair,
    disk: PathBuf,
}

impl World {
    fn tool(&self, command: &[&str]) -> Output {
        let mut tool = self.pair.operator_command(command[0]);
        tool.args(&command[1..]).output().expect("it runs")
    }

    fn volume(&self, command: &str, more: &[&str]) {
        let mut tool = blockferry_tests::pair::program("blockferry");
        tool.args(["volume", command, "--store", &self.pair.store_url(), "--volume", "data"]).args(more);
        check(command, &tool.output().expect("it runs"));
    }

    fn run_once(&self) -> Output {
        self.pair.sender_command(&[("data", &self.disk)]).output().expect("it runs")
    }

    fn refused(&self, word: &str) {
        let output = self.run_once();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "it was refused: {said}");
        assert!(said.lines().last().is_some_and(|line| line.contains(word) && line.contains("data")), "{said}");
    }
}

#[test]
fn a_retired_volume_refuses_its_sender_by_name_and_a_renamed_one_does_not() {
    let pair = Pair::start();
    let disk = pair.file("disk.img");
    std::fs::File::create(&disk).and_then(|file| file.set_len(8 << 20)).expect("a file");
    let _ = images::churn(&disk, 200, 1);
    let world = World { pair, disk };
    let _ = world.pair.run_once("data", &world.disk);

    world.volume("retire", &[]);
    let _ = images::churn(&world.disk, 20, 2);
    // The receiver that had the volume open is the one that refuses now.
    world.refused("retired");
    world.volume("unretire", &[]);
    let _ = world.pair.run_once("data", &world.disk);
    world.pair.restores_to("data", "latest", &world.disk);

    world.volume("delete", &["--yes"]);
    world.refused("deleted");
    assert!(world.pair.points_of_all().is_empty(), "it is not shown");
    world.volume("restore", &[]);

    // The sender's configuration still has the old name.
    world.volume("rename", &["--to", "shop"]);
    let _ = images::churn(&world.disk, 20, 3);
    let _ = world.pair.run_once("data", &world.disk);
    world.pair.restores_to("shop", "latest", &world.disk);
    let output = world.tool(&["points", "--volume", "machine/shop", "--json"]);
    check("points", &output);
    assert!(String::from_utf8_lossy(&output.stdout).contains("\"shop\""));
}
