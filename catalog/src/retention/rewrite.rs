//! Segments made anew from what is still needed of older ones.
//!
//! The new segment holds the needed records verbatim, each checked against its metadata on the way, and the metadata of all
//! records, so that the root of every epoch can still be recomputed. Memory: the needed records of one new segment.

#![allow(clippy::cast_possible_truncation, reason = "lengths are bounded by the decoders and by the group's bounds")]

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use common::format::log::{Replacement, SegmentRef};
use common::format::record::{Record, RecordMeta};
use common::format::segment::{PREAMBLE_BYTES, SegmentEntry, SegmentGroup, SegmentIndex, preamble_of};
use common::ids::{Digest, Epoch, Incarnation, VolumeId};
use common::limits;

use super::CollectError;
use super::live::SegmentLive;
use crate::store::Store;
use crate::volume::history::History;
use crate::volume::{paths, segment};

/// Bytes of payload for each record that a new segment describes, so that its index is a small part of it.
const RECORD_SHARE: u64 = 512;
/// Records, needed or not, that one new segment describes: 6.5 MiB of index.
const RECORDS_MAX: u64 = 65_536;
/// Segments that go into one.
const OLD_MAX: usize = 256;
/// A segment is rewritten where less than this share of its records' bytes is needed, in percent.
const NEEDED_PERCENT_MIN: u64 = 60;
/// Segments of like size are joined once there are so many: few joins for each byte in its life, few objects in the store.
const JOIN_AT: usize = 16;
/// Bytes between two records that are fetched along.
const GAP_BYTES_MAX: u64 = 64 << 10;
/// Largest range read at once.
const RANGE_BYTES_MAX: u64 = 4 << 20;

/// Segments that are to become one: places in the history, ascending.
pub(super) type Group = Vec<u32>;

/// Which segments are worth rewriting, and together with which, up to `payload_max` needed bytes in one. PURE.
#[must_use]
pub(super) fn groups(history: &History, live: &HashMap<u32, SegmentLive>, payload_max: u64) -> Vec<Group> {
    let mut places: Vec<u32> = live.keys().copied().collect();
    places.sort_unstable();
    let mut sparse = Vec::new();
    let mut tiers: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for place in places {
        let (reference, live) = (&history.segments[place as usize], &live[&place]);
        if live.bytes * 100 < live.present_bytes * NEEDED_PERCENT_MIN {
            sparse.push(place);
        } else if reference.size < limits::SEGMENT_BYTES_DEFAULT / 8 {
            tiers.entry(reference.size.max(1).ilog2() / 4).or_default().push(place);
        }
    }
    let mut found = pack(history, live, payload_max, &sparse);
    for members in tiers.into_values().filter(|members| members.len() >= JOIN_AT) {
        // One alone gains nothing by being copied.
        found.extend(pack(history, live, payload_max, &members).into_iter().filter(|group| group.len() >= JOIN_AT));
    }
    found
}

fn pack(history: &History, live: &HashMap<u32, SegmentLive>, payload_max: u64, places: &[u32]) -> Vec<Group> {
    let (mut found, mut open, mut bytes, mut records) = (Vec::new(), Group::new(), 0, 0);
    for &place in places {
        let (more_bytes, more_records) = (live[&place].bytes, u64::from(history.segments[place as usize].records));
        let full =
            bytes + more_bytes > payload_max || records + more_records > RECORDS_MAX.min(payload_max / RECORD_SHARE);
        if !open.is_empty() && (full || open.len() == OLD_MAX) {
            found.push(std::mem::take(&mut open));
            (bytes, records) = (0, 0);
        }
        open.push(place);
        (bytes, records) = (bytes + more_bytes, records + more_records);
    }
    if !open.is_empty() {
        found.push(open);
    }
    found
}

#[derive(Default)]
struct Gathered {
    collected: Vec<RecordMeta>,
    kept: Vec<(Record, RecordMeta)>,
}

/// Writes the segment that stands for those of `group`; `None` where one of them holds records of another volume too, which
/// this volume's log can't speak for.
///
/// # Errors
/// [`CollectError`]; an object that may have been written is named by nobody.
pub(super) async fn rewrite(
    store: &Store,
    volume: VolumeId,
    history: &History,
    live: &HashMap<u32, SegmentLive>,
    group: &Group,
) -> Result<Option<Replacement>, CollectError> {
    let mut epochs: BTreeMap<(Epoch, Incarnation), Gathered> = BTreeMap::new();
    let mut old = Vec::with_capacity(group.len());
    for &place in group {
        let reference = &history.segments[place as usize];
        let index = segment::read_index(store, reference).await?;
        if index.groups.iter().any(|group| group.volume != volume) {
            return Ok(None);
        }
        let needed = live.get(&place);
        let mut wanted: Vec<(Epoch, Incarnation, SegmentEntry)> = Vec::new();
        let mut ordinal = 0;
        for group in &index.groups {
            for entry in &group.entries {
                if needed.is_some_and(|needed| needed.is_live(ordinal)) {
                    wanted.push((group.epoch, group.incarnation, *entry));
                } else {
                    epochs.entry((group.epoch, group.incarnation)).or_default().collected.push(entry.meta);
                }
                ordinal += 1;
            }
        }
        read_records(store, reference, &wanted, &mut epochs).await?;
        old.push(reference.path.clone());
    }
    let mut parts = vec![Bytes::new()];
    let (mut index, mut offset, mut records) = (SegmentIndex::default(), PREAMBLE_BYTES as u64, 0);
    for ((epoch, incarnation), gathered) in epochs {
        let mut entries: Vec<SegmentEntry> =
            gathered.collected.into_iter().map(|meta| SegmentEntry { offset: 0, meta }).collect();
        for (record, meta) in gathered.kept {
            entries.push(SegmentEntry { offset, meta });
            offset += u64::from(meta.record_len);
            parts.push(record.into_bytes());
        }
        records += entries.len() as u32;
        index.groups.push(SegmentGroup { volume, incarnation, epoch, entries });
    }
    parts[0] = Bytes::copy_from_slice(&preamble_of(index.version()));
    parts.push(index.encode(offset).into());
    let mut hasher = blake3::Hasher::new();
    for part in &parts {
        hasher.update(part);
    }
    let name = ulid::Ulid::from_bytes(common::rng::random()?).to_string();
    let new = SegmentRef {
        path: paths::segment(volume, &name),
        size: parts.iter().map(|part| part.len() as u64).sum(),
        digest: Digest(*hasher.finalize().as_bytes()),
        index_offset: offset,
        records,
    };
    store.put_segment(&new.path, parts).await?;
    Ok(Some(Replacement { new, old }))
}

/// Reads the wanted records of one segment, neighbours together.
async fn read_records(
    store: &Store,
    reference: &SegmentRef,
    wanted: &[(Epoch, Incarnation, SegmentEntry)],
    epochs: &mut BTreeMap<(Epoch, Incarnation), Gathered>,
) -> Result<(), CollectError> {
    let mut rest = wanted;
    while let Some((.., first)) = rest.first() {
        let mut end = first.offset + u64::from(first.meta.record_len);
        let mut count = 1;
        for (.., next) in &rest[1..] {
            let next_end = next.offset + u64::from(next.meta.record_len);
            if next.offset > end + GAP_BYTES_MAX || next_end - first.offset > RANGE_BYTES_MAX {
                break;
            }
            (end, count) = (next_end, count + 1);
        }
        let bytes = store.get_range(&reference.path, first.offset..end).await?;
        for (epoch, incarnation, entry) in &rest[..count] {
            let start = (entry.offset - first.offset) as usize;
            // Copied, so that what lies between needed records is not held until all is written.
            let record = Bytes::copy_from_slice(&bytes[start..start + entry.meta.record_len as usize]);
            let damaged = |what| CollectError::Damaged { path: reference.path.clone(), offset: entry.offset, what };
            let record = Record::parse(record).map_err(|error| damaged(error.to_string()))?;
            let header = record.header();
            if (header.epoch, header.incarnation) != (*epoch, *incarnation) || !entry.meta.describes(&record) {
                return Err(damaged("it is not the record that the index describes".into()));
            }
            epochs.entry((*epoch, *incarnation)).or_default().kept.push((record, entry.meta));
        }
        rest = &rest[count..];
    }
    Ok(())
}
