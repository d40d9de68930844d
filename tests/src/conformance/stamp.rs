//! What a sector of the writer holds: the number of its write, the number of the write whose completion was awaited before,
//! its place, a checksum, and filling that follows from these.

use crate::images::Random;

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// Sectors of a page.
pub const PAGE_SECTORS: u64 = 8;

const MAGIC: &[u8; 8] = b"BFWRITE1";
const HEADER: usize = 8 + 8 + 8 + 8 + 8;

/// What a sector says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Zeros throughout.
    Zero,
    /// Part of this write; `awaited` is the write whose completion it awaited, 0 for none.
    Write {
        /// The write's number.
        number: u64,
        /// The awaited write's number.
        awaited: u64,
    },
    /// Neither: torn, of another place, or damaged.
    Foreign,
}

fn checksum(number: u64, awaited: u64, sector: u64) -> u64 {
    Random(number ^ awaited.rotate_left(21) ^ sector.rotate_left(42)).number()
}

/// The bytes of one sector of write `number`. Half of the writes compress.
pub fn fill(buffer: &mut [u8], number: u64, awaited: u64, sector: u64) {
    let check = checksum(number, awaited, sector);
    buffer[..8].copy_from_slice(MAGIC);
    for (at, value) in [number, awaited, sector, check].into_iter().enumerate() {
        buffer[8 + at * 8..16 + at * 8].copy_from_slice(&value.to_le_bytes());
    }
    let mut random = Random(check);
    let constant = random.number();
    for chunk in buffer[HEADER..SECTOR].chunks_mut(8) {
        let value = if number & 1 == 0 { random.number() } else { constant };
        chunk.copy_from_slice(&value.to_le_bytes()[..chunk.len()]);
    }
}

/// Reads what a sector at place `sector` holds.
///
/// # Panics
/// If it is not [`SECTOR`] bytes long.
#[must_use]
pub fn read(bytes: &[u8], sector: u64) -> Content {
    assert_eq!(bytes.len(), SECTOR);
    if bytes.iter().all(|byte| *byte == 0) {
        return Content::Zero;
    }
    let value = |at: usize| u64::from_le_bytes(bytes[8 + at * 8..16 + at * 8].try_into().expect("eight bytes"));
    let (number, awaited) = (value(0), value(1));
    let mut expected = [0; SECTOR];
    fill(&mut expected, number, awaited, sector);
    if bytes == expected { Content::Write { number, awaited } } else { Content::Foreign }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_says_which_write_it_belongs_to_and_any_change_or_move_shows() {
        for number in [6, 7] {
            let mut sector = [0; SECTOR];
            assert_eq!(read(&sector, 9), Content::Zero);
            fill(&mut sector, number, 3, 9);
            assert_eq!(read(&sector, 9), Content::Write { number, awaited: 3 });
            assert_eq!(read(&sector, 10), Content::Foreign, "it lies elsewhere");
            for at in 0..SECTOR {
                sector[at] ^= 1;
                assert_eq!(read(&sector, 9), Content::Foreign, "byte {at} changed");
                sector[at] ^= 1;
            }
        }
    }
}
