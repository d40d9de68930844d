//! Making each volume's capture, by its mode.

use std::sync::Arc;
use std::time::Duration;

use common::budget::Budget;
use common::clock::Clock;
use common::ids::CloseId;

use super::AgentError;
use super::prepare::Local;
use crate::capture::CaptureError;
use crate::capture::cut::Capture;
use crate::capture::hooks::Hooks;
use crate::capture::nbd::{self, Known, ListenAddr, NbdConfig, NbdServer};
use crate::capture::scan::ScanCapture;
use crate::config::RunConfig;
use crate::events::Events;
use crate::spec::{CaptureMode, Listen, Overload, VolumeSpec};
use crate::state::VolumeState;

/// Share of the payload budget that contents may take before they are sealed, as a divisor: the rest is for records.
const UNSEALED_SHARE: u64 = 2;

/// How long a hook may take.
const HOOK_TIME: Duration = Duration::from_secs(30);

/// What captures share.
pub(super) struct Captures<'a> {
    config: &'a RunConfig,
    budget: &'a Budget,
    clock: &'a Clock,
    events: &'a Events,
    hooks: Option<Hooks>,
    /// Serves all volumes whose capture is nbd.
    nbd: Option<NbdServer>,
}

impl<'a> Captures<'a> {
    /// Starts what captures share.
    ///
    /// # Errors
    /// [`AgentError::Capture`], naming the first volume that needs it.
    pub(super) async fn start(
        config: &'a RunConfig,
        budget: &'a Budget,
        clock: &'a Clock,
        events: &'a Events,
    ) -> Result<Self, AgentError> {
        let nbd = match config.volumes.iter().find(|volume| volume.capture == CaptureMode::Nbd) {
            Some(volume) => Some(NbdServer::start().await.map_err(|source| failed(volume, source))?),
            None => None,
        };
        let hooks = match &config.hook_dir {
            Some(directory) => Hooks::load(directory, HOOK_TIME).map_err(AgentError::Hooks)?,
            None => None,
        };
        Ok(Self { config, budget, clock, events, hooks, nbd })
    }

    /// The capture of a volume. Tracking has begun when this returns.
    ///
    /// # Errors
    /// [`AgentError::Capture`].
    pub(super) fn make(&self, local: &Local, state: &VolumeState) -> Result<Box<dyn Capture>, AgentError> {
        let Local { spec, source, .. } = local;
        let named = |source| failed(spec, source);
        if spec.capture != CaptureMode::Nbd {
            // Whatever it says, writes do not go through it any more.
            nbd::forget(state.directory()).map_err(named)?;
        }
        match (spec.capture, &self.nbd) {
            (CaptureMode::Nbd, Some(server)) => self.nbd(server, spec, state).map_err(named),
            (CaptureMode::Ebpf, _) => {
                Err(AgentError::Setup(format!("volume {}: capture=ebpf is not in this release", spec.name)))
            }
            _ => {
                let source = Arc::clone(source);
                Ok(Box::new(ScanCapture::new(source, self.clock.clone(), self.config.point_interval)))
            }
        }
    }

    fn nbd(
        &self,
        server: &NbdServer,
        spec: &VolumeSpec,
        state: &VolumeState,
    ) -> Result<Box<dyn Capture>, CaptureError> {
        let served = self.config.volumes.iter().filter(|volume| volume.capture == CaptureMode::Nbd).count() as u64;
        let listen = spec.listen.iter().map(|listen| match listen {
            Listen::Unix(path) => ListenAddr::Unix(path.clone()),
            Listen::Tcp(host) => ListenAddr::Tcp(host.to_string()),
        });
        let config = NbdConfig {
            name: spec.name.clone(),
            volume: state.identity().volume,
            incarnation: state.identity().incarnation,
            path: spec.path.clone(),
            listen: listen.collect(),
            state_dir: state.directory().to_owned(),
            epoch_interval: self.config.epoch_interval,
            overload: match self.config.overload {
                Overload::Bitmap => nbd::Overload::Bitmap,
                Overload::Throttle => nbd::Overload::Throttle,
            },
            budget: self.budget.clone(),
            payload_max: self.budget.payload() / UNSEALED_SHARE / served.max(1),
            clock: self.clock.clone(),
            hooks: self.hooks.clone(),
            events: self.events.clone(),
            known: if state.known().close == CloseId::ZERO { Known::Nothing } else { Known::Hashes },
        };
        Ok(Box::new(server.add_export(config)?))
    }
}

fn failed(spec: &VolumeSpec, source: CaptureError) -> AgentError {
    AgentError::Capture { volume: spec.name.clone(), source }
}
