//! `blockferry drill`: restores a point to a scratch disk and looks whether a machine could live on it.
//!
//! Order: restore (which proves and opens all that the point needs), find the partitions, then for each file system mount it read-only, read
//! all names and let its checker judge it; with `--boot` start the disk in QEMU. What was shown is recorded beside the point: `checked`,
//! `booted`.
//!
//! Promises: the scratch disk is sparse and removed in the end, whatever came out, a signal included; what a drill leaves that was
//! killed, the next one in the same folder removes; nothing but the note of the proof is written to the store; a
//! file system that is not sound fails the drill by name, and one that nobody here can judge makes it weaker (exit code 3), never better.
//! Never: gives the started machine a network. Kernels parse what the disk holds: drill disks that you do not trust in a throwaway machine.

mod boot;
mod filesystems;
mod partitions;
mod scratch;

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use catalog::store::Store;
use catalog::volume::header;
use catalog::volume::history::History;
use catalog::volume::proofs::Proof;
use clap::Args;
use common::error::{Dispose, Disposition};
use common::ids::CloseId;
use common::ops::cli::MemoryArgs;
use common::ops::exit::ExitCode;
use common::ops::shutdown::{EndSignal, Shutdown};
use common::units::{ByteCount, DurationText};

use crate::cli::StoreArgs;
use crate::error::OperatorError;
use crate::restore::image::Format;
use crate::restore::{self, RestoreRequest};
use crate::select::PointWanted;
use crate::verify;
use boot::{BootPlan, Booted};
use filesystems::{Part, State};
use scratch::Scratch;

/// Why a drill failed, or is worth less than asked for.
#[derive(Debug, thiserror::Error)]
pub enum DrillError {
    /// This machine can't do it.
    #[error("the drill could not be done: {what}")]
    Machine {
        /// What failed.
        what: String,
    },
    /// The scratch folder.
    #[error("cannot {what} {path}: {source}: name another folder with --scratch")]
    Scratch {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file system of the point is not sound.
    #[error("point {point} of volume {volume} is restored, but {part} is not sound: {what}; drill an older point")]
    Unsound {
        /// The point.
        point: String,
        /// `MACHINE/NAME`.
        volume: String,
        /// Which part of the disk.
        part: String,
        /// What is wrong.
        what: String,
    },
    /// It does not boot.
    #[error("point {point} of volume {volume} does not boot: {what}")]
    NotUp {
        /// The point.
        point: String,
        /// `MACHINE/NAME`.
        volume: String,
        /// What happened.
        what: String,
    },
    /// Not all of it could be judged.
    #[error("point {point} of volume {volume} is restored and opened, but not checked: {what}")]
    Weaker {
        /// The point.
        point: String,
        /// `MACHINE/NAME`.
        volume: String,
        /// Why not.
        what: String,
    },
    /// A signal.
    #[error("ended by a signal: the scratch disk is removed, nothing is recorded")]
    Ended(EndSignal),
}

impl DrillError {
    /// The exit code that scripts see.
    #[must_use]
    pub fn exit(&self) -> ExitCode {
        match self {
            Self::Weaker { .. } => ExitCode::Weaker,
            Self::Ended(by) => by.exit_code(),
            _ => ExitCode::Failed,
        }
    }
}

impl Dispose for DrillError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Unsound { .. } | Self::NotUp { .. } => Disposition::Corrupt,
            _ => Disposition::BadInput,
        }
    }
}

/// Arguments of `drill`.
#[derive(Debug, Args)]
pub(crate) struct DrillArgs {
    #[command(flatten)]
    pub(crate) store: StoreArgs,
    /// NAME, MACHINE/NAME or UUID
    #[arg(long, value_name = "VOLUME")]
    volume: String,
    /// As in restore
    #[arg(long, value_name = "POINT", default_value = "latest")]
    point: String,
    /// The key file made when the machine was registered, or a copy
    #[arg(long, value_name = "FILE", env = "BLOCKFERRY_KEY_FILE")]
    key_file: PathBuf,
    /// Folder for the scratch disk, which takes as much space as the point has data; removed afterwards, and if this drill is killed by the next one
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    scratch: PathBuf,
    /// Start the disk in QEMU, without a network, until it shows on its serial console that it is up
    #[arg(long)]
    boot: bool,
    /// What it says once it is up [default: a login prompt, or systemd's multi-user or graphical target]
    #[arg(long, value_name = "TEXT", requires = "boot")]
    boot_marker: Option<String>,
    /// How long it may take
    #[arg(long, value_name = "DURATION", default_value = "10m", requires = "boot")]
    boot_timeout: DurationText,
    /// Memory of the machine
    #[arg(long, value_name = "MIB", default_value_t = 1024, requires = "boot")]
    boot_memory_mib: u32,
    /// Use KVM instead of emulation
    #[arg(long, requires = "boot")]
    kvm: bool,
    /// Firmware for disks that boot by UEFI, such as OVMF.fd
    #[arg(long, value_name = "FILE", requires = "boot")]
    firmware: Option<PathBuf>,
    /// Kernel to boot with, where the disk has none of its own
    #[arg(long, value_name = "FILE", requires = "boot")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk for --kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Command line for --kernel
    #[arg(long, value_name = "TEXT", requires = "kernel", allow_hyphen_values = true)]
    append: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pub(crate) memory: MemoryArgs,
}

/// What a drill showed.
#[derive(Debug, serde::Serialize)]
struct DrillReport {
    /// What the restore says of volume and point.
    #[serde(flatten)]
    restored: serde_json::Value,
    /// The parts of the disk.
    parts: Vec<Part>,
    /// The machine that came up; null where none was started or none came up.
    boot: Option<Booted>,
    /// The proof that is recorded.
    proof: &'static str,
    /// Seconds for all of it.
    drill_seconds: f64,
}

/// Drills as asked.
///
/// # Errors
/// [`OperatorError`]; [`DrillError::Weaker`] where the point could not be judged as a whole.
pub(crate) async fn run(
    store: &Store,
    args: &DrillArgs,
    budget_bytes: u64,
    out: &mut (dyn std::io::Write + Send),
) -> Result<(), OperatorError> {
    let started = Instant::now();
    let point: PointWanted = args.point.parse()?;
    let machine = |error: std::io::Error| DrillError::Machine { what: error.to_string() };
    let shutdown = Shutdown::install().map_err(machine)?;
    let scratch = Scratch::make(&args.scratch)?;
    let disk = scratch.path().join("disk.img");
    let request = RestoreRequest {
        volume: args.volume.clone(),
        point,
        key_file: args.key_file.clone(),
        to: disk.clone(),
        format: Format::Raw,
        verify: false,
        dry_run: false,
        force: false,
        state_dir: scratch.path().to_owned(),
        json: true,
        budget_bytes,
    };
    let mut restored = Vec::new();
    tokio::select! {
        done = restore::run(store, &request, &mut restored) => done?,
        by = shutdown.requested() => return Err(DrillError::Ended(by).into()),
    }
    let restored: serde_json::Value = serde_json::from_slice(&restored)
        .map_err(|error| DrillError::Machine { what: format!("the restore's report: {error}") })?;
    let plan = args.boot.then(|| BootPlan {
        timeout: args.boot_timeout.0,
        marker: args.boot_marker.clone(),
        kvm: args.kvm,
        memory_mib: args.boot_memory_mib,
        firmware: args.firmware.clone(),
        kernel: args.kernel.clone(),
        initrd: args.initrd.clone(),
        append: args.append.clone(),
    });
    let (asked, watched) = (args.boot, shutdown.clone());
    let looked = tokio::task::spawn_blocking(move || {
        let parts = look(&disk, scratch.path(), &watched)?;
        let booted = match plan {
            Some(plan) if !parts.iter().any(|part| part.state == State::Bad) => {
                Some(boot::boot(&disk, scratch.path(), &plan, &watched)?)
            }
            _ => None,
        };
        // Removed here, after all that used it.
        drop(scratch);
        Ok::<_, String>((parts, booted))
    });
    let looked = looked.await.map_err(|error| DrillError::Machine { what: error.to_string() })?;
    let (parts, booted) = looked.map_err(|what| DrillError::Machine { what })?;
    if let Some(by) = shutdown.signal() {
        return Err(DrillError::Ended(by).into());
    }
    let verdict = judge(&parts, asked, booted);
    record(store, &args.volume, &restored, verdict.proof).await?;
    let Verdict { proof, boot, problem } = verdict;
    let report =
        DrillReport { restored, parts, boot, proof: proof.as_str(), drill_seconds: started.elapsed().as_secs_f64() };
    print(&report, args.json, out).map_err(OperatorError::Output)?;
    let text = |name: &str| report.restored[name].as_str().unwrap_or_default().to_owned();
    let (point, volume) = (text("point"), format!("{}/{}", text("machine"), text("name")));
    match problem {
        None => Ok(()),
        Some(Problem::Unsound { part, what }) => Err(DrillError::Unsound { point, volume, part, what }.into()),
        Some(Problem::NotUp(what)) => Err(DrillError::NotUp { point, volume, what }.into()),
        Some(Problem::Weaker(what)) => Err(DrillError::Weaker { point, volume, what }.into()),
    }
}

/// Looks at all parts of the restored disk.
fn look(disk: &Path, scratch: &Path, shutdown: &Shutdown) -> Result<Vec<Part>, String> {
    let file = std::fs::File::open(disk).map_err(|error| format!("{}: {error}", disk.display()))?;
    let bytes = file.metadata().map_err(|error| error.to_string())?.len();
    let read = |at: u64, len: usize| {
        let len = usize::try_from(bytes.saturating_sub(at)).unwrap_or(usize::MAX).min(len);
        let mut buffer = vec![0; len];
        file.read_exact_at(&mut buffer, at)?;
        Ok(buffer)
    };
    let mut ranges = partitions::find(&read, bytes).map_err(|error| error.to_string())?;
    if ranges.is_empty() {
        ranges.push((0, 0..bytes));
    }
    let mount_point = scratch.join("mount");
    std::fs::create_dir(&mount_point).map_err(|error| format!("{}: {error}", mount_point.display()))?;
    let mut parts = Vec::new();
    for (number, range) in ranges {
        if shutdown.is_requested() {
            break;
        }
        parts.push(filesystems::look(disk, number, range, &mount_point, shutdown)?);
    }
    Ok(parts)
}

enum Problem {
    Unsound { part: String, what: String },
    NotUp(String),
    Weaker(String),
}

struct Verdict {
    proof: Proof,
    boot: Option<Booted>,
    problem: Option<Problem>,
}

/// What the findings prove. PURE.
fn judge(parts: &[Part], boot_asked: bool, booted: Option<Result<Booted, String>>) -> Verdict {
    let name = |part: &Part| match part.number {
        0 => format!("the {} file system", part.kind),
        number => format!("partition {number} ({})", part.kind),
    };
    if let Some(part) = parts.iter().find(|part| part.state == State::Bad) {
        let problem = Problem::Unsound { part: name(part), what: part.what.clone() };
        return Verdict { proof: Proof::Opened, boot: None, problem: Some(problem) };
    }
    // A part that nobody knows may be a boot loader's: what counts is that some file system was checked, and none left unjudged.
    let sound = parts.iter().any(|part| part.state == State::Sound);
    let unjudged = parts
        .iter()
        .find(|part| part.state == State::Unchecked || part.state == State::Unknown && !part.kind.is_empty());
    let checked = if sound && unjudged.is_none() { Proof::Checked } else { Proof::Opened };
    let weaker = || match unjudged {
        Some(part) => Problem::Weaker(format!("{}: {}", name(part), part.what)),
        None => Problem::Weaker("no file system was recognised on it".to_owned()),
    };
    match booted {
        Some(Ok(boot)) => Verdict { proof: Proof::Booted, boot: Some(boot), problem: None },
        Some(Err(what)) => Verdict { proof: checked, boot: None, problem: Some(Problem::NotUp(what)) },
        None => {
            debug_assert!(!boot_asked, "what was asked for and had nothing against it was done");
            Verdict { proof: checked, boot: None, problem: (checked == Proof::Opened).then(weaker) }
        }
    }
}

async fn record(store: &Store, volume: &str, restored: &serde_json::Value, proof: Proof) -> Result<(), OperatorError> {
    let header = header::find(store, volume).await?.header;
    let (history, _) = History::read_whole_part(store, &header).await?;
    let point: Option<CloseId> = restored["point"].as_str().and_then(|text| text.parse().ok());
    if let Some(point) = point {
        verify::record(store, &header, &history.points(), &[(point, proof)]).await;
    }
    Ok(())
}

fn print(report: &DrillReport, json: bool, out: &mut (dyn std::io::Write + Send)) -> std::io::Result<()> {
    if json {
        serde_json::to_writer(&mut *out, report)?;
        return writeln!(out);
    }
    let text = |name: &str| report.restored[name].as_str().unwrap_or_default();
    writeln!(out, "volume   {}/{} ({})", text("machine"), text("name"), text("volume"))?;
    writeln!(out, "point    {} ({}, {} consistent)", text("point"), text("time"), text("consistency"))?;
    for part in &report.parts {
        let place = if part.number == 0 { "disk".to_owned() } else { format!("part {}", part.number) };
        let state = match part.state {
            State::Sound => "sound",
            State::Unchecked => "read, not checked",
            State::Skipped => "skipped",
            State::Unknown => "not judged",
            State::Bad => "NOT SOUND",
        };
        let kind = if part.kind.is_empty() { "unknown" } else { &part.kind };
        let why = if part.what.is_empty() { String::new() } else { format!(": {}", part.what) };
        writeln!(out, "{place:<8} {} {kind}, {} names, {state}{why}", ByteCount(part.bytes), part.names)?;
    }
    if let Some(boot) = &report.boot {
        writeln!(out, "boot     up after {:.0} s: it said \"{}\"", boot.seconds, boot.marker)?;
    }
    writeln!(out, "proof    {}", report.proof)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(kind: &str, state: State) -> Part {
        Part { number: 1, offset: 0, bytes: 1, kind: kind.into(), names: 1, state, what: "why".into() }
    }

    fn up() -> Option<Result<Booted, String>> {
        Some(Ok(Booted { marker: "login:".into(), seconds: 1.0 }))
    }

    #[test]
    fn a_point_is_checked_only_where_all_file_systems_were_and_one_at_least() {
        let sound = || part("ext4", State::Sound);
        for (parts, proof, weaker) in [
            (vec![sound()], Proof::Checked, false),
            (vec![sound(), part("swap", State::Skipped), part("", State::Unknown)], Proof::Checked, false),
            (vec![sound(), part("LVM2_member", State::Unknown)], Proof::Opened, true),
            (vec![sound(), part("ntfs", State::Unchecked)], Proof::Opened, true),
            (vec![part("", State::Unknown)], Proof::Opened, true),
            (vec![part("swap", State::Skipped)], Proof::Opened, true),
        ] {
            let verdict = judge(&parts, false, None);
            assert_eq!(verdict.proof, proof, "{parts:?}");
            assert_eq!(matches!(verdict.problem, Some(Problem::Weaker(_))), weaker, "{parts:?}");
        }
    }

    #[test]
    fn a_bad_file_system_proves_no_more_than_that_it_was_restored_even_if_it_boots() {
        let verdict = judge(&[part("ext4", State::Sound), part("xfs", State::Bad)], true, up());
        assert_eq!(verdict.proof, Proof::Opened);
        assert!(matches!(verdict.problem, Some(Problem::Unsound { .. })));
        let verdict = judge(&[part("", State::Unknown)], true, up());
        assert!(verdict.proof == Proof::Booted && verdict.problem.is_none());
        let verdict = judge(&[part("ext4", State::Sound)], true, Some(Err("silence".into())));
        assert!(verdict.proof == Proof::Checked && matches!(verdict.problem, Some(Problem::NotUp(_))));
    }
}
