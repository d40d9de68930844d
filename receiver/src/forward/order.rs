//! What may overtake what on the way to the store. Pure.
//!
//! 1. A segment is uploaded before the log entry that names it is created.
//! 2. The log entry is created before anyone is told that its epochs are committed.
//! 3. Everyone is told before the stage gives the epochs up.
//!
//! A crash after 1 leaves segments that nothing names; they are collected as orphans. A crash after 2 leaves committed epochs
//! in the stage; the next start finds them at or before the log's head and gives them up. So at each point a crash loses
//! nothing and commits nothing twice.
//!
//! Epochs go into the log in parent order, each whole in one entry: [`plan`] decides which may go next.

use common::format::close::Close;
use common::ids::{CloseId, Epoch};
use common::limits;

/// The log's newest committed close, or the close after which the next entry will follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Head {
    /// Epoch; 0 where nothing is committed.
    pub epoch: Epoch,
    /// Close; zero where nothing is committed.
    pub close: CloseId,
}

impl Head {
    /// The head once `close` is committed.
    #[must_use]
    pub fn after(close: &Close) -> Self {
        Self { epoch: close.statement().epoch, close: close.id() }
    }
}

/// What the next log entry may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// The first so many closes are committed already; the rest is to be planned again.
    Committed(usize),
    /// The first so many closes go into the next entry, at least one.
    Commit(usize),
    /// The first close does not follow the head, and never will.
    Broken,
    /// There is nothing to do.
    Nothing,
}

/// Decides about closed epochs that wait, in the order in which they were closed.
#[must_use]
pub fn plan<'a>(head: Head, waiting: impl Iterator<Item = &'a Close> + Clone) -> Plan {
    let old = waiting.clone().take_while(|close| close.statement().epoch <= head.epoch);
    let (known, last) = old.fold((0, None), |(count, _), close| (count + 1, Some(close.id())));
    if known > 0 {
        // The chain of parents vouches for those before.
        return if last == Some(head.close) { Plan::Committed(known) } else { Plan::Broken };
    }
    let (mut tip, mut taken, mut bytes) = (head, 0, 0_u64);
    for close in waiting {
        let statement = close.statement();
        let follows = statement.parent == tip.close && statement.epoch > tip.epoch;
        if !follows {
            return if taken == 0 { Plan::Broken } else { Plan::Commit(taken) };
        }
        bytes = bytes.saturating_add(statement.record_bytes);
        if taken > 0 && (bytes > limits::EPOCH_SEALED_BYTES_MAX || taken == limits::LOG_ENTRY_EPOCHS_MAX) {
            return Plan::Commit(taken);
        }
        taken += 1;
        tip = Head::after(close);
    }
    if taken == 0 { Plan::Nothing } else { Plan::Commit(taken) }
}

/// True where waiting for more epochs to share a segment gains nothing: one holds a recovery point, which somebody waits
/// for, or there is a whole segment already.
#[must_use]
pub fn is_due<'a>(waiting: impl Iterator<Item = &'a Close>, segment_bytes: u64) -> bool {
    let mut bytes = 0_u64;
    waiting.into_iter().any(|close| {
        bytes = bytes.saturating_add(close.statement().record_bytes);
        close.statement().point.is_some() || bytes >= segment_bytes
    })
}

/// How far one log entry has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Segments that the entry will name.
    pub segments: usize,
    /// Of them, durably in the store.
    pub uploaded: usize,
    /// The entry is in the log.
    pub logged: bool,
    /// It was told that the epochs are committed.
    pub told: bool,
    /// The stage has given the epochs up.
    pub released: bool,
}

/// What must be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Wait for the next segment to be in the store.
    Upload,
    /// Create the log entry.
    Log,
    /// Tell that the epochs are committed.
    Tell,
    /// Have the stage give them up.
    Release,
    /// Nothing.
    Done,
}

/// The order rule.
#[must_use]
pub fn next_step(progress: &Progress) -> Step {
    if progress.uploaded < progress.segments {
        Step::Upload
    } else if !progress.logged {
        Step::Log
    } else if !progress.told {
        Step::Tell
    } else if !progress.released {
        Step::Release
    } else {
        Step::Done
    }
}

#[cfg(test)]
mod tests {
    use common::clock::UnixMillis;
    use common::format::close::{CloseStatement, Consistency};
    use common::ids::{Digest, FleetId, GroupId, Incarnation, KeyId, Salt, VolumeId};

    use super::*;

    fn close(epoch: u64, parent: CloseId, record_bytes: u64, point: Option<Consistency>) -> Close {
        let statement = CloseStatement {
            fleet: FleetId::NIL,
            volume: VolumeId([1; 16]),
            incarnation: Incarnation(1),
            key_id: KeyId(1),
            epoch: Epoch(epoch),
            parent,
            salt: Salt::ZERO,
            cut_time: UnixMillis(0),
            point,
            disk_bytes: 4096,
            records: 1,
            data_pages: 0,
            zero_pages: 0,
            record_bytes,
            meta_root: Digest::ZERO,
            group: GroupId::NIL,
            group_point: GroupId::NIL,
        };
        Close::new(statement, [0; 64])
    }

    fn chain(epochs: &[u64], record_bytes: u64) -> Vec<Close> {
        let mut parent = CloseId::ZERO;
        let each = epochs.iter().map(|&epoch| {
            let next = close(epoch, parent, record_bytes, None);
            parent = next.id();
            next
        });
        each.collect()
    }

    #[test]
    fn nothing_overtakes_anything() {
        let at = |uploaded, logged, told, released| Progress { segments: 2, uploaded, logged, told, released };
        for (progress, step) in [
            (at(0, false, false, false), Step::Upload),
            (at(1, false, false, false), Step::Upload),
            (at(2, false, false, false), Step::Log),
            (at(2, true, false, false), Step::Tell),
            (at(2, true, true, false), Step::Release),
            (at(2, true, true, true), Step::Done),
            // Whatever else is claimed, an entry is not created before its segments are there.
            (at(1, false, true, true), Step::Upload),
            (Progress::default(), Step::Log),
        ] {
            assert_eq!(next_step(&progress), step, "{progress:?}");
        }
    }

    #[test]
    fn epochs_go_in_parent_order_and_gaps_in_their_numbers_are_allowed() {
        let closes = chain(&[1, 2, 5], 10);
        assert_eq!(plan(Head::default(), closes.iter()), Plan::Commit(3));
        assert_eq!(plan(Head::after(&closes[0]), closes[1..].iter()), Plan::Commit(2));
        assert_eq!(plan(Head::default(), std::iter::empty()), Plan::Nothing);
    }

    #[test]
    fn a_close_that_does_not_follow_breaks_the_chain_there() {
        let closes = chain(&[1, 2, 3], 10);
        let without_second = [closes[0].clone(), closes[2].clone()];
        assert_eq!(plan(Head::default(), without_second.iter()), Plan::Commit(1));
        assert_eq!(plan(Head::after(&closes[0]), without_second[1..].iter()), Plan::Broken);
        assert_eq!(plan(Head::default(), closes[1..].iter()), Plan::Broken);
    }

    #[test]
    fn committed_epochs_are_known_by_the_head_and_others_of_their_numbers_are_refused() {
        let closes = chain(&[1, 2, 3], 10);
        assert_eq!(plan(Head::after(&closes[1]), closes.iter()), Plan::Committed(2));
        let other = chain(&[2], 99);
        assert_eq!(plan(Head::after(&closes[1]), other.iter()), Plan::Broken);
    }

    #[test]
    fn an_entry_stays_within_its_bounds_but_takes_at_least_one_epoch() {
        let closes = chain(&[1, 2, 3], limits::EPOCH_SEALED_BYTES_MAX / 2);
        assert_eq!(plan(Head::default(), closes.iter()), Plan::Commit(2));
        let closes = chain(&[1, 2], limits::EPOCH_SEALED_BYTES_MAX * 2);
        assert_eq!(plan(Head::default(), closes.iter()), Plan::Commit(1));
        let many: Vec<u64> = (1..=limits::LOG_ENTRY_EPOCHS_MAX as u64 + 1).collect();
        assert_eq!(plan(Head::default(), chain(&many, 0).iter()), Plan::Commit(limits::LOG_ENTRY_EPOCHS_MAX));
    }

    #[test]
    fn a_point_or_a_full_segment_is_not_kept_waiting() {
        let small = chain(&[1, 2], 10);
        assert!(!is_due(small.iter(), 100));
        assert!(is_due(small.iter(), 20));
        assert!(is_due([close(1, CloseId::ZERO, 1, Some(Consistency::Crash))].iter(), 100));
    }
}
