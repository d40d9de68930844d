//! The tracker of `capture=ebpf` as a live capture asks for it.

use std::path::{Path, PathBuf};

use common::pages::PageSet;

use super::config::Start;
use super::tracker::{ChangeTracker, SavedSet};
use crate::capture::CaptureError;
use crate::capture::ebpf::{Adopted, DeviceId, Swapped, Tracker, TrackerError, remove_pins};

/// Changed pages by the kernel's block tracepoints.
#[derive(Debug)]
pub struct EbpfTracker {
    tracker: Tracker,
    path: PathBuf,
    pin_directory: PathBuf,
    state_directory: PathBuf,
}

/// What an attach came to.
#[derive(Debug)]
pub struct Attached {
    /// Tracks from now on.
    pub tracker: EbpfTracker,
    /// What is known of the disk.
    pub start: Start,
    /// Why tracking could not go on where it was; empty where it could, or had not begun.
    pub interrupted: String,
}

impl EbpfTracker {
    /// Begins to track the device at `path`, or goes on where an earlier sender was. `hashes` says whether any page of the
    /// volume is committed: if so, a disk of which nothing else is known is verified, not sent again. See [`Tracker::attach`]
    /// for the directories.
    ///
    /// # Errors
    /// [`CaptureError::Tracking`].
    pub fn attach(
        path: &Path,
        pin_directory: &Path,
        state_directory: &Path,
        hashes: bool,
    ) -> Result<Attached, CaptureError> {
        let failed = tracking(path);
        let device = DeviceId::of(path).map_err(&failed)?;
        let (tracker, adopted) = Tracker::attach(&device, pin_directory, state_directory).map_err(&failed)?;
        let all = if hashes { Start::Verify } else { Start::First };
        let (start, interrupted) = match adopted {
            Adopted::Fresh => (all, String::new()),
            Adopted::Pins(pages) => (Start::Pages(pages), String::new()),
            Adopted::Mismatch(reason) => (all, reason),
        };
        let tracker = Self {
            tracker,
            path: path.to_owned(),
            pin_directory: pin_directory.to_owned(),
            state_directory: state_directory.to_owned(),
        };
        Ok(Attached { tracker, start, interrupted })
    }

    fn of<T>(&self, result: Result<T, TrackerError>) -> Result<T, CaptureError> {
        result.map_err(tracking(&self.path))
    }
}

fn tracking(path: &Path) -> impl Fn(TrackerError) -> CaptureError {
    let path = path.to_owned();
    move |error| CaptureError::Tracking { path: path.clone(), source: Box::new(error) }
}

fn saved(swapped: Swapped) -> SavedSet {
    SavedSet { sequence: swapped.sequence, pages: swapped.pages }
}

impl ChangeTracker for EbpfTracker {
    fn swap(&mut self) -> Result<SavedSet, CaptureError> {
        let result = self.tracker.swap();
        self.of(result.map(saved))
    }

    fn switch(&mut self) -> Result<SavedSet, CaptureError> {
        let result = self.tracker.switch();
        self.of(result.map(saved))
    }

    fn settle(&mut self) -> Result<(), CaptureError> {
        let result = self.tracker.settle();
        self.of(result)
    }

    fn keep(&mut self, pages: &PageSet) -> Result<u64, CaptureError> {
        let result = self.tracker.keep(pages);
        self.of(result)
    }

    fn forget(&mut self, sequence: u64) -> Result<(), CaptureError> {
        let result = self.tracker.forget(sequence);
        self.of(result)
    }

    fn sequence(&self) -> u64 {
        self.tracker.sequence()
    }

    fn dirty_pages(&self) -> Result<u64, CaptureError> {
        self.of(self.tracker.dirty_pages())
    }

    fn marks(&self) -> Result<u64, CaptureError> {
        self.of(self.tracker.counts().map(|counts| counts.marks))
    }

    fn detach(&mut self) -> Result<(), CaptureError> {
        self.of(remove_pins(&self.pin_directory, &self.state_directory))
    }
}
