//! The metrics recorder of a process, and what the kernel says about the process itself.

use metrics::{Unit, describe_gauge, gauge};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

/// Bounds of histograms over seconds, from half a millisecond to a minute.
const SECONDS_BUCKETS: [f64; 16] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// Bounds of histograms over bytes, from 4 KiB to 256 MiB.
const BYTES_BUCKETS: [f64; 9] =
    [4096.0, 16_384.0, 65_536.0, 262_144.0, 1_048_576.0, 4_194_304.0, 16_777_216.0, 67_108_864.0, 268_435_456.0];

/// Installs the recorder for the whole process, once, in `main`; the handle renders what it holds.
///
/// # Errors
/// Where a recorder was installed before.
pub fn install_recorder() -> Result<PrometheusHandle, BuildError> {
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS_BUCKETS)?
        .set_buckets_for_metric(Matcher::Suffix("_bytes".to_owned()), &BYTES_BUCKETS)?;
    let handle = builder.install_recorder()?;
    describe();
    Ok(handle)
}

fn describe() {
    describe_gauge!("blockferry_process_resident_bytes", Unit::Bytes, "Resident memory of the process.");
    describe_gauge!(
        "blockferry_process_resident_peak_bytes",
        Unit::Bytes,
        "Most resident memory of the process so far."
    );
    describe_gauge!("blockferry_process_cpu_seconds", Unit::Seconds, "CPU time the process has used, user and system.");
}

/// What the kernel says about a process.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ProcessUsage {
    /// Resident memory in bytes (VmRSS).
    pub resident_bytes: u64,
    /// Most resident memory so far in bytes (VmHWM).
    pub resident_peak_bytes: u64,
    /// CPU time used, user and system, in seconds.
    pub cpu_seconds: f64,
}

/// This process's usage; zeros for what cannot be read.
#[must_use]
pub fn usage() -> ProcessUsage {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    parse_usage(&read("/proc/self/status"), &read("/proc/self/stat"), rustix::param::clock_ticks_per_second())
}

/// Usage from the texts of `/proc/PID/status` and `/proc/PID/stat`.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "ticks of a process stay far below 2^53")]
pub fn parse_usage(status: &str, stat: &str, ticks_per_second: u64) -> ProcessUsage {
    let bytes = |key: &str| {
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix(key)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        kib.unwrap_or(0).saturating_mul(1024)
    };
    // proc(5): the name, in brackets, may hold blanks and brackets; utime and stime are fields 14 and 15.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: u64 = after_name.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    ProcessUsage {
        resident_bytes: bytes("VmRSS:"),
        resident_peak_bytes: bytes("VmHWM:"),
        cpu_seconds: ticks as f64 / ticks_per_second.max(1) as f64,
    }
}

/// Sets the gauges of this process; called before each scrape.
#[expect(clippy::cast_precision_loss, reason = "memory sizes stay below 2^53 bytes")]
pub fn record() {
    let usage = usage();
    gauge!("blockferry_process_resident_bytes").set(usage.resident_bytes as f64);
    gauge!("blockferry_process_resident_peak_bytes").set(usage.resident_peak_bytes as f64);
    gauge!("blockferry_process_cpu_seconds").set(usage.cpu_seconds);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_read_also_where_the_name_holds_brackets() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 9 0 100 0 0";
        let usage = parse_usage(status, stat, 100);
        assert_eq!(usage, ProcessUsage { resident_bytes: 1 << 20, resident_peak_bytes: 2 << 20, cpu_seconds: 3.0 });
    }

    #[test]
    fn this_process_uses_memory() {
        let usage = usage();
        assert!(usage.resident_bytes > 0 && usage.resident_peak_bytes >= usage.resident_bytes / 2, "{usage:?}");
    }

    #[test]
    fn rubbish_is_zero() {
        assert_eq!(parse_usage("", "", 0), ProcessUsage::default());
    }
}
