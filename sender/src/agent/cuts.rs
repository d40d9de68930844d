//! Which cuts are under way, up to which close each of them reaches, and who waits for a point of them. Pure bookkeeping.

use std::collections::VecDeque;

use common::clock::UnixMillis;
use common::format::close::Consistency;
use common::ids::{CloseId, Epoch};
use common::session::ClosedEpoch;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::capture::cut::{Asserts, Cut, CutId, PointWish};
use crate::capture::group::GroupCut;
use crate::control::PointStatus;

/// What a cut came to, as it is reported.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Tally {
    pub(super) bytes_read: u64,
    pub(super) bytes_changed: u64,
}

/// A cut that is not committed.
#[derive(Debug)]
pub(super) struct UnderWay {
    pub(super) id: CutId,
    pub(super) asserts: Asserts,
    /// When it was made.
    pub(super) time: UnixMillis,
    pub(super) group: Option<GroupCut>,
    pub(super) weaker: String,
    /// Its last close, once it is sealed.
    pub(super) last: Option<ClosedEpoch>,
    /// What that close asserts.
    pub(super) point: Option<Consistency>,
}

/// A committed point.
#[derive(Debug, Clone)]
pub struct Point {
    /// Its close.
    pub close: CloseId,
    /// Its epoch.
    pub epoch: Epoch,
    /// What it asserts.
    pub consistency: Consistency,
    /// When its cut was made.
    pub time: UnixMillis,
    /// Names the instant at which other disks were cut too; `None` where there are none.
    pub group: Option<common::ids::GroupId>,
    /// Why it is weaker than what was asked for; empty where it is not.
    pub weaker: String,
}

impl Point {
    /// As status and commands show it.
    #[must_use]
    pub fn status(&self) -> PointStatus {
        PointStatus {
            id: self.close.to_string(),
            epoch: self.epoch.0,
            time_ms: self.time.0,
            consistency: self.consistency.as_str().to_owned(),
            group_point: self.group.map(|group| group.to_string()).unwrap_or_default(),
        }
    }
}

/// Somebody who waits for a point.
#[derive(Debug)]
pub struct PointRequest {
    /// What is asked for.
    pub wish: PointWish,
    /// Told once the point is committed; dropped where the volume stops before.
    pub reply: oneshot::Sender<Point>,
}

#[derive(Debug)]
struct Waiter {
    request: PointRequest,
    /// When it was asked for: a cut made before does not answer.
    asked: UnixMillis,
    /// The cut that will answer.
    cut: Option<CutId>,
}

/// The cuts of one volume that are not committed, oldest first, and those who wait for points.
#[derive(Debug, Default)]
pub(super) struct Cuts {
    under_way: VecDeque<UnderWay>,
    waiters: Vec<Waiter>,
    pub(super) tally: Tally,
    started: Option<Instant>,
}

impl Cuts {
    /// True where every cut is committed.
    pub(super) fn is_empty(&self) -> bool {
        self.under_way.is_empty()
    }

    /// A cut was made; it answers those who wait, if it asserts a point.
    pub(super) fn begin(&mut self, cut: &Cut) {
        self.started.get_or_insert_with(Instant::now);
        self.under_way.push_back(UnderWay {
            id: cut.id,
            asserts: cut.asserts,
            time: cut.time,
            group: cut.group.clone(),
            weaker: cut.weaker.clone(),
            last: None,
            point: None,
        });
        if cut.asserts != Asserts::Nothing {
            for waiter in self.waiters.iter_mut().filter(|waiter| waiter.cut.is_none() && waiter.asked <= cut.time) {
                waiter.cut = Some(cut.id);
            }
        }
    }

    /// True where somebody waits for the newest cut's point.
    pub(super) fn newest_is_awaited(&self) -> bool {
        let newest = self.under_way.back().map(|cut| cut.id);
        newest.is_some() && self.waiters.iter().any(|waiter| waiter.cut == newest)
    }

    /// The cut that is being sealed.
    pub(super) fn newest_mut(&mut self) -> Option<&mut UnderWay> {
        self.under_way.back_mut()
    }

    /// Somebody waits for a point from now on.
    pub(super) fn wait(&mut self, request: PointRequest, now: UnixMillis) {
        self.waiters.push(Waiter { request, asked: now, cut: None });
    }

    /// The next cut that is wholly committed, given the newest committed epoch.
    pub(super) fn pop_committed(&mut self, known: Epoch) -> Option<UnderWay> {
        let committed = self.under_way.front()?.last.is_some_and(|last| last.epoch <= known);
        committed.then(|| self.under_way.pop_front()).flatten()
    }

    /// Answers those who wait for a cut. Where it made no point after all, their wishes are given back.
    pub(super) fn answer(&mut self, cut: &UnderWay, point: Option<&Point>) -> Vec<PointWish> {
        let mut again = Vec::new();
        for mut waiter in std::mem::take(&mut self.waiters) {
            if waiter.cut != Some(cut.id) {
                self.waiters.push(waiter);
            } else if let Some(point) = point {
                // Whoever asked may be gone.
                let _ = waiter.request.reply.send(point.clone());
            } else {
                waiter.cut = None;
                again.push(waiter.request.wish.clone());
                self.waiters.push(waiter);
            }
        }
        again
    }

    /// Forgets the cuts that reach beyond `newest`, the newest close that is left. The first of them, and the wishes of those
    /// who wait for one of them.
    pub(super) fn lose_after(&mut self, newest: Epoch) -> (Option<CutId>, Vec<PointWish>) {
        let keep = self.under_way.iter().take_while(|cut| cut.last.is_some_and(|last| last.epoch <= newest)).count();
        let first = self.under_way.get(keep).map(|cut| cut.id);
        self.under_way.truncate(keep);
        let mut again = Vec::new();
        for waiter in &mut self.waiters {
            if first.is_some_and(|first| waiter.cut.is_some_and(|cut| cut >= first)) {
                waiter.cut = None;
                again.push(waiter.request.wish.clone());
            }
        }
        (first, again)
    }

    /// What was done since the last point, and since when.
    pub(super) fn take_tally(&mut self) -> (Tally, std::time::Duration) {
        let took = self.started.take().map(|started| started.elapsed()).unwrap_or_default();
        (std::mem::take(&mut self.tally), took)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::capture::cut::{CutPages, Piece, PieceRead};

    struct Nothing;

    impl CutPages for Nothing {
        fn next(&self) -> Option<Piece> {
            None
        }
        fn read(&self, _: &Piece, _: &mut [u8]) -> Result<PieceRead, crate::capture::CaptureError> {
            unreachable!("it has no pieces")
        }
        fn pages(&self) -> u64 {
            0
        }
    }

    fn begin(cuts: &mut Cuts, id: u64, asserts: Asserts) {
        let (pages, time) = (Arc::new(Nothing), UnixMillis(0));
        cuts.begin(&Cut { id: CutId(id), pages, time, asserts, group: None, weaker: String::new() });
    }

    #[test]
    fn a_cut_made_before_a_point_was_asked_for_does_not_answer() {
        let mut cuts = Cuts::default();
        let (reply, mut answer) = oneshot::channel();
        let wish = PointWish { consistency: Consistency::Crash, group: None };
        cuts.wait(PointRequest { wish, reply }, UnixMillis(1));
        begin(&mut cuts, 1, Asserts::Point(Consistency::Crash)); // at 0
        sealed(&mut cuts, 1);
        let cut = cuts.pop_committed(Epoch(1)).expect("committed");
        assert!(cuts.answer(&cut, None).is_empty(), "nobody waited for it, so nothing is wished for again");
        assert!(answer.try_recv().is_err());
    }

    fn sealed(cuts: &mut Cuts, epoch: u64) {
        let cut = cuts.newest_mut().expect("one was begun");
        cut.last = Some(ClosedEpoch { epoch: Epoch(epoch), close: CloseId([1; 32]) });
    }

    #[test]
    fn a_point_answers_only_those_who_asked_before_its_cut() {
        let mut cuts = Cuts::default();
        let wish = PointWish { consistency: Consistency::Crash, group: None };
        let ask = |cuts: &mut Cuts| {
            let (reply, mut answer) = oneshot::channel();
            cuts.wait(PointRequest { wish: wish.clone(), reply }, UnixMillis(0));
            move || answer.try_recv().is_ok()
        };
        let mut first = ask(&mut cuts);
        begin(&mut cuts, 1, Asserts::Nothing);
        sealed(&mut cuts, 1);
        begin(&mut cuts, 2, Asserts::Point(Consistency::Crash));
        let mut late = ask(&mut cuts);
        sealed(&mut cuts, 3);
        assert!(cuts.pop_committed(Epoch(0)).is_none());
        let step = cuts.pop_committed(Epoch(2)).expect("the first one is committed");
        assert_eq!(step.id, CutId(1));
        assert!(cuts.answer(&step, None).is_empty(), "nobody waits for a step");
        let cut = cuts.pop_committed(Epoch(3)).expect("committed");
        let point = Point {
            close: CloseId([1; 32]),
            epoch: Epoch(3),
            consistency: Consistency::Crash,
            time: UnixMillis(0),
            group: None,
            weaker: String::new(),
        };
        cuts.answer(&cut, Some(&point));
        assert!(first());
        assert!(!late(), "its cut is still to come");
        assert!(!cuts.newest_is_awaited());
        begin(&mut cuts, 4, Asserts::Point(Consistency::Crash));
        assert!(cuts.newest_is_awaited(), "the late one's cut");
        sealed(&mut cuts, 4);
        let cut = cuts.pop_committed(Epoch(4)).expect("committed");
        cuts.answer(&cut, None);
        assert!(cuts.is_empty());
    }

    #[test]
    fn what_is_lost_is_wished_for_again() {
        let mut cuts = Cuts::default();
        begin(&mut cuts, 1, Asserts::Point(Consistency::Crash));
        sealed(&mut cuts, 4);
        let (reply, _answer) = oneshot::channel();
        cuts.wait(
            PointRequest { wish: PointWish { consistency: Consistency::Crash, group: None }, reply },
            UnixMillis(0),
        );
        begin(&mut cuts, 2, Asserts::Point(Consistency::Crash));
        let (first, again) = cuts.lose_after(Epoch(4));
        assert_eq!((first, again.len()), (Some(CutId(2)), 1));
        assert!(cuts.pop_committed(Epoch(4)).is_some(), "the first one is not lost");
        assert_eq!(cuts.lose_after(Epoch(4)).0, None);
    }
}
