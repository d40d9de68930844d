//! Making each volume's capture, by its mode.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::budget::{Budget, Permit};
use common::clock::Clock;
use common::ids::CloseId;
use common::pages::PageSet;
use common::units::ByteCount;

use super::AgentError;
use super::prepare::Local;
use crate::capture::cut::Capture;
use crate::capture::ebpf;
use crate::capture::freeze::watchdog::WatchdogCommand;
use crate::capture::hooks::Hooks;
use crate::capture::live::{Attached, EbpfTracker, LiveCapture, LiveConfig};
use crate::capture::nbd::{self, Known, ListenAddr, NbdConfig, NbdServer};
use crate::capture::scan::ScanCapture;
use crate::capture::snapshot::{LvmTools, LvmVolume, Snapshotter};
use crate::capture::{CaptureError, Disk, Source};
use crate::config::RunConfig;
use crate::events::{EventKind, Events};
use crate::spec::{CaptureMode, Listen, Overload, VolumeSpec};
use crate::state::VolumeState;

/// Share of the payload budget that contents may take before they are sealed, as a divisor: the rest is for records.
const UNSEALED_SHARE: u64 = 2;

/// Where a tracker's page sets are saved, in the volume's directory.
const TRACKED: &str = "tracked";
/// Page sets that a volume may have at a time at their largest: what is to be read, and what is in cuts.
const PAGE_SETS: u64 = 2;
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
    /// What the page sets of the volumes may take.
    page_sets: Vec<Permit>,
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
        Ok(Self { config, budget, clock, events, hooks, nbd, page_sets: Vec::new() })
    }

    /// The capture of a volume. Tracking has begun when this returns.
    ///
    /// # Errors
    /// [`AgentError::Capture`].
    pub(super) fn make(&mut self, local: &Local, state: &VolumeState) -> Result<Box<dyn Capture>, AgentError> {
        let Local { spec, source, .. } = local;
        let named = |source| failed(spec, source);
        if spec.capture != CaptureMode::Nbd {
            // Whatever it says, writes do not go through it any more.
            nbd::forget(state.directory()).map_err(named)?;
        }
        if spec.capture != CaptureMode::Ebpf {
            let (pins, tracked) = tracker_directories(state);
            if pins.exists() || tracked.exists() {
                ebpf::remove_pins(&pins, &tracked).map_err(|source| {
                    named(CaptureError::Tracking { path: spec.path.clone(), source: Box::new(source) })
                })?;
            }
        }
        if spec.capture != CaptureMode::Scan {
            let bytes = PAGE_SETS * PageSet::memory_bytes_max(source.geometry());
            let permit = self.budget.try_acquire(bytes).ok_or_else(|| AgentError::PageSets {
                volume: spec.name.clone(),
                bytes: ByteCount(bytes),
                free: ByteCount(self.budget.payload() - self.budget.used()),
            })?;
            self.page_sets.push(permit);
        }
        match (spec.capture, &self.nbd) {
            (CaptureMode::Nbd, Some(server)) => self.nbd(server, local, state).map_err(named),
            (CaptureMode::Ebpf, _) => self.ebpf(local, state).map_err(named),
            _ => {
                let source = Arc::clone(source);
                let scan = ScanCapture::new(source, self.clock.clone(), self.config.point_interval);
                Ok(Box::new(scan.with_clones_of(&spec.path)))
            }
        }
    }

    /// What was set aside for the volumes' page sets, to be kept as long as they run.
    pub(super) fn into_page_sets(self) -> Vec<Permit> {
        self.page_sets
    }

    fn nbd(&self, server: &NbdServer, local: &Local, state: &VolumeState) -> Result<Box<dyn Capture>, CaptureError> {
        let Local { spec, source, .. } = local;
        let served = self.config.volumes.iter().filter(|volume| volume.capture == CaptureMode::Nbd).count() as u64;
        let listen = spec.listen.iter().map(|listen| match listen {
            Listen::Unix(path) => ListenAddr::Unix(path.clone()),
            Listen::Tcp(host) => ListenAddr::Tcp(host.to_string()),
        });
        let config = NbdConfig {
            name: spec.name.clone(),
            volume: state.identity().volume,
            incarnation: state.identity().incarnation,
            path: source.path().to_owned(),
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
            known: match state.known().close {
                CloseId::ZERO => Known::Nothing,
                _ if local.grew || state.must_verify() => Known::Void,
                _ => Known::Hashes,
            },
        };
        Ok(Box::new(server.add_export(config)?))
    }
}

impl Captures<'_> {
    fn ebpf(&self, local: &Local, state: &VolumeState) -> Result<Box<dyn Capture>, CaptureError> {
        let Local { spec, source, .. } = local;
        let hashes = state.known().close != CloseId::ZERO;
        let (pins, tracked) = tracker_directories(state);
        let path = source.path();
        if local.grew || state.must_verify() {
            // Marks of a smaller disk: tracking begins anew, and the whole disk is compared.
            let failed = |source| CaptureError::Tracking { path: path.to_owned(), source: Box::new(source) };
            ebpf::remove_pins(&pins, &tracked).map_err(failed)?;
        }
        let Attached { tracker, start, interrupted } = EbpfTracker::attach(path, &pins, &tracked, hashes)?;
        if !interrupted.is_empty() {
            self.events.note(&spec.name, EventKind::TrackingLost, interrupted);
        }
        let config = LiveConfig {
            name: spec.name.clone(),
            path: path.to_owned(),
            point_interval: self.config.point_interval,
            app_point_interval: self.config.app_points.0,
            freeze_limit: self.config.freeze_limit,
            hooks: self.hooks.clone(),
            snapshots: self.snapshots(spec, state),
            watchdog: WatchdogCommand::default(),
            budget: self.budget.clone(),
            clock: self.clock.clone(),
            events: self.events.clone(),
            start,
        };
        Ok(Box::new(LiveCapture::new(config, Arc::<Source>::clone(source), tracker)))
    }
}

impl Captures<'_> {
    /// What takes snapshots of a volume's device, where it is a logical volume.
    fn snapshots(&self, spec: &VolumeSpec, state: &VolumeState) -> Option<Arc<dyn Snapshotter>> {
        match LvmVolume::of(&spec.path, &state.identity().volume.to_string(), LvmTools::default()) {
            Ok(volume) => volume.map(|volume| Arc::new(volume) as Arc<dyn Snapshotter>),
            Err(error) => {
                self.events.note(&spec.name, EventKind::FreezeFailed, format!("no snapshots of this volume: {error}"));
                None
            }
        }
    }
}

/// Where a tracker's pins are, and where its page sets are saved.
fn tracker_directories(state: &VolumeState) -> (PathBuf, PathBuf) {
    (ebpf::default_directory(&state.identity().volume.to_string()), state.directory().join(TRACKED))
}

fn failed(spec: &VolumeSpec, source: CaptureError) -> AgentError {
    AgentError::Capture { volume: spec.name.clone(), source }
}
