//! Listens on Unix sockets and TCP addresses, and hands connections to threads of their own.
//!
//! Promises: a stale socket file is replaced, a live one is an error; a socket can be opened by this user alone; connections and
//! threads are bounded. Never: serves an export before its write-intent log is open.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use super::connection::{Connection, SCRATCH_BYTES, Stream};
use super::export::Export;
use super::{NbdCapture, NbdConfig};
use crate::capture::CaptureError;

/// Most connections of one server. A client with several takes some 4 to 16.
pub(super) const CONNECTIONS_MAX: usize = 32;
/// Most threads of one server; a connection gets one in any case.
pub(super) const THREADS_MAX: usize = 64;
/// How long requests in flight may take to end once an export is removed.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait after a failed accept, which mostly says that there are no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Memory that a server takes at most, in bytes, to be set aside in the budget.
#[must_use]
pub fn memory_bytes() -> u64 {
    ((THREADS_MAX + CONNECTIONS_MAX) * (SCRATCH_BYTES + (16 << 10))) as u64
}

/// Where clients connect.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum ListenAddr {
    /// A Unix socket at a path.
    Unix(PathBuf),
    /// `HOST:PORT`, `[IPv6]:PORT`.
    Tcp(String),
}

impl std::fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => f.write_str(address),
        }
    }
}

/// What a listener offers.
type Exports = Arc<Mutex<Vec<Arc<Export>>>>;

#[derive(Debug)]
struct Listener {
    exports: Exports,
    /// The address it got, for port 0.
    local: Option<SocketAddr>,
    task: JoinHandle<()>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Debug, Default)]
struct State {
    listeners: BTreeMap<ListenAddr, Listener>,
    connections: Vec<Weak<Connection>>,
}

/// Threads and connections that are allowed for, shared by all of a server.
#[derive(Debug, Default)]
pub(super) struct Bounds {
    connections: AtomicUsize,
    threads: AtomicUsize,
    ended: Condvar,
    lock: Mutex<()>,
}

/// A place among so many; given back when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    bounds: Arc<Bounds>,
    thread: bool,
}

impl Bounds {
    fn take(self: &Arc<Self>, thread: bool, most: usize) -> Option<Slot> {
        let counter = if thread { &self.threads } else { &self.connections };
        let taken = counter.fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| (now < most).then_some(now + 1));
        taken.is_ok().then(|| Slot { bounds: Arc::clone(self), thread })
    }

    /// A place for one more thread of a connection.
    pub(super) fn thread(self: &Arc<Self>) -> Option<Slot> {
        self.take(true, THREADS_MAX)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let counter = if self.thread { &self.bounds.threads } else { &self.bounds.connections };
        counter.fetch_sub(1, Ordering::AcqRel);
        drop(self.bounds.lock.lock().unwrap_or_else(PoisonError::into_inner));
        self.bounds.ended.notify_all();
    }
}

/// Serves exports on any number of addresses. Clones are the same server; it ends with the last one.
#[derive(Debug, Clone)]
pub struct NbdServer {
    runtime: tokio::runtime::Handle,
    state: Arc<Mutex<State>>,
    bounds: Arc<Bounds>,
}

impl NbdServer {
    /// A server without exports; it listens once one is added. To be called on the runtime that it is to use.
    ///
    /// # Errors
    /// [`CaptureError::Io`] where there is no runtime.
    pub async fn start() -> Result<Self, CaptureError> {
        let runtime = tokio::runtime::Handle::try_current()
            .map_err(|error| CaptureError::io("serve", Path::new("nbd"), io::Error::other(error)))?;
        Ok(Self { runtime, state: Arc::default(), bounds: Arc::default() })
    }

    /// Opens a disk and its write-intent log, then serves it. What clients write from then on is in a cut of the capture.
    /// Blocks on files.
    ///
    /// # Errors
    /// [`CaptureError`]; nothing is served then.
    pub fn add_export(&self, config: NbdConfig) -> Result<NbdCapture, CaptureError> {
        let export = NbdCapture::open(&config)?;
        let capture = NbdCapture::over(&config, self.clone(), Arc::clone(&export))?;
        // Where one address fails the capture is dropped, which takes the export from the others.
        for address in &config.listen {
            self.listen(address, &export)?;
        }
        Ok(capture)
    }

    /// The TCP addresses that are listened on, with the ports they got.
    #[must_use]
    pub fn tcp_addresses(&self) -> Vec<SocketAddr> {
        self.lock().listeners.values().filter_map(|listener| listener.local).collect()
    }

    /// Clients connected now.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.bounds.connections.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(&self, address: &ListenAddr, export: &Arc<Export>) -> Result<(), CaptureError> {
        let mut state = self.lock();
        if let Some(listener) = state.listeners.get(address) {
            listener.exports.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(export));
            return Ok(());
        }
        let exports: Exports = Arc::new(Mutex::new(vec![Arc::clone(export)]));
        let failed = |error| CaptureError::Listen { address: address.to_string(), source: error };
        let _on = self.runtime.enter();
        let (accept, local) = match address {
            ListenAddr::Unix(path) => {
                let listener = bind_unix(path).and_then(tokio::net::UnixListener::from_std).map_err(failed)?;
                (Accept::Unix(listener), None)
            }
            ListenAddr::Tcp(address) => {
                let bound = std::net::TcpListener::bind(address.as_str()).map_err(failed)?;
                bound.set_nonblocking(true).map_err(failed)?;
                let local = bound.local_addr().ok();
                (Accept::Tcp(tokio::net::TcpListener::from_std(bound).map_err(failed)?), local)
            }
        };
        tracing::info!(volume = %export.name(), listen = %address, "serves nbd");
        let serving = Serving {
            exports: Arc::clone(&exports),
            state: Arc::downgrade(&self.state),
            bounds: Arc::clone(&self.bounds),
        };
        let task = self.runtime.spawn(serving.run(accept));
        state.listeners.insert(address.clone(), Listener { exports, local, task });
        Ok(())
    }

    /// Stops to serve an export: no new request is taken, those in flight end and are answered, its connections close.
    pub(super) fn remove_export(&self, export: &Arc<Export>) {
        let mut state = self.lock();
        state.listeners.retain(|address, listener| {
            let mut exports = listener.exports.lock().unwrap_or_else(PoisonError::into_inner);
            exports.retain(|served| !Arc::ptr_eq(served, export));
            let used = !exports.is_empty();
            drop(exports);
            if let (false, ListenAddr::Unix(path)) = (used, address) {
                // A later start replaces one that stays.
                let _ = std::fs::remove_file(path);
            }
            used
        });
        let of_it = |connection: &Arc<Connection>| connection.serves(export);
        let connections: Vec<_> = state.connections.iter().filter_map(Weak::upgrade).filter(of_it).collect();
        drop(state);
        for connection in &connections {
            connection.stop_reading();
        }
        let connections: Vec<_> = connections.iter().map(Arc::downgrade).collect();
        let left = || connections.iter().any(|connection| connection.strong_count() > 0);
        if self.wait_until(STOP_PATIENCE / 2, || !left()) {
            export.close();
            return;
        }
        // Writers that wait for room, and clients that take no replies.
        export.close();
        connections.iter().filter_map(Weak::upgrade).for_each(|connection| connection.cut_off());
        self.wait_until(STOP_PATIENCE / 2, || !left());
    }

    /// Waits for connections to end. True where it came to be.
    fn wait_until(&self, patience: Duration, ended: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + patience;
        let mut lock = self.bounds.lock.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if ended() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            // The last thread gives its slot back a moment before its connection is gone.
            let step = left.min(Duration::from_millis(10));
            lock = self.bounds.ended.wait_timeout(lock, step).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

enum Accept {
    Unix(tokio::net::UnixListener),
    Tcp(tokio::net::TcpListener),
}

/// One listener's task.
struct Serving {
    exports: Exports,
    state: Weak<Mutex<State>>,
    bounds: Arc<Bounds>,
}

impl Serving {
    async fn run(self, accept: Accept) {
        loop {
            let accepted = match &accept {
                Accept::Unix(listener) => match listener.accept().await {
                    Ok((stream, _)) => stream.into_std().and_then(Stream::unix),
                    Err(error) => Err(error),
                },
                Accept::Tcp(listener) => match listener.accept().await {
                    Ok((stream, _)) => stream.into_std().and_then(Stream::tcp),
                    Err(error) => Err(error),
                },
            };
            match accepted {
                Ok(stream) => self.serve(stream),
                Err(error) => {
                    tracing::warn!(%error, "an nbd client could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn serve(&self, stream: Stream) {
        let Some(slot) = self.bounds.take(false, CONNECTIONS_MAX) else {
            tracing::warn!(limit = CONNECTIONS_MAX, "an nbd client was turned away: too many connections");
            return;
        };
        let exports = self.exports.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (state, bounds) = (self.state.clone(), Arc::clone(&self.bounds));
        let thread = std::thread::Builder::new().name("nbd".to_owned()).spawn(move || {
            let Some(connection) = Connection::open(stream, &exports, bounds, slot) else { return };
            let Some(state) = state.upgrade() else { return };
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            state.connections.retain(|known| known.strong_count() > 0);
            state.connections.push(Arc::downgrade(&connection));
            // An export that was removed meanwhile closed no connection that was not listed yet.
            drop(state);
            connection.work();
        });
        if let Err(error) = thread {
            tracing::warn!(%error, "an nbd client was turned away: no thread for it");
        }
    }
}

/// Listens at `path`, for this user alone. A socket that nobody listens on is replaced.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            if UnixStream::connect(path).is_ok() {
                return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there"));
            }
        }
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    // Bound under another name, so that nobody sees it before its mode is set, and renamed over what is stale.
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let fresh = PathBuf::from(fresh);
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&fresh)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&fresh, path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
