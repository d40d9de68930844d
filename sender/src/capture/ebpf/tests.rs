//! The tracker on real loop devices, with a file system, partitions, discards, restarts and kills. Needs root and a kernel that
//! can track (`preflight::tests` says what is missing where it can't).

mod marks;
mod restarts;
mod stacked;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::ids::{BlockIndex, PageMask};
use common::limits::{PAGE_BYTES, PAGES_PER_BLOCK};
use common::pages::PageSet;
use rustix::fs::OFlags;

use super::*;
use crate::capture::PageBuffer;

pub(super) const MIB: u64 = 1 << 20;

/// Runs a program; its output where it succeeds.
pub(super) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {}{text}", String::from_utf8_lossy(&output.stderr));
    text
}

/// A loop device with its file, pins and state, all of which go at the end.
pub(super) struct Disk {
    pub(super) folder: tempfile::TempDir,
    pub(super) device: PathBuf,
    pub(super) pins: PathBuf,
}

impl Disk {
    pub(super) fn new(bytes: u64) -> Self {
        let folder = tempfile::Builder::new().prefix("blockferry-ebpf-").tempdir_in("/var/tmp").expect("a directory");
        let file = folder.path().join("disk");
        File::create(&file).and_then(|file| file.set_len(bytes)).expect("a sparse file");
        let device = losetup(&["--partscan"], &file);
        let name = common::ids::VolumeId::from_random(common::rng::random().expect("random bytes")).to_string();
        Self { folder, device, pins: default_directory(&name) }
    }

    pub(super) fn file(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    pub(super) fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    pub(super) fn id(&self) -> DeviceId {
        DeviceId::of(&self.device).expect("a loop device")
    }

    pub(super) fn attach(&self) -> (Tracker, Adopted) {
        Tracker::attach(&self.id(), &self.pins, &self.state()).expect("the kernel tracks")
    }

    /// Attached, with nothing marked and no set saved.
    pub(super) fn tracked(&self) -> Tracker {
        let (mut tracker, adopted) = self.attach();
        assert_eq!(adopted, Adopted::Fresh);
        settled(&mut tracker);
        tracker
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = remove_pins(&self.pins, &self.state());
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).output();
    }
}

/// Attaches `file` to a free loop device.
pub(super) fn losetup(options: &[&str], file: &Path) -> PathBuf {
    let file = file.to_str().expect("UTF-8");
    let arguments: Vec<&str> = ["--find", "--show"].iter().chain(options).copied().chain([file]).collect();
    PathBuf::from(run("losetup", &arguments))
}

/// Takes what udev and others may have written so far, and forgets it and the set of all pages.
pub(super) fn settled(tracker: &mut Tracker) {
    let sequence = tracker.swap().expect("swapped").sequence;
    tracker.forget(sequence).expect("forgotten");
}

pub(super) fn open_direct(path: &Path) -> File {
    let flags = i32::try_from(OFlags::DIRECT.bits()).expect("small");
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).expect("a device with O_DIRECT")
}

/// Reads the whole device, past its page cache.
pub(super) fn read_all(path: &Path) -> Vec<u8> {
    let file = open_direct(path);
    let bytes = DeviceId::of(path).expect("a device").bytes;
    let mut content = Vec::new();
    let mut buffer = PageBuffer::new(1 << 20);
    while (content.len() as u64) < bytes {
        let read = file.read_at(buffer.bytes_mut(), content.len() as u64).expect("read");
        assert!(read > 0);
        content.extend_from_slice(&buffer.bytes()[..read]);
    }
    content
}

/// Writes `length` bytes of `value` at `offset`, past the page cache.
pub(super) fn write_direct(file: &File, offset: u64, length: usize, value: u8) {
    let mut buffer = PageBuffer::new(length);
    buffer.bytes_mut().fill(value);
    assert_eq!(file.write_at(buffer.bytes(), offset).expect("written"), length);
}

/// Page numbers that differ.
pub(super) fn differing(before: &[u8], after: &[u8]) -> Vec<u64> {
    assert_eq!(before.len(), after.len());
    let pages = before.chunks(PAGE_BYTES).zip(after.chunks(PAGE_BYTES));
    (0..).zip(pages).filter(|(_, (before, after))| before != after).map(|(page, _)| page).collect()
}

pub(super) fn contains(pages: &PageSet, page: u64) -> bool {
    let per_block = PAGES_PER_BLOCK as u64;
    pages.mask(BlockIndex(page / per_block)).contains(u32::try_from(page % per_block).expect("below 64"))
}

/// The set of pages `first` up to, not including, `end`.
pub(super) fn range(geometry: Geometry, first: u64, end: u64) -> PageSet {
    let mut pages = PageSet::empty(geometry);
    (first..end).for_each(|page| {
        let per_block = PAGES_PER_BLOCK as u64;
        let bit = u32::try_from(page % per_block).expect("below 64");
        pages.insert(BlockIndex(page / per_block), PageMask::EMPTY.with(bit));
    });
    pages
}

/// A sequence of numbers that looks random, from a seed that is printed.
pub(super) struct Numbers(u64);

impl Numbers {
    pub(super) fn new() -> Self {
        let seed = u64::from_le_bytes(common::rng::random().expect("random bytes")) | 1;
        println!("seed {seed:#x}");
        Self(seed)
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}
