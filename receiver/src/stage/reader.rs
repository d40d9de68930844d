//! Reading a staged epoch back, in chunks of bounded size: by batch, and within a batch by block.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use bytes::Bytes;
use common::format::record::Record;
use common::format::stage_key::StageKey;
use common::ids::{BatchId, BlockIndex, Epoch, VolumeId};

use super::Shared;
use super::db::Scanned;
use super::error::StageError;
use super::index::Family;
use super::recover::check_record;

/// Bounds how many read at once: each has a buffer to read ahead, which is charged to the stage's memory.
#[derive(Debug)]
pub(super) struct Reads {
    free: Mutex<usize>,
    freed: Condvar,
}

impl Reads {
    pub(super) fn new(max: usize) -> Self {
        Self { free: Mutex::new(max.max(1)), freed: Condvar::new() }
    }

    /// Waits for its turn; blocks. Who reads waits for nobody else, so it comes.
    fn begin(&self) -> Read<'_> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        while *free == 0 {
            free = self.freed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= 1;
        Read(self)
    }
}

/// One read under way.
struct Read<'a>(&'a Reads);

impl Drop for Read<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.freed.notify_one();
    }
}

/// Reads the durable records of one epoch once, each verbatim and checked against its checksum and place.
///
/// The order is that of batches and, within one, of blocks: that is how they lie on disk. All calls block.
pub struct EpochReader {
    shared: Arc<Shared>,
    volume: VolumeId,
    epoch: Epoch,
    /// Batches still to be read, the next one last.
    rest: Vec<(BatchId, Family)>,
    /// Where to go on in the next batch.
    resume: Option<Vec<u8>>,
}

impl EpochReader {
    pub(super) fn new(shared: Arc<Shared>, volume: VolumeId, epoch: Epoch) -> Result<Self, StageError> {
        let mut rest = {
            let state = shared.lock();
            if state.index.state(volume, epoch).is_none() {
                return Err(StageError::NoSuchEpoch { volume, epoch });
            }
            state.index.batches_of(volume, epoch)
        };
        rest.reverse();
        Ok(Self { shared, volume, epoch, rest, resume: None })
    }

    /// The next records, together at most `bytes_max` bytes or a single record; none at the end.
    ///
    /// # Errors
    /// [`StageError::DamagedRecord`], [`StageError::NoSuchEpoch`] where it was dropped or released meanwhile; failures of
    /// the disk. After an error the reader is of no more use.
    pub fn next_chunk(&mut self, bytes_max: usize) -> Result<Vec<Record>, StageError> {
        let (volume, epoch) = (self.volume, self.epoch);
        let shared = Arc::clone(&self.shared);
        let _turn = shared.reads.begin();
        let mut records = Vec::new();
        let mut bytes = 0;
        while let Some(&(batch, family)) = self.rest.last() {
            let key = |block| StageKey { batch, volume, epoch, block };
            let from = self.resume.take().unwrap_or_else(|| key(BlockIndex(0)).encode().to_vec());
            let to = key(StageKey::CLOSE).encode().to_vec();
            let mut full_at = None;
            let mut damage = None;
            // Without RocksDB's check of whole blocks: each record has its own, and one that is dead may be damaged.
            self.shared.db.scan(family, &from, Some(to), false, |found| {
                let (key, value) = match found {
                    Scanned::Value { key, value } => (key, value),
                    Scanned::BadKey { reason } => {
                        damage = Some((key(BlockIndex(0)), reason));
                        return false;
                    }
                    Scanned::Unreadable { after, reason } => {
                        let block = after.map_or(0, |after| after.block.0.saturating_add(1));
                        damage = Some((key(BlockIndex(block)), reason));
                        return false;
                    }
                };
                // A record that lost against an earlier copy of itself, or whose epoch is gone.
                if !self.shared.lock().index.is_live(&key) {
                    return true;
                }
                if bytes > 0 && bytes + value.len() > bytes_max {
                    full_at = Some(key);
                    return false;
                }
                if let Err(reason) = check_record(&key, value) {
                    damage = Some((key, reason));
                    return false;
                }
                bytes += value.len();
                match Record::parse(Bytes::copy_from_slice(value)) {
                    Ok(record) => records.push(record),
                    Err(error) => damage = Some((key, error.to_string())),
                }
                damage.is_none()
            })?;
            if let Some((StageKey { batch, volume, epoch, block }, reason)) = damage {
                return Err(StageError::DamagedRecord { volume, epoch, block, batch, reason });
            }
            if let Some(key) = full_at {
                self.resume = Some(key.encode().to_vec());
                return Ok(records);
            }
            self.rest.pop();
        }
        if records.is_empty() && self.shared.lock().index.state(volume, epoch).is_none() {
            return Err(StageError::NoSuchEpoch { volume, epoch });
        }
        Ok(records)
    }
}
