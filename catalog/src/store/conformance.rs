//! One suite that every store must pass: the promises of [`super`]'s doc, on a store that is empty but for what the suite
//! made. Run on the local store beside its code, and on real servers from the end-to-end tests.

#![allow(clippy::panic, clippy::missing_panics_doc, reason = "a suite of tests fails by panicking")]

use std::collections::HashSet;

use futures::StreamExt as _;

use super::{Bytes, CasOutcome, PutOutcome, Store, StoreError};

/// The promises of the module's doc, on any store.
///
/// # Panics
/// Where one is broken.
pub async fn conforms(store: &Store) {
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
    store.put_new("v1/b/y/z", "z".into()).await.expect("put");
    let behind: HashSet<String> = store
        .list_stream_after("v1", "v1/b/x")
        .expect("a stream")
        .map(|meta| meta.expect("listed").path)
        .filter(|path| std::future::ready(path.starts_with("v1/b")))
        .collect()
        .await;
    assert_eq!(behind, HashSet::from(["v1/b/y/z".to_owned(), "v1/bb/y".to_owned()]));
    store.delete("v1/b/y/z").await.expect("deleted");
    assert!(store.list("v2").await.expect("listed").is_empty());

    // Deletion is idempotent, and what is gone can't be swapped back.
    store.delete("v1/b/x").await.expect("deleted");
    store.delete("v1/b/x").await.expect("deleted again");
    assert_eq!(store.compare_and_swap("v1/b/x", &second, "fifth".into()).await.expect("swap"), CasOutcome::Changed);
    assert!(store.get("v1/b/x").await.expect_err("gone").is_not_found());
}

/// Of many that create one object at once, exactly one is told so, and its body is there.
///
/// # Panics
/// Where not.
pub async fn of_concurrent_creators_exactly_one_wins(stores: &[Store], rounds: u32) {
    for round in 0..rounds {
        let path = format!("v1/creators/{round}");
        let creators: Vec<_> = stores
            .iter()
            .cloned()
            .enumerate()
            .map(|(n, store)| {
                let path = path.clone();
                tokio::spawn(
                    async move { store.put_if_absent(&path, format!("writer {n}").into()).await.expect("put") },
                )
            })
            .collect();
        let mut winners = Vec::new();
        for (n, creator) in creators.into_iter().enumerate() {
            if creator.await.expect("joined") == PutOutcome::Created {
                winners.push(n);
            }
        }
        assert_eq!(winners.len(), 1, "round {round}: {winners:?}");
        assert_eq!(stores[0].get(&path).await.expect("got"), format!("writer {}", winners[0]));
    }
}

/// Counters that are incremented by compare-and-swap count right. Bodies hold who wrote them and when, as all bodies that are
/// swapped must differ.
///
/// # Panics
/// Where one increment is lost.
pub async fn of_concurrent_swappers_no_increment_is_lost(stores: &[Store], each: u32) {
    const PATH: &str = "v1/counter";
    stores[0].put_if_absent(PATH, "0".into()).await.expect("put");
    let adders: Vec<_> = stores
        .iter()
        .cloned()
        .enumerate()
        .map(|(n, store)| {
            tokio::spawn(async move {
                for step in 0..each {
                    for attempt in 0_u32.. {
                        let (body, version) = store.get_versioned(PATH).await.expect("got");
                        let text = std::str::from_utf8(&body).expect("text");
                        let value: u32 = text.split(' ').next().and_then(|first| first.parse().ok()).expect("a number");
                        let next = Bytes::from(format!("{} by {n} in step {step}, attempt {attempt}", value + 1));
                        match store.compare_and_swap(PATH, &version, next).await.expect("swap") {
                            CasOutcome::Swapped(_) => break,
                            CasOutcome::Changed => {}
                        }
                    }
                }
            })
        })
        .collect();
    for adder in adders {
        adder.await.expect("joined");
    }
    let body = stores[0].get(PATH).await.expect("got");
    let expected = format!("{} by", u32::try_from(stores.len()).expect("few") * each);
    assert!(body.starts_with(expected.as_bytes()), "expected {expected}, found {body:?}");
}
