//! The control socket of a running sender.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::budget::Budget;
use common::clock::{Clock, UnixMillis};
use common::error::{Dispose, Disposition};
use common::ops::process_metrics;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::protocol::{self, Answer, Answered, AskCommand, REQUEST_BYTES_MAX};
use super::status::{Board, MemoryPartStatus, MemoryStatus, SenderStatus};
use super::{Request, reachable, socket_path};
use crate::events::{EVENTS_MAX, Events};

/// Clients served at once; one more is told to come back.
pub const CLIENTS_MAX: usize = 16;
/// Requests that wait for the agent.
const REQUESTS_MAX: usize = 16;
/// How long a client may be silent, or slow to read.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Wait before accepting again after an error, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// The socket can't be served.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve the control socket {}: {source}; check the state directory", path.display())]
pub struct ServeError {
    /// The socket.
    path: PathBuf,
    /// The system's error.
    source: std::io::Error,
}

impl Dispose for ServeError {
    fn disposition(&self) -> Disposition {
        Disposition::BadInput
    }
}

/// The agent's end of the control socket.
#[derive(Debug)]
pub struct Handle {
    /// Where the agent notes how things stand.
    pub board: Board,
    /// What is asked of the agent.
    pub requests: mpsc::Receiver<Request>,
}

/// Serves until it is dropped, and removes the socket then.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        // A stale socket is replaced at the next start.
        let _ = std::fs::remove_file(&self.path);
    }
}

struct Context {
    board: Board,
    events: Events,
    budget: Budget,
    clock: Clock,
    started: UnixMillis,
    requests: mpsc::Sender<Request>,
    seats: Arc<Semaphore>,
}

/// Serves the control socket of `state_dir`, whose lock the caller holds: so a socket that is there was left by a dead
/// sender, and is replaced.
///
/// # Errors
/// [`ServeError`].
pub fn serve(state_dir: &Path, events: Events, budget: Budget, clock: Clock) -> Result<(Server, Handle), ServeError> {
    let path = socket_path(state_dir);
    let listener = bind(state_dir).map_err(|source| ServeError { path: path.clone(), source })?;
    let (sender, requests) = mpsc::channel(REQUESTS_MAX);
    let board = Board::default();
    let started = clock.now();
    let seats = Arc::new(Semaphore::new(CLIENTS_MAX));
    let context = Context { board: board.clone(), events, budget, clock, started, requests: sender, seats };
    let task = tokio::spawn(accept(listener, Arc::new(context)));
    Ok((Server { path, task }, Handle { board, requests }))
}

/// Binds under another name first: nobody can connect before the mode is right, and a stale socket is replaced at once.
fn bind(state_dir: &Path) -> std::io::Result<UnixListener> {
    let (fresh, _directory) = reachable(state_dir, "control.sock.new")?;
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&fresh)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&fresh, socket_path(state_dir))?;
    Ok(listener)
}

async fn accept(listener: UnixListener, context: Arc<Context>) {
    let mut clients = tokio::task::JoinSet::new();
    loop {
        while clients.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => {
                let context = Arc::clone(&context);
                clients.spawn(async move {
                    if let Err(error) = client(stream, &context).await {
                        tracing::debug!(%error, "a control client went away");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the control socket");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn client(mut stream: UnixStream, context: &Context) -> std::io::Result<()> {
    let Ok(_seat) = context.seats.try_acquire() else {
        let busy = format!("{CLIENTS_MAX} commands are being answered already; try again");
        return send(&mut stream, &Answer::Error(busy)).await;
    };
    let (read, mut write) = stream.split();
    let mut read = BufReader::new(read);
    let mut line = Vec::new();
    loop {
        line.clear();
        let bounded = &mut (&mut read).take(REQUEST_BYTES_MAX as u64);
        if timeout(SILENCE_MAX, bounded.read_until(b'\n', &mut line)).await.map_err(std::io::Error::from)?? == 0 {
            return Ok(());
        }
        if line.last() != Some(&b'\n') {
            let long = format!("a request line has at most {REQUEST_BYTES_MAX} bytes and ends with a line break");
            return send(&mut write, &Answer::Error(long)).await;
        }
        let answer = match protocol::decode_ask(&line) {
            // Whoever hangs up does not wait any more; nothing else may come before the answer.
            Ok(command) => tokio::select! {
                answer = answer(command, context) => answer,
                _ = read.fill_buf() => return Ok(()),
            },
            Err(reason) => Answer::Error(reason),
        };
        send(&mut write, &answer).await?;
    }
}

async fn send(stream: &mut (impl AsyncWriteExt + Unpin), answer: &Answer) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    timeout(SILENCE_MAX, stream.write_all(&line)).await?
}

async fn answer(command: AskCommand, context: &Context) -> Answer {
    match command {
        AskCommand::Status => Answer::Ok(Answered::Status(Box::new(status(context)))),
        AskCommand::Events { after } => {
            let mut events = context.events.recent(EVENTS_MAX);
            events.retain(|event| event.number > after);
            Answer::Ok(Answered::Events(events))
        }
        AskCommand::Point { volume, consistency } => {
            let consistency = consistency.and_then(|word| protocol::parse_consistency(&word).ok());
            ask(context, |reply| Request::Point { volume, consistency, reply }, Answered::Points).await
        }
        AskCommand::Detach { volume } => {
            ask(context, |reply| Request::Detach { volume, reply }, Answered::Detached).await
        }
    }
}

async fn ask<T>(
    context: &Context,
    request: impl FnOnce(oneshot::Sender<T>) -> Request,
    answered: impl FnOnce(T) -> Answered,
) -> Answer {
    let (reply, replied) = oneshot::channel();
    let stopping = || Answer::Error("the sender is stopping; start it and ask again".to_owned());
    if context.requests.send(request(reply)).await.is_err() {
        return stopping();
    }
    replied.await.map_or_else(|_| stopping(), |reply| Answer::Ok(answered(reply)))
}

fn status(context: &Context) -> SenderStatus {
    let usage = process_metrics::usage();
    let table = context.budget.table();
    let parts = table.parts().iter();
    SenderStatus {
        running: true,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        time_ms: context.clock.now().0,
        started_ms: context.started.0,
        link: context.board.link(),
        volumes: context.board.volumes(),
        memory: MemoryStatus {
            budget_bytes: context.budget.total(),
            resident_bytes: usage.resident_bytes,
            resident_peak_bytes: usage.resident_peak_bytes,
            payload_max_bytes: context.budget.payload(),
            payload_bytes: context.budget.used(),
            parts: parts.map(|part| MemoryPartStatus { name: part.name.to_owned(), bytes: part.bytes }).collect(),
        },
    }
}

#[cfg(test)]
mod tests {
    use common::budget::MemoryTable;

    use super::super::client::{ClientError, ControlClient};
    use super::super::protocol::PointReply;
    use super::*;
    use crate::events::EventKind;

    fn started(dir: &Path) -> (Server, Handle, Events) {
        let events = Events::default();
        let budget = Budget::new(MemoryTable::new(64 << 20)).expect("it fits");
        let (server, handle) = serve(dir, events.clone(), budget, Clock::System).expect("it serves");
        (server, handle, events)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_stale_socket_is_replaced_by_one_that_is_the_owners_alone_and_gone_in_the_end() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = socket_path(dir.path());
        drop(std::os::unix::net::UnixListener::bind(&path).expect("it binds"));
        assert!(path.exists());
        let (server, handle, _) = started(dir.path());
        handle.board.update("root", |volume| volume.state = "following".into());
        let mode = std::fs::metadata(&path).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut client = ControlClient::connect(dir.path()).await.expect("it connects");
        let Answered::Status(status) = client.ask(AskCommand::Status).await.expect("answered") else {
            panic!("status")
        };
        assert!(status.running && status.volumes["root"].state == "following" && status.pid == std::process::id());
        drop(server);
        assert!(!path.exists());
        assert!(matches!(ControlClient::connect(dir.path()).await, Err(ClientError::NotRunning { .. })));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn several_clients_are_answered_while_one_waits_for_its_point() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (_server, mut handle, events) = started(dir.path());
        let mut waiting = ControlClient::connect(dir.path()).await.expect("it connects");
        let point = AskCommand::Point { volume: Some("root".into()), consistency: Some("crash".into()) };
        let waiting = tokio::spawn(async move { waiting.ask(point).await });
        let Some(Request::Point { volume, consistency, reply }) = handle.requests.recv().await else {
            panic!("a point was asked for")
        };
        assert_eq!((volume.as_deref(), consistency.map(|c| c.as_str())), (Some("root"), Some("crash")));
        events.note("root", EventKind::Overload, "busy");
        events.note("root", EventKind::CaughtUp, "done");
        let mut other = ControlClient::connect(dir.path()).await.expect("it connects");
        let Answered::Events(found) = other.ask(AskCommand::Events { after: 1 }).await.expect("answered") else {
            panic!("events")
        };
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].kind, EventKind::CaughtUp);
        reply.send(vec![PointReply { volume: "root".into(), ..PointReply::default() }]).expect("the client waits");
        let Ok(Ok(Answered::Points(points))) = waiting.await else { panic!("points") };
        assert_eq!(points[0].volume, "root");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_line_without_end_and_one_that_is_no_request_are_refused_in_words() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (_server, _handle, _) = started(dir.path());
        for bytes in [vec![b'x'; REQUEST_BYTES_MAX], b"{\"version\":1,\"command\":\"dance\"}\n".to_vec()] {
            let mut stream = UnixStream::connect(socket_path(dir.path())).await.expect("it connects");
            stream.write_all(&bytes).await.expect("written");
            let mut line = String::new();
            BufReader::new(&mut stream).read_line(&mut line).await.expect("answered");
            assert!(line.starts_with("{\"error\":"), "{line}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_request_that_the_agent_drops_is_answered_as_such_also_under_a_long_path() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let deep = dir.path().join("a".repeat(120));
        std::fs::create_dir(&deep).expect("made");
        let (_server, handle, _) = started(&deep);
        drop(handle.requests);
        let mut client = ControlClient::connect(&deep).await.expect("it connects");
        let error = client.ask(AskCommand::Detach { volume: None }).await.expect_err("stopping").to_string();
        assert!(error.contains("stopping"), "{error}");
    }
}
