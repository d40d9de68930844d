use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use common::format::close::Close;
use common::format::record::Record;
use common::ids::{BlockIndex, Epoch, SealTag, SessionId, VolumeId};
use proptest::prelude::*;

use super::db::Scanned;
use super::index::Family;
use super::testing::{Source, stage_together};
use super::*;

const MIB: u64 = 1 << 20;

fn config() -> StageConfig {
    StageConfig::new(CAPACITY_BYTES_MIN, MEMORY_BYTES_MIN).expect("the minima are enough")
}

/// Full at 4 MiB, open again at 2 MiB, with room up to 8 MiB.
fn small() -> StageConfig {
    StageConfig { capacity_bytes: 8 * MIB, high_bytes: 4 * MIB, low_bytes: 2 * MIB, ..config() }
}

fn open(dir: &Path, config: StageConfig) -> (Stage, Recovered) {
    Stage::open(dir, config).expect("the stage opens")
}

async fn stage_all(stage: &Stage, records: &[Record]) {
    let mut tickets = Vec::new();
    for record in records {
        tickets.push(stage.submit(record.clone(), None).await.expect("it is taken"));
    }
    for ticket in tickets {
        ticket.await.expect("it is durable");
    }
}

async fn close(stage: &Stage, close: &Close) {
    stage.submit_close(close).expect("it is taken").await.expect("it is durable");
}

fn contents(stage: &Stage, volume: VolumeId, epoch: u64, chunk: usize) -> BTreeMap<BlockIndex, Record> {
    let mut reader = stage.read_epoch(volume, Epoch(epoch)).expect("it is staged");
    let mut found = BTreeMap::new();
    loop {
        let records = reader.next_chunk(chunk).expect("it reads");
        if records.is_empty() {
            return found;
        }
        for record in records {
            let block = record.header().block;
            assert!(found.insert(block, record).is_none(), "block {block} was read twice");
        }
    }
}

fn by_block(records: &[Record]) -> BTreeMap<BlockIndex, Record> {
    records.iter().map(|record| (record.header().block, record.clone())).collect()
}

/// Waits until something that happens in the background has happened.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not happen in a minute");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn sst_files(dir: &Path) -> Vec<(std::path::PathBuf, u64)> {
    let entries = std::fs::read_dir(dir.join("db")).expect("a database");
    let entries = entries.map(|entry| entry.expect("an entry"));
    let files = entries.filter(|entry| entry.path().extension().is_some_and(|ending| ending == "sst"));
    files.map(|entry| (entry.path(), entry.metadata().expect("a file").len())).collect()
}

fn newest_batch(stage: &Stage) -> u64 {
    let mut newest = 0;
    for family in [Family::Records, Family::Trickle] {
        let scanned = stage.shared.db.scan(family, &[], None, true, |found| {
            if let Scanned::Value { key, .. } = found {
                newest = newest.max(key.batch.0);
            }
            true
        });
        scanned.expect("it reads");
    }
    newest
}

#[tokio::test]
async fn a_reopened_stage_holds_everything_that_was_acknowledged() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut source = Source::new(1);
    let volume = source.volume();
    let session = SessionId([5; 16]);
    // One batch is a file of its own (over 256 KiB), the others go through the log.
    let first: Vec<_> = (0..40).map(|block| source.record(1, block * 3, 4)).collect();
    let second: Vec<_> = (0..3).map(|block| source.record(2, block, 1)).collect();
    let first_close = source.close(1, &first, None);
    {
        let (stage, recovered) = open(dir.path(), config());
        assert_eq!(recovered, Recovered::default());
        stage.set_session(volume, session).await.expect("it is stored");
        stage_all(&stage, &first).await;
        close(&stage, &first_close).await;
        stage_all(&stage, &second).await;
        stage.shutdown().await;
    }
    let (stage, recovered) = open(dir.path(), config());
    assert_eq!(recovered.damaged, []);
    let [found] = &recovered.volumes[..] else { panic!("one volume, not {recovered:?}") };
    assert_eq!((found.volume, found.session, found.next_epoch), (volume, session, Epoch(3)));
    let states: Vec<_> = found.epochs.iter().map(|epoch| (epoch.epoch.0, epoch.records, epoch.close.clone())).collect();
    assert_eq!(states, [(1, 40, Some(first_close)), (2, 3, None)]);
    let tags: Vec<_> = second.iter().map(|record| (record.header().block, record.meta().tag)).collect();
    assert_eq!(stage.staged_records(volume, Epoch(2)), tags);
    for chunk in [1, 100 << 10, 1 << 30] {
        assert_eq!(contents(&stage, volume, 1, chunk), by_block(&first));
        assert_eq!(contents(&stage, volume, 2, chunk), by_block(&second));
    }
    let metas = stage.epoch_meta(volume, Epoch(1)).await.expect("it reads");
    assert_eq!(metas, first.iter().map(Record::meta).collect::<Vec<_>>());
    // A resumed epoch goes on where it was.
    assert!(stage.submit(second[0].clone(), None).await.expect("it is known").is_resent());
    stage_all(&stage, &[source.record(2, 7, 1)]).await;
    assert_eq!(stage.staged_records(volume, Epoch(2)).len(), 4);
}

#[tokio::test]
async fn a_record_sent_again_is_staged_once_and_another_in_its_place_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let (stage, _) = open(dir.path(), config());
    let mut source = Source::new(1);
    let record = source.record(1, 4, 2);
    let first = stage.submit(record.clone(), None).await.expect("it is taken");
    let second = stage.submit(record.clone(), None).await.expect("it is taken");
    assert!(!first.is_resent() && second.is_resent());
    first.await.expect("it is durable");
    second.await.expect("it is durable with the first");
    let third = stage.submit(record.clone(), None).await.expect("it is taken");
    assert!(third.is_resent());
    third.await.expect("it is durable");
    assert_eq!(stage.used_bytes(), record.bytes().len() as u64);
    let other = source.record(1, 4, 2);
    let error = stage.submit(other, None).await.expect_err("another record");
    assert_eq!(error, StageError::Conflict { volume: source.volume(), epoch: Epoch(1), block: BlockIndex(4) });
}

#[tokio::test]
async fn an_epoch_that_ended_takes_nothing_more_also_after_a_restart() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut source = Source::new(1);
    let volume = source.volume();
    let committed = source.record(1, 1, 1);
    let first_close = source.close(1, std::slice::from_ref(&committed), None);
    let dropped = source.record(2, 1, 1);
    let closed = source.record(3, 1, 1);
    let third_close = source.close(3, std::slice::from_ref(&closed), None);
    {
        let (stage, _) = open(dir.path(), config());
        stage_all(&stage, &[committed, dropped, closed.clone()]).await;
        close(&stage, &first_close).await;
        stage.release(volume, Epoch(1)).await.expect("released");
        stage.drop_epoch(volume, Epoch(2)).await.expect("dropped");
        // A close that claims a record that is not there is refused, and does not end the epoch.
        let missing = source.record(3, 2, 1);
        let lying = source.close(3, &[closed.clone(), missing], None);
        let error = stage.submit_close(&lying).expect_err("a record is missing");
        assert_eq!(error, StageError::Incomplete { volume, epoch: Epoch(3), found: 1, expected: 2 });
        close(&stage, &third_close).await;
        assert!(stage.submit_close(&third_close).expect("known").is_resent());
        stage.shutdown().await;
    }
    let (stage, recovered) = open(dir.path(), config());
    assert_eq!(recovered.damaged, []);
    assert_eq!(recovered.volumes[0].epochs.iter().map(|epoch| epoch.epoch.0).collect::<Vec<_>>(), [3]);
    assert_eq!((recovered.volumes[0].released, recovered.volumes[0].next_epoch), (Epoch(1), Epoch(4)));
    for (epoch, state) in [(1, "committed"), (2, "dropped"), (3, "closed")] {
        let error = stage.submit(source.record(epoch, 9, 1), None).await.expect_err("it ended");
        assert_eq!(error, StageError::EpochEnded { volume, epoch: Epoch(epoch), state });
    }
}

#[tokio::test]
async fn dropped_and_released_epochs_free_their_files() {
    let dir = tempfile::tempdir().expect("a folder");
    let (stage, _) = open(dir.path(), config());
    let mut source = Source::new(1);
    let volume = source.volume();
    let first: Vec<_> = (0..64).map(|block| source.record(1, block, 16)).collect();
    let second: Vec<_> = (0..64).map(|block| source.record(2, block, 16)).collect();
    stage_all(&stage, &first).await;
    close(&stage, &source.close(1, &first, None)).await;
    stage_all(&stage, &second).await;
    stage_all(&stage, &[source.record(2, 100, 1)]).await;
    assert!(stage.used_bytes() > 8 * MIB);
    let on_disk = || sst_files(dir.path()).iter().map(|(_, len)| len).sum::<u64>();
    assert!(on_disk() > 6 * MIB);
    stage.release(volume, Epoch(1)).await.expect("released");
    eventually("freeing the first epoch", || stage.used_bytes() < 5 * MIB).await;
    assert!(stage.read_epoch(volume, Epoch(1)).is_err());
    assert_eq!(contents(&stage, volume, 2, 1 << 20).len(), 65);
    stage.drop_epoch(volume, Epoch(2)).await.expect("dropped");
    eventually("freeing all", || stage.used_bytes() == 0).await;
    eventually("deleting the files", || on_disk() < MIB).await;
}

#[tokio::test]
async fn batch_numbers_only_grow_even_if_everything_was_deleted() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut source = Source::new(1);
    let volume = source.volume();
    let mut newest = 0;
    for epoch in 1..4 {
        let (stage, _) = open(dir.path(), config());
        let records: Vec<_> = (0..8).map(|block| source.record(epoch, block, 16)).collect();
        stage_all(&stage, &records).await;
        stage_all(&stage, &[source.record(epoch, 9, 1)]).await;
        let found = newest_batch(&stage);
        assert!(found > newest, "batch {found} after {newest}");
        newest = found;
        stage.drop_epoch(volume, Epoch(epoch)).await.expect("dropped");
        eventually("freeing all", || stage.used_bytes() == 0).await;
        stage.shutdown().await;
    }
}

/// Flips one bit of `record` where it lies in a file of the stage.
fn damage(dir: &Path, record: &Record) {
    let needle = &record.bytes()[record.bytes().len() - 64..];
    for (path, _) in sst_files(dir) {
        let mut bytes = std::fs::read(&path).expect("readable");
        if let Some(at) = bytes.windows(needle.len()).position(|window| window == needle) {
            bytes[at + 5] ^= 0x10;
            std::fs::write(&path, bytes).expect("writable");
            return;
        }
    }
    panic!("the record lies in no file");
}

#[tokio::test]
async fn a_damaged_record_is_named_and_only_its_epoch_suffers() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut source = Source::new(1);
    let volume = source.volume();
    let closed: Vec<_> = (0..20).map(|block| source.record(1, block, 8)).collect();
    let whole: Vec<_> = (0..20).map(|block| source.record(2, block, 8)).collect();
    let open_records: Vec<_> = (0..20).map(|block| source.record(3, block, 8)).collect();
    let (first_close, second_close) = (source.close(1, &closed, None), source.close(2, &whole, None));
    {
        let (stage, _) = open(dir.path(), config());
        stage_all(&stage, &closed).await;
        close(&stage, &first_close).await;
        stage_all(&stage, &whole).await;
        close(&stage, &second_close).await;
        stage_all(&stage, &open_records).await;
        stage.shutdown().await;
    }
    damage(dir.path(), &closed[7]);
    damage(dir.path(), &open_records[19]);
    for again in [false, true] {
        let (stage, recovered) = open(dir.path(), config());
        let named: Vec<_> = recovered
            .damaged
            .iter()
            .filter_map(|error| match error {
                StageError::DamagedRecord { volume: found, epoch, block, .. } if *found == volume => {
                    Some((epoch.0, block.0))
                }
                _ => None,
            })
            .collect();
        if !again {
            assert_eq!(named, [(1, 7), (3, 19)]);
            assert!(recovered.damaged.contains(&StageError::Incomplete {
                volume,
                epoch: Epoch(1),
                found: 19,
                expected: 20
            }));
        }
        let states: Vec<_> = recovered.volumes[0].epochs.iter().map(|epoch| (epoch.epoch.0, epoch.records)).collect();
        assert_eq!(states, [(2, 20), (3, if again { 20 } else { 19 })]);
        assert_eq!(contents(&stage, volume, 2, 1 << 20), by_block(&whole));
        // What the open epoch lost is sent again.
        stage_all(&stage, &open_records).await;
        assert_eq!(contents(&stage, volume, 3, 1 << 20), by_block(&open_records));
        stage.shutdown().await;
    }
}

#[tokio::test]
async fn damage_after_the_start_is_found_when_the_epoch_is_read() {
    let dir = tempfile::tempdir().expect("a folder");
    let (stage, _) = open(dir.path(), config());
    let mut source = Source::new(1);
    let records: Vec<_> = (0..20).map(|block| source.record(1, block, 8)).collect();
    // One batch, for RocksDB keeps the first and last block of a file that it takes in, and would give those from memory.
    stage_together(&stage, records.clone()).await;
    damage(dir.path(), &records[11]);
    let mut reader = stage.read_epoch(source.volume(), Epoch(1)).expect("it is staged");
    let error = loop {
        match reader.next_chunk(64 << 10) {
            Ok(records) => assert!(!records.is_empty(), "the damage was not found"),
            Err(error) => break error,
        }
    };
    let StageError::DamagedRecord { epoch, block, .. } = error else { panic!("{error}") };
    assert_eq!((epoch, block), (Epoch(1), BlockIndex(11)));
}

#[tokio::test]
async fn the_gate_shuts_at_the_high_mark_and_opens_when_space_was_freed() {
    let dir = tempfile::tempdir().expect("a folder");
    let (stage, _) = open(dir.path(), small());
    let (mut source, mut other) = (Source::new(1), Source::new(2));
    let volume = source.volume();
    let intake = stage.intake_of(other.volume());
    intake.admit().await.expect("open");
    let records: Vec<_> = (0..64).map(|block| source.record(1, block, 16)).collect();
    stage_all(&stage, &records).await;
    close(&stage, &source.close(1, &records, None)).await;
    assert_eq!(*stage.intake().borrow(), Intake::Full { favoured: None });
    {
        let waiting = intake.admit();
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        // Not by what is committed alone, but once its space is free.
        stage.release(volume, Epoch(1)).await.expect("released");
        waiting.await.expect("open again");
    }
    assert_eq!(*stage.intake().borrow(), Intake::Open);
    stage_all(&stage, &[other.record(1, 1, 1)]).await;
}

#[tokio::test]
async fn a_stage_full_of_open_epochs_lets_one_volume_finish() {
    let dir = tempfile::tempdir().expect("a folder");
    let (stage, _) = open(dir.path(), small());
    let mut sources = [Source::new(1), Source::new(2)];
    let records: Vec<Vec<_>> = sources
        .iter_mut()
        .zip([40, 24])
        .map(|(source, count)| (0..count).map(|block| source.record(1, block, 16)).collect())
        .collect();
    stage_all(&stage, &records[0]).await;
    stage_all(&stage, &records[1]).await;
    let intakes = [stage.intake_of(sources[0].volume()), stage.intake_of(sources[1].volume())];
    let favoured = |stage: &Stage| match *stage.intake().borrow() {
        Intake::Full { favoured } => favoured,
        ref other => panic!("{other:?}"),
    };
    // Only the second waits, so it is the one that may go on …
    intakes[1].admit().await.expect("favoured");
    assert_eq!(favoured(&stage), Some(sources[1].volume()));
    let mut first = Box::pin(intakes[0].admit());
    assert!(futures::poll!(&mut first).is_pending());
    intakes[0].passed_over(|other| other == sources[1].volume()).await;
    assert!(futures::poll!(Box::pin(intakes[0].passed_over(|_| false))).is_pending(), "it does not mind that one");
    assert!(futures::poll!(Box::pin(intakes[1].passed_over(|_| true))).is_pending(), "it is the one that goes on");
    // … until it has closed its epoch, which can then be forwarded.
    close(&stage, &sources[1].close(1, &records[1], None)).await;
    assert_eq!(favoured(&stage), None);
    assert!(futures::poll!(&mut first).is_pending());
    stage.release(sources[1].volume(), Epoch(1)).await.expect("released");
    // Its space does not reach down to the low mark: now the first may go on.
    first.await.expect("favoured or open");
    // A favoured volume whose sender goes away does not keep the others out.
    drop(intakes);
    eventually("forgetting it", || !matches!(*stage.intake().borrow(), Intake::Full { favoured: Some(_) })).await;
}

#[tokio::test]
async fn a_file_kept_by_a_few_records_of_a_slow_volume_is_rewritten_when_the_stage_is_full() {
    let dir = tempfile::tempdir().expect("a folder");
    let (stage, _) = open(dir.path(), small());
    let (mut fast, mut slow) = (Source::new(1), Source::new(2));
    let kept = slow.record(1, 5, 1);
    let records: Vec<_> = (0..64).map(|block| fast.record(1, block, 16)).collect();
    let mut batch = vec![kept.clone()];
    batch.extend(records.iter().cloned());
    stage_together(&stage, batch).await;
    close(&stage, &fast.close(1, &records, None)).await;
    stage.release(fast.volume(), Epoch(1)).await.expect("released");
    eventually("freeing the dead records", || stage.used_bytes() < 2 * MIB).await;
    eventually("deleting their files", || sst_files(dir.path()).iter().map(|(_, len)| len).sum::<u64>() < 2 * MIB)
        .await;
    assert_eq!(contents(&stage, slow.volume(), 1, 1 << 20), by_block(&[kept]));
    stage.shutdown().await;
    let (stage, recovered) = open(dir.path(), small());
    assert_eq!(recovered.damaged, []);
    assert_eq!(stage.staged_records(slow.volume(), Epoch(1)).len(), 1);
}

#[tokio::test]
async fn a_disk_that_fails_ends_intake_and_acknowledges_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let (stage, _) = open(dir.path(), config());
    let mut source = Source::new(1);
    stage_all(&stage, &[source.record(1, 1, 1)]).await;
    // No file can be made any more where files are written before they are taken in.
    std::fs::remove_dir_all(dir.path().join("incoming")).expect("removable");
    std::fs::write(dir.path().join("incoming"), b"in the way").expect("writable");
    let mut tickets = Vec::new();
    for block in 10..30 {
        // The failure may be known before the last of them is handed in.
        tickets.extend(stage.submit(source.record(1, block, 64), None).await.ok());
    }
    for ticket in tickets {
        let error = ticket.await.expect_err("it is not durable");
        assert!(error.is_fatal(), "{error}");
        assert!(error.to_string().contains(&dir.path().display().to_string()), "{error}");
    }
    assert!(matches!(*stage.intake().borrow(), Intake::Failed(_)));
    assert!(stage.intake_of(source.volume()).admit().await.is_err());
    assert!(stage.submit(source.record(1, 99, 1), None).await.is_err());
    assert_eq!(stage.staged_records(source.volume(), Epoch(1)).len(), 1);
    stage.shutdown().await;
    std::fs::remove_file(dir.path().join("incoming")).expect("removable");
    let (stage, recovered) = open(dir.path(), config());
    assert_eq!(recovered.damaged, []);
    assert_eq!(stage.staged_records(source.volume(), Epoch(1)).len(), 1);
}

#[tokio::test]
async fn an_open_epoch_that_was_forgotten_frees_its_space_and_may_come_again() {
    let dir = tempfile::tempdir().expect("a folder");
    let (stage, _) = open(dir.path(), config());
    let mut source = Source::new(1);
    let volume = source.volume();
    let large: Vec<_> = (0..8).map(|block| source.record(1, block, 64)).collect();
    stage_all(&stage, &large).await;
    let small = [source.record(1, 100, 1)];
    stage_all(&stage, &small).await;
    stage.forget_open(volume, Epoch(1)).await.expect("forgotten");
    assert_eq!(stage.staged_records(volume, Epoch(1)), []);
    eventually("freeing its space", || stage.used_bytes() == 0).await;
    let again = stage.submit(small[0].clone(), None).await.expect("its number is not used up");
    assert!(!again.is_resent());
    again.await.expect("durable");
    close(&stage, &source.close(1, &small, None)).await;
    stage.forget_open(volume, Epoch(1)).await.expect("nothing to do");
    assert_eq!(stage.staged_records(volume, Epoch(1)).len(), 1, "a closed epoch stays");
    stage.shutdown().await;
    let (stage, recovered) = open(dir.path(), config());
    assert_eq!(recovered.damaged, []);
    assert_eq!(contents(&stage, volume, 1, 1 << 20), by_block(&small));
}

#[test]
fn unusable_stages_are_named_errors() {
    let dir = tempfile::tempdir().expect("a folder");
    assert!(matches!(StageConfig::new(MIB, MEMORY_BYTES_MIN), Err(StageError::CapacityTooSmall { .. })));
    assert!(matches!(StageConfig::new(CAPACITY_BYTES_MIN, MIB), Err(StageError::MemoryTooSmall { .. })));
    let (_stage, _) = open(dir.path(), config());
    let error = Stage::open(dir.path(), config()).expect_err("it is in use");
    assert_eq!(error, StageError::Locked { dir: dir.path().to_path_buf() });
    let file = dir.path().join("file");
    std::fs::write(&file, b"").expect("writable");
    let error = Stage::open(&file, config()).expect_err("it is a file");
    assert!(matches!(error, StageError::Io { .. }), "{error}");
}

#[tokio::test]
async fn a_stage_of_a_newer_release_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a folder");
    {
        let (stage, _) = open(dir.path(), config());
        stage.shutdown().await;
        let database = Database::open(dir.path(), DatabaseMemory { write_buffer_bytes: 1 << 20, cache_bytes: 1 << 20 });
        let newer = common::format::envelope::Kind {
            what: "stage batch ceiling",
            magic: *b"BFSTGCEI",
            version: 2,
            body_bytes_max: 64,
        };
        database.expect("it opens").put_row(b"c", &newer.seal(&[0; 8])).expect("it writes");
    }
    let error = Stage::open(dir.path(), config()).expect_err("another version");
    let StageError::Version { reason, .. } = &error else { panic!("{error}") };
    assert!(reason.contains("version 2"), "{reason}");
}

#[derive(Debug, Clone)]
enum Op {
    Put { volume: usize, block: u64, pages: u32 },
    PutMany { volume: usize, first: u64 },
    Close { volume: usize },
    DropOpen { volume: usize },
    Release { volume: usize },
    Reopen,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let volume = || 0..2_usize;
    let op = prop_oneof![
        6 => (volume(), 0..12_u64, 1..4_u32).prop_map(|(volume, block, pages)| Op::Put { volume, block, pages }),
        2 => (volume(), 20..40_u64).prop_map(|(volume, first)| Op::PutMany { volume, first }),
        3 => volume().prop_map(|volume| Op::Close { volume }),
        1 => volume().prop_map(|volume| Op::DropOpen { volume }),
        2 => volume().prop_map(|volume| Op::Release { volume }),
        2 => Just(Op::Reopen),
    ];
    proptest::collection::vec(op, 1..30)
}

/// What the stage must hold: records and the close of each epoch.
type Model = BTreeMap<(usize, u64), (BTreeMap<BlockIndex, Record>, Option<Close>)>;

fn compare(stage: &Stage, sources: &[Source; 2], model: &Model) {
    for (number, source) in sources.iter().enumerate() {
        let volume = source.volume();
        let expected: Vec<_> = model.range((number, 0)..(number + 1, 0)).collect();
        let found = stage.volume(volume).epochs;
        assert_eq!(
            found.iter().map(|state| (state.epoch.0, state.close.as_ref().map(Close::id))).collect::<Vec<_>>(),
            expected.iter().map(|((_, epoch), (_, close))| (*epoch, close.as_ref().map(Close::id))).collect::<Vec<_>>(),
        );
        for ((_, epoch), (records, _)) in expected {
            assert_eq!(&contents(stage, volume, *epoch, 64 << 10), records);
            let tags: Vec<(BlockIndex, SealTag)> =
                records.iter().map(|(block, record)| (*block, record.meta().tag)).collect();
            assert_eq!(stage.staged_records(volume, Epoch(*epoch)), tags);
        }
    }
}

async fn run_ops(ops: Vec<Op>) {
    let dir = tempfile::tempdir().expect("a folder");
    let mut sources = [Source::new(1), Source::new(2)];
    let mut epochs = [1_u64, 1];
    let mut model = Model::new();
    let (mut stage, _) = open(dir.path(), config());
    for op in ops {
        match op {
            Op::Put { volume, block, pages } => {
                let epoch = epochs[volume];
                let records = &mut model.entry((volume, epoch)).or_default().0;
                let known = records.get(&BlockIndex(block)).cloned();
                let record = known.clone().unwrap_or_else(|| sources[volume].record(epoch, block, pages));
                let ticket = stage.submit(record.clone(), None).await.expect("it is taken");
                assert_eq!(ticket.is_resent(), known.is_some());
                ticket.await.expect("it is durable");
                records.insert(BlockIndex(block), record);
            }
            Op::PutMany { volume, first } => {
                let epoch = epochs[volume];
                let records = &mut model.entry((volume, epoch)).or_default().0;
                let fresh = (first..first + 4).filter(|&block| !records.contains_key(&BlockIndex(block)));
                let fresh: Vec<_> = fresh.map(|block| sources[volume].record(epoch, block, 64)).collect();
                stage_all(&stage, &fresh).await;
                records.extend(by_block(&fresh));
            }
            Op::Close { volume } => {
                let epoch = epochs[volume];
                epochs[volume] += 1;
                let entry = model.entry((volume, epoch)).or_default();
                let records: Vec<_> = entry.0.values().cloned().collect();
                let made = sources[volume].close(epoch, &records, None);
                close(&stage, &made).await;
                entry.1 = Some(made);
            }
            Op::DropOpen { volume } => {
                let epoch = epochs[volume];
                epochs[volume] += 1;
                model.remove(&(volume, epoch));
                stage.drop_epoch(sources[volume].volume(), Epoch(epoch)).await.expect("dropped");
            }
            Op::Release { volume } => {
                let closed = model.range((volume, 0)..(volume + 1, 0)).find(|(_, (_, close))| close.is_some());
                let Some((&(_, epoch), _)) = closed else { continue };
                model.remove(&(volume, epoch));
                stage.release(sources[volume].volume(), Epoch(epoch)).await.expect("released");
            }
            Op::Reopen => {
                stage.shutdown().await;
                let (reopened, recovered) = open(dir.path(), config());
                assert_eq!(recovered.damaged, []);
                stage = reopened;
                compare(&stage, &sources, &model);
            }
        }
    }
    compare(&stage, &sources, &model);
    for (number, source) in sources.iter().enumerate() {
        stage.release(source.volume(), Epoch(epochs[number])).await.expect("released");
    }
    eventually("freeing all", || stage.used_bytes() == 0).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn it_holds_what_a_map_would_hold_whatever_happens_and_whenever_it_is_reopened(ops in ops()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        runtime.expect("a runtime").block_on(run_ops(ops));
    }
}
