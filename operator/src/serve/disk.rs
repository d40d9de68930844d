//! The disk that clients see: what they wrote, over the point.
//!
//! Promises: a write that returned is seen by every read after it; what was written before [`Disk::flush`] is durable after it,
//! where the overlay has a name; the point itself is never changed. A write that does not fill its pages takes the rest from the
//! point first, and no write to the same pages comes between.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use common::ids::Geometry;
use common::limits::{BLOCK_BYTES, PAGE_BYTES};
use common::nbd::Errno;
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard, Semaphore};

use super::ahead::ReadAhead;
use super::overlay::Overlay;
use super::point_disk::{Pages, PointDisk};

/// Blocks share so many locks.
const STRIPES: usize = 64;
/// Ranges fetched ahead at a time.
const AHEAD_IN_PARALLEL: usize = 2;
/// Bytes zeroed at a time.
const ZERO_BYTES: u64 = 64 << 20;

/// The disk of one export.
#[derive(Debug)]
pub(super) struct Disk {
    point: Arc<PointDisk>,
    /// `None` where it is read-only.
    overlay: Option<Arc<Overlay>>,
    /// Of writes: those that fill their pages read, others write.
    stripes: Vec<RwLock<()>>,
    ahead: Mutex<ReadAhead>,
    ahead_slots: Arc<Semaphore>,
}

/// The locks of a write's blocks.
enum Held<'a> {
    Shared { _guards: Vec<RwLockReadGuard<'a, ()>> },
    Alone { _guards: Vec<RwLockWriteGuard<'a, ()>> },
}

impl Disk {
    /// `overlay` takes what is written.
    pub(super) fn new(point: Arc<PointDisk>, overlay: Option<Overlay>) -> Self {
        Self {
            point,
            overlay: overlay.map(Arc::new),
            stripes: (0..STRIPES).map(|_| RwLock::new(())).collect(),
            ahead: Mutex::default(),
            ahead_slots: Arc::new(Semaphore::new(AHEAD_IN_PARALLEL)),
        }
    }

    /// Its size and layout.
    pub(super) fn geometry(&self) -> Geometry {
        self.point.geometry()
    }

    /// True where it can't be written.
    pub(super) fn is_read_only(&self) -> bool {
        self.overlay.is_none()
    }

    /// The bytes of `range`, within what is returned from the place returned on.
    ///
    /// # Errors
    /// For the client; the cause was logged.
    pub(super) async fn read(&self, range: Range<u64>) -> Result<(Vec<u8>, usize), Errno> {
        self.read_ahead(&range);
        let mut pages = Pages::of(self.geometry(), &range);
        let skipped = usize::try_from(range.start - pages.start()).unwrap_or(0);
        if let Some(overlay) = &self.overlay {
            let overlay = Arc::clone(overlay);
            pages = local(move || overlay.read(&mut pages).map(|()| pages)).await?;
        }
        let pages = self.point.read(pages).await.map_err(|_| Errno::Io)?;
        Ok((pages.into_bytes(), skipped))
    }

    fn read_ahead(&self, range: &Range<u64>) {
        let disk_bytes = self.geometry().disk_bytes();
        let Some(ahead) = self.ahead.lock().unwrap_or_else(PoisonError::into_inner).note(range.clone(), disk_bytes)
        else {
            return;
        };
        // Where enough is on its way, reads will come to it.
        let Ok(slot) = Arc::clone(&self.ahead_slots).try_acquire_owned() else { return };
        let point = Arc::clone(&self.point);
        tokio::spawn(async move {
            point.fetch_ahead(ahead).await;
            drop(slot);
        });
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// For the client; the cause was logged.
    pub(super) async fn write(&self, offset: u64, bytes: Vec<u8>) -> Result<(), Errno> {
        let Some(overlay) = &self.overlay else { return Err(Errno::NotPermitted) };
        let range = offset..offset + bytes.len() as u64;
        let partial = self.partial_pages(&range);
        let _held = self.hold(&range, !partial.is_empty()).await;
        for page in partial {
            self.prepare(overlay, page).await?;
        }
        let overlay = Arc::clone(overlay);
        local(move || overlay.write(offset, &bytes)).await
    }

    /// Makes bytes zero.
    ///
    /// # Errors
    /// For the client; the cause was logged.
    pub(super) async fn zero(&self, range: Range<u64>, may_punch: bool) -> Result<(), Errno> {
        let whole = self.whole_pages(&range);
        for part in [range.start..whole.start, whole.end..range.end] {
            if !part.is_empty() {
                // Less than a page.
                let length = usize::try_from(part.end - part.start).unwrap_or(0);
                self.write(part.start, vec![0; length]).await?;
            }
        }
        self.zero_whole(whole, may_punch).await
    }

    /// Gives bytes up: whole pages of them read as zeros afterwards.
    ///
    /// # Errors
    /// For the client; the cause was logged.
    pub(super) async fn trim(&self, range: Range<u64>) -> Result<(), Errno> {
        self.zero_whole(self.whole_pages(&range), true).await
    }

    async fn zero_whole(&self, range: Range<u64>, may_punch: bool) -> Result<(), Errno> {
        let Some(overlay) = &self.overlay else { return Err(Errno::NotPermitted) };
        let mut start = range.start;
        while start < range.end {
            let length = (range.end - start).min(ZERO_BYTES);
            let _held = self.hold(&(start..start + length), false).await;
            // The last page of a disk that ends within one is zeroed as a whole.
            let pages = length.next_multiple_of(PAGE_BYTES as u64);
            let overlay = Arc::clone(overlay);
            local(move || overlay.zero(start, pages, may_punch)).await?;
            start += length;
        }
        Ok(())
    }

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// For the client; the cause was logged.
    pub(super) async fn flush(&self) -> Result<(), Errno> {
        let Some(overlay) = &self.overlay else { return Ok(()) };
        let overlay = Arc::clone(overlay);
        local(move || overlay.flush()).await
    }

    /// The range of whole pages within `range`, empty at its start where there is none. A page that the disk ends in is whole where it
    /// is taken up to that end.
    fn whole_pages(&self, range: &Range<u64>) -> Range<u64> {
        let page = PAGE_BYTES as u64;
        let start = range.start.next_multiple_of(page);
        let end = if range.end == self.geometry().disk_bytes() { range.end } else { range.end / page * page };
        if start < end { start..end } else { range.start..range.start }
    }

    /// The pages at the ends of `range` that it does not fill.
    fn partial_pages(&self, range: &Range<u64>) -> BTreeSet<u64> {
        let page = PAGE_BYTES as u64;
        let ends = [
            (range.start, range.start.is_multiple_of(page)),
            (range.end.saturating_sub(1), range.end.is_multiple_of(page) || range.end == self.geometry().disk_bytes()),
        ];
        ends.into_iter().filter(|(_, fills)| !fills).map(|(offset, _)| offset / page).collect()
    }

    /// Puts a page of the point under what is about to be written to a part of it.
    async fn prepare(&self, overlay: &Arc<Overlay>, page: u64) -> Result<(), Errno> {
        let index = u32::try_from(page % 64).unwrap_or(0);
        if overlay.written(page / 64).contains(index) {
            return Ok(());
        }
        let start = page * PAGE_BYTES as u64;
        let pages = Pages::of(self.geometry(), &(start..start + 1));
        let bytes = self.point.read(pages).await.map_err(|_| Errno::Io)?.into_bytes();
        let overlay = Arc::clone(overlay);
        local(move || overlay.prepare(start, &bytes)).await
    }

    /// Locks the blocks of a write, in an order that no two wait for each other.
    async fn hold(&self, range: &Range<u64>, alone: bool) -> Held<'_> {
        let blocks = range.start / BLOCK_BYTES as u64..range.end.div_ceil(BLOCK_BYTES as u64);
        let stripes: BTreeSet<usize> =
            blocks.take(STRIPES).map(|block| usize::try_from(block).unwrap_or(0) % STRIPES).collect();
        if alone {
            let mut guards = Vec::with_capacity(stripes.len());
            for stripe in stripes {
                guards.push(self.stripes[stripe].write().await);
            }
            return Held::Alone { _guards: guards };
        }
        let mut guards = Vec::with_capacity(stripes.len());
        for stripe in stripes {
            guards.push(self.stripes[stripe].read().await);
        }
        Held::Shared { _guards: guards }
    }
}

/// Does something with the overlay's file.
async fn local<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T, Errno> {
    let done = match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(io::Error::other(error)),
    };
    done.map_err(|error| {
        tracing::error!(%error, "the overlay's file failed: the client gets an error");
        if error.kind() == io::ErrorKind::StorageFull { Errno::NoSpace } else { Errno::Io }
    })
}
