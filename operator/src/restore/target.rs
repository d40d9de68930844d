//! Where a restore writes: a new file of some format, or a block device.
//!
//! A file is written under `TO.blockferry-partial` and renamed when all of it is there and synced; until then nothing has the
//! name asked for. A device can't be renamed: its first block, without which nothing on it looks like a file system or a
//! partition table, is zeroed first and written last. Where a page of the disk lies in a file, [`Image`] says.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use common::limits::BLOCK_BYTES;
use common::units::ByteCount;
use rustix::fs::{FallocateFlags, FlockOperation, RenameFlags};

use super::device;
use super::image::{Format, Image};
use super::state::{RestoreState, sync_folder_of, with_suffix};

/// Put behind a file's name while it is not complete.
pub const PARTIAL_SUFFIX: &str = ".blockferry-partial";
/// Zeros written at a time where a device can't zero a range itself.
const ZEROS_BYTES: usize = 1 << 20;
/// Alignment of ranges that a device is asked to zero itself.
const ZERO_ALIGN: u64 = 4096;

/// Why a target can't be written.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// A file is there.
    #[error("{path} exists already: name another file, or pass --force to replace it")]
    Exists {
        /// Target.
        path: PathBuf,
    },
    /// Neither a file nor a block device.
    #[error("{path} is {what}: name a new file or a block device")]
    WrongKind {
        /// Target.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// A mounted or used device.
    #[error(
        "{path} is {by}: unmount or detach it first, name another device, or pass --force to overwrite it all the same"
    )]
    InUse {
        /// Target.
        path: PathBuf,
        /// By what.
        by: String,
    },
    /// A device with content.
    #[error("{path} is not empty: it holds {what}; name another device, or pass --force to overwrite it")]
    NotEmpty {
        /// Target.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// A device that is too small.
    #[error("{path} has {found} bytes, the point needs {needed} ({}): name a device that is at least as large", ByteCount(*needed))]
    TooSmall {
        /// Target.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// The point's size.
        needed: u64,
    },
    /// A device can't hold a file format.
    #[error("{path} is a block device, --format {} writes a file: name a new file, or restore raw", format.as_str())]
    NotAFile {
        /// Target.
        path: PathBuf,
        /// Format asked for.
        format: Format,
    },
    /// What was read back is not what was written.
    #[error(
        "{path} does not hold what was written: it differs at byte {offset}; its disk or the way to it is faulty: restore to another one"
    )]
    ReadsBack {
        /// The partial file or device.
        path: PathBuf,
        /// Place in it.
        offset: u64,
    },
    /// A partial file that is not this restore's.
    #[error("{path} is left from another restore: remove it, or pass --force to start over")]
    OtherPartial {
        /// The partial file.
        path: PathBuf,
    },
    /// Somebody else is writing it now.
    #[error("{path} is being written by another restore: wait for it, or name another target")]
    Busy {
        /// The partial file or device.
        path: PathBuf,
    },
    /// The target has no room left.
    #[error("no space left for {path}: free space there and run the same command again, it goes on where it stopped")]
    NoSpace {
        /// Target.
        path: PathBuf,
    },
    /// Anything else.
    #[error("cannot {what} {path}: {source}: check the path, its permissions and the device")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TargetError {
    let path = path.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => TargetError::NoSpace { path },
        _ => TargetError::Io { what, path, source },
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    File { replace: bool },
    Device,
}

/// A target that is open and may be written.
#[derive(Debug)]
pub struct Target {
    kind: Kind,
    /// As asked for.
    path: PathBuf,
    /// What is written to: the partial file or the device.
    written: PathBuf,
    file: File,
    state_path: PathBuf,
    disk_bytes: u64,
    image: Image,
}

impl Target {
    /// Opens `path` for the restore that `wanted` describes, written as `image`, and finds how far an earlier run of it came. Nothing of the target
    /// is changed but that a partial file may be created. `state_dir` keeps the state of restores to devices.
    ///
    /// # Errors
    /// [`TargetError`] for all that must not be overwritten, unless `force` allows it.
    pub fn open(
        path: &Path,
        wanted: &RestoreState,
        image: Image,
        force: bool,
        state_dir: &Path,
    ) -> Result<(Self, RestoreState), TargetError> {
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.file_type().is_block_device() => {
                Self::open_device(path, wanted, image, force, state_dir)
            }
            Ok(metadata) if metadata.is_file() => {
                if !force {
                    return Err(TargetError::Exists { path: path.into() });
                }
                Self::open_file(path, wanted, image, force)
            }
            Ok(metadata) => {
                let what = if metadata.is_dir() { "a folder" } else { "neither a file nor a block device" };
                Err(TargetError::WrongKind { path: path.into(), what })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => match std::fs::symlink_metadata(path) {
                Ok(_) => Err(TargetError::WrongKind { path: path.into(), what: "a symbolic link to nothing" }),
                Err(_) => Self::open_file(path, wanted, image, force),
            },
            Err(error) => Err(failed("look at", path)(error)),
        }
    }

    fn open_file(
        path: &Path,
        wanted: &RestoreState,
        image: Image,
        force: bool,
    ) -> Result<(Self, RestoreState), TargetError> {
        let written = with_suffix(path, PARTIAL_SUFFIX);
        let state_path = with_suffix(&written, ".state");
        let left_over = std::fs::symlink_metadata(&written).is_ok();
        let earlier = RestoreState::load(&state_path).map_err(failed("read", &state_path))?;
        let earlier = earlier.filter(|state| left_over && state.is_same_restore(wanted));
        if left_over && earlier.is_none() && !force {
            return Err(TargetError::OtherPartial { path: written });
        }
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&written);
        let file = open.map_err(failed("create", &written))?;
        lock(&file, &written)?;
        let state = match earlier {
            Some(state) => state,
            None => {
                // Before the file has content, so that a partial file is always known as whose it is.
                wanted.save(&state_path).map_err(failed("write", &state_path))?;
                file.set_len(0).map_err(failed("truncate", &written))?;
                wanted.clone()
            }
        };
        file.set_len(image.file_bytes()).map_err(failed("size", &written))?;
        let (disk_bytes, kind) = (wanted.disk_bytes, Kind::File { replace: force });
        Ok((Self { kind, path: path.into(), written, file, state_path, disk_bytes, image }, state))
    }

    fn open_device(
        path: &Path,
        wanted: &RestoreState,
        image: Image,
        force: bool,
        state_dir: &Path,
    ) -> Result<(Self, RestoreState), TargetError> {
        if image.format() != Format::Raw {
            return Err(TargetError::NotAFile { path: path.into(), format: image.format() });
        }
        if !force && let Some(by) = device::in_use(path).map_err(failed("look at", path))? {
            return Err(TargetError::InUse { path: path.into(), by });
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let exclusive = options.clone().custom_flags(rustix::fs::OFlags::EXCL.bits().cast_signed()).open(path);
        let file = match exclusive {
            Ok(file) => file,
            // The kernel knows users that /proc and /sys do not show.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => {
                if !force {
                    return Err(TargetError::InUse { path: path.into(), by: "in use".into() });
                }
                options.open(path).map_err(failed("open", path))?
            }
            Err(error) => return Err(failed("open", path)(error)),
        };
        lock(&file, path)?;
        let found =
            rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(|e| failed("size", path)(e.into()))?;
        if found < wanted.disk_bytes {
            return Err(TargetError::TooSmall { path: path.into(), found, needed: wanted.disk_bytes });
        }
        let canonical = std::fs::canonicalize(path).map_err(failed("look at", path))?;
        let name = blake3::hash(canonical.as_os_str().as_encoded_bytes()).to_hex();
        let state_path = state_dir.join(format!("{}.state", &name[..32]));
        std::fs::create_dir_all(state_dir).map_err(failed("create", state_dir))?;
        let earlier = RestoreState::load(&state_path).map_err(failed("read", &state_path))?;
        let first_block = wanted.disk_bytes.min(BLOCK_BYTES as u64);
        // A device that was put to another use since has something in its first block.
        let untouched = device::starts_with_zeros(&file, first_block).map_err(failed("read", path))?;
        let earlier = earlier.filter(|state| untouched && state.is_same_restore(wanted));
        if !force
            && earlier.is_none()
            && let Some(what) = device::content(&file, found).map_err(failed("read", path))?
        {
            return Err(TargetError::NotEmpty { path: path.into(), what });
        }
        let disk_bytes = wanted.disk_bytes;
        let (kind, written) = (Kind::Device, path.into());
        let target = Self { kind, path: path.into(), written, file, state_path, disk_bytes, image };
        let state = match earlier {
            Some(state) => state,
            None => {
                target.write_zeros(0, first_block)?;
                target.sync()?;
                target.save(wanted)?;
                wanted.clone()
            }
        };
        Ok((target, state))
    }

    /// True where bytes that are not written are not known to be zero.
    #[must_use]
    pub fn needs_zeros(&self) -> bool {
        self.kind == Kind::Device
    }

    /// Writes `bytes` at byte `offset` of the disk; what lies beyond its end is cut off. The bytes that are written.
    ///
    /// # Errors
    /// [`TargetError::NoSpace`], [`TargetError::Io`].
    pub fn write<'a>(&self, offset: u64, bytes: &'a [u8]) -> Result<&'a [u8], TargetError> {
        let written = self.on_disk(offset, bytes);
        let mut done = 0;
        while done < written.len() {
            let (place, side_by_side) = self.image.place(offset + done as u64, (written.len() - done) as u64);
            let end = done + usize::try_from(side_by_side).unwrap_or(usize::MAX);
            let place = place.expect("every page of data that a plan has was planned in the image");
            self.file.write_all_at(&written[done..end], place).map_err(failed("write to", &self.written))?;
            done = end;
        }
        Ok(written)
    }

    /// As much of `bytes` at byte `offset` as the disk has.
    #[must_use]
    pub fn on_disk<'a>(&self, offset: u64, bytes: &'a [u8]) -> &'a [u8] {
        let room = usize::try_from(self.disk_bytes.saturating_sub(offset)).unwrap_or(usize::MAX);
        &bytes[..bytes.len().min(room)]
    }

    /// Makes `len` bytes at `offset` zero: by the device itself where it can, else by writing.
    ///
    /// # Errors
    /// [`TargetError::Io`].
    pub fn zero(&self, offset: u64, len: u64) -> Result<(), TargetError> {
        let aligned_end = (offset + len) / ZERO_ALIGN * ZERO_ALIGN;
        if !offset.is_multiple_of(ZERO_ALIGN) || aligned_end <= offset {
            return self.write_zeros(offset, len);
        }
        let aligned = aligned_end - offset;
        let modes = [
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        ];
        if !modes.iter().any(|mode| rustix::fs::fallocate(&self.file, *mode, offset, aligned).is_ok()) {
            self.write_zeros(offset, aligned)?;
        }
        self.write_zeros(aligned_end, len - aligned)
    }

    fn write_zeros(&self, offset: u64, len: u64) -> Result<(), TargetError> {
        let zeros = vec![0; usize::try_from(len).unwrap_or(ZEROS_BYTES).min(ZEROS_BYTES)];
        let mut at = offset;
        while at < offset + len {
            let part = usize::try_from(offset + len - at).unwrap_or(ZEROS_BYTES).min(zeros.len());
            self.file.write_all_at(&zeros[..part], at).map_err(failed("write to", &self.written))?;
            at += part as u64;
        }
        Ok(())
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// [`TargetError::NoSpace`], [`TargetError::Io`].
    pub fn sync(&self) -> Result<(), TargetError> {
        self.file.sync_data().map_err(failed("sync", &self.written))
    }

    /// Writes what the image has beside the disk's data: headers and tables. Until then no file is one of its format.
    ///
    /// # Errors
    /// [`TargetError::NoSpace`], [`TargetError::Io`].
    pub fn write_metadata(&self) -> Result<(), TargetError> {
        for (at, bytes) in self.image.metadata() {
            self.file.write_all_at(&bytes, at).map_err(failed("write to", &self.written))?;
        }
        Ok(())
    }

    /// Lets go of what the kernel remembers of the target, so that reading it back reads its disk. What is written must be synced.
    pub fn forget_cache(&self) {
        // A hint: where it is not taken, what is read back comes from memory.
        if let Err(error) = rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed) {
            tracing::debug!(%error, "the page cache is not dropped before reading back");
        }
    }

    /// Reads back from byte `offset` of the disk; zeros where the image keeps nothing.
    ///
    /// # Errors
    /// [`TargetError::Io`].
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), TargetError> {
        let mut done = 0;
        while done < bytes.len() {
            let (place, side_by_side) = self.image.place(offset + done as u64, (bytes.len() - done) as u64);
            let end = done + usize::try_from(side_by_side).unwrap_or(usize::MAX);
            match place {
                Some(place) => self
                    .file
                    .read_exact_at(&mut bytes[done..end], place)
                    .map_err(failed("read back from", &self.written))?,
                None => bytes[done..end].fill(0),
            }
            done = end;
        }
        Ok(())
    }

    /// Checks that `len` bytes from byte `offset` of the disk on read as zeros. Holes of a file are not read.
    ///
    /// # Errors
    /// [`TargetError::ReadsBack`], [`TargetError::Io`].
    pub fn check_zeros(&self, offset: u64, len: u64) -> Result<(), TargetError> {
        let mut at = offset;
        while at < offset + len {
            let (place, side_by_side) = self.image.place(at, offset + len - at);
            if let Some(place) = place {
                self.check_file_zeros(place, side_by_side)?;
            }
            at += side_by_side;
        }
        Ok(())
    }

    fn check_file_zeros(&self, start: u64, len: u64) -> Result<(), TargetError> {
        let mut at = start;
        while at < start + len {
            if self.kind != Kind::Device {
                match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(at)) {
                    Ok(data) => at = data,
                    // No data behind this place.
                    Err(rustix::io::Errno::NXIO) => return Ok(()),
                    // A file system that can't say: read it.
                    Err(_) => {}
                }
                if at >= start + len {
                    return Ok(());
                }
            }
            let part = (start + len - at).min(ZEROS_BYTES as u64);
            let found =
                device::first_non_zero(&self.file, at, part).map_err(failed("read back from", &self.written))?;
            if let Some(offset) = found {
                return Err(TargetError::ReadsBack { path: self.written.clone(), offset });
            }
            at += part;
        }
        Ok(())
    }

    /// Checks that headers and tables are what [`Self::write_metadata`] wrote.
    ///
    /// # Errors
    /// [`TargetError::ReadsBack`], [`TargetError::Io`].
    pub fn check_metadata(&self) -> Result<(), TargetError> {
        for (at, expected) in self.image.metadata() {
            let mut found = vec![0; expected.len()];
            self.file.read_exact_at(&mut found, at).map_err(failed("read back from", &self.written))?;
            if found != expected {
                return Err(self.differs(at));
            }
        }
        Ok(())
    }

    /// The error that says that what was read back from byte `offset` is not what was written.
    #[must_use]
    pub fn differs(&self, offset: u64) -> TargetError {
        TargetError::ReadsBack { path: self.written.clone(), offset }
    }

    /// Takes back what makes a device look finished: its first block.
    ///
    /// # Errors
    /// [`TargetError::Io`].
    pub fn unfinish(&self) -> Result<(), TargetError> {
        if self.kind == Kind::Device {
            self.write_zeros(0, self.disk_bytes.min(BLOCK_BYTES as u64))?;
            self.sync()?;
        }
        Ok(())
    }

    /// Records durably how far the restore came. All that it says must be synced before.
    ///
    /// # Errors
    /// [`TargetError::NoSpace`], [`TargetError::Io`].
    pub fn save(&self, state: &RestoreState) -> Result<(), TargetError> {
        state.save(&self.state_path).map_err(failed("write", &self.state_path))
    }

    /// Makes the restored disk what it was asked to be: synced, under its name, without state.
    ///
    /// # Errors
    /// [`TargetError::Exists`] where a file of that name appeared meanwhile; [`TargetError::Io`].
    pub fn finish(self) -> Result<(), TargetError> {
        self.file.sync_all().map_err(failed("sync", &self.written))?;
        if let Kind::File { replace } = self.kind {
            let renamed = if replace {
                std::fs::rename(&self.written, &self.path)
            } else {
                rename_new(&self.written, &self.path)
            };
            renamed.map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => TargetError::Exists { path: self.path.clone() },
                _ => failed("rename to", &self.path)(error),
            })?;
            sync_folder_of(&self.path).map_err(failed("sync the folder of", &self.path))?;
        }
        // A state that stays behind is of no restore any more: the partial file is gone, a device's first block is written.
        if let Err(error) = std::fs::remove_file(&self.state_path) {
            tracing::warn!(path = %self.state_path.display(), %error, "restore state not removed; it may be deleted");
        }
        Ok(())
    }
}

fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    let at = rustix::fs::CWD;
    match rustix::fs::renameat_with(at, from, at, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        // File systems that can't do it in one step.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            if std::fs::symlink_metadata(to).is_ok() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            std::fs::rename(from, to)
        }
        Err(error) => Err(error.into()),
    }
}

fn lock(file: &File, path: &Path) -> Result<(), TargetError> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(TargetError::Busy { path: path.into() }),
        Err(error) => Err(failed("lock", path)(error.into())),
    }
}
