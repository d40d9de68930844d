//! Sealing: from page contents to records and back, and the proofs over them. Pure.
//!
//! Key hierarchy: a volume's [`DataKey`] is random and kept wrapped in the volume's header ([`keyfile`]). Each epoch draws a
//! random salt; HKDF-SHA-256 over data key, salt and the epoch's place gives its [`EpochKey`], under which every record
//! has its own counter as nonce. From the data key, too, comes the Ed25519 key that signs closes ([`signing`]), over the
//! Merkle root of the epoch's metadata ([`merkle`]).
//!
//! Promises: `open(seal(x)) == x`; a record opened at another place than it was sealed for is an error; keys are wiped when
//! dropped and print nothing. Never: draws randomness, reads files or clocks.

#![allow(
    clippy::cast_possible_truncation,
    reason = "lengths are within crate::limits, far below 4 GiB, on 64-bit targets alone"
)]

pub mod keyfile;
pub mod merkle;
mod opener;
mod sealer;
pub mod signing;

#[cfg(test)]
mod tests;

use std::fmt;

use aes_gcm::{Aes256Gcm, KeyInit};
use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

pub use opener::Opener;
pub use sealer::{Compression, Sealer};

use crate::error::{Dispose, Disposition};
use crate::ids::{Epoch, Incarnation, KeyId, Salt, VolumeId};

/// Why bytes could not be sealed, opened or proven.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The seal does not open: altered bytes, another place than stated, or another key.
    #[error(
        "record of {volume} epoch {epoch} block {block} does not open: the bytes were altered or the key is another one"
    )]
    NotAuthentic {
        /// Volume stated by the record.
        volume: VolumeId,
        /// Epoch stated by the record.
        epoch: Epoch,
        /// Block stated by the record.
        block: u64,
    },
    /// The record is of another volume, incarnation, key or epoch than the key opens.
    #[error("record is of {found}, expected {expected}")]
    WrongPlace {
        /// Volume and epoch expected.
        expected: String,
        /// Volume and epoch found.
        found: String,
    },
    /// The opened bytes do not decompress to the length that the header states.
    #[error("record of block {block} opened, but does not decompress to {expected} bytes")]
    Decompression {
        /// Block.
        block: u64,
        /// Length stated.
        expected: u32,
    },
    /// Page bytes that do not match their mask.
    #[error("{pages} pages were named, but {bytes} bytes given")]
    PageBytes {
        /// Pages in the mask.
        pages: u32,
        /// Bytes given.
        bytes: usize,
    },
    /// zstd could not be set up.
    #[error("zstd: {0}")]
    Zstd(String),
    /// A close whose signature does not verify.
    #[error("close of {volume} epoch {epoch}: the signature does not verify with the volume's key")]
    BadSignature {
        /// Volume stated.
        volume: VolumeId,
        /// Epoch stated.
        epoch: Epoch,
    },
    /// A key file that is not one, or is damaged.
    #[error("key file: {0}")]
    KeyFile(String),
    /// No wrapped copy of the data key was made with this key file.
    #[error("volume {volume} was not wrapped with key file {found}; it needs key file {needed}")]
    WrongKeyFile {
        /// Volume.
        volume: VolumeId,
        /// Id of the key file given.
        found: String,
        /// Ids of key files that would do.
        needed: String,
    },
    /// The wrapped data key does not open.
    #[error("the wrapped key of volume {volume} does not open: the header or the key file was altered")]
    Unwrap {
        /// Volume.
        volume: VolumeId,
    },
}

impl Dispose for SealError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::PageBytes { .. } | Self::Zstd(_) => Disposition::Bug,
            Self::KeyFile(_) | Self::WrongKeyFile { .. } => Disposition::BadInput,
            _ => Disposition::Corrupt,
        }
    }
}

/// A volume's data key. Wiped when dropped; never printed.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct DataKey([u8; 32]);

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(…)")
    }
}

impl DataKey {
    /// A key from 32 random bytes, drawn by the caller.
    #[must_use]
    pub fn from_random(random: [u8; 32]) -> Self {
        Self(random)
    }

    /// The key of one epoch: `HKDF-SHA-256(ikm = data key, salt, info = "blockferry epoch v1" ∥ volume ∥ incarnation ∥ epoch ∥
    /// key id)`, integers little-endian.
    ///
    /// # Panics
    /// Never: 32 bytes are a valid HKDF length.
    #[must_use]
    pub fn epoch_key(&self, context: EpochContext, salt: &Salt) -> EpochKey {
        let mut info = Vec::with_capacity(64);
        info.extend_from_slice(b"blockferry epoch v1");
        info.extend_from_slice(&context.volume.0);
        info.extend_from_slice(&context.incarnation.0.to_le_bytes());
        info.extend_from_slice(&context.epoch.0.to_le_bytes());
        info.extend_from_slice(&context.key_id.0.to_le_bytes());
        let key = self.derive(&salt.0, &info);
        let cipher = Aes256Gcm::new(&(*key).into());
        EpochKey { context, cipher }
    }

    /// The key that signs this volume's closes: seed `HKDF-SHA-256(ikm = data key, salt = volume, info = "blockferry close
    /// signing v1")`.
    #[must_use]
    pub fn signer(&self, volume: VolumeId) -> signing::CloseSigner {
        signing::CloseSigner::from_seed(&self.derive(&volume.0, b"blockferry close signing v1"))
    }

    fn derive(&self, salt: &[u8], info: &[u8]) -> Zeroizing<[u8; 32]> {
        derive_key(&self.0, salt, info)
    }

    fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

/// HKDF-SHA-256 to 32 bytes.
fn derive_key(ikm: &[u8], salt: &[u8], info: &[u8]) -> Zeroizing<[u8; 32]> {
    let mut key = Zeroizing::new([0; 32]);
    Hkdf::<Sha256>::new(Some(salt), ikm).expand(info, key.as_mut()).expect("32 bytes is a valid HKDF output length");
    key
}

/// The place that an epoch key is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochContext {
    /// Volume.
    pub volume: VolumeId,
    /// Incarnation.
    pub incarnation: Incarnation,
    /// Epoch.
    pub epoch: Epoch,
    /// Data key it is derived from.
    pub key_id: KeyId,
}

/// The key of one epoch's records.
#[derive(Clone)]
pub struct EpochKey {
    context: EpochContext,
    cipher: Aes256Gcm,
}

impl fmt::Debug for EpochKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EpochKey(volume {}, epoch {}, …)", self.context.volume, self.context.epoch)
    }
}

impl EpochKey {
    /// The place that it is bound to.
    #[must_use]
    pub fn context(&self) -> EpochContext {
        self.context
    }
}

/// The 96-bit nonce: the record's counter, little-endian, then four zero bytes.
fn nonce(counter: u64) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&counter.to_le_bytes());
    nonce
}
