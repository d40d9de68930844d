//! Small objects: the fleet's, checkpoints, and what else lies in a volume's folder.

use std::collections::HashSet;

use bytes::Bytes;
use catalog::store::{Store, StoreError};
use catalog::volume::checkpoint::check_fit;
use catalog::volume::history::History;
use catalog::volume::paths;
use catalog::volume::proofs::Proofs;
use common::format::FormatError;
use common::format::checkpoint::CheckpointHead;
use common::format::envelope::{HEAD_BYTES, OVERHEAD_BYTES};
use common::format::volume_header::VolumeHeader;
use common::format::volume_name::VolumeName;
use futures::StreamExt as _;

use super::VerifyReport;
use crate::error::OperatorError;

/// Folder of the fleet's objects.
const FLEET: &str = "v1/authority";
/// Objects read at the same time.
const READS_IN_PARALLEL: usize = 8;

/// Checks that every object of the fleet is whole: all are kept in envelopes.
pub(super) async fn check_fleet(store: &Store, report: &mut VerifyReport) -> Result<(), OperatorError> {
    let mut reads = store
        .list_stream(FLEET)?
        .map(|meta| async move {
            let path = meta?.path;
            let read = store.get(&path).await;
            Ok::<_, StoreError>((path, read))
        })
        .buffer_unordered(READS_IN_PARALLEL);
    while let Some(read) = reads.next().await {
        let (path, read) = read?;
        let bytes = match read {
            Ok(bytes) => bytes,
            // Fleet objects come and go while machines register.
            Err(error) if error.is_not_found() => continue,
            Err(error) => {
                report.bad(path, &error);
                continue;
            }
        };
        report.read(bytes.len() as u64);
        if let Err(error) = check_fleet_object(&path, &bytes) {
            report.bad(path, &error);
        }
    }
    Ok(())
}

fn check_fleet_object(path: &str, bytes: &Bytes) -> Result<(), FormatError> {
    if path.starts_with(paths::NAMES) {
        let claim = VolumeName::decode(bytes)?;
        if paths::name_claim(claim.machine, &claim.name) != path {
            return Err(FormatError::Invalid { what: "volume name's place", found: 0 });
        }
        return Ok(());
    }
    check_envelope(bytes)
}

/// Checks length and checksum of any envelope, whatever is in it.
fn check_envelope(bytes: &[u8]) -> Result<(), FormatError> {
    let what = "fleet object";
    let (found, needed) = (bytes.len() as u64, OVERHEAD_BYTES as u64);
    let Some((covered, checksum)) =
        bytes.split_last_chunk::<4>().map(|(covered, crc)| (covered, u32::from_le_bytes(*crc)))
    else {
        return Err(FormatError::Truncated { what, needed, found });
    };
    let Some(length) = covered.get(HEAD_BYTES - 4..HEAD_BYTES).and_then(|bytes| bytes.try_into().ok()) else {
        return Err(FormatError::Truncated { what, needed, found });
    };
    let needed = u64::from(u32::from_le_bytes(length)) + OVERHEAD_BYTES as u64;
    if needed > found {
        return Err(FormatError::Truncated { what, needed, found });
    }
    if needed < found {
        return Err(FormatError::TrailingBytes { what, extra: found - needed });
    }
    if crc32c::crc32c(covered) != checksum {
        return Err(FormatError::Checksum { what });
    }
    Ok(())
}

/// Checks all checkpoints, and counts segments that nothing refers to.
pub(super) async fn check_volume_folder(
    store: &Store,
    header: &VolumeHeader,
    history: &History,
    report: &mut VerifyReport,
) -> Result<(), OperatorError> {
    let mut checkpoints = store.list_stream(&paths::checkpoint_folder(header.volume))?;
    while let Some(meta) = checkpoints.next().await {
        let path = meta?.path;
        let Some(at) = paths::sequence(&path) else {
            tracing::warn!(path, "not a checkpoint: ignored");
            continue;
        };
        let bytes = match store.get(&path).await {
            Ok(bytes) => bytes,
            Err(error) => {
                report.bad(path, &error);
                continue;
            }
        };
        report.read(bytes.len() as u64);
        let head = match CheckpointHead::check_whole(&bytes) {
            Ok(head) if head.volume == header.volume && head.at == at => head,
            Ok(_) => {
                report.bad(path, "it is of another volume or place");
                continue;
            }
            Err(error) => {
                report.bad(path, &error);
                continue;
            }
        };
        match store.get(&paths::log_entry(header.volume, at)).await {
            Ok(entry) => {
                // A damaged entry is named already, and says nothing against the checkpoint.
                let entry_is_good = !report.bad.iter().any(|bad| bad.path == paths::log_entry(header.volume, at));
                if entry_is_good && let Err(what) = check_fit(header, &head, &entry) {
                    report.bad(path, format!("it does not fit the log: {what}"));
                }
            }
            Err(error) if error.is_not_found() => report.bad(paths::log_entry(header.volume, at), &error),
            Err(error) => return Err(error.into()),
        }
    }
    check_proofs(store, header, report).await?;
    let referenced: HashSet<&str> = history.segments.iter().map(|segment| segment.path.as_str()).collect();
    let mut segments = store.list_stream(&paths::segment_folder(header.volume))?;
    while let Some(meta) = segments.next().await {
        report.unreferenced += u64::from(!referenced.contains(meta?.path.as_str()));
    }
    Ok(())
}

/// Checks the note of what was proven earlier.
async fn check_proofs(store: &Store, header: &VolumeHeader, report: &mut VerifyReport) -> Result<(), OperatorError> {
    let path = paths::proofs(header.volume);
    match store.get(&path).await {
        Ok(bytes) => {
            report.read(bytes.len() as u64);
            match Proofs::decode(&bytes) {
                Ok(proofs) if proofs.volume == header.volume => {}
                Ok(_) => report.bad(path, "it is of another volume"),
                Err(error) => report.bad(path, &error),
            }
        }
        Err(error) if error.is_not_found() => {}
        Err(error) => report.bad(path, &error),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::format::envelope::Kind;

    #[test]
    fn any_envelope_passes_and_none_with_a_flipped_byte_or_a_cut() {
        let kind = Kind { what: "x", magic: *b"BFANYTHG", version: 7, body_bytes_max: 100 };
        let bytes = kind.seal(b"some content");
        assert_eq!(check_envelope(&bytes), Ok(()));
        for at in 0..bytes.len() {
            let mut broken = bytes.clone();
            broken[at] ^= 1;
            assert!(check_envelope(&broken).is_err(), "byte {at}");
            assert!(check_envelope(&bytes[..at]).is_err(), "cut at {at}");
        }
    }
}
