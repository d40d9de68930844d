//! What the sender keeps on disk: of each volume its identity, the hashes of its pages, and the closes not yet committed.
//!
//! ```text
//! STATE_DIR/lock                                one sender per directory
//! STATE_DIR/volumes/<uuid>/volume               identity and hash key (envelope)
//!                          hashes               16 bytes for each page, 0.4 % of the disk
//!                          journal/<epoch>.open    changes of an open epoch: removed at the next start
//!                          journal/<epoch>.closed  changes of a closed epoch, durable before its close is sent
//!                          journal/<epoch>.committed  changes of a committed close while they are applied
//! ```
//!
//! Promises
//! - `hashes` describe committed closes only. That a close is committed is made durable first (its journal is renamed); then
//!   its changes are applied, and its journal is removed after they, and the header that names the close, are durable. What a
//!   crash interrupts is done again at the next start, so no close is ever half applied and then discarded.
//! - A page whose hash could be wrong is unknown: it is sent again. Never the other way round.
//! - A scan may start only when nothing is in flight ([`VolumeState::begin_pass`]); else it would compare with hashes
//!   that an uncommitted close is about to change, and leave out a page that went back to its old content.
//! - Memory does not grow with the disk: hashes are read by position, journals in batches.
//! - A directory is used by one process at a time; what can't be written leaves nothing half-done.
//!
//! All functions block on files; async callers move them off the runtime.

mod error;
mod files;
mod glance;
mod grow;
mod hashes;
mod journal;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use common::format::close::Consistency;
pub use common::format::state::{HashChange, SourceIdentity, VolumeIdentity};
use common::ids::{CloseId, Epoch, VolumeId};
use common::session::ClosedEpoch;

pub use error::StateError;
pub use glance::{VolumeGlance, glance};
pub use hashes::HashReader;
use hashes::Hashes;
pub use journal::{JournalWriter, JournaledClose};

/// Largest volume identity that is read.
const IDENTITY_FILE_BYTES_MAX: u64 = 64 << 10;

/// A state directory, held by this process alone.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    _lock: File,
}

impl StateDir {
    /// Takes `path` for this process, making it where it is missing. What an interrupted [`VolumeState::create`] left is
    /// removed.
    ///
    /// # Errors
    /// [`StateError::InUse`], [`StateError::NotWritable`], [`StateError::Full`], [`StateError::Io`].
    pub fn open(path: &Path) -> Result<Self, StateError> {
        files::create_directory(path)?;
        let lock = files::lock(path)?;
        let state = Self { path: path.to_owned(), _lock: lock };
        files::create_directory(&state.volumes_path())?;
        for name in state.names()? {
            if name.ends_with(".new") {
                let stale = state.volumes_path().join(name);
                std::fs::remove_dir_all(&stale).map_err(|error| StateError::io("remove", &stale, error))?;
            }
        }
        Ok(state)
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Volumes protected from here, by id.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn volumes(&self) -> Result<Vec<VolumeId>, StateError> {
        let mut volumes: Vec<VolumeId> = self.names()?.iter().filter_map(|name| name.parse().ok()).collect();
        volumes.sort_unstable();
        Ok(volumes)
    }

    /// Ends a volume's protection: removes all that is kept of it here. Nothing is left of it after a success.
    ///
    /// # Errors
    /// [`StateError::Missing`], [`StateError::Io`].
    pub fn remove(&self, volume: VolumeId) -> Result<(), StateError> {
        let directory = self.volume_path(volume);
        let doomed = self.volumes_path().join(format!("{volume}.new"));
        match std::fs::rename(&directory, &doomed) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StateError::Missing { path: directory });
            }
            other => other.map_err(|error| StateError::io("remove", &directory, error))?,
        }
        files::sync_directory(&self.volumes_path())?;
        std::fs::remove_dir_all(&doomed).map_err(|error| StateError::io("remove", &doomed, error))
    }

    fn volumes_path(&self) -> PathBuf {
        self.path.join("volumes")
    }

    fn volume_path(&self, volume: VolumeId) -> PathBuf {
        self.volumes_path().join(volume.to_string())
    }

    fn names(&self) -> Result<Vec<String>, StateError> {
        let path = self.volumes_path();
        let unreadable = |error| StateError::io("list", &path, error);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&path).map_err(unreadable)? {
            names.extend(entry.map_err(unreadable)?.file_name().into_string());
        }
        Ok(names)
    }
}

/// The state of one volume.
#[derive(Debug)]
pub struct VolumeState {
    directory: PathBuf,
    journal: PathBuf,
    identity: VolumeIdentity,
    hashes: Hashes,
    /// Closes after the applied one, in parent order; each has a journal.
    journaled: VecDeque<JournaledClose>,
    /// How many of them, from the first, are marked as committed and not all applied.
    committed: usize,
    _lock: File,
}

impl VolumeState {
    /// Begins a volume's state, with nothing known of its pages and no close. Whole or not at all. `applied` is
    /// [`ClosedEpoch::default`] for a new volume; for one that is taken over, the newest committed close of its log.
    ///
    /// # Errors
    /// [`StateError::Exists`], [`StateError::Full`], [`StateError::NotWritable`], [`StateError::Io`].
    pub fn create(state: &StateDir, identity: &VolumeIdentity, applied: ClosedEpoch) -> Result<Self, StateError> {
        let directory = state.volume_path(identity.volume);
        if directory.exists() {
            return Err(StateError::Exists { path: directory });
        }
        let fresh = state.volumes_path().join(format!("{}.new", identity.volume));
        let made = Self::fill(&fresh, identity, applied).and_then(|()| {
            std::fs::rename(&fresh, &directory).map_err(|error| StateError::io("rename", &fresh, error))?;
            files::sync_directory(&state.volumes_path())
        });
        if let Err(error) = made {
            // If it stays, the next start removes it.
            let _ = std::fs::remove_dir_all(&fresh);
            return Err(error);
        }
        Self::open(state, identity.volume)
    }

    fn fill(directory: &Path, identity: &VolumeIdentity, applied: ClosedEpoch) -> Result<(), StateError> {
        if directory.exists() {
            std::fs::remove_dir_all(directory).map_err(|error| StateError::io("remove", directory, error))?;
        }
        files::create_directory(&directory.join("journal"))?;
        files::write_new(&directory.join("volume"), &identity.encode())?;
        Hashes::create(&directory.join("hashes"), identity, applied)?;
        files::sync_directory(directory)
    }

    /// Opens a volume's state: removes journals of epochs that were open and of those applied already, checks the others.
    ///
    /// # Errors
    /// [`StateError::Missing`], [`StateError::InUse`], [`StateError::AnotherVersion`], [`StateError::Damaged`],
    /// [`StateError::Foreign`], [`StateError::Io`]. Nothing is changed where the version is another.
    pub fn open(state: &StateDir, volume: VolumeId) -> Result<Self, StateError> {
        let directory = state.volume_path(volume);
        if !directory.is_dir() {
            return Err(StateError::Missing { path: directory });
        }
        let lock = files::lock(&directory)?;
        grow::remove_unfinished(&directory)?;
        let identity = read_identity(&directory.join("volume"), volume)?;
        let hashes = Hashes::open(&directory.join("hashes"), &identity)?;
        let journal = directory.join("journal");
        let mut state =
            Self { directory, journal, identity, hashes, journaled: VecDeque::new(), committed: 0, _lock: lock };
        state.recover()?;
        Ok(state)
    }

    /// Lists the journals, checks that they are one chain, and ends what a crash interrupted.
    fn recover(&mut self) -> Result<(), StateError> {
        let applied = self.known();
        let mut parent = applied.close;
        for (epoch, committed) in journal::recover(&self.journal)? {
            let path = match committed {
                true => journal::committed_path(&self.journal, epoch),
                false => journal::closed_path(&self.journal, epoch),
            };
            if epoch <= applied.epoch {
                files::remove(&path)?;
                continue;
            }
            let close = journal::read(path.clone(), &self.identity, epoch, |_| Ok(()))?;
            if close.parent != parent {
                let (expected, found) = (parent.to_string(), close.parent.to_string());
                return Err(StateError::Foreign { path, what: "parent close", expected, found });
            }
            parent = close.close;
            self.journaled.push_back(close);
            if committed {
                // Those before it are committed too, though their renaming may not have got to the disk.
                for index in self.committed..self.journaled.len() - 1 {
                    journal::mark_committed(&self.journal, self.journaled[index].epoch)?;
                }
                self.committed = self.journaled.len();
            }
        }
        self.apply_committed().map(drop)
    }

    /// The state of the volume that is called `name`; `None` where there is none.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn find(state: &StateDir, name: &str) -> Result<Option<Self>, StateError> {
        for volume in state.volumes()? {
            if read_identity(&state.volume_path(volume).join("volume"), volume)?.name == name {
                return Self::open(state, volume).map(Some);
            }
        }
        Ok(None)
    }

    /// The volume's identity.
    #[must_use]
    pub fn identity(&self) -> &VolumeIdentity {
        &self.identity
    }

    /// The volume's directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The newest committed close that is applied: the session's `known`.
    #[must_use]
    pub fn known(&self) -> ClosedEpoch {
        self.hashes.applied()
    }

    /// Closes made durable here after [`Self::known`], in parent order: the session's `journaled`.
    #[must_use]
    pub fn journaled(&self) -> Vec<ClosedEpoch> {
        self.journaled.iter().map(|close| ClosedEpoch { epoch: close.epoch, close: close.close }).collect()
    }

    /// The newest close: the parent of the next one.
    #[must_use]
    pub fn newest(&self) -> ClosedEpoch {
        self.journaled.back().map_or(self.known(), |close| ClosedEpoch { epoch: close.epoch, close: close.close })
    }

    /// The lowest epoch that was never closed here. The session may ask for a greater one.
    #[must_use]
    pub fn next_epoch(&self) -> Epoch {
        Epoch(self.newest().epoch.0 + 1)
    }

    /// The hashes to compare a scan with.
    ///
    /// # Errors
    /// [`StateError::InFlight`] while closes are not committed.
    pub fn begin_pass(&self) -> Result<HashReader, StateError> {
        if !self.journaled.is_empty() {
            return Err(StateError::InFlight { count: self.journaled.len() });
        }
        Ok(self.hashes.reader())
    }

    /// The hashes of what is committed, also while closes are in flight. Whoever compares with them must leave out the pages
    /// that those closes hold: they are about to change.
    #[must_use]
    pub fn committed_hashes(&self) -> HashReader {
        self.hashes.reader()
    }

    /// Begins the journal of a new epoch.
    ///
    /// # Errors
    /// [`StateError::EpochReused`], [`StateError::Full`], [`StateError::NotWritable`], [`StateError::Io`].
    pub fn begin_journal(&self, epoch: Epoch) -> Result<JournalWriter, StateError> {
        if epoch < self.next_epoch() {
            return Err(StateError::EpochReused { epoch: epoch.0, newest: self.newest().epoch.0 });
        }
        JournalWriter::create(&self.journal, &self.identity, epoch)
    }

    /// Ends an epoch's journal. Durable afterwards: only then may the close be sent.
    ///
    /// # Errors
    /// [`StateError::EpochReused`], [`StateError::UnknownClose`] where `parent` is not the newest close, [`StateError::Full`],
    /// [`StateError::Io`]. The epoch is not closed then, and what it holds is sent again in another.
    pub fn journal_close(
        &mut self,
        writer: JournalWriter,
        close: CloseId,
        parent: CloseId,
        point: Option<Consistency>,
    ) -> Result<(), StateError> {
        if writer.epoch() < self.next_epoch() {
            return Err(StateError::EpochReused { epoch: writer.epoch().0, newest: self.newest().epoch.0 });
        }
        if parent != self.newest().close {
            return Err(StateError::UnknownClose { path: self.directory.clone(), close: parent });
        }
        let closed = writer.close(close, parent, point)?;
        self.journaled.push_back(closed);
        Ok(())
    }

    /// Applies all closes up to `close`, which is committed, and removes their journals. Returns them, oldest first; none
    /// where `close` is [`Self::known`] already.
    ///
    /// # Errors
    /// [`StateError::UnknownClose`]; [`StateError::Damaged`], [`StateError::Full`] and [`StateError::Io`], after which the
    /// call can be repeated, and is at the next start.
    pub fn commit_through(&mut self, close: CloseId) -> Result<Vec<JournaledClose>, StateError> {
        if close == self.known().close {
            return Ok(Vec::new());
        }
        let Some(last) = self.journaled.iter().position(|journaled| journaled.close == close) else {
            return Err(StateError::UnknownClose { path: self.directory.clone(), close });
        };
        if last >= self.committed {
            for index in self.committed..=last {
                journal::mark_committed(&self.journal, self.journaled[index].epoch)?;
                self.committed = index + 1;
            }
            files::sync_directory(&self.journal)?;
        }
        self.apply_committed()
    }

    /// Applies the closes that are marked as committed, and removes their journals.
    fn apply_committed(&mut self) -> Result<Vec<JournaledClose>, StateError> {
        let Some(last) = self.committed.checked_sub(1).map(|last| self.journaled[last]) else { return Ok(Vec::new()) };
        for journaled in self.journaled.iter().take(self.committed) {
            let path = journal::committed_path(&self.journal, journaled.epoch);
            journal::read(path, &self.identity, journaled.epoch, |changes| {
                changes.iter().try_for_each(|change| self.hashes.apply(change))
            })?;
        }
        self.hashes.advance(last.epoch, last.close)?;
        let committed: Vec<_> = self.journaled.drain(..self.committed).collect();
        self.committed = 0;
        for journaled in &committed {
            files::remove(&journal::committed_path(&self.journal, journaled.epoch))?;
        }
        self.note_verified(&committed)?;
        Ok(committed)
    }

    /// Forgets all closes after `tip`: they were never staged, or are lost. What they held counts as changed again, since the
    /// hashes were never touched. Returns how many.
    ///
    /// # Errors
    /// [`StateError::UnknownClose`] where `tip` is neither known nor journaled; [`StateError::Io`].
    pub fn discard_after(&mut self, tip: CloseId) -> Result<usize, StateError> {
        let position = self.journaled.iter().position(|journaled| journaled.close == tip).map(|position| position + 1);
        let keep = position
            .or_else(|| (tip == self.known().close).then_some(0))
            // What was committed once can't be undone: a log without it is not the one that this state knows.
            .filter(|keep| *keep >= self.committed)
            .ok_or(StateError::UnknownClose { path: self.directory.clone(), close: tip })?;
        let discarded = self.journaled.len() - keep;
        // The newest first: what a crash leaves is still a chain.
        while self.journaled.len() > keep {
            if let Some(last) = self.journaled.back() {
                files::remove(&journal::closed_path(&self.journal, last.epoch))?;
                self.journaled.pop_back();
            }
        }
        if discarded > 0 {
            files::sync_directory(&self.journal)?;
        }
        Ok(discarded)
    }
}

fn read_identity(path: &Path, volume: VolumeId) -> Result<VolumeIdentity, StateError> {
    let length = std::fs::metadata(path).map_err(|error| StateError::io("open", path, error))?.len();
    let length = length.min(IDENTITY_FILE_BYTES_MAX);
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
    File::open(path)
        .and_then(|file| io::Read::read_to_end(&mut io::Read::take(file, IDENTITY_FILE_BYTES_MAX), &mut bytes))
        .map_err(|error| StateError::io("read", path, error))?;
    let identity = VolumeIdentity::decode(&bytes).map_err(|error| StateError::format(path, error))?;
    if identity.volume != volume {
        return Err(StateError::Foreign {
            path: path.to_owned(),
            what: "volume",
            expected: volume.to_string(),
            found: identity.volume.to_string(),
        });
    }
    Ok(identity)
}
