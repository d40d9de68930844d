//! The main job on real object stores that fail: killed and started again, throttling, cutting, losing replies, refusing, gone.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;

use blockferry_tests::images;
use blockferry_tests::pair::{Pair, check, check_fails, http_get, program, terminate, wait_for};
use blockferry_tests::servers::StoreAt;
use blockferry_tests::servers::azurite::Azurite;
use blockferry_tests::servers::proxy::FaultProxy;
use blockferry_tests::servers::seaweed::SeaweedFs;

/// A run to one point that goes on in the background.
fn start_run(pair: &Pair, image: &Path) -> Child {
    let log = File::create(pair.file("sender.log")).expect("a log");
    let mut command = pair.sender_command(&[("disk", image)]);
    command.stdout(Stdio::null()).stderr(log).spawn().expect("the sender starts")
}

fn ends_well(pair: &Pair, mut run: Child) {
    let status = wait_for("the sender's point", || run.try_wait().expect("a child can be asked"));
    let log = std::fs::read_to_string(pair.file("sender.log")).unwrap_or_default();
    assert!(status.success(), "{status}: {log}");
}

/// A receiver's errors of this kind so far.
fn errors(pair: &Pair, kind: &str) -> f64 {
    let text = http_get(pair.metrics_address(), "/metrics").unwrap_or_default();
    let label = format!("blockferry_receiver_errors_total{{kind=\"{kind}\"}} ");
    text.lines().find_map(|line| line.strip_prefix(&label)?.parse().ok()).unwrap_or(0.0)
}

fn verifies(pair: &Pair) {
    let mut verify = pair.operator_command("verify");
    verify.args(["--volume", "disk"]).arg("--key-file").arg(pair.key_file());
    check("verify", &verify.output().expect("it runs"));
}

/// Two points on a store, restored and verified; nothing that is logged at the finest level is a secret.
fn main_job(store: &StoreAt, secret: &str) {
    let mut pair = Pair::start_with_store(store, &["--log-level", "trace,quinn=info,quinn_proto=info,quinn_udp=info"]);
    let image = pair.file("disk.img");
    images::build(&image, 48);
    let _ = pair.run_once("disk", &image);
    let before = pair.file("before.img");
    std::fs::copy(&image, &before).expect("copied");
    images::churn(&image, 200, 3);
    let _ = pair.run_once("disk", &image);
    let points = pair.points("disk");
    assert_eq!(points.len(), 2);
    pair.restores_to("disk", points[0]["id"].as_str().expect("an id"), &before);
    pair.restores_to("disk", "latest", &image);
    verifies(&pair);
    assert!(pair.receiver_metric("blockferry_store_requests_total") > 5.0);
    assert!(pair.receiver_metric("blockferry_store_sent_bytes_total") > 1e6);
    assert_eq!(pair.stop_receiver(), Some(143));
    let log = pair.log();
    for hidden in [secret, "Signature=", "SharedKey "] {
        assert!(!log.contains(hidden), "the log tells {hidden:?}");
    }
}

#[test]
fn the_main_job_works_on_seaweedfs_and_nothing_logs_its_secret() {
    let server = SeaweedFs::shared();
    main_job(&server.store().within("main-job"), server.secret());
}

#[test]
fn the_main_job_works_on_azurite_and_nothing_logs_its_secret() {
    let server = Azurite::shared();
    main_job(&server.store().within("main-job"), server.secret());
}

/// What `main_job` does while one request in five fails.
fn survives_faults(proxy: &FaultProxy, store: &StoreAt) {
    let pair = Pair::start_with_store(store, &["--segment-size", "16MiB"]);
    let image = pair.file("disk.img");
    images::build(&image, 96);
    proxy.fail_one_in(5);
    for seed in 0..4 {
        let _ = pair.run_once("disk", &image);
        images::churn(&image, 100, seed);
    }
    let _ = pair.run_once("disk", &image);
    assert!(proxy.faults() > 5, "only {} faults were met", proxy.faults());
    pair.restores_to("disk", "latest", &image);
    proxy.heal();
    assert_eq!(pair.points("disk").len(), 5, "each epoch was committed once");
    assert!(pair.receiver_metric("blockferry_store_retries_total") > 0.0);
    verifies(&pair);
}

#[test]
fn throttling_resets_cut_uploads_and_lost_replies_of_seaweedfs_are_survived() {
    let server = SeaweedFs::shared();
    let proxy = FaultProxy::start(&server.address());
    let store = server.store().with("AWS_ENDPOINT", &format!("http://{}", proxy.address()));
    survives_faults(&proxy, &store.within("faults"));
}

#[test]
fn throttling_resets_cut_uploads_and_lost_replies_of_azurite_are_survived() {
    let server = Azurite::shared();
    let proxy = FaultProxy::start(&server.address());
    survives_faults(&proxy, &server.store_through(proxy.address()).within("faults"));
}

/// The store, and then the receiver too, are killed in the middle of uploads.
fn survives_kills(store: &StoreAt, mut kill: impl FnMut(), mut restart: impl FnMut()) {
    let mut pair = Pair::start_with_store(store, &["--segment-size", "16MiB"]);
    let image = pair.file("disk.img");
    images::build(&image, 160);
    let run = start_run(&pair, &image);
    wait_for("uploads", || (pair.receiver_metric("blockferry_store_sent_bytes_total") > 20e6).then_some(()));
    kill();
    wait_for("failures", || (pair.receiver_metric("blockferry_store_failures_total") > 0.0).then_some(()));
    restart();
    wait_for("uploads again", || (pair.receiver_metric("blockferry_store_sent_bytes_total") > 40e6).then_some(()));
    pair.kill_receiver();
    pair.start_receiver();
    ends_well(&pair, run);
    pair.restores_to("disk", "latest", &image);
    verifies(&pair);
}

#[test]
fn seaweedfs_killed_in_the_middle_of_uploads_costs_nothing() {
    let server = std::cell::RefCell::new(SeaweedFs::start());
    let store = server.borrow().store();
    survives_kills(&store, || server.borrow_mut().kill(), || server.borrow_mut().restart());
}

#[test]
fn azurite_stopped_in_the_middle_of_uploads_costs_nothing() {
    let server = std::cell::RefCell::new(Azurite::start());
    let store = server.borrow().store();
    survives_kills(&store, || server.borrow_mut().stop(), || server.borrow_mut().restart());
}

#[test]
fn refused_credentials_and_a_missing_bucket_are_named_and_all_goes_on_once_they_are_repaired() {
    let mut server = SeaweedFs::start();
    let (store, secret) = (server.store(), server.secret().to_owned());
    let mut pair = Pair::start_with_store(&store, &["--segment-size", "16MiB"]);
    let image = pair.file("disk.img");
    images::build(&image, 160);

    // In the middle of uploads the store knows another secret: what this receiver signs with has expired.
    let run = start_run(&pair, &image);
    wait_for("uploads", || (pair.receiver_metric("blockferry_store_sent_bytes_total") > 10e6).then_some(()));
    server.set_secret("another-secret-0123456789");
    server.restart();
    wait_for("the refusal to be counted", || (errors(&pair, "store_denied") > 0.0).then_some(()));
    assert!(pair.log().contains("check the credentials"), "{}", pair.log());
    let output = pair.operator_command("points").output().expect("it runs");
    check_fails("points", &output, 1, &["refused", "credentials"]);
    server.set_secret(&secret);
    server.restart();
    ends_well(&pair, run);
    pair.restores_to("disk", "latest", &image);

    // The bucket is gone before the next session.
    server.lose_bucket(true);
    server.restart();
    images::churn(&image, 50, 2);
    let run = start_run(&pair, &image);
    wait_for("the loss to be named", || pair.log().contains("the bucket of the store s3://blockferry").then_some(()));
    let output = pair.operator_command("points").output().expect("it runs");
    check_fails("points", &output, 1, &["bucket", "s3://blockferry", "is not there"]);
    server.lose_bucket(false);
    server.restart();
    ends_well(&pair, run);
    pair.restores_to("disk", "latest", &image);
    verifies(&pair);

    // A receiver that starts meanwhile says why it can't.
    server.lose_bucket(true);
    server.restart();
    pair.kill_receiver();
    check_fails("run", &pair.receiver_command().output().expect("it runs"), 1, &["bucket", "s3://blockferry"]);
}

/// A sender that goes on, and how often the store is asked for its volume in three seconds of idleness.
fn requests_while_idle(folder: &str, volume: &str, flags: &[&str]) -> Vec<(String, String)> {
    let server = SeaweedFs::shared();
    let proxy = FaultProxy::start(&server.address());
    let store = server.store().with("AWS_ENDPOINT", &format!("http://{}", proxy.address())).within(folder);
    let pair = Pair::start_with_store(&store, &[]);
    let image = pair.file("disk.img");
    images::build(&image, 16);
    let mut command = program("blockferry-sender");
    command.args(["run", "--metrics-listen", "127.0.0.1:0", "--memory-budget", "128MiB"]).args(flags);
    command.arg("--state-dir").arg(&pair.state);
    let spec = volume.replace("IMAGE", &image.to_string_lossy()).replace("SOCKET", &pair.file("s").to_string_lossy());
    let log = File::create(pair.file("sender.log")).expect("a log");
    let mut sender = command.arg("--volume").arg(spec).stderr(log).spawn().expect("the sender starts");
    wait_for("the first point", || (!pair.points_of_all().is_empty()).then_some(()));
    // `points` asks too; it is not run from here on.
    let before = proxy.seen().len();
    std::thread::sleep(std::time::Duration::from_secs(3));
    let seen = proxy.seen();
    terminate(&sender);
    wait_for("the sender's end", || sender.try_wait().expect("a child can be asked"));
    seen.into_iter().skip(before).filter(|(_, target)| target.contains("/volumes/")).collect()
}

#[test]
fn an_idle_volume_costs_no_request() {
    // Sixty epochs' time.
    let exported =
        requests_while_idle("idle-nbd", "disk=IMAGE,capture=nbd,listen=SOCKET", &["--epoch-interval", "50ms"]);
    assert_eq!(exported, []);
    // Thirty passes: one in an hour makes a point of what did not change.
    let scanned = requests_while_idle("idle-scan", "disk=IMAGE", &["--point-interval", "100ms"]);
    assert_eq!(scanned, []);
}

/// A certificate for `localhost` and the configuration that shows it.
fn certificate() -> (String, Arc<rustls::ServerConfig>) {
    common::net::tls::install_provider();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    let key = rustls_pki_types::PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let config = rustls::ServerConfig::builder().with_no_client_auth();
    let config = config.with_single_cert(vec![made.cert.der().clone()], key).expect("they fit");
    (made.cert.pem(), Arc::new(config))
}

#[test]
fn a_store_behind_a_private_authority_is_trusted_with_store_ca_alone() {
    let server = SeaweedFs::shared();
    let (pem, tls) = certificate();
    let proxy = FaultProxy::start_tls(&server.address(), tls);
    let port = proxy.address().rsplit(':').next().expect("a port").to_owned();
    let store = server.store().with("AWS_ENDPOINT", &format!("https://localhost:{port}")).within("tls");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let ca = dir.path().join("ca.pem");
    std::fs::write(&ca, pem).expect("written");
    let points = |ca: Option<&Path>| {
        let mut command = program("blockferry");
        command.args(["points", "--json", "--store", &store.url]).envs(store.env.iter().cloned());
        if let Some(ca) = ca {
            command.arg("--store-ca").arg(ca);
        }
        command.output().expect("it runs")
    };
    check("points with --store-ca", &points(Some(&ca)));
    let before = proxy.seen().len();
    assert!(before > 0);
    check_fails("points without --store-ca", &points(None), 1, &["could not"]);
    assert_eq!(proxy.seen().len(), before, "it said nothing to a server that it can't trust");
}

#[test]
fn the_proxy_that_the_environment_names_is_taken() {
    let server = SeaweedFs::shared();
    let proxy = FaultProxy::start(&server.address());
    let store = server.store().within("proxied").with("HTTP_PROXY", &format!("http://{}", proxy.address()));
    let store =
        store.with("http_proxy", &format!("http://{}", proxy.address())).with("NO_PROXY", "").with("no_proxy", "");
    let mut command = program("blockferry");
    command.args(["points", "--json", "--store", &store.url]).envs(store.env.iter().cloned());
    check("points", &command.output().expect("it runs"));
    let expected = format!("http://{}/", server.address());
    assert!(proxy.seen().iter().any(|(_, target)| target.starts_with(&expected)), "{:?}", proxy.seen());
}
