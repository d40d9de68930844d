//! `blockferry restore`: one recovery point to a file or a device.
//!
//! Order: find the volume, read and check its whole log, choose the point, open the data key (a wrong key ends here, before
//! anything is written), plan all of the disk from the epochs' proven metadata (an incomplete point ends here), open
//! the target (what must not be overwritten ends here), then fetch and write, and with `--verify` read back and compare. What is on
//! the target in the end was authenticated record by record.

pub mod device;
pub mod fetch;
pub mod group;
pub mod image;
pub mod plan;
pub mod readback;
pub mod state;
pub mod target;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use catalog::store::Store;
use common::budget::{Budget, MemoryTable};
use common::error::{Dispose, Disposition};
use common::ops::progress::Progress;
use common::units::ByteCount;

use crate::error::OperatorError;
use crate::intact;
use crate::open::RecordOpener;
use crate::point::PointSource;
use crate::select::PointWanted;
use fetch::{FetchError, Fetcher};
use image::{ClusterMap, Format, Image, ImageError};
use plan::{Plan, PlanError, WINDOW_BLOCKS};
use readback::Sums;
use state::RestoreState;
use target::{Target, TargetError};

/// Memory set aside for one window's plan and for indexes being read.
const PLAN_BYTES: u64 = 24 << 20;

/// Why a restore failed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// No plan.
    #[error("volume {volume}: {source}")]
    Plan {
        /// `MACHINE/NAME`.
        volume: String,
        /// Why.
        source: PlanError,
    },
    /// Data could not be fetched, opened or written.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The target.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The store lacks what the point needs.
    #[error("{source}; {offer}")]
    Damaged {
        /// What is wrong, and with which object.
        source: Box<OperatorError>,
        /// What to restore instead.
        offer: String,
    },
    /// No volume of that machine.
    #[error("the store has no volume of machine {machine}: run `blockferry volume list` to see all")]
    NoMachine {
        /// Machine asked for.
        machine: String,
    },
    /// No such instant.
    #[error("machine {machine} has no such group point; {known}")]
    NoGroupPoint {
        /// Machine.
        machine: String,
        /// What there is.
        known: String,
    },
    /// A volume's name can't be a file's.
    #[error("volume \"{name}\" can't be restored under its name ({why}): restore it alone, with --volume and --to")]
    BadName {
        /// Name.
        name: String,
        /// Why.
        why: String,
    },
    /// The format can't hold the disk.
    #[error(transparent)]
    Image(#[from] ImageError),
}

impl Dispose for RestoreError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Plan { source, .. } => source.disposition(),
            Self::Fetch(error) => error.disposition(),
            Self::Damaged { source, .. } => source.disposition(),
            Self::Target(_)
            | Self::NoMachine { .. }
            | Self::NoGroupPoint { .. }
            | Self::BadName { .. }
            | Self::Image(_) => Disposition::BadInput,
        }
    }
}

/// What to restore, and where to.
#[derive(Debug, Clone)]
pub struct RestoreRequest {
    /// Name or id of the volume.
    pub volume: String,
    /// Which point.
    pub point: PointWanted,
    /// The machine's key file.
    pub key_file: PathBuf,
    /// File or device.
    pub to: PathBuf,
    /// What a file is written as.
    pub format: Format,
    /// Read back and compare what was written.
    pub verify: bool,
    /// Stop before anything is written.
    pub dry_run: bool,
    /// Overwrite.
    pub force: bool,
    /// Where the state of restores to devices is kept.
    pub state_dir: PathBuf,
    /// Print JSON.
    pub json: bool,
    /// Memory to stay within, in bytes.
    pub budget_bytes: u64,
}

/// What was restored.
#[derive(Debug, Clone, serde::Serialize)]
pub struct RestoreReport {
    /// Volume's id.
    pub volume: String,
    /// Its machine's name.
    pub machine: String,
    /// Its name.
    pub name: String,
    /// The point's id.
    pub point: String,
    /// The point's epoch.
    pub epoch: u64,
    /// When the point was cut.
    pub time: String,
    /// What it asserts.
    pub consistency: &'static str,
    /// The log's newest close when it was read.
    pub head: String,
    /// The newest epoch.
    pub head_epoch: u64,
    /// Target.
    pub to: String,
    /// `raw`, `qcow2` or `vhd`.
    pub format: Format,
    /// Bytes of the disk.
    pub bytes: u64,
    /// Bytes of it that are not zero pages.
    pub data_bytes: u64,
    /// Bytes to be fetched from segments, without indexes.
    pub fetch_bytes: u64,
    /// Whether an earlier run was gone on with.
    pub resumed: bool,
    /// Whether all was read back from the target and found to be what was opened.
    pub verified: bool,
    /// Whether nothing was written, as asked.
    pub dry_run: bool,
    /// Seconds that it took.
    pub seconds: f64,
}

fn windows(source: &PointSource) -> u64 {
    source.geometry.blocks().div_ceil(WINDOW_BLOCKS)
}

/// Plans one window of the disk.
async fn plan_window(source: &PointSource, window: u64) -> Result<Plan, OperatorError> {
    source.plan(window * WINDOW_BLOCKS..(window + 1) * WINDOW_BLOCKS).await
}

/// Restores a point as asked.
///
/// # Errors
/// [`OperatorError`]; the target then is as it was, or known to be unfinished.
pub async fn run(
    store: &Store,
    request: &RestoreRequest,
    out: &mut (dyn std::io::Write + Send),
) -> Result<(), OperatorError> {
    let source = PointSource::open(store, &request.volume, &request.point, &request.key_file).await?;
    let restored = restore(&source, request, out).await;
    if let Err(error) = &restored {
        let bad = error.bad_objects();
        if !bad.is_empty() {
            let offer = intact::offer(&source, Some(source.point.id), &bad).await;
            return restored.map_err(|source| RestoreError::Damaged { source: Box::new(source), offer }.into());
        }
    }
    restored
}

/// Restores a point that was chosen.
async fn restore(
    source: &PointSource,
    request: &RestoreRequest,
    out: &mut (dyn std::io::Write + Send),
) -> Result<(), OperatorError> {
    let started = Instant::now();
    let (header, point) = (&source.header, &source.point);

    // Every window must be complete before the first byte is written; a disk of one window is planned once.
    let mut plans = Vec::new();
    let (mut data_bytes, mut fetch_bytes) = (0, 0);
    let mut clusters = match request.format {
        Format::Qcow2 => ClusterMap::new(point.disk_bytes),
        _ => ClusterMap::default(),
    };
    for window in 0..windows(source) {
        let plan = plan_window(source, window).await?;
        data_bytes += plan.data_bytes();
        fetch_bytes += plan.fetch_bytes();
        plan.data().for_each(|(block, pages)| clusters.mark_pages(block, pages));
        if windows(source) == 1 {
            plans.push(plan);
        }
    }
    let image = Image::plan(request.format, point.disk_bytes, clusters, point.id, point.cut_time)
        .map_err(RestoreError::from)?;
    let head = source.head();
    let mut report = RestoreReport {
        volume: header.volume.to_string(),
        machine: header.machine_name.clone(),
        name: header.name.clone(),
        point: point.id.to_string(),
        epoch: point.epoch.0,
        time: point.cut_time.to_string(),
        consistency: point.consistency.as_str(),
        head: head.id().to_string(),
        head_epoch: head.statement().epoch.0,
        to: request.to.display().to_string(),
        format: request.format,
        bytes: point.disk_bytes,
        data_bytes,
        fetch_bytes,
        resumed: false,
        verified: false,
        dry_run: request.dry_run,
        seconds: 0.0,
    };
    if !request.dry_run {
        report.resumed = write(source, request, image, plans, data_bytes).await?;
        report.verified = request.verify;
    }
    report.seconds = started.elapsed().as_secs_f64();
    print(&report, request.json, out).map_err(OperatorError::Output)
}

/// Writes the target; true where an earlier run was gone on with.
async fn write(
    source: &PointSource,
    request: &RestoreRequest,
    image: Image,
    mut plans: Vec<Plan>,
    data_bytes: u64,
) -> Result<bool, OperatorError> {
    let point = &source.point;
    let volume = source.history.epochs[source.newest].close.statement().volume;
    let wanted = RestoreState::new(volume, point.id, point.disk_bytes, request.format);
    let (target, mut state) =
        Target::open(&request.to, &wanted, image, request.force, &request.state_dir).map_err(RestoreError::from)?;
    let resumed = state.window > 0 || state.done.contains(&true);
    let target = Arc::new(target);
    let progress = Arc::new(Progress::bytes("restore", Some(data_bytes)));
    let checking =
        Arc::new(if request.verify { Progress::bytes("verify", Some(data_bytes)) } else { Progress::hidden() });
    let mut table = MemoryTable::new(request.budget_bytes).with("restore plan", PLAN_BYTES);
    if request.format == Format::Qcow2 {
        table = table.with("image layout", ClusterMap::memory_bytes(point.disk_bytes));
    }
    let budget = Budget::new(table)?;
    let fetcher = Arc::new(Fetcher::new(
        source.store.clone(),
        RecordOpener::new(Arc::clone(&source.history), source.data_key.clone()),
        Arc::clone(&source.history),
        Arc::clone(&target),
        budget,
        Arc::clone(&progress),
    ));
    // The first window holds the disk's first block, which is written last: so windows go from the end to the start.
    for turn in state.window..windows(source) {
        let window = windows(source) - 1 - turn;
        let plan = match plans.pop() {
            Some(plan) => Arc::new(plan),
            None => Arc::new(plan_window(source, window).await?),
        };
        state.enter(turn, plan.digest(), plan.items.len());
        if target.needs_zeros() {
            let (target, plan) = (Arc::clone(&target), Arc::clone(&plan));
            let zeros =
                move || plan.zero_ranges(false).try_for_each(|range| target.zero(range.start, range.end - range.start));
            let zeroed = tokio::task::spawn_blocking(zeros).await;
            zeroed
                .map_err(|error| RestoreError::Fetch(FetchError::Worker(error.to_string())))?
                .map_err(RestoreError::from)?;
        }
        let sums = request.verify.then(|| Arc::new(Sums::new(plan.records.len())));
        fetcher.run(&plan, &mut state, sums.as_ref()).await.map_err(RestoreError::from)?;
        if let Some(sums) = sums {
            read_back(&fetcher, &plan, &mut state, &sums, &checking).await.map_err(RestoreError::from)?;
        }
    }
    drop(fetcher);
    if let Ok(checking) = Arc::try_unwrap(checking) {
        checking.finish();
    }
    let target =
        Arc::try_unwrap(target).map_err(|_| RestoreError::Fetch(FetchError::Worker("it still writes".into())))?;
    let verify = request.verify;
    let finish = move || {
        target.write_metadata()?;
        if verify {
            target.sync()?;
            target.forget_cache();
            target.check_metadata()?;
        }
        target.finish()
    };
    let finished = tokio::task::spawn_blocking(finish).await;
    finished
        .map_err(|error| RestoreError::Fetch(FetchError::Worker(error.to_string())))?
        .map_err(RestoreError::from)?;
    if let Ok(progress) = Arc::try_unwrap(progress) {
        progress.finish();
    }
    Ok(resumed)
}

/// Compares a window with what the target holds. Where they differ, nothing of the window counts as done any more, and a device does
/// not look finished.
async fn read_back(
    fetcher: &Arc<Fetcher>,
    plan: &Arc<Plan>,
    state: &mut RestoreState,
    sums: &Arc<Sums>,
    progress: &Arc<Progress>,
) -> Result<(), FetchError> {
    fetcher.save(state).await?;
    let checked = readback::check(fetcher, plan, sums, progress).await;
    if let Err(FetchError::Target(TargetError::ReadsBack { .. })) = &checked {
        state.done.fill(false);
        fetcher.target.unfinish()?;
        fetcher.save(state).await?;
    }
    checked
}

fn print(report: &RestoreReport, json: bool, out: &mut (dyn std::io::Write + Send)) -> std::io::Result<()> {
    if json {
        serde_json::to_writer(&mut *out, report)?;
        return writeln!(out);
    }
    writeln!(out, "volume   {}/{} ({})", report.machine, report.name, report.volume)?;
    writeln!(out, "head     {} (epoch {})", report.head, report.head_epoch)?;
    writeln!(
        out,
        "point    {} (epoch {}, {}, {} consistent)",
        report.point, report.epoch, report.time, report.consistency
    )?;
    let (bytes, data) = (ByteCount(report.bytes), ByteCount(report.data_bytes));
    if report.dry_run {
        return writeln!(
            out,
            "would restore {bytes} ({data} of data, {} fetched) to {}",
            ByteCount(report.fetch_bytes),
            report.to
        );
    }
    let rate = if report.seconds > 0.0 { report.bytes as f64 / report.seconds / 1e6 } else { 0.0 };
    let resumed = if report.resumed { ", resumed" } else { "" };
    let verified = if report.verified { ", read back and compared" } else { "" };
    writeln!(
        out,
        "restored {bytes} ({data} of data) to {} ({}) in {:.1} s, {rate:.0} MB/s{resumed}{verified}",
        report.to,
        report.format.as_str(),
        report.seconds
    )
}

#[cfg(test)]
mod tests;
