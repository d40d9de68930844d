//! The key file, and the data key it opens.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use common::format::volume_header::VolumeHeader;
use common::seal::keyfile::{KEY_FILE_BYTES_MAX, KeyFile};
use common::seal::{DataKey, SealError};

/// Why there is no data key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file can't be read.
    #[error("cannot read key file {path}: {source}: pass the machine's key file with --key-file")]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no key file.
    #[error("{path}: {source}")]
    NotAKeyFile {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        source: SealError,
    },
    /// It does not open this volume's data key.
    #[error(
        "{path} does not open volume {volume}: {source}: pass the key file of the machine that the volume was registered on"
    )]
    WrongKey {
        /// Which.
        path: PathBuf,
        /// `MACHINE/NAME`.
        volume: String,
        /// Why.
        source: SealError,
    },
    /// The data key opens, but closes of this volume are signed by another.
    #[error(
        "v1/volumes/{volume}/header pins a signing key that does not come from its data key: the header was altered; bring an older copy of it back"
    )]
    Pinned {
        /// Volume.
        volume: common::ids::VolumeId,
    },
}

/// A key file that was read.
#[derive(Debug)]
pub struct ReadKeyFile {
    path: PathBuf,
    key_file: KeyFile,
}

impl ReadKeyFile {
    /// Reads and parses a key file.
    ///
    /// # Errors
    /// [`KeyError::Unreadable`], [`KeyError::NotAKeyFile`].
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let unreadable = |source| KeyError::Unreadable { path: path.into(), source };
        let mut text = String::new();
        let file = File::open(path).map_err(unreadable)?;
        file.take(KEY_FILE_BYTES_MAX as u64 + 1).read_to_string(&mut text).map_err(unreadable)?;
        let not_a_key = |source| KeyError::NotAKeyFile { path: path.into(), source };
        if text.len() > KEY_FILE_BYTES_MAX {
            return Err(not_a_key(SealError::KeyFile("it is longer than a key file can be".into())));
        }
        let key_file = KeyFile::parse(&text).map_err(not_a_key)?;
        Ok(Self { path: path.into(), key_file })
    }

    /// The volume's data key, which must be the one whose signatures the header pins.
    ///
    /// # Errors
    /// [`KeyError::WrongKey`], [`KeyError::Pinned`].
    pub fn unlock(&self, header: &VolumeHeader) -> Result<DataKey, KeyError> {
        let unwrapped = self.key_file.unwrap(&header.wrapped_keys, header.volume, header.key_id);
        let data_key = unwrapped.map_err(|source| KeyError::WrongKey {
            path: self.path.clone(),
            volume: catalog::volume::header::full_name(header),
            source,
        })?;
        if data_key.signer(header.volume).public() != header.signing_key {
            return Err(KeyError::Pinned { volume: header.volume });
        }
        Ok(data_key)
    }
}
