//! Joins the stage, the catalog and the forwarder to [`crate::volumes`], which knows them by traits only.

use std::sync::Arc;
use std::time::Duration;

use catalog::fleet::receivers::ReceiverState;
use catalog::store::Store;
use catalog::volume::LogError;
use catalog::volume::header::{self, HeaderError};
use catalog::volume::lifecycle;
use common::budget::Permit;
use common::error::{Dispose, Disposition};
use common::format::close::Close;
use common::format::frame::RefusalCode;
use common::format::lifecycle::Phase;
use common::format::record::{Record, RecordMeta};
use common::format::volume_header::VolumeHeader;
use common::ids::{Epoch, SessionId, VolumeId};
use common::session::{ClosedEpoch, StagedRecord};
use futures::future::BoxFuture;
use tokio::sync::{mpsc, watch};

use crate::drain::{Draining, Left};
use crate::forward::{ForwardEvent, ForwardHandle, Taken};
use crate::registry::Registry;
use crate::stage::{self, Stage, StageError, VolumeIntake};
use crate::verify;
use crate::volumes::{Catalog, Hold, Intake, Loaded, Pending, Purpose, Recovered, Staging, VolumeError, Volumes};

/// The stage as volumes see it.
pub(super) struct StageOfVolumes(pub(super) Stage);

fn failed(error: StageError) -> VolumeError {
    match error.disposition() {
        Disposition::BadInput => VolumeError::Bad(error.to_string()),
        _ => VolumeError::Failed(error.to_string()),
    }
}

/// One stream's place at the stage's gate.
struct IntakeOfStream(VolumeIntake);

impl Intake for IntakeOfStream {
    fn admit(&self) -> BoxFuture<'_, Result<(), VolumeError>> {
        Box::pin(async { self.0.admit().await.map_err(failed) })
    }

    fn passed_over<'a>(&'a self, by: &'a (dyn Fn(VolumeId) -> bool + Send + Sync)) -> BoxFuture<'a, ()> {
        Box::pin(self.0.passed_over(by))
    }
}

impl Staging for StageOfVolumes {
    fn intake_of(&self, volume: VolumeId) -> Box<dyn Intake> {
        Box::new(IntakeOfStream(self.0.intake_of(volume)))
    }

    fn release(&self, volume: VolumeId, up_to: Epoch) -> Pending<()> {
        let stage = self.0.clone();
        Box::pin(async move { stage.release(volume, up_to).await.map_err(failed) })
    }

    fn stage(&self, record: Record, meta: RecordMeta, permit: Permit) -> Pending<()> {
        let stage = self.0.clone();
        Box::pin(async move {
            let ticket = stage.submit_with(record, meta, Some(permit)).await.map_err(failed)?;
            ticket.await.map_err(failed)
        })
    }

    fn close(&self, header: Arc<VolumeHeader>, close: Close) -> Pending<()> {
        let stage = self.0.clone();
        Box::pin(async move {
            let statement = close.statement();
            let metas = if statement.records == 0 {
                Vec::new()
            } else {
                stage.epoch_meta(statement.volume, statement.epoch).await.map_err(failed)?
            };
            verify::check_close(&header, &close, &metas).map_err(|error| VolumeError::Bad(error.to_string()))?;
            stage.submit_close(&close).map_err(failed)?.await.map_err(failed)
        })
    }

    fn drop_epoch(&self, volume: VolumeId, epoch: Epoch) -> Pending<()> {
        let stage = self.0.clone();
        Box::pin(async move { stage.drop_epoch(volume, epoch).await.map_err(failed) })
    }

    fn forget_open(&self, volume: VolumeId, epoch: Epoch) -> Pending<()> {
        let stage = self.0.clone();
        Box::pin(async move { stage.forget_open(volume, epoch).await.map_err(failed) })
    }

    fn begin_session(&self, volume: VolumeId, session: SessionId) -> Pending<()> {
        let stage = self.0.clone();
        Box::pin(async move { stage.set_session(volume, session).await.map_err(failed) })
    }

    fn recovered(&self, volume: VolumeId) -> Recovered {
        let found = self.0.volume(volume);
        let mut recovered = Recovered { next_epoch: found.next_epoch, ..Recovered::default() };
        for epoch in found.epochs {
            match epoch.close {
                Some(close) => recovered.closes.push(close),
                None => {
                    let records = self.0.staged_records(volume, epoch.epoch).into_iter();
                    let records = records.map(|(block, tag)| StagedRecord { block, tag }).collect();
                    recovered.open.push((epoch.epoch, records));
                }
            }
        }
        recovered
    }

    fn volumes(&self) -> Vec<VolumeId> {
        self.0.volumes()
    }
}

/// The store as volumes see it; the forwarder has the right to write their logs.
pub(super) struct StoreOfVolumes {
    pub(super) store: Store,
    pub(super) forward: ForwardHandle,
}

async fn read_header(store: &Store, volume: VolumeId) -> Result<VolumeHeader, VolumeError> {
    match header::read(store, volume).await {
        Ok(stored) => Ok(stored.header),
        Err(HeaderError::NoVolume { volume }) => Err(VolumeError::NotFound(volume)),
        Err(error) => Err(VolumeError::Failed(error.to_string())),
    }
}

/// A volume that is retired or deleted is not written, until an operator says otherwise. What was closed before goes on to the store.
async fn refuse_retired(store: &Store, header: &VolumeHeader) -> Result<(), VolumeError> {
    let phase = lifecycle::phase(store, header.volume).await.map_err(|error| VolumeError::Failed(error.to_string()))?;
    let back = match phase {
        Phase::Active => return Ok(()),
        Phase::Retired => "unretire",
        Phase::Deleted => "restore",
    };
    let (name, phase) = (header::full_name(header), phase.as_str());
    let text = format!("volume {name} is {phase}: `blockferry volume {back}` lets it be written again");
    Err(VolumeError::Retired(text))
}

fn log_failed(error: LogError) -> VolumeError {
    match error {
        LogError::Fenced { .. } => VolumeError::Fenced(error.to_string()),
        error => VolumeError::Failed(error.to_string()),
    }
}

impl Catalog for StoreOfVolumes {
    fn header(&self, volume: VolumeId) -> Pending<VolumeHeader> {
        let store = self.store.clone();
        Box::pin(async move { read_header(&store, volume).await })
    }

    fn take(&self, volume: VolumeId, purpose: Purpose) -> Pending<Option<Loaded>> {
        let (store, forward) = (self.store.clone(), self.forward.clone());
        Box::pin(async move {
            let header = read_header(&store, volume).await?;
            let leftovers = purpose == Purpose::Leftovers;
            if !leftovers {
                refuse_retired(&store, &header).await?;
            }
            let taken = forward.take(header.clone(), leftovers).await.map_err(log_failed)?;
            Ok(taken.map(|Taken { head, hold, continues }| {
                let committed = ClosedEpoch { epoch: head.epoch, close: head.close };
                Loaded { header, committed, hold, continues }
            }))
        })
    }

    fn holds(&self, volume: VolumeId, hold: Hold) -> Pending<bool> {
        let forward = self.forward.clone();
        Box::pin(async move { forward.holds(volume, hold).await.map_err(log_failed) })
    }
}

/// Tells volumes what became of what was forwarded, until the forwarder is gone.
pub(super) async fn report(mut events: mpsc::UnboundedReceiver<ForwardEvent>, volumes: Arc<Volumes>) {
    while let Some(event) = events.recv().await {
        match event {
            ForwardEvent::Committed { volume, close } => volumes.handle_committed(volume, close),
            ForwardEvent::Lost { volume, hold, code, text } => {
                volumes.handle_lost(volume, hold, code, &text);
                if code == RefusalCode::Fenced {
                    let volumes = Arc::clone(&volumes);
                    tokio::spawn(async move {
                        // What is not dropped now is at the volume's next load.
                        if let Err(error) = volumes.settle(volume).await {
                            tracing::warn!(%volume, %error, "what is staged of a lost volume could not be dropped yet");
                        }
                    });
                }
            }
        }
    }
}

/// What a drain waits for: sessions, and closed epochs in the stage.
pub(super) fn left(stage: Stage, volumes: Arc<Volumes>) -> Left {
    Arc::new(move || {
        let closed = stage.volumes().into_iter().flat_map(|volume| stage.volume(volume).epochs);
        closed.filter(|epoch| epoch.close.is_some()).count() + volumes.counts().1
    })
}

/// Once asked to drain: tells the fleet, and takes care of staged volumes that nobody claimed.
pub(super) async fn drain_once_asked(draining: Draining, registry: Arc<Registry>, volumes: Arc<Volumes>, stage: Stage) {
    metrics::gauge!("blockferry_receiver_draining").set(0.0);
    draining.asked().await;
    metrics::gauge!("blockferry_receiver_draining").set(1.0);
    tracing::info!("draining: senders are told to go elsewhere, what is closed is forwarded");
    registry.announce(ReceiverState::Draining).await;
    let left = left(stage, Arc::clone(&volumes));
    while left() > 0 {
        // One that could not be loaded before, or was lost since.
        volumes.recover().await;
        tokio::time::sleep(SHED_INTERVAL).await;
    }
    tracing::info!("drained: nothing that is closed is left here");
}

/// How long the stage has been full before the room of open epochs is taken.
const FULL_GRACE: Duration = Duration::from_secs(15);
/// How long a sender has been away before the room of its open epochs may be taken: longer than its backoff, so that none loses
/// what it had staged to a restart of this receiver or a cut link.
const AWAY_GRACE: Duration = Duration::from_secs(60);
/// How often a full stage is looked at: about as long as it takes to free the space of what was given up.
const SHED_INTERVAL: Duration = Duration::from_secs(2);

/// Where the stage stays full, gives up the open epochs of senders that are away, one volume at a time, so that the others go on.
/// They hold nothing that is a recovery point yet, and their pages are still marked as changed at their senders.
pub(super) async fn relieve(mut intake: watch::Receiver<stage::Intake>, volumes: Arc<Volumes>) {
    let is_full = |now: &stage::Intake| matches!(now, stage::Intake::Full { .. });
    loop {
        if intake.wait_for(is_full).await.is_err() {
            return;
        }
        // Changes while it is full are only about who is favoured.
        if tokio::time::timeout(FULL_GRACE, intake.wait_for(|now| !is_full(now))).await.is_ok() {
            continue;
        }
        while is_full(&intake.borrow()) {
            if let Some((volume, epochs)) = volumes.shed(AWAY_GRACE) {
                tracing::warn!(
                    %volume, epochs,
                    "the stage is full and this volume's sender is away: its open epochs are given up, it sends their pages again"
                );
                metrics::counter!("blockferry_receiver_errors_total", "kind" => "stage_shed").increment(1);
            }
            let opened = tokio::time::timeout(SHED_INTERVAL, intake.wait_for(|now| !is_full(now))).await;
            if matches!(opened, Ok(Err(_))) {
                return;
            }
        }
    }
}
