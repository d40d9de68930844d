//! The command line, and the one exit path.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode as ProcessExit;
use std::sync::LazyLock;

use catalog::store::{Store, StoreOptions};
use clap::{Args, Parser, Subcommand};
use common::budget::{effective_memory, resolve};
use common::ids::CloseId;
use common::limits::MEMORY_BUDGET_BYTES_MIN;
use common::ops::cli::{LogArgs, MemoryArgs, version_text};
use common::ops::exit::{ExitCode, report_error};
use common::ops::{logging, panic_guard};

use crate::drill::{self, DrillArgs};
use crate::error::OperatorError;
use crate::lifecycle::LifecycleCommand;
use crate::policy::PolicyCommand;
use crate::restore::group::GroupRequest;
use crate::restore::image::Format;
use crate::restore::{self, RestoreRequest};
use crate::select::{PointWanted, parse_close};
use crate::serve::{self, ServeArgs, ServeError};
use crate::status::{self, StatusArgs};
use crate::verify::{self, VerifyRequest};
use crate::{points, prune, volumes};

const EXAMPLES: &str = "Examples:
  blockferry points --store s3://backups/site-a --volume web-1/root
  blockferry restore --store file:///srv/store --volume root --key-file blockferry.key --to root.img
  blockferry restore --store file:///srv/store --volume root --point 2026-01-31T12:00:00Z --key-file blockferry.key --to /dev/sdb
  blockferry verify --store file:///srv/store --volume root --key-file blockferry.key";

/// Lists, restores and verifies recovery points from the object store alone
#[derive(Debug, Parser)]
#[command(name = "blockferry", version = VERSION.as_str(), after_help = EXAMPLES, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: LogArgs,
}

/// Where the store is, as every command takes it.
#[derive(Debug, Args)]
pub(crate) struct StoreArgs {
    /// The object store: file:///path, s3://bucket/prefix, az://container/prefix or gs://bucket/prefix
    #[arg(long, value_name = "URL", env = "BLOCKFERRY_STORE")]
    store: String,
    /// Further certificate authorities (PEM) to trust for the store's endpoint
    #[arg(long, value_name = "FILE", env = "BLOCKFERRY_STORE_CA")]
    store_ca: Option<PathBuf>,
    /// Most requests a second to the object store; 0 for no cap
    #[arg(long, value_name = "N", env = "BLOCKFERRY_STORE_REQUESTS_PER_SECOND", default_value_t = 0)]
    store_requests_per_second: u32,
}

/// As [`StoreArgs`], where something else may be asked instead.
#[derive(Debug, Args)]
struct OptionalStoreArgs {
    /// The object store: file:///path, s3://bucket/prefix, az://container/prefix or gs://bucket/prefix
    #[arg(long, value_name = "URL", env = "BLOCKFERRY_STORE")]
    store: Option<String>,
    /// Further certificate authorities (PEM) to trust for the store's endpoint
    #[arg(long, value_name = "FILE", env = "BLOCKFERRY_STORE_CA")]
    store_ca: Option<PathBuf>,
    /// Most requests a second to the object store; 0 for no cap
    #[arg(long, value_name = "N", env = "BLOCKFERRY_STORE_REQUESTS_PER_SECOND", default_value_t = 0)]
    store_requests_per_second: u32,
}

impl OptionalStoreArgs {
    fn given(self) -> Option<StoreArgs> {
        let Self { store, store_ca, store_requests_per_second } = self;
        store.map(|store| StoreArgs { store, store_ca, store_requests_per_second })
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Expire points by each volume's policy and collect what no retained point needs
    #[command(
        after_help = "Examples:\n  blockferry prune --store s3://backups/site-a --dry-run\n  blockferry prune --store file:///srv/store --volume web-1/root --grace 7d --json\n\nSafe beside receivers, restores and other prunes; killed anywhere, run it again."
    )]
    Prune(prune::PruneArgs),
    /// List recovery points, oldest first
    #[command(
        after_help = "Examples:\n  blockferry points --store file:///srv/store\n  blockferry points --store file:///srv/store --volume web-1/root --json"
    )]
    Points {
        #[command(flatten)]
        store: StoreArgs,
        /// NAME, MACHINE/NAME or UUID [default: all volumes]
        #[arg(long, value_name = "VOLUME")]
        volume: Option<String>,
        /// Print a JSON array
        #[arg(long)]
        json: bool,
    },
    /// Restore a recovery point to a new file or a block device
    #[command(
        after_help = "Examples:\n  blockferry restore --store file:///srv/store --volume root --key-file blockferry.key --to root.img\n  blockferry restore --store file:///srv/store --volume root --key-file blockferry.key --to /dev/sdb --dry-run\n  blockferry restore --store file:///srv/store --volume root --key-file blockferry.key --to root.vhd --format vhd --verify\n  blockferry restore --store file:///srv/store --machine web-1 --point GROUP_POINT --key-file blockferry.key --to-dir restored\n\n`points --json` shows which points share a group point: an instant of several disks. An interrupted restore goes on where it stopped when the same command is run again."
    )]
    Restore {
        #[command(flatten)]
        store: StoreArgs,
        /// NAME, MACHINE/NAME or UUID
        #[arg(long, value_name = "VOLUME", required_unless_present = "machine")]
        volume: Option<String>,
        /// Restore all volumes of this machine that were cut at one instant, instead of one volume
        #[arg(long, value_name = "MACHINE", conflicts_with_all = ["volume", "to"], requires = "to_dir")]
        machine: Option<String>,
        /// latest (never a fuzzy point), latest-any, a point's id or its first digits, a group point's id, or a time with offset (the newest not after it)
        #[arg(long, value_name = "POINT", default_value = "latest")]
        point: String,
        /// The key file made when the machine was registered, or a copy
        #[arg(long, value_name = "FILE", env = "BLOCKFERRY_KEY_FILE")]
        key_file: PathBuf,
        /// New file, or block device
        #[arg(long, value_name = "FILE|DEVICE", required_unless_present = "machine")]
        to: Option<PathBuf>,
        /// With --machine: folder for a file of each volume, NAME.img, NAME.qcow2 or NAME.vhd
        #[arg(long, value_name = "DIR", requires = "machine")]
        to_dir: Option<PathBuf>,
        /// What a file is written as; vhd is a fixed one of whole MiB, as Azure takes it
        #[arg(long, value_enum, default_value_t = Format::Raw)]
        format: Format,
        /// Read back what was written and compare it
        #[arg(long)]
        verify: bool,
        /// Check everything and show what would be written; write nothing
        #[arg(long)]
        dry_run: bool,
        /// Replace an existing file; overwrite a device that is mounted or not empty
        #[arg(long)]
        force: bool,
        /// Where the progress of restores to devices is kept
        #[arg(long, value_name = "DIR", default_value = "/var/lib/blockferry/restore")]
        state_dir: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        memory: MemoryArgs,
    },
    /// Read every object of a volume and check it; with the key, open every record
    #[command(
        after_help = "Examples:\n  blockferry verify --store file:///srv/store --volume root\n  blockferry verify --store file:///srv/store --volume root --key-file blockferry.key --expect-head CLOSE"
    )]
    Verify {
        #[command(flatten)]
        store: StoreArgs,
        /// NAME, MACHINE/NAME or UUID
        #[arg(long, value_name = "VOLUME")]
        volume: String,
        /// all, or one point as in restore
        #[arg(long, value_name = "POINT", default_value = "all")]
        point: String,
        /// The machine's key file: also open and authenticate every record
        #[arg(long, value_name = "FILE", env = "BLOCKFERRY_KEY_FILE")]
        key_file: Option<PathBuf>,
        /// A close that must be in the log (restore and verify print the head): shows that no newer history was removed
        #[arg(long, value_name = "CLOSE", value_parser = parse_close)]
        expect_head: Option<CloseId>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        memory: MemoryArgs,
    },
    /// Restore a recovery point to a scratch disk, check its file systems, and boot it
    #[command(
        after_help = "Examples:\n  blockferry drill --store file:///srv/store --volume root --key-file blockferry.key\n  blockferry drill --store s3://backups/site-a --volume web-1/root --point 2026-01-31T12:00:00Z --key-file blockferry.key --boot\n\nExit code 3 where the point was restored but not all of it could be checked. What was shown is kept in the store: see `blockferry points`."
    )]
    Drill(DrillArgs),
    /// Serve a recovery point as a disk over NBD, at once; writes go to a local overlay
    #[command(
        after_help = "Examples:\n  blockferry serve --store s3://backups/site-a --volume web-1/root --key-file blockferry.key --nbd /run/root.sock\n  qemu-system-x86_64 -m 2G -drive file='nbd+unix:///root?socket=/run/root.sock',format=raw,if=virtio\n  blockferry serve --store file:///srv/store --volume root --key-file blockferry.key --nbd 127.0.0.1:10809 --overlay root.overlay\n\nIt ends with SIGTERM or ^C. The same command with the same --overlay goes on with what was written."
    )]
    Serve(ServeArgs),
    /// Show how the fleet's receivers and the volumes stand, and what to do about what is wrong
    #[command(
        after_help = "Examples:\n  blockferry status --store file:///srv/store\n  blockferry status --store s3://backups/site-a --max-age 15m --json\n  blockferry status --receiver backup.example.org:9443 --cert alice.pem\n\n`blockferry-receiver operator create NAME` makes the certificate. A receiver tells of itself, of the fleet, and of the volumes that it has loaded."
    )]
    Status {
        #[command(flatten)]
        store: OptionalStoreArgs,
        #[command(flatten)]
        status: StatusArgs,
    },
    /// Say which recovery points of a volume are kept, and for how long
    Policy {
        #[command(subcommand)]
        command: PolicyCommand,
    },
    /// List, rename, retire and delete volumes
    Volume {
        #[command(subcommand)]
        command: VolumeCommand,
    },
}

#[derive(Debug, Subcommand)]
enum VolumeCommand {
    /// List volumes by machine and name
    #[command(after_help = "Examples:\n  blockferry volume list --store file:///srv/store --json")]
    List {
        #[command(flatten)]
        store: StoreArgs,
        /// Also those that are deleted and not removed yet
        #[arg(long)]
        all: bool,
        /// Print a JSON array
        #[arg(long)]
        json: bool,
    },
    #[command(flatten)]
    Lifecycle(LifecycleCommand),
}

static VERSION: LazyLock<String> = LazyLock::new(version);

fn version() -> String {
    use common::format::{checkpoint, close, log, record, segment, volume_header};
    let formats: [(&str, u32); 6] = [
        ("record", record::VERSION.into()),
        ("close", close::KIND.version.into()),
        ("segment", segment::VERSION_COLLECTED.into()),
        ("log entry", log::KIND.version.into()),
        ("checkpoint", checkpoint::KIND.version.into()),
        ("volume header", volume_header::KIND.version.into()),
    ];
    version_text(env!("CARGO_PKG_VERSION"), 1..=1, &formats)
}

/// Runs the tool on the process's arguments.
#[must_use]
pub fn main() -> ProcessExit {
    panic_guard::install();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors and go to standard output.
            let code = if error.use_stderr() { ExitCode::Usage } else { ExitCode::Ok };
            let _ = error.print();
            return code.into();
        }
    };
    match start(cli) {
        Ok(()) => ExitCode::Ok.into(),
        // Whoever read our output has seen enough.
        Err(OperatorError::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::Ok.into(),
        // An orderly end is no error.
        Err(OperatorError::Serve(ended @ ServeError::Ended(_))) => ended.exit().into(),
        Err(error) => {
            report_error(&error);
            error.exit().into()
        }
    }
}

fn start(cli: Cli) -> Result<(), OperatorError> {
    // Unlike a daemon, a tool speaks of what surprises only, unless asked.
    let (level, format) = cli.log.effective("warn".parse().ok(), None);
    logging::init(&level, format)?;
    common::net::tls::install_provider();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(OperatorError::Runtime)?;
    runtime.block_on(run(cli.command))
}

async fn run(command: Command) -> Result<(), OperatorError> {
    let mut out = std::io::stdout();
    match command {
        Command::Points { store, volume, json } => {
            points::run(&open(&store).await?, volume.as_deref(), json, &mut out).await?;
        }
        Command::Restore {
            store,
            volume,
            machine,
            point,
            key_file,
            to,
            to_dir,
            format,
            verify,
            dry_run,
            force,
            state_dir,
            json,
            memory,
        } => {
            let point = point.parse()?;
            let budget_bytes = budget(memory)?;
            let store = open(&store).await?;
            if let (Some(machine), Some(to_dir)) = (machine, to_dir) {
                let request = GroupRequest {
                    machine,
                    point,
                    key_file,
                    to_dir,
                    format,
                    verify,
                    dry_run,
                    force,
                    state_dir,
                    json,
                    budget_bytes,
                };
                restore::group::run(&store, &request, &mut out).await?;
            } else {
                // clap demands both without --machine.
                let (volume, to) = (volume.unwrap_or_default(), to.unwrap_or_default());
                let request = RestoreRequest {
                    volume,
                    point,
                    key_file,
                    to,
                    format,
                    verify,
                    dry_run,
                    force,
                    state_dir,
                    json,
                    budget_bytes,
                };
                restore::run(&store, &request, &mut out).await?;
            }
        }
        Command::Verify { store, volume, point, key_file, expect_head, json, memory } => {
            let point = match point.as_str() {
                "all" => None,
                text => Some(text.parse::<PointWanted>()?),
            };
            let budget_bytes = budget(memory)?;
            let request = VerifyRequest { volume, point, key_file, expect_head, json, budget_bytes };
            verify::run(&open(&store).await?, &request, &mut out).await?;
        }
        Command::Drill(args) => {
            let budget_bytes = budget(args.memory)?;
            let store = open(&args.store).await?;
            drill::run(&store, &args, budget_bytes, &mut out).await?;
        }
        Command::Prune(args) => prune::run(&open(&args.store).await?, &args, &mut out).await?,
        Command::Serve(args) => {
            let budget_bytes = budget(args.memory)?;
            let store = open(&args.store).await?;
            serve::run(&store, &args, budget_bytes, &mut out).await?;
        }
        Command::Status { store, status } => match store.given() {
            Some(store) if status.receiver.is_none() => status::run(&open(&store).await?, &status, &mut out).await?,
            _ => status::ask(&status, &mut out).await?,
        },
        Command::Policy { command } => command.run(&open(command.store()).await?, &mut out).await?,
        Command::Volume { command: VolumeCommand::List { store, all, json } } => {
            volumes::list(&open(&store).await?, all, json, &mut out).await?;
        }
        Command::Volume { command: VolumeCommand::Lifecycle(command) } => {
            command.run(&open(command.store()).await?, &mut out).await?;
        }
    }
    out.flush().map_err(OperatorError::Output)
}

async fn open(args: &StoreArgs) -> Result<Store, OperatorError> {
    let read = |path: &PathBuf| {
        std::fs::read(path).map_err(|source| OperatorError::File { path: path.display().to_string(), source })
    };
    let ca_pem = args.store_ca.as_ref().map(read).transpose()?;
    let requests_per_second = std::num::NonZeroU32::new(args.store_requests_per_second);
    Ok(Store::open_with(&args.store, StoreOptions { ca_pem, requests_per_second, environment: None }).await?)
}

/// The budget asked for; by default the share of memory that every process takes, but never less than the minimum, since
/// this tool is run on small rescue systems too.
fn budget(memory: MemoryArgs) -> Result<u64, OperatorError> {
    let effective = effective_memory()?;
    match memory.memory_budget {
        Some(spec) => Ok(resolve(spec, &effective)?.0),
        None => {
            let share = resolve(memory.effective(None), &effective).map_or(MEMORY_BUDGET_BYTES_MIN, |bytes| bytes.0);
            Ok(share)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent_and_its_version_tells_the_formats() {
        Cli::command().debug_assert();
        assert!(version().contains("protocol 1; formats: record 1"), "{}", version());
    }
}
