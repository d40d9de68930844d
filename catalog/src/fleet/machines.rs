//! The fleet's machines: names that are given once, certificates that can be revoked.
//!
//! What an operator needs of a name: it never silently changes hands. Whoever registers under a name that is taken gets in
//! only as the same machine: by holding the same key (a registration repeated), or after an operator has revoked the
//! machine, or once all its certificates have expired, in each case with a valid passphrase. It then keeps its id, and with
//! it its volumes; what was revoked stays revoked.

use common::clock::{Clock, UnixMillis};
use common::ids::{Digest, MachineId, Nonce};
use common::net::identity::{PeerIdentity, check_name};
use common::net::passphrase::PassphraseId;

use super::FleetError;
use super::format::{CERTIFICATES_MAX, IssuedCertificate, Machine, MachineName};
use super::object;
use crate::store::Store;

/// The fleet's machines in the store.
pub struct Machines {
    store: Store,
    clock: Clock,
}

/// What a registration under a name is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// The name is free.
    New,
    /// The same key with the same passphrase: the reply was lost, or the machine asks again. Costs no use.
    Repeated(MachineId),
    /// The machine anew: the same key with another passphrase, or any key once the old ones open nothing.
    Again(MachineId),
    /// Somebody else has the name.
    Taken,
}

impl Machines {
    pub(super) fn new(store: Store, clock: Clock) -> Self {
        Self { store, clock }
    }

    /// A machine, or `None`.
    ///
    /// # Errors
    /// The store's; [`FleetError::Object`].
    pub async fn get(&self, machine: MachineId) -> Result<Option<Machine>, FleetError> {
        Ok(object::read::<Machine>(&self.store, &machine_path(machine)).await?.map(|(machine, _)| machine))
    }

    /// The machine of that name, or `None`.
    ///
    /// # Errors
    /// [`FleetError::Name`]; the store's; [`FleetError::Object`].
    pub async fn find(&self, name: &str) -> Result<Option<Machine>, FleetError> {
        match self.named(name).await? {
            Some(machine) => self.get(machine).await,
            None => Ok(None),
        }
    }

    /// All machines, by name.
    ///
    /// # Errors
    /// The store's; [`FleetError::Object`] for one that can't be read.
    pub async fn list(&self) -> Result<Vec<Machine>, FleetError> {
        let mut found = Vec::new();
        for meta in self.store.list("v1/authority/machines").await? {
            if let Some((machine, _)) = object::read::<Machine>(&self.store, &meta.path).await? {
                found.push(machine);
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Revokes all certificates of the machine of that name, those on their way included. Receivers act on it within
    /// [`super::REVOCATION_LAG`]. Doing it twice is no error.
    ///
    /// # Errors
    /// [`FleetError::NoSuchMachine`]; the store's.
    pub async fn revoke(&self, name: &str) -> Result<MachineId, FleetError> {
        let unknown = || FleetError::NoSuchMachine { name: name.into() };
        let machine = self.named(name).await?.ok_or_else(unknown)?;
        let path = machine_path(machine);
        let revoked = object::update::<Machine>(&self.store, &path, |found| {
            found.certificates.iter_mut().for_each(|certificate| certificate.revoked = true);
            Ok(())
        });
        revoked.await?.map(|found| found.machine).ok_or_else(unknown)
    }

    /// What a registration under `name` with this key and passphrase would be. Changes nothing.
    ///
    /// # Errors
    /// [`FleetError::Name`]; the store's.
    pub async fn claim(&self, name: &str, key: Digest, passphrase: PassphraseId) -> Result<Claim, FleetError> {
        let Some(machine) = self.named(name).await? else { return Ok(Claim::New) };
        Ok(match self.get(machine).await? {
            Some(found) => judge(&found, key, passphrase, self.clock.now()),
            // A registration that was cut short between name and machine: whoever comes next completes it.
            None => Claim::Again(machine),
        })
    }

    /// Takes a free name for `machine`; false where somebody was faster.
    ///
    /// # Errors
    /// The store's.
    pub(super) async fn take_name(&self, name: &str, machine: MachineId) -> Result<bool, FleetError> {
        check_name(name)?;
        let taken = MachineName { nonce: Nonce::ZERO, machine, name: name.into() };
        object::create(&self.store, &name_path(name), taken).await
    }

    /// Lists a certificate just issued by a registration. After `Ok` it may be given out.
    ///
    /// # Errors
    /// [`FleetError::NameTaken`] where the claim is no longer what it was; the store's.
    pub(super) async fn enter(
        &self,
        identity: &PeerIdentity,
        key: Digest,
        passphrase: PassphraseId,
    ) -> Result<(), FleetError> {
        let machine = MachineId(identity.id);
        let now = self.clock.now();
        let certificate = entry(identity, key);
        let add = |found: &mut Machine| {
            if judge(found, key, passphrase, now) == Claim::Taken {
                return Err(FleetError::NameTaken { name: identity.name.clone() });
            }
            found.passphrase = passphrase;
            push(found, certificate.clone(), now);
            Ok(())
        };
        if object::update(&self.store, &machine_path(machine), add).await?.is_some() {
            return Ok(());
        }
        let first = Machine {
            nonce: Nonce::ZERO,
            machine,
            name: identity.name.clone(),
            created: now,
            passphrase,
            certificates: vec![certificate.clone()],
        };
        if object::create(&self.store, &machine_path(machine), first).await? {
            return Ok(());
        }
        // Made in between by another attempt of the same registration.
        match object::update(&self.store, &machine_path(machine), add).await? {
            Some(_) => Ok(()),
            None => Err(FleetError::Contended { path: machine_path(machine) }),
        }
    }

    /// Lists a renewed certificate, if the one that asked (`present`) is still good. After `Ok` it may be given out.
    ///
    /// # Errors
    /// [`FleetError::Revoked`]; the store's.
    pub(super) async fn renew(
        &self,
        present: &PeerIdentity,
        renewed: &PeerIdentity,
        key: Digest,
    ) -> Result<(), FleetError> {
        let refused = || FleetError::Revoked { name: present.name.clone(), serial: present.serial.to_string() };
        let now = self.clock.now();
        let path = machine_path(MachineId(present.id));
        let updated = object::update::<Machine>(&self.store, &path, |found| {
            if !found.has_active(present.serial) {
                return Err(refused());
            }
            push(found, entry(renewed, key), now);
            Ok(())
        });
        updated.await?.map(drop).ok_or_else(refused)
    }

    async fn named(&self, name: &str) -> Result<Option<MachineId>, FleetError> {
        check_name(name)?;
        Ok(object::read::<MachineName>(&self.store, &name_path(name)).await?.map(|(named, _)| named.machine))
    }
}

/// Decides what a registration under a machine's name is. PURE.
fn judge(found: &Machine, key: Digest, passphrase: PassphraseId, now: UnixMillis) -> Claim {
    let same_key = found.certificates.iter().any(|certificate| certificate.key == key && !certificate.revoked);
    match (same_key, found.passphrase == passphrase) {
        (true, true) => Claim::Repeated(found.machine),
        (true, false) => Claim::Again(found.machine),
        (false, _) if !found.is_active(now) => Claim::Again(found.machine),
        (false, _) => Claim::Taken,
    }
}

/// Adds a certificate, once; drops expired ones, and beyond the bound the oldest.
fn push(found: &mut Machine, certificate: IssuedCertificate, now: UnixMillis) {
    if found.certificates.iter().any(|known| known.serial == certificate.serial) {
        return;
    }
    found.certificates.retain(|known| known.not_after > now);
    if found.certificates.len() >= CERTIFICATES_MAX {
        // No longer listed is no longer good: this fails closed.
        found.certificates.remove(0);
    }
    found.certificates.push(certificate);
}

fn entry(identity: &PeerIdentity, key: Digest) -> IssuedCertificate {
    IssuedCertificate { serial: identity.serial, not_after: identity.not_after, revoked: false, key }
}

fn machine_path(machine: MachineId) -> String {
    format!("v1/authority/machines/{machine}")
}

fn name_path(name: &str) -> String {
    format!("v1/authority/machine-names/{name}")
}
