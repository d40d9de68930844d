//! Why a disk could not be captured.

use std::io;
use std::path::{Path, PathBuf};

use common::error::{Dispose, Disposition};

/// Why a disk could not be captured.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// Nothing at that path.
    #[error("{} does not exist; check the path of the volume", path.display())]
    Missing {
        /// Path of the source.
        path: PathBuf,
    },
    /// Not allowed.
    #[error("{} can't be read by this user; run blockferry-sender as root or give it read access", path.display())]
    Permission {
        /// Path of the source.
        path: PathBuf,
    },
    /// Neither a block device nor a file.
    #[error("{} is a {found}; a volume is a block device or an image file", path.display())]
    NotADisk {
        /// Path of the source.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// Less than a page, or nothing at all.
    #[error("{} has {found} bytes; a volume needs at least 4096", path.display())]
    TooSmall {
        /// Path of the source.
        path: PathBuf,
        /// Bytes found.
        found: u64,
    },
    /// More than the largest disk.
    #[error("{} has {found} bytes; at most {limit} can be protected", path.display())]
    TooLarge {
        /// Path of the source.
        path: PathBuf,
        /// Bytes found.
        found: u64,
        /// The largest disk.
        limit: u64,
    },
    /// The disk grew or shrank.
    #[error(
        "{} has {found} bytes, but was registered with {expected}: nothing was sent. Give it its size back, or protect it as a new volume, under another name",
        path.display()
    )]
    SizeChanged {
        /// Path of the source.
        path: PathBuf,
        /// Bytes registered.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// Another disk is at the path.
    #[error(
        "{} is another disk than the one registered ({found}, expected {expected}): nothing was sent. Correct the path, or protect it as a new volume, under another name",
        path.display()
    )]
    Replaced {
        /// Path of the source.
        path: PathBuf,
        /// Serial number registered.
        expected: String,
        /// Serial number found.
        found: String,
    },
    /// The disk is neither at its path nor anywhere else.
    #[error(
        "{} is not there, and no disk of this machine is named \"{serial}\": attach it again, correct the path, or end its protection with `blockferry-sender detach`",
        path.display()
    )]
    Gone {
        /// Path of the source.
        path: PathBuf,
        /// Name registered.
        serial: String,
    },
    /// Several devices bear the disk's name.
    #[error(
        "{} is not the disk registered as \"{serial}\", and several are: {places}; name the one to be read, for several paths of one disk that of the multipath device",
        path.display()
    )]
    Twice {
        /// Path of the source.
        path: PathBuf,
        /// Name registered.
        serial: String,
        /// Paths that bear it.
        places: String,
    },
    /// A read failed.
    #[error("{}: reading {length} bytes at offset {offset} failed: {source}", path.display())]
    Read {
        /// Path of the source.
        path: PathBuf,
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: usize,
        /// Cause.
        source: io::Error,
    },
    /// Nobody can connect.
    #[error("cannot listen on {address}: {source}; correct listen= of the volume")]
    Listen {
        /// The address.
        address: String,
        /// Cause.
        source: io::Error,
    },
    /// Changed pages could not be tracked.
    #[error("{}: changes can't be tracked: {source}", path.display())]
    Tracking {
        /// Path of the source.
        path: PathBuf,
        /// Cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A page that belongs to a cut was not kept. This is a bug.
    #[error("page {page} of a cut was not read; this is a bug of blockferry-sender")]
    Missed {
        /// Number of the page.
        page: u64,
    },
    /// The system refused something else.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// Path of the source.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

impl CaptureError {
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => Self::Missing { path },
            io::ErrorKind::PermissionDenied => Self::Permission { path },
            _ => Self::Io { action, path, source },
        }
    }
}

impl Dispose for CaptureError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Read { .. } | Self::Io { .. } | Self::Tracking { .. } => Disposition::Retry,
            Self::Missed { .. } => Disposition::Bug,
            _ => Disposition::BadInput,
        }
    }
}
