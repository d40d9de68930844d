//! One stream of a session: reads its frames, each record after the stage and the budget let it in, and writes what the
//! session has for it.

use std::time::Duration;

use bytes::{BufMut as _, BytesMut};
use common::budget::{BudgetError, Permit};
use common::format::FormatError;
use common::format::frame::{FRAME_HEAD_BYTES, Frame, FrameHead, PREAMBLE, RefusalCode, check_preamble};
use common::session::SessionError;
use quinn::{RecvStream, SendStream, VarInt};
use tokio::io::AsyncReadExt as _;

use super::connection::{Session, Sessions};
use super::{Acceptor, count};
use crate::volumes::{Superseded, VolumeError};

/// Code of streams reset because the session ended.
pub(super) const ENDED: VarInt = VarInt::from_u32(1);
/// Largest frame of a sender that is no record; the largest is `Open` with full lists.
const CONTROL_BYTES_MAX: usize = 8 << 10;
/// How long a refusal may take to be delivered.
const REFUSAL_TIME: Duration = Duration::from_secs(2);

/// Why a stream is of no more use.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    /// The peer ended it, or the connection is gone.
    #[error("the stream ended: {0}")]
    Gone(String),
    /// The peer paused within a frame for too long.
    #[error("a frame was begun and not finished in time")]
    Paused,
    /// Not a frame.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A frame that breaks the protocol; the session has ended itself.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A later connection has the volume.
    #[error(transparent)]
    Superseded(#[from] Superseded),
    /// The stage takes nothing more.
    #[error(transparent)]
    Stage(#[from] VolumeError),
    /// The stage is full and goes on with another volume of this connection.
    #[error("the stage is full and another volume goes first")]
    PassedOver,
    /// A record can never fit the budget.
    #[error(transparent)]
    Budget(#[from] BudgetError),
}

/// Takes frames off a stream, one at a time, never reading ahead of what was let in.
pub(super) struct FrameReader {
    recv: RecvStream,
    pause_time: Duration,
}

/// A frame whose head was read.
struct Begun {
    head: FrameHead,
    bytes: [u8; FRAME_HEAD_BYTES],
}

impl FrameReader {
    pub(super) fn new(recv: RecvStream, pause_time: Duration) -> Self {
        Self { recv, pause_time }
    }

    /// Preamble and first frame, which is no record. Not safe to cancel.
    pub(super) async fn first(&mut self) -> Result<Frame, ReadError> {
        let mut preamble = [0; PREAMBLE.len()];
        self.recv.read_exact(&mut preamble).await.map_err(gone)?;
        check_preamble(preamble)?;
        let begun = self.begin().await?;
        if begun.head.is_record() {
            return Err(FormatError::Invalid { what: "first frame", found: 5 }.into());
        }
        self.finish(begun).await
    }

    /// Waits, for as long as it takes, for the next frame's head.
    async fn begin(&mut self) -> Result<Begun, ReadError> {
        let mut bytes = [0; FRAME_HEAD_BYTES];
        let begun =
            self.recv.read(&mut bytes).await.map_err(gone)?.ok_or_else(|| ReadError::Gone("finished".into()))?;
        let rest = self.recv.read_exact(&mut bytes[begun..]);
        tokio::time::timeout(self.pause_time, rest).await.map_err(|_| ReadError::Paused)?.map_err(gone)?;
        let head = FrameHead::peek(&bytes)?.ok_or(FormatError::Truncated {
            what: "frame",
            needed: FRAME_HEAD_BYTES as u64,
            found: 0,
        })?;
        if !head.is_record() && head.body_len > CONTROL_BYTES_MAX {
            let (found, limit) = (head.body_len as u64, CONTROL_BYTES_MAX as u64);
            return Err(FormatError::OverLimit { what: "control frame length", found, limit }.into());
        }
        Ok(Begun { head, bytes })
    }

    /// Reads the rest into memory of exactly the frame's size, which a record then keeps.
    async fn finish(&mut self, begun: Begun) -> Result<Frame, ReadError> {
        let len = FRAME_HEAD_BYTES + begun.head.body_len;
        let mut frame = BytesMut::with_capacity(len);
        frame.extend_from_slice(&begun.bytes);
        while frame.len() < len {
            let missing = len - frame.len();
            let mut rest = (&mut frame).limit(missing);
            let read = tokio::time::timeout(self.pause_time, self.recv.read_buf(&mut rest));
            if read.await.map_err(|_| ReadError::Paused)?.map_err(gone)? == 0 {
                return Err(ReadError::Gone("it was cut within a frame".into()));
            }
        }
        Frame::take(&mut frame)?.ok_or_else(|| ReadError::Gone("it was cut within a frame".into()))
    }
}

fn gone(error: impl std::fmt::Display) -> ReadError {
    ReadError::Gone(error.to_string())
}

/// Serves stream 0 until the session is over on this connection.
pub(super) async fn serve_control(
    acceptor: &Acceptor,
    sessions: &Sessions,
    session: &Session,
    send: SendStream,
    mut reader: FrameReader,
) {
    let writing = write_control(session, send);
    tokio::pin!(writing);
    let error = tokio::select! {
        // The writer ends once it has told the peer that the session is over, or can't write any more.
        () = &mut writing => return,
        error = read(acceptor, sessions, session, 0, &mut reader) => error,
    };
    note(session, &error);
    if !matches!(error, ReadError::Gone(_)) {
        // What the session has to say about it goes out first.
        let _ = tokio::time::timeout(2 * REFUSAL_TIME, writing).await;
    }
}

/// Serves a stream of records until the session is over on this connection.
pub(super) async fn serve_attached(
    acceptor: &Acceptor,
    sessions: &Sessions,
    session: &Session,
    stream: u8,
    mut send: SendStream,
    mut reader: FrameReader,
) {
    tokio::select! {
        () = session.over.cancelled() => {}
        _ = write_frames(session, stream, &mut send) => {}
        error = read(acceptor, sessions, session, stream, &mut reader) => {
            note(session, &error);
            // A session that lost a stream can't go on; stream 0 tells why, or finds the connection gone.
            if !matches!(error, ReadError::Superseded(_) | ReadError::PassedOver) {
                let text = format!("stream {stream}: {error}");
                session.volume.refuse(&session.scope, RefusalCode::GoingAway, text);
            }
            session.over.cancelled().await;
        }
    }
    drop(send.reset(ENDED));
}

/// Counts what went wrong, and ends the session where it does not know yet.
fn note(session: &Session, error: &ReadError) {
    let (kind, refusal) = match error {
        ReadError::Gone(_) | ReadError::Superseded(_) => return,
        // The session counts it and has refused by itself.
        ReadError::Session(_) => return,
        ReadError::PassedOver => {
            count("stage_full");
            return session.volume.give_way(&session.scope);
        }
        ReadError::Paused => ("slow_stream", RefusalCode::GoingAway),
        ReadError::Format(_) => ("bad_frame", RefusalCode::BadMessage),
        ReadError::Stage(error) => (error.kind(), error.refusal()),
        ReadError::Budget(_) => ("budget", RefusalCode::Failed),
    };
    count(kind);
    session.volume.refuse(&session.scope, refusal, error.to_string());
}

/// Reads until something ends it.
async fn read(
    acceptor: &Acceptor,
    sessions: &Sessions,
    session: &Session,
    stream: u8,
    reader: &mut FrameReader,
) -> ReadError {
    match read_frames(acceptor, sessions, session, stream, reader).await {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

async fn read_frames(
    acceptor: &Acceptor,
    sessions: &Sessions,
    session: &Session,
    stream: u8,
    reader: &mut FrameReader,
) -> Result<std::convert::Infallible, ReadError> {
    let received = metrics::counter!("blockferry_receiver_received_bytes_total");
    let (volume, scope) = (&session.volume, &session.scope);
    let intake = acceptor.volumes.staging().intake_of(volume.id());
    let shares_window = |other| sessions.shares_window(other);
    loop {
        let begun = reader.begin().await?;
        let len = (FRAME_HEAD_BYTES + begun.head.body_len) as u64;
        if !begun.head.is_record() {
            let frame = reader.finish(begun).await?;
            volume.handle_frame(scope, stream, frame)??;
            continue;
        }
        // First the stage, since who waits for it must not sit on memory.
        tokio::select! {
            biased;
            admitted = intake.admit() => admitted?,
            // Unread here it would fill the window of the connection, and the other's records could not come.
            () = intake.passed_over(&shares_window) => return Err(ReadError::PassedOver),
        }
        let permit: Permit = acceptor.budget.acquire(len).await?;
        let Frame::Record { seq, record } = reader.finish(begun).await? else {
            return Err(FormatError::Invalid { what: "frame kind", found: 0 }.into());
        };
        received.increment(len);
        // Hashed here, where it is in cache and each stream has a task of its own.
        let meta = record.meta();
        volume.handle_record(scope, stream, seq, record, meta, permit)??;
    }
}

/// Writes stream 0 until the peer was told that the session is over, or can't be told anything any more.
async fn write_control(session: &Session, mut send: SendStream) {
    match write_frames(session, 0, &mut send).await {
        Ok(()) => deliver(send).await,
        Err(_) => drop(send.reset(ENDED)),
    }
}

/// Waits a moment until the peer has the last frame, or has gone.
async fn deliver(mut send: SendStream) {
    drop(send.finish());
    let _ = tokio::time::timeout(REFUSAL_TIME, send.stopped()).await;
}

/// Writes until the session is over (its last frame was written) or the stream can't be written.
async fn write_frames(session: &Session, stream: u8, send: &mut SendStream) -> Result<(), quinn::WriteError> {
    let (volume, scope) = (&session.volume, &session.scope);
    send.write_all(&PREAMBLE).await?;
    loop {
        let more = volume.frames();
        tokio::pin!(more);
        more.as_mut().enable();
        let frame = match volume.poll_frame(scope, stream) {
            Ok(Some(frame)) => frame,
            Ok(None) => {
                tokio::select! {
                    () = more => {}
                    () = scope.over() => {}
                }
                continue;
            }
            Err(superseded) => Frame::Refused { code: RefusalCode::Superseded, text: superseded.to_string() },
        };
        let last = matches!(frame, Frame::Refused { .. });
        if stream != 0 && last {
            // Stream 0 tells.
            session.over.cancelled().await;
            return Ok(());
        }
        let (head, payload) = frame.encode();
        match payload {
            None => send.write_all_chunks(&mut [head]).await?,
            Some(payload) => send.write_all_chunks(&mut [head, payload]).await?,
        }
        if last {
            return Ok(());
        }
    }
}

/// Refuses a claim before there is a session.
pub(super) async fn refuse(mut send: SendStream, code: RefusalCode, text: String) {
    let (head, _) = Frame::Refused { code, text }.encode();
    if send.write_all(&PREAMBLE).await.is_ok() && send.write_all_chunks(&mut [head]).await.is_ok() {
        deliver(send).await;
    }
}
