//! What the writer writes to.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::stamp::SECTOR;
use crate::images::PAGE;

/// A disk, or a file on one, under test. Each call returns when the disk has said that it is done; what has to be tried again
/// because a server was away is tried again inside. Used by several threads at once.
pub trait Target: Send + Sync {
    /// Writes whole sectors; `lane` tells the writer's threads apart.
    ///
    /// # Errors
    /// Where the disk says that it failed: a failure of the test.
    fn write(&self, lane: usize, sector: u64, bytes: &[u8]) -> std::io::Result<()>;

    /// Makes sectors zero; `None` where the target has no such thing.
    ///
    /// # Errors
    /// As [`Self::write`].
    fn zero(&self, _lane: usize, _sectors: std::ops::Range<u64>) -> Option<std::io::Result<()>> {
        None
    }

    /// Lets the disk forget sectors; `None` where the target has no such thing.
    ///
    /// # Errors
    /// As [`Self::write`].
    fn trim(&self, _lane: usize, _sectors: std::ops::Range<u64>) -> Option<std::io::Result<()>> {
        None
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// As [`Self::write`].
    fn flush(&self, lane: usize) -> std::io::Result<()>;
}

/// A file or a device, written past the page cache: a write that returned is on the disk below.
#[derive(Debug)]
pub struct Direct(File);

impl Direct {
    /// Opens it.
    ///
    /// # Panics
    /// If it can't be opened for direct writing.
    #[must_use]
    pub fn open(path: &Path) -> Self {
        let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).expect("a small flag");
        let file = File::options().write(true).custom_flags(direct).open(path);
        Self(file.unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }
}

impl Target for Direct {
    fn write(&self, _: usize, sector: u64, bytes: &[u8]) -> std::io::Result<()> {
        let mut buffer = vec![0; bytes.len() + PAGE];
        let aligned = buffer.as_ptr().align_offset(PAGE);
        let buffer = &mut buffer[aligned..aligned + bytes.len()];
        buffer.copy_from_slice(bytes);
        self.0.write_all_at(buffer, sector * SECTOR as u64)
    }

    fn flush(&self, _: usize) -> std::io::Result<()> {
        self.0.sync_data()
    }
}

/// A file written through the page cache.
#[derive(Debug)]
pub struct Cached(File);

impl Cached {
    /// Opens it.
    ///
    /// # Panics
    /// If it can't be opened for writing.
    #[must_use]
    pub fn open(path: &Path) -> Self {
        Self(File::options().write(true).open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }
}

impl Target for Cached {
    fn write(&self, _: usize, sector: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.0.write_all_at(bytes, sector * SECTOR as u64)
    }

    fn flush(&self, _: usize) -> std::io::Result<()> {
        self.0.sync_data()
    }
}
