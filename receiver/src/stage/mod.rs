//! The stage: sealed records, durable in RocksDB from their acknowledgement until they are committed.
//!
//! # What callers may rely on
//!
//! - **Durable.** A [`Ticket`] completes with `Ok` only once its record or close survives a power cut. Records and closes
//!   become durable in the order in which they were submitted, batch by batch, a batch whole or not at all. So whoever
//!   submits a close after its records' tickets completed never finds a durable close without them.
//! - **Once.** A record that is staged, or on its way, is not staged again; its ticket says so and completes with the first.
//! - **Ended is ended.** A closed, dropped or released epoch takes no more records, also after a restart. Epoch numbers and
//!   batch numbers are never given out twice.
//! - **Bounded.** What waits to be durable is bounded in bytes; the index is bounded in records; space is bounded by
//!   [`VolumeIntake::admit`], which everyone awaits before reading the next record from a peer.
//! - **Fail-stop.** After a failure of the disk nothing more is acknowledged in this life of the stage.
//!
//! Keys are `(batch, volume, epoch, block)`; see [`common::format::stage_key`]. Large batches are sorted files, written,
//! synced and ingested, dropped whole once nothing in them is live; small ones go through RocksDB's log.

mod config;
mod db;
mod error;
mod gate;
mod index;
mod intake;
mod reader;
mod reclaim;
mod recover;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod wal;
mod writer;

use std::collections::HashMap;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;

use common::budget::Permit;
use common::format::close::Close;
use common::format::record::{Record, RecordMeta};
use common::format::stage_key::StageKey;
use common::ids::{BlockIndex, Epoch, SealTag, SessionId, VolumeId};
use common::limits;
use common::units::ByteCount;
use tokio::sync::{Semaphore, oneshot, watch};

pub use config::{CAPACITY_BYTES_MIN, MEMORY_BYTES_MIN, StageConfig};
pub use error::StageError;
pub use gate::Intake;
pub use index::EpochState;
pub use intake::VolumeIntake;
pub use reader::EpochReader;

use db::{Database, DatabaseMemory};
use gate::{Level, Waiting};
use index::{Begin, Freed, Index, VolumeRow};
use writer::{Job, Queue, Reply};

const METADATA_CHUNK_BYTES: usize = 512 << 10;

/// What a start found of one volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveredVolume {
    /// Volume.
    pub volume: VolumeId,
    /// The session that last wrote it here; nil if none was stored.
    pub session: SessionId,
    /// Epochs up to this one were released.
    pub released: Epoch,
    /// Smallest number that no epoch had here yet.
    pub next_epoch: Epoch,
    /// Staged epochs, ascending. Closed ones may be committed already: a crash can come before the release.
    pub epochs: Vec<EpochState>,
}

/// What a start found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Recovered {
    /// Volumes, ascending by identifier.
    pub volumes: Vec<RecoveredVolume>,
    /// What was damaged, named; none of it is in `volumes`. A closed epoch that lost a record is gone whole; an open one
    /// lacks that record, which will be sent again.
    pub damaged: Vec<StageError>,
}

pub(crate) struct State {
    index: Index,
    waiting: Waiting,
    connected: Waiting,
    /// Those who wait for a record that another stream submitted first.
    duplicates: HashMap<(VolumeId, Epoch, BlockIndex), Vec<Reply>>,
}

pub(crate) struct Shared {
    db: Database,
    config: StageConfig,
    state: Mutex<State>,
    /// Serialises what is written about volumes, so that an older row never overwrites a newer one.
    rows: Mutex<()>,
    intake: watch::Sender<Intake>,
    queue: Queue,
    slots: Arc<Semaphore>,
    reads: reader::Reads,
    reclaim: mpsc::Sender<reclaim::Work>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves the gate to where it belongs and wakes those who wait if it moved, or if space was freed.
    fn update_gate(&self, state: &mut State, freed: bool) {
        let level = Level {
            used_bytes: state.index.used_bytes(),
            records: state.index.records(),
            closed: state.index.closed(),
            freeing: state.index.is_freeing(),
        };
        #[expect(clippy::cast_precision_loss, reason = "a gauge")]
        {
            metrics::gauge!("blockferry_receiver_stage_used_bytes").set(level.used_bytes as f64);
            metrics::gauge!("blockferry_receiver_stage_records").set(level.records as f64);
        }
        let marks = self.config.marks();
        let mut filled = false;
        self.intake.send_if_modified(|now| {
            let waiting = state.waiting.volumes().map(|volume| (volume, state.index.open_bytes(volume)));
            let next = gate::decide(now, &marks, level, waiting);
            let changed = next != *now;
            filled = changed && *now == Intake::Open;
            *now = next;
            changed || freed
        });
        if filled {
            tracing::warn!(used = level.used_bytes, records = level.records, "the stage is full: intake stops");
            metrics::gauge!("blockferry_receiver_stage_intake_open").set(0.0);
            self.reclaim(Freed::default());
        } else if *self.intake.borrow() == Intake::Open {
            metrics::gauge!("blockferry_receiver_stage_intake_open").set(1.0);
        }
    }

    fn fail(&self, error: StageError) {
        metrics::gauge!("blockferry_receiver_stage_intake_open").set(0.0);
        self.intake.send_if_modified(|now| {
            let first = !matches!(now, Intake::Failed(_));
            if first {
                *now = Intake::Failed(error);
            }
            first
        });
    }

    fn failure(&self) -> Option<StageError> {
        match &*self.intake.borrow() {
            Intake::Failed(error) => Some(error.clone()),
            _ => None,
        }
    }

    fn reclaim(&self, freed: Freed) {
        let full = matches!(*self.intake.borrow(), Intake::Full { .. });
        if !freed.is_empty() || full {
            // The thread ends only with the stage; what it missed then is found at the next start.
            drop(self.reclaim.send(reclaim::Work::Free(freed)));
        }
    }
}

struct Threads {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
    reclaimer: Option<JoinHandle<()>>,
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.queue.stop();
        join(self.writer.take());
        drop(self.shared.reclaim.send(reclaim::Work::Stop));
        join(self.reclaimer.take());
        self.shared.fail(StageError::Stopped);
    }
}

fn join(thread: Option<JoinHandle<()>>) {
    if thread.is_some_and(|thread| thread.join().is_err()) {
        tracing::error!("a thread of the stage panicked");
    }
}

/// The stage; clones share it. Dropping the last one writes what is queued and blocks until that is done.
#[derive(Clone)]
pub struct Stage {
    shared: Arc<Shared>,
    threads: Arc<Threads>,
}

impl std::fmt::Debug for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stage({})", self.shared.db.dir().display())
    }
}

/// Completes once a record or close is durable. Dropping it changes nothing.
#[derive(Debug)]
pub struct Ticket {
    resent: bool,
    reply: Option<oneshot::Receiver<Result<(), StageError>>>,
}

impl Ticket {
    /// True where the record was staged, or on its way, before.
    #[must_use]
    pub fn is_resent(&self) -> bool {
        self.resent
    }
}

impl Future for Ticket {
    type Output = Result<(), StageError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.reply {
            None => Poll::Ready(Ok(())),
            Some(reply) => Pin::new(reply).poll(cx).map(|reply| reply.unwrap_or(Err(StageError::Stopped))),
        }
    }
}

impl Stage {
    /// Opens or creates the stage in `dir` and reads all that is in it. Blocks, for a full stage some seconds per ten GiB.
    ///
    /// # Errors
    /// [`StageError::Locked`], [`StageError::NoSpace`], [`StageError::ReadOnly`], [`StageError::Damaged`],
    /// [`StageError::Version`], [`StageError::Io`]. Damage of single records is no error, but named in [`Recovered`].
    pub fn open(dir: &Path, config: StageConfig) -> Result<(Self, Recovered), StageError> {
        let memory = DatabaseMemory { write_buffer_bytes: config.write_buffer_bytes, cache_bytes: config.cache_bytes };
        let db = Database::open(dir, memory)?;
        let mut index = Index::new(config.metas_max);
        let findings = recover::recover(&db, &mut index)?;
        // The ceiling may be among what a damaged log lost.
        let first_batch = db.ceiling()?.max(index.next_batch());
        for error in &findings.damaged {
            tracing::error!(%error, "damaged staged data");
            metrics::counter!("blockferry_receiver_errors_total", "kind" => error.kind()).increment(1);
        }
        let recovered = Recovered {
            volumes: index.volumes().into_iter().map(|volume| recovered(&index, volume)).collect(),
            damaged: findings.damaged,
        };
        #[expect(clippy::cast_precision_loss, reason = "a gauge")]
        metrics::gauge!("blockferry_receiver_stage_capacity_bytes").set(config.capacity_bytes as f64);
        warn_if_disk_is_smaller(dir, config.capacity_bytes.saturating_sub(index.used_bytes()));
        let (reclaim, work) = mpsc::channel();
        let shared = Arc::new(Shared {
            db,
            config,
            state: Mutex::new(State {
                index,
                waiting: Waiting::default(),
                connected: Waiting::default(),
                duplicates: HashMap::new(),
            }),
            rows: Mutex::new(()),
            intake: watch::Sender::new(Intake::Open),
            queue: Queue::default(),
            reads: reader::Reads::new(config.reads_max),
            slots: Arc::new(Semaphore::new(config.queue_bytes.max(limits::RECORD_BYTES_MAX))),
            reclaim,
        });
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run);
            thread.map_err(|error| StageError::from_io(dir, &error))
        };
        let writer = Arc::clone(&shared);
        let writer = spawn("stage-writer", Box::new(move || writer::run(&writer, first_batch)))?;
        let mut threads = Threads { shared: Arc::clone(&shared), writer: Some(writer), reclaimer: None };
        let reclaimer = Arc::clone(&shared);
        threads.reclaimer = Some(spawn("stage-reclaim", Box::new(move || reclaim::run(&reclaimer, &work)))?);
        shared.update_gate(&mut shared.lock(), false);
        shared.reclaim(findings.freed);
        Ok((Self { shared, threads: Arc::new(threads) }, recovered))
    }

    /// Writes what is queued, then closes the database. Other handles must be gone, else the last of them does it.
    pub async fn shutdown(self) {
        let Self { shared, threads } = self;
        drop(shared);
        // Blocks; a panic in there was logged by the thread that it happened in.
        drop(tokio::task::spawn_blocking(move || drop(threads)).await);
    }

    /// Queues a record. Waits while too many bytes wait to be durable. Safe to cancel: then the record is not queued.
    ///
    /// Takes the record's memory permit and gives it back once the record is durable, or is found to be staged already.
    /// Does not ask the gate; see [`Self::intake_of`].
    ///
    /// # Errors
    /// [`StageError::EpochEnded`], [`StageError::Conflict`]; the stage's failure, if it failed; [`StageError::Stopped`].
    pub async fn submit(&self, record: Record, permit: Option<Permit>) -> Result<Ticket, StageError> {
        let meta = record.meta();
        self.submit_with(record, meta, permit).await
    }

    /// As [`Self::submit`], with metadata that the caller has computed from the record.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub async fn submit_with(
        &self,
        record: Record,
        meta: RecordMeta,
        permit: Option<Permit>,
    ) -> Result<Ticket, StageError> {
        let shared = &self.shared;
        let header = *record.header();
        let slot = Arc::clone(&shared.slots).acquire_many_owned(meta.record_len).await;
        let slot = slot.map_err(|_| StageError::Stopped)?;
        if let Some(error) = shared.failure() {
            return Err(error);
        }
        let key = (header.volume, header.epoch, header.block);
        let (reply, answer) = oneshot::channel();
        {
            let mut state = shared.lock();
            match state.index.begin(header.volume, header.epoch, meta)? {
                Begin::New => {}
                Begin::Staged => return Ok(Ticket { resent: true, reply: None }),
                Begin::Pending => {
                    state.duplicates.entry(key).or_default().push(reply);
                    return Ok(Ticket { resent: true, reply: Some(answer) });
                }
            }
            shared.update_gate(&mut state, false);
        }
        let (volume, epoch, block) = key;
        self.push(Job { volume, epoch, block, value: record.into_bytes(), reply, permit, slot: Some(slot) })?;
        Ok(Ticket { resent: false, reply: Some(answer) })
    }

    /// Queues the close of an epoch. All of the epoch's records must be durable, and the close checked, before.
    ///
    /// # Errors
    /// [`StageError::EpochEnded`] where another close of the epoch is staged, or it was dropped or released;
    /// [`StageError::Incomplete`] where records of it are missing or not yet durable; as [`Self::submit`].
    pub fn submit_close(&self, close: &Close) -> Result<Ticket, StageError> {
        let shared = &self.shared;
        if let Some(error) = shared.failure() {
            return Err(error);
        }
        let (volume, epoch) = (close.statement().volume, close.statement().epoch);
        let (reply, answer) = oneshot::channel();
        {
            let mut state = shared.lock();
            let found = state.index.state(volume, epoch).map_or(0, |state| state.records);
            if !state.index.begin_close(close)? {
                let durable = state.index.state(volume, epoch).is_some_and(|state| state.close.is_some());
                if durable {
                    return Ok(Ticket { resent: true, reply: None });
                }
                state.duplicates.entry((volume, epoch, StageKey::CLOSE)).or_default().push(reply);
                return Ok(Ticket { resent: true, reply: Some(answer) });
            }
            let expected = close.statement().records;
            if found != expected {
                state.index.failed(volume, epoch, StageKey::CLOSE, close.bytes().len() as u64);
                return Err(StageError::Incomplete { volume, epoch, found, expected });
            }
        }
        let value = bytes::Bytes::copy_from_slice(close.bytes());
        self.push(Job { volume, epoch, block: StageKey::CLOSE, value, reply, permit: None, slot: None })?;
        Ok(Ticket { resent: false, reply: Some(answer) })
    }

    fn push(&self, job: Job) -> Result<(), StageError> {
        self.shared.queue.push(job).map_err(|job| {
            let len = job.value.len() as u64;
            self.shared.lock().index.failed(job.volume, job.epoch, job.block, len);
            StageError::Stopped
        })
    }

    /// Whether records are taken in; changes wake the listener.
    #[must_use]
    pub fn intake(&self) -> watch::Receiver<Intake> {
        self.shared.intake.subscribe()
    }

    /// Bytes of records staged or on their way, those not yet deleted from the disk included.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.shared.lock().index.used_bytes()
    }

    /// The stage's sizes.
    #[must_use]
    pub fn config(&self) -> &StageConfig {
        &self.shared.config
    }

    /// What is known of a volume now.
    #[must_use]
    pub fn volume(&self, volume: VolumeId) -> RecoveredVolume {
        recovered(&self.shared.lock().index, volume)
    }

    /// Every volume of which something is known.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeId> {
        self.shared.lock().index.volumes()
    }

    /// First block and tag of each durable record of an epoch, by block; empty for an epoch that is not staged.
    #[must_use]
    pub fn staged_records(&self, volume: VolumeId, epoch: Epoch) -> Vec<(BlockIndex, SealTag)> {
        self.shared.lock().index.tags(volume, epoch)
    }

    /// Metadata of all durable records of an epoch, by block: from memory, else by reading the records again.
    ///
    /// # Errors
    /// [`StageError::NoSuchEpoch`], [`StageError::DamagedRecord`], failures of the disk.
    pub async fn epoch_meta(&self, volume: VolumeId, epoch: Epoch) -> Result<Vec<RecordMeta>, StageError> {
        if let Some(metas) = self.shared.lock().index.metas(volume, epoch) {
            return Ok(metas);
        }
        let mut reader = self.read_epoch(volume, epoch)?;
        self.blocking(move |_| {
            let mut metas = Vec::new();
            loop {
                let chunk = reader.next_chunk(METADATA_CHUNK_BYTES)?;
                if chunk.is_empty() {
                    break;
                }
                metas.extend(chunk.iter().map(Record::meta));
            }
            metas.sort_by_key(|meta: &RecordMeta| meta.block);
            Ok(metas)
        })
        .await
    }

    /// Reads the durable records of an epoch.
    ///
    /// # Errors
    /// [`StageError::NoSuchEpoch`].
    pub fn read_epoch(&self, volume: VolumeId, epoch: Epoch) -> Result<EpochReader, StageError> {
        EpochReader::new(Arc::clone(&self.shared), volume, epoch)
    }

    /// Stores which session writes a volume. Durable once it returns.
    ///
    /// # Errors
    /// Failures of the disk.
    pub async fn set_session(&self, volume: VolumeId, session: SessionId) -> Result<(), StageError> {
        self.blocking(move |shared| {
            let _rows = shared.rows.lock().unwrap_or_else(PoisonError::into_inner);
            let row = {
                let mut state = shared.lock();
                let row = VolumeRow { session, ..state.index.row(volume) };
                state.index.set_row(volume, row);
                row
            };
            shared.db.set_row(volume, row)
        })
        .await
    }

    /// Drops an epoch, open or closed, that will not be committed. Its number is not used again; its space is freed soon
    /// after. That it is dropped is durable once this returns.
    ///
    /// # Errors
    /// Failures of the disk.
    pub async fn drop_epoch(&self, volume: VolumeId, epoch: Epoch) -> Result<(), StageError> {
        self.blocking(move |shared| {
            let _rows = shared.rows.lock().unwrap_or_else(PoisonError::into_inner);
            let (freed, row) = {
                let mut state = shared.lock();
                let freed = state.index.drop_epoch(volume, epoch);
                shared.update_gate(&mut state, false);
                (freed, state.index.row(volume))
            };
            shared.db.set_dropped(volume, &[epoch], row)?;
            shared.reclaim(freed);
            Ok(())
        })
        .await
    }

    /// Forgets the records of an open epoch to make room; more of it may come. Its space is freed soon after. Not durable: after
    /// a crash some of the records may be found again, each as it was acknowledged.
    ///
    /// # Errors
    /// Failures of the disk.
    pub async fn forget_open(&self, volume: VolumeId, epoch: Epoch) -> Result<(), StageError> {
        self.blocking(move |shared| {
            let mut state = shared.lock();
            let freed = state.index.forget_open(volume, epoch);
            shared.update_gate(&mut state, false);
            drop(state);
            shared.reclaim(freed);
            Ok(())
        })
        .await
    }

    /// Gives up all epochs of a volume up to `up_to`: they are committed. Their space is freed soon after.
    ///
    /// # Errors
    /// Failures of the disk.
    pub async fn release(&self, volume: VolumeId, up_to: Epoch) -> Result<(), StageError> {
        self.blocking(move |shared| {
            let _rows = shared.rows.lock().unwrap_or_else(PoisonError::into_inner);
            let (freed, marks, row) = {
                let mut state = shared.lock();
                let (freed, marks) = state.index.release(volume, up_to);
                shared.update_gate(&mut state, false);
                (freed, marks, state.index.row(volume))
            };
            // Before any of it is deleted, so that a start never finds half of a committed epoch and calls it damaged.
            shared.db.set_released(volume, row, &marks)?;
            shared.reclaim(freed);
            Ok(())
        })
        .await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        run: impl FnOnce(&Shared) -> Result<T, StageError> + Send + 'static,
    ) -> Result<T, StageError> {
        let shared = Arc::clone(&self.shared);
        // The runtime stops, or the closure panicked: nothing can be said of the disk any more.
        let result = tokio::task::spawn_blocking(move || {
            let result = run(&shared);
            if let Err(error) = &result
                && error.is_fatal()
            {
                metrics::counter!("blockferry_receiver_errors_total", "kind" => error.kind()).increment(1);
                shared.fail(error.clone());
            }
            result
        });
        result.await.unwrap_or(Err(StageError::Stopped))
    }
}

fn recovered(index: &Index, volume: VolumeId) -> RecoveredVolume {
    let row = index.row(volume);
    RecoveredVolume {
        volume,
        session: row.session,
        released: row.released,
        next_epoch: row.next_epoch,
        epochs: index.states(volume),
    }
}

fn warn_if_disk_is_smaller(dir: &Path, wanted: u64) {
    let Ok(stat) = rustix::fs::statvfs(dir) else { return };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < wanted {
        tracing::warn!(
            dir = %dir.display(),
            free = %ByteCount(free),
            wanted = %ByteCount(wanted),
            "the stage's file system is smaller than --stage-capacity: intake will fail when it is full, not wait"
        );
    }
}
