//! Why a disk could not be tracked.

use std::io;
use std::path::{Path, PathBuf};

use common::error::{Dispose, Disposition};

/// Why a disk could not be tracked.
#[derive(Debug, thiserror::Error)]
pub enum TrackerError {
    /// Not a block device.
    #[error("{} is not a block device; capture=ebpf tracks block devices, use capture=nbd or capture=scan", path.display())]
    NotADevice {
        /// Path of the volume.
        path: PathBuf,
    },
    /// A device whose writes the tracepoints don't show, or a kernel that can't track.
    #[error("{} can't be tracked: {reason}", path.display())]
    Unsupported {
        /// Path of the volume.
        path: PathBuf,
        /// What is missing, and which mode works instead.
        reason: String,
    },
    /// The system did not say something about the device.
    #[error("{}: cannot {action}: {source}", path.display())]
    Device {
        /// What was being done.
        action: &'static str,
        /// Path of the volume, or of the system's file about it.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The device went, or another disk is behind its number. What was marked since is of no use.
    #[error("{} is not the disk any more that was tracked: {reason}; verify it by hash", path.display())]
    Replaced {
        /// Path of the volume.
        path: PathBuf,
        /// What is different.
        reason: String,
    },
    /// The kernel refused the programs or a map.
    #[error(
        "the kernel does not take the tracker's programs: cannot {action}: {source}; see blockferry-sender preflight"
    )]
    Kernel {
        /// What was being done.
        action: &'static str,
        /// Cause, with libbpf's words.
        source: io::Error,
    },
    /// A pin could not be made, opened or removed.
    #[error("{}: cannot {action}: {source}", path.display())]
    Pin {
        /// What was being done.
        action: &'static str,
        /// Path below the BPF file system.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// A saved set of pages could not be written, read or removed. What was marked stays marked.
    #[error("{}: cannot {action}: {source}", path.display())]
    State {
        /// What was being done.
        action: &'static str,
        /// Path of the file or directory.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// `switch` was called again before `settle`: the other buffer still holds the only copy of what it marked.
    #[error("the pages of the last switch are not saved yet: settle first")]
    Unsettled,
}

impl TrackerError {
    pub(super) fn kernel(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Kernel { action, source }
    }

    pub(super) fn pin(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Pin { action, path: path.to_owned(), source }
    }

    pub(super) fn state(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::State { action, path: path.to_owned(), source }
    }

    pub(super) fn device(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Device { action, path: path.to_owned(), source }
    }
}

impl Dispose for TrackerError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Device { .. } | Self::Pin { .. } | Self::State { .. } | Self::Kernel { .. } => Disposition::Retry,
            Self::NotADevice { .. } | Self::Unsupported { .. } | Self::Replaced { .. } => Disposition::BadInput,
            Self::Unsettled => Disposition::Bug,
        }
    }
}
