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
use crate::ids::{Digest, Generation, LogSeq, Nonce, ReceiverId, VolumeId};
use crate::limits;

/// Envelope of a log entry.
pub const KIND: Kind =
    Kind { what: "log entry", magic: *b"BFLOGENT", version: 1, body_bytes_max: limits::ENVELOPE_BODY_BYTES_MAX };
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
        body.u32(0);
        KIND.seal(body.as_slice())
    }

    /// Parses an encoded entry that fills `bytes`. Signatures of closes are left to the caller.
    ///
    /// # Errors
    /// Any [`FormatError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new("log entry", KIND.open(bytes)?);
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
        let expiries = reader.u32()?;
        if expiries != 0 {
            return Err(FormatError::Invalid { what: "log entry expiries", found: expiries.into() });
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
