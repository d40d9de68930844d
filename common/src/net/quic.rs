//! QUIC endpoints for data, tuned by what figures.md measured.
//!
//! What each setting is for: socket buffers of several MiB, since the kernel's default overflows silently at speed;
//! windows no larger than the bandwidth-delay product needs, since what they hold is memory of the budget; segmentation
//! offload always; packets as large as the path takes, up to [`MTU_MAX_BYTES`].
//!
//! Worst-case memory of one connection: `connection_window_bytes` unread at the receiving end and `send_window_bytes`
//! unacknowledged at the sending end. Payload the application has read is its own to count.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Connection, Endpoint, EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt};
use rustls_pki_types::CertificateDer;
use socket2::{Domain, Protocol, Socket, Type};

use super::identity::{IdentityError, PeerIdentity, SERVER_NAME};
use super::resolve::{HostError, HostPort};
use crate::error::{Dispose, Disposition};
use crate::limits;

/// Largest packet that discovery tries: with segmentation offload ten segments must fit one send of 64 KiB; above some
/// 6,550 bytes throughput collapses (figures.md).
pub const MTU_MAX_BYTES: u16 = 6_500;
/// Longest wait for one address to complete the handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections not yet accepted by the application, and what they may have sent already.
const INCOMING_MAX: usize = 256;
const INCOMING_BYTES_MAX: u64 = 8 << 20;

/// Which algorithm finds the rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Congestion {
    /// The default everywhere.
    #[default]
    Cubic,
    /// For long paths that lose packets for reasons other than congestion.
    Bbr,
}

impl std::str::FromStr for Congestion {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "cubic" => Ok(Self::Cubic),
            "bbr" => Ok(Self::Bbr),
            other => Err(format!("expected cubic or bbr, found \"{other}\"")),
        }
    }
}

/// An endpoint's settings.
#[derive(Debug, Clone)]
pub struct QuicTuning {
    /// Unread bytes that one stream may hold here.
    pub stream_window_bytes: u32,
    /// Unread bytes that all streams of a connection may hold here.
    pub connection_window_bytes: u32,
    /// Unacknowledged bytes that a connection may hold here.
    pub send_window_bytes: u64,
    /// Data streams that the peer may open on one connection.
    pub streams_max: u32,
    /// Silence after which a client shows that it lives.
    pub keep_alive: Duration,
    /// Silence after which a connection is given up.
    pub idle_timeout: Duration,
    /// How the rate is found.
    pub congestion: Congestion,
    /// Socket buffer to ask the kernel for, each way.
    pub socket_buffer_bytes: usize,
    /// Largest packet to try.
    pub mtu_max_bytes: u16,
    /// Secret that a server keeps over restarts: with it, it can tell the peers of its predecessor, which was killed, that
    /// their connections are gone (stateless reset, RFC 9000 §10.3). They reconnect at once then, and not after
    /// `idle_timeout`. `None`: drawn anew at each start.
    pub reset_key: Option<[u8; 32]>,
}

impl Default for QuicTuning {
    fn default() -> Self {
        Self {
            stream_window_bytes: 4 << 20,
            connection_window_bytes: 8 << 20,
            send_window_bytes: 8 << 20,
            streams_max: 1_024,
            keep_alive: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(30),
            congestion: Congestion::Cubic,
            socket_buffer_bytes: 8 << 20,
            mtu_max_bytes: MTU_MAX_BYTES,
            reset_key: None,
        }
    }
}

const _: () = assert!(1_024 >= limits::STREAMS_PER_SESSION_MAX * limits::SESSIONS_PER_CONNECTION_MAX);

/// The socket buffers that the kernel gave, usable bytes. Less than some MiB costs throughput: `preflight` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrantedBuffers {
    /// For what arrives.
    pub receive_bytes: usize,
    /// For what leaves.
    pub send_bytes: usize,
}

/// Why there is no endpoint or no connection.
#[derive(Debug, thiserror::Error)]
pub enum QuicError {
    /// The address can't be bound.
    #[error("can't listen on UDP {address}: {source}; choose another --listen, or stop what uses it")]
    Bind {
        /// As configured.
        address: SocketAddr,
        /// The system's error.
        source: std::io::Error,
    },
    /// The endpoint can't be made.
    #[error("can't set up QUIC: {0}")]
    Setup(String),
    /// The host has no address.
    #[error(transparent)]
    Host(#[from] HostError),
    /// No address completed a handshake.
    #[error("no QUIC connection to {host}: {tried}; check that the receiver runs and that UDP gets through")]
    Unreachable {
        /// The host.
        host: HostPort,
        /// Each address and what came of it.
        tried: String,
    },
    /// The peer showed no certificate of the profile.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

impl Dispose for QuicError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Bind { .. } | Self::Identity(_) => Disposition::BadInput,
            Self::Setup(_) => Disposition::Bug,
            Self::Host(error) => error.disposition(),
            Self::Unreachable { .. } => Disposition::Retry,
        }
    }
}

/// An endpoint that serves on `listen` (port 0: any). Must be called within a runtime.
///
/// # Errors
/// [`QuicError::Bind`], [`QuicError::Setup`].
pub fn server_endpoint(
    listen: SocketAddr,
    tls: rustls::ServerConfig,
    tuning: &QuicTuning,
) -> Result<(Endpoint, GrantedBuffers), QuicError> {
    let crypto = QuicServerConfig::try_from(tls).map_err(|error| QuicError::Setup(error.to_string()))?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(Arc::new(transport(tuning)?));
    config.max_incoming(INCOMING_MAX).incoming_buffer_size_total(INCOMING_BYTES_MAX);
    let socket = socket(listen).map_err(|source| QuicError::Bind { address: listen, source })?;
    endpoint(socket, Some(config), tuning)
}

/// An endpoint for clients: IPv6 and IPv4 on one socket where the machine has IPv6. Must be called within a runtime.
///
/// # Errors
/// [`QuicError::Bind`], [`QuicError::Setup`].
pub fn client_endpoint(tuning: &QuicTuning) -> Result<(Endpoint, GrantedBuffers), QuicError> {
    let any_v6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    let any_v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let socket = socket(any_v6).or_else(|_| socket(any_v4));
    endpoint(socket.map_err(|source| QuicError::Bind { address: any_v4, source })?, None, tuning)
}

/// Connects to the receiver at `host`: resolves it now and tries each address. Safe to cancel.
///
/// As with all of TLS 1.3, a server that refuses this client's certificate says so just after: the first stream fails.
///
/// # Errors
/// [`QuicError::Host`], [`QuicError::Unreachable`] (its text has the peer's or TLS's reason), [`QuicError::Setup`].
pub async fn connect(
    endpoint: &Endpoint,
    host: &HostPort,
    tls: Arc<rustls::ClientConfig>,
    tuning: &QuicTuning,
) -> Result<Connection, QuicError> {
    let crypto = QuicClientConfig::try_from(tls).map_err(|error| QuicError::Setup(error.to_string()))?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport(tuning)?));
    let mut tried = Vec::new();
    for address in host.resolve().await? {
        let connecting = match endpoint.connect_with(config.clone(), address, SERVER_NAME) {
            Ok(connecting) => connecting,
            Err(error) => {
                tried.push(format!("{address} {error}"));
                continue;
            }
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(error)) => tried.push(format!("{address} {error}")),
            Err(_) => tried.push(format!("{address} no answer in {} s", CONNECT_TIMEOUT.as_secs())),
        }
    }
    Err(QuicError::Unreachable { host: host.clone(), tried: tried.join(", ") })
}

/// Whom a connection's verified certificate stands for.
///
/// # Errors
/// [`IdentityError`], also where the peer showed none.
pub fn peer_identity(connection: &Connection) -> Result<PeerIdentity, IdentityError> {
    let chain = connection.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    let empty = CertificateDer::from_slice(&[]);
    PeerIdentity::from_certificate(chain.as_deref().and_then(|chain| chain.first()).unwrap_or(&empty))
}

fn transport(tuning: &QuicTuning) -> Result<TransportConfig, QuicError> {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(tuning.mtu_max_bytes.min(MTU_MAX_BYTES));
    let idle = tuning.idle_timeout.try_into().map_err(|_| QuicError::Setup("idle timeout out of range".into()))?;
    let mut transport = TransportConfig::default();
    transport
        .stream_receive_window(VarInt::from_u32(tuning.stream_window_bytes))
        .receive_window(VarInt::from_u32(tuning.connection_window_bytes))
        .send_window(tuning.send_window_bytes)
        .max_concurrent_bidi_streams(VarInt::from_u32(tuning.streams_max))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .keep_alive_interval(Some(tuning.keep_alive))
        .max_idle_timeout(Some(idle))
        .mtu_discovery_config(Some(mtu))
        .enable_segmentation_offload(true);
    match tuning.congestion {
        Congestion::Cubic => {
            transport.congestion_controller_factory(Arc::new(quinn::congestion::CubicConfig::default()));
        }
        Congestion::Bbr => {
            transport.congestion_controller_factory(Arc::new(quinn::congestion::BbrConfig::default()));
        }
    }
    Ok(transport)
}

fn socket(address: SocketAddr) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn endpoint(
    socket: Socket,
    server: Option<quinn::ServerConfig>,
    tuning: &QuicTuning,
) -> Result<(Endpoint, GrantedBuffers), QuicError> {
    let failed = |error: std::io::Error| QuicError::Setup(error.to_string());
    // With the privilege the kernel gives what is asked; else up to net.core.{r,w}mem_max. What it gave is told.
    if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, tuning.socket_buffer_bytes).is_err() {
        socket.set_recv_buffer_size(tuning.socket_buffer_bytes).map_err(failed)?;
    }
    if rustix::net::sockopt::set_socket_send_buffer_size_force(&socket, tuning.socket_buffer_bytes).is_err() {
        socket.set_send_buffer_size(tuning.socket_buffer_bytes).map_err(failed)?;
    }
    // Linux reports double the usable size.
    let granted = GrantedBuffers {
        receive_bytes: socket.recv_buffer_size().map_err(failed)? / 2,
        send_bytes: socket.send_buffer_size().map_err(failed)? / 2,
    };
    let mut config = match &tuning.reset_key {
        Some(key) => {
            let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key);
            let mut config = EndpointConfig::new(Arc::new(key));
            config.cid_generator(|| Box::new(PlainIds));
            config
        }
        None => EndpointConfig::default(),
    };
    // What this end takes; its default would keep the peer's discovery at Ethernet's size.
    config.max_udp_payload_size(MTU_MAX_BYTES).map_err(|error| QuicError::Setup(error.to_string()))?;
    let endpoint = Endpoint::new(config, server, socket.into(), Arc::new(quinn::TokioRuntime)).map_err(failed)?;
    Ok((endpoint, granted))
}

/// Random connection ids without a mark of who made them. (The default's mark is drawn at each start, and packets without it
/// are dropped silently, where a reset is wanted.)
struct PlainIds;

/// Bytes of a connection id.
const CONNECTION_ID_BYTES: usize = 8;

impl quinn::ConnectionIdGenerator for PlainIds {
    fn generate_cid(&mut self) -> quinn::ConnectionId {
        // Without randomness there would be no TLS either; a repeated id is refused by the endpoint and drawn again.
        quinn::ConnectionId::new(&crate::rng::random::<CONNECTION_ID_BYTES>().unwrap_or_default())
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}
