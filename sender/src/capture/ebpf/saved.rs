//! The saved sets of a tracker: files `pages-<sequence>` (format: `docs/formats/page-set.md`), which hold what was marked until
//! it is committed.
//!
//! A set is durable before its buffer is cleared. A set that is damaged, or of another disk, counts as all pages.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use common::format::envelope::HEAD_BYTES;
use common::format::page_set::{Decoder, ENVELOPE_BYTES_MAX, Encoder, Head};
use common::ids::Geometry;
use common::pages::PageSet;
use tracing::warn;

use super::error::TrackerError;

const PREFIX: &str = "pages-";
const UNFINISHED: &str = ".new";

/// The directory of a tracker's saved sets.
#[derive(Debug)]
pub(super) struct Saved {
    directory: PathBuf,
    identity: [u8; 32],
    geometry: Geometry,
    /// Those that exist, ascending.
    sequences: Vec<u64>,
}

impl Saved {
    /// Opens the directory, which is made where it is not there; unfinished files are removed.
    pub(super) fn open(directory: &Path, identity: [u8; 32], geometry: Geometry) -> Result<Self, TrackerError> {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.map_err(TrackerError::state("make the directory", directory))?;
        let mut sequences = Vec::new();
        for entry in std::fs::read_dir(directory).map_err(TrackerError::state("list", directory))? {
            let path = entry.map_err(TrackerError::state("list", directory))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let Some(rest) = name.strip_prefix(PREFIX) else { continue };
            if rest.ends_with(UNFINISHED) {
                std::fs::remove_file(&path).map_err(TrackerError::state("remove", &path))?;
            } else if let Ok(sequence) = u64::from_str_radix(rest, 16) {
                sequences.push(sequence);
            }
        }
        sequences.sort_unstable();
        Ok(Self { directory: directory.to_owned(), identity, geometry, sequences })
    }

    /// True where there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// The greatest number of a set that exists; 0 where there is none.
    pub(super) fn newest(&self) -> u64 {
        self.sequences.last().copied().unwrap_or(0)
    }

    /// All pages that any of the sets holds.
    pub(super) fn union(&self) -> Result<PageSet, TrackerError> {
        let mut union = PageSet::empty(self.geometry);
        for sequence in &self.sequences {
            let path = self.path(*sequence);
            match self.read(&path, *sequence) {
                Ok(pages) => union.extend(&pages),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    warn!(path = %path.display(), %error, "a saved set of changed pages can't be used; all pages count as changed");
                    return Ok(PageSet::full(self.geometry));
                }
                Err(error) => return Err(TrackerError::state("read", &path)(error)),
            }
        }
        Ok(union)
    }

    /// Saves a set durably under a number greater than any before.
    pub(super) fn write(&mut self, sequence: u64, pages: &PageSet) -> Result<(), TrackerError> {
        let path = self.path(sequence);
        let unfinished = self.directory.join(format!("{PREFIX}{sequence:016x}{UNFINISHED}"));
        let written = (|| {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
            let head = Head { identity: self.identity, sequence, disk_bytes: self.geometry.disk_bytes() };
            file.write_all(&head.encode())?;
            for part in Encoder::new(pages) {
                file.write_all(&part)?;
            }
            file.sync_all()?;
            std::fs::rename(&unfinished, &path)?;
            self.sync()
        })();
        written.map_err(TrackerError::state("save the changed pages to", &path))?;
        self.sequences.push(sequence);
        Ok(())
    }

    /// Removes the sets up to and with `sequence`. That they are gone need not be durable: a set that comes back costs a read
    /// of its pages.
    pub(super) fn forget(&mut self, sequence: u64) -> Result<(), TrackerError> {
        while let Some(first) = self.sequences.first().copied().filter(|first| *first <= sequence) {
            let path = self.path(first);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(TrackerError::state("remove", &path)(error));
                }
                _ => self.sequences.remove(0),
            };
        }
        Ok(())
    }

    fn read(&self, path: &Path, sequence: u64) -> io::Result<PageSet> {
        let invalid = |error: String| io::Error::new(io::ErrorKind::InvalidData, error);
        let mut file = BufReader::new(File::open(path)?);
        let mut buffer = Vec::new();
        read_envelope(&mut file, &mut buffer)?;
        let (head, geometry) = Head::decode(&buffer).map_err(|error| invalid(error.to_string()))?;
        if head.identity != self.identity || geometry != self.geometry || head.sequence != sequence {
            return Err(invalid("it is of another disk, or of the time before the machine started".to_owned()));
        }
        let mut decoder = Decoder::new(geometry);
        loop {
            read_envelope(&mut file, &mut buffer)?;
            if decoder.take(&buffer).map_err(|error| invalid(error.to_string()))? {
                break;
            }
        }
        decoder.finish().ok_or_else(|| invalid("it has no end".to_owned()))
    }

    fn path(&self, sequence: u64) -> PathBuf {
        self.directory.join(format!("{PREFIX}{sequence:016x}"))
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.directory)?.sync_all()
    }
}

/// Removes all saved sets of a directory, and it where nothing else is in it.
pub(super) fn remove_all(directory: &Path) -> Result<(), TrackerError> {
    if !directory.exists() {
        return Ok(());
    }
    for entry in std::fs::read_dir(directory).map_err(TrackerError::state("list", directory))? {
        let path = entry.map_err(TrackerError::state("list", directory))?.path();
        if path.file_name().unwrap_or_default().to_string_lossy().starts_with(PREFIX) {
            std::fs::remove_file(&path).map_err(TrackerError::state("remove", &path))?;
        }
    }
    // The caller may keep other files there.
    let _ = std::fs::remove_dir(directory);
    Ok(())
}

/// Reads one envelope: its head says its length.
fn read_envelope(file: &mut impl Read, buffer: &mut Vec<u8>) -> io::Result<()> {
    let truncated = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::new(io::ErrorKind::InvalidData, "it is truncated"),
        _ => error,
    };
    buffer.resize(HEAD_BYTES, 0);
    file.read_exact(buffer).map_err(truncated)?;
    let length = buffer[HEAD_BYTES - 4..].try_into().map_or(u32::MAX, u32::from_le_bytes) as usize;
    let total = HEAD_BYTES.saturating_add(length).saturating_add(4);
    if total > ENVELOPE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a part of it is too long"));
    }
    buffer.resize(total, 0);
    file.read_exact(&mut buffer[HEAD_BYTES..]).map_err(truncated)
}
