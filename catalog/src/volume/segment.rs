//! Reading segments: their index by one range read, and their records.

use common::error::{Dispose, Disposition};
use common::format::FormatError;
use common::format::log::SegmentRef;
use common::format::segment::{FOOTER_BYTES, Footer, SegmentEntry, SegmentIndex};
use common::ids::{Epoch, Incarnation, VolumeId};

use crate::store::{Store, StoreError};

/// What is wrong with a segment.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// The store failed, or the object is missing or cut short.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its bytes are not what was written.
    #[error("{path}: {source}")]
    Damaged {
        /// The object.
        path: String,
        /// What is wrong with it.
        source: FormatError,
    },
    /// It is not the segment that the log entry refers to.
    #[error("{path}: the log names {expected} as its {what}, found {found}: the object was replaced")]
    Other {
        /// The object.
        path: String,
        /// Which property.
        what: &'static str,
        /// What the log entry says.
        expected: u64,
        /// What the object says.
        found: u64,
    },
}

impl SegmentError {
    /// The path of the segment that is damaged, missing or replaced; `None` where the store merely failed.
    #[must_use]
    pub fn bad_object(&self) -> Option<&str> {
        match self {
            Self::Damaged { path, .. } | Self::Other { path, .. } => Some(path),
            Self::Store(StoreError::NotFound { path } | StoreError::Truncated { path, .. }) => Some(path),
            Self::Store(_) => None,
        }
    }
}

impl Dispose for SegmentError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Damaged { source, .. } => source.disposition(),
            Self::Other { .. } => Disposition::Corrupt,
        }
    }
}

/// Reads a segment's index and checks it against the log's reference. The records are not read. Memory: the index, about 104
/// bytes for each record.
///
/// # Errors
/// [`SegmentError`].
pub async fn read_index(store: &Store, segment: &SegmentRef) -> Result<SegmentIndex, SegmentError> {
    let tail = store.get_range(&segment.path, segment.index_offset..segment.size).await?;
    let damaged = |source| SegmentError::Damaged { path: segment.path.clone(), source };
    let footer = Footer::decode_tail(&tail, segment.size).map_err(damaged)?;
    let other = |what, expected, found| Err(SegmentError::Other { path: segment.path.clone(), what, expected, found });
    if footer.index_offset != segment.index_offset {
        return other("index offset", segment.index_offset, footer.index_offset);
    }
    if footer.records != segment.records {
        return other("record count", segment.records.into(), footer.records.into());
    }
    SegmentIndex::decode(&tail[..tail.len() - FOOTER_BYTES], &footer).map_err(damaged)
}

/// The records of one epoch of one volume in a segment, in the order they lie.
pub fn epoch_entries(
    index: &SegmentIndex,
    volume: VolumeId,
    incarnation: Incarnation,
    epoch: Epoch,
) -> impl Iterator<Item = &SegmentEntry> {
    index
        .groups
        .iter()
        .filter(move |group| (group.volume, group.incarnation, group.epoch) == (volume, incarnation, epoch))
        .flat_map(|group| &group.entries)
}
