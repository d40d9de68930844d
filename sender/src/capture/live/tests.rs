//! Live captures of real devices with real file systems, as root. The tracker is one that compares the device with what it
//! was: slow, and never wrong.

use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::budget::{Budget, MemoryTable};
use common::clock::Clock;
use common::ids::{GroupId, PageMask};
use common::limits::{BLOCK_BYTES, PAGES_PER_BLOCK};

use super::*;
use crate::capture::freeze::tests::{MountedDisk, run, watchdog};
use crate::capture::group::GroupCut;
use crate::capture::hooks::Hooks;
use crate::capture::scan::{CHUNK_BLOCKS, CHUNK_BYTES};
use crate::capture::tests::{LoopDevice, image, noise, overwrite};
use crate::capture::{PageBuffer, Source};
use crate::events::Events;

/// Long enough for a tracker that reads the whole device in every freeze.
const LIMIT: Duration = Duration::from_secs(30);

/// What a test may want of the tracker, or learn from it.
#[derive(Default)]
struct Shared {
    /// The device at the last switch.
    at_switch: Mutex<Vec<u8>>,
    /// Sets that are not forgotten, by number.
    sets: Mutex<std::collections::BTreeMap<u64, PageSet>>,
    /// Writes to the device right after the next switch in a freeze, as somebody who knows no file system would.
    write_after_switch: AtomicBool,
    fail_settle: AtomicBool,
    switches: AtomicU64,
}

/// Compares the device with what it was at the last switch.
struct Comparing {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    shared: Arc<Shared>,
    base: Vec<u8>,
    sequence: u64,
    unsettled: Option<(u64, PageSet)>,
    owed: PageSet,
    /// Content that was seen last, and how often it was another one.
    seen: Mutex<([u8; 32], u64)>,
    /// Where sets are written, as a real tracker does.
    state_dir: Option<PathBuf>,
}

fn content(disk: &dyn Disk) -> Vec<u8> {
    let length = usize::try_from(disk.geometry().pages()).expect("small") * PAGE_BYTES;
    let mut buffer = PageBuffer::new(length.next_multiple_of(PAGE_BYTES));
    disk.read_at(0, buffer.bytes_mut()).expect("readable");
    buffer.bytes().to_vec()
}

impl Comparing {
    fn attach(disk: Arc<dyn Disk>, path: &Path) -> (Self, Arc<Shared>) {
        let shared = Arc::new(Shared::default());
        let base = content(disk.as_ref());
        let owed = PageSet::empty(disk.geometry());
        let seen = Mutex::new((*blake3::hash(&base).as_bytes(), 0));
        let path = path.to_owned();
        let tracker = Self {
            disk,
            path,
            shared: Arc::clone(&shared),
            base,
            sequence: 1,
            unsettled: None,
            owed,
            seen,
            state_dir: None,
        };
        (tracker, shared)
    }

    fn differing(&self, now: &[u8]) -> PageSet {
        let mut pages = PageSet::empty(self.disk.geometry());
        for (number, (old, new)) in self.base.chunks(PAGE_BYTES).zip(now.chunks(PAGE_BYTES)).enumerate() {
            if old != new {
                let bit = u32::try_from(number % PAGES_PER_BLOCK).expect("below 64");
                pages.insert(BlockIndex((number / PAGES_PER_BLOCK) as u64), PageMask::EMPTY.with(bit));
            }
        }
        pages
    }
}

impl ChangeTracker for Comparing {
    fn swap(&mut self) -> Result<SavedSet, CaptureError> {
        if let Some((_, pages)) = self.unsettled.clone() {
            self.owed.extend(&pages);
            self.settle()?;
        }
        let set = self.switch()?;
        self.settle()?;
        Ok(set)
    }

    fn switch(&mut self) -> Result<SavedSet, CaptureError> {
        assert!(self.unsettled.is_none(), "a switch after one that was not settled");
        let now = content(self.disk.as_ref());
        let mut pages = self.differing(&now);
        pages.extend(&std::mem::replace(&mut self.owed, PageSet::empty(self.disk.geometry())));
        self.base.clone_from(&now);
        *self.shared.at_switch.lock().expect("no panic") = now;
        self.shared.switches.fetch_add(1, Ordering::Relaxed);
        self.sequence += 1;
        self.unsettled = Some((self.sequence, pages.clone()));
        if self.shared.write_after_switch.load(Ordering::Relaxed) {
            let at = self.base.len() - PAGE_BYTES;
            let noise = noise(self.sequence, PAGE_BYTES);
            std::fs::OpenOptions::new()
                .write(true)
                .open(&self.path)
                .expect("root")
                .write_all_at(&noise, at as u64)
                .expect("room");
        }
        Ok(SavedSet { sequence: self.sequence, pages })
    }

    fn settle(&mut self) -> Result<(), CaptureError> {
        let Some((sequence, pages)) = self.unsettled.clone() else { return Ok(()) };
        if self.shared.fail_settle.swap(false, Ordering::Relaxed) {
            return Err(CaptureError::io("save", &self.path, std::io::ErrorKind::StorageFull.into()));
        }
        if let Some(dir) = &self.state_dir {
            let file = std::fs::File::create(dir.join(format!("set-{sequence}"))).expect("room");
            file.sync_all().expect("it syncs");
        }
        self.shared.sets.lock().expect("no panic").insert(sequence, pages);
        self.unsettled = None;
        Ok(())
    }

    fn keep(&mut self, pages: &PageSet) -> Result<u64, CaptureError> {
        assert!(self.unsettled.is_none());
        self.sequence += 1;
        self.shared.sets.lock().expect("no panic").insert(self.sequence, pages.clone());
        Ok(self.sequence)
    }

    fn forget(&mut self, sequence: u64) -> Result<(), CaptureError> {
        self.shared.sets.lock().expect("no panic").retain(|number, _| *number > sequence);
        Ok(())
    }

    fn sequence(&self) -> u64 {
        self.sequence
    }

    fn dirty_pages(&self) -> Result<u64, CaptureError> {
        Ok(self.differing(&content(self.disk.as_ref())).len())
    }

    fn marks(&self) -> Result<u64, CaptureError> {
        let now = *blake3::hash(&content(self.disk.as_ref())).as_bytes();
        let mut seen = self.seen.lock().expect("no panic");
        if seen.0 != now {
            *seen = (now, seen.1 + 1);
        }
        Ok(seen.1)
    }

    fn detach(&mut self) -> Result<(), CaptureError> {
        Ok(())
    }
}

struct Bench<T = Comparing> {
    capture: LiveCapture<T>,
    shared: Arc<Shared>,
    /// What the cuts add up to.
    replica: Vec<u8>,
    pages_travelled: u64,
}

fn budget() -> Budget {
    Budget::new(MemoryTable::new(256 << 20)).expect("large enough")
}

fn config(path: &Path) -> LiveConfig {
    LiveConfig {
        name: "root".into(),
        path: path.to_owned(),
        point_interval: Duration::from_millis(1),
        app_point_interval: None,
        freeze_limit: LIMIT,
        hooks: None,
        snapshots: None,
        watchdog: watchdog(),
        budget: budget(),
        clock: Clock::System,
        events: Events::new(Clock::System),
        start: Start::First,
    }
}

impl Bench {
    fn new(config: LiveConfig) -> Self {
        Self::with(config, |_| {})
    }

    fn with(config: LiveConfig, change: impl FnOnce(&mut Comparing)) -> Self {
        let disk: Arc<dyn Disk> = Arc::new(Source::open(&config.path).expect("a device"));
        let (mut tracker, shared) = Comparing::attach(Arc::clone(&disk), &config.path);
        change(&mut tracker);
        let replica = vec![0xee; tracker.base.len()];
        let capture = LiveCapture::new(config, disk, tracker);
        Self { capture, shared, replica, pages_travelled: 0 }
    }

    fn is_what_was_switched(&self) -> bool {
        *self.shared.at_switch.lock().expect("no panic") == self.replica
    }
}

impl<T: ChangeTracker> Bench<T> {
    /// The next cut, sealed into the replica.
    async fn cut(&mut self) -> (Cut, Option<Consistency>) {
        let cut = self.capture.next().await.expect("a cut");
        let asserted = self.seal(&cut);
        (cut, asserted)
    }

    fn seal(&mut self, cut: &Cut) -> Option<Consistency> {
        let mut buffer = PageBuffer::new(CHUNK_BYTES);
        let mut last = None;
        while let Some(piece) = cut.pages.next() {
            assert!(last.is_none_or(|last| piece.first > last), "pieces ascend");
            last = Some(piece.first);
            let read = cut.pages.read(&piece, buffer.bytes_mut()).expect("readable");
            for index in 0..CHUNK_BLOCKS {
                for bit in read.masks[index].iter() {
                    let at = index * BLOCK_BYTES + bit as usize * PAGE_BYTES;
                    let to = usize::try_from(piece.first.0).expect("small") * BLOCK_BYTES + at;
                    self.replica[to..to + PAGE_BYTES].copy_from_slice(&buffer.bytes()[at..at + PAGE_BYTES]);
                    self.pages_travelled += 1;
                }
            }
        }
        match cut.asserts {
            Asserts::Nothing => None,
            Asserts::Point(consistency) => Some(consistency),
            Asserts::AtEnd => cut.pages.finish().expect("it can tell").0,
        }
    }

    /// Cuts until one asserts a point.
    async fn point(&mut self) -> (Cut, Consistency) {
        for _ in 0..100 {
            let (cut, asserted) = self.cut().await;
            if let Some(consistency) = asserted {
                return (cut, consistency);
            }
        }
        panic!("a hundred cuts, and no point; {:?}", self.capture.status());
    }

    fn wish(&mut self, consistency: Consistency) {
        self.capture.want_point(PointWish { consistency, group: None });
    }
}

/// Appends numbered lines to files, each synced, until it is stopped.
struct Writer {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<u64>>,
}

impl Writer {
    fn start(point: &Path, bytes: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, point) = (Arc::clone(&stop), point.to_owned());
        let thread = std::thread::spawn(move || {
            let mut number = 0_u64;
            while !stopped.load(Ordering::Relaxed) {
                // Each number is durable before the next one is written.
                let file = std::fs::File::create(point.join(format!("n{}", number % 40))).expect("room");
                file.write_all_at(&number.to_le_bytes(), 0).expect("room");
                file.write_all_at(&noise(number, bytes), 8).expect("room");
                file.sync_all().expect("it syncs");
                number += 1;
            }
            number
        });
        Self { stop, thread: Some(thread) }
    }

    fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("not joined").join().expect("it wrote")
    }
}

/// Mounts the replica, checks it with the file system's own tool, and returns the numbers found.
fn numbers_in(replica: &[u8], fs_type: &str) -> Vec<u64> {
    let image = image(replica);
    let device = LoopDevice::attach(&image);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let options = if fs_type == "xfs" { "nouuid" } else { "defaults" };
    run(Command::new("mount").args(["-o", options]).arg(&device.path).arg(dir.path()));
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(dir.path()).expect("mounted") {
        let path = entry.expect("an entry").path();
        let mut number = [0; 8];
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('n'))
            && std::fs::File::open(&path).and_then(|mut file| file.read_exact(&mut number)).is_ok()
        {
            numbers.push(u64::from_le_bytes(number));
        }
    }
    run(Command::new("umount").arg(dir.path()));
    // After the mount: a frozen xfs has a log to replay, which its checker does not.
    match fs_type {
        "ext4" => run(Command::new("e2fsck").args(["-fn"]).arg(&device.path)),
        _ => run(Command::new("xfs_repair").args(["-n"]).arg(&device.path)),
    }
    numbers.sort_unstable();
    numbers
}

#[tokio::test(flavor = "multi_thread")]
async fn points_under_load_are_the_frozen_disk_and_hold_each_write_with_all_before_it() {
    // The tracker reads the whole disk again and again, and no xfs is smaller than 300 MiB.
    for (fs_type, mib, points) in [("ext4", 48, 5), ("xfs", 320, 2)] {
        let disk = MountedDisk::new(fs_type, mib);
        let writer = Writer::start(&disk.point, 20_000);
        let mut bench = Bench::new(config(&disk.device.path));
        let mut newest = 0;
        for _ in 0..points {
            let (cut, consistency) = bench.point().await;
            assert_eq!((consistency, cut.weaker.as_str()), (Consistency::Filesystem, ""), "{fs_type}");
            assert!(bench.is_what_was_switched(), "{fs_type}: the replica is the disk at the switch");
            let numbers = numbers_in(&bench.replica, fs_type);
            // At most 40 files, and the file that is just being written may be empty: what is there has no gap but that.
            let last = *numbers.last().expect("some are written");
            assert!(last >= newest, "a later point is not older");
            newest = last;
            let missing = (last.saturating_sub(38)..=last).filter(|number| !numbers.contains(number)).count();
            assert!(missing <= 1, "{fs_type}: {missing} of the numbers up to {last} are missing: {numbers:?}");
            bench.capture.committed(cut.id).expect("noted");
        }
        assert!(writer.stop() >= newest);
        // At rest: the next point is the disk, and then there is nothing to do.
        bench.wish(Consistency::Filesystem);
        bench.point().await;
        assert!(bench.is_what_was_switched());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sets_are_forgotten_when_their_cut_is_committed_and_lost_cuts_travel_again() {
    let disk = MountedDisk::new("ext4", 32);
    let mut bench = Bench::new(config(&disk.device.path));
    let sets = |bench: &Bench| bench.shared.sets.lock().expect("no panic").clone();
    let (first, _) = bench.point().await;
    assert!(!sets(&bench).is_empty(), "nothing is committed");
    bench.capture.committed(first.id).expect("noted");
    assert!(sets(&bench).is_empty(), "all is committed");

    std::fs::write(disk.point.join("file"), noise(1, 100_000)).expect("room");
    let (second, _) = bench.point().await;
    assert!(bench.is_what_was_switched());
    assert!(!sets(&bench).is_empty());
    bench.capture.lost(second.id).expect("noted");
    // What the lost cut had brought is taken back.
    let good = bench.replica.clone();
    bench.replica.fill(0xee);
    let travelled = bench.pages_travelled;
    let (third, _) = bench.point().await;
    assert!(third.id > second.id);
    let changed = sets(&bench).values().fold(PageSet::empty(bench.capture.geometry()), |mut all, set| {
        all.extend(set);
        all
    });
    assert!(bench.pages_travelled - travelled >= 25 && changed.len() >= 25, "the file's pages at least");
    for (block, mask) in changed.iter() {
        for bit in mask.iter() {
            let at = usize::try_from(block.0).expect("small") * BLOCK_BYTES + bit as usize * PAGE_BYTES;
            assert_ne!(bench.replica[at..at + PAGE_BYTES], [0xee; PAGE_BYTES], "page {at} came again");
        }
    }
    drop(good);
    bench.capture.committed(third.id).expect("noted");
    assert!(sets(&bench).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_past_the_frozen_file_system_makes_no_point() {
    let disk = MountedDisk::new("ext4", 32);
    let mut config = config(&disk.device.path);
    config.point_interval = Duration::from_secs(3600);
    let events = config.events.clone();
    let mut bench = Bench::new(config);
    let (first, consistency) = bench.point().await;
    assert_eq!(consistency, Consistency::Filesystem);
    bench.capture.committed(first.id).expect("noted");
    bench.shared.write_after_switch.store(true, Ordering::Relaxed);
    bench.wish(Consistency::Filesystem);
    let (cut, consistency) = bench.point().await;
    assert_eq!(consistency, Consistency::Fuzzy, "{cut:?}");
    assert!(cut.weaker.contains("written while"), "{}", cut.weaker);
    let failed = events.recent(100).into_iter().filter(|event| event.kind == EventKind::FreezeFailed).count();
    assert_eq!(failed, usize::try_from(FAILURES_MAX).expect("small"));
    // Left alone it gets points again, and what the failed freezes had taken is in them.
    bench.shared.write_after_switch.store(false, Ordering::Relaxed);
    bench.wish(Consistency::Filesystem);
    let (_, consistency) = bench.point().await;
    assert_eq!(consistency, Consistency::Filesystem);
    assert!(bench.is_what_was_switched());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_that_could_not_be_saved_makes_no_point_and_its_pages_travel() {
    let disk = MountedDisk::new("ext4", 32);
    let mut bench = Bench::new(config(&disk.device.path));
    bench.point().await;
    std::fs::write(disk.point.join("file"), noise(2, 50_000)).expect("room");
    bench.shared.fail_settle.store(true, Ordering::Relaxed);
    let (_, consistency) = bench.point().await;
    assert_eq!(consistency, Consistency::Filesystem);
    assert!(!bench.shared.fail_settle.load(Ordering::Relaxed), "it had failed once");
    assert!(bench.is_what_was_switched());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rest_that_never_fits_gives_no_point_of_its_own_and_a_fuzzy_one_where_somebody_waits() {
    let disk = MountedDisk::new("ext4", 48);
    let writer = Writer::start(&disk.point, 900_000);
    let mut config = config(&disk.device.path);
    // Less than the file system's writes alone take.
    config.freeze_limit = Duration::from_millis(1);
    config.point_interval = Duration::from_secs(3600);
    let events = config.events.clone();
    let mut bench = Bench::new(config);
    bench.wish(Consistency::Filesystem);
    let (cut, consistency) = bench.point().await;
    assert_ne!(consistency, Consistency::Filesystem);
    assert!(!cut.weaker.is_empty());
    assert!(!bench.capture.status().warning.is_empty());
    writer.stop();
    assert!(events.recent(100).iter().any(|event| event.kind == EventKind::WeakerPoint));
}

/// Copies the device, and writes to it right before and right after, as its users would.
#[derive(Debug)]
struct Copies {
    path: PathBuf,
    taken: Mutex<Vec<u8>>,
    number: AtomicU64,
}

impl crate::capture::snapshot::Snapshotter for Copies {
    fn take(&self) -> Result<Box<dyn Disk>, crate::capture::snapshot::SnapshotError> {
        let number = self.number.fetch_add(2, Ordering::Relaxed);
        overwrite(&self.path, 3 * PAGE_BYTES as u64, &noise(number, PAGE_BYTES));
        let taken = content(&Source::open(&self.path)?);
        overwrite(&self.path, 7 * PAGE_BYTES as u64, &noise(number + 1, PAGE_BYTES));
        let file = image(&taken);
        let source = Source::open(&file)?;
        *self.taken.lock().expect("no panic") = taken;
        Ok(Box::new(source))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_of_a_snapshot_is_the_snapshot_and_what_was_written_around_it_is_in_the_next_one() {
    let file = image(&noise(1, 4 * BLOCK_BYTES));
    let device = LoopDevice::attach(&file);
    let copies = Arc::new(Copies { path: device.path.clone(), taken: Mutex::default(), number: AtomicU64::new(100) });
    let mut config = config(&device.path);
    let snapshots: Arc<dyn crate::capture::snapshot::Snapshotter> = copies.clone();
    config.snapshots = Some(snapshots);
    config.point_interval = Duration::from_secs(3600);
    let mut bench = Bench::new(config);
    for round in 0..4 {
        bench.wish(Consistency::Crash);
        let (cut, consistency) = bench.point().await;
        assert_eq!((consistency, cut.weaker.as_str()), (Consistency::Crash, ""));
        assert!(*copies.taken.lock().expect("no panic") == bench.replica, "round {round}");
        assert!(content(&Source::open(&device.path).expect("a device")) != bench.replica, "it went on");
        if round % 2 == 0 {
            bench.capture.committed(cut.id).expect("noted");
            assert!(
                !bench.shared.sets.lock().expect("no panic").is_empty(),
                "what was written after it is not forgotten"
            );
        }
    }
}

fn hook_dir(pre: &str, post: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for (phase, script) in [("pre.d", pre), ("post.d", post)] {
        std::fs::create_dir(dir.path().join(phase)).expect("room");
        let path = dir.path().join(phase).join("10-hook");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("room");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("ours");
    }
    dir
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_make_a_point_application_consistent_and_a_failing_or_late_one_makes_it_weaker() {
    let disk = MountedDisk::new("ext4", 32);
    let log = tempfile::NamedTempFile::new().expect("a temporary file");
    let post = format!("echo $BLOCKFERRY_OUTCOME >> {}", log.path().display());
    // What the hook writes belongs to the point.
    let pre = format!("echo rested > {}", disk.point.join("application").display());
    for (pre, expected, weaker) in [
        (pre.as_str(), Consistency::Application, ""),
        ("echo it is down; exit 1", Consistency::Filesystem, "it is down"),
        ("sleep 1000", Consistency::Filesystem, "longer than"),
    ] {
        let dir = hook_dir(pre, &post);
        let mut config = config(&disk.device.path);
        config.hooks = Hooks::load(dir.path(), Duration::from_secs(2)).expect("usable");
        let mut bench = Bench::new(config);
        bench.wish(Consistency::Application);
        let (cut, consistency) = bench.point().await;
        assert_eq!(consistency, expected, "{pre}");
        assert!(cut.weaker.contains(weaker) && cut.weaker.is_empty() == weaker.is_empty(), "{}", cut.weaker);
        assert!(bench.is_what_was_switched());
        let text = b"rested\n";
        assert!(bench.replica.windows(text.len()).any(|window| window == text), "it was written by the first hook");
    }
    assert_eq!(std::fs::read_to_string(log.path()).expect("post hooks ran"), "cut\nfailed\nfailed\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn points_with_hooks_come_by_their_own_interval() {
    let disk = MountedDisk::new("ext4", 32);
    let dir = hook_dir("exit 0", "exit 0");
    let mut config = config(&disk.device.path);
    config.hooks = Hooks::load(dir.path(), Duration::from_secs(20)).expect("usable");
    config.app_point_interval = Some(Duration::from_secs(3600));
    let mut bench = Bench::new(config);
    assert_eq!(bench.point().await.1, Consistency::Application, "the first one");
    std::fs::write(disk.point.join("file"), "more").expect("room");
    assert_eq!(bench.point().await.1, Consistency::Filesystem, "the next one is not due");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_without_a_file_system_gives_crash_points_while_it_rests_and_fuzzy_ones_while_it_does_not() {
    let bytes = noise(1, 3 * BLOCK_BYTES + PAGE_BYTES + 512);
    let file = image(&bytes);
    let device = LoopDevice::attach(&file);
    let mut config = config(&device.path);
    config.point_interval = Duration::from_secs(3600);
    let mut bench = Bench::new(config);
    let (_, consistency) = bench.point().await;
    assert_eq!(consistency, Consistency::Crash);
    assert_eq!(bench.replica[..bytes.len()], bytes, "its last page is not whole");
    overwrite(&device.path, 5 * PAGE_BYTES as u64, &[7; 9000]);
    bench.wish(Consistency::Filesystem);
    let cut = bench.capture.next().await.expect("a cut");
    assert_eq!(cut.asserts, Asserts::AtEnd);
    assert_eq!(cut.pages.pages(), 3);
    overwrite(&device.path, 0, &[8; 10]);
    assert_eq!(bench.seal(&cut), Some(Consistency::Fuzzy));
    assert!(cut.weaker.contains("nothing to freeze"), "{}", cut.weaker);
    bench.wish(Consistency::Crash);
    let (cut, consistency) = bench.point().await;
    assert_eq!((consistency, cut.weaker.as_str()), (Consistency::Crash, ""));
    assert!(bench.is_what_was_switched());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_budget_makes_no_points_until_there_is_room_and_says_so_once() {
    let disk = MountedDisk::new("ext4", 32);
    let mut config = config(&disk.device.path);
    let (budget, events) = (config.budget.clone(), config.events.clone());
    config.start = Start::Pages(PageSet::empty(Source::open(&disk.device.path).expect("a device").geometry()));
    let mut bench = Bench::new(config);
    let all = budget.try_acquire(budget.payload()).expect("nobody else");
    let waited = tokio::time::timeout(Duration::from_millis(2500), bench.capture.next()).await;
    assert!(waited.is_err(), "a point without room: {waited:?}");
    let status = bench.capture.status();
    assert_eq!((status.state, status.overloads), (CaptureState::Overloaded, 1));
    drop(all);
    let (_, consistency) = bench.point().await;
    assert_eq!((consistency, bench.capture.status().state), (Consistency::Filesystem, CaptureState::Following));
    let kinds: Vec<_> = events.recent(100).iter().map(|event| event.kind).collect();
    assert_eq!(kinds, [EventKind::CaughtUp, EventKind::Overload, EventKind::CaughtUp]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_directory_may_lie_on_the_file_system_that_is_frozen() {
    let disk = MountedDisk::new("ext4", 32);
    let mut bench = Bench::with(config(&disk.device.path), |tracker| tracker.state_dir = Some(disk.point.clone()));
    for _ in 0..3 {
        let (cut, consistency) = bench.point().await;
        assert_eq!(consistency, Consistency::Filesystem);
        assert!(bench.is_what_was_switched());
        bench.capture.committed(cut.id).expect("noted");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_disks_are_cut_at_one_instant_or_each_for_itself() {
    let disks = [MountedDisk::new("ext4", 32), MountedDisk::new("ext4", 32)];
    let group = |parties| GroupCut::new(GroupId([1; 16]), GroupId([2; 16]), parties);
    let mut benches: Vec<_> = disks.iter().map(|disk| Bench::new(config(&disk.device.path))).collect();
    let together = group(2);
    for bench in &mut benches {
        bench.capture.want_point(PointWish { consistency: Consistency::Filesystem, group: Some(together.clone()) });
    }
    let mut tasks = Vec::new();
    for mut bench in benches {
        tasks.push(tokio::spawn(async move {
            let (cut, consistency) = bench.point().await;
            assert_eq!((consistency, cut.weaker.as_str()), (Consistency::Filesystem, ""));
            assert!(bench.is_what_was_switched());
            (bench, cut.group.map(|group| group.point))
        }));
    }
    let mut left = Vec::new();
    for task in tasks {
        let (bench, point) = task.await.expect("no panic");
        assert_eq!(point, Some(GroupId([2; 16])));
        left.push(bench);
    }
    // One that never comes.
    let alone = group(2);
    let mut bench = left.pop().expect("two");
    bench.capture.want_point(PointWish { consistency: Consistency::Filesystem, group: Some(alone.clone()) });
    alone.give_up();
    let (cut, consistency) = bench.point().await;
    assert_eq!(consistency, Consistency::Filesystem);
    assert!(cut.group.is_none() && cut.weaker.contains("one instant"), "{}", cut.weaker);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_future_that_is_dropped_again_and_again_loses_nothing() {
    let disk = MountedDisk::new("ext4", 32);
    let dir = hook_dir("sleep 0.3", "sleep 0.3");
    let mut config = config(&disk.device.path);
    config.hooks = Hooks::load(dir.path(), Duration::from_secs(20)).expect("usable");
    config.point_interval = Duration::from_secs(3600);
    let mut bench = Bench::new(config);
    bench.wish(Consistency::Application);
    let mut dropped = 0;
    loop {
        assert!(dropped < 10_000, "no point in ten thousand tries");
        match tokio::time::timeout(Duration::from_millis(20), bench.capture.next()).await {
            Err(_) => dropped += 1,
            Ok(cut) => {
                let cut = cut.expect("a cut");
                if let Some(consistency) = bench.seal(&cut) {
                    assert_eq!((consistency, cut.weaker.as_str()), (Consistency::Application, ""));
                    break;
                }
            }
        }
    }
    assert!(dropped > 5, "hooks alone take longer");
    assert!(bench.is_what_was_switched());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_verification_saves_what_is_left_so_that_a_restart_goes_on() {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.as_file().set_len(20 * (64 << 20)).expect("sparse");
    let device = LoopDevice::attach(file.path());
    let disk: Arc<dyn Disk> = Arc::new(Source::open(&device.path).expect("a device"));
    let geometry = disk.geometry();
    let shared = Arc::new(Shared::default());
    let tracker = Comparing {
        disk: Arc::clone(&disk),
        path: device.path.clone(),
        shared: Arc::clone(&shared),
        base: Vec::new(),
        sequence: 1,
        unsettled: None,
        owed: PageSet::empty(geometry),
        seen: Mutex::default(),
        state_dir: None,
    };
    shared.sets.lock().expect("no panic").insert(1, PageSet::full(geometry));
    let mut config = config(&device.path);
    config.start = Start::Verify;
    let mut capture = LiveCapture::new(config, disk, tracker);
    for _ in 0..CUTS_PER_KEEP {
        let cut = capture.next().await.expect("a cut");
        assert_eq!((cut.asserts, cut.pages.pages()), (Asserts::Nothing, CUT_PAGES_MAX));
        capture.committed(cut.id).expect("noted");
    }
    let sets = shared.sets.lock().expect("no panic").clone();
    let left: Vec<_> = sets.iter().map(|(number, set)| (*number, set.len())).collect();
    assert_eq!(left, [(2, 4 * CUT_PAGES_MAX)]);
    assert_eq!(capture.status().state, CaptureState::Verifying);
}

/// Tracking by the kernel, detached at the end.
struct Tracked {
    state: tempfile::TempDir,
    pins: PathBuf,
}

impl Tracked {
    fn new() -> Self {
        let name = common::ids::VolumeId::from_random(common::rng::random().expect("random bytes")).to_string();
        let state = tempfile::tempdir().expect("a temporary directory");
        Self { state, pins: crate::capture::ebpf::default_directory(&name) }
    }

    fn attach(
        &self,
        path: &Path,
        replica: Option<Vec<u8>>,
        change: impl FnOnce(&mut LiveConfig),
    ) -> Bench<EbpfTracker> {
        let attached = EbpfTracker::attach(path, &self.pins, self.state.path(), replica.is_some()).expect("it tracks");
        let disk: Arc<dyn Disk> = Arc::new(Source::open(path).expect("a device"));
        let mut config = config(path);
        config.start = attached.start;
        config.freeze_limit = Duration::from_secs(5);
        change(&mut config);
        let length = usize::try_from(disk.geometry().pages()).expect("small") * PAGE_BYTES;
        let replica = replica.unwrap_or_else(|| vec![0xee; length]);
        let capture = LiveCapture::new(config, disk, attached.tracker);
        Bench { capture, shared: Arc::default(), replica, pages_travelled: 0 }
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        let _ = crate::capture::ebpf::remove_pins(&self.pins, self.state.path());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_kernels_tracker_points_under_load_are_consistent_and_a_restart_reads_only_what_changed() {
    for (fs_type, mib, points) in [("ext4", 96, 8), ("xfs", 320, 3)] {
        let disk = MountedDisk::new(fs_type, mib);
        let path = disk.device.path.clone();
        let tracked = Tracked::new();
        let writer = Writer::start(&disk.point, 100_000);
        let mut bench = tracked.attach(&path, None, |_| {});
        let mut newest = 0;
        for _ in 0..points {
            let (cut, consistency) = bench.point().await;
            assert_eq!((consistency, cut.weaker.as_str()), (Consistency::Filesystem, ""), "{fs_type}");
            let numbers = numbers_in(&bench.replica, fs_type);
            let last = *numbers.last().expect("some are written");
            assert!(last >= newest, "a later point is not older");
            newest = last;
            let missing = (last.saturating_sub(38)..=last).filter(|number| !numbers.contains(number)).count();
            assert!(missing <= 1, "{fs_type}: {missing} of the numbers up to {last} are missing: {numbers:?}");
            bench.capture.committed(cut.id).expect("noted");
        }
        // The sender ends, the machine goes on.
        let replica = std::mem::take(&mut bench.replica);
        drop(bench);
        std::fs::write(disk.point.join("meanwhile"), noise(9, 50_000)).expect("room");
        writer.stop();
        let mut bench = tracked.attach(&path, Some(replica), |_| {});
        run(Command::new("umount").arg(&disk.point));
        bench.wish(Consistency::Crash);
        let (_, consistency) = bench.point().await;
        assert_eq!(consistency, Consistency::Crash, "nothing is mounted, and nobody writes");
        let now = content(&Source::open(&path).expect("a device"));
        assert!(now == bench.replica, "{fs_type}: the replica is the disk");
        let most = bench.replica.len() / PAGE_BYTES / 2;
        assert!(bench.pages_travelled < most as u64, "{fs_type}: {} pages", bench.pages_travelled);
    }
}
