//! Opens the live records of a point: what restore and serve have in common.
//!
//! A record's pages are handed out only if it parses (checksum), carries the tag that its epoch's signed root covers, and opens
//! under its epoch's key, for its place: the tag and the key together leave one possible content.

#![allow(clippy::cast_possible_truncation, reason = "a history in memory has fewer than 2^32 epochs")]

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use catalog::volume::history::History;
use common::error::{Dispose, Disposition};
use common::format::FormatError;
use common::format::record::Record;
use common::ids::PageMask;
use common::limits::{BLOCK_BYTES, PAGE_BYTES, SEAL_TAG_BYTES};
use common::seal::{DataKey, EpochContext, EpochKey, Opener, SealError};

use crate::restore::plan::{LiveRecord, page_runs};

/// Why a record's pages can't be had.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A record is damaged.
    #[error("{path}: record at byte {offset}: {source}")]
    Damaged {
        /// Segment.
        path: String,
        /// Where the record starts.
        offset: u64,
        /// What is wrong.
        source: FormatError,
    },
    /// A record is another than its epoch's close signs.
    #[error("{path}: the record at byte {offset} is not the one that the close of its epoch signs: it was replaced")]
    Replaced {
        /// Segment.
        path: String,
        /// Where the record starts.
        offset: u64,
    },
    /// A record does not open.
    #[error("{path}: record at byte {offset}: {source}")]
    Sealed {
        /// Segment.
        path: String,
        /// Where the record starts.
        offset: u64,
        /// Why.
        source: SealError,
    },
    /// No context to open records with.
    #[error(transparent)]
    Opener(SealError),
}

impl OpenError {
    /// The path of the segment whose record is not what it has to be.
    #[must_use]
    pub fn bad_object(&self) -> Option<&str> {
        match self {
            Self::Damaged { path, .. } | Self::Replaced { path, .. } | Self::Sealed { path, .. } => Some(path),
            Self::Opener(_) => None,
        }
    }
}

impl Dispose for OpenError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Damaged { source, .. } => source.disposition(),
            Self::Replaced { .. } | Self::Sealed { .. } => Disposition::Corrupt,
            Self::Opener(_) => Disposition::Bug,
        }
    }
}

/// Opens records of one volume; shared by all threads.
#[derive(Debug)]
pub struct RecordOpener {
    history: Arc<History>,
    data_key: DataKey,
    /// Contexts that no thread uses now.
    idle: Mutex<Vec<Opener>>,
}

impl RecordOpener {
    /// With no context yet.
    #[must_use]
    pub fn new(history: Arc<History>, data_key: DataKey) -> Self {
        Self { history, data_key, idle: Mutex::new(Vec::new()) }
    }

    /// A turn at opening records, one after the other.
    ///
    /// # Errors
    /// [`OpenError::Opener`].
    pub fn turn(&self) -> Result<Turn<'_>, OpenError> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let opener = match idle {
            Some(opener) => opener,
            None => Opener::new().map_err(OpenError::Opener)?,
        };
        Ok(Turn { of: self, opener: Some(opener), key: None, pages: Vec::with_capacity(BLOCK_BYTES) })
    }

    fn epoch_key(&self, epoch: u32) -> EpochKey {
        let statement = self.history.epochs[epoch as usize].close.statement();
        let context = EpochContext {
            volume: statement.volume,
            incarnation: statement.incarnation,
            epoch: statement.epoch,
            key_id: statement.key_id,
        };
        self.data_key.epoch_key(context, &statement.salt)
    }
}

/// Has a context to itself, gives it back when dropped.
#[derive(Debug)]
pub struct Turn<'a> {
    of: &'a RecordOpener,
    /// `None` only while it is dropped.
    opener: Option<Opener>,
    key: Option<(u32, EpochKey)>,
    pages: Vec<u8>,
}

impl Turn<'_> {
    /// Opens the record `live`, whose bytes are `record`.
    ///
    /// # Errors
    /// [`OpenError`]; other records may be opened all the same.
    pub fn open(&mut self, live: &LiveRecord, record: Bytes) -> Result<Opened<'_>, OpenError> {
        let path = || self.of.history.segments[live.segment as usize].path.clone();
        let offset = u64::from(live.offset);
        let record = Record::parse(record).map_err(|source| OpenError::Damaged { path: path(), offset, source })?;
        let header = *record.header();
        let tag = &record.bytes()[record.bytes().len() - SEAL_TAG_BYTES..];
        if tag != live.tag.0
            || header.block.0 != u64::from(live.block)
            || !live.live.without(header.data_mask).is_empty()
        {
            return Err(OpenError::Replaced { path: path(), offset });
        }
        let key = match &self.key {
            Some((epoch, key)) if *epoch == live.epoch => key,
            _ => &self.key.insert((live.epoch, self.of.epoch_key(live.epoch))).1,
        };
        let opener = self.opener.as_mut().expect("it is there until it is dropped");
        opener.open(key, &record, &mut self.pages).map_err(|source| OpenError::Sealed {
            path: path(),
            offset,
            source,
        })?;
        Ok(Opened { block: header.block.0, data: header.data_mask, live: live.live, pages: &self.pages })
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(opener) = self.opener.take() {
            self.of.idle.lock().unwrap_or_else(PoisonError::into_inner).push(opener);
        }
    }
}

/// An opened record.
#[derive(Debug, Clone, Copy)]
pub struct Opened<'a> {
    block: u64,
    data: PageMask,
    live: PageMask,
    pages: &'a [u8],
}

impl<'a> Opened<'a> {
    /// The runs of live pages: where each lies on the disk, and its bytes.
    pub fn runs(self) -> impl Iterator<Item = (u64, &'a [u8])> {
        page_runs(self.live).map(move |(first, count)| {
            // Pages of the record before the run's first one. The run's pages lie side by side, since none between is missing.
            let before = self.data.0 & ((1_u64 << first) - 1);
            let start = before.count_ones() as usize * PAGE_BYTES;
            let at = self.block * BLOCK_BYTES as u64 + u64::from(first) * PAGE_BYTES as u64;
            (at, &self.pages[start..start + count as usize * PAGE_BYTES])
        })
    }
}
