//! The second half of a volume's task: from uploaded segments to a released stage.

use std::sync::Arc;

use catalog::volume::checkpoint::{CheckpointBounds, open_view, write_checkpoint};
use catalog::volume::{LogError, LogWriter};
use common::format::close::Close;
use common::format::log::{CommittedEpoch, SegmentRef};
use common::format::volume_header::VolumeHeader;
use common::limits;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::hold::reopen;
use super::order::{Progress, Step, next_step};
use super::{Batch, ForwardEvent, Lost, Patience, Shared, kind_of, may_pass};
use crate::volumes::Hold;

/// Entries after which a checkpoint that failed is tried again.
const CHECKPOINT_RETRY_ENTRIES: u64 = 8;
/// Most memory for making one checkpoint.
const CHECKPOINT_BYTES_MAX: u64 = 48 << 20;

/// Commits batches in order until their channel ends.
pub(super) async fn commit(
    shared: &Arc<Shared>,
    hold: Hold,
    header: VolumeHeader,
    mut writer: LogWriter,
    mut entries: u64,
    mut batches: mpsc::Receiver<Batch>,
) -> Result<(), Lost> {
    let volume = header.volume;
    let mut checkpoint: Option<AbortOnDropHandle<bool>> = None;
    while let Some(Batch { mut uploads, epochs }) = batches.recv().await {
        let mut progress = Progress { segments: uploads.len(), ..Progress::default() };
        let mut stored: Vec<SegmentRef> = Vec::with_capacity(uploads.len());
        // In order: the log entry names segments by their place.
        uploads.reverse();
        loop {
            let step = next_step(&progress);
            shared.crash_point(step)?;
            match step {
                Step::Upload => {
                    let Some(upload) = uploads.pop() else { return Err(Lost::Task) };
                    stored.push(upload.await.map_err(|_| Lost::Task)??);
                    progress.uploaded += 1;
                }
                Step::Log => {
                    append(shared, &header, &mut writer, &stored, &epochs).await?;
                    shared.note_position(volume, hold, &writer);
                    entries += 1;
                    progress.logged = true;
                }
                Step::Tell => {
                    for (close, _) in &epochs {
                        let statement = close.statement();
                        metrics::counter!("blockferry_receiver_committed_bytes_total")
                            .increment(statement.record_bytes);
                        if let Some(point) = statement.point {
                            metrics::counter!("blockferry_receiver_points_total", "consistency" => point.as_str())
                                .increment(1);
                        }
                        shared.tell(ForwardEvent::Committed { volume, close: close.id() });
                    }
                    progress.told = true;
                }
                Step::Release => {
                    if let Some((close, _)) = epochs.last() {
                        shared.stage.release(volume, close.statement().epoch).await?;
                    }
                    progress.released = true;
                }
                Step::Done => break,
            }
        }
        if checkpoint.as_ref().is_some_and(AbortOnDropHandle::is_finished)
            && let Some(done) = checkpoint.take()
        {
            let failed = !done.await.unwrap_or(false);
            entries = if failed { limits::CHECKPOINT_INTERVAL_ENTRIES - CHECKPOINT_RETRY_ENTRIES } else { 0 };
        }
        if entries >= limits::CHECKPOINT_INTERVAL_ENTRIES && checkpoint.is_none() {
            let task = tokio::spawn(make_checkpoint(Arc::clone(shared), header.clone()));
            checkpoint = Some(AbortOnDropHandle::new(task));
        }
    }
    if let Some(checkpoint) = checkpoint {
        // One that fails costs later readers time, nothing else.
        drop(checkpoint.await);
    }
    Ok(())
}

/// Creates the log entry, however often the store fails.
async fn append(
    shared: &Shared,
    header: &VolumeHeader,
    writer: &mut LogWriter,
    segments: &[SegmentRef],
    epochs: &[(Close, Vec<u32>)],
) -> Result<(), Lost> {
    let committed: Vec<CommittedEpoch> = epochs
        .iter()
        .map(|(close, segments)| CommittedEpoch { close: close.clone(), segments: segments.clone() })
        .collect();
    let last = committed.last().map(|epoch| epoch.close.id());
    let mut patience = Patience::new(header.volume, "append to the volume's log");
    loop {
        match writer.append(segments.to_vec(), committed.clone()).await {
            Ok(_) => return Ok(()),
            Err(error) if may_pass(&error) => patience.after(&error, kind_of(&error)).await,
            // Too many attempts whose outcome is not known: the log itself tells which of them, if any, won. Where none did,
            // the epochs go from the stage once more, into segments of fresh names: a collector may have condemned these.
            Err(error @ (LogError::TooMuch { .. } | LogError::OtherAttempt { .. })) => {
                let (reopened, view) = reopen(shared, header).await?;
                *writer = reopened;
                if Some(view.position.head_id()) == last {
                    return Ok(());
                }
                return Err(error.into());
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Writes a checkpoint of the log as it is now; false where that failed.
async fn make_checkpoint(shared: Arc<Shared>, header: VolumeHeader) -> bool {
    let volume = header.volume;
    let result = async {
        let bytes = CHECKPOINT_BYTES_MAX.min(shared.budget.payload() / 2);
        let _permit = shared.budget.acquire(bytes).await.map_err(|error| error.to_string())?;
        let bounds = CheckpointBounds { index_bytes_max: bytes / 3 * 2, merge_bytes_max: bytes / 3 };
        let mut view = open_view(&shared.store, &header).await.map_err(|error| error.to_string())?;
        let written = write_checkpoint(&shared.store, &mut view, &shared.clock, bounds).await;
        written.map_err(|error| error.to_string())
    };
    match result.await {
        Ok(written) => {
            tracing::debug!(%volume, at = %written.at, bytes = written.bytes, "checkpoint written");
            true
        }
        Err(error) => {
            tracing::warn!(%volume, error, "a checkpoint could not be made; the log alone is enough, and it is tried again");
            metrics::counter!("blockferry_receiver_errors_total", "kind" => "checkpoint").increment(1);
            false
        }
    }
}
