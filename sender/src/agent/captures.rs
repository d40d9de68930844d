//! Making each volume's capture, by its mode.

use std::sync::Arc;

use common::budget::Budget;
use common::clock::Clock;

use super::AgentError;
use super::prepare::Local;
use crate::capture::cut::Capture;
use crate::capture::scan::ScanCapture;
use crate::config::RunConfig;
use crate::spec::CaptureMode;
use crate::state::VolumeState;

/// What captures share.
pub(super) struct Captures<'a> {
    pub(super) config: &'a RunConfig,
    #[expect(dead_code, reason = "nbd is charged to it")]
    pub(super) budget: &'a Budget,
    pub(super) clock: &'a Clock,
}

impl Captures<'_> {
    /// The capture of a volume. Tracking has begun when this returns.
    ///
    /// # Errors
    /// [`AgentError::Capture`].
    pub(super) fn make(&self, local: &Local, _state: &VolumeState) -> Result<Box<dyn Capture>, AgentError> {
        let Local { spec, source, .. } = local;
        match spec.capture {
            CaptureMode::Scan => {
                let source = Arc::clone(source);
                Ok(Box::new(ScanCapture::new(source, self.clock.clone(), self.config.point_interval)))
            }
            CaptureMode::Nbd | CaptureMode::Ebpf => {
                Err(AgentError::Setup(format!("volume {}: capture={} is not in this release", spec.name, spec.capture)))
            }
        }
    }
}
