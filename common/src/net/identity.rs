//! Who a certificate of the fleet stands for: its profile, made and read in one place.
//!
//! A certificate is for one role and none stands for another:
//!
//! | field | machine, operator, administrator | receiver |
//! | --- | --- | --- |
//! | subject | common name alone: the peer's name | the same |
//! | subject alternative name | `blockferry://<fleet>/<role>/<id>` alone | the same, and `receiver.blockferry.internal` |
//! | extended key usage | client authentication | server authentication |
//! | serial | 16 bytes, the first from 0x40 to 0x7f | the same |
//!
//! Reading refuses whatever departs from that. It verifies no signature: rustls did, before the certificate got here.

use rustls_pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;

use crate::clock::UnixMillis;
use crate::error::{Dispose, Disposition};
use crate::ids::{FleetId, MachineId, ReceiverId};
use crate::limits::NAME_BYTES_MAX;

/// The name under which every receiver's certificate is valid; all clients connect under it.
pub const SERVER_NAME: &str = "receiver.blockferry.internal";
const URI_SCHEME: &str = "blockferry://";

/// What a certificate's holder may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// A sender: registers, and writes its own volumes.
    Machine,
    /// Reads status.
    Operator,
    /// Changes policies too.
    Administrator,
    /// The server's side.
    Receiver,
}

impl Role {
    const ALL: [Self; 4] = [Self::Machine, Self::Operator, Self::Administrator, Self::Receiver];

    /// The role's name in certificates, commands and messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Machine => "machine",
            Self::Operator => "operator",
            Self::Administrator => "administrator",
            Self::Receiver => "receiver",
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Role {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|role| role.name() == text)
            .ok_or(IdentityError("the role is none of machine, operator, administrator, receiver"))
    }
}

/// A certificate's serial number: what revocation names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CertSerial(pub [u8; 16]);

impl CertSerial {
    /// A serial of 16 random bytes, made positive and exactly 16 bytes long in DER.
    #[must_use]
    pub fn from_random(mut random: [u8; 16]) -> Self {
        random[0] = random[0] & 0x3f | 0x40;
        Self(random)
    }
}

impl std::fmt::Display for CertSerial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for CertSerial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// A certificate that is not of the fleet's profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a certificate of a Blockferry fleet: {0}")]
pub struct IdentityError(&'static str);

impl Dispose for IdentityError {
    fn disposition(&self) -> Disposition {
        Disposition::BadInput
    }
}

/// A name that machines, receivers and operators can't have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" can't be a name: expected 1 to {NAME_BYTES_MAX} letters, digits, '.', '_' and '-', the first a letter or digit"
)]
pub struct NameError(String);

impl Dispose for NameError {
    fn disposition(&self) -> Disposition {
        Disposition::BadInput
    }
}

/// Checks the name of a machine, receiver or operator: what is taken is safe in object paths, metrics and logs.
///
/// # Errors
/// [`NameError`].
pub fn check_name(name: &str) -> Result<(), NameError> {
    let first = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    let all = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
    if first && all && name.len() <= NAME_BYTES_MAX {
        Ok(())
    } else {
        Err(NameError(name.chars().take(NAME_BYTES_MAX).collect()))
    }
}

/// Whom a verified certificate stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The fleet whose authority signed it.
    pub fleet: FleetId,
    /// The one role that it is for.
    pub role: Role,
    /// The machine's, receiver's or operator's id.
    pub id: [u8; 16],
    /// Its name.
    pub name: String,
    /// The certificate's serial number.
    pub serial: CertSerial,
    /// From when on the certificate is no longer valid.
    pub not_after: UnixMillis,
}

impl PeerIdentity {
    /// The machine, where the role is machine.
    #[must_use]
    pub fn machine(&self) -> Option<MachineId> {
        (self.role == Role::Machine).then_some(MachineId(self.id))
    }

    /// The receiver, where the role is receiver.
    #[must_use]
    pub fn receiver(&self) -> Option<ReceiverId> {
        (self.role == Role::Receiver).then_some(ReceiverId(self.id))
    }

    /// Reads a leaf certificate whose signature was verified.
    ///
    /// # Errors
    /// [`IdentityError`] for whatever is not exactly of the profile.
    pub fn from_certificate(der: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let (rest, cert) = x509_parser::parse_x509_certificate(der).map_err(|_| IdentityError("it is no X.509"))?;
        if !rest.is_empty() {
            return Err(IdentityError("bytes follow it"));
        }
        if cert.is_ca() {
            return Err(IdentityError("it is an authority's"));
        }
        let serial: [u8; 16] =
            cert.raw_serial().try_into().map_err(|_| IdentityError("its serial number has not 16 bytes"))?;
        let names =
            cert.subject_alternative_name().map_err(|_| IdentityError("its alternative names are malformed"))?;
        let names = names.ok_or(IdentityError("it has no alternative names"))?;
        let (mut uri, mut dns) = (None, None);
        for name in &names.value.general_names {
            let slot = match name {
                GeneralName::URI(text) => (&mut uri, *text),
                GeneralName::DNSName(text) => (&mut dns, *text),
                _ => return Err(IdentityError("it has an alternative name of a foreign kind")),
            };
            if slot.0.replace(slot.1).is_some() {
                return Err(IdentityError("it has two alternative names of one kind"));
            }
        }
        let (fleet, role, id) = parse_uri(uri.ok_or(IdentityError("it has no blockferry:// name"))?)?;
        match (role, dns) {
            (Role::Receiver, Some(SERVER_NAME)) => {}
            (Role::Receiver, _) => return Err(IdentityError("a receiver's must bear the receivers' host name")),
            (_, None) => {}
            (_, Some(_)) => return Err(IdentityError("only a receiver's may bear a host name")),
        }
        let usage = cert.extended_key_usage().map_err(|_| IdentityError("its key usage is malformed"))?;
        let usage = usage.ok_or(IdentityError("it has no extended key usage"))?.value;
        if usage.any || usage.server_auth != (role == Role::Receiver) || usage.client_auth == usage.server_auth {
            return Err(IdentityError("its key usage is not that of its role"));
        }
        let mut subject = cert.subject().iter_common_name();
        let name = match (subject.next().map(|name| name.as_str()), subject.next()) {
            (Some(Ok(name)), None) if check_name(name).is_ok() => name.to_owned(),
            _ => return Err(IdentityError("its subject is not one well-formed common name")),
        };
        let not_after = UnixMillis(cert.validity().not_after.timestamp().saturating_mul(1_000));
        Ok(Self { fleet, role, id, name, serial: CertSerial(serial), not_after })
    }

    /// The parameters from which the authority makes this identity's certificate, valid from `not_before`.
    ///
    /// # Errors
    /// The certificate library's, where a name can't be encoded.
    pub fn certificate_params(&self, not_before: UnixMillis) -> Result<rcgen::CertificateParams, rcgen::Error> {
        let uri = format!("{URI_SCHEME}{}/{}/{}", self.fleet, self.role, uuid::Uuid::from_bytes(self.id));
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        let mut params = rcgen::CertificateParams::default();
        params.not_before = epoch + since_1970(not_before);
        params.not_after = epoch + since_1970(self.not_after);
        params.serial_number = Some(rcgen::SerialNumber::from_slice(&self.serial.0));
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, self.name.as_str());
        params.subject_alt_names = vec![rcgen::SanType::URI(uri.try_into()?)];
        params.is_ca = rcgen::IsCa::ExplicitNoCa;
        params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        if self.role == Role::Receiver {
            params.subject_alt_names.push(rcgen::SanType::DnsName(SERVER_NAME.try_into()?));
            params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
        } else {
            params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        }
        Ok(params)
    }
}

/// The parameters of a fleet's authority: a certificate that signs leaves and nothing else.
#[must_use]
pub fn authority_params(fleet: FleetId, not_before: UnixMillis, not_after: UnixMillis) -> rcgen::CertificateParams {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let mut params = rcgen::CertificateParams::default();
    params.not_before = epoch + since_1970(not_before);
    params.not_after = epoch + since_1970(not_after);
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, format!("Blockferry fleet {fleet}"));
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
    params
}

/// The time of a certificate as its distance from 1970: whole seconds, as X.509 has them; nothing earlier.
fn since_1970(time: UnixMillis) -> std::time::Duration {
    std::time::Duration::from_secs(u64::try_from(time.0 / 1_000).unwrap_or(0))
}

fn parse_uri(uri: &str) -> Result<(FleetId, Role, [u8; 16]), IdentityError> {
    let malformed = IdentityError("its blockferry:// name is malformed");
    let rest = uri.strip_prefix(URI_SCHEME).ok_or(malformed)?;
    let mut parts = rest.split('/');
    let (Some(fleet), Some(role), Some(id), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return Err(malformed);
    };
    let fleet: FleetId = fleet.parse().map_err(|_| malformed)?;
    let role: Role = role.parse()?;
    let id: MachineId = id.parse().map_err(|_| malformed)?;
    // One spelling only: what is compared as text anywhere must not have two.
    if uri != format!("{URI_SCHEME}{fleet}/{role}/{id}") || fleet.is_nil() || id.is_nil() {
        return Err(malformed);
    }
    Ok((fleet, role, id.0))
}
