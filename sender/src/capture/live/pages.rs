//! Pages of a cut that are read from the disk when they are sealed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::format::close::Consistency;
use common::ids::{BlockIndex, PageMask};
use common::limits::{BLOCK_BYTES, PAGE_BYTES, PAGES_PER_BLOCK};
use common::pages::PageSet;

use crate::capture::cut::{CutPages, Piece, PieceMasks, PieceRead};
use crate::capture::scan::CHUNK_BLOCKS;
use crate::capture::{CaptureError, Disk};

/// How long reading takes, learned from reads. Clones learn together.
#[derive(Debug, Clone)]
pub(super) struct ReadSpeed(Arc<AtomicU64>);

impl ReadSpeed {
    pub(super) fn new(page: Duration) -> Self {
        Self(Arc::new(AtomicU64::new(nanos(page))))
    }

    /// A read of `pages` took this long. The newest counts for a quarter.
    pub(super) fn learn(&self, pages: u64, took: Duration) {
        if let Some(now) = nanos(took).checked_div(pages) {
            let old = self.0.load(Ordering::Relaxed);
            self.0.store((old / 4).saturating_mul(3).saturating_add(now / 4).max(1), Ordering::Relaxed);
        }
    }

    /// How long `pages` will take.
    pub(super) fn expect(&self, pages: u64) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed).saturating_mul(pages))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Hands out a set of pages in pieces.
#[derive(Debug)]
pub(super) struct Pieces {
    set: Arc<PageSet>,
    /// The first block that was not handed out.
    next: Mutex<BlockIndex>,
}

impl Pieces {
    pub(super) fn new(set: Arc<PageSet>) -> Self {
        Self { set, next: Mutex::new(BlockIndex(0)) }
    }

    pub(super) fn next(&self) -> Option<Piece> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let first = self.set.next_block(*next)?;
        let mut masks = [PageMask::EMPTY; CHUNK_BLOCKS];
        for (mask, block) in masks.iter_mut().zip(first.0..) {
            *mask = self.set.mask(BlockIndex(block));
        }
        *next = BlockIndex(first.0 + CHUNK_BLOCKS as u64);
        Some(Piece { first, masks })
    }

    pub(super) fn len(&self) -> u64 {
        self.set.len()
    }
}

/// What of a piece may be left out where its hash is the committed one: pages that are in no cut on its way.
pub(super) fn comparable(piece: &Piece, on_their_way: &PageSet) -> PieceMasks {
    let mut masks = piece.masks;
    for (mask, block) in masks.iter_mut().zip(piece.first.0..) {
        *mask = mask.without(on_their_way.mask(BlockIndex(block)));
    }
    masks
}

/// Runs of neighbouring pages of a mask: first page and how many.
pub(super) fn runs(mask: PageMask) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < PAGES_PER_BLOCK && mask.0 >> at & 1 == 0 {
            at += 1;
        }
        let first = at;
        while at < PAGES_PER_BLOCK && mask.0 >> at & 1 == 1 {
            at += 1;
        }
        (at > first).then_some((first, at - first))
    })
}

/// Says whether nothing was written since the cut.
pub(super) type StillQuiet = Box<dyn Fn() -> Result<bool, CaptureError> + Send + Sync>;

/// Pages that are read when they are sealed. What changes meanwhile is marked, and in a later cut.
pub(super) struct DiskPages {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) pieces: Pieces,
    pub(super) on_their_way: PageSet,
    pub(super) speed: ReadSpeed,
    /// For a cut that asserts something only where the disk rests until its last page is read.
    pub(super) quiet: Option<StillQuiet>,
}

impl CutPages for DiskPages {
    fn next(&self) -> Option<Piece> {
        self.pieces.next()
    }

    fn read(&self, piece: &Piece, buffer: &mut [u8]) -> Result<PieceRead, CaptureError> {
        let started = Instant::now();
        let mut pages = 0;
        for (index, mask) in piece.masks.iter().enumerate() {
            for (first, count) in runs(*mask) {
                let at = index * BLOCK_BYTES + first * PAGE_BYTES;
                let offset = piece.first.0 * BLOCK_BYTES as u64 + at as u64;
                self.disk.read_at(offset, &mut buffer[at..at + count * PAGE_BYTES])?;
                pages += count as u64;
            }
        }
        self.speed.learn(pages, started.elapsed());
        Ok(PieceRead {
            masks: piece.masks,
            comparable: comparable(piece, &self.on_their_way),
            source_bytes: pages * PAGE_BYTES as u64,
            permits: Default::default(),
        })
    }

    fn finish(&self) -> Result<(Option<Consistency>, String), CaptureError> {
        match &self.quiet {
            None => Ok((None, String::new())),
            Some(quiet) if quiet()? => Ok((Some(Consistency::Crash), String::new())),
            Some(_) => Ok((
                Some(Consistency::Fuzzy),
                "the device was written while its last pages were read, and there is nothing to freeze".to_owned(),
            )),
        }
    }

    fn pages(&self) -> u64 {
        self.pieces.len()
    }
}
