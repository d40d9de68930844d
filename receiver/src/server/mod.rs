//! The server: the one place of the receiver that sees all stages. Starts them in order, and ends them in reverse.
//!
//! Start: data directory and lock, store (probed), fleet, stage (recovered), forwarder, ports, volumes, then senders are let in.
//! End, on SIGTERM: senders are told to go to another receiver, what is closed is forwarded, the stage is closed. A second signal
//! ends at once; nothing acknowledged is lost then either, it is forwarded at the next start.

mod identity;
mod staging;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use catalog::fleet::receivers::ReceiverState;
use catalog::fleet::{Fleet, FleetError};
use catalog::store::StoreError;
use common::budget::{Budget, BudgetError, MemoryTable};
use common::clock::Clock;
use common::net::quic::{self, QuicError};
use common::net::tls::{self, ClientCertificate, ServerCertificate, TlsError};
use common::net::{grpc, pb};
use common::ops::exit::ExitCode;
use common::ops::http::{Endpoint, HttpError, Readiness};
use common::ops::process_metrics;
use common::ops::shutdown::Shutdown;
use common::rng::RngError;
use common::units::ByteCount;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::accept::{self, AcceptLimits, Acceptor, Revoked};
use crate::config::RunConfig;
use crate::control::ControlService;
use crate::drain::{self, Draining};
use crate::forward::{ForwardConfig, Forwarder};
use crate::registry::{self, Place, Registry, Standing};
use crate::stage::{Stage, StageConfig, StageError};
use crate::volumes::Volumes;
use identity::IdentityFileError;
use staging::{StageOfVolumes, StoreOfVolumes};

/// Where a running receiver says how it is reached, for scripts.
const ENDPOINT_FILE: &str = "endpoint.json";
/// How often the receiver's certificate, good for a week, is made anew.
const CERTIFICATE_INTERVAL: Duration = Duration::from_secs(24 * 3600);
/// How long a stop waits for the store to take what is closed.
const DRAIN_TIME: Duration = Duration::from_secs(60);
/// How long a stop waits for the store to take the news of it.
const FAREWELL_TIME: Duration = Duration::from_secs(5);
/// Times that a free port is sought which both TCP and UDP can have.
const PORT_ATTEMPTS: u32 = 64;

/// Why the receiver did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The data directory can't be used.
    #[error("data directory {}: {source}; choose another --data-dir, or make room and give write access", path.display())]
    DataDir {
        /// The directory or file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// Another receiver uses it.
    #[error("data directory {} is in use by another receiver: stop it, or choose another --data-dir", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The receiver's own identity can't be read.
    #[error(transparent)]
    Identity(#[from] IdentityFileError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The fleet.
    #[error(transparent)]
    Fleet(#[from] FleetError),
    /// The stage.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// The port for control.
    #[error("can't listen on TCP {address}: {source}; choose another --listen, or stop what uses it")]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// The system's error.
        source: std::io::Error,
    },
    /// QUIC.
    #[error(transparent)]
    Quic(#[from] QuicError),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
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

/// Serves until a signal.
///
/// # Errors
/// [`ServerError`], naming the thing and the next step.
pub async fn run(config: RunConfig) -> Result<ExitCode, ServerError> {
    let clock = Clock::System;
    let shutdown = Shutdown::install().map_err(|error| process("signals", &error))?;
    let recorder = process_metrics::install_recorder().map_err(|error| process("metrics", &error))?;
    describe_metrics();
    tracing::info!("memory budget:\n{}", config.memory);
    let data_dir = config.fleet.data_dir.clone();
    let _lock = identity::take(&data_dir)?;
    let _ = std::fs::remove_file(data_dir.join(ENDPOINT_FILE));
    let receiver = identity::load_or_create(&data_dir)?;

    let store = config.fleet.open_store().await?;
    store.probe().await?;
    let fleet = Arc::new(Fleet::open_or_create(&store, &data_dir, clock.clone()).await?);
    let (stage, stage_capacity) = open_stage(&config, &data_dir).await?;

    let (tcp, endpoint, address) = {
        let certificate = ServerCertificate::new(&fleet.authority.issue_receiver(receiver, &config.name)?)?;
        tokio::spawn(keep_certified(Arc::clone(&fleet), Arc::clone(&certificate), receiver, config.name.clone()));
        let control = tls::server_config(
            fleet.authority.public(),
            Arc::clone(&certificate),
            ClientCertificate::Optional,
            tls::ALPN_CONTROL,
        )?;
        let (listener, endpoint, address) = bind(&config, &fleet, &certificate).await?;
        ((listener, control), endpoint, address)
    };

    let forward_memory = Budget::new(MemoryTable::new(config.segment_memory_bytes))?;
    let forwarder = Forwarder::start(
        stage.clone(),
        store.clone(),
        ForwardConfig {
            receiver,
            segment_bytes: config.segment_bytes,
            linger: config.segment_linger,
            upload_concurrency: config.upload_concurrency,
        },
        forward_memory,
        clock.clone(),
    );
    let volumes = Arc::new(Volumes::new(
        Arc::new(StageOfVolumes(stage.clone())),
        Arc::new(forwarder.handle()),
        Arc::new(StoreOfVolumes { store: store.clone(), forward: forwarder.handle() }),
    ));
    let reports = tokio::spawn(staging::report(forwarder.events(), Arc::clone(&volumes)));
    let relieving = tokio::spawn(staging::relieve(stage.intake(), Arc::clone(&volumes)));
    volumes.recover().await;

    let draining = Draining::default();
    let standing = {
        let (stage, volumes) = (stage.clone(), Arc::clone(&volumes));
        move || {
            let (volumes, sessions) = volumes.counts();
            Standing { stage_used: stage.used_bytes(), volumes, sessions }
        }
    };
    let place = Place {
        receiver,
        name: config.name.clone(),
        addresses: config.addresses(address),
        stage_capacity,
        heartbeat: config.heartbeat,
    };
    let registry = Registry::new(store.clone(), clock.clone(), place, standing)?;
    let registry = Arc::new(registry);
    let service =
        ControlService::new(Arc::clone(&fleet), store.clone(), Arc::clone(&volumes), receiver, Arc::clone(&registry));
    let routes = tonic::service::Routes::new(pb::control_server::ControlServer::new(service));
    let stop = CancellationToken::new();
    let (listener, control) = tcp;
    let serving = tokio::spawn(grpc::serve(listener, Arc::new(control), routes, stop.clone().cancelled_owned()));
    let budget = Budget::new(config.memory.clone())?;
    let acceptor = Arc::new(Acceptor {
        volumes: Arc::clone(&volumes),
        budget: budget.clone(),
        revoked: revoked(Arc::clone(&fleet)),
        draining: draining.clone(),
        window_bytes: config.quic_memory_bytes,
        limits: AcceptLimits::default(),
    });
    let accepting = tokio::spawn(accept::run(endpoint, acceptor, stop.clone()));

    let readiness = Readiness::new(&["stage"]);
    readiness.set("stage", true);
    let (listen, chosen) = config.metrics_listen;
    let scrape = scrape(budget, stage.intake(), readiness.clone());
    let metrics = Endpoint::new(recorder, readiness).on_scrape(scrape).serve(listen, chosen).await?;
    let left = staging::left(stage.clone(), Arc::clone(&volumes));
    let commands = drain::serve(&data_dir, draining.clone(), left)
        .map_err(|source| ServerError::DataDir { path: data_dir.join("control.sock"), source })?;
    registry.announce(ReceiverState::Serving).await;
    let heartbeat = registry::start(&registry);
    let obeying = tokio::spawn(staging::drain_once_asked(
        draining.clone(),
        Arc::clone(&registry),
        Arc::clone(&volumes),
        stage.clone(),
    ));
    write_endpoint(&data_dir, address, metrics.as_ref().map(|serving| serving.address))?;
    tracing::info!(%address, fleet = %fleet.id(), receiver = %receiver, store = store.url(), "ready");

    let signal = shutdown.requested().await;
    tracing::info!("stopping: what is closed is forwarded first; a second signal ends at once");
    let _ = std::fs::remove_file(data_dir.join(ENDPOINT_FILE));
    draining.begin();
    stop.cancel();
    let _ = accepting.await;
    let _ = serving.await;
    if tokio::time::timeout(DRAIN_TIME, forwarder.drain()).await.is_err() {
        tracing::warn!(
            "the store did not take all that is closed in time; the rest stays staged and goes at the next start"
        );
    }
    drop(heartbeat);
    if tokio::time::timeout(FAREWELL_TIME, registry.announce(ReceiverState::Gone)).await.is_err() {
        tracing::warn!("the store did not take the news that this receiver stopped: it is shown as stale");
    }
    for task in [reports, relieving, obeying] {
        task.abort();
        let _ = task.await;
    }
    drop((commands, registry, volumes));
    stage.shutdown().await;
    tracing::info!("stopped");
    Ok(signal.exit_code())
}

async fn open_stage(config: &RunConfig, data_dir: &Path) -> Result<(Stage, u64), ServerError> {
    let dir = data_dir.join("stage");
    let failed = |source: std::io::Error| ServerError::DataDir { path: data_dir.to_owned(), source };
    let disk = rustix::fs::statvfs(data_dir).map_err(|error| failed(error.into()))?;
    let capacity = config.stage_capacity_on(disk.f_bavail.saturating_mul(disk.f_frsize));
    let sizes = StageConfig::new(capacity.bytes(), config.stage_memory_bytes)?;
    let opened = tokio::task::spawn_blocking(move || Stage::open(&dir, sizes)).await;
    let (stage, recovered) = opened.map_err(|error| process("the stage", &error))??;
    let epochs: usize = recovered.volumes.iter().map(|volume| volume.epochs.len()).sum();
    tracing::info!(
        capacity = %ByteCount(capacity.bytes()), used = %ByteCount(stage.used_bytes()), volumes = recovered.volumes.len(), epochs,
        damaged = recovered.damaged.len(), "stage open"
    );
    Ok((stage, capacity.bytes()))
}

/// TCP and UDP sockets on one port number: the one asked for, or for port 0 one that both can have.
async fn bind(
    config: &RunConfig,
    fleet: &Fleet,
    certificate: &Arc<ServerCertificate>,
) -> Result<(TcpListener, quinn::Endpoint, SocketAddr), ServerError> {
    let listen = config.listen;
    let tuning =
        quic::QuicTuning { reset_key: Some(identity::reset_key(&config.fleet.data_dir)?), ..config.quic.clone() };
    let mut attempt = 0;
    loop {
        attempt += 1;
        let failed = |source| ServerError::Listen { address: listen, source };
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let data = tls::server_config(
            fleet.authority.public(),
            Arc::clone(certificate),
            ClientCertificate::Required,
            tls::ALPN_DATA,
        )?;
        match quic::server_endpoint(address, data, &tuning) {
            Ok((endpoint, granted)) => {
                if granted.receive_bytes < 1 << 20 {
                    tracing::warn!(
                        granted = granted.receive_bytes,
                        "the kernel grants small UDP buffers, which costs throughput: raise net.core.rmem_max and net.core.wmem_max"
                    );
                }
                return Ok((listener, endpoint, address));
            }
            Err(QuicError::Bind { .. }) if listen.port() == 0 && attempt < PORT_ATTEMPTS => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Asks the fleet; where the store can't be asked, the certificate, which TLS verified, is enough for now: an outage of the
/// store must not stop machines from being protected.
fn revoked(fleet: Arc<Fleet>) -> Revoked {
    let handle = tokio::runtime::Handle::current();
    Arc::new(move |peer| {
        let admitted = tokio::task::block_in_place(|| handle.block_on(fleet.admit(peer)));
        match admitted {
            Ok(_) => false,
            Err(FleetError::Revoked { .. } | FleetError::WrongRole { .. }) => true,
            Err(error) => {
                tracing::warn!(machine = %peer.name, %error, "could not ask whether a certificate was revoked");
                false
            }
        }
    })
}

async fn keep_certified(
    fleet: Arc<Fleet>,
    certificate: Arc<ServerCertificate>,
    receiver: common::ids::ReceiverId,
    name: String,
) {
    loop {
        tokio::time::sleep(CERTIFICATE_INTERVAL).await;
        let renewed = fleet.authority.issue_receiver(receiver, &name).map_err(|error| error.to_string());
        let renewed =
            renewed.and_then(|credentials| certificate.replace(&credentials).map_err(|error| error.to_string()));
        if let Err(error) = renewed {
            tracing::error!(%error, "could not renew this receiver's certificate; trying again tomorrow");
        }
    }
}

fn write_endpoint(data_dir: &Path, listen: SocketAddr, metrics: Option<SocketAddr>) -> Result<(), ServerError> {
    let path = data_dir.join(ENDPOINT_FILE);
    let text =
        serde_json::json!({ "listen": listen.to_string(), "metrics": metrics.map(|address| address.to_string()) });
    let fresh = data_dir.join(format!("{ENDPOINT_FILE}.new"));
    let written = std::fs::write(&fresh, text.to_string()).and_then(|()| std::fs::rename(&fresh, &path));
    written.map_err(|source| ServerError::DataDir { path, source })
}

fn scrape(
    budget: Budget,
    intake: tokio::sync::watch::Receiver<crate::stage::Intake>,
    readiness: Readiness,
) -> impl Fn() + Send + Sync + 'static {
    move || {
        process_metrics::record();
        #[expect(clippy::cast_precision_loss, reason = "metrics are floating point")]
        let gauge = |name: &'static str, value: u64| metrics::gauge!(name).set(value as f64);
        gauge("blockferry_receiver_memory_budget_bytes", budget.total());
        gauge("blockferry_receiver_memory_used_bytes", process_metrics::usage().resident_bytes);
        gauge("blockferry_receiver_payload_bytes", budget.used());
        readiness.set("stage", !matches!(*intake.borrow(), crate::stage::Intake::Failed(_)));
    }
}

fn process(what: &'static str, error: &dyn std::error::Error) -> ServerError {
    ServerError::Process { what, reason: error.to_string() }
}

fn describe_metrics() {
    use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram};
    describe_gauge!("blockferry_receiver_memory_budget_bytes", Unit::Bytes, "Memory that the process may use.");
    describe_gauge!("blockferry_receiver_memory_used_bytes", Unit::Bytes, "Resident memory of the process.");
    describe_gauge!("blockferry_receiver_payload_bytes", Unit::Bytes, "Records in flight, charged to the budget.");
    describe_gauge!("blockferry_receiver_stage_used_bytes", Unit::Bytes, "Bytes that the stage holds.");
    describe_gauge!("blockferry_receiver_stage_capacity_bytes", Unit::Bytes, "Bytes that the stage may hold.");
    describe_gauge!("blockferry_receiver_stage_records", Unit::Count, "Records that the stage holds.");
    describe_gauge!(
        "blockferry_receiver_stage_intake_open",
        Unit::Count,
        "1 while the stage takes records in, else 0."
    );
    describe_counter!(
        "blockferry_receiver_received_bytes_total",
        Unit::Bytes,
        "Record bytes received, without transport overhead."
    );
    describe_counter!("blockferry_receiver_committed_bytes_total", Unit::Bytes, "Record bytes committed to the store.");
    describe_counter!("blockferry_receiver_points_total", Unit::Count, "Committed recovery points, by consistency.");
    describe_counter!(
        "blockferry_receiver_takeovers_total",
        Unit::Count,
        "Volumes taken over from other receivers of the fleet."
    );
    describe_gauge!("blockferry_receiver_draining", Unit::Count, "1 from a drain's begin on, else 0.");
    describe_counter!("blockferry_receiver_errors_total", Unit::Count, "Errors, by kind.");
    describe_gauge!("blockferry_receiver_connections", Unit::Count, "Connections of machines.");
    describe_histogram!(
        "blockferry_receiver_stage_batch_bytes",
        Unit::Bytes,
        "Sizes of batches made durable in the stage."
    );
    describe_histogram!("blockferry_receiver_stage_commit_seconds", Unit::Seconds, "Time to make a batch durable.");
    describe_histogram!("blockferry_receiver_upload_seconds", Unit::Seconds, "Time to store a segment.");
    describe_counter!("blockferry_store_requests_total", Unit::Count, "Requests to the object store, by operation.");
    // Series that alerts look at exist from the start, so that their first increase is seen.
    counter!("blockferry_receiver_received_bytes_total").increment(0);
    counter!("blockferry_receiver_committed_bytes_total").increment(0);
}
