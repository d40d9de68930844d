//! Control calls: gRPC over TLS on TCP, both ends.
//!
//! The server accepts connections itself: TLS handshakes run each in a task of its own, at most [`HANDSHAKES_MAX`] at once
//! and [`HANDSHAKE_TIMEOUT`] long, so that a peer that dawdles keeps nobody else waiting. Who the peer is (its verified
//! certificate, if it showed one) lies in each request's extensions as [`PeerInfo`]. Without a certificate only `Register`
//! reaches a handler; the other handlers check the role by [`require_machine`].
//!
//! A client's [`connect`] resolves the host anew, tries each address, finishes TLS, and only then makes a channel over
//! that one connection. When the connection is gone the channel is too: the caller connects again, with its own backoff.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::Status;
use tonic::service::Routes;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint};

use super::identity::{PeerIdentity, Role, SERVER_NAME};
use super::resolve::{HostError, HostPort};
use super::tls::PeerRefused;
use crate::error::{Dispose, Disposition};

/// TLS handshakes under way at once; further connections wait in the kernel's queue.
pub const HANDSHAKES_MAX: usize = 64;
/// Connections at once; each holds a few tens of KiB.
pub const CONNECTIONS_MAX: usize = 2_048;
/// Longest TLS handshake, at either end.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for one address to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Calls of one connection that are served at once.
const CALLS_PER_CONNECTION_MAX: usize = 32;
/// Longest call: handlers read and write the object store.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);
/// Silence after which a connection is asked for a sign of life, and how long the answer may take.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// The one call that needs no certificate.
const OPEN_CALL: &str = "/blockferry.v1.Control/Register";

/// Who sent a request: in its extensions.
#[derive(Debug, Clone)]
pub struct PeerInfo {
    /// Where from.
    pub address: SocketAddr,
    /// Its verified certificate, if it showed one.
    pub identity: Option<PeerIdentity>,
}

/// The peer of a request, who must have shown a certificate of the role machine. Whether the certificate was revoked
/// since is the fleet's to say (`catalog::fleet`).
///
/// # Errors
/// `Unauthenticated` without a certificate, `PermissionDenied` with one of another role.
pub fn require_machine<T>(request: &tonic::Request<T>) -> Result<PeerIdentity, Status> {
    require_role(request, &[Role::Machine])
}

/// As [`require_machine`], for any of `roles`.
///
/// # Errors
/// As [`require_machine`].
pub fn require_role<T>(request: &tonic::Request<T>, roles: &[Role]) -> Result<PeerIdentity, Status> {
    let peer = request.extensions().get::<PeerInfo>().and_then(|info| info.identity.clone());
    let peer = peer.ok_or_else(no_certificate)?;
    if roles.contains(&peer.role) {
        Ok(peer)
    } else {
        let roles: Vec<&str> = roles.iter().map(|role| role.name()).collect();
        let text = format!("the certificate's role is {}, this call is for {}", peer.role, roles.join(" or "));
        Err(Status::permission_denied(text))
    }
}

/// Where a request came from.
#[must_use]
pub fn peer_address<T>(request: &tonic::Request<T>) -> Option<SocketAddr> {
    request.extensions().get::<PeerInfo>().map(|info| info.address)
}

fn no_certificate() -> Status {
    Status::unauthenticated("this call needs a client certificate: register this machine first")
}

/// Serves `routes` on `listener` until `shutdown`, then lets calls under way end. `tls` must allow clients without a
/// certificate if `Register` is to work.
///
/// # Errors
/// The transport's, where serving itself failed; a single connection's failure is only logged.
pub async fn serve(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    routes: Routes,
    shutdown: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let (sender, receiver) = mpsc::channel(HANDSHAKES_MAX);
    let accepting = tokio::spawn(accept(listener, TlsAcceptor::from(tls), sender));
    let incoming = futures::stream::unfold(receiver, async |mut receiver: mpsc::Receiver<ServerStream>| {
        receiver.recv().await.map(|stream| (Ok::<_, std::io::Error>(stream), receiver))
    });
    let guarded = routes.into_axum_router().layer(axum::middleware::from_fn(demand_certificate));
    let result = tonic::transport::Server::builder()
        .concurrency_limit_per_connection(CALLS_PER_CONNECTION_MAX)
        .timeout(CALL_TIMEOUT)
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .add_routes(Routes::from(guarded))
        .serve_with_incoming_shutdown(incoming, async {
            shutdown.await;
            // No new connections while the present ones end.
            accepting.abort();
        })
        .await;
    accepting.abort();
    result
}

/// Fails closed: a handler that forgot to ask who calls is still not reached without a certificate.
async fn demand_certificate(request: axum::extract::Request, next: axum::middleware::Next) -> axum::response::Response {
    let known = request.extensions().get::<PeerInfo>().is_some_and(|info| info.identity.is_some());
    if known || request.uri().path() == OPEN_CALL { next.run(request).await } else { no_certificate().into_http() }
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, sender: mpsc::Sender<ServerStream>) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // Neither semaphore is ever closed; if one were, serving would rightly end.
        let Ok(connection) = connections.clone().acquire_owned().await else { return };
        let Ok(handshake) = handshakes.clone().acquire_owned().await else { return };
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, most likely: waiting is all that helps, and it must not spin.
                tracing::warn!(%error, "can't accept a control connection; trying again");
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        let (acceptor, sender) = (acceptor.clone(), sender.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshaken(stream, address, &acceptor)).await {
                Ok(Ok((tls, info))) => {
                    drop(handshake);
                    // An error says that serving has ended.
                    let _ = sender.send(ServerStream { tls, info, _connection: connection }).await;
                }
                Ok(Err(error)) => tracing::debug!(%address, %error, "a control connection's TLS failed"),
                Err(_) => tracing::debug!(%address, "a control connection's TLS took too long"),
            }
        });
    }
}

async fn handshaken(
    stream: TcpStream,
    address: SocketAddr,
    acceptor: &TlsAcceptor,
) -> std::io::Result<(tokio_rustls::server::TlsStream<TcpStream>, PeerInfo)> {
    stream.set_nodelay(true)?;
    let tls = acceptor.accept(stream).await?;
    let identity = match tls.get_ref().1.peer_certificates().and_then(<[_]>::first) {
        Some(leaf) => Some(PeerIdentity::from_certificate(leaf).map_err(std::io::Error::other)?),
        None => None,
    };
    Ok((tls, PeerInfo { address, identity }))
}

/// An accepted connection with its peer's identity, counted while it lives.
struct ServerStream {
    tls: tokio_rustls::server::TlsStream<TcpStream>,
    info: PeerInfo,
    _connection: OwnedSemaphorePermit,
}

impl Connected for ServerStream {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.info.clone()
    }
}

impl AsyncRead for ServerStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.tls).poll_read(cx, buf)
    }
}

impl AsyncWrite for ServerStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The host has no address.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Nobody answered.
    #[error("can't reach {host}: {tried}; check that the receiver runs and that no firewall is between")]
    Unreachable {
        /// The host.
        host: HostPort,
        /// Each address and what came of it.
        tried: String,
    },
    /// Who answered is not whom we look for.
    #[error("{host}: {refused}")]
    Peer {
        /// The host.
        host: HostPort,
        /// Why not.
        refused: PeerRefused,
    },
    /// TLS failed otherwise: an expired certificate, another protocol on this port.
    #[error("no TLS with {host}: {reason}")]
    Tls {
        /// The host.
        host: HostPort,
        /// The library's words.
        reason: String,
    },
    /// The connection was made and then didn't speak the protocol.
    #[error("{host} does not speak Blockferry's control protocol: {reason}")]
    Protocol {
        /// The host.
        host: HostPort,
        /// The library's words.
        reason: String,
    },
}

impl Dispose for ConnectError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Host(error) => error.disposition(),
            Self::Unreachable { .. } | Self::Protocol { .. } | Self::Tls { .. } => Disposition::Retry,
            Self::Peer { refused, .. } => refused.disposition(),
        }
    }
}

/// A channel to the receiver at `host` over one connection, whose TLS is complete. Resolves the host now. Safe to cancel.
///
/// A server that refuses the client's certificate says so only after its own handshake: the first call then fails.
///
/// # Errors
/// [`ConnectError`], the most telling of all addresses.
pub async fn connect(host: &HostPort, tls: Arc<rustls::ClientConfig>) -> Result<Channel, ConnectError> {
    let connector = TlsConnector::from(tls);
    let mut tried = Vec::new();
    let mut telling = None;
    for address in host.resolve().await? {
        match connect_address(address, host, &connector).await {
            Ok(stream) => return channel(host, stream).await,
            Err(Failure::Reach(reason)) => tried.push(format!("{address} {reason}")),
            Err(Failure::Telling(error)) => telling = Some(error),
        }
    }
    Err(telling.unwrap_or_else(|| ConnectError::Unreachable { host: host.clone(), tried: tried.join(", ") }))
}

type ClientStream = tokio_rustls::client::TlsStream<TcpStream>;

enum Failure {
    Reach(String),
    Telling(ConnectError),
}

async fn connect_address(
    address: SocketAddr,
    host: &HostPort,
    connector: &TlsConnector,
) -> Result<ClientStream, Failure> {
    let stream = match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(Failure::Reach(error.kind().to_string())),
        Err(_) => return Err(Failure::Reach(format!("no answer in {} s", CONNECT_TIMEOUT.as_secs()))),
    };
    // Without it small calls wait for acknowledgements; that it fails is no reason not to talk.
    let _ = stream.set_nodelay(true);
    let name = ServerName::try_from(SERVER_NAME).map_err(|error| Failure::Reach(error.to_string()))?;
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, connector.connect(name, stream)).await {
        Ok(Ok(tls)) => Ok(tls),
        Ok(Err(error)) => Err(Failure::Telling(match PeerRefused::find(&error) {
            Some(refused) => ConnectError::Peer { host: host.clone(), refused },
            None => ConnectError::Tls { host: host.clone(), reason: error.to_string() },
        })),
        Err(_) => Err(Failure::Reach(format!("no TLS in {} s", HANDSHAKE_TIMEOUT.as_secs()))),
    }
}

async fn channel(host: &HostPort, stream: ClientStream) -> Result<Channel, ConnectError> {
    let mut once = Some(hyper_util::rt::TokioIo::new(stream));
    let connector = tower::service_fn(move |_uri| {
        let stream = once.take().ok_or_else(|| std::io::Error::other("the connection to the receiver is gone"));
        std::future::ready(stream)
    });
    Endpoint::from_static("http://receiver.blockferry.internal")
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .timeout(CALL_TIMEOUT)
        .connect_with_connector(connector)
        .await
        .map_err(|error| ConnectError::Protocol { host: host.clone(), reason: chain(&error) })
}

/// An error's text with its causes: the transport's own says only that it failed.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut at = error.source();
    while let Some(cause) = at {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        at = cause.source();
    }
    text
}
