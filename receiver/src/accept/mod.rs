//! Accepting senders: QUIC connections, their streams, and whom they may speak for.
//!
//! Every connection has been authenticated by TLS when it gets here. It may claim volumes of its own machine only. Each
//! claim (an `Open` frame) begins a session of its own, with one reading and one writing task for each stream; what the
//! session does is `common::session`'s to say, through [`Volume`](crate::volumes::Volume).
//!
//! Backpressure: before a record is read off its stream, the stage must admit its volume and the memory budget must have
//! room for it. Until then nothing is read, QUIC's flow control fills up, and the sender stops.
//!
//! Bounds: connections in all and of each machine; sessions of a connection; the time until a handshake, a stream's first
//! frame and a frame begun are complete; frames other than records in size. So a slow or silent peer holds no more
//! than its share of QUIC's windows and one record for each of its streams.
//!
//! Never: opens a record (there is no key here), acknowledges on its own, or lets one machine see another's volumes: a
//! volume that is not the machine's is refused like one that does not exist.

mod connection;
mod stream;
mod windows;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::budget::Budget;
use common::format::frame::RefusalCode;
use common::ids::MachineId;
use common::net::identity::PeerIdentity;
use common::net::quic::peer_identity;
use quinn::{Endpoint, Incoming, VarInt};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::drain::Draining;
use crate::volumes::Volumes;
use windows::Windows;
pub use windows::window_of;

/// Bounds of what peers may take up.
#[derive(Debug, Clone)]
pub struct AcceptLimits {
    /// Connections in all.
    pub connections_max: usize,
    /// Connections of one machine: one in use, and those that its network has not yet seen die. The oldest goes first.
    pub machine_connections_max: usize,
    /// Until a connection's handshake is complete.
    pub handshake_time: Duration,
    /// Until a stream's first frame is there.
    pub first_frame_time: Duration,
    /// Longest pause within a frame that has begun.
    pub pause_time: Duration,
    /// How long a connection may stand without ever having opened a volume.
    pub unused_time: Duration,
}

impl Default for AcceptLimits {
    fn default() -> Self {
        Self {
            connections_max: 1_024,
            machine_connections_max: 8,
            handshake_time: Duration::from_secs(10),
            first_frame_time: Duration::from_secs(10),
            pause_time: Duration::from_secs(60),
            unused_time: Duration::from_secs(60),
        }
    }
}

/// Tells whether a certificate was revoked.
pub type Revoked = Arc<dyn Fn(&PeerIdentity) -> bool + Send + Sync>;

/// What accepting needs.
pub struct Acceptor {
    /// The volumes.
    pub volumes: Arc<Volumes>,
    /// Memory for records between wire and stage.
    pub budget: Budget,
    /// Revocation, asked at each connection and each claim.
    pub revoked: Revoked,
    /// Whether senders are to go elsewhere.
    pub draining: Draining,
    /// Unread bytes that all connections together may hold.
    pub window_bytes: u64,
    /// Bounds.
    pub limits: AcceptLimits,
}

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Acceptor").field("limits", &self.limits).finish_non_exhaustive()
    }
}

/// Close codes of connections, for logs at the other end.
const CLOSED_SHUTDOWN: VarInt = VarInt::from_u32(0);
const CLOSED_NOT_ALLOWED: VarInt = VarInt::from_u32(2);
const CLOSED_UNUSED: VarInt = VarInt::from_u32(3);
/// Senders go to another receiver on it.
const CLOSED_DRAINING: VarInt = VarInt::from_u32(4);
/// How long peers have to take the news that this receiver stops.
const FAREWELL_TIME: Duration = Duration::from_millis(500);
const DRAINS: &str =
    "this receiver drains: go to another one of the fleet, or come back once it has been started again";

/// Accepts connections on `endpoint` until `stop`; then tells every sender to go elsewhere, or to come back, and returns once the
/// connections are gone. While it drains, senders are told so and nothing else.
pub async fn run(endpoint: Endpoint, acceptor: Arc<Acceptor>, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(acceptor.limits.connections_max));
    let machines = Arc::new(Machines::default());
    let windows = Arc::new(Windows::new(acceptor.window_bytes));
    let tasks = TaskTracker::new();
    // Ends every connection's task, a moment after the sessions were told.
    let over = CancellationToken::new();
    let mut told = false;
    loop {
        let incoming = tokio::select! {
            () = stop.cancelled() => break,
            () = acceptor.draining.asked(), if !told => {
                told = true;
                acceptor.volumes.end_all(RefusalCode::Draining, DRAINS);
                let over = over.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(FAREWELL_TIME).await;
                    over.cancel();
                });
                continue;
            }
            incoming = endpoint.accept() => match incoming {
                Some(incoming) => incoming,
                None => break,
            },
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            count("too_many_connections");
            incoming.refuse();
            continue;
        };
        let (acceptor, machines, over) = (Arc::clone(&acceptor), Arc::clone(&machines), over.clone());
        let windows = Arc::clone(&windows);
        tasks.spawn(async move {
            serve(incoming, acceptor, machines, windows, over).await;
            drop(place);
        });
    }
    tasks.close();
    acceptor.volumes.end_all(RefusalCode::Draining, DRAINS);
    let _ = tokio::time::timeout(FAREWELL_TIME, tasks.wait()).await;
    over.cancel();
    tasks.wait().await;
    endpoint.close(CLOSED_SHUTDOWN, b"the receiver is stopping");
    let _ = tokio::time::timeout(FAREWELL_TIME, endpoint.wait_idle()).await;
}

async fn serve(
    incoming: Incoming,
    acceptor: Arc<Acceptor>,
    machines: Arc<Machines>,
    windows: Arc<Windows>,
    over: CancellationToken,
) {
    let remote = incoming.remote_address();
    let handshake = tokio::time::timeout(acceptor.limits.handshake_time, incoming);
    let connection = match handshake.await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            count("handshake");
            tracing::info!(%remote, %error, "a handshake failed");
            return;
        }
        Err(_) => {
            count("handshake");
            tracing::info!(%remote, "a handshake took too long");
            return;
        }
    };
    let refuse = |kind: &'static str, reason: &str| {
        count(kind);
        tracing::warn!(%remote, reason, "a connection was refused");
        connection.close(CLOSED_NOT_ALLOWED, reason.as_bytes());
    };
    let peer = match peer_identity(&connection) {
        Ok(peer) => peer,
        Err(error) => return refuse("identity", &error.to_string()),
    };
    let Some(machine) = peer.machine() else {
        return refuse("role", "only a machine's certificate may send data");
    };
    if (acceptor.revoked)(&peer) {
        return refuse("revoked", "this certificate was revoked");
    }
    if acceptor.draining.is_asked() {
        count("draining");
        tracing::info!(%remote, machine = peer.name, "a machine was told to go elsewhere");
        connection.close(CLOSED_DRAINING, DRAINS.as_bytes());
        return;
    }
    let _window = windows.enter(&connection);
    let place = machines.enter(machine, acceptor.limits.machine_connections_max, over.child_token());
    tracing::info!(%remote, machine = peer.name, "a machine connected");
    metrics::gauge!("blockferry_receiver_connections").increment(1.0);
    let reason = connection::serve(&acceptor, &connection, &peer, &place.over).await;
    metrics::gauge!("blockferry_receiver_connections").decrement(1.0);
    tracing::info!(%remote, machine = peer.name, reason, "a machine's connection ended");
}

fn count(kind: &'static str) {
    metrics::counter!("blockferry_receiver_errors_total", "kind" => kind).increment(1);
}

/// Connections of each machine, oldest first.
#[derive(Debug, Default)]
struct Machines {
    open: Mutex<HashMap<MachineId, VecDeque<(u64, CancellationToken)>>>,
    next: AtomicU64,
}

impl Machines {
    /// Enters a connection, which `over` ends. Where the machine has `max` already, the oldest is ended: a machine needs one,
    /// and those of senders that were killed stand until their idle timeout.
    fn enter(self: &Arc<Self>, machine: MachineId, max: usize, over: CancellationToken) -> MachinePlace {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let connections = open.entry(machine).or_default();
        connections.push_back((number, over.clone()));
        while connections.len() > max {
            if let Some((_, oldest)) = connections.pop_front() {
                oldest.cancel();
            }
        }
        MachinePlace { machines: Arc::clone(self), machine, number, over }
    }
}

/// A connection's place, given back when dropped.
struct MachinePlace {
    machines: Arc<Machines>,
    machine: MachineId,
    number: u64,
    over: CancellationToken,
}

impl Drop for MachinePlace {
    fn drop(&mut self) {
        let mut open = self.machines.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connections) = open.get_mut(&self.machine) {
            connections.retain(|(number, _)| *number != self.number);
            if connections.is_empty() {
                open.remove(&self.machine);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_with_too_many_connections_loses_its_oldest() {
        let machines = Arc::new(Machines::default());
        let machine = MachineId([1; 16]);
        let enter = |machine| machines.enter(machine, 2, CancellationToken::new());
        let (first, second, other) = (enter(machine), enter(machine), enter(MachineId([2; 16])));
        assert!(!first.over.is_cancelled());
        let third = enter(machine);
        assert!(first.over.is_cancelled());
        assert!(!second.over.is_cancelled() && !third.over.is_cancelled() && !other.over.is_cancelled());
        drop((first, third));
        let fourth = enter(machine);
        assert!(!second.over.is_cancelled(), "places given back are free again");
        drop((second, fourth, other));
        assert!(machines.open.lock().expect("not poisoned").is_empty());
    }
}
