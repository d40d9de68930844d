//! Boots a restored disk in QEMU and waits until the machine says that it is up, on its serial console.
//!
//! What it writes goes to a temporary overlay, so the disk stays as it was restored. No network is given to it: a machine that comes up twice
//! must not meet itself, nor do its work a second time.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::ops::shutdown::Shutdown;

use super::filesystems::program;

/// Said by machines that are up: a login prompt, or systemd on the way to one.
const MARKERS: [&str; 4] =
    ["login:", "Reached target Multi-User", "Reached target Graphical", "Welcome to emergency mode"];
const QEMU: &str = "qemu-system-x86_64";
/// Console text kept for whoever wants to know why it did not come up.
const KEPT_BYTES: usize = 16 << 10;
/// How often a wish to end is looked for.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// How to boot.
#[derive(Debug, Clone)]
pub(super) struct BootPlan {
    pub(super) timeout: Duration,
    pub(super) marker: Option<String>,
    pub(super) kvm: bool,
    pub(super) memory_mib: u32,
    pub(super) firmware: Option<PathBuf>,
    pub(super) kernel: Option<PathBuf>,
    pub(super) initrd: Option<PathBuf>,
    pub(super) append: Option<String>,
}

/// A machine that came up.
#[derive(Debug, Clone, serde::Serialize)]
pub(super) struct Booted {
    /// What it said that shows it.
    pub marker: String,
    /// Seconds until then.
    pub seconds: f64,
}

/// Kills the machine when dropped.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots `disk`. The outer error is one of this machine, the inner one tells why the disk did not come up.
pub(super) fn boot(
    disk: &Path,
    scratch: &Path,
    plan: &BootPlan,
    shutdown: &Shutdown,
) -> Result<Result<Booted, String>, String> {
    let started = Instant::now();
    let mut machine = Machine(start(disk, scratch, plan)?);
    let mut console = machine.0.stdout.take().ok_or("QEMU has no console")?;
    let (sender, said) = mpsc::sync_channel::<Vec<u8>>(16);
    // Ends with the machine: its console closes.
    std::thread::spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(len @ 1..) = console.read(&mut chunk) {
            if sender.send(chunk[..len].to_vec()).is_err() {
                break;
            }
        }
    });
    let mut text = String::new();
    loop {
        match said.recv_timeout(LOOK_INTERVAL) {
            Ok(chunk) => {
                text.push_str(&String::from_utf8_lossy(&chunk));
                if let Some(marker) = found(&text, plan.marker.as_deref()) {
                    if marker.contains("emergency mode") {
                        return Ok(Err(format!("it came up in emergency mode; {}", end_of(&text))));
                    }
                    return Ok(Ok(Booted { marker, seconds: started.elapsed().as_secs_f64() }));
                }
                if text.len() > 2 * KEPT_BYTES {
                    let cut = text.ceil_char_boundary(text.len() - KEPT_BYTES);
                    text.drain(..cut);
                }
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let status = machine.0.wait().map_err(|error| error.to_string())?;
                let mut why = String::new();
                if let Some(stderr) = &mut machine.0.stderr {
                    let _ = stderr.take(KEPT_BYTES as u64).read_to_string(&mut why);
                }
                return Ok(Err(format!(
                    "the machine ended ({status}) before it was up; {} {}",
                    why.trim(),
                    end_of(&text)
                )));
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
        if shutdown.is_requested() {
            return Ok(Err("it was not waited for".into()));
        }
        if started.elapsed() > plan.timeout {
            return Ok(Err(format!("it was not up after {} s; {}", plan.timeout.as_secs(), end_of(&text))));
        }
    }
}

fn start(disk: &Path, scratch: &Path, plan: &BootPlan) -> Result<Child, String> {
    if !is_installed(QEMU) {
        return Err(format!("{QEMU} is not there: install it, or drill without --boot"));
    }
    // A drill that is killed takes its machine along, where util-linux is new enough to arrange it.
    let mut qemu = if is_installed("setpriv") {
        let mut setpriv = program("setpriv");
        setpriv.args(["--pdeathsig", "KILL", QEMU]);
        setpriv
    } else {
        program(QEMU)
    };
    if plan.kvm {
        qemu.args(["-accel", "kvm", "-cpu", "host"]);
    } else {
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max"]);
    }
    qemu.args(["-smp", "2", "-m", &plan.memory_mib.to_string(), "-display", "none", "-monitor", "none"]);
    qemu.args(["-serial", "stdio", "-no-reboot", "-nic", "none", "-drive"]);
    let name = disk.display().to_string().replace(',', ",,");
    qemu.arg(format!("file={name},format=raw,if=virtio,snapshot=on"));
    for (flag, file) in [("-bios", &plan.firmware), ("-kernel", &plan.kernel), ("-initrd", &plan.initrd)] {
        if let Some(file) = file {
            qemu.arg(flag).arg(file);
        }
    }
    if let Some(append) = &plan.append {
        qemu.args(["-append", append]);
    }
    // The overlay is made where temporary files go, and may become large.
    qemu.env("TMPDIR", scratch).stdout(Stdio::piped()).stderr(Stdio::piped());
    qemu.spawn().map_err(|error| format!("{QEMU}: {error}: install it, or drill without --boot"))
}

fn is_installed(name: &str) -> bool {
    program(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

/// The marker that `text` holds: the one asked for, or any.
fn found(text: &str, wanted: Option<&str>) -> Option<String> {
    match wanted {
        Some(wanted) => text.contains(wanted).then(|| wanted.to_owned()),
        None => MARKERS.iter().find(|marker| text.contains(**marker)).map(|marker| (*marker).to_owned()),
    }
}

fn end_of(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() {
        return "its serial console said nothing: give its kernel console=ttyS0".to_owned();
    }
    format!("it said last: {}", lines[lines.len().saturating_sub(3)..].join(" / "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_up_when_it_says_the_marker_or_one_that_all_say() {
        assert_eq!(found("Debian 12 web ttyS0\r\n\r\nweb login: ", None).as_deref(), Some("login:"));
        assert_eq!(
            found("[  OK  ] Reached target Multi-User System.", None).as_deref(),
            Some("Reached target Multi-User")
        );
        assert_eq!(found("web login: ", Some("ready")), None);
        assert_eq!(found("it is ready now", Some("ready")).as_deref(), Some("ready"));
    }

    #[test]
    fn the_end_of_the_console_is_told_or_that_there_was_nothing() {
        assert_eq!(end_of("a\n\nb\r\nc\nd\n"), "it said last: b / c / d");
        assert!(end_of("\n").contains("console=ttyS0"));
    }
}
