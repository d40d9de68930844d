//! What a caller should do about an error, the one question every module's error answers.

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// The same call may work later: back off and try again.
    Retry,
    /// The connection or session is of no more use: open a new one.
    Reconnect,
    /// Another writer owns this volume now: stop writing it.
    Fenced,
    /// The operator's input or the peer's message was wrong: report it, do not try again.
    BadInput,
    /// Stored or received bytes are not what was written: report which, do not use them.
    Corrupt,
    /// A promise of our own code was broken.
    Bug,
}

/// Implemented by each module's error.
pub trait Dispose {
    /// What the caller should do now.
    fn disposition(&self) -> Disposition;
}
