//! Segments, each read once from start to end, and the epochs in them.

#![allow(clippy::cast_possible_truncation, reason = "a chunk of at most some 4 MiB")]

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use catalog::store::Store;
use catalog::volume::history::History;
use catalog::volume::segment::{self, SegmentError};
use common::budget::{Budget, BudgetError, MemoryTable};
use common::format::checkpoint::PointSummary;
use common::format::log::SegmentRef;
use common::format::record::Record;
use common::format::segment::{PREAMBLE_BYTES, SegmentGroup, SegmentIndex, check_preamble};
use common::ids::{BlockIndex, CloseId, Epoch, Geometry, Incarnation, PageMask, VolumeId};
use common::limits::{BLOCK_BYTES, RECORD_BYTES_MAX};
use common::ops::progress::Progress;
use common::seal::{DataKey, EpochContext, EpochKey, Opener};
use futures::StreamExt as _;

use super::VerifyReport;
use crate::epochs::{self, EpochError, Placed};
use crate::error::OperatorError;

/// Segments read at the same time.
const SEGMENTS_IN_PARALLEL: usize = 4;
/// Bytes of a segment read at a time.
const CHUNK_BYTES: u64 = 4 << 20;
/// Memory set aside for indexes and coverage masks.
const INDEX_BYTES: u64 = 24 << 20;

/// What one segment's scan gave.
struct Scanned {
    place: u32,
    index: Option<Arc<SegmentIndex>>,
    records: u64,
    opened: u64,
    bytes: u64,
    bad: Option<String>,
}

/// All that scans share.
struct Scanner {
    store: Store,
    volume: VolumeId,
    keys: Option<DataKey>,
    /// Place of each epoch in the history.
    epochs: HashMap<(Incarnation, Epoch), usize>,
    history: Arc<History>,
    budget: Budget,
    progress: Progress,
    openers: Mutex<Vec<Opener>>,
}

/// Checks the segments of the first `newest` epochs, each completely, and each epoch against its close; and whether each point
/// among them (`whole`), or only the last, is complete. Pages of a disk that grew are those of its smaller self until sent anew.
pub(super) async fn check(
    store: &Store,
    history: &History,
    newest: usize,
    whole: bool,
    data_key: Option<&DataKey>,
    budget_bytes: u64,
    report: &mut VerifyReport,
) -> Result<(), OperatorError> {
    if newest == 0 {
        return Ok(());
    }
    let taken: Vec<usize> = (0..newest).collect();
    // In the order of first use, so that an epoch can be judged as soon as its last segment was read.
    let (mut order, mut uses) = (Vec::new(), HashMap::<u32, usize>::new());
    for &at in &taken {
        for &place in &history.epochs[at].segments {
            let count = uses.entry(place).or_insert(0);
            if *count == 0 {
                order.push(place);
            }
            *count += 1;
        }
    }
    let total = order.iter().map(|&place| history.segments[place as usize].size).sum();
    let key = |at: usize| {
        let statement = history.epochs[at].close.statement();
        ((statement.incarnation, statement.epoch), at)
    };
    let budget = Budget::new(MemoryTable::new(budget_bytes).with("segment indexes", INDEX_BYTES))?;
    let scanner = Arc::new(Scanner {
        store: store.clone(),
        volume: history.epochs[taken[0]].close.statement().volume,
        keys: data_key.cloned(),
        epochs: (0..history.epochs.len()).map(key).collect(),
        history: Arc::new(history.clone()),
        budget,
        progress: Progress::bytes("verify", Some(total)),
        openers: Mutex::new(Vec::new()),
    });
    let mut scans = futures::stream::iter(order)
        .map(|place| {
            let scanner = Arc::clone(&scanner);
            async move { scanner.scan(place).await }
        })
        .buffered(SEGMENTS_IN_PARALLEL);
    let mut indexes: HashMap<u32, Arc<SegmentIndex>> = HashMap::new();
    let mut scanned: HashMap<u32, bool> = HashMap::new();
    let mut coverage = Coverage::default();
    for &at in &taken {
        let epoch = &history.epochs[at];
        while epoch.segments.iter().any(|place| !scanned.contains_key(place))
            && let Some(scan) = scans.next().await
        {
            let scan = scan?;
            report.segments += 1;
            (report.records, report.records_opened) =
                (report.records + scan.records, report.records_opened + scan.opened);
            report.read(scan.bytes);
            if let Some(what) = scan.bad {
                report.bad(history.segments[scan.place as usize].path.clone(), what);
                coverage.bad_segments.insert(scan.place);
            }
            scanned.insert(scan.place, scan.index.is_some());
            indexes.extend(scan.index.map(|index| (scan.place, index)));
        }
        if epoch.segments.iter().all(|place| indexes.contains_key(place)) {
            match epochs::gather(history, epoch, &indexes) {
                Ok(records) => coverage.add(history, at, &records, report),
                Err(EpochError::NotProven { what, .. }) => {
                    coverage.lose_all(history, at);
                    for &place in &epoch.segments {
                        let statement = epoch.close.statement();
                        let path = history.segments[place as usize].path.clone();
                        report.bad(path, format!("{what} of epoch {} is not what its close signs", statement.epoch));
                    }
                }
                Err(error) => return Err(error.into()),
            }
        } else {
            coverage.lose_all(history, at);
        }
        coverage.judge(history, at, whole || at + 1 == newest, report);
        for place in &epoch.segments {
            let uses = uses.entry(*place).or_insert(0);
            *uses = uses.saturating_sub(1);
            if *uses == 0 {
                indexes.remove(place);
            }
        }
    }
    Ok(())
}

/// Which pages of the disk the epochs so far have set, and which of them can't be had.
#[derive(Default)]
struct Coverage {
    incarnation: Option<Incarnation>,
    covered: Vec<PageMask>,
    missing: u64,
    /// Pages whose newest record lies in a bad segment, or may have been in an epoch whose metadata can't be read.
    lost: Vec<PageMask>,
    lost_pages: u64,
    bad_segments: HashSet<u32>,
    /// A log entry is missing, so nothing can be said of later points.
    broken: bool,
}

impl Coverage {
    /// Turns to an epoch: its disk may be another one than before.
    fn enter(&mut self, history: &History, at: usize) -> Geometry {
        let statement = history.epochs[at].close.statement();
        let geometry = Geometry::new(statement.disk_bytes).expect("a decoded close has a disk size within limits");
        if self.incarnation != Some(statement.incarnation) {
            self.incarnation = Some(statement.incarnation);
            let blocks = usize::try_from(geometry.blocks()).unwrap_or(0);
            let fit = |masks: &mut Vec<PageMask>| {
                masks.resize(blocks, PageMask::EMPTY);
                let pages = (0..).zip(masks).map(|(block, mask)| {
                    *mask = mask.and(geometry.pages_of(BlockIndex(block)));
                    u64::from(mask.count())
                });
                pages.sum::<u64>()
            };
            self.missing = geometry.pages() - fit(&mut self.covered);
            self.lost_pages = fit(&mut self.lost);
        }
        // Behind a lost log entry nobody knows what was sent.
        let before = at.checked_sub(1).map_or(CloseId::ZERO, |before| history.epochs[before].close.id());
        self.broken |= statement.parent != before;
        geometry
    }

    /// Any page may have been in this epoch.
    fn lose_all(&mut self, history: &History, at: usize) {
        let geometry = self.enter(history, at);
        (0..).zip(&mut self.lost).for_each(|(block, lost)| *lost = geometry.pages_of(BlockIndex(block)));
        self.lost_pages = geometry.pages();
    }

    fn add(&mut self, history: &History, at: usize, records: &[Placed], report: &mut VerifyReport) {
        let geometry = self.enter(history, at);
        for (place, entry) in records {
            // The metadata is proven, so what it calls zero is zero, whatever became of the segment.
            let is_gone = self.bad_segments.contains(place) || entry.is_collected();
            let gone = if is_gone { entry.meta.data_mask } else { PageMask::EMPTY };
            for block in entry.meta.block.0..entry.meta.block.0.saturating_add(entry.meta.block_count.into()) {
                let pages = entry.meta.pages();
                let fits = pages.without(geometry.pages_of(BlockIndex(block))).is_empty();
                let number = usize::try_from(block).unwrap_or(usize::MAX);
                let (Some(covered), Some(lost)) =
                    (self.covered.get_mut(number).filter(|_| fits), self.lost.get_mut(number))
                else {
                    let path = history.segments[*place as usize].path.clone();
                    report.bad(path, format!("it has a record for block {block}, beyond the end of the disk"));
                    break;
                };
                self.missing -= u64::from(pages.without(*covered).count());
                *covered = covered.or(pages);
                let now = lost.without(pages).or(gone);
                self.lost_pages = self.lost_pages + u64::from(now.count()) - u64::from(lost.count());
                *lost = now;
            }
        }
    }

    /// Says of the epoch's point, if it asserts one, whether it is whole; counts it where it is `asked` for.
    fn judge(&self, history: &History, at: usize, asked: bool, report: &mut VerifyReport) {
        let epoch = &history.epochs[at];
        let statement = epoch.close.statement();
        let Some(consistency) = statement.point.filter(|_| !self.broken && self.lost_pages == 0) else { return };
        if history.is_expired(epoch.close.id()) {
            return;
        }
        if self.missing == 0 {
            report.points += u64::from(asked);
            report.intact.push(PointSummary {
                id: epoch.close.id(),
                incarnation: statement.incarnation,
                epoch: statement.epoch,
                cut_time: statement.cut_time,
                consistency,
                disk_bytes: statement.disk_bytes,
                new_bytes: statement.record_bytes,
                committed: epoch.written,
                group_point: statement.group_point,
            });
        } else if asked {
            let path = catalog::volume::paths::log_entry(statement.volume, epoch.seq);
            let missing = self.missing;
            report.bad(
                path,
                format!("it commits a point at epoch {} of which {missing} pages were never sent", statement.epoch),
            );
        }
    }
}

impl Scanner {
    /// Reads a segment from start to end. What is wrong with it is in the result; an error is one of this process.
    async fn scan(self: &Arc<Self>, place: u32) -> Result<Scanned, OperatorError> {
        let reference = self.history.segments[place as usize].clone();
        let mut scanned = Scanned { place, index: None, records: 0, opened: 0, bytes: 0, bad: None };
        match self.read(&reference, &mut scanned).await {
            Ok(()) => {}
            Err(ScanError::Bad(what)) => scanned.bad = Some(what),
            Err(ScanError::Budget(error)) => return Err(error.into()),
        }
        Ok(scanned)
    }

    async fn read(self: &Arc<Self>, reference: &SegmentRef, scanned: &mut Scanned) -> Result<(), ScanError> {
        let index = Arc::new(segment::read_index(&self.store, reference).await?);
        let mut ends: Vec<u64> = index
            .groups
            .iter()
            .flat_map(|group| &group.entries)
            .map(|entry| entry.offset)
            .filter(|at| *at > 0)
            .collect();
        ends.push(reference.index_offset);
        let mut hasher = blake3::Hasher::new();
        // From now on the epochs in it can be judged, whatever the records turn out to be.
        scanned.index = Some(Arc::clone(&index));
        let size = self.store.size(&reference.path).await.map_err(SegmentError::from)?;
        if size != reference.size {
            return Err(ScanError::Bad(format!("it has {size} bytes, the log says {}", reference.size)));
        }
        let mut at = 0;
        while at < reference.size {
            let end = if at < reference.index_offset {
                record_end(&ends, at)
            } else {
                (at + CHUNK_BYTES).min(reference.size)
            };
            if end - at > CHUNK_BYTES + RECORD_BYTES_MAX as u64 {
                return Err(ScanError::Bad(format!("no record lies in its bytes {at} to {end}")));
            }
            let permit = self.budget.acquire(end - at + 2 * BLOCK_BYTES as u64).await?;
            let bytes = self.store.get_range(&reference.path, at..end).await.map_err(SegmentError::from)?;
            let (this, index) = (Arc::clone(self), Arc::clone(&index));
            let work = move || {
                let _permit = permit;
                hasher.update(&bytes);
                let checked = this.check_chunk(&index, at, &bytes);
                (hasher, checked)
            };
            let (back, checked) = tokio::task::spawn_blocking(work)
                .await
                .map_err(|error| ScanError::Bad(format!("not checked: {error}")))?;
            hasher = back;
            let (records, opened) = checked.map_err(ScanError::Bad)?;
            (scanned.records, scanned.opened, scanned.bytes) =
                (scanned.records + records, scanned.opened + opened, scanned.bytes + (end - at));
            self.progress.advance(end - at);
            at = end;
        }
        if hasher.finalize().as_bytes() != &reference.digest.0 {
            return Err(ScanError::Bad("its digest is not the one that the log names: the bytes were altered".into()));
        }
        Ok(())
    }

    /// Checks the records that lie in `bytes`, which start at `start` of the segment. (Records, opened ones.)
    fn check_chunk(&self, index: &SegmentIndex, start: u64, bytes: &Bytes) -> Result<(u64, u64), String> {
        if start == 0 {
            check_preamble(&bytes[..PREAMBLE_BYTES.min(bytes.len())]).map_err(|error| error.to_string())?;
        }
        let end = start + bytes.len() as u64;
        let spare = self.openers.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut opener = match spare {
            Some(opener) => opener,
            None => Opener::new().map_err(|error| error.to_string())?,
        };
        let (mut records, mut opened, mut pages) = (0, 0, Vec::new());
        for group in &index.groups {
            // Collected ones come first in their group; their bytes are nowhere.
            let from = group.entries.partition_point(|entry| entry.is_collected() || entry.offset < start);
            let here = group.entries[from..].iter().take_while(|entry| entry.offset < end);
            let mut key: Option<Option<EpochKey>> = None;
            for entry in here {
                let at = (entry.offset - start) as usize;
                let wrong = |what: String| format!("record at byte {}: {what}", entry.offset);
                let slice = at..at + entry.meta.record_len as usize;
                if slice.end > bytes.len() {
                    return Err(wrong("it reaches into the next record".into()));
                }
                let record = Record::parse(bytes.slice(slice)).map_err(|error| wrong(error.to_string()))?;
                let header = record.header();
                if (header.volume, header.incarnation, header.epoch) != (group.volume, group.incarnation, group.epoch) {
                    return Err(wrong("it is of another volume or epoch than the index says".into()));
                }
                if !entry.meta.describes(&record) {
                    return Err(wrong("its digest is not the one in the index".into()));
                }
                records += 1;
                if let Some(key) = key.get_or_insert_with(|| self.key_of(group)) {
                    opener.open(key, &record, &mut pages).map_err(|error| wrong(error.to_string()))?;
                    opened += 1;
                }
            }
        }
        self.openers.lock().unwrap_or_else(PoisonError::into_inner).push(opener);
        Ok((records, opened))
    }

    /// The key of a group's records; `None` without a data key, or for another volume's records in a shared segment.
    fn key_of(&self, group: &SegmentGroup) -> Option<EpochKey> {
        let data_key = self.keys.as_ref().filter(|_| group.volume == self.volume)?;
        let at = *self.epochs.get(&(group.incarnation, group.epoch))?;
        let statement = self.history.epochs[at].close.statement();
        let context = EpochContext {
            volume: statement.volume,
            incarnation: statement.incarnation,
            epoch: statement.epoch,
            key_id: statement.key_id,
        };
        Some(data_key.epoch_key(context, &statement.salt))
    }
}

/// The last of the record boundaries `ends`, ascending, within a chunk's length behind `at`; the next one where there is none.
fn record_end(ends: &[u64], at: u64) -> u64 {
    let behind = ends.partition_point(|end| *end <= at + CHUNK_BYTES);
    match ends[..behind].last() {
        Some(&end) if end > at => end,
        _ => ends.get(behind).copied().unwrap_or(u64::MAX),
    }
}

enum ScanError {
    /// Something is wrong with the object.
    Bad(String),
    /// The budget is smaller than a chunk.
    Budget(BudgetError),
}

impl From<SegmentError> for ScanError {
    fn from(error: SegmentError) -> Self {
        Self::Bad(error.to_string())
    }
}

impl From<BudgetError> for ScanError {
    fn from(error: BudgetError) -> Self {
        Self::Budget(error)
    }
}
