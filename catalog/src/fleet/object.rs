//! Reading and changing the fleet's objects by compare-and-swap.

use common::format::FormatError;
use common::ids::Nonce;
use common::net::backoff::Backoff;
use common::rng;

use super::FleetError;
use super::format::Object;
use crate::store::{CasOutcome, PutOutcome, Store, StoreError, Version};

/// Attempts of one change: others change the same object only for a moment.
const ATTEMPTS_MAX: u32 = 24;

/// A fresh nonce.
pub(super) fn nonce() -> Result<Nonce, FleetError> {
    Ok(Nonce(rng::random()?))
}

/// The object at `path`, or `None`.
pub(super) async fn read<T: Object>(store: &Store, path: &str) -> Result<Option<(T, Version)>, FleetError> {
    match store.get_versioned(path).await {
        Ok((body, version)) => Ok(Some((decode(path, &body)?, version))),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn decode<T: Object>(path: &str, body: &[u8]) -> Result<T, FleetError> {
    T::decode(body).map_err(|source: FormatError| FleetError::Object { path: path.into(), source })
}

/// Creates the object at `path`; false where another is there. A lost reply is cleared up by reading back.
pub(super) async fn create<T: Object>(store: &Store, path: &str, mut value: T) -> Result<bool, FleetError> {
    *value.nonce() = nonce()?;
    match store.put_if_absent(path, value.encode().into()).await {
        Ok(PutOutcome::Created) => Ok(true),
        Ok(PutOutcome::Exists) => won(store, path, &mut value).await,
        Err(error @ StoreError::Unavailable { .. }) => match won(store, path, &mut value).await {
            Ok(true) => Ok(true),
            _ => Err(error.into()),
        },
        Err(error) => Err(error.into()),
    }
}

/// Is what lies at `path` what we tried to put there?
async fn won<T: Object>(store: &Store, path: &str, value: &mut T) -> Result<bool, FleetError> {
    Ok(read::<T>(store, path).await?.is_some_and(|(mut found, _)| found.nonce() == value.nonce()))
}

/// Changes the object at `path` by `change`, again and again until no other change came between; `None` where there is no
/// such object. `change` may refuse, which ends it; it must not depend on how often it is called.
pub(super) async fn update<T: Object>(
    store: &Store,
    path: &str,
    mut change: impl FnMut(&mut T) -> Result<(), FleetError>,
) -> Result<Option<T>, FleetError> {
    let mut backoff = Backoff::new(std::time::Duration::from_millis(5), std::time::Duration::from_millis(500));
    for _ in 0..ATTEMPTS_MAX {
        let Some((mut value, version)) = read::<T>(store, path).await? else { return Ok(None) };
        change(&mut value)?;
        *value.nonce() = nonce()?;
        match store.compare_and_swap(path, &version, value.encode().into()).await {
            Ok(CasOutcome::Swapped(_)) => return Ok(Some(value)),
            // Maybe our own, from a reply that was lost inside the store's retries.
            Ok(CasOutcome::Changed) => {
                if won(store, path, &mut value).await? {
                    return Ok(Some(value));
                }
            }
            Err(error @ StoreError::Unavailable { .. }) => {
                return match won(store, path, &mut value).await {
                    Ok(true) => Ok(Some(value)),
                    _ => Err(error.into()),
                };
            }
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(backoff.next_wait(u64::from_le_bytes(rng::random()?))).await;
    }
    Err(FleetError::Contended { path: path.into() })
}
