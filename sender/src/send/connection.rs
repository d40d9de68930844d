//! Keeps one connection up.

use std::time::{Duration, Instant};

use common::net::backoff::Backoff;
use common::net::quic;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{LinkState, Route};

/// A connection that lived this long counts as a success: the next wait is short again.
const LASTED: Duration = Duration::from_secs(10);

/// The close code by which a receiver says that this machine may not send: `CLOSED_NOT_ALLOWED` of its `accept`.
const CLOSED_NOT_ALLOWED: quinn::VarInt = quinn::VarInt::from_u32(2);

/// Connects, publishes the connection, waits for its end, and starts over, until stopped.
pub(super) async fn keep(
    route: Route,
    published: watch::Sender<Option<quinn::Connection>>,
    state: watch::Sender<LinkState>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::for_connections();
    loop {
        let mut refused = None;
        let connected = tokio::select! {
            () = stop.cancelled() => return,
            connected = connect(&route) => connected,
        };
        let error = match connected {
            Ok(connection) => {
                let since = Instant::now();
                tracing::info!(address = %connection.remote_address(), "connected to the receiver");
                state.send_modify(|state| state.connected = true);
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
                if let quinn::ConnectionError::ApplicationClosed(close) = &error
                    && close.error_code == CLOSED_NOT_ALLOWED
                {
                    refused = Some(String::from_utf8_lossy(&close.reason).into_owned());
                }
                error.to_string()
            }
            Err(error) => error,
        };
        let wait = backoff.next_wait(random());
        tracing::warn!(%error, retry_ms = wait.as_millis(), "no connection to the receiver");
        state.send_replace(LinkState {
            connected: false,
            failed_attempts: backoff.attempts(),
            last_error: Some(error),
            refused,
        });
        metrics::counter!("blockferry_sender_errors_total", "kind" => "connection").increment(1);
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn connect(route: &Route) -> Result<quinn::Connection, String> {
    let mut tried = Vec::new();
    for host in &route.receivers {
        let tls = route.tls.borrow().clone();
        match quic::connect(&route.endpoint, host, tls, &route.tuning).await {
            Ok(connection) => return Ok(connection),
            Err(error) => tried.push(error.to_string()),
        }
    }
    Err(tried.join("; "))
}

/// Bits for jitter; where the system has none, no jitter.
pub(super) fn random() -> u64 {
    common::rng::random().map_or(u64::MAX, u64::from_le_bytes)
}
