//! One program under a time limit, with its output.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

/// How often, and how long apart, a program whose file is being written is tried again.
const BUSY_TRIES_MAX: u32 = 100;
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// How a program ended.
#[derive(Debug)]
pub(in crate::capture) enum Ended {
    /// By itself.
    Status(ExitStatus),
    /// It was killed at the limit.
    Late,
}

/// What came of a program.
#[derive(Debug)]
pub(in crate::capture) struct Finished {
    pub(in crate::capture) ended: Ended,
    output: Vec<u8>,
}

impl Finished {
    /// What it printed, without control characters.
    pub(in crate::capture) fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.output);
        text.trim().chars().filter(|character| !character.is_control() || *character == '\n').collect()
    }
}

/// Runs a program in a process group of its own, which is killed at the limit. Waits for the program, not for what it may
/// have left in the background.
pub(in crate::capture) fn run(command: &mut Command, timeout: Duration, output_max: usize) -> io::Result<Finished> {
    let (mut reader, writer) = io::pipe()?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer).process_group(0);
    let spawned = spawn(command);
    // The command keeps its ends of the pipe: without this the end of the output would never be seen.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = spawned?;
    let deadline = Instant::now() + timeout;
    rustix::io::ioctl_fionbio(&reader, true)?;
    let pid = Pid::from_child(&child);
    let mut output = Vec::new();
    let watched = pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from).and_then(|process| {
        let mut open = true;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            let wait = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut fds = [
                PollFd::new(&process, PollFlags::IN),
                PollFd::from_borrowed_fd(reader.as_fd(), if open { PollFlags::IN } else { PollFlags::empty() }),
            ];
            // A closed pipe keeps reporting that it hung up: it must not be asked any more.
            let asked = if open { 2 } else { 1 };
            match poll(&mut fds[..asked], Some(&wait)) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other?,
            };
            let ended = !fds[0].revents().is_empty();
            if open && (ended || !fds[1].revents().is_empty()) {
                open = drain(&mut reader, &mut output, output_max)?;
            }
            if ended {
                return Ok(true);
            }
        }
    });
    if !matches!(watched, Ok(true)) {
        let _ = kill_process_group(pid, Signal::KILL);
    }
    let status = child.wait()?;
    let _ = drain(&mut reader, &mut output, output_max);
    let ended = if watched? { Ended::Status(status) } else { Ended::Late };
    Ok(Finished { ended, output })
}

/// Starts the program. Waits a little where somebody is just writing its file, as package managers do.
fn spawn(command: &mut Command) -> io::Result<Child> {
    let mut tries = 0;
    loop {
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && tries < BUSY_TRIES_MAX => {
                tries += 1;
                std::thread::sleep(BUSY_PAUSE);
            }
            other => return other,
        }
    }
}

/// Takes what lies in the pipe, and says whether more may come.
fn drain(reader: &mut io::PipeReader, output: &mut Vec<u8>, output_max: usize) -> io::Result<bool> {
    let mut chunk = [0; 4096];
    // Bounded, so that a program which prints without end does not keep us from looking at the clock.
    for _ in 0..64 {
        match reader.read(&mut chunk) {
            Ok(0) => return Ok(false),
            Ok(read) => output.extend_from_slice(&chunk[..read.min(output_max - output.len().min(output_max))]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}
