//! One volume's agent: takes cuts from its capture, has them sealed, closes epochs, keeps journal and session; to one recovery
//! point, or to one after the other.
//!
//! Order of things, which is what crash safety rests on:
//!
//! 1. Cuts are sealed one after another, so the order of cuts is the order of epochs.
//! 2. A record's new hashes go to its epoch's journal; the journal is durable before the close is sent.
//! 3. `Committed` applies the journal to the hashes, and only then does the capture forget that the pages changed. What is
//!    never committed was never applied, and travels again.
//! 4. If the receiver lost what it had acknowledged, everything after its tip is forgotten, and captured again.

mod standing;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use common::clock::UnixMillis;
use common::format::close::Consistency;
use common::format::frame::RefusalCode;
use common::ids::{Epoch, GroupId, Salt, SessionId};
use common::limits;
use common::ops::progress::Progress;
use common::rng;
use common::seal::signing::CloseSigner;
use common::session::{SenderConfig, SenderEvent};
use tokio::sync::mpsc;
use tokio::task::block_in_place;
use tokio::time::Instant;

use super::cuts::{Cuts, Point, PointRequest, UnderWay};
use super::prepare::Prepared;
use super::rpo::Rpo;
use super::{AgentError, ONCE_PATIENCE, Shared};
use crate::capture::cut::{Asserts, Capture, CaptureState, Cut, PointWish};
use crate::epoch::{CloseTerms, EpochBook, EpochBounds, EpochGate, EpochSeed};
use crate::events::EventKind;
use crate::seal_pool::{Pass, PassConfig, PassOutput, PassSummary, SealedRecord};
use crate::send::{Sent, VolumeEvents, VolumeSender};
use crate::spec::CaptureMode;
use crate::state::{JournalWriter, StateError, VolumeState};

/// Record bytes that one session may hold beyond the receiver's acknowledgement; the budget's permits bound it too.
const OUTSTANDING_BYTES_MAX: u64 = 64 << 20;
/// How often an agent looks at its capture's state.
const TICK: Duration = Duration::from_millis(500);
/// A disk that is scanned and does not change gets a point this often.
const QUIET_POINT_INTERVAL_MS: i64 = 3_600_000;

/// How a volume's task ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// With its point (`--once`).
    Point {
        /// True where the point is fuzzy: the disk changed under the pass.
        weaker: bool,
    },
    /// By a signal.
    Interrupted,
    /// Its protection was ended.
    Detached,
}

/// What others ask of a volume's agent.
#[derive(Debug)]
pub enum Order {
    /// A point now.
    Point(PointRequest),
    /// The end of protection: what is kept of it here is removed.
    Detach(tokio::sync::oneshot::Sender<Result<(), String>>),
}

/// What each volume may take of the memory for payload, so that volumes whose receiver does not take their records now leave
/// enough for one whose receiver does: a full stage goes on with one volume, and would wait for it for ever.
fn payload_share(shared: &Shared) -> u64 {
    shared.budget.payload() / shared.config.volumes.len().max(1) as u64
}

/// A cut that is being sealed.
struct Running {
    pass: Pass,
    /// Bytes of it that progress has counted.
    counted: u64,
    /// Sealed, and not taken by the session yet.
    pending: Option<SealedRecord>,
}

/// What happened next.
enum Step {
    Event(SenderEvent),
    Interrupted,
    Ordered(Order),
    /// The session takes the pending record.
    Room,
    Output(PassOutput),
    Cut(Cut),
    Tick,
}

/// What a step leads to.
enum Next {
    Go,
    Once(Consistency),
    Detached,
}

/// Runs one volume.
pub(super) struct VolumeAgent {
    shared: Arc<Shared>,
    name: String,
    capture: Box<dyn Capture>,
    state: VolumeState,
    signer: CloseSigner,
    gate: Arc<EpochGate>,
    book: EpochBook,
    journals: BTreeMap<Epoch, JournalWriter>,
    sender: VolumeSender,
    events: VolumeEvents,
    orders: mpsc::Receiver<Order>,
    running: Option<Running>,
    cuts: Cuts,
    rpo: Rpo,
    newest_point: Option<Point>,
    /// The bar of a first replication, a verification, or a scan.
    progress: Option<Progress>,
    /// When the next point with hooks is due, where the agent sees to that.
    next_app_point: Option<Instant>,
    capture_state: CaptureState,
    records_resent: u64,
    sent_before: Sent,
    /// When the next record may leave, under a rate limit.
    next_send: Instant,
    down_since: Option<Instant>,
}

impl VolumeAgent {
    /// Opens the volume's session.
    ///
    /// # Errors
    /// [`AgentError::Send`], [`AgentError::Rng`].
    pub(super) fn new(
        shared: Arc<Shared>,
        name: String,
        mode: CaptureMode,
        prepared: Prepared,
        capture: Box<dyn Capture>,
        orders: mpsc::Receiver<Order>,
    ) -> Result<Self, AgentError> {
        let Prepared { state, data_key, signer } = prepared;
        let identity = state.identity().clone();
        let config = SenderConfig {
            protocol: common::session::PROTOCOL,
            volume: identity.volume,
            incarnation: identity.incarnation,
            session: SessionId::from_random(rng::random()?),
            streams: shared.config.streams,
            known: state.known().close,
            journaled: state.journaled(),
            outstanding_bytes_max: OUTSTANDING_BYTES_MAX.min(payload_share(&shared) / 2),
        };
        let (sender, events) = shared.sender.open_volume(&name, config)?;
        let seed = EpochSeed {
            data_key,
            volume: identity.volume,
            incarnation: identity.incarnation,
            key_id: identity.key_id,
            first: state.next_epoch(),
            draw_salt: Box::new(|| rng::random().map(Salt).map_err(|error| error.to_string())),
        };
        let bounds = EpochBounds { sealed_bytes: shared.config.epoch_bytes, ..EpochBounds::default() };
        let gate = Arc::new(EpochGate::new(seed, bounds));
        let sent_before = sender.sent();
        let rpo = Rpo::of(&shared.points, &name);
        // A live capture decides itself when to let hooks run; an exported disk is cut every second without.
        let app_points =
            shared.config.app_points.0.filter(|_| mode == CaptureMode::Nbd && shared.config.hook_dir.is_some());
        let next_app_point = app_points.map(|interval| Instant::now() + interval);
        Ok(Self {
            shared,
            name,
            capture,
            state,
            signer,
            book: EpochBook::new(Arc::clone(&gate)),
            gate,
            journals: BTreeMap::new(),
            sender,
            events,
            orders,
            running: None,
            cuts: Cuts::default(),
            rpo,
            newest_point: None,
            progress: None,
            next_app_point,
            capture_state: CaptureState::default(),
            records_resent: 0,
            sent_before,
            next_send: Instant::now(),
            down_since: None,
        })
    }

    /// Runs until there is a point (`--once`), or until a signal.
    ///
    /// # Errors
    /// [`AgentError`], naming the volume.
    pub(super) async fn run(mut self) -> Result<Outcome, AgentError> {
        let result = self.follow().await;
        match result {
            Ok(Next::Once(consistency)) => Ok(Outcome::Point { weaker: consistency == Consistency::Fuzzy }),
            Ok(Next::Detached) => Ok(Outcome::Detached),
            Ok(Next::Go) => {
                self.abandon();
                Ok(Outcome::Interrupted)
            }
            Err(error) => {
                self.abandon();
                metrics::counter!("blockferry_sender_errors_total", "kind" => kind(&error)).increment(1);
                Err(error)
            }
        }
    }

    async fn follow(&mut self) -> Result<Next, AgentError> {
        if !self.open().await? {
            return Ok(Next::Go);
        }
        loop {
            let next = match self.step().await? {
                Step::Interrupted => return Ok(Next::Go),
                Step::Event(event) => self.handle(event)?,
                Step::Ordered(order) => self.obey(order)?,
                Step::Room => self.send_pending()?,
                Step::Output(output) => self.take(output)?,
                Step::Cut(cut) => self.begin(cut),
                Step::Tick => self.tick(),
            };
            self.publish();
            if !matches!(next, Next::Go) {
                return Ok(next);
            }
            self.check_patience()?;
        }
    }

    /// Asks for a point with hooks where one is due.
    fn tick(&mut self) -> Next {
        if let (Some(due), Some(interval)) = (self.next_app_point, self.shared.config.app_points.0)
            && due <= Instant::now()
        {
            self.next_app_point = Some(Instant::now() + interval);
            self.capture.want_point(PointWish { consistency: Consistency::Application, group: None });
        }
        Next::Go
    }

    /// Waits for the next thing to happen. Nothing is lost with what is not chosen.
    async fn step(&mut self) -> Result<Step, AgentError> {
        // Epochs that are not committed are bounded: until one is, nothing more is sealed, and changes gather in the capture.
        let stalled = self.sender.epochs_in_flight() >= limits::EPOCHS_IN_FLIGHT_MAX;
        let idle = self.running.is_none();
        let pending = self.running.as_ref().is_some_and(|running| running.pending.is_some());
        let (sender, next_send) = (&self.sender, self.next_send);
        let room = async {
            tokio::time::sleep_until(next_send).await;
            sender.room().await;
        };
        let running = &mut self.running;
        let output = async {
            match running {
                Some(running) => running.pass.next().await,
                None => None,
            }
        };
        Ok(tokio::select! {
            biased;
            event = next_event(&mut self.events, &self.shared, &self.name) => match event? {
                Some(event) => Step::Event(event),
                None => Step::Interrupted,
            },
            Some(order) = self.orders.recv() => Step::Ordered(order),
            () = room, if pending => Step::Room,
            Some(output) = output, if !idle && !pending && !stalled => Step::Output(output),
            cut = self.capture.next(), if idle && !stalled => {
                Step::Cut(cut.map_err(|source| AgentError::Capture { volume: self.name.clone(), source })?)
            }
            () = tokio::time::sleep(TICK) => Step::Tick,
        })
    }

    /// Waits for the claim to be granted, drops what was never staged, and waits until what was staged is committed. False
    /// where a signal came first.
    async fn open(&mut self) -> Result<bool, AgentError> {
        let mut opened = false;
        while !opened || !self.state.journaled().is_empty() {
            let event = tokio::select! {
                event = next_event(&mut self.events, &self.shared, &self.name) => event?,
                () = tokio::time::sleep(TICK) => {
                    self.publish();
                    self.check_patience()?;
                    continue;
                }
            };
            match event {
                None => return Ok(false),
                Some(SenderEvent::Opened { tip, next_epoch, .. }) if !opened => {
                    opened = true;
                    let discarded = block_in_place(|| self.state.discard_after(tip))?;
                    if discarded > 0 {
                        tracing::info!(volume = %self.name, epochs = discarded, "closes that never arrived are dropped; their pages go again");
                    }
                    self.gate.restart(next_epoch.max(self.state.next_epoch()));
                }
                Some(event) => {
                    self.handle(event)?;
                }
            }
        }
        Ok(true)
    }

    /// With `--once`, gives up where no receiver has been there for long.
    fn check_patience(&mut self) -> Result<(), AgentError> {
        let link = self.shared.sender.state().borrow().clone();
        if link.connected || !self.shared.config.once {
            self.down_since = None;
        } else if self.down_since.get_or_insert_with(Instant::now).elapsed() > ONCE_PATIENCE {
            return Err(AgentError::Unreachable { tried: link.last_error.unwrap_or_default() });
        }
        Ok(())
    }

    /// Takes an event in.
    fn handle(&mut self, event: SenderEvent) -> Result<Next, AgentError> {
        match event {
            SenderEvent::Committed { closed, records_resent } => {
                self.records_resent = records_resent;
                let committed = block_in_place(|| self.state.commit_through(closed.close))?;
                for close in committed {
                    if let Some(consistency) = close.point {
                        metrics::counter!("blockferry_sender_points_total", "consistency" => consistency.as_str())
                            .increment(1);
                    }
                    tracing::debug!(volume = %self.name, epoch = %close.epoch, "committed");
                }
                return self.settle();
            }
            SenderEvent::StageLost { tip, next_epoch } => {
                let text = format!(
                    "the receiver lost what it had staged after {tip}; the pages of its uncommitted epochs are read and sent again"
                );
                self.shared.events.note(&self.name, EventKind::StageLost, text);
                metrics::counter!("blockferry_sender_errors_total", "kind" => "stage_lost").increment(1);
                block_in_place(|| self.state.discard_after(tip))?;
                // Threads put out nothing more from here on, so nothing of an old epoch comes later.
                self.running = None;
                self.journals.clear();
                let next = next_epoch.max(self.gate.next_epoch()).max(self.state.next_epoch());
                self.book.restart(next);
                self.sender.restart(next);
                let (first, wishes) = self.cuts.lose_after(self.state.newest().epoch);
                if let Some(first) = first {
                    block_in_place(|| self.capture.lost(first)).map_err(|source| self.capture_failed(source))?;
                }
                wishes.into_iter().for_each(|wish| self.capture.want_point(wish));
            }
            SenderEvent::Refused { code, text } => match code {
                RefusalCode::GoingAway | RefusalCode::Failed => {
                    tracing::warn!(volume = %self.name, reason = %text, "the receiver asks to come back later");
                }
                RefusalCode::Draining | RefusalCode::Fenced => {
                    tracing::warn!(volume = %self.name, reason = %text, "the receiver lets go of the volume");
                }
                _ => return Err(self.refused(code, &text)),
            },
            SenderEvent::Opened { .. } | SenderEvent::Staged { .. } | SenderEvent::Closed(_) => {}
        }
        Ok(Next::Go)
    }

    fn capture_failed(&self, source: crate::capture::CaptureError) -> AgentError {
        AgentError::Capture { volume: self.name.clone(), source }
    }

    fn obey(&mut self, order: Order) -> Result<Next, AgentError> {
        match order {
            Order::Point(request) => {
                self.capture.want_point(request.wish.clone());
                self.cuts.wait(request, self.shared.clock.now());
                Ok(Next::Go)
            }
            Order::Detach(reply) => {
                self.abandon();
                let stand_in = Box::new(super::Detached(self.capture.geometry()));
                let capture = std::mem::replace(&mut self.capture, stand_in);
                let removed = block_in_place(|| capture.detach());
                let failed = removed.as_ref().err().map(ToString::to_string);
                // The state itself is removed by whoever ordered this, once the volume's lock is free.
                let _ = reply.send(failed.map_or(Ok(()), Err));
                removed.map_err(|source| self.capture_failed(source))?;
                Ok(Next::Detached)
            }
        }
    }

    /// Begins to seal a cut.
    fn begin(&mut self, cut: Cut) -> Next {
        self.cuts.begin(&cut);
        let (bytes, standing) = (cut.pages.pages() * limits::PAGE_BYTES as u64, self.capture.status());
        // What goes on for ever has no bar.
        let long = matches!(standing.state, CaptureState::First | CaptureState::Verifying);
        if self.progress.is_none() && (long || cut.asserts == Asserts::AtEnd) {
            self.progress = Some(Progress::bytes(&self.name, Some(bytes + standing.backlog_bytes)));
        }
        let pass = Pass::start(
            &self.shared.pool,
            PassConfig {
                pages: cut.pages,
                hashes: self.state.committed_hashes(),
                hash_key: self.state.identity().hash_key,
                gate: Arc::clone(&self.gate),
                budget: self.shared.budget.clone(),
                outputs_bytes_max: payload_share(&self.shared) / 4,
                // A first replication is to end; a verification has time, and the machine works meanwhile.
                read_limit: self.shared.config.verify_rate.filter(|_| standing.state == CaptureState::Verifying),
                volume: self.name.clone(),
            },
        );
        self.running = Some(Running { pass, counted: 0, pending: None });
        Next::Go
    }

    /// Takes what a pass puts out.
    fn take(&mut self, output: PassOutput) -> Result<Next, AgentError> {
        match output {
            PassOutput::Sealed(sealed) => {
                self.enter(sealed)?;
                Ok(Next::Go)
            }
            PassOutput::Finished(summary) => self.sealed(summary),
            PassOutput::Failed(source) => Err(AgentError::Pass { volume: self.name.clone(), source }),
        }
    }

    /// Enters a sealed record into book and journal; it is sent when there is room.
    fn enter(&mut self, sealed: SealedRecord) -> Result<(), AgentError> {
        let epoch = sealed.epoch;
        block_in_place(|| {
            let journal = match self.journals.entry(epoch) {
                std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::btree_map::Entry::Vacant(entry) => entry.insert(self.state.begin_journal(epoch)?),
            };
            journal.append(sealed.change.clone())
        })?;
        self.book.record(epoch, sealed.meta);
        if let Some(running) = &mut self.running {
            running.pending = Some(sealed);
        }
        self.advance();
        Ok(())
    }

    /// Moves the bar on, where there is one.
    fn advance(&mut self) {
        if let (Some(running), Some(progress)) = (&mut self.running, &self.progress) {
            let done = running.pass.progress().bytes_done();
            progress.advance(done - running.counted);
            running.counted = done;
        }
    }

    fn send_pending(&mut self) -> Result<Next, AgentError> {
        if let Some(sealed) = self.running.as_mut().and_then(|running| running.pending.take()) {
            let bytes = sealed.record.bytes().len() as u64;
            self.sender.send_record_now(sealed.record, sealed.permit)?;
            self.space(bytes);
            self.close_ready(None)?;
        }
        Ok(Next::Go)
    }

    /// Under a rate limit, says when the record after one of `bytes` may leave.
    fn space(&mut self, bytes: u64) {
        if let Some(limit) = self.shared.config.rate_limit {
            let spacing = Duration::from_nanos(
                u64::try_from(u128::from(bytes) * 1_000_000_000 / u128::from(limit.0.max(1))).unwrap_or(u64::MAX),
            );
            self.next_send = self.next_send.max(Instant::now() - Duration::from_millis(50)) + spacing;
        }
    }

    /// True for a pass over a disk that rested and holds what its newest point says, where nobody asked for a point: one in an
    /// hour is enough then, so that an idle volume costs the store at most 24 requests a day.
    fn is_spared(&self, summary: &PassSummary, now: UnixMillis) -> bool {
        let quiet = summary.records == 0 && summary.consistency == Some(Consistency::Crash);
        let recent = self.newest_point.as_ref().is_some_and(|point| {
            point.consistency != Consistency::Fuzzy
                && (0..QUIET_POINT_INTERVAL_MS).contains(&now.0.saturating_sub(point.time.0))
        });
        quiet && recent && !self.shared.config.once && !self.cuts.newest_is_awaited()
    }

    /// A cut is sealed as a whole: closes its last epoch.
    fn sealed(&mut self, summary: PassSummary) -> Result<Next, AgentError> {
        self.advance();
        self.running = None;
        self.cuts.tally.bytes_read += summary.bytes_read;
        self.cuts.tally.bytes_changed += summary.pages_changed * limits::PAGE_BYTES as u64;
        let now = self.shared.clock.now();
        let spared = self.is_spared(&summary, now);
        let Some(cut) = self.cuts.newest_mut() else { return Ok(Next::Go) };
        let spared = spared && cut.asserts == Asserts::AtEnd;
        let point = match cut.asserts {
            Asserts::Nothing => None,
            Asserts::Point(consistency) => Some(consistency),
            Asserts::AtEnd => {
                if let Some(progress) = self.progress.take() {
                    progress.finish();
                }
                // The cut of a disk that is read as it is, is where the reading ended.
                cut.time = now;
                summary.consistency
            }
        };
        let point = point.filter(|_| !spared);
        if spared {
            // What the newest point holds is what the disk held just now.
            self.rpo.committed(now);
        }
        if point == Some(Consistency::Fuzzy) {
            cut.weaker.clone_from(&summary.reason);
            tracing::warn!(
                volume = %self.name, reason = %summary.reason,
                "the disk changed, or could have, while it was read: the point is fuzzy"
            );
        }
        cut.point = point;
        let end = CutEnd { point, time: cut.time, group: cut.group.as_ref().map(|group| (group.group, group.point)) };
        if point.is_some() || summary.records > 0 {
            let last = self.gate.retire().map_err(|source| AgentError::Epoch { volume: self.name.clone(), source })?;
            self.close_ready(Some((last, end)))?;
        }
        let newest = self.state.newest();
        if let Some(cut) = self.cuts.newest_mut() {
            cut.last = Some(newest);
        }
        self.settle()
    }

    /// Tells the capture of cuts that are wholly committed, and reports their points.
    fn settle(&mut self) -> Result<Next, AgentError> {
        let mut next = Next::Go;
        while let Some(cut) = self.cuts.pop_committed(self.state.known().epoch) {
            block_in_place(|| self.capture.committed(cut.id)).map_err(|source| self.capture_failed(source))?;
            let point = self.point_of(&cut);
            let again = self.cuts.answer(&cut, point.as_ref());
            again.into_iter().for_each(|wish| self.capture.want_point(wish));
            if let Some(point) = point {
                self.report(&point);
                if self.shared.config.once {
                    next = Next::Once(point.consistency);
                }
                self.rpo.committed(point.time);
                self.newest_point = Some(point);
            }
        }
        Ok(next)
    }

    fn point_of(&self, cut: &UnderWay) -> Option<Point> {
        let last = cut.last?;
        Some(Point {
            close: last.close,
            epoch: last.epoch,
            consistency: cut.point?,
            time: cut.time,
            group: cut.group.as_ref().map(|group| group.point),
            weaker: cut.weaker.clone(),
        })
    }

    /// Gives up what is open, at the end: its pages count as changed still.
    fn abandon(&mut self) {
        self.running = None;
        for (epoch, journal) in std::mem::take(&mut self.journals) {
            self.sender.drop_epoch(epoch);
            drop(journal);
        }
        self.book.restart(self.gate.next_epoch());
    }

    /// Closes all epochs that are complete; the one named in `last` asserts the point.
    fn close_ready(&mut self, last: Option<(Epoch, CutEnd)>) -> Result<(), AgentError> {
        while let Some(epoch) = self.book.closable() {
            let end = last.filter(|(last, _)| *last == epoch).map(|(_, end)| end);
            let (group, group_point) = end.and_then(|end| end.group).unwrap_or((GroupId::NIL, GroupId::NIL));
            let parent = self.state.newest().close;
            let terms = CloseTerms {
                fleet: self.state.identity().fleet,
                parent,
                cut_time: end.map_or_else(|| self.shared.clock.now(), |end| end.time),
                point: end.and_then(|end| end.point),
                disk_bytes: self.state.identity().disk_bytes,
                group,
                group_point,
            };
            let statement = self
                .book
                .close(epoch, terms)
                .map_err(|source| AgentError::Epoch { volume: self.name.clone(), source })?;
            let close = self.signer.sign(statement);
            block_in_place(|| {
                let journal = match self.journals.remove(&epoch) {
                    Some(journal) => journal,
                    None => self.state.begin_journal(epoch)?,
                };
                self.state.journal_close(journal, close.id(), parent, terms.point)
            })
            .map_err(|error: StateError| AgentError::from(error))?;
            self.sender.close(close)?;
        }
        Ok(())
    }
}

/// What the last close of a cut states.
#[derive(Debug, Clone, Copy)]
struct CutEnd {
    point: Option<Consistency>,
    time: UnixMillis,
    group: Option<(GroupId, GroupId)>,
}

/// The session's next event; `None` for a signal. Safe to cancel.
async fn next_event(events: &mut VolumeEvents, shared: &Shared, name: &str) -> Result<Option<SenderEvent>, AgentError> {
    let mut refusals = shared.sender.state();
    tokio::select! {
        biased;
        event = events.next() => event.map(Some).ok_or_else(|| AgentError::SessionEnded {
            volume: name.to_owned(),
            reason: "it ended without a reason; run the sender again".to_owned(),
        }),
        _ = shared.shutdown.requested() => Ok(None),
        Ok(state) = refusals.wait_for(|state| state.refused.is_some()) => {
            let reason = format!("{}; register this machine again", state.refused.clone().unwrap_or_default());
            Err(AgentError::SessionEnded { volume: name.to_owned(), reason })
        }
    }
}

fn kind(error: &AgentError) -> &'static str {
    match error {
        AgentError::State(_) => "state",
        AgentError::Capture { .. } => "capture",
        AgentError::SessionEnded { .. } => "session",
        AgentError::Unreachable { .. } => "unreachable",
        _ => "other",
    }
}
