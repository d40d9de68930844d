//! What a sender keeps of one volume: its identity, the hashes of its pages, and the journal of closes that are not committed.
//!
//! Three kinds of file, all little-endian; `docs/formats/sender-state.md` has the byte tables.
//!
//! - [`VolumeIdentity`], one envelope `BFSTVOL`.
//! - *Page hashes*: two slots of a header ([`HashesHeader`], envelope `BFHASHES`), 4,096 bytes each, then one [`HashEntry`]
//!   of 1,028 bytes for each block. The slot with the higher sequence number counts.
//! - *Journal of one epoch*: [`JournalHead`], [`JournalBatch`]es, [`JournalEnd`], an envelope each. A journal without its end
//!   is of an epoch that was never closed.
//!
//! The version of each is judged before its checksum.

use super::FormatError;
use super::close::Consistency;
use super::envelope::{self, Kind};
use super::wire::{Reader, Writer};
use crate::ids::{BlockIndex, CloseId, Epoch, FleetId, Geometry, Incarnation, KeyId, PageMask, VolumeId};
use crate::limits;

#[cfg(test)]
mod tests;

/// Bytes of one page's hash: keyed BLAKE3, truncated.
pub const PAGE_HASH_BYTES: usize = 16;
/// The keyed hash of one page.
pub type PageHash = [u8; PAGE_HASH_BYTES];
/// Stands for "not known": the page is sent whatever it holds.
pub const UNKNOWN_HASH: PageHash = [0; PAGE_HASH_BYTES];
/// Stands for a page of zeros, which is recognised without hashing it.
pub const ZERO_PAGE_HASH: PageHash = [0xff; PAGE_HASH_BYTES];

/// Bytes of one block's entry: 64 hashes and a CRC-32C.
pub const HASH_ENTRY_BYTES: usize = limits::PAGES_PER_BLOCK * PAGE_HASH_BYTES + 4;
/// Bytes from the start of one header slot to the next: a page each, so that one torn write never hits both.
pub const HASHES_SLOT_BYTES: usize = 4096;
/// Header slots.
pub const HASHES_SLOTS: usize = 2;
/// Offset of the first block's entry.
pub const HASHES_ENTRIES_OFFSET: u64 = (HASHES_SLOT_BYTES * HASHES_SLOTS) as u64;

/// Envelope of a volume's identity.
pub const IDENTITY_KIND: Kind =
    Kind { what: "volume state", magic: *b"BFSTVOL\0", version: 1, body_bytes_max: 16 << 10 };
/// Envelope of a header slot of the page hashes.
pub const HASHES_KIND: Kind = Kind { what: "page hashes", magic: *b"BFHASHES", version: 1, body_bytes_max: 512 };
/// Envelope of a journal's head.
pub const JOURNAL_HEAD_KIND: Kind = Kind { what: "journal", magic: *b"BFJRNHD\0", version: 1, body_bytes_max: 256 };
/// Envelope of some of a journal's changes.
pub const JOURNAL_BATCH_KIND: Kind =
    Kind { what: "journal batch", magic: *b"BFJRNBT\0", version: 1, body_bytes_max: 256 << 10 };
/// Envelope of a journal's end.
pub const JOURNAL_END_KIND: Kind = Kind { what: "journal end", magic: *b"BFJRNEN\0", version: 1, body_bytes_max: 256 };

/// Changes that one batch may hold.
pub const JOURNAL_BATCH_CHANGES_MAX: usize = 128;
/// Longest path of a source, in bytes.
const SOURCE_PATH_BYTES_MAX: usize = 4096;
const SERIAL_BYTES_MAX: usize = 256;
/// Fixed bytes of a change: kind, reserved, count, block, mask.
const CHANGE_BYTES: usize = 24;

const _: () = assert!(HASH_ENTRY_BYTES == 1028);
const _: () = assert!(
    JOURNAL_BATCH_CHANGES_MAX * (CHANGE_BYTES + limits::PAGES_PER_BLOCK * PAGE_HASH_BYTES) + 64
        <= JOURNAL_BATCH_KIND.body_bytes_max
);
const _: () = assert!(HASHES_KIND.body_bytes_max + envelope::OVERHEAD_BYTES <= HASHES_SLOT_BYTES);

/// What a source was when it was taken under protection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceIdentity {
    /// An image file.
    File {
        /// Device number of its file system.
        device: u64,
        /// Its inode.
        inode: u64,
    },
    /// A block device.
    Device {
        /// Serial number or WWN; empty where the device states none.
        serial: String,
    },
}

/// Identity of a protected volume, and the key of its page hashes. Prints without the key.
#[derive(Clone, PartialEq, Eq)]
pub struct VolumeIdentity {
    /// Fleet.
    pub fleet: FleetId,
    /// Volume.
    pub volume: VolumeId,
    /// Incarnation.
    pub incarnation: Incarnation,
    /// Data key that seals it.
    pub key_id: KeyId,
    /// Exact size of its disk in bytes.
    pub disk_bytes: u64,
    /// Logical sector size in bytes.
    pub sector_bytes: u32,
    /// Its name, unique within the machine.
    pub name: String,
    /// Path of the source as it was given, as bytes.
    pub source_path: Vec<u8>,
    /// What the source was.
    pub source: SourceIdentity,
    /// Key of the page hashes: 32 random bytes that never leave the machine.
    pub hash_key: [u8; 32],
}

impl std::fmt::Debug for VolumeIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VolumeIdentity")
            .field("volume", &self.volume)
            .field("incarnation", &self.incarnation)
            .field("disk_bytes", &self.disk_bytes)
            .field("name", &self.name)
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl VolumeIdentity {
    /// Size and layout of the disk.
    ///
    /// # Panics
    /// Never for a decoded identity, whose size was checked.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        Geometry::new(self.disk_bytes).expect("a decoded or registered size is within the limits")
    }

    /// Names the hash key without giving it away, so that hashes made with another key are recognised.
    #[must_use]
    pub fn hash_key_check(&self) -> [u8; 16] {
        let mut check = [0; 16];
        check.copy_from_slice(&blake3::derive_key("blockferry page hash key check v1", &self.hash_key)[..16]);
        check
    }

    /// The encoded identity.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Writer::with_capacity(512);
        body.raw(&self.fleet.0)
            .raw(&self.volume.0)
            .u32(self.incarnation.0)
            .u32(self.key_id.0)
            .u64(self.disk_bytes)
            .u32(self.sector_bytes);
        let (kind, device, inode, serial) = match &self.source {
            SourceIdentity::File { device, inode } => (1, *device, *inode, ""),
            SourceIdentity::Device { serial } => (2, 0, 0, serial.as_str()),
        };
        body.u8(kind)
            .raw(&[0; 3])
            .u64(device)
            .u64(inode)
            .raw(&self.hash_key)
            .block(serial.as_bytes())
            .block(self.name.as_bytes())
            .block(&self.source_path);
        IDENTITY_KIND.seal(body.as_slice())
    }

    /// Parses an encoded identity that fills `bytes`.
    ///
    /// # Errors
    /// Any [`FormatError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new("volume state", IDENTITY_KIND.open(bytes)?);
        let fleet = FleetId(reader.array()?);
        let volume = VolumeId(reader.array()?);
        let incarnation = Incarnation(reader.u32()?);
        let key_id = KeyId(reader.u32()?);
        let disk_bytes = disk_size(reader.u64()?)?;
        let sector_bytes = reader.u32()?;
        let kind = reader.u8()?;
        reader.take(3)?;
        let (device, inode) = (reader.u64()?, reader.u64()?);
        let hash_key = reader.array()?;
        let serial = reader.text("source serial number", SERIAL_BYTES_MAX)?;
        let source = match kind {
            1 => SourceIdentity::File { device, inode },
            2 => SourceIdentity::Device { serial },
            other => return Err(FormatError::Invalid { what: "source kind", found: other.into() }),
        };
        let name = reader.text("volume name", limits::NAME_BYTES_MAX)?;
        let source_path = reader.block("source path", SOURCE_PATH_BYTES_MAX)?.to_vec();
        reader.finish()?;
        Ok(Self { fleet, volume, incarnation, key_id, disk_bytes, sector_bytes, name, source_path, source, hash_key })
    }
}

fn disk_size(bytes: u64) -> Result<u64, FormatError> {
    if Geometry::new(bytes).is_some() {
        return Ok(bytes);
    }
    Err(FormatError::OverLimit { what: "disk size", found: bytes, limit: limits::DISK_BYTES_MAX })
}

/// Header of the page hashes: what they describe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashesHeader {
    /// Grows with every write; the higher of two slots counts.
    pub sequence: u64,
    /// Volume.
    pub volume: VolumeId,
    /// Incarnation.
    pub incarnation: Incarnation,
    /// Exact size of the disk in bytes.
    pub disk_bytes: u64,
    /// [`VolumeIdentity::hash_key_check`] of the key they were made with.
    pub hash_key_check: [u8; 16],
    /// Epoch of the newest committed close applied.
    pub applied_epoch: Epoch,
    /// That close; [`CloseId::ZERO`] before the first.
    pub applied_close: CloseId,
}

impl HashesHeader {
    /// One slot, padded with zeros to [`HASHES_SLOT_BYTES`].
    #[must_use]
    pub fn encode_slot(&self) -> Vec<u8> {
        let mut body = Writer::with_capacity(128);
        body.u64(self.sequence)
            .raw(&self.volume.0)
            .u32(self.incarnation.0)
            .u64(self.disk_bytes)
            .raw(&self.hash_key_check)
            .u64(self.applied_epoch.0)
            .raw(&self.applied_close.0);
        let mut slot = HASHES_KIND.seal(body.as_slice());
        slot.resize(HASHES_SLOT_BYTES, 0);
        slot
    }

    /// Parses one slot, padding included.
    ///
    /// # Errors
    /// Any [`FormatError`].
    pub fn decode_slot(slot: &[u8]) -> Result<Self, FormatError> {
        let (body, padding) = HASHES_KIND.open_prefix(slot)?;
        let mut reader = Reader::new("page hashes", body);
        let header = Self {
            sequence: reader.u64()?,
            volume: VolumeId(reader.array()?),
            incarnation: Incarnation(reader.u32()?),
            disk_bytes: disk_size(reader.u64()?)?,
            hash_key_check: reader.array()?,
            applied_epoch: Epoch(reader.u64()?),
            applied_close: CloseId(reader.array()?),
        };
        reader.finish()?;
        if let Some(byte) = padding.iter().find(|byte| **byte != 0) {
            return Err(FormatError::Invalid { what: "page hashes header padding", found: (*byte).into() });
        }
        Ok(header)
    }

    /// The header that counts, given both slots.
    ///
    /// # Errors
    /// A version or flag that this software does not know, in either slot; else, where no slot is whole, the first one's error.
    pub fn newest(slots: &[u8]) -> Result<Self, FormatError> {
        let decode = |index: usize| {
            let start = index * HASHES_SLOT_BYTES;
            Self::decode_slot(slots.get(start..start + HASHES_SLOT_BYTES).unwrap_or_default())
        };
        match (decode(0), decode(1)) {
            (Err(error @ (FormatError::UnknownVersion { .. } | FormatError::UnknownFlags { .. })), _)
            | (_, Err(error @ (FormatError::UnknownVersion { .. } | FormatError::UnknownFlags { .. }))) => Err(error),
            (Ok(first), Ok(second)) => Ok(if second.sequence > first.sequence { second } else { first }),
            (Ok(header), Err(_)) | (Err(_), Ok(header)) => Ok(header),
            (Err(error), Err(_)) => Err(error),
        }
    }
}

/// Hashes of one block's pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashEntry(pub [PageHash; limits::PAGES_PER_BLOCK]);

impl HashEntry {
    /// Nothing known.
    pub const UNKNOWN: Self = Self([UNKNOWN_HASH; limits::PAGES_PER_BLOCK]);
    /// All pages zero.
    pub const ZERO: Self = Self([ZERO_PAGE_HASH; limits::PAGES_PER_BLOCK]);

    /// Bytes between the start of the file and the entry of `block`.
    #[must_use]
    pub fn offset(block: BlockIndex) -> u64 {
        HASHES_ENTRIES_OFFSET + block.0.saturating_mul(HASH_ENTRY_BYTES as u64)
    }

    /// Writes the entry of `block`. The checksum covers the block's number, so that an entry at a wrong place is noticed.
    pub fn encode(&self, block: BlockIndex, out: &mut [u8; HASH_ENTRY_BYTES]) {
        let (hashes, crc) = out.split_at_mut(HASH_ENTRY_BYTES - 4);
        hashes.copy_from_slice(self.0.as_flattened());
        crc.copy_from_slice(&checksum(block, hashes).to_le_bytes());
    }

    /// Reads the entry of `block`. Bytes that are all zero, as in a file never written, are [`Self::UNKNOWN`].
    ///
    /// # Errors
    /// [`FormatError::Checksum`].
    pub fn decode(block: BlockIndex, bytes: &[u8; HASH_ENTRY_BYTES]) -> Result<Self, FormatError> {
        let (hashes, crc) = bytes.split_at(HASH_ENTRY_BYTES - 4);
        let mut entry = Self::UNKNOWN;
        entry.0.as_flattened_mut().copy_from_slice(hashes);
        if checksum(block, hashes).to_le_bytes() != crc && bytes.iter().any(|byte| *byte != 0) {
            return Err(FormatError::Checksum { what: "page hashes entry" });
        }
        Ok(entry)
    }
}

fn checksum(block: BlockIndex, hashes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&block.0.to_le_bytes()), hashes)
}

/// What one record changes in the page hashes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashChange {
    /// Pages of one block.
    Pages {
        /// Block.
        block: BlockIndex,
        /// Pages with content or zeros that the record holds; never empty.
        mask: PageMask,
        /// Their new hashes, ascending; as many as the mask has bits.
        hashes: Vec<PageHash>,
    },
    /// Whole blocks became zero.
    ZeroBlocks {
        /// The first.
        first: BlockIndex,
        /// How many, 1 to [`limits::RANGE_BLOCKS_MAX`].
        count: u32,
    },
}

impl HashChange {
    fn encode(&self, writer: &mut Writer) {
        match self {
            Self::Pages { block, mask, hashes } => {
                writer.u8(1).raw(&[0; 3]).u32(1).u64(block.0).u64(mask.0).raw(hashes.as_flattened());
            }
            Self::ZeroBlocks { first, count } => {
                writer.u8(2).raw(&[0; 3]).u32(*count).u64(first.0).u64(u64::MAX);
            }
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        const BLOCKS_MAX: u64 = limits::DISK_BYTES_MAX / limits::BLOCK_BYTES as u64;
        let kind = reader.u8()?;
        reader.take(3)?;
        let (count, block, mask) = (reader.u32()?, reader.u64()?, reader.u64()?);
        if block >= BLOCKS_MAX || block + u64::from(count) > BLOCKS_MAX {
            return Err(FormatError::OverLimit { what: "journal block", found: block, limit: BLOCKS_MAX });
        }
        match kind {
            1 if count == 1 && mask != 0 => {
                let hashes = reader.take(mask.count_ones() as usize * PAGE_HASH_BYTES)?;
                let hashes = hashes.as_chunks::<PAGE_HASH_BYTES>().0.to_vec();
                Ok(Self::Pages { block: BlockIndex(block), mask: PageMask(mask), hashes })
            }
            1 => Err(FormatError::Invalid { what: "journal page mask", found: mask }),
            2 if count == 0 || count > limits::RANGE_BLOCKS_MAX => {
                Err(FormatError::Invalid { what: "journal block count", found: count.into() })
            }
            2 => Ok(Self::ZeroBlocks { first: BlockIndex(block), count }),
            other => Err(FormatError::Invalid { what: "journal change kind", found: other.into() }),
        }
    }
}

/// The first part of a journal: the epoch that it is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalHead {
    /// Volume.
    pub volume: VolumeId,
    /// Incarnation.
    pub incarnation: Incarnation,
    /// [`VolumeIdentity::hash_key_check`].
    pub hash_key_check: [u8; 16],
    /// Epoch.
    pub epoch: Epoch,
}

/// Changes of an epoch, in no particular order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalBatch {
    /// Epoch.
    pub epoch: Epoch,
    /// Number of the batch within its journal, from 0.
    pub index: u32,
    /// At most [`JOURNAL_BATCH_CHANGES_MAX`].
    pub changes: Vec<HashChange>,
}

/// The last part of a journal: the close that ended the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalEnd {
    /// Epoch.
    pub epoch: Epoch,
    /// Its close.
    pub close: CloseId,
    /// The close before it.
    pub parent: CloseId,
    /// The recovery point that it asserts.
    pub point: Option<Consistency>,
    /// Batches in this journal.
    pub batches: u32,
    /// Changes in them.
    pub changes: u64,
}

/// One part of a journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JournalPart {
    /// The first part.
    Head(JournalHead),
    /// What lies between.
    Batch(JournalBatch),
    /// The last part.
    End(JournalEnd),
}

impl JournalPart {
    /// Bytes at the front of a part that [`Self::encoded_len`] needs.
    pub const PREFIX_BYTES: usize = envelope::HEAD_BYTES;

    /// Length in bytes of the part that begins with `prefix`, so that a reader knows how much to read.
    ///
    /// # Errors
    /// [`FormatError::WrongMagic`], [`FormatError::UnknownVersion`], [`FormatError::OverLimit`].
    pub fn encoded_len(prefix: &[u8; Self::PREFIX_BYTES]) -> Result<usize, FormatError> {
        let mut reader = Reader::new("journal", prefix);
        let kind = Self::kind(&reader.array()?)?;
        let version = reader.u16()?;
        if version == 0 || version > kind.version {
            return Err(FormatError::UnknownVersion { what: kind.what, found: version, known: kind.version });
        }
        reader.take(6)?;
        let length = reader.u32()? as usize;
        if length > kind.body_bytes_max {
            let (found, limit) = (length as u64, kind.body_bytes_max as u64);
            return Err(FormatError::OverLimit { what: kind.what, found, limit });
        }
        Ok(length + envelope::OVERHEAD_BYTES)
    }

    fn kind(magic: &[u8; 8]) -> Result<Kind, FormatError> {
        [JOURNAL_HEAD_KIND, JOURNAL_BATCH_KIND, JOURNAL_END_KIND]
            .into_iter()
            .find(|kind| kind.magic == *magic)
            .ok_or(FormatError::WrongMagic { what: "journal" })
    }

    /// The encoded part.
    ///
    /// # Panics
    /// If a batch holds more than [`JOURNAL_BATCH_CHANGES_MAX`] changes: a bug of the writer.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Writer::with_capacity(256);
        match self {
            Self::Head(head) => {
                body.raw(&head.volume.0).u32(head.incarnation.0).raw(&head.hash_key_check).u64(head.epoch.0);
                JOURNAL_HEAD_KIND.seal(body.as_slice())
            }
            Self::Batch(batch) => {
                assert!(batch.changes.len() <= JOURNAL_BATCH_CHANGES_MAX, "the writer bounds its batches");
                body.u64(batch.epoch.0).u32(batch.index).count(batch.changes.len());
                batch.changes.iter().for_each(|change| change.encode(&mut body));
                JOURNAL_BATCH_KIND.seal(body.as_slice())
            }
            Self::End(end) => {
                body.u64(end.epoch.0)
                    .raw(&end.close.0)
                    .raw(&end.parent.0)
                    .u8(match end.point {
                        None => 0,
                        Some(Consistency::Fuzzy) => 1,
                        Some(Consistency::Crash) => 2,
                        Some(Consistency::Filesystem) => 3,
                        Some(Consistency::Application) => 4,
                    })
                    .raw(&[0; 3])
                    .u32(end.batches)
                    .u64(end.changes);
                JOURNAL_END_KIND.seal(body.as_slice())
            }
        }
    }

    /// Parses a part that fills `bytes`.
    ///
    /// # Errors
    /// Any [`FormatError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let kind = Self::kind(&Reader::new("journal", bytes).array()?)?;
        let mut reader = Reader::new(kind.what, kind.open(bytes)?);
        let part = if kind.magic == JOURNAL_HEAD_KIND.magic {
            Self::Head(JournalHead {
                volume: VolumeId(reader.array()?),
                incarnation: Incarnation(reader.u32()?),
                hash_key_check: reader.array()?,
                epoch: Epoch(reader.u64()?),
            })
        } else if kind.magic == JOURNAL_BATCH_KIND.magic {
            let (epoch, index) = (Epoch(reader.u64()?), reader.u32()?);
            let count = reader.count("journal changes", JOURNAL_BATCH_CHANGES_MAX, CHANGE_BYTES)?;
            let changes = (0..count).map(|_| HashChange::decode(&mut reader)).collect::<Result<_, _>>()?;
            Self::Batch(JournalBatch { epoch, index, changes })
        } else {
            let (epoch, close, parent) = (Epoch(reader.u64()?), CloseId(reader.array()?), CloseId(reader.array()?));
            let point = match reader.u8()? {
                0 => None,
                1 => Some(Consistency::Fuzzy),
                2 => Some(Consistency::Crash),
                3 => Some(Consistency::Filesystem),
                4 => Some(Consistency::Application),
                other => return Err(FormatError::Invalid { what: "journal consistency", found: other.into() }),
            };
            reader.take(3)?;
            Self::End(JournalEnd { epoch, close, parent, point, batches: reader.u32()?, changes: reader.u64()? })
        };
        reader.finish()?;
        Ok(part)
    }
}
