//! Which cut a write belongs to, and what of it is kept until it is sealed. Pure.
//!
//! ```text
//! write ─▶ admit ─▶ open cut: page contents (charged to the budget), zeros ─▶ cut ─▶ frozen: sealed, uncommitted, committed
//!             └──▶ backfill set: pages whose content has to be read from the disk (at first, after restarts, after overload)
//! ```
//!
//! Promises
//! - A page that changed is in the open cut with its content, or in the backfill set, from its admission on. So the union of
//!   backfill, open cut and uncommitted cuts holds every page that the store may not have as it is on the disk.
//! - A cut asserts a point only where the backfill set is empty at its instant and the cuts before it were read to their end.
//! - Contents of a cut that was made are never changed: a later write to the page makes a new copy.
//! - All page contents are charged to the budget, and never exceed the volume's own bound.
//!
//! Never: waits, or touches the disk.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::budget::{Budget, Permit};
use common::ids::{BlockIndex, Geometry, PageMask};
use common::limits::{BLOCK_BYTES, PAGE_BYTES, PAGES_PER_BLOCK};
use common::pages::PageSet;

use super::Overload;
use super::ranges::Ranges;
use crate::capture::cut::CutId;

/// Charged for each block beside its pages, for the record's header and the bookkeeping.
pub(super) const BLOCK_OVERHEAD_BYTES: u64 = 256;
/// Most pages of a backfill cut: 64 MiB.
const BACKFILL_PAGES_MAX: u64 = (64 << 20) / PAGE_BYTES as u64;
/// While writers outrun the budget, backfill pauses, since it would read what is written again at once; but no longer than this.
const BACKFILL_PAUSE: Duration = Duration::from_secs(2);

/// One page's content.
pub(super) type Page = Box<[u8]>;

/// Pages of one block that are kept with their content.
#[derive(Debug)]
pub(super) struct BlockPages {
    /// Which.
    pub(super) mask: PageMask,
    /// Their contents, ascending.
    pub(super) pages: Vec<Page>,
    /// Their bytes in the budget; always there.
    pub(super) permit: Option<Permit>,
}

impl BlockPages {
    fn place(&self, index: u32) -> usize {
        self.mask.and(PageMask::first(index)).count() as usize
    }
}

/// Blocks with page contents.
pub(super) type Blocks = BTreeMap<u64, BlockPages>;

/// Which pages a cut has; kept until it is committed.
#[derive(Debug)]
pub(super) struct CutSet {
    /// The cut.
    pub(super) id: CutId,
    /// Blocks with pages that have content, ascending.
    pub(super) blocks: Vec<(BlockIndex, PageMask)>,
    /// Pages that became zero.
    pub(super) zero: PageSet,
    /// Set once every page was read.
    pub(super) complete: AtomicBool,
}

impl CutSet {
    /// Its pages of a block.
    pub(super) fn mask(&self, block: BlockIndex) -> PageMask {
        let content = self.blocks.binary_search_by_key(&block, |(block, _)| *block);
        content.map_or(PageMask::EMPTY, |place| self.blocks[place].1).or(self.zero.mask(block))
    }
}

/// What [`Admission::plan`] decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plan {
    /// Nothing to cut; look again after so long, or when something is admitted.
    Wait(Option<Duration>),
    /// Cut what was admitted.
    Ordinary,
    /// Read a part of the backfill set.
    Backfill,
}

/// An ordinary cut.
#[derive(Debug)]
pub(super) struct Frozen {
    /// Its pages.
    pub(super) set: Arc<CutSet>,
    /// Its contents.
    pub(super) blocks: Blocks,
    /// True where the replica equals the disk with it.
    pub(super) point: bool,
}

/// What a capture that found nothing to do waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asleep {
    /// It does not wait.
    No,
    /// For its time, or for a reason to cut early.
    UntilEarly,
    /// For anything.
    UntilAny,
}

/// What became of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admitted {
    /// Its pages are in the open cut, or in the backfill set.
    Done,
    /// There is no room, and the policy is to wait: try again once a cut was made or sealed.
    Throttled,
}

/// The state of one volume's admissions.
#[derive(Debug)]
pub(super) struct Admission {
    geometry: Geometry,
    budget: Budget,
    overload: Overload,
    payload_max: u64,
    /// Contents admitted since the last ordinary cut, their sum as charged, and pages that became zero.
    open: Blocks,
    open_bytes: u64,
    zero: PageSet,
    /// Bytes of frozen cuts that are not sealed yet.
    pub(super) frozen_bytes: Arc<AtomicU64>,
    /// Pages to be read from the disk.
    backfill: PageSet,
    /// Where the next backfill cut begins, so that it goes over the disk in order.
    backfill_from: BlockIndex,
    uncommitted: VecDeque<Arc<CutSet>>,
    /// Ranges of writes in flight and of backfill reads.
    pub(super) ranges: Ranges,
    /// True while no write is admitted.
    pub(super) held: bool,
    /// Since when contents are dropped, for overload.
    dropping: Option<Duration>,
    catching_up: bool,
    caught_up: bool,
    /// A point is to be made even if nothing is written.
    point_due: bool,
    /// A writer waits for room.
    starved: bool,
    backfilled_last: bool,
    /// What the capture waits for.
    asleep: Asleep,
    next_cut: u64,
    overloads: u64,
    last_cut: Option<Duration>,
    /// Dropped contents, whose memory is given back outside of the lock.
    garbage: Vec<Blocks>,
}

impl Admission {
    /// Begins with `backfill` to be read from the disk.
    pub(super) fn new(budget: Budget, overload: Overload, payload_max: u64, backfill: PageSet) -> Self {
        let geometry = backfill.geometry();
        Self {
            geometry,
            budget,
            overload,
            payload_max,
            open: Blocks::new(),
            open_bytes: 0,
            zero: PageSet::empty(geometry),
            frozen_bytes: Arc::default(),
            point_due: true,
            backfill,
            backfill_from: BlockIndex(0),
            uncommitted: VecDeque::new(),
            ranges: Ranges::default(),
            held: false,
            dropping: None,
            catching_up: false,
            caught_up: false,
            starved: false,
            backfilled_last: false,
            asleep: Asleep::No,
            next_cut: 1,
            overloads: 0,
            last_cut: None,
            garbage: Vec::new(),
        }
    }

    /// Takes whole pages in, the first of them page number `first`; all of them, or none where it says so. `pages` holds
    /// what they replaced after it: drop it without the lock. `now` counts from any fixed instant.
    pub(super) fn admit(&mut self, first: u64, pages: &mut [Page], now: Duration) -> Admitted {
        let count = pages.len() as u64;
        if self.dropping.is_none() {
            let (new_pages, new_blocks) = self.count_new(first, count);
            let bytes = new_pages * PAGE_BYTES as u64 + new_blocks * BLOCK_OVERHEAD_BYTES;
            // Who rewrites what is there already needs nothing, however long the queue for the budget.
            let permit = if bytes == 0 { Some(None) } else { self.charge(bytes).map(Some) };
            match permit {
                Some(permit) => {
                    self.insert(first, pages, permit);
                    self.starved = false;
                    return Admitted::Done;
                }
                // A write that would not even fit into an empty cut is never kept waiting: nothing could free room for it.
                None if self.overload == Overload::Throttle && bytes <= self.payload_max / 2 => {
                    self.starved = true;
                    return Admitted::Throttled;
                }
                None => self.drop_open(now),
            }
        }
        for (block, mask) in blocks_of(first, count) {
            self.backfill.insert(block, mask);
            self.zero.remove(block, mask);
        }
        self.catching_up = true;
        Admitted::Done
    }

    /// Takes in that pages from `first` on become zero.
    pub(super) fn admit_zero(&mut self, first: u64, count: u64) {
        let end = first + count;
        let blocks = first / PAGES..=(end - 1) / PAGES;
        // Contents of pages that are zero now are not needed.
        let with_content: Vec<u64> = self.open.range(blocks).map(|(block, _)| *block).collect();
        for block in with_content {
            self.forget_content(block, mask_in(block, first, end));
        }
        let whole = first.div_ceil(PAGES)..end / PAGES;
        if whole.start < whole.end {
            self.zero.insert_blocks(BlockIndex(whole.start), whole.end - whole.start);
        }
        for (block, mask) in blocks_of(first, count).filter(|(block, _)| !whole.contains(&block.0)) {
            self.zero.insert(block, mask);
        }
        let mut from = BlockIndex(first / PAGES);
        while let Some(block) = self.backfill.next_block(from).filter(|block| block.0 * PAGES < end) {
            self.backfill.remove(block, mask_in(block.0, first, end));
            from = BlockIndex(block.0 + 1);
        }
    }

    /// The disk may not hold what was admitted: the pages are to be read from it.
    pub(super) fn distrust(&mut self, first: u64, count: u64) {
        for (block, mask) in blocks_of(first, count) {
            self.forget_content(block.0, mask);
            self.zero.remove(block, mask);
            self.backfill.insert(block, mask);
        }
        self.point_due = true;
    }

    fn count_new(&self, first: u64, count: u64) -> (u64, u64) {
        let (mut pages, mut blocks) = (0, 0);
        for (block, mask) in blocks_of(first, count) {
            match self.open.get(&block.0) {
                Some(known) => pages += u64::from(mask.without(known.mask).count()),
                None => {
                    pages += u64::from(mask.count());
                    blocks += 1;
                }
            }
        }
        (pages, blocks)
    }

    /// Charges bytes to the volume's bound and to the budget.
    fn charge(&self, bytes: u64) -> Option<Permit> {
        let kept = self.open_bytes + self.frozen_bytes.load(Ordering::Relaxed);
        (kept + bytes <= self.payload_max).then(|| self.budget.try_acquire(bytes)).flatten()
    }

    /// `permit` covers all pages and blocks that are new.
    fn insert(&mut self, first: u64, pages: &mut [Page], mut permit: Option<Permit>) {
        self.open_bytes += permit.as_ref().map_or(0, Permit::bytes);
        let mut contents = pages.iter_mut();
        for (block, mask) in blocks_of(first, contents.len() as u64) {
            let entry = self.open.entry(block.0).or_insert_with(|| BlockPages {
                mask: PageMask::EMPTY,
                pages: Vec::new(),
                permit: permit.as_mut().map(|permit| permit.split(BLOCK_OVERHEAD_BYTES)),
            });
            let new = u64::from(mask.without(entry.mask).count()) * PAGE_BYTES as u64;
            if let (Some(own), Some(rest)) = (&mut entry.permit, &mut permit) {
                // Both are of the same budget.
                let _ = own.merge(rest.split(new));
            }
            if entry.mask.is_empty() {
                entry.mask = mask;
                entry.pages.extend(contents.by_ref().take(mask.count() as usize).map(std::mem::take));
            } else {
                for (index, content) in mask.iter().zip(contents.by_ref()) {
                    let place = entry.place(index);
                    if entry.mask.contains(index) {
                        std::mem::swap(&mut entry.pages[place], content);
                    } else {
                        entry.pages.insert(place, std::mem::take(content));
                        entry.mask = entry.mask.with(index);
                    }
                }
            }
            self.zero.remove(block, mask);
            self.backfill.remove(block, mask);
        }
    }

    fn forget_content(&mut self, block: u64, mask: PageMask) {
        let Some(known) = self.open.get_mut(&block) else { return };
        let gone = known.mask.and(mask);
        for index in gone.iter() {
            let place = known.place(index);
            known.pages.remove(place);
            known.mask = known.mask.without(PageMask(1 << index));
        }
        let bytes = u64::from(gone.count()) * PAGE_BYTES as u64;
        self.open_bytes -= bytes;
        if known.mask.is_empty() {
            self.open_bytes -= BLOCK_OVERHEAD_BYTES;
            self.open.remove(&block);
        } else if let Some(permit) = &mut known.permit {
            permit.shrink(permit.bytes() - bytes);
        }
    }

    /// Gives up the contents of the open cut: its pages will be read from the disk.
    fn drop_open(&mut self, now: Duration) {
        let open = std::mem::take(&mut self.open);
        for (block, pages) in &open {
            self.backfill.insert(BlockIndex(*block), pages.mask);
        }
        self.garbage.push(open);
        self.open_bytes = 0;
        self.dropping = Some(now);
        self.overloads += 1;
        self.point_due = true;
        self.catching_up = true;
    }

    /// Memory to be given back without the lock.
    #[must_use]
    pub(super) fn take_garbage(&mut self) -> Vec<Blocks> {
        std::mem::take(&mut self.garbage)
    }

    /// Decides what [`super::NbdCapture`] does next. `wished`: somebody asked for a point.
    pub(super) fn plan(&mut self, wished: bool, interval: Duration, now: Duration) -> Plan {
        let plan = self.decide(wished, interval, now);
        self.asleep = match plan {
            Plan::Wait(None) => Asleep::UntilAny,
            Plan::Wait(Some(_)) => Asleep::UntilEarly,
            Plan::Ordinary | Plan::Backfill => Asleep::No,
        };
        plan
    }

    /// After something was admitted: true where the capture waits for it and is to be woken. Says so once.
    pub(super) fn wakes(&mut self) -> bool {
        let wakes = match self.asleep {
            Asleep::No => false,
            Asleep::UntilEarly => self.is_early(),
            Asleep::UntilAny => true,
        };
        if wakes {
            self.asleep = Asleep::No;
        }
        wakes
    }

    fn decide(&mut self, wished: bool, interval: Duration, now: Duration) -> Plan {
        // What was left unread by the cut before is to be read again.
        if let Some(last) = self.uncommitted.back().filter(|last| !last.complete.load(Ordering::Acquire)) {
            let from = last.id;
            self.lost(from);
        }
        self.relieve();
        let paused = self.dropping.is_some_and(|since| now.saturating_sub(since) < BACKFILL_PAUSE);
        let admitted = !self.open.is_empty() || !self.zero.is_empty();
        if !self.backfill.is_empty() {
            if admitted && self.backfilled_last && self.dropping.is_none() {
                return Plan::Ordinary;
            }
            return if paused { Plan::Wait(Some(Duration::from_millis(50))) } else { Plan::Backfill };
        }
        if wished {
            return Plan::Ordinary;
        }
        if !admitted && !self.point_due {
            return Plan::Wait(None);
        }
        let due = self.last_cut.map_or(Duration::ZERO, |last| (last + interval).saturating_sub(now));
        if due.is_zero() || self.is_early() { Plan::Ordinary } else { Plan::Wait(Some(due)) }
    }

    /// True where a cut should be made before its time, so that its contents can be sealed.
    pub(super) fn is_early(&self) -> bool {
        self.starved || self.open_bytes >= self.payload_max / 4
    }

    /// Keeps contents again once the pressure is gone: the budget below three quarters, the frozen cut sealed by half.
    fn relieve(&mut self) {
        let frozen = self.frozen_bytes.load(Ordering::Relaxed);
        if self.dropping.is_some() && self.budget.pressure_permille() == 0 && frozen <= self.payload_max / 2 {
            self.dropping = None;
        }
        if self.backfill.is_empty() && self.dropping.is_none() {
            self.caught_up |= std::mem::take(&mut self.catching_up);
        }
    }

    /// Ends the open cut.
    pub(super) fn cut(&mut self, now: Duration) -> Frozen {
        let blocks = std::mem::take(&mut self.open);
        let zero = std::mem::replace(&mut self.zero, PageSet::empty(self.geometry));
        self.frozen_bytes.fetch_add(std::mem::take(&mut self.open_bytes), Ordering::Relaxed);
        self.starved = false;
        self.backfilled_last = false;
        self.last_cut = Some(now);
        let point = self.backfill.is_empty();
        self.point_due &= !point;
        let masks = blocks.iter().map(|(block, pages)| (BlockIndex(*block), pages.mask)).collect();
        let set = self.begin(masks, zero);
        Frozen { set, blocks, point }
    }

    /// Takes a part of the backfill set out, to be read from the disk, and the uncommitted cuts whose pages may not be
    /// compared.
    pub(super) fn cut_backfill(&mut self) -> (Arc<CutSet>, Vec<Arc<CutSet>>) {
        let before = self.uncommitted.iter().cloned().collect();
        let (mut blocks, mut pages) = (Vec::new(), 0);
        // At the end of the disk it goes on from the start.
        let mut from = self.backfill.next_block(self.backfill_from).unwrap_or_default();
        while pages < BACKFILL_PAGES_MAX {
            let Some((block, mask)) = self.backfill.take_next(from) else { break };
            pages += u64::from(mask.count());
            from = BlockIndex(block.0 + 1);
            blocks.push((block, mask));
        }
        self.backfill_from = from;
        self.backfilled_last = true;
        self.point_due = true;
        (self.begin(blocks, PageSet::empty(self.geometry)), before)
    }

    fn begin(&mut self, blocks: Vec<(BlockIndex, PageMask)>, zero: PageSet) -> Arc<CutSet> {
        let id = CutId(self.next_cut);
        self.next_cut += 1;
        let complete = AtomicBool::new(blocks.is_empty() && zero.is_empty());
        let set = Arc::new(CutSet { id, blocks, zero, complete });
        self.uncommitted.push_back(Arc::clone(&set));
        set
    }

    /// Pages of a backfill read that need not be read, since the open cut has their content.
    pub(super) fn in_open(&self, block: BlockIndex) -> PageMask {
        self.open.get(&block.0).map_or(PageMask::EMPTY, |pages| pages.mask).or(self.zero.mask(block))
    }

    /// Everything up to this cut is committed.
    pub(super) fn committed(&mut self, cut: CutId) {
        while self.uncommitted.front().is_some_and(|set| set.id <= cut) {
            self.uncommitted.pop_front();
        }
    }

    /// This cut and all after it came to nothing.
    pub(super) fn lost(&mut self, from: CutId) {
        while let Some(set) = self.uncommitted.pop_back_if(|set| set.id >= from) {
            for (block, mask) in &set.blocks {
                self.backfill.insert(*block, *mask);
            }
            self.backfill.extend(&set.zero);
            self.point_due = true;
            self.catching_up = true;
        }
    }

    /// True where no page from `first` to `last` is anywhere on its way to the store, or being written.
    pub(super) fn is_settled(&self, first: u64, last: u64) -> bool {
        if self.ranges.touches(first, last) {
            return false;
        }
        let open = (Bound::Included(first / PAGES), Bound::Included(last / PAGES));
        if self.open.range(open).next().is_some() {
            return false;
        }
        (first / PAGES..=last / PAGES).map(BlockIndex).all(|block| {
            self.backfill.mask(block).is_empty()
                && self.zero.mask(block).is_empty()
                && self.uncommitted.iter().all(|set| set.mask(block).is_empty())
        })
    }

    /// Bytes that are in no cut yet.
    pub(super) fn backlog_bytes(&self) -> u64 {
        self.open_bytes + self.zero.bytes() + self.backfill.bytes()
    }

    /// Times that contents were dropped.
    pub(super) fn overloads(&self) -> u64 {
        self.overloads
    }

    /// True while contents are dropped, or writers wait.
    pub(super) fn is_overloaded(&self) -> bool {
        self.dropping.is_some() || self.starved
    }

    /// True once after an overload or a loss is made good.
    pub(super) fn caught_up(&mut self) -> bool {
        std::mem::take(&mut self.caught_up)
    }

    /// The name of the next cut.
    pub(super) fn next_cut(&self) -> CutId {
        CutId(self.next_cut)
    }

    /// True while backfill is a consequence of overload or loss.
    pub(super) fn is_catching_up(&self) -> bool {
        self.catching_up
    }

    /// True while pages have to be read from the disk.
    pub(super) fn is_backfilling(&self) -> bool {
        !self.backfill.is_empty()
    }
}

const PAGES: u64 = PAGES_PER_BLOCK as u64;
const _: () = assert!(BLOCK_BYTES == PAGE_BYTES * PAGES_PER_BLOCK);

/// The blocks of `count` pages from page `first` on, with the masks of those pages.
fn blocks_of(first: u64, count: u64) -> impl Iterator<Item = (BlockIndex, PageMask)> {
    let end = first + count;
    (first / PAGES..end.div_ceil(PAGES)).map(move |block| (BlockIndex(block), mask_in(block, first, end)))
}

/// The pages of a block that lie in `first..end`.
fn mask_in(block: u64, first: u64, end: u64) -> PageMask {
    let up_to = |page: u64| PageMask::first(u32::try_from(page.saturating_sub(block * PAGES)).unwrap_or(u32::MAX));
    up_to(end).without(up_to(first))
}
