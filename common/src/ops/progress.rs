//! Progress for people: a bar on a terminal, plain lines at most every few seconds elsewhere.
//!
//! Promises: only standard error is written; no control characters reach a file or pipe; a log line and the bar never mix.

use super::logging::colour_wanted;
use crate::units::ByteCount;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Time between two plain lines.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// Redraws of the bar in a second.
const REDRAWS_PER_SECOND: u8 = 8;

/// All bars of the process, so that log lines can be written between them.
static BARS: OnceLock<MultiProgress> = OnceLock::new();

/// Runs `write` while no bar is on the screen.
pub(super) fn suspended<R>(write: impl FnOnce() -> R) -> R {
    match BARS.get() {
        Some(bars) => bars.suspend(write),
        None => write(),
    }
}

/// Progress of one task in bytes. Shared by reference between threads; cleared from the screen when dropped.
pub struct Progress {
    label: String,
    total: Option<u64>,
    done: AtomicU64,
    /// Of `done`, what an earlier run had done: it took this one no time.
    skipped: AtomicU64,
    shown: Shown,
}

enum Shown {
    Bar(ProgressBar),
    Lines(Mutex<Lines>),
    Nothing,
}

struct Lines {
    started: Instant,
    last: Instant,
}

impl Progress {
    /// Progress of `label` over `total_bytes`, shown as fits standard error.
    #[must_use]
    pub fn bytes(label: &str, total_bytes: Option<u64>) -> Self {
        let shown = if io::stderr().is_terminal() {
            let target = || ProgressDrawTarget::stderr_with_hz(REDRAWS_PER_SECOND);
            let bars = BARS.get_or_init(|| MultiProgress::with_draw_target(target()));
            Shown::Bar(
                bars.add(
                    ProgressBar::new(total_bytes.unwrap_or(0))
                        .with_style(style(total_bytes.is_some()))
                        .with_prefix(label.to_owned()),
                ),
            )
        } else {
            let now = Instant::now();
            Shown::Lines(Mutex::new(Lines { started: now, last: now }))
        };
        Self { label: label.to_owned(), total: total_bytes, done: AtomicU64::new(0), skipped: AtomicU64::new(0), shown }
    }

    /// Progress that is counted and not shown.
    #[must_use]
    pub fn hidden() -> Self {
        let (done, skipped) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { label: String::new(), total: None, done, skipped, shown: Shown::Nothing }
    }

    /// Bytes done so far.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Counts `bytes` as done by an earlier run: they say nothing of the rate.
    pub fn skip(&self, bytes: u64) {
        self.skipped.fetch_add(bytes, Ordering::Relaxed);
        let done = self.done.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        if let Shown::Bar(bar) = &self.shown {
            bar.set_position(done);
            bar.reset_eta();
        }
    }

    /// Counts `bytes` more as done. Cheap; may be called for each block.
    pub fn advance(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        match &self.shown {
            Shown::Bar(bar) => bar.set_position(done),
            Shown::Lines(lines) => {
                // Whoever finds the lock taken leaves the line to the other.
                let Ok(mut lines) = lines.try_lock() else { return };
                let now = Instant::now();
                if now.duration_since(lines.last) >= LINE_INTERVAL {
                    lines.last = now;
                    self.write(&self.line(now.duration_since(lines.started), true));
                }
            }
            Shown::Nothing => {}
        }
    }

    /// A few words beside the bar; plain lines leave them out.
    pub fn note(&self, text: &str) {
        if let Shown::Bar(bar) = &self.shown {
            bar.set_message(text.to_owned());
        }
    }

    /// Takes the bar away and leaves one last plain line with amount, time and rate.
    pub fn finish(self) {
        match &self.shown {
            Shown::Bar(bar) => {
                let elapsed = bar.elapsed();
                bar.finish_and_clear();
                self.write(&self.line(elapsed, false));
            }
            Shown::Lines(lines) => {
                let started = lines.lock().unwrap_or_else(PoisonError::into_inner).started;
                self.write(&self.line(started.elapsed(), false));
            }
            Shown::Nothing => {}
        }
    }

    fn line(&self, elapsed: Duration, running: bool) -> String {
        line(&self.label, self.done(), self.skipped.load(Ordering::Relaxed), self.total, elapsed, running)
    }

    fn write(&self, text: &str) {
        suspended(|| {
            let _ = writeln!(io::stderr().lock(), "{text}");
        });
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

fn style(known_total: bool) -> ProgressStyle {
    let template = match (known_total, colour_wanted()) {
        (true, true) => "{prefix} [{bar:28.green}] {bytes}/{total_bytes} {binary_bytes_per_sec} {eta} left {msg}",
        (true, false) => "{prefix} [{bar:28}] {bytes}/{total_bytes} {binary_bytes_per_sec} {eta} left {msg}",
        (false, _) => "{prefix} {bytes} {binary_bytes_per_sec} {elapsed} {msg}",
    };
    ProgressStyle::with_template(template)
        .map_or_else(|_| ProgressStyle::default_bar(), |style| style.progress_chars("=> "))
}

/// `root: 512 MiB of 1 GiB (50 %), 128 MiB/s, 4 s, 4 s left`: what is left is said while it runs. PURE.
fn line(label: &str, done: u64, skipped: u64, total: Option<u64>, elapsed: Duration, running: bool) -> String {
    let millis = elapsed.as_millis().max(1);
    let own = done.saturating_sub(skipped);
    let rate = ByteCount(u64::try_from(u128::from(own) * 1000 / millis).unwrap_or(u64::MAX));
    let amount = match total {
        Some(total) if total > 0 => {
            let percent = u128::from(done.min(total)) * 100 / u128::from(total);
            format!("{} of {} ({percent} %)", ByteCount(done), ByteCount(total))
        }
        _ => ByteCount(done).to_string(),
    };
    let left = total.filter(|_| running && rate.0 > 0).map(|total| total.saturating_sub(done).div_ceil(rate.0));
    let left = left.map_or_else(String::new, |seconds| format!(", {seconds} s left"));
    format!("{label}: {amount}, {rate}/s, {} s{left}", elapsed.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_line_tells_amount_share_and_rate_without_control_characters() {
        let text = line("root", 512 << 20, 0, Some(1 << 30), Duration::from_secs(4), false);
        assert_eq!(text, "root: 512 MiB of 1 GiB (50 %), 128 MiB/s, 4 s");
        assert_eq!(line("root", 0, 0, Some(0), Duration::ZERO, true), "root: 0 B, 0 B/s, 0 s");
    }

    #[test]
    fn what_is_left_is_told_from_what_this_run_did_alone() {
        let text = line("root", 768 << 20, 512 << 20, Some(1 << 30), Duration::from_secs(4), true);
        assert_eq!(text, "root: 768 MiB of 1 GiB (75 %), 64 MiB/s, 4 s, 4 s left");
    }

    #[test]
    fn bytes_are_counted_from_many_threads() {
        let progress = Progress::hidden();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|_| progress.advance(3)));
            }
        });
        assert_eq!(progress.done(), 12_000);
    }
}
