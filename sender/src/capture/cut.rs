//! What every capture mode gives the agent: cuts, one after the other, and their pages.
//!
//! ```text
//! Capture::next ─▶ Cut { pages, asserts } ─▶ seal pool: CutPages::next ─▶ Piece ─▶ CutPages::read ─▶ seal ─▶ records
//! Capture::committed(cut)  its pages are in the store: forget that they changed
//! Capture::lost(cut)       its pages, and those of later cuts, are to be captured again
//! ```
//!
//! The order of cuts is the order of their epochs in the volume's history. What makes a point true (design: "for each page,
//! the newest record in committed epochs up to N is that page's content at N's cut") rests on two rules that each mode keeps:
//!
//! 1. A page that changed since its content was last given to a cut is in this cut or in a later one: never in none.
//! 2. A cut asserts a point only if every page that differs from the disk at the cut's instant is in it, with its content at
//!    that instant, or in an earlier cut with the content that it still had then.
//!
//! A cut that asserts nothing ([`Asserts::Nothing`]) is a step on the way: a part of the first replication, of a verification
//! after a restart, of catching up, or of pre-copy. It may be read from a changing disk, since whatever changes meanwhile is
//! in a later cut.

use std::pin::Pin;
use std::sync::Arc;

use common::budget::Permit;
use common::clock::UnixMillis;
use common::format::close::Consistency;
use common::ids::{BlockIndex, Geometry, PageMask};

use super::error::CaptureError;
use super::group::GroupCut;
use super::scan::CHUNK_BLOCKS;

/// Names a cut of one capture; later cuts have greater numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CutId(pub u64);

/// What the close of a cut's last epoch will assert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asserts {
    /// Nothing: a step on the way to a point.
    Nothing,
    /// A point of this consistency.
    Point(Consistency),
    /// A point whose consistency [`CutPages::finish`] tells once all pages are read (`scan`).
    AtEnd,
}

/// Masks of the blocks of one piece.
pub type PieceMasks = [PageMask; CHUNK_BLOCKS];

/// Up to [`CHUNK_BLOCKS`] consecutive blocks of a cut, and which of their pages are in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The first block.
    pub first: BlockIndex,
    /// Pages of it and of the blocks after it; empty for blocks that are not in the piece.
    pub masks: PieceMasks,
}

/// What was read of a piece.
#[derive(Debug)]
pub struct PieceRead {
    /// Pages whose content is in the buffer. May be fewer than the piece's: the others will be in a later cut.
    pub masks: PieceMasks,
    /// Those of them that need not travel where their content has the hash known as committed: no cut that is not committed
    /// yet holds them.
    pub comparable: PieceMasks,
    /// Bytes read from the source disk, for the metric: 0 for pages that were in memory.
    pub source_bytes: u64,
    /// Budget that was charged for a block's pages while they were kept in memory. Handed on to the block's record, so that
    /// sealing never waits for memory that only sealing can free.
    pub permits: [Option<Permit>; CHUNK_BLOCKS],
}

/// The pages of one cut; used by several threads at once.
pub trait CutPages: Send + Sync {
    /// The next piece. Pieces ascend, each page comes once. `None` when all were handed out. Does not wait.
    fn next(&self) -> Option<Piece>;

    /// Reads a piece's pages to their places in `buffer` (whole blocks behind one another, page-aligned address); the rest of
    /// the buffer may hold anything. The last page of the disk is padded with zeros.
    ///
    /// # Errors
    /// [`CaptureError`]; the cut fails then and its pages count as lost.
    fn read(&self, piece: &Piece, buffer: &mut [u8]) -> Result<PieceRead, CaptureError>;

    /// Called once, after the last read: what a cut with [`Asserts::AtEnd`] asserts, and a reason where that is weak.
    ///
    /// # Errors
    /// [`CaptureError`], as for [`Self::read`].
    fn finish(&self) -> Result<(Option<Consistency>, String), CaptureError> {
        Ok((None, String::new()))
    }

    /// Pages in the cut, for progress.
    fn pages(&self) -> u64;
}

/// Pages at one instant, or on the way to one.
pub struct Cut {
    /// Its name.
    pub id: CutId,
    /// Its pages; the cut's memory is freed when the last clone is dropped.
    pub pages: Arc<dyn CutPages>,
    /// When it was made.
    pub time: UnixMillis,
    /// What it asserts.
    pub asserts: Asserts,
    /// Where all disks of the machine were cut at one instant: that instant's name.
    pub group: Option<GroupCut>,
    /// Why the point is weaker than what was asked for; empty where it is not.
    pub weaker: String,
}

impl std::fmt::Debug for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cut").field("id", &self.id).field("asserts", &self.asserts).finish_non_exhaustive()
    }
}

/// What a capture is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CaptureState {
    /// Reading the disk for the first time.
    #[default]
    First,
    /// Comparing the disk, or a part of it, with known hashes after a restart.
    Verifying,
    /// Changes travel as they happen.
    Following,
    /// Overloaded: only which pages change is kept (`bitmap`), or writers wait (`throttle`).
    Overloaded,
    /// Reading what changed while it was overloaded.
    CatchingUp,
}

impl CaptureState {
    /// The word used in status, events and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Verifying => "verifying",
            Self::Following => "following",
            Self::Overloaded => "overloaded",
            Self::CatchingUp => "catching-up",
        }
    }
}

/// A capture's account of itself, for status and metrics.
#[derive(Debug, Clone, Default)]
pub struct CaptureStatus {
    /// What it is doing.
    pub state: CaptureState,
    /// Bytes of pages that changed and are in no cut yet, or still have to be read.
    pub backlog_bytes: u64,
    /// True where a backlog of 0 means that the disk and what was given to cuts are the same; a mode that only sees changes
    /// when it reads the disk does not know.
    pub tracks: bool,
    /// Times that it was overloaded.
    pub overloads: u64,
    /// What weakens it now, for people; empty where all is well.
    pub warning: String,
}

/// The future of [`Capture::next`].
pub type NextCut<'a> = Pin<Box<dyn Future<Output = Result<Cut, CaptureError>> + Send + 'a>>;

/// What somebody asked for.
#[derive(Debug, Clone)]
pub struct PointWish {
    /// The consistency asked for; the capture does its best and says where it falls short ([`Cut::weaker`]).
    pub consistency: Consistency,
    /// Set where other disks are to be cut at the same instant.
    pub group: Option<GroupCut>,
}

/// One protected disk, in one mode.
///
/// Made with tracking begun: a change made after its constructor returned is in a cut. Methods are called from one task;
/// those that are not async may block on files.
pub trait Capture: Send {
    /// Size and layout of the disk.
    fn geometry(&self) -> Geometry;

    /// Waits until there is something to replicate, by the mode's own interval or by a wish, and gives it. At most one cut's
    /// pages are read at a time: the agent asks again once it has sealed the last one, and while it did not, changes gather
    /// in the capture. Safe to cancel: nothing is lost with the future.
    fn next(&mut self) -> NextCut<'_>;

    /// Asks for a point now. The next cut that asserts one answers, also where nothing changed.
    fn want_point(&mut self, wish: PointWish);

    /// All pages of this cut, and of those before it, are committed: forget that they changed.
    ///
    /// # Errors
    /// [`CaptureError`] where that could not be noted; the pages travel once more then, nothing is lost.
    fn committed(&mut self, cut: CutId) -> Result<(), CaptureError>;

    /// This cut and all after it came to nothing: their pages are to be captured again.
    ///
    /// # Errors
    /// [`CaptureError`].
    fn lost(&mut self, from: CutId) -> Result<(), CaptureError>;

    /// How it stands.
    fn status(&self) -> CaptureStatus;

    /// Ends the disk's protection: removes what the mode keeps beyond the process (pins, maps, logs). Nothing of it is left
    /// after a success.
    ///
    /// # Errors
    /// [`CaptureError`], naming what could not be removed.
    fn detach(self: Box<Self>) -> Result<(), CaptureError> {
        Ok(())
    }
}
