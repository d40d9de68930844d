//! One client: the handshake, then requests, several under way at a time.
//!
//! Promises: every request is answered once, in any order, a read of what can't be had with an error of its own; at most
//! [`REQUESTS_MAX`] are under way, and each holds a permit for its bytes; what a client sends, or fails to take, can at worst end its
//! own connection. Never: answers a write before it is where reads find it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use common::budget::{Budget, Permit};
use common::nbd::{
    Command, Errno, ExportFacts, Handshake, HandshakeStep, Negotiated, REQUEST_BYTES, Request, data_chunk, error_chunk,
    simple_reply,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader, ReadHalf, WriteHalf};
use tokio::sync::{Mutex, Semaphore, watch};

use super::disk::Disk;

/// Requests of one client under way.
const REQUESTS_MAX: u32 = 16;
/// Bytes of a write taken, and of a structured reply sent, at a time.
const PIECE_BYTES: usize = 1 << 20;
/// How long a client may take for each step of the handshake.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(30);
/// How long a client may take to take a reply, while it holds memory that others want.
const REPLY_PATIENCE: Duration = Duration::from_secs(120);

/// What a connection of either kind can do.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Stream for S {}

/// What all clients share.
#[derive(Debug)]
pub(super) struct Shared {
    /// The disk.
    pub(super) disk: Arc<Disk>,
    /// The export's name.
    pub(super) name: String,
    /// Memory for what is read and written.
    pub(super) budget: Budget,
}

/// Serves a client until it goes, or until `ending` says so and all its requests are answered.
///
/// # Errors
/// Why the connection ended, where not as it should.
pub(super) async fn serve<S: Stream>(
    stream: S,
    shared: Arc<Shared>,
    mut ending: watch::Receiver<bool>,
) -> io::Result<()> {
    let (input, output) = tokio::io::split(stream);
    let mut input = BufReader::with_capacity(64 << 10, input);
    let output = Output(Mutex::new(output));
    let facts = ExportFacts {
        name: shared.name.clone(),
        disk_bytes: shared.disk.geometry().disk_bytes(),
        read_only: shared.disk.is_read_only(),
    };
    let chosen = tokio::select! {
        chosen = shake_hands(&mut input, &output, facts) => chosen?,
        _ = ending.wait_for(|ending| *ending) => return Ok(()),
    };
    let Some(Negotiated { structured, .. }) = chosen else { return Ok(()) };
    let client =
        Arc::new(Client { shared, output, structured, slots: Arc::new(Semaphore::new(REQUESTS_MAX as usize)) });
    let ended = client.take_requests(&mut input, &mut ending).await;
    // All slots are free once all requests are answered.
    let _ = client.slots.acquire_many(REQUESTS_MAX).await;
    let _ = client.output.0.lock().await.shutdown().await;
    match ended {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
        other => other,
    }
}

/// The export chosen; `None` where the client wanted no more than to ask.
async fn shake_hands<S: Stream>(
    input: &mut BufReader<ReadHalf<S>>,
    output: &Output<S>,
    facts: ExportFacts,
) -> io::Result<Option<Negotiated>> {
    output.send(&Handshake::greeting(), &[]).await?;
    let mut handshake = Handshake::new(vec![facts]);
    let (mut came, mut out) = (Vec::new(), Vec::new());
    loop {
        let (consumed, step) = handshake.handle(&came, &mut out).map_err(io::Error::other)?;
        came.drain(..consumed);
        if !out.is_empty() {
            output.send(&out, &[]).await?;
            out.clear();
        }
        match step {
            // What came behind the handshake has to be taken for requests, so never more is read than an option needs.
            HandshakeStep::Go(chosen) => return Ok(Some(chosen)),
            HandshakeStep::Abort => return Ok(None),
            HandshakeStep::More if consumed > 0 => {}
            HandshakeStep::More => {
                let byte = tokio::time::timeout(HANDSHAKE_PATIENCE, input.read_u8()).await;
                came.push(byte.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??);
            }
        }
    }
}

#[derive(Debug)]
struct Output<S>(Mutex<WriteHalf<S>>);

impl<S: Stream> Output<S> {
    /// Sends both, one after the other, with nothing between.
    async fn send(&self, head: &[u8], body: &[u8]) -> io::Result<()> {
        let mut output = self.0.lock().await;
        let sending = async {
            output.write_all(head).await?;
            output.write_all(body).await?;
            output.flush().await
        };
        tokio::time::timeout(REPLY_PATIENCE, sending).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }
}

#[derive(Debug)]
struct Client<S> {
    shared: Arc<Shared>,
    output: Output<S>,
    structured: bool,
    slots: Arc<Semaphore>,
}

impl<S: Stream> Client<S> {
    async fn take_requests(
        self: &Arc<Self>,
        input: &mut BufReader<ReadHalf<S>>,
        ending: &mut watch::Receiver<bool>,
    ) -> io::Result<()> {
        let (failed, mut told) = watch::channel(false);
        loop {
            let slot = Arc::clone(&self.slots).acquire_owned().await.map_err(io::Error::other)?;
            let mut header = [0; REQUEST_BYTES];
            tokio::select! {
                read = input.read_exact(&mut header) => read?,
                _ = ending.wait_for(|ending| *ending) => return Ok(()),
                _ = told.wait_for(|failed| *failed) => return Err(io::ErrorKind::BrokenPipe.into()),
            };
            let disk_bytes = self.shared.disk.geometry().disk_bytes();
            let request = Request::parse(&header, disk_bytes, self.structured).map_err(io::Error::other)?;
            let work = match request.command {
                Ok(Command::Disconnect) => return Ok(()),
                Ok(Command::Write { offset, length, .. }) => self.take_payload(input, offset, length as usize).await?,
                _ => {
                    self.skip(input, request.payload).await?;
                    Ok(None)
                }
            };
            let (client, failed) = (Arc::clone(self), failed.clone());
            tokio::spawn(async move {
                if client.answer(&request, work).await.is_err() {
                    failed.send_replace(true);
                }
                drop(slot);
            });
        }
    }

    /// Takes a write's bytes, and writes all but the last piece of them.
    async fn take_payload(
        &self,
        input: &mut BufReader<ReadHalf<S>>,
        offset: u64,
        length: usize,
    ) -> io::Result<Result<Option<Piece>, Errno>> {
        let (mut at, end) = (offset, offset + length as u64);
        let mut done = Ok(());
        loop {
            // Pieces end with pages, so that no page is completed twice.
            let most = PIECE_BYTES - usize::try_from(at % 4096).unwrap_or(0);
            let piece = usize::try_from(end - at).unwrap_or(most).min(most);
            let permit = self.permit(piece).await?;
            let mut bytes = vec![0; piece];
            input.read_exact(&mut bytes).await?;
            let last = at + piece as u64 == end;
            match (done, last) {
                (Err(errno), true) => return Ok(Err(errno)),
                (Ok(()), true) => return Ok(Ok(Some(Piece { offset: at, bytes, _permit: permit }))),
                (Ok(()), false) => done = self.shared.disk.write(at, bytes).await,
                (Err(_), false) => {}
            }
            at += piece as u64;
        }
    }

    async fn skip(&self, input: &mut BufReader<ReadHalf<S>>, bytes: u32) -> io::Result<()> {
        let skipped = tokio::io::copy(&mut input.take(bytes.into()), &mut tokio::io::sink()).await?;
        if skipped < u64::from(bytes) { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    async fn permit(&self, bytes: usize) -> io::Result<Permit> {
        self.shared.budget.acquire(bytes as u64).await.map_err(io::Error::other)
    }

    /// Does a request and replies. An error ends the connection.
    async fn answer(&self, request: &Request, piece: Result<Option<Piece>, Errno>) -> io::Result<()> {
        let (disk, cookie) = (&self.shared.disk, request.cookie);
        let (done, fua) = match request.command {
            Err(errno) => {
                if request.read && self.structured {
                    return self.output.send(&error_chunk(cookie, errno), &[]).await;
                }
                (Err(errno), false)
            }
            Ok(Command::Read { offset, length }) => return self.read(request, offset, length).await,
            Ok(Command::Write { fua, .. }) => match piece {
                Ok(Some(piece)) => (disk.write(piece.offset, piece.bytes).await, fua),
                Ok(None) => (Ok(()), fua),
                Err(errno) => (Err(errno), false),
            },
            Ok(Command::Flush) => (Ok(()), true),
            Ok(Command::Trim { offset, length, fua }) => (disk.trim(offset..offset + u64::from(length)).await, fua),
            Ok(Command::WriteZeroes { offset, length, fua, may_punch }) => {
                (disk.zero(offset..offset + u64::from(length), may_punch).await, fua)
            }
            Ok(Command::Disconnect) => return Ok(()),
        };
        let done = match done {
            Ok(()) if fua => disk.flush().await,
            other => other,
        };
        self.output.send(&simple_reply(cookie, done.err()), &[]).await
    }

    async fn read(&self, request: &Request, offset: u64, length: u32) -> io::Result<()> {
        let (cookie, end) = (request.cookie, offset + u64::from(length));
        // Of a reply in one piece nothing can be taken back, so all of it has to be there before it begins.
        let most = if self.structured && !request.whole { PIECE_BYTES as u64 } else { u64::from(length) };
        let mut at = offset;
        while at < end {
            let piece = (end - at).min(most);
            // And the pages at both ends.
            let _permit = self.permit(usize::try_from(piece).unwrap_or(PIECE_BYTES) + 8192).await?;
            let (head, bytes, skipped) = match self.shared.disk.read(at..at + piece).await {
                Ok((bytes, skipped)) if self.structured => {
                    let length = u32::try_from(piece).unwrap_or(u32::MAX);
                    (data_chunk(cookie, at, length, at + piece == end).to_vec(), bytes, skipped)
                }
                Ok((bytes, skipped)) => (simple_reply(cookie, None).to_vec(), bytes, skipped),
                Err(errno) if self.structured => return self.output.send(&error_chunk(cookie, errno), &[]).await,
                Err(errno) => return self.output.send(&simple_reply(cookie, Some(errno)), &[]).await,
            };
            let piece_bytes = usize::try_from(piece).unwrap_or(0);
            self.output.send(&head, &bytes[skipped..skipped + piece_bytes]).await?;
            at += piece;
        }
        Ok(())
    }
}

/// The last bytes of a write.
#[derive(Debug)]
struct Piece {
    offset: u64,
    bytes: Vec<u8>,
    _permit: Permit,
}
