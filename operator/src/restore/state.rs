//! What an interrupted restore had finished, so that the next one goes on from there.
//!
//! One small file, replaced whole (temporary file, sync, rename, sync of the folder) after the data it speaks of is synced.
//! Kept in an envelope with magic `BFRESTOR`. Body: volume 16, point 32, disk bytes 8, format 1, window 8, digest of that window's
//! plan 32, item count 4, one bit for each item (1 = written), lowest first. Version 1 had no format and is not read: it is worth as
//! much as no state.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use common::format::FormatError;
use common::format::envelope::Kind;
use common::format::wire::{Reader, Writer};
use common::ids::{CloseId, Digest, VolumeId};

use super::image::Format;

/// Envelope of a restore's state.
pub const KIND: Kind = Kind { what: "restore state", magic: *b"BFRESTOR", version: 2, body_bytes_max: 4 << 20 };
const ITEMS_MAX: usize = 1 << 24;

/// A restore's progress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreState {
    /// Volume restored.
    pub volume: VolumeId,
    /// Point restored.
    pub point: CloseId,
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// What the target is written as.
    pub format: Format,
    /// Number of the window that is being written; those before are done.
    pub window: u64,
    /// Names the plan whose items `done` counts.
    pub plan: Digest,
    /// For each item of that plan, whether it is written and synced.
    pub done: Vec<bool>,
}

impl RestoreState {
    /// A restore that has done nothing yet.
    #[must_use]
    pub fn new(volume: VolumeId, point: CloseId, disk_bytes: u64, format: Format) -> Self {
        Self { volume, point, disk_bytes, format, window: 0, plan: Digest::ZERO, done: Vec::new() }
    }

    /// True where both are about the same restore, however far.
    #[must_use]
    pub fn is_same_restore(&self, other: &Self) -> bool {
        let restore = |state: &Self| (state.volume, state.point, state.disk_bytes, state.format);
        restore(self) == restore(other)
    }

    /// Turns to a window's plan: what is done stays done if it is the plan that the state speaks of.
    pub fn enter(&mut self, window: u64, plan: Digest, items: usize) {
        if (self.window, self.plan, self.done.len()) != (window, plan, items) {
            (self.window, self.plan, self.done) = (window, plan, vec![false; items]);
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut body = Writer::with_capacity(128 + self.done.len() / 8);
        body.raw(&self.volume.0).raw(&self.point.0).u64(self.disk_bytes).u8(self.format.number());
        body.u64(self.window).raw(&self.plan.0);
        body.count(self.done.len());
        for bits in self.done.chunks(8) {
            body.u8(bits.iter().enumerate().fold(0, |byte, (bit, done)| byte | u8::from(*done) << bit));
        }
        KIND.seal(body.as_slice())
    }

    fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let body = KIND.open(bytes)?;
        if bytes.get(8..10) != Some(KIND.version.to_le_bytes().as_slice()) {
            return Err(FormatError::UnknownVersion { what: KIND.what, found: 1, known: KIND.version });
        }
        let mut reader = Reader::new("restore state", body);
        let (volume, point, disk_bytes) = (VolumeId(reader.array()?), CloseId(reader.array()?), reader.u64()?);
        let number = reader.u8()?;
        let format =
            Format::from_number(number).ok_or(FormatError::Invalid { what: "restore format", found: number.into() })?;
        let mut state = Self {
            volume,
            point,
            disk_bytes,
            format,
            window: reader.u64()?,
            plan: Digest(reader.array()?),
            done: Vec::new(),
        };
        let items = reader.u32()? as usize;
        if items > ITEMS_MAX {
            return Err(FormatError::OverLimit { what: "restore items", found: items as u64, limit: ITEMS_MAX as u64 });
        }
        let bits = reader.take(items.div_ceil(8))?;
        state.done = (0..items).map(|item| bits[item / 8] >> (item % 8) & 1 == 1).collect();
        reader.finish()?;
        Ok(state)
    }

    /// Reads a state file; `None` where there is none, or where it can't be read as one (it is then worth nothing, and the
    /// restore starts over).
    ///
    /// # Errors
    /// Those of reading a file that is there.
    pub fn load(path: &Path) -> io::Result<Option<Self>> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match Self::decode(&bytes) {
            Ok(state) => Ok(Some(state)),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "restore state not used: starting over");
                Ok(None)
            }
        }
    }

    /// Replaces the state file durably.
    ///
    /// # Errors
    /// Those of writing; the old file is still whole then.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let temporary = with_suffix(path, ".new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(&self.encode())?;
        file.sync_all()?;
        drop(file);
        std::fs::rename(&temporary, path)?;
        sync_folder_of(path)
    }
}

/// `path` with `suffix` put behind its last component.
#[must_use]
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Makes a rename or removal beside `path` durable.
///
/// # Errors
/// Those of opening and syncing the folder.
pub fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(items: usize) -> RestoreState {
        let mut state = RestoreState::new(VolumeId::from_random([1; 16]), CloseId([2; 32]), 12_345, Format::Qcow2);
        state.enter(3, Digest([4; 32]), items);
        (0..items).step_by(3).for_each(|item| state.done[item] = true);
        state
    }

    #[test]
    fn a_state_reads_back_and_any_flipped_byte_voids_it() {
        for items in [0, 1, 8, 9, 100] {
            assert_eq!(RestoreState::decode(&state(items).encode()), Ok(state(items)));
        }
        let bytes = state(20).encode();
        for at in 0..bytes.len() {
            let mut broken = bytes.clone();
            broken[at] ^= 4;
            assert!(RestoreState::decode(&broken).is_err(), "byte {at}");
        }
    }

    #[test]
    fn what_was_done_counts_only_for_the_same_plan() {
        let mut same = state(10);
        same.enter(3, Digest([4; 32]), 10);
        assert_eq!(same, state(10));
        for (window, plan, items) in [(2, [4; 32], 10), (3, [5; 32], 10), (3, [4; 32], 11)] {
            let mut other = state(10);
            other.enter(window, Digest(plan), items);
            assert!(!other.done.contains(&true));
        }
    }

    #[test]
    fn a_saved_state_is_loaded_and_rubbish_is_as_good_as_none() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("x.state");
        assert_eq!(RestoreState::load(&path).expect("readable"), None);
        state(9).save(&path).expect("writable");
        assert_eq!(RestoreState::load(&path).expect("readable"), Some(state(9)));
        std::fs::write(&path, "rubbish").expect("writable");
        assert_eq!(RestoreState::load(&path).expect("readable"), None);
    }
}
