//! The freeze can't hang the machine: the sender is stopped, or killed, between freeze and thaw, with its own state on the file
//! system that it froze. Writes go on within twice the freeze limit, and no point says what is not so.

#![allow(clippy::panic, clippy::print_stdout, reason = "a test fails by panicking and prints what it measured")]

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockferry_tests::conformance::drive::{self, scaled};
use blockferry_tests::conformance::history::History;
use blockferry_tests::conformance::oracle::{Oracle, Window};
use blockferry_tests::conformance::target::{Direct, Target};
use blockferry_tests::conformance::writer::{Habits, Writer, initialise};
use blockferry_tests::loops::{LoopDevice, Mounted};
use blockferry_tests::pair::{Pair, check, wait_for};
use blockferry_tests::protected::Protected;
use rustix::process::Signal;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(2);

/// A thread that writes again and again to a file, and what came of it.
#[derive(Debug, Default)]
struct Prober {
    thread: AtomicU32,
    slowest_us: AtomicU64,
    writes: AtomicU64,
    stop: AtomicBool,
}

impl Prober {
    fn start(file: &Path) -> (Arc<Self>, std::thread::JoinHandle<()>) {
        let prober = Arc::new(Self::default());
        let target = Direct::open(file);
        let own = Arc::clone(&prober);
        let thread = std::thread::spawn(move || {
            let id = rustix::thread::gettid().as_raw_nonzero().get();
            own.thread.store(u32::try_from(id).expect("a thread id"), Ordering::Relaxed);
            while !own.stop.load(Ordering::Relaxed) {
                let started = Instant::now();
                target.write(0, 0, &[1; 4096]).expect("it can be written");
                let taken = u64::try_from(started.elapsed().as_micros()).expect("short");
                own.slowest_us.fetch_max(taken, Ordering::Relaxed);
                own.writes.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        (prober, thread)
    }

    /// True while the thread waits for a file system to thaw: the kernel says in which function it sleeps.
    fn waits_for_thaw(&self) -> bool {
        let thread = self.thread.load(Ordering::Relaxed);
        let function = std::fs::read_to_string(format!("/proc/self/task/{thread}/wchan")).unwrap_or_default();
        function.starts_with("percpu_rwsem_wait") || function.starts_with("__percpu_down_read")
    }
}

/// What is done to the sender while the file system is frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    Stopped,
    Killed,
}

fn disturbed_between_freeze_and_thaw(blow: Blow) {
    let seed = drive::seed();
    let dir = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let backing = dir.path().join("backing.img");
    std::fs::File::create(&backing).and_then(|file| file.set_len(192 * MIB)).expect("sparse files");
    let device = LoopDevice::attach(&backing, true);
    device.format("mkfs.ext4", &["-q", "-F", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"]);
    let mounted = device.mount(&dir.path().join("mnt"), "");
    let (written, probed) = (mounted.path().join("written"), mounted.path().join("probed"));
    initialise(&written, 32 * MIB);
    initialise(&probed, MIB);
    // The sender's state lies on what it freezes.
    let state = mounted.path().join("state");
    let pair = Pair::start_at(dir, None, Some(state), None, &[]);
    let volume = format!("disk={},capture=ebpf", device.device.display());
    let limit = format!("{}ms", LIMIT.as_millis());
    let mut sender = Protected::start(&pair, &[&volume], &["--point-interval", "1h", "--freeze-limit", &limit]);
    let history = Arc::new(History::default());
    let target: Arc<dyn Target> = Arc::new(Direct::open(&written));
    let habits = Habits::new(32 * MIB, seed);
    let writer = Writer::start(&habits, &target, &history, 0);
    drive::ask(&mut sender, "disk", &history);
    let (prober, probing) = Prober::start(&probed);
    let wanted = scaled(3, 20);
    let (mut hits, mut attempts) = (0, 0);
    while hits < wanted {
        attempts += 1;
        assert!(attempts < 40 * wanted, "the freeze was never seen: {hits} of {attempts}");
        let mut point = sender.tool("point");
        point
            .args(["--volume", "disk", "--json"])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        let mut point = point.spawn().expect("it runs");
        let hit = loop {
            if prober.waits_for_thaw() {
                sender.signal(if blow == Blow::Stopped { Signal::STOP } else { Signal::KILL });
                // Still frozen after the blow: it fell between freeze and thaw.
                break prober.waits_for_thaw();
            }
            if point.try_wait().expect("a child can be asked").is_some() {
                break false;
            }
        };
        if hit {
            hits += 1;
            let before = prober.writes.load(Ordering::Relaxed);
            wait_for("a write after the blow", || (prober.writes.load(Ordering::Relaxed) > before).then_some(()));
        }
        match blow {
            Blow::Stopped => sender.signal(Signal::CONT),
            Blow::Killed => {
                let _ = point.kill();
                sender.kill();
                sender.restart();
            }
        }
        let _ = point.wait();
        drive::ask(&mut sender, "disk", &history);
    }
    prober.stop.store(true, Ordering::Relaxed);
    probing.join().expect("no write fails");
    let rested = writer.rest(&history);
    let slowest = Duration::from_micros(prober.slowest_us.load(Ordering::Relaxed));
    println!(
        "{hits} times {blow:?} within {attempts} freezes; the slowest write took {slowest:?}, the limit is {LIMIT:?}"
    );
    let (_, last) = drive::ask(&mut sender, "disk", &history);
    sender.kill();

    let log = history.log();
    let oracle = Oracle::new(&log, habits.sectors);
    let mut previous = None;
    for point in pair.points("disk") {
        if point["consistency"] == "fuzzy" {
            continue;
        }
        let id = point["id"].as_str().expect("an id");
        let image = pair.file("restored.img");
        let _ = std::fs::remove_file(&image);
        check("restore", &pair.restore_command("disk", id, &image).output().expect("it runs"));
        let again = Mounted::mount(&image, &pair.file("again"), "loop");
        let mut file = std::fs::File::open(again.path().join("written")).expect("it is there");
        let floor = if id == last { rested } else { 0 };
        let reader: &mut dyn Read = &mut file;
        let shown = oracle.judge(reader, Window { floor, ..Window::ANY }, previous.as_ref());
        previous = Some(shown.unwrap_or_else(|violation| panic!("point {id}: {violation}")));
    }
    assert!(slowest <= 2 * LIMIT, "a write waited {slowest:?} for the thaw");
    drop(sender);
    drop(mounted);
}

#[test]
fn a_sender_stopped_between_freeze_and_thaw_hangs_nobody_and_tells_no_lie() {
    disturbed_between_freeze_and_thaw(Blow::Stopped);
}

#[test]
fn a_sender_killed_between_freeze_and_thaw_hangs_nobody_and_tells_no_lie() {
    disturbed_between_freeze_and_thaw(Blow::Killed);
}
