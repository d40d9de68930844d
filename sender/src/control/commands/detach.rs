//! `detach`: the end of a volume's protection, by the running sender or without one.
//!
//! Promises: what is in the store stays; of the volume nothing is left on this machine: no pins, no bitmaps, no write-intent
//! log, no hashes, no journals. Where it fails half-way it can be repeated, and says what is left.

use std::path::{Path, PathBuf};

use common::ids::VolumeId;
use common::ops::exit::ExitCode;

use super::super::client::{ClientError, ControlClient};
use super::super::protocol::{Answered, AskCommand, DetachReply};
use super::{CommandError, Out, known_names};
use crate::state::{self, StateDir};

/// Where the kernel keeps what outlives a sender: a directory for each volume.
const PIN_ROOT: &str = "/sys/fs/bpf/blockferry";

/// Where the pins of a volume's tracker are.
#[must_use]
pub fn pin_dir(volume: VolumeId) -> PathBuf {
    Path::new(PIN_ROOT).join(volume.to_string())
}

/// Removes the pins of a volume's tracker, which ends tracking in the kernel, and the pins' root with the last of them.
///
/// # Errors
/// [`CommandError::Remove`].
pub fn remove_pins(volume: VolumeId) -> Result<(), CommandError> {
    let path = pin_dir(volume);
    match std::fs::remove_dir_all(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|source| CommandError::Remove { path, source })?,
    }
    // Other volumes' pins keep it.
    let _ = std::fs::remove_dir(PIN_ROOT);
    Ok(())
}

/// Ends the protection of `volume`, or of all.
///
/// # Errors
/// [`CommandError`].
pub async fn run(state_dir: &Path, volume: Option<String>, out: Out<'_>) -> Result<ExitCode, CommandError> {
    let replies = match ControlClient::connect(state_dir).await {
        Ok(mut client) => match client.ask(AskCommand::Detach { volume }).await? {
            Answered::Detached(replies) => replies,
            _ => return Err(CommandError::Failed("the sender answered something else; see its log".into())),
        },
        Err(ClientError::NotRunning { .. }) => without_sender(state_dir, volume.as_deref())?,
        Err(error) => return Err(error.into()),
    };
    let mut failed = Vec::new();
    for DetachReply { volume, error } in &replies {
        if error.is_empty() {
            writeln!(out, "{volume}: protection ended; its recovery points stay in the store")?;
        } else {
            failed.push(format!("volume {volume}: {error}"));
        }
    }
    if replies.is_empty() {
        writeln!(out, "no volume is protected from {}", state_dir.display())?;
    }
    if failed.is_empty() { Ok(ExitCode::Ok) } else { Err(CommandError::Failed(failed.join("; "))) }
}

/// Detaches while no sender runs. Holds the directory's lock, so none can start meanwhile.
fn without_sender(state_dir: &Path, volume: Option<&str>) -> Result<Vec<DetachReply>, CommandError> {
    if !state_dir.is_dir() {
        let text =
            format!("{} does not exist: nothing is protected from there; check --state-dir", state_dir.display());
        return Err(CommandError::Failed(text));
    }
    let state = StateDir::open(state_dir)?;
    let volumes: Vec<(VolumeId, String)> = state::glance(state_dir)?
        .into_iter()
        // A volume whose identity can't be read goes by its id.
        .map(|glance| (glance.volume, glance.identity.map_or_else(|_| glance.volume.to_string(), |known| known.name)))
        .collect();
    let wanted: Vec<_> =
        volumes.iter().filter(|(id, name)| volume.is_none_or(|v| v == name || v == id.to_string())).collect();
    if let Some(name) = volume
        && wanted.is_empty()
    {
        return Err(CommandError::NoVolume {
            state_dir: state_dir.to_owned(),
            name: name.to_owned(),
            known: known_names(volumes.iter().map(|(_, name)| name)),
        });
    }
    let mut replies = Vec::new();
    for (id, name) in wanted {
        // Pins first: with the state gone nobody would find them.
        let removed = remove_pins(*id).and_then(|()| Ok(state.remove(*id)?));
        let error = removed.err().map_or_else(String::new, |error| error.to_string());
        replies.push(DetachReply { volume: name.clone(), error });
    }
    Ok(replies)
}
