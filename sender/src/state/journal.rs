//! The journal of one epoch: a file of its own, written while the epoch is open, made durable and renamed when it closes.
//!
//! `<epoch>.open` is of an epoch that was never closed and is removed at the next start. `<epoch>.closed` is whole and
//! durable; its close may be sent. `<epoch>.committed` is of a committed close: its changes are being applied, and are applied
//! again after a crash. Epochs are 20 decimal digits, so that names sort as epochs do.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use common::format::FormatError;
use common::format::close::Consistency;
use common::format::state::{
    HashChange, JOURNAL_BATCH_CHANGES_MAX, JournalBatch, JournalEnd, JournalHead, JournalPart, VolumeIdentity,
};
use common::ids::{CloseId, Epoch};

use super::error::StateError;
use super::files;

/// Suffix of the journal of an epoch that is not closed.
const OPEN: &str = "open";
/// Suffix of the journal of a closed epoch.
const CLOSED: &str = "closed";
/// Suffix of the journal of a committed epoch.
const COMMITTED: &str = "committed";

/// What the journal's end states of a closed epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournaledClose {
    /// Epoch.
    pub epoch: Epoch,
    /// Its close.
    pub close: CloseId,
    /// The close before it.
    pub parent: CloseId,
    /// The recovery point that it asserts.
    pub point: Option<Consistency>,
}

/// Collects the changes of an open epoch. Dropped without being closed, it leaves nothing that counts.
#[derive(Debug)]
pub struct JournalWriter {
    directory: PathBuf,
    path: PathBuf,
    file: File,
    head: JournalHead,
    pending: Vec<HashChange>,
    batches: u32,
    changes: u64,
    closed: bool,
}

impl JournalWriter {
    pub(super) fn create(directory: &Path, identity: &VolumeIdentity, epoch: Epoch) -> Result<Self, StateError> {
        let path = directory.join(format!("{:020}.{OPEN}", epoch.0));
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| StateError::io("create", &path, error))?;
        let head = JournalHead {
            volume: identity.volume,
            incarnation: identity.incarnation,
            hash_key_check: identity.hash_key_check(),
            epoch,
        };
        let mut writer = Self {
            directory: directory.to_owned(),
            path,
            file,
            head,
            pending: Vec::with_capacity(JOURNAL_BATCH_CHANGES_MAX),
            batches: 0,
            changes: 0,
            closed: false,
        };
        writer.write(&JournalPart::Head(head))?;
        Ok(writer)
    }

    /// Epoch that it is of.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.head.epoch
    }

    /// Adds what one record changes. Not durable before the epoch is closed.
    ///
    /// # Errors
    /// [`StateError::Full`], [`StateError::Io`]; the epoch can't be closed then and has to be dropped.
    pub fn append(&mut self, change: HashChange) -> Result<(), StateError> {
        self.pending.push(change);
        self.changes += 1;
        if self.pending.len() == JOURNAL_BATCH_CHANGES_MAX {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), StateError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let part = JournalPart::Batch(JournalBatch {
            epoch: self.head.epoch,
            index: self.batches,
            changes: std::mem::take(&mut self.pending),
        });
        self.write(&part)?;
        self.batches += 1;
        self.pending = Vec::with_capacity(JOURNAL_BATCH_CHANGES_MAX);
        Ok(())
    }

    fn write(&mut self, part: &JournalPart) -> Result<(), StateError> {
        let bytes = part.encode();
        self.file.write_all(&bytes).map_err(|error| StateError::write(&self.path, bytes.len() as u64, error))
    }

    /// Makes the journal durable under its final name.
    pub(super) fn close(
        mut self,
        close: CloseId,
        parent: CloseId,
        point: Option<Consistency>,
    ) -> Result<JournaledClose, StateError> {
        self.flush()?;
        let epoch = self.head.epoch;
        let end = JournalEnd { epoch, close, parent, point, batches: self.batches, changes: self.changes };
        self.write(&JournalPart::End(end))?;
        self.file.sync_all().map_err(|error| StateError::io("sync", &self.path, error))?;
        let closed = closed_path(&self.directory, epoch);
        std::fs::rename(&self.path, &closed).map_err(|error| StateError::io("rename", &self.path, error))?;
        self.closed = true;
        if let Err(error) = files::sync_directory(&self.directory) {
            // It must not count at the next start, where another epoch may have taken its place in the chain.
            let _ = files::remove(&closed);
            return Err(error);
        }
        Ok(JournaledClose { epoch, close, parent, point })
    }
}

impl Drop for JournalWriter {
    fn drop(&mut self) {
        if !self.closed {
            // If it stays, the next start removes it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

pub(super) fn closed_path(directory: &Path, epoch: Epoch) -> PathBuf {
    directory.join(format!("{:020}.{CLOSED}", epoch.0))
}

/// Marks the journal of a closed epoch as that of a committed one. Durable after [`files::sync_directory`].
pub(super) fn mark_committed(directory: &Path, epoch: Epoch) -> Result<(), StateError> {
    let (from, to) = (closed_path(directory, epoch), committed_path(directory, epoch));
    std::fs::rename(&from, to).map_err(|error| StateError::io("rename", &from, error))
}

pub(super) fn committed_path(directory: &Path, epoch: Epoch) -> PathBuf {
    directory.join(format!("{:020}.{COMMITTED}", epoch.0))
}

/// Removes journals of open epochs, and lists the others by epoch, with true for those of committed ones.
pub(super) fn recover(directory: &Path) -> Result<Vec<(Epoch, bool)>, StateError> {
    let unreadable = |error| StateError::io("list", directory, error);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let epoch = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok()).map(Epoch);
        match (epoch, path.extension().and_then(|extension| extension.to_str())) {
            (Some(_), Some(OPEN)) => files::remove(&path)?,
            (Some(epoch), Some(CLOSED)) => found.push((epoch, false)),
            (Some(epoch), Some(COMMITTED)) => found.push((epoch, true)),
            _ => {} // not ours: left alone
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Reads the journal of a closed epoch at `path`, giving each batch to `batch`; returns its end, checked.
pub(super) fn read(
    path: PathBuf,
    identity: &VolumeIdentity,
    epoch: Epoch,
    mut batch: impl FnMut(Vec<HashChange>) -> Result<(), StateError>,
) -> Result<JournaledClose, StateError> {
    let file = File::open(&path).map_err(|error| StateError::io("open", &path, error))?;
    let mut reader = BufReader::with_capacity(256 << 10, file);
    let damaged = |error| StateError::format(&path, error);
    let out_of_place = |what, found| Err(damaged(FormatError::Invalid { what, found }));
    let expected = JournalHead {
        volume: identity.volume,
        incarnation: identity.incarnation,
        hash_key_check: identity.hash_key_check(),
        epoch,
    };
    let (mut head_seen, mut batches, mut changes) = (false, 0_u32, 0_u64);
    loop {
        match next_part(&mut reader, &path)? {
            JournalPart::Head(head) if !head_seen => {
                // A disk that grew keeps the journals of closes from before.
                let older = head.incarnation <= identity.incarnation;
                if (JournalHead { incarnation: identity.incarnation, ..head }) != expected || !older {
                    return Err(StateError::Foreign {
                        path,
                        what: "journal",
                        expected: format!("{expected:?}"),
                        found: format!("{head:?}"),
                    });
                }
                head_seen = true;
            }
            JournalPart::Batch(found) if head_seen && found.epoch == epoch && found.index == batches => {
                batches += 1;
                changes += found.changes.len() as u64;
                batch(found.changes)?;
            }
            JournalPart::End(end) if head_seen && end.epoch == epoch => {
                if (end.batches, end.changes) != (batches, changes) {
                    return out_of_place("journal change count", changes);
                }
                if reader.read(&mut [0]).map_err(|error| StateError::io("read", &path, error))? != 0 {
                    return out_of_place("byte after the journal's end", 1);
                }
                return Ok(JournaledClose { epoch, close: end.close, parent: end.parent, point: end.point });
            }
            JournalPart::Batch(found) => return out_of_place("journal batch", found.index.into()),
            JournalPart::Head(_) | JournalPart::End(_) => return out_of_place("journal part order", batches.into()),
        }
    }
}

fn next_part(reader: &mut impl Read, path: &Path) -> Result<JournalPart, StateError> {
    let read = |reader: &mut dyn Read, bytes: &mut [u8]| {
        reader.read_exact(bytes).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => StateError::format(
                path,
                FormatError::Truncated { what: "journal", needed: bytes.len() as u64, found: 0 },
            ),
            _ => StateError::io("read", path, error),
        })
    };
    let mut prefix = [0; JournalPart::PREFIX_BYTES];
    read(reader, &mut prefix)?;
    let length = JournalPart::encoded_len(&prefix).map_err(|error| StateError::format(path, error))?;
    let mut bytes = vec![0; length];
    let (head, rest) = bytes.split_at_mut(prefix.len());
    head.copy_from_slice(&prefix);
    read(reader, rest)?;
    JournalPart::decode(&bytes).map_err(|error| StateError::format(path, error))
}
