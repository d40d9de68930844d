//! The disk or image file behind an export.
//!
//! Promises: a write that returned is seen by every read after it; what was written before [`Backing::sync`] began is durable
//! after it; zeroed bytes read as zeros. Never: opens a device that is mounted or otherwise in use.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use common::ids::Geometry;
use rustix::fs::{FallocateFlags, FlockOperation, OFlags};
use rustix::io::{Errno, ReadWriteFlags};

use crate::capture::{CaptureError, Disk, Source};

static ZEROS: [u8; 128 << 10] = [0; 128 << 10];

/// Positioned, blocking I/O on one disk. Offsets and lengths lie within it.
pub(super) trait Backing: Send + Sync {
    /// Fills `buffer` from `offset` on.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// As [`Self::read_at`], for much data that will not be asked for again soon. Offset and address are multiples of a page.
    fn read_bulk(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_at(offset, buffer)
    }

    /// Writes `bytes` at `offset`.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes `length` bytes from `offset` on zero; gives their space back where it may and can.
    fn zero(&self, offset: u64, length: u64, may_punch: bool) -> io::Result<()>;

    /// False where a trim could only be done by writing zeros.
    fn can_punch(&self) -> bool;

    /// Makes everything written so far durable.
    fn sync(&self) -> io::Result<()>;
}

/// A block device or an image file.
#[derive(Debug)]
pub(super) struct FileBacking {
    file: File,
    /// For bulk reads.
    direct: Option<File>,
    can_punch: AtomicBool,
    /// Whether `preadv2` says what lies in the page cache.
    cached_reads: bool,
    geometry: Geometry,
}

impl FileBacking {
    /// Opens the disk at `path` for reading and writing.
    ///
    /// # Errors
    /// As [`Source::open`]; [`CaptureError::Io`] where it is in use.
    pub(super) fn open(path: &Path) -> Result<Self, CaptureError> {
        let source = Source::open(path)?;
        let is_device = matches!(source.identity(), common::format::state::SourceIdentity::Device { .. });
        // With O_EXCL a device that is mounted, or belongs to another one, is refused.
        let flags = if is_device { OFlags::EXCL } else { OFlags::empty() };
        let busy = |error: io::Error| match error.raw_os_error() {
            Some(libc::EBUSY) => CaptureError::io("open for writing (it is mounted or in use)", path, error),
            _ => CaptureError::io("open for writing", path, error),
        };
        let file = open(path, true, flags).map_err(busy)?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| CaptureError::io("lock (another process serves it)", path, error.into()))?;
        let direct = open(path, false, OFlags::DIRECT).ok();
        let mut probe = [0];
        let probed = rustix::io::preadv2(&file, &mut [io::IoSliceMut::new(&mut probe)], 0, ReadWriteFlags::NOWAIT);
        let cached_reads = matches!(probed, Ok(_) | Err(Errno::AGAIN));
        Ok(Self { file, direct, can_punch: AtomicBool::new(true), cached_reads, geometry: source.geometry() })
    }

    /// Size and layout.
    pub(super) fn geometry(&self) -> Geometry {
        self.geometry
    }
}

fn open(path: &Path, write: bool, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NOCTTY | OFlags::CLOEXEC;
    let flags = i32::try_from(flags.bits()).map_err(|_| io::ErrorKind::InvalidInput)?;
    OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)
}

impl Backing for FileBacking {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn read_bulk(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        let mut cached = self.cached_reads;
        while done < buffer.len() {
            let at = offset + done as u64;
            if cached {
                let rest = &mut [io::IoSliceMut::new(&mut buffer[done..])];
                match rustix::io::preadv2(&self.file, rest, at, ReadWriteFlags::NOWAIT) {
                    // Direct reads go on at a page boundary.
                    Ok(read) if read >= common::limits::PAGE_BYTES => {
                        done += read;
                        if done < buffer.len() {
                            done -= done % common::limits::PAGE_BYTES;
                        }
                        continue;
                    }
                    _ => cached = false,
                }
            }
            // A direct read of a part of a sector fails; the end of the disk may be one.
            let rest = (buffer.len() - done) / common::limits::PAGE_BYTES * common::limits::PAGE_BYTES;
            let Some(direct) = self.direct.as_ref().filter(|_| rest > 0) else {
                return self.file.read_exact_at(&mut buffer[done..], at);
            };
            match direct.read_at(&mut buffer[done..done + rest], at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) if read % common::limits::PAGE_BYTES == 0 => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What direct reads can't do, reads through the cache can, or say why not.
                Ok(_) | Err(_) => return self.file.read_exact_at(&mut buffer[done..], at),
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn zero(&self, offset: u64, length: u64, may_punch: bool) -> io::Result<()> {
        let allocate = |flags| rustix::fs::fallocate(&self.file, flags | FallocateFlags::KEEP_SIZE, offset, length);
        if may_punch && self.can_punch() {
            // Of files and of devices alike this promises zeros, or fails.
            match allocate(FallocateFlags::PUNCH_HOLE) {
                Ok(()) => return Ok(()),
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => self.can_punch.store(false, Ordering::Relaxed),
                Err(error) => return Err(error.into()),
            }
        }
        match allocate(FallocateFlags::ZERO_RANGE) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
            other => return other.map_err(io::Error::from),
        }
        let mut done = 0;
        while done < length {
            let piece = usize::try_from(length - done).unwrap_or(ZEROS.len()).min(ZEROS.len());
            self.file.write_all_at(&ZEROS[..piece], offset + done)?;
            done += piece as u64;
        }
        Ok(())
    }

    fn can_punch(&self) -> bool {
        self.can_punch.load(Ordering::Relaxed)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Where an export's disk is, for errors.
#[derive(Debug, Clone)]
pub(super) struct BackingPath(pub(super) PathBuf);

impl BackingPath {
    /// An error of a read from it.
    pub(super) fn read_error(&self, offset: u64, length: usize, source: io::Error) -> CaptureError {
        CaptureError::Read { path: self.0.clone(), offset, length, source }
    }

    /// Another error with it.
    pub(super) fn io_error(&self, action: &'static str, source: io::Error) -> CaptureError {
        CaptureError::io(action, &self.0, source)
    }
}
