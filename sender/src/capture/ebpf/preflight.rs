//! What tracking needs from the kernel, whether it is there, and what the tracepoints can't show.

use std::ffi::CString;
use std::path::{Path, PathBuf};

use rustix::thread::CapabilitySet;

use super::device::{DeviceId, DeviceKind, read_number};
use super::error::TrackerError;
use super::{libbpf, pins, program};

/// The kernel's description of its own types.
const BTF: &str = "/sys/kernel/btf/vmlinux";
/// Atomic operations in programs, and bios that name their device.
const KERNEL_MIN: (u32, u32) = (5, 12);
const INSTEAD: &str = "use capture=nbd, which is in the write path, or capture=scan";

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Changes of this kind are not seen; everything else is.
    Limit,
    /// Tracking is not possible.
    Missing,
}

/// Something that is missing, or can't be seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// What was found, for people.
    pub what: String,
    /// What works instead, or what to do.
    pub instead: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.what, self.instead)
    }
}

impl Finding {
    fn missing(what: impl Into<String>, instead: impl Into<String>) -> Self {
        Self { severity: Severity::Missing, what: what.into(), instead: instead.into() }
    }

    fn limit(what: impl Into<String>, instead: impl Into<String>) -> Self {
        Self { severity: Severity::Limit, what: what.into(), instead: instead.into() }
    }
}

/// What the checks look at; tests give other places.
#[derive(Debug)]
struct System {
    btf: PathBuf,
    lockdown: PathBuf,
    kernel: (u32, u32),
    release: String,
    may: bool,
}

impl System {
    fn this() -> Self {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let may = rustix::thread::capabilities(None).is_ok_and(|sets| {
            let has = |capability| sets.effective.contains(capability);
            has(CapabilitySet::SYS_ADMIN) || has(CapabilitySet::BPF) && has(CapabilitySet::PERFMON)
        });
        Self {
            btf: BTF.into(),
            lockdown: "/sys/kernel/security/lockdown".into(),
            kernel: kernel_version(&release),
            release,
            may,
        }
    }

    /// What can be said without loading anything.
    fn look(&self, kinds: &[DeviceKind]) -> Vec<Finding> {
        let mut found = Vec::new();
        if self.kernel < KERNEL_MIN {
            found.push(Finding::missing(
                format!("kernel {} is older than {}.{}", self.release, KERNEL_MIN.0, KERNEL_MIN.1),
                INSTEAD,
            ));
        }
        if !self.may {
            found.push(Finding::missing(
                "this process has neither CAP_SYS_ADMIN nor both CAP_BPF and CAP_PERFMON",
                format!("run blockferry-sender as root or with these capabilities, or {INSTEAD}"),
            ));
        }
        if !self.btf.exists() {
            found.push(Finding::missing(
                format!(
                    "{} is not there: the kernel was built without BTF (CONFIG_DEBUG_INFO_BTF)",
                    self.btf.display()
                ),
                format!("install a kernel with BTF, or {INSTEAD}"),
            ));
        } else {
            match missing_tracepoints(&self.btf, kinds.iter().flat_map(|kind| program::tracepoints(*kind)).copied()) {
                Err(error) => {
                    found.push(Finding::missing(format!("{} can't be read: {error}", self.btf.display()), INSTEAD))
                }
                Ok(absent) if absent.is_empty() => {}
                Ok(absent) => found.push(Finding::missing(
                    format!("the kernel has no tracepoints {} (CONFIG_BLOCK, CONFIG_TRACEPOINTS)", absent.join(", ")),
                    INSTEAD,
                )),
            }
        }
        let lockdown = std::fs::read_to_string(&self.lockdown).unwrap_or_default();
        if lockdown.contains("[confidentiality]") {
            found.push(Finding::missing(
                "the kernel is locked down (confidentiality): it lets no program look at its memory",
                format!("start it with lockdown=integrity, or {INSTEAD}"),
            ));
        }
        found
    }
}

fn kernel_version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Those of the tracepoints that the kernel does not have.
fn missing_tracepoints<'a>(btf: &Path, names: impl Iterator<Item = &'a str>) -> std::io::Result<Vec<String>> {
    let prefix = "btf_trace_";
    let typedefs = names.map(|name| CString::new(format!("{prefix}{name}"))).collect::<Result<Vec<_>, _>>()?;
    let missing = libbpf::missing_typedefs(btf, &typedefs)?;
    Ok(missing.iter().map(|name| name.to_string_lossy()[prefix.len()..].to_owned()).collect())
}

/// What is missing for tracking on this machine, and what tracking can't see, of `device` where one is given. Loads the programs
/// for a moment where nothing else is missing, attaches nothing, and changes nothing but that it may mount the BPF file
/// system.
#[must_use]
pub fn preflight(device: Option<&DeviceId>) -> Vec<Finding> {
    let kinds = match device {
        Some(device) => vec![device.kind],
        None => vec![DeviceKind::Requests, DeviceKind::Bios],
    };
    let mut found = System::this().look(&kinds);
    if found.is_empty() {
        for kind in &kinds {
            if let Err(error) = program::probe(*kind) {
                found.push(Finding::missing(error.to_string(), INSTEAD));
                break;
            }
        }
    }
    let root = pins::default_directory("");
    let root = root.parent().unwrap_or(&root);
    if let Err(error) = pins::mount() {
        let text = format!("the BPF file system can't be mounted on {}: {error}", root.display());
        found.push(Finding::missing(text, format!("mount it (mount -t bpf bpf /sys/fs/bpf), or {INSTEAD}")));
    }
    match device {
        Some(device) => found.extend(limits(device)),
        None => found.push(passthrough_limit("a disk")),
    }
    found
}

/// Refuses what can't be tracked, before anything is loaded.
pub(super) fn refuse(device: &DeviceId) -> Result<(), TrackerError> {
    let mut found = System::this().look(&[device.kind]);
    found.extend(limits(device));
    let Some(first) = found.into_iter().find(|finding| finding.severity == Severity::Missing) else { return Ok(()) };
    Err(TrackerError::Unsupported { path: device.path.clone(), reason: first.to_string() })
}

fn passthrough_limit(name: &str) -> Finding {
    Finding::limit(
        format!(
            "commands passed through to {name} (sg, NVMe ioctls) are seen but not where they write: the whole disk is then compared by hash; those that erase without data (format, sanitize) are not seen"
        ),
        "after such a command run blockferry-sender adopt, which verifies by hash",
    )
}

/// What is particular to a device.
fn limits(device: &DeviceId) -> Vec<Finding> {
    limits_in(device, &device.disk_folder())
}

fn limits_in(device: &DeviceId, folder: &Path) -> Vec<Finding> {
    let name = &device.disk_name;
    let mut found = Vec::new();
    let parent = std::fs::canonicalize(folder.join("device")).unwrap_or_default();
    if parent.file_name().is_some_and(|name| name.to_string_lossy().starts_with("nvme-subsys")) {
        found.push(Finding::missing(
            format!("{name} is an NVMe disk with several paths (native multipath): the kernel shows its writes only on each path"),
            format!("start the kernel with nvme_core.multipath=N, or {INSTEAD}"),
        ));
    }
    if read_number(&folder.join("queue/dax")) == Some(1) {
        found.push(Finding::missing(
            format!("{name} is persistent memory (DAX): programs may write it without the block layer"),
            INSTEAD,
        ));
    }
    if name.starts_with("md") && read_number(&folder.join("queue/iostats")) == Some(0) {
        found.push(Finding::missing(
            format!("{name} does not account its writes, so their completion is not shown"),
            format!("echo 1 > /sys/block/{name}/queue/iostats, or {INSTEAD}"),
        ));
    }
    let zoned = std::fs::read_to_string(folder.join("queue/zoned")).unwrap_or_default();
    if !matches!(zoned.trim(), "" | "none") {
        found.push(Finding::limit(
            format!("{name} is zoned: resetting a zone counts as a change of the whole disk"),
            "expect more reading, or use capture=scan",
        ));
    }
    if device.disk_sequence.is_none() {
        found.push(Finding::limit(
            format!("this kernel does not number the lives of {name} (diskseq, Linux 5.15): another disk of the same size under the same number is told apart by its serial number alone"),
            "detach the volume before the disk is exchanged",
        ));
    }
    if folder.join("loop").exists() {
        found.push(Finding::limit(
            format!("writes to the file behind {name} that do not go through {name} are not seen"),
            "write through the loop device only",
        ));
    }
    if std::fs::read_dir(folder.join("slaves")).is_ok_and(|mut list| list.next().is_some()) {
        found.push(Finding::limit(
            format!("{name} lies on other devices: what is written to those directly, and a change of its table (a merged or restored snapshot, pvmove is fine), is not seen"),
            "after such a change run blockferry-sender adopt, which verifies by hash",
        ));
    }
    if device.kind == DeviceKind::Requests && folder.join("device").exists() {
        found.push(passthrough_limit(name));
        found.push(Finding::limit(
            format!("writes to the same disk through another path than {name} (another host, a second cable, multipath) are not seen"),
            "track the multipath device above, and let one host write",
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_all_that_tracking_needs() {
        let missing: Vec<_> =
            preflight(None).into_iter().filter(|finding| finding.severity == Severity::Missing).collect();
        assert!(missing.is_empty(), "the tracker's tests need a kernel that can track; missing: {missing:#?}");
    }

    #[test]
    fn each_thing_that_is_missing_is_named_with_what_works_instead() {
        let folder = tempfile::tempdir().expect("a directory");
        let lockdown = folder.path().join("lockdown");
        std::fs::write(&lockdown, "none integrity [confidentiality]\n").expect("written");
        let broken = System {
            btf: folder.path().join("no-btf"),
            lockdown,
            kernel: (5, 4),
            release: "5.4.0".to_owned(),
            may: false,
        };
        let found = broken.look(&[DeviceKind::Requests]);
        for what in ["kernel 5.4.0", "CAP_BPF", "without BTF", "locked down"] {
            let finding = found.iter().find(|finding| finding.what.contains(what));
            let finding = finding.unwrap_or_else(|| panic!("{what} is not in {found:#?}"));
            assert_eq!(finding.severity, Severity::Missing);
            assert!(finding.instead.contains("capture=nbd"), "{finding}");
        }
        assert_eq!(found.len(), 4);
        assert!(System::this().look(&[DeviceKind::Requests]).is_empty());
    }

    #[test]
    fn a_tracepoint_that_the_kernel_does_not_have_is_noticed() {
        let names = ["block_rq_issue", "block_of_cheese"].into_iter();
        assert_eq!(missing_tracepoints(Path::new(BTF), names).expect("the kernel has BTF"), ["block_of_cheese"]);
    }

    #[test]
    fn versions_are_read_from_releases() {
        assert_eq!(kernel_version("6.1.0-28-cloud-amd64"), (6, 1));
        assert_eq!(kernel_version("5.12-rc1"), (5, 12));
        assert_eq!(kernel_version("linux"), (0, 0));
    }

    #[test]
    fn a_device_whose_writes_are_not_shown_is_refused_and_others_get_their_limits_told() {
        let folder = tempfile::tempdir().expect("a directory");
        let path = folder.path();
        let device = DeviceId {
            path: "/dev/x".into(),
            number: (1, 2),
            disk_number: (1, 2),
            disk_name: "md0".to_owned(),
            partition: None,
            start_sector: 0,
            bytes: 1 << 20,
            serial: String::new(),
            disk_sequence: None,
            kind: DeviceKind::Bios,
        };
        std::fs::create_dir_all(path.join("queue")).expect("made");
        std::fs::create_dir_all(path.join("slaves/sda")).expect("made");
        std::fs::create_dir_all(path.join("real/nvme-subsys0")).expect("made");
        std::os::unix::fs::symlink(path.join("real/nvme-subsys0"), path.join("device")).expect("linked");
        for (name, text) in [("dax", "1\n"), ("iostats", "0\n"), ("zoned", "host-managed\n")] {
            std::fs::write(path.join("queue").join(name), text).expect("written");
        }
        let found = limits_in(&device, path);
        let of = |severity| found.iter().filter(move |finding| finding.severity == severity).count();
        assert_eq!((of(Severity::Missing), of(Severity::Limit)), (3, 3), "{found:#?}");
    }
}
