//! What the commands do that talk to a running sender, or stand in for one. Each gives an exit code; what is printed is the
//! command's answer, written to `out`.

pub mod adopt;
pub mod detach;
pub mod events;
pub mod point;
pub mod status;

use std::io::Write;
use std::path::PathBuf;

use common::net::enrolment::EnrolmentError;

use super::client::ClientError;
use crate::agent::AgentError;
use crate::register;
use crate::state::StateError;

/// Why a command failed. The text names the thing and the next step.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The running sender.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The machine's registration.
    #[error(transparent)]
    Enrolment(#[from] EnrolmentError),
    /// The key file.
    #[error(transparent)]
    Register(#[from] register::Error),
    /// The receiver.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// No volume of that name in the state directory.
    #[error("{} has no volume {name}{known}", state_dir.display())]
    NoVolume {
        /// The state directory.
        state_dir: PathBuf,
        /// Name asked for.
        name: String,
        /// Those that there are, as a clause.
        known: String,
    },
    /// Something else, in words with the next step.
    #[error("{0}")]
    Failed(String),
    /// A file of ours could not be removed.
    #[error("cannot remove {}: {source}; remove it by hand, and run the command again", path.display())]
    Remove {
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// Standard output.
    #[error("cannot write the answer: {0}")]
    Output(#[from] std::io::Error),
}

/// Where a command's answer goes.
pub type Out<'a> = &'a mut (dyn Write + Send);

/// `: it has a, b` for an error, or that there are none.
fn known_names<'a>(names: impl Iterator<Item = &'a String>) -> String {
    let names: Vec<&str> = names.map(String::as_str).collect();
    if names.is_empty() { "; it protects none".to_owned() } else { format!("; it has {}", names.join(", ")) }
}
