//! A look into a state directory without its lock: for `status` and `detach`. Nothing is changed.

use std::path::Path;

use common::ids::VolumeId;
use common::session::ClosedEpoch;

use super::error::StateError;
use super::hashes;
use super::{VolumeIdentity, read_identity};

/// What a state directory says of one of its volumes.
#[derive(Debug)]
pub struct VolumeGlance {
    /// The volume.
    pub volume: VolumeId,
    /// Its identity, or why that can't be read.
    pub identity: Result<VolumeIdentity, StateError>,
    /// The newest committed close whose changes are applied; `None` where the hashes can't be read.
    pub applied: Option<ClosedEpoch>,
}

/// The volumes of a state directory, by id; none where there is no such directory.
///
/// # Errors
/// [`StateError::Io`] where the directory can't be listed.
pub fn glance(state_dir: &Path) -> Result<Vec<VolumeGlance>, StateError> {
    let path = state_dir.join("volumes");
    let entries = match std::fs::read_dir(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|error| StateError::io("list", &path, error))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| StateError::io("list", &path, error))?;
        let Some(volume) = entry.file_name().to_str().and_then(|name| name.parse::<VolumeId>().ok()) else { continue };
        let identity = read_identity(&entry.path().join("volume"), volume);
        let applied = hashes::peek(&entry.path().join("hashes")).filter(|(of, _)| *of == volume);
        found.push(VolumeGlance { volume, identity, applied: applied.map(|(_, applied)| applied) });
    }
    found.sort_unstable_by_key(|glance| glance.volume);
    Ok(found)
}
