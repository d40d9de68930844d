//! A volume's points as a policy sees them: with the times at which the store wrote their log entries.
//!
//! Promises: an entry that the store does not list with its time is an error, never a guess. Never: takes a time that a
//! receiver wrote into an entry for the store's.

use std::collections::HashMap;

use common::clock::UnixMillis;
use common::ids::{LogSeq, VolumeId};
use futures::StreamExt as _;

use super::policy::PolicyPoint;
use super::store_time::StoreTimeError;
use crate::store::{Store, StoreError};
use crate::volume::history::History;
use crate::volume::paths;

/// When the store wrote each entry of a log; 16 bytes an entry.
#[derive(Debug, Clone, Default)]
pub struct EntryTimes {
    times: HashMap<LogSeq, UnixMillis>,
}

impl EntryTimes {
    /// Lists the log of `volume`.
    ///
    /// # Errors
    /// Those of a listing.
    pub async fn list(store: &Store, volume: VolumeId) -> Result<Self, StoreError> {
        let mut times = HashMap::new();
        let mut listing = store.list_stream(&paths::log_folder(volume))?;
        while let Some(meta) = listing.next().await {
            let meta = meta?;
            if let Some(seq) = paths::sequence(&meta.path) {
                times.insert(seq, meta.modified);
            }
        }
        Ok(Self { times })
    }

    /// When the store wrote entry `seq`; `None` where it does not list it.
    #[must_use]
    pub fn of(&self, seq: LogSeq) -> Option<UnixMillis> {
        self.times.get(&seq).copied()
    }

    /// The newest of all: the store's time can't be before that.
    #[must_use]
    pub fn newest(&self) -> Option<UnixMillis> {
        self.times.values().copied().max()
    }
}

/// The points that `history` offers, oldest first, with the store's times for their entries.
///
/// # Errors
/// [`StoreTimeError::NotListed`] where an entry that commits a point is not among `times`.
pub fn policy_points(
    volume: VolumeId,
    history: &History,
    times: &EntryTimes,
) -> Result<Vec<PolicyPoint>, StoreTimeError> {
    let entries: HashMap<_, _> = history.epochs.iter().map(|epoch| (epoch.close.id(), epoch.seq)).collect();
    let with_time = |point: &common::format::checkpoint::PointSummary| {
        let seq = entries.get(&point.id).copied().unwrap_or_default();
        let not_listed = || StoreTimeError::NotListed { path: paths::log_entry(volume, seq) };
        let committed = times.of(seq).ok_or_else(not_listed)?;
        Ok(PolicyPoint { id: point.id, committed, consistency: point.consistency, epoch: point.epoch })
    };
    history.points().iter().map(with_time).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use common::format::close::Consistency;

    use super::*;
    use crate::volume::fixture::{FixtureVolume, change, image};

    #[tokio::test]
    async fn a_point_is_as_old_as_its_entry_is_for_the_store_whatever_a_receiver_wrote() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(&format!("file://{}/store", dir.path().display())).await.expect("a store");
        let mut volume = FixtureVolume::create(&store, "m", "v", 1 << 20).await;
        let (mut content, volume_id) = (image(1 << 20, 1), volume.header.volume);
        let age = |seq: u64, seconds: u64| {
            let entry = paths::log_entry(volume_id, LogSeq(seq));
            let file = std::fs::File::open(dir.path().join("store").join(entry)).expect("the entry");
            file.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(seconds)).expect("set");
        };
        // The log's first entry claims it and commits nothing.
        age(1, 1);
        let kinds = [Some(Consistency::Fuzzy), None, Some(Consistency::Crash)];
        for (number, point) in kinds.into_iter().enumerate() {
            volume.capture(&content, point).await;
            age(number as u64 + 2, 1_000_000 * (number as u64 + 1));
            content = change(&content, 3, number as u64);
        }
        let history = History::read(&store, &volume.header).await.expect("a history");
        let mut times = EntryTimes::list(&store, volume.header.volume).await.expect("listed");
        assert_eq!(times.newest(), Some(UnixMillis(3_000_000_000)));
        let points = policy_points(volume.header.volume, &history, &times).expect("points");
        let found: Vec<_> = points.iter().map(|p| (p.epoch.0, p.committed.0, p.consistency)).collect();
        assert_eq!(found, [(1, 1_000_000_000, Consistency::Fuzzy), (3, 3_000_000_000, Consistency::Crash)]);
        assert_eq!(points[1].id, volume.head());

        times.times.remove(&LogSeq(4));
        let error = policy_points(volume.header.volume, &history, &times).expect_err("an entry is not listed");
        assert!(error.to_string().contains("log/00000000000000000004"), "{error}");
    }
}
