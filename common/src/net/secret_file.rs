//! Files that hold keys: written whole and durable, readable by their owner alone.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::error::{Dispose, Disposition};

/// Largest such file: keys and certificates are a few KiB.
const BYTES_MAX: u64 = 256 << 10;

/// A key or identity file that can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It isn't there.
    #[error("no file {}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file system is full.
    #[error("no space left to write {}: free space on its file system", path.display())]
    NoSpace {
        /// The file.
        path: PathBuf,
    },
    /// The system said no.
    #[error("can't {op} {}: {source}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Larger than any file of its kind.
    #[error("{} is larger than {BYTES_MAX} bytes: it is not the file that was expected", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
}

impl Dispose for FileError {
    fn disposition(&self) -> Disposition {
        Disposition::BadInput
    }
}

/// Reads a small file whole, into memory that is wiped.
///
/// # Errors
/// [`FileError`], which names the file.
pub fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => FileError::Missing { path: path.into() },
        _ => FileError::Io { op: "read", path: path.into(), source },
    };
    let file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    // Room for all at once: a buffer that grows would leave copies behind.
    let capacity = usize::try_from(size.min(BYTES_MAX)).unwrap_or(0) + 1;
    let mut bytes = Zeroizing::new(Vec::with_capacity(capacity));
    file.take(BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > BYTES_MAX {
        return Err(FileError::TooLarge { path: path.into() });
    }
    Ok(bytes)
}

/// True where others than the owner may read the file; the caller warns.
#[must_use]
pub fn is_open_to_others(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o077 != 0)
}

/// Writes a file with mode 0600 in place of what was there: after `Ok` it survives a power cut, and at no time is there
/// a part of it under its name.
///
/// # Errors
/// [`FileError`], which names the file; the old file, if any, is still there.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FileError::NoSpace { path: path.into() },
        _ => FileError::Io { op: "write", path: path.into(), source },
    };
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let work = || {
        // A leftover of a killed run may have other modes; a fresh file has ours.
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        sync_parent(path)
    };
    work().map_err(|error| {
        let _ = fs::remove_file(&temporary);
        failed(error)
    })
}

/// Renames a file durably.
///
/// # Errors
/// [`FileError`].
pub fn rename(from: &Path, to: &Path) -> Result<(), FileError> {
    fs::rename(from, to).and_then(|()| sync_parent(to)).map_err(|source| FileError::Io {
        op: "rename",
        path: from.into(),
        source,
    })
}

/// Removes a file durably; that there is none is no error.
///
/// # Errors
/// [`FileError`].
pub fn remove(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.and_then(|()| sync_parent(path)).map_err(|source| FileError::Io {
            op: "remove",
            path: path.into(),
            source,
        }),
    }
}

/// Makes a directory with mode 0700, durably, with what is missing above it.
///
/// # Errors
/// [`FileError`].
pub fn make_dir(path: &Path) -> Result<(), FileError> {
    let failed = |source| FileError::Io { op: "create", path: path.into(), source };
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        make_dir(parent)?;
    }
    match std::os::unix::fs::DirBuilderExt::mode(&mut fs::DirBuilder::new(), 0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        other => other.map_err(failed)?,
    }
    sync_parent(path).map_err(failed)
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_file_is_the_owners_alone_and_replaces_the_old_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a/b/key");
        make_dir(path.parent().expect("has one")).expect("made");
        write(&path, b"first").expect("written");
        write(&path, b"second").expect("written");
        assert_eq!(read(&path).expect("read").as_slice(), b"second");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        assert!(!is_open_to_others(&path));
        assert_eq!(fs::read_dir(path.parent().expect("has one")).expect("read").count(), 1);
    }

    #[test]
    fn a_missing_file_and_a_huge_one_are_errors_with_its_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("key");
        assert!(matches!(read(&path), Err(FileError::Missing { .. })));
        File::create(&path).and_then(|file| file.set_len(BYTES_MAX + 1)).expect("made");
        let error = read(&path).expect_err("too large").to_string();
        assert!(error.contains("key"), "{error}");
    }
}
