//! `blockferry verify`: is everything that a volume's points need in the store, and as it was written?
//!
//! Reads every object: the fleet's, the header, each log entry, each checkpoint, each segment completely. Without a key it
//! checks checksums, digests, the log's chain, signatures, and each epoch's metadata against its signed root; with one
//! it opens every record too. It goes on after a bad object and names all of them; the last line has their paths.

mod log;
mod objects;
mod segments;

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use catalog::retention::live;
use catalog::store::Store;
use catalog::volume::header;
use catalog::volume::history::History;
use catalog::volume::proofs::{self, Proof};
use common::clock::Clock;
use common::format::checkpoint::PointSummary;
use common::format::close::{Close, Consistency};
use common::format::volume_header::VolumeHeader;
use common::ids::CloseId;
use common::units::ByteCount;

use crate::error::OperatorError;
use crate::keys::ReadKeyFile;
use crate::select::PointWanted;

/// Bad objects named in the last line.
const NAMED_MAX: usize = 8;

/// What verifying found.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Objects that are missing, damaged, replaced or can't be read.
    #[error(
        "{count} bad object(s) of volume {volume}: {paths}; {intact}; bring them back from another copy of the store, points that need them don't restore"
    )]
    Bad {
        /// `MACHINE/NAME`.
        volume: String,
        /// How many.
        count: usize,
        /// Their paths, up to a bound.
        paths: String,
        /// Which point is not touched by that.
        intact: String,
    },
    /// The log does not hold the close that was expected.
    #[error(
        "the log of volume {volume} does not contain close {expected}, its head is {head}: the newest history was removed or this is another store; bring it back"
    )]
    HeadMissing {
        /// `MACHINE/NAME`.
        volume: String,
        /// Close expected.
        expected: CloseId,
        /// Close found.
        head: CloseId,
    },
}

/// What to verify.
#[derive(Debug, Clone)]
pub struct VerifyRequest {
    /// Name or id of the volume.
    pub volume: String,
    /// One point, or `None` for all.
    pub point: Option<PointWanted>,
    /// The machine's key file, to open records with.
    pub key_file: Option<PathBuf>,
    /// A close that must be in the log.
    pub expect_head: Option<CloseId>,
    /// Print JSON.
    pub json: bool,
    /// Memory to stay within, in bytes.
    pub budget_bytes: u64,
}

/// A bad object.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct BadObject {
    /// Its path in the store.
    pub path: String,
    /// What is wrong with it.
    pub what: String,
}

/// What was looked at and what was found; grows while verifying.
#[derive(Debug, Default, serde::Serialize)]
pub struct VerifyReport {
    /// Volume's id.
    pub volume: String,
    /// Its machine's name.
    pub machine: String,
    /// Its name.
    pub name: String,
    /// The log's newest close.
    pub head: String,
    /// Objects read.
    pub objects: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Log entries.
    pub log_entries: u64,
    /// Segments read.
    pub segments: u64,
    /// Records checked.
    pub records: u64,
    /// Records opened with the key.
    pub records_opened: u64,
    /// Points that are whole.
    pub points: u64,
    /// The newest point that is whole, and not fuzzy where there is one that is not.
    pub newest_intact: Option<String>,
    /// All points that are whole, oldest first.
    #[serde(skip)]
    intact: Vec<PointSummary>,
    /// Segments that no log entry refers to; they are no part of any point.
    pub unreferenced: u64,
    /// Bad objects, in the order they were found.
    pub bad: Vec<BadObject>,
    /// Seconds that it took.
    pub seconds: f64,
}

impl VerifyReport {
    /// Records a bad object once, and says so on standard error.
    fn bad(&mut self, path: impl Into<String>, what: impl ToString) {
        let bad = BadObject { path: path.into(), what: what.to_string() };
        if self.bad.iter().any(|known| known.path == bad.path) {
            return;
        }
        // The error's own text may start with the path.
        let text = bad.what.strip_prefix(&format!("{}: ", bad.path)).unwrap_or(&bad.what);
        let _ = writeln!(std::io::stderr().lock(), "bad object {}: {text}", bad.path);
        self.bad.push(bad);
    }

    fn read(&mut self, bytes: u64) {
        self.objects += 1;
        self.bytes += bytes;
    }
}

/// Verifies as asked.
///
/// # Errors
/// [`VerifyError`] where anything is bad; other errors where verifying could not be done at all.
pub async fn run(store: &Store, request: &VerifyRequest, out: &mut (dyn Write + Send)) -> Result<(), OperatorError> {
    let started = Instant::now();
    let key_file = request.key_file.as_deref().map(ReadKeyFile::read).transpose()?;
    let mut report = VerifyReport::default();
    objects::check_fleet(store, &mut report).await?;
    let stored = match header::find(store, &request.volume).await {
        Ok(stored) => stored,
        Err(error) => match error.bad_object() {
            // Without a header there is no signing key, so nothing else can be judged.
            Some(path) => {
                report.bad(path, &error);
                return Err(failed(&report, &request.volume).into());
            }
            None => return Err(error.into()),
        },
    };
    let header = &stored.header;
    let volume = header::full_name(header);
    (report.volume, report.machine, report.name) =
        (header.volume.to_string(), header.machine_name.clone(), header.name.clone());
    report.read(header.encode().len() as u64);
    let data_key = key_file.as_ref().map(|file| file.unlock(header)).transpose()?;

    let history = log::check(store, header, &mut report).await?;
    let head = history.position.head.as_ref().map_or(CloseId::ZERO, Close::id);
    report.head = head.to_string();
    let newest = match &request.point {
        None => history.epochs.len(),
        Some(wanted) => {
            let point = wanted.choose(&volume, &history.points())?;
            history.find(point.id).expect("the point was listed from this history") + 1
        }
    };
    objects::check_volume_folder(store, header, &history, &mut report).await?;
    let whole = request.point.is_none();
    segments::check(store, &history, newest, whole, data_key.as_ref(), request.budget_bytes, &mut report).await?;
    if report.bad.is_empty() {
        check_collected(store, &history, newest, whole, &mut report).await?;
    }
    report.newest_intact = newest_intact(&report.intact).map(|point| point.id.to_string());
    let proof = if data_key.is_some() { Proof::Opened } else { Proof::Verified };
    let proven: Vec<(CloseId, Proof)> = report.intact.iter().map(|point| (point.id, proof)).collect();
    record(store, header, &history.points(), &proven).await;
    report.seconds = started.elapsed().as_secs_f64();
    print(&report, request, out).map_err(OperatorError::Output)?;
    if !report.bad.is_empty() {
        return Err(failed(&report, &volume).into());
    }
    if let Some(expected) = request.expect_head
        && history.find(expected).is_none()
    {
        return Err(VerifyError::HeadMissing { volume, expected, head }.into());
    }
    Ok(())
}

/// Records proofs where the store may be written; else says why not, which takes nothing from what was proven.
pub(crate) async fn record(store: &Store, header: &VolumeHeader, points: &[PointSummary], proven: &[(CloseId, Proof)]) {
    if proven.is_empty() {
        return;
    }
    let offered = points.iter().map(|point| point.id).collect();
    if let Err(error) = proofs::raise(store, header.volume, proven, Clock::System.now(), &offered).await {
        tracing::warn!(%error, "what was proven is not recorded in the store");
    }
}

/// The newest that is not fuzzy, else the newest. PURE.
fn newest_intact(points: &[PointSummary]) -> Option<&PointSummary> {
    points.iter().rfind(|point| point.consistency != Consistency::Fuzzy).or_else(|| points.last())
}

/// `newest intact point: ID (epoch 7, TIME, crash consistent)`.
pub(crate) fn tell_intact(point: Option<&PointSummary>) -> String {
    match point {
        Some(point) => format!(
            "newest intact point: {} (epoch {}, {}, {} consistent)",
            point.id,
            point.epoch,
            point.cut_time,
            point.consistency.as_str()
        ),
        None => "no intact point is known".to_owned(),
    }
}

/// Nothing that an offered point among the first `newest` epochs needs (or the last of them alone) may have been collected.
async fn check_collected(
    store: &Store,
    history: &History,
    newest: usize,
    whole: bool,
    report: &mut VerifyReport,
) -> Result<(), OperatorError> {
    let offered = |at: &usize| {
        let close = &history.epochs[*at].close;
        close.statement().point.is_some() && !history.is_expired(close.id()) && (whole || at + 1 == newest)
    };
    let kept: Vec<usize> = (0..newest).filter(offered).collect();
    // Later epochs are not asked for, and may be damaged.
    let mut asked = history.clone();
    asked.epochs.truncate(newest);
    for gone in live::find(store, &asked, &kept, live::INDEX_CACHE_BYTES).await?.gone {
        let epoch = history.epochs[gone.epoch].close.statement().epoch;
        report.bad(
            gone.path,
            format!("a record of epoch {epoch} for block {} that a point needs is not in it any more", gone.meta.block),
        );
    }
    Ok(())
}

fn failed(report: &VerifyReport, volume: &str) -> VerifyError {
    let mut paths: Vec<&str> = report.bad.iter().take(NAMED_MAX).map(|bad| bad.path.as_str()).collect();
    let more = format!("and {} more, listed above", report.bad.len().saturating_sub(NAMED_MAX));
    if report.bad.len() > NAMED_MAX {
        paths.push(&more);
    }
    let intact = tell_intact(newest_intact(&report.intact));
    VerifyError::Bad { volume: volume.to_owned(), count: report.bad.len(), paths: paths.join(", "), intact }
}

fn print(report: &VerifyReport, request: &VerifyRequest, out: &mut (dyn Write + Send)) -> std::io::Result<()> {
    if request.json {
        serde_json::to_writer(&mut *out, report)?;
        return writeln!(out);
    }
    let opened = match &request.key_file {
        Some(_) => format!("{} of them opened with the key", report.records_opened),
        None => "not opened: no key given".to_owned(),
    };
    writeln!(out, "volume   {}/{} ({})", report.machine, report.name, report.volume)?;
    writeln!(out, "head     {}", report.head)?;
    writeln!(
        out,
        "read     {} objects, {} in {:.1} s: {} log entries, {} segments, {} records ({opened})",
        report.objects,
        ByteCount(report.bytes),
        report.seconds,
        report.log_entries,
        report.segments,
        report.records,
    )?;
    if report.unreferenced > 0 {
        writeln!(
            out,
            "notice   {} segments are in no log entry: left by an interrupted upload, harmless",
            report.unreferenced
        )?;
    }
    let verdict = if report.bad.is_empty() { "good" } else { "BAD" };
    writeln!(out, "points   {} whole; {}", report.points, tell_intact(newest_intact(&report.intact)))?;
    writeln!(out, "result   {verdict}")
}

#[cfg(test)]
mod tests;
