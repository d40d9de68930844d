//! Disks as they were at one instant, without a freeze of ours: clones of image files, and snapshots of logical volumes.
//!
//! - An *image file* on a file system that shares blocks (xfs, btrfs, …) is cloned into a file without a name in the same
//!   directory. The file system does that under the file's lock, after what lies dirty was written: no write is half in it, and
//!   each that completed before is. The clone goes with the last descriptor of it, also where the sender is killed.
//! - A *logical volume* is snapshotted by LVM's own tools. A snapshot that a killed sender left is removed by the next one.
//!
//! Both are crash consistent. Whoever tracks changed pages swaps them *before* the clone or snapshot is taken, and once more after:
//! what changed in between is in the snapshot, and what changed after has to travel again.
//!
//! Promises: what is returned does not change, or reading it is an error. Never: writes to the disk itself.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use common::error::{Dispose, Disposition};

use super::{CaptureError, Disk, Source};

mod lvm;

#[cfg(test)]
mod tests;

pub use lvm::{LvmTools, LvmVolume};

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file system can't share blocks between files.
    #[error("{} can't be cloned: its file system does not share blocks between files (xfs and btrfs do)", path.display())]
    NoClones {
        /// The image file.
        path: PathBuf,
    },
    /// The clone failed for another reason.
    #[error("{} can't be cloned: {source}", path.display())]
    Clone {
        /// The image file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The clone can't be opened.
    #[error(transparent)]
    Open(#[from] CaptureError),
    /// A tool of LVM failed.
    #[error("{tool} failed for {}: {said}", volume.display())]
    Lvm {
        /// The tool.
        tool: &'static str,
        /// The logical volume's path.
        volume: PathBuf,
        /// Its last words.
        said: String,
    },
}

impl Dispose for SnapshotError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::NoClones { .. } => Disposition::BadInput,
            Self::Clone { .. } | Self::Lvm { .. } => Disposition::Retry,
            Self::Open(error) => error.disposition(),
        }
    }
}

/// An image file as it was when this was made. Nobody else can open it, so its [`Disk::watch_rest`] proves that it rests.
pub type ClonedSource = Source;

/// Clones the image file at `path`. Takes a moment also for a large file, during which its writers wait; the clone takes room
/// only for what is written to the file while it lives.
///
/// # Errors
/// [`SnapshotError::NoClones`] where the file system can't, [`SnapshotError::Clone`], [`SnapshotError::Open`].
pub fn clone_image(path: &Path) -> Result<ClonedSource, SnapshotError> {
    let failed = |source| SnapshotError::Clone { path: path.to_owned(), source };
    let original = File::open(path).map_err(failed)?;
    // Where links lead, for the clone has to be on the same file system as the file itself.
    let real = std::fs::canonicalize(path).map_err(failed)?;
    let parent = real.parent().unwrap_or(Path::new("/"));
    let unnamed = OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_TMPFILE | libc::O_CLOEXEC)
        .open(parent)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::EISDIR) => SnapshotError::NoClones { path: path.to_owned() },
            _ => failed(error),
        })?;
    rustix::fs::ioctl_ficlone(&unnamed, &original).map_err(|error| match error.raw_os_error() {
        // EINVAL: files of another block size than the file system's, or on swap.
        libc::EOPNOTSUPP | libc::ENOTTY | libc::EXDEV | libc::EINVAL => {
            SnapshotError::NoClones { path: path.to_owned() }
        }
        _ => failed(error.into()),
    })?;
    // By its descriptor, since it has no name; and for reading only, so that nobody has it open for writing any more.
    Ok(Source::open(Path::new(&format!("/proc/self/fd/{}", unnamed.as_raw_fd())))?)
}

/// Takes snapshots of one disk.
pub trait Snapshotter: Send + Sync + std::fmt::Debug {
    /// The disk as it is now; the snapshot ends when it is dropped.
    ///
    /// # Errors
    /// [`SnapshotError`].
    fn take(&self) -> Result<Box<dyn Disk>, SnapshotError>;
}
