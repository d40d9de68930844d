//! One volume's session over whatever connection there is.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use common::budget::Permit;
use common::error::{Dispose, Disposition};
use common::format::FormatError;
use common::format::close::Close;
use common::format::frame::{FRAME_HEAD_BYTES, Frame, PREAMBLE, RefusalCode, check_preamble};
use common::format::record::Record;
use common::ids::{Epoch, SessionId};
use common::net::backoff::Backoff;
use common::net::quic::peer_identity;
use common::rng;
use common::session::{Offer, SenderConfig, SenderEvent, SenderSession, SessionError};
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::connection::{CLOSED_LEAVING, random};
use super::{Choice, Place, SendError};

/// Most bytes taken off a stream at once; what comes back is small.
const READ_BYTES: usize = 64 << 10;
/// How long a refusal may take to arrive behind the reset of a stream.
const REFUSAL_TIME: std::time::Duration = std::time::Duration::from_secs(1);
/// Refusals because of its own failure after which a receiver is left for another one.
const FAILURES_MAX: u32 = 3;
/// Longest pause between leaving a receiver and the look for a connection to another one.
const LEAVE_TIME: std::time::Duration = std::time::Duration::from_millis(20);
/// Code of streams reset because the session ended.
const ENDED: quinn::VarInt = quinn::VarInt::from_u32(1);

/// What was sent of a volume so far, each transmission counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sent {
    /// Records.
    pub records: u64,
    /// Their bytes with the frames around them.
    pub bytes: u64,
}

struct Shared {
    name: String,
    session: Mutex<SenderSession<Permit>>,
    /// Writers look for frames again.
    frames: Notify,
    /// Those who wait to offer a record look again.
    room: Notify,
    /// The owner looks for events again.
    events: Notify,
    ended: AtomicBool,
    sent_records: AtomicU64,
    sent_bytes: AtomicU64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, SenderSession<Permit>> {
        // A panic inside the session would be a bug; the state is then no worse than what the receiver would refuse.
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.frames.notify_waiters();
        self.room.notify_waiters();
        self.events.notify_one();
    }

    fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.changed();
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

/// Takes a volume's records and closes. Clones are the same session; it ends when the last one is dropped.
#[derive(Clone)]
pub struct VolumeSender {
    shared: Arc<Shared>,
    /// Ends the session's task with the last clone.
    _alive: Arc<tokio_util::sync::DropGuard>,
}

impl std::fmt::Debug for VolumeSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VolumeSender({})", self.shared.name)
    }
}

impl VolumeSender {
    /// Offers a record: waits while too much is outstanding. Its permit is given back once it is staged. Not safe to cancel:
    /// the record is lost with the future.
    ///
    /// # Errors
    /// [`SendError::Ended`], [`SendError::Offer`]; the record is discarded then.
    pub async fn send_record(&self, record: Record, permit: Permit) -> Result<Offer, SendError> {
        let shared = &*self.shared;
        loop {
            let room = shared.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if shared.has_ended() {
                return Err(SendError::Ended);
            }
            {
                let mut session = shared.lock();
                if session.wants_records() {
                    let offer = session.offer_record(record, permit)?;
                    drop(session);
                    // Any stream will do, so one idle writer is enough.
                    shared.frames.notify_one();
                    return Ok(offer);
                }
            }
            room.await;
        }
    }

    /// Waits until a record may be offered, or the session has ended. Safe to cancel.
    pub async fn room(&self) {
        let shared = &*self.shared;
        loop {
            let room = shared.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if shared.has_ended() || shared.lock().wants_records() {
                return;
            }
            room.await;
        }
    }

    /// As [`Self::send_record`], for threads outside the runtime: never waits; what is outstanding is bounded by the permits
    /// alone then.
    ///
    /// # Errors
    /// As [`Self::send_record`].
    pub fn send_record_now(&self, record: Record, permit: Permit) -> Result<Offer, SendError> {
        if self.shared.has_ended() {
            return Err(SendError::Ended);
        }
        let offer = self.shared.lock().offer_record(record, permit)?;
        self.shared.frames.notify_one();
        Ok(offer)
    }

    /// Offers a close, which is durable in the journal already, after all of its epoch's records.
    ///
    /// # Errors
    /// [`SendError::Ended`], [`SendError::Offer`].
    pub fn close(&self, close: Close) -> Result<Offer, SendError> {
        if self.shared.has_ended() {
            return Err(SendError::Ended);
        }
        let offer = self.shared.lock().offer_close(close)?;
        self.shared.frames.notify_waiters();
        Ok(offer)
    }

    /// Gives up an open epoch. See [`SenderSession::drop_epoch`].
    pub fn drop_epoch(&self, epoch: Epoch) {
        self.shared.lock().drop_epoch(epoch);
        self.shared.changed();
    }

    /// After [`SenderEvent::StageLost`], once what is behind the tip is forgotten. See [`SenderSession::restart`].
    pub fn restart(&self, from: Epoch) {
        self.shared.lock().restart(from);
    }

    /// Epochs begun and not yet committed; see [`SenderSession::epochs_in_flight`].
    #[must_use]
    pub fn epochs_in_flight(&self) -> usize {
        self.shared.lock().epochs_in_flight()
    }

    /// Bytes of records that the receiver does not hold yet.
    #[must_use]
    pub fn unacked_bytes(&self) -> u64 {
        self.shared.lock().unacked_bytes()
    }

    /// What was sent so far.
    #[must_use]
    pub fn sent(&self) -> Sent {
        Sent {
            records: self.shared.sent_records.load(Ordering::Relaxed),
            bytes: self.shared.sent_bytes.load(Ordering::Relaxed),
        }
    }
}

/// What a volume's session tells its owner.
pub struct VolumeEvents(Arc<Shared>);

impl std::fmt::Debug for VolumeEvents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VolumeEvents({})", self.0.name)
    }
}

impl VolumeEvents {
    /// The next event; `None` once the session has ended. After a refusal as `GoingAway` or `Failed` the session is tried
    /// again by itself; any other is the last event. Safe to cancel.
    pub async fn next(&mut self) -> Option<SenderEvent> {
        loop {
            let ended = self.0.has_ended();
            if let Some(event) = self.0.lock().poll_event() {
                return Some(event);
            }
            if ended {
                return None;
            }
            self.0.events.notified().await;
        }
    }
}

pub(super) fn open(
    name: &str,
    config: SenderConfig,
    connection: watch::Receiver<Option<Connection>>,
    choice: Choice,
    stop: CancellationToken,
    place: Place,
) -> (VolumeSender, VolumeEvents) {
    let shared = Arc::new(Shared {
        name: name.to_owned(),
        session: Mutex::new(SenderSession::new(config)),
        frames: Notify::new(),
        room: Notify::new(),
        events: Notify::new(),
        ended: AtomicBool::new(false),
        sent_records: AtomicU64::new(0),
        sent_bytes: AtomicU64::new(0),
    });
    let alive = Arc::new(stop.clone().drop_guard());
    tokio::spawn(run(Arc::clone(&shared), connection, choice, stop, place));
    (VolumeSender { shared: Arc::clone(&shared), _alive: alive }, VolumeEvents(shared))
}

/// Why a session stopped running on a connection.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("the connection broke: {0}")]
    Connection(#[from] quinn::ConnectionError),
    #[error("a stream could not be written: {0}")]
    Write(#[from] quinn::WriteError),
    #[error("a stream could not be read: {0}")]
    Read(#[from] quinn::ReadError),
    #[error("the receiver ended a stream")]
    Finished,
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("the receiver refused: {1}")]
    Refused(RefusalCode, String),
    #[error("a task of the session failed")]
    Task,
}

/// Where the session goes from here.
enum Next {
    /// The same again, at once when there is a connection.
    Again,
    /// The same again after a while.
    Later,
    /// The same at another receiver, now.
    Elsewhere,
    /// No more.
    Never,
}

impl Broken {
    fn next(&self) -> Next {
        match self {
            Self::Connection(_) | Self::Write(_) | Self::Read(_) => Next::Again,
            Self::Refused(RefusalCode::Draining, _) => Next::Elsewhere,
            Self::Refused(RefusalCode::GoingAway | RefusalCode::Failed | RefusalCode::Fenced, _) => Next::Later,
            Self::Refused(..) => Next::Never,
            Self::Session(error) if error.disposition() == Disposition::BadInput => Next::Never,
            Self::Finished | Self::Format(_) | Self::Session(_) | Self::Task => Next::Later,
        }
    }
}

async fn run(
    shared: Arc<Shared>,
    mut connection: watch::Receiver<Option<Connection>>,
    choice: Choice,
    stop: CancellationToken,
    _place: Place,
) {
    let mut backoff = Backoff::for_connections();
    let mut claimed_at = None;
    let mut failures = 0;
    loop {
        let found = tokio::select! {
            () = stop.cancelled() => break,
            // A connection that just broke may still be published for a moment.
            found = connection.wait_for(|found| found.as_ref().is_some_and(|live| live.close_reason().is_none())) => match found {
                Ok(found) => found.clone(),
                Err(_) => break,
            },
        };
        let Some(live) = found else { continue };
        let receiver = peer_identity(&live).ok().and_then(|peer| peer.receiver());
        if claimed_at.is_some() && claimed_at != receiver {
            // Without randomness there was no handshake either; the claim is tried again with the next connection.
            let Ok(random) = rng::random() else { continue };
            shared.lock().renew(SessionId::from_random(random));
        }
        claimed_at = receiver;
        let mut tasks = JoinSet::new();
        shared.lock().handle_connected();
        let broken = tokio::select! {
            () = stop.cancelled() => None,
            broken = session(&shared, &live, &mut tasks) => Some(reason(broken, &mut tasks).await),
        };
        // No task may touch the session once it is told that the connection is gone.
        tasks.shutdown().await;
        let opened = shared.lock().is_open();
        shared.lock().handle_disconnected();
        shared.changed();
        let Some(broken) = broken else { break };
        if opened {
            backoff.reset();
            failures = 0;
        }
        tracing::warn!(volume = shared.name, error = %broken, "the session is interrupted");
        metrics::counter!("blockferry_sender_errors_total", "kind" => "session").increment(1);
        match broken.next() {
            Next::Never => {
                if let Broken::Session(error) = &broken {
                    shared.lock().fail(error);
                }
                break;
            }
            Next::Again => tokio::select! {
                () = stop.cancelled() => break,
                _ = live.closed() => {}
                () = tokio::time::sleep(backoff.next_wait(random())) => {}
            },
            Next::Later => {
                failures += u32::from(matches!(broken, Broken::Refused(RefusalCode::Failed, _)));
                if failures >= FAILURES_MAX && choice.has_others(Instant::now()) {
                    failures = 0;
                    leave(&choice, &live, b"the receiver goes on failing");
                }
                tokio::select! {
                    () = stop.cancelled() => break,
                    () = tokio::time::sleep(backoff.next_wait(random())) => {}
                }
            }
            Next::Elsewhere => {
                leave(&choice, &live, b"the receiver drains");
                tokio::select! {
                    () = stop.cancelled() => break,
                    () = tokio::time::sleep(LEAVE_TIME) => {}
                }
            }
        }
    }
    shared.end();
}

/// Leaves the receiver that `live` leads to; the connection is made anew elsewhere. Only the first of its sessions does so.
fn leave(choice: &Choice, live: &Connection, reason: &[u8]) {
    if live.close_reason().is_none() {
        choice.leave(Instant::now());
        live.close(CLOSED_LEAVING, reason);
    }
}

/// What broke the session, given the first sign of it. A receiver that refuses tells so on stream 0, and the other streams,
/// which it resets, may break first. To miss a refusal would be to claim the volume again against a later session.
async fn reason(first: Broken, tasks: &mut JoinSet<Broken>) -> Broken {
    let told = async {
        while let Some(next) = tasks.join_next().await {
            if let Ok(refused @ Broken::Refused(..)) = next {
                return Some(refused);
            }
        }
        None
    };
    match first {
        Broken::Refused(..) | Broken::Connection(_) => first,
        _ => tokio::time::timeout(REFUSAL_TIME, told).await.ok().flatten().unwrap_or(first),
    }
}

/// Runs the session on one connection until something breaks.
async fn session(shared: &Arc<Shared>, connection: &Connection, tasks: &mut JoinSet<Broken>) -> Broken {
    let streams = shared.lock().streams();
    let mut opened = 0;
    loop {
        // The other streams' first frame names a session that the receiver must know by then.
        let wanted = if shared.lock().is_open() { streams } else { 1 };
        while opened < wanted {
            match connection.open_bi().await {
                Ok((send, recv)) => {
                    tasks.spawn(write(Arc::clone(shared), send, opened));
                    tasks.spawn(read(Arc::clone(shared), recv, opened));
                    opened += 1;
                }
                Err(error) => return error.into(),
            }
        }
        let changed = shared.room.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        if opened < streams && shared.lock().is_open() {
            continue;
        }
        tokio::select! {
            broken = tasks.join_next() => match broken {
                Some(Ok(broken)) => return broken,
                Some(Err(_)) | None => return Broken::Task,
            },
            () = &mut changed, if opened < streams => {}
        }
    }
}

async fn write(shared: Arc<Shared>, mut send: SendStream, stream: u8) -> Broken {
    let result = write_frames(&shared, &mut send, stream).await;
    drop(send.reset(ENDED));
    result.err().unwrap_or(Broken::Task)
}

async fn write_frames(shared: &Shared, send: &mut SendStream, stream: u8) -> Result<(), Broken> {
    let sent = metrics::counter!("blockferry_sender_sent_bytes_total", "volume" => shared.name.clone());
    send.write_all(&PREAMBLE).await?;
    loop {
        let more = shared.frames.notified();
        tokio::pin!(more);
        more.as_mut().enable();
        let frame = shared.lock().poll_frame(stream);
        let Some(frame) = frame else {
            more.await;
            continue;
        };
        let (head, payload) = frame.encode();
        let Some(payload) = payload else {
            send.write_all_chunks(&mut [head]).await?;
            continue;
        };
        let bytes = (head.len() + payload.len()) as u64;
        // Given over as they are: QUIC encrypts out of the record's own memory.
        send.write_all_chunks(&mut [head, payload]).await?;
        sent.increment(bytes);
        shared.sent_records.fetch_add(1, Ordering::Relaxed);
        shared.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

async fn read(shared: Arc<Shared>, mut recv: RecvStream, stream: u8) -> Broken {
    let result = read_frames(&shared, &mut recv, stream).await;
    drop(recv.stop(ENDED));
    result.err().unwrap_or(Broken::Task)
}

async fn read_frames(shared: &Shared, recv: &mut RecvStream, stream: u8) -> Result<(), Broken> {
    let mut buffer = BytesMut::new();
    while buffer.len() < PREAMBLE.len() {
        buffer.extend_from_slice(&chunk(recv).await?);
    }
    let mut preamble = [0; PREAMBLE.len()];
    preamble.copy_from_slice(&buffer.split_to(PREAMBLE.len()));
    check_preamble(preamble)?;
    loop {
        let (mut acknowledged, mut changed) = (false, false);
        while let Some(frame) = Frame::take(&mut buffer)? {
            // An acknowledgement makes room, but nothing to send.
            acknowledged |= matches!(frame, Frame::Staged { .. });
            changed |= !matches!(frame, Frame::Staged { .. });
            let refused = match &frame {
                Frame::Refused { code, text } => Some(Broken::Refused(*code, text.clone())),
                _ => None,
            };
            shared.lock().handle_frame(stream, frame)?;
            if let Some(refused) = refused {
                shared.changed();
                return Err(refused);
            }
        }
        if changed {
            shared.changed();
        } else if acknowledged {
            shared.room.notify_waiters();
            shared.events.notify_one();
        }
        buffer.reserve(FRAME_HEAD_BYTES);
        buffer.extend_from_slice(&chunk(recv).await?);
    }
}

async fn chunk(recv: &mut RecvStream) -> Result<Bytes, Broken> {
    match recv.read_chunk(READ_BYTES, true).await? {
        Some(chunk) => Ok(chunk.bytes),
        None => Err(Broken::Finished),
    }
}
