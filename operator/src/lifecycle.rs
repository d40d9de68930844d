//! `blockferry volume rename | retire | unretire | delete | restore`: what is to become of a volume.
//!
//! Promises: what a command says it did is in the store; a volume is deleted only by its full name, typed or passed, or with `--yes`;
//! until `prune` has removed its objects, after the grace period, it can be brought back. Never: touches recovery points.

use std::io::{BufRead as _, IsTerminal as _, Write};

use catalog::store::Store;
use catalog::volume::header::{self, HeaderError};
use catalog::volume::lifecycle::{self, LifecycleError};
use clap::{Args, Subcommand};
use common::clock::Clock;
use common::format::lifecycle::Phase;
use common::format::volume_header::VolumeHeader;

use crate::cli::StoreArgs;
use crate::error::OperatorError;

/// Which volume, and where.
#[derive(Debug, Args)]
pub struct VolumeArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// NAME, MACHINE/NAME or UUID
    #[arg(long, value_name = "VOLUME")]
    volume: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Changes to a volume.
#[derive(Debug, Subcommand)]
pub enum LifecycleCommand {
    /// Give a volume another name within its machine; the old one still finds it, and its sender goes on
    #[command(
        after_help = "Examples:\n  blockferry volume rename --store file:///srv/store --volume web-1/data --to shop-data"
    )]
    Rename {
        /// Which volume, and where.
        #[command(flatten)]
        volume: VolumeArgs,
        /// The new name
        #[arg(long, value_name = "NAME")]
        to: String,
    },
    /// Let a volume be written no more: its points stay, receivers refuse its sender
    #[command(after_help = "Examples:\n  blockferry volume retire --store file:///srv/store --volume web-1/data")]
    Retire(VolumeArgs),
    /// Let a retired volume be written again
    #[command(after_help = "Examples:\n  blockferry volume unretire --store file:///srv/store --volume web-1/data")]
    Unretire(VolumeArgs),
    /// Delete a volume: it is not listed any more, and `prune` removes its objects after the grace period
    #[command(
        after_help = "Examples:\n  blockferry volume delete --store file:///srv/store --volume web-1/data\n  blockferry volume delete --store file:///srv/store --volume web-1/data --confirm web-1/data"
    )]
    Delete {
        /// Which volume, and where.
        #[command(flatten)]
        volume: VolumeArgs,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// MACHINE/NAME of the volume, instead of typing it
        #[arg(long, value_name = "MACHINE/NAME", conflicts_with = "yes")]
        confirm: Option<String>,
    },
    /// Bring a deleted volume back, as long as its objects are there
    #[command(after_help = "Examples:\n  blockferry volume restore --store file:///srv/store --volume web-1/data")]
    Restore(VolumeArgs),
}

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// Lifecycle or name.
    #[error(transparent)]
    Lifecycle(#[from] LifecycleError),
    /// Nobody confirmed it.
    #[error(
        "nothing was deleted: volume {volume} with all its recovery points goes only if its full name is typed, or passed with --confirm {volume}, or with --yes"
    )]
    NotConfirmed {
        /// `MACHINE/NAME`.
        volume: String,
    },
    /// The command is for volumes that are something else.
    #[error("volume {volume} is {phase}, not {expected}: {next}", phase = .phase.as_str())]
    NotSo {
        /// `MACHINE/NAME`.
        volume: String,
        /// What it is.
        phase: Phase,
        /// What the command is for.
        expected: &'static str,
        /// What to do.
        next: &'static str,
    },
}

impl LifecycleCommand {
    /// Where the store is.
    pub(crate) fn store(&self) -> &StoreArgs {
        match self {
            Self::Rename { volume, .. } | Self::Delete { volume, .. } => &volume.store,
            Self::Retire(volume) | Self::Unretire(volume) | Self::Restore(volume) => &volume.store,
        }
    }

    /// Does it.
    ///
    /// # Errors
    /// [`OperatorError`].
    pub async fn run(&self, store: &Store, out: &mut (dyn Write + Send)) -> Result<(), OperatorError> {
        match self {
            Self::Rename { volume, to } => {
                let found = header::find(store, &volume.volume).await?.header;
                let renamed = lifecycle::rename(store, found.volume, to).await.map_err(ChangeError::from)?.header;
                let old = header::full_name(&found);
                let text = format!("volume {old} is {} now; {old} still finds it", header::full_name(&renamed));
                report(volume, &renamed, Phase::Active, &text, out)
            }
            Self::Retire(volume) => {
                let found = header::find(store, &volume.volume).await?.header;
                set(store, &found, Phase::Retired).await?;
                let text =
                    format!("volume {} is retired: its points stay, its sender is refused", header::full_name(&found));
                report(volume, &found, Phase::Retired, &text, out)
            }
            Self::Unretire(volume) => {
                let found = expect(store, volume, Phase::Retired, "retired", "nothing is to be done").await?;
                set(store, &found, Phase::Active).await?;
                let text = format!("volume {} is active again", header::full_name(&found));
                report(volume, &found, Phase::Active, &text, out)
            }
            Self::Restore(volume) => {
                let next = "only a deleted volume can be brought back; `blockferry restore` restores a point";
                let found = expect(store, volume, Phase::Deleted, "deleted", next).await?;
                set(store, &found, Phase::Active).await?;
                let text = format!("volume {} is back, with all its points", header::full_name(&found));
                report(volume, &found, Phase::Active, &text, out)
            }
            Self::Delete { volume, yes, confirm } => {
                let found = header::find(store, &volume.volume).await?.header;
                let name = header::full_name(&found);
                let confirmed = *yes
                    || match confirm {
                        Some(typed) => *typed == name,
                        None => ask(&name),
                    };
                if !confirmed {
                    return Err(ChangeError::NotConfirmed { volume: name }.into());
                }
                set(store, &found, Phase::Deleted).await?;
                let text = format!(
                    "volume {name} ({}) is deleted: `blockferry volume restore --volume {}` brings it back until `blockferry prune` removes its objects after the grace period",
                    found.volume, found.volume
                );
                report(volume, &found, Phase::Deleted, &text, out)
            }
        }
    }
}

async fn set(store: &Store, header: &VolumeHeader, phase: Phase) -> Result<(), OperatorError> {
    // A name for the record; where the system has none it stays empty.
    let by = rustix::system::uname().nodename().to_string_lossy().into_owned();
    lifecycle::set(store, header, phase, &by, &Clock::System).await.map_err(ChangeError::from)?;
    Ok(())
}

/// The volume, which has to be in this phase.
async fn expect(
    store: &Store,
    volume: &VolumeArgs,
    phase: Phase,
    expected: &'static str,
    next: &'static str,
) -> Result<VolumeHeader, OperatorError> {
    let found = header::find(store, &volume.volume).await?.header;
    let now = lifecycle::phase(store, found.volume).await.map_err(ChangeError::from)?;
    if now == phase {
        return Ok(found);
    }
    Err(ChangeError::NotSo { volume: header::full_name(&found), phase: now, expected, next }.into())
}

/// Asks for the name on a terminal. Where there is none, nobody confirms.
fn ask(name: &str) -> bool {
    let (mut terminal, input) = (std::io::stderr(), std::io::stdin());
    if !input.is_terminal() {
        return false;
    }
    let _ = write!(terminal, "This deletes volume {name} and all its recovery points. Type its full name to go on: ");
    let _ = terminal.flush();
    let mut typed = String::new();
    input.lock().read_line(&mut typed).is_ok() && typed.trim() == name
}

fn report(
    volume: &VolumeArgs,
    header: &VolumeHeader,
    phase: Phase,
    text: &str,
    out: &mut (dyn Write + Send),
) -> Result<(), OperatorError> {
    let done = if volume.json {
        let facts = serde_json::json!({
            "id": header.volume.to_string(),
            "machine": header.machine_name,
            "volume": header.name,
            "state": phase.as_str(),
        });
        writeln!(out, "{facts}")
    } else {
        writeln!(out, "{text}")
    };
    done.map_err(OperatorError::Output)
}

/// Whether an error says that a volume does not exist or can't be told from others: a matter of the command line.
pub(crate) fn is_usage(error: &ChangeError) -> bool {
    matches!(
        error,
        ChangeError::NotConfirmed { .. } | ChangeError::Lifecycle(LifecycleError::Header(HeaderError::BadName { .. }))
    )
}
