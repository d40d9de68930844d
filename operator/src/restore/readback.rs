//! `restore --verify`: reads a window back from the target and compares it with what was opened for it.
//!
//! What this run wrote is compared by its hash, taken of the opened pages as they were written. What an earlier run wrote, of which
//! no hash is left, is fetched and opened once more. Zeros are looked for where the target promised them. Memory: 16 bytes for
//! each live record of a window.

use std::sync::{Arc, Mutex, PoisonError};

use common::limits::BLOCK_BYTES;
use common::ops::progress::Progress;
use futures::StreamExt as _;

use super::fetch::{FETCHES_IN_PARALLEL, FetchError, Fetcher, blocking};
use super::plan::{LiveRecord, Plan, page_runs};

/// What was written of a record: the start of its BLAKE3. Damage is looked for here, no attacker: he would alter the target later.
type Sum = [u8; 16];

/// For each live record of a plan, what this run wrote of it.
#[derive(Debug)]
pub struct Sums(Mutex<Vec<Option<Sum>>>);

/// The sum with one more run of pages. A record is mostly one run.
fn next(before: Option<&Sum>, bytes: &[u8]) -> Sum {
    let mut hasher = blake3::Hasher::new();
    before.map(|sum| hasher.update(sum));
    hasher.update(bytes);
    let mut sum = [0; 16];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    sum
}

impl Sums {
    /// None yet.
    #[must_use]
    pub fn new(records: usize) -> Self {
        Self(Mutex::new(vec![None; records]))
    }

    /// Says that `bytes` were written of a record, behind those before.
    pub(super) fn add(&self, record: usize, bytes: &[u8]) {
        let before = self.get(record);
        let sum = next(before.as_ref(), bytes);
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[record] = Some(sum);
    }

    fn get(&self, record: usize) -> Option<Sum> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[record]
    }
}

/// Compares all of a window with the target, which was synced.
///
/// # Errors
/// [`FetchError::Target`] with [`super::target::TargetError::ReadsBack`] at the first difference; else what hindered comparing.
pub async fn check(
    fetcher: &Arc<Fetcher>,
    plan: &Arc<Plan>,
    sums: &Arc<Sums>,
    progress: &Arc<Progress>,
) -> Result<(), FetchError> {
    fetcher.target.forget_cache();
    let mut running = futures::stream::iter(0..plan.items.len())
        .map(|number| {
            let (fetcher, plan) = (Arc::clone(fetcher), Arc::clone(plan));
            let (sums, progress) = (Arc::clone(sums), Arc::clone(progress));
            async move {
                if plan.items[number].records.clone().all(|record| sums.get(record).is_some()) {
                    let permit = fetcher.budget.acquire(BLOCK_BYTES as u64).await?;
                    return blocking(move || {
                        let _permit = permit;
                        let records = plan.items[number].records.clone();
                        records.into_iter().try_for_each(|record| {
                            by_hash(&fetcher, &plan.records[record], sums.get(record).as_ref(), &progress)
                        })
                    })
                    .await;
                }
                let work = move |fetcher: &Fetcher, plan: &Plan, number, bytes: &bytes::Bytes| {
                    let mut found = Vec::new();
                    fetcher.each_run(plan, number, bytes, &mut |_, at, run| {
                        let expected = fetcher.target.on_disk(at, run);
                        found.resize(expected.len(), 0);
                        fetcher.target.read(at, &mut found)?;
                        progress.advance(expected.len() as u64);
                        if found == expected { Ok(()) } else { Err(fetcher.target.differs(at).into()) }
                    })
                };
                fetcher.with_item(&plan, number, work).await
            }
        })
        .buffer_unordered(FETCHES_IN_PARALLEL);
    while let Some(done) = running.next().await {
        done?;
    }
    drop(running);
    let (fetcher, plan) = (Arc::clone(fetcher), Arc::clone(plan));
    blocking(move || {
        let mut zeros = plan.zero_ranges(true);
        Ok(zeros.try_for_each(|range| fetcher.target.check_zeros(range.start, range.end - range.start))?)
    })
    .await
}

fn by_hash(
    fetcher: &Fetcher,
    record: &LiveRecord,
    expected: Option<&Sum>,
    progress: &Progress,
) -> Result<(), FetchError> {
    let mut buffer = vec![0; BLOCK_BYTES];
    let mut sum = None;
    for (first, count) in page_runs(record.live) {
        let at = record.page_at(first);
        let len = fetcher.target.on_disk(at, &buffer[..count as usize * common::limits::PAGE_BYTES]).len();
        fetcher.target.read(at, &mut buffer[..len])?;
        sum = Some(next(sum.as_ref(), &buffer[..len]));
        progress.advance(len as u64);
    }
    if sum.as_ref() == expected {
        return Ok(());
    }
    Err(fetcher.target.differs(record.page_at(record.live.iter().next().unwrap_or(0))).into())
}
