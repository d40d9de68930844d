//! The threads that seal, shared by all volumes: each takes a piece of some volume's cut, reads it, compares it with the known
//! hashes, and seals what differs while it is still in cache.
//!
//! ```text
//! CutPages ─▶ worker: read a piece ─▶ compare ─▶ budget permit ─▶ epoch ticket ─▶ seal ─▶ outputs ─▶ the volume's agent
//! ```
//!
//! Volumes take turns, a piece each, so that a busy one does not starve a quiet one; one whose agent does not take its outputs
//! is passed over. There are more threads than may use the CPU at once, so that some read while others seal.
//!
//! Promises: every piece of a cut is compared once; a block that differs gives one record, and runs of blocks that
//! became zero give one record together; a record is charged to the budget from before it is made until its permit is dropped;
//! the last output is [`PassOutput::Finished`] or [`PassOutput::Failed`], and nothing is left out before a `Finished`.
//! Dropping the [`Pass`] ends it. Never: writes, or holds more than its fixed buffers beside what it was given permits for.

mod order;
mod worker;

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::budget::{Budget, BudgetError, Permit};
use common::error::{Dispose, Disposition};
use common::format::close::Consistency;
use common::format::record::{Codec, Record, RecordMeta};
use common::format::state::HashChange;
use common::ids::Epoch;
use common::limits;
use common::seal::{Compression, SealError, Sealer};
use common::units::ByteRate;
use tokio::sync::mpsc;

use crate::capture::CaptureError;
use crate::capture::cut::{CutPages, Piece};
use crate::capture::scan::CHUNK_BYTES;
use crate::epoch::{EpochError, EpochGate};
use crate::state::{HashReader, StateError};
use order::{Order, ZeroRun};
use worker::Worker;

#[cfg(test)]
mod tests;

/// Threads beyond those that may use the CPU: they wait for the disk meanwhile.
const READING_THREADS: usize = 2;
/// Fixed memory of one thread: its chunk, gathered pages, the sealer's scratch and its zstd context at fast levels.
const THREAD_BYTES: u64 = (CHUNK_BYTES + 3 * limits::BLOCK_BYTES + (1 << 20)) as u64;
/// Sealed records that may wait for a volume's agent before its turn is passed over.
const OUTPUTS_MAX: usize = 64;
/// Blocks in a row that did not shrink before compression is left out.
const RAW_BLOCKS_BEFORE_SKIP: u32 = 8;
/// Blocks that are not tried then; after them one is.
const BLOCKS_SKIPPED: u32 = 31;

/// Fixed memory in bytes of a pool with `seal_threads`, to be set aside in the budget.
#[must_use]
pub fn memory_bytes(seal_threads: usize) -> u64 {
    (seal_threads + READING_THREADS) as u64 * THREAD_BYTES
}

/// Why a pass failed.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The disk could not be read.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The page hashes could not be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// A block could not be sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// An epoch could not be opened.
    #[error(transparent)]
    Epoch(#[from] EpochError),
    /// A record is larger than the whole budget.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// A thread could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    /// A thread ended without a word: a bug.
    #[error("a sealing thread ended unexpectedly; this is a bug of blockferry-sender")]
    Died,
}

impl Dispose for PassError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Capture(error) => error.disposition(),
            Self::State(error) => error.disposition(),
            Self::Seal(error) => error.disposition(),
            Self::Epoch(error) => error.disposition(),
            Self::Budget(_) => Disposition::BadInput,
            Self::Thread(_) => Disposition::Retry,
            Self::Died => Disposition::Bug,
        }
    }
}

/// A sealed record on its way to the agent.
#[derive(Debug)]
pub struct SealedRecord {
    /// Epoch that it is sealed in.
    pub epoch: Epoch,
    /// The record.
    pub record: Record,
    /// Its metadata, for the epoch's close.
    pub meta: RecordMeta,
    /// What it changes in the page hashes, for the epoch's journal.
    pub change: HashChange,
    /// The record's bytes in the budget.
    pub permit: Permit,
}

/// What a pass puts out.
#[derive(Debug)]
pub enum PassOutput {
    /// A record; in no particular order.
    Sealed(SealedRecord),
    /// The whole cut was compared, and all records were put out.
    Finished(PassSummary),
    /// The pass ended early: what it put out must not become a point.
    Failed(PassError),
}

/// What a pass came to.
#[derive(Debug, Clone)]
pub struct PassSummary {
    /// Bytes read from the source disk.
    pub bytes_read: u64,
    /// Pages that differed, with content or zero.
    pub pages_changed: u64,
    /// Those of them that became zero.
    pub zero_pages: u64,
    /// Records sealed.
    pub records: u64,
    /// Bytes of the records.
    pub record_bytes: u64,
    /// What [`CutPages::finish`] said of the consistency of what was read.
    pub consistency: Option<Consistency>,
    /// Its reason.
    pub reason: String,
}

/// How far a pass is; read while it runs.
#[derive(Debug, Default)]
pub struct PassProgress {
    pages_done: AtomicU64,
    bytes_read: AtomicU64,
    pages_changed: AtomicU64,
    zero_pages: AtomicU64,
    records: AtomicU64,
    record_bytes: AtomicU64,
}

impl PassProgress {
    /// Bytes of the cut's pages compared so far.
    #[must_use]
    pub fn bytes_done(&self) -> u64 {
        self.pages_done.load(Ordering::Relaxed) * limits::PAGE_BYTES as u64
    }

    /// Bytes of the disk read so far.
    #[must_use]
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Pages that differed so far.
    #[must_use]
    pub fn pages_changed(&self) -> u64 {
        self.pages_changed.load(Ordering::Relaxed)
    }

    /// Bytes of records sealed so far.
    #[must_use]
    pub fn record_bytes(&self) -> u64 {
        self.record_bytes.load(Ordering::Relaxed)
    }
}

/// What a pass works on.
pub struct PassConfig {
    /// The cut's pages.
    pub pages: Arc<dyn CutPages>,
    /// Known hashes of what is committed.
    pub hashes: HashReader,
    /// Key of the page hashes.
    pub hash_key: [u8; 32],
    /// Where epochs come from.
    pub gate: Arc<EpochGate>,
    /// What records are charged to.
    pub budget: Budget,
    /// Bytes of sealed records that may wait for the volume's agent before its turn is passed over.
    pub outputs_bytes_max: u64,
    /// How fast its pages may be read, in bytes a second; `None` for as fast as can be.
    pub read_limit: Option<ByteRate>,
    /// The volume's name, a label of metrics.
    pub volume: String,
}

/// A running pass over one cut.
#[derive(Debug)]
pub struct Pass {
    outputs: mpsc::UnboundedReceiver<PassOutput>,
    job: Arc<Job>,
    pool: SealPool,
    ended: bool,
}

impl Pass {
    /// Begins to seal a cut.
    #[must_use]
    pub fn start(pool: &SealPool, config: PassConfig) -> Self {
        // Bounded by `outputs_max`: a job with more is not worked on.
        let (sender, outputs) = mpsc::unbounded_channel();
        let labels = [("volume", config.volume.clone())];
        let job = Arc::new(Job {
            read_counter: metrics::counter!("blockferry_sender_source_read_bytes_total", &labels),
            captured_counter: metrics::counter!("blockferry_sender_captured_bytes_total", &labels),
            progress: Arc::new(PassProgress::default()),
            state: Mutex::default(),
            guess: Mutex::default(),
            outstanding: AtomicUsize::new(0),
            outputs_max: usize::try_from(config.outputs_bytes_max / limits::RECORD_BYTES_MAX as u64)
                .map_or(OUTPUTS_MAX, |outputs| outputs.clamp(2, OUTPUTS_MAX)),
            stopped: AtomicBool::new(false),
            outputs: sender,
            config,
        });
        pool.inner.lock().jobs.push_back(Arc::clone(&job));
        pool.inner.work.notify_all();
        Self { outputs, job, pool: pool.clone(), ended: false }
    }

    /// The next output; after the last one `None`. Safe to cancel.
    pub async fn next(&mut self) -> Option<PassOutput> {
        if self.ended {
            return None;
        }
        let output = self.outputs.recv().await;
        self.taken(output)
    }

    /// As [`Self::next`], for threads outside the async runtime.
    pub fn next_blocking(&mut self) -> Option<PassOutput> {
        if self.ended {
            return None;
        }
        let output = self.outputs.blocking_recv();
        self.taken(output)
    }

    fn taken(&mut self, output: Option<PassOutput>) -> Option<PassOutput> {
        // The pool went away.
        let output = output.unwrap_or(PassOutput::Failed(PassError::Died));
        self.ended = !matches!(output, PassOutput::Sealed(_));
        if self.job.outstanding.fetch_sub(1, Ordering::AcqRel) == self.job.outputs_max {
            self.pool.inner.wake();
        }
        Some(output)
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Arc<PassProgress> {
        Arc::clone(&self.job.progress)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.job.stopped.store(true, Ordering::Release);
        // Closed before the agent restarts its epochs: what threads have yet to put out is given up with its ticket.
        self.outputs.close();
        let mut state = self.pool.inner.lock();
        state.jobs.retain(|job| !Arc::ptr_eq(job, &self.job));
    }
}

/// One pass as the workers see it.
struct Job {
    config: PassConfig,
    state: Mutex<JobState>,
    guess: Mutex<CompressionGuess>,
    progress: Arc<PassProgress>,
    outputs: mpsc::UnboundedSender<PassOutput>,
    /// Outputs that the agent has not taken.
    outstanding: AtomicUsize,
    outputs_max: usize,
    stopped: AtomicBool,
    read_counter: metrics::Counter,
    captured_counter: metrics::Counter,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Job({})", self.config.volume)
    }
}

#[derive(Debug, Default)]
struct JobState {
    order: Order,
    /// Workers that have something of it in hand.
    working: usize,
    exhausted: bool,
    finished: bool,
    failure: Option<PassError>,
    /// Under a limit, when the next piece may be read.
    next_read: Option<Instant>,
}

/// Something to do.
enum Work {
    /// Read, compare and seal a piece.
    Piece { number: u64, piece: Piece },
    /// Seal the last run of zeros.
    Run(ZeroRun),
    /// Say how it ended.
    Finish,
}

impl Job {
    fn lock(&self) -> MutexGuard<'_, JobState> {
        // Nothing that holds the lock panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something to do now; the worker calls [`Self::done`] after it. Where only a limit is in the way, `soonest` becomes the
    /// moment to look again, if that is sooner.
    fn take(&self, soonest: &mut Option<Instant>) -> Option<Work> {
        let mut state = self.lock();
        if state.finished || self.stopped.load(Ordering::Acquire) {
            return None;
        }
        if let Some(next) = state.next_read
            && next > Instant::now()
        {
            *soonest = Some(soonest.map_or(next, |soonest| soonest.min(next)));
            return None;
        }
        let over = state.exhausted || state.failure.is_some();
        if !over && self.outstanding.load(Ordering::Acquire) < self.outputs_max && state.order.has_room() {
            if let Some(piece) = self.config.pages.next() {
                state.working += 1;
                state.next_read = self.config.read_limit.map(|limit| next_read(state.next_read, &piece, limit));
                let number = state.order.hand_out();
                return Some(Work::Piece { number, piece });
            }
            state.exhausted = true;
        }
        if state.working > 0 || !(state.exhausted || state.failure.is_some()) {
            return None;
        }
        state.working += 1;
        if state.failure.is_none()
            && let Some(run) = state.order.last_run()
        {
            return Some(Work::Run(run));
        }
        state.finished = true;
        Some(Work::Finish)
    }

    fn done(&self, result: Result<(), PassError>) {
        let mut state = self.lock();
        state.working -= 1;
        if let Err(error) = result {
            state.failure.get_or_insert(error);
        }
    }

    fn put_out(&self, output: PassOutput) -> Result<(), Unwanted> {
        self.outstanding.fetch_add(1, Ordering::AcqRel);
        self.outputs.send(output).map_err(|_| Unwanted)
    }

    /// How it ended, once nobody works on it.
    fn ending(&self) -> PassOutput {
        if let Some(error) = self.lock().failure.take() {
            return PassOutput::Failed(error);
        }
        let load = |counter: &AtomicU64| counter.load(Ordering::Acquire);
        match self.config.pages.finish() {
            Ok((consistency, reason)) => PassOutput::Finished(PassSummary {
                bytes_read: load(&self.progress.bytes_read),
                pages_changed: load(&self.progress.pages_changed),
                zero_pages: load(&self.progress.zero_pages),
                records: load(&self.progress.records),
                record_bytes: load(&self.progress.record_bytes),
                consistency,
                reason,
            }),
            Err(error) => PassOutput::Failed(error.into()),
        }
    }
}

/// When the next piece may be read after this one.
fn next_read(last: Option<Instant>, piece: &Piece, limit: ByteRate) -> Instant {
    let pages: u64 = piece.masks.iter().map(|mask| u64::from(mask.count())).sum();
    let nanos = u128::from(pages * limits::PAGE_BYTES as u64) * 1_000_000_000 / u128::from(limit.0.max(1));
    let now = Instant::now();
    last.unwrap_or(now).max(now) + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// Nobody takes the output any more.
struct Unwanted;

/// The threads that seal. Clones are the same pool; its threads end with the last one.
#[derive(Debug, Clone)]
pub struct SealPool {
    inner: Arc<Inner>,
    _alive: Arc<Alive>,
}

#[derive(Debug)]
struct Inner {
    state: Mutex<PoolState>,
    work: Condvar,
    cpu: CpuSlots,
}

#[derive(Debug, Default)]
struct PoolState {
    /// In the order of their turns.
    jobs: VecDeque<Arc<Job>>,
    ended: bool,
}

#[derive(Debug)]
struct Alive(Arc<Inner>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.work.notify_all();
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, PoolState> {
        // Nothing that holds the lock panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets workers look again. Taken with the lock, so that none is about to fall asleep on an older look.
    fn wake(&self) {
        drop(self.lock());
        self.work.notify_all();
    }

    /// Waits for something to do, giving each job its turn; `None` at the end.
    fn take(&self) -> Option<(Arc<Job>, Work)> {
        let mut state = self.lock();
        loop {
            if state.ended {
                return None;
            }
            let mut soonest = None;
            for _ in 0..state.jobs.len() {
                let Some(job) = state.jobs.pop_front() else { break };
                let work = job.take(&mut soonest);
                if !matches!(work, Some(Work::Finish)) {
                    state.jobs.push_back(Arc::clone(&job));
                }
                if let Some(work) = work {
                    return Some((job, work));
                }
            }
            state = match soonest {
                Some(soonest) => {
                    let time = soonest.saturating_duration_since(Instant::now());
                    self.work.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.work.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

impl SealPool {
    /// Starts the threads: `seal_threads` (at least 1) may use the CPU at once.
    ///
    /// # Errors
    /// [`PassError::Seal`] where zstd refuses the level, [`PassError::Thread`].
    pub fn new(seal_threads: usize, zstd_level: i32) -> Result<Self, PassError> {
        let seal_threads = seal_threads.max(1);
        let inner = Arc::new(Inner { state: Mutex::default(), work: Condvar::new(), cpu: CpuSlots::new(seal_threads) });
        // Dropping the pool on an error here stops the threads that run already.
        let pool = Self { _alive: Arc::new(Alive(Arc::clone(&inner))), inner };
        for index in 0..seal_threads + READING_THREADS {
            let worker = Worker::new(Arc::clone(&pool.inner), Sealer::new(zstd_level)?);
            std::thread::Builder::new()
                .name(format!("seal-{index}"))
                .spawn(move || worker.run())
                .map_err(PassError::Thread)?;
        }
        Ok(pool)
    }
}

/// As many threads may compute at once.
#[derive(Debug)]
struct CpuSlots {
    free: Mutex<usize>,
    freed: Condvar,
}

#[derive(Debug)]
struct CpuSlot<'a>(&'a CpuSlots);

impl CpuSlots {
    fn new(count: usize) -> Self {
        Self { free: Mutex::new(count), freed: Condvar::new() }
    }

    fn enter(&self) -> CpuSlot<'_> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        while *free == 0 {
            free = self.freed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= 1;
        CpuSlot(self)
    }
}

impl Drop for CpuSlot<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.freed.notify_one();
    }
}

/// Leaves compression out where recent blocks did not shrink, and tries again now and then.
#[derive(Debug, Default)]
struct CompressionGuess {
    raw_in_a_row: u32,
    to_skip: u32,
}

impl CompressionGuess {
    fn next(&mut self) -> Compression {
        if self.to_skip > 0 {
            self.to_skip -= 1;
            return Compression::Skip;
        }
        Compression::Try
    }

    fn learn(&mut self, tried: Compression, codec: Codec) {
        match (tried, codec) {
            (Compression::Skip, _) => {}
            (Compression::Try, Codec::Zstd) => self.raw_in_a_row = 0,
            (Compression::Try, Codec::Raw) => {
                self.raw_in_a_row += 1;
                if self.raw_in_a_row >= RAW_BLOCKS_BEFORE_SKIP {
                    self.to_skip = BLOCKS_SKIPPED;
                }
            }
        }
    }
}
