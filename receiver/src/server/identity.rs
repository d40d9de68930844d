//! The receiver's own identity, in its data directory: the lock that keeps a second receiver out, and `receiver.id`.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use common::ids::ReceiverId;
use common::net::secret_file::{self, FileError};
use common::rng;

use super::ServerError;

const LOCK_FILE: &str = "lock";
const ID_FILE: &str = "receiver.id";
const RESET_KEY_FILE: &str = "reset.key";

/// What is wrong with `receiver.id`.
#[derive(Debug, thiserror::Error)]
pub enum IdentityFileError {
    /// It can't be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// It holds something else.
    #[error("{}: expected one line with a UUID; restore it, or remove it to become a new receiver", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
    },
}

/// Makes the data directory where it is missing, and takes it for this process.
///
/// # Errors
/// [`ServerError::DataDir`], [`ServerError::InUse`].
pub(super) fn take(data_dir: &Path) -> Result<File, ServerError> {
    let failed = |source| ServerError::DataDir { path: data_dir.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(data_dir).map_err(failed)?;
    let lock =
        File::options().create(true).truncate(false).write(true).open(data_dir.join(LOCK_FILE)).map_err(failed)?;
    match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(ServerError::InUse { path: data_dir.to_owned() })
        }
        Err(error) => Err(failed(error.into())),
    }
}

/// This receiver's id; drawn at its first start.
///
/// # Errors
/// [`IdentityFileError`], [`ServerError::Rng`].
pub(super) fn load_or_create(data_dir: &Path) -> Result<ReceiverId, ServerError> {
    let path = data_dir.join(ID_FILE);
    match secret_file::read(&path) {
        Ok(bytes) => {
            let text = std::str::from_utf8(&bytes).ok().map(str::trim);
            let id = text.and_then(|text| text.parse().ok());
            Ok(id.ok_or(IdentityFileError::Malformed { path })?)
        }
        Err(FileError::Missing { .. }) => {
            let id = ReceiverId::from_random(rng::random()?);
            secret_file::write(&path, format!("{id}\n").as_bytes()).map_err(IdentityFileError::from)?;
            Ok(id)
        }
        Err(error) => Err(IdentityFileError::from(error).into()),
    }
}

/// The secret with which a receiver tells senders of a killed predecessor that their connections are gone.
///
/// # Errors
/// [`IdentityFileError`], [`ServerError::Rng`].
pub(super) fn reset_key(data_dir: &Path) -> Result<[u8; 32], ServerError> {
    let path = data_dir.join(RESET_KEY_FILE);
    match secret_file::read(&path) {
        // One that is damaged costs senders a pause at the next restart; a new one does as well.
        Ok(bytes) if bytes.len() == 32 => Ok(bytes[..].try_into().unwrap_or_default()),
        Ok(_) | Err(FileError::Missing { .. }) => {
            let key: [u8; 32] = rng::random()?;
            secret_file::write(&path, &key).map_err(IdentityFileError::from)?;
            Ok(key)
        }
        Err(error) => Err(IdentityFileError::from(error).into()),
    }
}
