#![allow(clippy::cast_possible_truncation, reason = "files and blocks are small")]

use std::collections::BTreeMap;

use common::format::close::Close;
use common::format::record::Record;
use common::ids::{BlockIndex, Epoch, VolumeId};
use proptest::prelude::*;

use super::*;
use crate::stage::testing::Source;
use crate::stage::{CAPACITY_BYTES_MIN, MEMORY_BYTES_MIN, Recovered, Stage, StageConfig, StageError};

const FEW: u64 = 3;
const MANY: u64 = 12;
const RECORDS: u64 = 6;

fn open(dir: &Path) -> (Stage, Recovered) {
    let config = StageConfig::new(CAPACITY_BYTES_MIN, MEMORY_BYTES_MIN).expect("the minima are enough");
    Stage::open(dir, config).expect("the stage opens")
}

/// A stage's folder as a killed receiver leaves it, and what was acknowledged.
struct Killed {
    folder: tempfile::TempDir,
    volume: VolumeId,
    epochs: BTreeMap<u64, (Vec<Record>, Option<Close>)>,
}

/// Small writes: records of some epochs, all but the last of them closed, each write a batch of its own. Few epochs lie in one
/// log file, many in several, of which some were written to tables in part.
async fn killed(count: u64) -> Killed {
    let folder = tempfile::tempdir().expect("a folder");
    let mut source = Source::new(1);
    let (stage, _) = open(folder.path());
    let mut epochs = BTreeMap::new();
    for epoch in 1..=count {
        let mut records = Vec::new();
        for block in 0..RECORDS {
            // Some are larger than a block of the log, so that they lie in several fragments.
            let record = source.record(epoch, block, 1 + (block as u32 % 2) * 9);
            stage.submit(record.clone(), None).await.expect("taken").await.expect("durable");
            records.push(record);
        }
        let close = (epoch < count).then(|| source.close(epoch, &records, None));
        if let Some(close) = &close {
            stage.submit_close(close).expect("taken").await.expect("durable");
        }
        epochs.insert(epoch, (records, close));
    }
    let copy = tempfile::tempdir().expect("a folder");
    copy_all(folder.path(), copy.path());
    stage.shutdown().await;
    Killed { folder: copy, volume: source.volume(), epochs }
}

fn copy_all(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        let target = to.join(path.file_name().expect("it has a name"));
        if path.is_dir() {
            copy_all(&path, &target);
        } else {
            std::fs::copy(&path, &target).expect("readable");
        }
    }
}

fn logs_of(dir: &Path) -> Vec<PathBuf> {
    let files = log_files(&dir.join("db")).expect("a folder").into_iter().map(|(_, path)| path);
    files.filter(|path| std::fs::metadata(path).is_ok_and(|found| found.len() > 0)).collect()
}

fn log_of(dir: &Path) -> PathBuf {
    logs_of(dir).pop().expect("a log with something in it")
}

/// Opens what is left in `dir`: true where all that was acknowledged is there. What is there must be right in any case.
async fn is_whole(dir: &Path, expected: &Killed) -> (bool, Vec<StageError>) {
    let (stage, recovered) = open(dir);
    let mut whole = true;
    for (epoch, (records, close)) in &expected.epochs {
        let found: BTreeMap<BlockIndex, _> = stage.staged_records(expected.volume, Epoch(*epoch)).into_iter().collect();
        let tags: BTreeMap<BlockIndex, _> =
            records.iter().map(|record| (record.header().block, record.meta().tag)).collect();
        assert!(found.iter().all(|(block, tag)| tags.get(block) == Some(tag)), "epoch {epoch} has what nobody staged");
        let closes = stage.volume(expected.volume).epochs;
        let closed = closes.iter().find(|state| state.epoch.0 == *epoch).and_then(|state| state.close.clone());
        assert!(closed.is_none() || found.len() == tags.len(), "epoch {epoch} is closed without all of its records");
        whole &= found.len() == tags.len() && closed.map(|close| close.id()) == close.as_ref().map(Close::id);
    }
    stage.shutdown().await;
    (whole, recovered.damaged)
}

fn flip(path: &Path, bit: u64) {
    let mut bytes = std::fs::read(path).expect("readable");
    let at = (bit / 8) as usize % bytes.len();
    bytes[at] ^= 1 << (bit % 8);
    std::fs::write(path, bytes).expect("writable");
}

#[tokio::test]
async fn the_log_of_a_killed_receiver_is_whole_and_its_writes_are_read_as_rocksdb_wrote_them() {
    let killed = killed(FEW).await;
    let log = log_of(killed.folder.path());
    let found = pieces(&std::fs::read(&log).expect("readable"));
    let firsts: Vec<u64> = found
        .iter()
        .filter_map(|piece| match piece {
            Piece::Write { first, .. } => Some(*first),
            Piece::Unreadable { .. } => None,
        })
        .collect();
    assert!(firsts.len() as u64 >= FEW * RECORDS + FEW - 1, "{} writes", firsts.len());
    assert!(firsts.is_sorted() && firsts.len() == found.len());
    let mut again = Vec::new();
    for piece in &found {
        if let Piece::Write { payload, .. } = piece {
            append(&mut again, payload);
        }
    }
    assert_eq!(pieces(&again), found, "what is mended reads the same");
    let (whole, damaged) = is_whole(killed.folder.path(), &killed).await;
    assert!(whole && damaged.is_empty(), "{damaged:?}");
}

#[tokio::test]
async fn a_torn_tail_that_nobody_was_told_of_is_no_damage() {
    let killed = killed(FEW).await;
    let log = log_of(killed.folder.path());
    let mut bytes = std::fs::read(&log).expect("readable");
    // The begin of a write that was never finished.
    bytes.extend_from_slice(&[7; 1000]);
    std::fs::write(&log, bytes).expect("writable");
    let (whole, damaged) = is_whole(killed.folder.path(), &killed).await;
    assert!(whole && damaged.is_empty(), "{damaged:?}");
}

#[tokio::test]
async fn a_log_that_ends_too_early_is_named() {
    let killed = killed(FEW).await;
    let log = log_of(killed.folder.path());
    let len = std::fs::metadata(&log).expect("it is there").len();
    File::options().write(true).open(&log).and_then(|file| file.set_len(len / 2)).expect("writable");
    let (whole, damaged) = is_whole(killed.folder.path(), &killed).await;
    assert!(!whole);
    assert!(matches!(damaged[0], StageError::DamagedLog { .. }), "{damaged:?}");
    // Named once: what is gone is gone, and is sent again.
    let again = is_whole(killed.folder.path(), &killed).await.1;
    assert!(!again.iter().any(|error| matches!(error, StageError::DamagedLog { .. })), "{again:?}");
}

#[tokio::test]
async fn a_missing_log_is_named() {
    let killed = killed(FEW).await;
    std::fs::remove_file(log_of(killed.folder.path())).expect("removable");
    let (whole, damaged) = is_whole(killed.folder.path(), &killed).await;
    assert!(!whole && matches!(damaged[0], StageError::DamagedLog { .. }), "{damaged:?}");
}

#[tokio::test]
async fn a_damaged_note_is_named() {
    let killed = killed(FEW).await;
    flip(&killed.folder.path().join("acknowledged"), 100);
    let (whole, damaged) = is_whole(killed.folder.path(), &killed).await;
    assert!(whole && matches!(damaged[0], StageError::DamagedLog { .. }), "{damaged:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4, ..ProptestConfig::default() })]

    #[test]
    fn a_flipped_bit_of_the_log_loses_nothing_silently(
        many in any::<bool>(), bits in proptest::collection::vec((any::<usize>(), any::<u64>()), 24)
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let killed = killed(if many { MANY } else { FEW }).await;
            let mut lost = 0;
            for (file, bit) in bits {
                let copy = tempfile::tempdir().expect("a folder");
                copy_all(killed.folder.path(), copy.path());
                let logs = logs_of(copy.path());
                flip(&logs[file % logs.len()], bit);
                let (whole, damaged) = is_whole(copy.path(), &killed).await;
                assert!(whole || damaged.iter().any(|error| matches!(error, StageError::DamagedLog { .. })), "bit {bit}");
                if !whole {
                    lost += 1;
                    let said = damaged[0].to_string();
                    assert!(said.contains("/db/"), "{said} names no file");
                }
            }
            assert!(lost > 0 || many, "none of the bits mattered");
        });
    }
}
