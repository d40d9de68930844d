//! A proxy between a program and its store that makes requests fail on command: by status, by reset, in the middle of an
//! upload, after the request got through, slowly, or with a flipped bit.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::http::{Answer, Head, Listener, read_head};

/// What to do to a request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Answered with this status and body; the store sees nothing of it.
    Status(u16, String),
    /// The connection is reset before anything is passed on.
    Reset,
    /// So many bytes of the body are passed on, then both connections are reset.
    CutUpload(usize),
    /// Passed on whole and carried out; the reply is lost.
    LoseReply,
    /// Passed on after so long.
    Delay(Duration),
    /// Passed on with one bit of the body flipped.
    Damage,
    /// So many bytes of the reply are passed on, then the connection is reset.
    CutReply(usize),
}

type Matches = Box<dyn Fn(&Head) -> bool + Send>;

struct Rule {
    matches: Matches,
    fault: Fault,
    left: usize,
}

#[derive(Default)]
struct State {
    upstream: String,
    rules: Vec<Rule>,
    seen: Vec<(String, String)>,
    faults: usize,
    /// One in so many requests fails, in a way that changes from one to the next.
    one_in: Option<u64>,
}

/// The proxy.
pub struct FaultProxy {
    listener: Listener,
    state: Arc<Mutex<State>>,
}

impl std::fmt::Debug for FaultProxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FaultProxy({})", self.listener.address())
    }
}

impl FaultProxy {
    /// A proxy to the server at `upstream`, which makes nothing fail yet.
    #[must_use]
    pub fn start(upstream: &str) -> Self {
        Self::listen(upstream, None)
    }

    /// As [`Self::start`], spoken to over TLS with this certificate.
    #[must_use]
    pub fn start_tls(upstream: &str, tls: Arc<rustls::ServerConfig>) -> Self {
        Self::listen(upstream, Some(tls))
    }

    fn listen(upstream: &str, tls: Option<Arc<rustls::ServerConfig>>) -> Self {
        let state = Arc::new(Mutex::new(State { upstream: upstream.to_owned(), ..State::default() }));
        let shared = Arc::clone(&state);
        let listener = Listener::start(move |stream| {
            // A client that goes away is no concern of the test's.
            let _ = match &tls {
                None => serve(Client::Plain(stream), &shared),
                Some(config) => {
                    rustls::ServerConnection::new(Arc::clone(config)).map_err(std::io::Error::other).and_then(
                        |session| serve(Client::Tls(Box::new(rustls::StreamOwned::new(session, stream))), &shared),
                    )
                }
            };
        });
        Self { listener, state }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// `HOST:PORT`.
    #[must_use]
    pub fn address(&self) -> &str {
        self.listener.address()
    }

    /// The next `times` requests for which `matches` holds meet `fault`.
    pub fn fail(&self, times: usize, fault: Fault, matches: impl Fn(&Head) -> bool + Send + 'static) {
        self.lock().rules.push(Rule { matches: Box::new(matches), fault, left: times });
    }

    /// One in `n` requests fails, now in one way, then in another; 0 ends it.
    pub fn fail_one_in(&self, n: u64) {
        self.lock().one_in = (n > 0).then_some(n);
    }

    /// All requests pass again.
    pub fn heal(&self) {
        let mut state = self.lock();
        state.rules.clear();
        state.one_in = None;
    }

    /// Faults that requests met so far.
    #[must_use]
    pub fn faults(&self) -> usize {
        self.lock().faults
    }

    /// Methods and targets of the requests so far.
    #[must_use]
    pub fn seen(&self) -> Vec<(String, String)> {
        self.lock().seen.clone()
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

enum Client {
    Plain(TcpStream),
    Tls(Box<rustls::StreamOwned<rustls::ServerConnection, TcpStream>>),
}

impl Client {
    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.get_ref(),
        }
    }
}

impl Read for Client {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Client {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(buffer),
            Self::Tls(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

/// Closing sends a reset instead of an end.
fn reset(stream: &TcpStream) {
    let _ = rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO));
    let _ = stream.shutdown(std::net::Shutdown::Both);
}

/// The fault that this request meets, if any.
fn fault_of(state: &Mutex<State>, head: &Head) -> Option<Fault> {
    let mut state = lock(state);
    state.seen.push((head.method.clone(), head.target.clone()));
    let number = state.seen.len() as u64;
    let ruled = state.rules.iter_mut().find(|rule| rule.left > 0 && (rule.matches)(head)).map(|rule| {
        rule.left -= 1;
        rule.fault.clone()
    });
    let fault = ruled.or_else(|| {
        let one_in = state.one_in?;
        number.is_multiple_of(one_in).then(|| match number / one_in % 6 {
            0 => Fault::Status(503, "<Error><Code>SlowDown</Code><Message>slow down</Message></Error>".into()),
            1 => Fault::Reset,
            2 => Fault::LoseReply,
            3 => Fault::CutUpload(head.content_length() / 2),
            4 => Fault::Status(429, String::new()),
            _ => Fault::CutReply(20),
        })
    });
    state.faults += usize::from(fault.is_some());
    fault
}

/// One request and its reply; then the connection ends, so that each request can be treated for itself.
fn serve(client: Client, state: &Mutex<State>) -> std::io::Result<()> {
    let mut client = BufReader::new(client);
    let Some(head) = read_head(&mut client)? else { return Ok(()) };
    let fault = fault_of(state, &head);
    let mut left = head.content_length();
    let mut damage = None;
    match &fault {
        Some(Fault::Status(status, body)) => {
            std::io::copy(&mut client.by_ref().take(left as u64), &mut std::io::sink())?;
            return Answer::new(*status, body.as_bytes()).write(client.get_mut(), &head.method, true);
        }
        Some(Fault::Reset) => {
            reset(client.get_ref().socket());
            return Ok(());
        }
        Some(Fault::Delay(time)) => std::thread::sleep(*time),
        Some(Fault::CutUpload(bytes)) => left = left.min(*bytes),
        Some(Fault::Damage) => damage = Some(left / 2),
        _ => {}
    }
    let upstream = lock(state).upstream.clone();
    // A store that is down looks as it would without a proxy: the connection ends without a word.
    let mut server = TcpStream::connect(upstream)?;
    server.set_read_timeout(Some(Duration::from_secs(120)))?;
    let mut text = format!("{} {} HTTP/1.1\r\n", head.method, head.relative());
    for (name, value) in
        head.headers.iter().filter(|(name, _)| !matches!(name.as_str(), "connection" | "proxy-connection"))
    {
        text += &format!("{name}: {value}\r\n");
    }
    server.write_all((text + "connection: close\r\n\r\n").as_bytes())?;
    let mut buffer = vec![0; 64 << 10];
    let mut passed = 0;
    while left > 0 {
        let most = left.min(buffer.len());
        let read = client.read(&mut buffer[..most])?;
        if read == 0 {
            return Ok(());
        }
        if let Some(at) = damage.filter(|at| (passed..passed + read).contains(at)) {
            buffer[at - passed] ^= 1;
        }
        if server.write_all(&buffer[..read]).is_err() {
            // It has answered already.
            break;
        }
        passed += read;
        left -= read;
    }
    if let Some(Fault::CutUpload(_)) = fault {
        reset(&server);
        reset(client.get_ref().socket());
        return Ok(());
    }
    let mut server = BufReader::new(server);
    match fault {
        Some(Fault::LoseReply) => {
            std::io::copy(&mut server, &mut std::io::sink())?;
            reset(client.get_ref().socket());
            Ok(())
        }
        Some(Fault::CutReply(bytes)) => {
            std::io::copy(&mut server.take(bytes as u64), client.get_mut())?;
            reset(client.get_ref().socket());
            Ok(())
        }
        _ => reply(&mut server, client.get_mut()),
    }
}

/// Passes a reply on, which says that the connection ends.
fn reply(server: &mut impl BufRead, client: &mut impl Write) -> std::io::Result<()> {
    loop {
        let mut line = String::new();
        if server.read_line(&mut line)? == 0 {
            return Ok(());
        }
        if line == "\r\n" {
            client.write_all(b"connection: close\r\n\r\n")?;
            break;
        }
        if !line.to_ascii_lowercase().starts_with("connection:") {
            client.write_all(line.as_bytes())?;
        }
    }
    std::io::copy(server, client)?;
    client.flush()
}
