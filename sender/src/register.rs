//! `register`: makes this machine a member of a fleet, and makes the key file that its data keys are wrapped with.

use std::path::{Path, PathBuf};

use common::net::enrolment::{Enrolment, EnrolmentError, MachineKey};
use common::net::identity::{NameError, check_name};
use common::net::passphrase::{PassphraseError, PassphraseFile};
use common::net::register::RegisterError;
use common::net::secret_file::{self, FileError};
use common::rng::{self, RngError};
use common::seal::SealError;
use common::seal::keyfile::{KEY_FILE_BYTES_MAX, KeyFile};

use crate::cli::RegisterArgs;

/// Name of the key file in the state directory.
pub const KEY_FILE_NAME: &str = "blockferry.key";

/// Why a machine was not registered. Nothing half-done is left: the command can be repeated as it was.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The passphrase file.
    #[error("passphrase file {}: {source}", path.display())]
    Passphrase {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: PassphraseError,
    },
    /// The machine's name.
    #[error("{0}; choose a name with --name")]
    Name(#[from] NameError),
    /// Keys and certificates in the state directory.
    #[error(transparent)]
    Enrolment(#[from] EnrolmentError),
    /// The receiver.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The state directory is another machine's.
    #[error(
        "{} is registered already, as {name} of fleet {fleet}; to start anew, choose another --state-dir", state_dir.display()
    )]
    Registered {
        /// The state directory.
        state_dir: PathBuf,
        /// The machine's name.
        name: String,
        /// The fleet.
        fleet: String,
    },
    /// The key file can't be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The key file is not one.
    #[error("{}: {source}", path.display())]
    KeyFile {
        /// Where it lies.
        path: PathBuf,
        /// What is wrong with it.
        source: SealError,
    },
    /// No randomness.
    #[error(transparent)]
    Rng(#[from] RngError),
}

/// Registers this machine; prints what it is now and what to keep safe.
///
/// # Errors
/// [`Error`], whose text names the next step.
pub async fn register(args: &RegisterArgs) -> Result<(), Error> {
    let passphrase = PassphraseFile::read(&args.passphrase_file)
        .map_err(|source| Error::Passphrase { path: args.passphrase_file.clone(), source })?;
    let name = args.name.clone().unwrap_or_else(host_name);
    check_name(&name)?;
    match Enrolment::load(&args.state_dir) {
        // The same fleet and name again: the certificate is made anew, the keys stay.
        Ok(present) if present.fleet() != passphrase.fleet || present.identity().name != name => {
            return Err(Error::Registered {
                state_dir: args.state_dir.clone(),
                name: present.identity().name.clone(),
                fleet: present.fleet().to_string(),
            });
        }
        Ok(_) | Err(EnrolmentError::NotRegistered { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    secret_file::make_dir(&args.state_dir)?;
    let key = MachineKey::load_or_create(&args.state_dir)?;
    // Before anything is spent: where the key file can't be made, nothing could be protected either.
    let key_file = load_or_create_key_file(&args.state_dir)?;
    let enrolment = common::net::register::register(&args.receiver, &passphrase, &name, key).await?;
    enrolment.store(&args.state_dir)?;
    let path = args.state_dir.join(KEY_FILE_NAME);
    say(&format!(
        "registered {name} as machine {} of fleet {}\n\
         key file {} (id {}): copy it to a safe place now. Without it nothing that this machine replicates can be restored, \
         by anybody.",
        enrolment.machine(),
        enrolment.fleet(),
        path.display(),
        key_file.id(),
    ));
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
fn say(text: &str) {
    println!("{text}");
}

/// The key file of the state directory.
///
/// # Errors
/// [`Error::File`], [`Error::KeyFile`].
pub fn load_key_file(state_dir: &Path) -> Result<KeyFile, Error> {
    let path = state_dir.join(KEY_FILE_NAME);
    let bytes = secret_file::read(&path)?;
    let damaged = |why: &str| Error::KeyFile { path: path.clone(), source: SealError::KeyFile(why.to_owned()) };
    if bytes.len() > KEY_FILE_BYTES_MAX {
        return Err(damaged("it is far too long to be one; use the copy of it that you kept"));
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| damaged("it is not text; use the copy of it that you kept"))?;
    KeyFile::parse(text).map_err(|source| Error::KeyFile { path, source })
}

fn load_or_create_key_file(state_dir: &Path) -> Result<KeyFile, Error> {
    match load_key_file(state_dir) {
        Err(Error::File(FileError::Missing { .. })) => {}
        other => return other,
    }
    let key_file = KeyFile::from_random(rng::random()?, rng::random()?);
    secret_file::write(&state_dir.join(KEY_FILE_NAME), key_file.encode().as_bytes())?;
    Ok(key_file)
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_is_made_once_and_read_back() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let made = load_or_create_key_file(dir.path()).expect("made");
        let again = load_or_create_key_file(dir.path()).expect("read");
        assert_eq!(made.encode(), again.encode());
    }

    #[test]
    fn a_damaged_key_file_is_named_and_never_replaced() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join(KEY_FILE_NAME);
        load_or_create_key_file(dir.path()).expect("made");
        let mut bytes = std::fs::read(&path).expect("readable");
        bytes[30] ^= 1;
        std::fs::write(&path, &bytes).expect("writable");
        let error = load_or_create_key_file(dir.path()).expect_err("damaged").to_string();
        assert!(error.contains(KEY_FILE_NAME), "{error}");
        assert_eq!(std::fs::read(&path).expect("readable"), bytes, "it was replaced");
    }
}
