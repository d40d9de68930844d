//! Keys of the stage: `(batch, volume, epoch, block)`, big-endian, so that RocksDB's order is the order of batches and a
//! batch that is wholly committed is one droppable range of keys.

use super::FormatError;
use super::wire::Reader;
use crate::ids::{BatchId, BlockIndex, Epoch, VolumeId};

/// Length of an encoded key.
pub const STAGE_KEY_BYTES: usize = 40;

/// Place of a record in the stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StageKey {
    /// Batch that the record was written with.
    pub batch: BatchId,
    /// Volume.
    pub volume: VolumeId,
    /// Epoch.
    pub epoch: Epoch,
    /// First block of the record, or [`StageKey::CLOSE`] for the epoch's close.
    pub block: BlockIndex,
}

impl StageKey {
    /// The block number under which an epoch's close is kept; beyond every block of the largest disk.
    pub const CLOSE: BlockIndex = BlockIndex(u64::MAX);

    /// The 40 bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; STAGE_KEY_BYTES] {
        let mut key = [0; STAGE_KEY_BYTES];
        key[..8].copy_from_slice(&self.batch.0.to_be_bytes());
        key[8..24].copy_from_slice(&self.volume.0);
        key[24..32].copy_from_slice(&self.epoch.0.to_be_bytes());
        key[32..].copy_from_slice(&self.block.0.to_be_bytes());
        key
    }

    /// Reads exactly 40 bytes.
    ///
    /// # Errors
    /// [`FormatError::Truncated`], [`FormatError::TrailingBytes`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new("stage key", bytes);
        let key = Self {
            batch: BatchId(u64::from_be_bytes(reader.array()?)),
            volume: VolumeId(reader.array()?),
            epoch: Epoch(u64::from_be_bytes(reader.array()?)),
            block: BlockIndex(u64::from_be_bytes(reader.array()?)),
        };
        reader.finish()?;
        Ok(key)
    }
}
