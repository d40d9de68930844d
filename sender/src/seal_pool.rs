//! The threads of a scan pass: each reads a chunk of the disk, compares it with the known hashes, and seals what differs
//! while it is still in cache.
//!
//! ```text
//! Chunks ─▶ worker: read 1 MiB ─▶ compare ─▶ budget permit ─▶ epoch ticket ─▶ seal ─▶ bounded channel ─▶ agent
//! ```
//!
//! There are more threads than may use the CPU at once ([`PassConfig::seal_threads`]), so that some read while others seal.
//!
//! Promises: every block of the disk is compared once; a block that differs gives one record, and runs of blocks that
//! became zero give one record together; a record is charged to the budget from before it is made until its permit is dropped;
//! the last output is [`PassOutput::Finished`] or [`PassOutput::Failed`], and nothing is left out before a `Finished`.
//! Dropping the [`Pass`] ends it. Never: writes, or holds more than its fixed buffers beside what it was given permits for.

use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use common::budget::{Budget, BudgetError, Permit};
use common::error::{Dispose, Disposition};
use common::format::record::{Codec, Record, RecordMeta};
use common::format::state::{HashChange, HashEntry};
use common::ids::{BlockIndex, Epoch, Geometry};
use common::limits;
use common::seal::{Compression, SealError, Sealer};
use tokio::sync::mpsc;

use crate::capture::scan::{self, CHUNK_BLOCKS, CHUNK_BYTES, Chunks, ZeroRun};
use crate::capture::{CaptureError, Disk, PageBuffer, Rest, RestProbe};
use crate::epoch::{EpochError, EpochGate};
use crate::state::{HashReader, StateError};

#[cfg(test)]
mod tests;

/// Threads beyond those that may use the CPU: they wait for the disk meanwhile.
const READING_THREADS: usize = 2;
/// Fixed memory of one thread: its chunk, gathered pages, the sealer's scratch and its zstd context at fast levels.
const THREAD_BYTES: u64 = (CHUNK_BYTES + 3 * limits::BLOCK_BYTES + (1 << 20)) as u64;
/// Sealed records that may wait for the agent.
const OUTPUTS_MAX: usize = 64;
/// Blocks in a row that did not shrink before compression is left out.
const RAW_BLOCKS_BEFORE_SKIP: u32 = 8;
/// Blocks that are not tried then; after them one is.
const BLOCKS_SKIPPED: u32 = 31;

/// Fixed memory in bytes of a pass with `seal_threads`, to be set aside in the budget.
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
    #[error("a scan thread ended unexpectedly; this is a bug of blockferry-sender")]
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
    /// The whole disk was compared, and all records were put out.
    Finished(PassSummary),
    /// The pass ended early: what it put out must not become a point.
    Failed(PassError),
}

/// What a pass came to.
#[derive(Debug, Clone)]
pub struct PassSummary {
    /// Bytes of the disk read.
    pub bytes_read: u64,
    /// Pages that differed, with content or zero.
    pub pages_changed: u64,
    /// Those of them that became zero.
    pub zero_pages: u64,
    /// Records sealed.
    pub records: u64,
    /// Bytes of the records.
    pub record_bytes: u64,
    /// Whether the disk rested meanwhile.
    pub rest: Rest,
}

/// How far a pass is; read while it runs.
#[derive(Debug, Default)]
pub struct PassProgress {
    bytes_read: AtomicU64,
    pages_changed: AtomicU64,
    zero_pages: AtomicU64,
    records: AtomicU64,
    record_bytes: AtomicU64,
}

impl PassProgress {
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
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// Known hashes, from [`crate::state::VolumeState::begin_pass`].
    pub hashes: HashReader,
    /// Key of the page hashes.
    pub hash_key: [u8; 32],
    /// Where epochs come from.
    pub gate: Arc<EpochGate>,
    /// What records are charged to.
    pub budget: Budget,
    /// Threads that may use the CPU at once, at least 1.
    pub seal_threads: usize,
    /// zstd level.
    pub zstd_level: i32,
    /// The volume's name, a label of metrics.
    pub volume: String,
}

/// A running pass.
#[derive(Debug)]
pub struct Pass {
    outputs: mpsc::Receiver<PassOutput>,
    progress: Arc<PassProgress>,
    chunks: Arc<Chunks>,
    ended: bool,
}

impl Pass {
    /// Begins to watch whether the disk rests, which may take some milliseconds, and starts the threads.
    ///
    /// # Errors
    /// [`PassError::Seal`] where zstd refuses the level, [`PassError::Thread`].
    pub fn start(config: PassConfig) -> Result<Self, PassError> {
        let rest = config.disk.watch_rest();
        let geometry = config.disk.geometry();
        let (sender, outputs) = mpsc::channel(OUTPUTS_MAX);
        let chunks = Arc::new(Chunks::new(geometry));
        let progress = Arc::new(PassProgress::default());
        let seal_threads = config.seal_threads.max(1);
        let threads = seal_threads + READING_THREADS;
        let labels = [("volume", config.volume.clone())];
        let shared = Arc::new(Shared {
            read_counter: metrics::counter!("blockferry_sender_source_read_bytes_total", &labels),
            captured_counter: metrics::counter!("blockferry_sender_captured_bytes_total", &labels),
            geometry,
            chunks: Arc::clone(&chunks),
            cpu: CpuSlots::new(seal_threads),
            progress: Arc::clone(&progress),
            running: AtomicUsize::new(threads),
            rest: Mutex::new(Some(rest)),
            failure: Mutex::new(None),
            config,
        });
        let pass = Self { outputs, progress, chunks, ended: false };
        for index in 0..threads {
            let sealer = Sealer::new(shared.config.zstd_level)?;
            let (shared, sender) = (Arc::clone(&shared), sender.clone());
            // Dropping the pass on an error here stops the threads that run already.
            std::thread::Builder::new()
                .name(format!("scan-{index}"))
                .spawn(move || Worker::new(shared, sealer, sender).run())
                .map_err(PassError::Thread)?;
        }
        Ok(pass)
    }

    /// The next output; after the last one `None`. Safe to cancel.
    pub async fn next(&mut self) -> Option<PassOutput> {
        if self.ended {
            return None;
        }
        let output = self.outputs.recv().await;
        self.ending(output)
    }

    /// As [`Self::next`], for threads outside the async runtime.
    pub fn next_blocking(&mut self) -> Option<PassOutput> {
        if self.ended {
            return None;
        }
        let output = self.outputs.blocking_recv();
        self.ending(output)
    }

    fn ending(&mut self, output: Option<PassOutput>) -> Option<PassOutput> {
        // All threads went away without a last word: one of them died.
        let output = output.unwrap_or(PassOutput::Failed(PassError::Died));
        self.ended = !matches!(output, PassOutput::Sealed(_));
        Some(output)
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Arc<PassProgress> {
        Arc::clone(&self.progress)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.chunks.stop();
        // Closed before the agent restarts its epochs: what threads have yet to put out is given up with its ticket.
        self.outputs.close();
    }
}

/// As many threads may compute at once.
struct CpuSlots {
    free: Mutex<usize>,
    freed: Condvar,
}

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

struct Shared {
    config: PassConfig,
    geometry: Geometry,
    chunks: Arc<Chunks>,
    cpu: CpuSlots,
    progress: Arc<PassProgress>,
    /// Threads that have not ended.
    running: AtomicUsize,
    rest: Mutex<Option<RestProbe>>,
    failure: Mutex<Option<PassError>>,
    read_counter: metrics::Counter,
    captured_counter: metrics::Counter,
}

/// Why a worker stops before the end.
enum Stop {
    Failed(PassError),
    /// Nobody takes the output any more.
    Unwanted,
}

impl<E: Into<PassError>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

struct Worker {
    shared: Arc<Shared>,
    sealer: Sealer,
    outputs: mpsc::Sender<PassOutput>,
    chunk: PageBuffer,
    gathered: Vec<u8>,
    known: Vec<HashEntry>,
    guess: CompressionGuess,
}

impl Worker {
    fn new(shared: Arc<Shared>, sealer: Sealer, outputs: mpsc::Sender<PassOutput>) -> Self {
        Self {
            shared,
            sealer,
            outputs,
            chunk: PageBuffer::new(CHUNK_BYTES),
            gathered: Vec::with_capacity(limits::BLOCK_BYTES),
            known: Vec::with_capacity(CHUNK_BLOCKS),
            guess: CompressionGuess::default(),
        }
    }

    fn run(mut self) {
        while let Some(chunk) = self.shared.chunks.take() {
            match self.scan(chunk) {
                Ok(()) => {}
                Err(stop) => {
                    self.shared.chunks.stop();
                    if let Stop::Failed(error) = stop {
                        let mut failure = self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner);
                        failure.get_or_insert(error);
                    }
                    break;
                }
            }
        }
        // The last one to leave says how it ended; all that others put out lies before it in the channel.
        if self.shared.running.fetch_sub(1, Ordering::AcqRel) == 1 {
            let output = self.ending();
            // The agent may be gone.
            let _ = self.outputs.blocking_send(output);
        }
    }

    fn ending(&self) -> PassOutput {
        let shared = &self.shared;
        if let Some(error) = shared.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return PassOutput::Failed(error);
        }
        if let Err(error) = shared.config.disk.check_size() {
            return PassOutput::Failed(error.into());
        }
        let probe = shared.rest.lock().unwrap_or_else(PoisonError::into_inner).take();
        let load = |counter: &AtomicU64| counter.load(Ordering::Acquire);
        PassOutput::Finished(PassSummary {
            bytes_read: load(&shared.progress.bytes_read),
            pages_changed: load(&shared.progress.pages_changed),
            zero_pages: load(&shared.progress.zero_pages),
            records: load(&shared.progress.records),
            record_bytes: load(&shared.progress.record_bytes),
            rest: probe.unwrap_or_else(|| RestProbe::none("the disk was not watched")).finish(),
        })
    }

    fn scan(&mut self, chunk: u64) -> Result<(), Stop> {
        let shared = Arc::clone(&self.shared);
        let first = BlockIndex(chunk * CHUNK_BLOCKS as u64);
        shared.config.hashes.read(first, CHUNK_BLOCKS, &mut self.known)?;
        let blocks = self.known.len();
        let offset = chunk * CHUNK_BYTES as u64;
        shared.config.disk.read_at(offset, &mut self.chunk.bytes_mut()[..blocks * limits::BLOCK_BYTES])?;
        let read = (shared.geometry.disk_bytes() - offset).min(CHUNK_BYTES as u64);
        shared.progress.bytes_read.fetch_add(read, Ordering::Relaxed);
        shared.read_counter.increment(read);

        let _cpu = shared.cpu.enter();
        let mut zero_blocks = 0_u8;
        let mut differences = Vec::with_capacity(blocks);
        for (index, known) in self.known.iter().enumerate() {
            let block = BlockIndex(first.0 + index as u64);
            let bytes = &self.chunk.bytes()[index * limits::BLOCK_BYTES..][..limits::BLOCK_BYTES];
            let difference = scan::compare(&shared.config.hash_key, bytes, shared.geometry.pages_of(block), known);
            if difference.changed().is_empty() {
                continue;
            }
            let changed = u64::from(difference.changed().count());
            shared.progress.pages_changed.fetch_add(changed, Ordering::Relaxed);
            shared.progress.zero_pages.fetch_add(difference.zero.count().into(), Ordering::Relaxed);
            shared.captured_counter.increment(changed * limits::PAGE_BYTES as u64);
            if difference.all_zero {
                zero_blocks |= 1 << index;
            } else {
                differences.push((index, block, difference));
            }
        }
        // Told before sealing, which may have to wait for the budget.
        let runs = shared.chunks.compared(chunk, zero_blocks);
        for (index, block, difference) in differences {
            self.seal_block(index, block, difference)?;
        }
        runs.into_iter().try_for_each(|run| self.seal_run(run))
    }

    fn seal_block(&mut self, index: usize, block: BlockIndex, difference: scan::BlockDifference) -> Result<(), Stop> {
        let bytes = &self.chunk.bytes()[index * limits::BLOCK_BYTES..][..limits::BLOCK_BYTES];
        let pages = scan::gather(bytes, difference.data, &mut self.gathered);
        let most = limits::RECORD_HEADER_BYTES + limits::SEAL_TAG_BYTES + pages.len();
        let permit = self.shared.config.budget.acquire_blocking(most as u64)?;
        let ticket = self.shared.config.gate.ticket()?;
        let compression = self.guess.next();
        let record = self.sealer.seal_block(
            ticket.key(),
            block,
            difference.data,
            difference.zero,
            ticket.counter(),
            pages,
            compression,
        )?;
        if !pages.is_empty() {
            self.guess.learn(compression, record.header().codec);
        }
        let epoch = ticket.epoch();
        let length = record.bytes().len();
        self.put_out(epoch, record, difference.into_change(block), permit)?;
        ticket.seal_done(length);
        Ok(())
    }

    fn seal_run(&mut self, run: ZeroRun) -> Result<(), Stop> {
        let most = limits::RECORD_HEADER_BYTES + limits::SEAL_TAG_BYTES;
        let permit = self.shared.config.budget.acquire_blocking(most as u64)?;
        let ticket = self.shared.config.gate.ticket()?;
        let record = self.sealer.seal_zero_range(ticket.key(), run.first, run.count, ticket.counter());
        let change = HashChange::ZeroBlocks { first: run.first, count: run.count };
        let epoch = ticket.epoch();
        let length = record.bytes().len();
        self.put_out(epoch, record, change, permit)?;
        ticket.seal_done(length);
        Ok(())
    }

    fn put_out(&self, epoch: Epoch, record: Record, change: HashChange, mut permit: Permit) -> Result<(), Stop> {
        let meta = record.meta();
        permit.shrink(u64::from(meta.record_len));
        self.shared.progress.records.fetch_add(1, Ordering::Relaxed);
        self.shared.progress.record_bytes.fetch_add(meta.record_len.into(), Ordering::Relaxed);
        let sealed = SealedRecord { epoch, record, meta, change, permit };
        self.outputs.blocking_send(PassOutput::Sealed(sealed)).map_err(|_| Stop::Unwanted)
    }
}
