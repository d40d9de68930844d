//! From the stage to the store: closed epochs become segments, then log entries, then are given up by the stage.
//!
//! One task for each volume reads closed epochs in parent order, checks each against its close once more, packs them into
//! segments and hands these to uploads, of which a bounded number runs for all volumes together. A second half of the task
//! waits for an entry's uploads, creates the entry, tells, and releases, in the order that [`order`] fixes; the next entry's
//! segments are built meanwhile.
//!
//! Promises: an epoch is whole in one log entry; what was told is in the log; nothing is released before; a store that fails
//! is tried again for ever, with backoff and jitter; memory for a segment is charged before its records are read and until it
//! is stored. Needs at least one segment's bytes of budget, and makes segments smaller where there is less.
//! Never: opens a record, or reorders epochs.

pub mod bundle;
mod commit;
mod hold;
pub mod order;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use catalog::store::Store;
use catalog::volume::header::{self, HeaderError};
use catalog::volume::{LogError, LogWriter, VolumeView, paths};
use common::budget::{Budget, BudgetError, Permit};
use common::clock::Clock;
use common::format::close::Close;
use common::format::frame::RefusalCode;
use common::format::log::SegmentRef;
use common::format::record::{Record, RecordMeta};
use common::format::volume_header::VolumeHeader;
use common::ids::{CloseId, Epoch, ReceiverId, VolumeId};
use common::limits;
use common::net::backoff::Backoff;
use common::rng::{self, RngError};
use common::seal::merkle;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::task::AbortOnDropHandle;

use crate::stage::{Stage, StageError};
use crate::volumes::{Forwarding, Hold};
use bundle::{Bundler, Segment, segment_cost};
pub use hold::Taken;
use hold::{Held, Parked};
use order::{Head, Plan, Step};

const BACKOFF_BASE: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// Read from the stage at once, within a segment.
const CHUNK_BYTES: u64 = 4 << 20;

/// How to forward.
#[derive(Debug, Clone, Copy)]
pub struct ForwardConfig {
    /// This receiver.
    pub receiver: ReceiverId,
    /// Segments are cut at this size in bytes.
    pub segment_bytes: u64,
    /// How long epochs without a point may wait for others to share a segment.
    pub linger: Duration,
    /// Segments uploaded at once, over all volumes.
    pub upload_concurrency: usize,
}

/// What happened to a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ForwardEvent {
    /// A close, and all before it, is in the log.
    Committed {
        /// Volume.
        volume: VolumeId,
        /// The close.
        close: CloseId,
    },
    /// The volume is not forwarded any more until closes of it are handed in anew, from the log's head on.
    Lost {
        /// Volume.
        volume: VolumeId,
        /// Under which right to write its log.
        hold: Hold,
        /// What its sender is to be told: whether another receiver owns the volume's log now.
        code: RefusalCode,
        /// For people.
        text: String,
    },
}

/// Why a volume can't be forwarded any more.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error(transparent)]
    Stage(#[from] StageError),
    #[error(transparent)]
    Budget(#[from] BudgetError),
    #[error(transparent)]
    Rng(#[from] RngError),
    #[error("the close of epoch {epoch} follows close {parent}, but the log's head is {head} of epoch {head_epoch}")]
    Broken { epoch: Epoch, parent: CloseId, head: CloseId, head_epoch: Epoch },
    #[error(
        "staged epoch {epoch} is not what its close states: {what}; its pages are read again from the protected disk"
    )]
    Mismatch { epoch: Epoch, what: String },
    #[error("receiver {winner} has taken the volume's log over")]
    Elsewhere { winner: ReceiverId },
    #[error("a task of the forwarder ended early")]
    Task,
    #[cfg(test)]
    #[error("crashed on purpose")]
    Crashed,
}

impl Lost {
    fn kind(&self) -> &'static str {
        match self {
            Self::Log(LogError::Fenced { .. }) | Self::Elsewhere { .. } => "fenced",
            Self::Log(_) | Self::Header(_) => "forward_log",
            Self::Stage(error) => error.kind(),
            Self::Budget(_) => "forward_budget",
            Self::Broken { .. } => "forward_order",
            Self::Mismatch { .. } => "stage_damaged",
            _ => "forward_failed",
        }
    }
}

struct Lane {
    closes: mpsc::UnboundedSender<Close>,
    number: u64,
}

#[derive(Default)]
struct Lanes {
    open: HashMap<VolumeId, Lane>,
    held: HashMap<VolumeId, Held>,
    tasks: JoinSet<()>,
    next_number: u64,
    next_hold: u64,
    draining: bool,
}

struct Shared {
    stage: Stage,
    store: Store,
    config: ForwardConfig,
    budget: Budget,
    clock: Clock,
    uploads: Arc<Semaphore>,
    events: mpsc::UnboundedSender<ForwardEvent>,
    lanes: Mutex<Lanes>,
    /// Where tests have a volume's task stop as a crash would.
    #[cfg(test)]
    crash_before: Option<Step>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: ForwardEvent) {
        // Nobody listens any more while shutting down; the log says it all.
        drop(self.events.send(event));
    }

    #[cfg_attr(not(test), expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "tests crash here"))]
    fn crash_point(&self, step: Step) -> Result<(), Lost> {
        #[cfg(test)]
        if self.crash_before == Some(step) {
            return Err(Lost::Crashed);
        }
        let _ = step;
        Ok(())
    }
}

/// Forwards the closed epochs of all volumes.
pub struct Forwarder {
    shared: Arc<Shared>,
    events: Mutex<Option<mpsc::UnboundedReceiver<ForwardEvent>>>,
}

impl std::fmt::Debug for Forwarder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Forwarder({} volumes)", self.shared.lock().open.len())
    }
}

/// Hands closed epochs to the forwarder; clones share it.
#[derive(Clone)]
pub struct ForwardHandle {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for ForwardHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ForwardHandle")
    }
}

impl Forwarder {
    /// A forwarder with nothing to do yet. `budget` is the memory for segments; their size is capped to it. Must be called
    /// within a runtime.
    #[must_use]
    pub fn start(stage: Stage, store: Store, config: ForwardConfig, budget: Budget, clock: Clock) -> Self {
        let (events, receiver) = mpsc::unbounded_channel();
        let segment_bytes = config.segment_bytes.min(budget.payload()).min(limits::SEGMENT_BYTES_MAX);
        let shared = Shared {
            stage,
            store,
            config: ForwardConfig { segment_bytes, ..config },
            budget,
            clock,
            uploads: Arc::new(Semaphore::new(config.upload_concurrency.max(1))),
            events,
            lanes: Mutex::default(),
            #[cfg(test)]
            crash_before: None,
        };
        Self { shared: Arc::new(shared), events: Mutex::new(Some(receiver)) }
    }

    /// What happens from now on. Only the first call gets it; later ones get a channel that says nothing.
    pub fn events(&self) -> mpsc::UnboundedReceiver<ForwardEvent> {
        let first = self.events.lock().unwrap_or_else(PoisonError::into_inner).take();
        first.unwrap_or_else(|| mpsc::unbounded_channel().1)
    }

    /// Where closed epochs are handed in.
    #[must_use]
    pub fn handle(&self) -> ForwardHandle {
        ForwardHandle { shared: Arc::clone(&self.shared) }
    }

    /// Has every volume's task stop before `step`, as a crash would.
    #[cfg(test)]
    fn crashing_before(mut self, step: Step) -> Self {
        Arc::get_mut(&mut self.shared).expect("no task has started").crash_before = Some(step);
        self
    }

    fn stop(&self) -> JoinSet<()> {
        let mut lanes = self.shared.lock();
        lanes.draining = true;
        lanes.open.clear();
        std::mem::take(&mut lanes.tasks)
    }

    /// Takes no more epochs, and waits until all that were handed in are committed and released. While the store is out of
    /// reach it does not return; dropping the future ends all at once, which loses nothing.
    pub async fn drain(self) {
        let mut tasks = self.stop();
        while tasks.join_next().await.is_some() {}
    }
}

impl Drop for Forwarder {
    /// Ends all at once; see [`Self::drain`].
    fn drop(&mut self) {
        drop(self.stop());
    }
}

impl Forwarding for ForwardHandle {
    fn closed(&self, volume: VolumeId, hold: Hold, close: Close) {
        let mut lanes = self.shared.lock();
        if lanes.draining {
            // It stays staged and is forwarded after the next start.
            return;
        }
        if hold != Hold::NONE && lanes.held.get(&volume).is_none_or(|held| held.hold != hold) {
            // Of an earlier load of the volume, whose right is lost: what becomes of it is decided at the next load.
            return;
        }
        while lanes.tasks.try_join_next().is_some() {}
        let close = match lanes.open.get(&volume) {
            Some(lane) => match lane.closes.send(close) {
                Ok(()) => return,
                Err(unsent) => unsent.0,
            },
            None => close,
        };
        let (sender, receiver) = mpsc::unbounded_channel();
        // Its receiver is right here.
        drop(sender.send(close));
        lanes.next_number += 1;
        let number = lanes.next_number;
        lanes.open.insert(volume, Lane { closes: sender, number });
        lanes.tasks.spawn(run(Arc::clone(&self.shared), volume, number, hold, receiver));
    }
}

/// Forwards one volume until its channel ends, or it is lost.
async fn run(shared: Arc<Shared>, volume: VolumeId, number: u64, hold: Hold, closes: mpsc::UnboundedReceiver<Close>) {
    let result = Box::pin(forward(&shared, volume, hold, closes)).await;
    let current = {
        let mut lanes = shared.lock();
        let current = lanes.open.get(&volume).is_some_and(|lane| lane.number == number);
        if current {
            lanes.open.remove(&volume);
            if result.is_err() && lanes.held.get(&volume).is_some_and(|held| held.hold == hold) {
                // Nothing more is taken under this right: the volume is loaded anew first.
                lanes.held.remove(&volume);
            }
        }
        current
    };
    let Err(lost) = result else { return };
    let code = match lost {
        Lost::Log(LogError::Fenced { .. }) | Lost::Elsewhere { .. } => RefusalCode::Fenced,
        _ => RefusalCode::Failed,
    };
    metrics::counter!("blockferry_receiver_errors_total", "kind" => lost.kind()).increment(1);
    if code == RefusalCode::Fenced {
        tracing::warn!(
            %volume, error = %lost,
            "this receiver lost the volume to another one: what is staged of it here is dropped, its sender sends the pages again"
        );
    } else {
        tracing::error!(%volume, error = %lost, "a volume is not forwarded any more");
    }
    if current {
        shared.tell(ForwardEvent::Lost { volume, hold, code, text: lost.to_string() });
    }
}

async fn forward(
    shared: &Arc<Shared>,
    volume: VolumeId,
    hold: Hold,
    closes: mpsc::UnboundedReceiver<Close>,
) -> Result<(), Lost> {
    let parked =
        shared.lock().held.get_mut(&volume).filter(|held| held.hold == hold).and_then(|held| held.parked.take());
    let Parked { header, writer, head, entries } = match parked {
        Some(parked) => *parked,
        None if hold == Hold::NONE => {
            let header = read_header(shared, volume).await?;
            let (writer, view) = open_log(shared, &header).await?;
            *Parked::new(header, writer, &view)
        }
        None => return Err(Lost::Task),
    };
    // Committed before a crash, and not yet given up then.
    shared.stage.release(volume, head.epoch).await?;
    let (batches, committed) = mpsc::channel(1);
    tokio::try_join!(
        build(shared, volume, head, closes, batches),
        commit::commit(shared, hold, header, writer, entries, committed)
    )?;
    Ok(())
}

async fn read_header(shared: &Shared, volume: VolumeId) -> Result<VolumeHeader, Lost> {
    let mut patience = Patience::new(volume, "read the volume's header");
    loop {
        match header::read(&shared.store, volume).await {
            Ok(stored) => return Ok(stored.header),
            Err(HeaderError::Store(error)) => patience.after(&error, error.kind()).await,
            Err(error) => return Err(error.into()),
        }
    }
}

/// One log entry in the making.
struct Batch {
    uploads: Vec<AbortOnDropHandle<Result<SegmentRef, Lost>>>,
    /// Closes, and which of the segments hold their records.
    epochs: Vec<(Close, Vec<u32>)>,
}

/// Builds log entries' segments, in parent order, until the channel of closes ends.
async fn build(
    shared: &Arc<Shared>,
    volume: VolumeId,
    mut head: Head,
    mut closes: mpsc::UnboundedReceiver<Close>,
    batches: mpsc::Sender<Batch>,
) -> Result<(), Lost> {
    let mut waiting: VecDeque<Close> = VecDeque::new();
    loop {
        if waiting.is_empty() {
            match closes.recv().await {
                Some(close) => waiting.push_back(close),
                None => return Ok(()),
            }
        }
        gather(shared, &mut closes, &mut waiting).await;
        match order::plan(head, waiting.iter()) {
            Plan::Nothing => {}
            Plan::Committed(known) => {
                for close in waiting.drain(..known) {
                    shared.tell(ForwardEvent::Committed { volume, close: close.id() });
                }
            }
            Plan::Commit(count) => {
                let taken: Vec<Close> = waiting.drain(..count).collect();
                head = taken.last().map_or(head, Head::after);
                let batch = bundle(shared, volume, taken).await?;
                if batches.send(batch).await.is_err() {
                    return Err(Lost::Task);
                }
            }
            Plan::Broken => {
                let statement = waiting.front().map(Close::statement);
                let (epoch, parent) = statement.map_or_else(Default::default, |close| (close.epoch, close.parent));
                return Err(Lost::Broken { epoch, parent, head: head.close, head_epoch: head.epoch });
            }
        }
    }
}

/// Waits a little for more closes, unless those at hand are worth an entry.
async fn gather(shared: &Shared, closes: &mut mpsc::UnboundedReceiver<Close>, waiting: &mut VecDeque<Close>) {
    let until = tokio::time::Instant::now() + shared.config.linger;
    loop {
        while let Ok(close) = closes.try_recv() {
            waiting.push_back(close);
        }
        if order::is_due(waiting.iter(), shared.config.segment_bytes) {
            return;
        }
        match tokio::time::timeout_at(until, closes.recv()).await {
            Ok(Some(close)) => waiting.push_back(close),
            // Time is up, or the forwarder drains.
            Ok(None) | Err(_) => return,
        }
    }
}

/// Reads epochs from the stage into segments and starts their uploads.
async fn bundle(shared: &Arc<Shared>, volume: VolumeId, closes: Vec<Close>) -> Result<Batch, Lost> {
    let total = |f: fn(&Close) -> u64| closes.iter().map(f).sum::<u64>();
    let mut rest = segment_cost(
        closes.len() as u64,
        total(|close| close.statement().records),
        total(|close| close.statement().record_bytes),
    );
    let mut batch = Batch { uploads: Vec::new(), epochs: Vec::with_capacity(closes.len()) };
    let mut open: Option<(Bundler, Permit)> = None;
    for close in closes {
        let mut segments: Vec<u32> = Vec::new();
        if close.statement().records > 0 {
            read_epoch(shared, volume, &close, &mut batch, &mut open, &mut rest, &mut segments).await?;
        }
        batch.epochs.push((close, segments));
    }
    if let Some((bundler, permit)) = open {
        hand_over(shared, volume, bundler, permit, &mut batch)?;
    }
    Ok(batch)
}

async fn read_epoch(
    shared: &Arc<Shared>,
    volume: VolumeId,
    close: &Close,
    batch: &mut Batch,
    open: &mut Option<(Bundler, Permit)>,
    rest: &mut u64,
    segments: &mut Vec<u32>,
) -> Result<(), Lost> {
    let epoch = close.statement().epoch;
    let mut reader = shared.stage.read_epoch(volume, epoch)?;
    let mut metas: Vec<RecordMeta> = Vec::new();
    loop {
        let (mut bundler, mut permit) = match open.take() {
            Some(open) => open,
            None => new_segment(shared, *rest).await?,
        };
        let bytes_max = usize::try_from(bundler.room().min(CHUNK_BYTES)).unwrap_or(usize::MAX).max(1);
        let read = tokio::task::spawn_blocking(move || {
            let chunk = reader.next_chunk(bytes_max);
            let hashed = |record: Record| (record.meta(), record);
            (reader, chunk.map(|records| records.into_iter().map(hashed).collect::<Vec<_>>()))
        });
        let (back, chunk) = read.await.map_err(|_| Lost::Task)?;
        reader = back;
        let chunk = match chunk {
            Ok(chunk) => chunk,
            Err(error) => {
                if let StageError::DamagedRecord { .. } = error {
                    drop_damaged(shared, volume, epoch).await?;
                }
                return Err(error.into());
            }
        };
        let last = chunk.is_empty();
        for (meta, record) in chunk {
            if !bundler.fits(&record) {
                hand_over(shared, volume, bundler, permit, batch)?;
                (bundler, permit) = new_segment(shared, *rest).await?;
            }
            let number = u32::try_from(batch.uploads.len()).unwrap_or(u32::MAX);
            if segments.last() != Some(&number) {
                segments.push(number);
            }
            *rest = rest.saturating_sub(segment_cost(0, 1, meta.record_len.into()) - segment_cost(0, 0, 0));
            bundler.push(record, meta);
            metas.push(meta);
        }
        *open = Some((bundler, permit));
        if last {
            break;
        }
    }
    let checked = tokio::task::spawn_blocking({
        let close = close.clone();
        move || check_epoch(&close, metas)
    });
    match checked.await.map_err(|_| Lost::Task)? {
        Ok(()) => Ok(()),
        Err(what) => {
            let lost = Lost::Mismatch { epoch, what };
            drop_damaged(shared, volume, epoch).await?;
            Err(lost)
        }
    }
}

/// Drops a damaged epoch, so that the next session starts before it.
async fn drop_damaged(shared: &Shared, volume: VolumeId, epoch: Epoch) -> Result<(), Lost> {
    tracing::error!(%volume, %epoch, "a staged epoch is damaged and is dropped; its sender reads the pages again");
    Ok(shared.stage.drop_epoch(volume, epoch).await?)
}

/// What was read is what the close was signed over.
fn check_epoch(close: &Close, mut metas: Vec<RecordMeta>) -> Result<(), String> {
    let statement = close.statement();
    if metas.len() as u64 != statement.records {
        return Err(format!("expected {} records, found {}", statement.records, metas.len()));
    }
    metas.sort_unstable_by_key(|meta| meta.block);
    match merkle::root(&metas) {
        Ok(root) if root == statement.meta_root => Ok(()),
        Ok(root) => Err(format!("expected metadata root {}, found {root}", statement.meta_root)),
        Err(error) => Err(error.to_string()),
    }
}

/// Memory for the next segment, of which `rest` bytes are still to come.
async fn new_segment(shared: &Shared, rest: u64) -> Result<(Bundler, Permit), Lost> {
    let cost = shared.config.segment_bytes.min(rest.max(segment_cost(1, 1, limits::RECORD_BYTES_MAX as u64)));
    let permit = shared.budget.acquire(cost.min(shared.budget.payload())).await?;
    Ok((Bundler::new(cost), permit))
}

/// Starts the upload of a finished segment.
fn hand_over(
    shared: &Arc<Shared>,
    volume: VolumeId,
    bundler: Bundler,
    permit: Permit,
    batch: &mut Batch,
) -> Result<(), Lost> {
    let Some(segment) = bundler.finish() else { return Ok(()) };
    let name = ulid(shared.clock.now().0, rng::random()?);
    let path = paths::segment(volume, &name);
    let task: JoinHandle<_> = tokio::spawn(upload(Arc::clone(shared), volume, path, segment, permit));
    batch.uploads.push(AbortOnDropHandle::new(task));
    Ok(())
}

async fn upload(
    shared: Arc<Shared>,
    volume: VolumeId,
    path: String,
    segment: Segment,
    permit: Permit,
) -> Result<SegmentRef, Lost> {
    let slot = Arc::clone(&shared.uploads).acquire_owned().await.map_err(|_| Lost::Task)?;
    let Segment { parts, size, digest, index_offset, records } = segment;
    let started = tokio::time::Instant::now();
    let mut patience = Patience::new(volume, "upload a segment");
    while let Err(error) = shared.store.put_segment(&path, parts.clone()).await {
        patience.after(&error, error.kind()).await;
    }
    metrics::histogram!("blockferry_receiver_upload_seconds").record(started.elapsed());
    drop((parts, permit, slot));
    Ok(SegmentRef { path, size, digest, index_offset, records })
}

/// Waits between attempts at what the store may do later: capped, jittered, without end.
struct Patience {
    volume: VolumeId,
    what: &'static str,
    backoff: Backoff,
    failures: u32,
}

impl Patience {
    fn new(volume: VolumeId, what: &'static str) -> Self {
        Self { volume, what, backoff: Backoff::new(BACKOFF_BASE, BACKOFF_MAX), failures: 0 }
    }

    /// An attempt failed, for a reason of this kind; done when it is time for the next.
    fn after(&mut self, error: &impl Display, kind: &'static str) -> tokio::time::Sleep {
        let wait = self.backoff.next_wait(rng::random().map_or(u64::MAX, u64::from_le_bytes));
        self.failures += 1;
        // The first ones are told, of the later ones one in eight.
        if self.failures < 4 || self.failures.is_multiple_of(8) {
            let (volume, what, failures) = (self.volume, self.what, self.failures);
            if kind == "store" {
                tracing::warn!(%volume, %error, failures, ?wait, "could not {what}; trying again");
            } else {
                // Credentials, the bucket or its disk: it goes on by itself once a person has repaired it.
                tracing::error!(%volume, %error, failures, ?wait, kind, "could not {what}; trying again");
            }
        }
        metrics::counter!("blockferry_receiver_errors_total", "kind" => kind).increment(1);
        tokio::time::sleep(wait)
    }
}

/// The volume's log, opened for writing, however often the store fails.
async fn open_log(shared: &Shared, header: &VolumeHeader) -> Result<(LogWriter, VolumeView), Lost> {
    let mut patience = Patience::new(header.volume, "open the volume's log");
    loop {
        match LogWriter::open(&shared.store, header, shared.config.receiver, &shared.clock).await {
            Ok(opened) => return Ok(opened),
            Err(error) if may_pass(&error) => patience.after(&error, kind_of(&error)).await,
            Err(error) => return Err(error.into()),
        }
    }
}

/// What an error that may pass counts as.
fn kind_of(error: &LogError) -> &'static str {
    if let LogError::Store(error) = error { error.kind() } else { "store" }
}

fn may_pass(error: &LogError) -> bool {
    matches!(error, LogError::Store(_) | LogError::Rng(_))
}

/// A ULID: 48 bits of milliseconds and 80 random ones, in Crockford's base 32.
fn ulid(millis: i64, random: [u8; 10]) -> String {
    const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    let mut value = u128::try_from(millis).unwrap_or(0) & ((1 << 48) - 1);
    for byte in random {
        value = value << 8 | u128::from(byte);
    }
    (0..26).rev().map(|digit| char::from(DIGITS[(value >> (digit * 5) & 31) as usize])).collect()
}
