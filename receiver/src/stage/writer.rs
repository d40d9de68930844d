//! The group commit: one thread that makes durable, together, whatever waits.
//!
//! Promises: records and closes become durable in the order in which they were queued, a batch whole or not at all; nobody
//! is told so before it is; after a failure of the disk nothing more is written.
//! Never: waits for more to come, but for a few milliseconds while it is busy.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::budget::Permit;
use common::format::stage_key::StageKey;
use common::ids::{BatchId, BlockIndex, Epoch, VolumeId};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::Shared;
use super::error::StageError;
use super::index::{Family, Freed};

/// How long a busy writer waits for a small batch to grow. Syncing a batch takes some 15 ms, so this is lost in it.
const GROW_TIME: Duration = Duration::from_millis(4);
/// Below this a batch of a busy writer waits to grow: the smallest that ingestion handles well.
const GROW_BYTES: usize = 8 << 20;
/// Batch numbers reserved at once.
const CEILING_STEP: u64 = 4096;

pub(super) type Reply = oneshot::Sender<Result<(), StageError>>;

/// A record or close to be made durable.
pub(super) struct Job {
    pub(super) volume: VolumeId,
    pub(super) epoch: Epoch,
    pub(super) block: BlockIndex,
    pub(super) value: Bytes,
    pub(super) reply: Reply,
    /// The memory that `value` stands for.
    pub(super) permit: Option<Permit>,
    /// Its place in the queue.
    pub(super) slot: Option<OwnedSemaphorePermit>,
}

#[derive(Default)]
struct Line {
    jobs: VecDeque<Job>,
    bytes: usize,
    stopped: bool,
}

/// What waits for the writer. Bounded by the slots that its jobs hold.
#[derive(Default)]
pub(super) struct Queue {
    line: Mutex<Line>,
    filled: Condvar,
}

impl Queue {
    fn lock(&self) -> std::sync::MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a job; hands it back where the writer has stopped.
    pub(super) fn push(&self, job: Job) -> Result<(), Box<Job>> {
        let mut line = self.lock();
        if line.stopped {
            return Err(Box::new(job));
        }
        line.bytes += job.value.len();
        line.jobs.push_back(job);
        drop(line);
        self.filled.notify_one();
        Ok(())
    }

    /// Appends jobs so that they are taken as one batch.
    #[cfg(test)]
    pub(super) fn push_together(&self, jobs: Vec<Job>) {
        let mut line = self.lock();
        line.bytes += jobs.iter().map(|job| job.value.len()).sum::<usize>();
        line.jobs.extend(jobs);
        drop(line);
        self.filled.notify_one();
    }

    /// Takes no more jobs; those queued are still written.
    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.filled.notify_one();
    }

    /// Waits for jobs and takes up to `bytes_max` bytes of them; nothing once stopped and empty.
    fn take(&self, bytes_max: usize, busy: bool) -> Vec<Job> {
        let mut line = self.lock();
        while line.jobs.is_empty() && !line.stopped {
            line = self.filled.wait(line).unwrap_or_else(PoisonError::into_inner);
        }
        let deadline = Instant::now() + GROW_TIME;
        while busy && line.bytes < GROW_BYTES.min(bytes_max) && !line.stopped {
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
                break;
            };
            line = self.filled.wait_timeout(line, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let mut taken = Vec::new();
        let mut bytes = 0;
        while bytes < bytes_max
            && let Some(job) = line.jobs.pop_front()
        {
            bytes += job.value.len();
            taken.push(job);
        }
        line.bytes -= bytes;
        taken
    }
}

/// Runs until the queue is stopped and empty.
pub(super) fn run(shared: &Arc<Shared>, first_batch: BatchId) {
    let mut next = first_batch;
    let mut ceiling = first_batch;
    let mut failure: Option<StageError> = None;
    let mut busy = false;
    loop {
        let mut jobs = shared.queue.take(shared.config.batch_bytes_max, busy);
        if jobs.is_empty() {
            return;
        }
        // Stable, so that of two equal keys (there are none) the first would stay first.
        jobs.sort_by_key(|job| (job.volume, job.epoch, job.block));
        let bytes: usize = jobs.iter().map(|job| job.value.len()).sum();
        let family = if bytes < shared.config.ingest_bytes_min { Family::Trickle } else { Family::Records };
        busy = family == Family::Records;
        let result = match &failure {
            Some(error) => Err(error.clone()),
            None => write(shared, &jobs, family, bytes, next, &mut ceiling),
        };
        if let Err(error) = &result
            && failure.is_none()
        {
            // Whether the batch is on disk is not known now; its number must not be used again, and nothing after it may
            // be acknowledged by a database that may be in any state.
            tracing::error!(%error, "staging failed; intake stops until the receiver is started again");
            metrics::counter!("blockferry_receiver_errors_total", "kind" => error.kind()).increment(1);
            failure = Some(error.clone());
            shared.fail(error.clone());
        }
        settle(shared, jobs, family, next, &result);
        next = BatchId(next.0 + 1);
    }
}

fn write(
    shared: &Shared,
    jobs: &[Job],
    family: Family,
    bytes: usize,
    batch: BatchId,
    ceiling: &mut BatchId,
) -> Result<(), StageError> {
    if batch >= *ceiling {
        let raised = BatchId(batch.0 + CEILING_STEP);
        shared.db.set_ceiling(raised)?;
        *ceiling = raised;
    }
    let started = Instant::now();
    let entries = jobs.iter().map(|job| (key_of(job, batch), &*job.value));
    let path = match family {
        Family::Records => {
            shared.db.ingest(batch, entries)?;
            "ingest"
        }
        Family::Trickle => {
            shared.db.write(entries)?;
            "log"
        }
    };
    metrics::histogram!("blockferry_receiver_stage_commit_seconds", "path" => path).record(started.elapsed());
    #[expect(clippy::cast_precision_loss, reason = "a batch is far below 2^52 bytes")]
    metrics::histogram!("blockferry_receiver_stage_batch_bytes", "path" => path).record(bytes as f64);
    Ok(())
}

fn key_of(job: &Job, batch: BatchId) -> StageKey {
    StageKey { batch, volume: job.volume, epoch: job.epoch, block: job.block }
}

/// Enters the batch into the index, then tells everyone who waits for it.
fn settle(shared: &Shared, jobs: Vec<Job>, family: Family, batch: BatchId, result: &Result<(), StageError>) {
    let mut replies = Vec::with_capacity(jobs.len());
    let mut state = shared.lock();
    let mut freed = Freed::default();
    if result.is_ok() {
        state.index.batch_written(batch, family);
    }
    for job in &jobs {
        let len = job.value.len() as u64;
        match result {
            Ok(()) => freed.add(state.index.durable(&key_of(job, batch), len)),
            Err(_) => state.index.failed(job.volume, job.epoch, job.block, len),
        }
        if let Some(others) = state.duplicates.remove(&(job.volume, job.epoch, job.block)) {
            replies.extend(others);
        }
    }
    freed.add(state.index.batch_settled(batch));
    shared.update_gate(&mut state, false);
    drop(state);
    shared.reclaim(freed);
    for job in jobs {
        // The memory is free before anyone is told, so that a sender's next record finds room.
        drop((job.value, job.permit, job.slot));
        replies.push(job.reply);
    }
    for reply in replies {
        // Whoever does not wait any more does not need to know.
        drop(reply.send(result.clone()));
    }
}
