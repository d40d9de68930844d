//! The session protocol: one sender's claim to write one volume, and what flows while it holds. Pure and sans-io.
//!
//! [`SenderSession`] and [`ReceiverSession`] are state machines: drivers feed them frames and facts (`handle_*`, `offer_*`)
//! and take out what is to be sent or done (`poll_*`, call until `None`). Neither knows sockets, files, time or chance.
//!
//! # Streams
//! A session is 1 to [`limits::STREAMS_PER_SESSION_MAX`] bidirectional streams of one connection. Stream 0 carries control
//! both ways, and records; the others start with `Attach` and carry records one way and `Staged` the other. Within a stream
//! order holds, between streams none.
//!
//! ```text
//! sender                                     receiver
//!   Open{session, known, journaled, resume} ─▶   claim: same session = resume, other = supersede
//!   ◀─ Opened{committed, tip, next_epoch, lists}, StagedRecords × lists      (or Refused)
//!   Attach on streams 1…  ─▶
//!   Record{seq}           ─▶                     staged durably, then
//!   ◀─ Staged{seq}                               cumulative per stream
//!   Close                 ─▶                     when all its records are staged: checked, staged durably, then
//!   ◀─ Closed{epoch}
//!   ◀─ Committed{epoch}                          when its log entry is in the store
//!   Drop{epoch}           ─▶                     an open epoch that will never be closed
//! ```
//!
//! # What is granted
//! The receiver's *tip* is the newest close that it holds, staged or committed. A claim is granted where the tip is the
//! sender's `known` close or one it journaled after that; else the sender is a clone or a rollback, and refused as
//! `Diverged`. Closes that the sender journaled after the tip were never staged, and the sender discards them.
//!
//! # What is resumed
//! On a claim the receiver first waits until nothing is on its way into the stage, so that what it lists is exact. It keeps
//! the open epochs that the claim resumes, drops the others, and lists what is staged of them by block and tag; only
//! what is not listed travels again, and closes after the tip. Where the receiver restarted meanwhile, the session's id is
//! forgotten, but epochs are never reused and tags are compared, so the same holds. Another session id supersedes: all open
//! epochs are dropped, never forwarded. If what was once acknowledged is gone, the sender reports `StageLost`, forgets
//! all after the tip, and its owner marks those pages dirty.
//!
//! # Promises
//! - A record or close is acknowledged only after the driver said that it is durable.
//! - Closes are handed out one at a time in parent order, each with all of its records staged, each record staged once.
//! - What was acknowledged to the sender is never sent again by the same session.
//! - Bounded: epochs, records per epoch, lists; the sender's queue by the permits of its records.
//!
//! # What is refused
//! As `BadMessage`: frames out of place or sequence, records of another volume or beyond the disk, records of ended epochs,
//! two different records of one block in one epoch, too many epochs or records, closes whose parent is not the newest close.

mod receiver;
mod sender;

#[cfg(test)]
mod tests;

pub use receiver::{Facts, ReceiverEvent, ReceiverSession, StagedRecord, Ticket};
pub use sender::{Offer, OfferError, SenderConfig, SenderEvent, SenderSession};

use crate::error::{Dispose, Disposition};
use crate::format::frame::{Frame, RefusalCode};
use crate::ids::{BlockIndex, CloseId, Epoch, Incarnation, SessionId, VolumeId};
#[cfg(doc)]
use crate::limits;

/// Version of the session protocol that this software speaks.
pub const PROTOCOL: u16 = 1;

/// A closed epoch: its number and the name of its close.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClosedEpoch {
    /// Number.
    pub epoch: Epoch,
    /// Close.
    pub close: CloseId,
}

/// The content of an `Open` frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Protocol version.
    pub protocol: u16,
    /// Volume.
    pub volume: VolumeId,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// The start of the sender that claims it.
    pub session: SessionId,
    /// Streams, stream 0 included.
    pub streams: u8,
    /// Newest close that the sender knows to be committed.
    pub known: CloseId,
    /// Closes that it journaled after `known`, in parent order.
    pub journaled: Vec<CloseId>,
    /// Open epochs to be resumed.
    pub resume: Vec<Epoch>,
}

impl Claim {
    /// The claim in an `Open` frame; any other frame is given back.
    ///
    /// # Errors
    /// The frame, where it is not `Open`.
    pub fn from_frame(frame: Frame) -> Result<Self, Box<Frame>> {
        match frame {
            Frame::Open { protocol, volume, incarnation, session, streams, known, journaled, resume } => {
                Ok(Self { protocol, volume, incarnation, session, streams, known, journaled, resume })
            }
            other => Err(Box::new(other)),
        }
    }

    fn into_frame(self) -> Frame {
        let Self { protocol, volume, incarnation, session, streams, known, journaled, resume } = self;
        Frame::Open { protocol, volume, incarnation, session, streams, known, journaled, resume }
    }
}

/// A frame of the peer that breaks the protocol. The session is of no more use on this connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// A frame that has no place here.
    #[error("stream {stream}: {frame} frame is out of place")]
    Unexpected {
        /// Kind of frame.
        frame: &'static str,
        /// Stream.
        stream: u8,
    },
    /// A stream that the session does not have.
    #[error("stream {stream} does not exist: the session has {streams}")]
    NoSuchStream {
        /// Stream.
        stream: u8,
        /// Streams of the session.
        streams: u8,
    },
    /// Records or acknowledgements out of sequence.
    #[error("stream {stream}: expected sequence number {expected}, found {found}")]
    Sequence {
        /// Stream.
        stream: u8,
        /// Expected next, or highest allowed.
        expected: u64,
        /// Found.
        found: u64,
    },
    /// A record or close of another volume or incarnation, or beyond the end of the disk.
    #[error(
        "record or close of {found} (incarnation {incarnation}) does not belong on {expected}, or lies beyond its end"
    )]
    WrongPlace {
        /// Volume of the session.
        expected: VolumeId,
        /// Volume found.
        found: VolumeId,
        /// Incarnation found.
        incarnation: Incarnation,
    },
    /// A record or close of an epoch that has ended.
    #[error("epoch {found} has ended: the newest close is of epoch {tip}")]
    EpochEnded {
        /// Epoch found.
        found: Epoch,
        /// Epoch of the newest close.
        tip: Epoch,
    },
    /// Two different records of one block in one epoch.
    #[error("epoch {epoch} holds another record of block {block}")]
    RecordDiffers {
        /// Epoch.
        epoch: Epoch,
        /// Block.
        block: BlockIndex,
    },
    /// More of something than the protocol allows.
    #[error("{what}: {found} is over the limit of {limit}")]
    OverLimit {
        /// What.
        what: &'static str,
        /// Found.
        found: u64,
        /// Allowed.
        limit: u64,
    },
    /// A close whose parent is not the newest close.
    #[error("close of epoch {epoch} names parent {found}, expected {expected}")]
    WrongParent {
        /// Epoch.
        epoch: Epoch,
        /// Newest close.
        expected: CloseId,
        /// Parent named.
        found: CloseId,
    },
    /// A close that states another number of records than were sent.
    #[error("close of epoch {epoch} states {stated} records, but there are {found}")]
    RecordCount {
        /// Epoch.
        epoch: Epoch,
        /// Stated.
        stated: u64,
        /// Found.
        found: u64,
    },
    /// The peer speaks of a close that this side has never heard of.
    #[error("close {close} is not one that this sender made: its state is a copy or older than the log")]
    UnknownClose {
        /// Close.
        close: CloseId,
    },
}

impl Dispose for SessionError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::UnknownClose { .. } => Disposition::BadInput,
            _ => Disposition::Reconnect,
        }
    }
}

impl SessionError {
    /// The code under which the peer is told.
    #[must_use]
    pub fn refusal(&self) -> RefusalCode {
        match self {
            Self::UnknownClose { .. } => RefusalCode::Diverged,
            _ => RefusalCode::BadMessage,
        }
    }
}

/// Name of a frame's kind, for errors.
fn kind(frame: &Frame) -> &'static str {
    match frame {
        Frame::Open { .. } => "Open",
        Frame::Attach { .. } => "Attach",
        Frame::Opened { .. } => "Opened",
        Frame::StagedRecords { .. } => "StagedRecords",
        Frame::Record { .. } => "Record",
        Frame::Staged { .. } => "Staged",
        Frame::Close(_) => "Close",
        Frame::Closed { .. } => "Closed",
        Frame::Committed { .. } => "Committed",
        Frame::Drop { .. } => "Drop",
        Frame::Refused { .. } => "Refused",
    }
}
