//! The fleet: its authority, the passphrases that let machines in, and the machines.
//!
//! All of it lies in the object store, shared by the fleet's receivers; only `authority.key`, the file that unseals the
//! authority's private key, lies in each receiver's data directory.
//!
//! ```text
//! v1/authority/root                  the authority: certificate, sealed private key; created once, if absent
//! v1/authority/passphrases/<id>      what a passphrase is worth: hash of its secret, expiry, uses left; compare-and-swap
//! v1/authority/machine-names/<name>  which machine bears a name; created once, if absent
//! v1/authority/machines/<id>         a machine's certificates, and which are revoked; compare-and-swap
//! v1/authority/receivers/<id>        what a receiver says of itself: addresses, load, heartbeat; compare-and-swap
//! ```
//!
//! Promises: two receivers that start at once make one fleet; of concurrent redemptions of a last use exactly one
//! succeeds; a certificate is listed under its machine before it is given out, so that whatever is out can be revoked.
//!
//! Never: keeps a passphrase's secret or an unsealed key in the store, or prints one.

pub mod authority;
pub mod control;
pub mod format;
mod key_file;
pub mod machines;
mod object;
pub mod passphrase;
pub mod rate;
pub mod receivers;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use common::clock::Clock;
use common::error::{Dispose, Disposition};
use common::format::FormatError;
use common::ids::{FleetId, MachineId};
use common::net::identity::{NameError, PeerIdentity, Role};
use common::net::passphrase::PassphraseId;
use common::net::secret_file::FileError;
use common::rng::RngError;

use crate::store::{Store, StoreError};
use authority::Authority;
use machines::Machines;
use passphrase::Passphrases;
use rate::RegisterLimiter;

/// How long an answer about a machine's certificates is believed: a revocation takes effect within this time.
pub const REVOCATION_LAG: Duration = Duration::from_secs(15);
/// Machines whose answers are remembered; above that all are asked anew.
const ADMITTED_MAX: usize = 8_192;

/// What can be wrong with a fleet's state, or with what somebody asks of it.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file of the data directory.
    #[error(transparent)]
    File(#[from] FileError),
    /// An object that can't be read as what it should be.
    #[error("object {path}: {source}; restore it from the store's versions or backups")]
    Object {
        /// Its path in the store.
        path: String,
        /// What is wrong.
        source: FormatError,
    },
    /// The store has a fleet and this data directory no key for it.
    #[error(
        "the store holds fleet {fleet}, but {} is missing: copy authority.key from the data directory of one of that \
         fleet's receivers", file.display()
    )]
    KeyMissing {
        /// The store's fleet.
        fleet: FleetId,
        /// Where the key file belongs.
        file: PathBuf,
    },
    /// The key file is another fleet's.
    #[error(
        "{} is the key of fleet {found}, the store holds fleet {expected}: check --store, or copy authority.key from one of \
         that fleet's receivers", file.display()
    )]
    KeyOfAnotherFleet {
        /// The key file.
        file: PathBuf,
        /// The store's fleet.
        expected: FleetId,
        /// The key's.
        found: FleetId,
    },
    /// The key file is not one.
    #[error("{}: {why}; copy it again from another receiver of the fleet, or from a backup", file.display())]
    KeyMalformed {
        /// The key file.
        file: PathBuf,
        /// What was expected and found.
        why: &'static str,
    },
    /// There is a key and no fleet that it is for.
    #[error(
        "{} is the key of fleet {fleet}, but the store at {url} holds no fleet: check --store; to start a new fleet there, \
         move the file away", file.display()
    )]
    StoreWithoutFleet {
        /// The key file.
        file: PathBuf,
        /// Its fleet.
        fleet: FleetId,
        /// The store.
        url: String,
    },
    /// Key and sealed key don't fit.
    #[error(
        "{} does not unseal the authority in {path}: one of the two was changed; restore both from a backup", file.display()
    )]
    Unsealable {
        /// The key file.
        file: PathBuf,
        /// The authority's object.
        path: String,
    },
    /// A certificate request that no certificate is made for.
    #[error("the certificate request is not usable: {0}")]
    Request(String),
    /// The certificate library failed on our own input.
    #[error("can't make a certificate: {0}")]
    Certificate(String),
    /// No randomness.
    #[error(transparent)]
    Random(#[from] RngError),
    /// A name that can't be one.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The passphrase does not let this machine in.
    #[error(transparent)]
    Passphrase(#[from] passphrase::Refused),
    /// Another machine has the name.
    #[error(
        "a machine named {name} is registered already: choose another --name; or, if it is this one anew, run \
         `blockferry-receiver machines revoke {name}` and register again, it keeps its volumes"
    )]
    NameTaken {
        /// The name.
        name: String,
    },
    /// No machine has the name.
    #[error("no machine named {name} is registered: `blockferry-receiver machines list` shows those that are")]
    NoSuchMachine {
        /// The name.
        name: String,
    },
    /// The certificate was revoked, or is not known.
    #[error(
        "the certificate {serial} of machine {name} is revoked: register the machine again with a new passphrase file"
    )]
    Revoked {
        /// The machine.
        name: String,
        /// The certificate's serial.
        serial: String,
    },
    /// A certificate of another role, or of another fleet.
    #[error("the certificate is for the role {found}, expected {expected}")]
    WrongRole {
        /// Expected.
        expected: Role,
        /// Found.
        found: Role,
    },
    /// Others changed the same object all the time.
    #[error("object {path} is being changed by others all the time: try again")]
    Contended {
        /// Its path in the store.
        path: String,
    },
}

impl Dispose for FleetError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Object { source, .. } => source.disposition(),
            Self::Unsealable { .. } => Disposition::Corrupt,
            Self::Contended { .. } | Self::Random(_) => Disposition::Retry,
            Self::Certificate(_) => Disposition::Bug,
            _ => Disposition::BadInput,
        }
    }
}

/// A fleet, opened: what a receiver, and its `passphrase`, `machines` and `operator` commands, work with.
pub struct Fleet {
    /// Issues certificates.
    pub authority: Authority,
    /// Lets machines in.
    pub passphrases: Passphrases,
    /// Knows the machines.
    pub machines: Machines,
    limiter: Mutex<RegisterLimiter>,
    started: tokio::time::Instant,
    admitted: Mutex<HashMap<MachineId, Admitted>>,
}

/// A machine's certificates as they were a moment ago.
struct Admitted {
    until: tokio::time::Instant,
    machine: format::Machine,
}

impl Fleet {
    /// Opens the fleet in `store` with the key in `data_dir`; makes one where the store has none.
    ///
    /// # Errors
    /// [`FleetError`]; its text names the file or object and the next step.
    pub async fn open_or_create(store: &Store, data_dir: &Path, clock: Clock) -> Result<Self, FleetError> {
        let authority = Authority::open_or_create(store, data_dir, clock.clone()).await?;
        Ok(Self {
            authority,
            passphrases: Passphrases::new(store.clone(), clock.clone()),
            machines: Machines::new(store.clone(), clock),
            limiter: Mutex::new(RegisterLimiter::default()),
            started: tokio::time::Instant::now(),
            admitted: Mutex::default(),
        })
    }

    /// The fleet.
    #[must_use]
    pub fn id(&self) -> FleetId {
        self.authority.fleet()
    }

    /// May this peer, whose certificate TLS verified, act as a machine? Asks the store at most once in
    /// [`REVOCATION_LAG`] for each machine. Called for each control call and each data connection.
    ///
    /// # Errors
    /// [`FleetError::Revoked`], [`FleetError::WrongRole`]; the store's, where it could not be asked.
    pub async fn admit(&self, peer: &PeerIdentity) -> Result<MachineId, FleetError> {
        let machine = peer.machine().ok_or(FleetError::WrongRole { expected: Role::Machine, found: peer.role })?;
        let now = tokio::time::Instant::now();
        let known = |admitted: &HashMap<MachineId, Admitted>| {
            admitted.get(&machine).filter(|known| known.until > now).map(|known| known.machine.has_active(peer.serial))
        };
        // A certificate that is not on the remembered list may have been issued since: only "yes" is believed.
        if known(&self.admitted.lock().unwrap_or_else(PoisonError::into_inner)) == Some(true) {
            return Ok(machine);
        }
        let refused = || FleetError::Revoked { name: peer.name.clone(), serial: peer.serial.to_string() };
        let found = self.machines.get(machine).await?.ok_or_else(refused)?;
        if !found.has_active(peer.serial) {
            self.forget(machine);
            return Err(refused());
        }
        let mut admitted = self.admitted.lock().unwrap_or_else(PoisonError::into_inner);
        if admitted.len() >= ADMITTED_MAX {
            admitted.clear();
        }
        admitted.insert(machine, Admitted { until: now + REVOCATION_LAG, machine: found });
        Ok(machine)
    }

    fn forget(&self, machine: MachineId) {
        self.admitted.lock().unwrap_or_else(PoisonError::into_inner).remove(&machine);
    }

    /// May an address try to register now? Counts the try.
    ///
    /// # Errors
    /// How long it should wait.
    pub fn may_register(&self, from: Option<IpAddr>) -> Result<(), Duration> {
        let now = self.started.elapsed();
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner).try_take(from, now)
    }
}

fn passphrase_path(id: PassphraseId) -> String {
    format!("v1/authority/passphrases/{id}")
}
