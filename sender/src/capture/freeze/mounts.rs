//! Which file systems lie on a device, and who else may write it.
//!
//! A device here is the device itself, its partitions, and whatever is stacked on them (device mapper, md, loop devices over
//! a partition). A file system counts once, however often it is mounted.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// How long after the first look for raw writers the second one follows.
const SECOND_LOOK: std::time::Duration = std::time::Duration::from_millis(50);

/// A block device's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl DeviceNumber {
    fn of(number: u64) -> Self {
        Self { major: rustix::fs::major(number), minor: rustix::fs::minor(number) }
    }

    /// The number of the block device at a path.
    ///
    /// # Errors
    /// Where it can't be looked at, or is no block device.
    pub fn of_path(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        if !metadata.file_type().is_block_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no block device"));
        }
        Ok(Self::of(metadata.rdev()))
    }

    fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

impl std::fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Identity of the mount, unique while it lasts.
    pub id: u64,
    /// Where it is mounted.
    pub point: PathBuf,
    /// Its type, such as `ext4`.
    pub fs_type: String,
}

/// Who uses a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceUse {
    /// File systems on it, each once.
    pub mounts: Vec<Mount>,
    /// What writes to it without a file system that could be frozen, for people. A point taken meanwhile is at most crash
    /// consistent.
    pub raw: Vec<String>,
}

/// Looks who uses the device at `path`.
///
/// # Errors
/// Where `/proc` or `/sys` can't be read.
pub fn find(path: &Path) -> io::Result<DeviceUse> {
    let device = DeviceNumber::of_path(path)?;
    let tree = Tree::collect(Path::new("/sys"), device);
    let mountinfo = std::fs::read("/proc/self/mountinfo")?;
    let mounted = |mount: &Line| tree.has_mount(mount);
    let mounts = pick(&mountinfo, mounted);
    let mut raw = swaps(&tree, &mounts);
    let mut writers = raw_writers(&tree);
    if !writers.is_empty() {
        // Programs that only look at a device, such as those of udev or losetup, have it open for a moment.
        std::thread::sleep(SECOND_LOOK);
        let again = raw_writers(&tree);
        writers.retain(|writer| again.contains(writer));
    }
    raw.extend(writers);
    raw.extend(held_unseen(&tree, &mountinfo));
    Ok(DeviceUse { mounts, raw })
}

/// A device with everything on it.
#[derive(Debug, Default)]
struct Tree {
    devices: BTreeSet<DeviceNumber>,
    /// Those of them that nothing is stacked on.
    leaves: BTreeSet<DeviceNumber>,
    /// Devices that belong to one btrfs.
    btrfs: Vec<BTreeSet<DeviceNumber>>,
}

impl Tree {
    fn collect(sysfs: &Path, device: DeviceNumber) -> Self {
        let mut tree = Self::default();
        let mut todo = vec![device];
        while let Some(device) = todo.pop() {
            if !tree.devices.insert(device) {
                continue;
            }
            let above = above(sysfs, device);
            if above.is_empty() {
                tree.leaves.insert(device);
            }
            todo.extend(above);
        }
        tree.btrfs = btrfs_sets(sysfs);
        tree
    }

    fn has_mount(&self, mount: &Line) -> bool {
        if self.devices.contains(&mount.device) {
            return true;
        }
        // btrfs and others have a number of their own; the source is the device, or one of its devices.
        if mount.device.major != 0 {
            return false;
        }
        let Ok(source) = DeviceNumber::of_path(&mount.source) else { return false };
        self.devices.contains(&source)
            || self.btrfs.iter().any(|set| set.contains(&source) && !set.is_disjoint(&self.devices))
    }
}

/// Partitions of a device, and devices stacked on it.
fn above(sysfs: &Path, device: DeviceNumber) -> Vec<DeviceNumber> {
    let folder = sysfs.join(format!("dev/block/{device}"));
    let number =
        |folder: PathBuf| std::fs::read_to_string(folder.join("dev")).ok().and_then(|text| DeviceNumber::parse(&text));
    let entries = |folder: PathBuf| std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let partitions = entries(folder.clone()).filter(|path| path.join("partition").exists());
    let mut found: Vec<_> = partitions.chain(entries(folder.join("holders"))).filter_map(number).collect();
    // A loop device over a block device is no holder.
    for block in entries(sysfs.join("block")) {
        let backing = std::fs::read_to_string(block.join("loop/backing_file")).unwrap_or_default();
        if !backing.is_empty() && DeviceNumber::of_path(Path::new(backing.trim_end())).is_ok_and(|on| on == device) {
            found.extend(number(block));
        }
    }
    found
}

fn btrfs_sets(sysfs: &Path) -> Vec<BTreeSet<DeviceNumber>> {
    let entries = |folder: PathBuf| std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries(sysfs.join("fs/btrfs"))
        .map(|volume| {
            entries(volume.join("devices"))
                .filter_map(|device| std::fs::read_to_string(device.join("dev")).ok())
                .filter_map(|text| DeviceNumber::parse(&text))
                .collect()
        })
        .collect()
}

/// A line of `/proc/self/mountinfo`.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    id: u64,
    device: DeviceNumber,
    point: PathBuf,
    fs_type: String,
    source: PathBuf,
}

impl Line {
    /// `id parent major:minor root point options [optional…] - type source super-options`, see proc_pid_mountinfo(5).
    fn parse(line: &[u8]) -> Option<Self> {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let dash = fields.iter().position(|field| *field == b"-")?;
        let text = |index: usize| fields.get(index).and_then(|field| std::str::from_utf8(field).ok());
        Some(Self {
            id: text(0)?.parse().ok()?,
            device: DeviceNumber::parse(text(2)?)?,
            point: unescape(fields.get(4)?),
            fs_type: text(dash + 1)?.to_owned(),
            source: unescape(fields.get(dash + 2)?),
        })
    }
}

/// Blanks, tabs, newlines and backslashes are written as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|digits| digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        match (byte, digits) {
            (b'\\', Some(digits)) => {
                let value = digits.iter().fold(0_u32, |value, digit| value * 8 + u32::from(digit - b'0'));
                out.push(u8::try_from(value & 0xff).unwrap_or(b'?'));
                rest = &after[3..];
            }
            _ => {
                out.push(*byte);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

/// One mount for each file system, the one mounted last: it is the least likely to lie under another mount.
fn pick(mountinfo: &[u8], wanted: impl Fn(&Line) -> bool) -> Vec<Mount> {
    let mut found = BTreeMap::new();
    for line in mountinfo.split(|byte| *byte == b'\n').filter_map(Line::parse).filter(|line| wanted(line)) {
        let reachable = std::fs::metadata(&line.point).is_ok();
        let mount = Mount { id: line.id, point: line.point, fs_type: line.fs_type };
        if reachable || !found.contains_key(&line.device) {
            found.insert(line.device, mount);
        }
    }
    found.into_values().collect()
}

fn swaps(tree: &Tree, mounts: &[Mount]) -> Vec<String> {
    let swaps = std::fs::read("/proc/swaps").unwrap_or_default();
    let mut found = Vec::new();
    for line in swaps.split(|byte| *byte == b'\n').skip(1) {
        let Some(path) = line.split(|byte| *byte == b' ' || *byte == b'\t').next().filter(|path| !path.is_empty())
        else {
            continue;
        };
        let path = unescape(path);
        let Ok(metadata) = std::fs::metadata(&path) else { continue };
        let on_device =
            metadata.file_type().is_block_device() && tree.devices.contains(&DeviceNumber::of(metadata.rdev()));
        let on_mount =
            mounts.iter().any(|mount| std::fs::metadata(&mount.point).is_ok_and(|root| root.dev() == metadata.dev()));
        if on_device || (metadata.is_file() && on_mount) {
            found.push(format!("swap on {}", path.display()));
        }
    }
    found
}

/// Processes that have the device itself open for writing. Processes that can't be looked into are left out: whatever they
/// write shows as marks.
fn raw_writers(tree: &Tree) -> Vec<String> {
    let own = std::process::id();
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(id) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()).filter(|id| *id != own)
        else {
            continue;
        };
        for entry in std::fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            let device = std::fs::read_link(entry.path()).is_ok_and(|target| target.starts_with("/dev"))
                && std::fs::metadata(entry.path()).is_ok_and(|metadata| {
                    metadata.file_type().is_block_device() && tree.devices.contains(&DeviceNumber::of(metadata.rdev()))
                });
            if device && opened_for_writing(&process.path(), &entry.file_name().to_string_lossy()) {
                let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                found.push(format!("process {id} ({}) has the device open for writing", name.trim_end()));
                break;
            }
        }
    }
    found
}

fn opened_for_writing(process: &Path, descriptor: &str) -> bool {
    let info = std::fs::read_to_string(process.join("fdinfo").join(descriptor)).unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).map(str::trim);
    let flags = flags.and_then(|flags| u32::from_str_radix(flags, 8).ok()).unwrap_or(0);
    flags & libc::O_ACCMODE.unsigned_abs() != libc::O_RDONLY.unsigned_abs()
}

/// Devices that somebody holds whom nothing above shows: a file system mounted in another mount namespace, a kernel driver.
fn held_unseen(tree: &Tree, mountinfo: &[u8]) -> Vec<String> {
    let lines: Vec<Line> = mountinfo.split(|byte| *byte == b'\n').filter_map(Line::parse).collect();
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    let mut found = Vec::new();
    for device in &tree.leaves {
        let one = Tree { devices: [*device].into(), leaves: BTreeSet::new(), btrfs: tree.btrfs.clone() };
        let Ok(name) = std::fs::read_link(format!("/sys/dev/block/{device}")) else { continue };
        let node = Path::new("/dev").join(name.file_name().unwrap_or_default());
        if lines.iter().any(|line| one.has_mount(line)) || swaps.contains(&*node.to_string_lossy()) {
            continue;
        }
        let held = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(&node);
        if held.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY)) {
            found.push(format!("{} is in use by something that this process can't see", node.display()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Option<Line> {
        Line::parse(text.as_bytes())
    }

    #[test]
    fn a_line_of_mountinfo_is_read_with_or_without_optional_fields() {
        let expected = Line {
            id: 36,
            device: DeviceNumber { major: 98, minor: 0 },
            point: "/mnt/a b".into(),
            fs_type: "ext3".into(),
            source: "/dev/root".into(),
        };
        let with = r"36 35 98:0 /mnt1 /mnt/a\040b rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue";
        assert_eq!(line(with), Some(expected));
        assert_eq!(line(r"36 35 98:0 / /mnt\134x rw - ext3 none rw").map(|line| line.point), Some(r"/mnt\x".into()));
        assert_eq!(line("36 35 98:0 / /mnt rw"), None);
        assert_eq!(line(""), None);
    }

    #[test]
    fn a_file_system_that_is_mounted_twice_counts_once() {
        let text = b"36 35 98:0 / /proc rw - ext4 /dev/a rw\n37 35 98:0 /sub /sys rw - ext4 /dev/a rw\n38 35 98:1 / /dev rw - xfs /dev/b rw\n39 35 98:0 / /no-such-place rw - ext4 /dev/a rw\n";
        let found = pick(text, |line| line.device.major == 98);
        let points: Vec<_> = found.iter().map(|mount| (mount.id, mount.point.to_str())).collect();
        assert_eq!(points, [(37, Some("/sys")), (38, Some("/dev"))]);
    }

    fn device(sysfs: &Path, folder: &str, number: &str) {
        let folder = sysfs.join(folder);
        std::fs::create_dir_all(folder.join("holders")).expect("room");
        std::fs::write(folder.join("dev"), format!("{number}\n")).expect("room");
        std::fs::create_dir_all(sysfs.join("dev/block")).expect("room");
        std::os::unix::fs::symlink(&folder, sysfs.join("dev/block").join(number)).expect("room");
    }

    #[test]
    fn partitions_and_what_is_stacked_on_them_belong_to_a_disk_but_not_to_its_neighbour() {
        let sysfs = tempfile::tempdir().expect("a temporary directory");
        let sysfs = sysfs.path();
        device(sysfs, "block/sda", "8:0");
        device(sysfs, "block/sda/sda1", "8:1");
        device(sysfs, "block/sda/sda2", "8:2");
        device(sysfs, "block/dm-0", "253:0");
        device(sysfs, "block/sdb", "8:16");
        for partition in ["sda1", "sda2"] {
            std::fs::write(sysfs.join("block/sda").join(partition).join("partition"), "1\n").expect("room");
        }
        std::os::unix::fs::symlink(sysfs.join("block/dm-0"), sysfs.join("block/sda/sda2/holders/dm-0")).expect("room");
        let numbers = |tree: Tree| tree.devices.iter().map(ToString::to_string).collect::<Vec<_>>();
        let whole = Tree::collect(sysfs, DeviceNumber { major: 8, minor: 0 });
        assert_eq!(whole.leaves.iter().map(ToString::to_string).collect::<Vec<_>>(), ["8:1", "253:0"]);
        assert_eq!(numbers(whole), ["8:0", "8:1", "8:2", "253:0"]);
        assert_eq!(numbers(Tree::collect(sysfs, DeviceNumber { major: 8, minor: 2 })), ["8:2", "253:0"]);
        assert_eq!(numbers(Tree::collect(sysfs, DeviceNumber { major: 8, minor: 16 })), ["8:16"]);
    }

    #[test]
    fn the_file_system_that_the_machine_runs_from_is_found_on_its_device_where_it_has_one() {
        let mountinfo = std::fs::read("/proc/self/mountinfo").expect("Linux");
        let root =
            mountinfo.split(|byte| *byte == b'\n').filter_map(Line::parse).find(|line| line.point == Path::new("/"));
        let Some(root) = root.filter(|root| root.device.major != 0) else { return };
        let Ok(node) = std::fs::read_link(format!("/sys/dev/block/{}", root.device)) else { return };
        let node = Path::new("/dev").join(node.file_name().expect("a name"));
        if node.exists() {
            let found = find(&node).expect("readable");
            assert!(found.mounts.iter().any(|mount| mount.fs_type == root.fs_type), "{found:?}");
        }
    }
}
