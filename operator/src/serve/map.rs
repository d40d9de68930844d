//! Where the pages of a point lie, a window of the disk at a time, planned when first asked for.
//!
//! Promises: a window is planned once, by whoever asks first, while others wait; windows that were not asked for longest are
//! forgotten where all together are over their share of memory, and planned again when needed. Never: keeps part of a plan
//! that was not proven complete.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::error::{Dispose as _, Disposition};
use common::ids::{Geometry, PageMask};

use crate::error::OperatorError;
use crate::point::PointSource;
use crate::restore::plan::LiveRecord;

/// Blocks planned at a time: 64 GiB of disk. Some 16 MiB where each block has one record.
const WINDOW_BLOCKS: u64 = 1 << 18;
/// How long an error is repeated before the window is planned anew.
const ERROR_PAUSE: Duration = Duration::from_secs(5);

/// The live records of a window, by block.
#[derive(Debug)]
pub(super) struct Window {
    records: Vec<LiveRecord>,
}

impl Window {
    /// Records in any order.
    pub(super) fn new(mut records: Vec<LiveRecord>) -> Self {
        records.sort_unstable_by_key(|record| record.block);
        records.shrink_to_fit();
        Self { records }
    }

    /// The records that have a page of `block`. Pages that none has are zero.
    pub(super) fn records_of(&self, block: u64) -> &[LiveRecord] {
        let start = self.records.partition_point(|record| u64::from(record.block) < block);
        let end = self.records.partition_point(|record| u64::from(record.block) <= block);
        &self.records[start..end]
    }

    /// The pages of `block` that are not zero.
    pub(super) fn data_of(&self, block: u64) -> PageMask {
        self.records_of(block).iter().fold(PageMask::EMPTY, |mask, record| mask.or(record.live))
    }

    fn bytes(&self) -> u64 {
        (self.records.len() * size_of::<LiveRecord>()) as u64 + 64
    }
}

/// What is known of one window.
type Slot = Arc<tokio::sync::Mutex<Option<Planned>>>;

/// A plan, or why there is none and since when.
#[derive(Debug, Clone)]
enum Planned {
    Window(Arc<Window>),
    Failed(Arc<OperatorError>, Instant),
}

#[derive(Debug, Default)]
struct Known {
    slots: HashMap<u64, Slot>,
    /// Windows with a plan and its bytes, in the order of their last use.
    order: Vec<(u64, u64)>,
}

/// All windows of one point.
#[derive(Debug)]
pub(super) struct Map {
    source: Arc<PointSource>,
    bytes_max: u64,
    known: Mutex<Known>,
}

impl Map {
    /// Nothing is planned yet; plans are to stay within `bytes_max`, but for a single one.
    pub(super) fn new(source: Arc<PointSource>, bytes_max: u64) -> Self {
        Self { source, bytes_max, known: Mutex::default() }
    }

    /// The disk.
    pub(super) fn geometry(&self) -> Geometry {
        self.source.geometry
    }

    /// The window that `block` lies in, and the first block behind it.
    ///
    /// # Errors
    /// Those of planning. One that is no passing fault is repeated for a while without another attempt.
    pub(super) async fn window(&self, block: u64) -> Result<(Arc<Window>, u64), Arc<OperatorError>> {
        let number = block / WINDOW_BLOCKS;
        let blocks = number * WINDOW_BLOCKS..(number + 1) * WINDOW_BLOCKS;
        let slot = self.slot(number);
        let mut planned = slot.lock().await;
        match &*planned {
            Some(Planned::Window(window)) => {
                self.used(number, window.bytes());
                return Ok((Arc::clone(window), blocks.end));
            }
            Some(Planned::Failed(error, since)) if since.elapsed() < ERROR_PAUSE => return Err(Arc::clone(error)),
            _ => {}
        }
        match self.source.plan(blocks.clone()).await {
            Ok(plan) => {
                let window = Arc::new(Window::new(plan.records));
                *planned = Some(Planned::Window(Arc::clone(&window)));
                self.used(number, window.bytes());
                Ok((window, blocks.end))
            }
            Err(error) => {
                let error = Arc::new(error);
                if error.disposition() != Disposition::Retry {
                    *planned = Some(Planned::Failed(Arc::clone(&error), Instant::now()));
                }
                Err(error)
            }
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, number: u64) -> Slot {
        Arc::clone(self.known().slots.entry(number).or_default())
    }

    /// Notes a use, and forgets what was not used for longest.
    fn used(&self, number: u64, bytes: u64) {
        let mut known = self.known();
        known.order.retain(|(other, _)| *other != number);
        known.order.push((number, bytes));
        while known.order.len() > 1 && known.order.iter().map(|(_, bytes)| bytes).sum::<u64>() > self.bytes_max {
            let (oldest, _) = known.order.remove(0);
            known.slots.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::ids::SealTag;

    fn record(block: u32, live: u64) -> LiveRecord {
        let tag = SealTag([0; 16]);
        LiveRecord { live: PageMask(live), segment: 0, offset: 16, len: 100, block, epoch: 0, tag }
    }

    #[test]
    fn a_window_knows_all_records_of_a_block_and_none_of_another() {
        let window = Window::new(vec![record(7, 0b100), record(3, 1), record(7, 0b011)]);
        assert_eq!(window.records_of(7).len(), 2);
        assert_eq!(window.data_of(7), PageMask(0b111));
        assert_eq!(window.data_of(3), PageMask(1));
        assert!(window.records_of(4).is_empty() && window.data_of(8).is_empty());
    }
}
