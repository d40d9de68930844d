//! Processes of tests in a control group with a memory limit, version 1 or 2, whichever the machine has.
//!
//! ```text
//! let group = MemoryGroup::create(128 << 20);
//! let mut child = group.command(&pair.receiver_command()).stderr(log).spawn()?;
//! … group.oom_kills() == 0, vm_hwm(child.id()) <= 128 << 20
//! ```

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Where systemd and container runtimes mount the memory controller of version 1.
const V1: &str = "/sys/fs/cgroup/memory";
/// Where version 2 is mounted.
const V2: &str = "/sys/fs/cgroup";

/// Enters a group, then becomes the program: the process id stays.
const ENTER: &str = r#"echo $$ > "$0"/cgroup.procs && exec "$@""#;

/// A control group that limits memory (page cache counts too). Removed when dropped; its processes have to be gone by then.
#[derive(Debug)]
pub struct MemoryGroup {
    dir: PathBuf,
    v1: bool,
}

impl MemoryGroup {
    /// Makes a group of at most `bytes` bytes.
    ///
    /// # Panics
    /// Without root, or where the machine has no memory controller.
    #[must_use]
    pub fn create(bytes: u64) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let v1 = Path::new(V1).join("memory.limit_in_bytes").exists();
        let name = format!("blockferry-test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        if !v1 {
            // Where it is on already this changes nothing; where it can't be, the limit's file is missing below.
            let _ = std::fs::write(Path::new(V2).join("cgroup.subtree_control"), "+memory");
        }
        let group = Self { dir: Path::new(if v1 { V1 } else { V2 }).join(name), v1 };
        std::fs::create_dir(&group.dir).expect("a control group can be made (tests need root)");
        let limit = group.dir.join(if v1 { "memory.limit_in_bytes" } else { "memory.max" });
        std::fs::write(&limit, bytes.to_string()).expect("the memory controller takes a limit");
        if !v1 {
            let _ = std::fs::write(group.dir.join("memory.swap.max"), "0");
        }
        group
    }

    /// The same command, run in the group; its process id is the program's own. Set standard streams on what is returned.
    #[must_use]
    pub fn command(&self, command: &Command) -> Command {
        let mut inside = Command::new("sh");
        inside.arg("-c").arg(ENTER).arg(&self.dir).arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        if let Some(dir) = command.get_current_dir() {
            inside.current_dir(dir);
        }
        inside.stdin(std::process::Stdio::null());
        inside
    }

    /// Processes that the kernel killed in it for want of memory.
    ///
    /// # Panics
    /// If the kernel does not say.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let text = std::fs::read_to_string(self.dir.join(if self.v1 { "memory.oom_control" } else { "memory.events" }));
        let text = text.expect("the group is there");
        let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        line.and_then(|number| number.trim().parse().ok()).expect("the kernel counts them")
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // A killed process leaves its group some moments after its end.
        for _ in 0..200 {
            if std::fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

/// The peak of a running process's resident memory, in bytes: `VmHWM`.
///
/// # Panics
/// If it does not run any more.
#[must_use]
pub fn vm_hwm(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("the kernel tells the peak");
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().expect("a number of KiB");
    kib << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_takes_more_than_its_group_allows_is_killed_and_counted() {
        let group = MemoryGroup::create(16 << 20);
        let mut hungry = Command::new("python3");
        hungry.args(["-c", "x = bytearray(64 << 20)"]);
        assert!(!group.command(&hungry).status().expect("it starts").success());
        assert_eq!(group.oom_kills(), 1);
        let mut modest = Command::new("sh");
        modest.args(["-c", "test \"$WORD\" = here"]).env("WORD", "here");
        assert!(group.command(&modest).status().expect("it starts").success(), "arguments and environment go along");
        assert!(vm_hwm(std::process::id()) > 0);
    }
}
