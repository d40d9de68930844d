//! Block devices and image files as disks.
//!
//! Devices are read with `O_DIRECT`: their page cache is not coherent with a mounted file system's writes. Of image files what
//! lies in the page cache is taken from there (`RWF_NOWAIT`), the rest is read with `O_DIRECT` where the file system has it,
//! which costs a tenth of the CPU of a cold buffered read and pushes nothing out of the cache. Both see every write that
//! completed before.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use common::format::state::SourceIdentity;
use common::ids::Geometry;
use common::limits;
use rustix::fs::{Advice, OFlags};
use rustix::io::{Errno, ReadWriteFlags};
use tracing::debug;

use super::Disk;
use super::error::CaptureError;
use super::rest::RestProbe;

/// Alignment of offsets, lengths and addresses that every device and file system accepts for `O_DIRECT`.
const ALIGNMENT: usize = limits::PAGE_BYTES;

/// A reusable buffer whose bytes begin at a page boundary.
#[derive(Debug)]
pub struct PageBuffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl PageBuffer {
    /// A buffer of `length` bytes, zeroed.
    #[must_use]
    pub fn new(length: usize) -> Self {
        let bytes = vec![0; length + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { bytes, start, length }
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }

    /// Its bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

#[derive(Debug)]
enum Kind {
    Device {
        /// Device number, `major:minor` as in sysfs.
        sysfs: PathBuf,
    },
    File {
        /// With `O_DIRECT`; `None` where the file system has none.
        direct: Option<File>,
        /// Whether the file system can say what lies in the page cache.
        cached_reads: bool,
    },
}

/// An open block device or image file.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    /// The device with `O_DIRECT`, or the file without.
    file: File,
    kind: Kind,
    geometry: Geometry,
    sector_bytes: u32,
    identity: SourceIdentity,
}

impl Source {
    /// Opens the disk at `path` for reading.
    ///
    /// # Errors
    /// [`CaptureError::Missing`], [`CaptureError::Permission`], [`CaptureError::NotADisk`], [`CaptureError::TooSmall`],
    /// [`CaptureError::TooLarge`], [`CaptureError::Io`].
    pub fn open(path: &Path) -> Result<Self, CaptureError> {
        let metadata = std::fs::metadata(path).map_err(|error| CaptureError::io("open", path, error))?;
        let kind = metadata.file_type();
        let not_a_disk = |found| Err(CaptureError::NotADisk { path: path.to_owned(), found });
        if kind.is_block_device() {
            Self::open_device(path, metadata.rdev())
        } else if kind.is_file() {
            Self::open_file(path)
        } else if kind.is_dir() {
            not_a_disk("directory")
        } else if kind.is_char_device() {
            not_a_disk("character device")
        } else {
            not_a_disk("pipe or socket")
        }
    }

    fn open_device(path: &Path, number: u64) -> Result<Self, CaptureError> {
        let file = open(path, OFlags::DIRECT).map_err(|error| CaptureError::io("open", path, error))?;
        let bytes = device_bytes(&file).map_err(|error| CaptureError::io("ask the size", path, error.into()))?;
        let sector_bytes = rustix::fs::ioctl_blksszget(&file)
            .map_err(|error| CaptureError::io("ask the sector size", path, error.into()))?;
        let sysfs =
            PathBuf::from(format!("/sys/dev/block/{}:{}", rustix::fs::major(number), rustix::fs::minor(number)));
        let identity = SourceIdentity::Device { serial: super::find::name_of(&sysfs) };
        let geometry = geometry(path, bytes)?;
        Ok(Self { path: path.to_owned(), file, kind: Kind::Device { sysfs }, geometry, sector_bytes, identity })
    }

    fn open_file(path: &Path) -> Result<Self, CaptureError> {
        let file = open(path, OFlags::empty()).map_err(|error| CaptureError::io("open", path, error))?;
        let metadata = file.metadata().map_err(|error| CaptureError::io("stat", path, error))?;
        let geometry = geometry(path, metadata.len())?;
        // A hint; without it reading works as well.
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::Sequential);
        let direct = open(path, OFlags::DIRECT)
            .inspect_err(|error| debug!(path = %path.display(), %error, "no direct reads of this file"))
            .ok()
            // Another file may have taken the name meanwhile.
            .filter(|direct| {
                direct.metadata().is_ok_and(|other| other.ino() == metadata.ino() && other.dev() == metadata.dev())
            });
        let mut probe = [0];
        let cached_reads =
            match rustix::io::preadv2(&file, &mut [IoSliceMut::new(&mut probe)], 0, ReadWriteFlags::NOWAIT) {
                Ok(_) | Err(Errno::AGAIN) => true,
                Err(_) => false,
            };
        let identity = SourceIdentity::File { device: metadata.dev(), inode: metadata.ino() };
        let kind = Kind::File { direct, cached_reads };
        Ok(Self { path: path.to_owned(), file, kind, geometry, sector_bytes: 512, identity })
    }

    /// Checks that this is the disk that was registered: the same size and, for a device that states one, the same serial
    /// number. An image file may be a copy.
    ///
    /// # Errors
    /// [`CaptureError::SizeChanged`], [`CaptureError::Replaced`].
    pub fn check(&self, disk_bytes: u64, identity: &SourceIdentity) -> Result<(), CaptureError> {
        if self.geometry.disk_bytes() != disk_bytes {
            return Err(self.size_changed(disk_bytes, self.geometry.disk_bytes()));
        }
        match (&self.identity, identity) {
            (SourceIdentity::Device { serial: found }, SourceIdentity::Device { serial: expected })
                if !found.is_empty() && !expected.is_empty() && found != expected =>
            {
                Err(CaptureError::Replaced {
                    path: self.path.clone(),
                    expected: expected.clone(),
                    found: found.clone(),
                })
            }
            _ => Ok(()),
        }
    }

    /// Path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Logical sector size in bytes; 512 for files.
    #[must_use]
    pub fn sector_bytes(&self) -> u32 {
        self.sector_bytes
    }

    /// What it is.
    #[must_use]
    pub fn identity(&self) -> &SourceIdentity {
        &self.identity
    }

    fn size_changed(&self, expected: u64, found: u64) -> CaptureError {
        CaptureError::SizeChanged { path: self.path.clone(), expected, found }
    }

    fn read_device(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, (u64, io::Error)> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err((offset + done as u64, error)),
            }
        }
        Ok(done)
    }

    fn read_file(
        &self,
        direct: Option<&File>,
        cached_reads: bool,
        offset: u64,
        buffer: &mut [u8],
        wanted: usize,
    ) -> Result<usize, (u64, io::Error)> {
        let mut done = 0;
        let mut try_cache = cached_reads && direct.is_some();
        while done < wanted {
            let at = offset + done as u64;
            if try_cache {
                // Takes what lies in the page cache without waiting, and says so where that is nothing.
                let rest = &mut [IoSliceMut::new(&mut buffer[done..])];
                match rustix::io::preadv2(&self.file, rest, at, ReadWriteFlags::NOWAIT) {
                    Ok(read) if read >= ALIGNMENT || done + read >= wanted => {
                        done += read;
                        // The next read has to be aligned again.
                        if done < wanted {
                            done -= done % ALIGNMENT;
                        }
                        continue;
                    }
                    _ => try_cache = false,
                }
            }
            let aligned = done.is_multiple_of(ALIGNMENT);
            let file = direct.filter(|_| aligned).unwrap_or(&self.file);
            match file.read_at(&mut buffer[done..], at) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err((at, error)),
            }
        }
        Ok(done)
    }
}

impl Disk for Source {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CaptureError> {
        let left = self.geometry.disk_bytes().saturating_sub(offset);
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let length = buffer.len();
        let read = match &self.kind {
            // A device is a whole number of sectors: its last read is as long as direct reads need it.
            Kind::Device { .. } => self.read_device(offset, &mut buffer[..wanted]),
            // Of a file direct reads ask for whole pages and get what there is.
            Kind::File { direct, cached_reads } => {
                self.read_file(direct.as_ref(), *cached_reads, offset, buffer, wanted)
            }
        };
        let read =
            read.map_err(|(offset, source)| CaptureError::Read { path: self.path.clone(), offset, length, source })?;
        if read < wanted {
            return Err(self.size_changed(self.geometry.disk_bytes(), offset + read as u64));
        }
        // Also what a file that grew holds beyond its registered end.
        buffer[wanted..].fill(0);
        Ok(())
    }

    fn check_size(&self) -> Result<(), CaptureError> {
        let found = match self.kind {
            Kind::Device { .. } => device_bytes(&self.file).map_err(io::Error::from),
            Kind::File { .. } => self.file.metadata().map(|metadata| metadata.len()),
        };
        let found = found.map_err(|error| CaptureError::io("ask the size", &self.path, error))?;
        if found == self.geometry.disk_bytes() {
            return Ok(());
        }
        Err(self.size_changed(self.geometry.disk_bytes(), found))
    }

    fn watch_rest(&self) -> RestProbe {
        match &self.kind {
            Kind::Device { sysfs } => RestProbe::of_device(&self.path, sysfs),
            Kind::File { .. } => RestProbe::of_file(&self.path, &self.file),
        }
    }
}

/// Opens for reading; never waits, never becomes the process's terminal.
fn open(path: &Path, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let flags = i32::try_from(flags.bits()).map_err(|_| io::ErrorKind::InvalidInput)?;
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// Size of a block device in bytes.
#[expect(unsafe_code, reason = "rustix has the call, but not this operation code")]
fn device_bytes(file: &File) -> Result<u64, Errno> {
    /// `BLKGETSIZE64` of linux/fs.h: `_IOR(0x12, 114, size_t)`, which fills 64 bits.
    const BLKGETSIZE64: rustix::ioctl::Opcode = rustix::ioctl::opcode::read::<usize>(0x12, 114);
    // SAFETY: the kernel writes exactly one 64-bit number for this operation code.
    unsafe { rustix::ioctl::ioctl(file, rustix::ioctl::Getter::<BLKGETSIZE64, u64>::new()) }
}

fn geometry(path: &Path, bytes: u64) -> Result<Geometry, CaptureError> {
    if bytes < limits::PAGE_BYTES as u64 {
        return Err(CaptureError::TooSmall { path: path.to_owned(), found: bytes });
    }
    Geometry::new(bytes).ok_or(CaptureError::TooLarge {
        path: path.to_owned(),
        found: bytes,
        limit: limits::DISK_BYTES_MAX,
    })
}
