//! Checkpoints: opening a volume from the newest one and the entries after it.
//!
//! A checkpoint is written by a receiver and countersigned by nobody yet, so nothing in it decides what a restore takes
//! (decision 0004). Opening believes it only as far as it can be tied to the log: the entry it names must be there with the
//! digest it names, and its head close must verify with the volume's key.

mod merge;
mod write;

pub use merge::{Candidate, merge_page};
pub use write::{CheckpointBounds, CheckpointWritten, write_checkpoint};

use std::collections::HashSet;

use common::error::{Dispose, Disposition};
use common::format::FormatError;
use common::format::checkpoint::{CheckpointHead, KIND, PointSummary};
use common::format::envelope::{HEAD_BYTES, OVERHEAD_BYTES};
use common::format::log::LogEntry;
use common::format::volume_header::VolumeHeader;
use common::ids::{Epoch, LogSeq};
use common::seal::signing::verify_close;
use futures::StreamExt as _;

use super::history::summary;
use super::log::{LogError, LogPosition, LogReader};
use super::paths;
use super::segment::SegmentError;
use crate::store::{Store, StoreError};

/// Checkpoints tried, newest first, before the log is read from its start.
const CHECKPOINTS_TRIED: usize = 3;

/// What went wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The checkpoint's bytes are not what was written.
    #[error("{path}: {source}")]
    Damaged {
        /// The object.
        path: String,
        /// What is wrong with it.
        source: FormatError,
    },
    /// The checkpoint does not fit the log.
    #[error("{path} does not fit the log: {what}")]
    Foreign {
        /// The object.
        path: String,
        /// What does not fit.
        what: &'static str,
    },
    /// The log could not be read.
    #[error(transparent)]
    Log(#[from] LogError),
    /// A segment's index could not be read.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// More than a checkpoint may hold.
    #[error("checkpoint of volume {volume} at {at}: {source}")]
    TooLarge {
        /// Volume.
        volume: common::ids::VolumeId,
        /// Log entry.
        at: LogSeq,
        /// Which bound.
        source: FormatError,
    },
    /// No random bytes.
    #[error(transparent)]
    Rng(#[from] common::rng::RngError),
}

impl Dispose for CheckpointError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Damaged { source, .. } => source.disposition(),
            Self::Foreign { .. } => Disposition::Corrupt,
            Self::Log(error) => error.disposition(),
            Self::Segment(error) => error.disposition(),
            Self::TooLarge { .. } => Disposition::BadInput,
            Self::Rng(_) => Disposition::Retry,
        }
    }
}

/// What an opening needs to know of a volume.
#[derive(Debug, Clone)]
pub struct VolumeView {
    /// The header that the log was checked against.
    pub header: VolumeHeader,
    /// The end of the log: newest entry, generation and committed close.
    pub position: LogPosition,
    /// All recovery points that did not expire, oldest first.
    pub points: Vec<PointSummary>,
    /// Bytes of records committed since the newest point.
    pub unpointed_bytes: u64,
    /// The log entry of the checkpoint that was used; 0 for none.
    pub checkpoint_at: LogSeq,
    /// Log entries after it.
    pub entries_since_checkpoint: u64,
}

impl VolumeView {
    /// The first epoch number that was never committed.
    #[must_use]
    pub fn next_epoch(&self) -> Epoch {
        Epoch(self.position.last_epoch().0.saturating_add(1))
    }
}

/// Reads what a volume's log says: the newest checkpoint that fits the log, then the entries after it. A checkpoint that can't
/// be used is logged and left out; the log alone is enough.
///
/// # Errors
/// Those of [`LogReader`].
pub async fn open_view(store: &Store, header: &VolumeHeader) -> Result<VolumeView, LogError> {
    let mut view = newest_checkpoint(store, header).await?.unwrap_or_else(|| VolumeView {
        header: header.clone(),
        position: LogPosition::default(),
        points: Vec::new(),
        unpointed_bytes: 0,
        checkpoint_at: LogSeq(0),
        entries_since_checkpoint: 0,
    });
    let mut reader = LogReader::open(store, header, view.position.clone()).await?;
    while let Some(read) = reader.next().await? {
        view.entries_since_checkpoint += 1;
        if let Some(maintenance) = read.entry.maintenance.as_ref().filter(|stated| !stated.expired.is_empty()) {
            let expired: HashSet<_> = maintenance.expired.iter().collect();
            view.points.retain(|point| !expired.contains(&point.id));
        }
        for committed in &read.entry.epochs {
            view.points.extend(summary(&committed.close, read.entry.written, &mut view.unpointed_bytes));
        }
    }
    view.position = reader.position().clone();
    Ok(view)
}

async fn newest_checkpoint(store: &Store, header: &VolumeHeader) -> Result<Option<VolumeView>, LogError> {
    let mut found = Vec::new();
    let mut listing = store.list_stream(&paths::checkpoint_folder(header.volume))?;
    while let Some(meta) = listing.next().await {
        found.extend(paths::sequence(&meta?.path));
    }
    found.sort_unstable_by(|a, b| b.cmp(a));
    for &at in found.iter().take(CHECKPOINTS_TRIED) {
        match read_fitting(store, header, at).await {
            Ok(head) => {
                return Ok(Some(VolumeView {
                    header: header.clone(),
                    position: LogPosition {
                        seq: head.at,
                        digest: head.entry_digest,
                        generation: head.generation,
                        head: head.head,
                    },
                    points: head.points,
                    unpointed_bytes: head.unpointed_bytes,
                    checkpoint_at: head.at,
                    entries_since_checkpoint: 0,
                }));
            }
            Err(CheckpointError::Store(error)) if !error.is_not_found() => return Err(error.into()),
            Err(error) => {
                tracing::warn!(volume = %header.volume, %error, "checkpoint not used: reading the log instead");
            }
        }
    }
    Ok(None)
}

/// Reads the head of the checkpoint at `at`; also the length of the encoded head, behind which the pages lie.
///
/// # Errors
/// [`CheckpointError::Store`], [`CheckpointError::Damaged`], [`CheckpointError::Foreign`] where it is of another place.
pub async fn read_head(
    store: &Store,
    header: &VolumeHeader,
    at: LogSeq,
) -> Result<(CheckpointHead, u64), CheckpointError> {
    let path = paths::checkpoint(header.volume, at);
    let damaged = |source| CheckpointError::Damaged { path: path.clone(), source };
    let prefix = store.get_range(&path, 0..HEAD_BYTES as u64).await?;
    let mut body_len = [0; 4];
    body_len.copy_from_slice(&prefix[HEAD_BYTES - 4..]);
    let body_len = u32::from_le_bytes(body_len) as usize;
    if body_len > KIND.body_bytes_max {
        return Err(damaged(FormatError::OverLimit {
            what: "checkpoint",
            found: body_len as u64,
            limit: KIND.body_bytes_max as u64,
        }));
    }
    let bytes = store.get_range(&path, 0..(OVERHEAD_BYTES + body_len) as u64).await?;
    let (head, head_len) = CheckpointHead::decode_prefix(&bytes).map_err(damaged)?;
    if head.volume != header.volume || head.at != at {
        return Err(CheckpointError::Foreign { path, what: "it is of another volume or place" });
    }
    Ok((head, head_len as u64))
}

/// Checks that a checkpoint's head fits the log entry that it names.
///
/// # Errors
/// What does not fit.
pub fn check_fit(header: &VolumeHeader, head: &CheckpointHead, entry_bytes: &[u8]) -> Result<(), &'static str> {
    if LogEntry::digest_of(entry_bytes) != head.entry_digest {
        return Err("the entry it summarises has another digest");
    }
    let Ok(entry) = LogEntry::decode(entry_bytes) else { return Err("the entry it summarises does not decode") };
    if entry.volume != header.volume || entry.seq != head.at || entry.generation != head.generation {
        return Err("the entry it summarises is another one");
    }
    if let Some(last) = entry.epochs.last()
        && head.head.as_ref().map(|close| close.id()) != Some(last.close.id())
    {
        return Err("its head close is not the newest of the entry it summarises");
    }
    match &head.head {
        Some(close) if close.statement().volume != header.volume => Err("its head close is of another volume"),
        Some(close) if verify_close(close, &header.signing_key).is_err() => {
            Err("the signature of its head close does not verify")
        }
        _ => Ok(()),
    }
}

async fn read_fitting(store: &Store, header: &VolumeHeader, at: LogSeq) -> Result<CheckpointHead, CheckpointError> {
    let (head, _) = read_head(store, header, at).await?;
    let entry = store.get(&paths::log_entry(header.volume, at)).await?;
    check_fit(header, &head, &entry)
        .map_err(|what| CheckpointError::Foreign { path: paths::checkpoint(header.volume, at), what })?;
    Ok(head)
}
