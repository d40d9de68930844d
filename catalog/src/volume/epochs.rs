//! An epoch's metadata, read from the segments' indexes and proven by its close.

use std::collections::HashMap;
use std::sync::Arc;

use super::history::{History, HistoryEpoch};
use super::segment::{self, SegmentError};
use crate::store::Store;
use common::error::{Dispose, Disposition};
use common::format::close::CloseStatement;
use common::format::record::RecordMeta;
use common::format::segment::{SegmentEntry, SegmentIndex};
use common::ids::Epoch;
use common::seal::merkle::MetaTree;
use futures::{StreamExt as _, TryStreamExt as _};

/// Indexes of one epoch's segments read at the same time.
const READS_IN_PARALLEL: usize = 8;

/// Why an epoch's metadata can't be believed.
#[derive(Debug, thiserror::Error)]
pub enum EpochError {
    /// A segment.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// The indexes do not add up to what the close states.
    #[error(
        "epoch {epoch}: {what} in its segments is not what its close signs (expected {expected}, found {found}); suspect {suspects}"
    )]
    NotProven {
        /// Epoch.
        epoch: Epoch,
        /// Which number.
        what: &'static str,
        /// What the close states.
        expected: String,
        /// What the indexes say.
        found: String,
        /// Paths of the epoch's segments.
        suspects: String,
    },
}

impl Dispose for EpochError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Segment(error) => error.disposition(),
            Self::NotProven { .. } => Disposition::Corrupt,
        }
    }
}

/// A record's place: index into [`History::segments`] and entry there.
pub type Placed = (u32, SegmentEntry);

/// Reads the indexes of an epoch's segments and returns its records in block order, after checking counts and Merkle root
/// against the close. Memory: the indexes of its segments.
///
/// # Errors
/// [`EpochError`].
pub async fn load(store: &Store, history: &History, epoch: &HistoryEpoch) -> Result<Vec<Placed>, EpochError> {
    // Owned numbers: a closure over borrowed ones is not general enough for tasks that are spawned.
    let reads = epoch.segments.clone().into_iter().map(|place| {
        let (store, segment) = (store.clone(), history.segments[place as usize].clone());
        async move { Ok::<_, EpochError>((place, Arc::new(segment::read_index(&store, &segment).await?))) }
    });
    let indexes: HashMap<u32, Arc<SegmentIndex>> =
        futures::stream::iter(reads).buffer_unordered(READS_IN_PARALLEL).try_collect().await?;
    gather(history, epoch, &indexes)
}

/// The epoch's records out of indexes that were read already, in block order, checked as [`load`] does. PURE.
///
/// # Errors
/// [`EpochError::NotProven`].
pub fn gather(
    history: &History,
    epoch: &HistoryEpoch,
    indexes: &HashMap<u32, Arc<SegmentIndex>>,
) -> Result<Vec<Placed>, EpochError> {
    let statement = epoch.close.statement();
    let mut records: Vec<Placed> = Vec::with_capacity(usize::try_from(statement.records).unwrap_or(0));
    for place in &epoch.segments {
        let Some(index) = indexes.get(place) else { continue };
        let entries = segment::epoch_entries(index, statement.volume, statement.incarnation, statement.epoch);
        records.extend(entries.map(|entry| (*place, *entry)));
    }
    records.sort_unstable_by_key(|(_, entry)| entry.meta.block);
    prove(statement, records.iter().map(|(_, entry)| &entry.meta))
        .map_err(|found| not_proven(history, epoch, found))?;
    Ok(records)
}

/// What does not fit: which number, what the close states, what was found.
pub type Unproven = (&'static str, String, String);

/// The error for an epoch that [`prove`] found wanting.
#[must_use]
pub fn not_proven(history: &History, epoch: &HistoryEpoch, (what, expected, found): Unproven) -> EpochError {
    let epoch_number = epoch.close.statement().epoch;
    EpochError::NotProven { epoch: epoch_number, what, expected, found, suspects: suspects(history, epoch) }
}

/// Paths of an epoch's segments.
fn suspects(history: &History, epoch: &HistoryEpoch) -> String {
    let paths: Vec<&str> = epoch.segments.iter().map(|&place| history.segments[place as usize].path.as_str()).collect();
    paths.join(", ")
}

/// Checks metadata in block order against a close: counts and Merkle root. PURE.
///
/// # Errors
/// [`Unproven`].
pub fn prove<'a>(statement: &CloseStatement, metas: impl Iterator<Item = &'a RecordMeta>) -> Result<(), Unproven> {
    let (mut records, mut data, mut zero, mut bytes) = (0_u64, 0_u64, 0_u64, 0_u64);
    let mut tree = MetaTree::default();
    for meta in metas {
        records += 1;
        data += u64::from(meta.data_mask.count());
        zero += u64::from(meta.zero_mask.count()) * u64::from(meta.block_count);
        bytes += u64::from(meta.record_len);
        if let Err(error) = tree.push(meta) {
            return Err(("the order of records", "records that do not overlap".into(), error.to_string()));
        }
    }
    let numbers = [
        ("the number of records", statement.records, records),
        ("the number of data pages", statement.data_pages, data),
        ("the number of zero pages", statement.zero_pages, zero),
        ("the number of record bytes", statement.record_bytes, bytes),
    ];
    for (what, expected, found) in numbers {
        if expected != found {
            return Err((what, expected.to_string(), found.to_string()));
        }
    }
    let root = tree.finish();
    if root != statement.meta_root {
        return Err(("the Merkle root", statement.meta_root.to_string(), root.to_string()));
    }
    Ok(())
}
