//! The sender's configuration: flags over environment over the TOML file over defaults, validated into a value that can't be
//! wrong. Nobody reads flags or environment after this.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::budget::{self, Budget, BudgetError, MemoryTable};
use common::limits;
use common::net::quic::{Congestion, QuicTuning};
use common::ops::config::FileError;
use common::ops::logging::{LogFormat, LogLevel};
use common::units::{BudgetSpec, ByteCount, ByteRate, DurationText};
use serde::Deserialize;

use crate::cli::{CONFIG_DEFAULT, RunArgs, STATE_DIR_DEFAULT};
use crate::spec::{AppPoints, CaptureMode, Overload, Transport, VolumeSpec, ZstdLevel};

/// Reading for a verification, unless told otherwise: some disks are faster, but others work beside it.
const VERIFY_RATE_DEFAULT: ByteRate = ByteRate(256 << 20);
const METRICS_PORT_DEFAULT: u16 = 9465;
/// Silence after which a receiver is given up, unless told otherwise: with what follows, a killed one is left within 15 s
/// (`send/race.rs` has the sum). A link that was given up too early costs a handshake: nothing is sent again that was staged.
pub const LINK_TIMEOUT: Duration = Duration::from_secs(8);
/// The program, its threads' stacks and libraries' own memory; measured as resident memory of an idle sender, rounded up.
const BASE_BYTES: u64 = 16 << 20;
/// Largest share of the budget that QUIC's unacknowledged bytes may take, as a divisor.
const QUIC_SHARE: u64 = 4;

/// Silence after which a sender asks for a sign of life, a few times before it gives up.
#[must_use]
pub fn keep_alive(link_timeout: Duration) -> Duration {
    QuicTuning::default().keep_alive.min(link_timeout / 4)
}

/// What is wrong with the configuration. All of it is exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file.
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
    state_dir: Option<PathBuf>,
    memory_budget: Option<BudgetSpec>,
    streams: Option<u8>,
    seal_threads: Option<usize>,
    zstd_level: Option<toml::Value>,
    transport: Option<String>,
    congestion: Option<String>,
    link_timeout: Option<DurationText>,
    rate_limit: Option<ByteRate>,
    point_interval: Option<DurationText>,
    epoch_interval: Option<DurationText>,
    app_point_interval: Option<String>,
    overload: Option<String>,
    freeze_limit: Option<DurationText>,
    hook_dir: Option<PathBuf>,
    verify_rate: Option<ByteRate>,
    epoch_size: Option<ByteCount>,
    metrics_listen: Option<SocketAddr>,
    /// `--log-level`.
    pub log_level: Option<LogLevel>,
    /// `--log-format`.
    pub log_format: Option<LogFormat>,
    volume: Vec<FileVolume>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileVolume {
    name: String,
    path: PathBuf,
    capture: Option<String>,
    listen: Option<String>,
}

impl FileConfig {
    /// The state directory: the one chosen, else the file's, else the default.
    #[must_use]
    pub fn state_dir(&self, chosen: Option<&Path>) -> PathBuf {
        chosen.or(self.state_dir.as_deref()).unwrap_or(Path::new(STATE_DIR_DEFAULT)).to_owned()
    }

    /// Names and disks of the volumes.
    #[must_use]
    pub fn volume_paths(&self) -> Vec<(String, PathBuf)> {
        self.volume.iter().map(|volume| (volume.name.clone(), volume.path.clone())).collect()
    }

    /// Path of the disk of a volume of this name.
    #[must_use]
    pub fn volume_path(&self, name: &str) -> Option<&Path> {
        self.volume.iter().find(|volume| volume.name == name).map(|volume| volume.path.as_path())
    }

    /// Reads `path`, or the default place if there is a file there.
    ///
    /// # Errors
    /// [`ConfigError::File`].
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        Ok(common::ops::config::load(path, Path::new(CONFIG_DEFAULT))?)
    }
}

/// A validated configuration of `run`.
#[derive(Debug, Clone)]
pub struct RunConfig {
    /// Where the state lies.
    pub state_dir: PathBuf,
    /// Volumes, names unique; at least one.
    pub volumes: Vec<VolumeSpec>,
    /// One point each, then exit.
    pub once: bool,
    /// JSON summaries on standard output.
    pub json: bool,
    /// QUIC streams per volume.
    pub streams: u8,
    /// Worker threads.
    pub seal_threads: usize,
    /// zstd level.
    pub zstd_level: ZstdLevel,
    /// How records travel.
    pub transport: Transport,
    /// QUIC's settings.
    pub quic: QuicTuning,
    /// Sending limit in bytes a second.
    pub rate_limit: Option<ByteRate>,
    /// Time between recovery points of `scan` and `ebpf`.
    pub point_interval: Duration,
    /// Time between recovery points of `nbd`.
    pub epoch_interval: Duration,
    /// Time between points with hooks.
    pub app_points: AppPoints,
    /// What to do when changes come faster than they can leave.
    pub overload: Overload,
    /// How long file systems may be frozen.
    pub freeze_limit: Duration,
    /// Where the hooks lie.
    pub hook_dir: Option<PathBuf>,
    /// How fast a disk is read, in bytes a second, to be compared with known hashes after a restart.
    pub verify_rate: Option<ByteRate>,
    /// Sealed bytes after which an epoch is closed.
    pub epoch_bytes: u64,
    /// Metrics endpoint, and whether somebody chose it.
    pub metrics_listen: (SocketAddr, bool),
    /// How the memory budget is divided.
    pub memory: MemoryTable,
}

impl RunConfig {
    /// Merges and validates.
    ///
    /// # Errors
    /// [`ConfigError`], whose text names the flag and what it takes.
    pub fn resolve(args: &RunArgs, file: &FileConfig) -> Result<Self, ConfigError> {
        let invalid = |problem: String| ConfigError::Invalid(problem);
        let volumes = volumes(args, file)?;
        let streams = args.streams.or(file.streams).unwrap_or(4);
        if streams == 0 || usize::from(streams) > limits::STREAMS_PER_SESSION_MAX {
            let most = limits::STREAMS_PER_SESSION_MAX;
            return Err(invalid(format!("--streams {streams}: expected 1 to {most}")));
        }
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let seal_threads = args.seal_threads.or(file.seal_threads).unwrap_or(cores);
        if seal_threads == 0 || seal_threads > 64 {
            return Err(invalid(format!("--seal-threads {seal_threads}: expected 1 to 64")));
        }
        let zstd_level = match (args.zstd_level, &file.zstd_level) {
            (Some(level), _) => level,
            (None, Some(value)) => {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                text.parse().map_err(|error| invalid(format!("zstd_level: {error}")))?
            }
            (None, None) => ZstdLevel::default(),
        };
        let transport = match (args.transport, &file.transport) {
            (Some(transport), _) => transport,
            (None, Some(text)) => text.parse().map_err(|error| invalid(format!("transport: {error}")))?,
            (None, None) => Transport::default(),
        };
        let app_points = match (args.app_point_interval, &file.app_point_interval) {
            (Some(points), _) => points,
            (None, Some(text)) => text.parse().map_err(|error| invalid(format!("app_point_interval: {error}")))?,
            (None, None) => AppPoints::default(),
        };
        let overload = match (args.overload, &file.overload) {
            (Some(overload), _) => overload,
            (None, Some(text)) => text.parse().map_err(|error| invalid(format!("overload: {error}")))?,
            (None, None) => Overload::default(),
        };
        let time = |flag: &str, given: Option<DurationText>, default: Duration, most: Duration| {
            let time = given.map_or(default, DurationText::get);
            if time.is_zero() || time > most {
                let (time, most) = (DurationText(time), DurationText(most));
                return Err(invalid(format!("{flag} {time}: expected more than 0 and at most {most}")));
            }
            Ok(time)
        };
        let day = Duration::from_secs(24 * 3600);
        let (second, tenth) = (Duration::from_secs(1), Duration::from_millis(100));
        let point_interval =
            time("--point-interval", args.point_interval.or(file.point_interval), 30 * second, 30 * day)?;
        let epoch_interval = time("--epoch-interval", args.epoch_interval.or(file.epoch_interval), second, day)?;
        let freeze_limit = time("--freeze-limit", args.freeze_limit.or(file.freeze_limit), tenth, 30 * second)?;
        let link_timeout = time("--link-timeout", args.link_timeout.or(file.link_timeout), LINK_TIMEOUT, 600 * second)?;
        if link_timeout < 2 * second {
            return Err(invalid(format!("--link-timeout {}: expected at least 2s", DurationText(link_timeout))));
        }
        let congestion: Congestion = match (args.congestion, &file.congestion) {
            (Some(congestion), _) => congestion,
            (None, Some(text)) => text.parse().map_err(|error| invalid(format!("congestion: {error}")))?,
            (None, None) => Congestion::default(),
        };
        let spec = args.memory.effective(file.memory_budget);
        let total = budget::resolve(spec, &budget::effective_memory()?)?.bytes();
        // Unacknowledged bytes of QUIC live outside the payload permits once they are handed over: a fixed part of the table.
        let send_window = (total / QUIC_SHARE / 2).clamp(2 << 20, 16 << 20);
        let quic = QuicTuning {
            send_window_bytes: send_window,
            stream_window_bytes: 256 << 10,
            connection_window_bytes: 1 << 20,
            congestion,
            idle_timeout: link_timeout,
            keep_alive: keep_alive(link_timeout),
            ..QuicTuning::default()
        };
        let memory = MemoryTable::new(total)
            .with("program", BASE_BYTES)
            .with("scan and seal threads", crate::seal_pool::memory_bytes(seal_threads))
            .with("QUIC send window", send_window)
            .with("QUIC receive window", 1 << 20);
        let memory = match volumes.iter().any(|volume| volume.capture == CaptureMode::Nbd) {
            true => memory.with("nbd requests and threads", crate::capture::nbd::memory_bytes()),
            false => memory,
        };
        Budget::new(memory.clone())?;
        let most = ByteCount(limits::EPOCH_SEALED_BYTES_MAX);
        let epoch = args.epoch_size.or(file.epoch_size).unwrap_or(most);
        if epoch < ByteCount::mib(1) || epoch > most {
            return Err(invalid(format!("--epoch-size {epoch}: expected {} to {most}", ByteCount::mib(1))));
        }
        let chosen = args.metrics_listen.or(file.metrics_listen);
        let default_listen = SocketAddr::from((Ipv4Addr::LOCALHOST, METRICS_PORT_DEFAULT));
        Ok(Self {
            state_dir: args.state_dir.clone().or_else(|| file.state_dir.clone()).unwrap_or(STATE_DIR_DEFAULT.into()),
            volumes,
            once: args.once,
            json: args.json,
            streams,
            seal_threads,
            zstd_level,
            transport,
            quic,
            rate_limit: args.rate_limit.or(file.rate_limit),
            point_interval,
            epoch_interval,
            app_points,
            overload,
            freeze_limit,
            verify_rate: Some(args.verify_rate.or(file.verify_rate).unwrap_or(VERIFY_RATE_DEFAULT)),
            hook_dir: args.hook_dir.clone().or_else(|| file.hook_dir.clone()),
            epoch_bytes: epoch.bytes(),
            metrics_listen: (chosen.unwrap_or(default_listen), chosen.is_some()),
            memory,
        })
    }
}

fn volumes(args: &RunArgs, file: &FileConfig) -> Result<Vec<VolumeSpec>, ConfigError> {
    let mut volumes = args.volumes.clone();
    if volumes.is_empty() {
        for volume in &file.volume {
            let named = |problem| ConfigError::Invalid(format!("volume {}: {problem}", volume.name));
            let capture = volume.capture.as_deref().map_or(Ok(CaptureMode::Scan), str::parse).map_err(named)?;
            let listen = volume.listen.as_deref().map(str::parse).transpose().map_err(named)?;
            let spec = VolumeSpec::new(&volume.name, volume.path.clone(), capture, listen);
            volumes.push(spec.map_err(ConfigError::Invalid)?);
        }
    }
    if volumes.is_empty() {
        let text = "no volume to protect: pass --volume NAME=PATH, or add a [[volume]] to the configuration file";
        return Err(ConfigError::Invalid(text.into()));
    }
    if volumes.len() > limits::SESSIONS_PER_CONNECTION_MAX {
        let (found, most) = (volumes.len(), limits::SESSIONS_PER_CONNECTION_MAX);
        return Err(ConfigError::Invalid(format!("{found} volumes: one sender takes at most {most}")));
    }
    for (index, volume) in volumes.iter().enumerate() {
        if volumes[..index].iter().any(|other| other.name == volume.name) {
            return Err(ConfigError::Invalid(format!("volume {} is given twice: names are unique", volume.name)));
        }
        if let Some(other) = volumes[..index].iter().find(|other| other.path == volume.path) {
            let (name, other, path) = (&volume.name, &other.name, volume.path.display());
            return Err(ConfigError::Invalid(format!(
                "volumes {other} and {name} are both {path}: protect a disk once"
            )));
        }
    }
    Ok(volumes)
}

impl fmt::Display for RunConfig {
    /// The effective configuration as TOML, then the memory table as comments.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "state_dir = {:?}", self.state_dir)?;
        writeln!(f, "memory_budget = {:?}", ByteCount(self.memory.total()).exact())?;
        writeln!(f, "streams = {}", self.streams)?;
        writeln!(f, "seal_threads = {}", self.seal_threads)?;
        writeln!(f, "zstd_level = \"{}\"", self.zstd_level)?;
        writeln!(f, "transport = \"{}\"", if self.transport == Transport::Auto { "auto" } else { "quic" })?;
        let congestion = if self.quic.congestion == Congestion::Cubic { "cubic" } else { "bbr" };
        writeln!(f, "congestion = \"{congestion}\"")?;
        if let Some(rate) = self.rate_limit {
            writeln!(f, "rate_limit = {:?}", rate.exact())?;
        }
        writeln!(f, "point_interval = {:?}", DurationText(self.point_interval).exact())?;
        writeln!(f, "epoch_interval = {:?}", DurationText(self.epoch_interval).exact())?;
        writeln!(f, "app_point_interval = \"{}\"", self.app_points)?;
        writeln!(f, "overload = \"{}\"", self.overload)?;
        writeln!(f, "link_timeout = {:?}", DurationText(self.quic.idle_timeout).exact())?;
        writeln!(f, "freeze_limit = {:?}", DurationText(self.freeze_limit).exact())?;
        if let Some(rate) = self.verify_rate {
            writeln!(f, "verify_rate = {:?}", rate.exact())?;
        }
        if let Some(directory) = &self.hook_dir {
            writeln!(f, "hook_dir = {directory:?}")?;
        }
        writeln!(f, "epoch_size = {:?}", ByteCount(self.epoch_bytes).exact())?;
        writeln!(f, "metrics_listen = \"{}\"", self.metrics_listen.0)?;
        for volume in &self.volumes {
            writeln!(f, "\n[[volume]]\nname = {:?}\npath = {:?}", volume.name, volume.path)?;
            writeln!(f, "capture = \"{}\"", volume.capture)?;
            if let Some(listen) = &volume.listen {
                writeln!(f, "listen = {:?}", listen.to_string())?;
            }
        }
        writeln!(f)?;
        self.memory.to_string().lines().try_for_each(|line| writeln!(f, "# {line}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    use crate::cli::{Cli, Command};

    fn resolve(flags: &[&str], file: &str) -> Result<RunConfig, ConfigError> {
        let cli = Cli::try_parse_from(["blockferry-sender", "run"].iter().chain(flags)).expect("flags parse");
        let Command::Run(args) = cli.command else { panic!("run was given") };
        RunConfig::resolve(&args, &toml::from_str(file).expect("the file parses"))
    }

    #[test]
    fn flags_override_the_file() {
        let file = "streams = 2\nzstd_level = 3\nmemory_budget = \"128MiB\"\n[[volume]]\nname = \"a\"\npath = \"/a\"\n";
        let config = resolve(&["--streams", "8"], file).expect("valid");
        assert_eq!((config.streams, config.zstd_level), (8, ZstdLevel::Fixed(3)));
        assert_eq!(config.memory.total(), 128 << 20);
        assert_eq!(config.volumes[0].name, "a");
    }

    #[test]
    fn the_printed_configuration_reads_back_the_same() {
        let flags = [
            "--volume",
            "a=/a",
            "--volume",
            "b=/b,capture=nbd,listen=/run/b",
            "--memory-budget",
            "100MiB",
            "--rate-limit",
            "5MiB/s",
            "--point-interval",
            "90s",
            "--app-point-interval",
            "off",
            "--overload",
            "throttle",
            "--hook-dir",
            "/etc/hooks",
        ];
        let config = resolve(&flags, "").expect("valid");
        let again = resolve(&[], &config.to_string()).expect("what is printed is valid");
        assert_eq!(again.to_string(), config.to_string());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (flags, file, named) in [
            (&["--volume", "a=/a", "--streams", "0"][..], "", "--streams"),
            (&["--volume", "a=/a", "--volume", "a=/b"], "", "volume a"),
            (&["--volume", "a=/a", "--volume", "b=/a"], "", "/a"),
            (&["--volume", "a=/a", "--memory-budget", "1MiB"], "", "64"),
            (&[], "", "--volume"),
            (&[], "[[volume]]\nname = \"a\"\npath = \"/a\"\ncapture = \"magic\"\n", "capture=magic"),
            (&["--volume", "a=/a,capture=nbd,listen=/run/a", "--freeze-limit", "90s"], "", "--freeze-limit"),
        ] {
            let error = resolve(flags, file).expect_err("invalid").to_string();
            assert!(error.contains(named), "{error:?} does not name {named}");
        }
        assert!(toml::from_str::<FileConfig>("stream = 2").is_err(), "an unknown key is refused");
    }
}
