//! A disk whose power can be cut: an ext4 on a loop device on a file of a FUSE file system that forgets what was not synced.
//!
//! Writes go to memory and become stable at the next flush alone, as with a real disk's write cache. At a power cut the disk
//! answers nothing any more but errors; what a disk might hold then is what was stable and a chosen part of the rest, in
//! any order, some of it torn between sectors. Killing a process can't show a missing fsync, since the page cache lives on;
//! this can.
//!
//! Needs root, `/dev/fuse`, a loop device and e2fsprogs. All of it is taken down when dropped.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, UNIX_EPOCH};

use fuser::{
    BackgroundSession, FileAttr, FileType, Filesystem, MountOption, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request,
};
use rustix::io::Errno;

use crate::images::{PAGE, Random};
use crate::pair::{check, wait_for};

const SECTOR: usize = 512;
const ROOT: u64 = 1;
const DISK: u64 = 2;
const NAME: &str = "disk";
const TTL: Duration = Duration::from_secs(3600);

/// What becomes of unsynced pages at a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsynced {
    /// None of them was written.
    Lost,
    /// Each was written or not, or in part, by the dice of this seed.
    Dice(u64),
    /// Each was written, but for one in sixteen by the dice of this seed: what followed a page is there and the page is not.
    MostlyKept(u64),
}

/// The medium and its cache.
#[derive(Debug)]
struct Medium {
    stable: File,
    bytes: u64,
    /// Pages written and not flushed.
    cache: BTreeMap<u64, Box<[u8; PAGE]>>,
    /// Without power all is an error.
    powered: bool,
}

impl Medium {
    fn read_page(&self, page: u64) -> std::io::Result<Box<[u8; PAGE]>> {
        if let Some(cached) = self.cache.get(&page) {
            return Ok(cached.clone());
        }
        let mut content = Box::new([0; PAGE]);
        self.stable.read_exact_at(content.as_mut_slice(), page * PAGE as u64)?;
        Ok(content)
    }

    /// Calls `each` with the page, the range in it and the range in a buffer, for `len` bytes at `offset` within the disk.
    fn pieces(&self, offset: u64, len: usize) -> Vec<(u64, std::ops::Range<usize>, std::ops::Range<usize>)> {
        let len = len.min(usize::try_from(self.bytes.saturating_sub(offset)).unwrap_or(usize::MAX));
        let (mut pieces, mut done) = (Vec::new(), 0);
        while done < len {
            let at = offset + done as u64;
            let start = usize::try_from(at % PAGE as u64).expect("below a page");
            let count = (PAGE - start).min(len - done);
            pieces.push((at / PAGE as u64, start..start + count, done..done + count));
            done += count;
        }
        pieces
    }

    fn read(&self, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
        let mut out = Vec::with_capacity(len);
        for (page, within, _) in self.pieces(offset, len) {
            out.extend_from_slice(&self.read_page(page)?[within]);
        }
        Ok(out)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> std::io::Result<usize> {
        let mut written = 0;
        for (page, within, from) in self.pieces(offset, bytes.len()) {
            let mut content = self.read_page(page)?;
            written = from.end;
            content[within].copy_from_slice(&bytes[from]);
            self.cache.insert(page, content);
        }
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        for (page, content) in std::mem::take(&mut self.cache) {
            self.stable.write_all_at(content.as_slice(), page * PAGE as u64)?;
        }
        Ok(())
    }

    /// Leaves on the medium what a disk might hold after a power cut, and empties the cache.
    fn settle(&mut self, unsynced: Unsynced) -> std::io::Result<()> {
        let cache = std::mem::take(&mut self.cache);
        let (seed, lost, torn) = match unsynced {
            Unsynced::Lost => return Ok(()),
            Unsynced::Dice(seed) => (seed, 8, 2),
            Unsynced::MostlyKept(seed) => (seed, 1, 0),
        };
        let mut dice = Random(seed);
        for (page, content) in cache {
            let roll = dice.below(16);
            let sectors = match roll {
                _ if roll < lost => 0..0,
                _ if roll < 16 - torn => 0..PAGE / SECTOR,
                // Torn: a disk writes sectors, not pages.
                _ => 0..usize::try_from(dice.below(PAGE as u64 / SECTOR as u64)).expect("small"),
            };
            let bytes = sectors.start * SECTOR..sectors.end * SECTOR;
            self.stable.write_all_at(&content[bytes], page * PAGE as u64)?;
        }
        Ok(())
    }
}

/// The file system with one file.
struct OneFile(Arc<Mutex<Medium>>);

fn lock(medium: &Mutex<Medium>) -> MutexGuard<'_, Medium> {
    medium.lock().unwrap_or_else(PoisonError::into_inner)
}

impl OneFile {
    fn attributes(&self, inode: u64) -> FileAttr {
        let (kind, size, perm) = if inode == ROOT {
            (FileType::Directory, 0, 0o700)
        } else {
            (FileType::RegularFile, lock(&self.0).bytes, 0o600)
        };
        FileAttr {
            ino: inode,
            size,
            blocks: size / SECTOR as u64,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// Runs `act` on the medium while it has power.
    fn powered<T>(&self, act: impl FnOnce(&mut Medium) -> std::io::Result<T>) -> Result<T, i32> {
        let mut medium = lock(&self.0);
        if !medium.powered {
            return Err(Errno::IO.raw_os_error());
        }
        act(&mut medium).map_err(|error| error.raw_os_error().unwrap_or(Errno::IO.raw_os_error()))
    }
}

impl Filesystem for OneFile {
    fn lookup(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, reply: ReplyEntry) {
        if parent == ROOT && name == NAME {
            reply.entry(&TTL, &self.attributes(DISK), 0);
        } else {
            reply.error(Errno::NOENT.raw_os_error());
        }
    }

    fn getattr(&mut self, _: &Request<'_>, inode: u64, _: Option<u64>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(inode));
    }

    fn open(&mut self, _: &Request<'_>, _: u64, _: i32, reply: ReplyOpen) {
        reply.opened(0, 0);
    }

    fn read(
        &mut self,
        _: &Request<'_>,
        _: u64,
        _: u64,
        offset: i64,
        size: u32,
        _: i32,
        _: Option<u64>,
        reply: ReplyData,
    ) {
        let offset = u64::try_from(offset).unwrap_or(0);
        match self.powered(|medium| medium.read(offset, size as usize)) {
            Ok(bytes) => reply.data(&bytes),
            Err(errno) => reply.error(errno),
        }
    }

    fn write(
        &mut self,
        _: &Request<'_>,
        _: u64,
        _: u64,
        offset: i64,
        bytes: &[u8],
        _: u32,
        _: i32,
        _: Option<u64>,
        reply: ReplyWrite,
    ) {
        let offset = u64::try_from(offset).unwrap_or(0);
        match self.powered(|medium| medium.write(offset, bytes)) {
            Ok(written) => reply.written(u32::try_from(written).unwrap_or(u32::MAX)),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(&mut self, _: &Request<'_>, _: u64, _: u64, _: u64, reply: ReplyEmpty) {
        reply.ok(); // close(2) is no promise of anything
    }

    fn fsync(&mut self, _: &Request<'_>, _: u64, _: u64, _: bool, reply: ReplyEmpty) {
        match self.powered(Medium::flush) {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }
}

/// A disk that answers nothing.
#[derive(Debug)]
pub struct Stall<'a> {
    _medium: MutexGuard<'a, Medium>,
}

/// An ext4 on a disk whose power can be cut.
#[derive(Debug)]
pub struct LossyDisk {
    /// Holds the medium's file and the FUSE mount point.
    dir: tempfile::TempDir,
    medium: Arc<Mutex<Medium>>,
    mount_point: PathBuf,
    session: Option<BackgroundSession>,
    device: Option<String>,
    mounted: bool,
}

impl LossyDisk {
    /// Makes an ext4 of `bytes` bytes (whole pages) and mounts it at `mount_point`, which is made.
    ///
    /// # Panics
    /// Without root, `/dev/fuse`, loop devices or e2fsprogs.
    #[must_use]
    pub fn create(mount_point: &Path, bytes: u64) -> Self {
        assert!(Path::new("/dev/fuse").exists(), "power cuts are tested with FUSE, and there is no /dev/fuse here");
        assert!(
            rustix::process::geteuid().is_root(),
            "power cuts are tested with loop devices and mounts: run as root"
        );
        assert_eq!(bytes % PAGE as u64, 0, "a disk is whole pages");
        let dir = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
        let path = dir.path().join("medium");
        let stable = File::options().read(true).write(true).create_new(true).open(&path).expect("a file");
        stable.set_len(bytes).expect("sparse files");
        let mut mkfs = Command::new("mkfs.ext4");
        // Blocks as large as the cache's pages also on a small disk, so that a lost page of the disk is one of a file.
        mkfs.args(["-q", "-F", "-b", "4096", "-m", "0", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"])
            .arg(&path);
        check("mkfs.ext4", &mkfs.output().expect("e2fsprogs is installed"));
        std::fs::create_dir_all(mount_point).expect("the mount point can be made");
        let medium = Medium { stable, bytes, cache: BTreeMap::new(), powered: true };
        let mut disk = Self {
            dir,
            medium: Arc::new(Mutex::new(medium)),
            mount_point: mount_point.to_owned(),
            session: None,
            device: None,
            mounted: false,
        };
        disk.attach();
        disk
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.mount_point
    }

    /// Pages that the disk was given and that no flush has made stable.
    #[must_use]
    pub fn unsynced_pages(&self) -> usize {
        lock(&self.medium).cache.len()
    }

    /// Has the kernel hand what it holds in its page cache to the disk, as it does by itself now and then: into the disk's
    /// cache, with no flush. Without it few unsynced pages get as far as the disk.
    pub fn write_back(&self) {
        let mut folders = vec![self.mount_point.clone()];
        while let Some(folder) = folders.pop() {
            // Files come and go under a running process.
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                    Ok(kind) if kind.is_file() => {
                        let Ok(file) = File::open(entry.path()) else { continue };
                        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
                    }
                    _ => {}
                }
            }
        }
    }

    /// Takes the power away, now: from here on each request fails, and nothing becomes stable any more. End the processes that
    /// use the disk, then call [`Self::restore_power`].
    pub fn cut_power(&self) {
        lock(&self.medium).powered = false;
    }

    /// As [`Self::cut_power`], as soon as the disk holds at least `pages` unsynced pages: between a write and its flush, where
    /// an order that nobody asked for would show. Waits no longer than `patience`, and cuts then too. Returns the number of
    /// unsynced pages.
    pub fn cut_power_in_flight(&self, pages: usize, patience: Duration) -> usize {
        let deadline = Instant::now() + patience;
        loop {
            let mut medium = lock(&self.medium);
            if medium.cache.len() >= pages || Instant::now() >= deadline {
                medium.powered = false;
                return medium.cache.len();
            }
            drop(medium);
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Has every request to the disk wait, for as long as what is returned lives.
    #[must_use]
    pub fn stall(&self) -> Stall<'_> {
        Stall { _medium: lock(&self.medium) }
    }

    /// Gives the power back to a disk that lost it, and mounts what is on it then; the journal is replayed.
    ///
    /// # Panics
    /// If it can't be mounted.
    pub fn restore_power(&mut self, unsynced: Unsynced) {
        self.cut_power();
        self.detach();
        let mut medium = lock(&self.medium);
        medium.settle(unsynced).expect("the medium's file takes it");
        // The old file system's thread may live on with its handle; it must not reach the disk of the next life.
        let next = Medium {
            stable: medium.stable.try_clone().expect("a second handle"),
            bytes: medium.bytes,
            cache: BTreeMap::new(),
            powered: true,
        };
        drop(medium);
        self.medium = Arc::new(Mutex::new(next));
        self.attach();
    }

    /// Unmounts in order and checks the file system.
    ///
    /// # Panics
    /// If `e2fsck` finds anything.
    pub fn check(mut self) {
        self.detach();
        let output = Command::new("e2fsck").arg("-fn").arg(self.dir.path().join("medium")).output();
        check("e2fsck", &output.expect("e2fsprogs is installed"));
    }

    fn attach(&mut self) {
        let fuse = self.fuse();
        std::fs::create_dir_all(&fuse).expect("a mount point");
        let options = [MountOption::FSName("lossy".to_owned()), MountOption::NoAtime];
        let session = fuser::spawn_mount2(OneFile(Arc::clone(&self.medium)), &fuse, &options);
        self.session = Some(session.expect("FUSE mounts (tests need root)"));
        let losetup = Command::new("losetup").args(["--find", "--show"]).arg(fuse.join(NAME)).output();
        let output = losetup.expect("util-linux is installed");
        check("losetup (tests need root and loop devices)", &output);
        let device = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        self.device = Some(device.clone());
        // A long commit interval: what is stable shall be what somebody asked for.
        let mount =
            Command::new("mount").args(["-t", "ext4", "-o", "commit=300", &device]).arg(&self.mount_point).output();
        check("mount after a power cut or the first time", &mount.expect("util-linux is installed"));
        self.mounted = true;
    }

    fn fuse(&self) -> PathBuf {
        self.dir.path().join("fuse")
    }

    /// Takes down mount, loop device and FUSE, in this order, whatever state they are in.
    fn detach(&mut self) {
        let run = |program: &str, args: &[&OsStr]| {
            Command::new(program).args(args).output().is_ok_and(|output| output.status.success())
        };
        if std::mem::take(&mut self.mounted) && !run("umount", &[self.mount_point.as_os_str()]) {
            run("umount", &["-l".as_ref(), self.mount_point.as_os_str()]);
        }
        if let Some(device) = self.device.take() {
            run("losetup", &["-d".as_ref(), device.as_ref()]);
            if !std::thread::panicking() {
                let backing = format!("/sys/block/{}/loop/backing_file", device.trim_start_matches("/dev/"));
                let ours = self.fuse().join(NAME);
                wait_for("the loop device to let go", || {
                    // The number may be another test's by now.
                    let file = std::fs::read_to_string(&backing).unwrap_or_default();
                    (!file.starts_with(&*ours.to_string_lossy())).then_some(())
                });
            }
        }
        if let Some(session) = self.session.take() {
            run("umount", &["-l".as_ref(), self.fuse().as_os_str()]);
            drop(session);
        }
    }
}

impl Drop for LossyDisk {
    fn drop(&mut self) {
        self.cut_power();
        self.detach();
    }
}
