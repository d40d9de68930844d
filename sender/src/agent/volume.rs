//! One volume's agent: passes over its disk, epochs, journal, session; to one recovery point, or to one after the other.
//!
//! Order of things, which is what crash safety rests on:
//!
//! 1. A pass begins only when nothing is in flight, so hashes describe what the store has.
//! 2. A record's new hashes go to its epoch's journal; the journal is durable before the close is sent.
//! 3. `Committed` applies the journal to the hashes. What is never committed was never applied, and travels again.
//! 4. If the receiver lost what it had acknowledged, everything after its tip is forgotten and the pass begins anew.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::PoisonError;
use std::time::Duration;

use common::clock::UnixMillis;
use common::format::close::Consistency;
use common::format::frame::RefusalCode;
use common::ids::{CloseId, Epoch, Salt, SessionId};
use common::limits;
use common::net::enrolment::Enrolment;
use common::ops::progress::Progress;
use common::rng;
use common::seal::DataKey;
use common::seal::keyfile::KeyFile;
use common::seal::signing::CloseSigner;
use common::session::{ClosedEpoch, SenderConfig, SenderEvent};
use tokio::task::block_in_place;
use tokio::time::Instant;

use super::control::Control;
use super::{AgentError, ONCE_PATIENCE, Shared};
use crate::capture::{Disk, Source};
use crate::cli::{VolumeSpec, ZstdLevel};
use crate::epoch::{CloseTerms, EpochBook, EpochBounds, EpochGate, EpochSeed};
use crate::seal_pool::{Pass, PassConfig, PassOutput, PassSummary, SealedRecord};
use crate::send::{Sent, VolumeEvents, VolumeSender};
use crate::state::{JournalWriter, StateDir, StateError, VolumeIdentity, VolumeState};

/// Record bytes that one session may hold beyond the receiver's acknowledgement; the budget's permits bound it too.
const OUTSTANDING_BYTES_MAX: u64 = 64 << 20;

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
}

/// A volume ready to be run.
pub(super) struct Prepared {
    name: String,
    source: Source,
    state: VolumeState,
    data_key: DataKey,
    signer: CloseSigner,
}

/// Opens a volume's disk.
///
/// # Errors
/// [`AgentError::Capture`].
pub(super) fn open_source(spec: &VolumeSpec) -> Result<Source, AgentError> {
    Source::open(&spec.path).map_err(|source| AgentError::Capture { volume: spec.name.clone(), source })
}

/// Finds or makes the volume in the store and its state here, and opens its data key.
///
/// # Errors
/// [`AgentError`], naming the volume.
pub(super) async fn prepare(
    control: &mut Control,
    enrolment: &Enrolment,
    key_file: &KeyFile,
    state_dir: &StateDir,
    spec: &VolumeSpec,
    source: Source,
    now: UnixMillis,
) -> Result<Prepared, AgentError> {
    let name = spec.name.clone();
    let disk_bytes = source.geometry().disk_bytes();
    let (header, head) = match control.find_volume(&name).await? {
        Some(known) => (known.header, known.head),
        None => {
            let made =
                control.create_volume(enrolment, key_file, &name, disk_bytes, source.sector_bytes(), now).await?;
            (made, CloseId::ZERO)
        }
    };
    let size = header.current();
    if size.disk_bytes != disk_bytes {
        let (path, expected) = (spec.path.clone(), size.disk_bytes);
        return Err(AgentError::SizeChanged { volume: name, path, expected, found: disk_bytes });
    }
    let named = |source| AgentError::Key { volume: name.clone(), source };
    let data_key = key_file.unwrap(&header.wrapped_keys, header.volume, header.key_id).map_err(named)?;
    let signer = data_key.signer(header.volume);
    if signer.public() != header.signing_key {
        return Err(named(common::seal::SealError::Unwrap { volume: header.volume }));
    }
    let state = if state_dir.volumes()?.contains(&header.volume) {
        VolumeState::open(state_dir, header.volume)?
    } else if head == CloseId::ZERO {
        let identity = VolumeIdentity {
            fleet: header.fleet,
            volume: header.volume,
            incarnation: size.incarnation,
            key_id: header.key_id,
            disk_bytes,
            sector_bytes: source.sector_bytes(),
            name: name.clone(),
            source_path: spec.path.as_os_str().as_bytes().to_vec(),
            source: source.identity().clone(),
            hash_key: rng::random()?,
        };
        VolumeState::create(state_dir, &identity, ClosedEpoch::default())?
    } else {
        return Err(AgentError::StateLost { volume: name, state_dir: state_dir.path().to_owned() });
    };
    Ok(Prepared { name, source, state, data_key, signer })
}

/// What a run did, as `--json` prints it.
#[derive(Debug, Default, Clone)]
struct Tally {
    bytes_read: u64,
    bytes_changed: u64,
    records_resent: u64,
}

/// How a pass ended.
enum PassEnd {
    /// With a committed point.
    Point { close: CloseId, consistency: Consistency, cut: UnixMillis },
    /// The receiver lost what it had; begin anew.
    Lost,
    /// By a signal.
    Interrupted,
}

/// What ended the driving of a pass.
enum Driven {
    /// The whole disk was compared.
    Finished(PassSummary),
    /// The receiver lost what it had.
    Lost,
    /// A signal.
    Interrupted,
}

/// Runs one volume.
pub(super) struct VolumeAgent {
    shared: Arc<Shared>,
    name: String,
    source: Arc<Source>,
    state: VolumeState,
    signer: CloseSigner,
    gate: Arc<EpochGate>,
    book: EpochBook,
    journals: BTreeMap<Epoch, JournalWriter>,
    sender: VolumeSender,
    events: VolumeEvents,
    tally: Tally,
    sent_before: Sent,
    /// When the next record may leave, under a rate limit.
    next_send: Instant,
}

impl VolumeAgent {
    /// Opens the volume's session.
    ///
    /// # Errors
    /// [`AgentError::Send`], [`AgentError::Rng`].
    pub(super) fn new(shared: Arc<Shared>, prepared: Prepared) -> Result<Self, AgentError> {
        let Prepared { name, source, state, data_key, signer } = prepared;
        let identity = state.identity().clone();
        let config = SenderConfig {
            protocol: common::session::PROTOCOL,
            volume: identity.volume,
            incarnation: identity.incarnation,
            session: SessionId::from_random(rng::random()?),
            streams: shared.config.streams,
            known: state.known().close,
            journaled: state.journaled(),
            outstanding_bytes_max: OUTSTANDING_BYTES_MAX.min(shared.budget.payload() / 2),
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
        Ok(Self {
            shared,
            name,
            source: Arc::new(source),
            state,
            signer,
            book: EpochBook::new(Arc::clone(&gate)),
            gate,
            journals: BTreeMap::new(),
            sender,
            events,
            tally: Tally::default(),
            sent_before,
            next_send: Instant::now(),
        })
    }

    /// Runs until there is a point (`--once`), or until a signal.
    ///
    /// # Errors
    /// [`AgentError`], naming the volume.
    pub(super) async fn run(mut self) -> Result<Outcome, AgentError> {
        let result = self.run_passes().await;
        if let Err(error) = &result {
            metrics::counter!("blockferry_sender_errors_total", "kind" => kind(error)).increment(1);
        }
        result
    }

    async fn run_passes(&mut self) -> Result<Outcome, AgentError> {
        if !self.open().await? {
            return Ok(Outcome::Interrupted);
        }
        loop {
            let started = Instant::now();
            match self.pass().await? {
                PassEnd::Lost => {}
                PassEnd::Interrupted => return Ok(Outcome::Interrupted),
                PassEnd::Point { close, consistency, cut } => {
                    self.report(close, consistency, cut, started.elapsed());
                    if self.shared.config.once {
                        return Ok(Outcome::Point { weaker: consistency == Consistency::Fuzzy });
                    }
                    let next = started + self.shared.config.point_interval;
                    if !self.idle_until(next).await? {
                        return Ok(Outcome::Interrupted);
                    }
                }
            }
        }
    }

    /// Waits for the claim to be granted, drops what was never staged, and waits until what was staged is committed. False
    /// where a signal came first.
    async fn open(&mut self) -> Result<bool, AgentError> {
        loop {
            let Some(event) = self.next_event().await? else { return Ok(false) };
            if let SenderEvent::Opened { tip, next_epoch, .. } = event {
                let discarded = block_in_place(|| self.state.discard_after(tip))?;
                if discarded > 0 {
                    tracing::info!(volume = %self.name, epochs = discarded, "closes that never arrived are dropped; their pages go again");
                }
                self.gate.restart(next_epoch.max(self.state.next_epoch()));
                return self.settle().await;
            }
            self.handle(event)?;
        }
    }

    /// Waits until nothing is in flight. False where a signal came first.
    async fn settle(&mut self) -> Result<bool, AgentError> {
        while !self.state.journaled().is_empty() {
            let Some(event) = self.next_event().await? else { return Ok(false) };
            if self.handle(event)? {
                self.forget_lost();
            }
        }
        Ok(true)
    }

    /// Waits for the next pass's time, and keeps the session's events flowing. False where a signal came first.
    async fn idle_until(&mut self, next: Instant) -> Result<bool, AgentError> {
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(next) => return Ok(true),
                event = self.next_event() => {
                    let Some(event) = event? else { return Ok(false) };
                    if self.handle(event)? {
                        self.forget_lost();
                    }
                }
            }
        }
    }

    /// The session's next event; `None` for a signal.
    async fn next_event(&mut self) -> Result<Option<SenderEvent>, AgentError> {
        let patience = self.shared.config.once;
        let mut link = self.shared.sender.state();
        let mut refusals = self.shared.sender.state();
        let mut down_since = Instant::now();
        loop {
            tokio::select! {
                biased;
                event = self.events.next() => {
                    return event.map(Some).ok_or_else(|| AgentError::SessionEnded {
                        volume: self.name.clone(),
                        reason: "it ended without a reason; run the sender again".to_owned(),
                    });
                }
                _ = self.shared.shutdown.requested() => return Ok(None),
                Ok(state) = refusals.wait_for(|state| state.refused.is_some()) => {
                    let reason = format!("{}; register this machine again", state.refused.clone().unwrap_or_default());
                    return Err(AgentError::SessionEnded { volume: self.name.clone(), reason });
                }
                () = tokio::time::sleep(Duration::from_secs(1)), if patience => {
                    let state = link.borrow_and_update().clone();
                    if state.connected {
                        down_since = Instant::now();
                    } else if down_since.elapsed() > ONCE_PATIENCE {
                        return Err(AgentError::Unreachable { tried: state.last_error.unwrap_or_default() });
                    }
                }
            }
        }
    }

    /// Takes an event in; true where the receiver lost what it had acknowledged, and [`Self::forget_lost`] must follow.
    fn handle(&mut self, event: SenderEvent) -> Result<bool, AgentError> {
        match event {
            SenderEvent::Committed { closed, records_resent } => {
                self.tally.records_resent = records_resent;
                let committed = block_in_place(|| self.state.commit_through(closed.close))?;
                for close in committed {
                    if let Some(consistency) = close.point {
                        metrics::counter!("blockferry_sender_points_total", "consistency" => consistency.as_str())
                            .increment(1);
                    }
                    tracing::debug!(volume = %self.name, epoch = %close.epoch, "committed");
                }
            }
            SenderEvent::StageLost { tip, next_epoch } => {
                tracing::warn!(
                    volume = %self.name, %tip,
                    "the receiver lost what it had staged; the pages of its uncommitted epochs are read and sent again"
                );
                metrics::counter!("blockferry_sender_errors_total", "kind" => "stage_lost").increment(1);
                block_in_place(|| self.state.discard_after(tip))?;
                self.book.restart(next_epoch);
                return Ok(true);
            }
            SenderEvent::Refused { code, text } => match code {
                RefusalCode::GoingAway | RefusalCode::Failed => {
                    tracing::warn!(volume = %self.name, reason = %text, "the receiver asks to come back later");
                }
                _ => return Err(self.refused(code, &text)),
            },
            SenderEvent::Opened { .. } | SenderEvent::Staged { .. } | SenderEvent::Closed(_) => {}
        }
        Ok(false)
    }

    /// After a loss, once the pass is over: nothing of the old epochs is left, new ones may begin.
    fn forget_lost(&mut self) {
        self.journals.clear();
        let next = self.gate.next_epoch().max(self.state.next_epoch());
        self.book.restart(next);
        self.sender.restart(next);
    }

    fn refused(&self, code: RefusalCode, text: &str) -> AgentError {
        let next_step = match code {
            RefusalCode::Diverged => {
                "; this state directory is a copy, or older than what the store has: use the one that is current, or protect the \
                 disk as a new volume, under another name"
            }
            RefusalCode::Superseded => "; another sender with this state took over: stop one of the two",
            RefusalCode::Fenced => "; run the sender again",
            _ => "",
        };
        AgentError::SessionEnded { volume: self.name.clone(), reason: format!("{text}{next_step}") }
    }

    /// One pass over the disk, to a committed point.
    async fn pass(&mut self) -> Result<PassEnd, AgentError> {
        if !self.settle().await? {
            return Ok(PassEnd::Interrupted);
        }
        let failed = |source| AgentError::Pass { volume: self.name.clone(), source };
        let config = PassConfig {
            disk: Arc::<Source>::clone(&self.source),
            hashes: self.state.begin_pass()?,
            hash_key: self.state.identity().hash_key,
            gate: Arc::clone(&self.gate),
            budget: self.shared.budget.clone(),
            seal_threads: self.shared.config.seal_threads,
            zstd_level: match self.shared.config.zstd_level {
                ZstdLevel::Auto => 1,
                ZstdLevel::Fixed(level) => level,
            },
            volume: self.name.clone(),
        };
        let mut pass = block_in_place(|| Pass::start(config)).map_err(failed)?;
        let summary = match self.drive(&mut pass).await {
            Ok(Driven::Finished(summary)) => summary,
            other => {
                // Threads put out nothing more from here on, so nothing of an old epoch comes later.
                drop(pass);
                return match other {
                    Ok(Driven::Lost) => {
                        self.forget_lost();
                        Ok(PassEnd::Lost)
                    }
                    Ok(Driven::Interrupted | Driven::Finished(_)) => {
                        self.abandon_open_epochs();
                        Ok(PassEnd::Interrupted)
                    }
                    Err(error) => {
                        self.abandon_open_epochs();
                        Err(error)
                    }
                };
            }
        };
        self.tally.bytes_read += summary.bytes_read;
        self.tally.bytes_changed += summary.pages_changed * limits::PAGE_BYTES as u64;
        let consistency = summary.rest.consistency();
        if consistency == Consistency::Fuzzy {
            tracing::warn!(
                volume = %self.name, reason = %summary.rest,
                "the disk changed, or could have, while it was read: the point is fuzzy"
            );
        }
        let cut = self.shared.clock.now();
        let last = self.gate.retire().map_err(|source| AgentError::Epoch { volume: self.name.clone(), source })?;
        self.close_ready(Some((last, consistency, cut)))?;
        let point = self.state.newest().close;
        while self.state.known().close != point {
            let Some(event) = self.next_event().await? else { return Ok(PassEnd::Interrupted) };
            if self.handle(event)? {
                self.forget_lost();
                return Ok(PassEnd::Lost);
            }
        }
        Ok(PassEnd::Point { close: point, consistency, cut })
    }

    /// Takes what a pass puts out, and what the session tells, until one of them ends the pass.
    async fn drive(&mut self, pass: &mut Pass) -> Result<Driven, AgentError> {
        let progress = Progress::bytes(&self.name, Some(self.source.geometry().disk_bytes()));
        let counters = pass.progress();
        loop {
            tokio::select! {
                biased;
                event = self.next_event() => match event? {
                    None => return Ok(Driven::Interrupted),
                    Some(event) => {
                        if self.handle(event)? {
                            return Ok(Driven::Lost);
                        }
                    }
                },
                // Epochs that are not committed are bounded: until one is, nothing more is taken, and the pass waits.
                output = pass.next(), if self.sender.epochs_in_flight() < limits::EPOCHS_IN_FLIGHT_MAX => match output {
                    Some(PassOutput::Sealed(sealed)) => self.take(sealed).await?,
                    Some(PassOutput::Finished(summary)) => {
                        progress.advance(summary.bytes_read.saturating_sub(progress.done()));
                        progress.finish();
                        return Ok(Driven::Finished(summary));
                    }
                    Some(PassOutput::Failed(source)) => {
                        return Err(AgentError::Pass { volume: self.name.clone(), source });
                    }
                    None => return Ok(Driven::Interrupted),
                },
            }
            progress.advance(counters.bytes_read().saturating_sub(progress.done()));
        }
    }

    /// Gives up what is open, after a pass that did not end: its pages count as changed still.
    fn abandon_open_epochs(&mut self) {
        for (epoch, journal) in std::mem::take(&mut self.journals) {
            self.sender.drop_epoch(epoch);
            drop(journal);
        }
        self.book.restart(self.gate.next_epoch());
    }

    /// Takes a sealed record: into the book, the journal, and on its way; then closes what became complete.
    async fn take(&mut self, sealed: SealedRecord) -> Result<(), AgentError> {
        let epoch = sealed.epoch;
        block_in_place(|| {
            let journal = match self.journals.entry(epoch) {
                std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::btree_map::Entry::Vacant(entry) => entry.insert(self.state.begin_journal(epoch)?),
            };
            journal.append(sealed.change)
        })?;
        self.book.record(epoch, sealed.meta);
        self.await_rate(sealed.record.bytes().len() as u64).await;
        self.sender.send_record(sealed.record, sealed.permit).await?;
        self.close_ready(None)
    }

    /// Under a rate limit, waits until `bytes` may leave.
    async fn await_rate(&mut self, bytes: u64) {
        if let Some(limit) = self.shared.config.rate_limit {
            tokio::time::sleep_until(self.next_send).await;
            let spacing = Duration::from_nanos(
                u64::try_from(u128::from(bytes) * 1_000_000_000 / u128::from(limit.0.max(1))).unwrap_or(u64::MAX),
            );
            self.next_send = self.next_send.max(Instant::now() - Duration::from_millis(50)) + spacing;
        }
    }

    /// Closes all epochs that are complete; the one named in `last` asserts a point.
    fn close_ready(&mut self, last: Option<(Epoch, Consistency, UnixMillis)>) -> Result<(), AgentError> {
        while let Some(epoch) = self.book.closable() {
            let point = last.filter(|(last, ..)| *last == epoch);
            let parent = self.state.newest().close;
            let terms = CloseTerms {
                fleet: self.state.identity().fleet,
                parent,
                cut_time: point.map_or_else(|| self.shared.clock.now(), |(_, _, cut)| cut),
                point: point.map(|(_, consistency, _)| consistency),
                disk_bytes: self.state.identity().disk_bytes,
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

    /// Says that there is a point; under `--json` on standard output.
    fn report(&mut self, close: CloseId, consistency: Consistency, cut: UnixMillis, took: Duration) {
        let sent = self.sender.sent();
        let before = std::mem::replace(&mut self.sent_before, sent);
        let (records, bytes) = (sent.records - before.records, sent.bytes - before.bytes);
        let tally = std::mem::take(&mut self.tally);
        self.shared.points.lock().unwrap_or_else(PoisonError::into_inner).insert(self.name.clone(), cut);
        tracing::info!(
            volume = %self.name, point = %close, consistency = consistency.as_str(), read = tally.bytes_read,
            changed = tally.bytes_changed, sent = bytes, records, seconds = took.as_secs_f64(), "recovery point"
        );
        if self.shared.config.json {
            print_line(&serde_json::json!({
                "volume": self.name,
                "point": close.to_string(),
                "consistency": consistency.as_str(),
                "time": cut.to_string(),
                "bytes_read": tally.bytes_read,
                "bytes_changed": tally.bytes_changed,
                "bytes_sent": bytes,
                "records_sent": records,
                "records_resent": tally.records_resent,
                "seconds": took.as_secs_f64(),
            }));
        }
    }
}

/// One object, one line, at once, so that lines of several volumes do not mix.
#[expect(clippy::print_stdout, reason = "what --json asks for")]
fn print_line(value: &serde_json::Value) {
    println!("{value}");
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
