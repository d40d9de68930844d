//! One loaded volume: its session's state, and the task that carries out what the session asks for.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use common::budget::Permit;
use common::format::close::Close;
use common::format::frame::{Frame, RefusalCode};
use common::format::record::{Record, RecordMeta};
use common::format::volume_header::VolumeHeader;
use common::ids::{CloseId, Epoch, Geometry, SessionId, VolumeId};
use common::session::{Claim, Facts, ReceiverEvent, ReceiverSession, SessionError, Ticket};
use futures::future::{BoxFuture, OptionFuture};
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::{Notify, futures::Notified};
use tokio_util::sync::CancellationToken;

use super::{Forwarding, Hold, Staging, VolumeError};

/// What travels with a record to the stage.
#[derive(Debug)]
struct Payload {
    meta: RecordMeta,
    permit: Permit,
}

/// A later claim took the volume, or it was unloaded: this connection's part in it is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a later connection has taken over the volume")]
pub struct Superseded;

/// One connection's hold on a volume, from its claim on.
#[derive(Debug)]
pub struct Scope {
    number: u64,
    /// Cancelled when a later claim takes over; set before it is why.
    over: CancellationToken,
}

impl Scope {
    /// Done once a later claim has taken over, or the volume was unloaded.
    pub async fn over(&self) {
        self.over.cancelled().await;
    }
}

struct State {
    header: Arc<VolumeHeader>,
    session: ReceiverSession<Payload>,
    scope: Arc<Scope>,
    /// When the last sender went away, or the volume was loaded.
    left: Instant,
    /// The session that was ended because the stage is full and another volume goes first.
    gave_way: Option<SessionId>,
    /// Its claims that wait for their turn.
    waiting: usize,
    stopped: bool,
}

/// A loaded volume.
pub struct Volume {
    id: VolumeId,
    hold: Hold,
    state: Mutex<State>,
    /// The volume's task looks for events again.
    work: Notify,
    /// Writers look for frames again.
    frames: Notify,
    stop: CancellationToken,
}

impl std::fmt::Debug for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Volume({})", self.id)
    }
}

impl Volume {
    /// Starts the volume's task. Must be called within a runtime.
    pub(super) fn start(
        header: Arc<VolumeHeader>,
        hold: Hold,
        facts: Facts,
        staging: Arc<dyn Staging>,
        forwarding: Arc<dyn Forwarding>,
    ) -> Arc<Self> {
        let scope = Arc::new(Scope { number: 0, over: CancellationToken::new() });
        let volume = Arc::new(Self {
            id: header.volume,
            hold,
            state: Mutex::new(State {
                header,
                session: ReceiverSession::new(facts),
                scope,
                left: Instant::now(),
                gave_way: None,
                waiting: 0,
                stopped: false,
            }),
            work: Notify::new(),
            frames: Notify::new(),
            stop: CancellationToken::new(),
        });
        tokio::spawn(run(Arc::clone(&volume), staging, forwarding));
        volume
    }

    /// Its identity.
    #[must_use]
    pub fn id(&self) -> VolumeId {
        self.id
    }

    /// The right to write its log under which it was loaded.
    #[must_use]
    pub fn hold(&self) -> Hold {
        self.hold
    }

    /// The session that was granted last in this process.
    #[must_use]
    pub fn session(&self) -> Option<SessionId> {
        self.lock().session.session()
    }

    /// Its header as it was loaded, or as it was when the disk grew last.
    #[must_use]
    pub fn header(&self) -> Arc<VolumeHeader> {
        Arc::clone(&self.lock().header)
    }

    /// The disk has grown: `header` has a newer incarnation. A session that is open ends; no effect where the header is older.
    pub(super) fn grow(&self, header: VolumeHeader) {
        let size = header.current();
        let Some(geometry) = Geometry::new(size.disk_bytes) else { return };
        let mut state = self.lock();
        if size.incarnation > state.header.current().incarnation {
            state.header = Arc::new(header);
            state.session.handle_grown(size.incarnation, geometry);
            drop(state);
            self.changed();
        }
    }

    /// True while a sender writes it.
    #[must_use]
    pub fn has_session(&self) -> bool {
        self.lock().session.is_open()
    }

    /// A connection, authorised, claims the volume. An earlier connection's scope is over then.
    ///
    /// # Errors
    /// [`Superseded`] where the volume was unloaded meanwhile: get it again.
    pub fn open(&self, claim: Claim) -> Result<Arc<Scope>, Superseded> {
        let mut state = self.lock();
        if state.stopped {
            return Err(Superseded);
        }
        state.scope.over.cancel();
        let scope = Arc::new(Scope { number: state.scope.number + 1, over: CancellationToken::new() });
        state.scope = Arc::clone(&scope);
        state.gave_way = None;
        state.session.handle_open(claim);
        drop(state);
        self.changed();
        Ok(scope)
    }

    /// The connection of this scope is gone.
    pub fn disconnect(&self, scope: &Scope) {
        let mut state = self.lock();
        if state.scope.number == scope.number {
            state.session.handle_disconnected();
            state.left = Instant::now();
            drop(state);
            self.changed();
        }
    }

    /// A frame other than a record.
    ///
    /// # Errors
    /// The outer where the scope is over; the inner where the frame breaks the protocol: the session has ended then and a
    /// `Refused` frame is waiting.
    pub fn handle_frame(
        &self,
        scope: &Scope,
        stream: u8,
        frame: Frame,
    ) -> Result<Result<(), SessionError>, Superseded> {
        self.with(scope, |session| session.handle_frame(stream, frame))
    }

    /// A record, with its metadata and the memory that it occupies.
    ///
    /// # Errors
    /// As [`Self::handle_frame`].
    pub fn handle_record(
        &self,
        scope: &Scope,
        stream: u8,
        seq: u64,
        record: Record,
        meta: RecordMeta,
        permit: Permit,
    ) -> Result<Result<(), SessionError>, Superseded> {
        self.with(scope, |session| session.handle_record(stream, seq, record, Payload { meta, permit }))
    }

    /// Ends the session of this scope for a reason of this side.
    pub fn refuse(&self, scope: &Scope, code: RefusalCode, text: String) {
        // Where it is over already there is nobody to tell.
        let _ = self.with(scope, |session| session.refuse(code, text));
    }

    /// Ends the session of this scope because the stage is full and another volume of its connection goes first: what this one's
    /// streams hold unread would keep that one's records from coming. It may claim the volume again, see [`Self::turn_of`].
    pub fn give_way(&self, scope: &Scope) {
        let mut state = self.lock();
        if state.scope.number == scope.number {
            state.gave_way = state.session.session();
            let text = "the stage is full and another volume goes first; its turn comes";
            state.session.refuse(RefusalCode::GoingAway, text.to_owned());
            drop(state);
            self.changed();
        }
    }

    /// A place among those who wait for their turn, where `session` gave way before. Whoever claims the volume for it waits at
    /// the stage's gate before it is opened. `None` where there is nothing to wait for: another session, above all, which
    /// drops what the earlier one left in the stage.
    #[must_use]
    pub fn turn_of(&self, session: SessionId) -> Option<Turn<'_>> {
        let mut state = self.lock();
        if state.gave_way != Some(session) {
            return None;
        }
        state.waiting += 1;
        Some(Turn(self))
    }

    /// The next frame for a stream.
    ///
    /// # Errors
    /// [`Superseded`].
    pub fn poll_frame(&self, scope: &Scope, stream: u8) -> Result<Option<Frame>, Superseded> {
        let mut state = self.lock();
        if state.scope.number != scope.number {
            return Err(Superseded);
        }
        Ok(state.session.poll_frame(stream))
    }

    /// Done once there may be frames; enable before polling.
    pub fn frames(&self) -> Notified<'_> {
        self.frames.notified()
    }

    pub(super) fn handle_committed(&self, close: CloseId) {
        self.lock().session.handle_committed(close);
        self.frames.notify_waiters();
    }

    /// Since when no sender is connected; `None` while one is.
    pub(super) fn away_since(&self) -> Option<Instant> {
        let state = self.lock();
        (!state.session.is_connected() && state.waiting == 0).then_some(state.left)
    }

    /// Gives up the open epochs of a sender that is away; see [`ReceiverSession::shed_open`].
    pub(super) fn shed_open(&self) -> usize {
        let shed = self.lock().session.shed_open();
        self.changed();
        shed
    }

    pub(super) fn end(&self, code: RefusalCode, text: &str) {
        self.lock().session.refuse(code, text.to_owned());
        self.changed();
    }

    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.stop.cancel();
    }

    fn with<T>(&self, scope: &Scope, apply: impl FnOnce(&mut ReceiverSession<Payload>) -> T) -> Result<T, Superseded> {
        let mut state = self.lock();
        if state.scope.number != scope.number {
            return Err(Superseded);
        }
        let result = apply(&mut state.session);
        let frames = state.session.has_frames();
        drop(state);
        self.work.notify_one();
        // Not for nothing: most records only make work for the stage.
        if frames {
            self.frames.notify_waiters();
        }
        Ok(result)
    }

    fn changed(&self) {
        self.work.notify_one();
        self.frames.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A claim that waits for its turn; its sender is not away.
#[derive(Debug)]
pub struct Turn<'a>(&'a Volume);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.waiting -= 1;
        state.left = Instant::now();
    }
}

/// What the volume's task has under way.
struct Work {
    volume: Arc<Volume>,
    staging: Arc<dyn Staging>,
    forwarding: Arc<dyn Forwarding>,
    records: FuturesUnordered<BoxFuture<'static, (Ticket, Result<(), VolumeError>)>>,
    notes: FuturesUnordered<BoxFuture<'static, Result<(), VolumeError>>>,
    forgetting: FuturesUnordered<BoxFuture<'static, (Epoch, Result<(), VolumeError>)>>,
    closing: OptionFuture<BoxFuture<'static, (Close, Result<(), VolumeError>)>>,
    is_closing: bool,
}

/// Carries out what the session asks for, until the volume is unloaded.
async fn run(volume: Arc<Volume>, staging: Arc<dyn Staging>, forwarding: Arc<dyn Forwarding>) {
    let stop = volume.stop.clone();
    let mut work = Work {
        volume,
        staging,
        forwarding,
        records: FuturesUnordered::new(),
        notes: FuturesUnordered::new(),
        forgetting: FuturesUnordered::new(),
        closing: None.into(),
        is_closing: false,
    };
    loop {
        work.take_events();
        tokio::select! {
            () = stop.cancelled() => return,
            () = work.volume.work.notified() => {}
            Some(done) = work.records.next() => work.settle_records(done),
            Some(done) = work.notes.next() => {
                if let Err(error) = done {
                    work.report(&error, "a change of the stage failed");
                }
            }
            Some((epoch, result)) = work.forgetting.next() => {
                if let Err(error) = result {
                    work.report(&error, "an epoch could not be given up");
                }
                // Only now may a sender that waits be told what is staged.
                work.volume.lock().session.handle_forgotten(epoch);
                work.volume.changed();
            }
            Some((close, result)) = &mut work.closing, if work.is_closing => work.settle_close(close, result),
        }
    }
}

impl Work {
    fn take_events(&mut self) {
        let id = self.volume.id();
        loop {
            let event = self.volume.lock().session.poll_event();
            match event {
                None => return,
                Some(ReceiverEvent::Stage { ticket, record, payload: Payload { meta, permit } }) => {
                    let staged = self.staging.stage(record, meta, permit);
                    self.records.push(staged.map(move |result| (ticket, result)).boxed());
                }
                Some(ReceiverEvent::CheckClose(close)) => {
                    let checked = self.staging.close(self.volume.header(), (*close).clone());
                    self.closing = Some(checked.map(move |result| (*close, result)).boxed()).into();
                    self.is_closing = true;
                }
                Some(ReceiverEvent::DropEpoch(epoch)) => {
                    tracing::info!(volume = %id, %epoch, "an open epoch is dropped");
                    self.notes.push(self.staging.drop_epoch(id, epoch));
                }
                Some(ReceiverEvent::ForgetEpoch(epoch)) => {
                    let forgotten = self.staging.forget_open(id, epoch);
                    self.forgetting.push(forgotten.map(move |result| (epoch, result)).boxed());
                }
                Some(ReceiverEvent::Opened { session }) => {
                    tracing::info!(volume = %id, %session, "a sender has opened the volume");
                    self.notes.push(self.staging.begin_session(id, session));
                }
                Some(ReceiverEvent::Ended { code, text }) => {
                    tracing::warn!(volume = %id, ?code, reason = text, "the session ended");
                    metrics::counter!("blockferry_receiver_errors_total", "kind" => refusal_kind(code)).increment(1);
                }
            }
        }
    }

    /// Everything that became durable together is acknowledged together.
    fn settle_records(&mut self, first: (Ticket, Result<(), VolumeError>)) {
        let volume = Arc::clone(&self.volume);
        let mut state = volume.lock();
        let mut next = Some(first);
        let mut failure = None;
        while let Some((ticket, result)) = next {
            match result {
                Ok(()) => state.session.handle_staged(ticket),
                Err(error) => {
                    state.session.handle_stage_failed(ticket);
                    state.session.refuse(error.refusal(), error.to_string());
                    failure = Some(error);
                }
            }
            next = self.records.next().now_or_never().flatten();
        }
        drop(state);
        volume.frames.notify_waiters();
        if let Some(error) = failure {
            self.report(&error, "records could not be staged");
        }
    }

    fn settle_close(&mut self, close: Close, result: Result<(), VolumeError>) {
        self.is_closing = false;
        match result {
            Ok(()) => {
                self.volume.lock().session.handle_close_staged(close.id());
                self.volume.frames.notify_waiters();
                self.forwarding.closed(self.volume.id(), self.volume.hold(), close);
            }
            Err(error) => {
                self.report(&error, "a close was not accepted");
                let (code, text) = (error.refusal(), error.to_string());
                self.volume.lock().session.handle_close_refused(close.id(), code, text);
                self.volume.frames.notify_waiters();
            }
        }
    }

    fn report(&self, error: &VolumeError, what: &'static str) {
        tracing::error!(volume = %self.volume.id(), %error, what);
        metrics::counter!("blockferry_receiver_errors_total", "kind" => error.kind()).increment(1);
    }
}

/// A word for metrics.
fn refusal_kind(code: RefusalCode) -> &'static str {
    match code {
        RefusalCode::NotYours => "not_yours",
        RefusalCode::WrongIncarnation => "wrong_incarnation",
        RefusalCode::Diverged => "diverged",
        RefusalCode::Superseded => "superseded",
        RefusalCode::BadMessage => "bad_message",
        RefusalCode::Protocol => "protocol",
        RefusalCode::Fenced => "fenced",
        RefusalCode::GoingAway => "going_away",
        RefusalCode::Draining => "draining",
        RefusalCode::Failed => "failed",
        RefusalCode::Retired => "retired",
    }
}
