//! The page hashes of one volume on disk: what the newest committed close made of each page.
//!
//! Promises: read by position, a few entries at a time, never whole; a damaged entry is reported and counts as unknown, so
//! its pages travel again. Changes of a close are applied in place and redone after a crash, for the journal is kept until
//! the header that names the close is durable.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use common::format::state::{
    HASH_ENTRY_BYTES, HASHES_ENTRIES_OFFSET, HASHES_SLOT_BYTES, HASHES_SLOTS, HashChange, HashEntry, HashesHeader,
    VolumeIdentity,
};
use common::ids::{BlockIndex, CloseId, Epoch, Geometry, VolumeId};
use common::session::ClosedEpoch;
use tracing::warn;

use super::error::StateError;

/// Entries of zero blocks written at a time.
const ZERO_ENTRIES: usize = 256;

/// Reads page hashes; clones share the file.
#[derive(Debug, Clone)]
pub struct HashReader {
    file: Arc<File>,
    path: Arc<PathBuf>,
    blocks: u64,
    /// Taken for writing while an entry is changed, so that nobody reads half of it.
    changing: Arc<RwLock<()>>,
}

impl HashReader {
    /// Blocks of the disk.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Replaces `entries` by those of `count` blocks from `first` on, as far as the disk goes. A damaged entry is logged
    /// and counts as unknown.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn read(&self, first: BlockIndex, count: usize, entries: &mut Vec<HashEntry>) -> Result<(), StateError> {
        entries.clear();
        let count = usize::try_from(self.blocks.saturating_sub(first.0)).unwrap_or(usize::MAX).min(count);
        let mut bytes = vec![0; count * HASH_ENTRY_BYTES];
        let steady = self.changing.read().unwrap_or_else(PoisonError::into_inner);
        self.file
            .read_exact_at(&mut bytes, HashEntry::offset(first))
            .map_err(|error| StateError::io("read", &self.path, error))?;
        drop(steady);
        for (block, entry) in (first.0..).zip(bytes.as_chunks::<HASH_ENTRY_BYTES>().0) {
            entries.push(decode(&self.path, BlockIndex(block), entry));
        }
        Ok(())
    }
}

fn decode(path: &Path, block: BlockIndex, bytes: &[u8; HASH_ENTRY_BYTES]) -> HashEntry {
    HashEntry::decode(block, bytes).unwrap_or_else(|error| {
        let offset = HashEntry::offset(block);
        warn!(file = %path.display(), offset, block = block.0, %error, "damaged page hashes: the block is sent again");
        HashEntry::UNKNOWN
    })
}

/// The page hashes' file, open for reading and writing.
#[derive(Debug)]
pub(super) struct Hashes {
    file: Arc<File>,
    path: Arc<PathBuf>,
    header: HashesHeader,
    geometry: Geometry,
    changing: Arc<RwLock<()>>,
}

impl Hashes {
    /// Makes the file, with nothing known about any page. Its whole length is reserved, so that a full disk shows now.
    pub(super) fn create(path: &Path, identity: &VolumeIdentity, applied: ClosedEpoch) -> Result<(), StateError> {
        let header = HashesHeader {
            sequence: 1,
            volume: identity.volume,
            incarnation: identity.incarnation,
            disk_bytes: identity.disk_bytes,
            hash_key_check: identity.hash_key_check(),
            applied_epoch: applied.epoch,
            applied_close: applied.close,
        };
        let length = file_bytes(identity.geometry());
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| StateError::io("create", path, error))?;
        let reserved = match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, length) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => file.set_len(length),
            other => other.map_err(Into::into),
        };
        reserved
            .and_then(|()| file.write_all_at(&header.encode_slot(), 0))
            .and_then(|()| {
                file.write_all_at(&HashesHeader { sequence: 0, ..header }.encode_slot(), HASHES_SLOT_BYTES as u64)
            })
            .and_then(|()| file.sync_all())
            .map_err(|error| StateError::write(path, length, error))
    }

    /// Opens the file and checks that it is this volume's.
    pub(super) fn open(path: &Path, identity: &VolumeIdentity) -> Result<Self, StateError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|error| StateError::io("open", path, error))?;
        let mut slots = vec![0; HASHES_SLOT_BYTES * HASHES_SLOTS];
        file.read_exact_at(&mut slots, 0).map_err(|error| StateError::io("read", path, error))?;
        let header = HashesHeader::newest(&slots).map_err(|error| StateError::format(path, error))?;
        let foreign = |what, expected: String, found: String| {
            if expected == found {
                return Ok(());
            }
            Err(StateError::Foreign { path: path.to_owned(), what, expected, found })
        };
        foreign("volume", identity.volume.to_string(), header.volume.to_string())?;
        // A crash in the middle of growing leaves these behind the identity: `grow` goes on.
        let grows = header.incarnation < identity.incarnation && header.disk_bytes < identity.disk_bytes;
        if !grows {
            foreign("incarnation", identity.incarnation.to_string(), header.incarnation.to_string())?;
            foreign("disk size", identity.disk_bytes.to_string(), header.disk_bytes.to_string())?;
        }
        let check = |check: [u8; 16]| check.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        foreign("hash key", check(identity.hash_key_check()), check(header.hash_key_check))?;
        let length = file.metadata().map_err(|error| StateError::io("stat", path, error))?.len();
        if grows {
            super::grow::grow_hashes(&file, path, header, length, identity)?;
            return Self::open(path, identity);
        }
        foreign("file length", file_bytes(identity.geometry()).to_string(), length.to_string())?;
        Ok(Self {
            file: Arc::new(file),
            path: Arc::new(path.to_owned()),
            header,
            geometry: identity.geometry(),
            changing: Arc::default(),
        })
    }

    pub(super) fn reader(&self) -> HashReader {
        HashReader {
            file: Arc::clone(&self.file),
            path: Arc::clone(&self.path),
            blocks: self.geometry.blocks(),
            changing: Arc::clone(&self.changing),
        }
    }

    /// The newest close whose changes are all in.
    pub(super) fn applied(&self) -> ClosedEpoch {
        ClosedEpoch { epoch: self.header.applied_epoch, close: self.header.applied_close }
    }

    /// Applies one change in place; durable after [`Self::advance`].
    pub(super) fn apply(&self, change: &HashChange) -> Result<(), StateError> {
        let (first, count) = match change {
            HashChange::Pages { block, .. } => (*block, 1),
            HashChange::ZeroBlocks { first, count } => (*first, *count),
        };
        if first.0 + u64::from(count) > self.geometry.blocks() {
            return Err(StateError::Foreign {
                path: self.path.to_path_buf(),
                what: "last block of a journaled change",
                expected: format!("below {}", self.geometry.blocks()),
                found: (first.0 + u64::from(count) - 1).to_string(),
            });
        }
        let _changing = self.changing.write().unwrap_or_else(PoisonError::into_inner);
        match change {
            HashChange::Pages { block, mask, hashes } => self.apply_pages(*block, mask.iter(), hashes),
            HashChange::ZeroBlocks { first, count } => self.apply_zero_blocks(first.0..first.0 + u64::from(*count)),
        }
    }

    fn apply_pages(
        &self,
        block: BlockIndex,
        pages: impl Iterator<Item = u32>,
        hashes: &[[u8; 16]],
    ) -> Result<(), StateError> {
        let offset = HashEntry::offset(block);
        let mut bytes = [0; HASH_ENTRY_BYTES];
        self.file.read_exact_at(&mut bytes, offset).map_err(|error| StateError::io("read", &self.path, error))?;
        let mut entry = decode(&self.path, block, &bytes);
        for (page, hash) in pages.zip(hashes) {
            entry.0[page as usize] = *hash;
        }
        entry.encode(block, &mut bytes);
        self.write(&bytes, offset)
    }

    fn apply_zero_blocks(&self, blocks: std::ops::Range<u64>) -> Result<(), StateError> {
        let mut bytes = Vec::with_capacity(ZERO_ENTRIES * HASH_ENTRY_BYTES);
        let mut first = blocks.start;
        while first < blocks.end {
            let end = blocks.end.min(first + ZERO_ENTRIES as u64);
            bytes.clear();
            for block in first..end {
                let mut entry = [0; HASH_ENTRY_BYTES];
                HashEntry::ZERO.encode(BlockIndex(block), &mut entry);
                bytes.extend_from_slice(&entry);
            }
            self.write(&bytes, HashEntry::offset(BlockIndex(first)))?;
            first = end;
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<(), StateError> {
        self.file.write_all_at(bytes, offset).map_err(|error| StateError::write(&self.path, bytes.len() as u64, error))
    }

    /// Makes all applied changes durable, and then the header that names the close they are of.
    pub(super) fn advance(&mut self, epoch: Epoch, close: CloseId) -> Result<(), StateError> {
        let sync = |file: &File| file.sync_data().map_err(|error| StateError::io("sync", &self.path, error));
        sync(&self.file)?;
        let header = HashesHeader {
            sequence: self.header.sequence + 1,
            applied_epoch: epoch,
            applied_close: close,
            ..self.header
        };
        // The older slot is overwritten: a torn write leaves the newer one.
        let slot = header.sequence.wrapping_add(1) % HASHES_SLOTS as u64;
        self.write(&header.encode_slot(), slot * HASHES_SLOT_BYTES as u64)?;
        sync(&self.file)?;
        self.header = header;
        Ok(())
    }
}

/// Volume and applied close of the file at `path`, where its header can be read. Changes nothing.
pub(super) fn peek(path: &Path) -> Option<(VolumeId, ClosedEpoch)> {
    let mut slots = vec![0; HASHES_SLOT_BYTES * HASHES_SLOTS];
    File::open(path).and_then(|file| file.read_exact_at(&mut slots, 0)).ok()?;
    let header = HashesHeader::newest(&slots).ok()?;
    Some((header.volume, ClosedEpoch { epoch: header.applied_epoch, close: header.applied_close }))
}

pub(super) fn file_bytes(geometry: Geometry) -> u64 {
    HASHES_ENTRIES_OFFSET + geometry.blocks() * HASH_ENTRY_BYTES as u64
}
