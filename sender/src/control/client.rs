//! The commands' end of the control socket.

use std::path::{Path, PathBuf};

use common::error::{Dispose, Disposition};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::protocol::{self, ANSWER_BYTES_MAX, Answer, Answered, AskCommand};
use super::{SOCKET_NAME, reachable, socket_path};

/// Why a running sender did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// None runs.
    #[error("no sender runs with the state directory {}; start one with `blockferry-sender run`", state_dir.display())]
    NotRunning {
        /// The state directory.
        state_dir: PathBuf,
    },
    /// Not allowed, or the system failed.
    #[error("cannot talk to the sender at {}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// It ended in the middle.
    #[error("the sender hung up before it answered; see its log, and ask again once it runs")]
    HungUp,
    /// Its answer can't be read.
    #[error("the sender's answer can't be read: {0}; use the command of the release that runs")]
    Answer(String),
    /// It said no.
    #[error("{0}")]
    Refused(String),
}

impl Dispose for ClientError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::HungUp => Disposition::Retry,
            _ => Disposition::BadInput,
        }
    }
}

/// A connection to a running sender.
#[derive(Debug)]
pub struct ControlClient {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl ControlClient {
    /// Connects to the sender of `state_dir`.
    ///
    /// # Errors
    /// [`ClientError::NotRunning`], [`ClientError::Io`].
    pub async fn connect(state_dir: &Path) -> Result<Self, ClientError> {
        use std::io::ErrorKind;
        let path = socket_path(state_dir);
        let reached = match reachable(state_dir, SOCKET_NAME) {
            Ok((short, _directory)) => UnixStream::connect(&short).await,
            Err(error) => Err(error),
        };
        match reached {
            Ok(stream) => Ok(Self { path, stream: BufReader::new(stream) }),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                Err(ClientError::NotRunning { state_dir: state_dir.to_owned() })
            }
            Err(source) => Err(ClientError::Io { path, source }),
        }
    }

    /// Asks, and waits for the answer as long as it takes. Not safe to cancel: connect anew then.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn ask(&mut self, command: AskCommand) -> Result<Answered, ClientError> {
        let line = protocol::encode_ask(command).map_err(ClientError::Refused)?;
        let failed = |source| ClientError::Io { path: self.path.clone(), source };
        self.stream.get_mut().write_all(&line).await.map_err(failed)?;
        let mut line = Vec::new();
        let bounded = &mut (&mut self.stream).take(ANSWER_BYTES_MAX as u64);
        bounded.read_until(b'\n', &mut line).await.map_err(failed)?;
        if line.last() != Some(&b'\n') {
            return Err(ClientError::HungUp);
        }
        match serde_json::from_slice(&line).map_err(|error| ClientError::Answer(error.to_string()))? {
            Answer::Ok(answered) => Ok(answered),
            Answer::Error(reason) => Err(ClientError::Refused(reason)),
        }
    }
}
