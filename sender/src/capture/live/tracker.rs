//! What a live capture asks of whoever tracks changed pages.

use common::pages::PageSet;

use crate::capture::CaptureError;

/// Pages marked up to a switch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedSet {
    /// Names the set for [`ChangeTracker::forget`]; later sets have greater numbers.
    pub sequence: u64,
    /// Pages that changed, or may have.
    pub pages: PageSet,
}

/// Tracks which pages of one device change, from before it was made. A write marks its pages when it is issued and when it
/// completes.
pub trait ChangeTracker: Send + 'static {
    /// Both halves of a swap: the pages marked so far, saved durably; marks begin anew.
    ///
    /// # Errors
    /// [`CaptureError`]; the pages come with the next swap then.
    fn swap(&mut self) -> Result<SavedSet, CaptureError>;

    /// The first half, used while file systems are frozen: writes no file and logs nothing. [`Self::settle`] follows before the
    /// next switch or swap.
    ///
    /// # Errors
    /// As for [`Self::swap`].
    fn switch(&mut self) -> Result<SavedSet, CaptureError>;

    /// The second half: saves the switched set durably, and only then clears its marks.
    ///
    /// # Errors
    /// [`CaptureError`]; may be called again.
    fn settle(&mut self) -> Result<(), CaptureError>;

    /// Saves `pages` durably as a set of their own, and returns its number.
    ///
    /// # Errors
    /// [`CaptureError`].
    fn keep(&mut self, pages: &PageSet) -> Result<u64, CaptureError>;

    /// Forgets the sets up to `sequence`: their pages are committed, or in a later set.
    ///
    /// # Errors
    /// [`CaptureError`]; pages are read once more after a restart then.
    fn forget(&mut self, sequence: u64) -> Result<(), CaptureError>;

    /// Number of the newest set.
    fn sequence(&self) -> u64;

    /// Pages marked since the last switch.
    ///
    /// # Errors
    /// [`CaptureError`].
    fn dirty_pages(&self) -> Result<u64, CaptureError>;

    /// Marks made since tracking began: where it is the same at two moments nothing was written between them. Allocates
    /// nothing.
    ///
    /// # Errors
    /// [`CaptureError`].
    fn marks(&self) -> Result<u64, CaptureError>;

    /// Ends tracking, and removes what it left outside of the process. Only dropping it makes sense afterwards.
    ///
    /// # Errors
    /// [`CaptureError`], naming what could not be removed.
    fn detach(&mut self) -> Result<(), CaptureError>;
}
