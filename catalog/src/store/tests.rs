//! The conformance suite on the local store, and what only the local one has.

use std::os::unix::fs::PermissionsExt as _;

use super::*;

fn temporary() -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let url = format!("file://{}/store", dir.path().display());
    (dir, url)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_local_store_conforms() {
    let (_dir, url) = temporary();
    conformance::conforms(&Store::open(&url).await.expect("opened")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_concurrent_writers_exactly_one_wins_and_no_increment_is_lost() {
    let (_dir, url) = temporary();
    let mut stores = Vec::new();
    for _ in 0..8 {
        // Each opens the store anew: as if they were processes.
        stores.push(Store::open(&url).await.expect("opened"));
    }
    conformance::of_concurrent_creators_exactly_one_wins(&stores, 20).await;
    conformance::of_concurrent_swappers_no_increment_is_lost(&stores, 10).await;
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
