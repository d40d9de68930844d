//! An NBD export as a file: what a kernel without an NBD client mounts, by way of a loop device.
//!
//! Not of one with direct I/O: over FUSE the kernel's loop driver mixes up scattered pages then, whatever serves the file (seen
//! with 6.18, nbdkit below, fio's checksums above).

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::pair::wait_for;

/// A file that is an NBD export, by QEMU's storage daemon. Taken down when dropped.
#[derive(Debug)]
pub struct FuseExport {
    /// The file.
    pub file: PathBuf,
    daemon: Child,
}

impl FuseExport {
    /// Serves the export `disk` of `socket` as `file`, which is made. For two minutes it waits for a server that went away.
    ///
    /// # Panics
    /// If there is no such export, no FUSE, or no `qemu-storage-daemon`.
    #[must_use]
    pub fn start(socket: &Path, file: &Path) -> Self {
        std::fs::write(file, []).expect("a mount point");
        let mut daemon = Command::new("qemu-storage-daemon");
        daemon.arg("--blockdev").arg(format!(
            "driver=nbd,node-name=disk,server.type=unix,server.path={},export=disk,reconnect-delay=120",
            socket.display()
        ));
        daemon
            .arg("--export")
            .arg(format!("type=fuse,id=fuse,node-name=disk,mountpoint={},writable=on", file.display()));
        let daemon = daemon.stdin(Stdio::null()).spawn().expect("qemu-storage-daemon is installed by make deps");
        wait_for("the FUSE export", || (std::fs::metadata(file).ok()?.len() > 0).then_some(()));
        Self { file: file.to_owned(), daemon }
    }
}

impl Drop for FuseExport {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(
            rustix::process::Pid::from_child(&self.daemon),
            rustix::process::Signal::TERM,
        );
        let ended = (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            self.daemon.try_wait().is_ok_and(|status| status.is_some())
        });
        if !ended {
            let _ = self.daemon.kill();
            let _ = self.daemon.wait();
        }
        let _ = Command::new("umount").arg("-l").arg(&self.file).output();
    }
}
