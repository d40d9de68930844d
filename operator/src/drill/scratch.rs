//! The folder of a drill: made for it, removed with it, and removed by a later drill where its own was killed.
//!
//! The folder is locked for as long as its drill lives, so one that can be locked is nobody's any more. Its mounts and loop devices
//! are let go before it is removed. Never: touches a folder of another user, or one whose drill lives.

use std::fs::File;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags};

use super::DrillError;
use super::filesystems::{program, run};

const PREFIX: &str = "blockferry-drill-";
/// Digits behind the prefix.
const DIGITS: usize = 16;
/// Names tried: another drill may sweep a new folder away in the moment before it is locked.
const ATTEMPTS_MAX: usize = 8;
/// Attempts at removing a folder into which a thread that is about to end may still write, and the pause between two.
const REMOVALS_MAX: usize = 20;
const REMOVAL_PAUSE: Duration = Duration::from_millis(25);

/// A folder that is removed when dropped.
#[derive(Debug)]
pub(super) struct Scratch {
    path: PathBuf,
    /// Locked until all is removed, or the process ends.
    _locked: File,
}

impl Scratch {
    /// Makes a folder in `parent`, after removing what drills left there that were killed.
    pub(super) fn make(parent: &Path) -> Result<Self, DrillError> {
        sweep(parent);
        let mut failed = None;
        for _ in 0..ATTEMPTS_MAX {
            let chance = common::rng::random::<8>().map_err(|error| DrillError::Machine { what: error.to_string() })?;
            let path = parent.join(format!("{PREFIX}{:016x}", u64::from_le_bytes(chance)));
            let mut builder = std::fs::DirBuilder::new();
            builder.mode(0o700);
            let scratch_error = |source| DrillError::Scratch { what: "make", path: path.clone(), source };
            builder.create(&path).map_err(scratch_error)?;
            match lock(&path) {
                Ok(locked) => return Ok(Self { path, _locked: locked }),
                Err(source) => failed = Some(scratch_error(source)),
            }
        }
        Err(failed.unwrap_or_else(|| DrillError::Machine { what: "no folder could be made".into() }))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the scratch folder is left: the next drill removes it");
        }
    }
}

/// Locks a folder that is there and this user's.
fn lock(path: &Path) -> std::io::Result<File> {
    let flags = (OFlags::DIRECTORY | OFlags::NOFOLLOW).bits().cast_signed();
    let folder = File::options().read(true).custom_flags(flags).open(path)?;
    rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive)?;
    let (held, there) = (folder.metadata()?, std::fs::symlink_metadata(path)?);
    if held.uid() != rustix::process::geteuid().as_raw() {
        return Err(std::io::ErrorKind::PermissionDenied.into());
    }
    // Whoever had the lock before may have removed it.
    if (held.dev(), held.ino()) != (there.dev(), there.ino()) {
        return Err(std::io::ErrorKind::NotFound.into());
    }
    Ok(folder)
}

fn remove(path: &Path) -> std::io::Result<()> {
    let mut attempts = 0;
    loop {
        match std::fs::remove_dir_all(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty && attempts < REMOVALS_MAX => {
                attempts += 1;
                std::thread::sleep(REMOVAL_PAUSE);
            }
            removed => return removed,
        }
    }
}

/// Removes the folders of drills that were killed. One that can't be removed costs its room and a warning.
fn sweep(parent: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| is_ours(path)) {
        let Ok(_locked) = lock(&path) else { continue };
        let removed = let_go(&path).and_then(|()| remove(&path).map_err(|error| error.to_string()));
        match removed {
            Ok(()) => tracing::info!(path = %path.display(), "removed what a drill left that was killed"),
            Err(error) => tracing::warn!(path = %path.display(), error, "a killed drill's folder is left: remove it"),
        }
    }
}

/// Whether the name is one that drills give.
fn is_ours(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    let digits = name.and_then(|name| name.strip_prefix(PREFIX));
    digits.is_some_and(|digits| digits.len() == DIGITS && digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
}

/// Unmounts what is mounted in a folder, and detaches the loop devices over files in it.
fn let_go(path: &Path) -> Result<(), String> {
    let path = path.canonicalize().map_err(|error| error.to_string())?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").map_err(|error| error.to_string())?;
    for point in mount_points(&mounts).filter(|point| Path::new(point).starts_with(&path)) {
        let mut umount = program("umount");
        umount.arg("--lazy").arg(&point);
        run(umount)?;
    }
    let mut losetup = program("losetup");
    losetup.args(["--list", "--noheadings", "--raw", "--output", "NAME,BACK-FILE"]);
    // A machine without losetup had no drill that attached one.
    let Ok(listed) = run(losetup) else { return Ok(()) };
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        if let Some((device, file)) = line.split_once(' ')
            && Path::new(file).starts_with(&path)
        {
            let mut losetup = program("losetup");
            losetup.args(["--detach", device]);
            run(losetup)?;
        }
    }
    Ok(())
}

/// The mount points in a `mountinfo`, the innermost first. Drills make none whose name would have to be escaped, but for the folder's.
fn mount_points(text: &str) -> impl Iterator<Item = String> {
    text.lines().rev().filter_map(|line| line.split(' ').nth(4)).map(|point| {
        // Spaces, tabs, line ends and backslashes come as octal numbers.
        [(r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", r"\")]
            .into_iter()
            .fold(point.to_owned(), |text, (escape, plain)| text.replace(escape, plain))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(parent: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(parent).expect("a folder").flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_goes_with_its_drill_and_a_killed_drills_folder_with_the_next_one() {
        let parent = tempfile::tempdir().expect("a folder");
        let living = Scratch::make(parent.path()).expect("made");
        std::fs::write(living.path().join("disk.img"), "x").expect("room");
        // Nobody holds this one's lock.
        let dead = parent.path().join("blockferry-drill-0123456789abcdef");
        std::fs::create_dir(&dead).expect("made");
        std::fs::write(dead.join("disk.img"), "x").expect("room");
        // These are none of ours.
        for name in ["blockferry-drill-notes", "blockferry-drill-0123456789abcdeg", "other"] {
            std::fs::create_dir(parent.path().join(name)).expect("made");
        }
        let file = parent.path().join("blockferry-drill-0123456789abcde0");
        std::fs::write(file, "a file").expect("room");
        let next = Scratch::make(parent.path()).expect("made");
        assert!(!dead.exists() && living.path().join("disk.img").exists());
        assert_eq!(names(parent.path()).len(), 6);
        drop((living, next));
        assert_eq!(
            names(parent.path()),
            [
                "blockferry-drill-0123456789abcde0",
                "blockferry-drill-0123456789abcdeg",
                "blockferry-drill-notes",
                "other"
            ]
        );
    }

    #[test]
    fn mount_points_are_read_from_the_last_to_the_first() {
        let text = "22 1 0:20 / / rw - ext4 /dev/vda rw\n\
                    30 22 7:0 / /var/tmp/a\\040b/mount ro - ext4 /dev/loop0 ro\n";
        assert_eq!(mount_points(text).collect::<Vec<_>>(), ["/var/tmp/a b/mount", "/"]);
    }
}
