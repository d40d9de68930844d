//! State directory and disks: room, and who lies on whom.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use common::units::ByteCount;

use super::{Finding, Level};
use crate::capture::{Disk, Source};

/// A block device by its numbers.
type Device = (u32, u32);

/// File systems that the kernel can freeze (FIFREEZE).
const FREEZABLE: [&str; 9] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "nilfs2", "jfs", "gfs2"];
/// Room for journals of epochs in flight, beside the hashes.
const JOURNAL_BYTES: u64 = 64 << 20;

/// What is mounted where, and swap: read once.
struct Mounts {
    /// Device, mount point, type.
    mounted: Vec<(Device, String, String)>,
    swaps: Vec<Device>,
}

pub(super) fn look(state_dir: &Path, volumes: &[(String, PathBuf)]) -> Vec<Finding> {
    let mounts = Mounts::read();
    let state_on = existing(state_dir).and_then(|dir| std::fs::metadata(dir).ok()).map(|found| numbers(found.dev()));
    let state_on = state_on.map(underlying).unwrap_or_default();
    let mut findings = Vec::new();
    let mut hashes = 0;
    for (name, path) in volumes {
        let subject = format!("volume {name}");
        let source = match Source::open(path) {
            Ok(source) => source,
            Err(error) => {
                findings.push(Finding::new(Level::Error, &subject, error.to_string(), "correct --volume NAME=PATH"));
                continue;
            }
        };
        let bytes = source.geometry().disk_bytes();
        // 16 bytes for each page of 4 KiB.
        hashes += bytes / 256;
        findings.push(Finding::ok(&subject, format!("{} can be read ({})", path.display(), ByteCount(bytes))));
        let device = std::fs::metadata(path).ok().filter(|found| found.file_type().is_block_device());
        if let Some(device) = device.map(|found| numbers(found.rdev())) {
            findings.extend(mounts.on_device(&subject, device));
            if state_on.contains(&device) {
                findings.push(Finding::new(
                    Level::Warning,
                    &subject,
                    format!("the state directory {} lies on this disk", state_dir.display()),
                    "put --state-dir on another disk: else the sender's own writes are replicated, and a frozen file system \
                     holds it back",
                ));
            }
        }
    }
    findings.push(room(state_dir, hashes + JOURNAL_BYTES));
    findings
}

/// The directory, or the nearest one above it that exists.
fn existing(path: &Path) -> Option<&Path> {
    path.ancestors().find(|path| path.is_dir())
}

fn room(state_dir: &Path, needed: u64) -> Finding {
    let found = existing(state_dir).and_then(|dir| rustix::fs::statvfs(dir).ok());
    let Some(found) = found else {
        let text = format!("{} can't be looked at", state_dir.display());
        return Finding::new(Level::Error, "state", text, "choose a --state-dir on a local file system");
    };
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    let text = format!("{} has {} free, needed {}", state_dir.display(), ByteCount(free), ByteCount(needed));
    if free < needed {
        return Finding::new(Level::Error, "state", text, "free some space, or choose another --state-dir");
    }
    Finding::ok("state", text)
}

impl Mounts {
    fn read() -> Self {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
        let swaps = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        let swaps = swaps.filter_map(|path| std::fs::metadata(path).ok()).map(|found| {
            if found.file_type().is_block_device() { numbers(found.rdev()) } else { numbers(found.dev()) }
        });
        Self { mounted: table.lines().filter_map(mount).collect(), swaps: swaps.collect() }
    }

    /// What lies on a device, or on a partition or mapping of it.
    fn on_device(&self, subject: &str, device: Device) -> Vec<Finding> {
        let mut findings = Vec::new();
        let mut seen = BTreeSet::new();
        for (on, at, kind) in self.mounted.iter().filter(|(on, ..)| underlying(*on).contains(&device)) {
            if !seen.insert(on) {
                continue;
            }
            findings.push(if FREEZABLE.contains(&kind.as_str()) {
                Finding::ok(subject, format!("{at} ({kind}) can be frozen: filesystem consistent points are possible"))
            } else {
                Finding::new(
                    Level::Warning,
                    subject,
                    format!("{at} ({kind}) can't be frozen: points are crash consistent at best"),
                    "put what needs more on ext4, xfs or btrfs, or use capture=nbd, whose cuts need no freeze",
                )
            });
        }
        if self.swaps.iter().any(|swap| underlying(*swap).contains(&device)) {
            findings.push(Finding::new(
                Level::Warning,
                subject,
                "swap lies on this disk: its pages are replicated, and no freeze holds them still",
                "move swap to a disk that is not protected",
            ));
        }
        findings
    }
}

/// A line of mountinfo: device, mount point, type; only what lies on a block device.
fn mount(line: &str) -> Option<(Device, String, String)> {
    let (front, back) = line.split_once(" - ")?;
    let mut fields = front.split(' ');
    let mut device = parse_numbers(fields.nth(2)?)?;
    let at = fields.nth(1)?.to_owned();
    let mut fields = back.split(' ');
    let (kind, from) = (fields.next()?, fields.next()?);
    if device.0 == 0 {
        // btrfs and others have a number of their own; where they come from is the device.
        let found = std::fs::metadata(from).ok().filter(|found| found.file_type().is_block_device())?;
        device = numbers(found.rdev());
    }
    Some((device, at, kind.to_owned()))
}

fn parse_numbers(text: &str) -> Option<Device> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn numbers(device: u64) -> Device {
    (rustix::fs::major(device), rustix::fs::minor(device))
}

/// A device and all that it lies on: its disk where it is a partition, what a mapping or array is made of.
fn underlying(device: Device) -> BTreeSet<Device> {
    let mut found = BTreeSet::new();
    let mut open = vec![device];
    while let Some(device) = open.pop() {
        if !found.insert(device) {
            continue;
        }
        let sysfs = PathBuf::from(format!("/sys/dev/block/{}:{}", device.0, device.1));
        let Ok(sysfs) = sysfs.canonicalize() else { continue };
        let read = |path: PathBuf| std::fs::read_to_string(path).ok().and_then(|text| parse_numbers(&text));
        if sysfs.join("partition").exists() {
            open.extend(sysfs.parent().and_then(|disk| read(disk.join("dev"))));
        }
        let slaves = std::fs::read_dir(sysfs.join("slaves")).into_iter().flatten().flatten();
        open.extend(slaves.filter_map(|slave| read(slave.path().join("dev"))));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_mount_table_gives_device_place_and_type() {
        let line = "36 35 98:1 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        assert_eq!(mount(line), Some(((98, 1), "/mnt2".into(), "ext3".into())));
        assert_eq!(mount("22 28 0:20 / /proc rw - proc proc rw"), None);
    }

    #[test]
    fn a_state_directory_without_room_and_a_disk_that_is_missing_are_errors() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        assert_eq!(room(dir.path(), u64::MAX).level, Level::Error);
        assert_eq!(room(&dir.path().join("to/be/made"), 1).level, Level::Ok);
        let found = look(dir.path(), &[("root".into(), dir.path().join("missing"))]);
        assert!(found.iter().any(|finding| finding.subject == "volume root" && finding.level == Level::Error));
    }

    #[test]
    fn what_can_not_be_frozen_is_a_warning() {
        let mounts = Mounts {
            mounted: vec![((250, 9), "/a".into(), "vfat".into()), ((250, 9), "/b".into(), "vfat".into())],
            swaps: vec![(250, 9)],
        };
        let found = mounts.on_device("volume a", (250, 9));
        assert_eq!(found.len(), 2);
        assert!(found.iter().all(|finding| finding.level == Level::Warning));
        assert!(mounts.on_device("volume a", (250, 8)).is_empty());
    }
}
