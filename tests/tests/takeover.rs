//! Receivers take over each other's volumes under load: killed, stopped in their tracks for longer than any timeout, drained and
//! started again one after the other. Whatever was reported as committed restores, and the last point equals the disk.
//!
//! `BLOCKFERRY_LONG=1` (`make test-long`) goes on for minutes, `BLOCKFERRY_SEED` replays the choices.

#![allow(clippy::panic, clippy::print_stdout, reason = "a test fails by panicking and prints what it did")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockferry_tests::conformance::drive::{self, scaled};
use blockferry_tests::conformance::history::{History, Moment};
use blockferry_tests::conformance::oracle::{Oracle, Shown, Window};
use blockferry_tests::conformance::target::Target;
use blockferry_tests::conformance::writer::{Habits, Writer, initialise};
use blockferry_tests::images::Random;
use blockferry_tests::members::{self, Member, in_use};
use blockferry_tests::nbd::NbdTarget;
use blockferry_tests::pair::{Pair, check, wait_for};
use blockferry_tests::protected::Protected;
use rustix::process::Signal;

const MIB: u64 = 1 << 20;
const DISK: u64 = 24 * MIB;
/// Points that came by themselves, to be judged beside those asked for.
const OTHERS_MAX: usize = 30;

/// A sender in nbd mode under load, and receivers beside the pair's own, which stays dead: it only made the fleet.
struct Load {
    pair: Pair,
    receivers: Vec<Member>,
    sender: Protected,
    history: Arc<History>,
    habits: Habits,
    writer: Option<Writer>,
    disk: PathBuf,
    asked: Vec<(String, Window)>,
}

impl Load {
    fn start(receivers: usize, seed: u64) -> Self {
        let mut pair = members::pair();
        let receivers: Vec<_> = (1..=receivers).map(|n| Member::join(&pair, &format!("receiver-{n}"))).collect();
        let (disk, socket) = (pair.file("disk.img"), pair.file("nbd.sock"));
        initialise(&disk, DISK);
        let volume = format!("disk={},capture=nbd,listen={}", disk.display(), socket.display());
        // What its receiver knows of the others is a second old.
        std::thread::sleep(Duration::from_millis(1_100));
        let sender = Protected::start(&pair, &[&volume], &["--epoch-interval", "200ms", "--link-timeout", "2s"]);
        let history = Arc::new(History::default());
        let target: Arc<dyn Target> = Arc::new(NbdTarget::new(socket, "disk", 3));
        let habits = Habits::new(DISK, seed);
        let writer = Some(Writer::start(&habits, &target, &history, 0));
        wait_for("the list of receivers", || {
            let known = std::fs::read_to_string(pair.state.join("identity/identity.toml")).unwrap_or_default();
            receivers.iter().all(|receiver| known.contains(receiver.listen())).then_some(())
        });
        assert_eq!(pair.stop_receiver(), Some(143));
        let mut load = Self { pair, receivers, sender, history, habits, writer, disk, asked: Vec::new() };
        load.ask();
        load
    }

    /// Which receiver the sender uses.
    fn used(&mut self) -> usize {
        wait_for("the sender to use a receiver", || {
            self.sender.assert_running();
            let used = in_use(&self.sender.status()?)?;
            self.receivers.iter().position(|receiver| receiver.listen() == used)
        })
    }

    fn used_other_than(&mut self, other: usize) -> usize {
        wait_for("the sender to use another receiver", || {
            let used = self.used();
            (used != other).then_some(used)
        })
    }

    /// Asks for a point until there is one.
    fn ask(&mut self) -> Moment {
        let (floor, id) = drive::ask(&mut self.sender, "disk", &self.history);
        let ceiling = self.history.moment();
        self.asked.push((id, Window { floor, ceiling }));
        ceiling
    }

    /// Ends the load; judges every point that was asked for and some others, and compares the last one with the disk.
    fn judge(mut self, random: &mut Random) {
        let rested = self.writer.take().expect("it writes").rest(&self.history);
        let (_, id) = drive::ask(&mut self.sender, "disk", &self.history);
        self.asked.push((id.clone(), Window { floor: rested, ceiling: self.history.moment() }));
        let log = self.history.log();
        let oracle = Oracle::new(&log, self.habits.sectors);
        let points = self.pair.points("disk");
        let others = points.len().saturating_sub(self.asked.len()).max(1) as u64;
        let (mut previous, mut judged): (Option<Shown>, usize) = (None, 0);
        for point in &points {
            let id = point["id"].as_str().expect("an id");
            let window = self.asked.iter().find(|(asked, _)| asked == id).map(|(_, window)| *window);
            if window.is_none() && random.below(others) >= OTHERS_MAX as u64 {
                continue;
            }
            let target = self.pair.file("judged.img");
            let _ = std::fs::remove_file(&target);
            check("restore", &self.pair.restore_command("disk", id, &target).output().expect("it runs"));
            let mut image = std::fs::File::open(&target).expect("it was restored");
            match oracle.judge(&mut image, window.unwrap_or(Window::ANY), previous.as_ref()) {
                Ok(shown) => previous = Some(shown),
                Err(violation) => panic!("point {id} of epoch {}: {violation}", point["epoch"]),
            }
            judged += 1;
        }
        for (id, _) in &self.asked {
            assert!(points.iter().any(|point| point["id"] == id.as_str()), "point {id} was reported and is not there");
        }
        self.pair.restores_to("disk", &id, &self.disk);
        println!(
            "{} points, {} asked for, {judged} judged, {} writes",
            points.len(),
            self.asked.len(),
            log.writes.len()
        );
    }
}

#[test]
fn killed_receivers_are_replaced_by_others_under_load() {
    let seed = drive::seed();
    let mut random = Random(seed ^ 0x7a4e);
    let mut load = Load::start(2, seed);
    for _ in 0..scaled(3, 40) {
        let used = load.used();
        std::thread::sleep(Duration::from_millis(random.below(700)));
        load.receivers[used].kill();
        let other = load.used_other_than(used);
        load.ask();
        load.receivers[used].start();
        assert!(load.receivers[other].metric("blockferry_receiver_takeovers_total") > 0.0);
    }
    load.judge(&mut random);
}

#[test]
fn receivers_that_stop_for_longer_than_any_timeout_take_turns_and_no_point_is_lost() {
    let seed = drive::seed();
    let mut random = Random(seed ^ 0x5709);
    let mut load = Load::start(2, seed);
    let until = Instant::now() + Duration::from_secs(u64::from(scaled(25, 300)));
    let mut turns = 0;
    while Instant::now() < until {
        let used = load.used();
        std::thread::sleep(Duration::from_millis(random.below(500)));
        load.receivers[used].signal(Signal::STOP);
        let other = load.used_other_than(used);
        if random.below(2) == 0 {
            load.ask();
        }
        load.receivers[used].signal(Signal::CONT);
        if random.below(3) == 0 {
            // At once again, before the one that woke has noticed.
            load.receivers[other].signal(Signal::STOP);
            load.used_other_than(other);
            load.receivers[other].signal(Signal::CONT);
        }
        turns += 1;
    }
    let fenced: f64 = load.receivers.iter().map(|receiver| receiver.metric("blockferry_receiver_errors_total")).sum();
    println!("{turns} turns, {fenced} errors counted by receivers");
    assert!(turns >= 2, "{turns} turns");
    // What was left behind at the one that lost the volume is dropped, not forwarded.
    load.ask();
    load.judge(&mut random);
}

#[test]
fn a_rolling_restart_of_all_receivers_under_load_loses_nothing() {
    let seed = drive::seed();
    let mut random = Random(seed ^ 0x2011);
    let mut load = Load::start(3, seed);
    for _ in 0..scaled(1, 10) {
        for at in 0..load.receivers.len() {
            check("drain", &load.receivers[at].drain());
            assert_ne!(load.used(), at, "a drained receiver is not in use");
            load.ask();
            assert_eq!(load.receivers[at].stop(), Some(143));
            load.receivers[at].start();
        }
    }
    load.judge(&mut random);
}
