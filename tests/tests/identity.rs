//! Who gets in and who does not: passphrases, certificates, and other machines' volumes.

use blockferry_tests::images;
use blockferry_tests::pair::{Pair, check, check_fails, wait_for};
use common::format::frame::{Frame, PREAMBLE, RefusalCode};
use common::ids::{CloseId, Incarnation, SessionId, VolumeId};
use common::net::enrolment::Enrolment;
use common::net::resolve::HostPort;
use common::net::{grpc, pb, quic, tls};

#[test]
fn a_wrong_expired_used_up_or_revoked_passphrase_is_refused_with_its_own_reason() {
    let pair = Pair::start();
    let state = pair.file("second");
    let register =
        |passphrase: &std::path::Path| pair.register(&state, passphrase, "second").output().expect("it runs");

    let expired = pair.passphrase(&["--ttl", "1ms"]);
    check_fails("expired", &register(&expired), 1, &["expired"]);

    let used = pair.passphrase(&["--uses", "1"]);
    check("first use", &pair.register(&pair.file("third"), &used, "third").output().expect("it runs"));
    check_fails("used up", &register(&used), 1, &["used up"]);

    let good = pair.passphrase(&[]);
    let text = std::fs::read_to_string(&good).expect("readable");
    let other = std::fs::read_to_string(pair.passphrase(&[])).expect("readable");
    let line = |text: &str, name: &str| text.lines().find(|line| line.starts_with(name)).expect("a line").to_owned();
    // A typo is caught by the file's own checksum, before anything is sent.
    let typo = pair.file("typo.txt");
    std::fs::write(&typo, text.replace(&line(&text, "secret"), &line(&other, "secret"))).expect("writable");
    check_fails("typo", &register(&typo), 1, &["typo.txt"]);

    let list = pair.receiver_tool(&["passphrase", "list", "--json"]);
    check("passphrase list", &list);
    let id = line(&text, "id").split_whitespace().last().expect("an id").to_owned();
    assert!(String::from_utf8_lossy(&list.stdout).contains(&id));
    check("passphrase revoke", &pair.receiver_tool(&["passphrase", "revoke", &id]));
    check_fails("revoked", &register(&good), 1, &["revoked"]);
}

#[test]
fn a_receiver_of_another_fleet_is_refused_by_its_fingerprint() {
    let (ours, theirs) = (Pair::start(), Pair::start());
    let passphrase = ours.passphrase(&[]);
    // Our passphrase, their receiver.
    let output = theirs.register(&theirs.file("second"), &passphrase, "second").output().expect("it runs");
    check_fails("wrong fingerprint", &output, 1, &["sha256:", "another fleet"]);
}

#[test]
fn a_revoked_machine_gets_nothing_more() {
    let pair = Pair::start();
    let image = pair.file("disk.img");
    images::build(&image, 16);
    let _ = pair.run_once("disk", &image);
    check("machines revoke", &pair.receiver_tool(&["machines", "revoke", "machine"]));
    // A revocation takes effect within the time for which the receiver believes an answer.
    wait_for("the revocation to take effect", || {
        let output = pair.sender_command(&[("disk", &image)]).output().expect("it runs");
        let refused = !output.status.success();
        assert!(!refused || String::from_utf8_lossy(&output.stderr).contains("revoked"), "{output:?}");
        refused.then_some(())
    });
    pair.restores_to("disk", "latest", &image);
}

#[test]
fn a_peer_without_a_certificate_or_with_another_machines_gets_nothing() {
    tls::install_provider();
    let pair = Pair::start();
    let image = pair.file("disk.img");
    images::build(&image, 16);
    let _ = pair.run_once("disk", &image);
    let volume: VolumeId = pair.points("disk")[0]["volume_id"]
        .as_str()
        .map_or_else(
            || {
                let volumes = std::fs::read_dir(pair.state.join("volumes")).expect("there");
                volumes
                    .map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned())
                    .next()
                    .expect("one")
            },
            str::to_owned,
        )
        .parse()
        .expect("a volume id");
    let other_state = pair.file("other");
    check("register", &pair.register(&other_state, &pair.passphrase(&[]), "other").output().expect("it runs"));
    let other = Enrolment::load(&other_state).expect("registered");
    let host: HostPort = pair.listen().parse().expect("an address");

    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        // Control, without a certificate: refused before any handler.
        let anonymous = tls::client_config(other.authority(), None, tls::ALPN_CONTROL).expect("a configuration");
        let channel = grpc::connect(&host, anonymous.into()).await.expect("TLS itself succeeds");
        let mut client = pb::control_client::ControlClient::new(channel);
        let status = client.list_volumes(pb::ListVolumesRequest {}).await.expect_err("refused");
        assert_eq!(status.code() as i32, 16, "unauthenticated: {status}");

        // Control, as another machine: the volume does not exist for it.
        let credentials = other.credentials();
        let named =
            tls::client_config(other.authority(), Some(&credentials), tls::ALPN_CONTROL).expect("a configuration");
        let channel = grpc::connect(&host, named.into()).await.expect("connected");
        let mut client = pb::control_client::ControlClient::new(channel);
        let own = client.list_volumes(pb::ListVolumesRequest {}).await.expect("answered").into_inner();
        assert!(own.volumes.is_empty(), "another machine's volumes are listed");
        let status =
            client.get_volume(pb::GetVolumeRequest { id: volume.0.to_vec().into() }).await.expect_err("refused");
        assert_eq!(status.code() as i32, 5, "not found: {status}");

        // Data, without a certificate: no stream ever answers.
        let tuning = quic::QuicTuning::default();
        let (endpoint, _) = quic::client_endpoint(&tuning).expect("an endpoint");
        let anonymous = tls::client_config(other.authority(), None, tls::ALPN_DATA).expect("a configuration");
        if let Ok(connection) = quic::connect(&endpoint, &host, anonymous.into(), &tuning).await {
            assert!(claim(&connection, volume).await.is_none(), "a claim without a certificate was answered");
        }

        // Data, as another machine: refused.
        let named = tls::client_config(other.authority(), Some(&credentials), tls::ALPN_DATA).expect("a configuration");
        let connection = quic::connect(&endpoint, &host, named.into(), &tuning).await.expect("connected");
        match claim(&connection, volume).await {
            Some(Frame::Refused { code: RefusalCode::NotYours, .. }) => {}
            other => panic!("another machine's claim was answered with {other:?}"),
        }
    });
}

/// Claims a volume by hand; the receiver's first frame, if it sends one.
async fn claim(connection: &quinn::Connection, volume: VolumeId) -> Option<Frame> {
    let (mut send, mut receive) = connection.open_bi().await.ok()?;
    let open = Frame::Open {
        protocol: common::session::PROTOCOL,
        volume,
        incarnation: Incarnation(1),
        session: SessionId([1; 16]),
        streams: 1,
        known: CloseId::ZERO,
        journaled: Vec::new(),
        resume: Vec::new(),
    };
    send.write_all(&PREAMBLE).await.ok()?;
    send.write_all(&open.encode().0).await.ok()?;
    let mut buffer = bytes::BytesMut::new();
    loop {
        let mut chunk = [0; 4096];
        let read = receive.read(&mut chunk).await.ok()??;
        buffer.extend_from_slice(&chunk[..read]);
        // The receiver's side of a stream starts with the preamble too.
        let mut frames = bytes::BytesMut::from(buffer.strip_prefix(&PREAMBLE[..]).unwrap_or(&buffer));
        if let Ok(Some(frame)) = Frame::take(&mut frames) {
            return Some(frame);
        }
    }
}
