//! A recovery point that was chosen and can be read: its history, its key, and where its pages lie.

#![allow(clippy::cast_possible_truncation, reason = "a log in memory has fewer than 2^32 epochs")]

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use catalog::store::Store;
use catalog::volume::header;
use catalog::volume::history::History;
use common::format::checkpoint::PointSummary;
use common::format::close::Close;
use common::format::volume_header::VolumeHeader;
use common::ids::Geometry;
use common::seal::DataKey;
use futures::StreamExt as _;

use crate::epochs::{self, EpochError};
use crate::error::OperatorError;
use crate::keys::ReadKeyFile;
use crate::restore::RestoreError;
use crate::restore::plan::{Plan, Planner};
use crate::select::PointWanted;

/// Epochs whose metadata is read ahead.
const EPOCHS_AHEAD: usize = 4;

/// Everything that planning and reading a point needs.
#[derive(Debug)]
pub struct PointSource {
    /// Where it lies.
    pub store: Store,
    /// Its volume's header.
    pub header: VolumeHeader,
    /// `MACHINE/NAME`.
    pub volume: String,
    /// The volume's whole log.
    pub history: Arc<History>,
    /// The point.
    pub point: PointSummary,
    /// Index of its epoch in the history.
    pub newest: usize,
    /// Its disk.
    pub geometry: Geometry,
    /// Opens its records.
    pub data_key: DataKey,
}

impl PointSource {
    /// Finds the volume, reads and checks its whole log, chooses the point, and opens the data key: a wrong key ends here.
    ///
    /// # Errors
    /// [`OperatorError`].
    pub async fn open(
        store: &Store,
        volume: &str,
        point: &PointWanted,
        key_file: &Path,
    ) -> Result<Self, OperatorError> {
        let key_file = ReadKeyFile::read(key_file)?;
        let header = header::find(store, volume).await?.header;
        let volume = header::full_name(&header);
        let history = Arc::new(History::read(store, &header).await?);
        let point = point.choose(&volume, &history.points())?;
        let data_key = key_file.unlock(&header)?;
        let newest = history.find(point.id).expect("the point was listed from this history");
        let geometry = Geometry::new(point.disk_bytes).expect("a decoded close has a disk size within limits");
        Ok(Self { store: store.clone(), header, volume, history, point, newest, geometry, data_key })
    }

    /// The log's newest close when it was read.
    #[must_use]
    pub fn head(&self) -> &Close {
        self.history.position.head.as_ref().expect("a history with a point has a head")
    }

    /// Plans some blocks of the disk, newest epoch first, until every page is covered.
    ///
    /// # Errors
    /// [`EpochError`], and [`RestoreError::Plan`] where the point is not complete.
    pub async fn plan(&self, blocks: Range<u64>) -> Result<Plan, OperatorError> {
        let mut planner = Planner::new(self.geometry, blocks);
        // Epochs of earlier incarnations too: what did not change when the disk grew was not sent again.
        let numbers: Vec<usize> = (0..=self.newest).rev().collect();
        let mut loaded = futures::stream::iter(numbers)
            .map(|number| async move {
                let epoch = &self.history.epochs[number];
                Ok::<_, EpochError>((number, epochs::load(&self.store, &self.history, epoch).await?))
            })
            .buffered(EPOCHS_AHEAD);
        let failed = |source| RestoreError::Plan { volume: self.volume.clone(), source };
        while !planner.is_complete()
            && let Some(epoch) = loaded.next().await
        {
            let (number, records) = epoch?;
            let statement = self.history.epochs[number].close.statement();
            let disk = Geometry::new(statement.disk_bytes).expect("a decoded close has a disk size within limits");
            for (segment, entry) in &records {
                planner.add(number as u32, statement.epoch, disk, *segment, entry).map_err(failed)?;
            }
        }
        Ok(planner.finish(self.point.epoch).map_err(failed)?)
    }
}
