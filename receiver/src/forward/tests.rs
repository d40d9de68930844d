use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use catalog::volume::LogReader;
use catalog::volume::log::LogPosition;
use common::budget::MemoryTable;
use common::clock::UnixMillis;
use common::format::close::Consistency;
use common::format::log::LogEntry;
use common::format::segment::SegmentIndex;
use common::ids::BlockIndex;

use super::*;
use crate::stage::testing::{Source, stage_together};
use crate::stage::{CAPACITY_BYTES_MIN, MEMORY_BYTES_MIN, StageConfig};

const SEGMENT_BYTES: u64 = 1 << 20;
const HOUR: Duration = Duration::from_secs(3600);
const PATIENCE: Duration = Duration::from_secs(60);

/// A receiver's disk and a store, in one folder.
struct World {
    dir: tempfile::TempDir,
    store: Store,
}

impl World {
    async fn new(sources: &[&Source]) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(dir.path().join("store")).expect("a folder");
        let store = Store::open(&format!("file://{}/store", dir.path().display())).await.expect("a store");
        for source in sources {
            header::create(&store, &source.header).await.expect("the volume is new");
        }
        Self { dir, store }
    }

    /// The stage, once whoever had it has let go of it.
    async fn stage(&self) -> Stage {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let config = StageConfig::new(CAPACITY_BYTES_MIN, MEMORY_BYTES_MIN).expect("the minima are enough");
            match Stage::open(&self.dir.path().join("stage"), config) {
                Ok((stage, recovered)) => {
                    assert_eq!(recovered.damaged, []);
                    return stage;
                }
                Err(StageError::Locked { .. }) if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn forwarder(&self, stage: &Stage, linger: Duration) -> Forwarder {
        self.forwarder_with(stage, linger, 8 * SEGMENT_BYTES)
    }

    fn forwarder_with(&self, stage: &Stage, linger: Duration, memory: u64) -> Forwarder {
        let config = ForwardConfig {
            receiver: ReceiverId([6; 16]),
            segment_bytes: SEGMENT_BYTES,
            linger,
            upload_concurrency: 3,
        };
        let budget = Budget::new(MemoryTable::new(memory)).expect("a budget");
        Forwarder::start(stage.clone(), self.store.clone(), config, budget, Clock::manual(UnixMillis(0)))
    }

    async fn log(&self, source: &Source) -> Vec<LogEntry> {
        let mut reader = LogReader::open(&self.store, &source.header, LogPosition::default()).await.expect("a log");
        let mut entries = Vec::new();
        while let Some(read) = reader.next().await.expect("a good log") {
            entries.push(read.entry);
        }
        entries
    }

    /// Everything that the log says is committed, after checking it: each epoch once, whole, its segments as named.
    async fn committed(&self, source: &Source) -> BTreeMap<u64, BTreeMap<BlockIndex, Record>> {
        let mut found = BTreeMap::new();
        for entry in self.log(source).await {
            let mut records: BTreeMap<u64, BTreeMap<BlockIndex, Record>> = BTreeMap::new();
            let mut places: BTreeMap<u64, BTreeSet<u32>> = BTreeMap::new();
            for (number, segment) in entry.segments.iter().enumerate() {
                let bytes = self.store.get(&segment.path).await.expect("a named segment is there");
                assert_eq!(bytes.len() as u64, segment.size);
                assert!(segment.size <= SEGMENT_BYTES);
                assert_eq!(blake3::hash(&bytes).as_bytes(), &segment.digest.0);
                let index = SegmentIndex::decode_segment(&bytes).expect("a good segment");
                for group in index.groups {
                    places.entry(group.epoch.0).or_default().insert(u32::try_from(number).expect("few"));
                    for entry in group.entries {
                        let start = usize::try_from(entry.offset).expect("small");
                        let record = bytes.slice(start..start + entry.meta.record_len as usize);
                        let record = Record::parse(record).expect("a good record");
                        assert_eq!(record.meta(), entry.meta);
                        records.entry(group.epoch.0).or_default().insert(record.header().block, record);
                    }
                }
            }
            for epoch in entry.epochs {
                let (number, statement) = (epoch.close.statement().epoch.0, epoch.close.statement());
                let records = records.remove(&number).unwrap_or_default();
                assert_eq!(records.len() as u64, statement.records, "epoch {number} is whole in one entry");
                let named: BTreeSet<u32> = epoch.segments.into_iter().collect();
                assert_eq!(named, places.remove(&number).unwrap_or_default());
                assert!(found.insert(number, records).is_none(), "epoch {number} was committed twice");
            }
            assert!(records.is_empty(), "segments of an entry hold only its epochs");
        }
        found
    }

    async fn segments(&self, source: &Source) -> usize {
        self.store.list(&paths::segment_folder(source.volume())).await.expect("it lists").len()
    }
}

async fn stage_epoch(stage: &Stage, close: &Close, records: &[Record]) {
    let mut tickets = Vec::new();
    for record in records {
        tickets.push(stage.submit(record.clone(), None).await.expect("it is taken"));
    }
    for ticket in tickets {
        ticket.await.expect("it is durable");
    }
    stage.submit_close(close).expect("it is taken").await.expect("it is durable");
}

fn by_block(records: &[Record]) -> BTreeMap<BlockIndex, Record> {
    records.iter().map(|record| (record.header().block, record.clone())).collect()
}

async fn next(events: &mut mpsc::UnboundedReceiver<ForwardEvent>) -> ForwardEvent {
    tokio::time::timeout(PATIENCE, events.recv()).await.expect("an event within a minute").expect("the forwarder lives")
}

async fn until_committed(events: &mut mpsc::UnboundedReceiver<ForwardEvent>, last: CloseId) {
    loop {
        match next(events).await {
            ForwardEvent::Committed { close, .. } if close == last => return,
            ForwardEvent::Committed { .. } => {}
            ForwardEvent::Lost { text, .. } => panic!("{text}"),
        }
    }
}

async fn until_empty(stage: &Stage) {
    let deadline = Instant::now() + PATIENCE;
    while stage.used_bytes() > 0 {
        assert!(Instant::now() < deadline, "the stage still holds {} bytes", stage.used_bytes());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Three epochs: one of several segments, one small, one without records and with a point.
fn three_epochs(source: &mut Source) -> Vec<(Close, Vec<Record>)> {
    let large: Vec<_> = (0..50).map(|block| source.record(1, block, 16)).collect();
    let small: Vec<_> = (0..3).map(|block| source.record(3, block * 7, 1)).collect();
    let first = source.close(1, &large, None);
    let second = source.close(3, &small, None);
    let third = source.close(4, &[], Some(Consistency::Crash));
    vec![(first, large), (second, small), (third, Vec::new())]
}

#[tokio::test]
async fn closed_epochs_are_committed_whole_and_then_given_up_by_the_stage() {
    let (mut source, mut other) = (Source::new(1), Source::new(2));
    let world = World::new(&[&source, &other]).await;
    let stage = world.stage().await;
    let forwarder = world.forwarder(&stage, HOUR);
    let mut events = forwarder.events();
    let mut sent = Vec::new();
    for source in [&mut source, &mut other] {
        let epochs = three_epochs(source);
        for (close, records) in &epochs {
            stage_epoch(&stage, close, records).await;
            forwarder.handle().closed(source.volume(), Hold::NONE, close.clone());
        }
        sent.push(epochs);
    }
    let mut told: BTreeMap<VolumeId, Vec<CloseId>> = BTreeMap::new();
    for _ in 0..6 {
        match next(&mut events).await {
            ForwardEvent::Committed { volume, close } => told.entry(volume).or_default().push(close),
            ForwardEvent::Lost { text, .. } => panic!("{text}"),
        }
    }
    for (source, epochs) in [&source, &other].into_iter().zip(&sent) {
        assert_eq!(told[&source.volume()], epochs.iter().map(|(close, _)| close.id()).collect::<Vec<_>>());
        let expected: BTreeMap<_, _> =
            epochs.iter().map(|(close, records)| (close.statement().epoch.0, by_block(records))).collect();
        assert_eq!(world.committed(source).await, expected);
        assert!(world.segments(source).await >= 3);
    }
    until_empty(&stage).await;
    forwarder.drain().await;
}

#[tokio::test]
async fn a_crash_before_any_step_loses_nothing_and_commits_nothing_twice() {
    for step in [Step::Upload, Step::Log, Step::Tell, Step::Release] {
        let mut source = Source::new(1);
        let volume = source.volume();
        let world = World::new(&[&source]).await;
        let epochs = three_epochs(&mut source);
        let last = epochs.last().expect("three").0.id();
        {
            let stage = world.stage().await;
            let forwarder = world.forwarder(&stage, Duration::ZERO).crashing_before(step);
            let mut events = forwarder.events();
            for (close, records) in &epochs {
                stage_epoch(&stage, close, records).await;
                forwarder.handle().closed(volume, Hold::NONE, close.clone());
            }
            while !matches!(next(&mut events).await, ForwardEvent::Lost { .. }) {}
        }
        // What a start does: closed epochs after the log's head go on, in order.
        let stage = world.stage().await;
        let before = world.committed(&source).await;
        assert_eq!(before.is_empty(), matches!(step, Step::Upload | Step::Log), "{step:?}");
        let head = before.keys().last().copied().unwrap_or(0);
        let forwarder = world.forwarder(&stage, Duration::ZERO);
        let mut events = forwarder.events();
        let staged = stage.volume(volume).epochs;
        assert_eq!(staged.len(), 3, "nothing is given up before it is told ({step:?})");
        let rest: Vec<_> = staged.into_iter().filter(|state| state.epoch.0 > head).collect();
        for state in &rest {
            forwarder.handle().closed(volume, Hold::NONE, state.close.clone().expect("it was closed"));
        }
        if rest.is_empty() {
            // A later epoch shows that what was committed before is given up.
            let next = source.close(5, &[], Some(Consistency::Crash));
            stage_epoch(&stage, &next, &[]).await;
            forwarder.handle().closed(volume, Hold::NONE, next.clone());
            until_committed(&mut events, next.id()).await;
        } else {
            until_committed(&mut events, last).await;
        }
        until_empty(&stage).await;
        let found = world.committed(&source).await;
        for (close, records) in &epochs {
            assert_eq!(found[&close.statement().epoch.0], by_block(records), "{step:?}");
        }
        forwarder.drain().await;
    }
}

#[tokio::test]
async fn small_epochs_wait_for_each_other_and_a_drain_does_not_wait() {
    let mut source = Source::new(1);
    let world = World::new(&[&source]).await;
    let stage = world.stage().await;
    let forwarder = world.forwarder(&stage, HOUR);
    let mut expected = BTreeMap::new();
    for epoch in 1..=5 {
        let records = [source.record(epoch, epoch, 2)];
        let close = source.close(epoch, &records, None);
        stage_epoch(&stage, &close, &records).await;
        forwarder.handle().closed(source.volume(), Hold::NONE, close);
        expected.insert(epoch, by_block(&records));
    }
    forwarder.drain().await;
    assert_eq!(world.committed(&source).await, expected);
    assert_eq!(world.segments(&source).await, 1);
    until_empty(&stage).await;
}

#[tokio::test]
async fn memory_for_less_than_two_segments_is_enough() {
    let mut source = Source::new(1);
    let world = World::new(&[&source]).await;
    let stage = world.stage().await;
    let forwarder = world.forwarder_with(&stage, Duration::ZERO, SEGMENT_BYTES / 2);
    let records: Vec<_> = (0..100).map(|block| source.record(1, block, 16)).collect();
    let close = source.close(1, &records, None);
    stage_epoch(&stage, &close, &records).await;
    forwarder.handle().closed(source.volume(), Hold::NONE, close);
    forwarder.drain().await;
    assert_eq!(world.committed(&source).await, BTreeMap::from([(1, by_block(&records))]));
}

#[tokio::test]
async fn another_receiver_that_took_the_log_fences_this_one_and_its_epoch_stays_staged() {
    let mut source = Source::new(1);
    let volume = source.volume();
    let world = World::new(&[&source]).await;
    let stage = world.stage().await;
    let forwarder = world.forwarder(&stage, Duration::ZERO);
    let mut events = forwarder.events();
    let first = source.close(1, &[], None);
    stage_epoch(&stage, &first, &[]).await;
    forwarder.handle().closed(volume, Hold::NONE, first.clone());
    until_committed(&mut events, first.id()).await;
    let winner = ReceiverId([7; 16]);
    let taken = LogWriter::open(&world.store, &source.header, winner, &Clock::manual(UnixMillis(0))).await;
    taken.expect("the log is free to take");
    let records = [source.record(2, 1, 1)];
    let second = source.close(2, &records, None);
    stage_epoch(&stage, &second, &records).await;
    forwarder.handle().closed(volume, Hold::NONE, second);
    let ForwardEvent::Lost { volume: lost, code, text, .. } = next(&mut events).await else { panic!("not lost") };
    assert_eq!((lost, code), (volume, RefusalCode::Fenced));
    assert!(text.contains(&winner.to_string()), "{text}");
    assert_eq!(stage.staged_records(volume, Epoch(2)).len(), 1);
    assert_eq!(world.committed(&source).await.keys().copied().collect::<Vec<_>>(), [1]);
}

#[tokio::test]
async fn a_right_that_another_receiver_took_is_known_to_be_lost_and_not_taken_back_for_leftovers() {
    let mut source = Source::new(1);
    let volume = source.volume();
    let world = World::new(&[&source]).await;
    let stage = world.stage().await;
    let forwarder = world.forwarder(&stage, Duration::ZERO);
    let mut events = forwarder.events();
    let handle = forwarder.handle();
    let taken = handle.take(source.header.clone(), false).await.expect("it works").expect("a claim takes it");
    assert!(taken.continues, "nobody had it before");
    assert!(handle.holds(volume, taken.hold).await.expect("it works"));
    let first = source.close(1, &[], None);
    stage_epoch(&stage, &first, &[]).await;
    handle.closed(volume, taken.hold, first.clone());
    until_committed(&mut events, first.id()).await;
    assert!(handle.holds(volume, taken.hold).await.expect("it works"), "its own entries take nothing from it");
    let again = handle.take(source.header.clone(), true).await.expect("it works").expect("its own leftovers go on");
    assert!(again.continues && again.head.close == first.id());
    assert!(!handle.holds(volume, taken.hold).await.expect("it works"), "the earlier taking is over");

    let winner = ReceiverId([7; 16]);
    let other = LogWriter::open(&world.store, &source.header, winner, &Clock::manual(UnixMillis(0))).await;
    other.expect("the log is free to take");
    assert!(!handle.holds(volume, again.hold).await.expect("it works"));
    assert!(handle.take(source.header.clone(), true).await.expect("it works").is_none(), "it is the winner's");
    let second = source.close(2, &[], None);
    stage_epoch(&stage, &second, &[]).await;
    handle.closed(volume, taken.hold, second.clone());
    handle.closed(volume, again.hold, second);
    let ForwardEvent::Lost { hold, code, .. } = next(&mut events).await else { panic!("not lost") };
    assert_eq!((hold, code), (again.hold, RefusalCode::Fenced), "closes of an earlier load are not even tried");
    let back = handle.take(source.header.clone(), false).await.expect("it works").expect("a claim takes it");
    assert!(!back.continues, "what was staged before may be forgotten by its sender");
}

#[tokio::test]
async fn a_close_that_does_not_follow_the_log_is_lost_and_nothing_is_written() {
    let mut source = Source::new(1);
    let volume = source.volume();
    let world = World::new(&[&source]).await;
    let stage = world.stage().await;
    let forwarder = world.forwarder(&stage, Duration::ZERO);
    let mut events = forwarder.events();
    source.close(1, &[], None);
    let second = source.close(2, &[], None);
    stage_epoch(&stage, &second, &[]).await;
    forwarder.handle().closed(volume, Hold::NONE, second);
    let ForwardEvent::Lost { code, .. } = next(&mut events).await else { panic!("not lost") };
    assert_eq!(code, RefusalCode::Failed);
    assert!(world.committed(&source).await.is_empty());
}

#[tokio::test]
async fn a_store_that_fails_is_tried_until_it_works() {
    let mut source = Source::new(1);
    let volume = source.volume();
    let world = World::new(&[&source]).await;
    let stage = world.stage().await;
    // No segment can be written where a file is in the way of their folder.
    let folder = world.dir.path().join("store").join(paths::segment_folder(volume));
    std::fs::write(&folder, b"in the way").expect("writable");
    let forwarder = world.forwarder(&stage, Duration::ZERO);
    let mut events = forwarder.events();
    let records = [source.record(1, 1, 1)];
    let close = source.close(1, &records, None);
    stage_epoch(&stage, &close, &records).await;
    forwarder.handle().closed(volume, Hold::NONE, close.clone());
    assert!(tokio::time::timeout(Duration::from_millis(300), events.recv()).await.is_err(), "nothing is told yet");
    assert!(world.committed(&source).await.is_empty());
    std::fs::remove_file(&folder).expect("removable");
    until_committed(&mut events, close.id()).await;
    assert_eq!(world.committed(&source).await, BTreeMap::from([(1, by_block(&records))]));
}

/// Flips one bit of `record` where it lies in a file of the stage.
fn damage(dir: &Path, record: &Record) {
    let needle = &record.bytes()[record.bytes().len() - 64..];
    for entry in std::fs::read_dir(dir.join("stage/db")).expect("a database") {
        let path = entry.expect("an entry").path();
        let mut bytes = std::fs::read(&path).expect("readable");
        if path.extension().is_some_and(|ending| ending == "sst")
            && let Some(at) = bytes.windows(needle.len()).position(|window| window == needle)
        {
            bytes[at + 3] ^= 1;
            std::fs::write(&path, bytes).expect("writable");
            return;
        }
    }
    panic!("the record lies in no file");
}

#[tokio::test]
async fn a_damaged_epoch_is_not_committed_but_dropped() {
    let mut source = Source::new(1);
    let volume = source.volume();
    let world = World::new(&[&source]).await;
    let stage = world.stage().await;
    let records: Vec<_> = (0..40).map(|block| source.record(1, block, 16)).collect();
    let close = source.close(1, &records, None);
    // One batch, for RocksDB keeps the first and last block of a file that it takes in, and would give those from memory.
    stage_together(&stage, records.clone()).await;
    stage_epoch(&stage, &close, &[]).await;
    damage(world.dir.path(), &records[20]);
    let forwarder = world.forwarder(&stage, Duration::ZERO);
    let mut events = forwarder.events();
    forwarder.handle().closed(volume, Hold::NONE, close);
    let ForwardEvent::Lost { code, text, .. } = next(&mut events).await else { panic!("not lost") };
    assert_eq!(code, RefusalCode::Failed);
    assert!(text.contains("block 20"), "{text}");
    assert!(stage.volume(volume).epochs.is_empty());
    assert!(world.committed(&source).await.is_empty());
}

#[tokio::test]
async fn a_checkpoint_is_made_after_many_entries() {
    let mut source = Source::new(1);
    let volume = source.volume();
    let world = World::new(&[&source]).await;
    let stage = world.stage().await;
    let forwarder = world.forwarder(&stage, Duration::ZERO);
    let mut events = forwarder.events();
    for epoch in 1..=limits::CHECKPOINT_INTERVAL_ENTRIES {
        let records = [source.record(epoch, epoch, 1)];
        let close = source.close(epoch, &records, Some(Consistency::Crash));
        stage_epoch(&stage, &close, &records).await;
        forwarder.handle().closed(volume, Hold::NONE, close.clone());
        until_committed(&mut events, close.id()).await;
    }
    forwarder.drain().await;
    let made = world.store.list(&paths::checkpoint_folder(volume)).await.expect("it lists");
    assert_eq!(made.len(), 1);
    let view = catalog::volume::open_view(&world.store, &source.header).await.expect("it opens");
    assert!(view.checkpoint_at.0 >= limits::CHECKPOINT_INTERVAL_ENTRIES);
    assert_eq!(view.position.last_epoch(), Epoch(limits::CHECKPOINT_INTERVAL_ENTRIES));
}

#[test]
fn segment_names_sort_by_time_and_have_the_form_of_ulids() {
    let (early, late) = (ulid(1_700_000_000_000, [255; 10]), ulid(1_700_000_000_001, [0; 10]));
    assert!(early < late);
    assert_eq!(early.len(), 26);
    assert_eq!(ulid(0, [0; 10]), "0".repeat(26));
    assert_eq!(ulid((1 << 48) - 1, [255; 10]), format!("7{}", "Z".repeat(25)));
}
