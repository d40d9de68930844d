//! Reading a volume's log, and what may follow what in it.
//!
//! The log is a chain: each entry names the digest of the one before, each close its parent close. [`LogPosition`] is the end
//! of a checked prefix; [`LogPosition::follow`] decides, without I/O, whether an entry may come next. The head is where
//! the next entry is not there: listings only tell what to fetch early, and whether an entry in the middle is missing.

use std::collections::VecDeque;

use bytes::Bytes;
use common::error::{Dispose, Disposition};
use common::format::FormatError;
use common::format::close::Close;
use common::format::log::{CommittedEpoch, LogEntry};
use common::format::volume_header::VolumeHeader;
use common::ids::{CloseId, Digest, Epoch, Generation, LogSeq, ReceiverId, VolumeId};
use common::seal::SealError;
use common::seal::signing::verify_close;
use futures::StreamExt as _;
use futures::stream::BoxStream;

use super::header::{self, HeaderError};
use super::paths;
use crate::store::{Store, StoreError};

/// Log entries fetched ahead.
const FETCH_AHEAD: usize = 16;

/// What went wrong with a volume's log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An entry's bytes are not what was written.
    #[error("{path}: {source}")]
    Damaged {
        /// The object.
        path: String,
        /// What is wrong with it.
        source: FormatError,
    },
    /// A later object shows that an entry must have been there.
    #[error("{path} is missing, but {later} is there: part of the log was lost; bring the object back")]
    Missing {
        /// The entry that is not there.
        path: String,
        /// The object that shows it.
        later: String,
    },
    /// The entry is of another volume or place than its path says.
    #[error("{path} is entry {seq} of volume {volume}: it was moved or overwritten")]
    WrongPlace {
        /// The object.
        path: String,
        /// Volume it names.
        volume: VolumeId,
        /// Sequence number it names.
        seq: LogSeq,
    },
    /// The entry names another predecessor than the one that is there.
    #[error(
        "{path} follows an entry with digest {expected}, but the entry before it has {found}: one of the two was replaced"
    )]
    BrokenChain {
        /// The later entry.
        path: String,
        /// Digest it names.
        expected: Digest,
        /// Digest of the entry that is there.
        found: Digest,
    },
    /// A close does not follow the log's head close.
    #[error("{path}: the close of epoch {epoch} follows close {expected}, but the head is {found}")]
    WrongParent {
        /// The entry.
        path: String,
        /// Epoch of the close.
        epoch: Epoch,
        /// Parent that it names.
        expected: CloseId,
        /// Head close before it.
        found: CloseId,
    },
    /// An epoch number was used again, or a generation fell.
    #[error("{path}: {what} {found} comes after {before}: it must grow")]
    NotGrowing {
        /// The entry.
        path: String,
        /// Epoch or generation.
        what: &'static str,
        /// Number found.
        found: u64,
        /// Number before.
        before: u64,
    },
    /// A close is of another volume, fleet or disk size than the header says.
    #[error("{path}: the close of epoch {epoch} is of {what}")]
    ForeignClose {
        /// The entry.
        path: String,
        /// Epoch of the close.
        epoch: Epoch,
        /// What does not fit.
        what: &'static str,
    },
    /// A close's signature does not verify with the key that the header pins.
    #[error("{path}: {source}")]
    Signature {
        /// The entry.
        path: String,
        /// Which close.
        source: SealError,
    },
    /// Another receiver writes this log.
    #[error(
        "volume {volume} is written by receiver {winner} now (generation {generation}, {path}): this receiver has lost it"
    )]
    Fenced {
        /// Volume.
        volume: VolumeId,
        /// Who won the sequence number.
        winner: ReceiverId,
        /// Generation of the winner.
        generation: Generation,
        /// The entry it made.
        path: String,
    },
    /// Nothing was given to commit, or more than one entry may hold.
    #[error("{what}: {found} given, expected at most {max}")]
    TooMuch {
        /// What.
        what: &'static str,
        /// Number given.
        found: usize,
        /// Bound.
        max: usize,
    },
    /// A collector gave a segment up that nothing had named yet.
    #[error("{path} was not named by any entry for so long that {entry} gave it up: its records are to be stored anew")]
    Condemned {
        /// The segment.
        path: String,
        /// The entry that says so.
        entry: String,
    },
    /// An entry of maintenance that raises the generation, or is the log's first.
    #[error("{path}: an entry of maintenance is of generation {found}, the one before it of {before}: it must keep it")]
    Maintenance {
        /// The entry.
        path: String,
        /// Generation found.
        found: Generation,
        /// Generation before.
        before: Generation,
    },
    /// An earlier attempt at this place, whose reply was lost, won with other content than is to be committed now.
    #[error("{path} was already committed by this receiver with other epochs than are given now")]
    OtherAttempt {
        /// The entry.
        path: String,
    },
    /// No random bytes.
    #[error(transparent)]
    Rng(#[from] common::rng::RngError),
}

impl LogError {
    /// The path of the object that is damaged, missing or replaced, where one is.
    #[must_use]
    pub fn bad_object(&self) -> Option<&str> {
        match self {
            Self::Damaged { path, .. }
            | Self::Missing { path, .. }
            | Self::WrongPlace { path, .. }
            | Self::BrokenChain { path, .. }
            | Self::WrongParent { path, .. }
            | Self::NotGrowing { path, .. }
            | Self::ForeignClose { path, .. }
            | Self::Maintenance { path, .. }
            | Self::Signature { path, .. } => Some(path),
            _ => None,
        }
    }
}

impl Dispose for LogError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Damaged { source, .. } => source.disposition(),
            Self::Missing { .. }
            | Self::WrongPlace { .. }
            | Self::BrokenChain { .. }
            | Self::WrongParent { .. }
            | Self::NotGrowing { .. }
            | Self::ForeignClose { .. }
            | Self::Maintenance { .. }
            | Self::Signature { .. } => Disposition::Corrupt,
            Self::Fenced { .. } => Disposition::Fenced,
            // Once more from the stage, which gives the segment another name.
            Self::Condemned { .. } => Disposition::Retry,
            Self::TooMuch { .. } | Self::OtherAttempt { .. } => Disposition::Bug,
            Self::Rng(_) => Disposition::Retry,
        }
    }
}

/// The end of a checked prefix of a log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogPosition {
    /// Newest entry; 0 before the first.
    pub seq: LogSeq,
    /// BLAKE3 of that entry; zero before the first.
    pub digest: Digest,
    /// Its generation; 0 before the first.
    pub generation: Generation,
    /// Newest committed close.
    pub head: Option<Close>,
}

impl LogPosition {
    /// The newest committed close's id; [`CloseId::ZERO`] where nothing is committed.
    #[must_use]
    pub fn head_id(&self) -> CloseId {
        self.head.as_ref().map_or(CloseId::ZERO, Close::id)
    }

    /// The newest committed epoch; 0 where nothing is committed.
    #[must_use]
    pub fn last_epoch(&self) -> Epoch {
        self.head.as_ref().map_or(Epoch(0), |close| close.statement().epoch)
    }

    /// The place of the next entry; `None` only at the end of the number range.
    #[must_use]
    pub fn next_seq(&self) -> Option<LogSeq> {
        self.seq.next()
    }

    /// Moves to `entry`, read from `path` and with `digest`, if it may come next: right volume and number, names this
    /// position's digest, its generation does not fall (that of maintenance stays), its closes chain from the head, epochs grow, and every close fits
    /// `header` and is signed by its key. Unchanged on error.
    ///
    /// # Errors
    /// Which of these does not hold.
    pub fn follow(
        &mut self,
        header: &VolumeHeader,
        path: &str,
        entry: &LogEntry,
        digest: Digest,
    ) -> Result<(), LogError> {
        let path = || path.to_owned();
        if entry.volume != header.volume || Some(entry.seq) != self.next_seq() {
            return Err(LogError::WrongPlace { path: path(), volume: entry.volume, seq: entry.seq });
        }
        if entry.previous != self.digest {
            return Err(LogError::BrokenChain { path: path(), expected: entry.previous, found: self.digest });
        }
        if entry.generation < self.generation {
            return Err(LogError::NotGrowing {
                path: path(),
                what: "generation",
                found: entry.generation.0,
                before: self.generation.0,
            });
        }
        if entry.maintenance.is_some() && (entry.generation != self.generation || self.seq == LogSeq(0)) {
            return Err(LogError::Maintenance { path: path(), found: entry.generation, before: self.generation });
        }
        let mut head: Option<&Close> = self.head.as_ref();
        for committed in &entry.epochs {
            check_close(header, &path(), head, &committed.close)?;
            head = Some(&committed.close);
        }
        let head = head.cloned();
        *self = Self { seq: entry.seq, digest, generation: entry.generation, head };
        Ok(())
    }
}

/// Checks that `close`, found at `path`, may follow `head` in the log of `header`'s volume, and its signature.
///
/// # Errors
/// [`LogError::WrongParent`], [`LogError::NotGrowing`], [`LogError::ForeignClose`], [`LogError::Signature`].
pub fn check_close(header: &VolumeHeader, path: &str, head: Option<&Close>, close: &Close) -> Result<(), LogError> {
    let statement = close.statement();
    let (path, epoch) = (|| path.to_owned(), statement.epoch);
    let (head_id, head_epoch) = head.map_or((CloseId::ZERO, Epoch(0)), |head| (head.id(), head.statement().epoch));
    if statement.parent != head_id {
        return Err(LogError::WrongParent { path: path(), epoch, expected: statement.parent, found: head_id });
    }
    if epoch <= head_epoch {
        return Err(LogError::NotGrowing { path: path(), what: "epoch", found: epoch.0, before: head_epoch.0 });
    }
    check_close_alone(header, &path(), close)
}

/// As [`check_close`], without looking at what it follows.
///
/// # Errors
/// [`LogError::ForeignClose`], [`LogError::Signature`].
pub fn check_close_alone(header: &VolumeHeader, path: &str, close: &Close) -> Result<(), LogError> {
    let statement = close.statement();
    let (path, epoch) = (|| path.to_owned(), statement.epoch);
    let foreign = |what| Err(LogError::ForeignClose { path: path(), epoch, what });
    if statement.volume != header.volume {
        return foreign("another volume");
    }
    if statement.fleet != header.fleet {
        return foreign("another fleet");
    }
    let known = header.incarnations.iter().find(|size| size.incarnation == statement.incarnation);
    if known.is_none_or(|size| size.disk_bytes != statement.disk_bytes) {
        return foreign("an incarnation or disk size that the volume's header does not have");
    }
    verify_close(close, &header.signing_key).map_err(|source| LogError::Signature { path: path(), source })
}

/// Reads the header anew where `epochs` are of an incarnation newer than it knows: the disk grew since it was read. The header is
/// changed before the first close of an incarnation is written, so whoever sees the close sees the header. Only sizes are
/// taken over; closes are judged by the key that was pinned when the volume was opened.
pub(super) async fn follow_growth(
    store: &Store,
    header: &mut VolumeHeader,
    epochs: &[CommittedEpoch],
) -> Result<(), LogError> {
    let newest = epochs.iter().map(|epoch| epoch.close.statement().incarnation).max();
    if newest.is_none_or(|newest| newest <= header.current().incarnation) {
        return Ok(());
    }
    match header::read(store, header.volume).await {
        Ok(stored) => header.incarnations = stored.header.incarnations,
        Err(HeaderError::Store(error)) => return Err(error.into()),
        // Then the close is judged by what is known, and refused.
        Err(error) => tracing::error!(volume = %header.volume, %error, "the volume's header can't be read anew"),
    }
    Ok(())
}

/// An entry that was read and checked.
#[derive(Debug, Clone)]
pub struct ReadEntry {
    /// Its path.
    pub path: String,
    /// BLAKE3 of its bytes.
    pub digest: Digest,
    /// What it says.
    pub entry: LogEntry,
}

type Fetched = (LogSeq, Result<Bytes, StoreError>);

/// Reads a log forward from a position, checking each entry; a few are fetched ahead.
pub struct LogReader {
    store: Store,
    header: VolumeHeader,
    position: LogPosition,
    ahead: BoxStream<'static, Fetched>,
    /// Newest numbers that listings gave, of entries and of checkpoints.
    hints: VecDeque<(LogSeq, String)>,
    done: bool,
}

impl std::fmt::Debug for LogReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LogReader(volume {}, at {})", self.header.volume, self.position.seq)
    }
}

impl LogReader {
    /// A reader of the log of `header`'s volume, behind `from`.
    ///
    /// # Errors
    /// [`LogError::Store`] where the log can't be listed.
    pub async fn open(store: &Store, header: &VolumeHeader, from: LogPosition) -> Result<Self, LogError> {
        let mut hints = VecDeque::new();
        // What lies before the position says nothing about the end, and would be a request for each thousand entries.
        for (folder, after) in [
            (paths::log_folder(header.volume), paths::log_entry(header.volume, from.seq)),
            (paths::checkpoint_folder(header.volume), paths::checkpoint(header.volume, from.seq)),
        ] {
            let mut newest = None;
            let mut listing = store.list_stream_after(&folder, &after)?;
            while let Some(meta) = listing.next().await {
                let meta = meta?;
                if let Some(seq) = paths::sequence(&meta.path) {
                    newest = newest.max(Some((seq, meta.path)));
                }
            }
            hints.extend(newest);
        }
        let last = hints.iter().map(|(seq, _)| *seq).max().unwrap_or(from.seq);
        let (owned, volume) = (store.clone(), header.volume);
        let ahead = futures::stream::iter(from.seq.0.saturating_add(1)..=last.0)
            .map(move |seq| {
                let (store, seq) = (owned.clone(), LogSeq(seq));
                async move { (seq, store.get(&paths::log_entry(volume, seq)).await) }
            })
            .buffered(FETCH_AHEAD)
            .boxed();
        Ok(Self { store: store.clone(), header: header.clone(), position: from, ahead, hints, done: false })
    }

    /// The position behind the last entry that [`Self::next`] gave.
    #[must_use]
    pub fn position(&self) -> &LogPosition {
        &self.position
    }

    /// The next entry, or `None` behind the head. After an error no more entries are given.
    ///
    /// # Errors
    /// Any of reading and [`LogPosition::follow`]; [`LogError::Missing`] where a later object is there.
    pub async fn next(&mut self) -> Result<Option<ReadEntry>, LogError> {
        if self.done {
            return Ok(None);
        }
        let read = self.read_next().await;
        if !matches!(read, Ok(Some(_))) {
            self.done = true;
        }
        read
    }

    async fn read_next(&mut self) -> Result<Option<ReadEntry>, LogError> {
        let Some(seq) = self.position.next_seq() else { return Ok(None) };
        let path = paths::log_entry(self.header.volume, seq);
        let fetched = match self.ahead.next().await {
            Some((_, fetched)) => fetched,
            None => self.store.get(&path).await,
        };
        let bytes = match fetched {
            Ok(bytes) => bytes,
            Err(error) if error.is_not_found() => {
                return match self.hints.iter().find(|(hint, _)| *hint >= seq) {
                    Some((_, later)) => Err(LogError::Missing { path, later: later.clone() }),
                    None => Ok(None),
                };
            }
            Err(error) => return Err(error.into()),
        };
        let entry = LogEntry::decode(&bytes).map_err(|source| LogError::Damaged { path: path.clone(), source })?;
        let digest = LogEntry::digest_of(&bytes);
        follow_growth(&self.store, &mut self.header, &entry.epochs).await?;
        self.position.follow(&self.header, &path, &entry, digest)?;
        Ok(Some(ReadEntry { path, digest, entry }))
    }
}
