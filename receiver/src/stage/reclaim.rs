//! The thread that frees space, off the path of acknowledgements and in small steps.
//!
//! Whole files go first. Where the stage is full and files are mostly dead but for a few records of a slow volume, the dead
//! epochs in them are range-deleted and the file is rewritten without them.

use std::sync::Arc;
use std::sync::mpsc;

use common::ids::BatchId;

use super::Shared;
use super::error::StageError;
use super::gate::Intake;
use super::index::Freed;

/// Files dropped by one change of the manifest.
const FILES_AT_ONCE: usize = 8;
/// Sparse files rewritten before new work is looked at.
const REWRITES_AT_ONCE: usize = 4;
/// Keys deleted by one write.
const KEYS_AT_ONCE: usize = 1024;

/// A message to the thread.
#[derive(Debug)]
pub(super) enum Work {
    /// Delete this, and see whether there is more to gain.
    Free(Freed),
    /// Finish what is queued, then end.
    Stop,
}

/// Runs until told to stop; what is not freed by then is found dead at the next start.
pub(super) fn run(shared: &Arc<Shared>, work: &mpsc::Receiver<Work>) {
    while let Ok(first) = work.recv() {
        let (mut freed, mut stop) = (Freed::default(), false);
        for next in std::iter::once(first).chain(work.try_iter()) {
            match next {
                Work::Free(more) => freed.add(more),
                Work::Stop => stop = true,
            }
        }
        let result = free(shared, freed).and_then(|()| {
            let full = matches!(*shared.intake.borrow(), Intake::Full { .. });
            if full && !stop { rewrite_sparse(shared) } else { Ok(()) }
        });
        if let Err(error) = result {
            tracing::error!(%error, "freeing staged space failed; intake stops until the receiver is started again");
            metrics::counter!("blockferry_receiver_errors_total", "kind" => error.kind()).increment(1);
            shared.fail(error);
        }
        if stop {
            return;
        }
    }
}

fn free(shared: &Shared, mut freed: Freed) -> Result<(), StageError> {
    for keys in freed.keys.chunks(KEYS_AT_ONCE) {
        shared.db.delete_keys(keys)?;
    }
    freed.batches.sort_unstable();
    freed.batches.dedup();
    for run in freed.batches.chunk_by(|a, b| a.0 + 1 == b.0).flat_map(|run| run.chunks(FILES_AT_ONCE)) {
        let (Some(&first), Some(&last)) = (run.first(), run.last()) else { continue };
        if !shared.db.delete_batches(first, last)? {
            // A file that reaches beyond the range, or one that a rewrite left in level 0.
            shared.db.delete_range(first, last)?;
        }
        deleted(shared, run);
    }
    if !freed.keys.is_empty() {
        shared.update_gate(&mut shared.lock(), true);
    }
    Ok(())
}

fn deleted(shared: &Shared, batches: &[BatchId]) {
    let mut state = shared.lock();
    for &batch in batches {
        state.index.batch_deleted(batch);
    }
    shared.update_gate(&mut state, true);
}

fn rewrite_sparse(shared: &Shared) -> Result<(), StageError> {
    let sparse = shared.lock().index.sparse_batches();
    for &(batch, dead) in sparse.iter().take(REWRITES_AT_ONCE) {
        for (volume, epoch) in shared.db.epochs_of_batch(batch)? {
            let live = {
                let state = shared.lock();
                state.index.state(volume, epoch).is_some()
            };
            if !live {
                shared.db.delete_epoch_in_batch(batch, volume, epoch)?;
            }
        }
        shared.db.compact(batch, batch)?;
        let mut state = shared.lock();
        state.index.compacted(batch, dead);
        shared.update_gate(&mut state, true);
    }
    if sparse.len() > REWRITES_AT_ONCE {
        // Comes back to the rest, if the stage is still full then, after what was queued meanwhile.
        shared.reclaim(Freed::default());
    }
    Ok(())
}
