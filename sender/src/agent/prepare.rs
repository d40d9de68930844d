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

use super::AgentError;
use super::control::Control;
use crate::capture::{Disk, Source};
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
}

/// A volume whose state and key are at hand.
pub(super) struct Prepared {
    pub(super) state: VolumeState,
    pub(super) data_key: DataKey,
    pub(super) signer: CloseSigner,
}

/// Opens a volume's disk and, where there is one, its state.
///
/// # Errors
/// [`AgentError::Capture`], [`AgentError::State`].
pub(super) fn local(state_dir: &StateDir, spec: &VolumeSpec) -> Result<Local, AgentError> {
    let source =
        Source::open(&spec.path).map_err(|source| AgentError::Capture { volume: spec.name.clone(), source })?;
    let state = VolumeState::find(state_dir, &spec.name)?;
    if let Some(state) = &state {
        let identity = state.identity();
        source
            .check(identity.disk_bytes, &identity.source)
            .map_err(|source| AgentError::Capture { volume: spec.name.clone(), source })?;
    }
    Ok(Local { spec: spec.clone(), source: Arc::new(source), state })
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
    local: &mut Local,
    now: UnixMillis,
) -> Result<Prepared, AgentError> {
    let Local { spec, source, state } = local;
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
    let size = header.current();
    if size.disk_bytes != disk_bytes {
        let (path, expected) = (spec.path.clone(), size.disk_bytes);
        return Err(AgentError::SizeChanged { volume: name, path, expected, found: disk_bytes });
    }
    let named = |source| AgentError::Key { volume: name.clone(), source };
    let data_key = key_file.unwrap(&header.wrapped_keys, header.volume, header.key_id).map_err(named)?;
    let signer = data_key.signer(header.volume);
    if signer.public() != header.signing_key {
        return Err(named(common::seal::SealError::Unwrap { volume: header.volume }));
    }
    let state = match state.take() {
        Some(state) if state.identity().volume == header.volume => state,
        Some(_) => return Err(AgentError::AnotherVolume { volume: name, state_dir: state_dir.path().to_owned() }),
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
