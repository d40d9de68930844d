//! Where the parts of a disk lie: GPT, MBR with logical partitions, or none. PURE.
//!
//! Sectors of 512 bytes first, then of 4,096: that is how large a disk's are is not in its table. Nothing is believed that reaches beyond the disk.

use std::ops::Range;

/// Most partitions looked at.
const PARTITIONS_MAX: usize = 128;
/// Where a table's sector sizes are tried.
const SECTORS: [u64; 2] = [512, 4096];
const LINUX_EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
const GPT_PROTECTIVE: u8 = 0xee;

/// Reads bytes of the disk; shorter than asked for at its end.
pub(super) type Read<'a> = dyn Fn(u64, usize) -> std::io::Result<Vec<u8>> + 'a;

/// The disk's partitions, by number; empty where there is no table.
///
/// # Errors
/// Those of reading.
pub(super) fn find(read: &Read<'_>, disk_bytes: u64) -> std::io::Result<Vec<(u32, Range<u64>)>> {
    let first = read(0, 512)?;
    if first.get(510..512) != Some(&[0x55, 0xaa]) {
        return Ok(Vec::new());
    }
    let entries = mbr(&first);
    if entries.iter().any(|(kind, _, _)| *kind == GPT_PROTECTIVE) {
        for sector in SECTORS {
            let header = read(sector, 512)?;
            if header.get(..8) == Some(b"EFI PART") {
                return gpt(read, &header, sector, disk_bytes);
            }
        }
        return Ok(Vec::new());
    }
    // A file system's boot sector ends with the same two bytes, and has text or code where a table would be.
    if entries.iter().any(|(_, start, sectors)| (start + sectors) * 512 > disk_bytes) || is_boot_sector(&first) {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    let mut logical = 5;
    for (number, (kind, start, sectors)) in (1..).zip(entries) {
        if LINUX_EXTENDED.contains(&kind) {
            let mut at = start;
            while found.len() < PARTITIONS_MAX {
                let table = read(at * 512, 512)?;
                if table.get(510..512) != Some(&[0x55, 0xaa]) {
                    break;
                }
                let entries = mbr(&table);
                let mut next = None;
                for (kind, from, sectors) in entries {
                    if LINUX_EXTENDED.contains(&kind) {
                        next = next.or(Some(start + from));
                    } else if kind != 0 && sectors > 0 {
                        push(&mut found, logical, at + from, sectors, 512, disk_bytes);
                        logical += 1;
                    }
                }
                // Tables only lead onwards, so that a loop ends.
                match next.filter(|next| *next > at) {
                    Some(next) => at = next,
                    None => break,
                }
            }
        } else if kind != 0 && sectors > 0 {
            push(&mut found, number, start, sectors, 512, disk_bytes);
        }
    }
    Ok(found)
}

/// (type, first sector, sectors) of the four entries.
fn mbr(sector: &[u8]) -> Vec<(u8, u64, u64)> {
    let entry = |number: usize| {
        let entry = &sector[446 + number * 16..][..16];
        (entry[4], u64::from(little(&entry[8..12])), u64::from(little(&entry[12..16])))
    };
    (0..4).map(entry).collect()
}

/// FAT and NTFS begin so.
fn is_boot_sector(sector: &[u8]) -> bool {
    &sector[3..11] == b"NTFS    " || sector[54..62].starts_with(b"FAT") || sector[82..90].starts_with(b"FAT")
}

fn gpt(read: &Read<'_>, header: &[u8], sector: u64, disk_bytes: u64) -> std::io::Result<Vec<(u32, Range<u64>)>> {
    let (table, count, size) = (long(&header[72..80]), little(&header[80..84]), little(&header[84..88]));
    let mut found = Vec::new();
    if !(128..=4096).contains(&size) {
        return Ok(found);
    }
    // As many as there are in nearly every table.
    for number in 0..count.min(128) {
        let at = table.saturating_mul(sector).saturating_add(u64::from(number) * u64::from(size));
        let entry = read(at, 128)?;
        if entry.len() < 128 || entry[..16] == [0; 16] {
            continue;
        }
        let (first, last) = (long(&entry[32..40]), long(&entry[40..48]));
        push(&mut found, number + 1, first, last.saturating_add(1).saturating_sub(first), sector, disk_bytes);
    }
    Ok(found)
}

fn push(found: &mut Vec<(u32, Range<u64>)>, number: u32, start: u64, sectors: u64, sector: u64, disk_bytes: u64) {
    let (start, len) = (start.saturating_mul(sector), sectors.saturating_mul(sector));
    if len > 0 && start.saturating_add(len) <= disk_bytes {
        found.push((number, start..start + len));
    }
}

fn little(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

fn long(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: usize = 4 << 20;

    fn parts(disk: &[u8]) -> Vec<(u32, Range<u64>)> {
        let read = |at: u64, len: usize| {
            let at = usize::try_from(at).unwrap_or(usize::MAX).min(disk.len());
            Ok(disk[at..(at + len).min(disk.len())].to_vec())
        };
        find(&read, disk.len() as u64).expect("memory")
    }

    fn entry(disk: &mut [u8], table: usize, number: usize, kind: u8, start: u32, sectors: u32) {
        let at = table * 512 + 446 + number * 16;
        disk[at + 4] = kind;
        disk[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&sectors.to_le_bytes());
        disk[table * 512 + 510..table * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
    }

    #[test]
    fn primary_and_logical_partitions_are_found_by_their_numbers() {
        let mut disk = vec![0; DISK];
        entry(&mut disk, 0, 0, 0x83, 8, 100);
        entry(&mut disk, 0, 2, 0x05, 1000, 3000);
        entry(&mut disk, 1000, 0, 0x83, 10, 50);
        entry(&mut disk, 1000, 1, 0x05, 500, 200);
        entry(&mut disk, 1500, 0, 0x82, 10, 60);
        let expected = [(1, 8..108), (5, 1010..1060), (6, 1510..1570)];
        let found: Vec<_> =
            parts(&disk).into_iter().map(|(n, range)| (n, range.start / 512..range.end / 512)).collect();
        assert_eq!(found, expected);
        // A chain that leads back ends.
        entry(&mut disk, 1500, 1, 0x05, 0, 10);
        assert_eq!(parts(&disk).len(), 3);
    }

    #[test]
    fn a_gpt_is_read_with_either_sector_size_and_never_beyond_the_disk() {
        for sector in [512, 4096] {
            let mut disk = vec![0; DISK];
            entry(&mut disk, 0, 0, 0xee, 1, 8000);
            disk[sector..sector + 8].copy_from_slice(b"EFI PART");
            disk[sector + 72..sector + 80].copy_from_slice(&2_u64.to_le_bytes());
            disk[sector + 80..sector + 84].copy_from_slice(&128_u32.to_le_bytes());
            disk[sector + 84..sector + 88].copy_from_slice(&128_u32.to_le_bytes());
            for (number, first, last) in [(0, 40_u64, 99_u64), (3, 100, u64::MAX), (5, 100, 100)] {
                let at = 2 * sector + number * 128;
                disk[at] = 1;
                disk[at + 32..at + 40].copy_from_slice(&first.to_le_bytes());
                disk[at + 40..at + 48].copy_from_slice(&last.to_le_bytes());
            }
            let sector = sector as u64;
            assert_eq!(parts(&disk), [(1, 40 * sector..100 * sector), (6, 100 * sector..101 * sector)]);
        }
    }

    #[test]
    fn a_disk_without_a_table_and_a_boot_sector_have_no_partitions() {
        assert_eq!(parts(&vec![0; DISK]), []);
        assert_eq!(parts(&[]), []);
        let mut disk = vec![0; DISK];
        entry(&mut disk, 0, 0, 0x6e, 1_701_998_624, 7);
        assert_eq!(parts(&disk), []);
    }
}
