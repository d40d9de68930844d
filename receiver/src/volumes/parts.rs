//! The real stage and the real store, as volumes see them.

use std::sync::Arc;

use catalog::store::Store;
use catalog::volume::{header, open_view};
use common::budget::Permit;
use common::error::{Dispose, Disposition};
use common::format::close::Close;
use common::format::record::{Record, RecordMeta};
use common::format::volume_header::VolumeHeader;
use common::ids::{Epoch, SessionId, VolumeId};
use common::session::{ClosedEpoch, StagedRecord};
use futures::FutureExt as _;
use futures::future::BoxFuture;

use super::check::check_close;
use super::{Catalog, Intake, Loaded, Pending, Recovered, Staging, VolumeError};
use crate::stage::{Stage, StageError, VolumeIntake};

fn failed(error: impl std::fmt::Display) -> VolumeError {
    VolumeError::Failed(error.to_string())
}

/// Errors of the stage that speak of what the sender sent are the sender's; all others are this receiver's.
impl From<StageError> for VolumeError {
    fn from(error: StageError) -> Self {
        match error {
            StageError::Conflict { .. } | StageError::EpochEnded { .. } => Self::Bad(error.to_string()),
            other => failed(other),
        }
    }
}

impl Intake for VolumeIntake {
    fn admit(&self) -> BoxFuture<'_, Result<(), VolumeError>> {
        async { Self::admit(self).await.map_err(failed) }.boxed()
    }
}

impl Staging for Stage {
    fn intake_of(&self, volume: VolumeId) -> Box<dyn Intake> {
        Box::new(Self::intake_of(self, volume))
    }

    fn stage(&self, record: Record, meta: RecordMeta, permit: Permit) -> Pending<()> {
        let stage = self.clone();
        async move { Ok(stage.submit_with(record, meta, Some(permit)).await?.await?) }.boxed()
    }

    fn close(&self, header: Arc<VolumeHeader>, close: Close) -> Pending<()> {
        let stage = self.clone();
        async move {
            let (volume, epoch) = (close.statement().volume, close.statement().epoch);
            // An epoch without records is unknown to the stage.
            let metas = match close.statement().records {
                0 => Vec::new(),
                _ => stage.epoch_meta(volume, epoch).await?,
            };
            let checked = close.clone();
            // Hashing 32,768 metadata takes some milliseconds: not on a thread that serves streams.
            let checked = tokio::task::spawn_blocking(move || check_close(&header, &checked, &metas));
            checked.await.map_err(failed)?.map_err(VolumeError::Bad)?;
            Ok(stage.submit_close(&close)?.await?)
        }
        .boxed()
    }

    fn drop_epoch(&self, volume: VolumeId, epoch: Epoch) -> Pending<()> {
        let stage = self.clone();
        async move { Ok(Self::drop_epoch(&stage, volume, epoch).await?) }.boxed()
    }

    fn release(&self, volume: VolumeId, up_to: Epoch) -> Pending<()> {
        let stage = self.clone();
        async move { Ok(Self::release(&stage, volume, up_to).await?) }.boxed()
    }

    fn begin_session(&self, volume: VolumeId, session: SessionId) -> Pending<()> {
        let stage = self.clone();
        async move { Ok(stage.set_session(volume, session).await?) }.boxed()
    }

    fn recovered(&self, volume: VolumeId) -> Recovered {
        let known = self.volume(volume);
        let mut recovered = Recovered { next_epoch: known.next_epoch, ..Recovered::default() };
        for state in known.epochs {
            match state.close {
                Some(close) => recovered.closes.push(close),
                None => {
                    let records = self.staged_records(volume, state.epoch).into_iter();
                    let records = records.map(|(block, tag)| StagedRecord { block, tag }).collect();
                    recovered.open.push((state.epoch, records));
                }
            }
        }
        recovered
    }

    fn volumes(&self) -> Vec<VolumeId> {
        Self::volumes(self)
    }
}

/// Reads volumes from the object store.
#[derive(Debug, Clone)]
pub struct StoreCatalog(Store);

impl StoreCatalog {
    /// Reads from `store`.
    #[must_use]
    pub fn new(store: Store) -> Self {
        Self(store)
    }
}

impl Catalog for StoreCatalog {
    fn load(&self, volume: VolumeId) -> Pending<Loaded> {
        let store = self.0.clone();
        async move {
            let header = match header::read(&store, volume).await {
                Ok(stored) => stored.header,
                Err(header::HeaderError::NoVolume { .. }) => return Err(VolumeError::NotFound(volume)),
                Err(error) => return Err(failed(error)),
            };
            let view = open_view(&store, &header).await.map_err(|error| match error.disposition() {
                Disposition::Fenced => VolumeError::Fenced(error.to_string()),
                _ => failed(error),
            })?;
            let head = view.position.head.as_ref();
            let committed = head.map(|close| ClosedEpoch { epoch: close.statement().epoch, close: close.id() });
            Ok(Loaded { header, committed: committed.unwrap_or_default() })
        }
        .boxed()
    }
}
