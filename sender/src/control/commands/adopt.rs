//! `adopt`: this state directory continues a volume's history, although it is not the one that wrote the newest of it.
//!
//! After a clone, a rollback or on a replaced machine a session is refused as diverged, or there is no state at all. Adopting
//! makes the log's head the known close of a state whose page hashes are void: nothing is believed of what the disk and
//! the store have in common, so the next run reads the whole disk and what it sends stands after everything before. Where the
//! newest of the log may have come from the same disk (a rollback), that sends again what is in the store; it never leaves
//! anything out.
//!
//! Promises: no sender runs with this state meanwhile (the directory's lock); what a crash leaves can be adopted again; the
//! store is only read.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use common::ids::CloseId;
use common::net::enrolment::Enrolment;
use common::ops::exit::ExitCode;
use common::rng;
use common::seal::DataKey;
use common::session::ClosedEpoch;
use common::units::ByteCount;

use super::detach::remove_pins;
use super::{CommandError, Out};
use crate::agent::{AgentError, KnownVolume, ReceiverCalls};
use crate::capture::{Disk, Source};
use crate::register;
use crate::state::{self, StateDir, VolumeIdentity, VolumeState};

/// Adopts the volume `name`, whose disk is at `path` if that is given.
///
/// # Errors
/// [`CommandError`]; nothing is changed then, unless removing the old state failed half-way: then the command is repeated.
pub async fn run(state_dir: &Path, name: &str, path: Option<PathBuf>, out: Out<'_>) -> Result<ExitCode, CommandError> {
    let enrolment = Enrolment::load(state_dir)?;
    let key_file = register::load_key_file(state_dir)?;
    let state = StateDir::open(state_dir)?;
    let mut receiver = ReceiverCalls::connect(&enrolment).await?;
    let Some(KnownVolume { header, head, head_epoch }) = receiver.find_volume(name).await? else {
        let text = format!(
            "the store has no volume {name} of machine {}: there is nothing to take over; `run` makes a new one",
            enrolment.identity().name
        );
        return Err(CommandError::Failed(text));
    };
    // The key first: without it, nothing that this sender seals could ever be opened with the rest.
    let named = |source| AgentError::Key { volume: name.to_owned(), source };
    let data_key: DataKey = key_file.unwrap(&header.wrapped_keys, header.volume, header.key_id).map_err(named)?;
    drop(data_key);

    let glance = state::glance(state_dir)?.into_iter().find(|glance| glance.volume == header.volume);
    let present = glance.is_some();
    let known = glance.as_ref().and_then(|glance| glance.applied);
    let recorded = glance.and_then(|glance| glance.identity.ok());
    let path = path
        .or_else(|| recorded.as_ref().map(|identity| std::ffi::OsStr::from_bytes(&identity.source_path).into()))
        .ok_or_else(|| {
            CommandError::Failed(format!("volume {name}: its disk is not known here; say it: --volume {name}=PATH"))
        })?;
    let failed = |source| AgentError::Capture { volume: name.to_owned(), source };
    let source = Source::open(&path).map_err(failed)?;
    let size = header.current();
    let found = source.geometry().disk_bytes();
    if found < size.disk_bytes {
        return Err(AgentError::SizeChanged { volume: name.to_owned(), path, expected: size.disk_bytes, found }.into());
    }
    let applied = ClosedEpoch { epoch: head_epoch, close: head };
    let identity = VolumeIdentity {
        fleet: header.fleet,
        volume: header.volume,
        incarnation: size.incarnation,
        key_id: header.key_id,
        disk_bytes: size.disk_bytes,
        sector_bytes: source.sector_bytes(),
        name: name.to_owned(),
        source_path: path.as_os_str().as_bytes().to_vec(),
        source: source.identity().clone(),
        hash_key: rng::random().map_err(AgentError::from)?,
    };
    if present {
        remove_pins(header.volume)?;
        state.remove(header.volume)?;
    }
    VolumeState::create(&state, &identity, applied)?;
    let before = match known {
        Some(known) if known == applied => "its state was current already".to_owned(),
        Some(known) => format!("its state ended at epoch {}", known.epoch),
        None => "there was no state of it here".to_owned(),
    };
    let end = if head == CloseId::ZERO { "no history yet".to_owned() } else { format!("epoch {head_epoch} ({head})") };
    writeln!(
        out,
        "{name}: adopted ({before}); the store's history ends at {end}. The next run reads the whole disk ({}) and sends what \
         is not known to be in the store. Any other sender of this volume is refused from then on: stop it.",
        ByteCount(found)
    )?;
    Ok(ExitCode::Ok)
}
