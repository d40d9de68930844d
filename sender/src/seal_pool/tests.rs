#![expect(clippy::cast_possible_truncation, reason = "the numbers of these tests are small")]

use std::collections::BTreeMap;
use std::path::Path;

use common::budget::MemoryTable;
use common::clock::{Clock, UnixMillis};
use common::format::close::Consistency;
use common::format::record::RecordKind;
use common::ids::{BlockIndex, FleetId, Geometry, GroupId, Incarnation, KeyId, PageMask, Salt, VolumeId};
use common::limits::{BLOCK_BYTES, PAGE_BYTES};
use common::seal::{DataKey, EpochContext, Opener};
use common::session::ClosedEpoch;
use proptest::prelude::*;

use super::*;
use crate::capture::cut::{Capture, PieceMasks, PieceRead};
use crate::capture::scan::{CHUNK_BLOCKS, ScanCapture};
use crate::capture::tests::{LoopDevice, image, noise, overwrite};
use crate::capture::{Disk, RestProbe, Source};
use crate::epoch::{CloseTerms, EpochBook, EpochBounds, EpochSeed};
use crate::state::{JournalWriter, SourceIdentity, StateDir, VolumeIdentity, VolumeState};

/// A sender without a network: passes over a disk, state, epochs; and the replica that its records make.
struct Bench {
    _directory: tempfile::TempDir,
    _state_dir: StateDir,
    disk: Arc<dyn Disk>,
    state: VolumeState,
    gate: Arc<EpochGate>,
    book: EpochBook,
    budget: Budget,
    pool: SealPool,
    data_key: DataKey,
    replica: Vec<u8>,
}

/// What one pass came to.
#[derive(Debug)]
struct Passed {
    summary: PassSummary,
    records: Vec<Record>,
    closes: usize,
}

impl Bench {
    fn new(path: &Path, bounds: EpochBounds, payload: u64) -> Self {
        Self::of(Arc::new(Source::open(path).expect("a disk")), bounds, payload)
    }

    fn of(disk: Arc<dyn Disk>, bounds: EpochBounds, payload: u64) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let state_dir = StateDir::open(directory.path()).expect("fresh");
        let identity = VolumeIdentity {
            fleet: FleetId([1; 16]),
            volume: VolumeId([2; 16]),
            incarnation: Incarnation(1),
            key_id: KeyId(1),
            disk_bytes: disk.geometry().disk_bytes(),
            sector_bytes: 512,
            name: "root".to_owned(),
            source_path: Vec::new(),
            source: SourceIdentity::File { device: 0, inode: 0 },
            hash_key: [3; 32],
        };
        let state = VolumeState::create(&state_dir, &identity, ClosedEpoch::default()).expect("room");
        let data_key = DataKey::from_random([4; 32]);
        let mut drawn = 0_u64;
        let seed = EpochSeed {
            data_key: data_key.clone(),
            volume: identity.volume,
            incarnation: identity.incarnation,
            key_id: identity.key_id,
            first: state.next_epoch(),
            draw_salt: Box::new(move || {
                drawn += 1;
                Ok(Salt(*blake3::hash(&drawn.to_le_bytes()).as_bytes()))
            }),
        };
        let gate = Arc::new(EpochGate::new(seed, bounds));
        let replica = vec![0xdd; usize::try_from(disk.geometry().disk_bytes()).expect("small")];
        Self {
            _directory: directory,
            _state_dir: state_dir,
            disk,
            state,
            book: EpochBook::new(Arc::clone(&gate)),
            gate,
            budget: Budget::new(MemoryTable::new(payload)).expect("payload"),
            pool: SealPool::new(3, 1).expect("threads"),
            data_key,
            replica,
        }
    }

    fn start(&self) -> Pass {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let mut capture = runtime.block_on(async {
            ScanCapture::new(Arc::clone(&self.disk), Clock::System, std::time::Duration::from_secs(3600))
        });
        let cut = runtime.block_on(capture.next()).expect("the first pass is due at once");
        self.begin_pass(cut.pages)
    }

    fn begin_pass(&self, pages: Arc<dyn CutPages>) -> Pass {
        let config = PassConfig {
            pages,
            hashes: self.state.begin_pass().expect("nothing in flight"),
            hash_key: self.state.identity().hash_key,
            gate: Arc::clone(&self.gate),
            budget: self.budget.clone(),
            outputs_bytes_max: u64::MAX,
            read_limit: None,
            volume: "root".to_owned(),
        };
        Pass::start(&self.pool, config)
    }

    /// One pass to its committed point, applied to the replica.
    fn pass(&mut self) -> Passed {
        let pass = self.start();
        self.finish(pass)
    }

    fn pass_over(&mut self, pages: Arc<dyn CutPages>) -> Passed {
        let pass = self.begin_pass(pages);
        self.finish(pass)
    }

    fn finish(&mut self, mut pass: Pass) -> Passed {
        let (mut records, mut journals, mut closes) = (Vec::new(), BTreeMap::new(), Vec::new());
        let summary = loop {
            match pass.next_blocking().expect("a last word") {
                PassOutput::Sealed(sealed) => {
                    let journal: &mut JournalWriter = journals
                        .entry(sealed.epoch)
                        .or_insert_with(|| self.state.begin_journal(sealed.epoch).expect("a new epoch"));
                    journal.append(sealed.change).expect("room");
                    assert!(self.book.record(sealed.epoch, sealed.meta));
                    assert_eq!(sealed.permit.bytes(), sealed.record.bytes().len() as u64);
                    records.push(sealed.record);
                    self.close_ready(&mut journals, &mut closes, None);
                }
                PassOutput::Finished(summary) => break summary,
                PassOutput::Failed(error) => panic!("{error}"),
            }
        };
        assert!(pass.next_blocking().is_none(), "nothing after the last word");
        let last = self.gate.retire().expect("a salt");
        let point = Some((last, summary.consistency.unwrap_or(Consistency::Crash)));
        self.close_ready(&mut journals, &mut closes, point);
        assert_eq!(self.book.open_epochs(), 0, "every epoch of the pass is closed");
        self.apply(&records, &closes);
        self.state.commit_through(self.state.newest().close).expect("journaled");
        assert_eq!(self.budget.used(), 0);
        Passed { summary, records, closes: closes.len() }
    }

    fn close_ready(
        &mut self,
        journals: &mut BTreeMap<Epoch, JournalWriter>,
        closes: &mut Vec<(EpochContext, Salt)>,
        point: Option<(Epoch, Consistency)>,
    ) {
        while let Some(epoch) = self.book.closable() {
            let identity = self.state.identity().clone();
            let terms = CloseTerms {
                fleet: identity.fleet,
                parent: self.state.newest().close,
                cut_time: UnixMillis(0),
                point: point.and_then(|(last, consistency)| (last == epoch).then_some(consistency)),
                disk_bytes: identity.disk_bytes,
                group: GroupId::NIL,
                group_point: GroupId::NIL,
            };
            let statement = self.book.close(epoch, terms).expect("closable");
            let close = self.data_key.signer(identity.volume).sign(statement.clone());
            let journal =
                journals.remove(&epoch).unwrap_or_else(|| self.state.begin_journal(epoch).expect("a new epoch"));
            self.state.journal_close(journal, close.id(), terms.parent, terms.point).expect("room");
            closes.push((
                EpochContext {
                    volume: identity.volume,
                    incarnation: identity.incarnation,
                    epoch,
                    key_id: identity.key_id,
                },
                statement.salt,
            ));
        }
    }

    /// Opens records and writes them to the replica, as a restore does.
    fn apply(&mut self, records: &[Record], closes: &[(EpochContext, Salt)]) {
        let keys: BTreeMap<_, _> =
            closes.iter().map(|(context, salt)| (context.epoch, self.data_key.epoch_key(*context, salt))).collect();
        let (mut opener, mut pages) = (Opener::new().expect("memory"), Vec::new());
        for record in records {
            let header = record.header();
            assert!(header.fits(self.disk.geometry()));
            opener.open(&keys[&header.epoch], record, &mut pages).expect("authentic");
            let mut write = |block: u64, page: u32, bytes: &[u8]| {
                let start = (block as usize * BLOCK_BYTES) + page as usize * PAGE_BYTES;
                let end = self.replica.len().min(start + PAGE_BYTES);
                self.replica[start..end].copy_from_slice(&bytes[..end - start]);
            };
            for (page, bytes) in header.data_mask.iter().zip(pages.chunks_exact(PAGE_BYTES)) {
                write(header.block.0, page, bytes);
            }
            for block in header.block.0..header.block.0 + u64::from(header.block_count) {
                header.zero_mask.iter().for_each(|page| write(block, page, &[0; PAGE_BYTES]));
            }
        }
    }
}

const ROOMY: u64 = 64 << 20;

fn changed_pages(records: &[Record]) -> u32 {
    records.iter().map(|record| record.header().pages().count() * record.header().block_count).sum()
}

#[test]
fn the_first_pass_makes_the_whole_disk_and_a_second_one_finds_nothing() {
    // Not a whole number of pages, blocks or chunks; noise, zeros and text.
    let mut bytes = noise(1, 9 * BLOCK_BYTES + 3 * PAGE_BYTES + 77);
    bytes[BLOCK_BYTES..4 * BLOCK_BYTES].fill(0);
    bytes[5 * BLOCK_BYTES..6 * BLOCK_BYTES].fill(b'a');
    let path = image(&bytes);
    let mut bench = Bench::new(&path, EpochBounds::default(), ROOMY);
    let passed = bench.pass();
    assert!(bench.replica == bytes, "the replica is the disk");
    assert_eq!(passed.summary.bytes_read, bytes.len() as u64);
    assert_eq!(passed.summary.pages_changed, bytes.len().div_ceil(PAGE_BYTES) as u64);
    assert_eq!(passed.summary.zero_pages, 3 * 64);
    assert_eq!(passed.summary.consistency, Some(Consistency::Crash), "{}", passed.summary.reason);
    let ranges: Vec<_> = passed.records.iter().filter(|record| record.header().kind == RecordKind::ZeroRange).collect();
    assert_eq!(ranges.len(), 1, "three zero blocks are one record");
    assert_eq!((ranges[0].header().block.0, ranges[0].header().block_count), (1, 3));
    assert_eq!(passed.summary.records, passed.records.len() as u64);
    assert_eq!(passed.closes, 1);

    let passed = bench.pass();
    assert_eq!((passed.records.len(), passed.summary.pages_changed), (0, 0));
    assert_eq!(passed.closes, 1, "an empty epoch can assert a point");
}

#[test]
fn only_pages_that_changed_travel() {
    let bytes = noise(2, 8 * BLOCK_BYTES + 100);
    let path = image(&bytes);
    let mut bench = Bench::new(&path, EpochBounds::default(), ROOMY);
    bench.pass();
    overwrite(&path, 5, b"x"); // page 0 of block 0
    overwrite(&path, 8 * BLOCK_BYTES as u64 + 99, b"y"); // the last byte of the disk
    overwrite(&path, 3 * BLOCK_BYTES as u64 - 1, b"zz"); // the last page of block 2 and the first of block 3
    overwrite(&path, 6 * BLOCK_BYTES as u64, &[0; 2 * PAGE_BYTES]);
    let passed = bench.pass();
    assert_eq!(changed_pages(&passed.records), 6);
    assert_eq!((passed.summary.pages_changed, passed.summary.zero_pages), (6, 2));
    let masks: BTreeMap<_, _> = passed
        .records
        .iter()
        .map(|record| (record.header().block.0, (record.header().data_mask, record.header().zero_mask)))
        .collect();
    let expected = [
        (0, (PageMask(1), PageMask::EMPTY)),
        (2, (PageMask(1 << 63), PageMask::EMPTY)),
        (3, (PageMask(1), PageMask::EMPTY)),
        (6, (PageMask::EMPTY, PageMask(0b11))),
        (8, (PageMask(1), PageMask::EMPTY)),
    ];
    assert_eq!(masks, BTreeMap::from(expected));
    assert!(bench.replica == std::fs::read(&path).expect("there"));
}

#[test]
fn a_device_is_replicated_like_a_file() {
    let bytes = noise(3, 5 * BLOCK_BYTES + 5 * 512);
    let path = image(&bytes);
    let device = LoopDevice::attach(&path);
    let mut bench = Bench::new(&device.path, EpochBounds::default(), ROOMY);
    let passed = bench.pass();
    assert!(bench.replica == bytes);
    assert_eq!(passed.summary.consistency, Some(Consistency::Crash), "{}", passed.summary.reason);
    overwrite(&device.path, bytes.len() as u64 - 512, &[9; 512]);
    let passed = bench.pass();
    assert_eq!(changed_pages(&passed.records), 1);
    overwrite(&device.path, 0, &[0; BLOCK_BYTES]);
    let passed = bench.pass();
    assert_eq!(passed.records.len(), 1);
    assert_eq!(passed.records[0].header().kind, RecordKind::ZeroRange);
    let mut now = bytes;
    let length = now.len();
    now[length - 512..].fill(9);
    now[..BLOCK_BYTES].fill(0);
    assert!(bench.replica == now);
}

#[test]
fn a_tight_budget_slows_a_pass_and_never_stops_it() {
    let bytes = noise(4, 40 * BLOCK_BYTES);
    let path = image(&bytes);
    // Room for one record of a block that does not compress, and a little.
    let mut bench = Bench::new(&path, EpochBounds::default(), 300_000);
    bench.pass();
    assert!(bench.replica == bytes);
    assert!(bench.budget.peak() <= 300_000);
}

#[test]
fn a_pass_that_is_dropped_gives_everything_back_and_the_next_one_is_whole() {
    let bytes = noise(5, 60 * BLOCK_BYTES);
    let path = image(&bytes);
    let mut bench = Bench::new(&path, EpochBounds { records: 7, sealed_bytes: u64::MAX }, ROOMY);
    for taken in [0, 1, 20] {
        let mut pass = bench.start();
        for _ in 0..taken {
            let Some(PassOutput::Sealed(sealed)) = pass.next_blocking() else { panic!("60 records come") };
            assert!(bench.book.record(sealed.epoch, sealed.meta));
        }
        drop(pass);
        bench.book.restart(bench.gate.next_epoch());
    }
    let passed = bench.pass();
    assert_eq!(passed.records.len(), 60);
    assert!(bench.replica == bytes);
    assert!(passed.closes >= 9, "epochs of at most 7 records");
}

#[test]
fn incompressible_blocks_are_soon_left_uncompressed_and_compressible_ones_found_again() {
    let mut guess = CompressionGuess::default();
    for _ in 0..RAW_BLOCKS_BEFORE_SKIP {
        assert_eq!(guess.next(), Compression::Try);
        guess.learn(Compression::Try, Codec::Raw);
    }
    for _ in 0..BLOCKS_SKIPPED {
        assert_eq!(guess.next(), Compression::Skip);
        guess.learn(Compression::Skip, Codec::Raw);
    }
    assert_eq!(guess.next(), Compression::Try, "one is tried now and then");
    guess.learn(Compression::Try, Codec::Raw);
    assert_eq!(guess.next(), Compression::Skip, "still not worth it");
    while guess.next() == Compression::Skip {}
    guess.learn(Compression::Try, Codec::Zstd);
    assert_eq!((guess.next(), guess.next()), (Compression::Try, Compression::Try), "worth it again");
}

/// Some pages that are in memory, charged to the budget.
struct InMemory {
    next: Mutex<VecDeque<Piece>>,
    content: Vec<u8>,
    comparable: bool,
    charged: Mutex<BTreeMap<u64, Permit>>,
}

impl InMemory {
    fn new(bench: &Bench, blocks: &[(u64, PageMask)], content: Vec<u8>, comparable: bool, charge: bool) -> Arc<Self> {
        let (mut next, mut charged) = (VecDeque::new(), BTreeMap::new());
        for (block, mask) in blocks {
            let mut masks = PieceMasks::default();
            masks[0] = *mask;
            next.push_back(Piece { first: BlockIndex(*block), masks });
            if charge {
                let bytes = u64::from(mask.count()) * PAGE_BYTES as u64 + 256;
                charged.insert(*block, bench.budget.try_acquire(bytes).expect("room"));
            }
        }
        Arc::new(Self { next: Mutex::new(next), content, comparable, charged: Mutex::new(charged) })
    }
}

impl CutPages for InMemory {
    fn next(&self) -> Option<Piece> {
        self.next.lock().expect("sound").pop_front()
    }

    fn read(&self, piece: &Piece, buffer: &mut [u8]) -> Result<PieceRead, CaptureError> {
        let start = piece.first.0 as usize * BLOCK_BYTES;
        for page in piece.masks[0].iter() {
            let (at, from) = (page as usize * PAGE_BYTES, start + page as usize * PAGE_BYTES);
            let end = self.content.len().min(from + PAGE_BYTES);
            buffer[at..at + PAGE_BYTES].fill(0);
            buffer[at..at + end - from].copy_from_slice(&self.content[from..end]);
        }
        let mut permits: [Option<Permit>; 4] = Default::default();
        permits[0] = self.charged.lock().expect("sound").remove(&piece.first.0);
        let comparable = if self.comparable { piece.masks } else { PieceMasks::default() };
        Ok(PieceRead { masks: piece.masks, comparable, source_bytes: 0, permits })
    }

    fn pages(&self) -> u64 {
        0
    }
}

#[test]
fn pages_of_a_set_travel_whatever_is_known_of_them_unless_they_may_be_compared() {
    let bytes = noise(6, 6 * BLOCK_BYTES + 10);
    let path = image(&bytes);
    let mut bench = Bench::new(&path, EpochBounds::default(), ROOMY);
    bench.pass();
    let mut changed = bytes.clone();
    changed[2 * BLOCK_BYTES..2 * BLOCK_BYTES + PAGE_BYTES].fill(7);
    let blocks = [(2, PageMask(0b11)), (4, PageMask(1)), (6, PageMask(1))];
    let compared = bench.pass_over(InMemory::new(&bench, &blocks, changed.clone(), true, false));
    assert_eq!(changed_pages(&compared.records), 1, "only what differs");
    let sent = bench.pass_over(InMemory::new(&bench, &blocks, changed.clone(), false, false));
    assert_eq!(changed_pages(&sent.records), 4);
    assert!(bench.replica == changed);
}

#[test]
fn zero_pages_of_a_set_join_to_runs_only_where_their_blocks_adjoin_and_are_whole() {
    let path = image(&noise(7, 9 * BLOCK_BYTES));
    let mut bench = Bench::new(&path, EpochBounds::default(), ROOMY);
    let zeros = vec![0; 9 * BLOCK_BYTES];
    let blocks = [(1, PageMask::FULL), (2, PageMask::FULL), (4, PageMask::FULL), (5, PageMask(1))];
    let passed = bench.pass_over(InMemory::new(&bench, &blocks, zeros, false, false));
    let mut found: Vec<_> = passed
        .records
        .iter()
        .map(|record| (record.header().block.0, record.header().block_count, record.header().zero_mask))
        .collect();
    found.sort_unstable_by_key(|(block, ..)| *block);
    assert_eq!(found, [(1, 2, PageMask::FULL), (4, 1, PageMask::FULL), (5, 1, PageMask(1))]);
}

#[test]
fn what_was_charged_for_pages_in_memory_pays_for_their_records_though_the_budget_is_full() {
    let bytes = noise(8, 4 * BLOCK_BYTES);
    let path = image(&bytes);
    let mut bench = Bench::new(&path, EpochBounds::default(), 4 * (BLOCK_BYTES as u64 + 256));
    let blocks: Vec<_> = (0..4).map(|block| (block, PageMask::FULL)).collect();
    let pages = InMemory::new(&bench, &blocks, bytes.clone(), false, true);
    assert!(bench.budget.try_acquire(1).is_none(), "nothing is left");
    bench.pass_over(pages);
    assert!(bench.replica == bytes);
}

#[test]
fn a_volume_whose_agent_takes_nothing_does_not_hold_up_another() {
    let (busy_path, quiet_path) = (image(&noise(9, 400 * BLOCK_BYTES)), image(&noise(10, 3 * BLOCK_BYTES)));
    let busy = Bench::new(&busy_path, EpochBounds::default(), 1 << 30);
    let mut quiet = Bench::new(&quiet_path, EpochBounds::default(), ROOMY);
    quiet.pool = busy.pool.clone();
    let stuck = busy.start();
    let passed = quiet.pass();
    assert_eq!(passed.records.len(), 3);
    // It goes on until its outputs wait for the agent, and then no further, however often the others have their turns.
    let (mut read, mut unchanged) = (0, 0);
    while unchanged < 20 {
        quiet.pass();
        let now = stuck.progress().bytes_read();
        unchanged = if now == read && now > 0 { unchanged + 1 } else { 0 };
        read = now;
    }
    let most = (OUTPUTS_MAX + 2 * CHUNK_BLOCKS * (3 + READING_THREADS)) * BLOCK_BYTES;
    assert!(read <= most as u64, "{read} bytes were read for an agent that takes nothing, at most {most} may be");
}

/// A disk whose reads fail from some offset on, or whose readers die there.
struct Broken {
    geometry: Geometry,
    from: u64,
    dies: bool,
}

impl Disk for Broken {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CaptureError> {
        buffer.fill(1);
        if offset < self.from {
            return Ok(());
        }
        assert!(!self.dies, "this test's disk kills its reader");
        Err(CaptureError::Read {
            path: "broken".into(),
            offset,
            length: buffer.len(),
            source: io::Error::from_raw_os_error(5),
        })
    }

    fn check_size(&self) -> Result<(), CaptureError> {
        Ok(())
    }

    fn watch_rest(&self) -> RestProbe {
        RestProbe::none("a test")
    }
}

#[test]
fn a_read_error_or_a_dead_thread_fails_the_pass_and_is_its_last_word() {
    for dies in [false, true] {
        let geometry = Geometry::new(100 * BLOCK_BYTES as u64).expect("a disk");
        let bench = Bench::of(
            Arc::new(Broken { geometry, from: 40 * BLOCK_BYTES as u64, dies }),
            EpochBounds::default(),
            ROOMY,
        );
        let mut pass = bench.start();
        let error = loop {
            match pass.next_blocking() {
                Some(PassOutput::Sealed(_)) => {}
                Some(PassOutput::Failed(error)) => break error,
                other => panic!("{other:?}"),
            }
        };
        match error {
            PassError::Capture(CaptureError::Read { offset, .. }) if !dies => {
                assert!(offset >= 40 * BLOCK_BYTES as u64);
            }
            PassError::Died if dies => {}
            other => panic!("{other:?}"),
        }
        assert!(pass.next_blocking().is_none());
    }
}

#[derive(Debug, Clone)]
enum Change {
    Noise(u64),
    Zeros,
    Fill(u8),
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Whatever is written between passes, the replica is the disk after each, in small epochs of many threads, and what
    /// travels is never more than what was touched.
    #[test]
    fn the_replica_is_the_disk_after_every_pass(
        length in 4 * PAGE_BYTES..10 * BLOCK_BYTES,
        records in 1_u64..20,
        rounds in prop::collection::vec(
            prop::collection::vec(
                (any::<prop::sample::Index>(), 1_usize..3 * BLOCK_BYTES, prop_oneof![
                    any::<u64>().prop_map(Change::Noise),
                    Just(Change::Zeros),
                    any::<u8>().prop_map(Change::Fill),
                ]),
                0..6,
            ),
            1..4,
        ),
    ) {
        let path = image(&vec![0; length]);
        let mut bench = Bench::new(&path, EpochBounds { records, sealed_bytes: 100_000 }, 1 << 20);
        bench.pass();
        prop_assert!(bench.replica.iter().all(|byte| *byte == 0));
        for changes in rounds {
            let mut touched = std::collections::BTreeSet::new();
            for (at, bytes, change) in changes {
                let offset = at.index(length);
                let bytes = bytes.min(length - offset);
                let content = match change {
                    Change::Noise(seed) => noise(seed, bytes),
                    Change::Zeros => vec![0; bytes],
                    Change::Fill(byte) => vec![byte; bytes],
                };
                overwrite(&path, offset as u64, &content);
                touched.extend(offset / PAGE_BYTES..=(offset + bytes - 1) / PAGE_BYTES);
            }
            let passed = bench.pass();
            prop_assert!(bench.replica == std::fs::read(&path).expect("there"));
            prop_assert!(passed.summary.pages_changed <= touched.len() as u64);
        }
    }
}
