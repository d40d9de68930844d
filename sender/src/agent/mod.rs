//! The agent: the one place of the sender that sees all stages. It prepares the volumes, starts a task for each, and ends
//! them; [`volume`] has what is done for one.

mod captures;
mod control;
mod cuts;
mod fleet;
mod grow;
mod orders;
mod prepare;
mod rpo;
mod volume;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::budget::{Budget, BudgetError};
use common::clock::Clock;
use common::error::{Dispose, Disposition};
use common::net::backoff::Backoff;
use common::net::enrolment::{Enrolment, EnrolmentError};
use common::net::quic::{self, QuicError};
use common::net::resolve::HostPort;
use common::net::tls;
use common::ops::exit::ExitCode;
use common::ops::http::{Endpoint, HttpError, Readiness};
use common::ops::process_metrics;
use common::ops::shutdown::Shutdown;
use common::rng::{self, RngError};
use common::seal::SealError;
use common::units::ByteCount;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::capture::CaptureError;
use crate::capture::cut::{Capture, CaptureStatus, CutId, NextCut, PointWish};
use crate::capture::hooks::HookError;
use crate::config::RunConfig;
use crate::control::{self as commands, Board, Handle};
use crate::epoch::EpochError;
use crate::events::{EventKind, Events};
use crate::register;
use crate::seal_pool::{PassError, SealPool};
use crate::send::{Choice, Route, SendError, Sender};
use crate::spec::{VolumeSpec, ZstdLevel};
use crate::state::{StateDir, StateError};
use captures::Captures;
use control::Control;
pub use cuts::{Point, PointRequest};
use orders::Reach;
use rpo::Ages;
use volume::VolumeAgent;
pub use volume::{Order, Outcome};

/// How long `--once` goes on trying to reach a receiver, at the start and in the middle.
const ONCE_PATIENCE: Duration = Duration::from_secs(120);
/// How soon calls that a receiver did not answer are made again.
const CALL_PAUSE: Duration = Duration::from_millis(500);

/// Why a run failed. The text names the volume, file or host, and the next step.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The machine's registration.
    #[error(transparent)]
    Enrolment(#[from] EnrolmentError),
    /// The key file.
    #[error(transparent)]
    Register(#[from] register::Error),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// A volume's disk.
    #[error("volume {volume}: {source}")]
    Capture {
        /// The volume.
        volume: String,
        /// What is wrong.
        source: CaptureError,
    },
    /// A pass over a volume's disk.
    #[error("volume {volume}: {source}")]
    Pass {
        /// The volume.
        volume: String,
        /// What is wrong.
        source: PassError,
    },
    /// A volume's data key.
    #[error("volume {volume}: {source}")]
    Key {
        /// The volume.
        volume: String,
        /// What is wrong.
        source: SealError,
    },
    /// The disk is not as large as the volume.
    #[error(
        "volume {volume}: {} has changed its size: it has {found} bytes, the volume has {expected}; protect it as a new volume, \
         under another name", path.display()
    )]
    SizeChanged {
        /// The volume.
        volume: String,
        /// Its disk.
        path: PathBuf,
        /// Bytes of the volume.
        expected: u64,
        /// Bytes of the disk.
        found: u64,
    },
    /// The store has history of a volume that this state directory knows nothing of.
    #[error(
        "volume {volume} has recovery points in the store, but {} holds no state of it: use the state directory that made them, \
         or take it over with `blockferry-sender adopt --volume {volume}`", state_dir.display()
    )]
    StateLost {
        /// The volume.
        volume: String,
        /// The state directory.
        state_dir: PathBuf,
    },
    /// The store's volume of this name is another one.
    #[error(
        "volume {volume} is another volume in the store than in {}: it was made anew there; use another name, or end its \
         protection here with `blockferry-sender detach`", state_dir.display()
    )]
    AnotherVolume {
        /// The volume.
        volume: String,
        /// The state directory.
        state_dir: PathBuf,
    },
    /// The budget has no room for a large disk's page sets.
    #[error(
        "volume {volume}: knowing which pages of its disk changed takes up to {bytes}, and {free} of the memory budget are free: raise \
         --memory-budget, or protect it with capture=scan"
    )]
    PageSets {
        /// The volume.
        volume: String,
        /// Bytes that the sets may take.
        bytes: ByteCount,
        /// Bytes that are free.
        free: ByteCount,
    },
    /// No receiver answered.
    #[error("no receiver could be reached: {tried}; check that one runs and that UDP and TCP get through")]
    Unreachable {
        /// Each host and what came of it.
        tried: String,
    },
    /// A receiver said no.
    #[error("{host} refused this machine: {reason}")]
    Refused {
        /// The receiver.
        host: HostPort,
        /// Its words.
        reason: String,
    },
    /// A receiver's answer makes no sense.
    #[error(
        "{host} answered with what can't be used: {reason}; check that sender and receiver are of releases that fit"
    )]
    Answer {
        /// The receiver.
        host: HostPort,
        /// What is wrong.
        reason: String,
    },
    /// The receiver ended a volume's session for good.
    #[error("volume {volume}: the receiver ended its session: {reason}")]
    SessionEnded {
        /// The volume.
        volume: String,
        /// Its words, and what to do.
        reason: String,
    },
    /// Epochs.
    #[error("volume {volume}: {source}")]
    Epoch {
        /// The volume.
        volume: String,
        /// What is wrong.
        source: EpochError,
    },
    /// Our own order of sending was broken.
    #[error(transparent)]
    Send(#[from] SendError),
    /// TLS can't be set up.
    #[error("cannot set up TLS: {0}")]
    Setup(String),
    /// QUIC can't be set up.
    #[error(transparent)]
    Quic(#[from] QuicError),
    /// The metrics endpoint.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The memory budget.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// No randomness.
    #[error(transparent)]
    Rng(#[from] RngError),
    /// The hooks.
    #[error(transparent)]
    Hooks(HookError),
    /// The control socket.
    #[error(transparent)]
    Commands(#[from] commands::server::ServeError),
    /// Metrics or signals can't be set up.
    #[error("cannot set up {what}: {reason}")]
    Process {
        /// What.
        what: &'static str,
        /// Why.
        reason: String,
    },
}

impl AgentError {
    /// The volume that it stopped, where it is one's.
    #[must_use]
    pub fn volume(&self) -> Option<&str> {
        match self {
            Self::Capture { volume, .. }
            | Self::Pass { volume, .. }
            | Self::Key { volume, .. }
            | Self::SizeChanged { volume, .. }
            | Self::StateLost { volume, .. }
            | Self::AnotherVolume { volume, .. }
            | Self::PageSets { volume, .. }
            | Self::SessionEnded { volume, .. }
            | Self::Epoch { volume, .. } => Some(volume),
            _ => None,
        }
    }
}

impl Dispose for AgentError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Unreachable { .. } => Disposition::Retry,
            Self::State(error) => error.disposition(),
            Self::Send(error) => error.disposition(),
            _ => Disposition::BadInput,
        }
    }
}

/// How long the end of the last volume's protection may take after its agent has ended.
const SERVING_TIME: Duration = Duration::from_secs(10);
/// Orders that may wait for a volume's agent.
const ORDERS_MAX: usize = 64;

/// What all volumes of a run share.
pub(crate) struct Shared {
    pub(crate) config: RunConfig,
    pub(crate) budget: Budget,
    pub(crate) clock: Clock,
    pub(crate) pool: SealPool,
    pub(crate) sender: Sender,
    pub(crate) shutdown: Shutdown,
    pub(crate) events: Events,
    pub(crate) board: Board,
    points: Ages,
}

/// Stands where the capture of a volume was that is no longer protected.
struct Detached(common::ids::Geometry);

impl Capture for Detached {
    fn geometry(&self) -> common::ids::Geometry {
        self.0
    }
    fn next(&mut self) -> NextCut<'_> {
        Box::pin(std::future::pending())
    }
    fn want_point(&mut self, _: PointWish) {}
    fn committed(&mut self, _: CutId) -> Result<(), CaptureError> {
        Ok(())
    }
    fn lost(&mut self, _: CutId) -> Result<(), CaptureError> {
        Ok(())
    }
    fn status(&self) -> CaptureStatus {
        CaptureStatus::default()
    }
}

/// Runs until every volume has its point (`--once`), or until a signal.
///
/// # Errors
/// [`AgentError`]. Without `--once`, a volume that fails is reported and the others go on; the error is the last one.
pub async fn run(config: RunConfig) -> Result<ExitCode, AgentError> {
    let clock = Clock::System;
    let shutdown = Shutdown::install().map_err(|error| process("signals", &error))?;
    let state = Arc::new(StateDir::open(&config.state_dir)?);
    let mut enrolment = Enrolment::load(&config.state_dir)?;
    let key_file = register::load_key_file(&config.state_dir)?;
    let budget = Budget::new(config.memory.clone())?;
    let points = Ages::default();
    let readiness = Readiness::new(&["volumes"]);
    let recorder = process_metrics::install_recorder().map_err(|error| process("metrics", &error))?;
    describe_metrics();
    tracing::info!("memory budget:\n{}", config.memory);
    let (listen, chosen) = config.metrics_listen;
    let endpoint = Endpoint::new(recorder, readiness.clone()).on_scrape(scrape(&budget, &points, &clock));
    let _serving = endpoint.serve(listen, chosen).await?;

    let events = Events::new(clock.clone());
    let (_control, control_handle) = commands::serve(&config.state_dir, events.clone(), budget.clone(), clock.clone())?;

    // Sources first: nothing is made in the store for a disk that can't be read. And captures of volumes that are known
    // here, before any receiver is asked: tracking begins, and a disk is served, whether or not one can be reached.
    let mut captures = Captures::start(&config, &budget, &clock, &events).await?;
    let mut failures = Failures { events: &events, board: &control_handle.board, last: None };
    let mut volumes = Vec::new();
    for spec in &config.volumes {
        let begun = prepare::local(&state, spec, &events).and_then(|local| {
            let capture = local.state.as_ref().map(|state| captures.make(&local, state)).transpose()?;
            Ok((local, capture))
        });
        volumes.extend(failures.or_stop(begun)?);
    }
    if volumes.is_empty() {
        return failures.end();
    }
    let patience = config.once.then_some(ONCE_PATIENCE);
    let Some(mut control) = connect(&enrolment, patience, &shutdown).await? else {
        return Ok(interrupted(&shutdown));
    };
    match control.renew_if_due(&mut enrolment, &config.state_dir, clock.now()).await {
        // It is tried again while the sender runs.
        Err(error @ AgentError::Unreachable { .. }) => {
            tracing::warn!(%error, "could not ask for this machine's certificate to be renewed");
        }
        other => drop(other?),
    }
    let mut ready = Vec::new();
    for (mut local, capture) in volumes {
        let begun = tokio::time::Instant::now();
        let prepared = loop {
            let prepared =
                prepare::prepare(&mut control, &enrolment, &key_file, &state, &events, &mut local, clock.now()).await;
            // The receiver went away in the middle of a call: the calls are made so that they can be repeated.
            match prepared {
                Err(error @ AgentError::Unreachable { .. })
                    if patience.is_none_or(|patience| begun.elapsed() <= patience) =>
                {
                    tracing::warn!(%error, "trying again");
                    tokio::time::sleep(CALL_PAUSE).await;
                }
                other => break other,
            }
            match connect(&enrolment, patience, &shutdown).await? {
                Some(again) => control = again,
                None => return Ok(interrupted(&shutdown)),
            }
        };
        let begun = prepared.and_then(|prepared| {
            let capture = match capture {
                Some(capture) => capture,
                None => captures.make(&local, &prepared.state)?,
            };
            Ok((local.spec, prepared, capture))
        });
        ready.extend(failures.or_stop(begun)?);
    }
    if ready.is_empty() {
        return failures.end();
    }
    let failed_before = failures.last.take();
    let page_sets = captures.into_page_sets();
    drop(key_file);

    let (tls, newest_tls) = watch::channel(data_tls(&enrolment)?);
    let known = fleet::candidates(&enrolment.receivers, control.receivers());
    drop(control);
    let choice = Choice::new(known.clone());
    let unfinished = ready.iter().any(|(_, prepared, _)| !prepared.state.journaled().is_empty());
    if let Some(last_used) = enrolment.receivers.first().filter(|_| unfinished) {
        // What an earlier start closed may lie there, staged: it need not travel again.
        choice.connected(last_used);
    }
    fleet::remember(&mut enrolment, &known, None, &config.state_dir);
    let sender = Sender::start(route(&config, newest_tls, choice)?);
    let level = match config.zstd_level {
        ZstdLevel::Auto => 1,
        ZstdLevel::Fixed(level) => level,
    };
    let pool = SealPool::new(config.seal_threads, level)
        .map_err(|source| AgentError::Pass { volume: config.volumes[0].name.clone(), source })?;
    let Handle { board, requests } = control_handle;
    let shared = Shared { config, budget, clock, pool, sender, shutdown: shutdown.clone(), events, board, points };
    let shared = Arc::new(shared);
    let renewal = tokio::spawn(fleet::keep(enrolment, Arc::clone(&shared), tls));
    let mut tasks = JoinSet::new();
    let mut reach = BTreeMap::new();
    for (spec, prepared, capture) in ready {
        let (order, ordered) = mpsc::channel(ORDERS_MAX);
        let VolumeSpec { name, path, capture: mode, .. } = spec;
        let identity = prepared.state.identity();
        shared.board.update(&name, |status| {
            status.id = identity.volume.to_string();
            status.path = path.display().to_string();
            status.capture = mode.to_string();
            "starting".clone_into(&mut status.state);
            status.disk_bytes = identity.disk_bytes;
        });
        reach.insert(name.clone(), Reach { volume: identity.volume, capture: mode, orders: order });
        let agent = VolumeAgent::new(Arc::clone(&shared), name, mode, prepared, capture, ordered)?;
        tasks.spawn(agent.run());
    }
    let serving = tokio::spawn(orders::serve(Arc::clone(&shared), Arc::clone(&state), reach, requests));
    let watching = tokio::spawn(watch_link(Arc::clone(&shared)));
    shared.events.note("", EventKind::Started, format!("version {}", env!("CARGO_PKG_VERSION")));
    readiness.set("volumes", failed_before.is_none());
    let mut result = failed_before.map_or(Ok(ExitCode::Ok), Err);
    let mut detached = false;
    while let Some(joined) = tasks.join_next().await {
        let outcome = joined.map_err(|error| process("a volume's task", &error))?;
        match outcome {
            Ok(Outcome::Point { weaker }) => {
                if weaker && matches!(result, Ok(ExitCode::Ok)) {
                    result = Ok(ExitCode::Weaker);
                }
            }
            Ok(Outcome::Interrupted) => {}
            Ok(Outcome::Detached) => detached = true,
            Err(error) => {
                stopped(&shared.events, &shared.board, &error);
                // The last one is reported by main; those before it here.
                if let Err(earlier) = std::mem::replace(&mut result, Err(error)) {
                    tracing::error!("{}", common::ops::exit::error_line(&earlier));
                }
                readiness.set("volumes", false);
            }
        }
    }
    renewal.abort();
    watching.abort();
    // A detach that ended the last volume has its state still to remove.
    if !shutdown.is_requested() {
        let _ = tokio::time::timeout(SERVING_TIME, async {
            while !shared.board.volumes().is_empty() && detached {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
    serving.abort();
    shared.sender.stop();
    drop(page_sets);
    // A detached state directory stays locked until the last task is gone, so a restart never meets its predecessor.
    drop(state);
    match result {
        Ok(ExitCode::Ok | ExitCode::Weaker) if shutdown.is_requested() => Ok(interrupted(&shutdown)),
        other => other,
    }
}

/// Volumes that can't be begun, while others can.
struct Failures<'a> {
    events: &'a Events,
    board: &'a Board,
    last: Option<AgentError>,
}

impl Failures<'_> {
    /// A volume's error stops that volume only; any other one ends the run.
    fn or_stop<T>(&mut self, result: Result<T, AgentError>) -> Result<Option<T>, AgentError> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.volume().is_some() => {
                stopped(self.events, self.board, &error);
                if let Some(earlier) = self.last.replace(error) {
                    tracing::error!("{}", common::ops::exit::error_line(&earlier));
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn end(self) -> Result<ExitCode, AgentError> {
        self.last.map_or(Ok(ExitCode::Ok), Err)
    }
}

/// Says that an error stopped a volume.
fn stopped(events: &Events, board: &Board, error: &AgentError) {
    let Some(volume) = error.volume() else { return };
    let text = common::ops::exit::error_line(error);
    board.update(volume, |status| {
        "stopped".clone_into(&mut status.state);
        status.error.clone_from(&text);
    });
    events.note(volume, EventKind::VolumeStopped, text);
}

fn interrupted(shutdown: &Shutdown) -> ExitCode {
    shutdown.signal().map_or(ExitCode::Ok, common::ops::shutdown::EndSignal::exit_code)
}

fn process(what: &'static str, error: &dyn std::error::Error) -> AgentError {
    AgentError::Process { what, reason: error.to_string() }
}

/// Connects, again and again with backoff while receivers are only out of reach; `None` where a signal came first.
async fn connect(
    enrolment: &Enrolment,
    patience: Option<Duration>,
    shutdown: &Shutdown,
) -> Result<Option<Control>, AgentError> {
    let started = tokio::time::Instant::now();
    let mut backoff = Backoff::for_connections();
    loop {
        let attempt = tokio::select! {
            attempt = Control::connect(enrolment) => attempt,
            _ = shutdown.requested() => return Ok(None),
        };
        match attempt {
            Err(error) if error.disposition() == Disposition::Retry => {
                if patience.is_some_and(|patience| started.elapsed() > patience) {
                    return Err(error);
                }
                let wait = backoff.next_wait(u64::from_le_bytes(rng::random()?));
                tracing::warn!(%error, ?wait, "trying again");
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    _ = shutdown.requested() => return Ok(None),
                }
            }
            other => return other.map(Some),
        }
    }
}

/// Keeps the link's state on the board, and notes when it breaks and comes back.
async fn watch_link(shared: Arc<Shared>) {
    let mut state = shared.sender.state();
    let mut connected_before = None;
    let mut receiver_before = String::new();
    loop {
        let link = state.borrow_and_update().clone();
        shared.board.update_link(|status| {
            status.connected = link.connected;
            status.receiver = if link.connected { link.receiver.clone() } else { String::new() };
            status.transport = if link.connected { "quic".to_owned() } else { String::new() };
            status.last_error = link.last_error.clone().unwrap_or_default();
        });
        match connected_before {
            Some(true) if !link.connected => {
                let text = link.last_error.clone().unwrap_or_else(|| "the link broke".to_owned());
                shared.events.note("", EventKind::Disconnected, text);
            }
            Some(false) if link.connected && link.receiver == receiver_before => {
                shared.events.note("", EventKind::Reconnected, "there is a link again");
            }
            Some(false) if link.connected => {
                let text = format!("from receiver {receiver_before} to {}", link.receiver);
                shared.events.note("", EventKind::Moved, text);
            }
            _ => {}
        }
        if link.connected {
            receiver_before = link.receiver;
        }
        // Before the first connection there is none to come back.
        if link.connected || connected_before.is_some() {
            connected_before = Some(link.connected);
        }
        if state.changed().await.is_err() {
            return;
        }
    }
}

fn route(
    config: &RunConfig,
    tls: watch::Receiver<Arc<rustls::ClientConfig>>,
    choice: Choice,
) -> Result<Route, AgentError> {
    let (endpoint, granted) = quic::client_endpoint(&config.quic)?;
    if granted.send_bytes < 1 << 20 {
        tracing::warn!(
            granted = granted.send_bytes,
            "the kernel grants small UDP buffers, which costs throughput: raise net.core.rmem_max and net.core.wmem_max"
        );
    }
    Ok(Route { endpoint, choice, tls, tuning: config.quic.clone() })
}

fn data_tls(enrolment: &Enrolment) -> Result<Arc<rustls::ClientConfig>, AgentError> {
    let credentials = enrolment.credentials();
    let tls = tls::client_config(enrolment.authority(), Some(&credentials), tls::ALPN_DATA);
    tls.map(Arc::new).map_err(|error| AgentError::Setup(error.to_string()))
}

fn scrape(budget: &Budget, points: &Ages, clock: &Clock) -> impl Fn() + Send + Sync + 'static {
    let (budget, points, clock) = (budget.clone(), points.clone(), clock.clone());
    move || {
        process_metrics::record();
        #[expect(clippy::cast_precision_loss, reason = "metrics are floating point")]
        let gauge = |name: &'static str, value: u64| metrics::gauge!(name).set(value as f64);
        gauge("blockferry_sender_memory_budget_bytes", budget.total());
        gauge("blockferry_sender_memory_used_bytes", process_metrics::usage().resident_bytes);
        gauge("blockferry_sender_payload_bytes", budget.used());
        for (volume, millis) in points.at(clock.now()) {
            #[expect(clippy::cast_precision_loss, reason = "metrics are floating point")]
            let age = millis as f64 / 1000.0;
            metrics::gauge!("blockferry_sender_rpo_seconds", "volume" => volume).set(age);
        }
    }
}

/// The control calls, for the commands that make them without a run.
pub(crate) use control::{Control as ReceiverCalls, KnownVolume};

fn describe_metrics() {
    use metrics::{Unit, describe_counter, describe_gauge};
    describe_gauge!("blockferry_sender_memory_budget_bytes", Unit::Bytes, "Memory that the process may use.");
    describe_gauge!("blockferry_sender_memory_used_bytes", Unit::Bytes, "Resident memory of the process.");
    describe_gauge!("blockferry_sender_payload_bytes", Unit::Bytes, "Payload in flight, charged to the budget.");
    describe_gauge!(
        "blockferry_sender_rpo_seconds",
        Unit::Seconds,
        "Age of the newest committed recovery point's cut."
    );
    describe_gauge!(
        "blockferry_sender_backlog_bytes",
        Unit::Bytes,
        "Bytes of pages that changed and have not been given to a cut, or are still to be read."
    );
    describe_gauge!("blockferry_sender_overloaded", Unit::Count, "1 while changes come faster than they can leave.");
    describe_counter!("blockferry_sender_source_read_bytes_total", Unit::Bytes, "Bytes read from protected disks.");
    describe_counter!("blockferry_sender_captured_bytes_total", Unit::Bytes, "Bytes of pages found changed.");
    describe_counter!(
        "blockferry_sender_sent_bytes_total",
        Unit::Bytes,
        "Record bytes sent, without transport overhead."
    );
    describe_counter!("blockferry_sender_points_total", Unit::Count, "Committed recovery points, by consistency.");
    describe_counter!("blockferry_sender_events_total", Unit::Count, "Events of volumes and of the link, by kind.");
    describe_counter!(
        "blockferry_sender_hook_failures_total",
        Unit::Count,
        "Hooks that failed or were late, by phase."
    );
    metrics::describe_histogram!(
        "blockferry_sender_freeze_seconds",
        Unit::Seconds,
        "Time from freezing a disk's file systems to their thaw."
    );
    describe_counter!("blockferry_sender_errors_total", Unit::Count, "Errors, by kind.");
}
