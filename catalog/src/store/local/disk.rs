//! The synchronous half of the local store: files, directories, locks. Called on blocking threads only.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read as _};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use common::clock::UnixMillis;
use rustix::fs::{FlockOperation, OFlags, RenameFlags};

use super::super::{CasOutcome, GET_BYTES_MAX, ObjectMeta, PutOutcome, StoreError, Version, VersionKind};
use super::{Inner, LARGE_BYTES_MIN};

/// Directories remembered as synced; above that the memory is dropped and they are synced again when next used.
pub(super) const DURABLE_DIRS_MAX: usize = 65_536;
/// Bytes of one direct write: at 1 MiB the device is the limit, not the number of calls.
const DIRECT_BUFFER_BYTES: usize = 1 << 20;
/// Alignment of direct writes: the largest logical sector size in use.
const DIRECT_ALIGN_BYTES: usize = 4_096;

/// What is wrong with `root` as a store, in words, or nothing.
pub(super) fn check_root(root: &Path) -> Result<(), String> {
    match fs::metadata(root) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(format!("{} is not a directory", root.display())),
        Err(error) if error.kind() == ErrorKind::NotFound => match root.parent().map(fs::metadata) {
            Some(Ok(parent)) if parent.is_dir() => Ok(()),
            _ => Err(format!("neither {} nor the directory above it is there: create it, or mount it", root.display())),
        },
        Err(error) => Err(format!("{} can't be read: {error}", root.display())),
    }
}

impl Inner {
    pub(super) fn read(&self, path: &str) -> Result<Bytes, StoreError> {
        let (mut file, size) = self.open(path)?;
        if size > GET_BYTES_MAX {
            return Err(StoreError::TooLarge { path: path.into(), found: size, max: GET_BYTES_MAX });
        }
        let mut body = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
        file.read_to_end(&mut body).map_err(|error| self.read_error("read", path, &error))?;
        Ok(body.into())
    }

    pub(super) fn read_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let (file, size) = self.open(path)?;
        if size < range.end {
            return Err(StoreError::Truncated { path: path.into(), expected: range.end, found: size });
        }
        let mut body = vec![0; usize::try_from(range.end - range.start).unwrap_or(0)];
        file.read_exact_at(&mut body, range.start).map_err(|error| self.read_error("read", path, &error))?;
        Ok(body.into())
    }

    pub(super) fn size(&self, path: &str) -> Result<u64, StoreError> {
        let found = fs::metadata(self.root.join(path)).map_err(|error| self.read_error("look up", path, &error))?;
        if found.is_file() { Ok(found.len()) } else { Err(StoreError::NotFound { path: path.into() }) }
    }

    pub(super) fn put(&self, path: &str, parts: &[Bytes]) -> Result<(), StoreError> {
        let work = || {
            let temp = self.write_temp(parts)?;
            self.publish(path, |target| fs::rename(&temp.path, target))
        };
        work().map_err(|error| self.write_error("write", path, &error))
    }

    pub(super) fn put_if_absent(&self, path: &str, body: &Bytes) -> Result<PutOutcome, StoreError> {
        let work = || {
            let target = self.root.join(path);
            // A common case (losing a sequence number) that needs no write.
            if fs::symlink_metadata(&target).is_err() {
                let temp = self.write_temp(std::slice::from_ref(body))?;
                match self.publish(path, |target| rename_no_replace(&temp.path, target)) {
                    Ok(()) => return Ok(PutOutcome::Created),
                    Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                    Err(error) => return Err(error),
                }
            }
            self.make_durable(parent(&target))?;
            sync_dir(parent(&target))?;
            Ok(PutOutcome::Exists)
        };
        work().map_err(|error| self.write_error("create", path, &error))
    }

    pub(super) fn compare_and_swap(
        &self,
        path: &str,
        expected: [u8; 32],
        body: &Bytes,
    ) -> Result<CasOutcome, StoreError> {
        let failed = |error: io::Error| self.write_error("replace", path, &error);
        let _lock = self.lock(path).map_err(failed)?;
        let present = match self.read(path) {
            Ok(present) => present,
            Err(error) if error.is_not_found() => return Ok(CasOutcome::Changed),
            Err(error) => return Err(error),
        };
        if *blake3::hash(&present).as_bytes() != expected {
            return Ok(CasOutcome::Changed);
        }
        let temp = self.write_temp(std::slice::from_ref(body)).map_err(failed)?;
        self.publish(path, |target| fs::rename(&temp.path, target)).map_err(failed)?;
        Ok(CasOutcome::Swapped(Version(VersionKind::Local(*blake3::hash(body).as_bytes()))))
    }

    pub(super) fn delete(&self, path: &str) -> Result<(), StoreError> {
        let work = || {
            let target = self.root.join(path);
            if fs::symlink_metadata(&target).is_err_and(|error| error.kind() == ErrorKind::NotFound) {
                return Ok(());
            }
            // So that a compare-and-swap under way can't bring back what is deleted here.
            let _lock = self.lock(path)?;
            match fs::remove_file(&target) {
                Ok(()) => sync_dir(parent(&target)),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
                Err(error) => Err(error),
            }
        };
        work().map_err(|error| self.write_error("delete", path, &error))
    }

    /// Calls `take` for each object under `prefix` whose path sorts behind `after`, until it returns false. An error is the
    /// last item.
    pub(super) fn walk(&self, prefix: &str, after: &str, take: &mut dyn FnMut(Result<ObjectMeta, StoreError>) -> bool) {
        // Directories still to read: bounded by the depth and width of the store's own layout.
        let mut pending = vec![prefix.to_owned()];
        while let Some(folder) = pending.pop() {
            let entries = match fs::read_dir(self.root.join(&folder)) {
                Ok(entries) => entries,
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => continue,
                Err(error) => {
                    take(Err(self.read_error("list", &folder, &error)));
                    return;
                }
            };
            for entry in entries {
                let found = entry.and_then(|entry| {
                    let name = entry.file_name();
                    // Asking each file for its size is what costs: not those that are not wanted.
                    let wanted = after.is_empty()
                        || !entry.file_type()?.is_file()
                        || name.to_str().is_none_or(|name| format!("{folder}/{name}").as_str() > after);
                    Ok(if wanted { Some((name, entry.metadata()?)) } else { None })
                });
                let (name, meta) = match found {
                    Ok(Some(found)) => found,
                    Ok(None) => continue,
                    // Deleted while we walked.
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    Err(error) => {
                        take(Err(self.read_error("list", &folder, &error)));
                        return;
                    }
                };
                // What is not text or starts with a dot is not ours.
                let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else { continue };
                let path = format!("{folder}/{name}");
                if meta.is_dir() {
                    pending.push(path);
                } else if meta.is_file() {
                    let modified =
                        UnixMillis(meta.mtime().saturating_mul(1_000).saturating_add(meta.mtime_nsec() / 1_000_000));
                    if !take(Ok(ObjectMeta { path, size: meta.len(), modified })) {
                        return;
                    }
                }
            }
        }
    }

    fn open(&self, path: &str) -> Result<(File, u64), StoreError> {
        let file = File::open(self.root.join(path)).map_err(|error| self.read_error("open", path, &error))?;
        let found = file.metadata().map_err(|error| self.read_error("open", path, &error))?;
        if found.is_file() { Ok((file, found.len())) } else { Err(StoreError::NotFound { path: path.into() }) }
    }

    /// Gives a synced temporary its name by `rename` and makes the name durable.
    fn publish(&self, path: &str, rename: impl Fn(&Path) -> io::Result<()>) -> io::Result<()> {
        let target = self.root.join(path);
        let folder = parent(&target);
        self.make_durable(folder)?;
        match rename(&target) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                // Somebody removed a directory that we remembered.
                self.forget_dirs();
                self.make_durable(folder)?;
                rename(&target)?;
            }
            other => other?,
        }
        sync_dir(folder)
    }

    /// Makes `folder` and what is missing above it, and syncs each one's entry in its parent, up to the root's own.
    fn make_durable(&self, folder: &Path) -> io::Result<()> {
        let mut missing = Vec::new();
        let mut at = folder;
        loop {
            if self.durable_dirs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).contains(at) {
                break;
            }
            missing.push(at.to_owned());
            if at == self.root {
                break;
            }
            at = parent(at);
        }
        for dir in missing.into_iter().rev() {
            match DirBuilder::new().mode(0o755).create(&dir) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                other => other?,
            }
            // The root's parent may be one that we may not even open; then whoever made the root vouches for it.
            match sync_dir(parent(&dir)) {
                Err(error) if dir == self.root && error.kind() == ErrorKind::PermissionDenied => {}
                other => other?,
            }
            let mut known = self.durable_dirs.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if known.len() >= DURABLE_DIRS_MAX {
                known.clear();
            }
            known.insert(dir);
        }
        Ok(())
    }

    fn forget_dirs(&self) {
        self.durable_dirs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
    }

    /// Makes the store's own folders and removes what dead writers left, once in a process.
    fn prepare(&self) -> io::Result<()> {
        let mut prepared = self.prepared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if *prepared {
            return Ok(());
        }
        self.make_durable(&self.root)?;
        for folder in [".tmp", ".locks"] {
            match DirBuilder::new().mode(0o700).create(self.root.join(folder)) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                other => other?,
            }
        }
        for entry in fs::read_dir(self.root.join(".tmp"))? {
            let path = entry?.path();
            // A living writer holds the lock; without it, the writer is dead.
            if let Ok(file) = File::open(&path)
                && rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
            {
                match fs::remove_file(&path) {
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    other => other?,
                }
            }
        }
        *prepared = true;
        Ok(())
    }

    fn lock(&self, path: &str) -> io::Result<File> {
        self.prepare()?;
        let shard = blake3::hash(path.as_bytes()).as_bytes()[0];
        let lock = self.root.join(".locks").join(format!("{shard:02x}"));
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(lock)?;
        loop {
            match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other?,
            }
        }
        Ok(file)
    }

    /// A synced file in `.tmp` with the body `parts`.
    fn write_temp(&self, parts: &[Bytes]) -> io::Result<Temp> {
        self.prepare()?;
        let len = parts.iter().map(Bytes::len).sum::<usize>();
        let temp = self.create_temp(len >= LARGE_BYTES_MIN)?;
        if temp.direct {
            match write_direct(&temp.file, parts, len) {
                // Opened with O_DIRECT and yet refused: some file systems do that.
                Err(error) if error.kind() == ErrorKind::InvalidInput => {
                    let flags = rustix::fs::fcntl_getfl(&temp.file)?;
                    rustix::fs::fcntl_setfl(&temp.file, flags - OFlags::DIRECT)?;
                    temp.file.set_len(0)?;
                    write_buffered(&temp.file, parts)?;
                }
                other => other?,
            }
        } else {
            write_buffered(&temp.file, parts)?;
        }
        // Data and the size needed to read it; times may lag.
        temp.file.sync_data()?;
        Ok(temp)
    }

    fn create_temp(&self, mut direct: bool) -> io::Result<Temp> {
        loop {
            let random: [u8; 16] = common::rng::random().map_err(io::Error::other)?;
            let path = self.root.join(".tmp").join(format!("{:032x}", u128::from_le_bytes(random)));
            let mut options = OpenOptions::new();
            options.create_new(true).read(true).write(true).mode(0o644);
            if direct {
                options.custom_flags(OFlags::DIRECT.bits().cast_signed());
            }
            let file = match options.open(&path) {
                Ok(file) => file,
                // No direct I/O on this file system. A first try may have left an empty file; it is nobody's.
                Err(error) if direct && error.kind() == ErrorKind::InvalidInput => {
                    let _ = fs::remove_file(&path);
                    direct = false;
                    continue;
                }
                Err(error) => return Err(error),
            };
            // A starting process could have taken the file for a dead writer's between creation and lock: then it holds
            // the lock or has removed the name, and another name is tried.
            let locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
            let temp = Temp { file, path, direct };
            if locked && temp.file.metadata()?.nlink() > 0 {
                return Ok(temp);
            }
        }
    }

    fn read_error(&self, op: &'static str, path: &str, error: &io::Error) -> StoreError {
        match error.kind() {
            // Where a folder has the name, no object has it.
            ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::IsADirectory => {
                StoreError::NotFound { path: path.into() }
            }
            ErrorKind::PermissionDenied => StoreError::Denied { op, path: path.into(), reason: error.to_string() },
            _ => StoreError::Unavailable { op, path: path.into(), reason: error.to_string() },
        }
    }

    fn write_error(&self, op: &'static str, path: &str, error: &io::Error) -> StoreError {
        let root = self.root.display().to_string();
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => StoreError::NoSpace { path: path.into(), root },
            ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied => {
                StoreError::ReadOnly { root, reason: error.to_string() }
            }
            _ => StoreError::Unavailable { op, path: path.into(), reason: error.to_string() },
        }
    }
}

/// A body being written. Its name in `.tmp` goes with it, unless a rename took it.
struct Temp {
    file: File,
    path: PathBuf,
    direct: bool,
}

impl Drop for Temp {
    fn drop(&mut self) {
        // After a rename there is nothing under this name; after a failure the next start would remove it as well.
        let _ = fs::remove_file(&self.path);
    }
}

fn write_buffered(file: &File, parts: &[Bytes]) -> io::Result<()> {
    let mut at = 0;
    for part in parts {
        file.write_all_at(part, at)?;
        at += part.len() as u64;
    }
    Ok(())
}

/// Writes `parts` (`len` bytes together) in order through one aligned buffer. The last write is padded, then cut off.
fn write_direct(file: &File, parts: &[Bytes], len: usize) -> io::Result<()> {
    let mut memory = vec![0_u8; DIRECT_BUFFER_BYTES + DIRECT_ALIGN_BYTES];
    let skip = memory.as_ptr().align_offset(DIRECT_ALIGN_BYTES);
    let buffer = &mut memory[skip..skip + DIRECT_BUFFER_BYTES];
    // Room at once: fewer extents, and a full disk is known before the work. Not every file system can.
    if let Err(error) = rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len as u64)
        && error == rustix::io::Errno::NOSPC
    {
        return Err(error.into());
    }
    let (mut at, mut filled) = (0_u64, 0);
    for part in parts {
        let mut rest = &part[..];
        while !rest.is_empty() {
            let take = rest.len().min(buffer.len() - filled);
            buffer[filled..filled + take].copy_from_slice(&rest[..take]);
            filled += take;
            rest = &rest[take..];
            if filled == buffer.len() {
                file.write_all_at(buffer, at)?;
                at += filled as u64;
                filled = 0;
            }
        }
    }
    if filled > 0 {
        let padded = filled.next_multiple_of(DIRECT_ALIGN_BYTES);
        buffer[filled..padded].fill(0);
        file.write_all_at(&buffer[..padded], at)?;
    }
    file.set_len(len as u64)
}

fn rename_no_replace(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::io::Errno;
    match rustix::fs::renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => fs::hard_link(from, to),
        other => Ok(other?),
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// The directory that holds `path`; the root directory for itself.
fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}
