//! Bringing the file systems of a device to rest for a moment, and never for longer.
//!
//! ```text
//! mounts::find ─▶ Prepared::new: open, sync, arm the watchdog ─▶ freeze ─▶ (the last copy) ─▶ thaw ─▶ Thawed
//!                                       │
//!                 watchdog, a process of its own: thaws when the sender dies, or when the limit passes
//! ```
//!
//! Between [`Prepared::freeze`] and [`Frozen::thaw`] the caller writes no file, logs nothing and touches only memory that it
//! touched before: whatever it waits for could wait for the frozen file system, and so for the thaw. Even then the machine
//! does not hang: the watchdog needs nothing of the sender.
//!
//! Promises: a freeze ends at the limit or before, whatever becomes of the sender; what [`Frozen::thaw`] calls [`Thawed::Held`] was
//! frozen without a gap from the return of `freeze` to the call of `thaw`.
//! Never: leaves a file system frozen that it froze; claims a freeze that somebody else ended.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub mod mounts;
pub mod watchdog;

#[cfg(test)]
pub(crate) mod tests;

use mounts::Mount;
use watchdog::{Watchdog, WatchdogCommand, WatchdogEnd};

/// `_IOWR('X', 119, int)` of linux/fs.h.
const FIFREEZE: libc::c_ulong = 0xc004_5877;
/// `_IOWR('X', 120, int)` of linux/fs.h.
const FITHAW: libc::c_ulong = 0xc004_5878;

/// Why a file system could not be frozen. Whatever had been frozen is thawed again.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// No longer what is mounted there, or it can't be opened.
    #[error("{} can't be opened to freeze it: {source}", point.display())]
    Open {
        /// The mount point.
        point: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The file system does not know how to.
    #[error("the file system {fs_type} at {} can't be frozen", point.display())]
    Unsupported {
        /// The mount point.
        point: PathBuf,
        /// Its type.
        fs_type: String,
    },
    /// Another program has frozen it.
    #[error("{} is frozen by another program", point.display())]
    Busy {
        /// The mount point.
        point: PathBuf,
    },
    /// The kernel refused.
    #[error("{} can't be frozen: {source}; freezing needs CAP_SYS_ADMIN", point.display())]
    Refused {
        /// The mount point.
        point: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Freezing took too long. The file system has much to write, or its disk is slow.
    #[error("freezing took longer than the limit of {} ms", limit.as_millis())]
    TooSlow {
        /// The limit.
        limit: Duration,
    },
    /// Without it nothing is frozen.
    #[error("the watchdog could not be armed: {0}")]
    Watchdog(io::Error),
}

/// How a freeze ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Thawed {
    /// All file systems were frozen all the time, and within the limit.
    Held {
        /// From the first freeze to the last thaw.
        frozen: Duration,
    },
    /// They may not have been; why. No point may be claimed.
    Broken {
        /// From the first freeze to the last thaw, as far as it is known.
        frozen: Duration,
        /// Why.
        reason: String,
    },
}

/// File systems opened and flushed, with a watchdog that is armed.
#[derive(Debug)]
pub struct Prepared {
    mounts: Vec<(Mount, File)>,
    watchdog: Watchdog,
    limit: Duration,
}

/// File systems that are frozen. Dropping it thaws them.
#[derive(Debug)]
pub struct Frozen {
    mounts: Vec<(Mount, File)>,
    /// `None` once it was told.
    watchdog: Option<Watchdog>,
    limit: Duration,
    since: Instant,
    frozen: usize,
}

/// Writes out what lies dirty in memory of these file systems, so that it is marked, and a freeze has little left to write.
/// Those that can't be opened are left out.
pub fn flush(mounts: &[Mount]) {
    for mount in mounts {
        let flushed = File::open(&mount.point).and_then(|file| Ok(rustix::fs::syncfs(file)?));
        if let Err(error) = flushed {
            tracing::debug!(point = %mount.point.display(), %error, "syncfs failed");
        }
    }
}

impl Prepared {
    /// Opens the mount points, writes out what lies dirty in memory, so that little is left to write at the freeze, and arms
    /// a watchdog with `limit`.
    ///
    /// # Errors
    /// [`FreezeError::Open`], [`FreezeError::Watchdog`].
    pub fn new(mounts: &[Mount], limit: Duration, command: &WatchdogCommand) -> Result<Self, FreezeError> {
        let opened = open(mounts)?;
        let files: Vec<&File> = opened.iter().map(|(_, file)| file).collect();
        let watchdog = Watchdog::arm(command, &files, limit).map_err(FreezeError::Watchdog)?;
        let prepared = Self { mounts: opened, watchdog, limit };
        prepared.flush();
        Ok(prepared)
    }

    /// Writes out what lies dirty in memory.
    pub fn flush(&self) {
        for (mount, file) in &self.mounts {
            if let Err(error) = rustix::fs::syncfs(file) {
                tracing::warn!(point = %mount.point.display(), %error, "syncfs failed");
            }
        }
    }

    /// Freezes all of them. From here on nothing may be written or logged.
    ///
    /// # Errors
    /// [`FreezeError`]; nothing is frozen then.
    pub fn freeze(self) -> Result<Frozen, FreezeError> {
        let Self { mounts, mut watchdog, limit } = self;
        let since = Instant::now();
        // The time runs from here in both processes. Where this fails the watchdog is gone.
        watchdog.freezing().map_err(FreezeError::Watchdog)?;
        let mut frozen = Frozen { mounts, watchdog: Some(watchdog), limit, since, frozen: 0 };
        for index in 0..frozen.mounts.len() {
            if frozen.left().is_zero() {
                // The watchdog may have thawed the first ones already.
                frozen.end();
                return Err(FreezeError::TooSlow { limit });
            }
            match freeze(&frozen.mounts[index].1) {
                Ok(()) => frozen.frozen += 1,
                Err(source) => {
                    // Thaws those before it.
                    frozen.end();
                    let mount = &frozen.mounts[index].0;
                    let point = mount.point.clone();
                    return Err(match source.raw_os_error() {
                        Some(libc::EOPNOTSUPP | libc::ENOTTY) => {
                            FreezeError::Unsupported { point, fs_type: mount.fs_type.clone() }
                        }
                        Some(libc::EBUSY) => FreezeError::Busy { point },
                        _ => FreezeError::Refused { point, source },
                    });
                }
            }
        }
        Ok(frozen)
    }
}

impl Frozen {
    /// Time since the first freeze began.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// What is left of the limit.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.limit.saturating_sub(self.since.elapsed())
    }

    /// Thaws all of them, and asks the watchdog whether it had to. Writing and logging is allowed again afterwards.
    #[must_use]
    pub fn thaw(mut self) -> Thawed {
        self.end()
    }

    fn end(&mut self) -> Thawed {
        // No allocation before the last file system is thawed.
        let mut lost = None;
        for index in (0..self.frozen).rev() {
            if let Err(error) = thaw(&self.mounts[index].1) {
                lost = Some((index, error));
            }
        }
        let frozen = self.since.elapsed();
        self.frozen = 0;
        let Some(watchdog) = self.watchdog.take() else {
            return Thawed::Broken { frozen, reason: "it was thawed before".to_owned() };
        };
        let end = watchdog.thawed();
        let broken = |reason: String| Thawed::Broken { frozen, reason };
        if let Some((index, error)) = lost {
            let point = self.mounts[index].0.point.display();
            return broken(format!("{point} was no longer frozen when it was to be thawed: {error}"));
        }
        match end {
            WatchdogEnd::Idle if frozen <= self.limit => Thawed::Held { frozen },
            WatchdogEnd::Idle => {
                let (took, limit) = (frozen.as_millis(), self.limit.as_millis());
                broken(format!("the freeze took {took} ms, more than the limit of {limit} ms"))
            }
            WatchdogEnd::Thawed => broken("the watchdog had to thaw at the limit".to_owned()),
            WatchdogEnd::Lost(reason) => broken(format!("the watchdog was lost: {reason}")),
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if self.watchdog.is_some() {
            let _ = self.end();
        }
    }
}

/// Opens mount points, and makes sure that what is opened is the mount that was meant: another may lie over it by now.
fn open(mounts: &[Mount]) -> Result<Vec<(Mount, File)>, FreezeError> {
    mounts
        .iter()
        .map(|mount| {
            let failed = |source| FreezeError::Open { point: mount.point.clone(), source };
            let file = File::open(&mount.point).map_err(failed)?;
            let flags = rustix::fs::AtFlags::EMPTY_PATH;
            let found = rustix::fs::statx(&file, "", flags, rustix::fs::StatxFlags::MNT_ID)
                .map_err(|error| failed(error.into()))?;
            if found.stx_mask & rustix::fs::StatxFlags::MNT_ID.bits() != 0 && found.stx_mnt_id != mount.id {
                return Err(failed(io::Error::other("another file system is mounted over it")));
            }
            Ok((mount.clone(), file))
        })
        .collect()
}

#[expect(unsafe_code, reason = "no crate wraps FIFREEZE")]
fn freeze(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is valid; the kernel does not look at the argument.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FIFREEZE, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[expect(unsafe_code, reason = "no crate wraps FITHAW")]
fn thaw(file: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: the descriptor is valid; the kernel does not look at the argument.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FITHAW, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
