//! A disk that grew: a new incarnation in the store first, then the state here.
//!
//! Promises: what the store has of the smaller disk stays where it is and is not sent again; a crash in between is gone on
//! from at the next start. A disk that shrank is a named error.

use std::path::Path;

use common::format::volume_header::VolumeHeader;

use super::AgentError;
use super::control::Control;
use crate::events::{EventKind, Events};
use crate::state::VolumeState;

/// Sees to it that the volume's header, and its state where there is one, are of a disk of `disk_bytes` bytes; gives the
/// header that is the current one.
///
/// # Errors
/// [`AgentError::SizeChanged`] for a disk that shrank; [`AgentError::State`]; those of the call.
pub(super) async fn follow(
    control: &mut Control,
    events: &Events,
    path: &Path,
    header: VolumeHeader,
    state: Option<&mut VolumeState>,
    disk_bytes: u64,
) -> Result<VolumeHeader, AgentError> {
    let before = header.current();
    if disk_bytes < before.disk_bytes {
        let (volume, path, expected) = (header.name, path.to_owned(), before.disk_bytes);
        return Err(AgentError::SizeChanged { volume, path, expected, found: disk_bytes });
    }
    let mut header = header;
    if disk_bytes > before.disk_bytes {
        header = control.grow_volume(header.volume, before.incarnation, disk_bytes).await?;
        let text = format!(
            "the disk grew from {} to {disk_bytes} bytes: incarnation {} begins; it is compared once, and only what differs \
             is sent",
            before.disk_bytes,
            header.current().incarnation
        );
        events.note(&header.name, EventKind::Grown, text);
    }
    let size = header.current();
    if let Some(state) = state
        && state.identity().incarnation < size.incarnation
    {
        state.grow(size.incarnation, size.disk_bytes)?;
    }
    Ok(header)
}
