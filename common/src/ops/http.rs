//! The HTTP endpoint of a process: `/metrics` for Prometheus, `/healthz` (alive), `/readyz` (able to do its work).
//!
//! Promises: a *default* port that is taken is a warning and the process goes on without the endpoint; a port that was asked
//! for is an error that names it. Values that age are computed at the scrape. Never serves anything secret.

use super::process_metrics;
use crate::error::{Dispose, Disposition};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// How often histograms are folded where nobody scrapes, so that their samples do not pile up.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// The endpoint could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for metrics on {listen}: {source}: pass another address with --metrics-listen")]
pub struct HttpError {
    /// The address asked for.
    pub listen: SocketAddr,
    /// Why.
    pub source: io::Error,
}

impl Dispose for HttpError {
    fn disposition(&self) -> Disposition {
        Disposition::BadInput
    }
}

/// What a process still waits for before it can do its work; clones share it. Ready once nothing is named.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    waiting_for: Arc<Mutex<BTreeSet<&'static str>>>,
}

impl Readiness {
    /// Not ready before each of `conditions` is met.
    #[must_use]
    pub fn new(conditions: &[&'static str]) -> Self {
        Self { waiting_for: Arc::new(Mutex::new(conditions.iter().copied().collect())) }
    }

    /// States whether `condition` is met now; it may be lost again.
    pub fn set(&self, condition: &'static str, met: bool) {
        let mut waiting = self.waiting_for.lock().unwrap_or_else(PoisonError::into_inner);
        if met {
            waiting.remove(condition);
        } else {
            waiting.insert(condition);
        }
    }

    /// The conditions that are not met.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        self.waiting_for.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }

    /// True where all conditions are met.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.missing().is_empty()
    }
}

/// Called before each rendering, to set values that age.
pub type ScrapeHook = Box<dyn Fn() + Send + Sync>;

struct Inner {
    handle: PrometheusHandle,
    readiness: Readiness,
    hooks: Vec<ScrapeHook>,
}

/// An endpoint that is not yet open.
pub struct Endpoint {
    inner: Inner,
}

/// An open endpoint; closed when dropped.
#[derive(Debug)]
pub struct Serving {
    /// The address it listens on, with the port that the system chose where 0 was asked for.
    pub address: SocketAddr,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Endpoint {
    /// An endpoint over the recorder's `handle` and the process's `readiness`.
    #[must_use]
    pub fn new(handle: PrometheusHandle, readiness: Readiness) -> Self {
        Self { inner: Inner { handle, readiness, hooks: Vec::new() } }
    }

    /// Calls `hook` before each rendering.
    #[must_use]
    pub fn on_scrape(mut self, hook: impl Fn() + Send + Sync + 'static) -> Self {
        self.inner.hooks.push(Box::new(hook));
        self
    }

    /// Opens the endpoint on `listen` and serves it in the background. `None`, with a warning logged, where a port that
    /// nobody `chosen` is taken.
    ///
    /// # Errors
    /// [`HttpError`] where a chosen address can't be listened on.
    pub async fn serve(self, listen: SocketAddr, chosen: bool) -> Result<Option<Serving>, HttpError> {
        let bound = match TcpListener::bind(listen).await {
            Ok(listener) => listener.local_addr().map(|address| (listener, address)),
            Err(error) => Err(error),
        };
        let (listener, address) = match bound {
            Ok(bound) => bound,
            Err(error) if !chosen => {
                tracing::warn!(%listen, %error, "no metrics endpoint: the default address is taken; choose one with --metrics-listen");
                return Ok(None);
            }
            Err(source) => return Err(HttpError { listen, source }),
        };
        let upkeep = self.inner.handle.clone();
        let app = Router::new()
            .route("/metrics", get(metrics))
            .route("/healthz", get(async || "ok\n"))
            .route("/readyz", get(ready))
            .with_state(Arc::new(self.inner));
        let serve = tokio::spawn(async move {
            // axum::serve retries failed accepts by itself and ends only with its listener.
            if let Err(error) = axum::serve(listener, app).await {
                tracing::error!(%error, "the metrics endpoint ended");
            }
        });
        let upkeep = tokio::spawn(async move {
            let mut interval = tokio::time::interval(UPKEEP_INTERVAL);
            loop {
                interval.tick().await;
                upkeep.run_upkeep();
            }
        });
        tracing::info!(%address, "metrics endpoint open");
        Ok(Some(Serving { address, tasks: [serve, upkeep] }))
    }
}

/// Opens an endpoint without scrape hooks; see [`Endpoint::serve`].
///
/// # Errors
/// [`HttpError`] where a chosen address can't be listened on.
pub async fn serve(
    listen: SocketAddr,
    chosen: bool,
    handle: PrometheusHandle,
    readiness: Readiness,
) -> Result<Option<Serving>, HttpError> {
    Endpoint::new(handle, readiness).serve(listen, chosen).await
}

async fn metrics(State(inner): State<Arc<Inner>>) -> impl IntoResponse {
    process_metrics::record();
    inner.hooks.iter().for_each(|hook| hook());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], inner.handle.render())
}

async fn ready(State(inner): State<Arc<Inner>>) -> (StatusCode, String) {
    let missing = inner.readiness.missing();
    if missing.is_empty() {
        (StatusCode::OK, "ready\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("waiting for: {}\n", missing.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use metrics_exporter_prometheus::PrometheusBuilder;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn fetch(address: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.expect("listening");
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.expect("text");
        reply
    }

    fn handle() -> PrometheusHandle {
        PrometheusBuilder::new().build_recorder().handle()
    }

    const ANY: &str = "127.0.0.1:0";

    #[tokio::test]
    async fn readiness_changes_with_its_conditions_while_health_stays() {
        let readiness = Readiness::new(&["store", "stage"]);
        let serving = serve(ANY.parse().expect("an address"), true, handle(), readiness.clone()).await;
        let serving = serving.expect("port 0 is free").expect("open");
        readiness.set("stage", true);
        let reply = fetch(serving.address, "/readyz").await;
        assert!(reply.starts_with("HTTP/1.1 503") && reply.contains("waiting for: store\n"), "{reply}");
        assert!(fetch(serving.address, "/healthz").await.starts_with("HTTP/1.1 200"));
        readiness.set("store", true);
        assert!(fetch(serving.address, "/readyz").await.starts_with("HTTP/1.1 200"));
        readiness.set("store", false);
        assert!(fetch(serving.address, "/readyz").await.starts_with("HTTP/1.1 503"));
    }

    #[tokio::test]
    async fn ageing_values_are_computed_at_each_scrape() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let age = std::sync::atomic::AtomicU64::new(0);
        let gauge = metrics::with_local_recorder(&recorder, || metrics::gauge!("test_age_seconds"));
        let endpoint = Endpoint::new(recorder.handle(), Readiness::default()).on_scrape(move || {
            let now = age.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            gauge.set(f64::from(u32::try_from(now).expect("small")));
        });
        let serving = endpoint.serve(ANY.parse().expect("an address"), true).await.expect("free").expect("open");
        let reply = fetch(serving.address, "/metrics").await;
        assert!(reply.contains("text/plain; version=0.0.4") && reply.contains("test_age_seconds 0\n"), "{reply}");
        assert!(fetch(serving.address, "/metrics").await.contains("test_age_seconds 1\n"));
    }

    #[tokio::test]
    async fn a_taken_default_port_is_let_go_and_a_chosen_one_is_an_error_that_names_it() {
        let taken = TcpListener::bind(ANY).await.expect("port 0 is free");
        let address = taken.local_addr().expect("bound");
        let open = serve(address, false, handle(), Readiness::default()).await.expect("a warning only");
        assert!(open.is_none());
        let error = serve(address, true, handle(), Readiness::default()).await.expect_err("taken").to_string();
        assert!(error.contains(&address.to_string()) && error.contains("--metrics-listen"), "{error}");
    }
}
