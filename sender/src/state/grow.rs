//! Growth: a volume's state moves to a new incarnation of a larger disk, and keeps the hashes of what the smaller one had.
//!
//! The store's header has the new incarnation first; then the identity here is replaced (written anew, renamed), then the page
//! hashes grow: new blocks are unknown, and their header names the new incarnation. A crash in between leaves hashes behind
//! the identity, and opening goes on from there. Journals of the smaller disk stay valid: their closes come before.
//!
//! The last page of the smaller disk, where that was no whole page, has a hash of its bytes padded with zeros; the store has
//! the same, and whoever reads the page now sees whether it still is that.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::format::state::{HASHES_SLOT_BYTES, HASHES_SLOTS, HashesHeader, VolumeIdentity};
use common::ids::Incarnation;

use super::error::StateError;
use super::files;
use super::hashes::{Hashes, file_bytes};
use super::{JournaledClose, VolumeState};

/// Says that the capture's marks can't be believed.
const VERIFY: &str = "verify";

impl VolumeState {
    /// Moves the state to `incarnation`, whose disk has `disk_bytes` bytes, both greater than now. Closes in flight stay. The
    /// capture's own marks are of the smaller disk: the new pages have unknown hashes, so a full comparison finds them.
    ///
    /// # Errors
    /// [`StateError::NotGrown`]; [`StateError::Full`], [`StateError::NotWritable`], [`StateError::Io`], after which the call, or
    /// the next start, goes on.
    pub fn grow(&mut self, incarnation: Incarnation, disk_bytes: u64) -> Result<(), StateError> {
        if incarnation <= self.identity.incarnation || disk_bytes <= self.identity.disk_bytes {
            return Err(StateError::NotGrown {
                path: self.directory.clone(),
                expected: self.identity.disk_bytes,
                found: disk_bytes,
            });
        }
        self.distrust_marks()?;
        let identity = VolumeIdentity { incarnation, disk_bytes, ..self.identity.clone() };
        self.replace_identity(identity)?;
        self.hashes = Hashes::open(&self.directory.join("hashes"), &self.identity)?;
        Ok(())
    }

    /// True where the capture's own marks of what changed can't be believed, and the whole disk is to be compared with the
    /// hashes first: the disk grew. Stays so until a point behind it is committed.
    #[must_use]
    pub fn must_verify(&self) -> bool {
        self.directory.join(VERIFY).exists()
    }

    /// Has the next start compare the whole disk with the hashes, whatever the capture's marks say.
    fn distrust_marks(&self) -> Result<(), StateError> {
        let newest = self.newest().epoch.0.to_string();
        files::write_new(&self.directory.join(VERIFY), newest.as_bytes())?;
        files::sync_directory(&self.directory)
    }

    /// Takes note of committed closes: one behind the growth that asserts a point says that the whole disk was compared, and
    /// what differed is committed.
    pub(super) fn note_verified(&self, committed: &[JournaledClose]) -> Result<(), StateError> {
        let Some(point) = committed.iter().rfind(|close| close.point.is_some()) else { return Ok(()) };
        let path = self.directory.join(VERIFY);
        let Ok(text) = std::fs::read_to_string(&path) else { return Ok(()) };
        // What can't be read was half written: the growth did not follow, or its first point says more than any number.
        let newest: u64 = text.parse().unwrap_or(0);
        if point.epoch.0 > newest { files::remove(&path) } else { Ok(()) }
    }

    /// Replaces the identity's file, whole or not at all.
    pub(super) fn replace_identity(&mut self, identity: VolumeIdentity) -> Result<(), StateError> {
        let (path, fresh) = (self.directory.join("volume"), self.directory.join("volume.new"));
        files::write_new(&fresh, &identity.encode())?;
        std::fs::rename(&fresh, &path).map_err(|error| StateError::io("rename", &fresh, error))?;
        files::sync_directory(&self.directory)?;
        self.identity = identity;
        Ok(())
    }
}

/// Ends what [`VolumeState::grow`] began: lengthens the file, then names the new disk in its header.
pub(super) fn grow_hashes(
    file: &File,
    path: &Path,
    header: HashesHeader,
    length: u64,
    identity: &VolumeIdentity,
) -> Result<(), StateError> {
    let wanted = file_bytes(identity.geometry());
    if length < wanted {
        let reserved = match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), length, wanted - length) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => file.set_len(wanted),
            other => other.map_err(Into::into),
        };
        reserved.map_err(|error| StateError::write(path, wanted - length, error))?;
    }
    // The length before the header that relies on it.
    file.sync_all().map_err(|error| StateError::io("sync", path, error))?;
    let header = HashesHeader {
        sequence: header.sequence + 1,
        incarnation: identity.incarnation,
        disk_bytes: identity.disk_bytes,
        ..header
    };
    let slot = header.sequence.wrapping_add(1) % HASHES_SLOTS as u64;
    file.write_all_at(&header.encode_slot(), slot * HASHES_SLOT_BYTES as u64)
        .and_then(|()| file.sync_all())
        .map_err(|error| StateError::write(path, HASHES_SLOT_BYTES as u64, error))
}

/// Removes what a crash left of an identity that was to be written.
pub(super) fn remove_unfinished(directory: &Path) -> Result<(), StateError> {
    files::remove(&directory.join("volume.new"))
}
