//! Rebuilding the index at start, from every key and value.

use common::format::close::Close;
use common::format::record::Record;
use common::format::stage_key::StageKey;
use common::ids::{BatchId, Epoch, SealTag, VolumeId};
use common::limits;

use super::db::{Database, Scanned};
use super::error::StageError;
use super::index::{Family, Freed, Index};

/// What a start found that is not in the index.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// Damaged records and incomplete epochs.
    pub(super) damaged: Vec<StageError>,
    /// What can be deleted at once.
    pub(super) freed: Freed,
}

/// Reads the whole stage into `index`, which must be empty. Every record's checksum and place is checked; what is damaged
/// is named and left out. Closed epochs that thereby lack records are dropped, durably.
pub(super) fn recover(db: &Database, index: &mut Index) -> Result<Findings, StageError> {
    let (rows, dropped) = db.rows()?;
    for (volume, row) in rows {
        index.set_row(volume, row);
    }
    for (volume, epoch) in dropped {
        index.set_dropped(volume, epoch);
    }
    let mut findings = Findings { damaged: db.log_damage().cloned().into_iter().collect(), ..Findings::default() };
    for family in [Family::Records, Family::Trickle] {
        recover_family(db, family, index, &mut findings)?;
    }
    drop_incomplete(db, index, &mut findings)?;
    findings.freed.add(index.recovered_dead());
    Ok(findings)
}

fn recover_family(db: &Database, family: Family, index: &mut Index, findings: &mut Findings) -> Result<(), StageError> {
    let mut from = Vec::new();
    loop {
        let Some((after, reason)) = pass(db, family, &from, None, true, index, findings)? else { return Ok(()) };
        // RocksDB refuses a block whose own checksum is wrong. Without that check the records before and behind the damage
        // can be had, and the damaged one fails its own check and is named. A record lies whole in one batch's file.
        let resume = after.map_or(from.clone(), |key| successor(&key));
        let batch = match after {
            Some(key) => key.batch,
            None => first_batch(db, family, &from)?.ok_or_else(|| unreadable(db, &reason))?,
        };
        let end = batch_start(BatchId(batch.0.saturating_add(1)));
        // The damage may lie in the batch behind the last good key.
        let next = first_batch(db, family, &end)?;
        let end = next.map_or(end, |next| batch_start(BatchId(next.0.saturating_add(1))));
        if let Some((_, reason)) = pass(db, family, &resume, Some(end.clone()), false, index, findings)? {
            findings.damaged.push(unreadable(db, &reason));
        }
        from = end;
    }
}

fn unreadable(db: &Database, reason: &str) -> StageError {
    StageError::Damaged { dir: db.dir().to_path_buf(), reason: reason.to_owned() }
}

/// Scans from `from`; where the database can't read on, the last key that it gave and why.
fn pass(
    db: &Database,
    family: Family,
    from: &[u8],
    to: Option<Vec<u8>>,
    check: bool,
    index: &mut Index,
    findings: &mut Findings,
) -> Result<Option<(Option<StageKey>, String)>, StageError> {
    let mut stuck = None;
    db.scan(family, from, to, check, |found| {
        match found {
            Scanned::Value { key, value } => match take(&key, value, family, index) {
                Ok(true) => {}
                Ok(false) if family == Family::Trickle => findings.freed.keys.push(key),
                Ok(false) => {}
                Err(reason) => {
                    index.recover_dead(key.batch, family, value.len() as u64);
                    let StageKey { batch, volume, epoch, block } = key;
                    findings.damaged.push(StageError::DamagedRecord { volume, epoch, block, batch, reason });
                }
            },
            Scanned::BadKey { reason } => findings.damaged.push(unreadable(db, &reason)),
            Scanned::Unreadable { after, reason } => stuck = Some((after, reason)),
        }
        true
    })?;
    Ok(stuck)
}

/// Enters one value; `false` where it is of no more use.
fn take(key: &StageKey, value: &[u8], family: Family, index: &mut Index) -> Result<bool, String> {
    if key.block == StageKey::CLOSE {
        return Ok(index.recover_close(key, family, check_close(key, value)?));
    }
    check_record(key, value)?;
    let mut tag = [0; limits::SEAL_TAG_BYTES];
    tag.copy_from_slice(&value[value.len() - limits::SEAL_TAG_BYTES..]);
    let len = u32::try_from(value.len()).map_err(|error| error.to_string())?;
    Ok(index.recover_record(key, family, len, SealTag(tag)))
}

/// A record whole and in its place.
pub(super) fn check_record(key: &StageKey, value: &[u8]) -> Result<(), String> {
    let header = Record::check(value).map_err(|error| error.to_string())?;
    if (header.volume, header.epoch, header.block) != (key.volume, key.epoch, key.block) {
        return Err(format!(
            "it is a record of volume {}, epoch {}, block {}",
            header.volume, header.epoch, header.block
        ));
    }
    Ok(())
}

fn check_close(key: &StageKey, value: &[u8]) -> Result<Close, String> {
    let close = Close::decode(value).map_err(|error| error.to_string())?;
    let statement = close.statement();
    if (statement.volume, statement.epoch) != (key.volume, key.epoch) {
        return Err(format!("it is the close of volume {}, epoch {}", statement.volume, statement.epoch));
    }
    Ok(close)
}

fn drop_incomplete(db: &Database, index: &mut Index, findings: &mut Findings) -> Result<(), StageError> {
    for volume in index.volumes() {
        let mut lost = Vec::new();
        for state in index.states(volume) {
            let Some(close) = &state.close else { continue };
            let expected = close.statement().records;
            if state.records != expected {
                findings.damaged.push(StageError::Incomplete {
                    volume,
                    epoch: state.epoch,
                    found: state.records,
                    expected,
                });
                lost.push(state.epoch);
            }
        }
        if lost.is_empty() {
            continue;
        }
        for &epoch in &lost {
            findings.freed.add(index.drop_epoch(volume, epoch));
        }
        db.set_dropped(volume, &lost, index.row(volume))?;
    }
    Ok(())
}

fn first_batch(db: &Database, family: Family, from: &[u8]) -> Result<Option<BatchId>, StageError> {
    let mut first = None;
    db.scan(family, from, None, false, |found| {
        if let Scanned::Value { key, .. } = found {
            first = Some(key.batch);
        }
        false
    })?;
    Ok(first)
}

fn successor(key: &StageKey) -> Vec<u8> {
    let mut bytes = key.encode().to_vec();
    bytes.push(0);
    bytes
}

fn batch_start(batch: BatchId) -> Vec<u8> {
    let key = StageKey { batch, volume: VolumeId::NIL, epoch: Epoch(0), block: common::ids::BlockIndex(0) };
    key.encode().to_vec()
}
