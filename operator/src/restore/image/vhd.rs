//! The footer of a fixed VHD ("Virtual Hard Disk Image Format Specification", Microsoft 2006). PURE.
//!
//! A fixed VHD is the disk and these 512 bytes. Azure takes only sizes that are whole MiB, so zeros fill the disk up. Numbers are
//! big-endian.

use common::clock::UnixMillis;
use common::ids::CloseId;

/// Bytes of the footer.
pub(super) const FOOTER_BYTES: usize = 512;
/// Most that the format's readers take: 2,040 GiB.
pub(super) const DISK_BYTES_MAX: u64 = 2040 << 30;
const MIB: u64 = 1 << 20;
/// 2000-01-01T00:00:00Z, from where a footer counts seconds, in Unix time.
const EPOCH_SECONDS: i64 = 946_684_800;

/// The size of the disk in the file.
pub(super) fn rounded(disk_bytes: u64) -> u64 {
    disk_bytes.next_multiple_of(MIB)
}

/// The footer of a disk of `bytes` bytes, a multiple of 1 MiB. The same point gives the same.
pub(super) fn footer(bytes: u64, point: CloseId, cut_time: UnixMillis) -> [u8; FOOTER_BYTES] {
    let seconds = u32::try_from((cut_time.0 / 1000 - EPOCH_SECONDS).max(0)).unwrap_or(u32::MAX);
    let (cylinders, heads, sectors) = geometry(bytes / 512);
    let mut fields = Vec::with_capacity(FOOTER_BYTES);
    fields.extend(b"conectix");
    fields.extend(2_u32.to_be_bytes()); // features: none, the bit that is always set
    fields.extend(0x0001_0000_u32.to_be_bytes());
    fields.extend(u64::MAX.to_be_bytes()); // a fixed disk has no further header
    fields.extend(seconds.to_be_bytes());
    // Creator "win ": readers then take the size from the size field, not from the geometry, which can't say every size.
    fields.extend(b"win \x00\x0a\x00\x00Wi2k");
    fields.extend(bytes.to_be_bytes()); // original size
    fields.extend(bytes.to_be_bytes()); // current size
    fields.extend(cylinders.to_be_bytes());
    fields.extend([heads, sectors]);
    fields.extend(2_u32.to_be_bytes()); // fixed
    fields.extend([0; 4]); // checksum
    fields.extend(&point.0[..16]); // unique id
    let mut footer = [0; FOOTER_BYTES];
    footer[..fields.len()].copy_from_slice(&fields);
    let sum: u32 = footer.iter().map(|byte| u32::from(*byte)).sum();
    footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
    footer
}

/// Cylinders, heads and sectors per track as the specification's appendix computes them.
fn geometry(sectors: u64) -> (u16, u8, u8) {
    let total = sectors.min(65_535 * 16 * 255) as u32;
    let (mut per_track, mut heads, mut tracks);
    if total >= 65_535 * 16 * 63 {
        (per_track, heads, tracks) = (255, 16, total / 255);
    } else {
        per_track = 17;
        tracks = total / per_track;
        heads = tracks.div_ceil(1024).max(4);
        if tracks >= heads * 1024 || heads > 16 {
            (per_track, heads) = (31, 16);
            tracks = total / per_track;
        }
        if tracks >= heads * 1024 {
            (per_track, heads) = (63, 16);
            tracks = total / per_track;
        }
    }
    ((tracks / heads) as u16, heads as u8, per_track as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_footers_checksum_is_the_complement_of_the_sum_of_its_other_bytes() {
        let footer = footer(rounded(5 * MIB + 1), CloseId([7; 32]), UnixMillis(1_700_000_000_000));
        let others: u32 = (0..FOOTER_BYTES).filter(|at| !(64..68).contains(at)).map(|at| u32::from(footer[at])).sum();
        assert_eq!(footer[64..68], (!others).to_be_bytes());
        assert_eq!(footer[48..56], (6 * MIB).to_be_bytes());
        assert_eq!(&footer[..8], b"conectix");
    }

    #[test]
    fn the_geometry_is_what_the_specifications_formula_gives() {
        // By hand from the appendix, for 40 MiB, 2 GiB and the largest.
        assert_eq!(geometry(40 * 2048), (963, 5, 17));
        assert_eq!(geometry(2048 * 2048), (4161, 16, 63));
        assert_eq!(geometry(u64::MAX), (65_535, 16, 255));
    }
}
