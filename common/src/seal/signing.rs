//! Signatures of closes: Ed25519 (RFC 8032), by ring.

use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};

use super::SealError;
use crate::format::close::{Close, CloseStatement};

/// Signs closes of one volume. Prints nothing.
pub struct CloseSigner(Ed25519KeyPair);

impl std::fmt::Debug for CloseSigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CloseSigner(…)")
    }
}

impl CloseSigner {
    pub(super) fn from_seed(seed: &[u8; 32]) -> Self {
        Self(Ed25519KeyPair::from_seed_unchecked(seed).expect("any 32 bytes are an Ed25519 seed"))
    }

    /// The public half, which the volume's header pins.
    ///
    /// # Panics
    /// Never: an Ed25519 public key has 32 bytes.
    #[must_use]
    pub fn public(&self) -> [u8; 32] {
        self.0.public_key().as_ref().try_into().expect("an Ed25519 public key has 32 bytes")
    }

    /// Signs a statement.
    ///
    /// # Panics
    /// Never: an Ed25519 signature has 64 bytes.
    #[must_use]
    pub fn sign(&self, statement: CloseStatement) -> Close {
        let signature = self.0.sign(&statement.signed_bytes());
        Close::new(statement, signature.as_ref().try_into().expect("an Ed25519 signature has 64 bytes"))
    }
}

/// Checks a close's signature against the public key that the volume's header pins. Needs no secret.
///
/// # Errors
/// [`SealError::BadSignature`].
pub fn verify_close(close: &Close, public: &[u8; 32]) -> Result<(), SealError> {
    let statement = close.statement();
    UnparsedPublicKey::new(&ED25519, public)
        .verify(&statement.signed_bytes(), close.signature())
        .map_err(|_| SealError::BadSignature { volume: statement.volume, epoch: statement.epoch })
}
