//! Did the disk provably rest while it was read? Then what was read is as after a power cut; else it is `fuzzy`.
//!
//! - *File*: size, modification and change time are equal before and after, and at both moments nobody had it open or mapped
//!   for writing. The kernel says so when it grants a read lease, which is given back at once, so that no writer ever
//!   waits for us. Where leases are not to be had, `/proc` is searched for writers.
//! - *Device*: held with `O_EXCL` all the while (so nothing is mounted on it), and the kernel's count of sectors
//!   written and discarded has not moved. What lies dirty in its page cache is flushed first, and again before the second look.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::clock::Clock;
use common::format::close::Consistency;
use rustix::fs::OFlags;

/// Time stamps of files move in steps of a kernel tick, 10 ms at most. One younger than this may stand for two writes.
const TIMESTAMP_STEP: Duration = Duration::from_millis(50);

/// `F_SETSIG` of linux/fcntl.h, which the libc crate lacks.
const F_SETSIG: libc::c_int = 10;

/// Whether the disk rested.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rest {
    /// It did; how that is known.
    Proven(String),
    /// It may not have; why.
    Unproven(String),
}

impl Rest {
    /// The consistency of what was read.
    #[must_use]
    pub fn consistency(&self) -> Consistency {
        match self {
            Self::Proven(_) => Consistency::Crash,
            Self::Unproven(_) => Consistency::Fuzzy,
        }
    }
}

impl std::fmt::Display for Rest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Proven(how) => write!(f, "at rest: {how}"),
            Self::Unproven(why) => write!(f, "not known to be at rest: {why}"),
        }
    }
}

/// Size and times of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(file: &File) -> std::io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

#[derive(Debug)]
enum Watched {
    File { file: File, stamp: Stamp, how: &'static str },
    Device { exclusive: File, sysfs: PathBuf, written: [u64; 2] },
    Lost(String),
}

/// Watches one disk from before the first read of a pass to after the last.
#[derive(Debug)]
pub struct RestProbe(Watched);

impl RestProbe {
    /// A probe that proves nothing, for disks that can't be watched.
    #[must_use]
    pub fn none(why: &str) -> Self {
        Self(Watched::Lost(why.to_owned()))
    }

    /// Watches an image file. `file` is open for reading only. Waits for a few milliseconds where the file has just been
    /// changed, so that a further change would show in its times.
    pub(super) fn of_file(path: &Path, file: &File) -> Self {
        let begin = || -> Result<Watched, String> {
            let unreadable = |error: std::io::Error| format!("{}: {error}", path.display());
            let file = file.try_clone().map_err(unreadable)?;
            wait_for_timestamps(&Stamp::of(&file).map_err(unreadable)?);
            let stamp = Stamp::of(&file).map_err(unreadable)?;
            let how = no_writer(&file)?;
            Ok(Watched::File { file, stamp, how })
        };
        Self(begin().unwrap_or_else(Watched::Lost))
    }

    /// Watches a block device; `sysfs` is its directory under `/sys/dev/block`.
    pub(super) fn of_device(path: &Path, sysfs: &Path) -> Self {
        let begin = || -> Result<Watched, String> {
            let flags = OFlags::EXCL | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let exclusive = OpenOptions::new()
                .read(true)
                .custom_flags(i32::try_from(flags.bits()).map_err(|error| error.to_string())?)
                .open(path)
                .map_err(|error| match error.raw_os_error() {
                    Some(libc::EBUSY) => format!("{} is mounted or otherwise in use", path.display()),
                    _ => format!("{} can't be opened exclusively: {error}", path.display()),
                })?;
            exclusive.sync_all().map_err(|error| format!("{} can't be flushed: {error}", path.display()))?;
            let written = sectors_written(sysfs)?;
            Ok(Watched::Device { exclusive, sysfs: sysfs.to_owned(), written })
        };
        Self(begin().unwrap_or_else(Watched::Lost))
    }

    /// Looks again, after the last read.
    #[must_use]
    pub fn finish(self) -> Rest {
        let outcome = match self.0 {
            Watched::Lost(why) => Err(why),
            Watched::File { file, stamp, how } => finish_file(&file, stamp, how),
            Watched::Device { exclusive, sysfs, written } => finish_device(&exclusive, &sysfs, written),
        };
        match outcome {
            Ok(how) => Rest::Proven(how),
            Err(why) => Rest::Unproven(why),
        }
    }
}

fn finish_file(file: &File, before: Stamp, how: &'static str) -> Result<String, String> {
    // First the writer, then the times: a writer that is gone by now has left its mark in them.
    no_writer(file)?;
    let after = Stamp::of(file).map_err(|error| error.to_string())?;
    if after != before {
        return Err("the file was changed while it was read".to_owned());
    }
    Ok(format!("size and times unchanged, no writer ({how})"))
}

fn finish_device(exclusive: &File, sysfs: &Path, before: [u64; 2]) -> Result<String, String> {
    exclusive.sync_all().map_err(|error| format!("the device can't be flushed: {error}"))?;
    if sectors_written(sysfs)? != before {
        return Err("the device was written while it was read".to_owned());
    }
    Ok("opened exclusively, no write counted".to_owned())
}

/// Lets time stamps move on if the newest is so young that another change could get the same.
fn wait_for_timestamps(stamp: &Stamp) {
    let step = i64::try_from(TIMESTAMP_STEP.as_millis()).unwrap_or(i64::MAX);
    let changed = stamp.changed.0.saturating_mul(1000).saturating_add(stamp.changed.1 / 1_000_000);
    let age = Clock::System.now().0.saturating_sub(changed);
    if (0..step).contains(&age) {
        std::thread::sleep(TIMESTAMP_STEP);
    }
}

/// Says how it is known that nobody has the file open for writing.
fn no_writer(file: &File) -> Result<&'static str, String> {
    match lease(file) {
        Lease::Granted => Ok("read lease granted"),
        Lease::Writer => Err("the file is open for writing".to_owned()),
        Lease::Unsupported => search_writers(Path::new("/proc"), file).map(|()| "no writer among all processes"),
    }
}

enum Lease {
    Granted,
    Writer,
    Unsupported,
}

/// Asks for a read lease, which the kernel grants only where nobody has the inode open or mapped for writing, and gives it
/// back at once.
#[expect(unsafe_code, reason = "leases have no safe wrapper")]
fn lease(file: &File) -> Lease {
    let descriptor = file.as_raw_fd();
    // If a writer comes between the two calls, the kernel tells us by a signal: SIGURG, which is ignored by default, not SIGIO,
    // which would end the process.
    // SAFETY: fcntl with a valid descriptor and an integer argument touches no memory.
    let set = unsafe { libc::fcntl(descriptor, F_SETSIG, libc::SIGURG) };
    if set != 0 {
        return Lease::Unsupported;
    }
    // SAFETY: as above.
    if unsafe { libc::fcntl(descriptor, libc::F_SETLEASE, libc::F_RDLCK) } == 0 {
        // SAFETY: as above.
        unsafe { libc::fcntl(descriptor, libc::F_SETLEASE, libc::F_UNLCK) };
        return Lease::Granted;
    }
    match std::io::Error::last_os_error().raw_os_error() {
        Some(libc::EAGAIN) => Lease::Writer,
        _ => Lease::Unsupported,
    }
}

/// Searches descriptors and mappings of all processes, and loop devices, for a writer of the file. Any process that can't be
/// looked into leaves the question open.
fn search_writers(proc: &Path, file: &File) -> Result<(), String> {
    let target = file.metadata().map_err(|error| error.to_string())?;
    let own = std::process::id().to_string();
    for process in std::fs::read_dir(proc).map_err(|error| format!("/proc can't be read: {error}"))? {
        let process = process.map_err(|error| format!("/proc can't be read: {error}"))?;
        let name = process.file_name().to_string_lossy().into_owned();
        if name == own || !name.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        if writes_file(&process.path(), &target)
            .map_err(|error| format!("process {name} can't be looked into: {error}"))?
        {
            return Err(format!("the file is open for writing by process {name}"));
        }
    }
    for device in std::fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let backing = std::fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
        let same = std::fs::metadata(backing.trim_end())
            .is_ok_and(|backing| backing.ino() == target.ino() && backing.dev() == target.dev());
        if same {
            return Err(format!("the file is in use by {}", device.file_name().to_string_lossy()));
        }
    }
    Ok(())
}

fn writes_file(process: &Path, target: &std::fs::Metadata) -> std::io::Result<bool> {
    let gone = |error: &std::io::Error| error.kind() == std::io::ErrorKind::NotFound;
    let entries = match std::fs::read_dir(process.join("fd")) {
        Err(error) if gone(&error) => return Ok(false),
        other => other?,
    };
    for entry in entries {
        let path = entry?.path();
        let same =
            std::fs::metadata(&path).is_ok_and(|other| other.ino() == target.ino() && other.dev() == target.dev());
        if !same {
            continue;
        }
        let info = path.file_name().map(|name| process.join("fdinfo").join(name)).unwrap_or_default();
        let info = std::fs::read_to_string(info).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).map(str::trim);
        let flags = flags.and_then(|flags| u32::from_str_radix(flags, 8).ok()).unwrap_or(libc::O_RDWR.unsigned_abs());
        if flags & libc::O_ACCMODE.unsigned_abs() != libc::O_RDONLY.unsigned_abs() {
            return Ok(true);
        }
    }
    let maps = match std::fs::read_to_string(process.join("maps")) {
        Err(error) if gone(&error) || error.raw_os_error() == Some(libc::ESRCH) => return Ok(false),
        other => other?,
    };
    // address permissions offset device inode path
    Ok(maps.lines().any(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (permissions, inode) = (fields.next().unwrap_or_default(), fields.nth(2).unwrap_or_default());
        permissions.ends_with('s') && permissions.contains('w') && inode.parse() == Ok(target.ino())
    }))
}

/// Sectors written and sectors discarded so far; no write may be under way. Requests are not counted: a flush is one, without
/// a sector.
fn sectors_written(sysfs: &Path) -> Result<[u64; 2], String> {
    let read = |path: PathBuf| {
        std::fs::read_to_string(&path).map_err(|error| format!("{} can't be read: {error}", path.display()))
    };
    let queue = if sysfs.join("partition").exists() { sysfs.join("../queue") } else { sysfs.join("queue") };
    if read(queue.join("iostats"))?.trim() == "0" {
        return Err("the kernel does not count the device's writes (iostats is off)".to_owned());
    }
    let inflight = read(sysfs.join("inflight"))?;
    if inflight.split_ascii_whitespace().nth(1) != Some("0") {
        return Err("the device has writes in flight".to_owned());
    }
    let stat = read(sysfs.join("stat"))?;
    let numbers: Vec<u64> = stat.split_ascii_whitespace().filter_map(|field| field.parse().ok()).collect();
    // Documentation/block/stat.rst: fields 4 to 7 are of writes, 11 to 14 of discards (since 4.18).
    match numbers.get(6) {
        Some(written) => Ok([*written, numbers.get(13).copied().unwrap_or(0)]),
        None => Err("the kernel does not count the device's writes".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A shell that holds `path` open; it says when it does.
    fn holder(redirection: &str, path: &Path) -> std::process::Child {
        let mut child = std::process::Command::new("sh")
            .args(["-c", &format!("exec 9{redirection}\"$0\"; echo ready; read line")])
            .arg(path)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("a shell");
        let mut ready = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().expect("piped"), &mut ready).expect("it says ready");
        child
    }

    #[test]
    fn a_process_that_could_write_the_file_is_told_from_one_that_reads_it() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let target = file.as_file().metadata().expect("just made");
        for (redirection, expected) in [("<", false), (">>", true), ("<>", true)] {
            let mut child = holder(redirection, file.path());
            let found = writes_file(&Path::new("/proc").join(child.id().to_string()), &target);
            child.kill().and_then(|()| child.wait()).expect("it ends");
            assert_eq!(found.expect("our own child can be looked into"), expected, "{redirection}");
        }
        assert!(!writes_file(Path::new("/proc/no-such-process"), &target).expect("gone is no writer"));
    }

    /// In a sandbox some processes can't be looked into: then nothing is proven, and that is said.
    #[test]
    fn the_search_of_all_processes_finds_a_writer_or_says_why_it_can_not() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file").into_temp_path();
        let reader = File::open(&file).expect("just made");
        let mut child = holder(">>", &file);
        let reason = search_writers(Path::new("/proc"), &reader).expect_err("there is a writer");
        child.kill().and_then(|()| child.wait()).expect("it ends");
        let writer = format!("the file is open for writing by process {}", child.id());
        assert!(reason == writer || reason.contains("can't be looked into"), "{reason}");
    }
}
