//! The agent: the one place of the sender that sees all stages. It prepares the volumes, starts a task for each, and ends
//! them; [`volume`] has what is done for one.

mod control;
mod volume;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::budget::{Budget, BudgetError};
use common::clock::{Clock, UnixMillis};
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
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::capture::CaptureError;
use crate::config::RunConfig;
use crate::epoch::EpochError;
use crate::register;
use crate::seal_pool::PassError;
use crate::send::{Route, SendError, Sender};
use crate::state::{StateDir, StateError};
use control::Control;
pub use volume::Outcome;
use volume::VolumeAgent;

/// How long `--once` goes on trying to reach a receiver, at the start and in the middle.
const ONCE_PATIENCE: Duration = Duration::from_secs(120);
/// How often a long run looks whether its certificate is due for renewal.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(6 * 3600);

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
         or protect the disk as a new volume, under another name", state_dir.display()
    )]
    StateLost {
        /// The volume.
        volume: String,
        /// The state directory.
        state_dir: PathBuf,
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
    /// Metrics or signals can't be set up.
    #[error("cannot set up {what}: {reason}")]
    Process {
        /// What.
        what: &'static str,
        /// Why.
        reason: String,
    },
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

/// Cut times of the newest committed points, for the metric that ages.
pub(crate) type Points = Arc<Mutex<HashMap<String, UnixMillis>>>;

/// What all volumes of a run share.
pub(crate) struct Shared {
    pub(crate) config: RunConfig,
    pub(crate) budget: Budget,
    pub(crate) clock: Clock,
    pub(crate) sender: Sender,
    pub(crate) shutdown: Shutdown,
    pub(crate) points: Points,
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
    let points = Points::default();
    let readiness = Readiness::new(&["volumes"]);
    let recorder = process_metrics::install_recorder().map_err(|error| process("metrics", &error))?;
    describe_metrics();
    tracing::info!("memory budget:\n{}", config.memory);
    let (listen, chosen) = config.metrics_listen;
    let endpoint = Endpoint::new(recorder, readiness.clone()).on_scrape(scrape(&budget, &points, &clock));
    let _serving = endpoint.serve(listen, chosen).await?;

    // Sources first: nothing is made in the store for a disk that can't be read.
    let mut sources = Vec::new();
    for spec in &config.volumes {
        sources.push(volume::open_source(spec)?);
    }
    let patience = config.once.then_some(ONCE_PATIENCE);
    let Some(mut control) = connect(&enrolment, patience, &shutdown).await? else {
        return Ok(interrupted(&shutdown));
    };
    control.renew_if_due(&mut enrolment, &config.state_dir, clock.now()).await?;
    let mut prepared = Vec::new();
    for (spec, source) in config.volumes.iter().zip(sources) {
        prepared.push(volume::prepare(&mut control, &enrolment, &key_file, &state, spec, source, clock.now()).await?);
    }
    drop(key_file);

    let (tls, newest_tls) = watch::channel(data_tls(&enrolment)?);
    let sender = Sender::start(route(&config, newest_tls, enrolment.receivers.clone())?);
    let shared = Arc::new(Shared { config, budget, clock, sender, shutdown: shutdown.clone(), points });
    let renewal = tokio::spawn(keep_renewed(enrolment, Arc::clone(&shared), tls));
    let mut tasks = JoinSet::new();
    for prepared in prepared {
        let agent = VolumeAgent::new(Arc::clone(&shared), prepared)?;
        tasks.spawn(agent.run());
    }
    readiness.set("volumes", true);
    let mut result = Ok(ExitCode::Ok);
    while let Some(joined) = tasks.join_next().await {
        let outcome = joined.map_err(|error| process("a volume's task", &error))?;
        match outcome {
            Ok(Outcome::Point { weaker }) => {
                if weaker && matches!(result, Ok(ExitCode::Ok)) {
                    result = Ok(ExitCode::Weaker);
                }
            }
            Ok(Outcome::Interrupted) => {}
            Err(error) => {
                // The last one is reported by main; those before it here.
                if let Err(earlier) = std::mem::replace(&mut result, Err(error)) {
                    tracing::error!("{}", common::ops::exit::error_line(&earlier));
                }
                readiness.set("volumes", false);
            }
        }
    }
    renewal.abort();
    shared.sender.stop();
    // A detached state directory stays locked until the last task is gone, so a restart never meets its predecessor.
    drop(state);
    match result {
        Ok(ExitCode::Ok | ExitCode::Weaker) if shutdown.is_requested() => Ok(interrupted(&shutdown)),
        other => other,
    }
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

fn route(
    config: &RunConfig,
    tls: watch::Receiver<Arc<rustls::ClientConfig>>,
    receivers: Vec<HostPort>,
) -> Result<Route, AgentError> {
    let (endpoint, granted) = quic::client_endpoint(&config.quic)?;
    if granted.send_bytes < 1 << 20 {
        tracing::warn!(
            granted = granted.send_bytes,
            "the kernel grants small UDP buffers, which costs throughput: raise net.core.rmem_max and net.core.wmem_max"
        );
    }
    Ok(Route { endpoint, receivers, tls, tuning: config.quic.clone() })
}

fn data_tls(enrolment: &Enrolment) -> Result<Arc<rustls::ClientConfig>, AgentError> {
    let credentials = enrolment.credentials();
    let tls = tls::client_config(enrolment.authority(), Some(&credentials), tls::ALPN_DATA);
    tls.map(Arc::new).map_err(|error| AgentError::Setup(error.to_string()))
}

/// Renews the certificate of a long run, ten days before its end: it is kept for the next start, and every connection made
/// from then on shows it.
async fn keep_renewed(mut enrolment: Enrolment, shared: Arc<Shared>, tls: watch::Sender<Arc<rustls::ClientConfig>>) {
    loop {
        tokio::time::sleep(RENEWAL_INTERVAL).await;
        let renewed = async {
            let mut control = Control::connect(&enrolment).await?;
            if control.renew_if_due(&mut enrolment, &shared.config.state_dir, shared.clock.now()).await? {
                tls.send_replace(data_tls(&enrolment)?);
            }
            Ok::<_, AgentError>(())
        };
        if let Err(error) = renewed.await {
            tracing::warn!(%error, "could not renew this machine's certificate; trying again later");
        }
    }
}

fn scrape(budget: &Budget, points: &Points, clock: &Clock) -> impl Fn() + Send + Sync + 'static {
    let (budget, points, clock) = (budget.clone(), Arc::clone(points), clock.clone());
    move || {
        process_metrics::record();
        #[expect(clippy::cast_precision_loss, reason = "metrics are floating point")]
        let gauge = |name: &'static str, value: u64| metrics::gauge!(name).set(value as f64);
        gauge("blockferry_sender_memory_budget_bytes", budget.total());
        gauge("blockferry_sender_memory_used_bytes", process_metrics::usage().resident_bytes);
        gauge("blockferry_sender_payload_bytes", budget.used());
        let now = clock.now();
        for (volume, cut) in points.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            #[expect(clippy::cast_precision_loss, reason = "metrics are floating point")]
            let age = now.0.saturating_sub(cut.0).max(0) as f64 / 1000.0;
            metrics::gauge!("blockferry_sender_rpo_seconds", "volume" => volume.clone()).set(age);
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
    describe_counter!("blockferry_sender_source_read_bytes_total", Unit::Bytes, "Bytes read from protected disks.");
    describe_counter!("blockferry_sender_captured_bytes_total", Unit::Bytes, "Bytes of pages found changed.");
    describe_counter!(
        "blockferry_sender_sent_bytes_total",
        Unit::Bytes,
        "Record bytes sent, without transport overhead."
    );
    describe_counter!("blockferry_sender_points_total", Unit::Count, "Committed recovery points, by consistency.");
    describe_counter!("blockferry_sender_errors_total", Unit::Count, "Errors, by kind.");
}
