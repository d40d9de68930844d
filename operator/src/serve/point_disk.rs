//! The point as a disk that can be read: from the cache, or from the store, record by record.
//!
//! Promises: a page is what the point asserts, opened and authenticated as [`crate::open`] does, or the read is an error; a bad
//! record costs only the reads that need it; a record is fetched by one at a time, so that those who want the same wait for it; a
//! store that fails for a while is asked again, up to a limit. Never: writes to the store.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use catalog::store::StoreError;
use common::budget::{Budget, BudgetError};
use common::error::{Dispose, Disposition};
use common::ids::{BlockIndex, Geometry, PageMask};
use common::limits::{BLOCK_BYTES, PAGE_BYTES};
use common::net::backoff::Backoff;
use futures::{StreamExt as _, TryStreamExt as _};

use super::cache::Cache;
use super::map::{Map, Window};
use crate::error::OperatorError;
use crate::open::{OpenError, RecordOpener};
use crate::point::PointSource;
use crate::restore::plan::{ITEM_BYTES_MAX, LiveRecord};

/// Bytes between two records that are fetched along: a request costs more.
const GAP_BYTES_MAX: u64 = 64 << 10;
/// Ranges that one read fetches at a time.
const FETCHES_IN_PARALLEL: usize = 4;
/// What opening a record takes beside its bytes.
const OPEN_BYTES: u64 = 2 * BLOCK_BYTES as u64;
/// Blocks share so many locks.
const STRIPES: usize = 1024;
/// Bad records that are remembered, so that each is told of once.
const TOLD_MAX: usize = 1024;

/// Why pages can't be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    /// There is no plan.
    #[error(transparent)]
    Plan(Arc<OperatorError>),
    /// The store, for longer than the limit, or for good.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A record.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// No memory for it.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// A worker thread died.
    #[error("a worker thread died: {0}: this is a bug, please report it")]
    Worker(String),
}

impl Dispose for ReadError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Plan(error) => error.disposition(),
            Self::Store(error) => error.disposition(),
            Self::Open(error) => error.disposition(),
            Self::Budget(_) => Disposition::BadInput,
            Self::Worker(_) => Disposition::Bug,
        }
    }
}

/// Whole pages of the disk, some of them still to be filled in.
#[derive(Debug)]
pub(super) struct Pages {
    /// First page.
    first: u64,
    /// For each block touched, from that of the first page on: what is still wanted.
    wanted: Vec<PageMask>,
    bytes: Vec<u8>,
}

impl Pages {
    /// The pages that `range` of a disk touches, all wanted, all zero so far.
    pub(super) fn of(geometry: Geometry, range: &Range<u64>) -> Self {
        let (first, end) = (range.start / PAGE_BYTES as u64, range.end.div_ceil(PAGE_BYTES as u64));
        let blocks = first / 64..end.div_ceil(64);
        let wanted = blocks.map(|block| {
            let before = PageMask::first(u32::try_from(first.saturating_sub(block * 64)).unwrap_or(64));
            let until = PageMask::first(u32::try_from((end - block * 64).min(64)).unwrap_or(64));
            until.without(before).and(geometry.pages_of(BlockIndex(block)))
        });
        let length = usize::try_from(end - first).unwrap_or(0) * PAGE_BYTES;
        Self { first, wanted: wanted.collect(), bytes: vec![0; length] }
    }

    /// Byte of the disk that the first page begins with.
    pub(super) fn start(&self) -> u64 {
        self.first * PAGE_BYTES as u64
    }

    /// All bytes, once filled in.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// The blocks touched.
    pub(super) fn blocks(&self) -> Range<u64> {
        self.first / 64..self.first / 64 + self.wanted.len() as u64
    }

    /// What is wanted of a block that is touched.
    pub(super) fn wanted(&mut self, block: u64) -> &mut PageMask {
        let at = usize::try_from(block - self.first / 64).unwrap_or(0);
        &mut self.wanted[at]
    }

    /// The bytes from the first page of `block` on that is touched, and which page of the block that is.
    pub(super) fn block_mut(&mut self, block: u64) -> (u32, &mut [u8]) {
        let skipped = self.first.saturating_sub(block * 64);
        let start = (block * 64 + skipped - self.first) * PAGE_BYTES as u64;
        let start = usize::try_from(start).unwrap_or(0);
        let end = (start + (64 - usize::try_from(skipped).unwrap_or(0)) * PAGE_BYTES).min(self.bytes.len());
        (u32::try_from(skipped).unwrap_or(0), &mut self.bytes[start..end])
    }

    /// Takes what is wanted of a run of pages within one block.
    fn fill(&mut self, at: u64, run: &[u8]) {
        let page = at / PAGE_BYTES as u64;
        let block = page / 64;
        if !self.blocks().contains(&block) {
            return;
        }
        for (number, bytes) in (page..).zip(run.chunks_exact(PAGE_BYTES)) {
            let index = u32::try_from(number % 64).unwrap_or(0);
            if self.wanted(block).contains(index) {
                let start = usize::try_from(number - self.first).unwrap_or(0) * PAGE_BYTES;
                self.bytes[start..start + PAGE_BYTES].copy_from_slice(bytes);
                let wanted = self.wanted(block);
                *wanted = wanted.without(PageMask::EMPTY.with(index));
            }
        }
    }
}

/// One range of a segment to be fetched, and the records in it that are to be opened.
#[derive(Debug, PartialEq, Eq)]
struct Item {
    segment: u32,
    range: Range<u64>,
    records: Vec<LiveRecord>,
}

/// Ranges that hold all `records`. PURE.
fn coalesce(mut records: Vec<LiveRecord>) -> Vec<Item> {
    records.sort_unstable_by_key(|record| (record.segment, record.offset));
    let mut items: Vec<Item> = Vec::new();
    for record in records {
        let range = u64::from(record.offset)..u64::from(record.offset) + u64::from(record.len);
        match items.last_mut() {
            Some(item)
                if item.segment == record.segment
                    && range.start <= item.range.end + GAP_BYTES_MAX
                    && range.end - item.range.start <= ITEM_BYTES_MAX =>
            {
                item.range.end = range.end;
                item.records.push(record);
            }
            _ => items.push(Item { segment: record.segment, range, records: vec![record] }),
        }
    }
    items
}

/// A point that can be read.
#[derive(Debug)]
pub(super) struct PointDisk {
    source: Arc<PointSource>,
    opener: RecordOpener,
    map: Map,
    cache: Cache,
    budget: Budget,
    patience: Duration,
    stripes: Vec<tokio::sync::Mutex<()>>,
    told: Mutex<HashSet<String>>,
}

impl PointDisk {
    /// Nothing is read yet. `map_bytes` is for plans, `budget` for ranges under way; a store that fails is asked again for
    /// `patience`.
    pub(super) fn new(
        source: Arc<PointSource>,
        cache: Cache,
        map_bytes: u64,
        budget: Budget,
        patience: Duration,
    ) -> Self {
        Self {
            opener: RecordOpener::new(Arc::clone(&source.history), source.data_key.clone()),
            map: Map::new(Arc::clone(&source), map_bytes),
            cache,
            budget,
            patience,
            stripes: (0..STRIPES).map(|_| tokio::sync::Mutex::new(())).collect(),
            told: Mutex::default(),
            source,
        }
    }

    /// Its size and layout.
    pub(super) fn geometry(&self) -> Geometry {
        self.map.geometry()
    }

    /// Fills in what is wanted of `pages`.
    ///
    /// # Errors
    /// [`ReadError`], which was logged.
    pub(super) async fn read(self: &Arc<Self>, pages: Pages) -> Result<Pages, ReadError> {
        let read = self.try_read(pages).await;
        read.inspect_err(|error| self.tell(error))
    }

    /// Fetches into the cache what is not there of `range`. Errors are left to those who read it.
    pub(super) async fn fetch_ahead(self: &Arc<Self>, range: Range<u64>) {
        let blocks = range.start / BLOCK_BYTES as u64..range.end.div_ceil(BLOCK_BYTES as u64);
        // Some blocks at a time, so that whoever reads them does not wait for all.
        let mut block = blocks.start;
        while block < blocks.end {
            let Ok((window, window_end)) = self.window(block).await else { return };
            let end = blocks.end.min(window_end).min(block + 8);
            let wanted: Vec<(u64, PageMask)> = (block..end).map(|block| (block, window.data_of(block))).collect();
            let missing = |this: &Self| -> Vec<(u64, PageMask)> {
                let missing = wanted.iter().map(|(block, mask)| (*block, this.cache.missing(*block, *mask)));
                missing.filter(|(_, mask)| !mask.is_empty()).collect()
            };
            let _turns = self.turns(missing(self).into_iter().map(|(block, _)| block)).await;
            if self.fetch(&window, missing(self), None).await.is_err() {
                return;
            }
            block = end;
        }
    }

    async fn try_read(self: &Arc<Self>, mut pages: Pages) -> Result<Pages, ReadError> {
        let blocks = pages.blocks();
        let mut block = blocks.start;
        while block < blocks.end {
            let (window, window_end) = self.window(block).await?;
            let end = blocks.end.min(window_end);
            pages = self.read_window(pages, &window, block..end).await?;
            block = end;
        }
        Ok(pages)
    }

    async fn read_window(
        self: &Arc<Self>,
        mut pages: Pages,
        window: &Arc<Window>,
        blocks: Range<u64>,
    ) -> Result<Pages, ReadError> {
        for block in blocks.clone() {
            // Zero pages are zero already.
            let data = window.data_of(block);
            let wanted = pages.wanted(block);
            *wanted = wanted.and(data);
        }
        pages = self.read_cached(pages, blocks.clone()).await?;
        let missing = |pages: &mut Pages| -> Vec<(u64, PageMask)> {
            let missing = blocks.clone().map(|block| (block, *pages.wanted(block)));
            missing.filter(|(_, mask)| !mask.is_empty()).collect()
        };
        let left = missing(&mut pages);
        if left.is_empty() {
            return Ok(pages);
        }
        let _turns = self.turns(left.into_iter().map(|(block, _)| block)).await;
        // Whoever had the turn before may have fetched it.
        pages = self.read_cached(pages, blocks.clone()).await?;
        let left = missing(&mut pages);
        if left.is_empty() {
            return Ok(pages);
        }
        let shared = Arc::new(Mutex::new(pages));
        self.fetch(window, left, Some(&shared)).await?;
        let pages = Arc::try_unwrap(shared).map_err(|_| ReadError::Worker("it still reads".into()))?;
        Ok(pages.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Fills in from the cache what is there.
    async fn read_cached(self: &Arc<Self>, mut pages: Pages, blocks: Range<u64>) -> Result<Pages, ReadError> {
        let this = Arc::clone(self);
        blocking(move || {
            for block in blocks {
                let wanted = *pages.wanted(block);
                if !wanted.is_empty() {
                    let (first, bytes) = pages.block_mut(block);
                    let missing = this.cache.read(block, wanted, first, bytes);
                    *pages.wanted(block) = missing;
                }
            }
            Ok(pages)
        })
        .await
    }

    /// Fetches the records that have the pages wanted, keeps all their live pages, and fills in those wanted. All ranges are tried;
    /// the first error is returned.
    async fn fetch(
        self: &Arc<Self>,
        window: &Window,
        wanted: Vec<(u64, PageMask)>,
        pages: Option<&Arc<Mutex<Pages>>>,
    ) -> Result<(), ReadError> {
        let needed = |(block, mask): (u64, PageMask)| {
            window.records_of(block).iter().filter(move |record| !record.live.and(mask).is_empty())
        };
        let items = coalesce(wanted.into_iter().flat_map(needed).copied().collect());
        let fetches = futures::stream::iter(items.into_iter().map(|item| {
            let (this, pages) = (Arc::clone(self), pages.cloned());
            async move { this.fetch_item(item, pages).await }
        }));
        fetches.buffer_unordered(FETCHES_IN_PARALLEL).try_collect::<()>().await
    }

    async fn fetch_item(self: Arc<Self>, item: Item, pages: Option<Arc<Mutex<Pages>>>) -> Result<(), ReadError> {
        let permit = self.budget.acquire(item.range.end - item.range.start + OPEN_BYTES).await?;
        let path = self.source.history.segments[item.segment as usize].path.clone();
        let bytes = self.get(&path, &item.range).await?;
        blocking(move || {
            let opened = self.open(&item, &bytes, pages.as_deref());
            drop(permit);
            opened
        })
        .await
    }

    /// Opens the records of an item, all that can be.
    fn open(&self, item: &Item, bytes: &Bytes, pages: Option<&Mutex<Pages>>) -> Result<(), ReadError> {
        let mut turn = self.opener.turn()?;
        let mut failed = None;
        for record in &item.records {
            let start = usize::try_from(u64::from(record.offset) - item.range.start).unwrap_or(usize::MAX);
            match turn.open(record, bytes.slice(start..start + record.len as usize)) {
                Ok(opened) => {
                    for (at, run) in opened.runs() {
                        self.cache.insert(at, run);
                        if let Some(pages) = pages {
                            pages.lock().unwrap_or_else(PoisonError::into_inner).fill(at, run);
                        }
                    }
                }
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Fetches a range, again and again while the store fails in a way that may pass.
    async fn get(&self, path: &str, range: &Range<u64>) -> Result<Bytes, StoreError> {
        let store = &self.source.store;
        with_patience(self.patience, path, || store.get_range(path, range.clone())).await
    }

    async fn window(&self, block: u64) -> Result<(Arc<Window>, u64), ReadError> {
        let planned = with_patience(self.patience, "the point's metadata", || self.map.window(block)).await;
        planned.map_err(ReadError::Plan)
    }

    /// The locks of blocks, in an order that no two wait for each other.
    async fn turns(&self, blocks: impl Iterator<Item = u64>) -> Vec<tokio::sync::MutexGuard<'_, ()>> {
        let stripes: BTreeSet<usize> = blocks.map(|block| usize::try_from(block).unwrap_or(0) % STRIPES).collect();
        let mut turns = Vec::with_capacity(stripes.len());
        for stripe in stripes {
            turns.push(self.stripes[stripe].lock().await);
        }
        turns
    }

    /// Logs an error, once for each cause.
    fn tell(&self, error: &ReadError) {
        let text = common::ops::exit::error_line(error);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() < TOLD_MAX && told.insert(text.clone()) {
            drop(told);
            tracing::error!(volume = %self.source.volume, error = %text, "a read failed: the client gets an input/output error");
        }
    }
}

/// Does `attempt` until it succeeds, fails for good, or `patience` is over.
async fn with_patience<T, E, F>(patience: Duration, what: &str, attempt: impl Fn() -> F) -> Result<T, E>
where
    E: PassingFault,
    F: Future<Output = Result<T, E>>,
{
    let started = Instant::now();
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    loop {
        let error = match attempt().await {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        if !error.may_pass() || started.elapsed() >= patience {
            return Err(error);
        }
        if backoff.attempts() == 0 {
            tracing::warn!(%error, what, "the store fails: reads wait for it");
        }
        // Half of the longest wait where there is no chance to be had.
        let random = common::rng::random::<8>().map_or(u64::MAX / 2, u64::from_le_bytes);
        tokio::time::sleep(backoff.next_wait(random)).await;
    }
}

/// An error of which it is known whether the same attempt may succeed later.
trait PassingFault: std::fmt::Display {
    fn may_pass(&self) -> bool;
}

impl PassingFault for StoreError {
    fn may_pass(&self) -> bool {
        self.disposition() == Disposition::Retry
    }
}

impl PassingFault for Arc<OperatorError> {
    fn may_pass(&self) -> bool {
        self.disposition() == Disposition::Retry
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ReadError> + Send + 'static,
) -> Result<T, ReadError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ReadError::Worker(error.to_string())),
    }
}
