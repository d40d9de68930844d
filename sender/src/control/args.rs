//! Command lines of the commands that talk to a running sender, or stand in for one.

use std::path::PathBuf;

use clap::Args;
use common::format::close::Consistency;
use common::net::resolve::HostPort;

use super::protocol::parse_consistency;
use crate::spec::VolumeSpec;

/// Where the state is.
#[derive(Debug, Args)]
pub struct StateArgs {
    /// Where the sender keeps its state [default: /var/lib/blockferry/sender]
    #[arg(long, value_name = "DIR", env = "BLOCKFERRY_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
}

/// One volume, or all.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct WhichArgs {
    /// The volume's name
    #[arg(long, value_name = "NAME")]
    pub volume: Option<String>,
    /// All volumes of this machine
    #[arg(long)]
    pub all: bool,
}

/// `point`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blockferry-sender point --volume root --consistency filesystem
  blockferry-sender point --all            # one instant for all disks

Returns when the point is committed. Exit codes: 0 made; 1 none; 2 usage; 3 made, but weaker than asked for.")]
pub struct PointArgs {
    /// State.
    #[command(flatten)]
    pub state: StateArgs,
    /// Volumes.
    #[command(flatten)]
    pub which: WhichArgs,
    /// The least that it has to be [default: the best that the volume's capture gives]
    #[arg(long, value_name = "crash|filesystem|application", value_parser = parse_consistency)]
    pub consistency: Option<Consistency>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `status`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blockferry-sender status
  blockferry-sender status --json | jq '.volumes[].rpo_seconds'
  blockferry-sender status --watch --memory

Works without a running sender too: it says so, and shows what the state directory holds.")]
pub struct StatusArgs {
    /// State.
    #[command(flatten)]
    pub state: StateArgs,
    /// Print JSON; with --watch a line at a time
    #[arg(long)]
    pub json: bool,
    /// Again every two seconds, until interrupted
    #[arg(long)]
    pub watch: bool,
    /// Show the memory table and what is used of it
    #[arg(long)]
    pub memory: bool,
}

/// `events`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blockferry-sender events
  blockferry-sender events --json | jq '.[] | select(.severity != \"info\")'

The newest thousand of this run, oldest first; the log has all.")]
pub struct EventsArgs {
    /// State.
    #[command(flatten)]
    pub state: StateArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `detach`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blockferry-sender detach --volume data
  blockferry-sender detach --all

Ends protection: removes pins, bitmaps, write-intent log and hashes from this machine, by the running sender or without one.
Recovery points stay in the store. To protect the same disk again under its old name, `adopt` it first.")]
pub struct DetachArgs {
    /// State.
    #[command(flatten)]
    pub state: StateArgs,
    /// Volumes.
    #[command(flatten)]
    pub which: WhichArgs,
}

/// `adopt`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blockferry-sender adopt --volume root
  blockferry-sender adopt --volume root=/dev/vda      # where this state directory has never seen the volume

Takes a volume over after a clone, a rollback or on a replaced machine, where `run` refuses: from here on this state directory
continues the volume's history, and any other sender of it is refused. Stop the sender first. The next run reads the disk and
sends what is not known to be in the store.")]
pub struct AdoptArgs {
    /// State.
    #[command(flatten)]
    pub state: StateArgs,
    /// The volume's name; with its disk, where neither state nor configuration name that
    #[arg(long, value_name = "NAME[=PATH]")]
    pub volume: String,
}

/// `preflight`
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blockferry-sender preflight
  blockferry-sender preflight -i receiver.example.net --volume root=/dev/vda --json

Exit codes: 0 all well; 3 warnings; 1 something is missing that protection can't do without.")]
pub struct PreflightArgs {
    /// State.
    #[command(flatten)]
    pub state: StateArgs,
    /// A receiver to be reached: a name, an IPv4 address or an [IPv6] address, with an optional port
    #[arg(short = 'i', long = "receiver", value_name = "HOST[:PORT]")]
    pub receiver: Option<HostPort>,
    /// A disk that is going to be protected; may be given several times [default: those of the configuration]
    #[arg(long = "volume", value_name = "NAME=PATH")]
    pub volumes: Vec<VolumeSpec>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
