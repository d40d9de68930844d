//! A set of pages in a file: which pages of a disk changed and are not committed yet. Pure.
//!
//! One head, batches, one end, an envelope each, so that a set of any size is written and read in small steps. A whole group
//! of blocks costs 16 bytes, however large; a block with some of its pages costs 8 bytes and a share of its run's head.

use super::FormatError;
use super::envelope::Kind;
use super::wire::{Reader, Writer};
use crate::ids::{BlockIndex, Geometry, PageMask};
use crate::limits;
use crate::pages::PageSet;

#[cfg(test)]
mod tests;

/// Most blocks with masks in one batch: bounds what a reader has in memory.
const BATCH_MASKS_MAX: usize = 8_192;
/// Most runs in one batch.
const BATCH_RUNS_MAX: usize = 2_048;
const RUN_BYTES: usize = 16;

/// The first envelope.
pub const HEAD: Kind = Kind { what: "page set head", magic: *b"BFPGSHD\0", version: 1, body_bytes_max: 48 };
/// An envelope of runs.
pub const BATCH: Kind = Kind {
    what: "page set batch",
    magic: *b"BFPGSBT\0",
    version: 1,
    body_bytes_max: 4 + BATCH_RUNS_MAX * RUN_BYTES + BATCH_MASKS_MAX * 8,
};
/// The last envelope.
pub const END: Kind = Kind { what: "page set end", magic: *b"BFPGSEN\0", version: 1, body_bytes_max: 16 };

/// What a set is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Digest of whatever the set's owner means to compare before it believes the set: the disk, the boot.
    pub identity: [u8; 32],
    /// Number of the set.
    pub sequence: u64,
    /// Exact size of the disk in bytes.
    pub disk_bytes: u64,
}

impl Head {
    /// The head's envelope.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Writer::with_capacity(48);
        body.raw(&self.identity).u64(self.sequence).u64(self.disk_bytes);
        HEAD.seal(body.as_slice())
    }

    /// Reads a head.
    ///
    /// # Errors
    /// [`FormatError`]; a size of no disk is [`FormatError::Invalid`].
    pub fn decode(bytes: &[u8]) -> Result<(Self, Geometry), FormatError> {
        let mut body = Reader::new(HEAD.what, HEAD.open(bytes)?);
        let head = Self { identity: body.array()?, sequence: body.u64()?, disk_bytes: body.u64()? };
        body.finish()?;
        let geometry = Geometry::new(head.disk_bytes)
            .ok_or(FormatError::Invalid { what: "page set: disk size", found: head.disk_bytes })?;
        Ok((head, geometry))
    }
}

/// Gives a set's batches and its end, one envelope after the other, until `None`.
#[derive(Debug)]
pub struct Encoder<'a> {
    pages: &'a PageSet,
    at: Option<BlockIndex>,
    batches: u64,
    ended: bool,
}

impl<'a> Encoder<'a> {
    /// From the first page on.
    #[must_use]
    pub fn new(pages: &'a PageSet) -> Self {
        Self { pages, at: Some(BlockIndex(0)), batches: 0, ended: false }
    }
}

impl Iterator for Encoder<'_> {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        if self.ended {
            return None;
        }
        let (mut runs, mut masks_total) = (Vec::<Run>::new(), 0_usize);
        while let Some(block) = self.at.and_then(|at| self.pages.next_block(at)) {
            let mask = self.pages.mask(block);
            let whole = mask == self.pages.geometry().pages_of(block);
            let follows =
                runs.last().is_some_and(|run| run.first + run.count == block.0 && run.masks.is_empty() == whole);
            if !whole && masks_total == BATCH_MASKS_MAX || !follows && runs.len() == BATCH_RUNS_MAX {
                break;
            }
            if !follows {
                runs.push(Run { first: block.0, count: 0, masks: Vec::new() });
            }
            let run = runs.last_mut().expect("one was pushed where there was none");
            let next = if whole { self.pages.whole_until(block) } else { BlockIndex(block.0 + 1) };
            run.count += next.0 - block.0;
            if !whole {
                run.masks.push(mask.0);
                masks_total += 1;
            }
            self.at = Some(next);
        }
        if runs.is_empty() {
            self.ended = true;
            let mut body = Writer::with_capacity(16);
            body.u64(self.batches).u64(self.pages.len());
            return Some(END.seal(body.as_slice()));
        }
        self.batches += 1;
        let mut body = Writer::with_capacity(4 + runs.len() * RUN_BYTES + masks_total * 8);
        body.count(runs.len());
        for run in &runs {
            // 2^30 blocks of the largest disk fit 32 bits.
            body.u64(run.first).count(usize::try_from(run.count).unwrap_or(usize::MAX)).count(run.masks.len());
            for mask in &run.masks {
                body.u64(*mask);
            }
        }
        Some(BATCH.seal(body.as_slice()))
    }
}

struct Run {
    first: u64,
    count: u64,
    masks: Vec<u64>,
}

/// Takes a set's envelopes one after the other.
#[derive(Debug)]
pub struct Decoder {
    pages: PageSet,
    next: u64,
    batches: u64,
    ended: bool,
}

impl Decoder {
    /// For the set whose head names this disk.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        Self { pages: PageSet::empty(geometry), next: 0, batches: 0, ended: false }
    }

    /// Takes the next envelope. True where it was the end.
    ///
    /// # Errors
    /// [`FormatError`]; runs that do not ascend, lie beyond the disk's end or are empty are [`FormatError::Invalid`].
    pub fn take(&mut self, bytes: &[u8]) -> Result<bool, FormatError> {
        if bytes.starts_with(&END.magic) {
            let mut body = Reader::new(END.what, END.open(bytes)?);
            let (batches, pages) = (body.u64()?, body.u64()?);
            body.finish()?;
            if batches != self.batches {
                return Err(FormatError::Invalid { what: "page set: number of batches", found: batches });
            }
            if pages != self.pages.len() {
                return Err(FormatError::Invalid { what: "page set: number of pages", found: pages });
            }
            self.ended = true;
            return Ok(true);
        }
        let mut body = Reader::new(BATCH.what, BATCH.open(bytes)?);
        for _ in 0..body.count(BATCH.what, BATCH_RUNS_MAX, RUN_BYTES)? {
            let first = body.u64()?;
            let count = u64::from(body.u32()?);
            let masks = body.count(BATCH.what, BATCH_MASKS_MAX, 8)?;
            let end = first.saturating_add(count);
            if first < self.next || count == 0 || end > self.pages.geometry().blocks() {
                return Err(FormatError::Invalid { what: "page set: first block", found: first });
            }
            if masks != 0 && masks as u64 != count {
                return Err(FormatError::Invalid { what: "page set: number of masks", found: masks as u64 });
            }
            if masks == 0 {
                self.pages.insert_blocks(BlockIndex(first), count);
            }
            for block in (first..).take(masks) {
                self.pages.insert(BlockIndex(block), PageMask(body.u64()?));
            }
            self.next = end;
        }
        body.finish()?;
        self.batches += 1;
        Ok(false)
    }

    /// The set, once its end was taken.
    #[must_use]
    pub fn finish(self) -> Option<PageSet> {
        self.ended.then_some(self.pages)
    }
}

/// Bytes of the longest envelope of this format.
pub const ENVELOPE_BYTES_MAX: usize = super::envelope::OVERHEAD_BYTES + BATCH.body_bytes_max;

const _: () = assert!(limits::DISK_BYTES_MAX / limits::BLOCK_BYTES as u64 <= u32::MAX as u64);
const _: () = assert!(ENVELOPE_BYTES_MAX <= limits::ENVELOPE_BODY_BYTES_MAX);
