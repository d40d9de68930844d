//! What a machine keeps of its registration, in its state directory.
//!
//! ```text
//! STATE_DIR/identity/machine.key     the machine's private key, PKCS #8 in PEM
//! STATE_DIR/identity/machine.crt     its certificate, and the authority's after it, in PEM
//! STATE_DIR/identity/fleet.crt       the authority's certificate, in PEM
//! STATE_DIR/identity/identity.toml   fleet, machine, name, receivers; written last: with it the registration is whole
//! ```
//!
//! All with mode 0600, each replaced whole and durable. The key is made and stored *before* the machine asks for a
//! certificate, so that a registration whose reply was lost is repeated with the same key, which the receiver takes for
//! the same registration. A renewal keeps the key and replaces `machine.crt` alone: no moment has a key without its
//! certificate.

use std::path::{Path, PathBuf};

use rcgen::PublicKeyData as _;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use zeroize::{Zeroize as _, Zeroizing};

use super::identity::{IdentityError, PeerIdentity, Role, check_name};
use super::resolve::HostPort;
use super::secret_file::{self, FileError};
use super::tls::{Credentials, FleetAuthority};
use crate::error::{Dispose, Disposition};
use crate::ids::{FleetId, MachineId};

const DIR: &str = "identity";
const KEY_FILE: &str = "machine.key";
const CERTIFICATE_FILE: &str = "machine.crt";
const AUTHORITY_FILE: &str = "fleet.crt";
const IDENTITY_FILE: &str = "identity.toml";
const KEY_LABEL: &str = "PRIVATE KEY";
const FORMAT: &str = "1";

/// What is wrong with a stored registration.
#[derive(Debug, thiserror::Error)]
pub enum EnrolmentError {
    /// There is none.
    #[error(
        "{} holds no registration: run `blockferry-sender register -i HOST -P PASSPHRASE_FILE`", state_dir.display()
    )]
    NotRegistered {
        /// The state directory.
        state_dir: PathBuf,
    },
    /// A file can't be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file whose contents are not what it should hold.
    #[error("{}: {why}; restore it from a backup, or register this machine again", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was expected and found.
        why: String,
    },
    /// No key could be made.
    #[error("can't make a key: {0}")]
    Key(String),
}

impl Dispose for EnrolmentError {
    fn disposition(&self) -> Disposition {
        Disposition::BadInput
    }
}

/// The machine's private key. Prints nothing, is wiped when dropped.
pub struct MachineKey {
    pair: rcgen::KeyPair,
}

impl Drop for MachineKey {
    fn drop(&mut self) {
        self.pair.zeroize();
    }
}

impl MachineKey {
    /// A new key (ECDSA over P-256).
    ///
    /// # Errors
    /// [`EnrolmentError::Key`] where the system gives no randomness.
    pub fn generate() -> Result<Self, EnrolmentError> {
        rcgen::KeyPair::generate().map(|pair| Self { pair }).map_err(|error| EnrolmentError::Key(error.to_string()))
    }

    /// The stored key of a registration that may not be complete, or a new one, stored.
    ///
    /// # Errors
    /// [`EnrolmentError`].
    pub fn load_or_create(state_dir: &Path) -> Result<Self, EnrolmentError> {
        let dir = state_dir.join(DIR);
        secret_file::make_dir(&dir)?;
        let path = dir.join(KEY_FILE);
        match Self::load(&path) {
            Err(EnrolmentError::File(FileError::Missing { .. })) => {
                let key = Self::generate()?;
                secret_file::write(&path, key.pem().as_bytes())?;
                Ok(key)
            }
            other => other,
        }
    }

    fn load(path: &Path) -> Result<Self, EnrolmentError> {
        let bytes = secret_file::read(path)?;
        if secret_file::is_open_to_others(path) {
            tracing::warn!(path = %path.display(), "a private key that others may read: chmod 600 it");
        }
        let bad = |why: String| EnrolmentError::Malformed { path: path.into(), why };
        let text = std::str::from_utf8(&bytes).map_err(|_| bad("expected a private key in PEM".into()))?;
        if !text.contains(KEY_LABEL) {
            return Err(bad("expected a private key in PEM".into()));
        }
        let pair = rcgen::KeyPair::from_pem(text).map_err(|error| bad(format!("no usable private key: {error}")))?;
        Ok(Self { pair })
    }

    pub(super) fn pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.pair.serialize_pem())
    }

    /// A certificate request for this key: its public half, signed. Names nothing; the authority would not look.
    ///
    /// # Errors
    /// [`EnrolmentError::Key`].
    pub fn request(&self) -> Result<Vec<u8>, EnrolmentError> {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let request = params.serialize_request(&self.pair).map_err(|error| EnrolmentError::Key(error.to_string()))?;
        Ok(request.der().to_vec())
    }

    /// The public half, as a certificate holds it (SubjectPublicKeyInfo, DER).
    #[must_use]
    pub fn public_key(&self) -> Vec<u8> {
        self.pair.subject_public_key_info()
    }
}

/// A registration: key, certificates, who and where. Prints nothing.
pub struct Enrolment {
    key: MachineKey,
    chain: Vec<CertificateDer<'static>>,
    authority: FleetAuthority,
    identity: PeerIdentity,
    /// The fleet's receivers, as last told; first the one that this machine registered with.
    pub receivers: Vec<HostPort>,
}

impl Enrolment {
    /// A registration from its parts, checked against each other: the certificate is for this key, of the role machine
    /// and of the authority's fleet. (Its signature is checked by TLS at each use.)
    ///
    /// # Errors
    /// Why the parts don't belong together, in words.
    pub fn new(
        key: MachineKey,
        chain: Vec<CertificateDer<'static>>,
        authority: FleetAuthority,
        receivers: Vec<HostPort>,
    ) -> Result<Self, String> {
        let identity = check_parts(&key, &chain, authority.fleet)?;
        Ok(Self { key, chain, authority, identity, receivers })
    }

    /// The fleet and its authority.
    #[must_use]
    pub fn authority(&self) -> &FleetAuthority {
        &self.authority
    }

    /// The fleet.
    #[must_use]
    pub fn fleet(&self) -> FleetId {
        self.authority.fleet
    }

    /// The machine's id.
    #[must_use]
    pub fn machine(&self) -> MachineId {
        MachineId(self.identity.id)
    }

    /// What the certificate says: name, serial, end of validity.
    #[must_use]
    pub fn identity(&self) -> &PeerIdentity {
        &self.identity
    }

    /// The machine's key, for a renewal's request.
    #[must_use]
    pub fn key(&self) -> &MachineKey {
        &self.key
    }

    /// Key and chain for TLS.
    #[must_use]
    pub fn credentials(&self) -> Credentials {
        Credentials::new(self.chain.clone(), Zeroizing::new(self.key.pair.serialize_der()))
    }

    /// Takes a renewed certificate for the same key, in memory; [`Self::store`] keeps it.
    ///
    /// # Errors
    /// In words, where the certificate is not one for this key, machine and fleet; the present one stays.
    pub fn renew(&mut self, chain: Vec<CertificateDer<'static>>) -> Result<(), String> {
        let identity = check_parts(&self.key, &chain, self.authority.fleet)?;
        if identity.id != self.identity.id || identity.name != self.identity.name {
            return Err("the renewed certificate is another machine's".into());
        }
        self.identity = identity;
        self.chain = chain;
        Ok(())
    }

    /// Writes the registration under `state_dir`. After `Ok` it survives a power cut; after an error or a kill the state
    /// directory holds the old one, or one that [`Self::load`] calls incomplete.
    ///
    /// # Errors
    /// [`EnrolmentError::File`].
    pub fn store(&self, state_dir: &Path) -> Result<(), EnrolmentError> {
        let dir = state_dir.join(DIR);
        secret_file::make_dir(&dir)?;
        secret_file::write(&dir.join(KEY_FILE), self.key.pem().as_bytes())?;
        secret_file::write(&dir.join(CERTIFICATE_FILE), pem(&self.chain).as_bytes())?;
        secret_file::write(&dir.join(AUTHORITY_FILE), pem(std::slice::from_ref(&self.authority.ca)).as_bytes())?;
        self.store_receivers(state_dir)
    }

    /// Writes what [`Self::receivers`] holds now under `state_dir`, where the registration is; whole and durable.
    ///
    /// # Errors
    /// [`EnrolmentError::File`].
    pub fn store_receivers(&self, state_dir: &Path) -> Result<(), EnrolmentError> {
        let dir = state_dir.join(DIR);
        let mut text = format!(
            "# Written by blockferry-sender register. Who this machine is; the keys lie beside.\n\
             format = {FORMAT}\nfleet = \"{}\"\nmachine = \"{}\"\nname = \"{}\"\nreceivers = [",
            self.fleet(),
            self.machine(),
            self.identity.name
        );
        for (index, receiver) in self.receivers.iter().enumerate() {
            text.push_str(if index == 0 { "\"" } else { ", \"" });
            text.push_str(&receiver.to_string());
            text.push('"');
        }
        text.push_str("]\n");
        secret_file::write(&dir.join(IDENTITY_FILE), text.as_bytes())?;
        Ok(())
    }

    /// Reads the registration under `state_dir`.
    ///
    /// # Errors
    /// [`EnrolmentError::NotRegistered`] where there is none or only the beginning of one; else which file is wrong.
    pub fn load(state_dir: &Path) -> Result<Self, EnrolmentError> {
        let dir = state_dir.join(DIR);
        let path = dir.join(IDENTITY_FILE);
        let text = match secret_file::read(&path) {
            Err(FileError::Missing { .. }) => {
                return Err(EnrolmentError::NotRegistered { state_dir: state_dir.into() });
            }
            other => other?,
        };
        let stored = parse_identity(&text).map_err(|why| EnrolmentError::Malformed { path: path.clone(), why })?;
        let key = MachineKey::load(&dir.join(KEY_FILE))?;
        let chain_path = dir.join(CERTIFICATE_FILE);
        let chain = certificates(&chain_path)?;
        let ca_path = dir.join(AUTHORITY_FILE);
        let mut authorities = certificates(&ca_path)?;
        let (Some(ca), true) = (authorities.pop(), authorities.is_empty()) else {
            return Err(EnrolmentError::Malformed { path: ca_path, why: "expected one certificate".into() });
        };
        let authority = FleetAuthority { fleet: stored.fleet, ca };
        let enrolment = Self::new(key, chain, authority, stored.receivers)
            .map_err(|why| EnrolmentError::Malformed { path: chain_path.clone(), why })?;
        if enrolment.machine() != stored.machine || enrolment.identity.name != stored.name {
            let why = format!("the certificate is for {}, {path:?} says {}", enrolment.identity.name, stored.name);
            return Err(EnrolmentError::Malformed { path: chain_path, why });
        }
        Ok(enrolment)
    }
}

fn check_parts(key: &MachineKey, chain: &[CertificateDer<'_>], fleet: FleetId) -> Result<PeerIdentity, String> {
    let leaf = chain.first().ok_or("there is no certificate")?;
    let identity = PeerIdentity::from_certificate(leaf).map_err(|error: IdentityError| error.to_string())?;
    if identity.role != Role::Machine {
        return Err(format!("the certificate's role is {}, expected machine", identity.role));
    }
    if identity.fleet != fleet {
        return Err(format!("the certificate is of fleet {}, expected {fleet}", identity.fleet));
    }
    let (_, cert) = x509_parser::parse_x509_certificate(leaf).map_err(|error| error.to_string())?;
    if cert.public_key().raw != key.public_key() {
        return Err("the certificate is for another key".into());
    }
    Ok(identity)
}

/// What `identity.toml` says.
struct Stored {
    fleet: FleetId,
    machine: MachineId,
    name: String,
    receivers: Vec<HostPort>,
}

/// Parses the few lines that [`Enrolment::store`] writes; not TOML at large.
fn parse_identity(bytes: &[u8]) -> Result<Stored, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not text")?;
    let mut lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    let mut next = |key: &str| {
        let line = lines.next().ok_or_else(|| format!("\"{key}\" is missing"))?;
        let (found, value) = line.split_once('=').ok_or_else(|| format!("expected \"{key} = …\""))?;
        if found.trim() == key { Ok(value.trim().to_owned()) } else { Err(format!("expected \"{key} = …\"")) }
    };
    let format = next("format")?;
    if format != FORMAT {
        return Err(format!("its format is {format}, this release reads {FORMAT}"));
    }
    let unquoted = |text: &str| {
        text.strip_prefix('"')
            .and_then(|text| text.strip_suffix('"'))
            .map(str::to_owned)
            .ok_or_else(|| format!("expected quotes round {text}"))
    };
    let fleet = unquoted(&next("fleet")?)?.parse().map_err(|error| format!("fleet: {error}"))?;
    let machine = unquoted(&next("machine")?)?.parse().map_err(|error| format!("machine: {error}"))?;
    let name = unquoted(&next("name")?)?;
    check_name(&name).map_err(|error| error.to_string())?;
    let list = next("receivers")?;
    let list = list.strip_prefix('[').and_then(|list| list.strip_suffix(']')).ok_or("receivers: expected a list")?;
    let receivers = list
        .split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .map(|item| unquoted(item)?.parse::<HostPort>().map_err(|error| format!("receivers: {error}")))
        .collect::<Result<Vec<_>, String>>()?;
    match lines.next() {
        None => Ok(Stored { fleet, machine, name, receivers }),
        Some(_) => Err("it has a line too many".into()),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, EnrolmentError> {
    let bytes = secret_file::read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(EnrolmentError::Malformed { path: path.into(), why: "expected certificates in PEM".into() }),
    }
}

/// Certificates as text that other tools read.
#[must_use]
pub fn pem(certificates: &[CertificateDer<'_>]) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    for certificate in certificates {
        let encoded = base64(certificate);
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        for line in encoded.as_bytes().chunks(64) {
            // Base64 is ASCII, and writing to a String can't fail.
            let _ = writeln!(text, "{}", std::str::from_utf8(line).unwrap_or_default());
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

/// Base64 of public bytes, as PEM wants it.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0_u32, |group, byte| group << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for index in 0..4 {
            let digit = (group >> (18 - 6 * index) & 0x3f) as usize;
            text.push(if index <= chunk.len() { char::from(ALPHABET[digit]) } else { '=' });
        }
    }
    text
}
