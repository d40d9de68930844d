//! The `nbd` capture: the sender is the disk of a virtual machine or of `nbd-client`, and sees every write before the disk does.
//!
//! ```text
//! client ═ socket ═▶ connection ─▶ export ─▶ backing disk or file
//!        common::nbd (PURE)          │ admission (PURE): open cut, backfill set     intent: which regions to compare after a crash
//!                                    ▼
//!                  NbdCapture::next ─▶ cut of kept contents, or of a part of the backfill set ─▶ seal pool
//! ```
//!
//! Promises
//! - Every cut that asserts a point is as after a power cut at its instant; no writer pauses for it.
//! - A write is acknowledged only after it is admitted, its region is marked durably in the write-intent log, and the backing
//!   took it. After a crash of the sender or of the machine only marked regions are compared.
//! - The memory of contents that are not sealed yet stays within [`NbdConfig::payload_max`] and the budget. Beyond that,
//!   contents are dropped and their pages read from the disk later ([`Overload::Bitmap`]), or writers wait
//!   ([`Overload::Throttle`]).
//! - A client of a sender that ends gets no error: its requests stay unanswered, and it sends them again once it is back.
//!
//! Never: opens a device that is in use elsewhere, answers a write before the backing did, or keeps a page locked while it waits
//! for memory or for the network.

mod admission;
mod backing;
mod connection;
mod cuts;
mod export;
mod intent;
mod ranges;
mod server;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::budget::Budget;
use common::clock::Clock;
use common::format::close::Consistency;
use common::ids::{Geometry, Incarnation, VolumeId};
use common::pages::PageSet;

use self::admission::{Admission, Plan};
use self::backing::{Backing, BackingPath, FileBacking};
use self::cuts::{BackfillPages, FrozenPages};
use self::export::Export;
use self::intent::{IntentLog, LogIdentity};
pub use self::server::{ListenAddr, NbdServer, memory_bytes};
use super::CaptureError;
use super::cut::{Asserts, Capture, CaptureState, CaptureStatus, Cut, CutId, NextCut, PointWish};
use super::hooks::{HookContext, Hooks, Session};
use crate::events::{EventKind, Events};

/// The write-intent log's name in the volume's directory.
const INTENT_FILE: &str = "write-intent";
/// How long writers are kept waiting for other disks of the machine to be at rest too.
const GROUP_PATIENCE: Duration = Duration::from_secs(1);
/// Smallest bound of contents: some large writes.
const PAYLOAD_BYTES_MIN: u64 = 4 << 20;
/// How often the write-intent log is looked through for bits that are needed no more. Regions that are written more often
/// stay marked, so that their writes wait for no `fdatasync`.
const SWEEP_INTERVAL: Duration = Duration::from_secs(3);

/// What to do where writers outrun the budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overload {
    /// Drop contents and remember which pages changed; points are lost until they have been read from the disk.
    #[default]
    Bitmap,
    /// Let writers wait.
    Throttle,
}

/// What is known of the volume's pages when the capture starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// Nothing: the first replication. Every page is read.
    Nothing,
    /// The hashes hold, but for what the write-intent log marks. Only that is compared; everything, where the log is missing,
    /// damaged, or another disk's.
    Hashes,
    /// The disk may have been written without us: every page is compared.
    Void,
}

/// Removes the write-intent log of a volume that is captured in another way from now on: it says nothing any more.
///
/// # Errors
/// [`CaptureError`] where it stays.
pub fn forget(state_dir: &Path) -> Result<(), CaptureError> {
    let path = state_dir.join(INTENT_FILE);
    intent::remove_file(&path).map_err(|error| CaptureError::io("remove the write-intent log", &path, error))
}

/// What an export is made of.
#[derive(Debug, Clone)]
pub struct NbdConfig {
    /// The volume's name; the export's.
    pub name: String,
    /// The volume, for the write-intent log.
    pub volume: VolumeId,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// The disk or image file behind it.
    pub path: PathBuf,
    /// Where clients connect. Several volumes may share an address.
    pub listen: Vec<ListenAddr>,
    /// The volume's own directory, where the write-intent log is kept.
    pub state_dir: PathBuf,
    /// Least time between two points.
    pub epoch_interval: Duration,
    /// What to do where writers outrun the budget.
    pub overload: Overload,
    /// What contents are charged to.
    pub budget: Budget,
    /// Most bytes of the budget that this volume's contents take before they are sealed; at least 4 MiB.
    pub payload_max: u64,
    /// Tells the time of cuts.
    pub clock: Clock,
    /// Programs that bring an application to rest, where there are any.
    pub hooks: Option<Hooks>,
    /// Where people are told.
    pub events: Events,
    /// What is known of its pages.
    pub known: Known,
}

/// The capture of one exported disk.
#[derive(Debug)]
pub struct NbdCapture {
    export: Arc<Export>,
    server: NbdServer,
    clock: Clock,
    epoch_interval: Duration,
    wishes: Vec<PointWish>,
    hooks: Option<Hooks>,
    /// Set while an application is at rest for a cut to come.
    at_rest: Option<Session>,
    /// What the backfill set came from at first.
    beginning: Option<CaptureState>,
    _sweeper: Sweeper,
}

impl NbdCapture {
    /// Opens disk and write-intent log. Nobody is served yet.
    fn open(config: &NbdConfig) -> Result<Arc<Export>, CaptureError> {
        let backing = FileBacking::open(&config.path)?;
        let geometry = backing.geometry();
        let identity = LogIdentity { volume: config.volume, incarnation: config.incarnation, geometry };
        let path = config.state_dir.join(INTENT_FILE);
        let known = match config.known {
            Known::Hashes => IntentLog::open(&path, &identity),
            Known::Nothing | Known::Void => Err(String::new()),
        };
        let (intent, backfill) = match known {
            Ok(opened) => opened,
            Err(reason) => {
                if !reason.is_empty() {
                    let text = format!("{reason}: the whole disk is compared with what the store has");
                    config.events.note(&config.name, EventKind::TrackingLost, text);
                }
                let made = IntentLog::create(&path, &identity);
                let made = made.map_err(|error| CaptureError::io("make the write-intent log", &path, error))?;
                (made, PageSet::full(geometry))
            }
        };
        Ok(Arc::new(Self::export(config, Box::new(backing), geometry, intent, backfill)))
    }

    fn export(
        config: &NbdConfig,
        backing: Box<dyn Backing>,
        geometry: Geometry,
        intent: IntentLog,
        backfill: PageSet,
    ) -> Export {
        let payload_max = config.payload_max.max(PAYLOAD_BYTES_MIN);
        let core = Admission::new(config.budget.clone(), config.overload, payload_max, backfill);
        let path = BackingPath(config.path.clone());
        Export::new(config.name.clone(), path, geometry, backing, intent, core, config.events.clone())
    }

    fn over(config: &NbdConfig, server: NbdServer, export: Arc<Export>) -> Result<Self, CaptureError> {
        let pages = export.core().backlog_bytes() / common::limits::PAGE_BYTES as u64;
        let beginning = match config.known {
            _ if pages == 0 => None,
            Known::Nothing => Some(CaptureState::First),
            Known::Hashes | Known::Void => {
                let text = format!("{pages} pages are compared with what the store has");
                config.events.note(&config.name, EventKind::Verifying, text);
                Some(CaptureState::Verifying)
            }
        };
        Ok(Self {
            server,
            clock: config.clock.clone(),
            epoch_interval: config.epoch_interval,
            wishes: Vec::new(),
            hooks: config.hooks.clone(),
            at_rest: None,
            beginning,
            _sweeper: Sweeper::start(Arc::clone(&export))
                .map_err(|error| CaptureError::io("start a thread for", &config.path, error))?,
            export,
        })
    }

    /// Ends the protection: serves nobody any more, and removes the write-intent log.
    ///
    /// # Errors
    /// [`CaptureError`] where the log stays.
    pub fn detach(self) -> Result<(), CaptureError> {
        self.server.remove_export(&self.export);
        let removed = self.export.intent().remove();
        removed.map_err(|error| self.export.path().io_error("remove the write-intent log of", error))
    }

    /// Cuts, if it is time to. Otherwise how long to wait, if not for something to happen.
    fn try_cut(&mut self) -> Result<Cut, Option<Duration>> {
        let mut core = self.export.core();
        let plan = core.plan(!self.wishes.is_empty(), self.epoch_interval, self.export.now());
        let caught_up = core.caught_up();
        let verified = (!core.is_backfilling()).then(|| self.beginning.take()).flatten();
        if caught_up || verified.is_some() {
            drop(core);
            if caught_up {
                self.export
                    .note(EventKind::CaughtUp, "what was not kept has been read from the disk: points are made again");
            }
            if verified == Some(CaptureState::Verifying) {
                self.export.note(EventKind::Verified, "the disk and what the store has were compared");
            }
            core = self.export.core();
        }
        match plan {
            Plan::Wait(time) => Err(time),
            Plan::Backfill => {
                let (set, before) = core.cut_backfill();
                drop(core);
                // There can be no point now: the application is not kept waiting for it.
                self.at_rest = None;
                let id = set.id;
                let pages = Arc::new(BackfillPages::new(Arc::clone(&self.export), set, before));
                let time = self.clock.now();
                Ok(Cut { id, pages, time, asserts: Asserts::Nothing, group: None, weaker: String::new() })
            }
            Plan::Ordinary => {
                drop(core);
                Ok(self.cut())
            }
        }
    }

    /// Cuts what was admitted; with other disks, where that was wished and can be.
    fn cut(&mut self) -> Cut {
        let point = !self.export.core().is_backfilling();
        let mut group = None;
        let mut groups = self.wishes.iter().filter_map(|wish| wish.group.clone());
        if point && let Some(asked) = groups.next() {
            // One cut can be the instant of one group.
            groups.filter(|other| other.point != asked.point).for_each(|other| other.give_up());
            self.export.hold(true);
            if asked.arrive(GROUP_PATIENCE) {
                group = Some(asked);
            }
        }
        let mut core = self.export.core();
        let frozen = core.cut(self.export.now());
        let frozen_bytes = Arc::clone(&core.frozen_bytes);
        drop(core);
        let time = self.clock.now();
        self.export.hold(false);
        let id = frozen.set.id;
        let (asserts, weaker) = if frozen.point {
            let asked = self.wishes.drain(..).map(|wish| wish.consistency).max_by_key(|asked| *asked as u8);
            let (got, weaker) = self.consistency(asked.unwrap_or(Consistency::Crash));
            (Asserts::Point(got), weaker)
        } else {
            // Dropping it runs the post hooks; the wish stays.
            self.at_rest = None;
            group = None;
            (Asserts::Nothing, String::new())
        };
        let pages = Arc::new(FrozenPages::new(Arc::clone(&self.export), frozen, frozen_bytes));
        Cut { id, pages, time, asserts, group, weaker }
    }

    /// How consistent the cut just made is, and why no more. Lets the application go on.
    fn consistency(&mut self, asked: Consistency) -> (Consistency, String) {
        let session = self.at_rest.take();
        let outcome = match (asked, &session) {
            (Consistency::Application, Some(session)) => match session.problem() {
                None => (Consistency::Application, String::new()),
                Some(problem) => (Consistency::Crash, format!("a pre hook failed: {problem}")),
            },
            (Consistency::Application, None) => (Consistency::Crash, "there are no hooks".to_owned()),
            (Consistency::Filesystem, _) => {
                (Consistency::Crash, "an nbd export sees writes, not file systems, and can't freeze them".to_owned())
            }
            (Consistency::Crash | Consistency::Fuzzy, _) => (Consistency::Crash, String::new()),
        };
        if let Some(session) = session {
            if let Some(problem) = session.problem() {
                self.export.note(EventKind::HookFailed, problem);
            }
            // On a task of its own: the cut is not kept waiting, nor lost with the future that makes it.
            let export = Arc::clone(&self.export);
            tokio::spawn(async move {
                if let Some(problem) = session.post(true).await {
                    export.note(EventKind::HookFailed, &problem);
                }
            });
        }
        outcome
    }

    /// Where an application point is wished and can be made, brings the application to rest. Safe to cancel.
    async fn rest_application(&mut self) {
        let wished = self.wishes.iter().any(|wish| wish.consistency == Consistency::Application);
        let Some(hooks) = self.hooks.as_ref().filter(|_| wished && self.at_rest.is_none()) else { return };
        if self.export.core().is_backfilling() {
            return;
        }
        let context = HookContext {
            volume: self.export.name().to_owned(),
            point: self.export.core().next_cut().0.to_string(),
            device: self.export.path().0.clone(),
        };
        self.at_rest = Some(hooks.pre(&context).await);
    }
}

impl Capture for NbdCapture {
    fn geometry(&self) -> Geometry {
        self.export.geometry()
    }

    fn next(&mut self) -> NextCut<'_> {
        Box::pin(async move {
            loop {
                self.rest_application().await;
                let export = Arc::clone(&self.export);
                // Taken before the look, so that what happens after it is not missed.
                let woken = export.wake.notified();
                match off_the_runtime(|| self.try_cut()) {
                    Ok(cut) => return Ok(cut),
                    Err(None) => woken.await,
                    Err(Some(time)) => {
                        let _ = tokio::time::timeout(time, woken).await;
                    }
                }
            }
        })
    }

    fn want_point(&mut self, wish: PointWish) {
        if let Some(group) = wish.group.as_ref().filter(|_| self.export.core().is_backfilling()) {
            // It may be long until there is a point here; the others are not kept waiting.
            group.give_up();
        }
        self.wishes.push(wish);
        self.export.wake.notify_one();
    }

    fn committed(&mut self, cut: CutId) -> Result<(), CaptureError> {
        self.export.core().committed(cut);
        Ok(())
    }

    fn lost(&mut self, from: CutId) -> Result<(), CaptureError> {
        self.export.core().lost(from);
        self.export.wake.notify_one();
        Ok(())
    }

    fn status(&self) -> CaptureStatus {
        let core = self.export.core();
        let state = if core.is_overloaded() {
            CaptureState::Overloaded
        } else if !core.is_backfilling() {
            CaptureState::Following
        } else {
            self.beginning.filter(|_| !core.is_catching_up()).unwrap_or(CaptureState::CatchingUp)
        };
        let (backlog_bytes, overloads) = (core.backlog_bytes(), core.overloads());
        drop(core);
        let warning = if self.export.intent().is_abandoned() {
            "the write-intent log can't be written and was removed: after a crash the whole disk is compared".to_owned()
        } else {
            String::new()
        };
        CaptureStatus { state, backlog_bytes, tracks: true, overloads, warning }
    }
}

impl Drop for NbdCapture {
    fn drop(&mut self) {
        off_the_runtime(|| self.server.remove_export(&self.export));
    }
}

/// Runs what may block for a moment, so that other tasks of the runtime go on.
fn off_the_runtime<T>(work: impl FnOnce() -> T) -> T {
    match tokio::runtime::Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(tokio::runtime::RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

/// The thread that clears bits of the write-intent log.
#[derive(Debug)]
struct Sweeper {
    stop: Option<std::sync::mpsc::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Sweeper {
    fn start(export: Arc<Export>) -> std::io::Result<Self> {
        let (stop, stopped) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name("nbd-intent".to_owned()).spawn(move || {
            while stopped.recv_timeout(SWEEP_INTERVAL) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                match export.sweep() {
                    Ok(0) => {}
                    Ok(cleared) => tracing::debug!(volume = %export.name(), cleared, "regions are settled"),
                    Err(error) => tracing::warn!(
                        volume = %export.name(), %error,
                        "the write-intent log can't be cleared; after a crash more than needed is compared"
                    ),
                }
            }
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It ends by itself; a panic in it has ended the process.
            let _ = thread.join();
        }
    }
}
