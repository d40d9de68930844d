//! Pages of the point that were fetched, in a file of our own, so that nothing is fetched twice while it fits.
//!
//! The file is sparse, a page lies where it lies on the disk. It has no name: nobody else opens it, and it is gone with the
//! process; so what is in it needs no proof. The kernel's page cache keeps what is used often in memory.
//!
//! Promises: what [`Cache::read`] fills in was put there by [`Cache::insert`]; at most the pages allowed for are kept, blocks
//! that were not used lately go first. A file that fails (a full disk) costs speed, never correctness. All functions block.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use common::ids::{Geometry, PageMask};
use common::limits::{BLOCK_BYTES, PAGE_BYTES};
use rustix::fs::{FallocateFlags, OFlags};

use crate::restore::plan::page_runs;

/// Parts that are locked by themselves.
const SHARDS: usize = 64;

#[derive(Debug, Default)]
struct Entry {
    pages: PageMask,
    /// Since the hand came by.
    used: AtomicBool,
}

type Shard = HashMap<u64, Entry>;

/// The cache of one point.
#[derive(Debug)]
pub(super) struct Cache {
    file: File,
    shards: Vec<RwLock<Shard>>,
    pages: AtomicU64,
    pages_max: u64,
    hand: AtomicUsize,
    /// Said once that the file failed.
    failed: AtomicBool,
}

/// A file without a name in `folder`, for this process alone.
///
/// # Errors
/// Those of the file system; not every one can do this.
pub(super) fn nameless(folder: &Path, bytes: u64) -> io::Result<File> {
    let flags = i32::try_from((OFlags::TMPFILE | OFlags::CLOEXEC).bits()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).mode(0o600).open(folder)?;
    file.set_len(bytes)?;
    Ok(file)
}

impl Cache {
    /// An empty cache in a file in `folder` that keeps at most `bytes_max` bytes of pages.
    ///
    /// # Errors
    /// Where there can't be such a file.
    pub(super) fn new(folder: &Path, geometry: Geometry, bytes_max: u64) -> io::Result<Self> {
        Ok(Self {
            file: nameless(folder, geometry.pages() * PAGE_BYTES as u64)?,
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            pages: AtomicU64::new(0),
            pages_max: bytes_max / PAGE_BYTES as u64,
            hand: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
        })
    }

    fn shard(&self, block: u64) -> &RwLock<Shard> {
        &self.shards[usize::try_from(block).unwrap_or(0) % SHARDS]
    }

    /// Fills in the pages `wanted` of a block, whose bytes `buffer` holds from page `first` of the block on. Returns those that
    /// it does not have.
    pub(super) fn read(&self, block: u64, wanted: PageMask, first: u32, buffer: &mut [u8]) -> PageMask {
        let shard = read(self.shard(block));
        let Some(entry) = shard.get(&block) else { return wanted };
        entry.used.store(true, Ordering::Relaxed);
        let here = wanted.and(entry.pages);
        for (page, count) in page_runs(here) {
            let place = (page - first) as usize * PAGE_BYTES;
            let bytes = &mut buffer[place..place + count as usize * PAGE_BYTES];
            if let Err(error) = self.file.read_exact_at(bytes, at(block, page)) {
                self.fails(&error);
                return wanted;
            }
        }
        wanted.without(here)
    }

    /// The pages of `wanted` that it does not have.
    pub(super) fn missing(&self, block: u64, wanted: PageMask) -> PageMask {
        let shard = read(self.shard(block));
        shard.get(&block).map_or(wanted, |entry| wanted.without(entry.pages))
    }

    /// Keeps a run of pages that starts at byte `offset` of the disk and lies in one block.
    pub(super) fn insert(&self, offset: u64, run: &[u8]) {
        let block = offset / BLOCK_BYTES as u64;
        let page = u32::try_from(offset % BLOCK_BYTES as u64 / PAGE_BYTES as u64).unwrap_or(0);
        let count = u32::try_from(run.len() / PAGE_BYTES).unwrap_or(0);
        if u64::from(count) > self.pages_max {
            return;
        }
        let mask = PageMask(PageMask::first(count).0 << page);
        let mut shard = write(self.shard(block));
        if let Err(error) = self.file.write_all_at(run, offset) {
            self.fails(&error);
            return;
        }
        let entry = shard.entry(block).or_default();
        let fresh = mask.without(entry.pages).count();
        entry.pages = entry.pages.or(mask);
        drop(shard);
        self.pages.fetch_add(fresh.into(), Ordering::AcqRel);
        self.make_room();
    }

    /// Lets blocks go until the rest is within bounds: those first that were not read since the hand last came by.
    fn make_room(&self) {
        // Twice around at most: in the first round every block may have been used.
        for _ in 0..2 * SHARDS {
            if self.pages.load(Ordering::Acquire) <= self.pages_max {
                return;
            }
            let mut shard = write(&self.shards[self.hand.fetch_add(1, Ordering::Relaxed) % SHARDS]);
            shard.retain(|block, entry| {
                if self.pages.load(Ordering::Acquire) <= self.pages_max || entry.used.swap(false, Ordering::Relaxed) {
                    return true;
                }
                self.pages.fetch_sub(entry.pages.count().into(), Ordering::AcqRel);
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                if let Err(error) = rustix::fs::fallocate(&self.file, flags, at(*block, 0), BLOCK_BYTES as u64) {
                    self.fails(&error.into());
                }
                false
            });
        }
    }

    fn fails(&self, error: &io::Error) {
        if !self.failed.swap(true, Ordering::Relaxed) {
            tracing::warn!(%error, "the cache file failed: what does not fit there is fetched again when read; free space, or pass --cache-dir");
        }
    }
}

fn at(block: u64, page: u32) -> u64 {
    block * BLOCK_BYTES as u64 + u64::from(page) * PAGE_BYTES as u64
}

fn read(shard: &RwLock<Shard>) -> RwLockReadGuard<'_, Shard> {
    shard.read().unwrap_or_else(PoisonError::into_inner)
}

fn write(shard: &RwLock<Shard>) -> RwLockWriteGuard<'_, Shard> {
    shard.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(blocks: u64, pages_max: u64) -> Cache {
        let geometry = Geometry::new(blocks * BLOCK_BYTES as u64).expect("not empty");
        Cache::new(Path::new("/var/tmp"), geometry, pages_max * PAGE_BYTES as u64).expect("a file")
    }

    #[test]
    fn what_was_put_in_comes_out_and_the_rest_is_said_to_be_missing() {
        let cache = cache(4, 1000);
        cache.insert(BLOCK_BYTES as u64 + 2 * PAGE_BYTES as u64, &[7; 2 * PAGE_BYTES]);
        let mut buffer = vec![1; 4 * PAGE_BYTES];
        let missing = cache.read(1, PageMask(0b11110), 1, &mut buffer);
        assert_eq!(missing, PageMask(0b10010));
        assert!(buffer[..PAGE_BYTES].iter().all(|byte| *byte == 1), "not touched");
        assert!(buffer[PAGE_BYTES..3 * PAGE_BYTES].iter().all(|byte| *byte == 7));
        assert_eq!(cache.missing(1, PageMask(0b111)), PageMask(0b011));
        assert_eq!(cache.missing(0, PageMask(1)), PageMask(1));
    }

    #[test]
    fn over_its_bound_blocks_that_were_not_read_go_first_and_are_not_taken_for_zeros() {
        let cache = cache(400, 4 * 64);
        let full = vec![9; BLOCK_BYTES];
        let mut buffer = vec![0; BLOCK_BYTES];
        for block in 0..400 {
            cache.insert(block * BLOCK_BYTES as u64, &full);
            // The first is read again and again.
            if cache.read(0, PageMask::FULL, 0, &mut buffer).is_empty() {
                assert_eq!(buffer, full);
            }
        }
        let kept = (0..400).filter(|block| cache.missing(*block, PageMask::FULL).is_empty()).count();
        assert!((1..=4).contains(&kept), "{kept} blocks are kept");
        assert!(cache.pages.load(Ordering::Relaxed) <= 4 * 64);
    }
}
