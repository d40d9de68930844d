//! One freeze: file systems at rest, a switch of marks, the last copy, thaw.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::budget::Permit;
use common::clock::{Clock, UnixMillis};
use common::pages::PageSet;

use super::copy::{CopyFailure, LastCopy, Readers, touch_stack};
use super::pages::ReadSpeed;
use super::tracker::{ChangeTracker, SavedSet};
use crate::capture::freeze::{Frozen, Prepared, Thawed};
use crate::capture::group::GroupCut;
use crate::capture::{CaptureError, Disk};

/// Pages that always fit: where even they don't, only a try shows it.
const PAGES_ALWAYS: u64 = 64;
/// Share of the limit that a freeze may be expected to take, in percent; the rest is for what goes otherwise than expected.
const EXPECTED_PERCENT: u32 = 70;

/// What freezes took, to know what the next one will take.
#[derive(Debug)]
pub(super) struct FreezeTimes {
    /// Reading a page, by all readers together.
    copy: ReadSpeed,
    /// Everything else.
    rest: ReadSpeed,
}

impl Default for FreezeTimes {
    /// Guesses for a slow disk; the first freeze corrects them.
    fn default() -> Self {
        Self { copy: ReadSpeed::new(Duration::from_micros(50)), rest: ReadSpeed::new(Duration::from_millis(20)) }
    }
}

impl FreezeTimes {
    /// Whether `pages` can be expected to be read within the limit, and there may be memory for them.
    pub(super) fn fits(&self, pages: u64, limit: Duration, pages_max: u64) -> bool {
        let expected = self.copy.expect(pages) + self.rest.expect(1);
        pages <= pages_max && (pages <= PAGES_ALWAYS || expected <= limit * EXPECTED_PERCENT / 100)
    }
}

/// What came of a freeze.
pub(super) enum Taken {
    /// The pages of an instant.
    Held {
        /// Pages that changed up to the instant and were in no cut.
        set: PageSet,
        /// Their content.
        copy: LastCopy,
        /// The instant.
        time: UnixMillis,
        /// Whether all disks of the group were at rest at that instant.
        grouped: bool,
    },
    /// Nothing may be said of it.
    Broken {
        /// Why.
        reason: String,
        /// Pages that were switched away from the tracker, and are in no cut now.
        pages: Option<PageSet>,
    },
}

/// What a freeze works with.
pub(super) struct FrozenCut<'a, T> {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) tracker: &'a Mutex<T>,
    pub(super) group: Option<&'a GroupCut>,
    pub(super) times: &'a mut FreezeTimes,
    pub(super) clock: &'a Clock,
    pub(super) volume: &'a str,
}

/// What happened while frozen. Strings are static: nothing is allocated for them.
struct InFreeze {
    switched: Option<SavedSet>,
    result: Result<(), Failure>,
    grouped: bool,
    time: UnixMillis,
    copied: Duration,
}

enum Failure {
    Tracker(CaptureError),
    Copy(CopyFailure),
    Written,
}

impl<T: ChangeTracker> FrozenCut<'_, T> {
    /// Freezes, copies, thaws, and saves the set that was copied.
    pub(super) fn take(self, prepared: Prepared, room: u64, permit: Permit) -> Taken {
        let broken = |reason| Taken::Broken { reason, pages: None };
        let mut copy = LastCopy::reserve(Arc::clone(&self.disk), room, permit);
        let mut tracker = self.tracker.lock().unwrap_or_else(PoisonError::into_inner);
        let tracker = &mut *tracker;
        // Only where it failed after the last freeze; its pages were given back then.
        if let Err(error) = tracker.settle() {
            return broken(error.to_string());
        }
        touch_stack();
        let (group, clock) = (self.group, self.clock);
        let ran = copy.run(|readers| {
            let frozen = prepared.freeze()?;
            // From here to the thaw: no file, no log, no memory.
            let inside = inside(&frozen, tracker, group, clock, readers);
            let thawed = frozen.thaw();
            Ok::<_, crate::capture::freeze::FreezeError>((inside, thawed))
        });
        let (inside, thawed) = match ran {
            Ok(Ok(both)) => both,
            Ok(Err(error)) => return broken(error.to_string()),
            Err(error) => {
                return broken(format!("no thread for the last copy: {error}"));
            }
        };
        let (Thawed::Held { frozen: took } | Thawed::Broken { frozen: took, .. }) = &thawed;
        metrics::histogram!("blockferry_sender_freeze_seconds", "volume" => self.volume.to_owned())
            .record(took.as_secs_f64());
        let pages = inside.switched.as_ref().map_or(0, |set| set.pages.len());
        if pages > 0 && inside.result.is_ok() {
            self.times.copy.learn(pages, inside.copied);
        }
        self.times.rest.learn(1, took.saturating_sub(inside.copied));
        tracing::debug!(volume = self.volume, pages, ?took, copied = ?inside.copied, "frozen and thawed");
        // Durable now; until here the kernel had it. Where this fails the kernel still has it.
        let settled = tracker.settle();
        let reason = match (inside.result, thawed) {
            (Ok(()), Thawed::Held { .. }) if settled.is_err() => {
                settled.err().map_or_else(String::new, |error| error.to_string())
            }
            (Ok(()), Thawed::Held { .. }) => {
                let Some(switched) = inside.switched else {
                    return broken("there was no switch".to_owned());
                };
                return Taken::Held { set: switched.pages, copy, time: inside.time, grouped: inside.grouped };
            }
            (_, Thawed::Broken { reason, .. }) => reason,
            (Err(Failure::Tracker(error) | Failure::Copy(CopyFailure::Read(error))), _) => error.to_string(),
            (Err(Failure::Copy(CopyFailure::NoRoom)), _) => {
                "more pages changed until the freeze than were expected".to_owned()
            }
            (Err(Failure::Copy(CopyFailure::Late)), _) => {
                "the last pages could not be read within the limit".to_owned()
            }
            (Err(Failure::Written), _) => "the device was written while its file systems were frozen".to_owned(),
        };
        Taken::Broken { reason, pages: inside.switched.map(|set| set.pages) }
    }
}

/// Between freeze and thaw.
fn inside<T: ChangeTracker>(
    frozen: &Frozen,
    tracker: &mut T,
    group: Option<&GroupCut>,
    clock: &Clock,
    readers: &mut Readers<'_, '_>,
) -> InFreeze {
    let mut inside =
        InFreeze { switched: None, result: Ok(()), grouped: false, time: clock.now(), copied: Duration::ZERO };
    inside.result = (|| {
        let marks = tracker.marks().map_err(Failure::Tracker)?;
        if let Some(group) = group {
            // The others rest by now, or they come too late for this freeze.
            inside.grouped = group.arrive(frozen.left() / 2);
            inside.time = clock.now();
        }
        let set = inside.switched.insert(tracker.switch().map_err(Failure::Tracker)?);
        let started = std::time::Instant::now();
        let copied = readers.copy(&set.pages, &|| frozen.left().is_zero());
        inside.copied = started.elapsed();
        copied.map_err(Failure::Copy)?;
        match tracker.marks() {
            Ok(now) if now == marks => Ok(()),
            Ok(_) => Err(Failure::Written),
            Err(error) => Err(Failure::Tracker(error)),
        }
    })();
    inside
}
