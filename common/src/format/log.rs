//! The log entry: what a receiver commits by creating the next object of a volume's log.
//!
//! Kept in an envelope with magic `BFLOGENT`. Body: volume 16, sequence 8, generation 8, writer 16, digest of the entry
//! before 32 (zero in the first), nonce 16, written at 8, segment count 4; per segment: path text, size 8, digest 32, index
//! offset 8, records 4; epoch count 4; per epoch: close block, segment count 4, per segment its index 4; expiry count 4
//! (zero in this version).

use super::FormatError;
use super::close::Close;
use super::envelope::Kind;
use super::wire::{Reader, Writer};
use crate::clock::UnixMillis;
use crate::ids::{CloseId, Digest, Generation, LogSeq, Nonce, ReceiverId, VolumeId};
use crate::limits;

/// Envelope of a log entry: the newest version.
pub const KIND: Kind =
    Kind { what: "log entry", magic: *b"BFLOGENT", version: 2, body_bytes_max: limits::ENVELOPE_BODY_BYTES_MAX };
/// Envelope of an entry that a writer of epochs makes, which readers of the first release understand.
const KIND_V1: Kind = Kind { version: 1, ..KIND };
const SEGMENT_REF_BYTES_MIN: usize = 4 + 8 + 32 + 8 + 4;
const EPOCH_BYTES_MIN: usize = 4 + 4;

/// A segment that a log entry refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentRef {
    /// Full path in the store.
    pub path: String,
    /// Size of the object in bytes.
    pub size: u64,
    /// BLAKE3 of the object.
    pub digest: Digest,
    /// Where its index starts.
    pub index_offset: u64,
    /// Records in it.
    pub records: u32,
}

impl SegmentRef {
    /// Appends the reference.
    pub fn encode(&self, writer: &mut Writer) {
        writer.block(self.path.as_bytes()).u64(self.size).raw(&self.digest.0).u64(self.index_offset).u32(self.records);
    }

    /// Takes a reference.
    ///
    /// # Errors
    /// Any [`FormatError`] but checksum ones.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let segment = Self {
            path: reader.text("segment path", limits::STORE_PATH_BYTES_MAX)?,
            size: reader.u64()?,
            digest: Digest(reader.array()?),
            index_offset: reader.u64()?,
            records: reader.u32()?,
        };
        if segment.size > super::segment::SEGMENT_BYTES_DECODE_MAX || segment.index_offset > segment.size {
            return Err(FormatError::OverLimit {
                what: "segment size",
                found: segment.size,
                limit: super::segment::SEGMENT_BYTES_DECODE_MAX,
            });
        }
        Ok(segment)
    }
}

/// An epoch that a log entry commits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommittedEpoch {
    /// Its close.
    pub close: Close,
    /// Indexes into the entry's segments: where its records lie. Empty for an epoch without records.
    pub segments: Vec<u32>,
}

/// Segments that another one stands for from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replacement {
    /// Holds the records of the old ones that any retained point needs, verbatim, and the metadata of all of them.
    pub new: SegmentRef,
    /// Full paths of the old ones.
    pub old: Vec<String>,
}

/// What a collector states: which points, and which objects, are given up.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Maintenance {
    /// Closes whose recovery points are not offered any more. They stay in the chain of closes.
    pub expired: Vec<CloseId>,
    /// Segments rewritten.
    pub replaced: Vec<Replacement>,
    /// Full paths of objects that no entry before this one names, and that no later one may name.
    pub condemned: Vec<String>,
}

impl Maintenance {
    /// True where it states nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.expired.is_empty() && self.replaced.is_empty() && self.condemned.is_empty()
    }
}

impl Maintenance {
    fn decode(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let mut found = Self::default();
        for _ in 0..reader.count("expired points", limits::LOG_ENTRY_EXPIRED_MAX, 32)? {
            found.expired.push(CloseId(reader.array()?));
        }
        let mut paths = 0;
        for _ in 0..reader.count("replacements", limits::LOG_ENTRY_SEGMENTS_MAX, SEGMENT_REF_BYTES_MIN + 4)? {
            let new = SegmentRef::decode(reader)?;
            let count = reader.count("replaced segments", limits::LOG_ENTRY_PATHS_MAX, 4)?;
            paths += count;
            if paths > limits::LOG_ENTRY_PATHS_MAX {
                return Err(FormatError::OverLimit {
                    what: "replaced segments",
                    found: paths as u64,
                    limit: limits::LOG_ENTRY_PATHS_MAX as u64,
                });
            }
            let old = (0..count).map(|_| reader.text("segment path", limits::STORE_PATH_BYTES_MAX));
            let old = old.collect::<Result<_, _>>()?;
            found.replaced.push(Replacement { new, old });
        }
        for _ in 0..reader.count("condemned objects", limits::LOG_ENTRY_SEGMENTS_MAX, 4)? {
            found.condemned.push(reader.text("condemned path", limits::STORE_PATH_BYTES_MAX)?);
        }
        Ok(found)
    }
}

/// One entry of a volume's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// Volume.
    pub volume: VolumeId,
    /// Its place in the log, also in its name.
    pub seq: LogSeq,
    /// The generation it was written under.
    pub generation: Generation,
    /// The receiver that wrote it.
    pub writer: ReceiverId,
    /// BLAKE3 of the encoded entry before this one; zero in the first.
    pub previous: Digest,
    /// Makes this entry's bytes unique, so that a writer can tell whether its own create won.
    pub nonce: Nonce,
    /// When it was written, by the writer's clock.
    pub written: UnixMillis,
    /// Segments that the epochs lie in.
    pub segments: Vec<SegmentRef>,
    /// Epochs committed, in the order of their parent chain. Empty in an entry that only takes a generation.
    pub epochs: Vec<CommittedEpoch>,
    /// Makes this an entry of maintenance, which has neither segments nor epochs of its own.
    pub maintenance: Option<Maintenance>,
}

impl LogEntry {
    /// The encoded entry.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Writer::with_capacity(4096);
        body.raw(&self.volume.0)
            .u64(self.seq.0)
            .u64(self.generation.0)
            .raw(&self.writer.0)
            .raw(&self.previous.0)
            .raw(&self.nonce.0)
            .i64(self.written.0)
            .count(self.segments.len());
        for segment in &self.segments {
            segment.encode(&mut body);
        }
        body.count(self.epochs.len());
        for epoch in &self.epochs {
            body.block(epoch.close.bytes()).count(epoch.segments.len());
            for &segment in &epoch.segments {
                body.u32(segment);
            }
        }
        let Some(maintenance) = &self.maintenance else {
            body.u32(0);
            return KIND_V1.seal(body.as_slice());
        };
        body.count(maintenance.expired.len());
        for close in &maintenance.expired {
            body.raw(&close.0);
        }
        body.count(maintenance.replaced.len());
        for Replacement { new, old } in &maintenance.replaced {
            new.encode(&mut body);
            body.count(old.len());
            for path in old {
                body.block(path.as_bytes());
            }
        }
        body.count(maintenance.condemned.len());
        for path in &maintenance.condemned {
            body.block(path.as_bytes());
        }
        KIND.seal(body.as_slice())
    }

    /// Parses an encoded entry that fills `bytes`. Signatures of closes are left to the caller.
    ///
    /// # Errors
    /// Any [`FormatError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new("log entry", KIND.open(bytes)?);
        let version = Kind::version_of(bytes);
        let mut entry = Self {
            volume: VolumeId(reader.array()?),
            seq: LogSeq(reader.u64()?),
            generation: Generation(reader.u64()?),
            writer: ReceiverId(reader.array()?),
            previous: Digest(reader.array()?),
            nonce: Nonce(reader.array()?),
            written: UnixMillis(reader.i64()?),
            segments: Vec::new(),
            epochs: Vec::new(),
            maintenance: None,
        };
        let segments = reader.count("log entry segments", limits::LOG_ENTRY_SEGMENTS_MAX, SEGMENT_REF_BYTES_MIN)?;
        for _ in 0..segments {
            entry.segments.push(SegmentRef::decode(&mut reader)?);
        }
        let epochs = reader.count("log entry epochs", limits::LOG_ENTRY_EPOCHS_MAX, EPOCH_BYTES_MIN)?;
        for _ in 0..epochs {
            let close =
                Close::decode(reader.block("close", limits::CLOSE_BYTES_MAX + super::envelope::OVERHEAD_BYTES)?)?;
            let count = reader.count("epoch segments", limits::LOG_ENTRY_SEGMENTS_MAX, 4)?;
            let mut indexes = Vec::with_capacity(count);
            for _ in 0..count {
                let index = reader.u32()?;
                if index as usize >= segments {
                    return Err(FormatError::Invalid { what: "epoch's segment index", found: index.into() });
                }
                indexes.push(index);
            }
            entry.epochs.push(CommittedEpoch { close, segments: indexes });
        }
        if version == Some(1) {
            let expired = reader.u32()?;
            if expired != 0 {
                return Err(FormatError::Invalid { what: "expired points of a log entry", found: expired.into() });
            }
        } else {
            if segments + epochs > 0 {
                return Err(FormatError::Invalid { what: "epochs of an entry of maintenance", found: epochs as u64 });
            }
            entry.maintenance = Some(Maintenance::decode(&mut reader)?);
        }
        reader.finish()?;
        Ok(entry)
    }

    /// BLAKE3 of the encoded entry, which the next entry names.
    #[must_use]
    pub fn digest_of(encoded: &[u8]) -> Digest {
        Digest(*blake3::hash(encoded).as_bytes())
    }
}
