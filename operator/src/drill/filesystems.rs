//! One file system of a restored disk: what is it, does the kernel take it, are all names there, what does its own checker say?
//!
//! Order: identify (`blkid`), mount read-only, read every folder, unmount, check. The mount comes first on purpose: a point is the state of
//! a running machine, so a journal has to be replayed as it would be at its next start, and the kernel is what does that. The disk is a
//! scratch copy and nothing of it is kept. Loop devices are attached so that they go away with their mount.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use common::ops::shutdown::Shutdown;

/// Most folders inside one another.
const DEPTH_MAX: usize = 200;
/// How often a wish to end is looked for while a checker runs.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// What became of a part of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum State {
    /// Mounted, all names read, and its checker finds nothing.
    Sound,
    /// Mounted, all names read; there is no checker for it here.
    Unchecked,
    /// Known to hold no file system: swap, or a part for a boot loader.
    Skipped,
    /// Nothing that is known, or something that is not looked into: LVM, RAID, encryption.
    Unknown,
    /// It does not mount, can't be read, or its checker finds errors.
    Bad,
}

/// A part of the disk, and what was found.
#[derive(Debug, Clone, serde::Serialize)]
pub(super) struct Part {
    /// Number of the partition; 0 for a disk without partitions.
    pub number: u32,
    /// Where it starts, in bytes.
    pub offset: u64,
    /// Its size in bytes.
    pub bytes: u64,
    /// What `blkid` calls it.
    pub kind: String,
    /// Names of files and folders that were read.
    pub names: u64,
    /// What became of it.
    pub state: State,
    /// Why it is no better.
    pub what: String,
}

/// A checker: program and flags, before the device. None of them writes.
fn checker(kind: &str) -> Option<&'static [&'static str]> {
    match kind {
        "ext2" | "ext3" | "ext4" => Some(&["e2fsck", "-fn"]),
        "xfs" => Some(&["xfs_repair", "-n"]),
        "btrfs" => Some(&["btrfs", "check", "--readonly"]),
        "vfat" => Some(&["fsck.vfat", "-n"]),
        "exfat" => Some(&["fsck.exfat", "-n"]),
        _ => None,
    }
}

/// A loop device over a part of the disk; detached when dropped.
struct Loop(String);

impl Loop {
    fn attach(disk: &Path, range: &Range<u64>) -> Result<Self, String> {
        let mut losetup = program("losetup");
        losetup.args(["--find", "--show", "--offset", &range.start.to_string()]);
        losetup.args(["--sizelimit", &(range.end - range.start).to_string()]).arg(disk);
        let output = run(losetup)?;
        if !output.status.success() {
            return Err(format!("no loop device: {} (a drill needs root)", said(&output)));
        }
        Ok(Self(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let mut losetup = program("losetup");
        losetup.args(["--detach", &self.0]);
        if let Err(error) = run(losetup) {
            tracing::warn!(device = self.0, error, "the loop device is left");
        }
    }
}

/// A mount; unmounted when dropped.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let mut umount = program("umount");
        umount.arg(&self.0);
        let unmounted = run(umount);
        if !unmounted.is_ok_and(|output| output.status.success()) {
            let mut umount = program("umount");
            umount.arg("--lazy").arg(&self.0);
            let _ = run(umount);
        }
    }
}

/// Looks at one part of `disk`; `mount_point` is an empty folder. An error is one of this machine, not of the disk. Once `shutdown`
/// is requested it comes back early, and what it found is worth nothing.
pub(super) fn look(
    disk: &Path,
    number: u32,
    range: Range<u64>,
    mount_point: &Path,
    shutdown: &Shutdown,
) -> Result<Part, String> {
    let device = Loop::attach(disk, &range)?;
    let (offset, bytes) = (range.start, range.end - range.start);
    let mut part =
        Part { number, offset, bytes, kind: String::new(), names: 0, state: State::Unknown, what: String::new() };
    let facts = probe(&device.0)?;
    let fact = |name: &str| facts.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value.as_str());
    part.kind = fact("TYPE").to_owned();
    match (fact("USAGE"), part.kind.as_str()) {
        (_, "") => part.what = "nothing that blkid knows".into(),
        (_, "swap" | "swsuspend") => part.state = State::Skipped,
        ("filesystem", _) => look_into(&device.0, mount_point, &mut part, shutdown)?,
        (_, kind) => part.what = format!("{kind} is not looked into"),
    }
    Ok(part)
}

/// What `blkid` says of a device, as name and value.
fn probe(device: &str) -> Result<Vec<(String, String)>, String> {
    let mut blkid = program("blkid");
    blkid.args(["--probe", "--output", "export", device]);
    let output = run(blkid)?;
    // 2: nothing found; 8: several things, which is as good as nothing.
    if !output.status.success() && !matches!(output.status.code(), Some(2 | 8)) {
        return Err(format!("blkid {device}: {}", said(&output)));
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.lines().filter_map(|line| line.split_once('=')).map(|(key, value)| (key.into(), value.into())).collect())
}

fn look_into(device: &str, mount_point: &Path, part: &mut Part, shutdown: &Shutdown) -> Result<(), String> {
    // The machine that made the point may be this one: xfs refuses the same file system twice unless told.
    let options = if part.kind == "xfs" { "ro,nodev,nosuid,noexec,nouuid" } else { "ro,nodev,nosuid,noexec" };
    let mut mount = program("mount");
    mount.args(["-t", &part.kind, "-o", options, device]).arg(mount_point);
    let output = run(mount)?;
    if !output.status.success() {
        let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
        let knows = known.lines().any(|line| line.split_whitespace().last() == Some(part.kind.as_str()));
        part.what = format!("it does not mount: {}", said(&output));
        part.state = if knows { State::Bad } else { State::Unknown };
        return Ok(());
    }
    let mounted = Mount(mount_point.to_owned());
    let counted = count_names(mount_point, 0, shutdown);
    drop(mounted);
    match counted {
        Ok(names) => part.names = names,
        Err(why) => {
            (part.state, part.what) = (State::Bad, why);
            return Ok(());
        }
    }
    let Some(command) = checker(&part.kind) else {
        (part.state, part.what) = (State::Unchecked, format!("no checker for {} is known", part.kind));
        return Ok(());
    };
    let mut check = program(command[0]);
    check.args(&command[1..]).arg(device);
    match output_until(check, shutdown) {
        Ok(output) if output.status.success() => part.state = State::Sound,
        Ok(output) => (part.state, part.what) = (State::Bad, format!("{}: {}", command[0], said(&output))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            (part.state, part.what) = (State::Unchecked, format!("{} is not installed", command[0]));
        }
        Err(error) => return Err(format!("{}: {error}", command[0])),
    }
    Ok(())
}

/// Reads every folder below `folder`; the number of names in them.
fn count_names(folder: &Path, depth: usize, shutdown: &Shutdown) -> Result<u64, String> {
    let wrong = |error: std::io::Error| format!("its folder {} can't be read: {error}", folder.display());
    if depth > DEPTH_MAX {
        return Err(format!("its folders are more than {DEPTH_MAX} deep"));
    }
    let mut names = 0;
    for entry in std::fs::read_dir(folder).map_err(wrong)? {
        let entry = entry.map_err(wrong)?;
        names += 1;
        if shutdown.is_requested() {
            break;
        }
        // Not followed: links of the machine would lead out of its disk.
        if entry.file_type().map_err(wrong)?.is_dir() {
            names += count_names(&entry.path(), depth + 1, shutdown)?;
        }
    }
    Ok(names)
}

/// A program of the system's, found where administrators' programs are as well.
pub(super) fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin")).env("LC_ALL", "C").stdin(Stdio::null());
    command
}

/// Runs a program to its end, or kills it once `shutdown` is requested.
fn output_until(mut command: Command, shutdown: &Shutdown) -> std::io::Result<Output> {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw);
    let (sender, ended) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let _ = sender.send(child.wait_with_output());
    });
    loop {
        match ended.recv_timeout(LOOK_INTERVAL) {
            Ok(output) => return output,
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => return Err(std::io::ErrorKind::BrokenPipe.into()),
        }
        // It has not been waited for yet, so the number is still its own.
        if shutdown.is_requested()
            && let Some(pid) = pid
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

pub(super) fn run(mut command: Command) -> Result<Output, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    command.output().map_err(|error| format!("{name}: {error}"))
}

/// The end of what a program said.
fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    let lines: Vec<&str> = out.lines().chain(err.lines()).map(str::trim).filter(|line| !line.is_empty()).collect();
    let end = lines.len().saturating_sub(4);
    if lines.is_empty() { output.status.to_string() } else { lines[end..].join("; ") }
}
