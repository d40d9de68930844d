//! The command line of `blockferry-sender`. Flags stay optional here: [`crate::config`] merges them with the environment, the
//! file and the defaults, and validates the result.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use common::net::quic::Congestion;
use common::net::resolve::HostPort;
use common::ops::cli::{LogArgs, MemoryArgs};
use common::units::{ByteCount, ByteRate, DurationText};

use crate::control::args::{AdoptArgs, DetachArgs, EventsArgs, PointArgs, PreflightArgs, StatusArgs};
use crate::spec::{AppPoints, Overload, Transport, VolumeSpec, ZstdLevel};

/// Where the state lies unless told otherwise.
pub const STATE_DIR_DEFAULT: &str = "/var/lib/blockferry/sender";
/// Where the configuration lies unless told otherwise.
pub const CONFIG_DEFAULT: &str = "/etc/blockferry/sender.toml";

const EXAMPLES: &str = "Examples:
  blockferry-sender register -i receiver.example.net -P passphrase.txt
  blockferry-sender run --volume root=/dev/vda --volume data=/dev/vdb
  blockferry-sender run --once --json --volume image=/srv/disk.img

Exit codes: 0 done; 1 failed; 2 usage; 3 done, but weaker than asked for; 128+n ended by signal n.
A running `run` ends cleanly on SIGTERM: what is sealed is sent, and nothing has to travel again.";

/// Protects this machine's disks: captures their changes, seals them and streams them to a receiver.
#[derive(Debug, Parser)]
#[command(name = "blockferry-sender", version = crate::version_text(), after_help = EXAMPLES, arg_required_else_help = true)]
pub struct Cli {
    /// Logs.
    #[command(flatten)]
    pub log: LogArgs,
    /// Configuration file [default: /etc/blockferry/sender.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE", env = "BLOCKFERRY_CONFIG")]
    pub config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes this machine a member of a receiver's fleet, and makes its key file.
    Register(RegisterArgs),
    /// Replicates volumes: continuously, or with --once to one recovery point each.
    Run(Box<RunArgs>),
    /// Looks whether this machine has what protection needs.
    Preflight(PreflightArgs),
    /// Makes a recovery point now; returns when it is committed.
    Point(PointArgs),
    /// Shows how the sender and its volumes stand, and what to do.
    Status(StatusArgs),
    /// Shows what happened lately.
    Events(EventsArgs),
    /// Takes a volume over after a clone, a rollback or on a replaced machine.
    Adopt(AdoptArgs),
    /// Ends the protection of a volume; its recovery points stay in the store.
    Detach(DetachArgs),
    /// Looks at the effective configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
}

/// `config …`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Prints the effective configuration and the memory table, or says what is wrong with it.
    Check(Box<RunArgs>),
}

/// `register`
#[derive(Debug, Args)]
pub struct RegisterArgs {
    /// A receiver of the fleet: a name, an IPv4 address or an [IPv6] address, with an optional port
    #[arg(short = 'i', long = "receiver", value_name = "HOST[:PORT]")]
    pub receiver: HostPort,
    /// The passphrase file from `blockferry-receiver passphrase create`
    #[arg(short = 'P', long = "passphrase-file", value_name = "FILE")]
    pub passphrase_file: PathBuf,
    /// Where the sender keeps its state
    #[arg(long, value_name = "DIR", env = "BLOCKFERRY_STATE_DIR", default_value = STATE_DIR_DEFAULT)]
    pub state_dir: PathBuf,
    /// This machine's name in the fleet [default: its host name]
    #[arg(long, value_name = "MACHINE")]
    pub name: Option<String>,
}

/// `run`
#[derive(Debug, Args, Default)]
pub struct RunArgs {
    /// Where the sender keeps its state [default: /var/lib/blockferry/sender]
    #[arg(long, value_name = "DIR", env = "BLOCKFERRY_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// A volume to protect: its name and its block device or image file; may be given several times
    #[arg(long = "volume", value_name = "NAME=PATH[,capture=scan|nbd|ebpf][,listen=SOCKET|HOST:PORT]")]
    pub volumes: Vec<VolumeSpec>,
    /// Replicate each volume to one recovery point, then exit
    #[arg(long)]
    pub once: bool,
    /// With --once: print a JSON object for each volume on standard output
    #[arg(long, requires = "once")]
    pub json: bool,
    /// Memory.
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// QUIC streams per volume [default: 4]
    #[arg(long, value_name = "N", env = "BLOCKFERRY_STREAMS")]
    pub streams: Option<u8>,
    /// Threads that read, compress and seal [default: one for each core]
    #[arg(long, value_name = "N", env = "BLOCKFERRY_SEAL_THREADS")]
    pub seal_threads: Option<usize>,
    /// zstd level, or auto: level 1, and none while the data doesn't shrink [default: auto]
    #[arg(long, value_name = "auto|N", env = "BLOCKFERRY_ZSTD_LEVEL", allow_hyphen_values = true)]
    pub zstd_level: Option<ZstdLevel>,
    /// How records travel; this release speaks QUIC only [default: auto]
    #[arg(long, value_name = "auto|quic", env = "BLOCKFERRY_TRANSPORT")]
    pub transport: Option<Transport>,
    /// Congestion control of QUIC [default: cubic]
    #[arg(long, value_name = "cubic|bbr", env = "BLOCKFERRY_CONGESTION")]
    pub congestion: Option<Congestion>,
    /// Silence after which a receiver is given up and another one of the fleet is sought, 2s to 10m [default: 8s]
    #[arg(long, value_name = "TIME", env = "BLOCKFERRY_LINK_TIMEOUT")]
    pub link_timeout: Option<DurationText>,
    /// Send at most this much, such as 20MiB/s [default: no limit]
    #[arg(long, value_name = "SIZE/s", env = "BLOCKFERRY_RATE_LIMIT")]
    pub rate_limit: Option<ByteRate>,
    /// Time from one recovery point to the next, where the capture is scan or ebpf [default: 30s]
    #[arg(long, value_name = "TIME", env = "BLOCKFERRY_POINT_INTERVAL")]
    pub point_interval: Option<DurationText>,
    /// Time from one recovery point to the next, where the capture is nbd and something changed [default: 1s]
    #[arg(long, value_name = "TIME", env = "BLOCKFERRY_EPOCH_INTERVAL")]
    pub epoch_interval: Option<DurationText>,
    /// Time from one point with the hooks of --hook-dir to the next, or off [default: 1h]
    #[arg(long, value_name = "TIME|off", env = "BLOCKFERRY_APP_POINT_INTERVAL")]
    pub app_point_interval: Option<AppPoints>,
    /// When changes come faster than they can leave: bitmap remembers which pages change and reads them later, throttle lets
    /// writers wait (nbd only) [default: bitmap]
    #[arg(long, value_name = "bitmap|throttle", env = "BLOCKFERRY_OVERLOAD")]
    pub overload: Option<Overload>,
    /// How long file systems may be frozen for a point of an ebpf volume [default: 100ms]
    #[arg(long, value_name = "TIME", env = "BLOCKFERRY_FREEZE_LIMIT")]
    pub freeze_limit: Option<DurationText>,
    /// Directory with pre.d and post.d: programs run around the cut of an application-consistent point
    #[arg(long, value_name = "DIR", env = "BLOCKFERRY_HOOK_DIR")]
    pub hook_dir: Option<PathBuf>,
    /// How fast a disk is read to be compared with known hashes after a restart [default: 256MiB/s]
    #[arg(long, value_name = "SIZE/s", env = "BLOCKFERRY_VERIFY_RATE")]
    pub verify_rate: Option<ByteRate>,
    /// Sealed bytes after which an epoch is closed and committed, 1MiB to 256MiB [default: 256MiB]
    #[arg(long, value_name = "SIZE", env = "BLOCKFERRY_EPOCH_SIZE")]
    pub epoch_size: Option<ByteCount>,
    /// Where Prometheus metrics, /healthz and /readyz are served [default: 127.0.0.1:9465]
    #[arg(long, value_name = "HOST:PORT", env = "BLOCKFERRY_METRICS_LISTEN")]
    pub metrics_listen: Option<std::net::SocketAddr>,
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
