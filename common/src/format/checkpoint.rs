//! The checkpoint: what a log says up to one entry, so that opening a volume reads O(live blocks), not O(history).
//!
//! ```text
//! 0     n  head, in an envelope with magic "BFCHKPT\0"
//! n     m  index pages, one after the other, as the head's page table says
//! ```
//!
//! Head body: volume 16, sequence 8, digest of that entry 32, generation 8, nonce 16, written 8, record bytes since the newest
//! point 8, head close block (empty where nothing is committed); point count 4, per point 100 bytes: close id 32, incarnation 4, epoch 8, cut time 8, consistency 1,
//! reserved 3, disk bytes 8, new bytes 8, committed 8, group point 16, reserved 4; segment count 4, per segment as in a
//! log entry; epoch count 4, per epoch 80 bytes: epoch 8, incarnation 4, key id 4, salt 32, close id 32; index kind 1
//! (0 left out, 1 paged), reserved 3; page count 4, per page 64 bytes: first block 8, checkpoint that holds the page 8 (in
//! this version this one), offset from the head's end 8, length 4, CRC-32C 4, digest 32; countersignature count 4 (zero in
//! this version).
//!
//! A page covers [`PAGE_BLOCKS`] blocks from its first on and holds entries of 140 bytes: first block 8, block count 4, epoch's
//! index 4, segment's index 4, offset in the segment 8, live pages 8, reserved 8, metadata 96. Entries ascend by block, then by falling
//! epoch; those of one block have disjoint live pages.

use super::FormatError;
use super::close::{Close, Consistency};
use super::envelope::Kind;
use super::log::SegmentRef;
use super::record::RecordMeta;
use super::wire::{Reader, Writer};
use crate::clock::UnixMillis;
use crate::ids::{
    BlockIndex, CloseId, Digest, Epoch, Generation, GroupId, Incarnation, KeyId, LogSeq, Nonce, PageMask, Salt,
    VolumeId,
};
use crate::limits;

/// Envelope of a checkpoint's head.
pub const KIND: Kind = Kind { what: "checkpoint", magic: *b"BFCHKPT\0", version: 1, body_bytes_max: 64 << 20 };
/// Blocks that one page covers: 1 GiB of disk.
pub const PAGE_BLOCKS: u64 = limits::MERKLE_RANGE_BLOCKS;
/// Most points listed.
pub const POINTS_MAX: usize = 262_144;
/// Most segments with live records.
pub const SEGMENTS_MAX: usize = 131_072;
/// Most epochs with live records.
pub const EPOCHS_MAX: usize = 131_072;
/// Most entries of one page: a record for each page of each block.
pub const PAGE_ENTRIES_MAX: u64 = PAGE_BLOCKS * limits::PAGES_PER_BLOCK as u64;
/// Most pages of an index.
pub const PAGES_MAX: usize = 1 << 18;
const POINT_BYTES: usize = 100;
const EPOCH_BYTES: usize = 80;
const PAGE_REF_BYTES: usize = 64;
/// Bytes of one entry of a page.
pub const ENTRY_BYTES: usize = 140;

const _: () = assert!(POINTS_MAX * POINT_BYTES + EPOCHS_MAX * EPOCH_BYTES < 48 << 20);

/// A recovery point, in short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PointSummary {
    /// The close that asserts it, and its name.
    pub id: CloseId,
    /// Incarnation of the disk.
    pub incarnation: Incarnation,
    /// Epoch.
    pub epoch: Epoch,
    /// When the cut was made, by the sender's clock.
    pub cut_time: UnixMillis,
    /// What it asserts.
    pub consistency: Consistency,
    /// Exact size of the disk in bytes.
    pub disk_bytes: u64,
    /// Bytes of records since the point before.
    pub new_bytes: u64,
    /// When its log entry was written, by the receiver's clock.
    pub committed: UnixMillis,
    /// Point that the disks of a group share, nil for none.
    pub group_point: GroupId,
}

/// What is needed of an epoch to open its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochRef {
    /// Epoch.
    pub epoch: Epoch,
    /// Incarnation.
    pub incarnation: Incarnation,
    /// Data key.
    pub key_id: KeyId,
    /// Salt of the epoch's key.
    pub salt: Salt,
    /// Its close.
    pub close: CloseId,
}

/// Where an index page lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRef {
    /// First block that it covers, a multiple of [`PAGE_BLOCKS`].
    pub first_block: BlockIndex,
    /// Offset from the end of the head.
    pub offset: u64,
    /// Length in bytes.
    pub length: u32,
    /// CRC-32C of the page.
    pub crc: u32,
    /// BLAKE3 of the page.
    pub digest: Digest,
}

/// One live record, or a run of blocks of a live range record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveEntry {
    /// First block meant, inside the page.
    pub block: BlockIndex,
    /// Blocks meant from there on, all inside the page and the record.
    pub block_count: u32,
    /// Index into the head's epochs.
    pub epoch: u32,
    /// Index into the head's segments.
    pub segment: u32,
    /// Offset of the record in the segment.
    pub offset: u64,
    /// Pages of each of these blocks for which this record is the newest.
    pub live: PageMask,
    /// The record's metadata.
    pub meta: RecordMeta,
}

/// A checkpoint's head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointHead {
    /// Volume.
    pub volume: VolumeId,
    /// The log entry up to which it summarises.
    pub at: LogSeq,
    /// BLAKE3 of that entry.
    pub entry_digest: Digest,
    /// Generation of that entry.
    pub generation: Generation,
    /// Makes its bytes unique.
    pub nonce: Nonce,
    /// When it was written.
    pub written: UnixMillis,
    /// Bytes of records committed since the newest point.
    pub unpointed_bytes: u64,
    /// Newest committed close.
    pub head: Option<Close>,
    /// All recovery points, oldest first.
    pub points: Vec<PointSummary>,
    /// Segments that hold live records.
    pub segments: Vec<SegmentRef>,
    /// Epochs that have live records, ascending.
    pub epochs: Vec<EpochRef>,
    /// Index pages, ascending; `None` where the index was left out, for it would have been too large.
    pub pages: Option<Vec<PageRef>>,
}

impl CheckpointHead {
    /// The encoded head.
    ///
    /// # Errors
    /// [`FormatError::OverLimit`] where a table is longer than its bound.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let pages = self.pages.as_deref().unwrap_or_default();
        for (what, found, limit) in [
            ("checkpoint points", self.points.len(), POINTS_MAX),
            ("checkpoint segments", self.segments.len(), SEGMENTS_MAX),
            ("checkpoint epochs", self.epochs.len(), EPOCHS_MAX),
            ("checkpoint pages", pages.len(), PAGES_MAX),
        ] {
            within(what, found as u64, limit as u64)?;
        }
        let mut body = Writer::with_capacity(1024 + self.points.len() * POINT_BYTES + self.segments.len() * 160);
        body.raw(&self.volume.0)
            .u64(self.at.0)
            .raw(&self.entry_digest.0)
            .u64(self.generation.0)
            .raw(&self.nonce.0)
            .i64(self.written.0)
            .u64(self.unpointed_bytes)
            .block(self.head.as_ref().map_or(&[], |close| close.bytes()));
        body.count(self.points.len());
        for point in &self.points {
            body.raw(&point.id.0)
                .u32(point.incarnation.0)
                .u64(point.epoch.0)
                .i64(point.cut_time.0)
                .u8(match point.consistency {
                    Consistency::Fuzzy => 1,
                    Consistency::Crash => 2,
                    Consistency::Filesystem => 3,
                    Consistency::Application => 4,
                })
                .raw(&[0; 3])
                .u64(point.disk_bytes)
                .u64(point.new_bytes)
                .i64(point.committed.0)
                .raw(&point.group_point.0)
                .u32(0);
        }
        body.count(self.segments.len());
        for segment in &self.segments {
            segment.encode(&mut body);
        }
        body.count(self.epochs.len());
        for epoch in &self.epochs {
            body.u64(epoch.epoch.0).u32(epoch.incarnation.0).u32(epoch.key_id.0).raw(&epoch.salt.0).raw(&epoch.close.0);
        }
        body.u8(u8::from(self.pages.is_some())).raw(&[0; 3]).count(pages.len());
        for page in pages {
            body.u64(page.first_block.0)
                .u64(self.at.0)
                .u64(page.offset)
                .u32(page.length)
                .u32(page.crc)
                .raw(&page.digest.0);
        }
        body.u32(0);
        within("checkpoint head bytes", body.as_slice().len() as u64, KIND.body_bytes_max as u64)?;
        Ok(KIND.seal(body.as_slice()))
    }

    /// Parses a head at the front of `bytes`; returns it and its encoded length, behind which the pages start.
    ///
    /// # Errors
    /// Any [`FormatError`].
    pub fn decode_prefix(bytes: &[u8]) -> Result<(Self, usize), FormatError> {
        let (body, rest) = KIND.open_prefix(bytes)?;
        let head_len = bytes.len() - rest.len();
        let mut reader = Reader::new("checkpoint", body);
        let mut head = Self {
            volume: VolumeId(reader.array()?),
            at: LogSeq(reader.u64()?),
            entry_digest: Digest(reader.array()?),
            generation: Generation(reader.u64()?),
            nonce: Nonce(reader.array()?),
            written: UnixMillis(reader.i64()?),
            unpointed_bytes: reader.u64()?,
            head: match reader.block("close", limits::CLOSE_BYTES_MAX + super::envelope::OVERHEAD_BYTES)? {
                [] => None,
                close => Some(Close::decode(close)?),
            },
            points: Vec::new(),
            segments: Vec::new(),
            epochs: Vec::new(),
            pages: None,
        };
        let points = reader.count("checkpoint points", POINTS_MAX, POINT_BYTES)?;
        head.points.reserve_exact(points);
        for _ in 0..points {
            head.points.push(decode_point(&mut reader)?);
        }
        let segments = reader.count("checkpoint segments", SEGMENTS_MAX, 4 + 8 + 32 + 8 + 4)?;
        for _ in 0..segments {
            head.segments.push(SegmentRef::decode(&mut reader)?);
        }
        let epochs = reader.count("checkpoint epochs", EPOCHS_MAX, EPOCH_BYTES)?;
        for _ in 0..epochs {
            let epoch = EpochRef {
                epoch: Epoch(reader.u64()?),
                incarnation: Incarnation(reader.u32()?),
                key_id: KeyId(reader.u32()?),
                salt: Salt(reader.array()?),
                close: CloseId(reader.array()?),
            };
            if head.epochs.last().is_some_and(|last| last.epoch >= epoch.epoch) {
                return Err(FormatError::Invalid { what: "checkpoint epoch order", found: epoch.epoch.0 });
            }
            head.epochs.push(epoch);
        }
        let kind = reader.u8()?;
        zero("checkpoint index reserved", reader.take(3)?)?;
        let count = reader.count("checkpoint pages", PAGES_MAX, PAGE_REF_BYTES)?;
        head.pages = match (kind, count) {
            (0, 0) => None,
            (1, count) => Some(decode_page_refs(&mut reader, count, head.at)?),
            (other, _) => return Err(FormatError::Invalid { what: "checkpoint index kind", found: other.into() }),
        };
        let countersignatures = reader.u32()?;
        if countersignatures != 0 {
            return Err(FormatError::Invalid { what: "checkpoint countersignatures", found: countersignatures.into() });
        }
        reader.finish()?;
        Ok((head, head_len))
    }

    /// Parses a whole checkpoint and all its pages, checking each; keeps only the head.
    ///
    /// # Errors
    /// Any [`FormatError`].
    pub fn check_whole(bytes: &[u8]) -> Result<Self, FormatError> {
        let (head, head_len) = Self::decode_prefix(bytes)?;
        let mut rest = &bytes[head_len..];
        for page in head.pages.as_deref().unwrap_or_default() {
            let (bytes, tail) = rest.split_at_checked(page.length as usize).ok_or(FormatError::Truncated {
                what: "checkpoint page",
                needed: page.length.into(),
                found: rest.len() as u64,
            })?;
            head.decode_page(page, bytes)?;
            rest = tail;
        }
        if !rest.is_empty() {
            return Err(FormatError::TrailingBytes { what: "checkpoint", extra: rest.len() as u64 });
        }
        Ok(head)
    }

    /// Parses one of this head's pages.
    ///
    /// # Errors
    /// Any [`FormatError`]; also where entries are out of order, overlap or point beyond the head's tables.
    pub fn decode_page(&self, page: &PageRef, bytes: &[u8]) -> Result<Vec<LiveEntry>, FormatError> {
        let what = "checkpoint page";
        if bytes.len() as u64 != u64::from(page.length) {
            return Err(FormatError::Truncated { what, needed: page.length.into(), found: bytes.len() as u64 });
        }
        if crc32c::crc32c(bytes) != page.crc || blake3::hash(bytes).as_bytes() != &page.digest.0 {
            return Err(FormatError::Checksum { what });
        }
        let mut reader = Reader::new(what, bytes);
        let mut entries: Vec<LiveEntry> = Vec::with_capacity(bytes.len() / ENTRY_BYTES);
        let page_end = page.first_block.0.saturating_add(PAGE_BLOCKS);
        while reader.remaining() > 0 {
            let entry = LiveEntry {
                block: BlockIndex(reader.u64()?),
                block_count: reader.u32()?,
                epoch: reader.u32()?,
                segment: reader.u32()?,
                offset: reader.u64()?,
                live: PageMask(reader.u64()?),
                meta: {
                    zero("checkpoint entry reserved", reader.take(8)?)?;
                    RecordMeta::decode(&mut reader)?
                },
            };
            let end = entry.block.0.saturating_add(entry.block_count.into());
            let record_end = entry.meta.block.0 + u64::from(entry.meta.block_count);
            let bad = if entry.block < page.first_block || end > page_end || entry.block_count == 0 {
                Some("checkpoint entry block")
            } else if entry.block < entry.meta.block || end > record_end {
                Some("checkpoint entry outside its record")
            } else if entry.live.is_empty() || !entry.live.without(entry.meta.pages()).is_empty() {
                Some("checkpoint entry live pages")
            } else if entry.epoch as usize >= self.epochs.len() || entry.segment as usize >= self.segments.len() {
                Some("checkpoint entry table index")
            } else if entries.last().is_some_and(|last| {
                (last.block, std::cmp::Reverse(last.epoch)) >= (entry.block, std::cmp::Reverse(entry.epoch))
            }) {
                Some("checkpoint entry order")
            } else {
                None
            };
            if let Some(what) = bad {
                return Err(FormatError::Invalid { what, found: entry.block.0 });
            }
            entries.push(entry);
        }
        Ok(entries)
    }
}

/// Encodes a page's entries, in order.
#[must_use]
pub fn encode_page(entries: &[LiveEntry]) -> Vec<u8> {
    let mut writer = Writer::with_capacity(entries.len() * ENTRY_BYTES);
    for entry in entries {
        writer
            .u64(entry.block.0)
            .u32(entry.block_count)
            .u32(entry.epoch)
            .u32(entry.segment)
            .u64(entry.offset)
            .u64(entry.live.0)
            .u64(0);
        entry.meta.encode(&mut writer);
    }
    writer.into_vec()
}

/// Replaces the table indexes in an encoded page: epoch `i` becomes `epochs[i]`, segment `i` `segments[i]`. Both maps must be
/// ascending over the indexes that occur, so that order is kept.
///
/// # Panics
/// If the page holds an index beyond a map: a bug of the caller, who encoded the page.
pub fn renumber_page(page: &mut [u8], epochs: &[u32], segments: &[u32]) {
    for entry in page.chunks_exact_mut(ENTRY_BYTES) {
        for (at, map) in [(12, epochs), (16, segments)] {
            let mut index = [0; 4];
            index.copy_from_slice(&entry[at..at + 4]);
            entry[at..at + 4].copy_from_slice(&map[u32::from_le_bytes(index) as usize].to_le_bytes());
        }
    }
}

/// The reference to an encoded page that will lie `offset` bytes behind the head.
#[must_use]
pub fn page_ref(first_block: BlockIndex, offset: u64, page: &[u8]) -> PageRef {
    PageRef {
        first_block,
        offset,
        length: u32::try_from(page.len()).unwrap_or(u32::MAX),
        crc: crc32c::crc32c(page),
        digest: Digest(*blake3::hash(page).as_bytes()),
    }
}

fn decode_point(reader: &mut Reader<'_>) -> Result<PointSummary, FormatError> {
    let point = PointSummary {
        id: CloseId(reader.array()?),
        incarnation: Incarnation(reader.u32()?),
        epoch: Epoch(reader.u64()?),
        cut_time: UnixMillis(reader.i64()?),
        consistency: match reader.u8()? {
            1 => Consistency::Fuzzy,
            2 => Consistency::Crash,
            3 => Consistency::Filesystem,
            4 => Consistency::Application,
            other => return Err(FormatError::Invalid { what: "point consistency", found: other.into() }),
        },
        disk_bytes: {
            zero("point reserved", reader.take(3)?)?;
            reader.u64()?
        },
        new_bytes: reader.u64()?,
        committed: UnixMillis(reader.i64()?),
        group_point: GroupId(reader.array()?),
    };
    zero("point reserved", reader.take(4)?)?;
    Ok(point)
}

fn decode_page_refs(reader: &mut Reader<'_>, count: usize, at: LogSeq) -> Result<Vec<PageRef>, FormatError> {
    let mut pages: Vec<PageRef> = Vec::with_capacity(count);
    let mut end = 0_u64;
    for _ in 0..count {
        let first_block = BlockIndex(reader.u64()?);
        let holder = reader.u64()?;
        if holder != at.0 {
            return Err(FormatError::Invalid { what: "checkpoint page holder", found: holder });
        }
        let page = PageRef {
            first_block,
            offset: reader.u64()?,
            length: reader.u32()?,
            crc: reader.u32()?,
            digest: Digest(reader.array()?),
        };
        within("checkpoint page bytes", page.length.into(), PAGE_ENTRIES_MAX * ENTRY_BYTES as u64)?;
        let ordered = pages.last().is_none_or(|last| last.first_block < page.first_block);
        if !ordered || !page.first_block.0.is_multiple_of(PAGE_BLOCKS) || page.offset != end {
            return Err(FormatError::Invalid { what: "checkpoint page place", found: page.first_block.0 });
        }
        end += u64::from(page.length);
        pages.push(page);
    }
    Ok(pages)
}

fn within(what: &'static str, found: u64, limit: u64) -> Result<(), FormatError> {
    if found <= limit { Ok(()) } else { Err(FormatError::OverLimit { what, found, limit }) }
}

fn zero(what: &'static str, bytes: &[u8]) -> Result<(), FormatError> {
    match bytes.iter().find(|byte| **byte != 0) {
        None => Ok(()),
        Some(&found) => Err(FormatError::Invalid { what, found: found.into() }),
    }
}

#[cfg(test)]
mod tests;
