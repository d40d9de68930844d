//! The command line of `blockferry-receiver`. Flags stay optional here: [`crate::config`] merges them with the environment,
//! the file and the defaults, and validates the result.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use common::net::resolve::HostPort;
use common::ops::cli::{LogArgs, MemoryArgs};
use common::units::{ByteCount, DurationText};

/// Where the configuration lies unless told otherwise.
pub const CONFIG_DEFAULT: &str = "/etc/blockferry/receiver.toml";

const EXAMPLES: &str = "Examples:
  blockferry-receiver run --data-dir /var/lib/blockferry/receiver --store file:///srv/blockferry
  blockferry-receiver passphrase create --data-dir /var/lib/blockferry/receiver --store file:///srv/blockferry > passphrase.txt
  blockferry-receiver machines list --data-dir /var/lib/blockferry/receiver --store file:///srv/blockferry

Stores: file:///path, s3://bucket/prefix, az://container/prefix, gs://bucket/prefix; credentials from AWS_*, AZURE_*, GOOGLE_*.
Exit codes: 0 done; 1 failed; 2 usage; 3 done, but weaker than asked for; 128+n ended by signal n.";

/// The process server: verifies what senders stream, stages it durably, and forwards it to object storage.
#[derive(Debug, Parser)]
#[command(name = "blockferry-receiver", version = crate::version_text(), after_help = EXAMPLES, arg_required_else_help = true)]
pub struct Cli {
    /// Logs.
    #[command(flatten)]
    pub log: LogArgs,
    /// Configuration file [default: /etc/blockferry/receiver.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE", env = "BLOCKFERRY_CONFIG")]
    pub config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serves senders until SIGTERM, which drains: what is closed is forwarded first.
    Run(Box<RunArgs>),
    /// Passphrase files, with which machines register.
    #[command(subcommand)]
    Passphrase(PassphraseCommand),
    /// Registered machines.
    #[command(subcommand)]
    Machines(MachinesCommand),
    /// The fleet's receivers.
    #[command(subcommand)]
    Receivers(ReceiversCommand),
    /// Certificates of people, for `blockferry status --receiver`.
    #[command(subcommand)]
    Operator(OperatorCommand),
    /// Has the receiver of this data directory send its senders elsewhere and forward what is closed; returns once it has. It
    /// runs on, taking no sessions, until it is stopped or started again.
    #[command(
        after_help = "Examples:\n  blockferry-receiver drain --data-dir /var/lib/blockferry/receiver && systemctl restart blockferry-receiver"
    )]
    Drain(DrainArgs),
    /// Looks at the effective configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
}

/// `drain`
#[derive(Debug, Args)]
pub struct DrainArgs {
    /// The receiver's own directory
    #[arg(long, value_name = "DIR", env = "BLOCKFERRY_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// Taken for symmetry with the other commands; the running receiver knows its store
    #[arg(long, value_name = "URL", env = "BLOCKFERRY_STORE", hide = true)]
    pub store: Option<String>,
    /// How long to wait; the drain itself goes on
    #[arg(long, value_name = "TIME", default_value = "10m")]
    pub timeout: DurationText,
}

/// `receivers …`
#[derive(Debug, Subcommand)]
pub enum ReceiversCommand {
    /// Lists the fleet's receivers: where they are, how full, and what they last said.
    List {
        /// Fleet.
        #[command(flatten)]
        fleet: FleetArgs,
        /// JSON on standard output
        #[arg(long)]
        json: bool,
    },
}

/// `operator …`
#[derive(Debug, Subcommand)]
pub enum OperatorCommand {
    /// Writes a new key and its certificate to standard output. It is a secret: whoever has it can see how the fleet stands.
    #[command(
        after_help = "Examples:\n  blockferry-receiver operator create alice --data-dir /var/lib/blockferry/receiver --store file:///srv/blockferry > alice.pem"
    )]
    Create {
        /// Fleet.
        #[command(flatten)]
        fleet: FleetArgs,
        /// The person's name
        name: String,
        /// What it may do
        #[arg(long, value_enum, default_value_t = OperatorRole::Operator)]
        role: OperatorRole,
    },
}

/// What a person's certificate stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum OperatorRole {
    /// Looks.
    Operator,
    /// Looks; set apart for calls that change the fleet, of which there are none yet.
    Administrator,
}

/// `config …`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Prints the effective configuration and the memory table, or says what is wrong with it.
    Check(Box<RunArgs>),
}

/// Where the fleet is kept.
#[derive(Debug, Args, Default, Clone)]
pub struct FleetArgs {
    /// The receiver's own directory: stage, identity, authority.key
    #[arg(long, value_name = "DIR", env = "BLOCKFERRY_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// The object store
    #[arg(long, value_name = "URL", env = "BLOCKFERRY_STORE")]
    pub store: Option<String>,
    /// Further certificate authorities (PEM) to trust for the store's endpoint
    #[arg(long, value_name = "FILE", env = "BLOCKFERRY_STORE_CA")]
    pub store_ca: Option<PathBuf>,
    /// Most requests a second to the object store; 0 for no cap [default: 500]
    #[arg(long, value_name = "N", env = "BLOCKFERRY_STORE_REQUESTS_PER_SECOND")]
    pub store_requests_per_second: Option<u32>,
}

/// `passphrase …`
#[derive(Debug, Subcommand)]
pub enum PassphraseCommand {
    /// Writes a new passphrase file to standard output. It is a secret until it is used up.
    Create {
        /// Fleet.
        #[command(flatten)]
        fleet: FleetArgs,
        /// How long it is good for
        #[arg(long, value_name = "TIME", default_value = "24h")]
        ttl: DurationText,
        /// How many machines may register with it
        #[arg(long, value_name = "N", default_value_t = 1)]
        uses: u32,
    },
    /// Lists passphrases: id, uses left, expiry. Never secrets.
    List {
        /// Fleet.
        #[command(flatten)]
        fleet: FleetArgs,
        /// JSON on standard output
        #[arg(long)]
        json: bool,
    },
    /// Ends a passphrase now.
    Revoke {
        /// Fleet.
        #[command(flatten)]
        fleet: FleetArgs,
        /// Its id, as `list` prints it
        id: String,
    },
}

/// `machines …`
#[derive(Debug, Subcommand)]
pub enum MachinesCommand {
    /// Lists machines.
    List {
        /// Fleet.
        #[command(flatten)]
        fleet: FleetArgs,
        /// JSON on standard output
        #[arg(long)]
        json: bool,
    },
    /// Revokes a machine's certificate: it can't connect any more. What it replicated stays.
    Revoke {
        /// Fleet.
        #[command(flatten)]
        fleet: FleetArgs,
        /// The machine's name
        name: String,
    },
}

/// `run`
#[derive(Debug, Args, Default)]
pub struct RunArgs {
    /// Fleet.
    #[command(flatten)]
    pub fleet: FleetArgs,
    /// Address and port for senders: QUIC on UDP and gRPC on TCP [default: 0.0.0.0:9443]
    #[arg(long, value_name = "HOST:PORT", env = "BLOCKFERRY_LISTEN")]
    pub listen: Option<SocketAddr>,
    /// How senders reach this receiver, if not by the address they registered with
    #[arg(long, value_name = "HOST:PORT", env = "BLOCKFERRY_ADVERTISE")]
    pub advertise: Option<HostPort>,
    /// Where Prometheus metrics, /healthz and /readyz are served [default: 127.0.0.1:9464]
    #[arg(long, value_name = "HOST:PORT", env = "BLOCKFERRY_METRICS_LISTEN")]
    pub metrics_listen: Option<SocketAddr>,
    /// Most bytes that the stage may hold; intake stops above 90 % [default: half of what is free on its disk, at most 64GiB]
    #[arg(long, value_name = "SIZE", env = "BLOCKFERRY_STAGE_CAPACITY")]
    pub stage_capacity: Option<ByteCount>,
    /// Memory.
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Size of a segment in the store, 16MiB to 64MiB [default: 32MiB]
    #[arg(long, value_name = "SIZE", env = "BLOCKFERRY_SEGMENT_SIZE")]
    pub segment_size: Option<ByteCount>,
    /// How long epochs without a recovery point may wait to share a segment [default: 1s]
    #[arg(long, value_name = "TIME", env = "BLOCKFERRY_SEGMENT_LINGER")]
    pub segment_linger: Option<DurationText>,
    /// Segments uploaded at once [default: 4]
    #[arg(long, value_name = "N", env = "BLOCKFERRY_UPLOAD_CONCURRENCY")]
    pub upload_concurrency: Option<usize>,
    /// Congestion control of QUIC: cubic or bbr [default: cubic]
    #[arg(long, value_name = "cubic|bbr", env = "BLOCKFERRY_CONGESTION")]
    pub congestion: Option<common::net::quic::Congestion>,
    /// How often this receiver says in the store that it lives, 1s to 60s [default: 60s]
    #[arg(long, value_name = "TIME", env = "BLOCKFERRY_HEARTBEAT")]
    pub heartbeat: Option<DurationText>,
    /// This receiver's name [default: the host name]
    #[arg(long, value_name = "NAME", env = "BLOCKFERRY_NAME")]
    pub name: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
