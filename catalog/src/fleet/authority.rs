//! The fleet's authority: made once, kept in the store with its private key sealed, and what signs all certificates.
//!
//! Making a fleet, in an order that a kill anywhere survives: a new key goes to `authority.key.new`; the sealed
//! authority is put under `v1/authority/root` if nothing is there; the key gets its name `authority.key`. Of two receivers
//! that do this at once on one store one wins; the other removes its key and says whose key it needs. A start that finds
//! `authority.key.new` goes on where the last one stopped, with the same key.

use std::path::Path;
use std::time::Duration;

use common::clock::{Clock, UnixMillis};
use common::ids::{FleetId, MachineId, Nonce, ReceiverId};
use common::net::enrolment::pem;
use common::net::identity::{CertSerial, PeerIdentity, Role, authority_params, check_name};
use common::net::secret_file;
use common::net::tls::{Credentials, Fingerprint, FleetAuthority};
use common::rng;
use rcgen::{CertificateSigningRequestParams, Issuer, KeyPair, PublicKeyData};
use ring::aead;
use rustls_pki_types::CertificateDer;
use zeroize::Zeroizing;

use super::FleetError;
use super::format::Root;
use super::key_file::AuthorityKey;
use super::object;
use crate::store::Store;

/// Where the authority lies.
const ROOT_PATH: &str = "v1/authority/root";
/// Binds the seal to its purpose.
const SEAL_CONTEXT: &[u8] = b"blockferry authority key v1\0";
/// Validity of the authority's certificate: ten years.
const AUTHORITY_TTL: Duration = Duration::from_secs(3_652 * 86_400);
/// Certificates are valid from a little before they are made, for peers whose clocks are behind.
const CLOCK_SKEW: Duration = Duration::from_secs(3_600);
/// Validity of a machine's certificate: long enough for a machine that is off for weeks, renewed long before.
pub const MACHINE_TTL: Duration = Duration::from_secs(30 * 86_400);
/// Validity of a receiver's certificate, which it makes itself at each start, and again each day.
pub const RECEIVER_TTL: Duration = Duration::from_secs(7 * 86_400);
/// Validity of an operator's certificate.
pub const OPERATOR_TTL: Duration = Duration::from_secs(90 * 86_400);
/// Largest certificate request.
const REQUEST_BYTES_MAX: usize = 4_096;

/// The authority, unsealed. Prints nothing.
pub struct Authority {
    authority: FleetAuthority,
    issuer: Issuer<'static, KeyPair>,
    clock: Clock,
}

/// A certificate just made.
pub struct Issued {
    /// What it says.
    pub identity: PeerIdentity,
    /// It, and the authority's after it.
    pub chain: Vec<CertificateDer<'static>>,
}

/// A certificate request whose signature was verified: the asker holds the private key.
pub struct VerifiedRequest {
    request: CertificateSigningRequestParams,
    public_key: Vec<u8>,
}

impl VerifiedRequest {
    /// Parses a PKCS #10 request and verifies its signature. Names and extensions in it are ignored.
    ///
    /// # Errors
    /// [`FleetError::Request`].
    pub fn parse(der: &[u8]) -> Result<Self, FleetError> {
        if der.len() > REQUEST_BYTES_MAX {
            return Err(FleetError::Request(format!("it has {} bytes, at most {REQUEST_BYTES_MAX}", der.len())));
        }
        let request = CertificateSigningRequestParams::from_der(&der.to_vec().into())
            .map_err(|error| FleetError::Request(error.to_string()))?;
        let public_key = request.public_key.subject_public_key_info();
        Ok(Self { request, public_key })
    }

    /// The public key (SubjectPublicKeyInfo, DER).
    #[must_use]
    pub fn public_key(&self) -> &[u8] {
        &self.public_key
    }
}

impl Authority {
    /// Opens the fleet's authority in `store` with the key in `data_dir`; makes a fleet where neither is there.
    ///
    /// # Errors
    /// [`FleetError`], each naming file or object and the next step.
    pub async fn open_or_create(store: &Store, data_dir: &Path, clock: Clock) -> Result<Self, FleetError> {
        let (file, file_new) = (AuthorityKey::path(data_dir), AuthorityKey::path_new(data_dir));
        let root = object::read::<Root>(store, ROOT_PATH).await?.map(|(root, _)| root);
        match (AuthorityKey::read(&file)?, root) {
            (Some(key), Some(root)) => Self::unseal(&key, &file, &root, clock),
            (Some(key), None) => Err(FleetError::StoreWithoutFleet { file, fleet: key.fleet, url: store.url().into() }),
            // A start that was killed after it had made the fleet and before the key got its name?
            (None, Some(root)) => match AuthorityKey::read(&file_new)? {
                Some(key) if key.fleet == root.fleet => {
                    secret_file::rename(&file_new, &file)?;
                    Self::unseal(&key, &file, &root, clock)
                }
                _ => Err(FleetError::KeyMissing { fleet: root.fleet, file }),
            },
            (None, None) => Self::create(store, data_dir, clock).await,
        }
    }

    async fn create(store: &Store, data_dir: &Path, clock: Clock) -> Result<Self, FleetError> {
        let (file, file_new) = (AuthorityKey::path(data_dir), AuthorityKey::path_new(data_dir));
        let key = match AuthorityKey::read(&file_new)? {
            // Of a start that was killed. What it put into the store may still arrive there: the key must be the same.
            Some(key) => key,
            None => {
                let (fleet, key) = (FleetId::from_random(rng::random()?), Zeroizing::new(rng::random()?));
                let key = AuthorityKey { fleet, key };
                secret_file::make_dir(data_dir)?;
                key.write(&file_new)?;
                key
            }
        };
        let now = clock.now();
        let pair = KeyPair::generate().map_err(certificate_error)?;
        let params = authority_params(key.fleet, earlier(now, CLOCK_SKEW), later(now, AUTHORITY_TTL));
        let ca = params.self_signed(&pair).map_err(certificate_error)?.der().to_vec();
        let seal_nonce: [u8; 12] = rng::random()?;
        let mut sealed_key = pair.serialize_der();
        sealing_key(&key)
            .seal_in_place_append_tag(
                aead::Nonce::assume_unique_for_key(seal_nonce),
                aead::Aad::from(seal_context(key.fleet, &ca)),
                &mut sealed_key,
            )
            .map_err(|_| FleetError::Certificate("sealing the authority's key failed".into()))?;
        let mut root = Root { nonce: Nonce::ZERO, fleet: key.fleet, created: now, ca, seal_nonce, sealed_key };
        if !object::create(store, ROOT_PATH, root.clone()).await? {
            root = match object::read::<Root>(store, ROOT_PATH).await? {
                Some((stored, _)) if stored.fleet == key.fleet => stored,
                other => {
                    // Another receiver made the fleet in between. Our key is for nothing.
                    secret_file::remove(&file_new)?;
                    let fleet = other.map_or(FleetId::NIL, |(stored, _)| stored.fleet);
                    return Err(FleetError::KeyMissing { fleet, file });
                }
            };
        }
        secret_file::rename(&file_new, &file)?;
        tracing::info!(fleet = %key.fleet, "made a new fleet; keep a copy of {}", file.display());
        Self::unseal(&key, &file, &root, clock)
    }

    fn unseal(key: &AuthorityKey, file: &Path, root: &Root, clock: Clock) -> Result<Self, FleetError> {
        if key.fleet != root.fleet {
            return Err(FleetError::KeyOfAnotherFleet { file: file.into(), expected: root.fleet, found: key.fleet });
        }
        let unsealable = || FleetError::Unsealable { file: file.into(), path: ROOT_PATH.into() };
        let mut sealed = Zeroizing::new(root.sealed_key.clone());
        let pkcs8 = sealing_key(key)
            .open_in_place(
                aead::Nonce::assume_unique_for_key(root.seal_nonce),
                aead::Aad::from(seal_context(root.fleet, &root.ca)),
                &mut sealed,
            )
            .map_err(|_| unsealable())?;
        let pair = KeyPair::try_from(&*pkcs8).map_err(|_| unsealable())?;
        let ca = CertificateDer::from(root.ca.clone());
        let issuer = Issuer::from_ca_cert_der(&ca, pair).map_err(|_| unsealable())?;
        Ok(Self { authority: FleetAuthority { fleet: root.fleet, ca }, issuer, clock })
    }

    /// The fleet.
    #[must_use]
    pub fn fleet(&self) -> FleetId {
        self.authority.fleet
    }

    /// What the fleet's members know of it.
    #[must_use]
    pub fn public(&self) -> &FleetAuthority {
        &self.authority
    }

    /// What passphrase files pin.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.authority.ca)
    }

    /// A machine's certificate for the key in `request`. The caller lists it under the machine before giving it out.
    ///
    /// # Errors
    /// [`FleetError::Name`], [`FleetError::Certificate`].
    pub fn issue_machine(
        &self,
        request: &VerifiedRequest,
        machine: MachineId,
        name: &str,
    ) -> Result<Issued, FleetError> {
        self.issue(&request.request.public_key, Role::Machine, machine.0, name, MACHINE_TTL)
    }

    /// A receiver's key, made in memory and never stored, and its certificate.
    ///
    /// # Errors
    /// [`FleetError::Name`], [`FleetError::Certificate`].
    pub fn issue_receiver(&self, receiver: ReceiverId, name: &str) -> Result<Credentials, FleetError> {
        let pair = KeyPair::generate().map_err(certificate_error)?;
        let issued = self.issue(&pair, Role::Receiver, receiver.0, name, RECEIVER_TTL)?;
        Ok(Credentials::new(issued.chain, Zeroizing::new(pair.serialize_der())))
    }

    /// An operator's or administrator's key and certificates as one PEM text, for `operator create`.
    ///
    /// # Errors
    /// [`FleetError::WrongRole`] for another role, [`FleetError::Name`], [`FleetError::Certificate`].
    pub fn issue_operator(&self, role: Role, name: &str) -> Result<Zeroizing<String>, FleetError> {
        if !matches!(role, Role::Operator | Role::Administrator) {
            return Err(FleetError::WrongRole { expected: Role::Operator, found: role });
        }
        let pair = KeyPair::generate().map_err(certificate_error)?;
        let issued = self.issue(&pair, role, rng::random()?, name, OPERATOR_TTL)?;
        let key = Zeroizing::new(pair.serialize_pem());
        Ok(Zeroizing::new(format!("{}{}", *key, pem(&issued.chain))))
    }

    fn issue(
        &self,
        key: &impl PublicKeyData,
        role: Role,
        id: [u8; 16],
        name: &str,
        ttl: Duration,
    ) -> Result<Issued, FleetError> {
        check_name(name)?;
        let now = self.clock.now();
        let identity = PeerIdentity {
            fleet: self.authority.fleet,
            role,
            id,
            name: name.to_owned(),
            serial: CertSerial::from_random(rng::random()?),
            // Whole seconds, as the certificate has them.
            not_after: UnixMillis(later(now, ttl).0 / 1_000 * 1_000),
        };
        let params = identity.certificate_params(earlier(now, CLOCK_SKEW)).map_err(certificate_error)?;
        let leaf = params.signed_by(key, &self.issuer).map_err(certificate_error)?.der().clone();
        Ok(Issued { identity, chain: vec![leaf, self.authority.ca.clone()] })
    }
}

fn sealing_key(key: &AuthorityKey) -> aead::LessSafeKey {
    let unbound = aead::UnboundKey::new(&aead::AES_256_GCM, key.key.as_slice());
    aead::LessSafeKey::new(unbound.expect("an AES-256 key has 32 bytes, and so has this"))
}

/// What the seal is bound to: its purpose, the fleet and the certificate of the key.
fn seal_context(fleet: FleetId, ca: &[u8]) -> Vec<u8> {
    [SEAL_CONTEXT, &fleet.0, ca].concat()
}

fn certificate_error(error: rcgen::Error) -> FleetError {
    FleetError::Certificate(error.to_string())
}

fn later(time: UnixMillis, by: Duration) -> UnixMillis {
    UnixMillis(time.0.saturating_add(i64::try_from(by.as_millis()).unwrap_or(i64::MAX)))
}

fn earlier(time: UnixMillis, by: Duration) -> UnixMillis {
    UnixMillis(time.0.saturating_sub(i64::try_from(by.as_millis()).unwrap_or(i64::MAX)))
}
