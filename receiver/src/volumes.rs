//! The volumes that this receiver has loaded: what the log and the stage hold of each, and the session that writes it.
//!
//! A volume is loaded at its first use, or at start where the stage holds something of it: header and log from the catalog,
//! closed epochs and open ones from the stage. Staged closes that follow the log's head go on to the forwarder, in order;
//! the others are dropped. Loading takes the right to write the volume's log first: so no other receiver can commit behind what
//! a claim is granted on; and where another one had that right since, all that is staged here is dropped. After that [`Volume`] is the one place through which the volume's session, its stage and
//! its commits are told of each other.
//!
//! Promises: at most one session writes a volume; an epoch reaches the forwarder once in this process, after its close is
//! durable, in parent order; a sender hears of a commit only through [`Volumes::handle_committed`].
//! Never: reads a socket, or waits for a slow peer.

mod volume;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::budget::Permit;
use common::error::{Dispose, Disposition};
use common::format::close::Close;
use common::format::frame::RefusalCode;
use common::format::record::{Record, RecordMeta};
use common::format::volume_header::VolumeHeader;
use common::ids::{CloseId, Epoch, Geometry, Incarnation, SessionId, VolumeId};
use common::session::{ClosedEpoch, Facts, StagedRecord};
use futures::future::BoxFuture;
use tokio::sync::OnceCell;

pub use volume::{Scope, Superseded, Turn, Volume};

/// Why the stage or the catalog did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VolumeError {
    /// What the sender sent does not check.
    #[error("{0}")]
    Bad(String),
    /// The store has no such volume.
    #[error("no volume {0}")]
    NotFound(VolumeId),
    /// The receiver's disk or store failed.
    #[error("{0}")]
    Failed(String),
    /// Another receiver writes the volume's log.
    #[error("{0}")]
    Fenced(String),
    /// The volume is retired or deleted.
    #[error("{0}")]
    Retired(String),
}

impl Dispose for VolumeError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Bad(_) | Self::NotFound(_) | Self::Retired(_) => Disposition::BadInput,
            Self::Failed(_) => Disposition::Retry,
            Self::Fenced(_) => Disposition::Fenced,
        }
    }
}

impl VolumeError {
    /// The code under which a sender is told.
    #[must_use]
    pub fn refusal(&self) -> RefusalCode {
        match self {
            Self::Bad(_) => RefusalCode::BadMessage,
            Self::NotFound(_) => RefusalCode::NotYours,
            Self::Failed(_) => RefusalCode::Failed,
            Self::Fenced(_) => RefusalCode::Fenced,
            Self::Retired(_) => RefusalCode::Retired,
        }
    }

    /// A word for metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Bad(_) => "bad_message",
            Self::NotFound(_) => "not_found",
            Self::Failed(_) => "failed",
            Self::Fenced(_) => "fenced",
            Self::Retired(_) => "retired",
        }
    }
}

/// Something under way that does not borrow.
pub type Pending<T> = BoxFuture<'static, Result<T, VolumeError>>;

/// What the stage holds of a volume after a start.
#[derive(Debug, Clone, Default)]
pub struct Recovered {
    /// Durable closes, by epoch.
    pub closes: Vec<Close>,
    /// Records of epochs without a close.
    pub open: Vec<(Epoch, Vec<StagedRecord>)>,
    /// Smallest number that no epoch had in the stage.
    pub next_epoch: Epoch,
}

/// One stream's place at the stage's intake. Dropping it says that the stream is gone.
pub trait Intake: Send + Sync {
    /// Done once the stage takes a record of the stream's volume in. Safe to cancel.
    fn admit(&self) -> BoxFuture<'_, Result<(), VolumeError>>;
    /// Done once the stage is full and goes on with another volume first, one for which `by` is true. Safe to cancel.
    fn passed_over<'a>(&'a self, by: &'a (dyn Fn(VolumeId) -> bool + Send + Sync)) -> BoxFuture<'a, ()>;
}

/// The stage, as volumes see it.
pub trait Staging: Send + Sync + 'static {
    /// A place at the intake for one stream of this volume.
    fn intake_of(&self, volume: VolumeId) -> Box<dyn Intake>;
    /// Makes a record durable. The permit is given back by then.
    fn stage(&self, record: Record, meta: RecordMeta, permit: Permit) -> Pending<()>;
    /// Checks a close against the metadata of its epoch's staged records, without any data key, and makes it durable.
    fn close(&self, header: Arc<VolumeHeader>, close: Close) -> Pending<()>;
    /// Forgets an epoch that will not be committed.
    fn drop_epoch(&self, volume: VolumeId, epoch: Epoch) -> Pending<()>;
    /// Gives up the room of an open epoch of which more may come.
    fn forget_open(&self, volume: VolumeId, epoch: Epoch) -> Pending<()>;
    /// Frees the epochs up to this one, which are committed.
    fn release(&self, volume: VolumeId, up_to: Epoch) -> Pending<()>;
    /// Notes which session writes the volume.
    fn begin_session(&self, volume: VolumeId, session: SessionId) -> Pending<()>;
    /// What the stage holds of the volume.
    fn recovered(&self, volume: VolumeId) -> Recovered;
    /// Volumes of which the stage holds anything.
    fn volumes(&self) -> Vec<VolumeId>;
}

/// What forwards closed epochs to the store. It reports by [`Volumes::handle_committed`].
pub trait Forwarding: Send + Sync + 'static {
    /// An epoch is closed and durable in the stage. Called in parent order for each volume and hold; must not wait. No effect
    /// where the hold is not the newest.
    fn closed(&self, volume: VolumeId, hold: Hold, close: Close);
}

/// Names one taking of the right to write a volume's log, within this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hold(pub u64);

impl Hold {
    /// Nobody took it: the forwarder does so itself.
    pub const NONE: Self = Self(0);
}

/// What the store says of a volume whose log is this receiver's to write now.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// Its header.
    pub header: VolumeHeader,
    /// Newest committed epoch; zero for none.
    pub committed: ClosedEpoch,
    /// The right to write the log that was taken.
    pub hold: Hold,
    /// What the stage holds may go on: no other receiver had that right since it was staged.
    pub continues: bool,
}

/// Why a volume is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A sender claims it.
    Claim,
    /// The stage holds something of it.
    Leftovers,
}

/// Reads volumes from the store, and takes the right to write their logs.
pub trait Catalog: Send + Sync + 'static {
    /// The header alone. Takes nothing.
    fn header(&self, volume: VolumeId) -> Pending<VolumeHeader>;
    /// Takes the right to write the volume's log, and gives header and head as they are from then on. For
    /// [`Purpose::Leftovers`] it gives `None` where another receiver has the right.
    fn take(&self, volume: VolumeId, purpose: Purpose) -> Pending<Option<Loaded>>;
    /// True while the right that was taken is this receiver's still.
    fn holds(&self, volume: VolumeId, hold: Hold) -> Pending<bool>;
}

type Slot = Arc<OnceCell<Arc<Volume>>>;

/// All loaded volumes.
pub struct Volumes {
    staging: Arc<dyn Staging>,
    forwarding: Arc<dyn Forwarding>,
    catalog: Arc<dyn Catalog>,
    slots: Mutex<HashMap<VolumeId, Slot>>,
}

impl std::fmt::Debug for Volumes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Volumes(…)")
    }
}

impl Volumes {
    /// None loaded yet.
    #[must_use]
    pub fn new(staging: Arc<dyn Staging>, forwarding: Arc<dyn Forwarding>, catalog: Arc<dyn Catalog>) -> Self {
        Self { staging, forwarding, catalog, slots: Mutex::default() }
    }

    /// The stage.
    #[must_use]
    pub fn staging(&self) -> &Arc<dyn Staging> {
        &self.staging
    }

    /// At start: loads every volume of which the stage holds something, so that its closed epochs go on even if its sender
    /// never comes back. Gives what could not be loaded; those are tried again when their senders come.
    pub async fn recover(&self) -> Vec<(VolumeId, VolumeError)> {
        let mut failed = Vec::new();
        for volume in self.staging.volumes() {
            if let Err(error) = self.settle(volume).await {
                tracing::error!(%volume, %error, "a staged volume could not be loaded; its epochs stay staged");
                metrics::counter!("blockferry_receiver_errors_total", "kind" => error.kind()).increment(1);
                failed.push((volume, error));
            }
        }
        failed
    }

    /// Decides about what the stage holds of a volume that is not loaded: loads it, so that it goes on; or drops it, where
    /// another receiver has the volume now. Nothing is done for a loaded one.
    ///
    /// # Errors
    /// [`VolumeError`] of the catalog or the stage.
    pub async fn settle(&self, volume: VolumeId) -> Result<(), VolumeError> {
        match self.get_or_load(volume, Purpose::Leftovers).await {
            Ok(_) | Err(VolumeError::Fenced(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The volume's header, without taking the volume. Safe to cancel.
    ///
    /// # Errors
    /// [`VolumeError`] of the catalog.
    pub async fn header(&self, volume: VolumeId) -> Result<Arc<VolumeHeader>, VolumeError> {
        match self.loaded(volume) {
            Some(loaded) => Ok(loaded.header()),
            None => self.catalog.header(volume).await.map(Arc::new),
        }
    }

    /// The volume, loaded now if it was not. Safe to cancel.
    ///
    /// # Errors
    /// [`VolumeError`] of the catalog or the stage.
    pub async fn get(&self, volume: VolumeId) -> Result<Arc<Volume>, VolumeError> {
        self.get_or_load(volume, Purpose::Claim).await
    }

    async fn get_or_load(&self, volume: VolumeId, purpose: Purpose) -> Result<Arc<Volume>, VolumeError> {
        let slot = Arc::clone(self.lock().entry(volume).or_default());
        let loaded = slot.get_or_try_init(|| self.load(volume, purpose)).await.cloned();
        if loaded.is_err() {
            // Names that lead nowhere must not pile up.
            let mut slots = self.lock();
            // Nor may one that others wait for be lost: this one and the map's are two.
            let unused =
                |known: &Slot| Arc::ptr_eq(known, &slot) && !known.initialized() && Arc::strong_count(known) <= 2;
            if slots.get(&volume).is_some_and(unused) {
                slots.remove(&volume);
            }
        }
        loaded
    }

    /// The volume, if it is loaded.
    #[must_use]
    pub fn loaded(&self, volume: VolumeId) -> Option<Arc<Volume>> {
        self.lock().get(&volume).and_then(|slot| slot.get().cloned())
    }

    /// The volume's disk has grown, as this header says. No effect where the volume is not loaded: it is read then anyway.
    pub fn handle_grown(&self, header: VolumeHeader) {
        if let Some(volume) = self.loaded(header.volume) {
            volume.grow(header);
        }
    }

    /// The volume for a claim of this session and incarnation.
    ///
    /// A session that was not the last one here may have been granted by another receiver since, which has taken the log then:
    /// so the log is asked, and the volume loaded anew where it was taken. (A sender draws a new session id whenever it claims
    /// from another receiver than the last time.) Where the incarnation is newer than what was loaded, the header is read
    /// anew, since another receiver may have been told that the disk grew. Safe to cancel.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn get_for(
        &self,
        volume: VolumeId,
        incarnation: Incarnation,
        session: SessionId,
    ) -> Result<Arc<Volume>, VolumeError> {
        let known = self.loaded(volume);
        let mut loaded = self.get(volume).await?;
        if let Some(known) = known.filter(|known| Arc::ptr_eq(known, &loaded) && known.session() != Some(session))
            && !self.catalog.holds(volume, known.hold()).await?
        {
            let text = "another receiver has taken the volume over; claim it again";
            self.handle_lost(volume, known.hold(), RefusalCode::Fenced, text);
            loaded = self.get(volume).await?;
        }
        if incarnation > loaded.header().current().incarnation {
            loaded.grow(self.catalog.header(volume).await?);
        }
        Ok(loaded)
    }

    /// All that are loaded, in no order.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Volume>> {
        self.lock().values().filter_map(|slot| slot.get().cloned()).collect()
    }

    /// Volumes loaded, and of them those that a sender writes.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        let slots = self.lock();
        let loaded = slots.values().filter_map(|slot| slot.get());
        loaded.fold((0, 0), |(loaded, open), volume| (loaded + 1, open + usize::from(volume.has_session())))
    }

    /// A close, and all before it, is committed: the volume's sender is told.
    pub fn handle_committed(&self, volume: VolumeId, close: CloseId) {
        if let Some(volume) = self.loaded(volume) {
            volume.handle_committed(close);
        }
    }

    /// The volume's log can't be written from here any more (another receiver has it, or the forwarder failed for good): its
    /// session ends, and it is read anew from the store at its next use.
    ///
    /// No effect where it was loaded anew since `hold` was taken.
    pub fn handle_lost(&self, volume: VolumeId, hold: Hold, code: RefusalCode, text: &str) {
        let slot = {
            let mut slots = self.lock();
            let is_of_hold = |slot: &Slot| slot.get().is_some_and(|volume| volume.hold() == hold);
            if slots.get(&volume).is_some_and(is_of_hold) { slots.remove(&volume) } else { None }
        };
        if let Some(volume) = slot.as_ref().and_then(|slot| slot.get()) {
            volume.end(code, text);
            volume.stop();
        }
    }

    /// Makes room in the stage: the open epochs of one volume are given up, that whose sender is away for longest, and for at
    /// least `grace`. Its sender, if it ever comes back, sends their pages anew. Returns the volume and how many epochs.
    pub fn shed(&self, grace: Duration) -> Option<(VolumeId, usize)> {
        let mut away: Vec<_> = {
            let slots = self.lock();
            let loaded = slots.values().filter_map(|slot| slot.get());
            loaded.filter_map(|volume| Some((volume.away_since()?, Arc::clone(volume)))).collect()
        };
        away.retain(|(since, _)| since.elapsed() >= grace);
        away.sort_by_key(|(since, volume)| (*since, volume.id()));
        away.iter().find_map(|(_, volume)| {
            let shed = volume.shed_open();
            (shed > 0).then(|| (volume.id(), shed))
        })
    }

    /// Ends every session with this reason, as at a shutdown.
    pub fn end_all(&self, code: RefusalCode, text: &str) {
        let slots: Vec<_> = self.lock().values().cloned().collect();
        for volume in slots.iter().filter_map(|slot| slot.get()) {
            volume.end(code, text);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<VolumeId, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn load(&self, volume: VolumeId, purpose: Purpose) -> Result<Arc<Volume>, VolumeError> {
        let Some(Loaded { header, committed, hold, continues }) = self.catalog.take(volume, purpose).await? else {
            let Recovered { closes, open, .. } = self.staging.recovered(volume);
            let closed = closes.iter().map(|close| close.statement().epoch);
            for epoch in closed.chain(open.iter().map(|(epoch, _)| *epoch)) {
                tracing::info!(%volume, %epoch, "another receiver has the volume: a staged epoch is dropped");
                self.staging.drop_epoch(volume, epoch).await?;
            }
            return Err(VolumeError::Fenced(format!("another receiver writes volume {volume}")));
        };
        let size = header.current();
        let geometry = Geometry::new(size.disk_bytes)
            .ok_or_else(|| VolumeError::Failed(format!("volume {volume} has a disk of {} bytes", size.disk_bytes)))?;
        let recovered = self.staging.recovered(volume);
        let plan = plan_recovery(committed, continues, recovered);
        if plan.release {
            // Committed by an earlier start that did not come to release them.
            self.staging.release(volume, committed.epoch).await?;
        }
        for epoch in &plan.dropped {
            tracing::warn!(%volume, %epoch, continues, "a staged epoch can't follow the log's head any more: it is dropped");
            self.staging.drop_epoch(volume, *epoch).await?;
        }
        let facts = Facts {
            volume,
            incarnation: size.incarnation,
            geometry,
            committed,
            uncommitted: plan.follow.iter().map(closed).collect(),
            next_epoch: plan.next_epoch,
            open: plan.open,
        };
        let (header, staging, forwarding) = (Arc::new(header), Arc::clone(&self.staging), Arc::clone(&self.forwarding));
        let loaded = Volume::start(header, hold, facts, staging, Arc::clone(&forwarding));
        for close in plan.follow {
            forwarding.closed(volume, hold, close);
        }
        Ok(loaded)
    }
}

fn closed(close: &Close) -> ClosedEpoch {
    ClosedEpoch { epoch: close.statement().epoch, close: close.id() }
}

/// What becomes of what the stage held.
#[derive(Debug, Default)]
struct RecoveryPlan {
    /// Closes that follow the log's head, in parent order.
    follow: Vec<Close>,
    /// Epochs that can't be committed any more.
    dropped: Vec<Epoch>,
    /// Open epochs that a sender may resume.
    open: Vec<(Epoch, Vec<StagedRecord>)>,
    /// The stage still holds epochs that are committed.
    release: bool,
    next_epoch: Epoch,
}

/// Decides which staged epochs still follow the log's head. None does where another receiver had the volume in between: the
/// sender may have forgotten them there.
fn plan_recovery(committed: ClosedEpoch, continues: bool, mut recovered: Recovered) -> RecoveryPlan {
    let mut plan = RecoveryPlan::default();
    let mut tip = committed;
    recovered.closes.sort_by_key(|close| close.statement().epoch);
    for close in recovered.closes {
        let epoch = close.statement().epoch;
        plan.next_epoch = plan.next_epoch.max(Epoch(epoch.0.saturating_add(1)));
        if epoch <= committed.epoch {
            plan.release = true;
        } else if continues && close.statement().parent == tip.close {
            tip = closed(&close);
            plan.follow.push(close);
        } else {
            plan.dropped.push(epoch);
        }
    }
    for (epoch, records) in recovered.open {
        if continues && epoch > tip.epoch {
            plan.open.push((epoch, records));
        } else {
            plan.dropped.push(epoch);
        }
    }
    let newest = tip.epoch.0.saturating_add(1);
    plan.next_epoch = plan.next_epoch.max(recovered.next_epoch).max(Epoch(newest));
    plan
}

#[cfg(test)]
mod tests {
    use common::clock::UnixMillis;
    use common::format::close::CloseStatement;
    use common::ids::{Digest, FleetId, GroupId, KeyId, Salt};

    use super::*;

    fn close(epoch: u64, parent: CloseId) -> Close {
        let statement = CloseStatement {
            fleet: FleetId::NIL,
            volume: VolumeId([1; 16]),
            incarnation: Incarnation(1),
            key_id: KeyId(1),
            epoch: Epoch(epoch),
            parent,
            salt: Salt::ZERO,
            cut_time: UnixMillis(0),
            point: None,
            disk_bytes: 4096,
            records: 0,
            data_pages: 0,
            zero_pages: 0,
            record_bytes: 0,
            meta_root: Digest::ZERO,
            group: GroupId::NIL,
            group_point: GroupId::NIL,
        };
        Close::new(statement, [0; 64])
    }

    #[test]
    fn staged_closes_go_on_only_as_far_as_they_follow_the_logs_head() {
        let committed = close(1, CloseId::ZERO);
        let second = close(2, committed.id());
        let third = close(4, second.id());
        let stranger = close(5, CloseId([9; 32]));
        let recovered = Recovered {
            closes: vec![third.clone(), stranger, committed.clone(), second.clone()],
            open: vec![(Epoch(3), Vec::new()), (Epoch(7), Vec::new())],
            next_epoch: Epoch(8),
        };
        let plan = plan_recovery(closed(&committed), true, recovered);
        assert_eq!(plan.follow, vec![second, third]);
        assert_eq!(plan.dropped, vec![Epoch(5), Epoch(3)]);
        assert_eq!(plan.open.iter().map(|(epoch, _)| *epoch).collect::<Vec<_>>(), vec![Epoch(7)]);
        assert_eq!(plan.next_epoch, Epoch(8));
        assert!(plan.release);
    }

    #[test]
    fn what_was_staged_before_another_receiver_had_the_volume_is_dropped_even_where_it_follows() {
        let committed = close(1, CloseId::ZERO);
        let second = close(2, committed.id());
        let recovered = Recovered { closes: vec![second], open: vec![(Epoch(3), Vec::new())], next_epoch: Epoch(4) };
        let plan = plan_recovery(closed(&committed), false, recovered);
        assert_eq!(plan.dropped, vec![Epoch(2), Epoch(3)]);
        assert!(plan.follow.is_empty() && plan.open.is_empty());
        assert_eq!(plan.next_epoch, Epoch(4), "their numbers are not used again");
    }

    #[test]
    fn an_empty_stage_starts_behind_the_log() {
        let committed = close(6, CloseId::ZERO);
        let plan = plan_recovery(closed(&committed), true, Recovered::default());
        assert_eq!(plan.next_epoch, Epoch(7));
        assert!(plan.follow.is_empty() && plan.dropped.is_empty() && !plan.release);
    }
}
