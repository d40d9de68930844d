//! Draining: senders are told to go elsewhere, and what is closed is forwarded, so that this receiver can be stopped without
//! anybody noticing. Asked for by `blockferry-receiver drain` over a Unix socket in the data directory; SIGTERM does the same.
//!
//! The socket, `DATA_DIR/control.sock`, takes one line, `drain`, and answers with lines: `left N` each time the number of
//! epochs changes that are closed and not yet in the store, at last `drained`; or `error TEXT`. Only who may enter the data directory gets there.
//!
//! Promises: once `drained` is said, no sender has a session here, and nothing that is closed lies in the stage. Draining is not
//! undone but by a restart.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::units::DurationText;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// Where a running receiver takes commands.
const SOCKET: &str = "control.sock";
/// Longest command line.
const COMMAND_BYTES_MAX: u64 = 64;
/// How often what is left is counted.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How long a client may take to say what it wants.
const COMMAND_TIME: Duration = Duration::from_secs(10);

/// The wish to drain, shared by whoever may have it and whoever obeys.
#[derive(Debug, Clone)]
pub struct Draining(watch::Sender<bool>);

impl Default for Draining {
    fn default() -> Self {
        Self(watch::Sender::new(false))
    }
}

impl Draining {
    /// Asks for it; true for the first to ask.
    pub fn begin(&self) -> bool {
        !self.0.send_replace(true)
    }

    /// True once it was asked for.
    #[must_use]
    pub fn is_asked(&self) -> bool {
        *self.0.borrow()
    }

    /// Done once it was asked for. Safe to cancel.
    pub async fn asked(&self) {
        // The channel can't close while self holds its sender.
        let _ = self.0.subscribe().wait_for(|asked| *asked).await;
    }
}

/// How far a drain has come: closed epochs in the stage, and sessions.
pub type Left = Arc<dyn Fn() -> usize + Send + Sync>;

/// Takes commands until dropped; the socket of an earlier process is replaced.
///
/// # Errors
/// The system's.
pub fn serve(data_dir: &Path, draining: Draining, left: Left) -> io::Result<AbortOnDropHandle<()>> {
    let path = data_dir.join(SOCKET);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (draining, left) = (draining.clone(), Arc::clone(&left));
                    tokio::spawn(async move {
                        // A client that is gone needs no answer.
                        let _ = answer(stream, &draining, &left).await;
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "can't accept a command");
                    tokio::time::sleep(LOOK_INTERVAL).await;
                }
            }
        }
    })))
}

async fn answer(stream: UnixStream, draining: &Draining, left: &Left) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut read = BufReader::new(tokio::io::AsyncReadExt::take(read, COMMAND_BYTES_MAX));
    tokio::time::timeout(COMMAND_TIME, read.read_line(&mut line)).await.map_err(io::Error::other)??;
    if line.trim() != "drain" {
        return write.write_all(b"error expected drain\n").await;
    }
    draining.begin();
    let mut told = None;
    loop {
        let now = left();
        if now == 0 {
            return write.write_all(b"drained\n").await;
        }
        if told != Some(now) {
            write.write_all(format!("left {now}\n").as_bytes()).await?;
            told = Some(now);
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Why `drain` failed.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// No receiver answers there.
    #[error("no receiver runs with {}: {source}; check --data-dir", data_dir.display())]
    NotRunning {
        /// The data directory.
        data_dir: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// The receiver ended before it had drained.
    #[error(
        "the receiver ended before it said that it had drained; what was left is staged, and goes on at its next start"
    )]
    Ended,
    /// It takes longer than the caller waits.
    #[error(
        "not drained within {}: {left} closed epochs or sessions are left; the drain goes on, run the command again to wait for it",
        DurationText(*timeout)
    )]
    Timeout {
        /// How long it was waited for.
        timeout: Duration,
        /// As the receiver last said.
        left: u64,
    },
    /// The receiver said something else.
    #[error("the receiver answered {0:?}: check that command and receiver are of one release")]
    Answer(String),
}

/// Asks the receiver of `data_dir` to drain, and waits until it has; `progress` is told what is left.
///
/// # Errors
/// [`DrainError`].
pub async fn request(data_dir: &Path, timeout: Duration, mut progress: impl FnMut(u64)) -> Result<(), DrainError> {
    let not_running = |source| DrainError::NotRunning { data_dir: data_dir.to_owned(), source };
    let mut stream = UnixStream::connect(data_dir.join(SOCKET)).await.map_err(not_running)?;
    stream.write_all(b"drain\n").await.map_err(not_running)?;
    let mut lines = BufReader::new(stream).lines();
    let deadline = tokio::time::Instant::now() + timeout;
    let mut left = 0;
    loop {
        let line = match tokio::time::timeout_at(deadline, lines.next_line()).await {
            Err(_) => return Err(DrainError::Timeout { timeout, left }),
            Ok(Ok(Some(line))) => line,
            Ok(Ok(None) | Err(_)) => return Err(DrainError::Ended),
        };
        if line == "drained" {
            return Ok(());
        }
        left = line.strip_prefix("left ").and_then(|count| count.parse().ok()).ok_or(DrainError::Answer(line))?;
        progress(left);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn a_drain_is_answered_once_nothing_is_left_and_one_that_takes_too_long_goes_on() {
        let dir = tempfile::tempdir().expect("a directory");
        let (draining, left) = (Draining::default(), Arc::new(AtomicUsize::new(2)));
        let count = Arc::clone(&left);
        let _serving =
            serve(dir.path(), draining.clone(), Arc::new(move || count.load(Ordering::Relaxed))).expect("it serves");
        let late = request(dir.path(), Duration::from_millis(50), |_| ()).await.expect_err("two are left");
        assert!(matches!(late, DrainError::Timeout { left: 2, .. }), "{late}");
        assert!(draining.is_asked());
        let obeys = left.clone();
        let asked = request(dir.path(), Duration::from_secs(60), |told| {
            // Each thing that is left goes as soon as it was told.
            obeys.store(usize::try_from(told).expect("few") - 1, Ordering::Relaxed);
        });
        asked.await.expect("drained");
    }

    #[tokio::test]
    async fn without_a_receiver_there_is_nothing_to_drain() {
        let dir = tempfile::tempdir().expect("a directory");
        let error = request(dir.path(), Duration::from_secs(1), |_| ()).await.expect_err("nobody there");
        assert!(error.to_string().contains("--data-dir"), "{error}");
    }
}
