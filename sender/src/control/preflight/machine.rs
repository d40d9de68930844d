//! The machine itself: kernel, user, memory, UDP buffers, clock.

use common::budget::{self, Budget, MemoryTable};
use common::clock::{Clock, UnixMillis};
use common::net::quic::{self, QuicTuning};
use common::units::{BudgetSpec, ByteCount};

use super::{Finding, Level};
use crate::capture::ebpf;

/// UDP buffers below this cost throughput at gigabit speeds: 4 MiB were granted where the figures were measured.
const UDP_BUFFER_BYTES_WISHED: usize = 2 << 20;
/// 2024-01-01: no clock of a machine that runs this release is before that.
const CLOCK_MIN: UnixMillis = UnixMillis(1_704_067_200_000);

pub(super) fn look() -> Vec<Finding> {
    let mut findings = vec![user(), memory(), udp_buffers(), clock()];
    findings.extend(kernel(ebpf::preflight(None)));
    findings
}

fn user() -> Finding {
    if rustix::process::geteuid().is_root() {
        return Finding::ok("user", "root: disks can be read, and tracking can be attached");
    }
    Finding::new(
        Level::Warning,
        "user",
        "not root: block devices can't be read, and capture=ebpf can't be attached",
        "run as root, as the service unit does; image files of this user can be protected as they are",
    )
}

fn memory() -> Finding {
    let look = || {
        let effective = budget::effective_memory()?;
        let total = budget::resolve(BudgetSpec::default(), &effective)?;
        Budget::new(MemoryTable::new(total.bytes()))?;
        Ok::<_, budget::BudgetError>(total)
    };
    match look() {
        Ok(total) => Finding::ok("memory", format!("the default budget is {total}")),
        Err(error) => Finding::new(Level::Error, "memory", error.to_string(), "give it more, or --memory-budget 64MiB"),
    }
}

/// quinn does not say when a small buffer overflows: packets are lost, and lost again.
fn udp_buffers() -> Finding {
    match quic::client_endpoint(&QuicTuning::default()) {
        Ok((_, granted)) => {
            let least = granted.receive_bytes.min(granted.send_bytes);
            let text = format!("the kernel grants UDP buffers of {}", ByteCount(least as u64));
            if least >= UDP_BUFFER_BYTES_WISHED {
                return Finding::ok("network", text);
            }
            Finding::new(
                Level::Warning,
                "network",
                text + ": packets are lost in them at high rates",
                "sysctl -w net.core.rmem_max=8388608 net.core.wmem_max=8388608, and keep it in /etc/sysctl.d",
            )
        }
        Err(error) => Finding::new(
            Level::Warning,
            "network",
            format!("no UDP socket: {error}"),
            "allow this process UDP; without it records travel over TCP, where both ends can",
        ),
    }
}

fn clock() -> Finding {
    let now = Clock::System.now();
    if now < CLOCK_MIN {
        return Finding::new(
            Level::Error,
            "clock",
            format!("the clock says {now}: certificates will not be valid, and points bear wrong times"),
            "set it, and keep it synchronised (chrony, systemd-timesyncd)",
        );
    }
    Finding::ok("clock", format!("{now}"))
}

/// What tracking needs and can't see. None of it is in the way of the other modes.
fn kernel(found: Vec<ebpf::Finding>) -> Vec<Finding> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let possible = !found.iter().any(|finding| finding.severity == ebpf::Severity::Missing);
    let mut findings: Vec<Finding> =
        found.into_iter().map(|finding| Finding::new(Level::Notice, "kernel", finding.what, finding.instead)).collect();
    if possible {
        findings.insert(0, Finding::ok("kernel", format!("{release}: capture=ebpf is possible")));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_part_of_the_machine_is_looked_at_and_troubles_have_a_next_step() {
        let findings = look();
        for subject in ["user", "memory", "network", "clock", "kernel"] {
            assert!(findings.iter().any(|finding| finding.subject == subject), "nothing on {subject}");
        }
        assert!(findings.iter().all(|finding| finding.level == Level::Ok || !finding.next_step.is_empty()));
    }
}
