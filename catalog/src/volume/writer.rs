//! Writing a volume's log: one writer at a time, by create-if-absent.
//!
//! Opening takes the next sequence number with a higher generation. From then on every earlier writer finds the number it
//! wants taken and is told who has it. A create whose reply is lost is read back: the nonce tells whose the entry is.

use std::collections::HashMap;

use bytes::Bytes;
use common::clock::Clock;
use common::format::log::{CommittedEpoch, LogEntry, SegmentRef};
use common::format::volume_header::VolumeHeader;
use common::ids::{CloseId, Digest, Generation, LogSeq, Nonce, ReceiverId};
use common::limits;

use super::checkpoint::{VolumeView, open_view};
use super::log::{LogError, LogPosition, follow_growth};
use super::paths;
use crate::store::{PutOutcome, Store};

/// Times that opening tries anew when other entries appear at the head meanwhile.
const OPEN_ATTEMPTS: usize = 16;
/// Attempts at one sequence number whose outcome is remembered.
const ATTEMPTS_MAX: usize = 64;

/// An entry that was committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Appended {
    /// Its sequence number.
    pub seq: LogSeq,
    /// BLAKE3 of its bytes.
    pub digest: Digest,
    /// The newest committed close now.
    pub head: CloseId,
}

/// The right to write one volume's log, until another receiver takes it.
#[derive(Debug)]
pub struct LogWriter {
    store: Store,
    clock: Clock,
    header: VolumeHeader,
    receiver: ReceiverId,
    generation: Generation,
    position: LogPosition,
    /// Attempts at the next sequence number whose outcome is not known: each may still appear there.
    attempts: Vec<Attempt>,
    /// What entries of maintenance that were followed condemned, and which entry did. A segment is uploaded before earlier
    /// ones are committed, so the entry that condemned it may lie behind the writer's position when its turn comes.
    condemned: HashMap<String, LogSeq>,
    fenced: Option<(ReceiverId, Generation, String)>,
}

#[derive(Debug)]
struct Attempt {
    nonce: Nonce,
    epochs: Vec<CloseId>,
}

impl LogWriter {
    /// Takes a new generation of the volume's log by creating its next entry, and returns what the log says, that entry
    /// included.
    ///
    /// # Errors
    /// Those of [`open_view`]; [`LogError::Fenced`] where other receivers keep taking the head.
    pub async fn open(
        store: &Store,
        header: &VolumeHeader,
        receiver: ReceiverId,
        clock: &Clock,
    ) -> Result<(Self, VolumeView), LogError> {
        let mut last_error = None;
        for _ in 0..OPEN_ATTEMPTS {
            let mut view = open_view(store, header).await?;
            let generation = Generation(view.position.generation.0.saturating_add(1));
            let mut writer = Self {
                store: store.clone(),
                clock: clock.clone(),
                header: header.clone(),
                receiver,
                generation,
                position: view.position.clone(),
                attempts: Vec::new(),
                condemned: HashMap::new(),
                fenced: None,
            };
            match writer.append(Vec::new(), Vec::new()).await {
                Ok(_) => {
                    view.position = writer.position.clone();
                    view.entries_since_checkpoint += 1;
                    return Ok((writer, view));
                }
                // The number was taken between reading and creating: read on from there.
                Err(error @ LogError::Fenced { .. }) => last_error = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last_error.unwrap_or(LogError::TooMuch { what: "attempts to open the log", found: 0, max: OPEN_ATTEMPTS }))
    }

    /// The end of the log as this writer knows it.
    #[must_use]
    pub fn position(&self) -> &LogPosition {
        &self.position
    }

    /// The generation that this writer writes under.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Commits epochs whose records lie in `segments`, all durably stored before: creates the next entry. When this returns
    /// `Ok` they are committed.
    ///
    /// Entries of maintenance that a collector made meanwhile are followed, and the next number is taken.
    ///
    /// After an error of kind `Retry` the entry may or may not be there: call again with the same epochs, which finds out; but
    /// after [`LogError::Condemned`] it is not, and the segments are to be stored anew under fresh names.
    /// Dropping the future is the same as such an error. After [`LogError::Fenced`] every call fails so.
    ///
    /// # Errors
    /// [`LogError::Fenced`]; [`LogError::WrongParent`], [`LogError::NotGrowing`], [`LogError::Signature`] and
    /// [`LogError::ForeignClose`] for closes that may not come next (nothing was written); [`LogError::TooMuch`];
    /// [`LogError::Condemned`]; [`LogError::Store`].
    pub async fn append(
        &mut self,
        segments: Vec<SegmentRef>,
        epochs: Vec<CommittedEpoch>,
    ) -> Result<Appended, LogError> {
        loop {
            if let Some(appended) = self.try_append(&segments, &epochs).await? {
                return Ok(appended);
            }
        }
    }

    /// `None` where maintenance took the number: the next one is to be tried.
    async fn try_append(
        &mut self,
        segments: &[SegmentRef],
        epochs: &[CommittedEpoch],
    ) -> Result<Option<Appended>, LogError> {
        if let Some((winner, generation, path)) = &self.fenced {
            return Err(LogError::Fenced {
                volume: self.header.volume,
                winner: *winner,
                generation: *generation,
                path: path.clone(),
            });
        }
        if let Some((segment, seq)) =
            segments.iter().find_map(|segment| Some((segment, self.condemned.get(&segment.path)?)))
        {
            let entry = paths::log_entry(self.header.volume, *seq);
            return Err(LogError::Condemned { path: segment.path.clone(), entry });
        }
        let bounds = [
            ("segments of one log entry", segments.len(), limits::LOG_ENTRY_SEGMENTS_MAX),
            ("epochs of one log entry", epochs.len(), limits::LOG_ENTRY_EPOCHS_MAX),
            ("undecided attempts at one log entry", self.attempts.len(), ATTEMPTS_MAX),
        ];
        for (what, found, max) in bounds {
            if found > max {
                return Err(LogError::TooMuch { what, found, max });
            }
        }
        let seq =
            self.position.next_seq().ok_or(LogError::TooMuch { what: "log entries", found: 0, max: usize::MAX })?;
        let path = paths::log_entry(self.header.volume, seq);
        let entry = LogEntry {
            volume: self.header.volume,
            seq,
            generation: self.generation,
            writer: self.receiver,
            previous: self.position.digest,
            nonce: Nonce(common::rng::random()?),
            written: self.clock.now(),
            segments: segments.to_vec(),
            epochs: epochs.to_vec(),
            maintenance: None,
        };
        let encoded = Bytes::from(entry.encode());
        // Judged before it is written, by the rule that readers apply.
        follow_growth(&self.store, &mut self.header, &entry.epochs).await?;
        let mut position = self.position.clone();
        position.follow(&self.header, &path, &entry, LogEntry::digest_of(&encoded))?;
        let wanted: Vec<CloseId> = entry.epochs.iter().map(|epoch| epoch.close.id()).collect();
        self.attempts.push(Attempt { nonce: entry.nonce, epochs: wanted.clone() });
        match self.store.put_if_absent(&path, encoded).await {
            Ok(PutOutcome::Created) => Ok(Some(self.advance(position))),
            Ok(PutOutcome::Exists) => {
                let found = self.store.get(&path).await?;
                self.settle(&path, &found, &wanted)
            }
            Err(error) => match self.store.get(&path).await {
                Ok(found) => self.settle(&path, &found, &wanted),
                Err(_) => Err(error.into()),
            },
        }
    }

    /// Decides whose the entry at the wanted number is; `None` where it is maintenance, which was followed.
    fn settle(&mut self, path: &str, found: &[u8], wanted: &[CloseId]) -> Result<Option<Appended>, LogError> {
        let entry = LogEntry::decode(found).map_err(|source| LogError::Damaged { path: path.to_owned(), source })?;
        if let Some(maintenance) = &entry.maintenance
            && entry.generation == self.position.generation
        {
            let mut position = self.position.clone();
            position.follow(&self.header, path, &entry, LogEntry::digest_of(found))?;
            // The number is taken, so none of the attempts at it can appear any more.
            self.advance(position);
            self.condemned.extend(maintenance.condemned.iter().map(|path| (path.clone(), entry.seq)));
            return Ok(None);
        }
        let Some(own) = self.attempts.iter().position(|attempt| attempt.nonce == entry.nonce) else {
            self.fenced = Some((entry.writer, entry.generation, path.to_owned()));
            return Err(LogError::Fenced {
                volume: self.header.volume,
                winner: entry.writer,
                generation: entry.generation,
                path: path.to_owned(),
            });
        };
        let same = self.attempts[own].epochs == wanted;
        let mut position = self.position.clone();
        position.follow(&self.header, path, &entry, LogEntry::digest_of(found))?;
        let appended = self.advance(position);
        if same { Ok(Some(appended)) } else { Err(LogError::OtherAttempt { path: path.to_owned() }) }
    }

    fn advance(&mut self, position: LogPosition) -> Appended {
        self.attempts.clear();
        self.position = position;
        Appended { seq: self.position.seq, digest: self.position.digest, head: self.position.head_id() }
    }
}
