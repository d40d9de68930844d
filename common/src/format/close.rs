//! The close: the signed statement that ends an epoch.
//!
//! Kept in an envelope with magic `BFCLOSE\0`. Body: fleet 16, volume 16, incarnation 4, key id 4, epoch 8, parent close 32,
//! salt 32, cut time 8 (milliseconds since 1970, signed), consistency 1, digest algorithm 1 (1 = BLAKE3), reserved 2, disk
//! bytes 8, records 8, data pages 8, zero pages 8, record bytes 8, metadata root 32, group 16, group point 16, signature 64.
//! The signature is Ed25519 over [`SIGNING_DOMAIN`] and the body without its last 64 bytes.

use super::FormatError;
use super::envelope::Kind;
use super::wire::{Reader, Writer};
use crate::clock::UnixMillis;
use crate::ids::{CloseId, Digest, Epoch, FleetId, GroupId, Incarnation, KeyId, Salt, VolumeId};
use crate::limits;

/// Envelope of a close.
pub const KIND: Kind =
    Kind { what: "close", magic: *b"BFCLOSE\0", version: 1, body_bytes_max: limits::CLOSE_BYTES_MAX };
/// Put before the body when signing, so that the signature says nothing in another context.
pub const SIGNING_DOMAIN: &[u8] = b"blockferry close v1\0";
const SIGNATURE_BYTES: usize = 64;
const DIGEST_BLAKE3: u8 = 1;

/// What a recovery point claims about the disk's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Consistency {
    /// Read from a changing disk without a cut.
    Fuzzy,
    /// As after a power cut at the instant of the cut.
    Crash,
    /// File systems were frozen at the cut.
    Filesystem,
    /// Applications were quiesced at the cut.
    Application,
}

impl Consistency {
    /// The word used on the command line, in metrics and in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fuzzy => "fuzzy",
            Self::Crash => "crash",
            Self::Filesystem => "filesystem",
            Self::Application => "application",
        }
    }
}

/// Everything a close states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloseStatement {
    /// Fleet that the volume belongs to.
    pub fleet: FleetId,
    /// Volume.
    pub volume: VolumeId,
    /// Incarnation.
    pub incarnation: Incarnation,
    /// Data key.
    pub key_id: KeyId,
    /// Epoch ended.
    pub epoch: Epoch,
    /// The close before this one; [`CloseId::ZERO`] for a volume's first.
    pub parent: CloseId,
    /// Salt of the epoch's key.
    pub salt: Salt,
    /// When the cut was made.
    pub cut_time: UnixMillis,
    /// The recovery point asserted, or `None` for an epoch without one.
    pub point: Option<Consistency>,
    /// Exact size of the disk in bytes.
    pub disk_bytes: u64,
    /// Records of the epoch.
    pub records: u64,
    /// Pages with content in them.
    pub data_pages: u64,
    /// Zero pages in them.
    pub zero_pages: u64,
    /// Bytes of the records.
    pub record_bytes: u64,
    /// Merkle root over the records' metadata.
    pub meta_root: Digest,
    /// Consistency group, nil for none.
    pub group: GroupId,
    /// Point that the group's disks share, nil for none.
    pub group_point: GroupId,
}

impl CloseStatement {
    /// The bytes that are signed: domain and body.
    #[must_use]
    pub fn signed_bytes(&self) -> Vec<u8> {
        let mut writer = Writer::with_capacity(512);
        writer
            .raw(SIGNING_DOMAIN)
            .raw(&self.fleet.0)
            .raw(&self.volume.0)
            .u32(self.incarnation.0)
            .u32(self.key_id.0)
            .u64(self.epoch.0)
            .raw(&self.parent.0)
            .raw(&self.salt.0)
            .i64(self.cut_time.0)
            .u8(match self.point {
                None => 0,
                Some(Consistency::Fuzzy) => 1,
                Some(Consistency::Crash) => 2,
                Some(Consistency::Filesystem) => 3,
                Some(Consistency::Application) => 4,
            })
            .u8(DIGEST_BLAKE3)
            .u16(0)
            .u64(self.disk_bytes)
            .u64(self.records)
            .u64(self.data_pages)
            .u64(self.zero_pages)
            .u64(self.record_bytes)
            .raw(&self.meta_root.0)
            .raw(&self.group.0)
            .raw(&self.group_point.0);
        writer.into_vec()
    }
}

/// A signed close, with the bytes it was read from or is written as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Close {
    statement: CloseStatement,
    signature: [u8; SIGNATURE_BYTES],
    bytes: Vec<u8>,
    id: CloseId,
}

impl Close {
    /// Joins a statement and its signature. Does not check the signature; see [`crate::seal::signing`].
    #[must_use]
    pub fn new(statement: CloseStatement, signature: [u8; SIGNATURE_BYTES]) -> Self {
        let mut body = statement.signed_bytes().split_off(SIGNING_DOMAIN.len());
        body.extend_from_slice(&signature);
        let bytes = KIND.seal(&body);
        let id = CloseId(*blake3::hash(&bytes).as_bytes());
        Self { statement, signature, bytes, id }
    }

    /// Parses an encoded close that fills `bytes`. Does not check the signature.
    ///
    /// # Errors
    /// Any [`FormatError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let body = KIND.open(bytes)?;
        let mut reader = Reader::new("close", body);
        let statement = CloseStatement {
            fleet: FleetId(reader.array()?),
            volume: VolumeId(reader.array()?),
            incarnation: Incarnation(reader.u32()?),
            key_id: KeyId(reader.u32()?),
            epoch: Epoch(reader.u64()?),
            parent: CloseId(reader.array()?),
            salt: Salt(reader.array()?),
            cut_time: UnixMillis(reader.i64()?),
            point: match reader.u8()? {
                0 => None,
                1 => Some(Consistency::Fuzzy),
                2 => Some(Consistency::Crash),
                3 => Some(Consistency::Filesystem),
                4 => Some(Consistency::Application),
                other => return Err(FormatError::Invalid { what: "close consistency", found: other.into() }),
            },
            disk_bytes: {
                let algorithm = reader.u8()?;
                if algorithm != DIGEST_BLAKE3 {
                    return Err(FormatError::Invalid { what: "close digest algorithm", found: algorithm.into() });
                }
                let reserved = reader.u16()?;
                if reserved != 0 {
                    return Err(FormatError::Invalid { what: "close reserved field", found: reserved.into() });
                }
                reader.u64()?
            },
            records: reader.u64()?,
            data_pages: reader.u64()?,
            zero_pages: reader.u64()?,
            record_bytes: reader.u64()?,
            meta_root: Digest(reader.array()?),
            group: GroupId(reader.array()?),
            group_point: GroupId(reader.array()?),
        };
        let signature = reader.array()?;
        reader.finish()?;
        if statement.records > limits::EPOCH_RECORDS_DECODE_MAX as u64 {
            return Err(FormatError::OverLimit {
                what: "records of an epoch",
                found: statement.records,
                limit: limits::EPOCH_RECORDS_DECODE_MAX as u64,
            });
        }
        if statement.disk_bytes == 0 || statement.disk_bytes > limits::DISK_BYTES_MAX {
            return Err(FormatError::OverLimit {
                what: "disk size",
                found: statement.disk_bytes,
                limit: limits::DISK_BYTES_MAX,
            });
        }
        let id = CloseId(*blake3::hash(bytes).as_bytes());
        Ok(Self { statement, signature, bytes: bytes.to_vec(), id })
    }

    /// What it states.
    #[must_use]
    pub fn statement(&self) -> &CloseStatement {
        &self.statement
    }

    /// Its signature, unchecked.
    #[must_use]
    pub fn signature(&self) -> &[u8; SIGNATURE_BYTES] {
        &self.signature
    }

    /// Its encoding.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The name by which a child close and the log refer to it.
    #[must_use]
    pub fn id(&self) -> CloseId {
        self.id
    }
}
