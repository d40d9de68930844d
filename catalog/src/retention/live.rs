//! Which records of a volume are still needed.
//!
//! A record's page is needed where some *kept* epoch (one with a retained recovery point, or the newest) comes at or after
//! the record's epoch, and no record in between sets the page anew. The kept epochs cut history into stretches; within one,
//! newest epoch first, a page is needed from the first record that sets it. So stretches are looked at one after the other,
//! and memory is two masks' worth for each GiB of disk touched, one bit for each record of history, and the indexes at hand.
//!
//! Promises: an epoch's metadata is believed only as far as its close proves it, so a damaged or replaced index gives
//! an error, never a wrong "not needed". Never: reads records, or decides what is kept.

#![allow(clippy::cast_possible_truncation, reason = "places and ordinals were bounded by the decoders")]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use common::format::record::RecordMeta;
use common::format::segment::SegmentIndex;
use common::ids::PageMask;
use futures::StreamExt as _;

use crate::store::Store;
use crate::volume::epochs::{EpochError, not_proven, prove};
use crate::volume::history::{History, HistoryEpoch};
use crate::volume::segment;

/// Epochs whose metadata is read ahead.
const EPOCHS_AHEAD: usize = 4;
/// Bytes of segments' indexes kept at hand where there is no reason for less: neighbouring epochs lie in one segment.
pub const INDEX_CACHE_BYTES: u64 = 24 << 20;
/// Blocks under one array of masks: 1 GiB of disk.
const RANGE_BLOCKS: u64 = 4096;
/// A record of at least so many data pages …
const WIDE_PAGES: u32 = 16;
/// … of which at most one in so many is needed, is worth sending anew.
const NARROW_SHARE: u32 = 8;

/// What is needed of one segment.
#[derive(Debug, Clone, Default)]
pub struct SegmentLive {
    /// One bit for each record, in the order of the index.
    bits: Vec<u64>,
    /// Records that are needed.
    pub records: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Bytes of all records whose payload is there.
    pub present_bytes: u64,
}

impl SegmentLive {
    /// Whether the record at this place of the index is needed.
    #[must_use]
    pub fn is_live(&self, ordinal: usize) -> bool {
        self.bits.get(ordinal / 64).is_some_and(|word| word >> (ordinal % 64) & 1 == 1)
    }

    fn mark(&mut self, ordinal: usize, bytes: u64) {
        if self.bits.len() <= ordinal / 64 {
            self.bits.resize(ordinal / 64 + 1, 0);
        }
        self.bits[ordinal / 64] |= 1 << (ordinal % 64);
        self.records += 1;
        self.bytes += bytes;
    }
}

/// A needed record whose payload is not there any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gone {
    /// Its segment.
    pub path: String,
    /// Index of its epoch in the history.
    pub epoch: usize,
    /// Its metadata.
    pub meta: RecordMeta,
}

/// What is needed of a volume.
#[derive(Debug, Clone, Default)]
pub struct Live {
    /// By place in [`History::segments`]; every segment that an epoch names is there.
    pub segments: HashMap<u32, SegmentLive>,
    /// Bytes of needed records.
    pub bytes: u64,
    /// Pages that kept points need, each page of each stretch once: live data and retained changes.
    pub pages: u64,
    /// Pages that the newest epoch's state needs, of records of any epoch.
    pub head_pages: u64,
    /// Blocks whose record lives on for few of its pages, widest waste first: the sender would best send them whole.
    pub refresh: Vec<(u64, u64)>,
    /// Needed records that were collected: nothing if all collectors kept to the rules.
    pub gone: Vec<Gone>,
}

/// A record of an epoch: its segment's place, its ordinal in that index, whether it was collected, and its metadata.
type Item = (u32, u32, bool, RecordMeta);

/// Finds what the epochs at the indexes `kept` (ascending, into [`History::epochs`]) need; the newest epoch is always kept. Holds up
/// to `cache_bytes` of indexes at hand, or one, and reads those of some epochs ahead.
///
/// # Errors
/// [`EpochError`]: an index can't be read, or is not what the epoch's close signs.
pub async fn find(store: &Store, history: &History, kept: &[usize], cache_bytes: u64) -> Result<Live, EpochError> {
    let mut live = Live::default();
    let Some(newest) = history.epochs.len().checked_sub(1) else { return Ok(live) };
    let mut bounds: Vec<usize> = kept.iter().copied().filter(|&at| at < newest).collect();
    bounds.push(newest);
    bounds.sort_unstable();
    bounds.dedup();
    let cache = Arc::new(IndexCache { bytes_max: cache_bytes, held: Mutex::default() });
    let mut end = newest + 1;
    // Newest stretch first, and in each the newest epoch first.
    while let Some(bound) = bounds.pop() {
        let start = bounds.last().map_or(0, |before| before + 1);
        debug_assert!(bound + 1 == end, "stretches join");
        let mut covered = Covered::default();
        let mut loaded = futures::stream::iter((start..end).rev())
            .map(|at| {
                let cache = Arc::clone(&cache);
                async move { Ok::<_, EpochError>((at, items(store, history, &history.epochs[at], &cache).await?)) }
            })
            .buffered(EPOCHS_AHEAD);
        while let Some(epoch) = loaded.next().await {
            let (at, items) = epoch?;
            for (place, ordinal, collected, meta) in items {
                let fresh = covered.take(&meta);
                let segment = live.segments.entry(place).or_default();
                if !collected {
                    segment.present_bytes += u64::from(meta.record_len);
                }
                if fresh.pages == 0 {
                    continue;
                }
                if collected {
                    let path = history.segments[place as usize].path.clone();
                    live.gone.push(Gone { path, epoch: at, meta });
                    continue;
                }
                segment.mark(ordinal as usize, meta.record_len.into());
                live.bytes += u64::from(meta.record_len);
                live.pages += fresh.pages;
                if bound == newest {
                    live.head_pages += fresh.pages;
                    let data = meta.data_mask.count();
                    if data >= WIDE_PAGES && fresh.pages <= u64::from(data / NARROW_SHARE) {
                        live.refresh.push((meta.block.0, u64::from(meta.record_len)));
                    }
                }
            }
        }
        end = start;
    }
    live.refresh.sort_unstable_by_key(|(block, waste)| (std::cmp::Reverse(*waste), *block));
    Ok(live)
}

/// What a record adds.
struct Fresh {
    pages: u64,
}

/// Pages that newer records of the stretch have set.
#[derive(Default)]
struct Covered {
    ranges: HashMap<u64, Box<[PageMask]>>,
}

impl Covered {
    fn take(&mut self, meta: &RecordMeta) -> Fresh {
        let mut pages = 0;
        for block in meta.block.0..meta.block.0.saturating_add(meta.block_count.into()) {
            let range = self
                .ranges
                .entry(block / RANGE_BLOCKS)
                .or_insert_with(|| vec![PageMask::EMPTY; RANGE_BLOCKS as usize].into_boxed_slice());
            let covered = &mut range[(block % RANGE_BLOCKS) as usize];
            pages += u64::from(meta.pages().without(*covered).count());
            *covered = covered.or(meta.pages());
        }
        Fresh { pages }
    }
}

/// Indexes read a short while ago.
struct IndexCache {
    bytes_max: u64,
    held: Mutex<Vec<(u32, Arc<SegmentIndex>, u64)>>,
}

impl IndexCache {
    async fn read(&self, store: &Store, history: &History, place: u32) -> Result<Arc<SegmentIndex>, EpochError> {
        {
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(found) = held.iter().position(|(at, ..)| *at == place) {
                let found = held.remove(found);
                let index = Arc::clone(&found.1);
                held.push(found);
                return Ok(index);
            }
        }
        let reference = &history.segments[place as usize];
        let index = Arc::new(segment::read_index(store, reference).await?);
        let bytes = reference.size - reference.index_offset;
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.push((place, Arc::clone(&index), bytes));
        let mut total: u64 = held.iter().map(|(.., bytes)| bytes).sum();
        // Oldest use first; the one just read stays however large it is.
        while total > self.bytes_max && held.len() > 1 {
            total -= held.remove(0).2;
        }
        Ok(index)
    }
}

/// An epoch's records in block order, proven by its close.
async fn items(
    store: &Store,
    history: &History,
    epoch: &HistoryEpoch,
    cache: &IndexCache,
) -> Result<Vec<Item>, EpochError> {
    let statement = epoch.close.statement();
    let mut items: Vec<Item> = Vec::with_capacity(statement.records as usize);
    for &place in &epoch.segments {
        let index = cache.read(store, history, place).await?;
        let mut ordinal = 0_u32;
        for group in &index.groups {
            if (group.volume, group.incarnation, group.epoch)
                == (statement.volume, statement.incarnation, statement.epoch)
            {
                let entries = (ordinal..).zip(&group.entries);
                items.extend(entries.map(|(ordinal, entry)| (place, ordinal, entry.is_collected(), entry.meta)));
            }
            ordinal += group.entries.len() as u32;
        }
    }
    items.sort_unstable_by_key(|(.., meta)| meta.block);
    prove(statement, items.iter().map(|(.., meta)| meta)).map_err(|found| not_proven(history, epoch, found))?;
    Ok(items)
}
