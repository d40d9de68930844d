//! One suite that every store must pass, run on the local one; and what only the local one has.

use std::collections::HashSet;
use std::os::unix::fs::PermissionsExt as _;

use super::*;

fn temporary() -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let url = format!("file://{}/store", dir.path().display());
    (dir, url)
}

/// The promises of the module's doc, on any store.
async fn conforms(store: &Store) {
    store.probe().await.expect("the probe passes");
    assert!(store.list("v1").await.expect("listed").is_empty(), "the probe leaves nothing");

    // Whole objects and ranges.
    assert!(store.get("v1/a/none").await.expect_err("absent").is_not_found());
    assert!(store.size("v1/a/none").await.expect_err("absent").is_not_found());
    store.put_new("v1/a/one", Bytes::from_static(b"0123456789")).await.expect("put");
    assert_eq!(store.get("v1/a/one").await.expect("got"), "0123456789");
    assert_eq!(store.size("v1/a/one").await.expect("size"), 10);
    assert_eq!(store.get_range("v1/a/one", 3..6).await.expect("range"), "345");
    assert!(store.get_range("v1/a/one", 4..4).await.expect("nothing").is_empty());
    let error = store.get_range("v1/a/one", 5..11).await.expect_err("beyond the end");
    assert!(matches!(error, StoreError::Truncated { expected: 11, found: 10, .. }), "{error}");
    assert!(store.get("v1/a").await.expect_err("a folder is no object").is_not_found());

    // A large object in odd parts.
    let parts: Vec<Bytes> = (0_u8..37).map(|n| Bytes::from(vec![n; 300_001 + usize::from(n)])).collect();
    let whole = Bytes::from(parts.concat());
    store.put_segment("v1/a/large", parts).await.expect("put");
    assert_eq!(store.get("v1/a/large").await.expect("got"), whole);
    assert_eq!(
        store.get_range("v1/a/large", 1_000_000..9_000_000).await.expect("range"),
        whole.slice(1_000_000..9_000_000)
    );

    // Create-if-absent never replaces.
    assert_eq!(store.put_if_absent("v1/b/x", "first".into()).await.expect("put"), PutOutcome::Created);
    assert_eq!(store.put_if_absent("v1/b/x", "second".into()).await.expect("put"), PutOutcome::Exists);
    assert_eq!(store.get("v1/b/x").await.expect("got"), "first");

    // Compare-and-swap takes the present version alone.
    let (_, first) = store.get_versioned("v1/b/x").await.expect("got");
    let CasOutcome::Swapped(second) = store.compare_and_swap("v1/b/x", &first, "third".into()).await.expect("swap")
    else {
        panic!("the present version was refused");
    };
    assert_eq!(store.compare_and_swap("v1/b/x", &first, "fourth".into()).await.expect("swap"), CasOutcome::Changed);
    assert_eq!(store.get_versioned("v1/b/x").await.expect("got"), (Bytes::from_static(b"third"), second.clone()));

    // Listings see a folder and nothing that merely starts like it.
    store.put_new("v1/bb/y", "y".into()).await.expect("put");
    let names: HashSet<String> = store.list("v1/b").await.expect("listed").into_iter().map(|meta| meta.path).collect();
    assert_eq!(names, HashSet::from(["v1/b/x".to_owned()]));
    assert_eq!(store.list("v1/").await.expect("listed").len(), 4);
    assert!(store.list("v2").await.expect("listed").is_empty());

    // Deletion is idempotent, and what is gone can't be swapped back.
    store.delete("v1/b/x").await.expect("deleted");
    store.delete("v1/b/x").await.expect("deleted again");
    assert_eq!(store.compare_and_swap("v1/b/x", &second, "fifth".into()).await.expect("swap"), CasOutcome::Changed);
    assert!(store.get("v1/b/x").await.expect_err("gone").is_not_found());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_local_store_conforms() {
    let (_dir, url) = temporary();
    conforms(&Store::open(&url).await.expect("opened")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_concurrent_creators_exactly_one_wins() {
    let (_dir, url) = temporary();
    for round in 0..20 {
        let path = format!("v1/log/{round}");
        let creators = (0..8).map(|n| {
            let (url, path) = (url.clone(), path.clone());
            // Each opens the store anew: as if they were processes.
            tokio::spawn(async move {
                let store = Store::open(&url).await.expect("opened");
                (n, store.put_if_absent(&path, format!("writer {n}").into()).await.expect("put"))
            })
        });
        let mut winners = Vec::new();
        for creator in creators.collect::<Vec<_>>() {
            let (n, outcome) = creator.await.expect("joined");
            if outcome == PutOutcome::Created {
                winners.push(n);
            }
        }
        assert_eq!(winners.len(), 1, "{winners:?}");
        let body = Store::open(&url).await.expect("opened").get(&path).await.expect("got");
        assert_eq!(body, format!("writer {}", winners[0]));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_concurrent_swappers_exactly_one_wins_and_no_increment_is_lost() {
    let (_dir, url) = temporary();
    let store = Store::open(&url).await.expect("opened");
    store.put_if_absent("v1/counter", "0".into()).await.expect("put");
    let adders = (0..8).map(|_| {
        let url = url.clone();
        tokio::spawn(async move {
            let store = Store::open(&url).await.expect("opened");
            for _ in 0..10 {
                loop {
                    let (body, version) = store.get_versioned("v1/counter").await.expect("got");
                    let value: u32 = std::str::from_utf8(&body).expect("text").parse().expect("a number");
                    let next = Bytes::from((value + 1).to_string());
                    match store.compare_and_swap("v1/counter", &version, next).await.expect("swap") {
                        CasOutcome::Swapped(_) => break,
                        CasOutcome::Changed => {}
                    }
                }
            }
        })
    });
    for adder in adders.collect::<Vec<_>>() {
        adder.await.expect("joined");
    }
    assert_eq!(store.get("v1/counter").await.expect("got"), "80");
}

#[tokio::test]
async fn what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not() {
    let (dir, url) = temporary();
    let tmp = dir.path().join("store/.tmp");
    std::fs::create_dir_all(&tmp).expect("made");
    std::fs::write(tmp.join("dead"), b"half a body").expect("written");
    let living = std::fs::File::create(tmp.join("living")).expect("made");
    rustix::fs::flock(&living, rustix::fs::FlockOperation::LockExclusive).expect("locked");
    let store = Store::open(&url).await.expect("opened");
    store.put_new("v1/x", "x".into()).await.expect("put");
    assert!(!tmp.join("dead").exists());
    assert!(tmp.join("living").exists());
    assert_eq!(store.list("v1").await.expect("listed").len(), 1);
}

#[tokio::test]
async fn opening_and_reading_write_nothing() {
    let (dir, url) = temporary();
    let store = Store::open(&url).await.expect("opened");
    assert!(store.get("v1/x").await.expect_err("absent").is_not_found());
    assert!(store.list("v1").await.expect("listed").is_empty());
    assert_eq!(std::fs::read_dir(dir.path()).expect("read").count(), 0);
}

#[tokio::test]
async fn bad_urls_say_what_was_expected() {
    let cases = [
        ("/srv/store", "expected file:///path, s3://"),
        ("ftp://host/x", "found ftp://"),
        ("file://relative/x", "three slashes"),
        ("file:///no/such/directory/here", "neither /no/such/directory/here nor the directory above"),
        ("file:///etc/passwd", "not a directory"),
        ("s3://key:secret@bucket/x", "environment"),
        ("s3://bucket/../x/..%2f", "not valid"),
        ("s3:///x", "bucket"),
    ];
    for (url, part) in cases {
        let error = Store::open(url).await.expect_err(url).to_string();
        assert!(error.contains(part), "{url}: {error}");
    }
}

#[tokio::test]
async fn a_full_file_system_is_an_error_that_names_the_store() {
    // A file system of its own needs root; as another user there is nothing to test on.
    let (dir, url) = temporary();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"])
        .arg(dir.path())
        .status()
        .is_ok_and(|status| status.success());
    if !mounted {
        return;
    }
    let store = Store::open(&url).await.expect("opened");
    let result = store.put_segment("v1/big", vec![Bytes::from(vec![1; 4 << 20])]).await;
    let leftovers = std::fs::read_dir(dir.path().join("store/.tmp")).map(Iterator::count);
    let remount = |option: &str| {
        std::process::Command::new("mount").args(["-o", &format!("remount,{option}")]).arg(dir.path()).status()
    };
    let read_only = remount("ro");
    let refused = store.put_if_absent("v1/small", "x".into()).await;
    let unmounted = std::process::Command::new("umount").arg(dir.path()).status();
    assert!(unmounted.is_ok_and(|status| status.success()));
    let error = result.expect_err("no space");
    assert!(matches!(error, StoreError::NoSpace { .. }), "{error}");
    assert_eq!(leftovers.expect("read"), 0, "nothing half-done is left");
    if read_only.is_ok_and(|status| status.success()) {
        let error = refused.expect_err("read-only");
        assert!(matches!(error, StoreError::ReadOnly { .. }), "{error}");
    }
}

#[tokio::test]
async fn objects_are_readable_by_others_and_the_stores_own_folders_are_not() {
    let (dir, url) = temporary();
    Store::open(&url).await.expect("opened").put_new("v1/x", "x".into()).await.expect("put");
    let mode = |path: &str| std::fs::metadata(dir.path().join(path)).expect("there").permissions().mode() & 0o777;
    assert_eq!(mode("store/.tmp"), 0o700);
    assert_eq!(mode("store/.locks"), 0o700);
    assert_eq!(mode("store/v1/x") & 0o400, 0o400);
}
