//! Several receivers of one fleet, as real processes over one store: they find each other, machines learn of them, and one that
//! drains sends its machines elsewhere.

#![allow(clippy::panic, reason = "a test fails by panicking")]

use std::time::Duration;

use blockferry_tests::conformance::drive;
use blockferry_tests::conformance::history::History;
use blockferry_tests::conformance::target::Target as _;
use blockferry_tests::images;
use blockferry_tests::members::{self, Member, drain_command, in_use, listed};
use blockferry_tests::nbd::NbdTarget;
use blockferry_tests::pair::{Pair, check, check_fails, program, wait_for};
use blockferry_tests::protected::Protected;
use rustix::process::Signal;

const MIB: u64 = 1 << 20;

fn known_receivers(pair: &Pair) -> String {
    std::fs::read_to_string(pair.state.join("identity/identity.toml")).unwrap_or_default()
}

/// The sender's receiver is the one at `listen`.
fn wait_for_use(sender: &mut Protected, listen: &str) {
    wait_for(&format!("the sender to use {listen}"), || {
        sender.assert_running();
        (in_use(&sender.status()?)? == listen).then_some(())
    });
}

#[test]
fn a_receiver_joins_with_a_copy_of_the_key_and_machines_learn_of_it_and_go_there_when_the_first_is_dead() {
    let mut pair = members::pair();
    let (image, refused) = (pair.file("disk.img"), pair.file("stranger"));
    images::build(&image, 24);
    std::fs::create_dir(&refused).expect("a directory");
    let mut stranger = program("blockferry-receiver");
    stranger.arg("run").arg("--data-dir").arg(&refused).arg("--store").arg(pair.store_url());
    stranger.args(["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--memory-budget", "256MiB"]);
    check_fails("a receiver without the key", &stranger.output().expect("it runs"), 1, &["authority.key"]);

    let second = Member::join(&pair, "receiver-2");
    let listed = listed(&pair);
    assert_eq!(listed.len(), 2, "{listed:?}");
    assert!(listed.iter().all(|receiver| receiver["state"] == "serving"), "{listed:?}");
    let addresses: Vec<_> = listed.iter().map(|receiver| receiver["addresses"][0].as_str().unwrap_or("")).collect();
    assert!(addresses.contains(&pair.listen()) && addresses.contains(&second.listen()), "{addresses:?}");

    wait_for("the machine to learn of the second", || {
        let _ = pair.run_once("disk", &image);
        known_receivers(&pair).contains(second.listen()).then_some(())
    });
    pair.kill_receiver();
    images::churn(&image, 200, 7);
    // It registered with the one that is dead, and this is another start: it knows of the other from its state directory.
    let summary = pair.run_once("disk", &image);
    assert!(summary.number("bytes_sent") < 12 * MIB, "only what changed travels: {}", summary.0);
    pair.restores_to("disk", "latest", &image);
    assert!(second.metric("blockferry_receiver_received_bytes_total") > 0.0);
}

#[test]
fn a_drain_moves_senders_forwards_what_is_closed_and_the_fleet_knows() {
    let mut pair = members::pair();
    let (disk, socket) = (pair.file("disk.img"), pair.file("nbd.sock"));
    images::build(&disk, 16);
    let mut receivers = [Member::join(&pair, "receiver-1"), Member::join(&pair, "receiver-2")];
    // What a receiver knows of others is a second old.
    std::thread::sleep(Duration::from_millis(1_100));
    let volume = format!("disk={},capture=nbd,listen={}", disk.display(), socket.display());
    let mut sender = Protected::start(&pair, &[&volume], &["--epoch-interval", "200ms"]);
    let history = History::default();
    drive::ask(&mut sender, "disk", &history);
    wait_for("the sender to learn of all", || {
        let known = known_receivers(&pair);
        receivers.iter().all(|receiver| known.contains(receiver.listen())).then_some(())
    });
    assert_eq!(pair.stop_receiver(), Some(143));
    wait_for("the sender to use one of the others", || {
        let used = in_use(&sender.status()?)?;
        if used == receivers[1].listen() {
            receivers.swap(0, 1);
        }
        (used == receivers[0].listen()).then_some(())
    });
    // While nothing is written: the move itself is what has to work.
    check("drain", &receivers[0].drain());
    wait_for_use(&mut sender, receivers[1].listen());
    let states: Vec<_> = listed(&pair).iter().map(|receiver| receiver["state"].as_str().map(str::to_owned)).collect();
    let states: Vec<_> = states.iter().flatten().map(String::as_str).collect();
    assert!(["gone", "draining", "serving"].iter().all(|state| states.contains(state)), "{states:?}");
    assert!(receivers[0].metric("blockferry_receiver_draining") > 0.0);

    let nbd = NbdTarget::new(socket, "disk", 1);
    nbd.write(0, 64, &[7; 4096]).expect("a write succeeds");
    nbd.flush(0).expect("a flush succeeds");
    drive::ask(&mut sender, "disk", &history);
    pair.restores_to("disk", "latest", &disk);
    assert!(receivers[1].metric("blockferry_receiver_takeovers_total") > 0.0, "it took the volume over");

    // A second drain of the same receiver finds nothing left; one of a receiver that does not answer takes too long.
    check("drain again", &receivers[0].drain());
    receivers[1].signal(Signal::STOP);
    let late = drain_command(&receivers[1].data, "100ms").output().expect("it runs");
    check_fails("drain of a stopped receiver", &late, 1, &["not drained within"]);
    receivers[1].signal(Signal::CONT);
    assert_eq!(receivers[0].stop(), Some(143));
    receivers[0].start();
    let events = sender.tool("events").output().expect("it runs");
    assert!(String::from_utf8_lossy(&events.stdout).contains("moved"), "{}", String::from_utf8_lossy(&events.stdout));
    assert_eq!(receivers[1].stop(), Some(143));
    wait_for_use(&mut sender, receivers[0].listen());
    let status = pair.operator_command("status").arg("--json").output().expect("it runs");
    check("status", &status);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).expect("JSON");
    assert_eq!(status["receivers"].as_array().map(Vec::len), Some(3));
    let volume = &status["volumes"][0];
    assert!(volume["volume"] == "disk" && volume["newest_point"].is_string(), "{status}");
    assert!(volume["receiver"].as_str().is_some_and(|name| name.starts_with("receiver-")), "{status}");
    let gone = listed(&pair).into_iter().find(|receiver| receiver["name"] == receivers[1].name.as_str());
    assert_eq!(gone.expect("it stays listed")["state"], "gone");
}

#[test]
fn a_drain_where_no_receiver_runs_says_so() {
    let pair = members::pair();
    let nowhere = pair.file("nowhere");
    let output = drain_command(&nowhere, "1s").output().expect("it runs");
    check_fails("drain", &output, 1, &["--data-dir"]);
}

#[test]
fn a_receiver_tells_a_person_with_a_certificate_how_it_stands_and_nobody_else() {
    let pair = members::pair();
    let second = Member::join(&pair, "receiver-2");
    let disk = pair.file("disk.img");
    images::build(&disk, 8);
    let _ = pair.run_once("disk", &disk);
    let cert = |name: &str, role: &str| {
        let made = pair.receiver_tool(&["operator", "create", name, "--role", role]);
        check("operator create", &made);
        let file = pair.file(&format!("{name}.pem"));
        std::fs::write(&file, &made.stdout).expect("room");
        file
    };
    let ask = |listen: &str, cert: &std::path::Path| {
        let mut command = program("blockferry");
        command.args(["status", "--json", "--receiver", listen, "--cert"]).arg(cert).env_remove("BLOCKFERRY_STORE");
        command.output().expect("it runs")
    };
    for (name, role) in [("alice", "operator"), ("bob", "administrator")] {
        let file = cert(name, role);
        // What a receiver knows of the others is as old as a heartbeat.
        let status = wait_for("the receiver to know of the other one", || {
            let output = ask(pair.listen(), &file);
            check("status --receiver", &output);
            let status: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
            (status["receivers"].as_array().map(Vec::len) == Some(2)).then_some(status)
        });
        let receivers = status["receivers"].as_array().expect("an array");
        assert!(
            receivers[0]["addresses"][0] == pair.listen() && receivers[0]["stage_capacity_bytes"].is_u64(),
            "{status}"
        );
        assert!(receivers[1]["name"] == "receiver-2" && receivers[1]["stage_capacity_bytes"].is_null(), "{status}");
        let points = pair.points("disk");
        let volume = &status["volumes"][0];
        assert!(volume["machine"] == "machine" && volume["volume"] == "disk", "{status}");
        assert_eq!(volume["newest_point"], points.last().expect("a point")["id"]);
        assert_eq!(status["problems"].as_array().map(Vec::len), Some(0), "{status}");
    }
    // The other one has loaded no volume.
    let output = ask(second.listen(), &pair.file("alice.pem"));
    check("status of the second", &output);
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(status["volumes"].as_array().map(Vec::len), Some(0), "{status}");

    // A machine's certificate is none of a person's, and one of another fleet opens nothing here.
    let identity = pair.state.join("identity");
    let read = |name: &str| std::fs::read_to_string(identity.join(name)).expect("the machine registered");
    let machine = pair.file("machine.pem");
    let parts: Vec<String> = std::fs::read_dir(&identity)
        .expect("a folder")
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.ends_with(".pem") || name.ends_with(".key"))
        .map(|name| read(&name))
        .collect();
    std::fs::write(&machine, parts.concat()).expect("room");
    check_fails("status with a machine's certificate", &ask(pair.listen(), &machine), 1, &["machine.pem"]);
    let stranger = members::pair();
    check_fails("status of another fleet", &ask(stranger.listen(), &pair.file("alice.pem")), 1, &[stranger.listen()]);
    check_fails("status of nobody", &ask("127.0.0.1:1", &pair.file("alice.pem")), 1, &["127.0.0.1:1"]);
    let neither = program("blockferry").arg("status").env_remove("BLOCKFERRY_STORE").output().expect("it runs");
    check_fails("status of nothing", &neither, 2, &[]);
}
