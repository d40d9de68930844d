//! A fleet for tests: an authority that issues whatever certificate a test asks for.

use rcgen::{Issuer, KeyPair, PublicKeyData};
use rustls_pki_types::CertificateDer;
use zeroize::Zeroizing;

use super::identity::{CertSerial, PeerIdentity, Role, authority_params};
use super::tls::{Credentials, FleetAuthority};
use crate::clock::{Clock, UnixMillis};
use crate::ids::FleetId;

pub(super) const HOUR: i64 = 3_600_000;

pub(super) struct TestFleet {
    pub(super) authority: FleetAuthority,
    issuer: Issuer<'static, KeyPair>,
}

impl TestFleet {
    pub(super) fn new() -> Self {
        let fleet = FleetId::from_random(crate::rng::random().expect("random"));
        let key = KeyPair::generate().expect("a key");
        let now = Clock::System.now().0;
        let params = authority_params(fleet, UnixMillis(now - HOUR), UnixMillis(now + HOUR));
        let ca = params.self_signed(&key).expect("signed").der().clone();
        Self { authority: FleetAuthority { fleet, ca }, issuer: Issuer::new(params, key) }
    }

    pub(super) fn identity(&self, role: Role, name: &str) -> PeerIdentity {
        PeerIdentity {
            fleet: self.authority.fleet,
            role,
            id: FleetId::from_random(crate::rng::random().expect("random")).0,
            name: name.into(),
            serial: CertSerial::from_random(crate::rng::random().expect("random")),
            not_after: UnixMillis((Clock::System.now().0 / 1_000) * 1_000 + HOUR),
        }
    }

    pub(super) fn certify(&self, identity: &PeerIdentity, key: &impl PublicKeyData) -> Vec<CertificateDer<'static>> {
        let not_before = UnixMillis(identity.not_after.0 - 2 * HOUR);
        let params = identity.certificate_params(not_before).expect("encodable");
        self.sign(params, key)
    }

    pub(super) fn sign(
        &self,
        params: rcgen::CertificateParams,
        key: &impl PublicKeyData,
    ) -> Vec<CertificateDer<'static>> {
        let leaf = params.signed_by(key, &self.issuer).expect("signed").der().clone();
        vec![leaf, self.authority.ca.clone()]
    }

    pub(super) fn credentials(&self, identity: &PeerIdentity) -> Credentials {
        let key = KeyPair::generate().expect("a key");
        Credentials::new(self.certify(identity, &key), Zeroizing::new(key.serialize_der()))
    }

    pub(super) fn issue(&self, role: Role, name: &str) -> Credentials {
        self.credentials(&self.identity(role, name))
    }
}
