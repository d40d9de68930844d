//! Getting a volume ready: its state here, its header in the store, its data key.

use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use common::clock::UnixMillis;
use common::ids::CloseId;
use common::net::enrolment::Enrolment;
use common::rng;
use common::seal::DataKey;
use common::seal::keyfile::KeyFile;
use common::seal::signing::CloseSigner;
use common::session::ClosedEpoch;

use super::control::Control;
use super::{AgentError, grow};
use crate::capture::find::{self, Found};
use crate::capture::{Disk, Source};
use crate::events::{EventKind, Events};
use crate::spec::VolumeSpec;
use crate::state::{StateDir, VolumeIdentity, VolumeState};

/// What is known of a volume before any receiver is asked.
pub(super) struct Local {
    /// How it was given.
    pub(super) spec: VolumeSpec,
    /// Its disk.
    pub(super) source: Arc<Source>,
    /// Its state here; `None` for a new one.
    pub(super) state: Option<VolumeState>,
    /// The disk is larger than the state: it grew, and a capture's own marks are of a smaller one.
    pub(super) grew: bool,
}

/// A volume whose state and key are at hand.
pub(super) struct Prepared {
    pub(super) state: VolumeState,
    pub(super) data_key: DataKey,
    pub(super) signer: CloseSigner,
}

/// Opens a volume's state, where there is one, and its disk, wherever that is attached now.
///
/// # Errors
/// [`AgentError::Capture`], [`AgentError::State`].
pub(super) fn local(state_dir: &StateDir, spec: &VolumeSpec, events: &Events) -> Result<Local, AgentError> {
    let failed = |source| AgentError::Capture { volume: spec.name.clone(), source };
    let state = VolumeState::find(state_dir, &spec.name)?;
    let recorded = state.as_ref().map(|state| &state.identity().source);
    let Found { source, moved_to } = find::open(&spec.path, recorded).map_err(failed)?;
    if let Some(place) = moved_to {
        let text = format!(
            "its disk is at {} now, not at {}: found by its serial number, WWN or UUID; a path under /dev/disk/by-id stays",
            place.display(),
            spec.path.display()
        );
        events.note(&spec.name, EventKind::DiskMoved, text);
    }
    let mut grew = false;
    if let Some(state) = &state {
        let identity = state.identity();
        grew = source.geometry().disk_bytes() > identity.disk_bytes;
        if !grew {
            source.check(identity.disk_bytes, &identity.source).map_err(failed)?;
        }
    }
    Ok(Local { spec: spec.clone(), source: Arc::new(source), state, grew })
}

/// Finds or makes the volume in the store and its state here, and opens its data key.
///
/// # Errors
/// [`AgentError`], naming the volume.
pub(super) async fn prepare(
    control: &mut Control,
    enrolment: &Enrolment,
    key_file: &KeyFile,
    state_dir: &StateDir,
    events: &Events,
    local: &mut Local,
    now: UnixMillis,
) -> Result<Prepared, AgentError> {
    let Local { spec, source, state, .. } = local;
    let name = spec.name.clone();
    let disk_bytes = source.geometry().disk_bytes();
    let (header, head) = match control.find_volume(&name).await? {
        Some(known) => (known.header, known.head),
        None => {
            let made =
                control.create_volume(enrolment, key_file, &name, disk_bytes, source.sector_bytes(), now).await?;
            (made, CloseId::ZERO)
        }
    };
    if state.as_ref().is_some_and(|state| state.identity().volume != header.volume) {
        return Err(AgentError::AnotherVolume { volume: name, state_dir: state_dir.path().to_owned() });
    }
    let header = grow::follow(control, events, &spec.path, header, state.as_mut(), disk_bytes).await?;
    let size = header.current();
    let named = |source| AgentError::Key { volume: name.clone(), source };
    let data_key = key_file.unwrap(&header.wrapped_keys, header.volume, header.key_id).map_err(named)?;
    let signer = data_key.signer(header.volume);
    if signer.public() != header.signing_key {
        return Err(named(common::seal::SealError::Unwrap { volume: header.volume }));
    }
    let state = match state.take() {
        Some(state) => state,
        None if head == CloseId::ZERO => {
            let identity = VolumeIdentity {
                fleet: header.fleet,
                volume: header.volume,
                incarnation: size.incarnation,
                key_id: header.key_id,
                disk_bytes,
                sector_bytes: source.sector_bytes(),
                name: name.clone(),
                source_path: spec.path.as_os_str().as_bytes().to_vec(),
                source: source.identity().clone(),
                hash_key: rng::random()?,
            };
            VolumeState::create(state_dir, &identity, ClosedEpoch::default())?
        }
        None => return Err(AgentError::StateLost { volume: name, state_dir: state_dir.path().to_owned() }),
    };
    Ok(Prepared { state, data_key, signer })
}
