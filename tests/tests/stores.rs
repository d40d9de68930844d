//! Every kind of store keeps the promises of `catalog::store`: a real SeaweedFS (S3), a real Azurite (Azure Blob), a directory, and
//! for Google Cloud Storage a fake of our own, since there is no other; real GCS is untested.

use blockferry_tests::servers::azurite::Azurite;
use blockferry_tests::servers::gcs::GcsFake;
use blockferry_tests::servers::proxy::{Fault, FaultProxy};
use blockferry_tests::servers::seaweed::SeaweedFs;
use blockferry_tests::servers::{StoreAt, http};
use bytes::Bytes;
use catalog::store::{CasOutcome, PutOutcome, Store, StoreError, conformance};

/// The whole suite in one folder of a store.
async fn conforms(at: &StoreAt) {
    let at = at.within("conformance");
    conformance::conforms(&at.open().await).await;
    let mut stores = Vec::new();
    for _ in 0..6 {
        stores.push(at.open().await);
    }
    conformance::of_concurrent_creators_exactly_one_wins(&stores, 10).await;
    conformance::of_concurrent_swappers_no_increment_is_lost(&stores, 8).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn seaweedfs_conforms() {
    conforms(&SeaweedFs::shared().store()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn azurite_conforms() {
    conforms(&Azurite::shared().store()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_fake_of_gcs_conforms() {
    let fake = GcsFake::start();
    conforms(&fake.store()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_ignores_preconditions_is_refused_by_name() {
    let fake = GcsFake::start_ignoring_preconditions();
    let store = fake.store().open().await;
    let error = store.probe().await.expect_err("it overwrites whatever is there");
    assert!(matches!(error, StoreError::NotConditional { .. }), "{error}");
    assert!(error.to_string().contains("If-None-Match"), "{error}");
    assert!(store.list("v1").await.expect("listed").is_empty(), "the probe leaves nothing there either");
}

/// The two kinds of real server, each behind a proxy of its own.
fn behind_proxies(folder: &str) -> Vec<(FaultProxy, StoreAt)> {
    let seaweed = SeaweedFs::shared();
    let proxy = FaultProxy::start(&seaweed.address());
    let s3 = seaweed.store().with("AWS_ENDPOINT", &format!("http://{}", proxy.address())).within(folder);
    let azurite = Azurite::shared();
    let other = FaultProxy::start(&azurite.address());
    let azure = azurite.store_through(other.address()).within(folder);
    vec![(proxy, s3), (other, azure)]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conditional_write_whose_reply_was_lost_is_known_as_ones_own() {
    for (proxy, at) in behind_proxies("lost-replies") {
        let store = at.open().await;
        proxy.fail(1, Fault::LoseReply, |head| head.method == "PUT" && head.path().ends_with("/v1/entry"));
        let outcome = store.put_if_absent("v1/entry", "nonce 1".into()).await.expect("it got through");
        assert_eq!(outcome, PutOutcome::Created, "{}", at.url);
        assert_eq!(store.put_if_absent("v1/entry", "nonce 2".into()).await.expect("put"), PutOutcome::Exists);

        let (_, version) = store.get_versioned("v1/entry").await.expect("got");
        proxy.fail(1, Fault::LoseReply, |head| head.method == "PUT");
        let swapped = store.compare_and_swap("v1/entry", &version, "nonce 3".into()).await.expect("it got through");
        let CasOutcome::Swapped(now) = swapped else { panic!("{}: {swapped:?}", at.url) };
        assert_eq!(store.get_versioned("v1/entry").await.expect("got"), (Bytes::from_static(b"nonce 3"), now));

        // The request of another is not taken for ones own.
        proxy.fail(1, Fault::Reset, |head| head.method == "PUT");
        let outcome = store.put_if_absent("v1/entry", "nonce 4".into()).await.expect("put");
        assert_eq!(outcome, PutOutcome::Exists, "{}", at.url);
        assert_eq!(proxy.faults(), 3);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_fail_for_a_while_are_made_again() {
    for (proxy, at) in behind_proxies("transient") {
        let store = at.open().await;
        let body = Bytes::from((0..20_u32 << 20).map(|n| (n / 7).to_le_bytes()[0]).collect::<Vec<_>>());
        let is_part = |head: &http::Head| head.query("partNumber").is_some() || head.query("blockid").is_some();
        proxy.fail(1, Fault::Status(503, String::new()), is_part);
        proxy.fail(1, Fault::CutUpload(3 << 20), is_part);
        proxy.fail(1, Fault::LoseReply, is_part);
        let is_end = |head: &http::Head| {
            head.method == "POST" && head.query("uploadId").is_some()
                || head.query("comp").as_deref() == Some("blocklist")
        };
        proxy.fail(1, Fault::LoseReply, is_end);
        store.put_segment("v1/large", vec![body.clone()]).await.expect("it is stored in the end");
        assert_eq!(proxy.faults(), 4, "{}", at.url);
        proxy.fail(1, Fault::Status(429, String::new()), |head| head.method == "GET");
        proxy.fail(1, Fault::CutReply(400_000), |head| head.method == "GET");
        proxy.fail(1, Fault::Reset, |head| head.method == "GET");
        assert_eq!(store.get("v1/large").await.expect("got in the end"), body);
        assert_eq!(proxy.faults(), 7, "{}", at.url);
        proxy.fail(1, Fault::CutReply(30), |head| head.method == "GET");
        proxy.fail(1, Fault::Status(503, String::new()), |head| head.method == "GET");
        assert_eq!(store.list("v1").await.expect("listed in the end").len(), 1);
        proxy.fail(1, Fault::LoseReply, |head| head.method == "DELETE" || head.method == "POST");
        store.delete("v1/large").await.expect("deleted in the end");
        assert!(store.get("v1/large").await.expect_err("gone").is_not_found());
        assert_eq!(proxy.faults(), 10, "{}", at.url);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_hangs_is_given_up_and_made_again() {
    let hang = std::time::Duration::from_secs(20);
    for (proxy, at) in behind_proxies("hanging") {
        // Longer than anything takes here, shorter than it hangs.
        let store = at.with("AWS_TIMEOUT", "4 seconds").with("AZURE_TIMEOUT", "4 seconds").open().await;
        proxy.fail(1, Fault::Delay(hang), |head| head.method == "PUT");
        let started = std::time::Instant::now();
        let outcome = store.put_if_absent("v1/slow", "nonce".into()).await.expect("created in the end");
        assert_eq!(outcome, PutOutcome::Created, "{}", at.url);
        proxy.fail(1, Fault::Delay(hang), |head| head.method == "GET");
        assert_eq!(store.get("v1/slow").await.expect("got in the end"), "nonce");
        assert!(started.elapsed() < hang, "it waited for the request that hung: {:?}", started.elapsed());
        assert_eq!(proxy.faults(), 2, "{}", at.url);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bit_flipped_on_the_way_up_is_noticed_and_the_body_sent_again() {
    let fake = GcsFake::start();
    let google = FaultProxy::start(fake.address());
    let at = fake.store().with("GOOGLE_BASE_URL", &format!("http://{}", google.address()));
    let mut stores = behind_proxies("flipped");
    stores.push((google, at));
    for (proxy, at) in stores {
        let store = at.open().await;
        // Small enough for one request; Azurite does not tell the checksum of a part.
        let mut sizes = vec![1 << 20];
        if !at.url.starts_with("az:") {
            sizes.push(17 << 20);
        }
        for size in sizes {
            let body = Bytes::from((0..size).map(|n: u32| (n % 251).to_le_bytes()[0]).collect::<Vec<_>>());
            let before = proxy.faults();
            proxy.fail(1, Fault::Damage, |head| head.method == "PUT");
            store.put_new(&format!("v1/{size}"), body.clone()).await.expect("it is stored in the end");
            assert_eq!(proxy.faults(), before + 1, "{}", at.url);
            assert!(store.get(&format!("v1/{size}")).await.expect("got") == body, "{}: damaged", at.url);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_and_missing_buckets_are_named_and_no_secret_is() {
    let (seaweed, azurite, fake) = (SeaweedFs::shared(), Azurite::shared(), GcsFake::start());
    let wrong_key = "d3JvbmcgYnV0IHdlbGwtZm9ybWVkIGtleSBvZiB0aGUgdGVzdHM=";
    for (at, secret, variable) in [
        (seaweed.store(), seaweed.secret(), "AWS_SECRET_ACCESS_KEY"),
        (azurite.store(), azurite.secret(), "AZURE_STORAGE_ACCOUNT_KEY"),
        (fake.store(), fake.secret(), "GOOGLE_BEARER_TOKEN"),
    ] {
        let silent = |error: &StoreError| {
            let text = format!("{error} {error:?}");
            for secret in [secret, wrong_key, "Signature=", "StringToSign", "Bearer"] {
                assert!(!text.contains(secret), "{text}");
            }
        };
        let store = at.with(variable, wrong_key).open().await;
        assert!(!format!("{store:?} {:?}", at.options()).contains(secret), "{store:?}");
        for error in [
            store.get("v1/x").await.expect_err("refused"),
            store.put_if_absent("v1/x", "x".into()).await.expect_err("refused"),
            store.list("v1").await.expect_err("refused"),
        ] {
            assert!(matches!(error, StoreError::Denied { .. }), "{}: {error}", at.url);
            silent(&error);
        }
        let mut elsewhere = at.clone();
        elsewhere.url = at.url.replace("blockferry", "nosuchbucket");
        let store = elsewhere.open().await;
        for error in [
            store.get("v1/x").await.expect_err("no bucket"),
            store.size("v1/x").await.expect_err("no bucket"),
            store.get_range("v1/x", 0..5).await.expect_err("no bucket"),
            store.put_new("v1/x", "x".into()).await.expect_err("no bucket"),
            store.put_new("v1/x", Bytes::from(vec![1; 9 << 20])).await.expect_err("no bucket"),
            store.put_if_absent("v1/x", "x".into()).await.expect_err("no bucket"),
            store.list("v1").await.expect_err("no bucket"),
            store.probe().await.expect_err("no bucket"),
        ] {
            assert!(matches!(error, StoreError::NoBucket { .. }), "{}: {error:?}", elsewhere.url);
            assert!(error.to_string().contains(&elsewhere.url), "{error}");
            silent(&error);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_requests_go_out_in_a_second_than_the_cap_allows() {
    let fake = GcsFake::start();
    let proxy = FaultProxy::start(fake.address());
    let at = fake.store().with("GOOGLE_BASE_URL", &format!("http://{}", proxy.address()));
    let mut options = at.options();
    options.requests_per_second = std::num::NonZeroU32::new(20);
    let store = Store::open_with(&at.url, options).await.expect("opened");
    let started = std::time::Instant::now();
    let reads = (0..60).map(|_| store.get("v1/none"));
    for result in futures::future::join_all(reads).await {
        assert!(result.expect_err("absent").is_not_found());
    }
    assert_eq!(proxy.seen().len(), 60);
    // A second's worth may go at once, the rest at twenty a second.
    assert!(started.elapsed().as_secs_f64() > 1.9, "{:?}", started.elapsed());
}
