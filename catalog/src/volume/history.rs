//! A volume's whole log in memory: what restore, verify and the listing of points work on.
//!
//! Some 500 bytes for each epoch and 200 for each segment. Everything in it was checked as [`super::log`] promises: the
//! checkpoint is not asked, since nothing proves it yet (decision 0004).

use std::collections::{HashMap, HashSet};

use common::clock::UnixMillis;
use common::format::checkpoint::PointSummary;
use common::format::close::Close;
use common::format::log::{LogEntry, Maintenance, SegmentRef};
use common::format::volume_header::VolumeHeader;
use common::ids::{CloseId, LogSeq};

use super::log::{LogError, LogPosition, LogReader, ReadEntry};
use crate::store::Store;

/// A committed epoch.
#[derive(Debug, Clone)]
pub struct HistoryEpoch {
    /// Its close.
    pub close: Close,
    /// The log entry that committed it.
    pub seq: LogSeq,
    /// When that entry was written.
    pub written: UnixMillis,
    /// Indexes into [`History::segments`]: where its records lie.
    pub segments: Vec<u32>,
}

/// All that a volume's log says.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// Every segment referred to, once each.
    pub segments: Vec<SegmentRef>,
    /// Committed epochs, oldest first.
    pub epochs: Vec<HistoryEpoch>,
    /// The end of the log.
    pub position: LogPosition,
    known: HashMap<String, u32>,
    expired: HashSet<CloseId>,
    given_up: HashMap<String, LogSeq>,
}

impl History {
    /// Reads the whole log of `header`'s volume.
    ///
    /// # Errors
    /// Those of [`LogReader`].
    pub async fn read(store: &Store, header: &VolumeHeader) -> Result<Self, LogError> {
        Self::read_up_to(store, header, LogSeq(u64::MAX)).await
    }

    /// Reads the log of `header`'s volume up to the entry `last`, or its end.
    ///
    /// # Errors
    /// Those of [`LogReader`].
    pub async fn read_up_to(store: &Store, header: &VolumeHeader, last: LogSeq) -> Result<Self, LogError> {
        let mut reader = LogReader::open(store, header, LogPosition::default()).await?;
        let mut history = Self::default();
        while reader.position().seq < last
            && let Some(ReadEntry { entry, .. }) = reader.next().await?
        {
            history.push(&entry);
        }
        history.position = reader.position().clone();
        Ok(history)
    }

    /// As much of the log of `header`'s volume as is whole: all before the first entry that is missing, damaged or replaced, and what is
    /// wrong with that one.
    ///
    /// # Errors
    /// [`LogError`] where the store failed, which says nothing of the log.
    pub async fn read_whole_part(store: &Store, header: &VolumeHeader) -> Result<(Self, Option<LogError>), LogError> {
        let mut reader = LogReader::open(store, header, LogPosition::default()).await?;
        let mut history = Self::default();
        let bad = loop {
            match reader.next().await {
                Ok(Some(ReadEntry { entry, .. })) => history.push(&entry),
                Ok(None) => break None,
                Err(error) if error.bad_object().is_some() => break Some(error),
                Err(error) => return Err(error),
            }
        };
        history.position = reader.position().clone();
        Ok((history, bad))
    }

    /// Adds an entry that follows the ones before. Does not move [`Self::position`].
    pub fn push(&mut self, entry: &LogEntry) {
        if let Some(maintenance) = &entry.maintenance {
            self.apply(entry.seq, maintenance);
        }
        let places: Vec<u32> = entry.segments.iter().map(|segment| self.place(segment)).collect();
        for committed in &entry.epochs {
            self.epochs.push(HistoryEpoch {
                close: committed.close.clone(),
                seq: entry.seq,
                written: entry.written,
                segments: committed.segments.iter().filter_map(|&i| places.get(i as usize).copied()).collect(),
            });
        }
    }

    /// What a collector stated.
    fn apply(&mut self, seq: LogSeq, maintenance: &Maintenance) {
        self.expired.extend(&maintenance.expired);
        self.given_up.extend(maintenance.condemned.iter().map(|path| (path.clone(), seq)));
        let mut moved: HashMap<u32, u32> = HashMap::new();
        for replacement in &maintenance.replaced {
            let new = self.place(&replacement.new);
            for path in &replacement.old {
                moved.extend(self.known.remove(path).map(|old| (old, new)));
                self.given_up.insert(path.clone(), seq);
            }
        }
        if moved.is_empty() {
            return;
        }
        for epoch in &mut self.epochs {
            if epoch.segments.iter().any(|place| moved.contains_key(place)) {
                let mut places: Vec<u32> = Vec::with_capacity(epoch.segments.len());
                for place in &epoch.segments {
                    let place = *moved.get(place).unwrap_or(place);
                    // Two old segments of one epoch may have become one.
                    if !places.contains(&place) {
                        places.push(place);
                    }
                }
                epoch.segments = places;
            }
        }
    }

    /// All recovery points that are offered, oldest first: those that did not expire.
    #[must_use]
    pub fn points(&self) -> Vec<PointSummary> {
        let mut new_bytes = 0;
        let summarise = |epoch: &HistoryEpoch| summary(&epoch.close, epoch.written, &mut new_bytes);
        self.epochs.iter().filter_map(summarise).filter(|point| !self.expired.contains(&point.id)).collect()
    }

    /// True where the point that `close` asserts has expired.
    #[must_use]
    pub fn is_expired(&self, close: CloseId) -> bool {
        self.expired.contains(&close)
    }

    /// Objects that a collector gave up, replaced or condemned, and the entry that says so.
    #[must_use]
    pub fn given_up(&self) -> &HashMap<String, LogSeq> {
        &self.given_up
    }

    /// True where an epoch has records in the segment at `path`, as the log stands.
    #[must_use]
    pub fn names(&self, path: &str) -> bool {
        self.known.contains_key(path)
    }

    /// The place in [`Self::epochs`] of the epoch that `close` ended.
    #[must_use]
    pub fn find(&self, close: CloseId) -> Option<usize> {
        self.epochs.iter().position(|epoch| epoch.close.id() == close)
    }

    fn place(&mut self, segment: &SegmentRef) -> u32 {
        if let Some(&place) = self.known.get(&segment.path)
            && self.segments[place as usize] == *segment
        {
            return place;
        }
        let place = u32::try_from(self.segments.len()).expect("a log in memory names fewer than 2^32 segments");
        self.segments.push(segment.clone());
        self.known.insert(segment.path.clone(), place);
        place
    }
}

/// The point that `close` asserts, if it does. Adds the epoch's bytes to `unpointed`, and resets it where there is a point.
pub(super) fn summary(close: &Close, written: UnixMillis, unpointed: &mut u64) -> Option<PointSummary> {
    let statement = close.statement();
    *unpointed = unpointed.saturating_add(statement.record_bytes);
    let consistency = statement.point?;
    Some(PointSummary {
        id: close.id(),
        incarnation: statement.incarnation,
        epoch: statement.epoch,
        cut_time: statement.cut_time,
        consistency,
        disk_bytes: statement.disk_bytes,
        new_bytes: std::mem::take(unpointed),
        committed: written,
        group_point: statement.group_point,
    })
}
