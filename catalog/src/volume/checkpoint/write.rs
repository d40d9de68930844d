//! Making a checkpoint: the previous one's index and the entries since, merged page by page.
//!
//! Memory: records since the previous checkpoint are looked at in as many passes over their segments' indexes as
//! [`CheckpointBounds::merge_bytes_max`] asks for, and the finished index is held up to
//! [`CheckpointBounds::index_bytes_max`]; one that would be larger is left out, which costs later readers time, not content.

#![allow(clippy::cast_possible_truncation, reason = "tables have at most 2^17 rows")]

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use common::clock::Clock;
use common::format::checkpoint::{CheckpointHead, EpochRef, LiveEntry, PAGE_BLOCKS, PageRef};
use common::format::checkpoint::{encode_page, page_ref, renumber_page};
use common::format::close::Close;
use common::format::log::SegmentRef;
use common::ids::{BlockIndex, Geometry, LogSeq, Nonce};
use common::limits;

use super::merge::{Candidate, merge_page};
use super::{CheckpointError, VolumeView, read_head};
use crate::store::{PutOutcome, Store};
use crate::volume::history::History;
use crate::volume::log::{LogPosition, LogReader};
use crate::volume::{paths, segment};

/// How much memory making a checkpoint may take.
#[derive(Debug, Clone, Copy)]
pub struct CheckpointBounds {
    /// Largest index in bytes; 140 for each live record.
    pub index_bytes_max: u64,
    /// Most bytes of records' metadata held while merging (never less than those of 1 GiB of disk).
    pub merge_bytes_max: u64,
}

impl Default for CheckpointBounds {
    fn default() -> Self {
        Self { index_bytes_max: 32 << 20, merge_bytes_max: 16 << 20 }
    }
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointWritten {
    /// Up to which entry.
    pub at: LogSeq,
    /// Size of the object in bytes.
    pub bytes: u64,
    /// False where the index was left out, for it would have been too large.
    pub indexed: bool,
    /// Whether this call made it, or it was there already.
    pub outcome: PutOutcome,
}

/// Writes the checkpoint of the log up to `view`'s position, create-if-absent. On success `view` says that it is there.
///
/// # Errors
/// [`CheckpointError`]; nothing is written then, and the volume is as readable as before.
pub async fn write_checkpoint(
    store: &Store,
    view: &mut VolumeView,
    clock: &Clock,
    bounds: CheckpointBounds,
) -> Result<CheckpointWritten, CheckpointError> {
    let (volume, at) = (view.header.volume, view.position.seq);
    let mut head = CheckpointHead {
        volume,
        at,
        entry_digest: view.position.digest,
        generation: view.position.generation,
        nonce: Nonce(common::rng::random()?),
        written: clock.now(),
        unpointed_bytes: view.unpointed_bytes,
        head: view.position.head.clone(),
        points: view.points.clone(),
        segments: Vec::new(),
        epochs: Vec::new(),
        pages: None,
    };
    let mut parts = vec![Bytes::new()];
    if let Some(index) = build_index(store, view, bounds).await? {
        let mut offset = 0;
        let mut pages: Vec<PageRef> = Vec::with_capacity(index.pages.len());
        for (first_block, page) in index.pages {
            pages.push(page_ref(first_block, offset, &page));
            offset += page.len() as u64;
            parts.push(page.into());
        }
        (head.epochs, head.segments, head.pages) = (index.epochs, index.segments, Some(pages));
    }
    let indexed = head.pages.is_some();
    parts[0] = head.encode().map_err(|source| CheckpointError::TooLarge { volume, at, source })?.into();
    let body: Vec<u8> = parts.concat();
    let bytes = body.len() as u64;
    let outcome = store.put_if_absent(&paths::checkpoint(volume, at), body.into()).await?;
    (view.checkpoint_at, view.entries_since_checkpoint) = (at, 0);
    Ok(CheckpointWritten { at, bytes, indexed, outcome })
}

struct Index {
    epochs: Vec<EpochRef>,
    segments: Vec<SegmentRef>,
    pages: Vec<(BlockIndex, Vec<u8>)>,
}

/// An epoch whose records are to be merged.
struct NewEpoch {
    epoch: u32,
    segments: Vec<u32>,
}

async fn build_index(
    store: &Store,
    view: &VolumeView,
    bounds: CheckpointBounds,
) -> Result<Option<Index>, CheckpointError> {
    let Some(close) = &view.position.head else {
        return Ok(Some(Index { epochs: Vec::new(), segments: Vec::new(), pages: Vec::new() }));
    };
    let statement = close.statement();
    let volume = view.header.volume;
    let geometry = Geometry::new(statement.disk_bytes).expect("a decoded close has a disk size within limits");
    let previous = match view.checkpoint_at {
        LogSeq(0) => None,
        at => Some(read_head(store, &view.header, at).await?),
    };
    // Where a collector rewrote segments since, the previous index names places that are not there any more.
    let previous = match previous {
        Some((head, head_len)) if !rewritten_since(store, view, position_of(&head)).await? => Some((head, head_len)),
        _ => None,
    };
    let (mut epochs, mut segments, old_pages, from, pages_at) = match previous {
        None => (Vec::new(), Vec::new(), Vec::new(), None, 0),
        Some((head, head_len)) => {
            let Some(pages) = head.pages.clone() else { return Ok(None) };
            let from = position_of(&head);
            let old = pages.into_iter().map(|page| (page.first_block, page)).collect();
            (head.epochs.clone(), head.segments.clone(), old, Some(from), head_len)
        }
    };
    let old_tables = OldTables { epochs: epochs.clone(), segments: segments.clone() };
    let new = match from {
        Some(from) => read_new_epochs(store, view, from, &mut epochs, &mut segments).await?,
        None => all_epochs(store, view, &mut epochs, &mut segments).await?,
    };
    let old_pages: HashMap<BlockIndex, PageRef> = old_pages.into_iter().collect();
    let mut pages: Vec<(BlockIndex, Vec<u8>)> = Vec::new();
    let (mut held, mut start) = (0_u64, 0_u64);
    let end = geometry.blocks().div_ceil(PAGE_BLOCKS);
    while start < end {
        let (mut candidates, stop) =
            gather(store, view, &epochs, &segments, &new, start..end, bounds.merge_bytes_max).await?;
        for page in start..stop {
            let first_block = BlockIndex(page * PAGE_BLOCKS);
            let newer = candidates.remove(&page).unwrap_or_default();
            let older = match old_pages.get(&first_block) {
                None => Vec::new(),
                Some(page) => old_tables.read_page(store, view, page, pages_at).await?,
            };
            let live = merge_page(geometry, first_block, newer, &older);
            if live.is_empty() {
                continue;
            }
            let encoded = encode_page(&live);
            held += encoded.len() as u64;
            if held > bounds.index_bytes_max {
                tracing::info!(%volume, at = view.position.seq.0, held, "checkpoint without index: it would be too large");
                return Ok(None);
            }
            pages.push((first_block, encoded));
        }
        start = stop;
    }
    Ok(Some(compact(epochs, segments, pages)))
}

/// The tables that an older checkpoint's pages refer to; the new tables start with the same rows.
struct OldTables {
    epochs: Vec<EpochRef>,
    segments: Vec<SegmentRef>,
}

impl OldTables {
    async fn read_page(
        &self,
        store: &Store,
        view: &VolumeView,
        page: &PageRef,
        pages_at: u64,
    ) -> Result<Vec<LiveEntry>, CheckpointError> {
        let path = paths::checkpoint(view.header.volume, view.checkpoint_at);
        let start = pages_at + page.offset;
        let bytes = store.get_range(&path, start..start + u64::from(page.length)).await?;
        let tables = CheckpointHead {
            volume: view.header.volume,
            at: view.checkpoint_at,
            entry_digest: Default::default(),
            generation: Default::default(),
            nonce: Default::default(),
            written: Default::default(),
            unpointed_bytes: 0,
            head: None,
            points: Vec::new(),
            segments: self.segments.clone(),
            epochs: self.epochs.clone(),
            pages: None,
        };
        tables.decode_page(page, &bytes).map_err(|source| CheckpointError::Damaged { path, source })
    }
}

fn position_of(head: &CheckpointHead) -> LogPosition {
    LogPosition { seq: head.at, digest: head.entry_digest, generation: head.generation, head: head.head.clone() }
}

/// True where an entry after `from` says that segments were rewritten.
async fn rewritten_since(store: &Store, view: &VolumeView, from: LogPosition) -> Result<bool, CheckpointError> {
    let mut reader = LogReader::open(store, &view.header, from).await?;
    while reader.position().seq < view.position.seq
        && let Some(read) = reader.next().await?
    {
        if read.entry.maintenance.is_some_and(|stated| !stated.replaced.is_empty()) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// All epochs up to the view's position, and where their records lie now.
async fn all_epochs(
    store: &Store,
    view: &VolumeView,
    epochs: &mut Vec<EpochRef>,
    segments: &mut Vec<SegmentRef>,
) -> Result<Vec<NewEpoch>, CheckpointError> {
    let history = History::read_up_to(store, &view.header, view.position.seq).await?;
    let mut new = Vec::new();
    for epoch in &history.epochs {
        new.push(NewEpoch { epoch: epochs.len() as u32, segments: epoch.segments.clone() });
        epochs.push(epoch_ref(&epoch.close));
    }
    *segments = history.segments;
    Ok(new)
}

fn epoch_ref(close: &Close) -> EpochRef {
    let statement = close.statement();
    EpochRef {
        epoch: statement.epoch,
        incarnation: statement.incarnation,
        key_id: statement.key_id,
        salt: statement.salt,
        close: close.id(),
    }
}

/// Reads the entries after `from`, appends their epochs and segments to the tables. A page's newest record may be of any
/// incarnation: what did not change when the disk grew is not sent again.
async fn read_new_epochs(
    store: &Store,
    view: &VolumeView,
    from: LogPosition,
    epochs: &mut Vec<EpochRef>,
    segments: &mut Vec<SegmentRef>,
) -> Result<Vec<NewEpoch>, CheckpointError> {
    let mut reader = LogReader::open(store, &view.header, from).await?;
    let mut new = Vec::new();
    while reader.position().seq < view.position.seq
        && let Some(read) = reader.next().await?
    {
        let first = segments.len() as u32;
        segments.extend(read.entry.segments);
        for committed in read.entry.epochs {
            new.push(NewEpoch {
                epoch: epochs.len() as u32,
                segments: committed.segments.iter().map(|index| first + index).collect(),
            });
            epochs.push(epoch_ref(&committed.close));
        }
    }
    Ok(new)
}

/// Candidates by page from `pages.start` on, and the page behind the last one that is complete: where they take more than
/// `bytes_max`, pages at the end are left for the next pass.
async fn gather(
    store: &Store,
    view: &VolumeView,
    epochs: &[EpochRef],
    segments: &[SegmentRef],
    new: &[NewEpoch],
    pages: std::ops::Range<u64>,
    bytes_max: u64,
) -> Result<(BTreeMap<u64, Vec<Candidate>>, u64), CheckpointError> {
    let mut found: BTreeMap<u64, Vec<Candidate>> = BTreeMap::new();
    let (mut stop, mut held) = (pages.end, 0_u64);
    for epoch in new {
        let EpochRef { epoch: number, incarnation, .. } = epochs[epoch.epoch as usize];
        for &place in &epoch.segments {
            let index = segment::read_index(store, &segments[place as usize]).await?;
            for entry in segment::epoch_entries(&index, view.header.volume, incarnation, number) {
                let candidate =
                    Candidate { epoch: epoch.epoch, segment: place, offset: entry.offset, meta: entry.meta };
                let last = entry.meta.block.0 + u64::from(entry.meta.block_count) - 1;
                for page in (entry.meta.block.0 / PAGE_BLOCKS).max(pages.start)..=last / PAGE_BLOCKS {
                    if page < stop {
                        found.entry(page).or_default().push(candidate);
                        held += size_of::<Candidate>() as u64;
                    }
                }
            }
            while held > bytes_max
                && found.len() > 1
                && let Some((page, dropped)) = found.pop_last()
            {
                held -= (dropped.len() * size_of::<Candidate>()) as u64;
                stop = page;
            }
        }
    }
    Ok((found, stop))
}

/// Drops the table rows that no page refers to.
fn compact(epochs: Vec<EpochRef>, segments: Vec<SegmentRef>, mut pages: Vec<(BlockIndex, Vec<u8>)>) -> Index {
    let (mut epochs_used, mut segments_used) = (vec![false; epochs.len()], vec![false; segments.len()]);
    let index_at = |entry: &[u8], at: usize| {
        let mut index = [0; 4];
        index.copy_from_slice(&entry[at..at + 4]);
        u32::from_le_bytes(index) as usize
    };
    for (_, page) in &pages {
        for entry in page.chunks_exact(common::format::checkpoint::ENTRY_BYTES) {
            epochs_used[index_at(entry, 12)] = true;
            segments_used[index_at(entry, 16)] = true;
        }
    }
    let numbers = |used: &[bool]| -> Vec<u32> {
        used.iter()
            .scan(0, |next, &used| {
                let number = *next;
                *next += u32::from(used);
                Some(number)
            })
            .collect()
    };
    let (epoch_numbers, segment_numbers) = (numbers(&epochs_used), numbers(&segments_used));
    for (_, page) in &mut pages {
        renumber_page(page, &epoch_numbers, &segment_numbers);
    }
    fn keep<T>(rows: Vec<T>, used: &[bool]) -> Vec<T> {
        rows.into_iter().zip(used).filter_map(|(row, &used)| used.then_some(row)).collect()
    }
    Index { epochs: keep(epochs, &epochs_used), segments: keep(segments, &segments_used), pages }
}

const _: () = assert!(size_of::<Candidate>() < 2 * limits::RECORD_META_BYTES);
