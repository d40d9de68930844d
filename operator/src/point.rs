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
use crate::intact;
use crate::keys::ReadKeyFile;
use crate::restore::RestoreError;
use crate::restore::plan::{Plan, Planner};
use crate::select::PointWanted;
use crate::verify::tell_intact;

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
    /// Finds the volume, opens its data key (a wrong key ends here), reads and checks its log, and chooses the point. Behind damage of
    /// the log there are no points; of those before, only one that is named by its id is taken.
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
        let data_key = key_file.unlock(&header)?;
        let volume = header::full_name(&header);
        let (history, bad) = History::read_whole_part(store, &header).await?;
        let history = Arc::new(history);
        let points = history.points();
        let at = |point: PointSummary| {
            let newest = history.find(point.id).expect("the point was listed from this history");
            let geometry = Geometry::new(point.disk_bytes).expect("a decoded close has a disk size within limits");
            let (store, header, volume) = (store.clone(), header.clone(), volume.clone());
            Self {
                store,
                header,
                volume,
                history: Arc::clone(&history),
                point,
                newest,
                geometry,
                data_key: data_key.clone(),
            }
        };
        let Some(bad) = bad else { return Ok(at(point.choose(&volume, &points)?)) };
        // Whoever names a point by its id means that one; all others may mean one that the log has lost.
        if matches!(point, PointWanted::Id(_) | PointWanted::Group(_))
            && let Ok(point) = point.choose(&volume, &points)
        {
            tracing::warn!(error = %bad, "the log is damaged behind this point: newer history is not seen");
            return Ok(at(point));
        }
        let offer = match points.last() {
            Some(last) => intact::offer(&at(*last), None, &[]).await,
            None => tell_intact(None),
        };
        Err(RestoreError::Damaged { source: Box::new(bad.into()), offer }.into())
    }

    /// The same volume at another of its points.
    #[must_use]
    pub fn at(&self, point: PointSummary) -> Option<Self> {
        let newest = self.history.find(point.id)?;
        let geometry = Geometry::new(point.disk_bytes)?;
        let (store, header, volume) = (self.store.clone(), self.header.clone(), self.volume.clone());
        let (history, data_key) = (Arc::clone(&self.history), self.data_key.clone());
        Some(Self { store, header, volume, history, point, newest, geometry, data_key })
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
