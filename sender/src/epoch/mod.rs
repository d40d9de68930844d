//! Epochs: which one a record is sealed in, when an epoch is full, and what its close states. Pure.
//!
//! Workers seal on several threads. Each takes an [`EpochTicket`] for one record from the [`EpochGate`]: the open epoch's
//! key and a counter that no other record of it has. When the epoch is full the gate retires it and opens the next; tickets
//! handed out before still belong to the old one. The agent gives the metadata of every sealed record to the [`EpochBook`],
//! which says which epoch may be closed: the oldest, once it is retired and every ticket has come back as a record or was
//! given up.
//!
//! ```text
//! worker:  gate.ticket() ─▶ seal ─▶ ticket.seal_done(len) ─▶ (record, meta, …) ──▶ agent: book.record(epoch, meta)
//! agent:   while let Some(epoch) = book.closable() { book.close(epoch, terms) ─▶ statement }
//! at the end of a pass: gate.retire() names the last epoch, which asserts the point
//! ```
//!
//! Promises: a counter is used once in an epoch; an epoch holds at most [`limits::EPOCH_RECORDS_MAX`] records and is retired
//! after [`limits::EPOCH_SEALED_BYTES_MAX`] sealed bytes, overshot by what is being sealed at that moment; epochs become
//! closable in order; a statement counts every record of its epoch. Never: draws a salt itself, reads clocks or files.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::clock::UnixMillis;
use common::error::{Dispose, Disposition};
use common::format::close::{CloseStatement, Consistency};
use common::format::record::RecordMeta;
use common::ids::{CloseId, Epoch, FleetId, GroupId, Incarnation, KeyId, Salt, VolumeId};
use common::limits;
use common::seal::{DataKey, EpochContext, EpochKey, merkle};

#[cfg(test)]
mod tests;

/// Why an epoch could not be opened or closed.
#[derive(Debug, thiserror::Error)]
pub enum EpochError {
    /// No salt could be drawn; without one no epoch may be opened.
    #[error("cannot open an epoch: {0}")]
    NoSalt(String),
    /// Epoch numbers are used up.
    #[error("epoch numbers are used up")]
    Exhausted,
    /// Two records of one block in one epoch.
    #[error("epoch {epoch}: {source}")]
    Overlap {
        /// Epoch.
        epoch: Epoch,
        /// Where.
        source: merkle::OrderError,
    },
    /// An epoch that the book does not hold, or that is not complete.
    #[error("epoch {0} can't be closed: it is unknown, or records of it are still to come")]
    NotClosable(Epoch),
}

impl Dispose for EpochError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::NoSalt(_) => Disposition::Retry,
            _ => Disposition::Bug,
        }
    }
}

/// Draws the salt of an epoch from the operating system; the text of an error is for people.
pub type DrawSalt = Box<dyn FnMut() -> Result<Salt, String> + Send>;

/// When an epoch counts as full.
#[derive(Debug, Clone, Copy)]
pub struct EpochBounds {
    /// Records.
    pub records: u64,
    /// Sealed bytes.
    pub sealed_bytes: u64,
}

impl Default for EpochBounds {
    fn default() -> Self {
        Self { records: limits::EPOCH_RECORDS_MAX as u64, sealed_bytes: limits::EPOCH_SEALED_BYTES_MAX }
    }
}

/// One epoch as the workers share it.
struct Shared {
    key: EpochKey,
    salt: Salt,
    /// Tickets handed out; changed under the gate's lock only.
    issued: AtomicU64,
    /// Tickets given up without a record.
    abandoned: AtomicU64,
    sealed_bytes: AtomicU64,
}

/// The right, and the duty, to seal one record in an epoch. Dropped without [`EpochTicket::seal_done`], it is given up.
pub struct EpochTicket {
    shared: Arc<Shared>,
    counter: u64,
    done: bool,
}

impl std::fmt::Debug for EpochTicket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EpochTicket(epoch {}, counter {})", self.epoch(), self.counter)
    }
}

impl EpochTicket {
    /// Epoch of the record.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.shared.key.context().epoch
    }

    /// Key that seals the record.
    #[must_use]
    pub fn key(&self) -> &EpochKey {
        &self.shared.key
    }

    /// The record's counter.
    #[must_use]
    pub fn counter(&self) -> u64 {
        self.counter
    }

    /// The record was sealed, with `record_bytes` bytes, and is on its way to the book. If it does not get there, the epoch
    /// never closes and has to be forgotten by [`EpochBook::restart`].
    pub fn seal_done(mut self, record_bytes: usize) {
        self.shared.sealed_bytes.fetch_add(record_bytes as u64, Ordering::Relaxed);
        self.done = true;
    }
}

impl Drop for EpochTicket {
    fn drop(&mut self) {
        if !self.done {
            self.shared.abandoned.fetch_add(1, Ordering::Release);
        }
    }
}

/// What the gate needs to open epochs.
pub struct EpochSeed {
    /// Data key that epoch keys are derived from.
    pub data_key: DataKey,
    /// Volume.
    pub volume: VolumeId,
    /// Incarnation.
    pub incarnation: Incarnation,
    /// Name of the data key.
    pub key_id: KeyId,
    /// The first epoch to be opened.
    pub first: Epoch,
    /// Draws salts.
    pub draw_salt: DrawSalt,
}

struct GateState {
    seed: EpochSeed,
    current: Option<Arc<Shared>>,
    /// Epochs opened and not yet closed or dropped; true once retired.
    open: BTreeMap<Epoch, (Arc<Shared>, bool)>,
}

/// Hands out tickets for the open epoch, and moves to the next when it is full. Shared by workers and agent.
pub struct EpochGate {
    bounds: EpochBounds,
    state: Mutex<GateState>,
}

impl std::fmt::Debug for EpochGate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EpochGate(…)")
    }
}

impl EpochGate {
    /// A gate with no epoch open.
    #[must_use]
    pub fn new(seed: EpochSeed, bounds: EpochBounds) -> Self {
        Self { bounds, state: Mutex::new(GateState { seed, current: None, open: BTreeMap::new() }) }
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        // Nothing that holds the lock panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A ticket for the next record, in the open epoch or, where that is full, in a new one.
    ///
    /// # Errors
    /// [`EpochError::NoSalt`], [`EpochError::Exhausted`].
    pub fn ticket(&self) -> Result<EpochTicket, EpochError> {
        let mut state = self.lock();
        let full = state.current.as_ref().is_some_and(|epoch| {
            epoch.issued.load(Ordering::Relaxed) >= self.bounds.records
                || epoch.sealed_bytes.load(Ordering::Relaxed) >= self.bounds.sealed_bytes
        });
        if full {
            state.retire();
        }
        let shared = state.open_current()?;
        // The counter of a ticket is the number of those before it: unique, since the lock is held.
        let counter = shared.issued.fetch_add(1, Ordering::Relaxed);
        Ok(EpochTicket { shared, counter, done: false })
    }

    /// Ends the open epoch, making an empty one where none is open, and names it. Tickets out there still count.
    ///
    /// # Errors
    /// As [`Self::ticket`].
    pub fn retire(&self) -> Result<Epoch, EpochError> {
        let mut state = self.lock();
        let epoch = state.open_current()?.key.context().epoch;
        state.retire();
        Ok(epoch)
    }

    /// Forgets all epochs that are not closed; new ones are numbered from `next` or, if greater, from where the numbers
    /// stood. Tickets still out there are of no use any more.
    pub fn restart(&self, next: Epoch) {
        let mut state = self.lock();
        state.current = None;
        state.open.clear();
        state.seed.first = state.seed.first.max(next);
    }

    /// The number that the next new epoch will have.
    #[must_use]
    pub fn next_epoch(&self) -> Epoch {
        self.lock().seed.first
    }

    /// The oldest epoch that is not closed, whether it is retired, and how many records it will have if it is.
    fn oldest(&self) -> Option<(Epoch, Option<u64>)> {
        let state = self.lock();
        let (epoch, (shared, retired)) = state.open.first_key_value()?;
        let records = retired.then(|| shared.issued.load(Ordering::Relaxed) - shared.abandoned.load(Ordering::Acquire));
        Some((*epoch, records))
    }

    fn take(&self, epoch: Epoch) -> Option<(EpochContext, Salt)> {
        let (shared, _) = self.lock().open.remove(&epoch)?;
        Some((shared.key.context(), shared.salt))
    }
}

impl GateState {
    fn open_current(&mut self) -> Result<Arc<Shared>, EpochError> {
        if let Some(current) = &self.current {
            return Ok(Arc::clone(current));
        }
        let epoch = self.seed.first;
        let next = epoch.next().ok_or(EpochError::Exhausted)?;
        let salt = (self.seed.draw_salt)().map_err(EpochError::NoSalt)?;
        let EpochSeed { volume, incarnation, key_id, .. } = self.seed;
        let key = self.seed.data_key.epoch_key(EpochContext { volume, incarnation, epoch, key_id }, &salt);
        let shared = Arc::new(Shared {
            key,
            salt,
            issued: AtomicU64::new(0),
            abandoned: AtomicU64::new(0),
            sealed_bytes: AtomicU64::new(0),
        });
        self.seed.first = next;
        self.open.insert(epoch, (Arc::clone(&shared), false));
        self.current = Some(Arc::clone(&shared));
        Ok(shared)
    }

    fn retire(&mut self) {
        if let Some(current) = self.current.take()
            && let Some((_, retired)) = self.open.get_mut(&current.key.context().epoch)
        {
            *retired = true;
        }
    }
}

/// What a close states beside what the book counts.
#[derive(Debug, Clone, Copy)]
pub struct CloseTerms {
    /// Fleet.
    pub fleet: FleetId,
    /// The newest close.
    pub parent: CloseId,
    /// When the cut was made.
    pub cut_time: UnixMillis,
    /// The recovery point asserted, if any.
    pub point: Option<Consistency>,
    /// Exact size of the disk in bytes.
    pub disk_bytes: u64,
    /// Names the disks that were cut at the same instant; nil where there are none.
    pub group: GroupId,
    /// Names that instant.
    pub group_point: GroupId,
}

/// The agent's record of what was sealed in each epoch that is not closed. 96 bytes a record.
#[derive(Debug)]
pub struct EpochBook {
    gate: Arc<EpochGate>,
    metas: BTreeMap<Epoch, Vec<RecordMeta>>,
}

impl EpochBook {
    /// An empty book for the epochs of `gate`.
    #[must_use]
    pub fn new(gate: Arc<EpochGate>) -> Self {
        Self { gate, metas: BTreeMap::new() }
    }

    /// Enters a record. False where its epoch is closed or forgotten: the record is void and must not be sent.
    pub fn record(&mut self, epoch: Epoch, meta: RecordMeta) -> bool {
        let known = self.gate.lock().open.contains_key(&epoch);
        if known {
            self.metas.entry(epoch).or_default().push(meta);
        }
        known
    }

    /// The oldest epoch, if it is complete: retired, and all of its records entered. Call [`Self::close`] until `None`.
    #[must_use]
    pub fn closable(&self) -> Option<Epoch> {
        let (epoch, records) = self.gate.oldest()?;
        let entered = self.metas.get(&epoch).map_or(0, |metas| metas.len() as u64);
        (records? == entered).then_some(epoch)
    }

    /// Epochs opened and not closed.
    #[must_use]
    pub fn open_epochs(&self) -> usize {
        self.gate.lock().open.len()
    }

    /// Ends an epoch: the statement to be signed. The book forgets the epoch.
    ///
    /// # Errors
    /// [`EpochError::NotClosable`]; [`EpochError::Overlap`], a bug of the capture.
    pub fn close(&mut self, epoch: Epoch, terms: CloseTerms) -> Result<CloseStatement, EpochError> {
        if self.closable() != Some(epoch) {
            return Err(EpochError::NotClosable(epoch));
        }
        let (context, salt) = self.gate.take(epoch).ok_or(EpochError::NotClosable(epoch))?;
        let mut metas = self.metas.remove(&epoch).unwrap_or_default();
        metas.sort_unstable_by_key(|meta| meta.block);
        let meta_root = merkle::root(&metas).map_err(|source| EpochError::Overlap { epoch, source })?;
        let pages_per_block = limits::PAGES_PER_BLOCK as u64;
        let zero_pages = |meta: &RecordMeta| match meta.block_count {
            1 => u64::from(meta.zero_mask.count()),
            blocks => u64::from(blocks) * pages_per_block,
        };
        Ok(CloseStatement {
            fleet: terms.fleet,
            volume: context.volume,
            incarnation: context.incarnation,
            key_id: context.key_id,
            epoch,
            parent: terms.parent,
            salt,
            cut_time: terms.cut_time,
            point: terms.point,
            disk_bytes: terms.disk_bytes,
            records: metas.len() as u64,
            data_pages: metas.iter().map(|meta| u64::from(meta.data_mask.count())).sum(),
            zero_pages: metas.iter().map(zero_pages).sum(),
            record_bytes: metas.iter().map(|meta| u64::from(meta.record_len)).sum(),
            meta_root,
            group: terms.group,
            group_point: terms.group_point,
        })
    }

    /// Forgets all epochs that are not closed: their records are void. New ones are numbered from `next` or above.
    pub fn restart(&mut self, next: Epoch) {
        self.gate.restart(next);
        self.metas.clear();
    }
}
