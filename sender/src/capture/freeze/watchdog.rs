//! The watchdog: a process that thaws file systems when the sender does not.
//!
//! It is the sender's own program, started again with a hidden subcommand, with one end of a socket pair as its standard input.
//! Over it travel single bytes, and with the first one the open mount points:
//!
//! ```text
//! sender                              watchdog
//!   ARM, limit, mount points   ─────▶  locks its memory
//!                              ◀─────  READY
//!   FREEZING                   ─────▶  the time runs
//!   … freezes, copies, thaws …
//!   THAWED                     ─────▶
//!                              ◀─────  IDLE, or: I had to thaw.  Ends.
//! ```
//!
//! It thaws where the time is up without `THAWED`, and where the socket closes: the sender died. It is in a session of its own, so
//! that a signal to the sender's group does not reach it, ignores what asks it to end, and asks not to be chosen when memory
//! runs out. It opens no file, and writes none, after it said `READY`.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

use super::thaw;

/// The hidden subcommand.
pub const SUBCOMMAND: &str = "thaw-watchdog";

/// File systems of one device that can be frozen together. The kernel takes 253 descriptors with one message.
pub const MOUNTS_MAX: usize = 64;

const ARM: u8 = b'A';
const READY: u8 = b'R';
const FREEZING: u8 = b'F';
const THAWED: u8 = b'T';
const IDLE: u8 = b'I';
const ACTED: u8 = b'W';

/// How long the watchdog may take to come up. It is a whole program's start on a machine that may be busy.
const START_PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to answer after the thaw.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
/// First and longest pause between two rounds of thawing.
const THAW_PAUSE: Duration = Duration::from_millis(5);
const THAW_PAUSE_MAX: Duration = Duration::from_millis(20);
/// How long it waits, armed, for the sender to freeze.
const ARMED_PATIENCE: Duration = Duration::from_secs(60);

/// How to start the watchdog.
#[derive(Debug, Clone)]
pub struct WatchdogCommand {
    /// The program.
    pub program: std::path::PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
}

impl Default for WatchdogCommand {
    /// This program, with the hidden subcommand.
    fn default() -> Self {
        Self { program: "/proc/self/exe".into(), args: vec![SUBCOMMAND.to_owned()] }
    }
}

/// What the watchdog had to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchdogEnd {
    /// Nothing.
    Idle,
    /// It thawed: the time was up.
    Thawed,
    /// Not known; why.
    Lost(String),
}

/// The sender's half. Dropping it makes the watchdog thaw, where it had been told of a freeze, and end.
#[derive(Debug)]
pub struct Watchdog {
    /// `None` once it is closed.
    socket: Option<UnixStream>,
    child: Child,
}

impl Watchdog {
    /// Starts a watchdog over `mounts`, and returns once it is ready.
    ///
    /// # Errors
    /// Where it can't be started, or does not say that it is ready.
    pub fn arm(command: &WatchdogCommand, mounts: &[&File], limit: Duration) -> io::Result<Self> {
        if mounts.len() > MOUNTS_MAX {
            let text =
                format!("{} file systems on one device, at most {MOUNTS_MAX} can be frozen together", mounts.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let (socket, theirs) = UnixStream::pair()?;
        let child = Command::new(&command.program)
            .args(&command.args)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .spawn()?;
        let mut watchdog = Self { socket: Some(socket), child };
        watchdog.introduce(mounts, limit)?;
        Ok(watchdog)
    }

    fn introduce(&mut self, mounts: &[&File], limit: Duration) -> io::Result<()> {
        let Some(socket) = &mut self.socket else { return Err(io::ErrorKind::NotConnected.into()) };
        let mut message = [ARM, 0, 0, 0, 0, 0, 0, 0, 0];
        let limit = u64::try_from(limit.as_nanos()).map_err(io::Error::other)?;
        message[1..].copy_from_slice(&limit.to_le_bytes());
        let descriptors: Vec<_> = mounts.iter().map(|file| file.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOUNTS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        rustix::net::sendmsg(&*socket, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL)?;
        socket.set_read_timeout(Some(START_PATIENCE))?;
        let mut answer = [0];
        socket.read_exact(&mut answer)?;
        if answer[0] != READY {
            return Err(io::Error::other("it answered something else than that it is ready"));
        }
        Ok(())
    }

    /// Says that the freeze begins. Allocates nothing.
    ///
    /// # Errors
    /// Where the watchdog is gone.
    pub fn freezing(&mut self) -> io::Result<()> {
        let socket = self.socket.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        socket.write_all(&[FREEZING])
    }

    /// Says that all is thawed, and asks whether the watchdog had to act.
    #[must_use]
    pub fn thawed(mut self) -> WatchdogEnd {
        let Some(socket) = &mut self.socket else { return WatchdogEnd::Lost("it was closed".to_owned()) };
        let mut answer = [0];
        let asked = socket
            .write_all(&[THAWED])
            .and_then(|()| socket.set_read_timeout(Some(ANSWER_PATIENCE)))
            .and_then(|()| socket.read_exact(&mut answer));
        match (asked, answer[0]) {
            (Ok(()), IDLE) => WatchdogEnd::Idle,
            (Ok(()), ACTED) => WatchdogEnd::Thawed,
            (Ok(()), other) => WatchdogEnd::Lost(format!("it answered {other:#x}")),
            // It may have acted and ended before it could be told.
            (Err(error), _) => WatchdogEnd::Lost(error.to_string()),
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.socket = None;
        // It ends by itself now. A thread of its own waits for that, since a thaw may wait for the kernel.
        match self.child.try_wait() {
            Ok(Some(_)) => {}
            _ => {
                let id = self.child.id();
                let _ = std::thread::Builder::new().name("watchdog-end".to_owned()).spawn(move || {
                    let Some(pid) = i32::try_from(id).ok().and_then(rustix::process::Pid::from_raw) else { return };
                    let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
                });
            }
        }
    }
}

/// The watchdog's half: the whole life of its process, with the socket as standard input. Returns the process's exit code.
#[must_use]
pub fn serve() -> u8 {
    let socket = io::stdin().as_fd().try_clone_to_owned();
    match socket.and_then(|socket| watch(UnixStream::from(socket))) {
        Ok(()) => 0,
        Err(_) => 1,
    }
}

fn watch(mut socket: UnixStream) -> io::Result<()> {
    detach();
    socket.set_read_timeout(Some(START_PATIENCE))?;
    let (mounts, limit) = receive(&socket)?;
    // Where this is not allowed the watchdog works all the same, unless memory runs out in that very moment.
    let _ = rustix::mm::mlockall(rustix::mm::MlockAllFlags::CURRENT | rustix::mm::MlockAllFlags::FUTURE);
    socket.write_all(&[READY])?;
    let mut byte = [0];
    socket.set_read_timeout(Some(ARMED_PATIENCE))?;
    if socket.read_exact(&mut byte).is_err() || byte[0] != FREEZING {
        // The sender changed its mind, or died. Nothing was frozen.
        return Ok(());
    }
    if let Wait::Thawed = wait_for_thawed(&mut socket, Instant::now() + limit) {
        return socket.write_all(&[IDLE]);
    }
    thaw_until_over(&mut socket, &mounts);
    socket.write_all(&[ACTED])
}

/// What came over the socket.
enum Wait {
    /// The sender has thawed.
    Thawed,
    /// The sender is dead.
    Closed,
    /// Nothing until the deadline.
    Late,
}

fn wait_for_thawed(socket: &mut UnixStream, deadline: Instant) -> Wait {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(wait) = Timespec::try_from(left) else { return Wait::Late };
        match poll(&mut [PollFd::new(&*socket, PollFlags::IN)], Some(&wait)) {
            Ok(0) => return Wait::Late,
            Ok(_) => {
                let mut byte = [0];
                let thawed = matches!(socket.read(&mut byte), Ok(1)) && byte[0] == THAWED;
                return if thawed { Wait::Thawed } else { Wait::Closed };
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return Wait::Late,
        }
    }
}

/// Thaws all file systems, and again, until the sender is dead or says that it is through: a freeze that is under way in the
/// kernel can't be undone before it is complete, and a sender that was stopped may freeze when it goes on.
fn thaw_until_over(socket: &mut UnixStream, mounts: &[OwnedFd]) {
    let mut pause = THAW_PAUSE;
    loop {
        for mount in mounts.iter().rev() {
            // "Not frozen" is the usual answer from the second round on.
            let _ = thaw(mount);
        }
        match wait_for_thawed(socket, Instant::now() + pause) {
            Wait::Thawed => return,
            Wait::Closed => break,
            Wait::Late => pause = (pause * 2).min(THAW_PAUSE_MAX),
        }
    }
    // Dead, so none of its calls is under way: once more for what it froze last.
    for mount in mounts.iter().rev() {
        let _ = thaw(mount);
    }
}

fn receive(socket: &UnixStream) -> io::Result<(Vec<OwnedFd>, Duration)> {
    let mut message = [0; 9];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOUNTS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut message)];
    let received = rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut mounts = Vec::new();
    for ancillary in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = ancillary {
            mounts.extend(descriptors);
        }
    }
    if received.bytes != message.len() || message[0] != ARM || received.flags.contains(rustix::net::ReturnFlags::CTRUNC)
    {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut limit = [0; 8];
    limit.copy_from_slice(&message[1..]);
    Ok((mounts, Duration::from_nanos(u64::from_le_bytes(limit))))
}

/// Takes the process out of the reach of what may end the sender. What is not allowed is left out.
fn detach() {
    let _ = rustix::process::setsid();
    ignore_signals();
    // CPU and memory: the thaw must not wait for either.
    let _ = rustix::process::setpriority_process(None, -20);
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
}

#[expect(unsafe_code, reason = "signal dispositions have no safe wrapper here")]
fn ignore_signals() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGPIPE, libc::SIGTSTP] {
        // SAFETY: SIG_IGN runs no code of ours.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}
