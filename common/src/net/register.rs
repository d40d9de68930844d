//! How a machine becomes a member of a fleet, the machine's side.
//!
//! 1. The key is made and stored ([`MachineKey::load_or_create`]).
//! 2. TLS to the receiver: it must show an authority whose fingerprint is the passphrase file's, and a certificate for the
//!    role receiver signed by it. Nothing was said before.
//! 3. `Register` with the secret, the machine's name and a request for the key.
//! 4. What comes back is checked against the passphrase file and the key, and stored ([`Enrolment::store`]).
//!
//! A run that was cut short at any point is repeated as it was: the same key, name and passphrase are one registration.

use std::time::Duration;

use rustls_pki_types::CertificateDer;

use super::enrolment::{Enrolment, EnrolmentError, MachineKey};
use super::grpc::{self, ConnectError};
use super::passphrase::PassphraseFile;
use super::pb;
use super::resolve::HostPort;
use super::tls::{self, Fingerprint, FleetAuthority, TlsError};
use super::version;
use crate::error::{Dispose, Disposition};
use crate::ids::{FleetId, MachineId};

/// Longest wait for the receiver's answer: it reads and writes its store meanwhile.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Receivers that a fleet may name.
const RECEIVERS_MAX: usize = 64;

/// Why a machine was not registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// No connection to a receiver of the right fleet.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Keys or certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Keys or files.
    #[error(transparent)]
    Enrolment(#[from] EnrolmentError),
    /// The receiver said no, and why.
    #[error("{host} refused the registration: {reason}")]
    Refused {
        /// The receiver.
        host: HostPort,
        /// Its words, which name the next step.
        reason: String,
    },
    /// The receiver did not answer, or could not now.
    #[error("{host} could not register this machine now: {reason}; try again, the passphrase is still good")]
    Unavailable {
        /// The receiver.
        host: HostPort,
        /// Its or the transport's words.
        reason: String,
    },
    /// The receiver's answer doesn't hold together.
    #[error("{host} answered the registration with what can't be used: {reason}")]
    Answer {
        /// The receiver.
        host: HostPort,
        /// What is wrong.
        reason: String,
    },
}

impl Dispose for RegisterError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Connect(error) => error.disposition(),
            Self::Tls(error) => error.disposition(),
            Self::Enrolment(error) => error.disposition(),
            Self::Refused { .. } | Self::Answer { .. } => Disposition::BadInput,
            Self::Unavailable { .. } => Disposition::Retry,
        }
    }
}

/// Registers the machine `name` with the receiver at `host`; one attempt. The result is not stored yet. Safe to cancel,
/// and to repeat with the same key.
///
/// # Errors
/// [`RegisterError`]; its text names the next step.
pub async fn register(
    host: &HostPort,
    passphrase: &PassphraseFile,
    name: &str,
    key: MachineKey,
) -> Result<Enrolment, RegisterError> {
    let config = tls::fingerprint_client_config(passphrase.fleet, passphrase.fingerprint)?;
    let channel = grpc::connect(host, config.into()).await?;
    let request = pb::RegisterRequest {
        protocol_min: version::OURS.min,
        protocol_max: version::OURS.max,
        passphrase_id: passphrase.id.0.to_vec().into(),
        secret: passphrase.secret.to_vec().into(),
        machine_name: name.to_owned(),
        csr_der: key.request()?.into(),
        software_version: env!("CARGO_PKG_VERSION").into(),
    };
    let mut request = tonic::Request::new(request);
    request.set_timeout(CALL_TIMEOUT);
    let reply = pb::control_client::ControlClient::new(channel).register(request).await;
    let reply = reply.map_err(|status| refused(host, &status))?.into_inner();
    enrolled(host, passphrase, name, key, reply).map_err(|reason| RegisterError::Answer { host: host.clone(), reason })
}

fn refused(host: &HostPort, status: &tonic::Status) -> RegisterError {
    use tonic::Code;
    let (host, reason) = (host.clone(), status.message().to_owned());
    match status.code() {
        Code::Unavailable
        | Code::ResourceExhausted
        | Code::DeadlineExceeded
        | Code::Cancelled
        | Code::Aborted
        | Code::Internal
        | Code::Unknown => RegisterError::Unavailable { host, reason },
        _ => RegisterError::Refused { host, reason },
    }
}

fn enrolled(
    host: &HostPort,
    passphrase: &PassphraseFile,
    name: &str,
    key: MachineKey,
    reply: pb::RegisterReply,
) -> Result<Enrolment, String> {
    let ours = version::OURS;
    if !(ours.min..=ours.max).contains(&reply.protocol) {
        return Err(format!("protocol version {}, expected {ours}", reply.protocol));
    }
    let ca = CertificateDer::from(reply.ca_der.to_vec());
    if Fingerprint::of(&ca) != passphrase.fingerprint {
        return Err("the authority in its answer is not the passphrase file's".into());
    }
    let fleet = FleetId(id(&reply.fleet_id, "fleet")?);
    if fleet != passphrase.fleet {
        return Err(format!("fleet {fleet}, expected {}", passphrase.fleet));
    }
    let chain = reply.certificate_chain_der.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
    let mut receivers = vec![host.clone()];
    for text in reply.receivers.iter().take(RECEIVERS_MAX) {
        let receiver: HostPort = text.parse().map_err(|error| format!("among its receivers {error}"))?;
        if !receivers.contains(&receiver) {
            receivers.push(receiver);
        }
    }
    let enrolment = Enrolment::new(key, chain, FleetAuthority { fleet, ca }, receivers)?;
    if enrolment.machine() != MachineId(id(&reply.machine_id, "machine")?) || enrolment.identity().name != name {
        return Err("the certificate is for another machine".into());
    }
    Ok(enrolment)
}

fn id(bytes: &[u8], what: &str) -> Result<[u8; 16], String> {
    bytes.try_into().map_err(|_| format!("its {what} id has {} bytes, expected 16", bytes.len()))
}
