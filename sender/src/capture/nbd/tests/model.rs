//! Random histories: writes, cuts, commits, losses, overload and power cuts, against what the disk was.
//!
//! The backing and the write-intent log are in memory and forget at a power cut what was not synced, page by page at random.

#![expect(clippy::cast_possible_truncation, reason = "numbers of tests are small, or cut on purpose")]

use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::ids::BlockIndex;
use common::nbd::Errno;

use super::super::admission::Page;
use super::super::export::Failure;
use super::super::intent::tests::{MemoryLog, identity};
use super::super::intent::{self, REGION_BYTES};
use super::*;

/// A disk as it is, as it would be after a power cut, and the log whose bits have to be durable before it is written.
pub(super) struct MemoryDisk {
    pub(super) live: Mutex<Vec<u8>>,
    durable: Mutex<Vec<u8>>,
    log: Arc<MemoryLog>,
    pub(super) fail_writes: AtomicBool,
    writes: AtomicU64,
}

impl MemoryDisk {
    pub(super) fn new(content: Vec<u8>, log: Arc<MemoryLog>) -> Arc<Self> {
        Arc::new(Self {
            live: Mutex::new(content.clone()),
            durable: Mutex::new(content),
            log,
            fail_writes: AtomicBool::new(false),
            writes: AtomicU64::new(0),
        })
    }

    fn check_marked(&self, offset: u64, length: u64) {
        if self.log.removed.load(Ordering::Relaxed) {
            return;
        }
        let disk_bytes = self.live.lock().expect("sound").len() as u64;
        let durable = self.log.durable.lock().expect("sound");
        let (words, _) = intent::parse(&durable, &identity(disk_bytes)).expect("ours");
        for region in offset / REGION_BYTES..=(offset + length - 1) / REGION_BYTES {
            let marked = words[(region / 64) as usize] >> (region % 64) & 1 == 1;
            assert!(marked, "region {region} is written before its mark is durable");
        }
    }
}

impl Backing for Arc<MemoryDisk> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        // In parts, so that a read beside a write that is not kept away from it is torn.
        for (place, part) in buffer.chunks_mut(1000).enumerate() {
            let at = offset as usize + place * 1000;
            part.copy_from_slice(&self.live.lock().expect("sound")[at..at + part.len()]);
            std::thread::yield_now();
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.check_marked(offset, bytes.len() as u64);
        self.writes.fetch_add(1, Ordering::Relaxed);
        let failing = self.fail_writes.load(Ordering::Relaxed);
        for (place, part) in bytes.chunks(1000).enumerate() {
            let at = offset as usize + place * 1000;
            self.live.lock().expect("sound")[at..at + part.len()].copy_from_slice(part);
            if failing {
                return Err(io::Error::other("a bad sector"));
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.write_at(offset, &vec![0; length as usize])
    }

    fn can_punch(&self) -> bool {
        true
    }

    fn sync(&self) -> io::Result<()> {
        let live = self.live.lock().expect("sound").clone();
        *self.durable.lock().expect("sound") = live;
        Ok(())
    }
}

/// Numbers from a seed.
pub(super) struct Chance(pub(super) u64);

impl Chance {
    pub(super) fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

pub(super) struct Rig {
    pub(super) disk: Arc<MemoryDisk>,
    pub(super) log: Arc<MemoryLog>,
    pub(super) capture: NbdCapture,
    pub(super) export: Arc<Export>,
}

fn config(overload: Overload, budget: Budget) -> NbdConfig {
    NbdConfig {
        name: "disk".to_owned(),
        volume: VolumeId([7; 16]),
        incarnation: Incarnation(2),
        path: PathBuf::from("/memory"),
        listen: Vec::new(),
        state_dir: PathBuf::from("/memory"),
        epoch_interval: Duration::ZERO,
        overload,
        budget,
        payload_max: 0,
        clock: Clock::System,
        hooks: None,
        events: Events::new(Clock::System),
        known: Known::Hashes,
    }
}

impl Rig {
    /// Over a disk and a log as a restart finds them; `backfill` is what the log marks.
    pub(super) fn start(content: Vec<u8>, log_bytes: Vec<u8>, overload: Overload, payload_max: u64) -> Self {
        let identity = identity(content.len() as u64);
        let (words, _) = intent::parse(&log_bytes, &identity).expect("ours");
        let backfill = intent::marked_pages(&words, identity.geometry);
        let log = MemoryLog::new(log_bytes);
        let disk = MemoryDisk::new(content, Arc::clone(&log));
        let intent = IntentLog::with_store(Box::new(Arc::clone(&log)), words);
        let config = config(overload, budget(64 << 20));
        let core = Admission::new(config.budget.clone(), overload, payload_max, backfill);
        let path = BackingPath(config.path.clone());
        let backing = Box::new(Arc::clone(&disk));
        let (name, events) = (config.name.clone(), config.events.clone());
        let export = Arc::new(Export::new(name, path, identity.geometry, backing, intent, core, events));
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let server = runtime.block_on(NbdServer::start()).expect("a server");
        let capture = NbdCapture::over(&config, server, Arc::clone(&export)).expect("a thread");
        Self { disk, log, capture, export }
    }

    pub(super) fn live(&self) -> Vec<u8> {
        self.disk.live.lock().expect("sound").clone()
    }

    /// Clears all bits: as if all had been committed long ago.
    pub(super) fn settled(content: Vec<u8>, overload: Overload, payload_max: u64) -> Self {
        let identity = identity(content.len() as u64);
        let store = MemoryLog::new(intent::all_set(&identity).1);
        let log = IntentLog::with_store(Box::new(Arc::clone(&store)), intent::all_set(&identity).0);
        (0..identity.geometry.disk_bytes().div_ceil(REGION_BYTES)).for_each(|region| log.clear(region));
        log.write_cleared().expect("written");
        let bytes = store.durable.lock().expect("sound").clone();
        Self::start(content, bytes, overload, payload_max)
    }
}

/// The store: what is committed, and cuts that are not yet.
struct Store {
    committed: Vec<u8>,
    /// After each uncommitted cut.
    after: BTreeMap<CutId, Vec<u8>>,
}

impl Store {
    fn newest(&self) -> &Vec<u8> {
        self.after.values().next_back().unwrap_or(&self.committed)
    }

    /// Seals a cut as the seal pool does: what may be compared, and equals what is committed, does not travel.
    /// False where it stopped early, as asked.
    fn seal(&mut self, cut: &Cut, stop_after: Option<u64>) -> bool {
        let mut replica = self.newest().clone();
        let mut buffer = PageBuffer::new(CHUNK_BYTES);
        let mut pieces = 0;
        while let Some(piece) = cut.pages.next() {
            if stop_after == Some(pieces) {
                return false;
            }
            pieces += 1;
            // What is not asked for may hold anything.
            buffer.bytes_mut().fill(0xee);
            let read = cut.pages.read(&piece, buffer.bytes_mut()).expect("readable");
            for place in 0..read.masks.len() {
                assert!(read.masks[place].without(piece.masks[place]).is_empty());
                assert!(read.comparable[place].without(read.masks[place]).is_empty());
                for index in read.masks[place].iter() {
                    let from = place * BLOCK_BYTES + index as usize * PAGE_BYTES;
                    let to = (piece.first.0 as usize + place) * BLOCK_BYTES + index as usize * PAGE_BYTES;
                    let length = PAGE_BYTES.min(replica.len() - to);
                    let content = &buffer.bytes()[from..from + length];
                    let same = content == &self.committed[to..to + length];
                    if !(same && read.comparable[place].contains(index)) {
                        replica[to..to + length].copy_from_slice(content);
                    }
                }
            }
        }
        self.after.insert(cut.id, replica);
        true
    }
}

/// One random history of one client, whose requests are done one after the other.
fn history(seed: u64, steps: usize) -> u64 {
    let mut chance = Chance(seed);
    let bytes = (3 << 20) + 4096 * 3 + 700;
    let content: Vec<u8> = (0..bytes).map(|_| chance.next() as u8).collect();
    let mut store = Store { committed: content.clone(), after: BTreeMap::new() };
    let payload_max = if seed.is_multiple_of(3) { 64 << 20 } else { 300 << 10 };
    let mut rig = Rig::settled(content, Overload::Bitmap, payload_max);
    let mut pages: Vec<Page> = Vec::new();
    let mut points = 0;
    for _ in 0..steps {
        // Often at the same places, so that pages are rewritten.
        let area = if chance.below(2) == 0 { 64 << 10 } else { bytes };
        let length = 1 + match chance.below(4) {
            0 => chance.below(100),
            1 => chance.below(9000),
            2 => 4095,
            _ => chance.below(100 << 10),
        };
        let offset = chance.below(area - length.min(area - 1));
        let offset = if length == 4096 { offset / 4096 * 4096 } else { offset };
        let longer = (length * 4).min(bytes - offset);
        match chance.below(20) {
            0..8 => {
                let written: Vec<u8> = (0..length).map(|_| chance.next() as u8).collect();
                rig.export.write(offset, &written, &mut pages).expect("written");
            }
            8 => rig.export.write_zeroes(offset, longer, true, &mut pages).expect("zeroed"),
            9 => rig.export.trim(offset, longer).expect("taken"),
            10 => rig.export.flush().expect("durable"),
            11..15 => {
                let Ok(cut) = rig.capture.try_cut() else { continue };
                // Written right after the cut: not in it.
                let at_cut = rig.live();
                if chance.below(2) == 0 {
                    let written: Vec<u8> = (0..5000).map(|_| chance.next() as u8).collect();
                    rig.export.write(chance.below(60 << 10), &written, &mut pages).expect("written");
                }
                let stop = (chance.below(12) == 0).then_some(chance.below(3));
                if !store.seal(&cut, stop) {
                    // The cut failed; the agent says so, or just asks for the next one.
                    if chance.below(2) == 0 {
                        rig.capture.lost(cut.id).expect("noted");
                    }
                } else if let Asserts::Point(_) = cut.asserts {
                    points += 1;
                    assert!(store.newest() == &at_cut, "seed {seed}: a point is the disk at its cut");
                }
            }
            15..17 => {
                if let Some((cut, content)) = store.after.pop_first() {
                    store.committed = content;
                    rig.capture.committed(cut).expect("noted");
                }
            }
            17 => {
                if let Some(from) = store.after.keys().nth(chance.below(3) as usize).copied() {
                    drop(store.after.split_off(&from));
                    rig.capture.lost(from).expect("noted");
                }
            }
            18 => drop(rig.export.sweep().expect("swept")),
            _ if chance.below(3) > 0 => {}
            _ => {
                // A power cut, or a kill: unsynced pages survive or not, the log's too; closed epochs are committed or not.
                let kill = chance.below(2) == 0;
                let live = rig.live();
                let mut disk = rig.disk.durable.lock().expect("sound").clone();
                let mut log = rig.log.durable.lock().expect("sound").clone();
                let written = rig.log.written.lock().expect("sound").clone();
                for (from, to) in live.chunks(512).zip(disk.chunks_mut(512)) {
                    if kill || chance.below(2) == 0 {
                        to.copy_from_slice(from);
                    }
                }
                for (from, to) in written.chunks(512).zip(log.chunks_mut(512)).skip(8) {
                    if kill || chance.below(2) == 0 {
                        to.copy_from_slice(from);
                    }
                }
                for _ in 0..chance.below(4) {
                    if let Some((_, content)) = store.after.pop_first() {
                        store.committed = content;
                    }
                }
                store.after.clear();
                rig.export.close();
                rig = Rig::start(disk, log, Overload::Bitmap, payload_max);
            }
        }
    }
    // At rest the replica becomes the disk.
    rig.capture.want_point(PointWish { consistency: Consistency::Crash, group: None });
    loop {
        match rig.capture.try_cut() {
            Ok(cut) => {
                assert!(store.seal(&cut, None));
                if cut.asserts != Asserts::Nothing {
                    break;
                }
            }
            Err(wait) => std::thread::sleep(wait.expect("a point is wished")),
        }
    }
    assert!(store.newest() == &rig.live(), "seed {seed}");
    points
}

#[test]
fn any_history_of_writes_cuts_losses_overload_and_power_cuts_gives_true_points() {
    let points: u64 = (1..=30).map(|seed| history(seed, 120)).sum();
    assert!(points > 50, "points were made all along: {points}");
}

#[test]
fn at_every_point_the_replica_is_a_moment_between_concurrent_writes() {
    // Each writer goes over pages of its own, in order, again and again; and over one page that all share.
    const WRITERS: u64 = 4;
    const OWN_PAGES: u64 = 24;
    const WRITES: u64 = 600;
    for (overload, payload_max) in
        [(Overload::Bitmap, 64 << 20), (Overload::Bitmap, 200 << 10), (Overload::Throttle, 200 << 10)]
    {
        let bytes = (2 << 20) + 100;
        let rig = Rig::settled(vec![0; bytes], overload, payload_max);
        let (export, mut capture, disk) = (rig.export, rig.capture, rig.disk);
        let started: Arc<Vec<AtomicU64>> = Arc::new((0..WRITERS).map(|_| AtomicU64::new(0)).collect());
        let completed: Arc<Vec<AtomicU64>> = Arc::new((0..WRITERS).map(|_| AtomicU64::new(0)).collect());
        let shared_page = 2 << 20;
        let threads: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (export, started, completed) = (Arc::clone(&export), Arc::clone(&started), Arc::clone(&completed));
                std::thread::spawn(move || {
                    let mut pages = Vec::new();
                    for number in 1..=WRITES {
                        started[writer as usize].store(number, Ordering::SeqCst);
                        let page = writer * OWN_PAGES + number % OWN_PAGES;
                        // Now and then a part of the page only: the rest keeps what was there, which is older.
                        let content = number.to_le_bytes().repeat(512);
                        export.write(page * 4096, &content, &mut pages).expect("written");
                        completed[writer as usize].store(number, Ordering::SeqCst);
                        export.write(shared_page + writer * 20, &number.to_le_bytes(), &mut pages).expect("written");
                    }
                })
            })
            .collect();
        let mut replica = vec![0; bytes];
        let mut points = 0;
        loop {
            let ended = threads.iter().all(std::thread::JoinHandle::is_finished);
            let before: Vec<u64> = completed.iter().map(|number| number.load(Ordering::SeqCst)).collect();
            let cut = match capture.try_cut() {
                Ok(cut) => cut,
                Err(None) if ended => break,
                Err(_) => {
                    std::thread::yield_now();
                    continue;
                }
            };
            let after: Vec<u64> = started.iter().map(|number| number.load(Ordering::SeqCst)).collect();
            replay(&*cut.pages, &mut replica);
            capture.committed(cut.id).expect("noted");
            if cut.asserts == Asserts::Nothing {
                continue;
            }
            points += 1;
            for writer in 0..WRITERS {
                let own = |page: u64| {
                    let start = ((writer * OWN_PAGES + page) * 4096) as usize;
                    let page = &replica[start..start + 4096];
                    let number = u64::from_le_bytes(page[..8].try_into().expect("eight"));
                    assert!(page.chunks(8).all(|part| part == number.to_le_bytes()), "a page is not torn");
                    number
                };
                let newest = (0..OWN_PAGES).map(own).max().expect("some");
                for page in 0..OWN_PAGES {
                    let expected = (1..=newest).rev().find(|number| number % OWN_PAGES == page).unwrap_or(0);
                    assert_eq!(own(page), expected, "all writes up to the newest, and none after it");
                }
                let (least, most) = (before[writer as usize], after[writer as usize]);
                assert!((least..=most).contains(&newest), "{newest} of {least} to {most}");
            }
        }
        threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
        assert!(points > 0);
        let live = disk.live.lock().expect("sound").clone();
        assert!(replica == live, "at rest the replica is the disk");
        for writer in 0..WRITERS as usize {
            let at = shared_page as usize + writer * 20;
            assert_eq!(live[at..at + 8], WRITES.to_le_bytes(), "parts of one page do not undo each other");
        }
    }
}

#[test]
fn a_page_rewritten_right_after_a_cut_keeps_its_content_at_the_cut() {
    let mut rig = Rig::settled(vec![1; 1 << 20], Overload::Bitmap, 4 << 20);
    let mut pages = Vec::new();
    rig.export.write(8192, &[2; 4096], &mut pages).expect("written");
    let cut = rig.capture.try_cut().expect("a cut");
    rig.export.write(8192, &[3; 4096], &mut pages).expect("written");
    rig.export.write_zeroes(8192, 4096, true, &mut pages).expect("written");
    let mut replica = vec![1; 1 << 20];
    replay(&*cut.pages, &mut replica);
    assert_eq!(replica[8192..12288], [2; 4096]);
    let cut = rig.capture.try_cut().expect("a cut");
    replay(&*cut.pages, &mut replica);
    assert_eq!(replica[8192..12288], [0; 4096]);
}

#[test]
fn a_write_that_fails_is_told_and_its_pages_are_read_again() {
    let mut rig = Rig::settled(vec![1; 1 << 20], Overload::Bitmap, 4 << 20);
    let mut pages = Vec::new();
    rig.disk.fail_writes.store(true, Ordering::Relaxed);
    assert_eq!(rig.export.write(0, &[2; 4096], &mut pages), Err(Failure::Errno(Errno::Io)));
    rig.disk.fail_writes.store(false, Ordering::Relaxed);
    let mut replica = vec![1; 1 << 20];
    loop {
        let cut = rig.capture.try_cut().expect("a cut");
        replay(&*cut.pages, &mut replica);
        if cut.asserts != Asserts::Nothing {
            break;
        }
    }
    assert_eq!(replica[..1000], [2; 1000], "a part of it was written");
    assert!(replica == rig.live());
}

#[test]
fn without_room_in_the_log_a_write_fails_only_where_the_log_can_not_be_removed_either() {
    let rig = Rig::settled(vec![1; 4 << 20], Overload::Bitmap, 4 << 20);
    let mut pages = Vec::new();
    rig.log.full.store(true, Ordering::Relaxed);
    rig.log.stuck.store(true, Ordering::Relaxed);
    assert_eq!(rig.export.write(0, &[2; 4096], &mut pages), Err(Failure::Errno(Errno::Io)));
    assert_eq!(rig.disk.writes.load(Ordering::Relaxed), 0, "it did not reach the disk");
    assert!(rig.export.core().in_open(BlockIndex(0)).is_empty());
    rig.log.stuck.store(false, Ordering::Relaxed);
    assert_eq!(rig.export.write(0, &[2; 4096], &mut pages), Ok(()));
    assert!(!rig.capture.status().warning.is_empty());
}

#[test]
fn throttled_writers_wait_for_room_and_go_on_once_a_cut_is_sealed() {
    let mut rig = Rig::settled(vec![1; 4 << 20], Overload::Throttle, 64 << 10);
    let export = Arc::clone(&rig.export);
    let writer = std::thread::spawn(move || {
        let mut pages = Vec::new();
        for page in 0..200 {
            export.write(page * 4096, &[2; 4096], &mut pages).expect("written");
        }
    });
    let mut replica = vec![1; 4 << 20];
    let mut cuts = 0;
    while !writer.is_finished() || rig.capture.status().backlog_bytes > 0 {
        assert!(rig.export.core().backlog_bytes() <= 64 << 10);
        if let Ok(cut) = rig.capture.try_cut() {
            assert_eq!(cut.asserts, Asserts::Point(Consistency::Crash), "no point is lost");
            replay(&*cut.pages, &mut replica);
            cuts += 1;
        }
    }
    writer.join().expect("no panic");
    assert!(cuts > 10);
    assert!(replica == rig.live());
    // One that waits when the export ends is not answered.
    let mut pages = Vec::new();
    (0..15).for_each(|page| rig.export.write(page * 4096, &[3; 4096], &mut pages).expect("there is room"));
    let export = Arc::clone(&rig.export);
    let writer = std::thread::spawn(move || export.write(1 << 20, &[3; 4096], &mut Vec::new()));
    while rig.capture.status().state != CaptureState::Overloaded {
        std::thread::yield_now();
    }
    rig.export.close();
    assert_eq!(writer.join().expect("no panic"), Err(Failure::Closing));
}

#[test]
fn bits_of_the_log_go_once_all_is_committed_and_quiet_and_not_before() {
    let mut rig = Rig::settled(vec![1; 8 << 20], Overload::Bitmap, 4 << 20);
    let mut pages = Vec::new();
    rig.export.write(5 << 20, &[2; 4096], &mut pages).expect("written");
    for _ in 0..3 {
        assert_eq!(rig.export.sweep().expect("swept"), 0, "it is in the open cut");
    }
    let cut = rig.capture.try_cut().expect("a cut");
    replay(&*cut.pages, &mut vec![0; 8 << 20]);
    assert_eq!(rig.export.sweep().expect("swept"), 0, "it is not committed");
    rig.capture.committed(cut.id).expect("noted");
    assert_eq!(rig.export.sweep().expect("swept"), 1);
    assert_eq!(rig.export.intent().marked(), 0);
    let (words, _) = intent::parse(&rig.log.durable.lock().expect("sound"), &identity(8 << 20)).expect("ours");
    assert!(words.iter().all(|word| *word == 0));
    assert_eq!(*rig.disk.durable.lock().expect("sound"), rig.live(), "the disk was made durable before");
}

#[test]
fn an_overload_drops_contents_not_pages_and_points_return_after_it() {
    let mut rig = Rig::settled(vec![1; 4 << 20], Overload::Bitmap, 100 << 10);
    let mut pages = Vec::new();
    (0..100).for_each(|page| rig.export.write(page * 8192, &[2; 4096], &mut pages).expect("written"));
    assert_eq!(rig.capture.status().state, CaptureState::Overloaded);
    assert_eq!(rig.capture.status().overloads, 1);
    let mut replica = vec![1; 4 << 20];
    let cut = loop {
        let cut = rig.capture.try_cut().expect("a cut");
        replay(&*cut.pages, &mut replica);
        if cut.asserts != Asserts::Nothing {
            break cut;
        }
    };
    assert!(replica == rig.live());
    assert_eq!(cut.pages.pages(), 0, "a point without pages ends the catching up");
    assert_eq!(rig.capture.status().state, CaptureState::Following);
    assert_eq!(rig.capture.status().backlog_bytes, 0);
}

#[test]
fn while_admissions_are_held_for_a_group_no_write_reaches_the_disk() {
    let mut rig = Rig::settled(vec![1; 1 << 20], Overload::Bitmap, 4 << 20);
    rig.capture.try_cut().expect("the first point");
    let group =
        super::super::super::group::GroupCut::new(common::ids::GroupId([1; 16]), common::ids::GroupId([2; 16]), 2);
    rig.capture.want_point(PointWish { consistency: Consistency::Crash, group: Some(group.clone()) });
    let (export, disk) = (Arc::clone(&rig.export), Arc::clone(&rig.disk));
    let other = std::thread::spawn(move || {
        // Writers are held from before this capture arrives until it has cut.
        while !export.core().held {
            std::thread::yield_now();
        }
        let export = Arc::clone(&export);
        let writer = std::thread::spawn(move || export.write(0, &[2; 4096], &mut Vec::new()));
        let reached = disk.writes.load(Ordering::Relaxed);
        assert!(group.arrive(Duration::from_secs(60)));
        (writer, reached)
    });
    let cut = rig.capture.try_cut().expect("a cut");
    assert!(cut.group.is_some());
    let (writer, reached) = other.join().expect("no panic");
    assert_eq!(reached, 0);
    writer.join().expect("no panic").expect("written");
    assert_eq!(cut.pages.pages(), 0, "it was written after the instant");
    // One that stays away: a point of its own.
    let group =
        super::super::super::group::GroupCut::new(common::ids::GroupId([1; 16]), common::ids::GroupId([3; 16]), 2);
    group.give_up();
    rig.capture.want_point(PointWish { consistency: Consistency::Application, group: Some(group) });
    let cut = rig.capture.try_cut().expect("a cut");
    assert!(cut.group.is_none() && !rig.export.core().held);
    assert_eq!(cut.asserts, Asserts::Point(Consistency::Crash));
    assert!(cut.weaker.contains("no hooks"));
}
