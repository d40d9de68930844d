//! The age of a volume's newest committed point: what the operator would lose now.
//!
//! While nothing is outstanding (the replica is what the disk is) the age stands still, and once something changes again it
//! goes on from there: what did not change meanwhile would not be lost.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use common::clock::UnixMillis;

#[derive(Debug, Clone, Copy)]
struct Age {
    /// The newest point's cut, moved on by the time in which nothing was outstanding.
    cut: UnixMillis,
    /// Since when nothing is outstanding.
    still_since: Option<UnixMillis>,
}

impl Age {
    fn millis(&self, now: UnixMillis) -> u64 {
        let until = self.still_since.unwrap_or(now);
        u64::try_from(until.0.saturating_sub(self.cut.0)).unwrap_or(0)
    }
}

/// The ages of all volumes that have a point.
#[derive(Debug, Clone, Default)]
pub(super) struct Ages(Arc<Mutex<HashMap<String, Age>>>);

impl Ages {
    /// Volumes and ages in milliseconds.
    pub(super) fn at(&self, now: UnixMillis) -> Vec<(String, u64)> {
        let ages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ages.iter().map(|(volume, age)| (volume.clone(), age.millis(now))).collect()
    }

    /// Forgets a volume.
    pub(super) fn forget(&self, volume: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(volume);
    }
}

/// One volume's age.
#[derive(Debug)]
pub(super) struct Rpo {
    ages: Ages,
    volume: String,
}

impl Rpo {
    pub(super) fn of(ages: &Ages, volume: &str) -> Self {
        Self { ages: ages.clone(), volume: volume.to_owned() }
    }

    /// A point with this cut is committed.
    pub(super) fn committed(&self, cut: UnixMillis) {
        let mut ages = self.ages.0.lock().unwrap_or_else(PoisonError::into_inner);
        ages.insert(self.volume.clone(), Age { cut, still_since: None });
    }

    /// Says whether anything is outstanding now.
    pub(super) fn outstanding(&self, outstanding: bool, now: UnixMillis) {
        let mut ages = self.ages.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(age) = ages.get_mut(&self.volume) else { return };
        match (outstanding, age.still_since) {
            (false, None) => age.still_since = Some(now),
            (true, Some(since)) => {
                age.cut.0 = age.cut.0.saturating_add(now.0.saturating_sub(since.0).max(0));
                age.still_since = None;
            }
            _ => {}
        }
    }

    /// The age in milliseconds; `None` before the first point.
    #[cfg(test)]
    pub(super) fn age(&self, now: UnixMillis) -> Option<u64> {
        let ages = self.ages.0.lock().unwrap_or_else(PoisonError::into_inner);
        ages.get(&self.volume).map(|age| age.millis(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_stands_still_while_nothing_is_outstanding_and_goes_on_from_there() {
        let rpo = Rpo::of(&Ages::default(), "root");
        let at = UnixMillis;
        rpo.outstanding(true, at(5));
        assert_eq!(rpo.age(at(10)), None, "no point, no age");
        rpo.committed(at(1_000));
        assert_eq!(rpo.age(at(1_500)), Some(500));
        rpo.outstanding(false, at(1_600));
        assert_eq!(rpo.age(at(9_000)), Some(600));
        rpo.outstanding(true, at(10_000));
        assert_eq!(rpo.age(at(10_100)), Some(700));
        rpo.committed(at(10_050));
        assert_eq!(rpo.age(at(10_100)), Some(50));
    }
}
