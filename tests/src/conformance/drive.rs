//! Drives a mode through the suite: the writer writes, points are asked for at random moments, either end is killed, stopped and
//! started again, and at the end the points are restored and judged.

use std::io::Read;
use std::path::Path;
use std::process::Output;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::history::{History, Moment};
use super::oracle::{Oracle, Shown, Window};
use super::target::Target;
use super::writer::{Habits, Writer};
use crate::images::Random;
use crate::pair::{Pair, check, wait_for};
use crate::protected::Protected;

/// Opens what the writer writes to.
pub type OpenTarget<'a> = &'a dyn Fn() -> Arc<dyn Target>;
/// Gives a reader over the writer's part of a restored image, and judges what is beside it.
pub type OpenRestored<'a> = &'a dyn Fn(&Path, &mut dyn FnMut(&mut dyn Read));

/// One mode's run through the suite.
pub struct Scenario<'a> {
    /// The volume's name.
    pub volume: &'a str,
    /// The disk that is protected: what the last point has to equal.
    pub disk: &'a Path,
    /// How the writer behaves.
    pub habits: Habits,
    /// Points to ask for.
    pub cuts: u32,
    /// Whether the writer rests before most of the points: what the mode `scan` needs.
    pub rests: bool,
    /// Points that came by themselves, to be judged beside those asked for.
    pub others_max: usize,
    /// What the writer writes to.
    pub open: OpenTarget<'a>,
    /// Called before the last point, with the writer at rest: whatever else may still write to the disk ends here.
    pub at_rest: &'a dyn Fn(),
    /// What it wrote, in a restored image.
    pub restored: OpenRestored<'a>,
}

/// A point that was asked for.
#[derive(Debug, Clone)]
struct Asked {
    id: String,
    window: Window,
}

/// What was done, to be printed.
#[derive(Debug, Default)]
pub struct Account {
    /// Kills of the sender.
    pub sender_kills: u32,
    /// Orderly ends of the sender.
    pub sender_stops: u32,
    /// Kills of the receiver.
    pub receiver_kills: u32,
    /// Writes made.
    pub writes: usize,
    /// Points judged.
    pub judged: u32,
    /// Points that promise nothing.
    pub fuzzy: u32,
}

/// `long` where the long version is asked for with `BLOCKFERRY_LONG=1` (`make test-long`), else `short`.
#[must_use]
pub fn scaled(short: u32, long: u32) -> u32 {
    if std::env::var_os("BLOCKFERRY_LONG").is_some_and(|value| value == "1") { long } else { short }
}

/// The seed of a run, printed so that a failure can be run again with `BLOCKFERRY_SEED`.
///
/// # Panics
/// Without randomness.
#[must_use]
pub fn seed() -> u64 {
    let given = std::env::var("BLOCKFERRY_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| u64::from_le_bytes(common::rng::random().expect("randomness")));
    println!("BLOCKFERRY_SEED={seed}");
    seed
}

/// The first value of this name, however deep.
#[must_use]
pub fn find<'v>(value: &'v Value, name: &str) -> Option<&'v Value> {
    match value {
        Value::Object(fields) => fields.get(name).or_else(|| fields.values().find_map(|value| find(value, name))),
        Value::Array(values) => values.iter().find_map(|value| find(value, name)),
        _ => None,
    }
}

/// The id of the point that `point --json` made; `None` where there was none.
#[must_use]
pub fn point_id(output: &Output) -> Option<String> {
    if !matches!(output.status.code(), Some(0 | 3)) {
        return None;
    }
    let answer: Value = serde_json::from_slice(&output.stdout).ok()?;
    find(&answer, "id")?.as_str().map(str::to_owned)
}

/// Asks for a point until there is one. Gives the moment before the last attempt, and the point.
///
/// # Panics
/// If there is none within the harness's patience.
pub fn ask(sender: &mut Protected, volume: &str, history: &History) -> (Moment, String) {
    let mut last = String::new();
    wait_for(&format!("a point of {volume}"), || {
        sender.assert_running();
        let floor = history.moment();
        let output = sender.point(volume, &["--json"]);
        let id = point_id(&output);
        if id.is_none() {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            if text != last {
                eprintln!("no point yet: {}", text.trim_end());
            }
            last = text;
            std::thread::sleep(Duration::from_millis(50));
        }
        id.map(|id| (floor, id))
    })
}

/// One disturbance by the dice, or none.
fn disturb(volume: &str, random: &mut Random, pair: &mut Pair, sender: &mut Protected, account: &mut Account) {
    match random.below(20) {
        0..4 => {
            sender.kill();
            account.sender_kills += 1;
            sender.restart();
        }
        4 => {
            sender.stop();
            account.sender_stops += 1;
            sender.restart();
        }
        5 | 6 => {
            pair.kill_receiver();
            account.receiver_kills += 1;
            pair.start_receiver();
        }
        // Killed while a point is under way.
        7 | 8 => {
            let point = sender.tool("point").args(["--volume", volume, "--json"]).output_in_background();
            std::thread::sleep(Duration::from_millis(random.below(200)));
            sender.kill();
            account.sender_kills += 1;
            sender.restart();
            let _ = point.join();
        }
        _ => {}
    }
}

/// A command whose output is collected by a thread.
trait Background {
    fn output_in_background(&mut self) -> std::thread::JoinHandle<()>;
}

impl Background for std::process::Command {
    fn output_in_background(&mut self) -> std::thread::JoinHandle<()> {
        let child = self.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn();
        std::thread::spawn(move || drop(child.map(|mut child| child.wait())))
    }
}

/// Runs a scenario to its end.
///
/// # Panics
/// At the first violation, naming the point.
pub fn run(scenario: &Scenario<'_>, pair: &mut Pair, sender: &mut Protected, seed: u64) -> Account {
    run_until(scenario, pair, sender, seed, &mut |_| true)
}

/// As [`run`], with the writer writing on, undisturbed, until `enough`.
///
/// # Panics
/// As [`run`], or if it is never enough.
pub fn run_until(
    scenario: &Scenario<'_>,
    pair: &mut Pair,
    sender: &mut Protected,
    seed: u64,
    enough: &mut dyn FnMut(&mut Protected) -> bool,
) -> Account {
    let mut random = Random(seed ^ 0xd21e);
    let history = Arc::new(History::default());
    let (mut asked, mut account): (Vec<Asked>, Account) = (Vec::new(), Account::default());
    let mut round = 0;
    let start = |round: u64| {
        let target = (scenario.open)();
        Writer::start(&scenario.habits, &target, &history, round)
    };
    // The writer writes before the first replication begins.
    let mut writer = Some(start(round));
    for _ in 0..scenario.cuts {
        std::thread::sleep(Duration::from_millis(random.below(250)));
        disturb(scenario.volume, &mut random, pair, sender, &mut account);
        if scenario.rests && random.below(8) != 0 {
            writer.take().expect("it writes").rest(&history);
        }
        if scenario.rests && writer.is_some() {
            // Under a writer that nobody holds back there may be no point, or one that promises nothing.
            let floor = history.moment();
            if let Some(id) = point_id(&sender.point(scenario.volume, &["--json"])) {
                asked.push(Asked { id, window: Window { floor, ceiling: history.moment() } });
            }
            continue;
        }
        let (floor, id) = ask(sender, scenario.volume, &history);
        asked.push(Asked { id, window: Window { floor, ceiling: history.moment() } });
        if writer.is_none() {
            round += 1;
            writer = Some(start(round));
        }
    }
    wait_for("enough to be written", || {
        std::thread::sleep(Duration::from_millis(20));
        enough(sender).then_some(())
    });
    let rested = writer.take().expect("it writes").rest(&history);
    (scenario.at_rest)();
    let (_, id) = ask(sender, scenario.volume, &history);
    asked.push(Asked { id: id.clone(), window: Window { floor: rested, ceiling: history.moment() } });
    judge_all(scenario, pair, &history, &asked, &mut random, &mut account);
    assert_last_equals_disk(scenario, pair, &id);
    println!("{account:?}");
    account
}

fn judge_all(
    scenario: &Scenario<'_>,
    pair: &Pair,
    history: &History,
    asked: &[Asked],
    random: &mut Random,
    account: &mut Account,
) {
    let log = history.log();
    account.writes = log.writes.len();
    let oracle = Oracle::new(&log, scenario.habits.sectors);
    let points = pair.points(scenario.volume);
    let others = points.len().saturating_sub(asked.len()).max(1);
    let mut previous: Option<Shown> = None;
    for point in &points {
        let id = point["id"].as_str().expect("an id");
        let window = asked.iter().find(|asked| asked.id == id).map(|asked| asked.window);
        if window.is_none() && random.below(others as u64) >= scenario.others_max as u64 {
            continue;
        }
        if point["consistency"] == "fuzzy" {
            account.fuzzy += 1;
            continue;
        }
        let target = pair.file("judged.img");
        let _ = std::fs::remove_file(&target);
        check("restore", &pair.restore_command(scenario.volume, id, &target).output().expect("it runs"));
        (scenario.restored)(&target, &mut |image| match oracle.judge(
            image,
            window.unwrap_or(Window::ANY),
            previous.as_ref(),
        ) {
            Ok(shown) => previous = Some(shown),
            Err(violation) => panic!(
                "point {id} (epoch {}, {}, {}) of {} points, {} writes: {violation}",
                point["epoch"],
                point["consistency"],
                if window.is_some() { "asked for" } else { "by itself" },
                points.len(),
                account.writes
            ),
        });
        account.judged += 1;
        std::fs::remove_file(&target).expect("it is there");
    }
    for asked in asked {
        assert!(points.iter().any(|point| point["id"] == asked.id.as_str()), "point {} is not in the store", asked.id);
    }
}

/// The whole restored image is the writer's.
pub fn whole(path: &Path, judge: &mut dyn FnMut(&mut dyn Read)) {
    judge(&mut std::fs::File::open(path).expect("it was restored"));
}

/// The last point and the disk, byte for byte; a device is read past the page cache.
fn assert_last_equals_disk(scenario: &Scenario<'_>, pair: &Pair, id: &str) {
    if !scenario.disk.starts_with("/dev") {
        return pair.restores_to(scenario.volume, id, scenario.disk);
    }
    let copy = pair.file("device.img");
    let mut dd = std::process::Command::new("dd");
    dd.args(["bs=1M", "iflag=direct", "status=none"]).arg(format!("if={}", scenario.disk.display()));
    check("dd", &dd.arg(format!("of={}", copy.display())).output().expect("coreutils are installed"));
    pair.restores_to(scenario.volume, id, &copy);
}
