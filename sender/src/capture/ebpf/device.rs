//! What a block device is: its place on its disk, and what tells it from another that gets the same number later.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use common::ids::Geometry;

use super::super::find;
use super::error::TrackerError;

const SECTOR_BYTES: u64 = 512;

/// How a device takes its writes, hence which tracepoints tell of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// Requests of a whole disk, also where a partition is written: disks, loop devices, network block devices.
    Requests,
    /// Bios, handed on to other devices: device mapper, md, and drivers without a queue.
    Bios,
}

/// A block device as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceId {
    /// Path that it was named by.
    pub path: PathBuf,
    /// Its own number, major and minor.
    pub number: (u32, u32),
    /// The number of the whole disk; the same unless it is a partition.
    pub disk_number: (u32, u32),
    /// Kernel's name of the whole disk (`sda`, `loop0`).
    pub disk_name: String,
    /// Number of the partition; `None` for a whole disk.
    pub partition: Option<u32>,
    /// First sector on its disk, in units of 512 bytes.
    pub start_sector: u64,
    /// Exact size in bytes.
    pub bytes: u64,
    /// Serial number or WWN; empty where the kernel knows none.
    pub serial: String,
    /// The kernel's number of this disk's life: another disk, or another file behind a loop device, has another. `None`
    /// before Linux 5.15.
    pub disk_sequence: Option<u64>,
    /// How it takes writes.
    pub kind: DeviceKind,
}

impl DeviceId {
    /// Asks the system about the device at `path`.
    ///
    /// # Errors
    /// [`TrackerError::NotADevice`], [`TrackerError::Device`]; [`TrackerError::Unsupported`] for a size of no disk.
    pub fn of(path: &Path) -> Result<Self, TrackerError> {
        let metadata = std::fs::metadata(path).map_err(TrackerError::device("look at the device", path))?;
        if !metadata.file_type().is_block_device() {
            return Err(TrackerError::NotADevice { path: path.to_owned() });
        }
        let number = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
        let link = PathBuf::from(format!("/sys/dev/block/{}:{}", number.0, number.1));
        let own = std::fs::canonicalize(&link).map_err(TrackerError::device("find the device", &link))?;
        let partition = read_number(&own.join("partition")).and_then(|found| u32::try_from(found).ok());
        let disk = if partition.is_some() { own.parent().unwrap_or(&own).to_owned() } else { own.clone() };
        let start_sector = if partition.is_some() { required(&own.join("start"))? } else { 0 };
        let bytes = required(&own.join("size"))? * SECTOR_BYTES;
        let disk_number = parse_number_pair(&disk.join("dev"))?;
        let kind = if disk.join("mq").exists() { DeviceKind::Requests } else { DeviceKind::Bios };
        let device = Self {
            path: path.to_owned(),
            number,
            disk_number,
            disk_name: disk.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            partition,
            start_sector,
            bytes,
            serial: find::name_of(&own),
            disk_sequence: read_number(&disk.join("diskseq")),
            kind,
        };
        device.geometry()?;
        Ok(device)
    }

    /// How it divides into pages.
    ///
    /// # Errors
    /// [`TrackerError::Unsupported`] where it is empty (a loop device without a file) or too large.
    pub fn geometry(&self) -> Result<Geometry, TrackerError> {
        Geometry::new(self.bytes).ok_or_else(|| TrackerError::Unsupported {
            path: self.path.clone(),
            reason: format!("its size is {} bytes", self.bytes),
        })
    }

    /// The system's folder about the whole disk.
    #[must_use]
    pub fn disk_folder(&self) -> PathBuf {
        PathBuf::from(format!("/sys/dev/block/{}:{}", self.disk_number.0, self.disk_number.1))
    }

    /// Checks that the same disk, at the same place and of the same size, is still behind the device's number.
    ///
    /// # Errors
    /// [`TrackerError::Replaced`].
    pub fn check(&self) -> Result<(), TrackerError> {
        let replaced = |reason: String| TrackerError::Replaced { path: self.path.clone(), reason };
        let own = PathBuf::from(format!("/sys/dev/block/{}:{}", self.number.0, self.number.1));
        let size = read_number(&own.join("size")).ok_or_else(|| replaced("the device is gone".to_owned()))?;
        if size * SECTOR_BYTES != self.bytes {
            return Err(replaced(format!("its size was {} bytes and is {}", self.bytes, size * SECTOR_BYTES)));
        }
        let start = read_number(&own.join("start")).unwrap_or(0);
        if self.partition.is_some() && start != self.start_sector {
            return Err(replaced(format!("it began at sector {} and begins at {start}", self.start_sector)));
        }
        let sequence = read_number(&self.disk_folder().join("diskseq"));
        if sequence != self.disk_sequence {
            let text = |value: Option<u64>| value.map_or_else(|| "unknown".to_owned(), |value| value.to_string());
            return Err(replaced(format!(
                "disk sequence number was {} and is {}",
                text(self.disk_sequence),
                text(sequence)
            )));
        }
        Ok(())
    }
}

/// What must be the same for marks to be believed after a restart. Kept as text beside the maps, so that a difference can be
/// told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity(Vec<(&'static str, String)>);

/// What an identity says about pins found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    Same,
    /// The same disk and boot, tracked by other programs: an older release's.
    OtherProgram,
    Different(String),
}

impl Identity {
    pub(super) fn of(device: &DeviceId, program: &str) -> Result<Self, TrackerError> {
        let path = Path::new("/proc/sys/kernel/random/boot_id");
        let boot = std::fs::read_to_string(path).map_err(TrackerError::device("read the boot id", path))?;
        let sequence = device.disk_sequence.map_or_else(|| "unknown".to_owned(), |value| value.to_string());
        Ok(Self(vec![
            ("boot id", boot.trim().to_owned()),
            ("disk sequence number", sequence),
            ("device number", format!("{}:{}", device.number.0, device.number.1)),
            ("disk", format!("{}:{}", device.disk_number.0, device.disk_number.1)),
            ("first sector", device.start_sector.to_string()),
            ("size in bytes", device.bytes.to_string()),
            ("serial number", device.serial.clone()),
            ("program", program.to_owned()),
        ]))
    }

    pub(super) fn text(&self) -> String {
        self.0.iter().map(|(name, value)| format!("{name}={value}\n")).collect()
    }

    /// Names the disk and boot, whatever program tracks it.
    pub(super) fn digest(&self) -> [u8; 32] {
        let text: String = self
            .0
            .iter()
            .filter(|(name, _)| *name != "program")
            .map(|(name, value)| format!("{name}={value}\n"))
            .collect();
        *blake3::hash(text.as_bytes()).as_bytes()
    }

    /// Compares with the text found beside pins.
    pub(super) fn compare(&self, found: &str) -> Comparison {
        let of = |name: &str| {
            found.lines().find_map(|line| line.split_once('=').filter(|(key, _)| *key == name)).map(|(_, value)| value)
        };
        let mut other_program = false;
        for (name, expected) in &self.0 {
            match of(name) {
                Some(found) if found == expected => {}
                _ if *name == "program" => other_program = true,
                found => {
                    let found = found.unwrap_or("not stated");
                    return Comparison::Different(format!("{name} was {found} and is {expected}"));
                }
            }
        }
        if other_program { Comparison::OtherProgram } else { Comparison::Same }
    }
}

pub(super) fn read_number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn required(path: &Path) -> Result<u64, TrackerError> {
    let text = std::fs::read_to_string(path).map_err(TrackerError::device("read", path))?;
    text.trim()
        .parse()
        .map_err(|_| TrackerError::device("read a number from", path)(std::io::ErrorKind::InvalidData.into()))
}

fn parse_number_pair(path: &Path) -> Result<(u32, u32), TrackerError> {
    let text = std::fs::read_to_string(path).map_err(TrackerError::device("read", path))?;
    text.trim()
        .split_once(':')
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
        .ok_or_else(|| TrackerError::device("read a device number from", path)(std::io::ErrorKind::InvalidData.into()))
}
