//! Which records are live at a point, and in which order their bytes are fetched. PURE.
//!
//! Epochs are shown newest first; a page is taken from the first record that sets it. Memory for a window of the disk: two
//! masks (16 bytes) for each block and [`LiveRecord`] (48 bytes) for each record that is live there, so a window of
//! [`WINDOW_BLOCKS`] of a full disk takes some 64 MiB.

#![allow(clippy::cast_possible_truncation, reason = "a window has at most 2^20 blocks, a block 64 pages")]

use std::ops::Range;

use common::error::{Dispose, Disposition};
use common::format::record::RecordMeta;
use common::format::segment::SegmentEntry;
use common::ids::{BlockIndex, Digest, Epoch, Geometry, PageMask, SealTag};
use common::limits::{BLOCK_BYTES, PAGE_BYTES, PAGES_PER_BLOCK};

/// Blocks planned at a time: 256 GiB of disk.
pub const WINDOW_BLOCKS: u64 = 1 << 20;
/// Largest range fetched at once.
pub const ITEM_BYTES_MAX: u64 = 4 << 20;
/// Bytes between two records that are fetched along rather than asked for separately: a request costs more.
const GAP_BYTES_MAX: u64 = 64 << 10;

/// Why there is no plan.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// Some pages were never sent up to this point.
    #[error(
        "the point at epoch {epoch} is not complete: {pages} pages were never sent, the first at byte {first_byte} of the disk; choose another point"
    )]
    Incomplete {
        /// Epoch of the point.
        epoch: Epoch,
        /// Pages missing.
        pages: u64,
        /// Where the first of them lies.
        first_byte: u64,
    },
    /// A record that the point needs was given up, as its point had expired.
    #[error(
        "the point at epoch {point} can't be restored any more: a record of epoch {epoch} for block {block} was collected after the point expired; `blockferry points` lists those that can"
    )]
    Collected {
        /// Epoch of the point.
        point: Epoch,
        /// Epoch of the record.
        epoch: Epoch,
        /// Its block.
        block: BlockIndex,
    },
    /// A record sets pages that the disk does not have.
    #[error("epoch {epoch} has a record for block {block}, which reaches beyond the end of the disk")]
    BeyondEnd {
        /// Epoch.
        epoch: Epoch,
        /// First block of the record.
        block: BlockIndex,
    },
}

impl Dispose for PlanError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Incomplete { .. } | Self::Collected { .. } => Disposition::BadInput,
            Self::BeyondEnd { .. } => Disposition::Corrupt,
        }
    }
}

/// A record with pages to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveRecord {
    /// Data pages for which it is the newest.
    pub live: PageMask,
    /// Index into the history's segments.
    pub segment: u32,
    /// Offset there.
    pub offset: u32,
    /// Length of the record.
    pub len: u32,
    /// Block, below 2^30.
    pub block: u32,
    /// Index into the history's epochs.
    pub epoch: u32,
    /// The seal's tag, which the epoch's signed root covers.
    pub tag: SealTag,
}

impl LiveRecord {
    /// Where a page of its block lies on the disk.
    #[must_use]
    pub fn page_at(&self, page: u32) -> u64 {
        u64::from(self.block) * BLOCK_BYTES as u64 + u64::from(page) * PAGE_BYTES as u64
    }
}

/// One range of a segment to be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkItem {
    /// Index into the history's segments.
    pub segment: u32,
    /// Bytes of the segment.
    pub range: Range<u64>,
    /// Records in it: a range of [`Plan::records`].
    pub records: Range<usize>,
}

/// Takes epochs newest first.
#[derive(Debug)]
pub struct Planner {
    geometry: Geometry,
    window: Range<u64>,
    covered: Vec<PageMask>,
    data: Vec<PageMask>,
    missing: u64,
    records: Vec<LiveRecord>,
    /// A needed record whose payload is gone: its epoch and block.
    collected: Option<(Epoch, BlockIndex)>,
}

/// What a window of the disk is made of.
#[derive(Debug)]
pub struct Plan {
    geometry: Geometry,
    window: Range<u64>,
    data: Vec<PageMask>,
    /// Live records, those of the disk's first block last, else by segment and offset.
    pub records: Vec<LiveRecord>,
    /// Ranges to fetch, in that order.
    pub items: Vec<WorkItem>,
    /// From here on, items hold the disk's first block, which is to be written last of all.
    pub first_block_from: usize,
}

impl Planner {
    /// A planner for the blocks of `window` on a disk of this geometry.
    #[must_use]
    pub fn new(geometry: Geometry, window: Range<u64>) -> Self {
        let window = window.start.min(geometry.blocks())..window.end.min(geometry.blocks());
        let blocks = usize::try_from(window.end - window.start).unwrap_or(0);
        let missing = window.clone().map(|block| u64::from(geometry.pages_of(BlockIndex(block)).count())).sum();
        Self {
            geometry,
            window,
            covered: vec![PageMask::EMPTY; blocks],
            data: vec![PageMask::EMPTY; blocks],
            missing,
            records: Vec::new(),
            collected: None,
        }
    }

    /// Shows a record of epoch number `number`, which is `epoch` in the history, when the disk had the geometry `disk`. Records
    /// of one epoch may come in any order, since none overlap; newer epochs must come before older ones. A page that was the
    /// last of a smaller disk holds zeros behind that disk's end.
    ///
    /// # Errors
    /// [`PlanError::BeyondEnd`].
    pub fn add(
        &mut self,
        epoch: u32,
        number: Epoch,
        disk: Geometry,
        segment: u32,
        entry: &SegmentEntry,
    ) -> Result<(), PlanError> {
        let meta = &entry.meta;
        let (first, end) = (meta.block.0, meta.block.0.saturating_add(meta.block_count.into()));
        if end > disk.blocks() || !meta.pages().without(disk.pages_of(BlockIndex(end - 1))).is_empty() {
            return Err(PlanError::BeyondEnd { epoch: number, block: meta.block });
        }
        for block in first.max(self.window.start)..end.min(self.window.end) {
            let at = (block - self.window.start) as usize;
            let fresh = meta.pages().and(self.geometry.pages_of(BlockIndex(block))).without(self.covered[at]);
            self.covered[at] = self.covered[at].or(fresh);
            self.missing -= u64::from(fresh.count());
            let live = fresh.and(meta.data_mask);
            self.data[at] = self.data[at].or(live);
            if !live.is_empty() {
                if entry.is_collected() {
                    self.collected.get_or_insert((number, meta.block));
                    continue;
                }
                self.records.push(live_record(epoch, segment, entry.offset, meta, live));
            }
        }
        Ok(())
    }

    /// True where no older epoch can add anything.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.missing == 0
    }

    /// Ends planning for the point at `epoch`.
    ///
    /// # Errors
    /// [`PlanError::Incomplete`] where no epoch set some page; [`PlanError::Collected`].
    pub fn finish(mut self, epoch: Epoch) -> Result<Plan, PlanError> {
        if let Some((of, block)) = self.collected {
            return Err(PlanError::Collected { point: epoch, epoch: of, block });
        }
        if self.missing > 0 {
            let first = (self.window.clone()).zip(&self.covered).find_map(|(block, covered)| {
                let missing = self.geometry.pages_of(BlockIndex(block)).without(*covered);
                missing.iter().next().map(|page| block * BLOCK_BYTES as u64 + u64::from(page) * PAGE_BYTES as u64)
            });
            return Err(PlanError::Incomplete { epoch, pages: self.missing, first_byte: first.unwrap_or(0) });
        }
        self.records.sort_unstable_by_key(|record| (record.block == 0, record.segment, record.offset));
        let mut items: Vec<WorkItem> = Vec::new();
        let mut first_block_from = None;
        for (number, record) in self.records.iter().enumerate() {
            let range = u64::from(record.offset)..u64::from(record.offset) + u64::from(record.len);
            if record.block == 0 && first_block_from.is_none() {
                first_block_from = Some(items.len());
            }
            let starts_first_block = first_block_from == Some(items.len());
            match items.last_mut() {
                Some(item)
                    if !starts_first_block
                        && item.segment == record.segment
                        && range.start <= item.range.end + GAP_BYTES_MAX
                        && range.end - item.range.start <= ITEM_BYTES_MAX =>
                {
                    item.range.end = range.end;
                    item.records.end = number + 1;
                }
                _ => items.push(WorkItem { segment: record.segment, range, records: number..number + 1 }),
            }
        }
        let first_block_from = first_block_from.unwrap_or(items.len());
        let Self { geometry, window, data, records, .. } = self;
        Ok(Plan { geometry, window, data, records, items, first_block_from })
    }
}

fn live_record(epoch: u32, segment: u32, offset: u64, meta: &RecordMeta, live: PageMask) -> LiveRecord {
    let small = |value: u64| u32::try_from(value).expect("decoders bound segments to 129 MiB and disks to 2^30 blocks");
    LiveRecord {
        live,
        segment,
        offset: small(offset),
        len: meta.record_len,
        block: small(meta.block.0),
        epoch,
        tag: meta.tag,
    }
}

impl Plan {
    /// Bytes of the disk that lie in data pages.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        let pages: u64 = self.data.iter().map(|mask| u64::from(mask.count())).sum();
        let last = self.geometry.pages() - 1;
        let (block, page) = (last / PAGES_PER_BLOCK as u64, (last % PAGES_PER_BLOCK as u64) as u32);
        let has_last = self.window.contains(&block) && self.data[(block - self.window.start) as usize].contains(page);
        let beyond = self.geometry.pages() * PAGE_BYTES as u64 - self.geometry.disk_bytes();
        pages * PAGE_BYTES as u64 - if has_last { beyond } else { 0 }
    }

    /// The blocks of the window, and which of their pages hold data.
    pub fn data(&self) -> impl Iterator<Item = (u64, PageMask)> {
        (self.window.start..).zip(self.data.iter().copied())
    }

    /// Bytes to be fetched.
    #[must_use]
    pub fn fetch_bytes(&self) -> u64 {
        self.items.iter().map(|item| item.range.end - item.range.start).sum()
    }

    /// The byte ranges of the disk, ascending and joined, that are zero. None lies in the disk's first block unless
    /// `first_block` is true.
    pub fn zero_ranges(&self, first_block: bool) -> impl Iterator<Item = Range<u64>> {
        let (geometry, start) = (self.geometry, self.window.start);
        let mut pages = self.data.iter().enumerate().flat_map(move |(at, data)| {
            let block = start + at as u64;
            let zero = if block == 0 && !first_block {
                PageMask::EMPTY
            } else {
                geometry.pages_of(BlockIndex(block)).without(*data)
            };
            zero.iter().map(move |page| {
                let first = block * BLOCK_BYTES as u64 + u64::from(page) * PAGE_BYTES as u64;
                first..(first + PAGE_BYTES as u64).min(geometry.disk_bytes())
            })
        });
        let mut next = pages.next();
        std::iter::from_fn(move || {
            let mut run = next.take()?;
            next = pages.next();
            while let Some(page) = &next
                && page.start == run.end
            {
                run.end = page.end;
                next = pages.next();
            }
            Some(run)
        })
    }

    /// Names this plan: the same store state and point give the same.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new();
        for record in &self.records {
            for number in [record.segment, record.offset, record.len, record.block, record.epoch] {
                hasher.update(&number.to_le_bytes());
            }
            hasher.update(&record.live.0.to_le_bytes()).update(&record.tag.0);
        }
        for item in &self.items {
            hasher.update(&(item.records.end as u64).to_le_bytes());
        }
        Digest(*hasher.finalize().as_bytes())
    }
}

/// The runs of consecutive pages in a mask: (first page, pages).
pub fn page_runs(mask: PageMask) -> impl Iterator<Item = (u32, u32)> {
    let mut rest = mask.0;
    std::iter::from_fn(move || {
        (rest != 0).then(|| {
            let first = rest.trailing_zeros();
            let pages = (!(rest >> first)).trailing_zeros();
            rest &= if first + pages >= 64 { 0 } else { u64::MAX << (first + pages) };
            (first, pages)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::format::record::{Codec, RecordKind};
    use common::limits::{RECORD_HEADER_BYTES, SEAL_TAG_BYTES};
    use proptest::prelude::*;

    fn entry(offset: u64, block: u64, count: u32, data: u64, zero: u64) -> SegmentEntry {
        let record_len = (RECORD_HEADER_BYTES + SEAL_TAG_BYTES) as u32 + data.count_ones() * PAGE_BYTES as u32;
        let meta = RecordMeta {
            kind: if count == 1 { RecordKind::Delta } else { RecordKind::ZeroRange },
            codec: Codec::Raw,
            block_count: count,
            block: BlockIndex(block),
            data_mask: PageMask(data),
            zero_mask: PageMask(zero),
            counter: 1,
            record_len,
            tag: SealTag([block as u8; 16]),
            digest: Digest::ZERO,
        };
        SegmentEntry { offset, meta }
    }

    fn disk(pages: u64) -> Geometry {
        Geometry::new(pages * 4096).expect("not empty")
    }

    #[test]
    fn a_page_comes_from_the_newest_epoch_that_sets_it() {
        let mut planner = Planner::new(disk(64), 0..1);
        planner.add(2, Epoch(9), disk(64), 1, &entry(16, 0, 1, 0b0011, 0b0100)).expect("fits");
        assert!(!planner.is_complete());
        planner.add(0, Epoch(5), disk(64), 0, &entry(16, 0, 1, u64::MAX, 0)).expect("fits");
        let plan = planner.finish(Epoch(9)).expect("complete");
        let live: Vec<_> = plan.records.iter().map(|record| (record.epoch, record.live.0)).collect();
        assert_eq!(live, [(0, !0b0111), (2, 0b0011)]);
        assert!(plan.zero_ranges(true).eq(std::iter::once(8192..12288)));
        assert_eq!(plan.zero_ranges(false).count(), 0);
        assert_eq!(plan.data_bytes(), 63 * 4096);
    }

    #[test]
    fn a_page_that_no_epoch_set_is_named() {
        let mut planner = Planner::new(disk(64 + 3), 0..2);
        planner.add(0, Epoch(5), disk(64 + 3), 0, &entry(16, 0, 1, u64::MAX, 0)).expect("fits");
        planner.add(0, Epoch(5), disk(64 + 3), 0, &entry(16, 1, 1, 0b010, 0)).expect("fits");
        let expected = PlanError::Incomplete { epoch: Epoch(5), pages: 2, first_byte: BLOCK_BYTES as u64 };
        assert_eq!(planner.finish(Epoch(5)).expect_err("incomplete"), expected);
    }

    #[test]
    fn a_record_beyond_the_end_is_refused() {
        let mut planner = Planner::new(disk(64 + 3), 0..2);
        for bad in [entry(16, 1, 1, 0b1000, 0), entry(16, 2, 1, 1, 0), entry(16, 0, 2, 0, u64::MAX)] {
            assert!(
                matches!(planner.add(0, Epoch(5), disk(64 + 3), 0, &bad), Err(PlanError::BeyondEnd { .. })),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn a_disk_that_grew_takes_pages_of_its_smaller_self_and_one_that_shrank_only_what_it_still_has() {
        let (small, large) = (disk(64 + 3), disk(64 + 5));
        let old = entry(16, 1, 1, 0b111, 0);
        let mut planner = Planner::new(large, 1..2);
        planner.add(1, Epoch(6), large, 1, &entry(16, 1, 1, 0b11100, 0)).expect("fits");
        planner.add(0, Epoch(5), small, 0, &old).expect("fits");
        let plan = planner.finish(Epoch(6)).expect("complete");
        let live: Vec<_> = plan.records.iter().map(|record| (record.epoch, record.live.0)).collect();
        assert_eq!(live, [(0, 0b011), (1, 0b11100)]);
        let mut planner = Planner::new(disk(64 + 2), 1..2);
        planner.add(0, Epoch(5), small, 0, &old).expect("it fitted its own disk");
        assert_eq!(planner.finish(Epoch(5)).expect("complete").records[0].live.0, 0b11);
    }

    #[test]
    fn near_records_of_a_segment_are_fetched_together_and_the_first_block_alone_and_last() {
        let mut planner = Planner::new(disk(64 * 6), 0..6);
        let full = |offset, block| entry(offset, block, 1, u64::MAX, 0);
        let len = u64::from(full(0, 0).meta.record_len);
        planner.add(0, Epoch(1), disk(64 * 6), 0, &full(16 + len, 0)).expect("fits");
        planner.add(0, Epoch(1), disk(64 * 6), 0, &full(16, 1)).expect("fits");
        planner.add(0, Epoch(1), disk(64 * 6), 0, &full(16 + 2 * len, 2)).expect("fits");
        planner.add(0, Epoch(1), disk(64 * 6), 0, &full(16 + 3 * len, 3)).expect("fits");
        planner.add(0, Epoch(1), disk(64 * 6), 0, &full(16 + 9 * len, 4)).expect("fits");
        planner.add(0, Epoch(1), disk(64 * 6), 1, &full(16, 5)).expect("fits");
        let plan = planner.finish(Epoch(1)).expect("complete");
        let blocks: Vec<Vec<u32>> = plan
            .items
            .iter()
            .map(|item| plan.records[item.records.clone()].iter().map(|r| r.block).collect())
            .collect();
        // The gap that block 0's record leaves between 1 and 2 is over 64 KiB.
        assert_eq!(blocks, [vec![1], vec![2, 3], vec![4], vec![5], vec![0]]);
        assert_eq!(plan.first_block_from, 4);
    }

    #[test]
    fn a_window_takes_only_its_part_of_a_range_record() {
        let mut parts = Vec::new();
        for window in [0..2, 2..4, 4..9] {
            let mut planner = Planner::new(disk(64 * 5), window);
            planner.add(0, Epoch(1), disk(64 * 5), 0, &entry(16, 0, 5, 0, u64::MAX)).expect("fits");
            parts.extend(planner.finish(Epoch(1)).expect("complete").zero_ranges(true));
        }
        let block = BLOCK_BYTES as u64;
        assert_eq!(parts, [0..2 * block, 2 * block..4 * block, 4 * block..5 * block]);
    }

    proptest! {
        #[test]
        fn runs_of_pages_put_together_are_the_mask(mask in any::<u64>()) {
            let mut rebuilt = 0_u64;
            let mut end = 0;
            for (first, pages) in page_runs(PageMask(mask)) {
                prop_assert!(pages > 0 && (end == 0 || first > end));
                end = first + pages;
                rebuilt |= PageMask::first(pages).0 << first;
            }
            prop_assert_eq!(rebuilt, mask);
        }
    }
}
