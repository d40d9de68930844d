//! The log, entry by entry, going on after a bad one.

use std::collections::BTreeMap;

use catalog::store::Store;
use catalog::volume::history::History;
use catalog::volume::log::{check_close, check_close_alone};
use catalog::volume::{LogError, LogPosition, paths};
use common::format::close::Close;
use common::format::log::LogEntry;
use common::format::volume_header::VolumeHeader;
use common::ids::{Digest, LogSeq};
use futures::StreamExt as _;

use super::VerifyReport;
use crate::error::OperatorError;

/// Entries read at the same time.
const READS_IN_PARALLEL: usize = 16;

/// Checks every entry of the log and returns what the good ones say. Behind a bad entry the chain is taken up again at the next
/// good one, so that what that one refers to is checked too.
pub(super) async fn check(
    store: &Store,
    header: &VolumeHeader,
    report: &mut VerifyReport,
) -> Result<History, OperatorError> {
    let mut listed = BTreeMap::new();
    let mut listing = store.list_stream(&paths::log_folder(header.volume))?;
    while let Some(meta) = listing.next().await {
        let meta = meta?;
        match paths::sequence(&meta.path) {
            Some(seq) => drop(listed.insert(seq, meta.path)),
            None => tracing::warn!(path = meta.path, "not a log entry: ignored"),
        }
    }
    let last = listed.keys().next_back().copied().unwrap_or(LogSeq(0));
    let mut reads = futures::stream::iter(1..=last.0)
        .map(|seq| {
            let path = paths::log_entry(header.volume, LogSeq(seq));
            async move { (LogSeq(seq), store.get(&path).await, path) }
        })
        .buffered(READS_IN_PARALLEL);
    let mut history = History::default();
    let mut unknown_before = false;
    while let Some((seq, read, path)) = reads.next().await {
        report.log_entries += 1;
        let bytes = match read {
            Ok(bytes) => bytes,
            Err(error) => {
                report.bad(path, &error);
                unknown_before = true;
                continue;
            }
        };
        report.read(bytes.len() as u64);
        let entry = match LogEntry::decode(&bytes) {
            Ok(entry) => entry,
            Err(error) => {
                report.bad(path, &error);
                unknown_before = true;
                continue;
            }
        };
        let digest = LogEntry::digest_of(&bytes);
        let followed = if unknown_before {
            behind_gap(header, &path, seq, &entry, digest)
        } else {
            let mut position = history.position.clone();
            position.follow(header, &path, &entry, digest).map(|()| position)
        };
        match followed {
            Ok(position) => history.position = position,
            Err(error) => {
                if let LogError::BrokenChain { .. } = error {
                    // Which of the two was replaced is not known: name both.
                    let before = paths::log_entry(header.volume, LogSeq(seq.0 - 1));
                    report.bad(before, "the entry after it follows another one: one of the two was replaced");
                }
                report.bad(path, &error);
                unknown_before = true;
                continue;
            }
        }
        unknown_before = false;
        history.push(&entry);
    }
    Ok(history)
}

/// The position behind an entry whose predecessor is lost: what can be judged of it alone is.
fn behind_gap(
    header: &VolumeHeader,
    path: &str,
    seq: LogSeq,
    entry: &LogEntry,
    digest: Digest,
) -> Result<LogPosition, LogError> {
    if entry.volume != header.volume || entry.seq != seq {
        return Err(LogError::WrongPlace { path: path.to_owned(), volume: entry.volume, seq: entry.seq });
    }
    let mut head: Option<&Close> = None;
    for committed in &entry.epochs {
        match head {
            None => check_close_alone(header, path, &committed.close)?,
            Some(_) => check_close(header, path, head, &committed.close)?,
        }
        head = Some(&committed.close);
    }
    Ok(LogPosition { seq, digest, generation: entry.generation, head: head.cloned() })
}
