//! Finding a volume's disk: by what names it across reboots, wherever it is attached now.
//!
//! `/dev/sdX` names follow the order of discovery. A disk is known by its WWN or serial number, a partition by that of its disk
//! and its number, or by its partition UUID, a mapping or array by its own UUID; what has none of these (loop devices) is known
//! by its path alone.
//!
//! Promises: a disk whose name is known is never taken for another, and is found under any path of this machine; where it is
//! nowhere, or twice (paths of a multipath disk), that is an error with names. Never: writes to a disk, or opens one for writing.

use std::path::{Path, PathBuf};

use common::format::state::SourceIdentity;

use super::Source;
use super::error::CaptureError;

/// Block devices of this machine, partitions too.
const SYS_CLASS_BLOCK: &str = "/sys/class/block";
/// Links from partition UUIDs to devices.
const BY_PARTUUID: &str = "/dev/disk/by-partuuid";

/// A disk that was found.
#[derive(Debug)]
pub struct Found {
    /// It, open for reading.
    pub source: Source,
    /// Where it is now, where that is not the path that was given.
    pub moved_to: Option<PathBuf>,
}

/// Opens the disk at `path`; where that is not the one `recorded`, the one recorded, wherever it is.
///
/// # Errors
/// Those of [`Source::open`]; [`CaptureError::Replaced`] where another disk is at the path and the recorded one is nowhere;
/// [`CaptureError::Gone`] where nothing is at the path and it is nowhere else either; [`CaptureError::Twice`].
pub fn open(path: &Path, recorded: Option<&SourceIdentity>) -> Result<Found, CaptureError> {
    let opened = Source::open(path);
    let Some(SourceIdentity::Device { serial }) = recorded.filter(|recorded| names(recorded)) else {
        return Ok(Found { source: opened?, moved_to: None });
    };
    let at_path = match opened {
        Ok(source) => match source.identity() {
            // One that states no name may be it: then size and content decide.
            SourceIdentity::Device { serial: found } if found == serial || found.is_empty() => {
                return Ok(Found { source, moved_to: None });
            }
            SourceIdentity::Device { serial: found } => Some(found.clone()),
            SourceIdentity::File { .. } => return Ok(Found { source, moved_to: None }),
        },
        Err(CaptureError::Missing { .. }) => None,
        Err(error) => return Err(error),
    };
    let places = search(Path::new(SYS_CLASS_BLOCK), serial);
    match places.as_slice() {
        [place] => Ok(Found { source: Source::open(place)?, moved_to: Some(place.clone()) }),
        [] => Err(match at_path {
            Some(found) => CaptureError::Replaced { path: path.to_owned(), expected: serial.clone(), found },
            None => CaptureError::Gone { path: path.to_owned(), serial: serial.clone() },
        }),
        several => Err(CaptureError::Twice {
            path: path.to_owned(),
            serial: serial.clone(),
            places: several.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join(", "),
        }),
    }
}

fn names(identity: &SourceIdentity) -> bool {
    matches!(identity, SourceIdentity::Device { serial } if !serial.is_empty())
}

/// Devices below `class` that bear this name, as paths under `/dev`.
fn search(class: &Path, serial: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(class).into_iter().flatten().flatten();
    let mut places: Vec<PathBuf> = entries
        .filter(|entry| name_of(&entry.path()) == serial)
        // The kernel writes `cciss!c0d0` for what is `/dev/cciss/c0d0`.
        .map(|entry| Path::new("/dev").join(entry.file_name().to_string_lossy().replace('!', "/")))
        .collect();
    places.sort();
    places
}

/// What names the device of this sysfs directory across reboots, as far as the kernel knows it; empty where it does not.
pub(super) fn name_of(sysfs: &Path) -> String {
    let read = |path: PathBuf| clean(&std::fs::read_to_string(path).ok()?);
    let partition = read(sysfs.join("partition"));
    // Links of /sys/class/block and /sys/dev/block lead to the device's directory, which lies in its disk's.
    let disk = if partition.is_some() { sysfs.join("..") } else { sysfs.to_owned() };
    let disk = disk.canonicalize().unwrap_or(disk);
    let disk = match partition {
        Some(_) => sysfs.canonicalize().ok().and_then(|own| own.parent().map(Path::to_owned)).unwrap_or(disk),
        None => disk,
    };
    let found = ["wwid", "device/wwid", "serial", "device/serial", "dm/uuid", "md/uuid"]
        .iter()
        .find_map(|name| read(disk.join(name)));
    match (found, partition) {
        (Some(serial), Some(partition)) => format!("{serial} partition {partition}"),
        (Some(serial), None) => serial,
        (None, Some(_)) => partition_uuid(sysfs).map(|uuid| format!("partuuid {uuid}")).unwrap_or_default(),
        (None, None) => String::new(),
    }
}

/// A partition's UUID: from the kernel where it tells, else from the links that udev keeps.
fn partition_uuid(sysfs: &Path) -> Option<String> {
    let uevent = std::fs::read_to_string(sysfs.join("uevent")).unwrap_or_default();
    let told = uevent.lines().find_map(|line| line.strip_prefix("PARTUUID="));
    if let Some(uuid) = told.and_then(clean) {
        return Some(uuid);
    }
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    let device = Path::new("/dev").join(name).canonicalize().ok()?;
    let links = std::fs::read_dir(BY_PARTUUID).into_iter().flatten().flatten();
    let mut own = links.filter(|link| link.path().canonicalize().is_ok_and(|target| target == device));
    own.next().and_then(|link| clean(&link.file_name().to_string_lossy()))
}

/// A name as it is kept: no control characters, at most 60 characters; `None` for nothing.
fn clean(text: &str) -> Option<String> {
    let text: String = text.trim().chars().filter(|character| !character.is_control()).take(60).collect();
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sysfs of disks: name, file, content.
    fn sysfs(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for (path, content) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().expect("it has one")).expect("made");
            std::fs::write(path, content).expect("writable");
        }
        dir
    }

    #[test]
    fn a_disk_is_named_by_the_first_of_wwn_serial_and_uuid_and_a_partition_by_its_disk() {
        let dir = sysfs(&[
            ("sda/wwid", "naa.5000c500a\n"),
            ("sda/device/serial", "S1\n"),
            ("vda/serial", "  V-7 \n"),
            ("dm-0/dm/uuid", "LVM-abc\n"),
            ("sda/sda2/partition", "2\n"),
            ("vdb/vdb1/partition", "1\n"),
            ("vdb/vdb1/uevent", "DEVNAME=vdb1\nPARTUUID=1234-01\n"),
            ("loop0/size", "8\n"),
        ]);
        let name = |path: &str| name_of(&dir.path().join(path));
        assert_eq!(name("sda"), "naa.5000c500a");
        assert_eq!(name("vda"), "V-7");
        assert_eq!(name("dm-0"), "LVM-abc");
        assert_eq!(name("sda/sda2"), "naa.5000c500a partition 2");
        assert_eq!(name("vdb/vdb1"), "partuuid 1234-01");
        assert_eq!(name("loop0"), "");
    }

    #[test]
    fn a_disk_is_found_under_its_new_path_and_one_seen_twice_is_told() {
        let dir = sysfs(&[("sda/wwid", "other"), ("sdb/wwid", "mine"), ("cciss!c0d0/wwid", "third")]);
        assert_eq!(search(dir.path(), "mine"), [PathBuf::from("/dev/sdb")]);
        assert_eq!(search(dir.path(), "third"), [PathBuf::from("/dev/cciss/c0d0")]);
        assert!(search(dir.path(), "nowhere").is_empty());
        std::fs::create_dir(dir.path().join("sdc")).expect("made");
        std::fs::write(dir.path().join("sdc/wwid"), "mine\n").expect("writable");
        assert_eq!(search(dir.path(), "mine").len(), 2);
    }

    #[test]
    fn a_missing_disk_with_a_name_is_gone_and_a_file_needs_none() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("disk.img");
        let recorded = SourceIdentity::Device { serial: "no such disk on any machine".into() };
        assert!(matches!(open(&path, Some(&recorded)), Err(CaptureError::Gone { .. })));
        assert!(matches!(open(&path, None), Err(CaptureError::Missing { .. })));
        std::fs::write(&path, vec![0; 8192]).expect("writable");
        let found = open(&path, Some(&SourceIdentity::File { device: 1, inode: 2 })).expect("a copy of a file is fine");
        assert_eq!(found.moved_to, None);
    }
}
