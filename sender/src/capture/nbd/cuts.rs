//! The pages of cuts: contents that were kept, and parts of the backfill set that are read from the disk.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::ids::{BlockIndex, PageMask};
use common::limits::{BLOCK_BYTES, PAGE_BYTES};

use super::admission::{Blocks, CutSet, Frozen};
use super::export::Export;
use crate::capture::CaptureError;
use crate::capture::cut::{CutPages, Piece, PieceMasks, PieceRead};
use crate::capture::scan::CHUNK_BLOCKS;

/// Hands out a set of pages in pieces, and counts what was read.
#[derive(Debug)]
struct Pieces {
    set: Arc<CutSet>,
    pages: u64,
    cursor: Mutex<Cursor>,
    read: AtomicU64,
}

#[derive(Debug, Default)]
struct Cursor {
    /// The first block not handed out, and the place of the first block with content at or after it.
    block: u64,
    place: usize,
}

impl Pieces {
    fn new(set: Arc<CutSet>) -> Self {
        let content: u64 = set.blocks.iter().map(|(_, mask)| u64::from(mask.count())).sum();
        // No page is in both.
        let pages = content + set.zero.len();
        Self { set, pages, cursor: Mutex::default(), read: AtomicU64::new(0) }
    }

    fn next(&self) -> Option<Piece> {
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        let content = self.set.blocks.get(cursor.place).map(|(block, _)| *block);
        let zero = self.set.zero.next_block(BlockIndex(cursor.block));
        let first = content.into_iter().chain(zero).min()?;
        let mut masks = PieceMasks::default();
        for (mask, block) in masks.iter_mut().zip(first.0..) {
            *mask = self.set.zero.mask(BlockIndex(block));
            if let Some((_, content)) = self.set.blocks.get(cursor.place).filter(|(found, _)| found.0 == block) {
                *mask = mask.or(*content);
                cursor.place += 1;
            }
        }
        cursor.block = first.0 + CHUNK_BLOCKS as u64;
        Some(Piece { first, masks })
    }

    /// Counts the pages of a piece as read.
    fn done(&self, piece: &Piece) {
        let pages: u64 = piece.masks.iter().map(|mask| u64::from(mask.count())).sum();
        if self.read.fetch_add(pages, Ordering::AcqRel) + pages >= self.pages {
            self.set.complete.store(true, Ordering::Release);
        }
    }
}

/// An ordinary cut: contents are in memory, and are given up as they are read.
#[derive(Debug)]
pub(super) struct FrozenPages {
    export: Arc<Export>,
    pieces: Pieces,
    blocks: Mutex<Blocks>,
    /// What the volume's bound counts for cuts that are not sealed.
    frozen_bytes: Arc<AtomicU64>,
}

impl FrozenPages {
    /// The pages of `frozen`.
    pub(super) fn new(export: Arc<Export>, frozen: Frozen, frozen_bytes: Arc<AtomicU64>) -> Self {
        Self { export, pieces: Pieces::new(frozen.set), blocks: Mutex::new(frozen.blocks), frozen_bytes }
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CutPages for FrozenPages {
    fn next(&self) -> Option<Piece> {
        self.pieces.next()
    }

    fn read(&self, piece: &Piece, buffer: &mut [u8]) -> Result<PieceRead, CaptureError> {
        let mut permits = [const { None }; CHUNK_BLOCKS];
        let mut sealed = 0;
        let parts = buffer.chunks_exact_mut(BLOCK_BYTES).zip(permits.iter_mut());
        for (((part, permit), mask), block) in parts.zip(piece.masks).zip(piece.first.0..) {
            let content = self.blocks().remove(&block);
            let zero = mask.without(content.as_ref().map_or(PageMask::EMPTY, |content| content.mask));
            for index in zero.iter() {
                part[index as usize * PAGE_BYTES..][..PAGE_BYTES].fill(0);
            }
            let Some(content) = content else { continue };
            for (index, page) in content.mask.iter().zip(&content.pages) {
                part[index as usize * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(page);
            }
            sealed += content.permit.as_ref().map_or(0, common::budget::Permit::bytes);
            *permit = content.permit;
        }
        self.frozen_bytes.fetch_sub(sealed, Ordering::Relaxed);
        self.pieces.done(piece);
        self.export.room();
        Ok(PieceRead { masks: piece.masks, comparable: PieceMasks::default(), source_bytes: 0, permits })
    }

    fn pages(&self) -> u64 {
        self.pieces.pages
    }
}

impl Drop for FrozenPages {
    fn drop(&mut self) {
        let left =
            self.blocks().values().filter_map(|block| block.permit.as_ref()).map(common::budget::Permit::bytes).sum();
        self.frozen_bytes.fetch_sub(left, Ordering::Relaxed);
        self.export.room();
    }
}

/// A part of the backfill set: read from the disk under the locks of its pages.
#[derive(Debug)]
pub(super) struct BackfillPages {
    export: Arc<Export>,
    pieces: Pieces,
    /// Cuts that were not committed when this one was made.
    before: Vec<Arc<CutSet>>,
}

impl BackfillPages {
    /// The pages of `set`.
    pub(super) fn new(export: Arc<Export>, set: Arc<CutSet>, before: Vec<Arc<CutSet>>) -> Self {
        Self { export, pieces: Pieces::new(set), before }
    }
}

impl CutPages for BackfillPages {
    fn next(&self) -> Option<Piece> {
        self.pieces.next()
    }

    fn read(&self, piece: &Piece, buffer: &mut [u8]) -> Result<PieceRead, CaptureError> {
        let (masks, source_bytes) = self.export.read_backfill(piece, buffer)?;
        let mut comparable = masks;
        for (mask, block) in comparable.iter_mut().zip(piece.first.0..).filter(|(mask, _)| !mask.is_empty()) {
            let uncommitted = self.before.iter().map(|set| set.mask(BlockIndex(block)));
            *mask = mask.without(uncommitted.fold(PageMask::EMPTY, PageMask::or));
        }
        self.pieces.done(piece);
        Ok(PieceRead { masks, comparable, source_bytes, permits: [const { None }; CHUNK_BLOCKS] })
    }

    fn pages(&self) -> u64 {
        self.pieces.pages
    }
}
