//! What was proven of a volume's points: `v1/volumes/<uuid>/proofs`.
//!
//! Promises: several who prove at once lose nothing of each other's; a proof never becomes weaker; points that are not offered any
//! more are forgotten. Never: is asked when something is restored. It is a note of whoever may write the store.

use std::collections::HashSet;
use std::time::Duration;

use common::clock::UnixMillis;
use common::error::{Dispose, Disposition};
use common::format::FormatError;
use common::format::proofs::PROVEN_POINTS_MAX;
pub use common::format::proofs::{Proof, Proofs};
use common::ids::{CloseId, Nonce, VolumeId};
use common::net::backoff::Backoff;
use common::rng;

use super::paths;
use crate::store::{CasOutcome, PutOutcome, Store, StoreError, Version};

/// Attempts of one change: others change the same object only for a moment.
const ATTEMPTS_MAX: u32 = 24;

/// Why proofs can't be read or recorded.
#[derive(Debug, thiserror::Error)]
pub enum ProofsError {
    /// The store failed, or may not be written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The object is not what was written.
    #[error("{path}: {source}: bring the object back or delete it, it only says what was proven earlier")]
    Damaged {
        /// The object.
        path: String,
        /// What is wrong with it.
        source: FormatError,
    },
    /// Others kept changing it.
    #[error("{path} was changed by others again and again: run the command again")]
    Contended {
        /// The object.
        path: String,
    },
    /// No random bytes.
    #[error(transparent)]
    Rng(#[from] rng::RngError),
}

impl Dispose for ProofsError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Damaged { source, .. } => source.disposition(),
            Self::Contended { .. } | Self::Rng(_) => Disposition::Retry,
        }
    }
}

/// What was proven of `volume`'s points; where nothing was, nothing.
///
/// # Errors
/// [`ProofsError::Store`], [`ProofsError::Damaged`].
pub async fn read(store: &Store, volume: VolumeId) -> Result<Proofs, ProofsError> {
    Ok(read_versioned(store, volume).await?.0)
}

async fn read_versioned(store: &Store, volume: VolumeId) -> Result<(Proofs, Option<Version>), ProofsError> {
    let path = paths::proofs(volume);
    let (body, version) = match store.get_versioned(&path).await {
        Ok(read) => read,
        Err(error) if error.is_not_found() => return Ok((Proofs::none(volume), None)),
        Err(error) => return Err(error.into()),
    };
    let proofs = Proofs::decode(&body).map_err(|source| ProofsError::Damaged { path: path.clone(), source })?;
    if proofs.volume != volume {
        let source = FormatError::Invalid { what: "volume of the proofs", found: 0 };
        return Err(ProofsError::Damaged { path, source });
    }
    Ok((proofs, Some(version)))
}

/// Records that each of `points` was proven at `at`. `offered` are the points that the volume has; others are forgotten.
///
/// # Errors
/// [`ProofsError`]; then it may have been recorded.
pub async fn raise(
    store: &Store,
    volume: VolumeId,
    points: &[(CloseId, Proof)],
    at: UnixMillis,
    offered: &HashSet<CloseId>,
) -> Result<(), ProofsError> {
    let path = paths::proofs(volume);
    let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(500));
    for _ in 0..ATTEMPTS_MAX {
        let (mut proofs, version) = read_versioned(store, volume).await?;
        proofs.points.retain(|point, _| offered.contains(point));
        for (point, proof) in points {
            if *proof > Proof::Committed {
                proofs.raise(*point, *proof, at);
            }
        }
        forget_oldest(&mut proofs);
        proofs.nonce = Nonce(rng::random()?);
        let body = bytes::Bytes::from(proofs.encode());
        let written = match &version {
            None => store.put_if_absent(&path, body).await.map(|outcome| outcome == PutOutcome::Created),
            Some(version) => {
                let swapped = store.compare_and_swap(&path, version, body).await;
                swapped.map(|outcome| matches!(outcome, CasOutcome::Swapped(_)))
            }
        };
        // A lost reply is cleared up by reading back whose nonce is there.
        let won = async || Ok::<_, ProofsError>(read(store, volume).await?.nonce == proofs.nonce);
        match written {
            Ok(true) => return Ok(()),
            Ok(false) if won().await? => return Ok(()),
            Err(error @ StoreError::Unavailable { .. }) => {
                return if won().await? { Ok(()) } else { Err(error.into()) };
            }
            Ok(false) => {}
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(backoff.next_wait(u64::from_le_bytes(rng::random()?))).await;
    }
    Err(ProofsError::Contended { path })
}

/// Keeps the object within its bound: the longest not proven go first.
fn forget_oldest(proofs: &mut Proofs) {
    while proofs.points.len() > PROVEN_POINTS_MAX {
        let oldest = proofs.points.iter().min_by_key(|(_, (_, at))| *at).map(|(point, _)| *point);
        oldest.and_then(|point| proofs.points.remove(&point));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn proofs_of_many_at_once_are_all_kept_and_those_of_points_that_are_gone_are_not() {
        let dir = tempfile::tempdir().expect("a folder");
        let store = Store::open(&format!("file://{}/store", dir.path().display())).await.expect("a store");
        let volume = VolumeId::from_random([7; 16]);
        let id = |number: u8| CloseId([number; 32]);
        assert_eq!(read(&store, volume).await.expect("nothing yet"), Proofs::none(volume));
        let offered: HashSet<CloseId> = (0..8).map(id).collect();
        let writers: Vec<_> = (0..8)
            .map(|number| {
                let (store, offered) = (store.clone(), offered.clone());
                tokio::spawn(async move {
                    raise(&store, volume, &[(id(number), Proof::Opened)], UnixMillis(number.into()), &offered).await
                })
            })
            .collect();
        for writer in writers {
            writer.await.expect("no panic").expect("recorded");
        }
        let proofs = read(&store, volume).await.expect("readable");
        let expected: Vec<_> = (0..8).map(|n| (id(n), (Proof::Opened, UnixMillis(n.into())))).collect();
        assert_eq!(proofs.points.into_iter().collect::<Vec<_>>(), expected);
        let offered: HashSet<CloseId> = [id(3)].into();
        raise(&store, volume, &[(id(3), Proof::Verified)], UnixMillis(99), &offered).await.expect("recorded");
        let proofs = read(&store, volume).await.expect("readable");
        assert_eq!(proofs.points.into_iter().collect::<Vec<_>>(), [(id(3), (Proof::Opened, UnixMillis(3)))]);
    }

    #[tokio::test]
    async fn a_damaged_object_is_named() {
        let dir = tempfile::tempdir().expect("a folder");
        let store = Store::open(&format!("file://{}/store", dir.path().display())).await.expect("a store");
        let volume = VolumeId::from_random([7; 16]);
        store.put_new(&paths::proofs(volume), bytes::Bytes::from_static(b"rubbish")).await.expect("written");
        let error = read(&store, volume).await.expect_err("damaged").to_string();
        assert!(error.contains(&paths::proofs(volume)), "{error}");
    }
}
