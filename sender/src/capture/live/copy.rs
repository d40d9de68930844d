//! The last copy: pages read into memory while file systems are frozen.
//!
//! Everything that takes memory or a thread is made before ([`LastCopy::reserve`]), touched, and locked where that is allowed.
//! Between freeze and thaw [`LastCopy::run`] only reads the disk into it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::thread::Scope;

use common::budget::Permit;
use common::ids::BlockIndex;
use common::limits::{BLOCK_BYTES, PAGE_BYTES, PAGES_PER_BLOCK};
use common::pages::PageSet;

use super::pages::{Pieces, comparable, runs};
use crate::capture::cut::{CutPages, Piece, PieceRead};
use crate::capture::{CaptureError, Disk, PageBuffer};

/// Reads at a time. More gain little on one disk, and each has a buffer that may stay partly empty.
pub(super) const READERS: usize = 4;
/// Stack of a reader; it only reads.
const STACK_BYTES: usize = 256 << 10;

/// Memory that was touched, and is locked where that is allowed.
#[derive(Debug)]
struct Locked {
    buffer: PageBuffer,
    locked: bool,
}

impl Locked {
    #[expect(unsafe_code, reason = "rustix has mlock as an unsafe function")]
    fn new(bytes: usize) -> Self {
        let mut buffer = PageBuffer::new(bytes);
        // Touches it: a page of zeros that is only promised would have to be found in the middle of the freeze.
        buffer.bytes_mut().fill(1);
        let whole = buffer.bytes_mut();
        // SAFETY: the range is this buffer's own; locking changes nothing of its content.
        let locked = unsafe { rustix::mm::mlock(whole.as_mut_ptr().cast(), whole.len()) }.is_ok();
        Self { buffer, locked }
    }
}

impl Drop for Locked {
    #[expect(unsafe_code, reason = "rustix has munlock as an unsafe function")]
    fn drop(&mut self) {
        if self.locked {
            let whole = self.buffer.bytes_mut();
            // SAFETY: as above; only its own pages are unlocked, before the memory is given back.
            let _ = unsafe { rustix::mm::munlock(whole.as_mut_ptr().cast(), whole.len()) };
        }
    }
}

/// Neighbouring pages of one block.
#[derive(Debug, Clone, Copy)]
struct Run {
    page: u64,
    pages: usize,
}

/// A page, and where it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Placed {
    page: u64,
    region: u8,
    slot: u32,
}

/// What one reader fills.
#[derive(Debug)]
struct Region {
    memory: Locked,
    placed: Vec<Placed>,
}

/// Why the copy is of no use.
#[derive(Debug)]
pub(super) enum CopyFailure {
    /// More pages than there is room for.
    NoRoom,
    /// Stopped, since the time was up.
    Late,
    /// The disk could not be read.
    Read(CaptureError),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Signal {
    Wait,
    Go,
    Stop,
}

/// What readers share.
struct Work {
    runs: RwLock<Vec<Run>>,
    next: AtomicUsize,
    stop: AtomicBool,
    failed: Mutex<Option<CaptureError>>,
    signal: Mutex<Signal>,
    signalled: Condvar,
}

/// Reserved memory for the last copy.
pub(super) struct LastCopy {
    disk: Arc<dyn Disk>,
    regions: Vec<Region>,
    work: Work,
    permit: Permit,
    pages_max: usize,
}

/// Bytes that a copy of up to `pages` takes.
pub(super) fn bytes(pages: u64) -> u64 {
    READERS as u64 * region_pages(pages) * PAGE_BYTES as u64
        + pages.saturating_mul((size_of::<Placed>() * READERS + size_of::<Run>()) as u64)
}

/// Room of one reader: its share, half as much again, and one block, since what is left may be too little for a run.
fn region_pages(pages: u64) -> u64 {
    pages.div_ceil(READERS as u64) * 3 / 2 + PAGES_PER_BLOCK as u64
}

impl LastCopy {
    /// Makes room for `pages`; `permit` is of [`bytes()`].
    pub(super) fn reserve(disk: Arc<dyn Disk>, pages: u64, permit: Permit) -> Self {
        let pages_max = usize::try_from(pages).unwrap_or(usize::MAX);
        let region = usize::try_from(region_pages(pages)).unwrap_or(usize::MAX);
        let mut regions = Vec::with_capacity(READERS);
        for _ in 0..READERS {
            let mut placed = vec![Placed { page: u64::MAX, region: u8::MAX, slot: u32::MAX }; region];
            placed.clear();
            regions.push(Region { memory: Locked::new(region * PAGE_BYTES), placed });
        }
        let mut runs = vec![Run { page: u64::MAX, pages: 1 }; pages_max];
        runs.clear();
        let work = Work {
            runs: RwLock::new(runs),
            next: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            failed: Mutex::new(None),
            signal: Mutex::new(Signal::Wait),
            signalled: Condvar::new(),
        };
        Self { disk, regions, work, permit, pages_max }
    }

    /// Starts the readers, lets `frozen` freeze, call [`Readers::copy`] and thaw, and gives back what it returned.
    pub(super) fn run<T>(&mut self, frozen: impl FnOnce(&mut Readers<'_, '_>) -> T) -> std::io::Result<T> {
        let (disk, work, pages_max) = (&self.disk, &self.work, self.pages_max);
        let regions = &mut self.regions;
        std::thread::scope(|scope| {
            let mut readers = Readers { work, pages_max, threads: Vec::with_capacity(READERS) };
            for (number, region) in regions.iter_mut().enumerate() {
                if let Err(error) = readers.start(scope, number, region, disk) {
                    readers.signal(Signal::Stop);
                    return Err(error);
                }
            }
            let result = frozen(&mut readers);
            // Where it did not come to the copy they still wait.
            readers.signal(Signal::Stop);
            Ok(result)
        })
    }

    /// The pages, once they are read. `pages` is the set that was given to the copy.
    pub(super) fn into_pages(self, pages: Arc<PageSet>, on_their_way: PageSet) -> FrozenPages {
        let mut placed: Vec<Placed> = self.regions.iter().flat_map(|region| region.placed.iter().copied()).collect();
        placed.sort_unstable();
        let memory = self.regions.into_iter().map(|region| region.memory).collect();
        FrozenPages { pieces: Pieces::new(pages), placed, memory, on_their_way, _permit: self.permit }
    }
}

/// Readers that wait for the copy.
pub(super) struct Readers<'scope, 'work> {
    work: &'work Work,
    pages_max: usize,
    threads: Vec<std::thread::ScopedJoinHandle<'scope, ()>>,
}

impl<'scope, 'work: 'scope> Readers<'scope, 'work> {
    fn start<'env>(
        &mut self,
        scope: &'scope Scope<'scope, 'env>,
        number: usize,
        region: &'scope mut Region,
        disk: &'scope Arc<dyn Disk>,
    ) -> std::io::Result<()> {
        let work = self.work;
        let name = format!("last-copy-{number}");
        let number = u8::try_from(number).unwrap_or(u8::MAX);
        let builder = std::thread::Builder::new().name(name).stack_size(STACK_BYTES);
        self.threads.push(builder.spawn_scoped(scope, move || work.read(number, region, disk.as_ref()))?);
        Ok(())
    }
}

impl Readers<'_, '_> {
    fn signal(&self, signal: Signal) {
        let mut now = self.work.signal.lock().unwrap_or_else(PoisonError::into_inner);
        if *now == Signal::Wait {
            *now = signal;
        }
        drop(now);
        self.work.signalled.notify_all();
    }

    /// Reads the pages of a set. `late` is asked between reads. Takes no memory.
    ///
    /// # Errors
    /// [`CopyFailure`].
    pub(super) fn copy(&mut self, pages: &PageSet, late: &(dyn Fn() -> bool + Sync)) -> Result<(), CopyFailure> {
        if usize::try_from(pages.len()).unwrap_or(usize::MAX) > self.pages_max {
            return Err(CopyFailure::NoRoom);
        }
        let mut list = self.work.runs.write().unwrap_or_else(PoisonError::into_inner);
        for (block, mask) in pages.iter() {
            for (first, count) in runs(mask) {
                list.push(Run { page: block.0 * PAGES_PER_BLOCK as u64 + first as u64, pages: count });
            }
        }
        drop(list);
        self.signal(Signal::Go);
        while !self.threads.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            if late() {
                self.work.stop.store(true, Ordering::Relaxed);
            }
            // A reader that is through wakes nobody: a look each 200 µs is a small part of any freeze.
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        let failed = self.work.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        let runs = self.work.runs.read().unwrap_or_else(PoisonError::into_inner).len();
        match failed {
            Some(error) => Err(CopyFailure::Read(error)),
            None if self.work.stop.load(Ordering::Relaxed) => Err(CopyFailure::Late),
            None if self.work.next.load(Ordering::Relaxed) < runs => Err(CopyFailure::NoRoom),
            None => Ok(()),
        }
    }
}

impl Work {
    /// A reader's life: waits, then takes runs until there is none left.
    fn read(&self, number: u8, region: &mut Region, disk: &dyn Disk) {
        touch_stack();
        let mut signal = self.signal.lock().unwrap_or_else(PoisonError::into_inner);
        while *signal == Signal::Wait {
            signal = self.signalled.wait(signal).unwrap_or_else(PoisonError::into_inner);
        }
        let go = *signal == Signal::Go;
        drop(signal);
        let runs = self.runs.read().unwrap_or_else(PoisonError::into_inner);
        while go && !self.stop.load(Ordering::Relaxed) {
            let start = region.placed.len();
            let buffer = region.memory.buffer.bytes_mut();
            let Some(room) = buffer.get_mut(start * PAGE_BYTES..(start + PAGES_PER_BLOCK) * PAGE_BYTES) else {
                // No room for the longest run: the others have it.
                return;
            };
            let Some(run) = runs.get(self.next.fetch_add(1, Ordering::Relaxed)) else { return };
            let room = &mut room[..run.pages * PAGE_BYTES];
            if let Err(error) = disk.read_at(run.page * PAGE_BYTES as u64, room) {
                *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                self.stop.store(true, Ordering::Relaxed);
                return;
            }
            for (page, slot) in (run.page..).zip(start..start + run.pages) {
                let slot = u32::try_from(slot).unwrap_or(u32::MAX);
                region.placed.push(Placed { page, region: number, slot });
            }
        }
    }
}

/// Makes the stack's pages real before they are needed.
pub(super) fn touch_stack() {
    let touched = std::hint::black_box([0_u8; 64 << 10]);
    std::hint::black_box(&touched);
}

/// Pages that were read at the cut's instant.
pub(super) struct FrozenPages {
    pieces: Pieces,
    /// Ascending by page.
    placed: Vec<Placed>,
    memory: Vec<Locked>,
    on_their_way: PageSet,
    _permit: Permit,
}

impl FrozenPages {
    fn page(&self, page: u64) -> Option<&[u8]> {
        let index = self.placed.binary_search_by_key(&page, |placed| placed.page).ok()?;
        let placed = self.placed[index];
        let at = placed.slot as usize * PAGE_BYTES;
        self.memory.get(usize::from(placed.region))?.buffer.bytes().get(at..at + PAGE_BYTES)
    }
}

impl CutPages for FrozenPages {
    fn next(&self) -> Option<Piece> {
        self.pieces.next()
    }

    fn read(&self, piece: &Piece, buffer: &mut [u8]) -> Result<PieceRead, CaptureError> {
        let mut pages = 0;
        for (index, mask) in piece.masks.iter().enumerate() {
            let block = BlockIndex(piece.first.0 + index as u64);
            for bit in mask.iter() {
                let number = block.0 * PAGES_PER_BLOCK as u64 + u64::from(bit);
                let at = index * BLOCK_BYTES + bit as usize * PAGE_BYTES;
                // Each page of the set was read, or the copy would have failed.
                let page = self.page(number).ok_or(CaptureError::Missed { page: number })?;
                buffer[at..at + PAGE_BYTES].copy_from_slice(page);
                pages += 1;
            }
        }
        Ok(PieceRead {
            masks: piece.masks,
            comparable: comparable(piece, &self.on_their_way),
            source_bytes: pages * PAGE_BYTES as u64,
            permits: Default::default(),
        })
    }

    fn pages(&self) -> u64 {
        self.pieces.len()
    }
}
