//! A small NBD client for tests: several requests under way on a connection, and a target of the conformance suite that
//! connects again when its server went away, as QEMU's `reconnect-delay` does.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::conformance::stamp::SECTOR;
use crate::conformance::target::Target;
use crate::pair::PATIENCE;

const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;

/// A request's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Read.
    Read = 0,
    /// Write.
    Write = 1,
    /// Flush.
    Flush = 3,
    /// Trim.
    Trim = 4,
    /// Write zeroes.
    WriteZeroes = 6,
}

/// The request's flag for "durable before it is answered".
pub const FUA: u16 = 1;

type Answer = Result<Vec<u8>, u32>;

/// Requests under way by cookie, with the bytes expected back; `None` once the connection is gone.
type Waiting = Option<HashMap<u64, (SyncSender<Answer>, usize)>>;

#[derive(Debug)]
struct Shared {
    waiting: Mutex<Waiting>,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection to an export.
#[derive(Debug)]
pub struct Connection {
    stream: Mutex<UnixStream>,
    shared: Arc<Shared>,
    next: AtomicU64,
    /// The export's size in bytes.
    pub size: u64,
    /// The export's transmission flags.
    pub flags: u16,
}

fn lost(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, what.to_owned())
}

fn take<const N: usize>(stream: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

impl Connection {
    /// Connects and agrees on the export.
    ///
    /// # Errors
    /// Where nobody listens, or the server refuses.
    pub fn open(socket: &std::path::Path, export: &str) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let greeting = take::<18>(&mut stream)?;
        if &greeting[8..16] != OPTION_MAGIC {
            return Err(io::Error::other("the server speaks no newstyle"));
        }
        let mut hello = Vec::new();
        hello.extend_from_slice(&3_u32.to_be_bytes()); // fixed newstyle, no zeroes
        hello.extend_from_slice(OPTION_MAGIC);
        hello.extend_from_slice(&OPTION_GO.to_be_bytes());
        let name = u32::try_from(export.len()).expect("short");
        hello.extend_from_slice(&(4 + name + 2).to_be_bytes());
        hello.extend_from_slice(&name.to_be_bytes());
        hello.extend_from_slice(export.as_bytes());
        hello.extend_from_slice(&0_u16.to_be_bytes());
        stream.write_all(&hello)?;
        let (mut size, mut flags) = (0, 0);
        loop {
            let head = take::<20>(&mut stream)?;
            let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four bytes"));
            if u64::from_be_bytes(head[..8].try_into().expect("eight bytes")) != OPTION_REPLY {
                return Err(io::Error::other("a wrong magic in the server's answer to an option"));
            }
            let mut body = vec![0; word(16) as usize];
            stream.read_exact(&mut body)?;
            match word(12) {
                REPLY_ACK => break,
                REPLY_INFO if body[..2] == [0, 0] => {
                    size = u64::from_be_bytes(body[2..10].try_into().expect("eight bytes"));
                    flags = u16::from_be_bytes(body[10..12].try_into().expect("two bytes"));
                }
                REPLY_INFO => {}
                other => return Err(io::Error::other(format!("the server refused the export: {other:#x}"))),
            }
        }
        stream.set_read_timeout(None)?;
        let shared = Arc::new(Shared { waiting: Mutex::new(Some(HashMap::new())) });
        let (reader, waiting) = (stream.try_clone()?, Arc::clone(&shared));
        std::thread::spawn(move || receive(reader, &waiting));
        Ok(Self { stream: Mutex::new(stream), shared, next: AtomicU64::new(1), size, flags })
    }

    /// One request, answered.
    ///
    /// # Errors
    /// `ConnectionAborted` where the connection broke: it may have been carried out or not. Others are the server's.
    pub fn request(
        &self,
        command: Command,
        flags: u16,
        offset: u64,
        len: usize,
        payload: &[u8],
    ) -> io::Result<Vec<u8>> {
        let cookie = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = sync_channel(1);
        let expected = if command == Command::Read { len } else { 0 };
        match self.shared.waiting().as_mut() {
            Some(waiting) => waiting.insert(cookie, (answer, expected)),
            None => return Err(lost("the connection is gone")),
        };
        let mut head = Vec::with_capacity(28 + payload.len());
        head.extend_from_slice(&REQUEST.to_be_bytes());
        head.extend_from_slice(&flags.to_be_bytes());
        head.extend_from_slice(&(command as u16).to_be_bytes());
        head.extend_from_slice(&cookie.to_be_bytes());
        head.extend_from_slice(&offset.to_be_bytes());
        head.extend_from_slice(&u32::try_from(len).expect("a short request").to_be_bytes());
        head.extend_from_slice(payload);
        let sent = self.stream.lock().unwrap_or_else(PoisonError::into_inner).write_all(&head);
        if sent.is_err() {
            return Err(lost("the connection broke while sending"));
        }
        match answered.recv() {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(errno)) => Err(io::Error::from_raw_os_error(i32::try_from(errno).unwrap_or(5))),
            Err(_) => Err(lost("the connection broke before the answer")),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let stream = self.stream.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
}

/// Hands answers to those who wait, until the connection ends; then tells all that are left.
fn receive(mut stream: UnixStream, shared: &Shared) {
    while let Ok(head) = take::<16>(&mut stream) {
        let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four bytes"));
        let cookie = u64::from_be_bytes(head[8..].try_into().expect("eight bytes"));
        let entry = shared.waiting().as_mut().and_then(|waiting| waiting.remove(&cookie));
        let Some((answer, expected)) = entry.filter(|_| word(0) == REPLY) else { break };
        let result = if word(4) == 0 {
            let mut bytes = vec![0; expected];
            if stream.read_exact(&mut bytes).is_err() {
                break;
            }
            Ok(bytes)
        } else {
            Err(word(4))
        };
        let _ = answer.send(result);
    }
    shared.waiting().take();
}

/// An export as the conformance suite's target, over several connections; each is opened again when it breaks.
#[derive(Debug)]
pub struct NbdTarget {
    socket: PathBuf,
    export: String,
    connections: Vec<Mutex<Option<Arc<Connection>>>>,
    slowest_us: AtomicU64,
    reconnects: AtomicU64,
}

impl NbdTarget {
    /// Of `connections` connections, none of them opened yet.
    #[must_use]
    pub fn new(socket: PathBuf, export: &str, connections: usize) -> Self {
        let connections = (0..connections).map(|_| Mutex::new(None)).collect();
        let (slowest_us, reconnects) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { socket, export: export.to_owned(), connections, slowest_us, reconnects }
    }

    /// The longest that a write took since the last call, pauses without a server included.
    #[must_use]
    pub fn slowest(&self) -> Duration {
        Duration::from_micros(self.slowest_us.swap(0, Ordering::Relaxed))
    }

    /// How often a connection was opened, the first time included.
    #[must_use]
    pub fn connects(&self) -> u64 {
        self.reconnects.load(Ordering::Relaxed)
    }

    fn connection(&self, lane: usize) -> io::Result<Arc<Connection>> {
        let slot = &self.connections[lane % self.connections.len()];
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = slot.as_ref().filter(|connection| connection.shared.waiting().is_some()) {
            return Ok(Arc::clone(connection));
        }
        let connection = Arc::new(Connection::open(&self.socket, &self.export)?);
        self.reconnects.fetch_add(1, Ordering::Relaxed);
        *slot = Some(Arc::clone(&connection));
        Ok(connection)
    }

    /// A request that waits for its server to come back as long as need be, and is sent again then.
    ///
    /// # Errors
    /// What the server answers, or `TimedOut` after [`PATIENCE`].
    pub fn request(
        &self,
        lane: usize,
        command: Command,
        flags: u16,
        offset: u64,
        len: usize,
        payload: &[u8],
    ) -> io::Result<Vec<u8>> {
        let started = Instant::now();
        loop {
            let attempt = self.connection(lane);
            match attempt.and_then(|connection| connection.request(command, flags, offset, len, payload)) {
                Ok(bytes) => {
                    let taken = u64::try_from(started.elapsed().as_micros()).expect("short");
                    if command == Command::Write {
                        self.slowest_us.fetch_max(taken, Ordering::Relaxed);
                    }
                    return Ok(bytes);
                }
                Err(error) if error.raw_os_error().is_some() && !away(&error) => return Err(error),
                Err(error) if started.elapsed() > PATIENCE => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, error.to_string()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Reads the export from `offset` on.
    ///
    /// # Errors
    /// As [`Self::request`].
    pub fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.request(0, Command::Read, 0, offset, len, &[])
    }

    fn range(&self, lane: usize, command: Command, sectors: &Range<u64>) -> io::Result<()> {
        let len = usize::try_from(sectors.end - sectors.start).expect("small") * SECTOR;
        self.request(lane, command, 0, sectors.start * SECTOR as u64, len, &[]).map(drop)
    }
}

/// True for the errors of a server that is not there just now.
fn away(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
    matches!(
        error.kind(),
        BrokenPipe | ConnectionAborted | ConnectionRefused | ConnectionReset | NotFound | UnexpectedEof
    ) || error.raw_os_error() == Some(108) // ESHUTDOWN: the server says that it is ending
}

impl Target for NbdTarget {
    fn write(&self, lane: usize, sector: u64, bytes: &[u8]) -> io::Result<()> {
        let flags = if sector.is_multiple_of(13) { FUA } else { 0 };
        self.request(lane, Command::Write, flags, sector * SECTOR as u64, bytes.len(), bytes).map(drop)
    }

    fn zero(&self, lane: usize, sectors: Range<u64>) -> Option<io::Result<()>> {
        Some(self.range(lane, Command::WriteZeroes, &sectors))
    }

    fn trim(&self, lane: usize, sectors: Range<u64>) -> Option<io::Result<()>> {
        Some(self.range(lane, Command::Trim, &sectors))
    }

    fn flush(&self, lane: usize) -> io::Result<()> {
        self.request(lane, Command::Flush, 0, 0, 0, &[]).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::history::History;
    use crate::conformance::oracle::{Oracle, Window};
    use crate::conformance::writer::{Habits, Writer, initialise};
    use crate::pair::wait_for;

    #[test]
    fn the_writer_over_somebody_elses_server_leaves_what_its_log_says_through_a_kill() {
        let dir = tempfile::tempdir_in("/var/tmp").expect("a directory");
        let (disk, socket) = (dir.path().join("disk"), dir.path().join("socket"));
        let bytes = 8 << 20;
        initialise(&disk, bytes);
        let serve = || {
            let _ = std::fs::remove_file(&socket);
            let mut nbdkit = std::process::Command::new("nbdkit");
            nbdkit.arg("-f").arg("-U").arg(&socket).arg("file").arg(&disk).spawn().expect("make deps installs nbdkit")
        };
        let mut server = serve();
        let target = Arc::new(NbdTarget::new(socket.clone(), "", 2));
        let history = Arc::new(History::default());
        let habits = Habits { pause_max: Duration::from_micros(200), ..Habits::new(bytes, 11) };
        let writer = Writer::start(&habits, &(Arc::clone(&target) as Arc<dyn Target>), &history, 0);
        let written = |count: usize| wait_for("writes", || (history.log().writes.len() > count).then_some(()));
        written(500);
        server.kill().and_then(|()| server.wait()).expect("it can be killed");
        let at_kill = history.log().writes.len();
        let mut server = serve();
        written(at_kill + 500);
        let rested = writer.rest(&history);
        let content = target.read(0, usize::try_from(bytes).expect("small")).expect("readable");
        server.kill().and_then(|()| server.wait()).expect("it can be killed");
        assert!(target.connects() >= 4, "it connected again");
        let log = history.log();
        let window = Window { floor: rested, ceiling: rested };
        Oracle::new(&log, habits.sectors).judge(&mut content.as_slice(), window, None).expect("as written");
    }
}
