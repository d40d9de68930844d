//! The order of a pass's pieces: which are out, how far ahead of the slowest, and which blocks of zeros join to one run. Pure.

use std::collections::BTreeMap;

use common::ids::BlockIndex;
use common::limits::RANGE_BLOCKS_MAX;

use crate::capture::scan::CHUNK_BLOCKS;

/// Pieces that may be handed out beyond the oldest that is still being compared.
const PIECES_AHEAD_MAX: u64 = 256;

/// Consecutive blocks that became zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ZeroRun {
    /// The first.
    pub(super) first: BlockIndex,
    /// How many, at most [`RANGE_BLOCKS_MAX`].
    pub(super) count: u32,
}

/// Where the pieces of one pass are.
///
/// Promises: each zero block in one run; never more than [`PIECES_AHEAD_MAX`] pieces ahead.
#[derive(Debug, Default)]
pub(super) struct Order {
    next: u64,
    /// The oldest piece whose zero blocks are not known yet.
    low: u64,
    /// First block and zero blocks, a bit each, of pieces after it.
    ahead: BTreeMap<u64, (BlockIndex, u8)>,
    run: Option<ZeroRun>,
}

impl Order {
    /// True where another piece may be handed out now.
    pub(super) fn has_room(&self) -> bool {
        self.next < self.low + PIECES_AHEAD_MAX
    }

    /// Counts a piece as handed out and numbers it. Pieces ascend.
    pub(super) fn hand_out(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    /// Says which blocks of a piece became zero as a whole, a bit each, the first one lowest. Returns runs that are now
    /// complete; the caller seals them.
    #[must_use]
    pub(super) fn compared(&mut self, number: u64, first: BlockIndex, zero_blocks: u8) -> Vec<ZeroRun> {
        self.ahead.insert(number, (first, zero_blocks));
        let mut complete = Vec::new();
        while let Some((first, bits)) = self.ahead.remove(&self.low) {
            self.low += 1;
            for index in (0..CHUNK_BLOCKS as u64).filter(|index| bits >> index & 1 == 1) {
                let block = first.0 + index;
                match &mut self.run {
                    Some(run) if run.first.0 + u64::from(run.count) == block && run.count < RANGE_BLOCKS_MAX => {
                        run.count += 1;
                    }
                    run => complete.extend(run.replace(ZeroRun { first: BlockIndex(block), count: 1 })),
                }
            }
        }
        complete
    }

    /// The last run, once every piece is compared and no other will come.
    #[must_use]
    pub(super) fn last_run(&mut self) -> Option<ZeroRun> {
        self.run.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u32) -> ZeroRun {
        ZeroRun { first: BlockIndex(first), count }
    }

    #[test]
    fn zero_blocks_join_to_runs_in_whatever_order_they_are_found() {
        let mut order = Order::default();
        for _ in 0..4 {
            order.hand_out();
        }
        assert_eq!(order.compared(2, BlockIndex(8), 0b0001), []);
        assert_eq!(order.compared(1, BlockIndex(4), 0b1111), []);
        // Blocks 3 to 8 are zero; 1 is a run of its own.
        assert_eq!(order.compared(0, BlockIndex(0), 0b1010), [run(1, 1)]);
        assert_eq!(order.compared(3, BlockIndex(20), 0b0001), [run(3, 6)], "blocks that do not adjoin are not joined");
        assert_eq!(order.last_run(), Some(run(20, 1)));
        assert_eq!(order.last_run(), None);
    }

    #[test]
    fn a_run_is_no_longer_than_a_record_may_state() {
        let mut order = Order::default();
        let mut complete = Vec::new();
        let blocks = u64::from(RANGE_BLOCKS_MAX) * 2 + 4;
        for first in (0..blocks).step_by(CHUNK_BLOCKS) {
            let number = order.hand_out();
            complete.extend(order.compared(number, BlockIndex(first), 0b1111));
        }
        complete.extend(order.last_run());
        let most = u64::from(RANGE_BLOCKS_MAX);
        assert_eq!(complete, [run(0, RANGE_BLOCKS_MAX), run(most, RANGE_BLOCKS_MAX), run(2 * most, 4)]);
    }

    #[test]
    fn pieces_are_not_handed_out_far_ahead_of_one_that_is_slow() {
        let mut order = Order::default();
        while order.has_room() {
            order.hand_out();
        }
        assert_eq!(order.next, PIECES_AHEAD_MAX);
        let _ = order.compared(1, BlockIndex(4), 0);
        assert!(!order.has_room(), "the first one is what is waited for");
        let _ = order.compared(0, BlockIndex(0), 0);
        assert!(order.has_room());
    }
}
