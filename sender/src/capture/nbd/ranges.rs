//! Locks on ranges of pages: writes that overlap pass one after the other, in the order in which they came. Pure.
//!
//! Promises: of two ranges that overlap the one that entered first is held first, so nobody waits for ever; a range is taken
//! whole, so there is no deadlock. Never: waits itself; the caller asks again once something left.

/// Names one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RangeId(u64);

#[derive(Debug)]
struct Entry {
    id: u64,
    first: u64,
    last: u64,
}

/// The ranges that are held or waited for. Few: as many as there are threads that write.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// In the order in which they came.
    entries: Vec<Entry>,
    next: u64,
}

impl Ranges {
    /// Enters the queue for pages `first` to `last`.
    pub(super) fn enter(&mut self, first: u64, last: u64) -> RangeId {
        let id = self.next;
        self.next += 1;
        self.entries.push(Entry { id, first, last });
        RangeId(id)
    }

    /// True where the range is held: nothing that came earlier overlaps it.
    pub(super) fn is_held(&self, RangeId(id): RangeId) -> bool {
        let Some(place) = self.entries.iter().position(|entry| entry.id == id) else { return false };
        let own = &self.entries[place];
        !self.entries[..place].iter().any(|entry| entry.first <= own.last && own.first <= entry.last)
    }

    /// Leaves the queue. True where somebody may have waited for it.
    pub(super) fn leave(&mut self, RangeId(id): RangeId) -> bool {
        let Some(place) = self.entries.iter().position(|entry| entry.id == id) else { return false };
        let gone = self.entries.remove(place);
        self.entries[place..].iter().any(|entry| entry.first <= gone.last && gone.first <= entry.last)
    }

    /// True where any entry touches pages `first` to `last`.
    pub(super) fn touches(&self, first: u64, last: u64) -> bool {
        self.entries.iter().any(|entry| entry.first <= last && first <= entry.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_ranges_are_held_one_after_the_other_in_the_order_they_came() {
        let mut ranges = Ranges::default();
        let first = ranges.enter(0, 9);
        let second = ranges.enter(5, 19);
        let third = ranges.enter(15, 29);
        let elsewhere = ranges.enter(100, 100);
        assert!(ranges.is_held(first) && ranges.is_held(elsewhere));
        assert!(!ranges.is_held(second));
        assert!(!ranges.is_held(third), "it does not overtake the one that waits before it");
        assert!(ranges.leave(first), "somebody waited");
        assert!(ranges.is_held(second) && !ranges.is_held(third));
        assert!(ranges.leave(second));
        assert!(ranges.is_held(third));
        assert!(!ranges.leave(elsewhere));
        assert!(ranges.touches(29, 40) && !ranges.touches(30, 40));
    }
}
