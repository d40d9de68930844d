//! An outage of the store that outlasts the stage: it fills, intake stops, and once the store is back all catches up alone.

#![allow(clippy::float_cmp, reason = "gauges are whole numbers")]

use std::fs::File;
use std::io::{BufWriter, Write};
use std::process::Stdio;

use blockferry_tests::images::Random;
use blockferry_tests::pair::{Pair, check, wait_for};
use blockferry_tests::servers::seaweed::SeaweedFs;

#[test]
fn an_outage_that_fills_the_stage_stops_intake_and_all_catches_up_alone() {
    let mut server = SeaweedFs::start();
    let pair = Pair::start_with_store(&server.store(), &["--stage-capacity", "1GiB"]);
    let image = pair.file("disk.img");
    let mut file = BufWriter::new(File::create(&image).expect("the image can be made"));
    let mut random = Random(11);
    for _ in 0..(720 << 20) / 8 {
        file.write_all(&random.number().to_le_bytes()).expect("there is room");
    }
    drop(file.into_inner().expect("flushed"));
    let log = File::create(pair.file("sender.log")).expect("a log");
    let mut command = pair.sender_command(&[("disk", &image)]);
    let mut run = command.stdout(Stdio::null()).stderr(log).spawn().expect("the sender starts");
    wait_for("uploads", || (pair.receiver_metric("blockferry_store_sent_bytes_total") > 1e6).then_some(()));
    server.kill();
    let open = || pair.receiver_metric("blockferry_receiver_stage_intake_open");
    wait_for("the stage to be full", || (open() == 0.0).then_some(()));
    assert!(run.try_wait().expect("a child can be asked").is_none(), "the sender waits");
    server.restart();
    let status = wait_for("the sender's point", || run.try_wait().expect("a child can be asked"));
    assert!(status.success(), "{}", std::fs::read_to_string(pair.file("sender.log")).unwrap_or_default());
    assert_eq!(open(), 1.0);
    pair.restores_to("disk", "latest", &image);
    let mut verify = pair.operator_command("verify");
    check("verify", &verify.args(["--volume", "disk"]).output().expect("it runs"));
}
