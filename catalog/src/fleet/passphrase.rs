//! Passphrases: each lets a number of machines in, for a time. The file that carries one is `common::net::passphrase`; what
//! the store keeps is a salted hash of its secret, so that reading the store registers nobody.

use std::time::Duration;

use common::clock::{Clock, UnixMillis};
use common::error::{Dispose, Disposition};
use common::ids::{Digest, Nonce};
use common::net::passphrase::{PassphraseFile, PassphraseId};
use common::rng;
use zeroize::Zeroizing;

use super::authority::Authority;
use super::format::Passphrase;
use super::{FleetError, object, passphrase_path};
use crate::store::Store;

/// Why a passphrase does not let a machine in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The fleet has none of this id.
    #[error("this fleet has no passphrase {id}: create a new one with `blockferry-receiver passphrase create`")]
    Unknown {
        /// As asked.
        id: PassphraseId,
    },
    /// The secret is not its secret.
    #[error("the secret of passphrase {id} is wrong: copy the passphrase file again, every byte of it counts")]
    WrongSecret {
        /// Which.
        id: PassphraseId,
    },
    /// An operator revoked it.
    #[error("passphrase {id} was revoked: create a new one with `blockferry-receiver passphrase create`")]
    Revoked {
        /// Which.
        id: PassphraseId,
    },
    /// Its time is over.
    #[error(
        "passphrase {id} expired at {expired}: create a new one with `blockferry-receiver passphrase create`; if that is in \
         the future, set the clocks"
    )]
    Expired {
        /// Which.
        id: PassphraseId,
        /// Since when.
        expired: UnixMillis,
    },
    /// It let in as many machines as it was made for.
    #[error(
        "passphrase {id} is used up, it was good for {uses}: create a new one with `blockferry-receiver passphrase create`, \
         with --uses for several machines"
    )]
    UsedUp {
        /// Which.
        id: PassphraseId,
        /// How many.
        uses: u32,
    },
}

impl Dispose for Refused {
    fn disposition(&self) -> Disposition {
        Disposition::BadInput
    }
}

/// The fleet's passphrases in the store.
pub struct Passphrases {
    store: Store,
    clock: Clock,
}

impl Passphrases {
    pub(super) fn new(store: Store, clock: Clock) -> Self {
        Self { store, clock }
    }

    /// Makes a passphrase that lets in `uses` machines within `ttl`; the file for the operator to carry.
    ///
    /// # Errors
    /// The store's.
    pub async fn create(&self, authority: &Authority, ttl: Duration, uses: u32) -> Result<PassphraseFile, FleetError> {
        let now = self.clock.now();
        let secret = Zeroizing::new(rng::random::<32>()?);
        let salt = rng::random()?;
        let id = PassphraseId::from_random(rng::random()?);
        let stored = Passphrase {
            nonce: Nonce::ZERO,
            id,
            created: now,
            expires: UnixMillis(now.0.saturating_add(i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX))),
            uses,
            uses_left: uses,
            revoked: false,
            hash: hash(&salt, &*secret),
            salt,
        };
        let path = passphrase_path(id);
        if !object::create(&self.store, &path, stored).await? {
            // 122 random bits met twice: not by chance.
            return Err(FleetError::Contended { path });
        }
        Ok(PassphraseFile { fleet: authority.fleet(), fingerprint: authority.fingerprint(), id, secret })
    }

    /// Is the secret right, and is the passphrase neither revoked nor expired? Uses nothing up. What is left of it is in the
    /// answer: zero uses are not refused here, since a machine that repeats its registration needs none.
    ///
    /// # Errors
    /// [`Refused`]; the store's.
    pub async fn check(&self, id: PassphraseId, secret: &[u8]) -> Result<Passphrase, FleetError> {
        let (found, _) =
            object::read::<Passphrase>(&self.store, &passphrase_path(id)).await?.ok_or(Refused::Unknown { id })?;
        judge(&found, id, secret, self.clock.now())?;
        Ok(found)
    }

    /// Uses one use up. Of concurrent calls for the last one exactly one succeeds.
    ///
    /// # Errors
    /// [`Refused`]; the store's.
    pub async fn redeem(&self, id: PassphraseId, secret: &[u8]) -> Result<(), FleetError> {
        let now = self.clock.now();
        let path = passphrase_path(id);
        let taken = object::update::<Passphrase>(&self.store, &path, |found| {
            judge(found, id, secret, now)?;
            found.uses_left = found.uses_left.checked_sub(1).ok_or(Refused::UsedUp { id, uses: found.uses })?;
            Ok(())
        });
        taken.await?.map(drop).ok_or_else(|| Refused::Unknown { id }.into())
    }

    /// All passphrases, newest first.
    ///
    /// # Errors
    /// The store's; [`FleetError::Object`] for one that can't be read.
    pub async fn list(&self) -> Result<Vec<Passphrase>, FleetError> {
        let mut found = Vec::new();
        for meta in self.store.list("v1/authority/passphrases").await? {
            if let Some((passphrase, _)) = object::read::<Passphrase>(&self.store, &meta.path).await? {
                found.push(passphrase);
            }
        }
        found.sort_by_key(|passphrase| (std::cmp::Reverse(passphrase.created), passphrase.id));
        Ok(found)
    }

    /// From now on the passphrase lets nobody in. Doing it twice is no error.
    ///
    /// # Errors
    /// [`Refused::Unknown`]; the store's.
    pub async fn revoke(&self, id: PassphraseId) -> Result<(), FleetError> {
        let path = passphrase_path(id);
        let revoked = object::update::<Passphrase>(&self.store, &path, |found| {
            found.revoked = true;
            Ok(())
        });
        revoked.await?.map(drop).ok_or_else(|| Refused::Unknown { id }.into())
    }
}

/// Without the right secret nothing else about the passphrase is told.
fn judge(found: &Passphrase, id: PassphraseId, secret: &[u8], now: UnixMillis) -> Result<(), Refused> {
    // BLAKE3's own comparison takes the same time wherever the bytes differ.
    if blake3::Hash::from(hash(&found.salt, secret).0) != blake3::Hash::from(found.hash.0) || found.id != id {
        Err(Refused::WrongSecret { id })
    } else if found.revoked {
        Err(Refused::Revoked { id })
    } else if now >= found.expires {
        Err(Refused::Expired { id, expired: found.expires })
    } else {
        Ok(())
    }
}

fn hash(salt: &[u8; 32], secret: &[u8]) -> Digest {
    Digest(*blake3::keyed_hash(salt, secret).as_bytes())
}
