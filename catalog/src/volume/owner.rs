//! Who has the right to write a volume's log: the receiver that wrote the newest entry of the newest generation.

use common::format::log::LogEntry;
use common::ids::{LogSeq, ReceiverId, VolumeId};

use super::log::LogError;
use super::paths;
use crate::store::Store;

/// The receiver that had the right to write the log at entry `seq`; `None` for an empty log.
///
/// That is who committed the newest epoch in it, or who took the generation since. An entry that does neither, of somebody who
/// maintains the log, keeps the generation of the one before and says nothing of this.
///
/// # Errors
/// The store's; [`LogError::Damaged`].
pub async fn owner(store: &Store, volume: VolumeId, seq: LogSeq) -> Result<Option<ReceiverId>, LogError> {
    let mut found = match seq.0 {
        0 => None,
        _ => entry(store, volume, seq).await?,
    };
    while let Some(newest) = found {
        if !newest.epochs.is_empty() || newest.seq.0 <= 1 {
            return Ok(Some(newest.writer));
        }
        let before = entry(store, volume, LogSeq(newest.seq.0 - 1)).await?;
        if before.as_ref().is_none_or(|before| before.generation < newest.generation) {
            return Ok(Some(newest.writer));
        }
        found = before;
    }
    Ok(None)
}

/// One entry of the log as it lies there, not checked against its neighbours; `None` where there is none.
///
/// # Errors
/// As [`owner`].
pub async fn entry(store: &Store, volume: VolumeId, seq: LogSeq) -> Result<Option<LogEntry>, LogError> {
    let path = paths::log_entry(volume, seq);
    match store.get(&path).await {
        Ok(bytes) => LogEntry::decode(&bytes).map(Some).map_err(|source| LogError::Damaged { path, source }),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}
