//! Cutting several disks at one instant.
//!
//! Each capture brings its disk to rest (holds writers back, or freezes file systems), then arrives. Once all have arrived
//! there is an instant at which all disks rest, so whatever each of them cuts before it lets go is the state at that instant.
//! A capture that does not come in time breaks the group: every disk then makes a point of its own.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::ids::GroupId;

#[derive(Debug, Default)]
struct Arrivals {
    gathered: usize,
    arrived: usize,
    broken: bool,
}

#[derive(Debug)]
struct Shared {
    parties: usize,
    arrivals: Mutex<Arrivals>,
    changed: Condvar,
}

/// One instant for several disks. Clones are the same instant.
#[derive(Debug, Clone)]
pub struct GroupCut {
    /// Names the set of disks.
    pub group: GroupId,
    /// Names the instant: the same in the close of each disk.
    pub point: GroupId,
    shared: Arc<Shared>,
}

impl GroupCut {
    /// An instant that `parties` disks have to arrive at.
    #[must_use]
    pub fn new(group: GroupId, point: GroupId, parties: usize) -> Self {
        let shared = Shared { parties, arrivals: Mutex::default(), changed: Condvar::new() };
        Self { group, point, shared: Arc::new(shared) }
    }

    /// Called by captures that can rest only for a moment, before they bring their disk to rest: waits until the others are
    /// about to, or have arrived. False as for [`Self::arrive`].
    #[must_use]
    pub fn gather(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut arrivals = self.shared.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        arrivals.gathered += 1;
        self.shared.changed.notify_all();
        while arrivals.gathered + arrivals.arrived < self.shared.parties && !arrivals.broken {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                arrivals.broken = true;
                break;
            }
            arrivals = self.shared.changed.wait_timeout(arrivals, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let together = !arrivals.broken;
        drop(arrivals);
        self.shared.changed.notify_all();
        together
    }

    /// Called with the disk at rest: waits for the others. True where all disks rest now; they may be cut, and let go after.
    /// False where one did not arrive within `patience`, or gave up: nothing may be said of the group.
    #[must_use]
    pub fn arrive(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut arrivals = self.shared.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        arrivals.arrived += 1;
        self.shared.changed.notify_all();
        while arrivals.arrived < self.shared.parties && !arrivals.broken {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                arrivals.broken = true;
                break;
            }
            arrivals = self.shared.changed.wait_timeout(arrivals, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let together = !arrivals.broken;
        drop(arrivals);
        self.shared.changed.notify_all();
        together
    }

    /// Says that a disk will not arrive: those that wait go on without the group.
    pub fn give_up(&self) {
        let mut arrivals = self.shared.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        if arrivals.arrived < self.shared.parties {
            arrivals.broken = true;
        }
        drop(arrivals);
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(parties: usize) -> GroupCut {
        GroupCut::new(GroupId([1; 16]), GroupId([2; 16]), parties)
    }

    #[test]
    fn all_that_arrive_go_on_together() {
        let group = group(3);
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let group = group.clone();
                std::thread::spawn(move || group.arrive(Duration::from_secs(60)))
            })
            .collect();
        assert!(threads.into_iter().all(|thread| thread.join().expect("no panic")));
    }

    #[test]
    fn those_that_rest_only_for_a_moment_gather_first_and_those_that_hold_writers_back_need_not() {
        let group = group(3);
        let moments: Vec<_> = (0..2)
            .map(|_| {
                let group = group.clone();
                std::thread::spawn(move || {
                    group.gather(Duration::from_secs(60)) && group.arrive(Duration::from_secs(60))
                })
            })
            .collect();
        assert!(group.arrive(Duration::from_secs(60)));
        assert!(moments.into_iter().all(|thread| thread.join().expect("no panic")));
    }

    #[test]
    fn one_that_stays_away_or_gives_up_breaks_the_group_for_all() {
        assert!(!group(2).arrive(Duration::from_millis(1)));
        let group = group(2);
        let waiting = {
            let group = group.clone();
            std::thread::spawn(move || group.arrive(Duration::from_secs(60)))
        };
        group.give_up();
        assert!(!waiting.join().expect("no panic"));
        assert!(!group.arrive(Duration::from_secs(60)), "a late one learns it too");
    }
}
