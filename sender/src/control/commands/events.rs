//! `events`: the newest events of a running sender.

use std::path::Path;

use common::ops::exit::ExitCode;

use super::super::client::ControlClient;
use super::super::protocol::{Answered, AskCommand};
use super::{CommandError, Out};

/// Prints the events, oldest first.
///
/// # Errors
/// [`CommandError`].
pub async fn run(state_dir: &Path, json: bool, out: Out<'_>) -> Result<ExitCode, CommandError> {
    let mut client = ControlClient::connect(state_dir).await?;
    let Answered::Events(events) = client.ask(AskCommand::Events { after: 0 }).await? else {
        return Err(CommandError::Failed("the sender answered something else; see its log".into()));
    };
    if json {
        serde_json::to_writer_pretty(&mut *out, &events).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        for event in &events {
            writeln!(out, "{event}")?;
        }
    }
    Ok(ExitCode::Ok)
}
