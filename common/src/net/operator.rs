//! A person's certificate, and what can be asked with it.
//!
//! The file is what `blockferry-receiver operator create` writes: a key in PKCS #8, its certificate, and the authority's, all in PEM.
//! Nothing is believed that the authority in the file did not sign, so the file is all that a person needs beside an address.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

use super::grpc::{self, ConnectError};
use super::identity::{PeerIdentity, Role};
use super::resolve::HostPort;
use super::secret_file::{self, FileError};
use super::tls::{self, ALPN_CONTROL, Credentials, FleetAuthority, TlsError};
use super::{pb, tls::PeerRefused};
use crate::error::{Dispose, Disposition};

/// Longest wait for an answer: the receiver reads its store meanwhile.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);
/// Largest answer: 64 receivers and 1,000 volumes take less than 1 MiB.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// Why a receiver did not answer a person.
#[derive(Debug, thiserror::Error)]
pub enum OperatorCallError {
    /// The file with key and certificate.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is there, and is not such a file.
    #[error(
        "{}: {why}; name a file that `blockferry-receiver operator create` wrote", path.display()
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// No connection to a receiver of the fleet.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Key or certificates can't be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The receiver said no, or could not.
    #[error("{host} did not answer: {reason}")]
    Refused {
        /// The receiver.
        host: HostPort,
        /// Its or the transport's words.
        reason: String,
    },
}

impl Dispose for OperatorCallError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::File(error) => error.disposition(),
            Self::Connect(error) => error.disposition(),
            Self::Malformed { .. } | Self::Tls(_) => Disposition::BadInput,
            Self::Refused { .. } => Disposition::Retry,
        }
    }
}

/// A person's key and certificate. Prints no key.
pub struct OperatorFile {
    authority: FleetAuthority,
    credentials: Credentials,
    identity: PeerIdentity,
}

impl std::fmt::Debug for OperatorFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OperatorFile({} {})", self.identity.role, self.identity.name)
    }
}

impl OperatorFile {
    /// Reads a file that `operator create` wrote.
    ///
    /// # Errors
    /// [`OperatorCallError::File`], [`OperatorCallError::Malformed`].
    pub fn load(path: &Path) -> Result<Self, OperatorCallError> {
        let bytes = secret_file::read(path)?;
        Self::parse(&bytes).map_err(|why| OperatorCallError::Malformed { path: path.into(), why })
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let key =
            PrivatePkcs8KeyDer::from_pem_slice(bytes).map_err(|error| format!("no private key in it: {error}"))?;
        let key = Zeroizing::new(key.secret_pkcs8_der().to_vec());
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(bytes).collect();
        let chain: Vec<CertificateDer<'static>> =
            found.map_err(|error| format!("a certificate can't be read: {error}"))?;
        let [own, ca] = chain.as_slice() else {
            return Err(format!("expected a certificate and its authority's, found {} certificates", chain.len()));
        };
        let identity = PeerIdentity::from_certificate(own).map_err(|error| error.to_string())?;
        if !matches!(identity.role, Role::Operator | Role::Administrator) {
            return Err(format!("the certificate's role is {}, expected operator or administrator", identity.role));
        }
        let authority = FleetAuthority { fleet: identity.fleet, ca: ca.clone() };
        Ok(Self { authority, credentials: Credentials::new(chain, key), identity })
    }

    /// Whom the certificate stands for.
    #[must_use]
    pub fn identity(&self) -> &PeerIdentity {
        &self.identity
    }
}

/// Asks the receiver at `host` how it, its fleet and its volumes stand.
///
/// # Errors
/// [`OperatorCallError`].
pub async fn status(host: &HostPort, file: &OperatorFile) -> Result<pb::GetStatusReply, OperatorCallError> {
    let config = tls::client_config(&file.authority, Some(&file.credentials), ALPN_CONTROL)?;
    let channel = grpc::connect(host, config.into()).await?;
    let mut request = tonic::Request::new(pb::GetStatusRequest {});
    request.set_timeout(CALL_TIMEOUT);
    let mut client = pb::control_client::ControlClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
    let reply = client.get_status(request).await;
    reply.map(tonic::Response::into_inner).map_err(|status| {
        let reason = match PeerRefused::find(&status) {
            Some(refused) => refused.to_string(),
            None if status.code() == tonic::Code::Unimplemented => {
                "it is of an older version, which does not know the question: update it, or ask the store with --store"
                    .into()
            }
            None => status.message().to_owned(),
        };
        OperatorCallError::Refused { host: host.clone(), reason }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_persons_file_is_refused_with_what_is_wrong() {
        for (text, word) in [
            ("", "private key"),
            ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "private key"),
            ("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "found 0 certificates"),
        ] {
            let error = OperatorFile::parse(text.as_bytes()).expect_err("refused");
            assert!(error.contains(word), "{error}");
        }
    }
}
