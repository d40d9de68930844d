//! Capture of a device that is in use: a tracker says which pages change, and a short freeze gives a point.
//!
//! ```text
//! first replication, verification ─▶ cuts of up to 64 MiB that assert nothing
//! a point is due ─▶ flush ─▶ does the rest fit the freeze limit? ── no ──▶ swap, a cut that asserts nothing, once more
//!                                        │ yes
//!                     pre hooks, if due ─▶ flush, does it still fit? ─▶ watchdog ─▶ freeze ─▶ switch ─▶ copy ─▶ nothing
//!                     written since the freeze? ─▶ thaw ─▶ settle ─▶ post hooks ─▶ a cut that asserts a point
//! ```
//!
//! Without a mounted file system there is nothing to freeze: the last pages are read at once, and the cut is crash consistent
//! where nothing was written meanwhile, else fuzzy.
//!
//! What makes it true (the rules of [`cut`](crate::capture::cut)):
//! - The tracker marked from before the first read. Pages of a set go to `pending`, from there to cuts; so each page that
//!   changed is marked, pending, or in a cut. Sets are forgotten only once a cut that left nothing pending is committed, with
//!   all before it.
//! - A cut asserts a point only where nothing is pending, all file systems were frozen from before the switch to after the last
//!   read, and no mark was made meanwhile.
//!
//! Promises: no freeze is longer than the limit, or no point is made of it; memory beyond page sets is charged to the budget;
//! where points can't be had it goes on replicating and says so.
//! Never: writes to the device; freezes without a watchdog.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::format::close::Consistency;
use common::ids::{BlockIndex, Geometry};
use common::limits::PAGE_BYTES;
use common::pages::PageSet;
use tokio::task::{JoinHandle, block_in_place};
use tokio::time::Instant;

use super::cut::{Asserts, Capture, CaptureState, CaptureStatus, Cut, CutId, CutPages, NextCut, PointWish};
use super::freeze::{Prepared, mounts};
use super::hooks::HookContext;
use super::{CaptureError, Disk};
use crate::events::EventKind;

mod attempt;
mod config;
mod copy;
mod ebpf;
mod frozen;
mod pages;
mod tracker;

#[cfg(test)]
mod tests;

use attempt::{Attempt, Holding};
pub use config::{LiveConfig, Start};
pub use ebpf::{Attached, EbpfTracker};
use frozen::{FreezeTimes, FrozenCut, Taken};
use pages::{DiskPages, Pieces, ReadSpeed, StillQuiet};
pub use tracker::{ChangeTracker, SavedSet};

/// Pages of a cut on the way to a point: 64 MiB.
const CUT_PAGES_MAX: u64 = (64 << 20) / PAGE_BYTES as u64;
/// Cuts on the way after which a rest that does not shrink is taken for one that never will.
const ROUNDS_MAX: u32 = 8;
/// The same where there is nothing to freeze: a round more would only make the rest older.
const ROUNDS_RAW_MAX: u32 = 2;
/// Cuts on the way while an application is held by its hooks.
const ROUNDS_HELD_MAX: u32 = 3;
/// Freezes that fail before a point is given up for now.
const FAILURES_MAX: u32 = 3;
/// Cuts on the way after which what is still pending is saved anew, so that a restart does not begin where this did: 1 GiB.
const CUTS_PER_KEEP: u64 = 16;
/// How soon an overloaded capture looks again whether there is room.
const OVERLOAD_PAUSE: Duration = Duration::from_secs(1);
/// How long a disk waits for others that are cut at the same instant.
const GATHER_PATIENCE: Duration = Duration::from_secs(20);

/// A cut that was handed out and is not committed.
struct Handed {
    id: CutId,
    pages: Arc<PageSet>,
    /// The newest set whose pages are all in this cut or an earlier one.
    covers: Option<u64>,
    point: bool,
}

/// What to do next.
enum Step {
    Cut(Cut),
    /// Nothing before this moment.
    Wait(Instant),
    /// Run the `pre` hooks.
    Hold,
    /// Wait for the other disks of a group.
    Gather(Prepared, u64),
    /// Look again.
    Again,
}

/// Captures one live device.
pub struct LiveCapture<T> {
    config: LiveConfig,
    disk: Arc<dyn Disk>,
    geometry: Geometry,
    tracker: Arc<Mutex<T>>,
    /// Pages that are in saved sets and in no cut.
    pending: PageSet,
    handed: VecDeque<Handed>,
    next_id: u64,
    cuts_since_keep: u64,
    state: CaptureState,
    overloads: u64,
    warning: String,
    attempt: Option<Attempt>,
    wish: Option<PointWish>,
    next_point: Instant,
    next_app_point: Option<Instant>,
    /// A point was made of everything that was committed or handed out, and not lost since.
    has_point: bool,
    /// A cut whose `post` hooks run.
    ready: Option<Cut>,
    post: Option<JoinHandle<Option<String>>>,
    speed: ReadSpeed,
    times: FreezeTimes,
}

impl<T: ChangeTracker> LiveCapture<T> {
    /// A capture of `disk`, whose changes `tracker` has marked since before anything of [`LiveConfig::start`] was known.
    pub fn new(config: LiveConfig, disk: Arc<dyn Disk>, tracker: T) -> Self {
        let geometry = disk.geometry();
        let (pending, state) = match &config.start {
            Start::First => (PageSet::full(geometry), CaptureState::First),
            Start::Verify => (PageSet::full(geometry), CaptureState::Verifying),
            Start::Pages(pages) => (pages.clone(), CaptureState::CatchingUp),
        };
        if matches!(config.start, Start::Verify) {
            config.events.note(&config.name, EventKind::Verifying, "the disk is compared with what is committed");
        }
        let now = Instant::now();
        let next_app_point = config.app_point_interval.filter(|_| config.hooks.is_some()).map(|_| now);
        Self {
            disk,
            geometry,
            tracker: Arc::new(Mutex::new(tracker)),
            pending,
            handed: VecDeque::new(),
            next_id: 1,
            cuts_since_keep: 0,
            state,
            overloads: 0,
            warning: String::new(),
            attempt: None,
            wish: None,
            next_point: now,
            next_app_point,
            has_point: false,
            ready: None,
            post: None,
            speed: ReadSpeed::new(Duration::from_micros(100)),
            times: FreezeTimes::default(),
            config,
        }
    }

    fn tracker(&self) -> std::sync::MutexGuard<'_, T> {
        self.tracker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn next_cut(&mut self) -> Result<Cut, CaptureError> {
        loop {
            if let Some(post) = &mut self.post {
                let problem = post.await.unwrap_or_else(|error| Some(format!("the post hooks ended early: {error}")));
                self.post = None;
                self.after_post(problem);
            }
            if let Some(cut) = self.ready.take() {
                return Ok(cut);
            }
            self.await_hooks().await;
            let gathered = match self.attempt.as_mut().and_then(|attempt| attempt.gathering.as_mut()) {
                Some((waiting, ..)) => Some(waiting.await.unwrap_or(false)),
                None => None,
            };
            let step = block_in_place(|| match gathered {
                Some(together) => self.after_gathering(together),
                None => self.step(),
            })?;
            match step {
                Step::Cut(cut) => return Ok(cut),
                Step::Again => {}
                Step::Wait(until) => tokio::time::sleep_until(until).await,
                Step::Hold => self.start_hooks(),
                Step::Gather(prepared, expected) => self.start_gathering(prepared, expected),
            }
        }
    }

    /// One step, decided from how things stand.
    fn step(&mut self) -> Result<Step, CaptureError> {
        if !self.pending.is_empty() {
            return Ok(Step::Cut(self.pending_cut()));
        }
        self.caught_up();
        let now = Instant::now();
        if self.wish.is_none() && self.attempt.is_none() && now < self.next_point {
            return Ok(Step::Wait(self.next_point));
        }
        self.disk.check_size()?;
        let users = mounts::find(&self.config.path)
            .map_err(|error| CaptureError::io("look who uses the device", &self.config.path, error))?;
        super::freeze::flush(&users.mounts);
        let dirty = self.tracker().dirty_pages()?;
        if dirty == 0 && self.has_point && self.wish.is_none() && self.attempt.is_none() {
            self.next_point = now + self.config.point_interval;
            return Ok(Step::Wait(self.next_point));
        }
        let attempt = self.begin_attempt(now)?;
        let raw = users.mounts.is_empty();
        attempt.raw.clone_from(&users.raw);
        if !self.times.fits(dirty, self.config.freeze_limit, self.copy_pages_max()) {
            let Some(attempt) = &self.attempt else { return Ok(Step::Again) };
            let most = if raw { ROUNDS_RAW_MAX } else { ROUNDS_MAX };
            if attempt.rounds < most && attempt.held_rounds < ROUNDS_HELD_MAX {
                return self.round();
            }
            if !raw {
                return self.outrun(dirty);
            }
        }
        if raw {
            let why = "no file system on the device is mounted, so there is nothing to freeze";
            return match self.snapshot_cut(why)? {
                Some(cut) => Ok(Step::Cut(cut)),
                None => self.unfrozen_cut(why).map(Step::Cut),
            };
        }
        if self.attempt.as_ref().is_some_and(Attempt::wants_hooks) {
            return Ok(Step::Hold);
        }
        let prepared = match Prepared::new(&users.mounts, self.config.freeze_limit, &self.config.watchdog) {
            Ok(prepared) => prepared,
            Err(error) => return self.freeze_failed(&error.to_string()),
        };
        if self.wish.as_ref().is_some_and(|wish| wish.group.is_some()) {
            return Ok(Step::Gather(prepared, dirty));
        }
        self.frozen_cut(prepared, dirty, false)
    }

    fn begin_attempt(&mut self, now: Instant) -> Result<&mut Attempt, CaptureError> {
        let asked = self.wish.as_ref().is_some_and(|wish| wish.consistency == Consistency::Application);
        if self.attempt.is_none() {
            let due = self.next_app_point.is_some_and(|due| due <= now) && self.wish.is_none();
            let random: [u8; 8] = common::rng::random()
                .map_err(|error| CaptureError::io("name a point", &self.config.path, std::io::Error::other(error)))?;
            self.attempt = Some(Attempt {
                rounds: 0,
                held_rounds: 0,
                failures: 0,
                application: due && self.config.hooks.is_some(),
                holding: Holding::No,
                gathering: None,
                weaker: Vec::new(),
                raw: Vec::new(),
                name: format!("{:016x}", u64::from_le_bytes(random)),
            });
        }
        let attempt = self.attempt.as_mut().ok_or(CaptureError::Missed { page: 0 })?;
        attempt.application |= asked && self.config.hooks.is_some();
        Ok(attempt)
    }

    /// A cut on the way: what is marked now goes to `pending`.
    fn round(&mut self) -> Result<Step, CaptureError> {
        let set = self.tracker().swap()?;
        self.pending.extend(&set.pages);
        Ok(Step::Again)
    }

    /// The next part of what is pending.
    fn pending_cut(&mut self) -> Cut {
        let mut pages = PageSet::empty(self.geometry);
        while pages.len() < CUT_PAGES_MAX
            && let Some((block, mask)) = self.pending.take_next(BlockIndex(0))
        {
            pages.insert(block, mask);
        }
        let pages = Arc::new(pages);
        let content = DiskPages {
            disk: Arc::clone(&self.disk),
            pieces: Pieces::new(Arc::clone(&pages)),
            on_their_way: self.on_their_way(),
            speed: self.speed.clone(),
            quiet: None,
        };
        self.hand_out(pages, Arc::new(content), Asserts::Nothing)
    }

    /// A cut of everything that is marked, which is crash consistent where nothing is written until it is read.
    fn unfrozen_cut(&mut self, why: &str) -> Result<Cut, CaptureError> {
        // Before the swap: a write between the two would be in the new buffer, and in no cut.
        let marks = self.tracker().marks()?;
        let mut set = self.tracker().swap()?.pages;
        // What a freeze that failed had taken.
        set.extend(&std::mem::replace(&mut self.pending, PageSet::empty(self.geometry)));
        let pages = Arc::new(set);
        let tracker = Arc::clone(&self.tracker);
        let quiet: StillQuiet =
            Box::new(move || Ok(tracker.lock().unwrap_or_else(PoisonError::into_inner).marks()? == marks));
        let content = DiskPages {
            disk: Arc::clone(&self.disk),
            pieces: Pieces::new(Arc::clone(&pages)),
            on_their_way: self.on_their_way(),
            speed: self.speed.clone(),
            quiet: Some(quiet),
        };
        let mut cut = self.hand_out(pages, Arc::new(content), Asserts::AtEnd);
        self.give_up_group();
        self.finish_attempt(&mut cut, why);
        Ok(cut)
    }

    /// A cut of what is marked, read from a snapshot: crash consistent. `None` where there are no snapshots of this disk, or none
    /// can be had now.
    fn snapshot_cut(&mut self, why: &str) -> Result<Option<Cut>, CaptureError> {
        let Some(snapshots) = self.config.snapshots.clone() else { return Ok(None) };
        // Before: so that little is marked while the snapshot is taken.
        let before = self.tracker().swap()?.pages;
        self.pending.extend(&before);
        let snapshot = match snapshots.take() {
            Ok(snapshot) if snapshot.geometry() == self.geometry => snapshot,
            other => {
                let problem = other.err().map_or_else(|| "it has another size".to_owned(), |error| error.to_string());
                self.config.events.note(&self.config.name, EventKind::FreezeFailed, format!("no snapshot: {problem}"));
                return Ok(None);
            }
        };
        // And after: what changed in between is in the snapshot, and what changed since then has to come again.
        let between = self.tracker().swap()?.pages;
        let mut set = std::mem::replace(&mut self.pending, between);
        set.extend(&self.pending);
        let pages = Arc::new(set);
        let content = DiskPages {
            disk: Arc::from(snapshot),
            pieces: Pieces::new(Arc::clone(&pages)),
            on_their_way: self.on_their_way(),
            speed: self.speed.clone(),
            quiet: None,
        };
        let mut cut = self.hand_out(pages, Arc::new(content), Asserts::Point(Consistency::Crash));
        self.give_up_group();
        self.finish_attempt(&mut cut, why);
        Ok(Some(cut))
    }

    /// Pages of cuts that are not committed.
    fn on_their_way(&self) -> PageSet {
        let mut union = PageSet::empty(self.geometry);
        self.handed.iter().for_each(|handed| union.extend(&handed.pages));
        union
    }

    fn hand_out(&mut self, pages: Arc<PageSet>, content: Arc<dyn CutPages>, asserts: Asserts) -> Cut {
        let id = CutId(self.next_id);
        self.next_id += 1;
        let covers = self.pending.is_empty().then(|| self.tracker().sequence());
        self.handed.push_back(Handed { id, pages, covers, point: asserts != Asserts::Nothing });
        self.has_point &= asserts != Asserts::Nothing;
        if let Some(attempt) = &mut self.attempt
            && asserts == Asserts::Nothing
        {
            attempt.rounds += 1;
            if matches!(attempt.holding, Holding::Held(_)) {
                attempt.held_rounds += 1;
            }
        }
        Cut { id, pages: content, time: self.config.clock.now(), asserts, group: None, weaker: String::new() }
    }

    /// The rest never fits: a point that somebody waits for is made without a freeze, others later.
    fn outrun(&mut self, dirty: u64) -> Result<Step, CaptureError> {
        let limit = self.config.freeze_limit.as_millis();
        let reason = format!(
            "{} MiB change faster than they can be read within --freeze-limit ({limit} ms)",
            (dirty * PAGE_BYTES as u64) >> 20
        );
        self.without_freeze(&reason)
    }

    /// A freeze came to nothing.
    fn freeze_failed(&mut self, reason: &str) -> Result<Step, CaptureError> {
        self.config.events.note(&self.config.name, EventKind::FreezeFailed, reason);
        let failures = self.attempt.as_mut().map_or(FAILURES_MAX, |attempt| {
            attempt.failures += 1;
            attempt.failures
        });
        if failures < FAILURES_MAX { Ok(Step::Again) } else { self.without_freeze(reason) }
    }

    fn without_freeze(&mut self, reason: &str) -> Result<Step, CaptureError> {
        if let Some(cut) = self.snapshot_cut(reason)? {
            return Ok(Step::Cut(cut));
        }
        self.warning = format!("no consistent point: {reason}");
        if self.wish.is_some() {
            return self.unfrozen_cut(reason).map(Step::Cut);
        }
        self.config.events.note(&self.config.name, EventKind::PointFailed, self.warning.clone());
        if let Some(attempt) = self.attempt.take()
            && let Holding::Held(session) = attempt.holding
        {
            self.post = Some(tokio::spawn(session.post(false)));
        }
        self.next_point = Instant::now() + self.config.point_interval;
        Ok(Step::Again)
    }

    /// Ends the attempt with a cut that asserts a point. `unfrozen` says why nothing was frozen, if so.
    fn finish_attempt(&mut self, cut: &mut Cut, unfrozen: &str) {
        let asked = self.wish.take().map(|wish| wish.consistency);
        self.has_point = true;
        let now = Instant::now();
        self.next_point = now + self.config.point_interval;
        let Some(attempt) = self.attempt.take() else { return };
        if attempt.application {
            self.next_app_point = self.config.app_point_interval.map(|interval| now + interval);
        }
        let mut weaker = attempt.weaker;
        weaker.extend(attempt.raw);
        // Somebody who asked for a crash consistent point has one, or is told at its end why not.
        if !unfrozen.is_empty() && asked.is_some_and(|asked| asked != Consistency::Crash) {
            weaker.insert(0, unfrozen.to_owned());
        }
        if weaker.is_empty() && asked == Some(Consistency::Application) && !attempt.application {
            weaker.push("there are no hooks (--hook-dir), so no application was brought to rest".to_owned());
        }
        cut.weaker = weaker.join("; ");
        // Once for each change, not for each point.
        if !cut.weaker.is_empty() && self.warning != cut.weaker {
            self.config.events.note(&self.config.name, EventKind::WeakerPoint, cut.weaker.clone());
        }
        self.warning.clone_from(&cut.weaker);
        if let Holding::Held(session) = attempt.holding {
            // Where nothing was frozen the pages are still to be read: the application goes on all the same.
            self.post = Some(tokio::spawn(session.post(unfrozen.is_empty())));
        }
    }

    fn after_post(&mut self, problem: Option<String>) {
        let Some(problem) = problem else { return };
        self.config.events.note(&self.config.name, EventKind::HookFailed, problem.clone());
        self.warning.clone_from(&problem);
        if let Some(cut) = &mut self.ready {
            cut.weaker = if cut.weaker.is_empty() { problem } else { format!("{}; {problem}", cut.weaker) };
        }
    }

    fn start_hooks(&mut self) {
        let (Some(hooks), Some(attempt)) = (self.config.hooks.clone(), &mut self.attempt) else { return };
        let context = HookContext {
            volume: self.config.name.clone(),
            point: attempt.name.clone(),
            device: self.config.path.clone(),
        };
        attempt.holding = Holding::Starting(tokio::spawn(async move { hooks.pre(&context).await }));
    }

    async fn await_hooks(&mut self) {
        let Some(attempt) = &mut self.attempt else { return };
        let Holding::Starting(starting) = &mut attempt.holding else { return };
        let session = starting.await;
        let problem = match &session {
            Ok(session) => session.problem().map(str::to_owned),
            Err(error) => Some(format!("the pre hooks ended early: {error}")),
        };
        match (session, problem) {
            (Ok(session), None) => attempt.holding = Holding::Held(session),
            (session, problem) => {
                attempt.holding = Holding::Failed;
                let problem = problem.unwrap_or_default();
                self.config.events.note(&self.config.name, EventKind::HookFailed, problem.clone());
                attempt.weaker.push(problem);
                self.post = session.ok().map(|session| tokio::spawn(session.post(false)));
            }
        }
    }

    fn start_gathering(&mut self, prepared: Prepared, expected: u64) {
        let group = self.wish.as_ref().and_then(|wish| wish.group.clone());
        let (Some(group), Some(attempt)) = (group, &mut self.attempt) else { return };
        let waiting = tokio::task::spawn_blocking(move || group.gather(GATHER_PATIENCE));
        attempt.gathering = Some((waiting, prepared, expected));
    }

    fn after_gathering(&mut self, together: bool) -> Result<Step, CaptureError> {
        let Some((_, prepared, expected)) = self.attempt.as_mut().and_then(|attempt| attempt.gathering.take()) else {
            return Ok(Step::Again);
        };
        if !together {
            self.give_up_group();
            return Ok(Step::Again);
        }
        // It waited for the others: there may be more by now.
        prepared.flush();
        let expected = expected.max(self.tracker().dirty_pages()?);
        self.frozen_cut(prepared, expected, true)
    }

    /// This disk goes on alone.
    fn give_up_group(&mut self) {
        if let Some(group) = self.wish.as_mut().and_then(|wish| wish.group.take()) {
            group.give_up();
            if let Some(attempt) = &mut self.attempt {
                attempt.weaker.push("the disks of the machine could not be cut at one instant".to_owned());
            }
        }
    }

    /// Most pages of the last copy: an eighth of the payload's memory.
    fn copy_pages_max(&self) -> u64 {
        self.config.budget.payload() / 8 / PAGE_BYTES as u64
    }

    fn frozen_cut(&mut self, prepared: Prepared, expected: u64, grouped: bool) -> Result<Step, CaptureError> {
        let group = self.wish.as_ref().filter(|_| grouped).and_then(|wish| wish.group.clone());
        // What is written between the count and the freeze is a part of what was counted, or little.
        let room = expected + expected / 2 + 512;
        let Some(permit) = self.config.budget.try_acquire(copy::bytes(room)) else {
            drop(prepared);
            self.give_up_group();
            if let Some(attempt) = self.attempt.take()
                && let Holding::Held(session) = attempt.holding
            {
                // Nobody knows how long it takes: the application is not held that long.
                self.post = Some(tokio::spawn(session.post(false)));
            }
            return Ok(Step::Wait(self.overloaded()));
        };
        if self.state == CaptureState::Overloaded {
            self.state = CaptureState::Following;
            let text = "there is room in the memory budget again: points are made";
            self.config.events.note(&self.config.name, EventKind::CaughtUp, text);
        }
        let taken = FrozenCut {
            disk: Arc::clone(&self.disk),
            tracker: &self.tracker,
            group: group.as_ref(),
            times: &mut self.times,
            clock: &self.config.clock,
            volume: &self.config.name,
        }
        .take(prepared, room, permit);
        let (set, copy, time, grouped) = match taken {
            Taken::Held { set, copy, time, grouped } => (set, copy, time, grouped),
            Taken::Broken { reason, pages } => {
                if let Some(pages) = pages {
                    self.pending.extend(&pages);
                }
                self.give_up_group();
                return self.freeze_failed(&reason);
            }
        };
        if group.is_some() && !grouped {
            self.give_up_group();
        }
        let pages = Arc::new(set);
        let content = copy.into_pages(Arc::clone(&pages), self.on_their_way());
        let consistency = self.attempt.as_ref().map_or(Consistency::Crash, Attempt::consistency);
        let mut cut = self.hand_out(pages, Arc::new(content), Asserts::Point(consistency));
        cut.time = time;
        cut.group = group.filter(|_| grouped);
        self.finish_attempt(&mut cut, "");
        if self.post.is_none() {
            return Ok(Step::Cut(cut));
        }
        self.ready = Some(cut);
        Ok(Step::Again)
    }

    fn overloaded(&mut self) -> Instant {
        if self.state != CaptureState::Overloaded {
            self.state = CaptureState::Overloaded;
            self.overloads += 1;
            let text =
                "the memory budget is full: changed pages are only marked until there is room, and no points are made";
            self.config.events.note(&self.config.name, EventKind::Overload, text);
        }
        self.next_point = Instant::now() + OVERLOAD_PAUSE;
        self.next_point
    }

    /// Nothing is pending.
    fn caught_up(&mut self) {
        let kind = match self.state {
            CaptureState::Following | CaptureState::Overloaded => return,
            CaptureState::Verifying => EventKind::Verified,
            _ => EventKind::CaughtUp,
        };
        self.state = CaptureState::Following;
        self.config.events.note(&self.config.name, kind, "all pages are captured; changes follow as they happen");
    }
}

impl<T: ChangeTracker> Capture for LiveCapture<T> {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn next(&mut self) -> NextCut<'_> {
        Box::pin(self.next_cut())
    }

    fn want_point(&mut self, wish: PointWish) {
        self.give_up_group();
        self.wish = Some(wish);
    }

    fn committed(&mut self, cut: CutId) -> Result<(), CaptureError> {
        let mut covered = None;
        let mut keep = false;
        while self.handed.front().is_some_and(|handed| handed.id <= cut) {
            if let Some(handed) = self.handed.pop_front() {
                covered = handed.covers.or(covered);
                self.cuts_since_keep += u64::from(handed.covers.is_none());
            }
        }
        if covered.is_some() {
            self.cuts_since_keep = 0;
        } else if self.cuts_since_keep >= CUTS_PER_KEEP {
            keep = true;
        }
        let mut tracker = self.tracker();
        if let Some(sequence) = covered {
            tracker.forget(sequence)?;
        } else if keep {
            // All that is saved and not committed, as one smaller set; marks are not in it, and stay.
            let mut rest = self.pending.clone();
            self.handed.iter().for_each(|handed| rest.extend(&handed.pages));
            let sequence = tracker.keep(&rest)?;
            tracker.forget(sequence - 1)?;
            drop(tracker);
            self.cuts_since_keep = 0;
        }
        Ok(())
    }

    fn lost(&mut self, from: CutId) -> Result<(), CaptureError> {
        while let Some(handed) = self.handed.pop_back_if(|handed| handed.id >= from) {
            self.pending.extend(&handed.pages);
            if handed.point {
                self.has_point = false;
                self.next_point = Instant::now();
            }
        }
        Ok(())
    }

    fn status(&self) -> CaptureStatus {
        let dirty = self.tracker().dirty_pages().unwrap_or(0);
        CaptureStatus {
            state: self.state,
            backlog_bytes: self.pending.bytes() + dirty * PAGE_BYTES as u64,
            tracks: true,
            overloads: self.overloads,
            warning: self.warning.clone(),
        }
    }

    fn detach(self: Box<Self>) -> Result<(), CaptureError> {
        self.tracker().detach()
    }
}

impl<T> Drop for LiveCapture<T> {
    fn drop(&mut self) {
        if let Some(group) = self.wish.take().and_then(|wish| wish.group) {
            group.give_up();
        }
    }
}
