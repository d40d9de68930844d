//! Which pages of a live block device change, told by programs on the kernel's block tracepoints. No kernel module.
//!
//! ```text
//! write ─▶ issued: mark ─▶ driver ─▶ completed: mark ─▶ writer learns of it        (bpf/tracker.bpf.c, in the kernel)
//!                    ╲                     ╱
//!                     active buffer ◀─────     Tracker::switch: other buffer active, no program left in the first
//!                     other buffer ─▶ set of pages     ::settle: saved durably, then cleared     ::forget: committed
//! ```
//!
//! Promises: a page whose content changed since [`Tracker::attach`] returned is in a set that a later [`Tracker::swap`] gives,
//! also where the write was on its way during the swap (then it may be in both), and where the sender was dead meanwhile. Programs
//! and marks are pinned: they work on without a sender until [`Tracker::detach`]. A set that was given is saved on disk until
//! [`Tracker::forget`]. What cannot be known counts as changed: everything, if need be.
//! Never: stalls a writer, reads the disk, or believes marks of another disk or boot.
//!
//! Attach before the first read. What the tracepoints do not show is listed by [`preflight()`].

mod buffer;
mod device;
mod error;
mod libbpf;
mod pins;
pub mod preflight;
mod program;
mod saved;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::ids::Geometry;
use common::pages::PageSet;
use tracing::info;

use buffer::Layout;
use device::{Comparison, Identity};
use program::Generation;
use saved::Saved;

pub use device::{DeviceId, DeviceKind};
pub use error::TrackerError;
pub use pins::default_directory;
pub use preflight::{Finding, Severity, preflight};
pub use program::Counts;

/// How long an attach waits for the writes that a stacked device had on their way. See [`Tracker::attach`].
const QUIET_WAIT: Duration = Duration::from_secs(2);

/// What was found when a tracker was attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Adopted {
    /// This disk was not tracked before. All pages are unknown: read them all, or verify them by hash.
    Fresh,
    /// Tracking went on since an earlier sender. These pages changed since it last knew them as committed; all others did not.
    /// They are saved under [`Tracker::sequence`].
    Pins(PageSet),
    /// Tracking was interrupted, for this reason: verify all pages by hash.
    Mismatch(String),
}

/// The pages marked up to a switch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Swapped {
    /// Name of the set, for [`Tracker::forget`].
    pub sequence: u64,
    /// Pages that changed, or may have.
    pub pages: PageSet,
}

/// A moment in the sequence of marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(u64);

/// The tracking of one device. Dropping it changes nothing in the kernel: marks go on. May be used from any thread; calls wait
/// for the kernel (tens of milliseconds for a switch) and for the disk of the state directory.
#[derive(Debug)]
pub struct Tracker {
    device: DeviceId,
    geometry: Geometry,
    pin_directory: PathBuf,
    state_directory: PathBuf,
    generation: Generation,
    saved: Saved,
    /// The last number given to a set.
    sequence: u64,
    /// Number of the set that only the other buffer holds.
    unsettled: Option<u64>,
    /// Pages of swaps that failed after their switch: they go with the next one.
    owed: PageSet,
}

/// Memory that tracking a disk takes in the kernel, charged to the control group of the process that attached first, in bytes:
/// two buffers. A device that takes bios needs up to 2 MiB more, for those that are on their way.
#[must_use]
pub fn memory_bytes(geometry: Geometry) -> u64 {
    Layout::of(geometry).map_or(0, |layout| 2 * layout.bytes() as u64)
}

/// Removes all that an ended tracking left: pins, hence programs and marks, and saved sets. For volumes without a [`Tracker`].
///
/// # Errors
/// [`TrackerError::Pin`], [`TrackerError::State`].
pub fn remove_pins(pin_directory: &Path, state_directory: &Path) -> Result<(), TrackerError> {
    // Pins first: sets without pins mean "verify", pins without sets would mean "nothing changed".
    if pin_directory.exists() {
        for number in pins::generations(pin_directory)? {
            Generation::remove(&pin_directory.join(number.to_string()))?;
        }
        pins::remove_directory(pin_directory)?;
    }
    saved::remove_all(state_directory)
}

impl Tracker {
    /// Begins to track `device`, or goes on where pins of an earlier sender are found in `pin_directory` (on a BPF file system,
    /// see [`default_directory`]; one for each volume) that belong to this disk, this boot and these programs. Saved sets are
    /// kept in `state_directory`, which is the tracker's own.
    ///
    /// Of a device that takes bios it is not known where those go that were queued before; their completion marks everything.
    /// So this waits up to two seconds for a moment without any on their way.
    ///
    /// On [`Adopted::Fresh`] and [`Adopted::Mismatch`] the set of all pages is saved under [`Self::sequence`]: until that is
    /// forgotten, a restart gives all pages.
    ///
    /// # Errors
    /// [`TrackerError`]; [`TrackerError::Unsupported`] says what works instead.
    pub fn attach(
        device: &DeviceId,
        pin_directory: &Path,
        state_directory: &Path,
    ) -> Result<(Self, Adopted), TrackerError> {
        preflight::refuse(device)?;
        let geometry = device.geometry()?;
        let identity = Identity::of(device, &program::digest())?;
        pins::prepare(pin_directory)?;
        let saved = Saved::open(state_directory, identity.digest(), geometry)?;
        let found = Found::look(device, geometry, pin_directory, &identity)?;
        let attaching = Attaching { device, geometry, pin_directory, state_directory, identity, saved };
        match (found.same, found.other_programs) {
            (Some(generation), older) => attaching.adopt(generation, older),
            (None, older) if !older.is_empty() => attaching.replace(older, found.next_number),
            _ => attaching.begin(found.reason, found.next_number),
        }
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &DeviceId {
        &self.device
    }

    /// How it divides into pages.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The number of the newest set.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The pages marked since the last switch, which are from now on marked anew: [`Self::switch`] and [`Self::settle`].
    ///
    /// # Errors
    /// [`TrackerError`]. Nothing is lost: the pages come with the next swap.
    pub fn swap(&mut self) -> Result<Swapped, TrackerError> {
        if self.unsettled.is_some() {
            self.generation.buffers()?.1.collect(&mut self.owed);
            self.settle()?;
        }
        let swapped = self.switch()?;
        // Where this fails the pages are still in the other buffer, and collected from there at the next swap.
        self.settle()?;
        Ok(swapped)
    }

    /// The first half of a swap: writes no file, so that it may be used while a file system is frozen. Waits until no program
    /// marks in the old buffer any more. The pages are only in memory, this one's and the kernel's, until [`Self::settle`]; a
    /// sender that dies before finds them again.
    ///
    /// # Errors
    /// [`TrackerError::Unsettled`] where the last switch was not settled; [`TrackerError::Replaced`] where another disk is
    /// behind the device's number; [`TrackerError::Kernel`].
    pub fn switch(&mut self) -> Result<Swapped, TrackerError> {
        if self.unsettled.is_some() {
            return Err(TrackerError::Unsettled);
        }
        self.device.check()?;
        self.generation.switch()?;
        self.sequence += 1;
        self.unsettled = Some(self.sequence);
        let mut pages = std::mem::replace(&mut self.owed, PageSet::empty(self.geometry));
        self.generation.buffers()?.1.collect(&mut pages);
        Ok(Swapped { sequence: self.sequence, pages })
    }

    /// The second half of a swap: saves the pages durably, and only then clears their buffer. Without effect where that was
    /// done.
    ///
    /// # Errors
    /// [`TrackerError::State`], [`TrackerError::Kernel`]; may be called again.
    pub fn settle(&mut self) -> Result<(), TrackerError> {
        let Some(sequence) = self.unsettled else { return Ok(()) };
        let old = self.generation.buffers()?.1;
        let mut pages = PageSet::empty(self.geometry);
        old.collect(&mut pages);
        if !pages.is_empty() {
            self.saved.write(sequence, &pages)?;
            old.clear();
        }
        self.unsettled = None;
        Ok(())
    }

    /// Saves pages of the caller's durably, under a new number, which is returned: so that a long verification or catch-up can
    /// forget the large set it began with.
    ///
    /// # Errors
    /// [`TrackerError::State`]; [`TrackerError::Unsettled`] between a switch and its settling.
    pub fn keep(&mut self, pages: &PageSet) -> Result<u64, TrackerError> {
        if self.unsettled.is_some() {
            return Err(TrackerError::Unsettled);
        }
        self.saved.write(self.sequence + 1, pages)?;
        self.sequence += 1;
        Ok(self.sequence)
    }

    /// Forgets the saved sets up to and with `up_to`: all their pages are committed, or in a later set.
    ///
    /// # Errors
    /// [`TrackerError::State`]; the pages are read once more after a restart then.
    pub fn forget(&mut self, up_to: u64) -> Result<(), TrackerError> {
        self.saved.forget(up_to)
    }

    /// How many pages are marked since the last switch. Looks at the whole buffer: milliseconds for a disk of a TiB.
    ///
    /// # Errors
    /// [`TrackerError::Kernel`].
    pub fn dirty_pages(&self) -> Result<u64, TrackerError> {
        let mut pages = PageSet::empty(self.geometry);
        self.generation.buffers()?.0.collect(&mut pages);
        Ok(pages.len())
    }

    /// Now, for [`Self::marks_since`].
    ///
    /// # Errors
    /// [`TrackerError::Kernel`].
    pub fn mark(&self) -> Result<Mark, TrackerError> {
        Ok(Mark(self.generation.counts()?.sum))
    }

    /// Whether anything was written since: a write that was issued or completed. False proves that the disk rested.
    ///
    /// # Errors
    /// [`TrackerError::Kernel`].
    pub fn marks_since(&self, mark: &Mark) -> Result<bool, TrackerError> {
        Ok(self.mark()? != *mark)
    }

    /// What was counted since tracking of this disk began.
    ///
    /// # Errors
    /// [`TrackerError::Kernel`].
    pub fn counts(&self) -> Result<Counts, TrackerError> {
        self.generation.counts()
    }

    /// Ends tracking: programs, marks, pins and saved sets are gone afterwards.
    ///
    /// # Errors
    /// [`TrackerError::Pin`], [`TrackerError::State`]; [`remove_pins`] may be called then.
    pub fn detach(self) -> Result<(), TrackerError> {
        let (pin_directory, state_directory) = (self.pin_directory.clone(), self.state_directory.clone());
        drop(self);
        remove_pins(&pin_directory, &state_directory)
    }
}

/// What lies in a directory of pins.
struct Found {
    /// This disk and boot, these programs.
    same: Option<Generation>,
    /// This disk and boot, other programs.
    other_programs: Vec<Generation>,
    /// Why others were removed; empty where there were none.
    reason: String,
    next_number: u32,
}

impl Found {
    /// Looks at all generations; removes those that are of no use.
    fn look(
        device: &DeviceId,
        geometry: Geometry,
        directory: &Path,
        identity: &Identity,
    ) -> Result<Self, TrackerError> {
        let mut found = Self { same: None, other_programs: Vec::new(), reason: String::new(), next_number: 1 };
        for number in pins::generations(directory)? {
            found.next_number = found.next_number.max(number.saturating_add(1));
            let folder = directory.join(number.to_string());
            let useless = match Generation::identity_of(&folder).map(|text| identity.compare(&text)) {
                Ok(Comparison::Different(reason)) => Some(reason),
                Ok(comparison) => match Generation::open(device, geometry, &folder) {
                    Ok(generation) if comparison == Comparison::Same && found.same.is_none() => {
                        found.same = Some(generation);
                        None
                    }
                    Ok(generation) => {
                        found.other_programs.push(generation);
                        None
                    }
                    Err(error) => Some(format!("pins are incomplete ({error})")),
                },
                Err(error) => Some(format!("pins are incomplete ({error})")),
            };
            if let Some(reason) = useless {
                info!(folder = %folder.display(), reason, "pins that are of no use are removed");
                found.reason = reason;
                Generation::remove(&folder)?;
            }
        }
        Ok(found)
    }
}

/// What an attach works with.
struct Attaching<'a> {
    device: &'a DeviceId,
    geometry: Geometry,
    pin_directory: &'a Path,
    state_directory: &'a Path,
    identity: Identity,
    saved: Saved,
}

impl Attaching<'_> {
    fn tracker(self, generation: Generation) -> Tracker {
        Tracker {
            device: self.device.clone(),
            geometry: self.geometry,
            pin_directory: self.pin_directory.to_owned(),
            state_directory: self.state_directory.to_owned(),
            sequence: self.saved.newest(),
            unsettled: None,
            owed: PageSet::empty(self.geometry),
            generation,
            saved: self.saved,
        }
    }

    fn create(&self, number: u32) -> Result<Generation, TrackerError> {
        let folder = self.pin_directory.join(number.to_string());
        let created = Generation::create(self.device, self.geometry, &folder, &self.identity.text());
        created.inspect_err(|_| {
            // Incomplete pins are of no use to anybody; the next attach removes them where this fails.
            let _ = Generation::remove(&folder);
        })
    }

    /// Nothing is known: tracking begins.
    fn begin(mut self, reason: String, number: u32) -> Result<(Tracker, Adopted), TrackerError> {
        let reason = match (reason.is_empty(), self.saved.is_empty()) {
            (false, _) => Some(reason),
            (true, false) => Some("the kernel's marks are gone, as after a restart of the machine".to_owned()),
            (true, true) => None,
        };
        // Before there are pins: complete pins mean that what is not in a set did not change.
        let all = self.saved.newest() + 1;
        self.saved.write(all, &PageSet::full(self.geometry))?;
        self.saved.forget(all - 1)?;
        let generation = self.create(number)?;
        self.wait_for_quiet();
        // Nobody has read anything yet, and all pages are in the set that was saved.
        generation.buffers()?.0.unmark_everything();
        let tracker = self.tracker(generation);
        Ok((tracker, reason.map_or(Adopted::Fresh, Adopted::Mismatch)))
    }

    /// Goes on with pins that were found.
    fn adopt(self, generation: Generation, older: Vec<Generation>) -> Result<(Tracker, Adopted), TrackerError> {
        let mut union = self.saved.union()?;
        for one in &older {
            collect_both(one, &mut union)?;
        }
        let mut tracker = self.tracker(generation);
        if !tracker.generation.buffers()?.1.is_clear() {
            // A switch that was never settled.
            tracker.sequence += 1;
            tracker.unsettled = Some(tracker.sequence);
        }
        tracker.owed = union;
        let swapped = tracker.swap()?;
        tracker.finish(older, swapped)
    }

    /// Replaces the programs of another release, without a moment in which nobody marks.
    fn replace(self, older: Vec<Generation>, number: u32) -> Result<(Tracker, Adopted), TrackerError> {
        let generation = self.create(number)?;
        // The older programs know where the bios are that were on their way.
        self.wait_for_quiet();
        generation.buffers()?.0.unmark_everything();
        let mut union = self.saved.union()?;
        for one in &older {
            collect_both(one, &mut union)?;
        }
        let mut tracker = self.tracker(generation);
        tracker.owed = union;
        let swapped = tracker.swap()?;
        tracker.finish(older, swapped)
    }

    /// Waits, for devices that take bios, for a moment without one on its way.
    fn wait_for_quiet(&self) {
        let deadline = Instant::now() + QUIET_WAIT;
        while self.device.kind == DeviceKind::Bios && Instant::now() < deadline {
            let text = std::fs::read_to_string(self.device.disk_folder().join("inflight")).unwrap_or_default();
            if text.split_whitespace().nth(1) == Some("0") {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Tracker {
    /// The last step of an adoption: one set holds all, the others and the older programs go.
    fn finish(mut self, older: Vec<Generation>, swapped: Swapped) -> Result<(Self, Adopted), TrackerError> {
        let sequence = self.keep(&swapped.pages)?;
        self.forget(sequence - 1)?;
        for one in older {
            Generation::remove(one.folder())?;
        }
        Ok((self, Adopted::Pins(swapped.pages)))
    }
}

fn collect_both(generation: &Generation, into: &mut PageSet) -> Result<(), TrackerError> {
    let (active, other) = generation.buffers()?;
    active.collect(into);
    other.collect(into);
    Ok(())
}
