//! Packs records verbatim into segments, with index, footer and digest. Pure.

use bytes::Bytes;
use common::format::record::{Record, RecordMeta};
use common::format::segment::{self, SegmentEntry, SegmentGroup, SegmentIndex};
use common::ids::Digest;
use common::limits;

/// What a record costs beside its bytes: its entry in the index, and bookkeeping until the segment is stored.
const ENTRY_BYTES: u64 = 8 + limits::RECORD_META_BYTES as u64 + 96;
/// What a segment costs before its first record: preamble, footer and the index's first group.
const FIXED_BYTES: u64 = 256;
/// What another epoch in it costs.
const GROUP_BYTES: u64 = 64;

/// Memory for a segment of so many records and bytes of them, of so many epochs.
#[must_use]
pub fn segment_cost(epochs: u64, records: u64, record_bytes: u64) -> u64 {
    FIXED_BYTES
        .saturating_add(epochs.saturating_mul(GROUP_BYTES))
        .saturating_add(records.saturating_mul(ENTRY_BYTES))
        .saturating_add(record_bytes)
}

/// A finished segment.
#[derive(Debug)]
pub struct Segment {
    /// Its bytes, in order.
    pub parts: Vec<Bytes>,
    /// Their number.
    pub size: u64,
    /// BLAKE3 of them.
    pub digest: Digest,
    /// Where the index starts.
    pub index_offset: u64,
    /// Records in it.
    pub records: u32,
}

/// Builds one segment.
///
/// Promises: records lie in it verbatim, in the order pushed; its cost ([`segment_cost`]) stays within the bound given, but
/// for a single record that is larger alone. Copies no record.
#[derive(Debug)]
pub struct Bundler {
    cost_max: u64,
    cost: u64,
    parts: Vec<Bytes>,
    hasher: blake3::Hasher,
    offset: u64,
    index: SegmentIndex,
    records: u32,
}

impl Bundler {
    /// An empty segment that may cost `cost_max` bytes.
    #[must_use]
    pub fn new(cost_max: u64) -> Self {
        let preamble = segment::preamble();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&preamble);
        Self {
            cost_max,
            cost: FIXED_BYTES,
            parts: vec![Bytes::copy_from_slice(&preamble)],
            hasher,
            offset: preamble.len() as u64,
            index: SegmentIndex::default(),
            records: 0,
        }
    }

    /// Bytes of records that may be read for it at once.
    #[must_use]
    pub fn room(&self) -> u64 {
        self.cost_max.saturating_sub(self.cost)
    }

    /// True where `record` may be pushed: it fits, or is the first.
    #[must_use]
    pub fn fits(&self, record: &Record) -> bool {
        self.records == 0
            || self.cost + GROUP_BYTES + ENTRY_BYTES + record.bytes().len() as u64 <= self.cost_max
                && (self.records as usize) < limits::SEGMENT_RECORDS_MAX
    }

    /// Appends a record.
    pub fn push(&mut self, record: Record, meta: RecordMeta) {
        let header = *record.header();
        let same = |group: &SegmentGroup| {
            (group.volume, group.incarnation, group.epoch) == (header.volume, header.incarnation, header.epoch)
        };
        if !self.index.groups.last().is_some_and(same) {
            self.cost += GROUP_BYTES;
            self.index.groups.push(SegmentGroup {
                volume: header.volume,
                incarnation: header.incarnation,
                epoch: header.epoch,
                entries: Vec::new(),
            });
        }
        if let Some(group) = self.index.groups.last_mut() {
            group.entries.push(SegmentEntry { offset: self.offset, meta });
        }
        let bytes = record.into_bytes();
        self.hasher.update(&bytes);
        self.offset += bytes.len() as u64;
        self.cost += ENTRY_BYTES + bytes.len() as u64;
        self.records += 1;
        self.parts.push(bytes);
    }

    /// Ends the segment; nothing where no record was pushed.
    #[must_use]
    pub fn finish(mut self) -> Option<Segment> {
        if self.records == 0 {
            return None;
        }
        let tail = self.index.encode(self.offset);
        self.hasher.update(&tail);
        let size = self.offset + tail.len() as u64;
        self.parts.push(tail.into());
        Some(Segment {
            parts: self.parts,
            size,
            digest: Digest(*self.hasher.finalize().as_bytes()),
            index_offset: self.offset,
            records: self.records,
        })
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "records are small")]
mod tests {
    use common::format::record::{Codec, RecordHeader, RecordKind};
    use common::ids::{BlockIndex, Epoch, Incarnation, KeyId, PageMask, VolumeId};

    use super::*;

    fn record(epoch: u64, block: u64, pages: u32) -> Record {
        let plain_len = pages * limits::PAGE_BYTES as u32;
        let header = RecordHeader {
            kind: RecordKind::Delta,
            codec: Codec::Raw,
            volume: VolumeId([1; 16]),
            incarnation: Incarnation(1),
            key_id: KeyId(1),
            epoch: Epoch(epoch),
            block: BlockIndex(block),
            data_mask: PageMask::first(pages),
            zero_mask: PageMask::EMPTY,
            block_count: 1,
            plain_len,
            sealed_len: plain_len + limits::SEAL_TAG_BYTES as u32,
            dictionary_id: 0,
            counter: block,
        };
        let mut buffer = vec![u8::try_from(block % 251).expect("small"); header.record_len()];
        buffer[..limits::RECORD_HEADER_BYTES].fill(0);
        Record::assemble(header, buffer)
    }

    #[test]
    fn records_lie_verbatim_where_the_index_says_and_the_digest_is_that_of_the_object() {
        let mut bundler = Bundler::new(1 << 20);
        let records: Vec<_> = [(3, 9), (3, 11), (4, 2)].map(|(epoch, block)| record(epoch, block, 2)).into();
        for record in &records {
            assert!(bundler.fits(record));
            bundler.push(record.clone(), record.meta());
        }
        let segment = bundler.finish().expect("records were pushed");
        let bytes = segment.parts.concat();
        assert_eq!(bytes.len() as u64, segment.size);
        assert_eq!(blake3::hash(&bytes).as_bytes(), &segment.digest.0);
        let index = SegmentIndex::decode_segment(&bytes).expect("a valid segment");
        assert_eq!(index.groups.iter().map(|group| group.epoch.0).collect::<Vec<_>>(), [3, 4]);
        let entries: Vec<_> = index.groups.iter().flat_map(|group| &group.entries).collect();
        assert_eq!(entries.len(), records.len());
        for (entry, record) in entries.iter().zip(&records) {
            let start = usize::try_from(entry.offset).expect("small");
            assert_eq!(&bytes[start..start + record.bytes().len()], &record.bytes()[..]);
            assert_eq!(entry.meta, record.meta());
        }
    }

    #[test]
    fn a_segment_stays_within_its_cost_but_takes_one_record_of_any_size() {
        let small = record(1, 1, 1);
        let large = record(1, 2, 64);
        let mut bundler = Bundler::new(segment_cost(1, 2, 2 * small.bytes().len() as u64));
        assert!(bundler.fits(&large), "the first always fits");
        bundler.push(small.clone(), small.meta());
        assert!(!bundler.fits(&large));
        bundler.push(record(1, 3, 1), record(1, 3, 1).meta());
        assert!(!bundler.fits(&record(1, 4, 1)));
        assert_eq!(bundler.room(), 0);
        assert!(Bundler::new(100).finish().is_none());
    }
}
