//! Control: how people and scripts talk to a sender on its own machine.
//!
//! ```text
//! blockferry-sender point|status|events|detach ─▶ client ══ STATE_DIR/control.sock, a JSON object a line ══▶ server
//!   server ─▶ Request ─▶ agent (answers through the request's reply)
//!   agent  ─▶ Board   ─▶ server (status), Events ─▶ server (events)
//! ```
//!
//! # For the agent
//! [`serve`] gives a [`Server`] (keep it until the end; dropping it removes the socket) and a [`Handle`]:
//! - [`Handle::board`]: the agent writes how each volume stands, and the link, whenever that changes; `status` reads it.
//! - [`Handle::requests`]: what was asked. Each request carries a `reply`, to be sent exactly once, by the task that did the
//!   work or gave it up. A reply whose receiver is gone (the client left) is dropped without a word.
//!
//! # Promises
//! The socket is the owner's alone (mode 0600), and one that a dead sender left is replaced. A line has at most
//! [`protocol::REQUEST_BYTES_MAX`] bytes, at most [`server::CLIENTS_MAX`] clients are served at once, a silent one is hung up
//! on. Commands that change a state directory without a running sender hold its lock meanwhile.
//! Never: keys or contents of disks in an answer.

pub mod args;
pub mod client;
pub mod commands;
pub mod preflight;
pub mod protocol;
pub mod server;
pub mod status;

use std::path::{Path, PathBuf};

use common::format::close::Consistency;
use tokio::sync::oneshot;

pub use protocol::{DetachReply, PointReply};
pub use server::{Handle, Server, serve};
pub use status::{Board, LinkStatus, PointStatus, SenderStatus, VolumeStatus};

/// Name of the socket in the state directory.
pub const SOCKET_NAME: &str = "control.sock";

/// Where a sender with this state directory answers.
#[must_use]
pub fn socket_path(state_dir: &Path) -> PathBuf {
    state_dir.join(SOCKET_NAME)
}

/// A path to the socket that fits the system's limit of 108 bytes, however long the state directory's is. It leads there as
/// long as the handle is open.
fn reachable(state_dir: &Path, name: &str) -> std::io::Result<(PathBuf, Option<std::fs::File>)> {
    use std::os::fd::AsRawFd;
    /// `sun_path` holds 108 bytes with a terminating zero.
    const PATH_BYTES_MAX: usize = 107;
    let path = state_dir.join(name);
    if path.as_os_str().len() <= PATH_BYTES_MAX {
        return Ok((path, None));
    }
    let directory = std::fs::File::open(state_dir)?;
    Ok((PathBuf::from(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd())), Some(directory)))
}

/// What a client asks of the agent.
#[derive(Debug)]
pub enum Request {
    /// A recovery point now. Answered when it is committed, or when it is known that there will be none.
    Point {
        /// The volume; `None` for all of the machine, at one instant where their captures can.
        volume: Option<String>,
        /// The least consistency asked for; `None` for the best that the capture gives.
        consistency: Option<Consistency>,
        /// One answer for each volume asked for. An unknown volume is answered with an error in its reply.
        reply: oneshot::Sender<Vec<PointReply>>,
    },
    /// Ends protection: stops the volume, removes pins, bitmaps, write-intent log and hash state
    /// ([`crate::state::StateDir::remove`], [`commands::detach::remove_pins`]). What is in the store stays.
    Detach {
        /// The volume; `None` for all.
        volume: Option<String>,
        /// One answer for each volume.
        reply: oneshot::Sender<Vec<DetachReply>>,
    },
}
