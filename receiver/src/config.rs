//! The receiver's configuration: flags over environment over the TOML file over defaults, validated into a value that can't
//! be wrong. Nobody reads flags or environment after this.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use catalog::fleet::receivers::HEARTBEAT;
use catalog::store::{Store, StoreError, StoreOptions};
use common::budget::{self, Budget, BudgetError, MemoryTable};
use common::limits;
use common::net::quic::{Congestion, QuicTuning};
use common::net::resolve::{HostPort, PORT_DEFAULT};
use common::ops::config::FileError;
use common::ops::logging::{LogFormat, LogLevel};
use common::units::{BudgetSpec, ByteCount, DurationText};
use serde::Deserialize;

use crate::accept::window_of;
use crate::cli::{CONFIG_DEFAULT, FleetArgs, RunArgs};

const METRICS_PORT_DEFAULT: u16 = 9464;
/// The program, its threads' stacks and libraries' own memory; measured as resident memory of an idle receiver, rounded up.
const BASE_BYTES: u64 = 32 << 20;
/// Smallest budget of a receiver; its resident memory peaks at some 100 MiB then (tests/tests/memory.rs).
const BUDGET_MIN: ByteCount = ByteCount(128 << 20);
/// Of what the program itself leaves, for what allocations take beyond what was asked for, as a divisor: a full record of
/// 256 KiB takes up to 320 KiB, jemalloc's next size.
const ALLOCATOR_SHARE: u64 = 6;
/// For RocksDB and the stage's index.
const STAGE_SHARE: u64 = 4;
/// For unread bytes of QUIC streams, of all connections together.
const QUIC_SHARE: u64 = 12;
/// For segments under construction and upload.
const SEGMENT_SHARE: u64 = 4;
/// Smallest stage.
const STAGE_CAPACITY_MIN: ByteCount = ByteCount(crate::stage::CAPACITY_BYTES_MIN);
/// Far above what a receiver needs (a segment of 32 MiB is six requests) and far below what a bucket allows.
const STORE_REQUESTS_PER_SECOND_DEFAULT: u32 = 500;
/// Largest stage that is chosen unasked.
const STAGE_CAPACITY_DEFAULT_MAX: u64 = 64 << 30;

/// What is wrong with the configuration. All of it is exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The configuration file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Values that do not fit together.
    #[error("{0}")]
    Invalid(String),
    /// The memory budget does not fit.
    #[error(transparent)]
    Budget(#[from] BudgetError),
}

/// The TOML file: flag names with underscores.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FileConfig {
    data_dir: Option<PathBuf>,
    store: Option<String>,
    store_ca: Option<PathBuf>,
    store_requests_per_second: Option<u32>,
    listen: Option<SocketAddr>,
    advertise: Option<String>,
    metrics_listen: Option<SocketAddr>,
    stage_capacity: Option<ByteCount>,
    memory_budget: Option<BudgetSpec>,
    segment_size: Option<ByteCount>,
    segment_linger: Option<DurationText>,
    upload_concurrency: Option<usize>,
    congestion: Option<String>,
    heartbeat: Option<DurationText>,
    name: Option<String>,
    /// `--log-level`.
    pub log_level: Option<LogLevel>,
    /// `--log-format`.
    pub log_format: Option<LogFormat>,
}

impl FileConfig {
    /// Reads `path`, or the default place if there is a file there.
    ///
    /// # Errors
    /// [`ConfigError::File`].
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        Ok(common::ops::config::load(path, Path::new(CONFIG_DEFAULT))?)
    }
}

/// Where the fleet is kept: what every command needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleetConfig {
    /// The receiver's own directory.
    pub data_dir: PathBuf,
    /// The store's URL.
    pub store: String,
    /// A file of further authorities for the store's endpoint, and what it holds.
    pub store_ca: Option<(PathBuf, Vec<u8>)>,
    /// Most requests a second to the store; 0 for no cap.
    pub store_requests_per_second: u32,
}

/// The receiver's own directory, where that is all that a command needs.
///
/// # Errors
/// [`ConfigError::Invalid`] where it is missing.
pub fn data_dir(flag: Option<&Path>, file: &FileConfig) -> Result<PathBuf, ConfigError> {
    let chosen = flag.map(Path::to_owned).or_else(|| file.data_dir.clone());
    let missing = "--data-dir is missing: pass --data-dir DIR, such as /var/lib/blockferry/receiver";
    chosen.ok_or_else(|| ConfigError::Invalid(missing.to_owned()))
}

impl FleetConfig {
    /// Merges and validates.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] where one is missing, or the file of authorities can't be read.
    pub fn resolve(args: &FleetArgs, file: &FileConfig) -> Result<Self, ConfigError> {
        let missing =
            |flag: &str, example: &str| ConfigError::Invalid(format!("{flag} is missing: pass {flag} {example}"));
        let data_dir = args.data_dir.clone().or_else(|| file.data_dir.clone());
        let store = args.store.clone().or_else(|| file.store.clone());
        let store_ca = args.store_ca.clone().or_else(|| file.store_ca.clone());
        let store_ca = store_ca.map(|path| match std::fs::read(&path) {
            Ok(pem) => Ok((path, pem)),
            Err(error) => {
                let path = path.display();
                Err(ConfigError::Invalid(format!("--store-ca {path}: {error}; pass a file of certificates in PEM")))
            }
        });
        Ok(Self {
            data_dir: data_dir.ok_or_else(|| missing("--data-dir", "DIR, such as /var/lib/blockferry/receiver"))?,
            store: store.ok_or_else(|| missing("--store", "URL, such as file:///srv/blockferry"))?,
            store_ca: store_ca.transpose()?,
            store_requests_per_second: args
                .store_requests_per_second
                .or(file.store_requests_per_second)
                .unwrap_or(STORE_REQUESTS_PER_SECOND_DEFAULT),
        })
    }

    /// Opens the store.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn open_store(&self) -> Result<Store, StoreError> {
        let ca_pem = self.store_ca.as_ref().map(|(_, pem)| pem.clone());
        let requests_per_second = NonZeroU32::new(self.store_requests_per_second);
        Store::open_with(&self.store, StoreOptions { ca_pem, requests_per_second, environment: None }).await
    }
}

/// A validated configuration of `run`.
#[derive(Debug, Clone)]
pub struct RunConfig {
    /// Where the fleet is kept.
    pub fleet: FleetConfig,
    /// QUIC and gRPC.
    pub listen: SocketAddr,
    /// How senders reach this receiver, where somebody said so.
    pub advertise: Option<HostPort>,
    /// Metrics endpoint, and whether somebody chose it.
    pub metrics_listen: (SocketAddr, bool),
    /// Most bytes of the stage; `None` where it is to be derived from the free space of its disk.
    pub stage_capacity: Option<ByteCount>,
    /// Size of a segment.
    pub segment_bytes: u64,
    /// How long epochs without a point may wait to share a segment.
    pub segment_linger: Duration,
    /// Segments uploaded at once.
    pub upload_concurrency: usize,
    /// QUIC's settings.
    pub quic: QuicTuning,
    /// Of the memory budget, for unread bytes of all connections together.
    pub quic_memory_bytes: u64,
    /// How often this receiver says that it lives.
    pub heartbeat: Duration,
    /// This receiver's name.
    pub name: String,
    /// How the memory budget is divided.
    pub memory: MemoryTable,
    /// Of it, for RocksDB and the stage's index.
    pub stage_memory_bytes: u64,
    /// Of it, for segments under construction and upload.
    pub segment_memory_bytes: u64,
}

impl RunConfig {
    /// Merges and validates.
    ///
    /// # Errors
    /// [`ConfigError`], whose text names the flag and what it takes.
    pub fn resolve(args: &RunArgs, file: &FileConfig) -> Result<Self, ConfigError> {
        let invalid = |problem: String| ConfigError::Invalid(problem);
        let spec = args.memory.effective(file.memory_budget);
        let effective = budget::effective_memory()?;
        let found = budget::resolve(spec, &effective)?;
        if found < BUDGET_MIN {
            let (effective, minimum) = (effective.bytes, BUDGET_MIN);
            return Err(BudgetError::BelowMinimum { spec, found, effective, minimum }.into());
        }
        let total = found.bytes();
        // What is clamped goes to payload.
        let rest = total - BASE_BYTES;
        let quic_bytes = (rest / QUIC_SHARE).min(64 << 20);
        let stage_memory_bytes = (rest / STAGE_SHARE).min(512 << 20);
        let segment_memory_bytes = (rest / SEGMENT_SHARE).min(1 << 30);
        let memory = MemoryTable::new(total)
            .with("program", BASE_BYTES)
            .with("allocator", rest / ALLOCATOR_SHARE)
            .with("stage (RocksDB, index)", stage_memory_bytes)
            .with("QUIC receive windows", quic_bytes)
            .with("segments under upload", segment_memory_bytes);
        Budget::new(memory.clone())?;

        let (least, most) = (ByteCount(limits::SEGMENT_BYTES_MIN), ByteCount(limits::SEGMENT_BYTES_MAX));
        let segment = args.segment_size.or(file.segment_size).unwrap_or(ByteCount(limits::SEGMENT_BYTES_DEFAULT));
        if segment < least || segment > most {
            return Err(invalid(format!("--segment-size {segment}: expected {least} to {most}")));
        }
        let concurrency = args.upload_concurrency.or(file.upload_concurrency).unwrap_or(4);
        if concurrency == 0 || concurrency > 64 {
            return Err(invalid(format!("--upload-concurrency {concurrency}: expected 1 to 64")));
        }
        let heartbeat = args.heartbeat.or(file.heartbeat).map_or(HEARTBEAT, DurationText::get);
        if heartbeat < Duration::from_secs(1) || heartbeat > HEARTBEAT {
            let (found, most) = (DurationText(heartbeat), DurationText(HEARTBEAT));
            return Err(invalid(format!("--heartbeat {found}: expected 1s to {most}")));
        }
        let stage_capacity = args.stage_capacity.or(file.stage_capacity);
        if let Some(capacity) = stage_capacity.filter(|&capacity| capacity < STAGE_CAPACITY_MIN) {
            return Err(invalid(format!("--stage-capacity {capacity}: expected at least {STAGE_CAPACITY_MIN}")));
        }
        let congestion: Congestion = match (args.congestion, &file.congestion) {
            (Some(congestion), _) => congestion,
            (None, Some(text)) => text.parse().map_err(|error| invalid(format!("congestion: {error}")))?,
            (None, None) => Congestion::default(),
        };
        let advertise = match (&args.advertise, &file.advertise) {
            (Some(advertise), _) => Some(advertise.clone()),
            (None, Some(text)) => Some(text.parse().map_err(|error| invalid(format!("advertise: {error}")))?),
            (None, None) => None,
        };
        let name = args.name.clone().or_else(|| file.name.clone()).unwrap_or_else(host_name);
        common::net::identity::check_name(&name).map_err(|error| invalid(format!("--name: {error}")))?;
        let quic = QuicTuning {
            connection_window_bytes: window_of(quic_bytes, 1),
            stream_window_bytes: window_of(quic_bytes, 1) / 2,
            send_window_bytes: 1 << 20,
            congestion,
            ..QuicTuning::default()
        };
        let chosen = args.metrics_listen.or(file.metrics_listen);
        Ok(Self {
            fleet: FleetConfig::resolve(&args.fleet, file)?,
            listen: args.listen.or(file.listen).unwrap_or(SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT_DEFAULT))),
            advertise,
            metrics_listen: (
                chosen.unwrap_or(SocketAddr::from((Ipv4Addr::LOCALHOST, METRICS_PORT_DEFAULT))),
                chosen.is_some(),
            ),
            stage_capacity,
            // A segment is held in memory until it is stored, so a small budget makes smaller ones.
            segment_bytes: segment.bytes().min(segment_memory_bytes / 2),
            segment_linger: args
                .segment_linger
                .or(file.segment_linger)
                .map_or(Duration::from_secs(1), DurationText::get),
            upload_concurrency: concurrency,
            quic,
            quic_memory_bytes: quic_bytes,
            heartbeat,
            name,
            memory,
            stage_memory_bytes,
            segment_memory_bytes,
        })
    }

    /// Where senders reach this receiver, which listens at `listen`: where somebody said, else there, else at the port of this
    /// machine's name.
    #[must_use]
    pub fn addresses(&self, listen: SocketAddr) -> Vec<String> {
        let named = || HostPort::parse(&rustix::system::uname().nodename().to_string_lossy(), listen.port()).ok();
        let address = match &self.advertise {
            Some(advertise) => Some(advertise.clone()),
            None if listen.ip().is_unspecified() => named(),
            None => Some(listen.into()),
        };
        address.iter().map(ToString::to_string).collect()
    }

    /// The stage's capacity on a disk with `free_bytes` free: what was asked for, or half of what is free.
    #[must_use]
    pub fn stage_capacity_on(&self, free_bytes: u64) -> ByteCount {
        self.stage_capacity
            .unwrap_or(ByteCount((free_bytes / 2).clamp(STAGE_CAPACITY_MIN.bytes(), STAGE_CAPACITY_DEFAULT_MAX)))
    }
}

fn host_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if common::net::identity::check_name(&name).is_ok() { name } else { "receiver".to_owned() }
}

impl fmt::Display for RunConfig {
    /// The effective configuration as TOML, then the memory table as comments.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "data_dir = {:?}", self.fleet.data_dir)?;
        writeln!(f, "store = {:?}", self.fleet.store)?;
        if let Some((path, _)) = &self.fleet.store_ca {
            writeln!(f, "store_ca = {path:?}")?;
        }
        writeln!(f, "store_requests_per_second = {}", self.fleet.store_requests_per_second)?;
        writeln!(f, "listen = \"{}\"", self.listen)?;
        if let Some(advertise) = &self.advertise {
            writeln!(f, "advertise = \"{advertise}\"")?;
        }
        writeln!(f, "metrics_listen = \"{}\"", self.metrics_listen.0)?;
        match self.stage_capacity {
            Some(capacity) => writeln!(f, "stage_capacity = {:?}", capacity.exact())?,
            None => writeln!(f, "# stage_capacity: half of what is free on its disk")?,
        }
        writeln!(f, "memory_budget = {:?}", ByteCount(self.memory.total()).exact())?;
        if self.segment_bytes >= limits::SEGMENT_BYTES_MIN {
            writeln!(f, "segment_size = {:?}", ByteCount(self.segment_bytes).exact())?;
        } else {
            writeln!(f, "# segment_size: {}, as the memory budget allows", ByteCount(self.segment_bytes))?;
        }
        writeln!(f, "segment_linger = {:?}", DurationText(self.segment_linger).exact())?;
        writeln!(f, "upload_concurrency = {}", self.upload_concurrency)?;
        let congestion = if self.quic.congestion == Congestion::Cubic { "cubic" } else { "bbr" };
        writeln!(f, "congestion = \"{congestion}\"")?;
        writeln!(f, "heartbeat = {:?}", DurationText(self.heartbeat).exact())?;
        writeln!(f, "name = {:?}\n", self.name)?;
        self.memory.to_string().lines().try_for_each(|line| writeln!(f, "# {line}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    use crate::cli::{Cli, Command};

    fn resolve(flags: &[&str], file: &str) -> Result<RunConfig, ConfigError> {
        let cli = Cli::try_parse_from(["blockferry-receiver", "run"].iter().chain(flags)).expect("flags parse");
        let Command::Run(args) = cli.command else { panic!("run was given") };
        RunConfig::resolve(&args, &toml::from_str(file).expect("the file parses"))
    }

    const FLEET: [&str; 4] = ["--data-dir", "/d", "--store", "file:///s"];

    #[test]
    fn flags_override_the_file_and_the_result_reads_back_the_same() {
        let flags = [&FLEET[..], &["--segment-size", "64MiB", "--memory-budget", "768MiB"]].concat();
        let config = resolve(&flags, "segment_size = \"16MiB\"\nname = \"ps-1\"\n").expect("valid");
        assert_eq!((config.segment_bytes, config.name.as_str()), (64 << 20, "ps-1"));
        let again = resolve(&[], &config.to_string()).expect("what is printed is valid");
        assert_eq!(again.to_string(), config.to_string());
    }

    #[test]
    fn the_smallest_budget_still_leaves_room_for_payload_and_a_segment() {
        let config = resolve(&[&FLEET[..], &["--memory-budget", "128MiB"]].concat(), "").expect("valid");
        assert!(config.memory.payload() >= 4 << 20, "{}", config.memory);
        assert!(config.segment_bytes >= 8 << 20);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (flags, named) in [
            (&["--data-dir", "/d"][..], "--store"),
            (&["--store", "file:///s"], "--data-dir"),
            (&["--data-dir", "/d", "--store", "file:///s", "--segment-size", "1MiB"], "--segment-size"),
            (&["--data-dir", "/d", "--store", "file:///s", "--stage-capacity", "1MiB"], "--stage-capacity"),
            (&["--data-dir", "/d", "--store", "file:///s", "--memory-budget", "100MiB"], "128"),
            (&["--data-dir", "/d", "--store", "file:///s", "--name", "a b"], "--name"),
            (&["--data-dir", "/d", "--store", "s3://b", "--store-ca", "/nowhere/ca.pem"], "/nowhere/ca.pem"),
        ] {
            let error = resolve(flags, "").expect_err("invalid").to_string();
            assert!(error.contains(named), "{error:?} does not name {named}");
        }
    }
}
