//! An attempt at a point, from the first look at what is marked to the cut.

use common::format::close::Consistency;
use tokio::task::JoinHandle;

use crate::capture::freeze::Prepared;
use crate::capture::hooks::Session;

/// Hooks of an attempt.
pub(super) enum Holding {
    /// Not begun.
    No,
    /// The `pre` hooks run.
    Starting(JoinHandle<Session>),
    /// The application rests, or not: [`Session::problem`].
    Held(Session),
    /// They failed, or were given up: the point is made without them.
    Failed,
}

/// On the way to a point.
pub(super) struct Attempt {
    pub(super) rounds: u32,
    pub(super) held_rounds: u32,
    pub(super) failures: u32,
    /// Whether hooks are to run.
    pub(super) application: bool,
    pub(super) holding: Holding,
    pub(super) gathering: Option<(JoinHandle<bool>, Prepared, u64)>,
    /// Why the point is weaker than what was asked for.
    pub(super) weaker: Vec<String>,
    /// Who writes the device without a file system.
    pub(super) raw: Vec<String>,
    /// Names it for hooks.
    pub(super) name: String,
}

impl Attempt {
    pub(super) fn wants_hooks(&self) -> bool {
        self.application && matches!(self.holding, Holding::No)
    }

    /// What a point of a freeze that held is.
    pub(super) fn consistency(&self) -> Consistency {
        match &self.holding {
            // What writes past the file systems is not frozen. It did not write meanwhile, so it is as after a power cut.
            _ if !self.raw.is_empty() => Consistency::Crash,
            Holding::Held(_) => Consistency::Application,
            _ => Consistency::Filesystem,
        }
    }
}
