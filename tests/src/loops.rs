//! Loop devices of tests. Detached when dropped.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::pair::{check, wait_for};

/// A loop device over a file.
#[derive(Debug)]
pub struct LoopDevice {
    /// `/dev/loopN`.
    pub device: PathBuf,
    backing: PathBuf,
}

impl LoopDevice {
    /// Attaches one to `backing`, with direct reading and writing of it where `direct`.
    ///
    /// # Panics
    /// Without root or loop devices.
    #[must_use]
    pub fn attach(backing: &Path, direct: bool) -> Self {
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show"]);
        if direct {
            losetup.arg("--direct-io=on");
        }
        let output = losetup.arg(backing).output().expect("util-linux is installed");
        check("losetup (tests need root and loop devices)", &output);
        let device = String::from_utf8_lossy(&output.stdout).trim().into();
        Self { device, backing: backing.to_owned() }
    }

    /// Makes a file system on it: `mkfs.KIND` and its flags.
    ///
    /// # Panics
    /// If that fails.
    pub fn format(&self, mkfs: &str, flags: &[&str]) {
        let output = Command::new(mkfs).args(flags).arg(&self.device).output();
        check(mkfs, &output.expect("make deps installs it"));
    }

    /// Mounts it.
    #[must_use]
    pub fn mount(&self, at: &Path, options: &str) -> Mounted {
        Mounted::mount(&self.device, at, options)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).output();
        if !std::thread::panicking() {
            let name = self.device.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let ours = self.backing.to_string_lossy().into_owned();
            wait_for("the loop device to let go", || {
                let backing = std::fs::read_to_string(format!("/sys/block/{name}/loop/backing_file"));
                (!backing.unwrap_or_default().starts_with(&ours)).then_some(())
            });
        }
    }
}

/// A mounted file system. Unmounted when dropped.
#[derive(Debug)]
pub struct Mounted(PathBuf);

impl Mounted {
    /// Mounts a device or, with `loop` among the options, an image; the mount point is made.
    ///
    /// # Panics
    /// If it can't be mounted.
    #[must_use]
    pub fn mount(what: &Path, at: &Path, options: &str) -> Self {
        std::fs::create_dir_all(at).expect("the mount point can be made");
        let mut mount = Command::new("mount");
        if !options.is_empty() {
            mount.args(["-o", options]);
        }
        check("mount", &mount.arg(what).arg(at).output().expect("util-linux is installed"));
        Self(at.to_owned())
    }

    /// The mount point.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let quiet = Command::new("umount").arg(&self.0).output().is_ok_and(|output| output.status.success());
        if !quiet {
            // Frozen by a sender that a failed test left: thaw, else nothing ever ends.
            let _ = Command::new("fsfreeze").arg("-u").arg(&self.0).output();
            let _ = Command::new("umount").arg("-l").arg(&self.0).output();
        }
    }
}
