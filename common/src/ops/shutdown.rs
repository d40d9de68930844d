//! The orderly end: SIGTERM and SIGINT ask the process to drain; a second one ends it at once.
//!
//! Promises: the first signal is remembered, for the exit code 128+n; whoever waits is woken, however late it comes to wait.

use super::exit::ExitCode;
use std::io;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// A signal that ends the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndSignal {
    /// SIGINT, from a terminal.
    Interrupt,
    /// SIGTERM, from a service manager.
    Terminate,
}

impl EndSignal {
    /// The signal's number.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Interrupt => 2,
            Self::Terminate => 15,
        }
    }

    /// 128 + its number.
    #[must_use]
    pub const fn exit_code(self) -> ExitCode {
        ExitCode::Signal(self.number())
    }
}

/// The wish to end, shared by clones.
#[derive(Debug, Clone)]
pub struct Shutdown {
    asked: watch::Sender<Option<EndSignal>>,
}

impl Shutdown {
    /// One that only [`Shutdown::request`] triggers.
    #[must_use]
    pub fn manual() -> Self {
        Self { asked: watch::Sender::new(None) }
    }

    /// Listens for SIGTERM and SIGINT from now on; within a tokio runtime. A second signal ends the process at once with
    /// 128+n: a drain that hangs must not need SIGKILL.
    ///
    /// # Errors
    /// Where the kernel refuses the handlers.
    pub fn install() -> io::Result<Self> {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let shutdown = Self::manual();
        let handle = shutdown.clone();
        tokio::spawn(async move {
            loop {
                let received = tokio::select! {
                    Some(()) = terminate.recv() => EndSignal::Terminate,
                    Some(()) = interrupt.recv() => EndSignal::Interrupt,
                    else => return,
                };
                if !handle.request(received) {
                    tracing::warn!(signal = received.number(), "second signal: ending at once without draining");
                    end_now(received.exit_code());
                }
                tracing::info!(signal = received.number(), "ending in order; a second signal ends at once");
            }
        });
        Ok(shutdown)
    }

    /// Asks the process to end as `by` would. True for the first to ask.
    pub fn request(&self, by: EndSignal) -> bool {
        self.asked.send_if_modified(|asked| {
            let first = asked.is_none();
            asked.get_or_insert(by);
            first
        })
    }

    /// The signal that asked first, if any did.
    #[must_use]
    pub fn signal(&self) -> Option<EndSignal> {
        *self.asked.borrow()
    }

    /// True once the process was asked to end.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        self.signal().is_some()
    }

    /// Waits until the process is asked to end. Cancel safe.
    pub async fn requested(&self) -> EndSignal {
        let mut asked = self.asked.subscribe();
        let by = asked.wait_for(Option::is_some).await.ok().and_then(|by| *by);
        // The channel can't close while self holds its sender.
        by.unwrap_or(EndSignal::Terminate)
    }
}

#[expect(clippy::disallowed_methods, reason = "the one place that ends a process without returning from main")]
pub(super) fn end_now(code: ExitCode) -> ! {
    std::process::exit(i32::from(code.code()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_request_wins_and_wakes_early_and_late_waiters() {
        let shutdown = Shutdown::manual();
        let early = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { shutdown.requested().await }
        });
        assert!(!shutdown.is_requested());
        assert!(shutdown.request(EndSignal::Interrupt));
        assert!(!shutdown.request(EndSignal::Terminate), "the second is told so");
        assert_eq!(early.await.expect("woken"), EndSignal::Interrupt);
        assert_eq!(shutdown.requested().await, EndSignal::Interrupt);
        assert_eq!(shutdown.signal().map(|by| by.exit_code().code()), Some(130));
    }

    #[tokio::test]
    async fn sigterm_asks_for_an_orderly_end() {
        let shutdown = Shutdown::install().expect("handlers");
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM)
            .expect("sent to ourselves");
        assert_eq!(shutdown.requested().await.exit_code().code(), 143);
    }
}
