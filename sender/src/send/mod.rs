//! Sending: drives [`common::session::SenderSession`] over QUIC.
//!
//! One [`Sender`] keeps one connection to one of the fleet's receivers, and makes it anew with backoff and jitter whenever it
//! breaks, there or to another one ([`Choice`]), until it is told to stop. Any number of volumes share it, each with streams of its own; QUIC serves streams in turn, so that
//! none starves. A [`VolumeSender`] takes sealed records with their budget permits, and closes; [`VolumeEvents`] tells
//! what became of them.
//!
//! Promises: a record's permit is given back once the receiver holds the record durably, or its epoch is dropped or lost;
//! what the receiver acknowledged is not sent again; payload is not copied between sealing and encryption; memory is
//! bounded by the permits. Events wait in the session, merged, so that a slow owner never stops acknowledgements.
//! Tested against the receiver's own accepting side in `tests/tests/session_loopback.rs`.
//! Never: reads a disk, seals, or decides what is in an epoch.

mod choice;
mod connection;
mod race;
mod volume;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::error::{Dispose, Disposition};
use common::limits;
use common::net::quic::QuicTuning;
use common::session::{OfferError, SenderConfig};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use choice::{Choice, KnownReceiver};
pub use volume::{Sent, VolumeEvents, VolumeSender};

/// Why a record or close was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The session has ended: the receiver refused it for good, or the sender stopped.
    #[error("the session of this volume has ended")]
    Ended,
    /// The offer breaks the order of things.
    #[error(transparent)]
    Offer(#[from] OfferError),
    /// One connection carries no more volumes.
    #[error("this sender has {0} volumes already, one connection carries no more")]
    TooManyVolumes(usize),
}

impl Dispose for SendError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Ended => Disposition::Reconnect,
            Self::Offer(error) => error.disposition(),
            Self::TooManyVolumes(_) => Disposition::BadInput,
        }
    }
}

/// Where and how to connect.
#[derive(Debug, Clone)]
pub struct Route {
    /// The client's endpoint.
    pub endpoint: quinn::Endpoint,
    /// The fleet's receivers; asked at each attempt.
    pub choice: Choice,
    /// Identity and authority; the newest is taken at each attempt, so that a renewed certificate serves from then on.
    pub tls: watch::Receiver<Arc<rustls::ClientConfig>>,
    /// Windows, timeouts.
    pub tuning: QuicTuning,
}

/// How the connection stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LinkState {
    /// True while there is a connection.
    pub connected: bool,
    /// The receiver that it leads to, or led to last; empty before the first.
    pub receiver: String,
    /// Attempts that failed since the last connection that lasted.
    pub failed_attempts: u32,
    /// What went wrong last; `None` before anything did.
    pub last_error: Option<String>,
    /// Set where the receiver closed the connection because of who this machine is (revoked, of another role): trying again
    /// will not help.
    pub refused: Option<String>,
}

/// The connection to the receiver, shared by volumes. Clones share it; it ends by [`Self::stop`].
#[derive(Debug, Clone)]
pub struct Sender {
    connection: watch::Receiver<Option<quinn::Connection>>,
    state: watch::Receiver<LinkState>,
    stop: CancellationToken,
    volumes: Arc<AtomicUsize>,
    choice: Choice,
}

impl Sender {
    /// Starts connecting. Must be called within a runtime.
    #[must_use]
    pub fn start(route: Route) -> Self {
        let stop = CancellationToken::new();
        let (connection_tx, connection) = watch::channel(None);
        let (state_tx, state) = watch::channel(LinkState::default());
        let choice = route.choice.clone();
        tokio::spawn(connection::keep(route, connection_tx, state_tx, stop.clone()));
        Self { connection, state, stop, volumes: Arc::default(), choice }
    }

    /// How the connection stands; changes wake the listener.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<LinkState> {
        self.state.clone()
    }

    /// The fleet's receivers, as they are known here.
    #[must_use]
    pub fn choice(&self) -> &Choice {
        &self.choice
    }

    /// Opens a volume's session and keeps it open over reconnections, under `name` in metrics and logs. Nothing is to be
    /// offered before [`common::session::SenderEvent::Opened`] came for the first time.
    ///
    /// # Errors
    /// [`SendError::TooManyVolumes`].
    pub fn open_volume(&self, name: &str, config: SenderConfig) -> Result<(VolumeSender, VolumeEvents), SendError> {
        let limit = limits::SESSIONS_PER_CONNECTION_MAX;
        if self.volumes.fetch_add(1, Ordering::Relaxed) >= limit {
            self.volumes.fetch_sub(1, Ordering::Relaxed);
            return Err(SendError::TooManyVolumes(limit));
        }
        let place = Place(Arc::clone(&self.volumes));
        Ok(volume::open(name, config, self.connection.clone(), self.choice.clone(), self.stop.child_token(), place))
    }

    /// Ends all sessions and the connection.
    pub fn stop(&self) {
        self.stop.cancel();
    }
}

/// A volume's place among those of its connection, given back when dropped.
#[derive(Debug)]
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
