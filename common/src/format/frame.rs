//! Frames of a data stream. A stream starts with an 8-byte preamble, then frames follow.
//!
//! ```text
//! preamble: magic "BFSTRM" 6, version 2
//! frame:    body length 4, kind 1, reserved 3, CRC-32C 4, body
//! ```
//!
//! The checksum covers the first eight bytes and the body; of a [`Frame::Record`] only the body's first eight bytes (the
//! sequence number), since the record carries its own.

use bytes::{Buf, Bytes, BytesMut};

use super::FormatError;
use super::close::Close;
use super::envelope;
use super::record::Record;
use super::wire::{Reader, Writer};
use crate::ids::{BlockIndex, CloseId, Epoch, Incarnation, SealTag, SessionId, VolumeId};
use crate::limits;

/// First bytes of every data stream, in both directions.
pub const PREAMBLE: [u8; 8] = *b"BFSTRM\x01\0";
/// Bytes before a frame's body.
pub const FRAME_HEAD_BYTES: usize = 12;
const WHAT: &str = "frame";
const SEQ_BYTES: usize = 8;

/// Why a peer ended a session; the number travels, the text explains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RefusalCode {
    /// The volume is not this machine's, or does not exist.
    NotYours,
    /// Another incarnation is current.
    WrongIncarnation,
    /// The sender's state is not the one that wrote the log's head: a clone or a rollback.
    Diverged,
    /// A newer session of the same volume took over.
    Superseded,
    /// A frame that makes no sense here, or a record or close that does not check.
    BadMessage,
    /// Protocol version not spoken.
    Protocol,
    /// The receiver can't write this volume's log any more: another receiver owns it.
    Fenced,
    /// The receiver is shutting down or drains; connect again.
    GoingAway,
    /// The receiver failed (disk, store); connect again later.
    Failed,
    /// The receiver drains: go to another one of the fleet now.
    Draining,
    /// The volume is retired or deleted: it takes no more until an operator says so.
    Retired,
}

impl RefusalCode {
    fn to_wire(self) -> u16 {
        match self {
            Self::NotYours => 1,
            Self::WrongIncarnation => 2,
            Self::Diverged => 3,
            Self::Superseded => 4,
            Self::BadMessage => 5,
            Self::Protocol => 6,
            Self::Fenced => 7,
            Self::GoingAway => 8,
            Self::Failed => 9,
            Self::Draining => 10,
            Self::Retired => 11,
        }
    }

    fn from_wire(code: u16) -> Result<Self, FormatError> {
        Ok(match code {
            1 => Self::NotYours,
            2 => Self::WrongIncarnation,
            3 => Self::Diverged,
            4 => Self::Superseded,
            5 => Self::BadMessage,
            6 => Self::Protocol,
            7 => Self::Fenced,
            8 => Self::GoingAway,
            9 => Self::Failed,
            10 => Self::Draining,
            11 => Self::Retired,
            other => return Err(FormatError::Invalid { what: "refusal code", found: other.into() }),
        })
    }
}

/// One message of a data stream.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::large_enum_variant, reason = "frames are few and pass by value from stream to session")]
pub enum Frame {
    /// Sender, first on stream 0: claims a volume.
    Open {
        /// Protocol version chosen by `Hello`.
        protocol: u16,
        /// Volume.
        volume: VolumeId,
        /// Its incarnation.
        incarnation: Incarnation,
        /// This start of the sender.
        session: SessionId,
        /// Data streams of the session, stream 0 included.
        streams: u8,
        /// The newest close the sender knows to be committed.
        known: CloseId,
        /// Closes that it journaled after `known`, in the order of their parent chain.
        journaled: Vec<CloseId>,
        /// Epochs still open in this very session, to be resumed. Empty at a first connection.
        resume: Vec<Epoch>,
    },
    /// Sender, first on streams 1 and up.
    Attach {
        /// The session opened on stream 0 of the same connection.
        session: SessionId,
        /// Index of this stream.
        stream: u8,
    },
    /// Receiver, on stream 0: the claim is granted.
    Opened {
        /// Newest committed close.
        committed: CloseId,
        /// Newest close that is staged or committed; closes after it must be made anew.
        tip: CloseId,
        /// Smallest number that a new epoch may take.
        next_epoch: Epoch,
        /// Staged records of resumed epochs follow in this many [`Frame::StagedRecords`].
        lists: u32,
    },
    /// Receiver, on stream 0, after `Opened`: what is staged of a resumed epoch.
    StagedRecords {
        /// Epoch.
        epoch: Epoch,
        /// First block and tag of each staged record.
        records: Vec<(BlockIndex, SealTag)>,
    },
    /// Sender: one record; `seq` counts the records of this stream of this connection from 1.
    Record {
        /// Position on the stream.
        seq: u64,
        /// The record.
        record: Record,
    },
    /// Receiver: all records of this stream up to `seq` are durable in the stage.
    Staged {
        /// Position on the stream.
        seq: u64,
    },
    /// Sender, on stream 0: ends an epoch. Records of it may still be under way on other streams.
    Close(Close),
    /// Receiver, on stream 0: the close and all records of its epoch are durable in the stage.
    Closed {
        /// Epoch.
        epoch: Epoch,
        /// Its close.
        close: CloseId,
    },
    /// Receiver, on stream 0: the close is committed, and with it all before it.
    Committed {
        /// Epoch.
        epoch: Epoch,
        /// Its close.
        close: CloseId,
        /// Records of the session so far that the receiver held already.
        records_resent: u64,
    },
    /// Sender, on stream 0: this open epoch will not be closed; its stage may go.
    Drop {
        /// Epoch.
        epoch: Epoch,
    },
    /// Either: the session ends for this reason.
    Refused {
        /// Reason.
        code: RefusalCode,
        /// For people.
        text: String,
    },
}

impl Frame {
    fn kind(&self) -> u8 {
        match self {
            Self::Open { .. } => 1,
            Self::Attach { .. } => 2,
            Self::Opened { .. } => 3,
            Self::StagedRecords { .. } => 4,
            Self::Record { .. } => 5,
            Self::Staged { .. } => 6,
            Self::Close(_) => 7,
            Self::Closed { .. } => 8,
            Self::Committed { .. } => 9,
            Self::Drop { .. } => 10,
            Self::Refused { .. } => 11,
        }
    }

    /// The frame's bytes: head and fields, and for a record its bytes apart, so that they need no copying.
    ///
    /// # Panics
    /// If a list is longer than its bound in [`limits`]: a bug of the session.
    #[must_use]
    pub fn encode(&self) -> (Bytes, Option<Bytes>) {
        let mut writer = Writer::with_capacity(128);
        writer.raw(&[0; FRAME_HEAD_BYTES]);
        let mut payload = None;
        match self {
            Self::Open { protocol, volume, incarnation, session, streams, known, journaled, resume } => {
                writer
                    .u16(*protocol)
                    .u8(*streams)
                    .u8(0)
                    .raw(&volume.0)
                    .u32(incarnation.0)
                    .raw(&session.0)
                    .raw(&known.0)
                    .count(journaled.len());
                journaled.iter().for_each(|close| {
                    writer.raw(&close.0);
                });
                writer.count(resume.len());
                resume.iter().for_each(|epoch| {
                    writer.u64(epoch.0);
                });
            }
            Self::Attach { session, stream } => {
                writer.raw(&session.0).u8(*stream);
            }
            Self::Opened { committed, tip, next_epoch, lists } => {
                writer.raw(&committed.0).raw(&tip.0).u64(next_epoch.0).u32(*lists);
            }
            Self::StagedRecords { epoch, records } => {
                assert!(records.len() <= limits::STAGED_LIST_MAX, "the session splits longer lists");
                writer.u64(epoch.0).count(records.len());
                records.iter().for_each(|(block, tag)| {
                    writer.u64(block.0).raw(&tag.0);
                });
            }
            Self::Record { seq, record } => {
                writer.u64(*seq);
                payload = Some(record.bytes().clone());
            }
            Self::Staged { seq } => {
                writer.u64(*seq);
            }
            Self::Close(close) => {
                writer.raw(close.bytes());
            }
            Self::Closed { epoch, close } => {
                writer.u64(epoch.0).raw(&close.0);
            }
            Self::Committed { epoch, close, records_resent } => {
                writer.u64(epoch.0).raw(&close.0).u64(*records_resent);
            }
            Self::Drop { epoch } => {
                writer.u64(epoch.0);
            }
            Self::Refused { code, text } => {
                let end = text.floor_char_boundary(limits::ERROR_TEXT_BYTES_MAX);
                writer.u16(code.to_wire()).block(&text.as_bytes()[..end]);
            }
        }
        let mut bytes = writer.into_vec();
        let body_len = bytes.len() - FRAME_HEAD_BYTES + payload.as_ref().map_or(0, Bytes::len);
        bytes[..4].copy_from_slice(&(body_len as u32).to_le_bytes());
        bytes[4] = self.kind();
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..8]), &bytes[FRAME_HEAD_BYTES..]);
        bytes[8..FRAME_HEAD_BYTES].copy_from_slice(&crc.to_le_bytes());
        (bytes.into(), payload)
    }

    /// Takes the first frame off `buffer`, or `None` where it is not all there yet. A record's bytes are shared with the
    /// buffer, not copied.
    ///
    /// # Errors
    /// Any [`FormatError`]; the stream is of no use after one. A length over [`limits::FRAME_BYTES_MAX`] is refused before
    /// anything is awaited.
    pub fn take(buffer: &mut BytesMut) -> Result<Option<Self>, FormatError> {
        let Some(head) = FrameHead::peek(buffer)? else { return Ok(None) };
        if buffer.len() < FRAME_HEAD_BYTES + head.body_len {
            return Ok(None);
        }
        let mut frame = buffer.split_to(FRAME_HEAD_BYTES + head.body_len);
        let first = crc32c::crc32c(&frame[..8]);
        frame.advance(FRAME_HEAD_BYTES);
        Self::decode(&head, first, frame.freeze()).map(Some)
    }

    fn decode(head: &FrameHead, crc_of_head: u32, body: Bytes) -> Result<Self, FormatError> {
        let is_record = head.kind == 5;
        let covered = if is_record { body.len().min(SEQ_BYTES) } else { body.len() };
        if crc32c::crc32c_append(crc_of_head, &body[..covered]) != head.crc {
            return Err(FormatError::Checksum { what: WHAT });
        }
        let mut reader = Reader::new(WHAT, &body);
        let frame = match head.kind {
            1 => {
                let (protocol, streams, reserved) = (reader.u16()?, reader.u8()?, reader.u8()?);
                if streams == 0 || usize::from(streams) > limits::STREAMS_PER_SESSION_MAX || reserved != 0 {
                    return Err(FormatError::Invalid { what: "stream count", found: streams.into() });
                }
                let (volume, incarnation) = (VolumeId(reader.array()?), Incarnation(reader.u32()?));
                let (session, known) = (SessionId(reader.array()?), CloseId(reader.array()?));
                let count = reader.count("journaled closes", limits::EPOCHS_IN_FLIGHT_MAX * 4, 32)?;
                let journaled = (0..count).map(|_| reader.array().map(CloseId)).collect::<Result<_, _>>()?;
                let count = reader.count("epochs to resume", limits::EPOCHS_IN_FLIGHT_MAX * 4, 8)?;
                let resume = (0..count).map(|_| reader.u64().map(Epoch)).collect::<Result<_, _>>()?;
                Self::Open { protocol, volume, incarnation, session, streams, known, journaled, resume }
            }
            2 => Self::Attach { session: SessionId(reader.array()?), stream: reader.u8()? },
            3 => Self::Opened {
                committed: CloseId(reader.array()?),
                tip: CloseId(reader.array()?),
                next_epoch: Epoch(reader.u64()?),
                lists: reader.u32()?,
            },
            4 => {
                let epoch = Epoch(reader.u64()?);
                let count = reader.count("staged records", limits::STAGED_LIST_MAX, 24)?;
                let mut records = Vec::with_capacity(count);
                for _ in 0..count {
                    records.push((BlockIndex(reader.u64()?), SealTag(reader.array()?)));
                }
                Self::StagedRecords { epoch, records }
            }
            5 => {
                let seq = reader.u64()?;
                return Ok(Self::Record { seq, record: Record::parse(body.slice(SEQ_BYTES..))? });
            }
            6 => Self::Staged { seq: reader.u64()? },
            7 => return Ok(Self::Close(Close::decode(&body)?)),
            8 => Self::Closed { epoch: Epoch(reader.u64()?), close: CloseId(reader.array()?) },
            9 => Self::Committed {
                epoch: Epoch(reader.u64()?),
                close: CloseId(reader.array()?),
                records_resent: reader.u64()?,
            },
            10 => Self::Drop { epoch: Epoch(reader.u64()?) },
            11 => Self::Refused {
                code: RefusalCode::from_wire(reader.u16()?)?,
                text: reader.text("refusal", limits::ERROR_TEXT_BYTES_MAX)?,
            },
            other => return Err(FormatError::Invalid { what: "frame kind", found: other.into() }),
        };
        reader.finish()?;
        Ok(frame)
    }
}

/// The fixed part of a frame, so that a reader knows how much to await, and to charge to its budget, before it reads on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHead {
    /// Bytes of the body.
    pub body_len: usize,
    kind: u8,
    crc: u32,
}

impl FrameHead {
    /// Reads the head at the front of `buffer`; `None` where it is not all there yet.
    ///
    /// # Errors
    /// [`FormatError::OverLimit`], [`FormatError::Invalid`].
    pub fn peek(buffer: &[u8]) -> Result<Option<Self>, FormatError> {
        let Some(head) = buffer.get(..FRAME_HEAD_BYTES) else { return Ok(None) };
        let mut reader = Reader::new(WHAT, head);
        let (body_len, kind) = (reader.u32()? as usize, reader.u8()?);
        if reader.array::<3>()? != [0; 3] {
            return Err(FormatError::Invalid { what: "frame reserved bytes", found: 1 });
        }
        if body_len > limits::FRAME_BYTES_MAX {
            return Err(FormatError::OverLimit {
                what: "frame length",
                found: body_len as u64,
                limit: limits::FRAME_BYTES_MAX as u64,
            });
        }
        if kind == 0 || kind > 11 {
            return Err(FormatError::Invalid { what: "frame kind", found: kind.into() });
        }
        Ok(Some(Self { body_len, kind, crc: reader.u32()? }))
    }

    /// True where the frame carries a record, whose bytes are payload to be charged to the budget.
    #[must_use]
    pub fn is_record(&self) -> bool {
        self.kind == 5
    }
}

/// Checks a stream's preamble.
///
/// # Errors
/// [`FormatError::WrongMagic`], [`FormatError::UnknownVersion`].
pub fn check_preamble(bytes: [u8; 8]) -> Result<(), FormatError> {
    if bytes[..6] != PREAMBLE[..6] {
        return Err(FormatError::WrongMagic { what: "stream" });
    }
    let version = u16::from_le_bytes([bytes[6], bytes[7]]);
    if version != 1 {
        return Err(FormatError::UnknownVersion { what: "stream", found: version, known: 1 });
    }
    Ok(())
}

const _: () = assert!(limits::CLOSE_BYTES_MAX + envelope::OVERHEAD_BYTES < limits::FRAME_BYTES_MAX);
