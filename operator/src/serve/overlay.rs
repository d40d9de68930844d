//! What clients wrote: a sparse file with a page wherever one was written, and bitmaps of which. The format is in
//! `docs/formats/overlay.md`.
//!
//! ```text
//! 0      header: an envelope with magic BFOVRLAY that binds the file to a volume, a point and a size
//! 4096   the run: boot id of the machine that wrote last, and its CRC-32C
//! 8192   bitmap of the pages written, in whole 4096 bytes
//! …      bitmap of the pages that a flush made durable, as long
//! …      the pages, each where it lies on the disk
//! ```
//!
//! Promises: after [`Overlay::flush`] returned, what was written before it began survives a power cut; what was written since
//! survives a kill of the process, and after a power cut each page of it is as flushed last or as written, or the point's:
//! a bit becomes durable only after its page did, and bits of another boot that were never flushed are forgotten. A file of
//! another volume or point is refused, as is one in use. Never: touches anything else. All functions block.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::format::FormatError;
use common::format::envelope::{Kind, OVERHEAD_BYTES};
use common::format::wire::{Reader, Writer};
use common::ids::{CloseId, Geometry, PageMask, VolumeId};
use common::limits::PAGE_BYTES;
use rustix::fs::{FallocateFlags, FlockOperation};
use rustix::io::Errno;

use super::cache::nameless;
use super::point_disk::Pages;
use crate::restore::plan::page_runs;
use crate::restore::state::{sync_folder_of, with_suffix};

/// Envelope of an overlay's header.
pub(super) const KIND: Kind = Kind { what: "serve overlay", magic: *b"BFOVRLAY", version: 1, body_bytes_max: 256 };
const BODY_BYTES: usize = 16 + 32 + 8;
const RUN_AT: u64 = 4096;
const BITMAP_AT: u64 = 8192;
/// Bytes of a bitmap read, written and remembered at a time: 128 MiB of disk.
const CHUNK_BYTES: usize = 4096;
const CHUNK_BLOCKS: usize = CHUNK_BYTES / 8;

/// Why there is no overlay.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The file system.
    #[error("overlay {path}: {source}: check the path, its permissions, and the space there")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no overlay, or a damaged one.
    #[error("{path} is no overlay that can be used: {source}; name another file with --overlay")]
    NotOne {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: FormatError,
    },
    /// It is one of something else.
    #[error(
        "overlay {path} holds changes to point {point} of volume {volume} ({disk_bytes} bytes), not to the point asked for: pass --point {point}, or another --overlay"
    )]
    Other {
        /// The file.
        path: PathBuf,
        /// Volume it belongs to.
        volume: VolumeId,
        /// Point it belongs to.
        point: CloseId,
        /// Size of its disk.
        disk_bytes: u64,
    },
    /// Another process has it.
    #[error("overlay {path} is in use by another process: end that one, or name another file with --overlay")]
    InUse {
        /// The file.
        path: PathBuf,
    },
}

/// What an overlay holds changes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Binding {
    /// Volume.
    pub volume: VolumeId,
    /// Point.
    pub point: CloseId,
    /// Size of the point's disk in bytes.
    pub disk_bytes: u64,
}

impl Binding {
    fn encode(&self) -> Vec<u8> {
        let mut body = Writer::with_capacity(BODY_BYTES);
        body.raw(&self.volume.0).raw(&self.point.0).u64(self.disk_bytes);
        KIND.seal(body.as_slice())
    }

    fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let (body, _) = KIND.open_prefix(bytes)?;
        let mut reader = Reader::new(KIND.what, body);
        let binding =
            Self { volume: VolumeId(reader.array()?), point: CloseId(reader.array()?), disk_bytes: reader.u64()? };
        reader.finish()?;
        Ok(binding)
    }

    /// What the overlay at `path` holds changes to; `None` where there is no file.
    ///
    /// # Errors
    /// [`OverlayError::Io`], [`OverlayError::NotOne`].
    pub(super) fn read(path: &Path) -> Result<Option<Self>, OverlayError> {
        let failed = |source| OverlayError::Io { path: path.into(), source };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut bytes = vec![0; BODY_BYTES + OVERHEAD_BYTES];
        let length = file.metadata().map_err(failed)?.len();
        bytes.truncate(usize::try_from(length).unwrap_or(usize::MAX).min(bytes.len()));
        file.read_exact_at(&mut bytes, 0).map_err(failed)?;
        Self::decode(&bytes).map(Some).map_err(|source| OverlayError::NotOne { path: path.into(), source })
    }
}

/// Which pages are written: a mask for each block, kept in chunks where there is any.
#[derive(Debug)]
struct Bitmap {
    chunks: Vec<Option<Box<[u64; CHUNK_BLOCKS]>>>,
    /// Chunks with bits that no flush made durable.
    dirty: BTreeSet<usize>,
}

impl Bitmap {
    fn get(&self, block: u64) -> PageMask {
        let (chunk, at) = place(block);
        PageMask(self.chunks.get(chunk).and_then(Option::as_deref).map_or(0, |masks| masks[at]))
    }

    /// Adds pages; the block's mask afterwards, or `None` where it had them all.
    fn add(&mut self, block: u64, mask: PageMask) -> Option<PageMask> {
        let (chunk, at) = place(block);
        let masks = self.chunks[chunk].get_or_insert_with(|| Box::new([0; CHUNK_BLOCKS]));
        let old = masks[at];
        masks[at] |= mask.0;
        if masks[at] == old {
            return None;
        }
        self.dirty.insert(chunk);
        Some(PageMask(masks[at]))
    }
}

fn place(block: u64) -> (usize, usize) {
    let block = usize::try_from(block).unwrap_or(0);
    (block / CHUNK_BLOCKS, block % CHUNK_BLOCKS)
}

/// The overlay of one export.
#[derive(Debug)]
pub(super) struct Overlay {
    file: File,
    geometry: Geometry,
    bitmap_bytes: u64,
    bitmap: Mutex<Bitmap>,
    /// Kept through a flush, so that two do not write one bitmap at once.
    flushing: Mutex<()>,
    durable: bool,
}

impl Overlay {
    /// One that is gone with the process, in a file without a name in `folder`.
    ///
    /// # Errors
    /// Where there can't be such a file.
    pub(super) fn temporary(folder: &Path, geometry: Geometry) -> Result<Self, OverlayError> {
        let layout = Layout::of(geometry);
        let file = nameless(folder, layout.file_bytes)
            .map_err(|source| OverlayError::Io { path: folder.join("(temporary)"), source })?;
        Ok(Self::new(file, geometry, false))
    }

    /// The one at `path`, made where there is none.
    ///
    /// # Errors
    /// [`OverlayError`].
    pub(super) fn open(path: &Path, binding: &Binding, geometry: Geometry) -> Result<Self, OverlayError> {
        Self::open_in_boot(path, binding, geometry, boot_id())
    }

    fn open_in_boot(
        path: &Path,
        binding: &Binding,
        geometry: Geometry,
        boot: Option<[u8; 16]>,
    ) -> Result<Self, OverlayError> {
        let failed = |source| OverlayError::Io { path: path.into(), source };
        match Binding::read(path)? {
            Some(found) if found != *binding => {
                let Binding { volume, point, disk_bytes } = found;
                return Err(OverlayError::Other { path: path.into(), volume, point, disk_bytes });
            }
            Some(_) => {}
            None => create(path, binding, geometry).map_err(failed)?,
        }
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(OverlayError::InUse { path: path.into() }),
            Err(error) => return Err(failed(error.into())),
        }
        let mut overlay = Self::new(file, geometry, true);
        overlay.load(boot).map_err(failed)?;
        Ok(overlay)
    }

    fn new(file: File, geometry: Geometry, durable: bool) -> Self {
        let layout = Layout::of(geometry);
        let chunks = usize::try_from(layout.bitmap_bytes).unwrap_or(0) / CHUNK_BYTES;
        let bitmap = Bitmap { chunks: (0..chunks).map(|_| None).collect(), dirty: BTreeSet::new() };
        let bitmap_bytes = layout.bitmap_bytes;
        Self { file, geometry, bitmap_bytes, bitmap: Mutex::new(bitmap), flushing: Mutex::new(()), durable }
    }

    /// Reads the bitmap: of pages written where this is the boot that wrote them, else of those that were flushed.
    fn load(&mut self, boot: Option<[u8; 16]>) -> io::Result<()> {
        let layout = Layout::of(self.geometry);
        if self.file.metadata()?.len() < layout.file_bytes {
            self.file.set_len(layout.file_bytes)?;
        }
        let mut run = [0; 20];
        self.file.read_exact_at(&mut run, RUN_AT)?;
        let same_boot = boot.is_some_and(|boot| run == run_block(&boot));
        let mut chunk = [0; CHUNK_BYTES];
        let bitmap = self.bitmap.get_mut().unwrap_or_else(PoisonError::into_inner);
        for number in 0..bitmap.chunks.len() {
            let at = (number * CHUNK_BYTES) as u64;
            let source = if same_boot { BITMAP_AT } else { BITMAP_AT + self.bitmap_bytes };
            self.file.read_exact_at(&mut chunk, source + at)?;
            let masks = decode_chunk(&chunk);
            if !same_boot {
                let mut written = [0; CHUNK_BYTES];
                self.file.read_exact_at(&mut written, BITMAP_AT + at)?;
                if written != chunk {
                    self.file.write_all_at(&chunk, BITMAP_AT + at)?;
                }
            } else if masks.iter().any(|mask| *mask != 0) {
                let mut synced = [0; CHUNK_BYTES];
                self.file.read_exact_at(&mut synced, BITMAP_AT + self.bitmap_bytes + at)?;
                if synced != chunk {
                    bitmap.dirty.insert(number);
                }
            }
            bitmap.chunks[number] = masks.iter().any(|mask| *mask != 0).then(|| Box::new(masks));
        }
        if !same_boot {
            // The bitmap first: until the run names this boot, it is made again from the one that counts.
            self.file.sync_data()?;
            let run = boot.map_or([0; 20], |boot| run_block(&boot));
            self.file.write_all_at(&run, RUN_AT)?;
            self.file.sync_data()?;
        }
        Ok(())
    }

    fn bitmap(&self) -> MutexGuard<'_, Bitmap> {
        self.bitmap.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn data_at(&self, offset: u64) -> u64 {
        BITMAP_AT + 2 * self.bitmap_bytes + offset
    }

    /// The pages of a block that were written.
    pub(super) fn written(&self, block: u64) -> PageMask {
        self.bitmap().get(block)
    }

    /// Pages written in all.
    pub(super) fn pages(&self) -> u64 {
        let bitmap = self.bitmap();
        bitmap.chunks.iter().flatten().flat_map(|masks| masks.iter()).map(|mask| u64::from(mask.count_ones())).sum()
    }

    /// Fills in what was written of what is wanted.
    ///
    /// # Errors
    /// Those of reading.
    pub(super) fn read(&self, pages: &mut Pages) -> io::Result<()> {
        for block in pages.blocks() {
            let here = pages.wanted(block).and(self.written(block));
            let (skipped, bytes) = pages.block_mut(block);
            for (page, count) in page_runs(here) {
                let start = (page - skipped) as usize * PAGE_BYTES;
                let run = &mut bytes[start..start + count as usize * PAGE_BYTES];
                self.file.read_exact_at(run, self.data_at((block * 64 + u64::from(page)) * PAGE_BYTES as u64))?;
            }
            let wanted = pages.wanted(block);
            *wanted = wanted.without(here);
        }
        Ok(())
    }

    /// Puts bytes without saying that they are there: what the point has around a write that does not fill its page.
    ///
    /// # Errors
    /// Those of writing.
    pub(super) fn prepare(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.data_at(offset))
    }

    /// Writes bytes. Pages at their ends that are not filled must be there or prepared.
    ///
    /// # Errors
    /// Those of writing; what of it is there is not known then.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.data_at(offset))?;
        self.mark(offset, bytes.len() as u64)
    }

    /// Makes whole pages zero; takes no space where `may_punch`.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn zero(&self, offset: u64, length: u64, may_punch: bool) -> io::Result<()> {
        let allocate =
            |flags| rustix::fs::fallocate(&self.file, flags | FallocateFlags::KEEP_SIZE, self.data_at(offset), length);
        let zeroed = if may_punch { Err(Errno::OPNOTSUPP) } else { allocate(FallocateFlags::ZERO_RANGE) };
        let zeroed = zeroed.or_else(|error| match error {
            Errno::OPNOTSUPP | Errno::NOSYS => allocate(FallocateFlags::PUNCH_HOLE),
            error => Err(error),
        });
        match zeroed {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                let zeros = [0; 16 * PAGE_BYTES];
                let mut done = 0;
                while done < length {
                    let piece = usize::try_from(length - done).unwrap_or(zeros.len()).min(zeros.len());
                    self.file.write_all_at(&zeros[..piece], self.data_at(offset + done))?;
                    done += piece as u64;
                }
            }
            Err(error) => return Err(error.into()),
        }
        self.mark(offset, length)
    }

    /// Says that the pages that the bytes touch are there.
    fn mark(&self, offset: u64, length: u64) -> io::Result<()> {
        let (first, end) = (offset / PAGE_BYTES as u64, (offset + length).div_ceil(PAGE_BYTES as u64));
        let mut bitmap = self.bitmap();
        for block in first / 64..end.div_ceil(64) {
            let before = PageMask::first(u32::try_from(first.saturating_sub(block * 64)).unwrap_or(64));
            let until = PageMask::first(u32::try_from((end - block * 64).min(64)).unwrap_or(64));
            if let Some(mask) = bitmap.add(block, until.without(before))
                && self.durable
            {
                // Not synced: it outlives this process, and counts in this boot only.
                self.file.write_all_at(&mask.0.to_le_bytes(), BITMAP_AT + block * 8)?;
            }
        }
        Ok(())
    }

    /// Makes everything written so far durable. Of a temporary overlay nothing is.
    ///
    /// # Errors
    /// Those of the file system; the flush is to be repeated then.
    pub(super) fn flush(&self) -> io::Result<()> {
        if !self.durable {
            return Ok(());
        }
        let _turn = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        let chunks: Vec<(usize, [u8; CHUNK_BYTES])> = {
            let mut bitmap = self.bitmap();
            let dirty = std::mem::take(&mut bitmap.dirty);
            let chunk = |number: usize| Some((number, encode_chunk(bitmap.chunks[number].as_deref()?)));
            dirty.into_iter().filter_map(chunk).collect()
        };
        let flushed = self.flush_chunks(&chunks);
        if flushed.is_err() {
            self.bitmap().dirty.extend(chunks.iter().map(|(number, _)| *number));
        }
        flushed
    }

    fn flush_chunks(&self, chunks: &[(usize, [u8; CHUNK_BYTES])]) -> io::Result<()> {
        // The pages, before it is said that they are there.
        self.file.sync_data()?;
        for (number, bytes) in chunks {
            self.file.write_all_at(bytes, BITMAP_AT + self.bitmap_bytes + (number * CHUNK_BYTES) as u64)?;
        }
        if chunks.is_empty() { Ok(()) } else { self.file.sync_data() }
    }
}

struct Layout {
    bitmap_bytes: u64,
    file_bytes: u64,
}

impl Layout {
    fn of(geometry: Geometry) -> Self {
        let bitmap_bytes = (geometry.blocks() * 8).next_multiple_of(CHUNK_BYTES as u64);
        Self { bitmap_bytes, file_bytes: BITMAP_AT + 2 * bitmap_bytes + geometry.pages() * PAGE_BYTES as u64 }
    }
}

/// Makes an empty overlay; there is a whole one under its name or none.
fn create(path: &Path, binding: &Binding, geometry: Geometry) -> io::Result<()> {
    let fresh = with_suffix(path, ".new");
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    file.set_len(Layout::of(geometry).file_bytes)?;
    file.write_all_at(&binding.encode(), 0)?;
    file.sync_all()?;
    // Another process may have been faster: its overlay stays.
    match rustix::fs::renameat_with(rustix::fs::CWD, &fresh, rustix::fs::CWD, path, rustix::fs::RenameFlags::NOREPLACE)
    {
        Err(Errno::INVAL | Errno::NOSYS) => std::fs::rename(&fresh, path)?,
        other => other?,
    }
    sync_folder_of(path)
}

fn decode_chunk(bytes: &[u8; CHUNK_BYTES]) -> [u64; CHUNK_BLOCKS] {
    let mut masks = [0; CHUNK_BLOCKS];
    for (mask, bytes) in masks.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *mask = u64::from_le_bytes(*bytes);
    }
    masks
}

fn encode_chunk(masks: &[u64; CHUNK_BLOCKS]) -> [u8; CHUNK_BYTES] {
    let mut bytes = [0; CHUNK_BYTES];
    for (bytes, mask) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(masks) {
        *bytes = mask.to_le_bytes();
    }
    bytes
}

fn run_block(boot: &[u8; 16]) -> [u8; 20] {
    let mut block = [0; 20];
    block[..16].copy_from_slice(boot);
    block[16..].copy_from_slice(&crc32c::crc32c(boot).to_le_bytes());
    block
}

/// This boot of this machine; `None` where the kernel does not tell.
fn boot_id() -> Option<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    text.trim().parse::<VolumeId>().ok().map(|id| id.0)
}

#[cfg(test)]
mod tests;
