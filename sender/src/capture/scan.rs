//! `scan`: the whole disk is read, and each page compared with what is known of it. Needs nothing from the kernel.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::clock::Clock;
use common::format::close::Consistency;
use common::format::state::{HashChange, HashEntry, PageHash, ZERO_PAGE_HASH};
use common::ids::{BlockIndex, Geometry, PageMask};
use common::limits::{BLOCK_BYTES, PAGE_BYTES};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::cut::{
    Asserts, Capture, CaptureState, CaptureStatus, Cut, CutId, CutPages, NextCut, Piece, PieceMasks, PieceRead,
    PointWish,
};
use super::error::CaptureError;
use super::snapshot::{SnapshotError, clone_image};
use super::{Disk, RestProbe};

/// Blocks read at a time: 1 MiB reads are where disks and kernels stop gaining.
pub const CHUNK_BLOCKS: usize = 4;
/// Bytes read at a time.
pub const CHUNK_BYTES: usize = CHUNK_BLOCKS * BLOCK_BYTES;

static ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// How a block differs from what is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDifference {
    /// Pages with new content.
    pub data: PageMask,
    /// Pages that became zero.
    pub zero: PageMask,
    /// Every page of the block is zero, and it has all 64.
    pub all_zero: bool,
    /// New hashes of the pages of both masks, ascending.
    pub hashes: Vec<PageHash>,
}

impl BlockDifference {
    /// Pages that differ.
    #[must_use]
    pub fn changed(&self) -> PageMask {
        self.data.or(self.zero)
    }

    /// What it changes in the page hashes, once a record of it is committed.
    #[must_use]
    pub fn into_change(self, block: BlockIndex) -> HashChange {
        HashChange::Pages { block, mask: self.changed(), hashes: self.hashes }
    }
}

/// The hash of a page: keyed BLAKE3, truncated to 128 bits; a constant for a page of zeros.
#[must_use]
pub fn page_hash(key: &[u8; 32], page: &[u8]) -> PageHash {
    if page == ZERO_PAGE {
        return ZERO_PAGE_HASH;
    }
    let mut hash = [0; 16];
    hash.copy_from_slice(&blake3::keyed_hash(key, page).as_bytes()[..16]);
    hash
}

/// Compares the pages of `pages`, which lie at their places in `bytes`, with their known hashes; those that are not in
/// `comparable` count as different whatever they hold.
#[must_use]
pub fn compare(
    key: &[u8; 32],
    bytes: &[u8],
    pages: PageMask,
    comparable: PageMask,
    known: &HashEntry,
) -> BlockDifference {
    let (mut data, mut zero, mut zeros) = (PageMask::EMPTY, PageMask::EMPTY, 0);
    let mut hashes = Vec::new();
    for index in pages.iter() {
        let start = index as usize * PAGE_BYTES;
        let hash = page_hash(key, &bytes[start..start + PAGE_BYTES]);
        let is_zero = hash == ZERO_PAGE_HASH;
        zeros += u32::from(is_zero);
        if hash != known.0[index as usize] || !comparable.contains(index) {
            if is_zero {
                zero = zero.with(index);
            } else {
                data = data.with(index);
            }
            hashes.push(hash);
        }
    }
    BlockDifference { data, zero, all_zero: zeros == PageMask::FULL.count(), hashes }
}

/// Puts the pages of `mask` behind one another: `bytes` itself where it needs no copy, else `scratch`.
#[must_use]
pub fn gather<'a>(bytes: &'a [u8], mask: PageMask, scratch: &'a mut Vec<u8>) -> &'a [u8] {
    let (first, count) = (mask.0.trailing_zeros() as usize, mask.count() as usize);
    if count == 0 {
        return &[];
    }
    if mask.0 >> first == PageMask::first(mask.count()).0 {
        return &bytes[first * PAGE_BYTES..(first + count) * PAGE_BYTES];
    }
    scratch.clear();
    for index in mask.iter() {
        let start = index as usize * PAGE_BYTES;
        scratch.extend_from_slice(&bytes[start..start + PAGE_BYTES]);
    }
    scratch
}

/// The whole disk, read block after block.
struct WholeDisk {
    disk: Arc<dyn Disk>,
    next: AtomicU64,
    rest: Mutex<Option<RestProbe>>,
}

impl CutPages for WholeDisk {
    fn next(&self) -> Option<Piece> {
        let first = self.next.fetch_add(CHUNK_BLOCKS as u64, Ordering::Relaxed);
        let geometry = self.disk.geometry();
        if first >= geometry.blocks() {
            return None;
        }
        let mut masks = PieceMasks::default();
        for (mask, block) in masks.iter_mut().zip(first..) {
            *mask = geometry.pages_of(BlockIndex(block));
        }
        Some(Piece { first: BlockIndex(first), masks })
    }

    fn read(&self, piece: &Piece, buffer: &mut [u8]) -> Result<PieceRead, CaptureError> {
        let geometry = self.disk.geometry();
        let offset = piece.first.0 * BLOCK_BYTES as u64;
        let blocks = piece.masks.iter().filter(|mask| !mask.is_empty()).count();
        self.disk.read_at(offset, &mut buffer[..blocks * BLOCK_BYTES])?;
        let source_bytes = (geometry.disk_bytes() - offset).min(CHUNK_BYTES as u64);
        Ok(PieceRead { masks: piece.masks, comparable: piece.masks, source_bytes, permits: Default::default() })
    }

    fn finish(&self) -> Result<(Option<Consistency>, String), CaptureError> {
        self.disk.check_size()?;
        let probe = self.rest.lock().unwrap_or_else(PoisonError::into_inner).take();
        let rest = probe.unwrap_or_else(|| RestProbe::none("the disk was not watched")).finish();
        Ok((Some(rest.consistency()), rest.to_string()))
    }

    fn pages(&self) -> u64 {
        self.disk.geometry().pages()
    }
}

/// A disk that is read as a whole for each point.
///
/// A pass is given only when no cut is under way: it would compare with hashes that an uncommitted one is about to change.
pub struct ScanCapture {
    disk: Arc<dyn Disk>,
    clock: Clock,
    interval: Duration,
    due: Instant,
    wished: bool,
    under_way: Option<CutId>,
    last: u64,
    committed_once: bool,
    changed: Arc<Notify>,
    /// An image file that is read from a clone, as long as its file system can make one.
    clones_of: Option<PathBuf>,
}

impl ScanCapture {
    /// Reads `disk` at once, and again each `interval`.
    #[must_use]
    pub fn new(disk: Arc<dyn Disk>, clock: Clock, interval: Duration) -> Self {
        let changed = Arc::new(Notify::new());
        let due = Instant::now();
        Self {
            disk,
            clock,
            interval,
            due,
            wished: false,
            under_way: None,
            last: 0,
            committed_once: false,
            changed,
            clones_of: None,
        }
    }

    /// Reads each pass from a clone of the image file at `path`, where it is one and its file system shares blocks between
    /// files: then the pass is crash consistent whoever writes the file meanwhile.
    #[must_use]
    pub fn with_clones_of(mut self, path: &Path) -> Self {
        self.clones_of = path.is_file().then(|| path.to_owned());
        self
    }

    /// What the next pass reads.
    fn pass_disk(&mut self) -> Arc<dyn Disk> {
        let Some(path) = &self.clones_of else { return Arc::clone(&self.disk) };
        match clone_image(path) {
            Ok(clone) if clone.geometry() == self.disk.geometry() => return Arc::new(clone),
            // The pass finds that the size changed.
            Ok(_) => {}
            Err(error @ SnapshotError::NoClones { .. }) => {
                tracing::debug!(%error, "read as it is");
                self.clones_of = None;
            }
            Err(error) => tracing::warn!(%error, "the file is read as it is this time"),
        }
        Arc::clone(&self.disk)
    }

    async fn next_pass(&mut self) -> Result<Cut, CaptureError> {
        while self.under_way.is_some() || !self.wished && self.due > Instant::now() {
            let changed = self.changed.notified();
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep_until(self.due), if self.under_way.is_none() => {}
            }
        }
        self.due = Instant::now() + self.interval;
        self.wished = false;
        self.last += 1;
        let id = CutId(self.last);
        self.under_way = Some(id);
        // Waits some milliseconds at most.
        let disk = self.pass_disk();
        let rest = disk.watch_rest();
        let pages = WholeDisk { disk, next: AtomicU64::new(0), rest: Mutex::new(Some(rest)) };
        Ok(Cut {
            id,
            pages: Arc::new(pages),
            time: self.clock.now(),
            asserts: Asserts::AtEnd,
            group: None,
            weaker: String::new(),
        })
    }
}

impl Capture for ScanCapture {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn next(&mut self) -> NextCut<'_> {
        Box::pin(self.next_pass())
    }

    fn want_point(&mut self, wish: PointWish) {
        // A disk that is read over minutes has no part in an instant.
        if let Some(group) = wish.group {
            group.give_up();
        }
        self.wished = true;
        self.changed.notify_one();
    }

    fn committed(&mut self, cut: CutId) -> Result<(), CaptureError> {
        if self.under_way.is_some_and(|under_way| under_way <= cut) {
            self.under_way = None;
            self.committed_once = true;
            self.changed.notify_one();
        }
        Ok(())
    }

    fn lost(&mut self, from: CutId) -> Result<(), CaptureError> {
        if self.under_way.is_some_and(|under_way| under_way >= from) {
            self.under_way = None;
            self.due = Instant::now();
            self.changed.notify_one();
        }
        Ok(())
    }

    fn status(&self) -> CaptureStatus {
        let state = if self.committed_once { CaptureState::Following } else { CaptureState::First };
        CaptureStatus { state, ..CaptureStatus::default() }
    }
}
