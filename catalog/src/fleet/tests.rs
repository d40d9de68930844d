//! The fleet on a real local store, and over real connections.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use common::clock::UnixMillis;
use common::error::Dispose as _;
use common::ids::ReceiverId;
use common::net::enrolment::{Enrolment, MachineKey};
use common::net::grpc;
use common::net::pb::control_client::ControlClient;
use common::net::pb::control_server::{Control, ControlServer};
use common::net::register::{RegisterError, register};
use common::net::resolve::HostPort;
use common::net::tls::{self, ALPN_CONTROL, ClientCertificate, ServerCertificate};
use common::net::{pb, version};
use tonic::{Code, Request, Response, Status};

use super::passphrase::Refused;
use super::*;

const HOUR: Duration = Duration::from_secs(3_600);

/// A store and a receiver's data directory that go when the test ends.
struct Place {
    dir: tempfile::TempDir,
    store: Store,
}

impl Place {
    async fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(&format!("file://{}/store", dir.path().display())).await.expect("a store");
        Self { dir, store }
    }

    fn data(&self, receiver: &str) -> PathBuf {
        self.dir.path().join(receiver)
    }

    async fn fleet(&self, receiver: &str) -> Result<Fleet, FleetError> {
        self.fleet_at(receiver, Clock::System).await
    }

    async fn fleet_at(&self, receiver: &str, clock: Clock) -> Result<Fleet, FleetError> {
        Fleet::open_or_create(&self.store, &self.data(receiver), clock).await
    }
}

fn refused(error: FleetError) -> Refused {
    match error {
        FleetError::Passphrase(refused) => refused,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_fleet_is_made_once_and_opened_again_with_its_key() {
    let place = Place::new().await;
    let first = place.fleet("r1").await.expect("made");
    let again = place.fleet("r1").await.expect("opened");
    assert_eq!(again.id(), first.id());
    assert_eq!(again.authority.fingerprint(), first.authority.fingerprint());
    let key = place.data("r1").join("authority.key");
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(std::fs::metadata(&key).expect("there").permissions().mode() & 0o777, 0o600);
    assert!(!place.data("r1").join("authority.key.new").exists());
    // A second receiver joins with a copy.
    std::fs::create_dir(place.data("r2")).expect("made");
    std::fs::copy(&key, place.data("r2").join("authority.key")).expect("copied");
    assert_eq!(place.fleet("r2").await.expect("joined").id(), first.id());
}

#[tokio::test]
async fn wrong_missing_and_damaged_keys_are_named_with_the_next_step() {
    let (place, other) = (Place::new().await, Place::new().await);
    place.fleet("r1").await.expect("made");
    other.fleet("r1").await.expect("made");
    let key = place.data("r1").join("authority.key");

    let error = place.fleet("r2").await.err().expect("no key");
    assert!(
        matches!(error, FleetError::KeyMissing { .. }) && error.to_string().contains("copy authority.key"),
        "{error}"
    );
    assert!(!place.data("r2").exists(), "nothing is left behind");

    std::fs::create_dir(place.data("r3")).expect("made");
    std::fs::copy(other.data("r1").join("authority.key"), place.data("r3").join("authority.key")).expect("copied");
    let error = place.fleet("r3").await.err().expect("another fleet's key");
    assert!(matches!(error, FleetError::KeyOfAnotherFleet { .. }), "{error}");

    let empty = Place::new().await;
    let error = Fleet::open_or_create(&empty.store, &place.data("r1"), Clock::System).await.err().expect("no fleet");
    assert!(matches!(error, FleetError::StoreWithoutFleet { .. }), "{error}");
    assert!(empty.store.list("v1").await.expect("listed").is_empty());

    // A key of the right fleet and form that is not its key.
    let text = std::fs::read_to_string(&key).expect("read");
    let wrong = {
        let line = text.lines().nth(2).expect("the key");
        let forged = text.replace(line, &format!("key: {}", "0".repeat(64)));
        let body = &forged[..forged.find("checksum").expect("there")];
        format!("{body}checksum: {:08x}\n", crc32c::crc32c(body.as_bytes()))
    };
    std::fs::write(&key, wrong).expect("written");
    let error = place.fleet("r1").await.err().expect("the wrong key");
    assert!(matches!(error, FleetError::Unsealable { .. }), "{error}");
    std::fs::write(&key, &text[..text.len() - 3]).expect("cut");
    let error = place.fleet("r1").await.err().expect("cut");
    assert!(matches!(error, FleetError::KeyMalformed { .. }) && error.to_string().contains("authority.key"), "{error}");

    // A damaged authority.
    std::fs::write(&key, &text).expect("written");
    place.fleet("r1").await.expect("whole again");
    let root = place.dir.path().join("store/v1/authority/root");
    let mut bytes = std::fs::read(&root).expect("read");
    bytes[100] ^= 1;
    std::fs::write(&root, bytes).expect("written");
    let error = place.fleet("r1").await.err().expect("damaged");
    assert_eq!(error.disposition(), Disposition::Corrupt);
    assert!(error.to_string().contains("v1/authority/root"), "{error}");
}

#[tokio::test]
async fn a_start_that_was_killed_while_making_the_fleet_goes_on() {
    let place = Place::new().await;
    let fleet = place.fleet("r1").await.expect("made").id();
    // Killed after the store had the fleet and before the key had its name.
    let (key, key_new) = (place.data("r1").join("authority.key"), place.data("r1").join("authority.key.new"));
    std::fs::rename(&key, &key_new).expect("renamed");
    assert_eq!(place.fleet("r1").await.expect("went on").id(), fleet);
    assert!(key.exists() && !key_new.exists());
    // Killed before the store had it, or before the store said so: the same key is used, whichever it was.
    let place = Place::new().await;
    std::fs::create_dir(place.data("r1")).expect("made");
    std::fs::copy(&key, place.data("r1").join("authority.key.new")).expect("copied");
    assert_eq!(place.fleet("r1").await.expect("made").id(), fleet);
    assert_eq!(place.fleet("r1").await.expect("opened").id(), fleet);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn receivers_that_start_at_once_make_one_fleet() {
    let place = Arc::new(Place::new().await);
    let starts = (0..6).map(|n| {
        let place = place.clone();
        tokio::spawn(async move { place.fleet(&format!("r{n}")).await })
    });
    let mut made = 0;
    for start in starts.collect::<Vec<_>>() {
        match start.await.expect("joined") {
            Ok(_) => made += 1,
            Err(error) => assert!(matches!(error, FleetError::KeyMissing { .. }), "{error}"),
        }
    }
    assert_eq!(made, 1);
}

#[tokio::test]
async fn a_passphrase_lets_in_as_many_as_it_says_for_as_long_as_it_says() {
    let place = Place::new().await;
    let clock = Clock::manual(UnixMillis(1_800_000_000_000));
    let fleet = place.fleet_at("r1", clock.clone()).await.expect("made");
    let passphrases = &fleet.passphrases;
    let file = passphrases.create(&fleet.authority, HOUR, 2).await.expect("created");
    assert!(file.fleet == fleet.id() && file.fingerprint == fleet.authority.fingerprint());
    let secret = file.secret.as_slice();

    let wrong = passphrases.redeem(file.id, &[0; 32]).await.expect_err("wrong");
    assert_eq!(refused(wrong), Refused::WrongSecret { id: file.id });
    let unknown = PassphraseId::from_random([9; 16]);
    let error = passphrases.redeem(unknown, secret).await.expect_err("unknown");
    assert_eq!(refused(error), Refused::Unknown { id: unknown });

    passphrases.redeem(file.id, secret).await.expect("the first");
    assert_eq!(passphrases.check(file.id, secret).await.expect("good").uses_left, 1);
    passphrases.redeem(file.id, secret).await.expect("the second");
    let error = passphrases.redeem(file.id, secret).await.expect_err("used up");
    assert_eq!(refused(error), Refused::UsedUp { id: file.id, uses: 2 });

    let file = passphrases.create(&fleet.authority, HOUR, 1).await.expect("created");
    let created = clock.now();
    clock.set(UnixMillis(created.0 + 3_600_000));
    let error = passphrases.redeem(file.id, file.secret.as_slice()).await.expect_err("expired");
    assert_eq!(refused(error), Refused::Expired { id: file.id, expired: UnixMillis(created.0 + 3_600_000) });
    clock.set(created);

    assert_eq!(passphrases.list().await.expect("listed").len(), 2);
    passphrases.revoke(file.id).await.expect("revoked");
    passphrases.revoke(file.id).await.expect("revoked again");
    let error = passphrases.redeem(file.id, file.secret.as_slice()).await.expect_err("revoked");
    assert_eq!(refused(error), Refused::Revoked { id: file.id });
    assert!(passphrases.list().await.expect("listed").iter().any(|passphrase| passphrase.revoked));
}

#[tokio::test]
async fn the_store_never_holds_a_passphrases_secret_or_the_open_key() {
    let place = Place::new().await;
    let fleet = place.fleet("r1").await.expect("made");
    let file = fleet.passphrases.create(&fleet.authority, HOUR, 1).await.expect("created");
    for meta in place.store.list("v1").await.expect("listed") {
        let body = place.store.get(&meta.path).await.expect("got");
        assert!(!body.windows(32).any(|window| window == file.secret.as_slice()), "{}", meta.path);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_concurrent_redemptions_of_one_use_exactly_one_succeeds() {
    let place = Arc::new(Place::new().await);
    let fleet = Arc::new(place.fleet("r1").await.expect("made"));
    for _ in 0..10 {
        let file = fleet.passphrases.create(&fleet.authority, HOUR, 1).await.expect("created");
        let tries = (0..8).map(|_| {
            let (fleet, id, secret) = (fleet.clone(), file.id, file.secret.clone());
            tokio::spawn(async move { fleet.passphrases.redeem(id, secret.as_slice()).await })
        });
        let mut good = 0;
        for attempt in tries.collect::<Vec<_>>() {
            match attempt.await.expect("joined") {
                Ok(()) => good += 1,
                Err(error) => assert!(matches!(refused(error), Refused::UsedUp { .. })),
            }
        }
        assert_eq!(good, 1);
    }
}

/// The control service with the fleet behind it, as a receiver has it.
struct Receiver(Arc<Fleet>);

#[tonic::async_trait]
impl Control for Receiver {
    async fn get_status(&self, _: Request<pb::GetStatusRequest>) -> Result<Response<pb::GetStatusReply>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn register(&self, request: Request<pb::RegisterRequest>) -> Result<Response<pb::RegisterReply>, Status> {
        control::register(&self.0, request, &[]).await.map(Response::new)
    }

    async fn hello(&self, request: Request<pb::HelloRequest>) -> Result<Response<pb::HelloReply>, Status> {
        control::hello(&self.0, request, ReceiverId([7; 16]), &[]).await.map(Response::new)
    }

    async fn renew(&self, request: Request<pb::RenewRequest>) -> Result<Response<pb::RenewReply>, Status> {
        control::renew(&self.0, request).await.map(Response::new)
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

async fn serve(fleet: Arc<Fleet>) -> HostPort {
    let listener = tokio::net::TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await.expect("bound");
    let host = listener.local_addr().expect("an address").into();
    let credentials = fleet.authority.issue_receiver(ReceiverId([7; 16]), "r1").expect("issued");
    let certificate = ServerCertificate::new(&credentials).expect("usable");
    let tls = tls::server_config(fleet.authority.public(), certificate, ClientCertificate::Optional, ALPN_CONTROL);
    let routes = tonic::service::Routes::new(ControlServer::new(Receiver(fleet)));
    tokio::spawn(grpc::serve(listener, tls.expect("settings").into(), routes, std::future::pending()));
    host
}

async fn client(host: &HostPort, machine: &Enrolment) -> ControlClient<tonic::transport::Channel> {
    let tls = tls::client_config(machine.authority(), Some(&machine.credentials()), ALPN_CONTROL).expect("settings");
    ControlClient::new(grpc::connect(host, tls.into()).await.expect("connected"))
}

fn hello() -> pb::HelloRequest {
    pb::HelloRequest { protocol_min: 1, protocol_max: version::OURS.max, software_version: "test".into() }
}

fn key() -> MachineKey {
    MachineKey::generate().expect("a key")
}

fn reason(result: Result<Enrolment, RegisterError>) -> String {
    match result {
        Err(RegisterError::Refused { reason, .. }) => reason,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("registered"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_registers_renews_and_is_locked_out_when_revoked() {
    let place = Place::new().await;
    let fleet = Arc::new(place.fleet("r1").await.expect("made"));
    let host = serve(fleet.clone()).await;
    let file = fleet.passphrases.create(&fleet.authority, HOUR, 1).await.expect("created");
    let mut machine = register(&host, &file, "web-1", key()).await.expect("registered");
    assert_eq!(machine.fleet(), fleet.id());

    let mut control = client(&host, &machine).await;
    let reply = control.hello(hello()).await.expect("served").into_inner();
    assert_eq!(reply.protocol, version::OURS.max);
    assert_eq!(reply.receiver_id, vec![7; 16]);
    let old = machine.identity().serial;
    let request = pb::RenewRequest { csr_der: machine.key().request().expect("a request").into() };
    let chain = control.renew(request).await.expect("renewed").into_inner().certificate_chain_der;
    let chain = chain.iter().map(|der| der.to_vec().into()).collect();
    machine.renew(chain).expect("fits");
    assert_ne!(machine.identity().serial, old);
    let mut control = client(&host, &machine).await;
    control.hello(hello()).await.expect("served with the renewed certificate");

    fleet.machines.revoke("web-1").await.expect("revoked");
    assert!(matches!(fleet.machines.revoke("web-2").await, Err(FleetError::NoSuchMachine { .. })));
    // What this receiver remembers is believed for a while; another one, or this one later, asks the store.
    let elsewhere = Arc::new(place.fleet("r1").await.expect("opened"));
    let host = serve(elsewhere).await;
    let mut control = client(&host, &machine).await;
    let error = control.hello(hello()).await.expect_err("revoked");
    assert_eq!(error.code(), Code::PermissionDenied);
    assert!(error.message().contains("revoked"), "{error}");
    let request = pb::RenewRequest { csr_der: machine.key().request().expect("a request").into() };
    assert_eq!(control.renew(request).await.expect_err("revoked").code(), Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_never_changes_hands_and_a_revoked_machine_comes_back_as_itself() {
    let place = Place::new().await;
    let fleet = Arc::new(place.fleet("r1").await.expect("made"));
    let host = serve(fleet.clone()).await;
    let file = fleet.passphrases.create(&fleet.authority, HOUR, 2).await.expect("created");
    let first = register(&host, &file, "web-1", key()).await.expect("registered");

    // Another key under the same name is refused, and costs no use.
    let text = reason(register(&host, &file, "web-1", key()).await);
    assert!(text.contains("registered already") && text.contains("machines revoke web-1"), "{text}");
    let left = fleet.passphrases.check(file.id, file.secret.as_slice()).await.expect("good").uses_left;
    assert_eq!(left, 1);

    fleet.machines.revoke("web-1").await.expect("revoked");
    let second = register(&host, &file, "web-1", key()).await.expect("registered anew");
    assert_eq!(second.machine(), first.machine(), "it keeps its id, and with it its volumes");
    client(&host, &second).await.hello(hello()).await.expect("served");
    let error = client(&host, &first).await.hello(hello()).await.expect_err("the old certificate stays revoked");
    assert_eq!(error.code(), Code::PermissionDenied);
    assert_eq!(fleet.machines.list().await.expect("listed").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_whose_reply_was_lost_is_repeated_at_no_cost() {
    let place = Place::new().await;
    let fleet = Arc::new(place.fleet("r1").await.expect("made"));
    let host = serve(fleet.clone()).await;
    let file = fleet.passphrases.create(&fleet.authority, HOUR, 1).await.expect("created");
    let state = place.dir.path().join("sender");
    let key = || MachineKey::load_or_create(&state).expect("the stored key");
    let first = register(&host, &file, "web-1", key()).await.expect("registered");
    let again = register(&host, &file, "web-1", key()).await.expect("repeated");
    assert_eq!(again.machine(), first.machine());
    // Under another name it would be another use, and there is none.
    let text = reason(register(&host, &file, "web-2", key()).await);
    assert!(text.contains("used up"), "{text}");
    assert!(fleet.machines.find("web-2").await.expect("asked").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bad_passphrase_and_name_is_refused_in_its_own_words() {
    let place = Place::new().await;
    let fleet = Arc::new(place.fleet("r1").await.expect("made"));
    let host = serve(fleet.clone()).await;
    let mut file = fleet.passphrases.create(&fleet.authority, HOUR, 1).await.expect("created");
    let text = reason(register(&host, &file, "a/b", key()).await);
    assert!(text.contains("can't be a name"), "{text}");
    file.secret[0] ^= 1;
    assert!(reason(register(&host, &file, "web-1", key()).await).contains("secret"));
    file.secret[0] ^= 1;
    fleet.passphrases.revoke(file.id).await.expect("revoked");
    assert!(reason(register(&host, &file, "web-1", key()).await).contains("was revoked"));
    let expired = fleet.passphrases.create(&fleet.authority, Duration::ZERO, 1).await.expect("created");
    assert!(reason(register(&host, &expired, "web-1", key()).await).contains("expired at"));
    file.id = PassphraseId::from_random([3; 16]);
    assert!(reason(register(&host, &file, "web-1", key()).await).contains("no passphrase"));
    assert!(fleet.machines.list().await.expect("listed").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_of_the_next_version_is_served_and_one_of_a_far_version_is_told_why_not() {
    let place = Place::new().await;
    let fleet = Arc::new(place.fleet("r1").await.expect("made"));
    let host = serve(fleet.clone()).await;
    let file = fleet.passphrases.create(&fleet.authority, HOUR, 1).await.expect("created");
    let machine = register(&host, &file, "web-1", key()).await.expect("registered");
    let mut control = client(&host, &machine).await;
    let ours = version::OURS.max;
    let of = |min, max| pb::HelloRequest { protocol_min: min, protocol_max: max, software_version: "other".into() };
    let reply = control.hello(of(ours, ours + 1)).await.expect("one version apart").into_inner();
    assert_eq!(reply.protocol, ours);
    let error = control.hello(of(ours + 1, ours + 2)).await.expect_err("none in common");
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains(&format!("the peer {} to {}", ours + 1, ours + 2)), "{error}");
    assert_eq!(control.hello(of(0, 0)).await.expect_err("no range").code(), Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn registrations_are_rate_limited_by_address() {
    let place = Place::new().await;
    let fleet = Arc::new(place.fleet("r1").await.expect("made"));
    let host = serve(fleet.clone()).await;
    let tls = tls::client_config(fleet.authority.public(), None, ALPN_CONTROL).expect("settings");
    let mut control = ControlClient::new(grpc::connect(&host, tls.into()).await.expect("connected"));
    let mut limited = false;
    for _ in 0..200 {
        let error = control.register(pb::RegisterRequest::default()).await.expect_err("nothing right in it");
        limited |= error.code() == Code::ResourceExhausted;
    }
    assert!(limited);
}

#[tokio::test]
async fn operators_get_certificates_and_no_other_role_does() {
    let place = Place::new().await;
    let fleet = place.fleet("r1").await.expect("made");
    let text = fleet.authority.issue_operator(Role::Administrator, "alice").expect("issued");
    assert!(text.contains("PRIVATE KEY") && text.matches("BEGIN CERTIFICATE").count() == 2);
    assert!(fleet.authority.issue_operator(Role::Machine, "alice").is_err());
    assert!(fleet.authority.issue_operator(Role::Operator, "../alice").is_err());
}
