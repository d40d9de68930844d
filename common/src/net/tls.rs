//! TLS 1.3 with the fleet's own authority: who may connect to whom, and how each end proves who it is.
//!
//! - A server demands (QUIC) or allows (gRPC) a client certificate, and in either case refuses one that the fleet's
//!   authority did not sign, that is expired, or that is not of the profile in [`super::identity`].
//! - A client takes only a server whose certificate the fleet's authority signed for the role receiver.
//! - A machine that registers has no authority's certificate yet: it takes the authority that its passphrase file's
//!   fingerprint names ([`fingerprint_client_config`]), before it says anything.
//!
//! Sessions are never resumed: a resumed one would skip the certificates, and with them expiry. No early data.

use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore, ServerConfig,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use sha2::Digest as _;
use zeroize::Zeroizing;

use super::identity::{IdentityError, PeerIdentity, Role};
use crate::error::{Dispose, Disposition};
use crate::ids::FleetId;

/// Application protocol of the data streams.
pub const ALPN_DATA: &[u8] = b"blockferry/1";
/// Application protocol of the control calls.
pub const ALPN_CONTROL: &[u8] = b"h2";

/// The one crypto provider of the process: ring.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Makes ring the process's default provider, for the libraries that ask for the default (the HTTP client of the object
/// store). Called at the start of each `main`; calling it again does nothing.
pub fn install_provider() {
    // An error says that one is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// Keys, certificates or settings that TLS can't work with.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A certificate or key that TLS does not take.
    #[error("unusable {what}: {reason}")]
    Unusable {
        /// Which of the parts.
        what: &'static str,
        /// The library's words.
        reason: String,
    },
}

impl Dispose for TlsError {
    fn disposition(&self) -> Disposition {
        Disposition::BadInput
    }
}

/// SHA-256 of the authority's certificate (DER): what a passphrase file pins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// The fingerprint of a certificate.
    #[must_use]
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        Self(sha2::Sha256::digest(certificate.as_ref()).into())
    }
}

impl std::fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::str::FromStr for Fingerprint {
    type Err = crate::ids::ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.strip_prefix("sha256:").unwrap_or("");
        digits.parse::<crate::ids::Digest>().map(|digest| Self(digest.0))
    }
}

/// Why a peer whose TLS was in order is not the one to talk to.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerRefused {
    /// The server's authority is not the one that the passphrase file names.
    #[error(
        "the server's authority is {found}, the passphrase file names {expected}: this is another fleet's receiver, or \
         somebody between; check the address, or get a new passphrase file"
    )]
    WrongFingerprint {
        /// From the passphrase file.
        expected: Fingerprint,
        /// Of the authority that the server showed.
        found: Fingerprint,
    },
    /// The server showed no authority's certificate to compare with.
    #[error(
        "the server showed no authority beside its own certificate: it is no Blockferry receiver; check the address"
    )]
    NoAuthority,
    /// A certificate of the right authority and the wrong role.
    #[error("the peer's certificate is for the role {found}, expected {expected}")]
    WrongRole {
        /// The role that this end talks to.
        expected: Role,
        /// The role in the certificate.
        found: Role,
    },
    /// A certificate whose name says another fleet than its authority's.
    #[error("the peer's certificate is of fleet {found}, expected {expected}")]
    WrongFleet {
        /// This end's fleet.
        expected: FleetId,
        /// The one in the certificate.
        found: FleetId,
    },
    /// Not of the profile.
    #[error(transparent)]
    Malformed(#[from] IdentityError),
}

impl std::fmt::Debug for PeerRefused {
    /// The same words as `Display`: QUIC passes a verifier's error on as its `Debug` text alone.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl Dispose for PeerRefused {
    fn disposition(&self) -> Disposition {
        Disposition::BadInput
    }
}

impl PeerRefused {
    /// The refusal in a chain of errors of TLS, or of what wraps it.
    #[must_use]
    pub fn find(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        let mut at = Some(error);
        while let Some(error) = at {
            if let Some(rustls::Error::InvalidCertificate(CertificateError::Other(other))) = error.downcast_ref()
                && let Some(refused) = other.0.downcast_ref::<Self>()
            {
                return Some(refused.clone());
            }
            // An io::Error hides what it carries from `source`.
            at = match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
                Some(inner) => Some(inner),
                None => error.source(),
            };
        }
        None
    }
}

impl From<PeerRefused> for rustls::Error {
    fn from(refused: PeerRefused) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refused))))
    }
}

/// A key of this process and the certificates that go with it, its own first. Prints nothing, is wiped when dropped.
pub struct Credentials {
    chain: Vec<CertificateDer<'static>>,
    key_pkcs8: Zeroizing<Vec<u8>>,
}

impl Credentials {
    /// A PKCS #8 key and its chain; whether they belong together shows when they are used.
    #[must_use]
    pub fn new(chain: Vec<CertificateDer<'static>>, key_pkcs8: Zeroizing<Vec<u8>>) -> Self {
        Self { chain, key_pkcs8 }
    }

    /// Whom the first certificate stands for.
    ///
    /// # Errors
    /// [`IdentityError`], also where the chain is empty.
    pub fn identity(&self) -> Result<PeerIdentity, IdentityError> {
        PeerIdentity::from_certificate(self.chain.first().unwrap_or(&CertificateDer::from_slice(&[])))
    }

    fn key(&self) -> PrivateKeyDer<'_> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key_pkcs8.as_slice()))
    }

    fn certified(&self) -> Result<CertifiedKey, TlsError> {
        CertifiedKey::from_der(self.chain.clone(), self.key().clone_key(), &provider())
            .map_err(|error| TlsError::Unusable { what: "certificate or key", reason: error.to_string() })
    }
}

/// A server's certificate that can be replaced while it serves: later handshakes see the new one.
pub struct ServerCertificate {
    present: RwLock<Arc<CertifiedKey>>,
}

impl std::fmt::Debug for ServerCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServerCertificate")
    }
}

impl ServerCertificate {
    /// Serves with `credentials`. The chain must hold the authority's certificate after the server's own: a machine that
    /// registers compares its fingerprint.
    ///
    /// # Errors
    /// [`TlsError::Unusable`] where key and certificate don't belong together.
    pub fn new(credentials: &Credentials) -> Result<Arc<Self>, TlsError> {
        Ok(Arc::new(Self { present: RwLock::new(Arc::new(credentials.certified()?)) }))
    }

    /// Serves with `credentials` from now on.
    ///
    /// # Errors
    /// As [`Self::new`]; the present ones stay.
    pub fn replace(&self, credentials: &Credentials) -> Result<(), TlsError> {
        let certified = Arc::new(credentials.certified()?);
        *self.present.write().unwrap_or_else(PoisonError::into_inner) = certified;
        Ok(())
    }
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.present.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

/// Whether a client must show a certificate. One that is shown is verified in either case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientCertificate {
    /// No connection without one (data).
    Required,
    /// A connection without one is made; each call decides (control).
    Optional,
}

/// What a fleet's member needs to know of its authority.
#[derive(Debug, Clone)]
pub struct FleetAuthority {
    /// The fleet.
    pub fleet: FleetId,
    /// The authority's certificate.
    pub ca: CertificateDer<'static>,
}

impl FleetAuthority {
    fn roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let mut roots = RootCertStore::empty();
        roots
            .add(self.ca.clone())
            .map_err(|error| TlsError::Unusable { what: "authority's certificate", reason: error.to_string() })?;
        Ok(Arc::new(roots))
    }
}

/// A server's TLS settings for one application protocol.
///
/// # Errors
/// [`TlsError`] for an authority's certificate that can't be one.
pub fn server_config(
    authority: &FleetAuthority,
    certificate: Arc<ServerCertificate>,
    clients: ClientCertificate,
    alpn: &[u8],
) -> Result<ServerConfig, TlsError> {
    let mut verifier = WebPkiClientVerifier::builder_with_provider(authority.roots()?, provider());
    if clients == ClientCertificate::Optional {
        verifier = verifier.allow_unauthenticated();
    }
    let inner = verifier
        .build()
        .map_err(|error| TlsError::Unusable { what: "authority's certificate", reason: error.to_string() })?;
    let verifier = Arc::new(MemberVerifier { inner, fleet: authority.fleet });
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| TlsError::Unusable { what: "provider", reason: error.to_string() })?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(config)
}

/// A client's TLS settings for one application protocol: takes the fleet's receivers alone, shows `credentials`.
///
/// # Errors
/// [`TlsError`] for certificates or a key that can't be used.
pub fn client_config(
    authority: &FleetAuthority,
    credentials: Option<&Credentials>,
    alpn: &[u8],
) -> Result<ClientConfig, TlsError> {
    let inner = WebPkiServerVerifier::builder_with_provider(authority.roots()?, provider())
        .build()
        .map_err(|error| TlsError::Unusable { what: "authority's certificate", reason: error.to_string() })?;
    client_with(Arc::new(ReceiverVerifier { inner, fleet: authority.fleet }), credentials, alpn)
}

/// TLS settings of a machine that registers: takes a receiver whose authority has this fingerprint, shows nothing.
///
/// # Errors
/// [`TlsError`], in no case that is known.
pub fn fingerprint_client_config(fleet: FleetId, fingerprint: Fingerprint) -> Result<ClientConfig, TlsError> {
    client_with(Arc::new(FingerprintVerifier { fleet, fingerprint, provider: provider() }), None, ALPN_CONTROL)
}

fn client_with(
    verifier: Arc<dyn ServerCertVerifier>,
    credentials: Option<&Credentials>,
    alpn: &[u8],
) -> Result<ClientConfig, TlsError> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| TlsError::Unusable { what: "provider", reason: error.to_string() })?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match credentials {
        Some(credentials) => config
            .with_client_auth_cert(credentials.chain.clone(), credentials.key().clone_key())
            .map_err(|error| TlsError::Unusable { what: "certificate or key", reason: error.to_string() })?,
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}

/// Of a client's certificate: the authority's signature, validity, purpose; then the profile, the fleet and the role.
#[derive(Debug)]
struct MemberVerifier {
    inner: Arc<dyn ClientCertVerifier>,
    fleet: FleetId,
}

impl ClientCertVerifier for MemberVerifier {
    fn offer_client_auth(&self) -> bool {
        self.inner.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.inner.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        let peer = PeerIdentity::from_certificate(end_entity).map_err(PeerRefused::from)?;
        check_fleet(self.fleet, &peer)?;
        if peer.role == Role::Receiver {
            return Err(PeerRefused::WrongRole { expected: Role::Machine, found: peer.role }.into());
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Of a server's certificate: the authority's signature, validity, purpose, host name; then the profile and the role.
#[derive(Debug)]
struct ReceiverVerifier {
    inner: Arc<WebPkiServerVerifier>,
    fleet: FleetId,
}

impl ServerCertVerifier for ReceiverVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        // The role first: of a machine's certificate webpki would only say that the host name is not in it.
        let peer = PeerIdentity::from_certificate(end_entity);
        if let Ok(peer) = &peer {
            check_receiver(peer)?;
        }
        let verified = self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        check_fleet(self.fleet, &peer.map_err(PeerRefused::from)?)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// As [`ReceiverVerifier`], with the authority taken from what the server shows, by its fingerprint.
#[derive(Debug)]
struct FingerprintVerifier {
    fleet: FleetId,
    fingerprint: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for FingerprintVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(shown) = intermediates.last() else { return Err(PeerRefused::NoAuthority.into()) };
        let Some(ca) = intermediates.iter().find(|ca| Fingerprint::of(ca) == self.fingerprint) else {
            let found = Fingerprint::of(shown);
            return Err(PeerRefused::WrongFingerprint { expected: self.fingerprint, found }.into());
        };
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        ReceiverVerifier { inner, fleet: self.fleet }.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        )
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn check_receiver(peer: &PeerIdentity) -> Result<(), PeerRefused> {
    if peer.role == Role::Receiver {
        Ok(())
    } else {
        Err(PeerRefused::WrongRole { expected: Role::Receiver, found: peer.role })
    }
}

fn check_fleet(expected: FleetId, peer: &PeerIdentity) -> Result<(), PeerRefused> {
    if peer.fleet == expected { Ok(()) } else { Err(PeerRefused::WrongFleet { expected, found: peer.fleet }) }
}
