//! The command line of `blockferry-sender`. Flags stay optional here: [`crate::config`] merges them with the environment, the
//! file and the defaults, and validates the result.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use common::net::quic::Congestion;
use common::net::resolve::HostPort;
use common::ops::cli::{LogArgs, MemoryArgs};
use common::units::{ByteCount, ByteRate, DurationText};

use crate::control::args::{AdoptArgs, DetachArgs, EventsArgs, PointArgs, StatusArgs};

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
    #[arg(long = "volume", value_name = "NAME=PATH[,capture=scan]")]
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
    /// Send at most this much, such as 20MiB/s [default: no limit]
    #[arg(long, value_name = "SIZE/s", env = "BLOCKFERRY_RATE_LIMIT")]
    pub rate_limit: Option<ByteRate>,
    /// Without --once: time from one recovery point to the next pass [default: 30s]
    #[arg(long, value_name = "TIME", env = "BLOCKFERRY_POINT_INTERVAL")]
    pub point_interval: Option<DurationText>,
    /// Sealed bytes after which an epoch is closed and committed, 1MiB to 256MiB [default: 256MiB]
    #[arg(long, value_name = "SIZE", env = "BLOCKFERRY_EPOCH_SIZE")]
    pub epoch_size: Option<ByteCount>,
    /// Where Prometheus metrics, /healthz and /readyz are served [default: 127.0.0.1:9465]
    #[arg(long, value_name = "HOST:PORT", env = "BLOCKFERRY_METRICS_LISTEN")]
    pub metrics_listen: Option<std::net::SocketAddr>,
}

/// `NAME=PATH[,capture=MODE]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeSpec {
    /// The volume's name.
    pub name: String,
    /// Its block device or image file.
    pub path: PathBuf,
}

impl FromStr for VolumeSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, rest) = text.split_once('=').ok_or("expected NAME=PATH")?;
        // Options follow the last commas; a path may hold commas as long as what follows is no option.
        let mut path = rest;
        while let Some((before, option)) = path.rsplit_once(',') {
            match option.split_once('=') {
                Some(("capture", mode)) => check_capture(mode)?,
                Some(("listen", _)) => {
                    return Err("listen= goes with capture=nbd, which this release does not have".into());
                }
                _ => break,
            }
            path = before;
        }
        Self::new(name, path.into())
    }
}

impl VolumeSpec {
    /// A volume of this name and path.
    ///
    /// # Errors
    /// In words, where the name is not one or the path is empty.
    pub fn new(name: &str, path: PathBuf) -> Result<Self, String> {
        common::net::identity::check_name(name).map_err(|error| error.to_string())?;
        if path.as_os_str().is_empty() {
            return Err(format!("volume {name} has no path: expected NAME=PATH"));
        }
        Ok(Self { name: name.to_owned(), path })
    }
}

/// Refuses capture modes that this release does not have.
///
/// # Errors
/// In words, naming what there is.
pub fn check_capture(mode: &str) -> Result<(), String> {
    match mode {
        "scan" => Ok(()),
        other => Err(format!("capture={other} is not in this release; it has capture=scan")),
    }
}

/// `auto|N`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ZstdLevel {
    /// Level 1, and none while the data doesn't shrink.
    #[default]
    Auto,
    /// Always this level.
    Fixed(i32),
}

impl FromStr for ZstdLevel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        text.parse()
            .ok()
            .filter(|level| (-7..=19).contains(level))
            .map(Self::Fixed)
            .ok_or_else(|| format!("expected auto or a level from -7 to 19, found \"{text}\""))
    }
}

impl std::fmt::Display for ZstdLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(level) => level.fmt(f),
        }
    }
}

/// `auto|quic`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    /// What works; in this release QUIC.
    #[default]
    Auto,
    /// QUIC.
    Quic,
}

impl FromStr for Transport {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "quic" => Ok(Self::Quic),
            other => {
                Err(format!("expected auto or quic, found \"{other}\"; this release does not speak another transport"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_volume_is_a_name_and_a_path_that_may_hold_commas_and_equals_signs() {
        let spec: VolumeSpec = "root=/dev/disk/by-id/a=b,c,capture=scan".parse().expect("valid");
        assert_eq!((spec.name.as_str(), spec.path), ("root", PathBuf::from("/dev/disk/by-id/a=b,c")));
        for wrong in ["root", "=/dev/vda", "root=", "a b=/dev/vda", "root=/dev/vda,capture=nbd", "root=,capture=scan"] {
            assert!(wrong.parse::<VolumeSpec>().is_err(), "{wrong} was taken");
        }
    }
}
