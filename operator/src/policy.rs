//! `blockferry policy get | set`: which recovery points of a volume are kept, and for how long.
//!
//! Promises: what `set` printed is in the store, whole. Never: expires anything by itself; receivers and `prune` do, by the policy.

use std::io::Write;

use catalog::retention::policy::{Policy, PolicyError};
use catalog::retention::policy_object::{self, PolicyObjectError};
use catalog::store::Store;
use catalog::volume::header;
use clap::{Args, Subcommand};

use crate::cli::StoreArgs;
use crate::error::OperatorError;

/// Which volume's policy.
#[derive(Debug, Args)]
pub struct PolicyArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// NAME, MACHINE/NAME or UUID
    #[arg(long, value_name = "VOLUME")]
    volume: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What to do with a policy.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Print a volume's policy
    #[command(after_help = "Examples:\n  blockferry policy get --store file:///srv/store --volume web-1/data")]
    Get(PolicyArgs),
    /// Give a volume a policy; `prune` and receivers expire points by it
    #[command(
        after_help = "Examples:\n  blockferry policy set --store file:///srv/store --volume web-1/data \"all for 24h, hourly for 7d, daily for 30d, weekly for 1y\"\n  blockferry policy set --store file:///srv/store --volume web-1/data \"all\"\n\n`blockferry prune --dry-run` shows what a policy would expire."
    )]
    Set {
        /// Which volume, and where.
        #[command(flatten)]
        volume: PolicyArgs,
        /// Such as "all for 24h, hourly for 7d, daily for 30d, keep latest 10"
        #[arg(value_name = "POLICY", value_parser = parse)]
        policy: Policy,
    },
}

fn parse(text: &str) -> Result<Policy, PolicyError> {
    text.parse()
}

impl PolicyCommand {
    /// Where the store is.
    pub(crate) fn store(&self) -> &StoreArgs {
        match self {
            Self::Get(volume) | Self::Set { volume, .. } => &volume.store,
        }
    }

    /// Does it.
    ///
    /// # Errors
    /// [`OperatorError`].
    pub async fn run(&self, store: &Store, out: &mut (dyn Write + Send)) -> Result<(), OperatorError> {
        let (args, set) = match self {
            Self::Get(args) => (args, None),
            Self::Set { volume, policy } => (volume, Some(policy)),
        };
        let header = header::find(store, &args.volume).await?.header;
        let policy = match set {
            Some(policy) => {
                policy_object::write(store, header.volume, policy).await?;
                Some(policy.clone())
            }
            None => policy_object::read(store, header.volume).await?.map(|stored| stored.policy),
        };
        let text = policy.as_ref().map(ToString::to_string);
        let printed = if args.json {
            let facts = serde_json::json!({
                "id": header.volume.to_string(),
                "machine": header.machine_name,
                "volume": header.name,
                "policy": text,
                "keeps_all": policy.as_ref().is_none_or(Policy::keeps_all),
            });
            writeln!(out, "{facts}")
        } else {
            let text = text.as_deref().unwrap_or("none: all points are kept");
            writeln!(out, "{}  {text}", header::full_name(&header))
        };
        printed.map_err(OperatorError::Output)
    }
}

/// An error of a policy's object, as this tool has it.
impl From<PolicyObjectError> for OperatorError {
    fn from(error: PolicyObjectError) -> Self {
        Self::Policy(Box::new(error))
    }
}
