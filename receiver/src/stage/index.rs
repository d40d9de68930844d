//! The stage's index in memory: which records of which epochs lie in which batch. Pure.
//!
//! Promises: a batch is handed out for deletion only once nothing in it is live; an epoch that ended (closed, dropped,
//! released) takes no record; every byte of a batch counts as used until its deletion is reported.
//! Never: does I/O, waits, or forgets a record that is live.

use std::collections::{BTreeMap, BTreeSet, HashMap, btree_map};

use common::format::close::Close;
use common::format::record::RecordMeta;
use common::format::stage_key::StageKey;
use common::ids::{BatchId, BlockIndex, Epoch, SealTag, SessionId, VolumeId};

use super::error::StageError;

/// What one record costs in the index: 48 bytes in a B-tree whose nodes are two thirds full, and its share of a batch.
pub(super) const ENTRY_MEMORY_BYTES: u64 = 88;
/// What the metadata of a record of an open epoch costs on top.
pub(super) const META_MEMORY_BYTES: u64 = 112;

/// Where a batch lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Family {
    /// A sorted file of its own.
    Records,
    /// Keys among others, written through the log.
    Trickle,
}

#[derive(Debug)]
struct Entry {
    /// `None` while the record waits to be durable.
    batch: Option<BatchId>,
    len: u32,
    tag: SealTag,
    /// Kept only while the epoch is open and memory allows; else read again from the record.
    meta: Option<Box<RecordMeta>>,
}

/// A staged close.
#[derive(Debug, Clone)]
pub(super) struct StagedClose {
    pub(super) close: Close,
    /// `None` while it waits to be durable.
    pub(super) batch: Option<BatchId>,
}

#[derive(Debug, Default)]
struct EpochIndex {
    records: BTreeMap<BlockIndex, Entry>,
    bytes: u64,
    pending: usize,
    close: Option<StagedClose>,
}

#[derive(Debug)]
struct VolumeIndex {
    session: SessionId,
    /// Epochs up to this one are committed and gone.
    released: Epoch,
    /// Smallest number that no epoch had yet.
    next_epoch: Epoch,
    dropped: BTreeSet<Epoch>,
    epochs: BTreeMap<Epoch, EpochIndex>,
}

impl Default for VolumeIndex {
    fn default() -> Self {
        Self {
            session: SessionId::NIL,
            released: Epoch(0),
            next_epoch: Epoch(1),
            dropped: BTreeSet::new(),
            epochs: BTreeMap::new(),
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Batch {
    family: Family,
    bytes: u64,
    live: u32,
    live_bytes: u64,
    /// Deletion is under way.
    freed: bool,
}

impl Batch {
    fn new(family: Family) -> Self {
        Self { family, bytes: 0, live: 0, live_bytes: 0, freed: false }
    }
}

/// What may be deleted now.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Freed {
    /// Sorted files in which nothing is live.
    pub(super) batches: Vec<BatchId>,
    /// Single keys of the trickle family.
    pub(super) keys: Vec<StageKey>,
}

impl Freed {
    pub(super) fn is_empty(&self) -> bool {
        self.batches.is_empty() && self.keys.is_empty()
    }

    pub(super) fn add(&mut self, more: Self) {
        self.batches.extend(more.batches);
        self.keys.extend(more.keys);
    }
}

/// What to do with a record that arrived.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Begin {
    /// Stage it.
    New,
    /// The same record waits to be durable already.
    Pending,
    /// The same record is durable already.
    Staged,
}

/// What is known of one volume after a restart, or now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct VolumeRow {
    pub(super) session: SessionId,
    pub(super) released: Epoch,
    pub(super) next_epoch: Epoch,
}

/// Counts of one epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EpochState {
    /// Volume.
    pub volume: VolumeId,
    /// Epoch.
    pub epoch: Epoch,
    /// Durable records.
    pub records: u64,
    /// Records that wait to be durable.
    pub pending: u64,
    /// Bytes of both.
    pub bytes: u64,
    /// Its close, if that is durable.
    pub close: Option<Close>,
}

#[derive(Debug, Default)]
pub(super) struct Index {
    volumes: HashMap<VolumeId, VolumeIndex>,
    batches: BTreeMap<BatchId, Batch>,
    /// Bytes on disk of all batches not yet deleted.
    used_bytes: u64,
    /// Bytes of records and closes that wait to be durable.
    pending_bytes: u64,
    /// Records in the index, durable or not.
    records: u64,
    metas: u64,
    metas_max: u64,
    /// Closed epochs that are not released.
    closed: u64,
    /// Files whose deletion is under way.
    freeing: u64,
}

impl Index {
    /// An empty index that keeps the metadata of at most `metas_max` records.
    pub(super) fn new(metas_max: u64) -> Self {
        Self { metas_max, ..Self::default() }
    }

    pub(super) fn used_bytes(&self) -> u64 {
        self.used_bytes + self.pending_bytes
    }

    /// Smallest number above all batches known.
    pub(super) fn next_batch(&self) -> BatchId {
        BatchId(self.batches.keys().next_back().map_or(1, |batch| batch.0.saturating_add(1)))
    }

    pub(super) fn records(&self) -> u64 {
        self.records
    }

    pub(super) fn closed(&self) -> u64 {
        self.closed
    }

    /// True while files wait to be deleted.
    pub(super) fn is_freeing(&self) -> bool {
        self.freeing > 0
    }

    /// Bytes in sorted files that are no longer live but can't be dropped with the whole file, by file, most first.
    pub(super) fn sparse_batches(&self) -> Vec<(BatchId, u64)> {
        let mut sparse: Vec<_> = self
            .batches
            .iter()
            .filter(|(_, batch)| batch.family == Family::Records && !batch.freed && batch.live_bytes * 2 < batch.bytes)
            .map(|(&id, batch)| (id, batch.bytes - batch.live_bytes))
            .collect();
        sparse.sort_by_key(|&(_, dead)| std::cmp::Reverse(dead));
        sparse
    }

    /// The dead bytes of a file were taken out of it.
    pub(super) fn compacted(&mut self, id: BatchId, dead: u64) {
        if let Some(batch) = self.batches.get_mut(&id) {
            let dead = dead.min(batch.bytes - batch.live_bytes);
            batch.bytes -= dead;
            self.used_bytes -= dead;
        }
    }

    /// True where a live record lies in `batch` for this volume and epoch.
    pub(super) fn is_live(&self, key: &StageKey) -> bool {
        let Some(epoch) = self.volumes.get(&key.volume).and_then(|volume| volume.epochs.get(&key.epoch)) else {
            return false;
        };
        if key.block == StageKey::CLOSE {
            return epoch.close.as_ref().is_some_and(|close| close.batch == Some(key.batch));
        }
        epoch.records.get(&key.block).is_some_and(|entry| entry.batch == Some(key.batch))
    }

    fn ended(&self, volume: VolumeId, epoch: Epoch) -> Option<StageError> {
        let index = self.volumes.get(&volume)?;
        let state = if epoch <= index.released {
            "committed"
        } else if index.dropped.contains(&epoch) {
            "dropped"
        } else if index.epochs.get(&epoch).is_some_and(|epoch| epoch.close.is_some()) {
            "closed"
        } else {
            return None;
        };
        Some(StageError::EpochEnded { volume, epoch, state })
    }

    /// Takes note of a record that arrived.
    ///
    /// # Errors
    /// [`StageError::EpochEnded`], [`StageError::Conflict`].
    pub(super) fn begin(&mut self, volume: VolumeId, epoch: Epoch, meta: RecordMeta) -> Result<Begin, StageError> {
        let block = meta.block;
        let staged = self.volumes.get(&volume).and_then(|index| index.epochs.get(&epoch)?.records.get(&block));
        if let Some(entry) = staged {
            if entry.tag != meta.tag || entry.len != meta.record_len {
                return Err(StageError::Conflict { volume, epoch, block });
            }
            return Ok(if entry.batch.is_some() { Begin::Staged } else { Begin::Pending });
        }
        if let Some(error) = self.ended(volume, epoch) {
            return Err(error);
        }
        let keep = self.metas < self.metas_max;
        self.metas += u64::from(keep);
        self.records += 1;
        self.pending_bytes += u64::from(meta.record_len);
        let index = self.volumes.entry(volume).or_default();
        index.next_epoch = index.next_epoch.max(Epoch(epoch.0.saturating_add(1)));
        let index = index.epochs.entry(epoch).or_default();
        index.pending += 1;
        index.bytes += u64::from(meta.record_len);
        let entry = Entry { batch: None, len: meta.record_len, tag: meta.tag, meta: keep.then(|| Box::new(meta)) };
        index.records.insert(block, entry);
        Ok(Begin::New)
    }

    /// Takes note of a close that arrived; `false` where the same close is staged or on its way already.
    ///
    /// # Errors
    /// [`StageError::EpochEnded`] for another close of that epoch, or one that was dropped or committed.
    pub(super) fn begin_close(&mut self, close: &Close) -> Result<bool, StageError> {
        let (volume, epoch) = (close.statement().volume, close.statement().epoch);
        let known = self.volumes.get(&volume).and_then(|index| index.epochs.get(&epoch)?.close.as_ref());
        if known.is_some_and(|known| known.close.id() == close.id()) {
            return Ok(false);
        }
        if let Some(error) = self.ended(volume, epoch) {
            return Err(error);
        }
        self.pending_bytes += close.bytes().len() as u64;
        let index = self.volumes.entry(volume).or_default();
        index.next_epoch = index.next_epoch.max(Epoch(epoch.0.saturating_add(1)));
        index.epochs.entry(epoch).or_default().close = Some(StagedClose { close: close.clone(), batch: None });
        Ok(true)
    }

    /// Opens the account of a batch that was just written.
    pub(super) fn batch_written(&mut self, id: BatchId, family: Family) {
        self.batches.insert(id, Batch::new(family));
    }

    /// A record or close at `key`, of `len` bytes, is durable. What was dropped meanwhile is counted as dead.
    pub(super) fn durable(&mut self, key: &StageKey, len: u64) -> Freed {
        let live = self.settle(key, len);
        let mut freed = Freed::default();
        let Some(batch) = self.batches.get_mut(&key.batch) else { return freed };
        match (live, batch.family) {
            (true, _) => {
                batch.live += 1;
                batch.live_bytes += len;
            }
            (false, Family::Trickle) => {
                freed.keys.push(*key);
                return freed;
            }
            (false, Family::Records) => {}
        }
        batch.bytes += len;
        self.used_bytes += len;
        freed
    }

    fn settle(&mut self, key: &StageKey, len: u64) -> bool {
        let Some(epoch) = self.volumes.get_mut(&key.volume).and_then(|index| index.epochs.get_mut(&key.epoch)) else {
            return false;
        };
        if key.block == StageKey::CLOSE {
            let Some(close) = epoch.close.as_mut().filter(|close| close.batch.is_none()) else { return false };
            close.batch = Some(key.batch);
            self.pending_bytes -= len;
            self.closed += 1;
            // Metadata is no more needed at hand: the close was checked before it was staged.
            for entry in epoch.records.values_mut() {
                self.metas -= u64::from(entry.meta.take().is_some());
            }
            return true;
        }
        let Some(entry) = epoch.records.get_mut(&key.block).filter(|entry| entry.batch.is_none()) else { return false };
        entry.batch = Some(key.batch);
        epoch.pending -= 1;
        self.pending_bytes -= len;
        true
    }

    /// All of a batch's records were reported; names the batch if nothing in it is live.
    pub(super) fn batch_settled(&mut self, id: BatchId) -> Freed {
        let mut freed = Freed::default();
        self.free_if_dead(id, &mut freed);
        freed
    }

    fn free_if_dead(&mut self, id: BatchId, freed: &mut Freed) {
        let Some(batch) = self.batches.get_mut(&id) else { return };
        if batch.live > 0 || batch.freed {
            return;
        }
        match batch.family {
            Family::Records => {
                batch.freed = true;
                self.freeing += 1;
                freed.batches.push(id);
            }
            Family::Trickle => {
                self.used_bytes -= batch.bytes;
                self.batches.remove(&id);
            }
        }
    }

    /// A batch's file is gone.
    pub(super) fn batch_deleted(&mut self, id: BatchId) {
        if let Some(batch) = self.batches.remove(&id) {
            self.used_bytes -= batch.bytes;
            self.freeing -= u64::from(batch.freed);
        }
    }

    /// A record or close could not be made durable: it is not staged.
    pub(super) fn failed(&mut self, volume: VolumeId, epoch: Epoch, block: BlockIndex, len: u64) {
        let Some(index) = self.volumes.get_mut(&volume).and_then(|index| index.epochs.get_mut(&epoch)) else { return };
        if block == StageKey::CLOSE {
            if index.close.as_ref().is_some_and(|close| close.batch.is_none()) {
                index.close = None;
                self.pending_bytes -= len;
            }
        } else if index.records.get(&block).is_some_and(|entry| entry.batch.is_none())
            && let Some(entry) = index.records.remove(&block)
        {
            self.metas -= u64::from(entry.meta.is_some());
            self.records -= 1;
            self.pending_bytes -= len;
            index.pending -= 1;
            index.bytes -= len;
        }
    }

    /// Forgets an epoch's records. Those on their way are counted as dead when they arrive.
    fn forget(&mut self, volume: VolumeId, epoch: Epoch, freed: &mut Freed) {
        let Some(index) = self.volumes.get_mut(&volume).and_then(|index| index.epochs.remove(&epoch)) else { return };
        let mut gone = Vec::with_capacity(index.records.len() + 1);
        for (block, entry) in index.records {
            self.metas -= u64::from(entry.meta.is_some());
            self.records -= 1;
            match entry.batch {
                Some(batch) => gone.push((batch, block, u64::from(entry.len))),
                None => self.pending_bytes -= u64::from(entry.len),
            }
        }
        if let Some(close) = index.close {
            let len = close.close.bytes().len() as u64;
            match close.batch {
                Some(batch) => {
                    self.closed -= 1;
                    gone.push((batch, StageKey::CLOSE, len));
                }
                None => self.pending_bytes -= len,
            }
        }
        for (id, block, len) in gone {
            let Some(batch) = self.batches.get_mut(&id) else { continue };
            batch.live -= 1;
            batch.live_bytes -= len;
            if batch.family == Family::Trickle {
                batch.bytes -= len;
                self.used_bytes -= len;
                freed.keys.push(StageKey { batch: id, volume, epoch, block });
            }
            self.free_if_dead(id, freed);
        }
    }

    /// Drops an epoch that will not be committed; its number is never used again.
    pub(super) fn drop_epoch(&mut self, volume: VolumeId, epoch: Epoch) -> Freed {
        let mut freed = Freed::default();
        self.forget(volume, epoch, &mut freed);
        let index = self.volumes.entry(volume).or_default();
        index.next_epoch = index.next_epoch.max(Epoch(epoch.0.saturating_add(1)));
        if epoch > index.released {
            index.dropped.insert(epoch);
        }
        freed
    }

    /// Forgets what is staged of an open epoch; its number may still be used, for the same records or others.
    pub(super) fn forget_open(&mut self, volume: VolumeId, epoch: Epoch) -> Freed {
        let mut freed = Freed::default();
        if self.state(volume, epoch).is_some_and(|state| state.close.is_none()) {
            self.forget(volume, epoch, &mut freed);
        }
        freed
    }

    /// Releases all epochs up to `up_to`, which are committed. Names the drop marks that are no more needed.
    pub(super) fn release(&mut self, volume: VolumeId, up_to: Epoch) -> (Freed, Vec<Epoch>) {
        let mut freed = Freed::default();
        let index = self.volumes.entry(volume).or_default();
        index.released = index.released.max(up_to);
        index.next_epoch = index.next_epoch.max(Epoch(up_to.0.saturating_add(1)));
        let epochs: Vec<_> = index.epochs.range(..=up_to).map(|(&epoch, _)| epoch).collect();
        let kept = index.dropped.split_off(&Epoch(up_to.0.saturating_add(1)));
        let marks = std::mem::replace(&mut index.dropped, kept).into_iter().collect();
        for epoch in epochs {
            self.forget(volume, epoch, &mut freed);
        }
        (freed, marks)
    }

    pub(super) fn row(&self, volume: VolumeId) -> VolumeRow {
        self.volumes
            .get(&volume)
            .map_or(VolumeRow { session: SessionId::NIL, released: Epoch(0), next_epoch: Epoch(1) }, |index| {
                VolumeRow { session: index.session, released: index.released, next_epoch: index.next_epoch }
            })
    }

    pub(super) fn set_row(&mut self, volume: VolumeId, row: VolumeRow) {
        let index = self.volumes.entry(volume).or_default();
        (index.session, index.released, index.next_epoch) = (row.session, row.released, row.next_epoch);
    }

    pub(super) fn set_dropped(&mut self, volume: VolumeId, epoch: Epoch) {
        self.volumes.entry(volume).or_default().dropped.insert(epoch);
    }

    pub(super) fn volumes(&self) -> Vec<VolumeId> {
        let mut volumes: Vec<_> = self.volumes.keys().copied().collect();
        volumes.sort_unstable();
        volumes
    }

    /// Tags of the durable records of an epoch, by block.
    pub(super) fn tags(&self, volume: VolumeId, epoch: Epoch) -> Vec<(BlockIndex, SealTag)> {
        let Some(epoch) = self.volumes.get(&volume).and_then(|index| index.epochs.get(&epoch)) else {
            return Vec::new();
        };
        let durable = epoch.records.iter().filter(|(_, entry)| entry.batch.is_some());
        durable.map(|(&block, entry)| (block, entry.tag)).collect()
    }

    /// Metadata of an epoch's durable records by block, if all of it is in memory.
    pub(super) fn metas(&self, volume: VolumeId, epoch: Epoch) -> Option<Vec<RecordMeta>> {
        let epoch = self.volumes.get(&volume)?.epochs.get(&epoch)?;
        epoch
            .records
            .values()
            .filter(|entry| entry.batch.is_some())
            .map(|entry| entry.meta.as_deref().copied())
            .collect()
    }

    /// Batches that an epoch's durable records lie in, ascending.
    pub(super) fn batches_of(&self, volume: VolumeId, epoch: Epoch) -> Vec<(BatchId, Family)> {
        let Some(index) = self.volumes.get(&volume).and_then(|index| index.epochs.get(&epoch)) else {
            return Vec::new();
        };
        let ids: BTreeSet<_> = index.records.values().filter_map(|entry| entry.batch).collect();
        ids.into_iter().filter_map(|id| Some((id, self.batches.get(&id)?.family))).collect()
    }

    pub(super) fn state(&self, volume: VolumeId, epoch: Epoch) -> Option<EpochState> {
        let index = self.volumes.get(&volume)?.epochs.get(&epoch)?;
        Some(state_of(volume, epoch, index))
    }

    pub(super) fn states(&self, volume: VolumeId) -> Vec<EpochState> {
        let epochs = self.volumes.get(&volume).into_iter().flat_map(|index| &index.epochs);
        epochs.map(|(&epoch, index)| state_of(volume, epoch, index)).collect()
    }

    /// Bytes of a volume's open epochs.
    pub(super) fn open_bytes(&self, volume: VolumeId) -> u64 {
        let epochs = self.volumes.get(&volume).into_iter().flat_map(|index| index.epochs.values());
        epochs.filter(|epoch| epoch.close.is_none()).map(|epoch| epoch.bytes).sum()
    }

    /// Takes in a record found on disk at start; `false` where it is of no more use.
    pub(super) fn recover_record(&mut self, key: &StageKey, family: Family, len: u32, tag: SealTag) -> bool {
        self.batches.entry(key.batch).or_insert(Batch::new(family));
        let wanted = !self.is_over(key) && {
            // Not `begin`: the close may have been read before its records.
            let index = self.volumes.entry(key.volume).or_default();
            index.next_epoch = index.next_epoch.max(Epoch(key.epoch.0.saturating_add(1)));
            let epoch = index.epochs.entry(key.epoch).or_default();
            match epoch.records.entry(key.block) {
                // Only where an earlier start found the first copy damaged and it was sent again.
                btree_map::Entry::Occupied(_) => false,
                btree_map::Entry::Vacant(place) => {
                    place.insert(Entry { batch: Some(key.batch), len, tag, meta: None });
                    epoch.bytes += u64::from(len);
                    self.records += 1;
                    true
                }
            }
        };
        self.recover_bytes(key.batch, len.into(), wanted);
        wanted
    }

    /// Takes in a close found on disk at start; `false` where it is of no more use.
    pub(super) fn recover_close(&mut self, key: &StageKey, family: Family, close: Close) -> bool {
        let len = close.bytes().len() as u64;
        self.batches.entry(key.batch).or_insert(Batch::new(family));
        let wanted = !self.is_over(key);
        if wanted {
            let index = self.volumes.entry(key.volume).or_default();
            index.next_epoch = index.next_epoch.max(Epoch(key.epoch.0.saturating_add(1)));
            let epoch = index.epochs.entry(key.epoch).or_default();
            if epoch.close.replace(StagedClose { close, batch: Some(key.batch) }).is_none() {
                self.closed += 1;
            }
        }
        self.recover_bytes(key.batch, len, wanted);
        wanted
    }

    /// Takes note of `len` dead bytes found in a batch at start.
    pub(super) fn recover_dead(&mut self, id: BatchId, family: Family, len: u64) {
        self.batches.entry(id).or_insert(Batch::new(family));
        self.recover_bytes(id, len, false);
    }

    fn is_over(&self, key: &StageKey) -> bool {
        self.volumes
            .get(&key.volume)
            .is_some_and(|index| key.epoch <= index.released || index.dropped.contains(&key.epoch))
    }

    fn recover_bytes(&mut self, id: BatchId, len: u64, live: bool) {
        let Some(batch) = self.batches.get_mut(&id) else { return };
        batch.bytes += len;
        self.used_bytes += len;
        if live {
            batch.live += 1;
            batch.live_bytes += len;
        }
    }

    /// Every batch found at start in which nothing is live.
    pub(super) fn recovered_dead(&mut self) -> Freed {
        let mut freed = Freed::default();
        for id in self.batches.keys().copied().collect::<Vec<_>>() {
            self.free_if_dead(id, &mut freed);
        }
        freed
    }
}

fn state_of(volume: VolumeId, epoch: Epoch, index: &EpochIndex) -> EpochState {
    EpochState {
        volume,
        epoch,
        records: (index.records.len() - index.pending) as u64,
        pending: index.pending as u64,
        bytes: index.bytes,
        close: index.close.as_ref().filter(|close| close.batch.is_some()).map(|close| close.close.clone()),
    }
}
