//! What may be overwritten: is a block device mounted, in use, or not empty?

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// Bytes looked at, at both ends of a device.
const ENDS_BYTES: u64 = 4 << 20;
/// Places looked at in between, and bytes at each.
const SAMPLES: u64 = 128;
const SAMPLE_BYTES: u64 = 64 << 10;
const CHUNK_BYTES: usize = 1 << 20;

/// Major and minor number.
type DeviceNumber = (u32, u32);

fn number(rdev: u64) -> DeviceNumber {
    (rustix::fs::major(rdev), rustix::fs::minor(rdev))
}

/// Who uses the block device at `path`, if anybody does: a mount, swap, or a device built on it or on a partition of it.
///
/// # Errors
/// Those of `stat` on the device itself; what `/proc` and `/sys` don't show is not known.
pub fn in_use(path: &Path) -> io::Result<Option<String>> {
    let own = number(std::fs::metadata(path)?.rdev());
    let family = family(own);
    if let Ok(mounts) = std::fs::read_to_string("/proc/self/mountinfo")
        && let Some(place) = mounted(&mounts, &family)
    {
        return Ok(Some(format!("mounted on {place}")));
    }
    if let Ok(swaps) = std::fs::read_to_string("/proc/swaps") {
        for line in swaps.lines().skip(1) {
            let device = line.split_whitespace().next().unwrap_or_default();
            let used = std::fs::metadata(device)
                .is_ok_and(|m| m.file_type().is_block_device() && family.contains(&number(m.rdev())));
            if used {
                return Ok(Some(format!("used as swap ({device})")));
            }
        }
    }
    for (major, minor) in &family {
        let holders = format!("/sys/dev/block/{major}:{minor}/holders");
        if let Ok(mut holders) = std::fs::read_dir(holders)
            && let Some(Ok(holder)) = holders.next()
        {
            return Ok(Some(format!("used by {}", holder.file_name().to_string_lossy())));
        }
    }
    Ok(None)
}

/// A device and its partitions.
fn family(own: DeviceNumber) -> BTreeSet<DeviceNumber> {
    let mut family = BTreeSet::from([own]);
    let folder = PathBuf::from(format!("/sys/dev/block/{}:{}", own.0, own.1));
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().join("partition").exists()
            && let Ok(text) = std::fs::read_to_string(entry.path().join("dev"))
        {
            family.extend(parse_number(text.trim()));
        }
    }
    family
}

fn parse_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The mount point of any of these devices in the text of a `mountinfo` file.
fn mounted(mountinfo: &str, devices: &BTreeSet<DeviceNumber>) -> Option<String> {
    mountinfo.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let device = parse_number(fields.nth(2)?)?;
        let place = fields.nth(1)?;
        devices.contains(&device).then(|| place.replace("\\040", " "))
    })
}

/// What a device holds, if anything was found: its ends are read whole, the rest in samples.
///
/// # Errors
/// Those of reading.
pub fn content(device: &File, bytes: u64) -> io::Result<Option<String>> {
    let mut start = vec![0; usize::try_from(bytes.min(ENDS_BYTES)).unwrap_or(0)];
    device.read_exact_at(&mut start, 0)?;
    if let Some(name) = signature(&start) {
        return Ok(Some(name.to_owned()));
    }
    let step = (bytes / SAMPLES).max(SAMPLE_BYTES);
    let samples = (0..SAMPLES).map(|sample| sample * step).filter(|at| at + SAMPLE_BYTES <= bytes);
    let mut places: Vec<(u64, u64)> = samples.map(|at| (at, SAMPLE_BYTES)).collect();
    places.push((0, bytes.min(ENDS_BYTES)));
    places.push((bytes.saturating_sub(ENDS_BYTES), bytes.min(ENDS_BYTES)));
    for (at, len) in places {
        if let Some(at) = first_non_zero(device, at, len)? {
            return Ok(Some(format!("data at byte {at}")));
        }
    }
    Ok(None)
}

/// True where the first `len` bytes are all zero.
///
/// # Errors
/// Those of reading.
pub fn starts_with_zeros(device: &File, len: u64) -> io::Result<bool> {
    Ok(first_non_zero(device, 0, len)?.is_none())
}

/// Where the first byte that is not zero lies among `len` bytes from `start` on.
///
/// # Errors
/// Those of reading.
pub fn first_non_zero(device: &File, start: u64, len: u64) -> io::Result<Option<u64>> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let (mut at, end) = (start, start + len);
    while at < end {
        let part = &mut chunk[..usize::try_from(end - at).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES)];
        device.read_exact_at(part, at)?;
        if let Some(found) = part.iter().position(|byte| *byte != 0) {
            return Ok(Some(at + found as u64));
        }
        at += part.len() as u64;
    }
    Ok(None)
}

/// What a disk that starts with these bytes holds, for those kinds that people keep.
fn signature(start: &[u8]) -> Option<&'static str> {
    const SIGNATURES: [(usize, &[u8], &str); 10] = [
        (0x438, &[0x53, 0xef], "an ext file system"),
        (0, b"XFSB", "an XFS file system"),
        (0x10040, b"_BHRfS_M", "a btrfs file system"),
        (512, b"EFI PART", "a GPT partition table"),
        (512, b"LABELONE", "an LVM physical volume"),
        (0, b"LUKS\xba\xbe", "a LUKS volume"),
        (4086, b"SWAPSPACE2", "swap space"),
        (3, b"NTFS    ", "an NTFS file system"),
        (0x52, b"FAT32", "a FAT file system"),
        (510, &[0x55, 0xaa], "a partition table or boot sector"),
    ];
    SIGNATURES.iter().find(|(at, magic, _)| start.get(*at..at + magic.len()) == Some(magic)).map(|(_, _, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn a_mount_of_the_device_or_of_a_partition_is_found() {
        let text = "22 1 253:0 / / rw - ext4 /dev/vda rw\n30 22 7:3 / /mnt/a\\040b rw - xfs /dev/loop3 rw\n";
        assert_eq!(mounted(text, &BTreeSet::from([(7, 2), (7, 3)])).as_deref(), Some("/mnt/a b"));
        assert_eq!(mounted(text, &BTreeSet::from([(7, 2)])), None);
    }

    #[test]
    fn one_byte_at_either_end_or_a_signature_makes_a_device_not_empty() {
        let size = 20_u64 << 20;
        let mut file = tempfile::tempfile().expect("a file");
        file.set_len(size).expect("sized");
        assert_eq!(content(&file, size).expect("read"), None);
        file.write_all_at(&[1], size - 1).expect("written");
        assert_eq!(content(&file, size).expect("read"), Some(format!("data at byte {}", size - 1)));
        file.write_all_at(&[0x53, 0xef], 0x438).expect("written");
        assert_eq!(content(&file, size).expect("read").as_deref(), Some("an ext file system"));
        file.set_len(100).expect("sized");
        file.flush().expect("flushed");
        assert_eq!(content(&file, 100).expect("read"), None);
    }
}
