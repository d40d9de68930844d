//! The intake gate: when the stage takes records in, and from whom. The decision is pure; a watch tells those who wait.
//!
//! Between the high and the low mark the gate keeps its position, so that it does not flutter. While it is shut nobody is
//! let in as long as there are closed epochs to forward, or files to delete, which frees space. If there are none, forwarding can't free
//! anything: then one volume, the one with most staged, may go on above the high mark until it has closed an epoch. The
//! room between high mark and capacity is there for that, so a stage full of open epochs does not stand still.

use std::collections::HashMap;

use common::ids::VolumeId;

use super::error::StageError;

/// Whether the stage takes records in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Intake {
    /// It does.
    Open,
    /// Above its high mark and not yet down to its low mark.
    Full {
        /// The volume that may go on, so that its open epoch can be closed and forwarded.
        favoured: Option<VolumeId>,
    },
    /// The disk failed; it takes nothing more in this life.
    Failed(StageError),
}

/// The bounds the gate watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Marks {
    pub(super) capacity_bytes: u64,
    pub(super) high_bytes: u64,
    pub(super) low_bytes: u64,
    pub(super) records_high: u64,
    pub(super) records_low: u64,
}

/// What the gate looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Level {
    pub(super) used_bytes: u64,
    pub(super) records: u64,
    /// Closed epochs that wait to be forwarded.
    pub(super) closed: u64,
    /// Files wait to be deleted.
    pub(super) freeing: bool,
}

/// Where the gate stands after `level` was reached. `waiting` gives the staged bytes of open epochs of each volume that
/// waits for the gate.
pub(super) fn decide(
    now: &Intake,
    marks: &Marks,
    level: Level,
    waiting: impl Iterator<Item = (VolumeId, u64)>,
) -> Intake {
    let favoured = match now {
        Intake::Failed(_) => return now.clone(),
        Intake::Open if level.used_bytes < marks.high_bytes && level.records < marks.records_high => {
            return Intake::Open;
        }
        Intake::Full { .. } if level.used_bytes <= marks.low_bytes && level.records <= marks.records_low => {
            return Intake::Open;
        }
        Intake::Open => None,
        Intake::Full { favoured } => *favoured,
    };
    if level.closed > 0 {
        return Intake::Full { favoured: None };
    }
    if level.freeing && favoured.is_none() {
        return Intake::Full { favoured: None };
    }
    // Ties go to the larger identifier, so that the choice does not depend on a map's order.
    let favoured =
        favoured.or_else(|| waiting.max_by_key(|&(volume, bytes)| (bytes, volume)).map(|(volume, _)| volume));
    Intake::Full { favoured }
}

/// True where `volume` may stage a record now; `Err` where nobody may any more.
pub(super) fn admits(intake: &Intake, marks: &Marks, used_bytes: u64, volume: VolumeId) -> Result<bool, StageError> {
    match intake {
        Intake::Open => Ok(true),
        Intake::Full { favoured } => Ok(*favoured == Some(volume) && used_bytes < marks.capacity_bytes),
        Intake::Failed(error) => Err(error.clone()),
    }
}

/// Volumes that wait, and how many streams of each.
#[derive(Debug, Default)]
pub(super) struct Waiting(HashMap<VolumeId, usize>);

impl Waiting {
    pub(super) fn enter(&mut self, volume: VolumeId) {
        *self.0.entry(volume).or_default() += 1;
    }

    pub(super) fn leave(&mut self, volume: VolumeId) {
        if let Some(count) = self.0.get_mut(&volume) {
            *count -= 1;
            if *count == 0 {
                self.0.remove(&volume);
            }
        }
    }

    pub(super) fn contains(&self, volume: VolumeId) -> bool {
        self.0.contains_key(&volume)
    }

    pub(super) fn volumes(&self) -> impl Iterator<Item = VolumeId> + '_ {
        self.0.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARKS: Marks =
        Marks { capacity_bytes: 100, high_bytes: 80, low_bytes: 50, records_high: 1000, records_low: 800 };
    const A: VolumeId = VolumeId([1; 16]);
    const B: VolumeId = VolumeId([2; 16]);

    fn level(used_bytes: u64, closed: u64) -> Level {
        Level { used_bytes, records: 0, closed, freeing: false }
    }

    #[test]
    fn it_shuts_at_the_high_mark_and_opens_at_the_low_mark() {
        let shut = Intake::Full { favoured: None };
        for (now, used, then) in [
            (Intake::Open, 79, Intake::Open),
            (Intake::Open, 80, shut.clone()),
            (shut.clone(), 51, shut.clone()),
            (shut.clone(), 50, Intake::Open),
        ] {
            assert_eq!(decide(&now, &MARKS, level(used, 1), std::iter::empty()), then, "at {used}");
        }
    }

    #[test]
    fn too_many_records_shut_it_too() {
        let level = |records| Level { used_bytes: 0, records, closed: 1, freeing: false };
        let shut = Intake::Full { favoured: None };
        assert_eq!(decide(&Intake::Open, &MARKS, level(1000), std::iter::empty()), shut);
        assert_eq!(decide(&shut, &MARKS, level(801), std::iter::empty()), shut);
        assert_eq!(decide(&shut, &MARKS, level(800), std::iter::empty()), Intake::Open);
    }

    #[test]
    fn with_nothing_to_forward_the_fullest_waiting_volume_goes_on_until_it_closed_an_epoch() {
        let waiting = || [(A, 10), (B, 30)].into_iter();
        let favoured = decide(&Intake::Open, &MARKS, level(80, 0), waiting());
        assert_eq!(favoured, Intake::Full { favoured: Some(B) });
        assert_eq!(admits(&favoured, &MARKS, 90, B), Ok(true));
        assert_eq!(admits(&favoured, &MARKS, 90, A), Ok(false));
        assert_eq!(admits(&favoured, &MARKS, 100, B), Ok(false));
        // It stays the same one even if another has more by now.
        assert_eq!(decide(&favoured, &MARKS, level(85, 0), [(A, 99)].into_iter()), favoured);
        assert_eq!(decide(&favoured, &MARKS, level(85, 1), waiting()), Intake::Full { favoured: None });
    }

    #[test]
    fn nobody_is_favoured_while_space_is_being_freed_but_who_is_stays_so() {
        let freeing = Level { freeing: true, ..level(85, 0) };
        let shut = Intake::Full { favoured: None };
        assert_eq!(decide(&shut, &MARKS, freeing, [(A, 1)].into_iter()), shut);
        let favoured = Intake::Full { favoured: Some(B) };
        assert_eq!(decide(&favoured, &MARKS, freeing, [(A, 1)].into_iter()), favoured);
    }

    #[test]
    fn a_failure_is_final() {
        let failed = Intake::Failed(StageError::Stopped);
        assert_eq!(decide(&failed, &MARKS, level(0, 0), std::iter::empty()), failed);
        assert_eq!(admits(&failed, &MARKS, 0, A), Err(StageError::Stopped));
    }
}
