//! Keeps one connection up.

use std::time::{Duration, Instant};

use common::net::backoff::Backoff;
use common::net::quic;
use common::net::resolve::HostPort;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::race::race;
use super::{LinkState, Route};

/// A connection that lived this long counts as a success: the next wait is short again.
const LASTED: Duration = Duration::from_secs(10);

/// Longest wait after a connection broke that stood for a while, where there is another receiver to go to.
pub(super) const ELSEWHERE_WAIT_MAX: Duration = Duration::from_secs(1);

/// The close code by which a receiver says that this machine may not send: `CLOSED_NOT_ALLOWED` of its `accept`.
const CLOSED_NOT_ALLOWED: quinn::VarInt = quinn::VarInt::from_u32(2);
/// The close code by which a receiver says that it drains: `CLOSED_DRAINING` of its `accept`.
const CLOSED_DRAINING: quinn::VarInt = quinn::VarInt::from_u32(4);
/// The close code by which this sender leaves a receiver that drains, or goes on failing.
pub(super) const CLOSED_LEAVING: quinn::VarInt = quinn::VarInt::from_u32(5);

/// Connects, publishes the connection, waits for its end, and starts over, until stopped.
pub(super) async fn keep(
    route: Route,
    published: watch::Sender<Option<quinn::Connection>>,
    state: watch::Sender<LinkState>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::for_connections();
    loop {
        let (mut refused, mut leaving, mut stood) = (None, false, false);
        let connected = tokio::select! {
            () = stop.cancelled() => return,
            connected = connect(&route) => connected,
        };
        let error = match connected {
            Ok((host, connection)) => {
                let since = Instant::now();
                stood = true;
                tracing::info!(%host, address = %connection.remote_address(), "connected to the receiver");
                route.choice.connected(&host);
                state.send_modify(|state| {
                    state.connected = true;
                    state.receiver = host.to_string();
                });
                published.send_replace(Some(connection.clone()));
                let error = tokio::select! {
                    () = stop.cancelled() => {
                        // Sessions get a moment to say what they have to say.
                        published.send_replace(None);
                        connection.close(quinn::VarInt::from_u32(0), b"stopped");
                        return;
                    }
                    error = connection.closed() => error,
                };
                published.send_replace(None);
                if since.elapsed() >= LASTED {
                    backoff.reset();
                }
                match &error {
                    quinn::ConnectionError::ApplicationClosed(close) if close.error_code == CLOSED_NOT_ALLOWED => {
                        refused = Some(String::from_utf8_lossy(&close.reason).into_owned());
                    }
                    quinn::ConnectionError::ApplicationClosed(close) if close.error_code == CLOSED_DRAINING => {
                        route.choice.leave(tokio::time::Instant::now());
                        leaving = true;
                    }
                    // A session closed it, after it told the choice why.
                    quinn::ConnectionError::LocallyClosed => leaving = true,
                    _ => {}
                }
                error.to_string()
            }
            Err(error) => error,
        };
        // Where there is another receiver to go to, nothing is to be waited for; or not for long, after a connection that stood.
        let now = tokio::time::Instant::now();
        let wait = if leaving && route.choice.has_alternative(now) {
            Duration::ZERO
        } else if stood && route.choice.has_others(now) {
            backoff.next_wait(random()).min(ELSEWHERE_WAIT_MAX)
        } else {
            backoff.next_wait(random())
        };
        tracing::warn!(%error, retry_ms = wait.as_millis(), "no connection to the receiver");
        state.send_modify(|state| {
            state.connected = false;
            state.failed_attempts = backoff.attempts();
            state.last_error = Some(error);
            state.refused = refused;
        });
        metrics::counter!("blockferry_sender_errors_total", "kind" => "connection").increment(1);
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Tries the receivers, in the order of the choice. One that does not answer is waited for no longer than a connection may be
/// silent, and not alone.
async fn connect(route: &Route) -> Result<(HostPort, quinn::Connection), String> {
    let hosts = route.choice.order(random(), tokio::time::Instant::now());
    let attempt = |number: usize| {
        let host = hosts[number].clone();
        async move {
            let tls = route.tls.borrow().clone();
            let connecting = quic::connect(&route.endpoint, &host, tls, &route.tuning);
            match tokio::time::timeout(route.tuning.idle_timeout, connecting).await {
                Ok(connected) => connected.map_err(|error| error.to_string()),
                Err(_) => Err(format!("{host}: no answer in {} s", route.tuning.idle_timeout.as_secs())),
            }
        }
    };
    let (number, connection) = race(hosts.len(), attempt).await.map_err(|tried| tried.join("; "))?;
    Ok((hosts[number].clone(), connection))
}

/// Bits for jitter; where the system has none, no jitter.
pub(super) fn random() -> u64 {
    common::rng::random().map_or(u64::MAX, u64::from_le_bytes)
}
