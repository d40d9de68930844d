//! The segment: an immutable cloud object of records verbatim, their index, and a footer that finds the index.
//!
//! ```text
//! 0            16  magic "BFSEGMT\0", version 2, reserved 6
//! 16           n   records verbatim, one after the other
//! index_offset m   index: group count 4; per group: volume 16, incarnation 4, epoch 8, record count 4;
//!                  per record of it: offset 8, metadata 96; in version 2 offset 0 says that the record was collected:
//!                  its metadata is kept to prove its epoch, its bytes are not here. Such records come first in a group
//! size - 48    48  footer: index offset 8, index length 4, CRC-32C of the index 4, record count 4, reserved 8, version 2,
//!                  reserved 2, CRC-32C of the 32 bytes before 4, reserved 4, magic "BFSEGEND"
//! ```

use super::FormatError;
use super::record::RecordMeta;
use super::wire::{Reader, Writer};
use crate::ids::{Epoch, Incarnation, VolumeId};
use crate::limits;

const WHAT: &str = "segment";
/// First eight bytes.
pub const MAGIC: [u8; 8] = *b"BFSEGMT\0";
const END_MAGIC: [u8; 8] = *b"BFSEGEND";
/// Version written where every record is here.
pub const VERSION: u16 = 1;
/// Version written where some records were collected; the newest that is read.
pub const VERSION_COLLECTED: u16 = 2;
/// Bytes before the first record.
pub const PREAMBLE_BYTES: usize = 16;
/// Bytes after the index.
pub const FOOTER_BYTES: usize = 48;
const GROUP_BYTES: usize = 32;
const ENTRY_BYTES: usize = 8 + limits::RECORD_META_BYTES;
/// Largest index a decoder accepts.
pub const INDEX_BYTES_MAX: usize = 64 << 20;
/// Largest segment a decoder accepts: the largest asked for, one epoch's last record over it, and the index.
pub const SEGMENT_BYTES_DECODE_MAX: u64 =
    limits::SEGMENT_BYTES_MAX + limits::RECORD_BYTES_MAX as u64 + INDEX_BYTES_MAX as u64;

/// The bytes before the first record of a segment with all its records.
#[must_use]
pub fn preamble() -> [u8; PREAMBLE_BYTES] {
    preamble_of(VERSION)
}

/// The bytes before the first record of a segment of this version.
#[must_use]
pub fn preamble_of(version: u16) -> [u8; PREAMBLE_BYTES] {
    let mut bytes = [0; PREAMBLE_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&version.to_le_bytes());
    bytes
}

/// Checks the bytes before the first record, and gives the segment's version.
///
/// # Errors
/// [`FormatError::WrongMagic`], [`FormatError::UnknownVersion`], [`FormatError::Truncated`], [`FormatError::Invalid`].
pub fn check_preamble(bytes: &[u8]) -> Result<u16, FormatError> {
    let mut reader = Reader::new(WHAT, bytes);
    if reader.array::<8>()? != MAGIC {
        return Err(FormatError::WrongMagic { what: WHAT });
    }
    let version = reader.u16()?;
    if version == 0 || version > VERSION_COLLECTED {
        return Err(FormatError::UnknownVersion { what: WHAT, found: version, known: VERSION_COLLECTED });
    }
    if reader.array::<6>()? != [0; 6] {
        return Err(FormatError::Invalid { what: "segment preamble", found: 1 });
    }
    Ok(version)
}

/// One record's place in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentEntry {
    /// Offset of the record from the start of the object; 0 for one that was collected.
    pub offset: u64,
    /// The record's metadata, its length included.
    pub meta: RecordMeta,
}

impl SegmentEntry {
    /// True where only the metadata is left: no retained recovery point needs the record.
    #[must_use]
    pub fn is_collected(&self) -> bool {
        self.offset == 0
    }
}

/// The records of one epoch in a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentGroup {
    /// Volume.
    pub volume: VolumeId,
    /// Incarnation.
    pub incarnation: Incarnation,
    /// Epoch.
    pub epoch: Epoch,
    /// Records, in the order they lie.
    pub entries: Vec<SegmentEntry>,
}

/// A segment's index.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SegmentIndex {
    /// Groups, in the order their records lie.
    pub groups: Vec<SegmentGroup>,
}

impl SegmentIndex {
    /// The version of a segment with this index.
    #[must_use]
    pub fn version(&self) -> u16 {
        let collected = self.groups.iter().flat_map(|group| &group.entries).any(SegmentEntry::is_collected);
        if collected { VERSION_COLLECTED } else { VERSION }
    }

    /// Index and footer, to be written after the records; `index_offset` is where the index starts.
    #[must_use]
    pub fn encode(&self, index_offset: u64) -> Vec<u8> {
        let records: usize = self.groups.iter().map(|group| group.entries.len()).sum();
        let capacity = 4 + self.groups.len() * GROUP_BYTES + records * ENTRY_BYTES + FOOTER_BYTES;
        let mut index = Writer::with_capacity(capacity);
        index.count(self.groups.len());
        for group in &self.groups {
            index.raw(&group.volume.0).u32(group.incarnation.0).u64(group.epoch.0).count(group.entries.len());
            for entry in &group.entries {
                index.u64(entry.offset);
                entry.meta.encode(&mut index);
            }
        }
        let mut bytes = index.into_vec();
        let footer = Footer {
            index_offset,
            index_len: bytes.len() as u32,
            index_crc: crc32c::crc32c(&bytes),
            records: records as u32,
            version: self.version(),
        };
        bytes.extend_from_slice(&footer.encode());
        bytes
    }

    /// Parses an index that its footer describes.
    ///
    /// # Errors
    /// Any [`FormatError`]; also where entries overlap the index or each other, so that an index can't name bytes twice.
    pub fn decode(bytes: &[u8], footer: &Footer) -> Result<Self, FormatError> {
        if bytes.len() as u64 != u64::from(footer.index_len) {
            return Err(FormatError::Truncated {
                what: "segment index",
                needed: footer.index_len.into(),
                found: bytes.len() as u64,
            });
        }
        if crc32c::crc32c(bytes) != footer.index_crc {
            return Err(FormatError::Checksum { what: "segment index" });
        }
        let mut reader = Reader::new("segment index", bytes);
        let group_count = reader.count("segment groups", limits::SEGMENT_RECORDS_MAX, GROUP_BYTES)?;
        let mut groups = Vec::with_capacity(group_count);
        let (mut end, mut total) = (PREAMBLE_BYTES as u64, 0_usize);
        for _ in 0..group_count {
            let (volume, incarnation, epoch) =
                (VolumeId(reader.array()?), Incarnation(reader.u32()?), Epoch(reader.u64()?));
            let count = reader.count("segment records", limits::SEGMENT_RECORDS_MAX, ENTRY_BYTES)?;
            let mut entries: Vec<SegmentEntry> = Vec::with_capacity(count);
            for _ in 0..count {
                let offset = reader.u64()?;
                let meta = RecordMeta::decode(&mut reader)?;
                // Collected ones come first in their group, so that the others are sorted by their offsets.
                if offset == 0
                    && footer.version == VERSION_COLLECTED
                    && entries.last().is_none_or(SegmentEntry::is_collected)
                {
                    entries.push(SegmentEntry { offset, meta });
                    continue;
                }
                if offset < end || offset.saturating_add(meta.record_len.into()) > footer.index_offset {
                    return Err(FormatError::Invalid { what: "segment record offset", found: offset });
                }
                end = offset + u64::from(meta.record_len);
                entries.push(SegmentEntry { offset, meta });
            }
            total += count;
            groups.push(SegmentGroup { volume, incarnation, epoch, entries });
        }
        reader.finish()?;
        if total as u64 != u64::from(footer.records) {
            return Err(FormatError::Invalid { what: "segment record count", found: total as u64 });
        }
        Ok(Self { groups })
    }

    /// Parses a whole segment's preamble, footer and index; the records are left to the caller.
    ///
    /// # Errors
    /// Any [`FormatError`].
    pub fn decode_segment(bytes: &[u8]) -> Result<Self, FormatError> {
        let version = check_preamble(bytes)?;
        let footer = Footer::decode_tail(bytes, bytes.len() as u64)?;
        if version != footer.version {
            return Err(FormatError::Invalid { what: "version at a segment's end", found: footer.version.into() });
        }
        let start = usize::try_from(footer.index_offset).unwrap_or(usize::MAX);
        let index = bytes.get(start..bytes.len() - FOOTER_BYTES).ok_or(FormatError::Truncated {
            what: WHAT,
            needed: footer.index_offset,
            found: bytes.len() as u64,
        })?;
        Self::decode(index, &footer)
    }
}

/// The last bytes of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    /// Where the index starts.
    pub index_offset: u64,
    /// Length of the index.
    pub index_len: u32,
    /// CRC-32C of the index.
    pub index_crc: u32,
    /// Records in the segment, collected ones included.
    pub records: u32,
    /// [`VERSION`], or [`VERSION_COLLECTED`].
    pub version: u16,
}

impl Footer {
    fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::with_capacity(FOOTER_BYTES);
        writer
            .u64(self.index_offset)
            .u32(self.index_len)
            .u32(self.index_crc)
            .u32(self.records)
            .u64(0)
            .u16(self.version)
            .u16(0);
        let crc = crc32c::crc32c(writer.as_slice());
        writer.u32(crc).u32(0).raw(&END_MAGIC);
        writer.into_vec()
    }

    /// Parses the footer at the end of `tail`, the last bytes of an object of `size` bytes.
    ///
    /// # Errors
    /// Any [`FormatError`]; also where the lengths do not add up to `size`.
    pub fn decode_tail(tail: &[u8], size: u64) -> Result<Self, FormatError> {
        let what = "segment footer";
        let start = tail.len().checked_sub(FOOTER_BYTES).ok_or(FormatError::Truncated {
            what,
            needed: FOOTER_BYTES as u64,
            found: tail.len() as u64,
        })?;
        let bytes = &tail[start..];
        let mut reader = Reader::new(what, bytes);
        let mut footer = Self {
            index_offset: reader.u64()?,
            index_len: reader.u32()?,
            index_crc: reader.u32()?,
            records: reader.u32()?,
            version: VERSION,
        };
        let (reserved, version, reserved_too) = (reader.u64()?, reader.u16()?, reader.u16()?);
        footer.version = version;
        let (crc, reserved_last) = (reader.u32()?, reader.u32()?);
        if reader.array::<8>()? != END_MAGIC {
            return Err(FormatError::WrongMagic { what });
        }
        if version == 0 || version > VERSION_COLLECTED {
            return Err(FormatError::UnknownVersion { what, found: version, known: VERSION_COLLECTED });
        }
        if crc != crc32c::crc32c(&bytes[..32]) || reserved_last != 0 {
            return Err(FormatError::Checksum { what });
        }
        if reserved != 0 || reserved_too != 0 {
            return Err(FormatError::Invalid { what, found: reserved });
        }
        if footer.index_len as usize > INDEX_BYTES_MAX {
            return Err(FormatError::OverLimit {
                what: "segment index length",
                found: footer.index_len.into(),
                limit: INDEX_BYTES_MAX as u64,
            });
        }
        let whole = footer.index_offset.checked_add(u64::from(footer.index_len) + FOOTER_BYTES as u64);
        if whole != Some(size) || footer.index_offset < PREAMBLE_BYTES as u64 {
            return Err(FormatError::Truncated { what: WHAT, needed: whole.unwrap_or(u64::MAX), found: size });
        }
        Ok(footer)
    }
}
