//! Volume headers and the names by which volumes are found.
//!
//! A volume is made in two steps: its name is claimed (create-if-absent), then its header created (create-if-absent). A crash
//! in between leaves a claim without a header; the next creation by the same machine takes that claim over.

use common::error::{Dispose, Disposition};
use common::format::FormatError;
use common::format::volume_header::{IncarnationSize, VolumeHeader};
use common::format::volume_name::VolumeName;
use common::ids::{Geometry, Incarnation, MachineId, Nonce, VolumeId};
use common::limits;
use futures::StreamExt as _;

use super::paths;
use crate::store::{CasOutcome, PutOutcome, Store, StoreError, Version};

/// Name claims and headers read at the same time.
const READS_IN_PARALLEL: usize = 16;
/// Attempts to take over an abandoned claim before giving up.
const CLAIM_ATTEMPTS: usize = 4;

/// What went wrong with a volume's header or name.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No such volume.
    #[error("no volume {volume} in the store: it has no header")]
    NoVolume {
        /// Volume asked for.
        volume: VolumeId,
    },
    /// The object's bytes are not what was written.
    #[error("{path}: {source}")]
    Damaged {
        /// The object.
        path: String,
        /// What is wrong with it.
        source: FormatError,
    },
    /// The object is of another volume than its path says.
    #[error("{path} is the header of volume {found}: it was moved or overwritten")]
    WrongPlace {
        /// The object.
        path: String,
        /// The volume it names.
        found: VolumeId,
    },
    /// The machine has another volume of this name.
    #[error("machine {machine} already has a volume \"{name}\" ({volume}): choose another name, or use that volume")]
    NameTaken {
        /// Machine.
        machine: String,
        /// Name asked for.
        name: String,
        /// The volume that has it.
        volume: VolumeId,
    },
    /// The volume exists and belongs to another machine or has another name.
    #[error("volume {volume} exists already as {existing}")]
    VolumeTaken {
        /// Volume.
        volume: VolumeId,
        /// `MACHINE/NAME` that it has.
        existing: String,
    },
    /// A name that is empty or too long.
    #[error("{what} has {found} bytes, expected 1 to {max}")]
    BadName {
        /// Which name.
        what: &'static str,
        /// Its bytes.
        found: usize,
        /// Bound.
        max: usize,
    },
    /// Somebody else changed the header since it was read.
    #[error("the header of volume {volume} was changed by another process meanwhile: read it again and repeat")]
    Changed {
        /// Volume.
        volume: VolumeId,
    },
    /// The volume's disk is not one that grew to this size.
    #[error(
        "volume {volume} can't grow to {disk_bytes} bytes: its current incarnation is {incarnation} of {found} bytes; a disk \
         that shrank or was replaced is a new volume, under another name"
    )]
    NotGrown {
        /// Volume.
        volume: VolumeId,
        /// Its current incarnation.
        incarnation: Incarnation,
        /// That one's size.
        found: u64,
        /// Size asked for.
        disk_bytes: u64,
    },
    /// Nothing is called so.
    #[error("no volume \"{text}\" in the store{known}: run `blockferry volume list` to see all")]
    NotFound {
        /// What was looked for.
        text: String,
        /// Some of the names there are, as a clause.
        known: String,
    },
    /// Several volumes are called so.
    #[error("volume name \"{text}\" is ambiguous, name one of: {}", candidates.join(", "))]
    Ambiguous {
        /// What was looked for.
        text: String,
        /// `MACHINE/NAME (UUID)` of each.
        candidates: Vec<String>,
    },
    /// No random bytes.
    #[error(transparent)]
    Rng(#[from] common::rng::RngError),
}

impl HeaderError {
    /// The path of the object that is damaged, where one is.
    #[must_use]
    pub fn bad_object(&self) -> Option<&str> {
        match self {
            Self::Damaged { path, .. } | Self::WrongPlace { path, .. } => Some(path),
            _ => None,
        }
    }
}

impl Dispose for HeaderError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Damaged { source, .. } => source.disposition(),
            Self::WrongPlace { .. } => Disposition::Corrupt,
            Self::Changed { .. } | Self::Rng(_) => Disposition::Retry,
            Self::NoVolume { .. }
            | Self::NameTaken { .. }
            | Self::VolumeTaken { .. }
            | Self::BadName { .. }
            | Self::NotGrown { .. }
            | Self::NotFound { .. }
            | Self::Ambiguous { .. } => Disposition::BadInput,
        }
    }
}

/// A header and the version to compare with when it is changed.
#[derive(Debug, Clone)]
pub struct StoredHeader {
    /// The header.
    pub header: VolumeHeader,
    version: Version,
}

/// Reads a volume's header.
///
/// # Errors
/// [`HeaderError::NoVolume`], [`HeaderError::Damaged`], [`HeaderError::WrongPlace`], [`HeaderError::Store`].
pub async fn read(store: &Store, volume: VolumeId) -> Result<StoredHeader, HeaderError> {
    let path = paths::header(volume);
    let (bytes, version) = store
        .get_versioned(&path)
        .await
        .map_err(|error| if error.is_not_found() { HeaderError::NoVolume { volume } } else { error.into() })?;
    let header = VolumeHeader::decode(&bytes).map_err(|source| HeaderError::Damaged { path: path.clone(), source })?;
    if header.volume != volume {
        return Err(HeaderError::WrongPlace { path, found: header.volume });
    }
    Ok(StoredHeader { header, version })
}

/// Makes a volume: claims its name within its machine, then creates the header. Safe to repeat with the same volume id: the
/// volume that an earlier call made is returned, with [`PutOutcome::Exists`] (its keys are the ones that count).
/// The header's nonce is drawn here.
///
/// # Errors
/// [`HeaderError::NameTaken`], [`HeaderError::VolumeTaken`], [`HeaderError::BadName`], those of [`read`].
pub async fn create(store: &Store, header: &VolumeHeader) -> Result<(StoredHeader, PutOutcome), HeaderError> {
    check_name("machine name", &header.machine_name)?;
    check_name("volume name", &header.name)?;
    claim_name(store, header).await?;
    let mut header = header.clone();
    header.nonce = Nonce(common::rng::random()?);
    let outcome = store.put_if_absent(&paths::header(header.volume), header.encode().into()).await?;
    // Read back in every case: a lost reply makes a first `Exists` our own, and a version is only had by reading.
    let stored = read(store, header.volume).await?;
    if (stored.header.machine, stored.header.name.as_str()) != (header.machine, header.name.as_str()) {
        return Err(HeaderError::VolumeTaken { volume: header.volume, existing: full_name(&stored.header) });
    }
    // Somebody may have taken a slow creator's claim over before the header was there: then the name is theirs.
    if let Some((claim, _)) = read_claim(store, &paths::name_claim(header.machine, &header.name)).await?
        && claim.volume != header.volume
    {
        return Err(HeaderError::NameTaken { machine: header.machine_name, name: header.name, volume: claim.volume });
    }
    let ours = stored.header.nonce == header.nonce;
    Ok((stored, if ours { PutOutcome::Created } else { outcome }))
}

/// Begins an incarnation of `disk_bytes` bytes behind `incarnation`, which must be the current one: the disk grew. Safe to
/// repeat: the header that an earlier call made is returned.
///
/// # Errors
/// [`HeaderError::NotGrown`] where the sizes or the current incarnation are others; [`HeaderError::Changed`] where the header
/// keeps changing; those of [`read`].
pub async fn grow(
    store: &Store,
    volume: VolumeId,
    incarnation: Incarnation,
    disk_bytes: u64,
) -> Result<StoredHeader, HeaderError> {
    for _ in 0..CLAIM_ATTEMPTS {
        let stored = read(store, volume).await?;
        let current = stored.header.current();
        let refused = || HeaderError::NotGrown {
            volume,
            incarnation: current.incarnation,
            found: current.disk_bytes,
            disk_bytes,
        };
        if current.incarnation > incarnation && current.disk_bytes == disk_bytes {
            return Ok(stored);
        }
        let next = incarnation.next().filter(|_| Geometry::new(disk_bytes).is_some()).ok_or_else(refused)?;
        if current.incarnation != incarnation || current.disk_bytes >= disk_bytes {
            return Err(refused());
        }
        let size = IncarnationSize { incarnation: next, disk_bytes };
        match update(store, &stored, |header| header.incarnations.push(size)).await {
            Err(HeaderError::Changed { .. }) => {}
            other => return other,
        }
    }
    Err(HeaderError::Changed { volume })
}

/// Changes a header as `edit` says, if it still is the one in `stored`.
///
/// # Errors
/// [`HeaderError::Changed`] where somebody else was faster: read again and decide anew.
pub async fn update(
    store: &Store,
    stored: &StoredHeader,
    edit: impl FnOnce(&mut VolumeHeader),
) -> Result<StoredHeader, HeaderError> {
    let mut header = stored.header.clone();
    edit(&mut header);
    header.nonce = Nonce(common::rng::random()?);
    let path = paths::header(header.volume);
    match store.compare_and_swap(&path, &stored.version, header.encode().into()).await {
        Ok(CasOutcome::Swapped(version)) => Ok(StoredHeader { header, version }),
        other => {
            // The reply of a swap that won may be lost, and a retry then finds it changed: the nonce tells.
            let now = read(store, header.volume).await?;
            if now.header.nonce == header.nonce {
                return Ok(now);
            }
            match other {
                Err(error) => Err(error.into()),
                Ok(_) => Err(HeaderError::Changed { volume: header.volume }),
            }
        }
    }
}

/// The volume that `machine` calls `name`, if it has one with a header.
///
/// # Errors
/// Those of [`read`].
pub async fn find_in_machine(
    store: &Store,
    machine: MachineId,
    name: &str,
) -> Result<Option<StoredHeader>, HeaderError> {
    let path = paths::name_claim(machine, name);
    let Some((claim, _)) = read_claim(store, &path).await? else { return Ok(None) };
    match read(store, claim.volume).await {
        Ok(stored) => Ok(Some(stored)),
        Err(HeaderError::NoVolume { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// All name claims, and the errors of those that can't be read.
///
/// # Errors
/// [`HeaderError::Store`] where the store can't be listed.
pub async fn names(store: &Store) -> Result<(Vec<VolumeName>, Vec<HeaderError>), HeaderError> {
    let listed = store.list(paths::NAMES).await?;
    let mut reads = futures::stream::iter(listed)
        .map(|meta| async move { read_claim(store, &meta.path).await })
        .buffer_unordered(READS_IN_PARALLEL);
    let (mut claims, mut errors) = (Vec::new(), Vec::new());
    while let Some(read) = reads.next().await {
        match read {
            Ok(Some((claim, _))) => claims.push(claim),
            Ok(None) => {}
            Err(error) => errors.push(error),
        }
    }
    claims.sort_by(|a, b| (&a.machine_name, &a.name, a.volume).cmp(&(&b.machine_name, &b.name, b.volume)));
    Ok((claims, errors))
}

/// All volumes that have a header, by machine and name, and the errors of those that can't be read.
///
/// # Errors
/// [`HeaderError::Store`] where the store can't be listed.
pub async fn list(store: &Store) -> Result<(Vec<VolumeHeader>, Vec<HeaderError>), HeaderError> {
    let (claims, mut errors) = names(store).await?;
    let mut reads = futures::stream::iter(claims)
        .map(|claim| async move { read(store, claim.volume).await })
        .buffer_unordered(READS_IN_PARALLEL);
    let mut headers: Vec<VolumeHeader> = Vec::new();
    while let Some(read) = reads.next().await {
        match read {
            Ok(stored) => headers.push(stored.header),
            Err(HeaderError::NoVolume { .. }) => {}
            Err(error) => errors.push(error),
        }
    }
    headers.sort_by(|a, b| (&a.machine_name, &a.name, a.volume).cmp(&(&b.machine_name, &b.name, b.volume)));
    // A renamed volume is found by its old names too.
    headers.dedup_by_key(|header| header.volume);
    Ok((headers, errors))
}

/// The volume meant by `text`: `NAME`, `MACHINE/NAME` or a UUID.
///
/// # Errors
/// [`HeaderError::Ambiguous`] (a usage error that lists the candidates), [`HeaderError::NotFound`],
/// [`HeaderError::NoVolume`] for a UUID; [`HeaderError::Damaged`] where the name may be one that can't be read.
pub async fn find(store: &Store, text: &str) -> Result<StoredHeader, HeaderError> {
    if let Ok(volume) = text.parse::<VolumeId>() {
        return read(store, volume).await;
    }
    let (claims, mut errors) = names(store).await?;
    let mut found: Vec<StoredHeader> = Vec::new();
    for claim in &claims {
        if claim.name == text || format!("{}/{}", claim.machine_name, claim.name) == text {
            match read(store, claim.volume).await {
                Ok(stored) => found.push(stored),
                Err(HeaderError::NoVolume { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }
    // Who bears a name now goes before who bore it once.
    let bears = |stored: &StoredHeader| stored.header.name == text || full_name(&stored.header) == text;
    if found.iter().any(bears) {
        found.retain(bears);
    }
    match found.len() {
        1 => Ok(found.swap_remove(0)),
        0 if !errors.is_empty() => Err(errors.swap_remove(0)),
        0 => {
            let names: Vec<_> =
                claims.iter().take(8).map(|claim| format!("{}/{}", claim.machine_name, claim.name)).collect();
            let known = if names.is_empty() { String::new() } else { format!(" (there are {})", names.join(", ")) };
            Err(HeaderError::NotFound { text: text.to_owned(), known })
        }
        _ => Err(HeaderError::Ambiguous {
            text: text.to_owned(),
            candidates: found.iter().map(|s| format!("{} ({})", full_name(&s.header), s.header.volume)).collect(),
        }),
    }
}

/// `MACHINE/NAME`.
#[must_use]
pub fn full_name(header: &VolumeHeader) -> String {
    format!("{}/{}", header.machine_name, header.name)
}

async fn read_claim(store: &Store, path: &str) -> Result<Option<(VolumeName, Version)>, HeaderError> {
    let (bytes, version) = match store.get_versioned(path).await {
        Ok(read) => read,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let damaged = |source| HeaderError::Damaged { path: path.to_owned(), source };
    let claim = VolumeName::decode(&bytes).map_err(damaged)?;
    if paths::name_claim(claim.machine, &claim.name) != path {
        return Err(HeaderError::WrongPlace { path: path.to_owned(), found: claim.volume });
    }
    Ok(Some((claim, version)))
}

/// Claims `header`'s name for its volume. Safe to repeat.
///
/// # Errors
/// [`HeaderError::NameTaken`], [`HeaderError::BadName`], those of [`read`].
pub(super) async fn claim(store: &Store, header: &VolumeHeader) -> Result<(), HeaderError> {
    check_name("volume name", &header.name)?;
    claim_name(store, header).await
}

/// Removes the claims of names that a volume had before. Its header must be there while this runs: then nobody takes a claim over.
///
/// # Errors
/// Those of the store.
pub(super) async fn release_other_names(store: &Store, header: &VolumeHeader) -> Result<(), HeaderError> {
    let own = paths::name_claim(header.machine, &header.name);
    for meta in store.list(&paths::name_folder(header.machine)).await? {
        if meta.path == own {
            continue;
        }
        if let Some((claim, _)) = read_claim(store, &meta.path).await?
            && claim.volume == header.volume
        {
            store.delete(&meta.path).await?;
        }
    }
    Ok(())
}

async fn claim_name(store: &Store, header: &VolumeHeader) -> Result<(), HeaderError> {
    let path = paths::name_claim(header.machine, &header.name);
    for _ in 0..CLAIM_ATTEMPTS {
        let claim = VolumeName {
            nonce: Nonce(common::rng::random()?),
            volume: header.volume,
            machine: header.machine,
            machine_name: header.machine_name.clone(),
            name: header.name.clone(),
        };
        store.put_if_absent(&path, claim.encode().into()).await?;
        let Some((found, version)) = read_claim(store, &path).await? else { continue };
        if found.volume == header.volume {
            return Ok(());
        }
        match read(store, found.volume).await {
            Ok(_) => {
                return Err(HeaderError::NameTaken {
                    machine: header.machine_name.clone(),
                    name: header.name.clone(),
                    volume: found.volume,
                });
            }
            // A creation that died between claim and header. One that is merely slow sees that its claim is gone.
            Err(HeaderError::NoVolume { .. }) => {
                store.compare_and_swap(&path, &version, claim.encode().into()).await?;
            }
            Err(error) => return Err(error),
        }
    }
    Err(HeaderError::Changed { volume: header.volume })
}

fn check_name(what: &'static str, name: &str) -> Result<(), HeaderError> {
    if name.is_empty() || name.len() > limits::NAME_BYTES_MAX {
        return Err(HeaderError::BadName { what, found: name.len(), max: limits::NAME_BYTES_MAX });
    }
    Ok(())
}
