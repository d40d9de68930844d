//! Durable small-file operations that the state is built from.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use super::error::StateError;

/// Makes what was created, renamed or removed in `directory` durable.
pub(super) fn sync_directory(directory: &Path) -> Result<(), StateError> {
    File::open(directory).and_then(|handle| handle.sync_all()).map_err(|error| StateError::io("sync", directory, error))
}

/// Makes a directory that only this user may enter; no effect where it exists.
pub(super) fn create_directory(directory: &Path) -> Result<(), StateError> {
    match std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(StateError::io("create", directory, error)),
        _ => Ok(()),
    }
}

/// Writes a new file durably, readable by this user alone. The name itself is durable after [`sync_directory`].
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), StateError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| StateError::io("create", path, error))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(|error| StateError::write(path, bytes.len() as u64, error))
}

/// Removes a file; no effect where it is gone.
pub(super) fn remove(path: &Path) -> Result<(), StateError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StateError::io("remove", path, error)),
        _ => Ok(()),
    }
}

/// How often, and how long apart, a lock that is taken is asked for again.
const LOCK_ATTEMPTS: u32 = 25;
const LOCK_PAUSE: std::time::Duration = std::time::Duration::from_millis(20);

/// Takes `directory` for this process until the handle is dropped, also at its death.
///
/// # Errors
/// [`StateError::InUse`] where another process, or another part of this one, holds it.
pub(super) fn lock(directory: &Path) -> Result<File, StateError> {
    let path = directory.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|error| StateError::io("open", &path, error))?;
    // A program that is being started holds a copy of a lock that was just given back, until it has begun: that passes.
    let lock = || rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    let mut locked = lock();
    for _ in 0..LOCK_ATTEMPTS {
        if locked != Err(rustix::io::Errno::WOULDBLOCK) {
            break;
        }
        std::thread::sleep(LOCK_PAUSE);
        locked = lock();
    }
    match locked {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let pid = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
            return Err(StateError::InUse { path: directory.to_owned(), pid });
        }
        Err(error) => return Err(StateError::io("lock", &path, error.into())),
    }
    // For the message above only: the lock is what counts.
    let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(file)
}
