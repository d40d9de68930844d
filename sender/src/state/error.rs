//! Why state could not be read or kept, by file.

use std::io;
use std::path::{Path, PathBuf};

use common::error::{Dispose, Disposition};
use common::format::FormatError;
use common::ids::CloseId;

/// Why state could not be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another process holds the directory.
    #[error("{} is in use by another blockferry-sender{}; stop it first", path.display(), holder(*pid))]
    InUse {
        /// Directory.
        path: PathBuf,
        /// The other process, where it is known.
        pid: Option<u32>,
    },
    /// No space is left.
    #[error("{}: no space left on its file system (needed {needed} bytes); free some space, nothing is lost meanwhile", path.display())]
    Full {
        /// File that was to be written.
        path: PathBuf,
        /// Bytes that were to be written.
        needed: u64,
    },
    /// The directory is read-only, or this user may not write it.
    #[error("{} cannot be written ({source}); make it writable or choose another --state-dir", path.display())]
    NotWritable {
        /// File or directory.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The system refused something else.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// File or directory.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// No such volume here.
    #[error("{} does not exist: the volume is not protected from this state directory; check --state-dir, or register it", path.display())]
    Missing {
        /// Directory of the volume.
        path: PathBuf,
    },
    /// The volume exists already.
    #[error("{} exists already: the volume is protected from this state directory", path.display())]
    Exists {
        /// Directory of the volume.
        path: PathBuf,
    },
    /// A file of another version of the software.
    #[error("{} was written by another version of blockferry-sender: {source}; nothing was changed", path.display())]
    AnotherVersion {
        /// File.
        path: PathBuf,
        /// Version found.
        source: FormatError,
    },
    /// A file is damaged.
    #[error("{} is damaged: {source}; protect the disk as a new volume, under another name (what is in the store stays restorable)", path.display())]
    Damaged {
        /// File.
        path: PathBuf,
        /// What is wrong.
        source: FormatError,
    },
    /// The disk did not grow.
    #[error("{} is of a disk of {expected} bytes and can't be moved to one of {found}; a disk that shrank or was replaced is a new volume, under another name", path.display())]
    NotGrown {
        /// Directory of the volume.
        path: PathBuf,
        /// Bytes of the disk that the state is of.
        expected: u64,
        /// Bytes of the disk that it was to be moved to.
        found: u64,
    },
    /// A file that belongs to something else: another volume, incarnation, key or chain of closes.
    #[error("{} does not belong here: {what} is {found}, expected {expected}; use the state directory that is current, or protect the disk as a new volume, under another name (what is in the store stays restorable)", path.display())]
    Foreign {
        /// File.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// Expected.
        expected: String,
        /// Found.
        found: String,
    },
    /// A scan may not begin before all closes are committed: it would compare with outdated hashes.
    #[error("{count} closed epochs of this volume are not committed yet; a scan has to wait for them")]
    InFlight {
        /// Closes.
        count: usize,
    },
    /// A close that is neither the newest committed one nor journaled.
    #[error("close {close} is not in the journal of {}: the state is a copy or older than the log; use the state directory that is current, or protect the disk as a new volume, under another name (what is in the store stays restorable)", path.display())]
    UnknownClose {
        /// Directory of the volume.
        path: PathBuf,
        /// Close.
        close: CloseId,
    },
    /// An epoch that is closed or journaled already.
    #[error("epoch {epoch} is not newer than epoch {newest}, which is closed")]
    EpochReused {
        /// Epoch asked for.
        epoch: u64,
        /// Newest closed one.
        newest: u64,
    },
}

fn holder(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

impl Dispose for StateError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Full { .. } | Self::Io { .. } => Disposition::Retry,
            Self::Damaged { .. } => Disposition::Corrupt,
            Self::InFlight { .. } | Self::EpochReused { .. } => Disposition::Bug,
            _ => Disposition::BadInput,
        }
    }
}

impl StateError {
    /// The error of a system call on `path`.
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { path, needed: 0 },
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => Self::NotWritable { path, source },
            _ => Self::Io { action, path, source },
        }
    }

    /// As [`Self::io`] for a write of `needed` bytes.
    pub(super) fn write(path: &Path, needed: u64, source: io::Error) -> Self {
        match Self::io("write", path, source) {
            Self::Full { path, .. } => Self::Full { path, needed },
            other => other,
        }
    }

    /// The error of a file whose content does not decode.
    pub(super) fn format(path: &Path, source: FormatError) -> Self {
        let path = path.to_owned();
        match source {
            FormatError::UnknownVersion { .. } | FormatError::UnknownFlags { .. } => {
                Self::AnotherVersion { path, source }
            }
            _ => Self::Damaged { path, source },
        }
    }
}
