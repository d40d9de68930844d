//! Real endpoints on loopback: who gets in, and what the others are told.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rcgen::KeyPair;
use rustls_pki_types::CertificateDer;
use tokio::net::TcpListener;
use tonic::{Code, Request, Response, Status};
use zeroize::Zeroizing;

use super::enrolment::{Enrolment, EnrolmentError, MachineKey};
use super::grpc::{self, ConnectError, require_machine};
use super::identity::{PeerIdentity, Role};
use super::passphrase::{PassphraseFile, PassphraseId};
use super::pb::control_client::ControlClient;
use super::pb::control_server::{Control, ControlServer};
use super::quic::{self, QuicTuning};
use super::register::{RegisterError, register};
use super::resolve::HostPort;
use super::testing::{HOUR, TestFleet};
use super::tls::{
    self, ALPN_CONTROL, ALPN_DATA, ClientCertificate, Credentials, Fingerprint, PeerRefused, ServerCertificate,
};
use super::{pb, version};
use crate::clock::UnixMillis;

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// Far beyond what any of this takes; only so that a broken test ends.
const DEADLINE: Duration = Duration::from_secs(30);

/// Answers `Hello` with the caller's name and `Register` by certifying whatever is asked.
struct TestControl(Arc<TestFleet>);

#[tonic::async_trait]
impl Control for TestControl {
    async fn get_status(&self, _: Request<pb::GetStatusRequest>) -> Result<Response<pb::GetStatusReply>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn register(&self, request: Request<pb::RegisterRequest>) -> Result<Response<pb::RegisterReply>, Status> {
        let asked = request.into_inner();
        if asked.machine_name == "refused" {
            return Err(Status::permission_denied("the passphrase is used up"));
        }
        let csr = rcgen::CertificateSigningRequestParams::from_der(&asked.csr_der.to_vec().into());
        let identity = self.0.identity(Role::Machine, &asked.machine_name);
        let chain = self.0.certify(&identity, &csr.map_err(|_| Status::invalid_argument("csr"))?.public_key);
        Ok(Response::new(pb::RegisterReply {
            fleet: Vec::new(),
            certificate_chain_der: chain.iter().map(|der| der.to_vec().into()).collect(),
            ca_der: self.0.authority.ca.to_vec().into(),
            machine_id: identity.id.to_vec().into(),
            fleet_id: self.0.authority.fleet.0.to_vec().into(),
            protocol: version::OURS.max,
            receivers: vec!["receiver.example:7".into()],
        }))
    }

    async fn hello(&self, request: Request<pb::HelloRequest>) -> Result<Response<pb::HelloReply>, Status> {
        let peer = require_machine(&request)?;
        Ok(Response::new(pb::HelloReply { fleet: Vec::new(), software_version: peer.name, ..Default::default() }))
    }

    async fn renew(&self, _: Request<pb::RenewRequest>) -> Result<Response<pb::RenewReply>, Status> {
        // Forgets to ask who calls: the server must not let it be reached.
        Ok(Response::new(pb::RenewReply::default()))
    }

    async fn create_volume(
        &self,
        _: Request<pb::CreateVolumeRequest>,
    ) -> Result<Response<pb::CreateVolumeReply>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn list_volumes(&self, _: Request<pb::ListVolumesRequest>) -> Result<Response<pb::ListVolumesReply>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn grow_volume(&self, _: Request<pb::GrowVolumeRequest>) -> Result<Response<pb::GrowVolumeReply>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn get_volume(&self, _: Request<pb::GetVolumeRequest>) -> Result<Response<pb::GetVolumeReply>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}

async fn control_server(fleet: &Arc<TestFleet>, credentials: &Credentials) -> HostPort {
    let listener = TcpListener::bind(LOOPBACK).await.expect("bound");
    let address = listener.local_addr().expect("an address");
    let certificate = ServerCertificate::new(credentials).expect("usable");
    let tls =
        tls::server_config(&fleet.authority, certificate, ClientCertificate::Optional, ALPN_CONTROL).expect("settings");
    let routes = tonic::service::Routes::new(ControlServer::new(TestControl(fleet.clone())));
    tokio::spawn(grpc::serve(listener, tls.into(), routes, std::future::pending()));
    address.into()
}

async fn client(
    host: &HostPort,
    fleet: &TestFleet,
    credentials: Option<&Credentials>,
) -> Result<ControlClient<tonic::transport::Channel>, ConnectError> {
    let tls = tls::client_config(&fleet.authority, credentials, ALPN_CONTROL).expect("settings");
    grpc::connect(host, tls.into()).await.map(ControlClient::new)
}

fn data_server(fleet: &TestFleet, credentials: &Credentials) -> (quinn::Endpoint, HostPort) {
    let certificate = ServerCertificate::new(credentials).expect("usable");
    let tls =
        tls::server_config(&fleet.authority, certificate, ClientCertificate::Required, ALPN_DATA).expect("settings");
    let (endpoint, granted) = quic::server_endpoint(LOOPBACK, tls, &QuicTuning::default()).expect("an endpoint");
    assert!(granted.receive_bytes > 0 && granted.send_bytes > 0);
    let host = endpoint.local_addr().expect("an address").into();
    // Greets each peer by name and echoes what it sends.
    let serving = endpoint.clone();
    tokio::spawn(async move {
        while let Some(incoming) = serving.accept().await {
            tokio::spawn(async move {
                let connection = incoming.await.ok()?;
                let peer = quic::peer_identity(&connection).ok()?;
                let (mut send, mut receive) = connection.accept_bi().await.ok()?;
                send.write_all(peer.name.as_bytes()).await.ok()?;
                while let Some(chunk) = receive.read_chunk(1 << 20, true).await.ok()? {
                    send.write_chunk(chunk.bytes).await.ok()?;
                }
                send.finish().ok()?;
                connection.closed().await;
                Some(())
            });
        }
    });
    (endpoint, host)
}

/// What a client that sends `body` gets back, or why it gets nothing.
async fn exchange(
    host: &HostPort,
    fleet: &TestFleet,
    credentials: Option<&Credentials>,
    body: &[u8],
) -> Result<Vec<u8>, String> {
    let tls = tls::client_config(&fleet.authority, credentials, ALPN_DATA).expect("settings");
    let tuning = QuicTuning::default();
    let (endpoint, _) = quic::client_endpoint(&tuning).expect("an endpoint");
    let connection = quic::connect(&endpoint, host, tls.into(), &tuning).await.map_err(|error| error.to_string())?;
    let (mut send, mut receive) = connection.open_bi().await.map_err(|error| error.to_string())?;
    let sending = async {
        send.write_all(body).await.map_err(|error| error.to_string())?;
        send.finish().map_err(|error| error.to_string())
    };
    let reading = async { receive.read_to_end(64 << 20).await.map_err(|error| error.to_string()) };
    let (sent, got) = tokio::time::timeout(DEADLINE, async { tokio::join!(sending, reading) }).await.expect("in time");
    sent.and(got)
}

#[tokio::test(flavor = "multi_thread")]
async fn quic_carries_data_for_a_machine_of_the_fleet() {
    let fleet = TestFleet::new();
    let (_server, host) = data_server(&fleet, &fleet.issue(Role::Receiver, "r1"));
    let machine = fleet.issue(Role::Machine, "m1");
    let body: Vec<u8> = (0..20_u32 << 20).map(|n| n.to_le_bytes()[usize::from(n % 7 == 0)]).collect();
    let got = exchange(&host, &fleet, Some(&machine), &body).await.expect("exchanged");
    assert!(got.starts_with(b"m1"));
    assert!(got[2..] == body);
}

#[tokio::test(flavor = "multi_thread")]
async fn quic_without_a_certificate_of_the_fleet_gets_nothing() {
    let (fleet, other) = (TestFleet::new(), TestFleet::new());
    let (_server, host) = data_server(&fleet, &fleet.issue(Role::Receiver, "r1"));
    assert!(exchange(&host, &fleet, None, b"x").await.is_err(), "without a certificate");
    let foreign = other.issue(Role::Machine, "m1");
    assert!(exchange(&host, &fleet, Some(&foreign), b"x").await.is_err(), "with another fleet's");
    let receiver = fleet.issue(Role::Receiver, "r2");
    assert!(exchange(&host, &fleet, Some(&receiver), b"x").await.is_err(), "with a receiver's");
    let mut expired = fleet.identity(Role::Machine, "m1");
    expired.not_after = UnixMillis(expired.not_after.0 - 2 * HOUR);
    assert!(exchange(&host, &fleet, Some(&fleet.credentials(&expired)), b"x").await.is_err(), "with an expired one");
    let valid = fleet.issue(Role::Machine, "m1");
    assert_eq!(exchange(&host, &fleet, Some(&valid), b"x").await.expect("the server still serves"), b"m1x");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_a_certificate_of_another_role_or_fleet_is_not_talked_to() {
    let (fleet, other) = (Arc::new(TestFleet::new()), TestFleet::new());
    let machine = fleet.issue(Role::Machine, "m1");
    let host = control_server(&fleet, &fleet.issue(Role::Machine, "thief")).await;
    let error = client(&host, &fleet, Some(&machine)).await.expect_err("a machine is no receiver");
    assert!(
        matches!(&error, ConnectError::Peer { refused: PeerRefused::WrongRole { found: Role::Machine, .. }, .. }),
        "{error}"
    );
    let (_server, host) = data_server(&fleet, &fleet.issue(Role::Machine, "thief"));
    let error = exchange(&host, &fleet, Some(&machine), b"x").await.expect_err("a machine is no receiver");
    assert!(error.contains("certificate is for the role machine, expected receiver"), "{error}");
    let host = control_server(&fleet, &other.issue(Role::Receiver, "r1")).await;
    let error = client(&host, &fleet, Some(&machine)).await.expect_err("another fleet's receiver");
    assert!(matches!(error, ConnectError::Tls { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_but_register_demands_a_machines_certificate() {
    let fleet = Arc::new(TestFleet::new());
    let host = control_server(&fleet, &fleet.issue(Role::Receiver, "r1")).await;
    let mut nobody = client(&host, &fleet, None).await.expect("connected");
    let code = |result: Result<_, Status>| result.expect_err("refused").code();
    assert_eq!(code(nobody.hello(pb::HelloRequest::default()).await.map(drop)), Code::Unauthenticated);
    assert_eq!(code(nobody.renew(pb::RenewRequest::default()).await.map(drop)), Code::Unauthenticated);
    assert_eq!(code(nobody.list_volumes(pb::ListVolumesRequest::default()).await.map(drop)), Code::Unauthenticated);
    assert_eq!(code(nobody.register(pb::RegisterRequest::default()).await.map(drop)), Code::InvalidArgument);
    let operator = fleet.issue(Role::Operator, "o1");
    let mut operator = client(&host, &fleet, Some(&operator)).await.expect("connected");
    assert_eq!(code(operator.hello(pb::HelloRequest::default()).await.map(drop)), Code::PermissionDenied);
    let machine = fleet.issue(Role::Machine, "m1");
    let mut machine = client(&host, &fleet, Some(&machine)).await.expect("connected");
    let hello = machine.hello(pb::HelloRequest::default()).await.expect("served").into_inner();
    assert_eq!(hello.software_version, "m1");
}

#[tokio::test(flavor = "multi_thread")]
async fn control_with_a_bad_certificate_gets_no_answer() {
    let (fleet, other) = (Arc::new(TestFleet::new()), TestFleet::new());
    let host = control_server(&fleet, &fleet.issue(Role::Receiver, "r1")).await;
    let mut expired = fleet.identity(Role::Machine, "m1");
    expired.not_after = UnixMillis(expired.not_after.0 - 2 * HOUR);
    for credentials in [other.issue(Role::Machine, "m1"), fleet.credentials(&expired), fleet.issue(Role::Receiver, "x")]
    {
        let refused = match client(&host, &fleet, Some(&credentials)).await {
            Ok(mut client) => client.hello(pb::HelloRequest::default()).await.is_err(),
            Err(_) => true,
        };
        assert!(refused);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_never_finishes_its_handshake_keeps_nobody_else_waiting() {
    let fleet = Arc::new(TestFleet::new());
    let host = control_server(&fleet, &fleet.issue(Role::Receiver, "r1")).await;
    let address = host.resolve().await.expect("an address")[0];
    let mut silent = Vec::new();
    for _ in 0..grpc::HANDSHAKES_MAX - 1 {
        silent.push(tokio::net::TcpStream::connect(address).await.expect("connected"));
    }
    let machine = fleet.issue(Role::Machine, "m1");
    let mut machine = client(&host, &fleet, Some(&machine)).await.expect("connected");
    machine.hello(pb::HelloRequest::default()).await.expect("served");
}

fn passphrase(fleet: &TestFleet) -> PassphraseFile {
    PassphraseFile {
        fleet: fleet.authority.fleet,
        fingerprint: Fingerprint::of(&fleet.authority.ca),
        id: PassphraseId::from_random([1; 16]),
        secret: Zeroizing::new([2; 32]),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_is_stored_loaded_and_good_for_both_protocols() {
    let fleet = Arc::new(TestFleet::new());
    let receiver = fleet.issue(Role::Receiver, "r1");
    let host = control_server(&fleet, &receiver).await;
    let dir = tempfile::tempdir().expect("a directory");
    let error = Enrolment::load(dir.path()).err().expect("nothing yet");
    assert!(matches!(error, EnrolmentError::NotRegistered { .. }), "{error}");

    let key = MachineKey::load_or_create(dir.path()).expect("a key");
    let public = key.public_key();
    let enrolment = register(&host, &passphrase(&fleet), "web-1", key).await.expect("registered");
    enrolment.store(dir.path()).expect("stored");
    let again = MachineKey::load_or_create(dir.path()).expect("the same key");
    assert!(again.public_key() == public, "a repeated registration uses the stored key");

    let loaded = Enrolment::load(dir.path()).expect("loaded");
    assert_eq!(loaded.identity(), enrolment.identity());
    assert_eq!(loaded.fleet(), fleet.authority.fleet);
    assert_eq!(
        loaded.receivers.iter().map(ToString::to_string).collect::<Vec<_>>(),
        [host.to_string(), "receiver.example:7".into()]
    );
    let mut control = client(&host, &fleet, Some(&loaded.credentials())).await.expect("connected");
    let hello = control.hello(pb::HelloRequest::default()).await.expect("served").into_inner();
    assert_eq!(hello.software_version, "web-1");
    let (_server, host) = data_server(&fleet, &receiver);
    assert_eq!(exchange(&host, &fleet, Some(&loaded.credentials()), b"x").await.expect("exchanged"), b"web-1x");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_says_nothing_to_a_receiver_with_another_fingerprint() {
    let (fleet, other) = (Arc::new(TestFleet::new()), TestFleet::new());
    let host = control_server(&fleet, &fleet.issue(Role::Receiver, "r1")).await;
    let key = || MachineKey::generate().expect("a key");
    let error = register(&host, &passphrase(&other), "web-1", key()).await.err().expect("another authority");
    assert!(error.to_string().contains("the passphrase file names sha256:"), "{error}");
    let RegisterError::Connect(ConnectError::Peer { refused: PeerRefused::WrongFingerprint { found, .. }, .. }) = error
    else {
        panic!("{error}");
    };
    assert_eq!(found, Fingerprint::of(&fleet.authority.ca));

    // The right authority shown by someone whose certificate it did not sign, or signed for another role.
    let forged = KeyPair::generate().expect("a key");
    let mut chain = other.certify(&fleet.identity(Role::Receiver, "r1"), &forged);
    chain[1] = fleet.authority.ca.clone();
    let forged = Credentials::new(chain, Zeroizing::new(forged.serialize_der()));
    let host = control_server(&fleet, &forged).await;
    assert!(matches!(
        register(&host, &passphrase(&fleet), "web-1", key()).await,
        Err(RegisterError::Connect(ConnectError::Tls { .. }))
    ));
    let host = control_server(&fleet, &fleet.issue(Role::Machine, "thief")).await;
    assert!(matches!(
        register(&host, &passphrase(&fleet), "web-1", key()).await,
        Err(RegisterError::Connect(ConnectError::Peer { refused: PeerRefused::WrongRole { .. }, .. }))
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_told_in_the_receivers_words_and_a_dead_receiver_is_named() {
    let fleet = Arc::new(TestFleet::new());
    let host = control_server(&fleet, &fleet.issue(Role::Receiver, "r1")).await;
    let key = || MachineKey::generate().expect("a key");
    let error = register(&host, &passphrase(&fleet), "refused", key()).await.err().expect("refused");
    assert!(matches!(error, RegisterError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("the passphrase is used up"), "{error}");

    let listener = TcpListener::bind(LOOPBACK).await.expect("bound");
    let host = HostPort::from(listener.local_addr().expect("an address"));
    drop(listener);
    let error = register(&host, &passphrase(&fleet), "web-1", key()).await.err().expect("nobody there");
    assert!(error.to_string().contains(&host.to_string()), "{error}");
}

#[test]
fn an_identity_reads_back_as_it_was_certified() {
    let fleet = TestFleet::new();
    for role in [Role::Machine, Role::Operator, Role::Administrator, Role::Receiver] {
        let identity = fleet.identity(role, "Some-Name_1.example");
        assert_eq!(fleet.credentials(&identity).identity(), Ok(identity));
    }
}

#[test]
fn certificates_off_the_profile_are_refused() {
    let fleet = TestFleet::new();
    let key = KeyPair::generate().expect("a key");
    type Change = fn(&mut rcgen::CertificateParams);
    let changes: [(&str, Change); 9] = [
        ("no names", |params| params.subject_alt_names.clear()),
        ("two names", |params| params.subject_alt_names.push(params.subject_alt_names[0].clone())),
        ("a host name", |params| {
            params.subject_alt_names.push(rcgen::SanType::DnsName("a.example".try_into().expect("ascii")));
        }),
        ("a foreign name", |params| {
            params.subject_alt_names.push(rcgen::SanType::IpAddress(Ipv4Addr::LOCALHOST.into()));
        }),
        ("another usage", |params| params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth]),
        ("no usage", |params| params.extended_key_usages.clear()),
        ("a short serial", |params| params.serial_number = Some(7_u64.into())),
        ("an authority", |params| params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained)),
        ("no subject", |params| params.distinguished_name = rcgen::DistinguishedName::new()),
    ];
    let identity = fleet.identity(Role::Machine, "m1");
    let params = || identity.certificate_params(UnixMillis(0)).expect("encodable");
    assert!(PeerIdentity::from_certificate(&fleet.sign(params(), &key)[0]).is_ok());
    for (what, change) in changes {
        let mut params = params();
        change(&mut params);
        assert!(PeerIdentity::from_certificate(&fleet.sign(params, &key)[0]).is_err(), "{what}");
    }
    for uri in ["blockferry://x/machine/y", "https://a", "blockferry://", "blockferry://a/b/c/d"] {
        let mut params = params();
        params.subject_alt_names = vec![rcgen::SanType::URI(uri.try_into().expect("ascii"))];
        assert!(PeerIdentity::from_certificate(&fleet.sign(params, &key)[0]).is_err(), "{uri}");
    }
    let good = fleet.sign(params(), &key).remove(0).to_vec();
    for len in 0..good.len() {
        assert!(PeerIdentity::from_certificate(&CertificateDer::from_slice(&good[..len])).is_err(), "{len} bytes");
    }
}

#[test]
fn a_damaged_registration_names_the_file() {
    let fleet = TestFleet::new();
    let key = MachineKey::generate().expect("a key");
    let pair = KeyPair::from_pem(&key_pem(&key)).expect("the key");
    let chain = fleet.certify(&fleet.identity(Role::Machine, "m1"), &pair);
    let enrolment = Enrolment::new(key, chain, fleet.authority.clone(), Vec::new()).expect("fits");
    for file in ["machine.key", "machine.crt", "fleet.crt", "identity.toml"] {
        let dir = tempfile::tempdir().expect("a directory");
        enrolment.store(dir.path()).expect("stored");
        assert!(Enrolment::load(dir.path()).is_ok());
        let path = dir.path().join("identity").join(file);
        let good = std::fs::read(&path).expect("read");
        std::fs::write(&path, &good[..good.len() / 2]).expect("cut");
        let error = Enrolment::load(dir.path()).err().expect("cut in half").to_string();
        assert!(error.contains(file), "{error}");
    }
    // A certificate for another key.
    let dir = tempfile::tempdir().expect("a directory");
    enrolment.store(dir.path()).expect("stored");
    std::fs::remove_file(dir.path().join("identity/machine.key")).expect("removed");
    MachineKey::load_or_create(dir.path()).expect("another key");
    let error = Enrolment::load(dir.path()).err().expect("another key").to_string();
    assert!(error.contains("another key"), "{error}");
}

/// The key's PEM as it lies on disk.
fn key_pem(key: &MachineKey) -> String {
    key.pem().to_string()
}
