//! What a volume's agent says of itself: status, metrics, log, and why a receiver ended its session.

use common::format::frame::RefusalCode;

use super::super::AgentError;
use super::super::cuts::Point;
use super::VolumeAgent;
use crate::capture::cut::CaptureState;

impl VolumeAgent {
    pub(super) fn refused(&self, code: RefusalCode, text: &str) -> AgentError {
        let next_step = match code {
            RefusalCode::Diverged => {
                "; this state directory is a copy, or older than what the store has: use the one that is current, take the volume \
                 over with `blockferry-sender adopt`, or protect the disk as a new volume, under another name"
            }
            RefusalCode::Superseded => "; another sender with this state took over: stop one of the two",
            _ => "",
        };
        AgentError::SessionEnded { volume: self.name.clone(), reason: format!("{text}{next_step}") }
    }

    /// Says how it stands, to status, metrics and log.
    pub(super) fn publish(&mut self) {
        let capture = self.capture.status();
        if capture.state != self.capture_state {
            tracing::debug!(volume = %self.name, from = self.capture_state.as_str(), to = capture.state.as_str(), "capture");
            self.capture_state = capture.state;
        }
        if !matches!(capture.state, CaptureState::First | CaptureState::Verifying)
            && let Some(progress) = self.progress.take()
        {
            progress.finish();
        }
        let outstanding = !self.cuts.is_empty() || self.running.is_some() || capture.backlog_bytes > 0;
        self.rpo.outstanding(outstanding || !capture.tracks, self.shared.clock.now());
        #[expect(clippy::cast_precision_loss, reason = "metrics are floating point")]
        let backlog = capture.backlog_bytes as f64;
        metrics::gauge!("blockferry_sender_backlog_bytes", "volume" => self.name.clone()).set(backlog);
        let overloaded = matches!(capture.state, CaptureState::Overloaded);
        metrics::gauge!("blockferry_sender_overloaded", "volume" => self.name.clone())
            .set(f64::from(u8::from(overloaded)));
        let newest_point = self.newest_point.as_ref().map(Point::status);
        let epochs_in_flight = self.sender.epochs_in_flight() as u64;
        self.shared.board.update(&self.name, |status| {
            capture.state.as_str().clone_into(&mut status.state);
            status.backlog_bytes = capture.backlog_bytes;
            status.epochs_in_flight = epochs_in_flight;
            status.settled = capture.tracks && !outstanding;
            if newest_point.is_some() {
                status.last_point = newest_point;
            }
            status.overloads = capture.overloads;
            status.warning = capture.warning;
        });
    }

    /// Says that there is a point; under `--json` on standard output.
    pub(super) fn report(&mut self, point: &Point) {
        let sent = self.sender.sent();
        let before = std::mem::replace(&mut self.sent_before, sent);
        let (records, bytes) = (sent.records - before.records, sent.bytes - before.bytes);
        let (tally, took) = self.cuts.take_tally();
        tracing::info!(
            volume = %self.name, point = %point.close, consistency = point.consistency.as_str(), read = tally.bytes_read,
            changed = tally.bytes_changed, sent = bytes, records, seconds = took.as_secs_f64(), "recovery point"
        );
        if self.shared.config.json {
            print_line(&serde_json::json!({
                "volume": self.name,
                "point": point.close.to_string(),
                "consistency": point.consistency.as_str(),
                "time": point.time.to_string(),
                "bytes_read": tally.bytes_read,
                "bytes_changed": tally.bytes_changed,
                "bytes_sent": bytes,
                "records_sent": records,
                "records_resent": self.records_resent,
                "seconds": took.as_secs_f64(),
            }));
        }
    }
}

/// One object, one line, at once, so that lines of several volumes do not mix.
#[expect(clippy::print_stdout, reason = "what --json asks for")]
fn print_line(value: &serde_json::Value) {
    println!("{value}");
}
