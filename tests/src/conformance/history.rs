//! The log that the test keeps of its own writes. Its clock counts submissions and completions, so that "completed before
//! submitted" is a comparison of two numbers.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A moment on the log's clock: greater is later.
pub type Moment = u64;

/// The completion of a write that is not known to be complete.
pub const NEVER: Moment = Moment::MAX;

/// What a write does to its sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Stamps them.
    Stamp,
    /// Makes them zero.
    Zero,
    /// Lets the disk make them zero or leave them.
    Trim,
}

/// One write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// What it does.
    pub kind: Kind,
    /// Where.
    pub sectors: Range<u64>,
    /// The write whose completion was awaited before this one was submitted; 0 for none.
    pub awaited: u64,
    /// Before its first byte was handed on.
    pub submitted: Moment,
    /// After the disk said that it is done, or [`NEVER`].
    pub completed: Moment,
}

/// All writes. A write's number is its place plus one; 0 stands for what was there before.
#[derive(Debug, Default)]
pub struct Log {
    /// The writes by number.
    pub writes: Vec<Write>,
    /// Numbers of writes that are under way, oldest first.
    pub under_way: Vec<u64>,
    now: Moment,
}

impl Log {
    fn tick(&mut self) -> Moment {
        self.now += 1;
        self.now
    }

    /// Notes that a write is about to be handed to the disk, and gives it its number.
    pub fn submit(&mut self, kind: Kind, sectors: Range<u64>, awaited: u64) -> u64 {
        let submitted = self.tick();
        self.writes.push(Write { kind, sectors, awaited, submitted, completed: NEVER });
        let number = self.writes.len() as u64;
        self.under_way.push(number);
        number
    }

    /// Notes that the disk said that a write is done.
    ///
    /// # Panics
    /// If it was not under way.
    pub fn complete(&mut self, number: u64) {
        let now = self.tick();
        let at = self.under_way.iter().position(|other| *other == number).expect("it is under way");
        self.under_way.remove(at);
        self.writes[usize::try_from(number - 1).expect("in memory")].completed = now;
    }

    /// Takes back a write that was not made after all.
    ///
    /// # Panics
    /// If it was not under way.
    pub fn forget(&mut self, number: u64) {
        let at = self.under_way.iter().position(|other| *other == number).expect("it is under way");
        self.under_way.remove(at);
        let write = &mut self.writes[usize::try_from(number - 1).expect("in memory")];
        write.sectors.end = write.sectors.start;
    }

    /// This moment, after all that was noted and before all that will be.
    pub fn moment(&mut self) -> Moment {
        self.tick()
    }
}

/// A [`Log`] that threads share.
#[derive(Debug, Default)]
pub struct History {
    log: Mutex<Log>,
    completed: Condvar,
}

impl History {
    /// The log, locked.
    pub fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Log::complete`]; wakes whoever awaits it.
    pub fn complete(&self, number: u64) {
        self.log().complete(number);
        self.completed.notify_all();
    }

    /// As [`Log::moment`].
    pub fn moment(&self) -> Moment {
        self.log().moment()
    }

    /// Waits until write `number` is complete; false where it was not within `patience`.
    pub fn await_completion(&self, number: u64, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut log = self.log();
        while log.under_way.contains(&number) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            log = self.completed.wait_timeout(log, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}
