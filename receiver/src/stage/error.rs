//! What can go wrong with the stage. Errors are cloned to everyone who waits for the same batch, so causes are texts.

use std::path::{Path, PathBuf};

use common::error::{Dispose, Disposition};
use common::ids::{BatchId, BlockIndex, Epoch, VolumeId};
use common::units::ByteCount;

/// Why the stage did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StageError {
    /// The capacity asked for can't hold what must fit at once.
    #[error("stage capacity {found} is below the minimum of {minimum}: pass --stage-capacity {minimum} or more")]
    CapacityTooSmall {
        /// Capacity asked for.
        found: ByteCount,
        /// Smallest that works.
        minimum: ByteCount,
    },
    /// The stage's share of the memory budget can't hold a useful index.
    #[error("the stage's memory share of {found} is below the minimum of {minimum}: pass a larger --memory-budget")]
    MemoryTooSmall {
        /// Share given.
        found: ByteCount,
        /// Smallest that works.
        minimum: ByteCount,
    },
    /// Another process has the stage open.
    #[error("stage {dir} is in use by another process: stop the other receiver or give this one its own --data-dir")]
    Locked {
        /// The stage's directory.
        dir: PathBuf,
    },
    /// The stage's file system is full.
    #[error(
        "no space left for the stage in {dir}: free space there or lower --stage-capacity, then start again ({reason})"
    )]
    NoSpace {
        /// The stage's directory.
        dir: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// The stage's file system can't be written.
    #[error("stage {dir} can't be written: mount it read-write and give this user write permission ({reason})")]
    ReadOnly {
        /// The stage's directory.
        dir: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// Any other failure of the disk or of RocksDB.
    #[error("stage {dir} failed: {reason}; check the disk, then start again")]
    Io {
        /// The stage's directory.
        dir: PathBuf,
        /// RocksDB's or the system's words.
        reason: String,
    },
    /// The stage's own structure is damaged; it can't be opened or read.
    #[error(
        "stage {dir} is damaged: {reason}; move the directory aside and start again: what was not committed is read again \
         from the protected disks"
    )]
    Damaged {
        /// The stage's directory.
        dir: PathBuf,
        /// What was found.
        reason: String,
    },
    /// The stage was written by a release that this one does not understand.
    #[error("stage {dir}: {reason}")]
    Version {
        /// The stage's directory.
        dir: PathBuf,
        /// The format's error.
        reason: String,
    },
    /// RocksDB's log does not hold all that was acknowledged through it.
    #[error(
        "stage log {file} is damaged: {reason}; records that were acknowledged may be missing and are sent again by their \
         senders, recovery points of that time may be missing; check the disk if this happens again"
    )]
    DamagedLog {
        /// The log file, or the note of what was acknowledged.
        file: PathBuf,
        /// What was found, and where.
        reason: String,
    },
    /// One staged record or close is not what was written.
    #[error("staged record of volume {volume}, epoch {epoch}, block {block} (batch {batch}) is damaged: {reason}")]
    DamagedRecord {
        /// Volume.
        volume: VolumeId,
        /// Epoch.
        epoch: Epoch,
        /// First block of the record, or the number that stands for the close.
        block: BlockIndex,
        /// Batch that it lies in.
        batch: BatchId,
        /// What was found.
        reason: String,
    },
    /// A closed epoch lacks records, or has some too many.
    #[error(
        "staged epoch {epoch} of volume {volume} has {found} records, its close states {expected}: it is not staged"
    )]
    Incomplete {
        /// Volume.
        volume: VolumeId,
        /// Epoch.
        epoch: Epoch,
        /// Records found.
        found: u64,
        /// Records stated.
        expected: u64,
    },
    /// Another record is staged for the same block of the same epoch.
    #[error("volume {volume}, epoch {epoch}: another record of block {block} is staged already")]
    Conflict {
        /// Volume.
        volume: VolumeId,
        /// Epoch.
        epoch: Epoch,
        /// First block of the record.
        block: BlockIndex,
    },
    /// The epoch takes no more: it is closed, dropped or released.
    #[error("volume {volume}, epoch {epoch}: it is {state} and takes no more")]
    EpochEnded {
        /// Volume.
        volume: VolumeId,
        /// Epoch.
        epoch: Epoch,
        /// What became of it.
        state: &'static str,
    },
    /// Nothing is staged of this epoch.
    #[error("volume {volume}: nothing is staged of epoch {epoch}")]
    NoSuchEpoch {
        /// Volume.
        volume: VolumeId,
        /// Epoch.
        epoch: Epoch,
    },
    /// The stage is shutting down.
    #[error("the stage is shutting down")]
    Stopped,
}

impl StageError {
    /// The error's kind, for `blockferry_receiver_errors_total{kind}`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::CapacityTooSmall { .. } | Self::MemoryTooSmall { .. } => "stage_config",
            Self::Locked { .. } => "stage_locked",
            Self::NoSpace { .. } => "stage_no_space",
            Self::ReadOnly { .. } => "stage_read_only",
            Self::Io { .. } => "stage_io",
            Self::Damaged { .. } | Self::DamagedLog { .. } | Self::DamagedRecord { .. } | Self::Incomplete { .. } => {
                "stage_damaged"
            }
            Self::Version { .. } => "stage_version",
            Self::Conflict { .. } => "stage_conflict",
            Self::EpochEnded { .. } | Self::NoSuchEpoch { .. } => "stage_epoch",
            Self::Stopped => "stage_stopped",
        }
    }

    /// True where the disk or RocksDB failed, after which nothing more is taken in until a restart.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        matches!(
            self,
            Self::NoSpace { .. } | Self::ReadOnly { .. } | Self::Io { .. } | Self::Damaged { .. } | Self::Stopped
        )
    }

    /// Sorts RocksDB's error into ours by its kind and the system's words in it.
    pub(super) fn from_rocksdb(dir: &Path, error: &rocksdb::Error) -> Self {
        let (dir, reason) = (dir.to_path_buf(), error.as_ref().to_owned());
        if reason.contains("No space left on device") || reason.contains("Disk quota exceeded") {
            return Self::NoSpace { dir, reason };
        }
        if reason.contains("Read-only file system") || reason.contains("Permission denied") {
            return Self::ReadOnly { dir, reason };
        }
        if reason.contains("lock hold by current process")
            || (reason.contains("/LOCK") && reason.contains("temporarily unavailable"))
        {
            return Self::Locked { dir };
        }
        match error.kind() {
            rocksdb::ErrorKind::Corruption => Self::Damaged { dir, reason },
            _ => Self::Io { dir, reason },
        }
    }

    /// Sorts a system error into ours.
    pub(super) fn from_io(dir: &Path, error: &std::io::Error) -> Self {
        let (dir, reason) = (dir.to_path_buf(), error.to_string());
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Self::NoSpace { dir, reason },
            std::io::ErrorKind::ReadOnlyFilesystem | std::io::ErrorKind::PermissionDenied => {
                Self::ReadOnly { dir, reason }
            }
            _ => Self::Io { dir, reason },
        }
    }
}

impl Dispose for StageError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::CapacityTooSmall { .. }
            | Self::MemoryTooSmall { .. }
            | Self::Locked { .. }
            | Self::ReadOnly { .. }
            | Self::Version { .. }
            | Self::Conflict { .. }
            | Self::EpochEnded { .. } => Disposition::BadInput,
            Self::NoSpace { .. } | Self::Io { .. } => Disposition::Retry,
            Self::Damaged { .. } | Self::DamagedLog { .. } | Self::DamagedRecord { .. } | Self::Incomplete { .. } => {
                Disposition::Corrupt
            }
            Self::NoSuchEpoch { .. } => Disposition::Bug,
            Self::Stopped => Disposition::Reconnect,
        }
    }
}
