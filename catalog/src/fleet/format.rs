//! Bytes of the fleet's objects. PURE. Byte tables: `docs/formats/fleet.md`.
//!
//! Each is an envelope (magic, version, length, body, checksum) whose body starts with a nonce that is fresh in each
//! version of the object: so a compare-and-swap never meets two equal bodies, and a writer whose reply was lost finds out by
//! reading back whether it won.

use common::clock::UnixMillis;
use common::format::FormatError;
use common::format::envelope::Kind;
use common::format::wire::{Reader, Writer};
use common::ids::{Digest, FleetId, MachineId, Nonce};
use common::limits::NAME_BYTES_MAX;
use common::net::identity::CertSerial;
use common::net::passphrase::PassphraseId;

/// Largest certificate or sealed key.
const DER_BYTES_MAX: usize = 8_192;
/// Certificates that a machine's object lists.
pub const CERTIFICATES_MAX: usize = 64;
/// Bytes of one listed certificate.
const CERTIFICATE_BYTES: usize = 16 + 8 + 1 + 32;
/// The one way in which the authority's key is sealed: AES-256-GCM under the key of `authority.key`.
const SEAL_AES_256_GCM: u8 = 1;

/// A decoded object of the fleet.
pub(super) trait Object: Sized {
    fn encode(&self) -> Vec<u8>;
    fn decode(bytes: &[u8]) -> Result<Self, FormatError>;
    fn nonce(&mut self) -> &mut Nonce;
}

/// `v1/authority/root`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    /// Unique in each version of the object.
    pub nonce: Nonce,
    /// The fleet.
    pub fleet: FleetId,
    /// When it was made.
    pub created: UnixMillis,
    /// The authority's certificate, DER.
    pub ca: Vec<u8>,
    /// Of the seal.
    pub seal_nonce: [u8; 12],
    /// The authority's private key (PKCS #8), sealed; bound to fleet and certificate.
    pub sealed_key: Vec<u8>,
}

const ROOT: Kind = Kind { what: "fleet authority", magic: *b"BFFLTAUT", version: 1, body_bytes_max: 32 << 10 };

impl Object for Root {
    fn encode(&self) -> Vec<u8> {
        let mut body = Writer::with_capacity(2_048);
        body.raw(&self.nonce.0).raw(&self.fleet.0).i64(self.created.0).block(&self.ca);
        body.u8(SEAL_AES_256_GCM).raw(&self.seal_nonce).block(&self.sealed_key);
        ROOT.seal(body.as_slice())
    }

    fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(ROOT.what, ROOT.open(bytes)?);
        let (nonce, fleet) = (Nonce(reader.array()?), FleetId(reader.array()?));
        let created = UnixMillis(reader.i64()?);
        let ca = reader.block("authority certificate", DER_BYTES_MAX)?.to_vec();
        let seal = reader.u8()?;
        if seal != SEAL_AES_256_GCM {
            return Err(FormatError::Invalid { what: "authority seal", found: seal.into() });
        }
        let seal_nonce = reader.array()?;
        let sealed_key = reader.block("sealed authority key", DER_BYTES_MAX)?.to_vec();
        reader.finish()?;
        Ok(Self { nonce, fleet, created, ca, seal_nonce, sealed_key })
    }

    fn nonce(&mut self) -> &mut Nonce {
        &mut self.nonce
    }
}

/// `v1/authority/passphrases/<id>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passphrase {
    /// Unique in each version of the object.
    pub nonce: Nonce,
    /// Which passphrase.
    pub id: PassphraseId,
    /// When it was made.
    pub created: UnixMillis,
    /// From when on it lets nobody in.
    pub expires: UnixMillis,
    /// Machines that it was made for.
    pub uses: u32,
    /// Machines that it still lets in.
    pub uses_left: u32,
    /// Set by an operator.
    pub revoked: bool,
    /// BLAKE3 keyed by `salt`, of the secret.
    pub hash: Digest,
    /// Random.
    pub salt: [u8; 32],
}

const PASSPHRASE: Kind = Kind { what: "passphrase", magic: *b"BFFLTPAS", version: 1, body_bytes_max: 1_024 };

impl Object for Passphrase {
    fn encode(&self) -> Vec<u8> {
        let mut body = Writer::with_capacity(256);
        body.raw(&self.nonce.0).raw(&self.id.0).i64(self.created.0).i64(self.expires.0);
        body.u32(self.uses).u32(self.uses_left).u8(self.revoked.into()).raw(&self.hash.0).raw(&self.salt);
        PASSPHRASE.seal(body.as_slice())
    }

    fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(PASSPHRASE.what, PASSPHRASE.open(bytes)?);
        let found = Self {
            nonce: Nonce(reader.array()?),
            id: PassphraseId(reader.array()?),
            created: UnixMillis(reader.i64()?),
            expires: UnixMillis(reader.i64()?),
            uses: reader.u32()?,
            uses_left: reader.u32()?,
            revoked: flag(&mut reader)?,
            hash: Digest(reader.array()?),
            salt: reader.array()?,
        };
        reader.finish()?;
        if found.uses_left > found.uses {
            return Err(FormatError::Invalid { what: "uses left", found: found.uses_left.into() });
        }
        Ok(found)
    }

    fn nonce(&mut self) -> &mut Nonce {
        &mut self.nonce
    }
}

/// `v1/authority/machine-names/<name>`: never changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineName {
    /// Random.
    pub nonce: Nonce,
    /// Whose name it is.
    pub machine: MachineId,
    /// The name, as in the path.
    pub name: String,
}

const MACHINE_NAME: Kind = Kind { what: "machine name", magic: *b"BFFLTNAM", version: 1, body_bytes_max: 1_024 };

impl Object for MachineName {
    fn encode(&self) -> Vec<u8> {
        let mut body = Writer::with_capacity(256);
        body.raw(&self.nonce.0).raw(&self.machine.0).block(self.name.as_bytes());
        MACHINE_NAME.seal(body.as_slice())
    }

    fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(MACHINE_NAME.what, MACHINE_NAME.open(bytes)?);
        let found = Self {
            nonce: Nonce(reader.array()?),
            machine: MachineId(reader.array()?),
            name: reader.text("machine name", NAME_BYTES_MAX)?,
        };
        reader.finish()?;
        Ok(found)
    }

    fn nonce(&mut self) -> &mut Nonce {
        &mut self.nonce
    }
}

/// One certificate of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedCertificate {
    /// Its serial number.
    pub serial: CertSerial,
    /// End of its validity.
    pub not_after: UnixMillis,
    /// Set by an operator; never unset.
    pub revoked: bool,
    /// BLAKE3 of the public key (SubjectPublicKeyInfo, DER) that it is for.
    pub key: Digest,
}

/// `v1/authority/machines/<id>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Unique in each version of the object.
    pub nonce: Nonce,
    /// The machine.
    pub machine: MachineId,
    /// Its name, for ever.
    pub name: String,
    /// When it was first registered.
    pub created: UnixMillis,
    /// The passphrase of its latest registration.
    pub passphrase: PassphraseId,
    /// Its certificates, oldest first; expired ones may be missing.
    pub certificates: Vec<IssuedCertificate>,
}

const MACHINE: Kind = Kind { what: "machine", magic: *b"BFFLTMAC", version: 1, body_bytes_max: 8 << 10 };

impl Machine {
    /// True where this certificate is the machine's and was not revoked. (Whether it is expired, TLS checks.)
    #[must_use]
    pub fn has_active(&self, serial: CertSerial) -> bool {
        self.certificates.iter().any(|certificate| certificate.serial == serial && !certificate.revoked)
    }

    /// True where some certificate still opens doors at `now`.
    #[must_use]
    pub fn is_active(&self, now: UnixMillis) -> bool {
        self.certificates.iter().any(|certificate| !certificate.revoked && certificate.not_after > now)
    }
}

impl Object for Machine {
    fn encode(&self) -> Vec<u8> {
        let mut body = Writer::with_capacity(512);
        body.raw(&self.nonce.0).raw(&self.machine.0).block(self.name.as_bytes()).i64(self.created.0);
        body.raw(&self.passphrase.0).count(self.certificates.len());
        for certificate in &self.certificates {
            body.raw(&certificate.serial.0).i64(certificate.not_after.0);
            body.u8(certificate.revoked.into()).raw(&certificate.key.0);
        }
        MACHINE.seal(body.as_slice())
    }

    fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(MACHINE.what, MACHINE.open(bytes)?);
        let (nonce, machine) = (Nonce(reader.array()?), MachineId(reader.array()?));
        let name = reader.text("machine name", NAME_BYTES_MAX)?;
        let created = UnixMillis(reader.i64()?);
        let passphrase = PassphraseId(reader.array()?);
        let count = reader.count("machine certificates", CERTIFICATES_MAX, CERTIFICATE_BYTES)?;
        let mut certificates = Vec::with_capacity(count);
        for _ in 0..count {
            certificates.push(IssuedCertificate {
                serial: CertSerial(reader.array()?),
                not_after: UnixMillis(reader.i64()?),
                revoked: flag(&mut reader)?,
                key: Digest(reader.array()?),
            });
        }
        reader.finish()?;
        Ok(Self { nonce, machine, name, created, passphrase, certificates })
    }

    fn nonce(&mut self) -> &mut Nonce {
        &mut self.nonce
    }
}

fn flag(reader: &mut Reader<'_>) -> Result<bool, FormatError> {
    match reader.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(FormatError::Invalid { what: "revoked", found: other.into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> Root {
        Root {
            nonce: Nonce([1; 16]),
            fleet: FleetId([2; 16]),
            created: UnixMillis(3),
            ca: vec![4; 40],
            seal_nonce: [5; 12],
            sealed_key: vec![6; 50],
        }
    }

    fn passphrase() -> Passphrase {
        Passphrase {
            nonce: Nonce([1; 16]),
            id: PassphraseId([2; 16]),
            created: UnixMillis(3),
            expires: UnixMillis(4),
            uses: 5,
            uses_left: 4,
            revoked: true,
            hash: Digest([6; 32]),
            salt: [7; 32],
        }
    }

    fn name() -> MachineName {
        MachineName { nonce: Nonce([1; 16]), machine: MachineId([2; 16]), name: "web-1".into() }
    }

    fn machine() -> Machine {
        let certificate = |n: u8| IssuedCertificate {
            serial: CertSerial([n; 16]),
            not_after: UnixMillis(i64::from(n)),
            revoked: n.is_multiple_of(2),
            key: Digest([n; 32]),
        };
        Machine {
            nonce: Nonce([1; 16]),
            machine: MachineId([2; 16]),
            name: "web-1".into(),
            created: UnixMillis(3),
            passphrase: PassphraseId([4; 16]),
            certificates: vec![certificate(5), certificate(6)],
        }
    }

    fn golden<T: Object + PartialEq + std::fmt::Debug>(value: &T, bytes: &[u8]) {
        assert_eq!(value.encode(), bytes, "the encoding changed: what is stored could not be read any more");
        assert_eq!(&T::decode(bytes).expect("decoded"), value);
        for at in 0..bytes.len() {
            let mut broken = bytes.to_vec();
            broken[at] ^= 0x41;
            assert!(T::decode(&broken).is_err(), "byte {at}");
            assert!(T::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn objects_read_back_as_first_written_and_no_damage_passes() {
        golden(&root(), include_bytes!("golden/root-v1.bin"));
        golden(&passphrase(), include_bytes!("golden/passphrase-v1.bin"));
        golden(&name(), include_bytes!("golden/machine-name-v1.bin"));
        golden(&machine(), include_bytes!("golden/machine-v1.bin"));
    }

    #[test]
    fn a_revoked_certificate_is_not_active() {
        let machine = machine();
        assert!(machine.has_active(CertSerial([5; 16])));
        assert!(!machine.has_active(CertSerial([6; 16])));
        assert!(!machine.has_active(CertSerial([7; 16])));
        assert!(machine.is_active(UnixMillis(4)));
        assert!(!machine.is_active(UnixMillis(5)));
    }
}
