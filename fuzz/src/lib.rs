//! What the fuzz targets share.
//!
//! A checksum keeps a mutated input from getting any further than to the checksum. So each target looks at its input twice: as
//! it is, and with its checksums made right, which is what somebody who wants to do harm would send.

use bytes::Bytes;
use common::format::envelope::{HEAD_BYTES, Kind, OVERHEAD_BYTES};
use common::format::frame::FRAME_HEAD_BYTES;
use common::limits::RECORD_HEADER_BYTES;

/// The input as the body of an envelope of this kind, with magic, version, length and checksum as they should be: of a
/// whole envelope (as a seed is one) its body, of anything else all of it. `None` where it is too long for the kind.
#[must_use]
pub fn enveloped(kind: &Kind, data: &[u8]) -> Option<Vec<u8>> {
    let whole = data.starts_with(&kind.magic) && data.len() >= OVERHEAD_BYTES;
    let body = if whole { &data[HEAD_BYTES..data.len() - 4] } else { data };
    (body.len() <= kind.body_bytes_max).then(|| kind.seal(body))
}

/// Makes the checksum of a record right, if there is a whole header.
pub fn fix_record(record: &mut [u8]) {
    if record.len() >= RECORD_HEADER_BYTES {
        let at = RECORD_HEADER_BYTES - 4;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&record[..at]), &record[RECORD_HEADER_BYTES..]);
        record[at..RECORD_HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Makes the checksums of all whole frames right, and those of the records and closes in them.
pub fn fix_frames(mut rest: &mut [u8]) {
    while let Some(length) = rest.first_chunk::<4>() {
        let end = FRAME_HEAD_BYTES.saturating_add(u32::from_le_bytes(*length) as usize);
        let Some((frame, tail)) = rest.split_at_mut_checked(end) else { return };
        let (head, body) = frame.split_at_mut(FRAME_HEAD_BYTES);
        let covered = match head[4] {
            5 => {
                let covered = body.len().min(8);
                fix_record(&mut body[covered..]);
                covered
            }
            7 => {
                if let Some(fixed) = enveloped(&common::format::close::KIND, body)
                    && fixed.len() == body.len()
                {
                    body.copy_from_slice(&fixed);
                }
                body.len()
            }
            _ => body.len(),
        };
        let crc = crc32c::crc32c_append(crc32c::crc32c(&head[..8]), &body[..covered]);
        head[8..].copy_from_slice(&crc.to_le_bytes());
        rest = tail;
    }
}

/// The input with the checksums of a segment's index and footer made right, if it is long enough to have a footer.
#[must_use]
pub fn fix_segment(data: &[u8]) -> Vec<u8> {
    const FOOTER_BYTES: usize = common::format::segment::FOOTER_BYTES;
    let mut bytes = data.to_vec();
    let Some(footer) = bytes.len().checked_sub(FOOTER_BYTES) else { return bytes };
    let offset = u64::from_le_bytes(bytes[footer..footer + 8].try_into().expect("eight bytes"));
    let index = usize::try_from(offset).ok().filter(|start| *start <= footer).unwrap_or(footer);
    let index_crc = crc32c::crc32c(&bytes[index..footer]);
    bytes[footer + 12..footer + 16].copy_from_slice(&index_crc.to_le_bytes());
    let footer_crc = crc32c::crc32c(&bytes[footer..footer + 32]);
    bytes[footer + 32..footer + 36].copy_from_slice(&footer_crc.to_le_bytes());
    bytes
}

/// A copy that a decoder may keep.
#[must_use]
pub fn owned(data: &[u8]) -> Bytes {
    Bytes::copy_from_slice(data)
}
