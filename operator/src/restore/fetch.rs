//! Fetches a plan's ranges in parallel, opens the records in them and writes their pages.
//!
//! Memory: each range in flight holds a permit for its bytes and for the two blocks that opening a record takes. What is
//! written was opened as [`crate::open`] promises.

#![allow(clippy::cast_possible_truncation, reason = "a range of at most 4 MiB")]

use std::sync::Arc;

use bytes::Bytes;
use catalog::store::{Store, StoreError};
use catalog::volume::history::History;
use common::budget::{Budget, BudgetError, Permit};
use common::error::{Dispose, Disposition};
use common::limits::{BLOCK_BYTES, PAGE_BYTES};
use common::ops::progress::Progress;
use tokio::task::{JoinError, JoinSet};

use super::plan::{LiveRecord, Plan};
use super::readback::Sums;
use super::state::RestoreState;
use super::target::{Target, TargetError};
use crate::open::{OpenError, RecordOpener};

/// Ranges in flight.
pub(super) const FETCHES_IN_PARALLEL: usize = 8;
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
    /// A record does not open as what it has to be.
    #[error(transparent)]
    Open(#[from] OpenError),
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
            Self::Open(error) => error.disposition(),
            Self::Target(_) => Disposition::Retry,
            Self::Budget(_) => Disposition::BadInput,
            Self::Worker(_) => Disposition::Bug,
        }
    }
}

/// What is done with a run of pages: the record's number in the plan, the run's place on the disk, its bytes.
pub(super) type EachRun<'a> = dyn FnMut(usize, u64, &[u8]) -> Result<(), FetchError> + 'a;

/// All that the workers share.
pub struct Fetcher {
    /// Where segments lie.
    pub store: Store,
    /// What the log says.
    pub history: Arc<History>,
    /// What is written.
    pub target: Arc<Target>,
    /// Bounds the bytes in flight.
    pub budget: Budget,
    /// Shows how far it is.
    pub progress: Arc<Progress>,
    /// Opens the records.
    opener: RecordOpener,
}

impl Fetcher {
    /// A fetcher that has done nothing yet.
    #[must_use]
    pub fn new(
        store: Store,
        opener: RecordOpener,
        history: Arc<History>,
        target: Arc<Target>,
        budget: Budget,
        progress: Arc<Progress>,
    ) -> Self {
        Self { store, history, target, budget, progress, opener }
    }

    /// Restores the items of `plan` that `state` does not have as done, the disk's first block last, and syncs. Items of the
    /// first block are never recorded as done. Into `sums`, where given, goes what was written of each record.
    ///
    /// # Errors
    /// The first [`FetchError`]; what `state` records is durable.
    pub async fn run(
        self: &Arc<Self>,
        plan: &Arc<Plan>,
        state: &mut RestoreState,
        sums: Option<&Arc<Sums>>,
    ) -> Result<(), FetchError> {
        let mut pending = Vec::new();
        for (number, item) in plan.items.iter().enumerate().take(plan.first_block_from) {
            if state.done[number] {
                self.progress.skip(live_bytes(&plan.records[item.records.clone()]));
            } else {
                pending.push(number);
            }
        }
        // Tasks of their own, so that all cores receive, and go on while what was written is synced.
        let (mut running, mut saving) = (JoinSet::new(), JoinSet::new());
        let mut pending = pending.into_iter();
        let mut unsaved = 0;
        loop {
            while running.len() < FETCHES_IN_PARALLEL
                && let Some(number) = pending.next()
            {
                let (this, plan, sums) = (Arc::clone(self), Arc::clone(plan), sums.cloned());
                running.spawn(async move { this.restore(&plan, number, sums).await.map(|()| number) });
            }
            let Some(done) = running.join_next().await else { break };
            let number = joined(done)?;
            state.done[number] = true;
            unsaved += plan.items[number].range.end - plan.items[number].range.start;
            if unsaved >= SAVE_BYTES {
                unsaved = 0;
                if let Some(saved) = saving.join_next().await {
                    joined(saved)?;
                }
                // As of now: what is done later is not in it, whether the sync reaches it or not.
                let (this, state) = (Arc::clone(self), state.clone());
                saving.spawn(async move { this.save(&state).await });
            }
        }
        if let Some(saved) = saving.join_next().await {
            joined(saved)?;
        }
        self.save(state).await?;
        for number in plan.first_block_from..plan.items.len() {
            self.restore(plan, number, sums.cloned()).await?;
        }
        Ok(())
    }

    /// Makes durable what was written, and then that it was.
    ///
    /// # Errors
    /// Those of the target.
    pub async fn save(self: &Arc<Self>, state: &RestoreState) -> Result<(), FetchError> {
        let (this, state) = (Arc::clone(self), state.clone());
        blocking(move || {
            this.target.sync()?;
            Ok(this.target.save(&state)?)
        })
        .await
    }

    async fn restore(
        self: &Arc<Self>,
        plan: &Arc<Plan>,
        number: usize,
        sums: Option<Arc<Sums>>,
    ) -> Result<(), FetchError> {
        self.with_item(plan, number, move |this, plan, number, bytes| {
            this.each_run(plan, number, bytes, &mut |record, at, run| {
                let written = this.target.write(at, run)?;
                this.progress.advance(written.len() as u64);
                if let Some(sums) = &sums {
                    sums.add(record, written);
                }
                Ok(())
            })
        })
        .await
    }

    /// Fetches an item and gives its bytes to `work` on a thread that may block, within the budget.
    ///
    /// # Errors
    /// Those of the store and of `work`.
    pub(super) async fn with_item(
        self: &Arc<Self>,
        plan: &Arc<Plan>,
        number: usize,
        work: impl FnOnce(&Self, &Plan, usize, &Bytes) -> Result<(), FetchError> + Send + 'static,
    ) -> Result<(), FetchError> {
        let item = &plan.items[number];
        let permit = self.budget.acquire(item.range.end - item.range.start + OPEN_BYTES).await?;
        let segment = &self.history.segments[item.segment as usize];
        let bytes = self.store.get_range(&segment.path, item.range.clone()).await?;
        let (this, plan) = (Arc::clone(self), Arc::clone(plan));
        blocking(move || {
            // Held until all is done with the bytes.
            let _permit: Permit = permit;
            work(&this, &plan, number, &bytes)
        })
        .await
    }

    /// Opens the records of an item and gives each run of live pages to `each`. Runs of a record come in the disk's order.
    ///
    /// # Errors
    /// The first of opening a record and of `each`.
    pub(super) fn each_run(
        &self,
        plan: &Plan,
        number: usize,
        bytes: &Bytes,
        each: &mut EachRun<'_>,
    ) -> Result<(), FetchError> {
        let item = &plan.items[number];
        let mut turn = self.opener.turn()?;
        for number in item.records.clone() {
            let live = &plan.records[number];
            let start = (u64::from(live.offset) - item.range.start) as usize;
            let opened = turn.open(live, bytes.slice(start..start + live.len as usize))?;
            for (at, run) in opened.runs() {
                each(number, at, run)?;
            }
        }
        Ok(())
    }
}

fn live_bytes(records: &[LiveRecord]) -> u64 {
    records.iter().map(|record| u64::from(record.live.count()) * PAGE_BYTES as u64).sum()
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FetchError> + Send + 'static,
) -> Result<T, FetchError> {
    joined(tokio::task::spawn_blocking(work).await)
}

fn joined<T>(ended: Result<Result<T, FetchError>, JoinError>) -> Result<T, FetchError> {
    ended.unwrap_or_else(|error| Err(FetchError::Worker(error.to_string())))
}
