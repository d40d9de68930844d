//! Listens on a Unix socket or a TCP address, and gives each client a task.
//!
//! Promises: a socket that nobody listens on is replaced, a live one is an error; a socket can be opened by this user alone;
//! connections are bounded; at the end no new request is taken, and those under way are answered.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use common::ops::shutdown::{EndSignal, Shutdown};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::client::{self, Shared, Stream};

/// Connections at a time.
const CONNECTIONS_MAX: usize = 64;
/// How long requests under way may take at the end.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait after a failed accept, which mostly says that there are no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Where clients connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddr {
    /// A Unix socket at a path.
    Unix(PathBuf),
    /// `HOST:PORT`, `[IPv6]:PORT`.
    Tcp(String),
}

impl FromStr for ListenAddr {
    type Err = String;

    /// A text with a slash is a path, and so is one that does not end in a port.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("expected a socket's path or HOST:PORT".into());
        }
        let port = text.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
        match port {
            Some((host, _)) if !text.contains('/') => {
                if host.is_empty() || (host.contains(':') && !(host.starts_with('[') && host.ends_with(']'))) {
                    return Err("expected HOST:PORT, an IPv6 address in brackets".into());
                }
                Ok(Self::Tcp(text.into()))
            }
            _ => Ok(Self::Unix(text.into())),
        }
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => f.write_str(address),
        }
    }
}

/// A socket that listens.
#[derive(Debug)]
pub(super) enum Listener {
    Unix(tokio::net::UnixListener, PathBuf),
    Tcp(tokio::net::TcpListener, SocketAddr),
}

impl Listener {
    /// Listens at `address`.
    pub(super) async fn bind(address: &ListenAddr) -> io::Result<Self> {
        match address {
            ListenAddr::Unix(path) => {
                let listener = tokio::net::UnixListener::from_std(bind_unix(path)?)?;
                Ok(Self::Unix(listener, std::path::absolute(path)?))
            }
            ListenAddr::Tcp(address) => {
                let listener = tokio::net::TcpListener::bind(address.as_str()).await?;
                let local = listener.local_addr()?;
                Ok(Self::Tcp(listener, local))
            }
        }
    }

    /// The NBD URI of an export here.
    pub(super) fn uri(&self, export: &str) -> String {
        let export = percent(export, false);
        match self {
            Self::Unix(_, path) => format!("nbd+unix:///{export}?socket={}", percent(&path.to_string_lossy(), true)),
            Self::Tcp(_, address) => format!("nbd://{address}/{export}"),
        }
    }

    /// Serves clients until a signal asks for the end; returns it.
    pub(super) async fn run(self, shared: Arc<Shared>, shutdown: &Shutdown) -> EndSignal {
        let (ending, end) = watch::channel(false);
        let mut clients = JoinSet::new();
        let by = loop {
            tokio::select! {
                by = shutdown.requested() => break by,
                Some(_) = clients.join_next(), if !clients.is_empty() => {}
                accepted = self.accept() => match accepted {
                    Ok(_) if clients.len() >= CONNECTIONS_MAX => {
                        tracing::warn!(limit = CONNECTIONS_MAX, "an nbd client was turned away: too many connections");
                    }
                    Ok(Accepted::Unix(stream)) => drop(clients.spawn(one(stream, Arc::clone(&shared), end.clone()))),
                    Ok(Accepted::Tcp(stream)) => drop(clients.spawn(one(stream, Arc::clone(&shared), end.clone()))),
                    Err(error) => {
                        tracing::warn!(%error, "an nbd client could not be accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        };
        if let Self::Unix(_, path) = &self {
            // A later start replaces one that stays.
            let _ = std::fs::remove_file(path);
        }
        ending.send_replace(true);
        let all = async { while clients.join_next().await.is_some() {} };
        if tokio::time::timeout(STOP_PATIENCE, all).await.is_err() {
            tracing::warn!("some requests could not be answered in time: their connections are cut");
        }
        by
    }

    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Unix(listener, _) => Ok(Accepted::Unix(listener.accept().await?.0)),
            Self::Tcp(listener, _) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                // A client whose machine died must not hold its place for ever.
                rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
                Ok(Accepted::Tcp(stream))
            }
        }
    }
}

enum Accepted {
    Unix(tokio::net::UnixStream),
    Tcp(tokio::net::TcpStream),
}

async fn one<S: Stream>(stream: S, shared: Arc<Shared>, end: watch::Receiver<bool>) {
    if let Err(error) = client::serve(stream, shared, end).await {
        tracing::warn!(%error, "an nbd connection ended");
    }
}

/// Listens at `path`, for this user alone. A socket that nobody listens on is replaced.
fn bind_unix(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there"));
            }
        }
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    // Bound under another name, so that nobody sees it before its mode is set, and renamed over what is stale.
    let fresh = crate::restore::state::with_suffix(path, ".new");
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(&fresh)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&fresh, path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Escapes what has a meaning in a URI.
fn percent(text: &str, slashes: bool) -> String {
    use fmt::Write as _;
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || (slashes && byte == b'/') {
            escaped.push(char::from(byte));
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_path_unless_it_ends_in_a_port() {
        let parse = |text: &str| text.parse::<ListenAddr>();
        assert_eq!(parse("/run/x.sock"), Ok(ListenAddr::Unix("/run/x.sock".into())));
        assert_eq!(parse("x.sock"), Ok(ListenAddr::Unix("x.sock".into())));
        assert_eq!(parse("./a:10809"), Ok(ListenAddr::Unix("./a:10809".into())));
        assert_eq!(parse("127.0.0.1:0"), Ok(ListenAddr::Tcp("127.0.0.1:0".into())));
        assert_eq!(parse("[::1]:10809"), Ok(ListenAddr::Tcp("[::1]:10809".into())));
        assert!(parse("::1:10809").is_err() && parse(":10809").is_err() && parse("").is_err());
    }

    #[test]
    fn a_uri_holds_no_character_that_has_a_meaning_in_it() {
        assert_eq!(percent("a b/c%d", false), "a%20b%2Fc%25d");
        assert_eq!(percent("/run/a&b.sock", true), "/run/a%26b.sock");
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("socket");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
        let _listens = Listener::bind(&ListenAddr::Unix(path.clone())).await.expect("nobody listens");
        let busy = Listener::bind(&ListenAddr::Unix(path.clone())).await.expect_err("somebody listens");
        assert_eq!(busy.kind(), io::ErrorKind::AddrInUse);
        std::fs::write(dir.path().join("file"), "").expect("writable");
        assert!(Listener::bind(&ListenAddr::Unix(dir.path().join("file"))).await.is_err());
    }
}
