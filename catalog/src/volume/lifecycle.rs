//! Renaming, retiring and deleting volumes.
//!
//! - **Rename**: the new name is claimed (create-if-absent), then the header says it. The old claim stays: a sender that is configured
//!   with the old name goes on, and the old name finds the volume. A crash between the two leaves both names finding it and the header
//!   with the old one; the same rename again completes it.
//! - **Retire, delete**: first `v1/volumes/<uuid>/lifecycle` says so, then the log's next generation is taken, so that whoever writes
//!   it is fenced; receivers refuse the sessions that follow. A crash between the two leaves a session that goes on until it ends; the
//!   same command again fences it.
//! - **Purge**: all objects of a volume that was deleted longer ago than the grace period, by the store's time. Everything but header
//!   and lifecycle first, so that the volume stays known as deleted until nothing else is left; then other names, header, lifecycle.
//!   Killed anywhere, it goes on when it is run again. The claim of the volume's own name stays without a header, and the next volume
//!   of that name takes it over: removing it could hit the claim of that volume.
//!
//! Never: removes an object of a volume that is not deleted, or takes a name from another volume.

use common::clock::{Clock, UnixMillis};
use common::error::{Dispose, Disposition};
use common::format::FormatError;
use common::format::lifecycle::{Lifecycle, Phase};
use common::format::volume_header::VolumeHeader;
use common::ids::{Nonce, ReceiverId, VolumeId};
use common::net::backoff::Backoff;
use futures::StreamExt as _;

use super::header::{self, HeaderError, StoredHeader};
use super::log::LogError;
use super::paths;
use super::writer::LogWriter;
use crate::store::{CasOutcome, Store, StoreError, Version};

/// Attempts of one change: others change the same object only for a moment.
const ATTEMPTS_MAX: u32 = 24;
/// Objects of one volume deleted, and lifecycles of several read, at a time.
const IN_PARALLEL: usize = 16;

/// Why a volume's lifecycle was not read or changed.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Header or name.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The log could not be taken from its writer.
    #[error("the volume is {phase} now, but its log could not be taken from whoever writes it: {source}; run the command again", phase = .phase.as_str())]
    Log {
        /// What the volume is now.
        phase: Phase,
        /// Why.
        source: LogError,
    },
    /// The object's bytes are not what was written.
    #[error("{path}: {source}")]
    Damaged {
        /// The object.
        path: String,
        /// What is wrong with it.
        source: FormatError,
    },
    /// The object keeps changing.
    #[error("{path} is changed by others all the time: try again")]
    Contended {
        /// The object.
        path: String,
    },
    /// A volume that is on its way out can't be changed so.
    #[error("volume {volume} is deleted (since {at}): `blockferry volume restore` brings it back first")]
    Deleted {
        /// Volume.
        volume: VolumeId,
        /// Since when.
        at: UnixMillis,
    },
    /// No random bytes.
    #[error(transparent)]
    Rng(#[from] common::rng::RngError),
}

impl Dispose for LifecycleError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Header(error) => error.disposition(),
            Self::Log { source, .. } => source.disposition(),
            Self::Damaged { source, .. } => source.disposition(),
            Self::Contended { .. } | Self::Rng(_) => Disposition::Retry,
            Self::Deleted { .. } => Disposition::BadInput,
        }
    }
}

/// A volume's lifecycle; `None` for a volume of which nothing was ever said: it is active.
///
/// # Errors
/// [`LifecycleError::Store`], [`LifecycleError::Damaged`].
pub async fn read(store: &Store, volume: VolumeId) -> Result<Option<Lifecycle>, LifecycleError> {
    Ok(read_versioned(store, volume).await?.map(|(lifecycle, _)| lifecycle))
}

/// What may be done with a volume.
///
/// # Errors
/// As [`read`].
pub async fn phase(store: &Store, volume: VolumeId) -> Result<Phase, LifecycleError> {
    Ok(read(store, volume).await?.map_or(Phase::Active, |lifecycle| lifecycle.phase))
}

async fn read_versioned(store: &Store, volume: VolumeId) -> Result<Option<(Lifecycle, Version)>, LifecycleError> {
    let path = paths::lifecycle(volume);
    match store.get_versioned(&path).await {
        Ok((bytes, version)) => {
            let lifecycle = Lifecycle::decode(&bytes).map_err(|source| LifecycleError::Damaged { path, source })?;
            Ok(Some((lifecycle, version)))
        }
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Says what is to become of a volume, and takes its log from whoever writes it where that is to end. `by` is who says so. Safe to
/// repeat: what is so already stays as it is, with its time, but a writer is fenced again.
///
/// # Errors
/// [`LifecycleError`]; [`LifecycleError::Deleted`] for retiring what is deleted.
pub async fn set(
    store: &Store,
    header: &VolumeHeader,
    phase: Phase,
    by: &str,
    clock: &Clock,
) -> Result<Lifecycle, LifecycleError> {
    let lifecycle = say(store, header.volume, phase, by, clock).await?;
    if phase != Phase::Active {
        // The writer of this one entry is nobody who goes on.
        let nobody = ReceiverId(common::rng::random()?);
        LogWriter::open(store, header, nobody, clock).await.map_err(|source| LifecycleError::Log { phase, source })?;
    }
    Ok(lifecycle)
}

async fn say(
    store: &Store,
    volume: VolumeId,
    phase: Phase,
    by: &str,
    clock: &Clock,
) -> Result<Lifecycle, LifecycleError> {
    let path = paths::lifecycle(volume);
    let mut backoff = Backoff::new(std::time::Duration::from_millis(5), std::time::Duration::from_millis(500));
    for _ in 0..ATTEMPTS_MAX {
        let found = read_versioned(store, volume).await?;
        match &found {
            Some((lifecycle, _)) if lifecycle.phase == phase => return Ok(lifecycle.clone()),
            Some((Lifecycle { phase: Phase::Deleted, at, .. }, _)) if phase == Phase::Retired => {
                return Err(LifecycleError::Deleted { volume, at: *at });
            }
            _ => {}
        }
        let by = by.chars().take(32).collect();
        let wanted = Lifecycle { nonce: Nonce(common::rng::random()?), phase, at: clock.now(), by };
        let done = match &found {
            Some((_, version)) => {
                let swapped = store.compare_and_swap(&path, version, wanted.encode().into()).await;
                swapped.map(|outcome| matches!(outcome, CasOutcome::Swapped(_)))
            }
            None => store.put_if_absent(&path, wanted.encode().into()).await.map(|_| false),
        };
        if matches!(done, Ok(true)) {
            return Ok(wanted);
        }
        // The reply of a change that won may be lost: the nonce tells.
        match (read(store, volume).await?, done) {
            (Some(now), _) if now.nonce == wanted.nonce => return Ok(now),
            (_, Err(error)) => return Err(error.into()),
            _ => {}
        }
        tokio::time::sleep(backoff.next_wait(u64::from_le_bytes(common::rng::random()?))).await;
    }
    Err(LifecycleError::Contended { path })
}

/// Gives a volume another name within its machine; the old one still finds it. Safe to repeat, also after a crash.
///
/// # Errors
/// [`HeaderError::NameTaken`] where another volume has the name; [`LifecycleError::Deleted`]; those of reading and writing.
pub async fn rename(store: &Store, volume: VolumeId, name: &str) -> Result<StoredHeader, LifecycleError> {
    if let Some(Lifecycle { phase: Phase::Deleted, at, .. }) = read(store, volume).await? {
        return Err(LifecycleError::Deleted { volume, at });
    }
    for _ in 0..ATTEMPTS_MAX {
        let stored = header::read(store, volume).await?;
        if stored.header.name == name {
            return Ok(stored);
        }
        header::claim(store, &VolumeHeader { name: name.into(), ..stored.header.clone() }).await?;
        match header::update(store, &stored, |header| name.clone_into(&mut header.name)).await {
            Err(HeaderError::Changed { .. }) => {}
            other => return Ok(other?),
        }
    }
    Err(LifecycleError::Contended { path: paths::header(volume) })
}

/// A volume and what may be done with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// Its header.
    pub header: VolumeHeader,
    /// What may be done with it.
    pub phase: Phase,
    /// When that was said; `None` for a volume of which nothing was.
    pub since: Option<UnixMillis>,
}

/// All volumes, those that are deleted included, and the errors of what can't be read.
///
/// # Errors
/// Where the store can't be listed.
pub async fn list(store: &Store) -> Result<(Vec<Known>, Vec<LifecycleError>), LifecycleError> {
    let (headers, errors) = header::list(store).await?;
    let mut errors: Vec<LifecycleError> = errors.into_iter().map(Into::into).collect();
    let mut reads = futures::stream::iter(headers)
        .map(|header| async move {
            let lifecycle = read(store, header.volume).await?;
            let (phase, since) = lifecycle.map_or((Phase::Active, None), |found| (found.phase, Some(found.at)));
            Ok(Known { header, phase, since })
        })
        .buffered(IN_PARALLEL);
    let mut known = Vec::new();
    while let Some(read) = reads.next().await {
        match read {
            Ok(volume) => known.push(volume),
            Err(error) => errors.push(error),
        }
    }
    Ok((known, errors))
}

/// What [`purge`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purged {
    /// It is not deleted.
    Kept,
    /// It is deleted, but not for so long.
    Waiting {
        /// Until then by the store's time.
        until: UnixMillis,
    },
    /// Its objects are gone, or would be.
    Gone {
        /// How many.
        objects: u64,
        /// Their bytes.
        bytes: u64,
    },
}

/// Removes all objects of a volume that was deleted longer than `grace_ms` before `store_now`, which is the store's time. With
/// `dry_run` only counts them.
///
/// # Errors
/// Those of the store; run it again then.
pub async fn purge(
    store: &Store,
    volume: VolumeId,
    grace_ms: i64,
    store_now: UnixMillis,
    dry_run: bool,
) -> Result<Purged, LifecycleError> {
    if phase(store, volume).await? != Phase::Deleted {
        return Ok(Purged::Kept);
    }
    let (header, lifecycle) = (paths::header(volume), paths::lifecycle(volume));
    let (mut others, mut last, mut deleted_at, mut bytes) = (Vec::new(), Vec::new(), None, 0);
    let mut listed = store.list_stream(&paths::volume(volume))?;
    while let Some(meta) = listed.next().await {
        let meta = meta?;
        bytes += meta.size;
        if meta.path == lifecycle {
            deleted_at = Some(meta.modified);
        }
        if meta.path == header || meta.path == lifecycle { last.push(meta.path) } else { others.push(meta.path) }
    }
    // A listing may miss what is there: then another time.
    let Some(deleted_at) = deleted_at else { return Ok(Purged::Waiting { until: store_now }) };
    let until = UnixMillis(deleted_at.0.saturating_add(grace_ms));
    if store_now < until {
        return Ok(Purged::Waiting { until });
    }
    let gone = Purged::Gone { objects: (others.len() + last.len()) as u64, bytes };
    if dry_run {
        return Ok(gone);
    }
    let mut deletions = futures::stream::iter(others)
        .map(|path| async move { store.delete(&path).await })
        .buffer_unordered(IN_PARALLEL);
    while let Some(deleted) = deletions.next().await {
        deleted?;
    }
    // While the header is there, nobody takes one of its claims over.
    if let Ok(stored) = header::read(store, volume).await {
        header::release_other_names(store, &stored.header).await?;
    }
    store.delete(&header).await?;
    store.delete(&lifecycle).await?;
    Ok(gone)
}

/// Volumes that are deleted and not purged yet, those of which only a part is left included.
///
/// # Errors
/// Where the store can't be listed or read.
pub async fn deleted(store: &Store) -> Result<Vec<VolumeId>, LifecycleError> {
    let (claims, _) = header::names(store).await?;
    let mut volumes: Vec<VolumeId> = claims.into_iter().map(|claim| claim.volume).collect();
    volumes.sort_unstable();
    volumes.dedup();
    let mut reads = futures::stream::iter(volumes)
        .map(|volume| async move { phase(store, volume).await.map(|phase| (volume, phase)) })
        .buffered(IN_PARALLEL);
    let mut deleted = Vec::new();
    while let Some(read) = reads.next().await {
        if let (volume, Phase::Deleted) = read? {
            deleted.push(volume);
        }
    }
    Ok(deleted)
}

#[cfg(test)]
mod tests;
