//! One exported disk: where requests of all its connections, the capture and the threads that read backfill meet.
//!
//! ```text
//! write ─▶ lock its pages ─▶ write-intent bit durable ─▶ complete to whole pages ─▶ admit ─▶ backing ─▶ unlock ─▶ reply
//! read  ─▶ backing ─▶ reply                                flush ─▶ one fdatasync for all that wait ─▶ reply
//! ```
//!
//! Promises
//! - The order above, for each write: nothing reaches the backing that is not admitted, and whose region is not marked durably.
//! - Writes that overlap pass one after the other from admission to completion, so that disk and replica end the same.
//! - A write that failed leaves its pages to be read from the disk.
//! - A bit of the write-intent log is cleared only where no write is in flight, nothing is on its way to the store, and the
//!   backing was made durable after the last write.
//!
//! Never: keeps a page locked while it waits for memory. All functions block; call them on threads of their own.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::ids::{BlockIndex, Geometry};
use common::limits::{PAGE_BYTES, PAGES_PER_BLOCK};
use common::nbd::Errno;

use super::admission::{Admission, Admitted, Page};
use super::backing::{Backing, BackingPath};
use super::intent::{IntentLog, REGION_PAGES};
use super::ranges::RangeId;
use crate::capture::CaptureError;
use crate::capture::cut::{Piece, PieceMasks};
use crate::events::{EventKind, Events};

/// Overloads are told of no more often than this.
const OVERLOAD_EVENT_INTERVAL: Duration = Duration::from_secs(60);
/// How long a throttled writer sleeps before it looks again by itself.
const THROTTLE_STEP: Duration = Duration::from_millis(20);
/// Most bytes zeroed under one lock.
const ZERO_BYTES_MAX: u64 = 256 << 20;
/// Backfill reads over gaps of so many pages, since one long read is faster than two.
const GAP_PAGES_MAX: usize = 4;
/// Most regions looked at in one sweep of the write-intent log.
const SWEEP_REGIONS_MAX: usize = 4096;

static ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
const PAGE: u64 = PAGE_BYTES as u64;

/// Why a request was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// To be replied.
    Errno(Errno),
    /// The export ends: say nothing, the client asks again once it is back.
    Closing,
}

/// One exported disk.
pub(super) struct Export {
    name: String,
    path: BackingPath,
    geometry: Geometry,
    backing: Box<dyn Backing>,
    intent: IntentLog,
    core: Mutex<Admission>,
    /// A range was left, admissions go on, there may be room, or the export closes.
    changed: Condvar,
    syncs: Syncs,
    /// Wakes the capture.
    pub(super) wake: tokio::sync::Notify,
    closing: AtomicBool,
    failing: AtomicBool,
    started: Instant,
    events: Events,
    /// When people were told of an overload last.
    told_overload: Mutex<Option<Instant>>,
}

impl std::fmt::Debug for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Export").field("name", &self.name).field("path", &self.path).finish_non_exhaustive()
    }
}

impl Export {
    pub(super) fn new(
        name: String,
        path: BackingPath,
        geometry: Geometry,
        backing: Box<dyn Backing>,
        intent: IntentLog,
        core: Admission,
        events: Events,
    ) -> Self {
        Self {
            events,
            told_overload: Mutex::new(None),
            name,
            path,
            geometry,
            backing,
            intent,
            core: Mutex::new(core),
            changed: Condvar::new(),
            syncs: Syncs::default(),
            wake: tokio::sync::Notify::new(),
            closing: AtomicBool::new(false),
            failing: AtomicBool::new(false),
            started: Instant::now(),
        }
    }

    /// The export's name: the volume's.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Size and layout.
    pub(super) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Tells people something.
    pub(super) fn note(&self, kind: EventKind, text: &str) {
        self.events.note(&self.name, kind, text);
    }

    /// Tells people of an overload, now and then.
    fn note_overload(&self, text: &str) {
        let mut told = self.told_overload.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none_or(|told| told.elapsed() > OVERLOAD_EVENT_INTERVAL) {
            *told = Some(Instant::now());
            drop(told);
            self.note(EventKind::Overload, text);
        }
    }

    /// Where its disk is.
    pub(super) fn path(&self) -> &BackingPath {
        &self.path
    }

    /// The write-intent log.
    pub(super) fn intent(&self) -> &IntentLog {
        &self.intent
    }

    /// Time since the export began.
    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// The admissions; not to be held for long.
    pub(super) fn core(&self) -> MutexGuard<'_, Admission> {
        // Nothing that holds the lock panics half-way through a change.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, core: MutexGuard<'a, Admission>) -> MutexGuard<'a, Admission> {
        self.changed.wait(core).unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses requests from now on, and wakes those that wait.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        // With the lock, so that nobody is between its look at the flag and its sleep.
        drop(self.core());
        self.changed.notify_all();
    }

    /// True after [`Self::close`].
    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Keeps new writes waiting, or lets them go on.
    pub(super) fn hold(&self, held: bool) {
        self.core().held = held;
        if !held {
            self.changed.notify_all();
        }
    }

    /// Says that there may be room for writers that wait.
    pub(super) fn room(&self) {
        self.changed.notify_all();
    }

    /// Reads bytes of the disk.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Failure> {
        if self.is_closing() {
            return Err(Failure::Closing);
        }
        self.backing.read_at(offset, buffer).map_err(|error| self.failed("read", offset, &error))
    }

    /// Writes bytes to the disk. `pages` is scratch that the caller keeps, so that its memory is used again.
    pub(super) fn write(&self, offset: u64, bytes: &[u8], pages: &mut Vec<Page>) -> Result<(), Failure> {
        let end = offset + bytes.len() as u64;
        let (first, last) = (offset / PAGE, (end - 1) / PAGE);
        let whole = offset.is_multiple_of(PAGE) && (end.is_multiple_of(PAGE) || end == self.geometry.disk_bytes());
        pages.clear();
        if whole {
            self.complete(offset, bytes, pages).map_err(|error| self.failed("read", offset, &error))?;
        }
        let range = loop {
            let (mut core, range) = self.enter(first, last)?;
            if pages.is_empty() || !self.intent.is_durable(first, last) {
                drop(core);
                let prepared = self.intent.ensure(first, last).and_then(|()| match pages.is_empty() {
                    true => self.complete(offset, bytes, pages),
                    false => Ok(()),
                });
                if let Err(error) = prepared {
                    self.leave(range, first, last);
                    return Err(self.failed("prepare a write", offset, &error));
                }
                core = self.wait_admitting(self.core());
            }
            let admitted = core.admit(first, pages, self.now());
            let garbage = core.take_garbage();
            if core.wakes() {
                self.wake.notify_one();
            }
            if admitted == Admitted::Done {
                drop(core);
                pages.clear();
                if !garbage.is_empty() {
                    drop(garbage);
                    self.note_overload(
                        "writers outran the budget: until that is over only which pages change is kept, and there are no points",
                    );
                }
                break range;
            }
            // Nothing is locked while it waits for room.
            if core.ranges.leave(range) {
                self.changed.notify_all();
            }
            if !whole {
                // Others may write the rest of its first and last page meanwhile.
                pages.clear();
            }
            drop(self.changed.wait_timeout(core, THROTTLE_STEP));
            self.note_overload("writers outran the budget and are kept waiting");
        };
        let written = self.backing.write_at(offset, bytes);
        self.finish(range, first, last, offset, written)
    }

    /// Waits until pages `first` to `last` are locked and writes are admitted. Returns with the lock of the admissions.
    fn enter(&self, first: u64, last: u64) -> Result<(MutexGuard<'_, Admission>, RangeId), Failure> {
        let mut core = self.core();
        if self.is_closing() {
            return Err(Failure::Closing);
        }
        let range = core.ranges.enter(first, last);
        while core.held || !core.ranges.is_held(range) {
            core = self.wait(core);
        }
        self.intent.touch(first, last);
        Ok((core, range))
    }

    fn wait_admitting<'a>(&'a self, mut core: MutexGuard<'a, Admission>) -> MutexGuard<'a, Admission> {
        while core.held {
            core = self.wait(core);
        }
        core
    }

    fn leave(&self, range: RangeId, first: u64, last: u64) {
        let mut core = self.core();
        self.intent.touch(first, last);
        if core.ranges.leave(range) {
            self.changed.notify_all();
        }
    }

    /// After the backing has answered.
    fn finish(
        &self,
        range: RangeId,
        first: u64,
        last: u64,
        offset: u64,
        written: io::Result<()>,
    ) -> Result<(), Failure> {
        if written.is_err() {
            self.core().distrust(first, last - first + 1);
            self.wake.notify_one();
        }
        self.leave(range, first, last);
        if written.is_ok() && self.failing.load(Ordering::Relaxed) {
            self.failing.store(false, Ordering::Relaxed);
        }
        written.map_err(|error| self.failed("write", offset, &error))
    }

    /// Copies bytes to whole pages; what they lack at their ends is read. Those pages must be locked then.
    fn complete(&self, offset: u64, bytes: &[u8], pages: &mut Vec<Page>) -> io::Result<()> {
        let disk_bytes = self.geometry.disk_bytes();
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let start = at / PAGE * PAGE;
            let within = usize::try_from(at - start).unwrap_or(0);
            let (here, after) = rest.split_at(rest.len().min(PAGE_BYTES - within));
            if here.len() == PAGE_BYTES {
                pages.push(here.into());
            } else {
                let mut page = vec![0; PAGE_BYTES];
                let existing = usize::try_from((disk_bytes - start).min(PAGE)).unwrap_or(PAGE_BYTES);
                if here.len() < existing {
                    self.backing.read_at(start, &mut page[..existing])?;
                }
                page[within..within + here.len()].copy_from_slice(here);
                pages.push(page.into_boxed_slice());
            }
            at += here.len() as u64;
            rest = after;
        }
        Ok(())
    }

    /// Makes bytes zero.
    pub(super) fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        may_punch: bool,
        pages: &mut Vec<Page>,
    ) -> Result<(), Failure> {
        let end = offset + length;
        let (inner, inner_end) = self.whole_pages(offset, end);
        if inner >= inner_end {
            // At most two parts of pages.
            let mut at = offset;
            while at < end {
                let next = ((at / PAGE + 1) * PAGE).min(end);
                self.write(at, &ZERO_PAGE[..usize::try_from(next - at).unwrap_or(0)], pages)?;
                at = next;
            }
            return Ok(());
        }
        if offset < inner {
            self.write(offset, &ZERO_PAGE[..usize::try_from(inner - offset).unwrap_or(0)], pages)?;
        }
        self.zero_pages(inner, inner_end, may_punch)?;
        if inner_end < end {
            self.write(inner_end, &ZERO_PAGE[..usize::try_from(end - inner_end).unwrap_or(0)], pages)?;
        }
        Ok(())
    }

    /// Takes note that bytes are not needed: the whole pages among them become zero, or nothing happens.
    pub(super) fn trim(&self, offset: u64, length: u64) -> Result<(), Failure> {
        let (inner, inner_end) = self.whole_pages(offset, offset + length);
        if inner < inner_end && self.backing.can_punch() {
            self.zero_pages(inner, inner_end, true)?;
        }
        Ok(())
    }

    /// The whole pages within a range of bytes; the last page of the disk is whole where the disk ends.
    fn whole_pages(&self, offset: u64, end: u64) -> (u64, u64) {
        let inner_end = if end == self.geometry.disk_bytes() { end } else { end / PAGE * PAGE };
        (offset.div_ceil(PAGE) * PAGE, inner_end)
    }

    fn zero_pages(&self, start: u64, end: u64, may_punch: bool) -> Result<(), Failure> {
        let mut at = start;
        while at < end {
            let piece_end = (at + ZERO_BYTES_MAX).min(end);
            let (first, last) = (at / PAGE, (piece_end - 1) / PAGE);
            let (core, range) = self.enter(first, last)?;
            drop(core);
            if let Err(error) = self.intent.ensure(first, last) {
                self.leave(range, first, last);
                return Err(self.failed("prepare a write", at, &error));
            }
            let mut core = self.wait_admitting(self.core());
            core.admit_zero(first, last - first + 1);
            if core.wakes() {
                self.wake.notify_one();
            }
            drop(core);
            let zeroed = self.backing.zero(at, piece_end - at, may_punch);
            self.finish(range, first, last, at, zeroed)?;
            at = piece_end;
        }
        Ok(())
    }

    /// Makes everything that completed before durable.
    pub(super) fn flush(&self) -> Result<(), Failure> {
        self.syncs.run(|| self.backing.sync()).map_err(|error| self.failed("flush", 0, &error))
    }

    /// Notes a failure of the backing; one line for each time that it begins to fail.
    fn failed(&self, what: &str, offset: u64, error: &io::Error) -> Failure {
        metrics::counter!("blockferry_sender_errors_total", "kind" => "nbd_backing").increment(1);
        if !self.failing.swap(true, Ordering::Relaxed) {
            tracing::error!(
                volume = %self.name, path = %self.path.0.display(), offset, %error,
                "the disk behind the nbd export failed to {what}; its client was told, what was written there is read again"
            );
        }
        Failure::Errno(Errno::Io)
    }

    /// Reads pages of a backfill piece. Returns those read; the others are in the open cut.
    ///
    /// # Errors
    /// [`CaptureError::Read`].
    pub(super) fn read_backfill(&self, piece: &Piece, buffer: &mut [u8]) -> Result<(PieceMasks, u64), CaptureError> {
        let pages = |masks: &PieceMasks| -> Vec<usize> {
            let blocks = masks.iter().zip((0..).step_by(PAGES_PER_BLOCK));
            blocks.flat_map(|(mask, start)| mask.iter().map(move |index| start + index as usize)).collect()
        };
        let wanted = pages(&piece.masks);
        let (Some(first), Some(last)) = (wanted.first(), wanted.last()) else {
            return Ok((PieceMasks::default(), 0));
        };
        let base = piece.first.0 * PAGES_PER_BLOCK as u64;
        let (first, last) = (base + *first as u64, base + *last as u64);
        let mut core = self.core();
        let range = core.ranges.enter(first, last);
        while !core.ranges.is_held(range) {
            core = self.wait(core);
        }
        let mut masks = piece.masks;
        for (mask, block) in masks.iter_mut().zip(piece.first.0..) {
            *mask = mask.without(core.in_open(BlockIndex(block)));
        }
        drop(core);
        let read = self.read_runs(base, &pages(&masks), buffer);
        let mut core = self.core();
        if core.ranges.leave(range) {
            self.changed.notify_all();
        }
        drop(core);
        read.map(|bytes| (masks, bytes))
    }

    /// Reads pages to their places; `pages` ascend and count from page `base`.
    fn read_runs(&self, base: u64, pages: &[usize], buffer: &mut [u8]) -> Result<u64, CaptureError> {
        let disk_bytes = self.geometry.disk_bytes();
        let mut bytes = 0;
        let mut rest = pages;
        while let Some(start) = rest.first().copied() {
            let gap = rest.windows(2).position(|pair| pair[1] - pair[0] > GAP_PAGES_MAX);
            let (run, after) = rest.split_at(gap.map_or(rest.len(), |place| place + 1));
            rest = after;
            let end = run.last().map_or(start, |last| *last) + 1;
            let place = &mut buffer[start * PAGE_BYTES..end * PAGE_BYTES];
            let offset = (base + start as u64) * PAGE;
            let length = usize::try_from(disk_bytes - offset).unwrap_or(usize::MAX).min(place.len());
            place[length..].fill(0);
            self.backing
                .read_bulk(offset, &mut place[..length])
                .map_err(|source| self.path.read_error(offset, length, source))?;
            bytes += length as u64;
        }
        Ok(bytes)
    }

    /// Clears bits of the write-intent log that are needed no more. Returns how many. To be called now and then; a bit goes
    /// two calls after the last write to its region at the earliest.
    ///
    /// # Errors
    /// Where the backing can't be made durable, or the log not be written.
    pub(super) fn sweep(&self) -> io::Result<u64> {
        let settled =
            |core: &Admission, region: u64| core.is_settled(region * REGION_PAGES, (region + 1) * REGION_PAGES - 1);
        let mut regions = self.intent.quiet(SWEEP_REGIONS_MAX);
        for part in 0..regions.len().div_ceil(64) {
            let core = self.core();
            let part = &mut regions[part * 64..];
            let length = part.len().min(64);
            for region in part[..length].iter_mut().filter(|region| !settled(&core, **region)) {
                *region = u64::MAX;
            }
        }
        regions.retain(|region| *region != u64::MAX);
        if regions.is_empty() {
            return Ok(0);
        }
        self.syncs.run(|| self.backing.sync())?;
        let mut cleared = 0;
        for region in regions {
            let core = self.core();
            // What was written since the look above may not be durable.
            if !self.intent.is_recent(region) && settled(&core, region) {
                self.intent.clear(region);
                cleared += 1;
            }
        }
        self.intent.write_cleared()?;
        Ok(cleared)
    }
}

/// One `fdatasync` for all that wait for one.
#[derive(Debug, Default)]
struct Syncs {
    state: Mutex<SyncState>,
    done: Condvar,
}

#[derive(Debug, Default)]
struct SyncState {
    /// How many have begun, and how many have ended well.
    begun: u64,
    ended: u64,
    running: bool,
}

impl Syncs {
    /// Returns after a run of `sync` that began after this call did.
    fn run(&self, sync: impl Fn() -> io::Result<()>) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = state.begun + 1;
        loop {
            if state.ended >= mine {
                return Ok(());
            }
            if state.running {
                state = self.done.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.running = true;
            state.begun += 1;
            let number = state.begun;
            drop(state);
            let synced = sync();
            state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.running = false;
            if synced.is_ok() {
                state.ended = number;
            }
            drop(state);
            self.done.notify_all();
            // Those that waited for a run that failed make one of their own, and see for themselves.
            return synced;
        }
    }
}
