//! The BPF file system, and the directories of pins in it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::error::TrackerError;
use super::libbpf;

/// Where the BPF file system belongs.
const BPFFS: &str = "/sys/fs/bpf";
/// `BPF_FS_MAGIC` of linux/magic.h.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Where a volume's pins are by default. `name` must not have a dot (the BPF file system reserves those): a UUID is fine.
#[must_use]
pub fn default_directory(name: &str) -> PathBuf {
    Path::new(BPFFS).join("blockferry").join(name)
}

/// True where `path` is on a BPF file system.
pub(super) fn is_bpffs(path: &Path) -> bool {
    // The type has another width on other platforms.
    #[allow(clippy::unnecessary_cast, reason = "the field's type depends on the platform")]
    rustix::fs::statfs(path).is_ok_and(|found| found.f_type as i64 == BPF_FS_MAGIC)
}

/// Makes `directory`, with the BPF file system mounted where it belongs if it is not.
pub(super) fn prepare(directory: &Path) -> Result<(), TrackerError> {
    if directory.starts_with(BPFFS) {
        mount().map_err(TrackerError::pin("mount the BPF file system", Path::new(BPFFS)))?;
    }
    let existing = directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    if !is_bpffs(existing) {
        let error = io::Error::other("pins can only be kept on a BPF file system, such as /sys/fs/bpf");
        return Err(TrackerError::pin("keep pins", directory)(error));
    }
    std::fs::create_dir_all(directory).map_err(TrackerError::pin("make the directory of pins", directory))
}

/// Mounts the BPF file system unless it is there. Under a lock: a second mount above the first would hide its pins.
pub(super) fn mount() -> io::Result<()> {
    let parent = File::open("/sys/fs")?;
    rustix::fs::flock(&parent, rustix::fs::FlockOperation::LockExclusive)?;
    if is_bpffs(Path::new(BPFFS)) {
        return Ok(());
    }
    libbpf::mount_bpffs(c"/sys/fs/bpf")
}

/// Numbers of the generations in `directory`, newest first.
pub(super) fn generations(directory: &Path) -> Result<Vec<u32>, TrackerError> {
    let list = std::fs::read_dir(directory).map_err(TrackerError::pin("list pins", directory))?;
    let mut found = Vec::new();
    for entry in list {
        let entry = entry.map_err(TrackerError::pin("list pins", directory))?;
        found.extend(entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    found.sort_unstable_by(|a, b| b.cmp(a));
    Ok(found)
}

/// Removes `directory`, which is empty, and its parent where that is empty too.
pub(super) fn remove_directory(directory: &Path) -> Result<(), TrackerError> {
    match std::fs::remove_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(TrackerError::pin("remove the directory of pins", directory)(error));
        }
        _ => {}
    }
    if let Some(parent) = directory.parent().filter(|parent| parent.ends_with("blockferry")) {
        // Other volumes' pins may be in it; then it stays.
        let _ = std::fs::remove_dir(parent);
    }
    Ok(())
}
