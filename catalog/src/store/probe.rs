//! Is this store what Blockferry needs? Asked once at a receiver's start, by trying.

use bytes::Bytes;

use super::{CasOutcome, PutOutcome, Store, StoreError};

pub(super) async fn probe(store: &Store) -> Result<(), StoreError> {
    let random: [u8; 16] = common::rng::random().map_err(|error| StoreError::Unavailable {
        op: "probe",
        path: "v1/probe".into(),
        reason: error.to_string(),
    })?;
    let path = format!("v1/probe/{}", hex(&random));
    let body = |step: u8| {
        let mut body = b"blockferry probe ".to_vec();
        body.extend_from_slice(&random);
        body.push(step);
        Bytes::from(body)
    };
    let result = try_all(store, &path, body).await;
    // The object goes in either case; what failed first is what counts.
    let removed = store.delete(&path).await;
    result?;
    removed
}

async fn try_all(store: &Store, path: &str, body: impl Fn(u8) -> Bytes) -> Result<(), StoreError> {
    let broken = |what| Err(StoreError::NotConditional { what });
    if store.put_if_absent(path, body(1)).await? != PutOutcome::Created {
        // Possible only where the first reply was lost and the store's client asked again.
        tracing::debug!(path, "the probe's object existed: its first reply was lost");
    }
    if store.put_if_absent(path, body(2)).await? != PutOutcome::Exists {
        return broken("create-if-absent (If-None-Match)");
    }
    let (found, first) = store.get_versioned(path).await?;
    if found != body(1) {
        return broken("create-if-absent (If-None-Match): it answered \"exists\" and overwrote");
    }
    let CasOutcome::Swapped(second) = store.compare_and_swap(path, &first, body(3)).await? else {
        return broken("compare-and-swap (If-Match): it refused the present version");
    };
    if store.compare_and_swap(path, &first, body(4)).await? != CasOutcome::Changed {
        return broken("compare-and-swap (If-Match): it took an old version");
    }
    let (found, version) = store.get_versioned(path).await?;
    if found != body(3) || version != second {
        return broken("compare-and-swap (If-Match): what it reads is not what it swapped in");
    }
    let whole = body(3);
    if store.get_range(path, 4..12).await? != whole.slice(4..12) {
        return broken("range reads");
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
