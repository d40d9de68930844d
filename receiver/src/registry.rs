//! This receiver among the fleet's: says each minute, and at once when something changes, where it is and how it stands; and
//! knows what the others say, for machines that ask.
//!
//! Promises: a heartbeat costs two requests to the store, the list of the fleet one and one for each receiver, at most once in the
//! time of a heartbeat and only where somebody asks. A store that does not answer costs a warning; the list is then the last known.
//! Never: decides who may write a volume.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use catalog::fleet::receivers::{self, Published, Receiver, ReceiverState, Watch};
use catalog::store::Store;
use common::clock::Clock;
use common::ids::{Nonce, ReceiverId};
use common::net::pb;
use common::rng::{self, RngError};
use tokio::time::Instant;

/// Longest wait for the store where a machine waits for the list.
const LIST_TIME_MAX: Duration = Duration::from_secs(5);

/// What changes from heartbeat to heartbeat.
#[derive(Debug, Clone, Copy, Default)]
pub struct Standing {
    /// Bytes that the stage holds.
    pub stage_used: u64,
    /// Volumes loaded.
    pub volumes: usize,
    /// Volumes that a sender writes.
    pub sessions: usize,
}

/// Who and where a receiver is.
#[derive(Debug, Clone)]
pub struct Place {
    /// Its id.
    pub receiver: ReceiverId,
    /// Its name.
    pub name: String,
    /// `HOST:PORT` under which senders reach it, the best first.
    pub addresses: Vec<String>,
    /// Bytes that its stage may hold.
    pub stage_capacity: u64,
    /// How often it says that it lives.
    pub heartbeat: Duration,
}

/// This receiver among the fleet's.
pub struct Registry {
    store: Store,
    clock: Clock,
    own: Mutex<Own>,
    standing: Box<dyn Fn() -> Standing + Send + Sync>,
    heartbeat: Duration,
    list: tokio::sync::Mutex<List>,
    started: Instant,
}

struct Own {
    receiver: Receiver,
    published: bool,
}

#[derive(Default)]
struct List {
    at: Option<Instant>,
    watch: Watch,
    receivers: Vec<pb::FleetReceiver>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Registry(…)")
    }
}

impl Registry {
    /// A receiver that serves as `place` says; nothing is written yet.
    ///
    /// # Errors
    /// [`RngError`].
    pub fn new(
        store: Store,
        clock: Clock,
        place: Place,
        standing: impl Fn() -> Standing + Send + Sync + 'static,
    ) -> Result<Self, RngError> {
        let Place { receiver, name, addresses, stage_capacity, heartbeat } = place;
        let receiver = Receiver {
            nonce: Nonce::ZERO,
            receiver,
            instance: rng::random()?,
            name,
            addresses,
            state: ReceiverState::Serving,
            stage_capacity,
            stage_used: 0,
            volumes: 0,
            sessions: 0,
            heartbeat: 0,
            started: clock.now(),
            written: clock.now(),
            software: env!("CARGO_PKG_VERSION").to_owned(),
        };
        Ok(Self {
            store,
            clock,
            own: Mutex::new(Own { receiver, published: false }),
            standing: Box::new(standing),
            heartbeat,
            list: tokio::sync::Mutex::default(),
            started: Instant::now(),
        })
    }

    /// Says at each heartbeat that this receiver lives; until dropped.
    pub async fn run(&self) {
        loop {
            tokio::time::sleep(self.heartbeat).await;
            self.publish().await;
        }
    }

    /// Says at once that this receiver is in another state now.
    pub async fn announce(&self, state: ReceiverState) {
        self.lock().receiver.state = state;
        self.publish().await;
        // Whoever asks next is to hear of it.
        self.list.lock().await.at = None;
    }

    /// This receiver, as it stands now.
    pub fn own(&self) -> Receiver {
        let Standing { stage_used, volumes, sessions } = (self.standing)();
        let bounded = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let mut own = self.lock();
        own.receiver.stage_used = stage_used;
        (own.receiver.volumes, own.receiver.sessions) = (bounded(volumes), bounded(sessions));
        own.receiver.written = self.clock.now();
        own.receiver.clone()
    }

    async fn publish(&self) {
        let (receiver, first) = (self.own(), !self.lock().published);
        match receivers::publish(&self.store, &receiver, first).await {
            Ok(Published::Done) => self.lock().published = true,
            Ok(Published::SharedIdentity { name, addresses }) => {
                tracing::error!(
                    id = %receiver.receiver, other = name, at = addresses.join(", "),
                    "another process runs as the same receiver: stop one of the two, and remove receiver.id from a copied data directory"
                );
                metrics::counter!("blockferry_receiver_errors_total", "kind" => "shared_identity").increment(1);
            }
            Err(error) => {
                tracing::warn!(%error, "could not say that this receiver lives; trying again in a minute");
                metrics::counter!("blockferry_receiver_errors_total", "kind" => "heartbeat").increment(1);
            }
        }
    }

    /// The fleet's receivers that are not gone, this one among them.
    pub async fn receivers(&self) -> Vec<pb::FleetReceiver> {
        let mut list = self.list.lock().await;
        if list.at.is_none_or(|at| at.elapsed() >= self.heartbeat) {
            match tokio::time::timeout(LIST_TIME_MAX, receivers::list(&self.store)).await {
                Ok(Ok((found, errors))) => {
                    for error in errors {
                        tracing::error!(%error, "a receiver of the fleet can't be listed");
                    }
                    let now = self.started.elapsed();
                    let found = found.into_iter().map(|listed| listed.receiver);
                    let own = self.lock().receiver.receiver;
                    let watch = &mut list.watch;
                    list.receivers = found
                        .filter(|receiver| receiver.state != ReceiverState::Gone)
                        .map(|receiver| {
                            let stale = watch.observe(&receiver, now) && receiver.receiver != own;
                            shown(&receiver, stale)
                        })
                        .collect();
                }
                Ok(Err(error)) => tracing::warn!(%error, "could not list the fleet's receivers"),
                Err(_) => tracing::warn!("the store did not list the fleet's receivers in time"),
            }
            list.at = Some(Instant::now());
        }
        let mut receivers = list.receivers.clone();
        drop(list);
        let own = self.lock().receiver.clone();
        if !receivers.iter().any(|receiver| receiver.id[..] == own.receiver.0) {
            receivers.push(shown(&own, false));
        }
        receivers
    }

    fn lock(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn shown(receiver: &Receiver, stale: bool) -> pb::FleetReceiver {
    pb::FleetReceiver {
        id: receiver.receiver.0.to_vec().into(),
        name: receiver.name.clone(),
        addresses: receiver.addresses.clone(),
        draining: receiver.state == ReceiverState::Draining,
        stale,
        load_percent: receiver.load_percent(),
    }
}

/// Runs a registry for as long as it is held.
pub fn start(registry: &Arc<Registry>) -> tokio_util::task::AbortOnDropHandle<()> {
    let registry = Arc::clone(registry);
    tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move { registry.run().await }))
}
