//! A stage's sizes: how its capacity and its share of the memory budget are divided.

use common::limits;
use common::units::ByteCount;

use super::db::READAHEAD_BYTES;
use super::error::StageError;
use super::gate::Marks;
use super::index::{ENTRY_MEMORY_BYTES, META_MEMORY_BYTES};

/// Smallest capacity that can be asked for: two full epochs fit above the high mark, and two below.
pub const CAPACITY_BYTES_MIN: u64 = 4 * limits::EPOCH_SEALED_BYTES_MAX;
/// Smallest memory share: RocksDB's fixed parts, and an index for two full epochs.
pub const MEMORY_BYTES_MIN: u64 = 16 << 20;
/// What writing one file holds beside its records.
const SST_WRITER_MEMORY_BYTES: u64 = 2 << 20;
/// Share of the memory for reading ahead, as a divisor.
const READ_SHARE: u64 = 16;

/// Sizes of a stage; see [`StageConfig::new`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StageConfig {
    /// Bytes of records that the stage may hold.
    pub capacity_bytes: u64,
    /// Intake stops here.
    pub high_bytes: u64,
    /// Intake resumes here.
    pub low_bytes: u64,
    /// Records at which intake stops: what the memory share has room for, less one epoch.
    pub records_high: u64,
    /// Records of open epochs of which metadata is kept at hand.
    pub metas_max: u64,
    /// Bytes that may wait to be durable.
    pub queue_bytes: usize,
    /// Largest batch.
    pub batch_bytes_max: usize,
    /// Smallest batch that is written as a file of its own.
    pub ingest_bytes_min: usize,
    /// RocksDB's write buffer, one of three.
    pub write_buffer_bytes: usize,
    /// RocksDB's block cache.
    pub cache_bytes: usize,
    /// Epochs read at once, each with a buffer of its own to read ahead; more wait.
    pub reads_max: usize,
}

impl StageConfig {
    /// Sizes for a stage of `capacity_bytes` with `memory_bytes` of the memory budget, the records that wait to be durable
    /// not counted (they hold permits of their own).
    ///
    /// # Errors
    /// [`StageError::CapacityTooSmall`], [`StageError::MemoryTooSmall`].
    pub fn new(capacity_bytes: u64, memory_bytes: u64) -> Result<Self, StageError> {
        if capacity_bytes < CAPACITY_BYTES_MIN {
            let (found, minimum) = (ByteCount(capacity_bytes), ByteCount(CAPACITY_BYTES_MIN));
            return Err(StageError::CapacityTooSmall { found, minimum });
        }
        if memory_bytes < MEMORY_BYTES_MIN {
            let (found, minimum) = (ByteCount(memory_bytes), ByteCount(MEMORY_BYTES_MIN));
            return Err(StageError::MemoryTooSmall { found, minimum });
        }
        let write_buffer_bytes = (memory_bytes / 32).clamp(256 << 10, 4 << 20);
        let cache_bytes = (memory_bytes / 32).clamp(256 << 10, 8 << 20);
        let reads_max = (memory_bytes / READ_SHARE / READAHEAD_BYTES as u64).clamp(2, 8);
        let reads_bytes = reads_max * READAHEAD_BYTES as u64;
        let index_bytes = memory_bytes - 3 * write_buffer_bytes - cache_bytes - SST_WRITER_MEMORY_BYTES - reads_bytes;
        // One eighth for metadata at hand, the rest for entries. Above the mark one volume may finish its epoch.
        let records_max = index_bytes / 8 * 7 / ENTRY_MEMORY_BYTES;
        let high_bytes = capacity_bytes - (2 * limits::EPOCH_SEALED_BYTES_MAX).max(capacity_bytes / 10);
        Ok(Self {
            capacity_bytes,
            high_bytes,
            low_bytes: high_bytes - high_bytes / 8,
            records_high: records_max - limits::EPOCH_RECORDS_DECODE_MAX as u64,
            metas_max: index_bytes / 8 / META_MEMORY_BYTES,
            queue_bytes: 64 << 20,
            batch_bytes_max: 32 << 20,
            ingest_bytes_min: 256 << 10,
            write_buffer_bytes: usize::try_from(write_buffer_bytes).unwrap_or(4 << 20),
            cache_bytes: usize::try_from(cache_bytes).unwrap_or(8 << 20),
            reads_max: usize::try_from(reads_max).unwrap_or(2),
        })
    }

    pub(super) fn marks(&self) -> Marks {
        Marks {
            capacity_bytes: self.capacity_bytes,
            high_bytes: self.high_bytes,
            low_bytes: self.low_bytes,
            records_high: self.records_high,
            records_low: self.records_high - self.records_high / 8,
        }
    }
}

const _: () = assert!(
    (MEMORY_BYTES_MIN - 4 * (MEMORY_BYTES_MIN / 32) - SST_WRITER_MEMORY_BYTES - 2 * READAHEAD_BYTES as u64) / 8 * 7
        / ENTRY_MEMORY_BYTES
        > 2 * limits::EPOCH_RECORDS_DECODE_MAX as u64
);
