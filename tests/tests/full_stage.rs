//! A stage full of what senders left behind: those that are there go on, and those that come back lose nothing.

#![allow(clippy::panic, clippy::float_cmp, reason = "a test fails by panicking; gauges are whole numbers")]

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use blockferry_tests::images::Random;
use blockferry_tests::pair::{Pair, check, program, wait_for};
use rustix::process::{Pid, Signal, kill_process};

const MIB: u64 = 1 << 20;
/// The stage's marks at its smallest capacity of 1 GiB.
const LOW: u64 = 448 * MIB;
const HIGH: u64 = 512 * MIB;

fn noise(path: &Path, mib: u64, seed: u64) {
    let mut random = Random(seed);
    let mut file = BufWriter::new(File::create(path).expect("the image can be made"));
    for _ in 0..mib * MIB / 8 {
        file.write_all(&random.number().to_le_bytes()).expect("there is room");
    }
    file.into_inner().expect("flushed").sync_all().expect("synced");
}

/// A sender of a machine of its own.
fn sender_of(state: &Path, volumes: &[(String, std::path::PathBuf)]) -> Command {
    let mut command = program("blockferry-sender");
    command.args(["run", "--once", "--json", "--metrics-listen", "127.0.0.1:0", "--memory-budget", "256MiB"]);
    command.arg("--state-dir").arg(state);
    for (name, path) in volumes {
        command.arg("--volume").arg(format!("{name}={}", path.display()));
    }
    command
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).expect("a child can be signalled");
}

#[test]
fn open_epochs_of_a_sender_that_is_away_make_room_for_another_and_are_sent_again() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let pair = Pair::start_in(dir, None, &["--stage-capacity", "1GiB"]);
    let other_state = pair.file("other");
    check("register", &pair.register(&other_state, &pair.passphrase(&[]), "other").output().expect("it runs"));
    // Three volumes of less than an epoch each: none is closed before all of it is staged.
    let images: Vec<_> = (0..3).map(|number| (format!("disk-{number}"), pair.file(&format!("{number}.img")))).collect();
    for (number, (_, path)) in images.iter().enumerate() {
        noise(path, 240, number as u64 + 1);
    }
    let mine = pair.file("mine.img");
    noise(&mine, 128, 9);
    let log = File::create(pair.file("away.log")).expect("a log");
    let mut away = sender_of(&other_state, &images);
    away.args(["--rate-limit", "48MiB/s"]).stdout(Stdio::null()).stderr(log);
    let mut away = away.spawn().expect("the sender starts");
    #[expect(clippy::cast_precision_loss, reason = "sizes are small")]
    let (low, high) = (LOW as f64, HIGH as f64);
    let used = || pair.receiver_metric("blockferry_receiver_stage_used_bytes");
    wait_for("the stage to be nearly full", || (used() > low + 16.0 * 1_048_576.0).then_some(()));
    signal(&away, Signal::STOP);
    assert!(used() < high, "it was to be stopped before the stage is full: {}", used());

    // Fills the stage, and would find it full ever after.
    let mut command = sender_of(&pair.state, &[("mine".to_owned(), mine.clone())]);
    let log = File::create(pair.file("mine.log")).expect("a log");
    let mut here = command.stdout(Stdio::null()).stderr(log).spawn().expect("the sender starts");
    let open = || pair.receiver_metric("blockferry_receiver_stage_intake_open");
    wait_for("the stage to be full", || (open() == 0.0).then_some(()));
    wait_for("the stage to take records in from everyone", || (open() == 1.0).then_some(()));
    assert!(pair.log().contains("its open epochs are given up"), "somebody else made room");
    assert!(wait_for("the sender that is there", || here.try_wait().expect("a child can be asked")).success());
    pair.restores_to("mine", "latest", &mine);

    signal(&away, Signal::CONT);
    let status = wait_for("the sender that was away", || away.try_wait().expect("a child can be asked"));
    let log = std::fs::read_to_string(pair.file("away.log")).unwrap_or_default();
    assert!(status.success(), "{log}");
    assert!(log.contains("lost what it had staged"), "it was told:\n{log}");
    for (name, path) in &images {
        pair.restores_with(&other_state.join("blockferry.key"), name, "latest", path);
    }
}
