//! Mounts of tests: small, full or read-only file systems. Unmounted when dropped.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::pair::check;

/// A mounted tmpfs.
#[derive(Debug)]
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Mounts a tmpfs of at most `bytes` bytes at `path`, which is made.
    ///
    /// # Panics
    /// Without root.
    #[must_use]
    pub fn mount(path: &Path, bytes: u64) -> Self {
        std::fs::create_dir_all(path).expect("the mount point can be made");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"]).arg(path);
        check("mount (tests need root)", &mount.output().expect("util-linux is installed"));
        Self(path.to_owned())
    }

    /// Makes it read-only.
    ///
    /// # Panics
    /// Where the kernel refuses.
    pub fn read_only(&self) {
        let remount = Command::new("mount").args(["-o", "remount,ro"]).arg(&self.0).output();
        check("remount", &remount.expect("util-linux is installed"));
    }

    /// Fills what is left with one file.
    pub fn fill(&self) {
        use std::io::Write;
        let mut file = std::fs::File::create(self.0.join("filler")).expect("a file can be made");
        let mut size = 1 << 20;
        while size > 0 {
            if file.write_all(&vec![0; size]).is_err() {
                size /= 2;
            }
        }
    }

    /// Removes what [`Self::fill`] made.
    ///
    /// # Panics
    /// If it was not filled.
    pub fn free(&self) {
        std::fs::remove_file(self.0.join("filler")).expect("it was filled");
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}
