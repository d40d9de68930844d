//! The delta record: what is sealed once on the sender and copied verbatim ever after, and its metadata.
//!
//! ```text
//! 0    4  magic "BFRD"              56  8  data mask
//! 4    2  version, 1                64  8  zero mask
//! 6    2  header length, 104        72  4  block count (range records; else 1)
//! 8    1  kind: 1 delta, 2 zero     76  4  plain length: bytes of the data pages
//!         range, 3 reference        80  4  sealed length: ciphertext and tag
//! 9    1  codec: 0 raw, 1 zstd      84  4  dictionary id, 0 = none
//! 10   1  cipher: 1 AES-256-GCM     88  8  counter: the nonce within the epoch
//! 11   1  reserved, zero            96  4  reserved, zero
//! 12   2  critical flags            100 4  CRC-32C of bytes 0 to 99 and the sealed bytes
//! 14   2  ignorable flags           104 n  sealed bytes; the last 16 are the tag
//! 16   16 volume
//! 32   4  incarnation
//! 36   4  key id
//! 40   8  epoch
//! 48   8  block (range: the first)
//! ```
//!
//! Bytes 0 to 99 are the seal's associated data, so a record can't be moved to another place, epoch or volume.

use bytes::Bytes;

use super::FormatError;
use super::wire::{Reader, Writer};
use crate::ids::{BlockIndex, Digest, Epoch, Geometry, Incarnation, KeyId, PageMask, SealTag, VolumeId};
use crate::limits;

/// First bytes of a record.
pub const MAGIC: [u8; 4] = *b"BFRD";
/// Version written and read.
pub const VERSION: u16 = 1;
/// Bytes that are the seal's associated data.
pub const AAD_BYTES: usize = limits::RECORD_HEADER_BYTES - 4;
const CIPHER_AES_256_GCM: u8 = 1;
const WHAT: &str = "record";

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RecordKind {
    /// Pages of one block: those of the data mask are sealed, those of the zero mask are zero.
    Delta,
    /// All pages of `block_count` whole blocks are zero.
    ZeroRange,
}

/// How the data pages were encoded before sealing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    /// As they are.
    Raw,
    /// One zstd frame.
    Zstd,
}

/// The fixed part of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    /// What it says.
    pub kind: RecordKind,
    /// Encoding of the data pages.
    pub codec: Codec,
    /// Volume written.
    pub volume: VolumeId,
    /// Incarnation of the volume.
    pub incarnation: Incarnation,
    /// Data key that the epoch key is derived from.
    pub key_id: KeyId,
    /// Epoch that the record belongs to.
    pub epoch: Epoch,
    /// Block, or first block of a range.
    pub block: BlockIndex,
    /// Pages with content.
    pub data_mask: PageMask,
    /// Pages that are zero. Disjoint from `data_mask`.
    pub zero_mask: PageMask,
    /// Blocks covered: 1 for a delta.
    pub block_count: u32,
    /// Bytes of the data pages: 4,096 for each.
    pub plain_len: u32,
    /// Ciphertext and tag.
    pub sealed_len: u32,
    /// zstd dictionary, 0 = none.
    pub dictionary_id: u32,
    /// Nonce within the epoch.
    pub counter: u64,
}

impl RecordHeader {
    /// The associated data: the header without its checksum.
    #[must_use]
    pub fn aad(&self) -> [u8; AAD_BYTES] {
        let mut writer = Writer::with_capacity(AAD_BYTES);
        writer
            .raw(&MAGIC)
            .u16(VERSION)
            .u16(limits::RECORD_HEADER_BYTES as u16)
            .u8(match self.kind {
                RecordKind::Delta => 1,
                RecordKind::ZeroRange => 2,
            })
            .u8(match self.codec {
                Codec::Raw => 0,
                Codec::Zstd => 1,
            })
            .u8(CIPHER_AES_256_GCM)
            .u8(0)
            .u16(0)
            .u16(0)
            .raw(&self.volume.0)
            .u32(self.incarnation.0)
            .u32(self.key_id.0)
            .u64(self.epoch.0)
            .u64(self.block.0)
            .u64(self.data_mask.0)
            .u64(self.zero_mask.0)
            .u32(self.block_count)
            .u32(self.plain_len)
            .u32(self.sealed_len)
            .u32(self.dictionary_id)
            .u64(self.counter)
            .u32(0);
        let mut aad = [0; AAD_BYTES];
        aad.copy_from_slice(writer.as_slice());
        aad
    }

    /// Parses and checks the header of a record; the checksum is [`Record::parse`]'s to check.
    ///
    /// # Errors
    /// Any [`FormatError`] but [`FormatError::Checksum`].
    pub fn decode(bytes: &[u8]) -> Result<(Self, u32), FormatError> {
        let mut reader = Reader::new(WHAT, bytes);
        if reader.array::<4>()? != MAGIC {
            return Err(FormatError::WrongMagic { what: WHAT });
        }
        let version = reader.u16()?;
        if version != VERSION {
            return Err(FormatError::UnknownVersion { what: WHAT, found: version, known: VERSION });
        }
        expect("record header length", u64::from(reader.u16()?), limits::RECORD_HEADER_BYTES as u64)?;
        let kind = match reader.u8()? {
            1 => RecordKind::Delta,
            2 => RecordKind::ZeroRange,
            other => return Err(FormatError::Invalid { what: "record kind", found: other.into() }),
        };
        let codec = match reader.u8()? {
            0 => Codec::Raw,
            1 => Codec::Zstd,
            other => return Err(FormatError::Invalid { what: "record codec", found: other.into() }),
        };
        expect("record cipher", reader.u8()?.into(), CIPHER_AES_256_GCM.into())?;
        expect("record reserved byte", reader.u8()?.into(), 0)?;
        let critical = reader.u16()?;
        if critical != 0 {
            return Err(FormatError::UnknownFlags { what: WHAT, found: critical });
        }
        expect("record ignorable flags", reader.u16()?.into(), 0)?;
        let header = Self {
            kind,
            codec,
            volume: VolumeId(reader.array()?),
            incarnation: Incarnation(reader.u32()?),
            key_id: KeyId(reader.u32()?),
            epoch: Epoch(reader.u64()?),
            block: BlockIndex(reader.u64()?),
            data_mask: PageMask(reader.u64()?),
            zero_mask: PageMask(reader.u64()?),
            block_count: reader.u32()?,
            plain_len: reader.u32()?,
            sealed_len: reader.u32()?,
            dictionary_id: reader.u32()?,
            counter: reader.u64()?,
        };
        expect("record reserved word", reader.u32()?.into(), 0)?;
        let crc = reader.u32()?;
        header.check()?;
        Ok((header, crc))
    }

    fn check(&self) -> Result<(), FormatError> {
        const BLOCKS_MAX: u64 = limits::DISK_BYTES_MAX / limits::BLOCK_BYTES as u64;
        let invalid = |what, found| Err(FormatError::Invalid { what, found });
        if self.block.0 >= BLOCKS_MAX || self.block.0 + u64::from(self.block_count) > BLOCKS_MAX {
            return Err(FormatError::OverLimit { what: "record block", found: self.block.0, limit: BLOCKS_MAX });
        }
        if self.dictionary_id != 0 {
            return invalid("record dictionary id", self.dictionary_id.into());
        }
        if self.plain_len as usize != self.data_mask.count() as usize * limits::PAGE_BYTES {
            return invalid("record plain length", self.plain_len.into());
        }
        let tag = limits::SEAL_TAG_BYTES as u64;
        let sealed = u64::from(self.sealed_len);
        let plain = u64::from(self.plain_len);
        let sealed_fits = match self.codec {
            Codec::Raw => sealed == plain + tag,
            Codec::Zstd => sealed > tag && sealed < plain + tag,
        };
        if !sealed_fits {
            return invalid("record sealed length", sealed);
        }
        match self.kind {
            RecordKind::Delta => {
                if self.block_count != 1 {
                    return invalid("delta record block count", self.block_count.into());
                }
                if !self.data_mask.and(self.zero_mask).is_empty() || self.data_mask.or(self.zero_mask).is_empty() {
                    return invalid("delta record masks", self.data_mask.and(self.zero_mask).0);
                }
            }
            RecordKind::ZeroRange => {
                if self.block_count == 0 || self.block_count > limits::RANGE_BLOCKS_MAX {
                    return invalid("range record block count", self.block_count.into());
                }
                if !self.data_mask.is_empty() || self.zero_mask != PageMask::FULL {
                    return invalid("range record masks", self.data_mask.0);
                }
            }
        }
        Ok(())
    }

    /// Pages that the record sets in each block it covers.
    #[must_use]
    pub fn pages(&self) -> PageMask {
        self.data_mask.or(self.zero_mask)
    }

    /// True where every page that the record sets exists on a disk of this geometry.
    #[must_use]
    pub fn fits(&self, geometry: Geometry) -> bool {
        let last = BlockIndex(self.block.0 + u64::from(self.block_count.max(1)) - 1);
        self.pages().without(geometry.pages_of(last)).is_empty()
    }

    /// Length of the whole record.
    #[must_use]
    pub fn record_len(&self) -> usize {
        limits::RECORD_HEADER_BYTES + self.sealed_len as usize
    }
}

fn expect(what: &'static str, found: u64, expected: u64) -> Result<(), FormatError> {
    if found == expected { Ok(()) } else { Err(FormatError::Invalid { what, found }) }
}

/// A whole record: its bytes verbatim, and the header parsed out of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    header: RecordHeader,
    bytes: Bytes,
}

impl Record {
    /// Puts a header's checksum over sealed bytes that stand at `104..` of `buffer`, and the header before them.
    ///
    /// # Panics
    /// If the buffer's length is not the header's record length: a bug of the sealer.
    #[must_use]
    pub fn assemble(header: RecordHeader, mut buffer: Vec<u8>) -> Self {
        assert_eq!(buffer.len(), header.record_len(), "the sealer fills the buffer exactly");
        buffer[..AAD_BYTES].copy_from_slice(&header.aad());
        let crc = checksum(&buffer);
        buffer[AAD_BYTES..limits::RECORD_HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
        Self { header, bytes: buffer.into() }
    }

    /// Checks that `bytes` are exactly one record: bounds, lengths and checksum. Takes no copy.
    ///
    /// # Errors
    /// Any [`FormatError`].
    pub fn parse(bytes: Bytes) -> Result<Self, FormatError> {
        let header = Self::check(&bytes)?;
        Ok(Self { header, bytes })
    }

    /// As [`Self::parse`], for borrowed bytes: the header.
    ///
    /// # Errors
    /// Any [`FormatError`].
    pub fn check(bytes: &[u8]) -> Result<RecordHeader, FormatError> {
        let (header, crc) = RecordHeader::decode(bytes)?;
        let (needed, found) = (header.record_len() as u64, bytes.len() as u64);
        if found < needed {
            return Err(FormatError::Truncated { what: WHAT, needed, found });
        }
        if found > needed {
            return Err(FormatError::TrailingBytes { what: WHAT, extra: found - needed });
        }
        if crc != checksum(bytes) {
            return Err(FormatError::Checksum { what: WHAT });
        }
        Ok(header)
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &RecordHeader {
        &self.header
    }

    /// The record verbatim.
    #[must_use]
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The record verbatim, by value.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        self.bytes
    }

    /// Its metadata: hashes the bytes once.
    #[must_use]
    pub fn meta(&self) -> RecordMeta {
        RecordMeta::of(&self.header, &self.bytes)
    }
}

/// CRC-32C of a record's bytes without the four that hold it.
fn checksum(record: &[u8]) -> u32 {
    let head = crc32c::crc32c(&record[..AAD_BYTES]);
    crc32c::crc32c_append(head, &record[limits::RECORD_HEADER_BYTES..])
}

/// What a close's Merkle root covers of a record, and all that need be known of it to plan a restore.
///
/// 96 bytes: kind 1, codec 1, reserved 2, block count 4, block 8, data mask 8, zero mask 8, counter 8, record length 4,
/// reserved 4, tag 16, digest 32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordMeta {
    /// What the record says.
    pub kind: RecordKind,
    /// Encoding of the data pages.
    pub codec: Codec,
    /// Blocks covered.
    pub block_count: u32,
    /// Block, or first block of a range.
    pub block: BlockIndex,
    /// Pages with content.
    pub data_mask: PageMask,
    /// Pages that are zero.
    pub zero_mask: PageMask,
    /// Nonce within the epoch.
    pub counter: u64,
    /// Length of the whole record.
    pub record_len: u32,
    /// The seal's tag.
    pub tag: SealTag,
    /// BLAKE3 of the record verbatim, header and checksum included.
    pub digest: Digest,
}

impl RecordMeta {
    /// Metadata of a record with this header and these bytes.
    #[must_use]
    pub fn of(header: &RecordHeader, bytes: &[u8]) -> Self {
        let mut tag = [0; limits::SEAL_TAG_BYTES];
        tag.copy_from_slice(&bytes[bytes.len() - limits::SEAL_TAG_BYTES..]);
        Self {
            kind: header.kind,
            codec: header.codec,
            block_count: header.block_count,
            block: header.block,
            data_mask: header.data_mask,
            zero_mask: header.zero_mask,
            counter: header.counter,
            record_len: bytes.len() as u32,
            tag: SealTag(tag),
            digest: Digest(*blake3::hash(bytes).as_bytes()),
        }
    }

    /// True where `record` is the one that this metadata describes.
    #[must_use]
    pub fn describes(&self, record: &Record) -> bool {
        record.meta() == *self
    }

    /// Pages that the record sets in each block it covers.
    #[must_use]
    pub fn pages(&self) -> PageMask {
        self.data_mask.or(self.zero_mask)
    }

    /// Appends the 96 bytes.
    pub fn encode(&self, writer: &mut Writer) {
        writer
            .u8(match self.kind {
                RecordKind::Delta => 1,
                RecordKind::ZeroRange => 2,
            })
            .u8(match self.codec {
                Codec::Raw => 0,
                Codec::Zstd => 1,
            })
            .u16(0)
            .u32(self.block_count)
            .u64(self.block.0)
            .u64(self.data_mask.0)
            .u64(self.zero_mask.0)
            .u64(self.counter)
            .u32(self.record_len)
            .u32(0)
            .raw(&self.tag.0)
            .raw(&self.digest.0);
    }

    /// Takes 96 bytes.
    ///
    /// # Errors
    /// [`FormatError::Truncated`], [`FormatError::Invalid`], [`FormatError::OverLimit`].
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let kind = match reader.u8()? {
            1 => RecordKind::Delta,
            2 => RecordKind::ZeroRange,
            other => return Err(FormatError::Invalid { what: "record kind", found: other.into() }),
        };
        let codec = match reader.u8()? {
            0 => Codec::Raw,
            1 => Codec::Zstd,
            other => return Err(FormatError::Invalid { what: "record codec", found: other.into() }),
        };
        expect("record metadata reserved", reader.u16()?.into(), 0)?;
        let meta = Self {
            kind,
            codec,
            block_count: reader.u32()?,
            block: BlockIndex(reader.u64()?),
            data_mask: PageMask(reader.u64()?),
            zero_mask: PageMask(reader.u64()?),
            counter: reader.u64()?,
            record_len: reader.u32()?,
            tag: {
                expect("record metadata reserved", reader.u32()?.into(), 0)?;
                SealTag(reader.array()?)
            },
            digest: Digest(reader.array()?),
        };
        let plain_len = meta.data_mask.count() * limits::PAGE_BYTES as u32;
        let sealed_len = meta
            .record_len
            .checked_sub(limits::RECORD_HEADER_BYTES as u32)
            .ok_or(FormatError::Invalid { what: "record length", found: meta.record_len.into() })?;
        RecordHeader {
            kind,
            codec,
            volume: VolumeId::NIL,
            incarnation: Incarnation(0),
            key_id: KeyId(0),
            epoch: Epoch(0),
            block: meta.block,
            data_mask: meta.data_mask,
            zero_mask: meta.zero_mask,
            block_count: meta.block_count,
            plain_len,
            sealed_len,
            dictionary_id: 0,
            counter: meta.counter,
        }
        .check()?;
        Ok(meta)
    }
}
