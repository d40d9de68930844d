//! One client: the handshake, then threads that take turns in reading requests.
//!
//! ```text
//! thread A: ── read request ─▶ hand the reading on ─▶ do it ─▶ reply ─▶ wait for a turn …
//! thread B:                    └── read request ─▶ hand on ─▶ do it …
//! ```
//! Whoever read a request does it, so none is handed from thread to thread; there are as many threads as requests were in flight
//! at once, within bounds. Payload is taken in pieces of [`SCRATCH_BYTES`], so a request's length costs no memory.
//!
//! Promises: no more bytes are held than a piece for each thread; replies that come together are sent together; what a client
//! sends can at worst end its own connection. Never: answers a request that was not done, or was given up for the end.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::nbd::{
    Command, Errno, ExportFacts, Handshake, HandshakeStep, Negotiated, ProtocolError, REQUEST_BYTES, Request,
    data_chunk, error_chunk, simple_reply,
};

use super::admission::Page;
use super::export::{Export, Failure};
use super::server::{Bounds, Slot};
use crate::events::EventKind;

/// A thread's buffer. Larger ones gain little: the copy is what costs.
pub(super) const SCRATCH_BYTES: usize = 128 << 10;
/// What is read ahead of a connection.
const AHEAD_BYTES: usize = 64 << 10;
/// Most threads of one connection.
const THREADS_PER_CONNECTION_MAX: usize = 16;
/// How long a client may take for each step of the handshake.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(30);
/// Replies that may wait for a client that does not take them.
const REPLIES_BYTES_MAX: usize = 16 << 10;

/// A client's socket, blocking.
#[derive(Debug)]
pub(super) enum Stream {
    /// Of a Unix socket.
    Unix(UnixStream),
    /// Of a TCP connection.
    Tcp(TcpStream),
}

impl Stream {
    pub(super) fn unix(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        Ok(Self::Unix(stream))
    }

    pub(super) fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        // A client whose machine died must not hold its threads for ever.
        rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
        Ok(Self::Tcp(stream))
    }

    fn shutdown(&self, how: Shutdown) {
        // It fails only where the client is gone already.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        };
    }

    fn set_read_timeout(&self, time: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(time),
            Self::Tcp(stream) => stream.set_read_timeout(time),
        }
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = match self {
                Self::Unix(stream) => (&*stream).read(buffer),
                Self::Tcp(stream) => (&*stream).read(buffer),
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Unix(stream) => (&*stream).write_all(bytes),
            Self::Tcp(stream) => (&*stream).write_all(bytes),
        }
    }

    fn write_both(&self, head: &[u8], body: &[u8]) -> io::Result<()> {
        let parts = [IoSlice::new(head), IoSlice::new(body)];
        let written = match self {
            Self::Unix(stream) => (&*stream).write_vectored(&parts),
            Self::Tcp(stream) => (&*stream).write_vectored(&parts),
        };
        let written = match written {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        if written < head.len() {
            self.write_all(&head[written..])?;
            return self.write_all(body);
        }
        self.write_all(&body[written - head.len()..])
    }
}

/// What came and was not consumed yet.
#[derive(Debug)]
struct Incoming {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// No request is read any more.
    ended: bool,
}

impl Incoming {
    fn new() -> Self {
        Self { buffer: vec![0; AHEAD_BYTES].into_boxed_slice(), start: 0, end: 0, ended: false }
    }

    fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn consume(&mut self, length: usize) {
        self.start += length;
    }

    /// Reads more behind what is there.
    fn more(&mut self, stream: &Stream) -> io::Result<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        match stream.read(&mut self.buffer[self.end..])? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            read => {
                self.end += read;
                Ok(())
            }
        }
    }

    fn read_exact(&mut self, stream: &Stream, mut place: &mut [u8]) -> io::Result<()> {
        while !place.is_empty() {
            let there = self.bytes();
            if there.is_empty() {
                if place.len() >= self.buffer.len() {
                    // Straight to where it belongs.
                    match stream.read(place)? {
                        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                        read => place = &mut place[read..],
                    }
                } else {
                    self.more(stream)?;
                }
                continue;
            }
            let length = there.len().min(place.len());
            place[..length].copy_from_slice(&there[..length]);
            place = &mut place[length..];
            self.consume(length);
        }
        Ok(())
    }
}

/// Replies on their way out.
#[derive(Debug, Default)]
struct Outgoing {
    waiting: Vec<u8>,
    spare: Vec<u8>,
    /// Somebody is writing to the socket.
    writing: bool,
}

/// One client.
#[derive(Debug)]
pub(super) struct Connection {
    stream: Stream,
    export: Arc<Export>,
    structured: bool,
    bounds: Arc<Bounds>,
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Outgoing>,
    written: Condvar,
    threads: AtomicUsize,
    idle: AtomicUsize,
    ended: AtomicBool,
    _slot: Slot,
}

impl Connection {
    /// Makes the handshake. `None` where it came to nothing.
    pub(super) fn open(stream: Stream, exports: &[Arc<Export>], bounds: Arc<Bounds>, slot: Slot) -> Option<Arc<Self>> {
        let mut incoming = Incoming::new();
        let chosen = stream
            .set_read_timeout(Some(HANDSHAKE_PATIENCE))
            .and_then(|()| shake_hands(&stream, exports, &mut incoming))
            .and_then(|chosen| stream.set_read_timeout(None).map(|()| chosen));
        let chosen = chosen.inspect_err(|error| tracing::debug!(%error, "an nbd handshake came to nothing")).ok()??;
        let export = exports.iter().find(|export| export.name() == chosen.name)?;
        export.note(EventKind::Client, "an nbd client connected");
        Some(Arc::new(Self {
            stream,
            export: Arc::clone(export),
            structured: chosen.structured,
            bounds,
            incoming: Mutex::new(incoming),
            outgoing: Mutex::default(),
            written: Condvar::new(),
            threads: AtomicUsize::new(1),
            idle: AtomicUsize::new(0),
            ended: AtomicBool::new(false),
            _slot: slot,
        }))
    }

    /// True where it is a client of that export.
    pub(super) fn serves(&self, export: &Arc<Export>) -> bool {
        Arc::ptr_eq(&self.export, export)
    }

    /// Takes no new request; those in flight are answered.
    pub(super) fn stop_reading(&self) {
        self.ended.store(true, Ordering::Release);
        self.stream.shutdown(Shutdown::Read);
    }

    /// Ends it at once.
    pub(super) fn cut_off(&self) {
        self.ended.store(true, Ordering::Release);
        self.stream.shutdown(Shutdown::Both);
    }

    /// Serves requests until the connection ends. Run by several threads.
    pub(super) fn work(self: Arc<Self>) {
        let mut scratch = vec![0; SCRATCH_BYTES].into_boxed_slice();
        let mut pages = Vec::new();
        loop {
            self.idle.fetch_add(1, Ordering::AcqRel);
            let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
            self.idle.fetch_sub(1, Ordering::AcqRel);
            if incoming.ended {
                return;
            }
            let request = match self.next_request(&mut incoming) {
                Ok(Some(request)) => request,
                Ok(None) => {
                    incoming.ended = true;
                    return;
                }
                Err(error) => {
                    incoming.ended = true;
                    let ended = self.ended.load(Ordering::Acquire) || error.kind() == io::ErrorKind::UnexpectedEof;
                    drop(incoming);
                    if !ended {
                        tracing::warn!(volume = %self.export.name(), %error, "an nbd connection ended");
                    }
                    return;
                }
            };
            if self.handle(&request, incoming, &mut scratch, &mut pages).is_err() {
                self.cut_off();
                return;
            }
        }
    }

    /// The next request; `None` for an orderly end.
    fn next_request(&self, incoming: &mut Incoming) -> io::Result<Option<Request>> {
        if self.ended.load(Ordering::Acquire) {
            return Ok(None);
        }
        let mut header = [0; REQUEST_BYTES];
        incoming.read_exact(&self.stream, &mut header)?;
        let request =
            Request::parse(&header, self.export.geometry().disk_bytes(), self.structured).map_err(io::Error::other)?;
        Ok((request.command != Ok(Command::Disconnect)).then_some(request))
    }

    /// Lets another thread read the next request.
    fn hand_on(self: &Arc<Self>, incoming: MutexGuard<'_, Incoming>) {
        drop(incoming);
        if self.idle.load(Ordering::Acquire) > 0 || self.threads.load(Ordering::Relaxed) >= THREADS_PER_CONNECTION_MAX {
            return;
        }
        let Some(slot) = self.bounds.thread() else { return };
        self.threads.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("nbd".to_owned()).spawn(move || {
            connection.work();
            drop(slot);
        });
        if spawned.is_err() {
            self.threads.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Does a request and replies. An error ends the connection.
    fn handle(
        self: &Arc<Self>,
        request: &Request,
        mut incoming: MutexGuard<'_, Incoming>,
        scratch: &mut [u8],
        pages: &mut Vec<Page>,
    ) -> io::Result<()> {
        let cookie = request.cookie;
        match request.command {
            Err(errno) => {
                let mut left = request.payload as usize;
                while left > 0 {
                    let piece = left.min(scratch.len());
                    incoming.read_exact(&self.stream, &mut scratch[..piece])?;
                    left -= piece;
                }
                self.hand_on(incoming);
                if self.structured && request.read {
                    return self.reply(&error_chunk(cookie, errno));
                }
                self.reply(&simple_reply(cookie, Some(errno)))
            }
            Ok(Command::Read { offset, length }) => {
                self.hand_on(incoming);
                self.read(cookie, offset, length, request.whole, scratch)
            }
            Ok(Command::Write { offset, length, fua }) => {
                let mut length = length as usize;
                let mut done = Ok(());
                let mut at = offset;
                // All pieces but the last while nobody else can read from the socket.
                while length > scratch.len() {
                    // Ends at a page's end, so that no page is completed twice.
                    let piece = scratch.len() - usize::try_from(at % 4096).unwrap_or(0);
                    incoming.read_exact(&self.stream, &mut scratch[..piece])?;
                    done = done.and_then(|()| self.export.write(at, &scratch[..piece], pages));
                    at += piece as u64;
                    length -= piece;
                }
                incoming.read_exact(&self.stream, &mut scratch[..length])?;
                self.hand_on(incoming);
                let done = done.and_then(|()| self.export.write(at, &scratch[..length], pages));
                self.done(cookie, done, fua)
            }
            Ok(Command::Flush) => {
                self.hand_on(incoming);
                self.done(cookie, Ok(()), true)
            }
            Ok(Command::Trim { offset, length, fua }) => {
                self.hand_on(incoming);
                self.done(cookie, self.export.trim(offset, u64::from(length)), fua)
            }
            Ok(Command::WriteZeroes { offset, length, fua, may_punch }) => {
                self.hand_on(incoming);
                let done = self.export.write_zeroes(offset, u64::from(length), may_punch, pages);
                self.done(cookie, done, fua)
            }
            // The reader ends with it.
            Ok(Command::Disconnect) => Ok(()),
        }
    }

    /// Replies to what was done, made durable before where it has to be.
    fn done(&self, cookie: u64, done: Result<(), Failure>, durable: bool) -> io::Result<()> {
        let done = done.and_then(|()| if durable { self.export.flush() } else { Ok(()) });
        match done {
            Ok(()) => self.reply(&simple_reply(cookie, None)),
            Err(Failure::Errno(errno)) => self.reply(&simple_reply(cookie, Some(errno))),
            Err(Failure::Closing) => Err(io::ErrorKind::ConnectionAborted.into()),
        }
    }

    fn read(&self, cookie: u64, offset: u64, length: u32, whole: bool, scratch: &mut [u8]) -> io::Result<()> {
        let total = length as usize;
        let mut done = 0;
        let mut token = None;
        while done < total {
            let piece = (total - done).min(scratch.len());
            let at = offset + done as u64;
            let read = self.export.read(at, &mut scratch[..piece]);
            let last = done + piece == total;
            match read {
                Ok(()) if self.structured && !whole => {
                    let head = data_chunk(cookie, at, u32::try_from(piece).unwrap_or(u32::MAX), last);
                    self.begin_writing()?.write_both(&head, &scratch[..piece])?;
                }
                Ok(()) => {
                    // One head, and all pieces behind it: nothing else may come between.
                    let first = token.is_none();
                    let writing = match &token {
                        Some(writing) => writing,
                        None => token.insert(self.begin_writing()?),
                    };
                    match (first, self.structured) {
                        (false, _) => self.stream.write_all(&scratch[..piece])?,
                        (true, false) => writing.write_both(&simple_reply(cookie, None), &scratch[..piece])?,
                        (true, true) => writing.write_both(&data_chunk(cookie, at, length, true), &scratch[..piece])?,
                    }
                }
                // Success is said already; all that is left is to end.
                Err(_) if token.is_some() => return Err(io::ErrorKind::ConnectionAborted.into()),
                Err(Failure::Errno(errno)) if self.structured => return self.reply(&error_chunk(cookie, errno)),
                Err(Failure::Errno(errno)) => return self.reply(&simple_reply(cookie, Some(errno))),
                Err(Failure::Closing) => return Err(io::ErrorKind::ConnectionAborted.into()),
            }
            done += piece;
        }
        Ok(())
    }

    fn outgoing(&self) -> MutexGuard<'_, Outgoing> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a short reply, or leaves it to whoever is sending.
    fn reply(&self, bytes: &[u8]) -> io::Result<()> {
        let mut outgoing = self.outgoing();
        while outgoing.writing && outgoing.waiting.len() > REPLIES_BYTES_MAX {
            outgoing = self.written.wait(outgoing).unwrap_or_else(PoisonError::into_inner);
        }
        outgoing.waiting.extend_from_slice(bytes);
        if outgoing.writing {
            return Ok(());
        }
        outgoing.writing = true;
        drop(outgoing);
        self.send_waiting();
        Ok(())
    }

    /// Takes the socket for a reply with data.
    fn begin_writing(&self) -> io::Result<Writing<'_>> {
        let mut outgoing = self.outgoing();
        while outgoing.writing {
            outgoing = self.written.wait(outgoing).unwrap_or_else(PoisonError::into_inner);
        }
        outgoing.writing = true;
        Ok(Writing { connection: self })
    }

    /// Sends what waits, until nothing does.
    fn send_waiting(&self) {
        let mut outgoing = self.outgoing();
        while !outgoing.waiting.is_empty() {
            let spare = std::mem::take(&mut outgoing.spare);
            let mut bytes = std::mem::replace(&mut outgoing.waiting, spare);
            drop(outgoing);
            if self.stream.write_all(&bytes).is_err() {
                self.cut_off();
            }
            bytes.clear();
            outgoing = self.outgoing();
            outgoing.spare = bytes;
            self.written.notify_all();
        }
        outgoing.writing = false;
        drop(outgoing);
        self.written.notify_all();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.export.note(EventKind::Client, "an nbd client is gone");
    }
}

/// The right to write to the socket; what waited meanwhile is sent when it ends.
struct Writing<'a> {
    connection: &'a Connection,
}

impl Writing<'_> {
    fn write_both(&self, head: &[u8], body: &[u8]) -> io::Result<()> {
        self.connection.stream.write_both(head, body)
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.connection.send_waiting();
    }
}

/// The export chosen; `None` where the client wanted no more than to ask.
fn shake_hands(stream: &Stream, exports: &[Arc<Export>], incoming: &mut Incoming) -> io::Result<Option<Negotiated>> {
    stream.write_all(&Handshake::greeting())?;
    let facts = exports.iter().map(|export| ExportFacts {
        name: export.name().to_owned(),
        disk_bytes: export.geometry().disk_bytes(),
        read_only: false,
    });
    let mut handshake = Handshake::new(facts.collect());
    let mut out = Vec::new();
    loop {
        let (consumed, step) =
            handshake.handle(incoming.bytes(), &mut out).map_err(|error: ProtocolError| io::Error::other(error))?;
        incoming.consume(consumed);
        if !out.is_empty() {
            stream.write_all(&out)?;
            out.clear();
        }
        match step {
            HandshakeStep::Go(chosen) => return Ok(Some(chosen)),
            HandshakeStep::Abort => return Ok(None),
            HandshakeStep::More if consumed == 0 => incoming.more(stream)?,
            HandshakeStep::More => {}
        }
    }
}

const _: () = assert!(AHEAD_BYTES > common::nbd::OPTION_BYTES_MAX + 64);
const _: () = assert!(SCRATCH_BYTES.is_multiple_of(4096));
// An errno is a number of the protocol, not of this system.
const _: () = assert!(Errno::Io as u32 == 5);
