//! Fetches a plan's ranges in parallel, opens the records in them and writes their pages.
//!
//! Memory: each range in flight holds a permit for its bytes and for the two blocks that opening a record takes. A record is
//! written only if it parses (checksum), carries the tag that its epoch's signed root covers, and opens under its
//! epoch's key, for its place: the tag and the key together leave one possible content.

#![allow(clippy::cast_possible_truncation, reason = "a range of at most 4 MiB")]

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use catalog::store::{Store, StoreError};
use catalog::volume::history::History;
use common::budget::{Budget, BudgetError, Permit};
use common::error::{Dispose, Disposition};
use common::format::FormatError;
use common::format::record::Record;
use common::limits::{BLOCK_BYTES, PAGE_BYTES, SEAL_TAG_BYTES};
use common::ops::progress::Progress;
use common::seal::{DataKey, EpochContext, EpochKey, Opener, SealError};
use futures::StreamExt as _;

use super::plan::{LiveRecord, Plan, page_runs};
use super::state::RestoreState;
use super::target::{Target, TargetError};

/// Ranges in flight.
const FETCHES_IN_PARALLEL: usize = 8;
/// Bytes fetched after which what was written is synced and remembered.
const SAVE_BYTES: u64 = 64 << 20;
/// What opening a record takes beside its bytes.
const OPEN_BYTES: u64 = 2 * BLOCK_BYTES as u64;

/// Why a range could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The store failed, or a segment is missing or cut short.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A record is damaged.
    #[error("{path}: record at byte {offset}: {source}")]
    Damaged {
        /// Segment.
        path: String,
        /// Where the record starts.
        offset: u64,
        /// What is wrong.
        source: FormatError,
    },
    /// A record is another than its epoch's close signs.
    #[error("{path}: the record at byte {offset} is not the one that the close of its epoch signs: it was replaced")]
    Replaced {
        /// Segment.
        path: String,
        /// Where the record starts.
        offset: u64,
    },
    /// A record does not open.
    #[error("{path}: record at byte {offset}: {source}")]
    Sealed {
        /// Segment.
        path: String,
        /// Where the record starts.
        offset: u64,
        /// Why.
        source: SealError,
    },
    /// No context to open records with.
    #[error(transparent)]
    Opener(SealError),
    /// The target failed.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The budget is smaller than one range.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// A worker thread died.
    #[error("a worker thread died: {0}: this is a bug, please report it")]
    Worker(String),
}

impl Dispose for FetchError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Damaged { source, .. } => source.disposition(),
            Self::Replaced { .. } | Self::Sealed { .. } => Disposition::Corrupt,
            Self::Target(_) => Disposition::Retry,
            Self::Budget(_) => Disposition::BadInput,
            Self::Opener(_) | Self::Worker(_) => Disposition::Bug,
        }
    }
}

/// All that the workers share.
pub struct Fetcher {
    /// Where segments lie.
    pub store: Store,
    /// What the log says.
    pub history: Arc<History>,
    /// Opens the records.
    pub data_key: DataKey,
    /// What is written.
    pub target: Arc<Target>,
    /// Bounds the bytes in flight.
    pub budget: Budget,
    /// Shows how far it is.
    pub progress: Arc<Progress>,
    /// Openers that no worker uses now.
    openers: Mutex<Vec<Opener>>,
}

impl Fetcher {
    /// A fetcher with no opener yet.
    #[must_use]
    pub fn new(
        store: Store,
        history: Arc<History>,
        data_key: DataKey,
        target: Arc<Target>,
        budget: Budget,
        progress: Arc<Progress>,
    ) -> Self {
        Self { store, history, data_key, target, budget, progress, openers: Mutex::new(Vec::new()) }
    }

    /// Restores the items of `plan` that `state` does not have as done, the disk's first block last, and syncs. Items of the
    /// first block are never recorded as done.
    ///
    /// # Errors
    /// The first [`FetchError`]; what `state` records is durable.
    pub async fn run(self: &Arc<Self>, plan: &Arc<Plan>, state: &mut RestoreState) -> Result<(), FetchError> {
        let mut pending = Vec::new();
        for (number, item) in plan.items.iter().enumerate().take(plan.first_block_from) {
            if state.done[number] {
                self.progress.advance(live_bytes(&plan.records[item.records.clone()]));
            } else {
                pending.push(number);
            }
        }
        let mut running = futures::stream::iter(pending)
            .map(|number| {
                let (this, plan) = (Arc::clone(self), Arc::clone(plan));
                async move { this.restore(&plan, number).await.map(|()| number) }
            })
            .buffer_unordered(FETCHES_IN_PARALLEL);
        let mut unsaved = 0;
        while let Some(done) = running.next().await {
            let number = done?;
            state.done[number] = true;
            unsaved += plan.items[number].range.end - plan.items[number].range.start;
            if unsaved >= SAVE_BYTES {
                self.save(state).await?;
                unsaved = 0;
            }
        }
        drop(running);
        self.save(state).await?;
        for number in plan.first_block_from..plan.items.len() {
            self.restore(plan, number).await?;
        }
        Ok(())
    }

    async fn save(self: &Arc<Self>, state: &RestoreState) -> Result<(), FetchError> {
        let (this, state) = (Arc::clone(self), state.clone());
        blocking(move || {
            this.target.sync()?;
            Ok(this.target.save(&state)?)
        })
        .await
    }

    async fn restore(self: &Arc<Self>, plan: &Arc<Plan>, number: usize) -> Result<(), FetchError> {
        let item = &plan.items[number];
        let permit = self.budget.acquire(item.range.end - item.range.start + OPEN_BYTES).await?;
        let segment = &self.history.segments[item.segment as usize];
        let bytes = self.store.get_range(&segment.path, item.range.clone()).await?;
        let (this, plan) = (Arc::clone(self), Arc::clone(plan));
        blocking(move || this.write(&plan, number, &bytes, &permit)).await
    }

    /// Opens the records of an item and writes their live pages. The permit is held until all is written.
    fn write(&self, plan: &Plan, number: usize, bytes: &Bytes, _permit: &Permit) -> Result<(), FetchError> {
        let spare = self.openers.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut opener = match spare {
            Some(opener) => opener,
            None => Opener::new().map_err(FetchError::Opener)?,
        };
        let item = &plan.items[number];
        let mut pages = Vec::with_capacity(BLOCK_BYTES);
        let mut key: Option<(u32, EpochKey)> = None;
        for live in &plan.records[item.records.clone()] {
            let key = match &key {
                Some((epoch, key)) if *epoch == live.epoch => key,
                _ => &key.insert((live.epoch, self.epoch_key(live.epoch))).1,
            };
            let start = (u64::from(live.offset) - item.range.start) as usize;
            let record = bytes.slice(start..start + live.len as usize);
            self.open(live, key, record, &mut opener, &mut pages)?;
        }
        self.openers.lock().unwrap_or_else(PoisonError::into_inner).push(opener);
        Ok(())
    }

    fn open(
        &self,
        live: &LiveRecord,
        key: &EpochKey,
        record: Bytes,
        opener: &mut Opener,
        pages: &mut Vec<u8>,
    ) -> Result<(), FetchError> {
        let path = || self.history.segments[live.segment as usize].path.clone();
        let offset = u64::from(live.offset);
        let record = Record::parse(record).map_err(|source| FetchError::Damaged { path: path(), offset, source })?;
        let header = *record.header();
        let tag = &record.bytes()[record.bytes().len() - SEAL_TAG_BYTES..];
        if tag != live.tag.0
            || header.block.0 != u64::from(live.block)
            || !live.live.without(header.data_mask).is_empty()
        {
            return Err(FetchError::Replaced { path: path(), offset });
        }
        opener.open(key, &record, pages).map_err(|source| FetchError::Sealed { path: path(), offset, source })?;
        for (first, count) in page_runs(live.live) {
            // Pages of the record before the run's first one. The run's pages lie side by side, since none between is missing.
            let before = header.data_mask.0 & ((1_u64 << first) - 1);
            let start = before.count_ones() as usize * PAGE_BYTES;
            let run = &pages[start..start + count as usize * PAGE_BYTES];
            let at = header.block.0 * BLOCK_BYTES as u64 + u64::from(first) * PAGE_BYTES as u64;
            let written = self.target.write(at, run)?;
            self.progress.advance(written);
        }
        Ok(())
    }

    fn epoch_key(&self, epoch: u32) -> EpochKey {
        let statement = self.history.epochs[epoch as usize].close.statement();
        let context = EpochContext {
            volume: statement.volume,
            incarnation: statement.incarnation,
            epoch: statement.epoch,
            key_id: statement.key_id,
        };
        self.data_key.epoch_key(context, &statement.salt)
    }
}

fn live_bytes(records: &[LiveRecord]) -> u64 {
    records.iter().map(|record| u64::from(record.live.count()) * PAGE_BYTES as u64).sum()
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FetchError> + Send + 'static,
) -> Result<T, FetchError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(FetchError::Worker(error.to_string())),
    }
}
