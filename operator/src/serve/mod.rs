//! `blockferry serve`: a recovery point as a disk over NBD, at once.
//!
//! ```text
//! client ═ socket ═▶ client ─▶ disk ─┬─▶ overlay      what clients wrote, in a local file
//!                 common::nbd        └─▶ point_disk ─▶ cache (a local file without a name)
//!                                            └─ map ─▶ plan of a window ─▶ fetch, open ─▶ object store
//! ```
//!
//! Promises
//! - It answers as soon as the log is read and the key opens; pages are fetched when they are read, and ahead of those that read in
//!   order. What was fetched is kept within `--cache-size` and not fetched again.
//! - A page is what the point asserts, proven as at a restore, or what a client wrote over it; where it can't be had the read is an
//!   input/output error, and the log names the object. A store that fails for a while delays reads, up to `--patience`.
//! - Nothing is ever written to the store. Writes go to the overlay: with `--overlay`, what was flushed survives a power cut, and a
//!   later start with the same file goes on; without, all is gone at the end.
//! - Memory stays within the budget: a quarter for plans, an eighth for what is being fetched, half for requests.
//!
//! Never: offers the point to more than this user (Unix socket) or whoever reaches the address (TCP, without encryption: for
//! loopback and trusted networks).

mod ahead;
mod cache;
mod client;
mod disk;
mod map;
mod overlay;
mod point_disk;
mod server;
#[cfg(test)]
mod tests;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use catalog::store::Store;
use clap::Args;
use common::budget::{Budget, MemoryTable};
use common::error::{Dispose, Disposition};
use common::limits::BLOCK_BYTES;
use common::ops::cli::MemoryArgs;
use common::ops::exit::ExitCode;
use common::ops::shutdown::Shutdown;
use common::units::{ByteCount, DurationText};

use self::cache::Cache;
use self::client::Shared;
use self::disk::Disk;
use self::overlay::{Binding, Overlay};
use self::point_disk::PointDisk;
use self::server::Listener;
use crate::cli::StoreArgs;
use crate::error::OperatorError;
use crate::point::PointSource;
use crate::select::PointWanted;

pub use overlay::OverlayError;
pub use server::ListenAddr;

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The overlay.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// The cache.
    #[error("cannot keep a cache in {folder}: {source}: name a folder on a local file system with --cache-dir")]
    Cache {
        /// Its folder.
        folder: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The address.
    #[error("cannot listen on {address}: {source}: pass another --nbd")]
    Listen {
        /// Where.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// Signals.
    #[error("cannot wait for signals: {0}")]
    Signals(std::io::Error),
    /// It was asked to end, and did.
    #[error("ended by signal {}", .0.number())]
    Ended(common::ops::shutdown::EndSignal),
}

impl ServeError {
    /// The exit code that scripts see.
    #[must_use]
    pub fn exit(&self) -> ExitCode {
        match self {
            Self::Ended(by) => by.exit_code(),
            _ => ExitCode::Failed,
        }
    }
}

impl Dispose for ServeError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Overlay(_) | Self::Cache { .. } | Self::Listen { .. } | Self::Ended(_) => Disposition::BadInput,
            Self::Signals(_) => Disposition::Retry,
        }
    }
}

/// What to serve, and how.
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub(crate) store: StoreArgs,
    /// NAME, MACHINE/NAME or UUID
    #[arg(long, value_name = "VOLUME")]
    volume: String,
    /// As in restore [default: that of the overlay, or latest]
    #[arg(long, value_name = "POINT")]
    point: Option<String>,
    /// The key file made when the machine was registered, or a copy
    #[arg(long, value_name = "FILE", env = "BLOCKFERRY_KEY_FILE")]
    key_file: PathBuf,
    /// Where clients connect; a Unix socket is for this user alone
    #[arg(long, value_name = "SOCKET|HOST:PORT")]
    nbd: ListenAddr,
    /// Refuse writes
    #[arg(long, conflicts_with = "overlay")]
    read_only: bool,
    /// Keep what clients write in this file, which a later start goes on with [default: forgotten at the end]
    #[arg(long, value_name = "FILE")]
    overlay: Option<PathBuf>,
    /// Where fetched pages, and writes that are to be forgotten, are kept while it runs
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    cache_dir: PathBuf,
    /// Most bytes of fetched pages to keep
    #[arg(long, value_name = "SIZE", default_value = "8GiB")]
    cache_size: ByteCount,
    /// How long reads wait for a store that fails before they are errors
    #[arg(long, value_name = "DURATION", default_value = "2m")]
    patience: DurationText,
    /// Print one line of JSON once it serves
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pub(crate) memory: MemoryArgs,
}

/// What is served.
#[derive(Debug, serde::Serialize)]
struct Ready {
    volume: String,
    machine: String,
    name: String,
    point: String,
    epoch: u64,
    time: String,
    consistency: &'static str,
    head: String,
    head_epoch: u64,
    bytes: u64,
    uri: String,
    read_only: bool,
    overlay: Option<PathBuf>,
    /// Pages that the overlay held already.
    overlay_pages: u64,
}

/// Serves a point until a signal ends it.
///
/// # Errors
/// [`OperatorError`]; after an orderly end [`ServeError::Ended`], whose exit code is the signal's.
pub async fn run(
    store: &Store,
    args: &ServeArgs,
    budget_bytes: u64,
    out: &mut (dyn Write + Send),
) -> Result<(), OperatorError> {
    let shutdown = Shutdown::install().map_err(ServeError::Signals)?;
    let bound = match &args.overlay {
        Some(path) => Binding::read(path).map_err(ServeError::from)?,
        None => None,
    };
    let wanted = match (&args.point, bound) {
        (Some(text), _) => text.parse()?,
        (None, Some(bound)) => PointWanted::Id(bound.point.to_string()),
        (None, None) => PointWanted::Latest,
    };
    let source = Arc::new(PointSource::open(store, &args.volume, &wanted, &args.key_file).await?);
    let overlay = if args.read_only { None } else { Some(overlay(args, &source).map_err(ServeError::from)?) };
    let overlay_pages = overlay.as_ref().map_or(0, Overlay::pages);
    let cache = Cache::new(&args.cache_dir, source.geometry, args.cache_size.0)
        .map_err(|source| ServeError::Cache { folder: args.cache_dir.clone(), source })?;
    let fetching = Budget::new(MemoryTable::new(budget_bytes / 8))?;
    let point = Arc::new(PointDisk::new(Arc::clone(&source), cache, budget_bytes / 4, fetching, args.patience.0));
    let disk = Arc::new(Disk::new(Arc::clone(&point), overlay));
    let listener = Listener::bind(&args.nbd)
        .await
        .map_err(|source| ServeError::Listen { address: args.nbd.to_string(), source })?;
    let statement = source.head().statement();
    let ready = Ready {
        volume: source.header.volume.to_string(),
        machine: source.header.machine_name.clone(),
        name: source.header.name.clone(),
        point: source.point.id.to_string(),
        epoch: source.point.epoch.0,
        time: source.point.cut_time.to_string(),
        consistency: source.point.consistency.as_str(),
        head: source.head().id().to_string(),
        head_epoch: statement.epoch.0,
        bytes: source.point.disk_bytes,
        uri: listener.uri(&source.header.name),
        read_only: args.read_only,
        overlay: args.overlay.clone(),
        overlay_pages,
    };
    print(&ready, args.json, out).map_err(OperatorError::Output)?;
    // Clients read the start of the disk first: its plan is on the way before they connect.
    tokio::spawn(async move { point.fetch_ahead(0..BLOCK_BYTES as u64).await });
    // Room for the pages at both ends of the largest request.
    let budget = Budget::new(MemoryTable::new(budget_bytes / 2 + (64 << 10)))?;
    let shared = Arc::new(Shared { disk: Arc::clone(&disk), name: source.header.name.clone(), budget });
    let by = listener.run(shared, &shutdown).await;
    if disk.flush().await.is_err() {
        let path = args.overlay.clone().unwrap_or_default();
        let source = std::io::Error::other("what was written last may not be durable");
        return Err(ServeError::Overlay(OverlayError::Io { path, source }).into());
    }
    Err(ServeError::Ended(by).into())
}

fn overlay(args: &ServeArgs, source: &PointSource) -> Result<Overlay, OverlayError> {
    let binding = Binding { volume: source.header.volume, point: source.point.id, disk_bytes: source.point.disk_bytes };
    match &args.overlay {
        Some(path) => Overlay::open(path, &binding, source.geometry),
        None => Overlay::temporary(&args.cache_dir, source.geometry),
    }
}

fn print(ready: &Ready, json: bool, out: &mut (dyn Write + Send)) -> std::io::Result<()> {
    if json {
        serde_json::to_writer(&mut *out, ready)?;
        writeln!(out)?;
        return out.flush();
    }
    writeln!(out, "volume   {}/{} ({})", ready.machine, ready.name, ready.volume)?;
    writeln!(out, "head     {} (epoch {})", ready.head, ready.head_epoch)?;
    writeln!(
        out,
        "point    {} (epoch {}, {}, {} consistent)",
        ready.point, ready.epoch, ready.time, ready.consistency
    )?;
    let writes = match (&ready.overlay, ready.read_only) {
        (_, true) => "read-only".to_owned(),
        (None, false) => "writes are forgotten at the end".to_owned(),
        (Some(path), false) if ready.overlay_pages > 0 => {
            let kept = ByteCount(ready.overlay_pages * common::limits::PAGE_BYTES as u64);
            format!("going on with {kept} of writes in {}", path.display())
        }
        (Some(path), false) => format!("writes go to {}", path.display()),
    };
    writeln!(out, "serving  {} at {} ({writes})", ByteCount(ready.bytes), ready.uri)?;
    let read_only = if ready.read_only { ",readonly=on" } else { "" };
    writeln!(out, "attach   qemu-system-x86_64 -m 2G -drive file='{}',format=raw,if=virtio{read_only}", ready.uri)?;
    out.flush()
}
