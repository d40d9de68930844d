use proptest::prelude::*;

use super::*;
use crate::format::tests::golden;

const DISK_BYTES: u64 = (3 << 28) + (5 << 18) + 4097;

fn geometry() -> Geometry {
    Geometry::new(DISK_BYTES).expect("a disk")
}

fn head() -> Head {
    Head { identity: [7; 32], sequence: 9, disk_bytes: DISK_BYTES }
}

fn encode(pages: &PageSet) -> Vec<Vec<u8>> {
    std::iter::once(head().encode()).chain(Encoder::new(pages)).collect()
}

fn decode(parts: &[Vec<u8>]) -> Result<(Head, Option<PageSet>), FormatError> {
    let (head, geometry) = Head::decode(&parts[0])?;
    let mut decoder = Decoder::new(geometry);
    for part in &parts[1..] {
        decoder.take(part)?;
    }
    Ok((head, decoder.finish()))
}

fn sample() -> PageSet {
    let mut pages = PageSet::empty(geometry());
    pages.insert_blocks(BlockIndex(1020), 1500);
    pages.insert(BlockIndex(3), PageMask(0b101));
    pages.insert(BlockIndex(4), PageMask(1 << 63));
    pages.insert(BlockIndex(geometry().blocks() - 1), PageMask(0b11));
    pages
}

#[test]
fn a_page_set_is_as_it_was_first_written() {
    let bytes = golden("page-set-v1.bin", &encode(&sample()).concat());
    assert_eq!(decode(&encode(&sample())), Ok((head(), Some(sample()))));
    assert!(!bytes.is_empty());
}

#[test]
fn the_set_of_all_pages_of_the_largest_disk_is_small() {
    let largest = Geometry::new(limits::DISK_BYTES_MAX).expect("a disk");
    let parts: Vec<_> = Encoder::new(&PageSet::full(largest)).collect();
    assert!(parts.concat().len() < 256, "{} bytes", parts.concat().len());
}

#[test]
fn every_flipped_byte_and_every_missing_envelope_is_noticed() {
    let parts = encode(&sample());
    for (part, at) in (0..parts.len()).flat_map(|part| (0..parts[part].len()).map(move |at| (part, at))) {
        let ignorable = (12..16).contains(&at);
        let mut flipped = parts.clone();
        flipped[part][at] ^= 0x10;
        // Ignorable flags and reserved bytes are under the checksum too.
        assert!(decode(&flipped).is_err(), "part {part} byte {at} (ignorable: {ignorable})");
    }
    for missing in 1..parts.len() {
        let mut fewer = parts.clone();
        fewer.remove(missing);
        assert!(!matches!(decode(&fewer), Ok((_, Some(_)))), "without part {missing}");
    }
}

proptest! {
    #[test]
    fn a_set_decodes_to_what_was_encoded(
        ranges in proptest::collection::vec((0_u64..3100, 1_u64..1500), 0..4),
        blocks in proptest::collection::vec((0_u64..3100, any::<u64>()), 0..3000),
    ) {
        let mut pages = PageSet::empty(geometry());
        for (first, count) in ranges {
            pages.insert_blocks(BlockIndex(first), count);
        }
        for (block, mask) in blocks {
            pages.insert(BlockIndex(block), PageMask(mask));
        }
        prop_assert_eq!(decode(&encode(&pages)), Ok((head(), Some(pages))));
    }

    #[test]
    fn no_bytes_make_the_decoder_panic(parts in proptest::collection::vec(any::<Vec<u8>>(), 1..4)) {
        let _ = decode(&parts);
        let mut decoder = Decoder::new(geometry());
        for part in &parts {
            let _ = decoder.take(&BATCH.seal(&part[..part.len().min(BATCH.body_bytes_max)]));
        }
    }
}
