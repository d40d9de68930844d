use proptest::prelude::*;

use super::keyfile::KeyFile;
use super::merkle::{MetaTree, root};
use super::signing::verify_close;
use super::*;
use crate::format::close::Close;
use crate::format::record::{Codec, Record};
use crate::format::tests as samples;
use crate::ids::{BlockIndex, PageMask};
use crate::limits;

const CONTEXT: EpochContext =
    EpochContext { volume: VolumeId([1; 16]), incarnation: Incarnation(1), epoch: Epoch(5), key_id: KeyId(1) };

fn data_key() -> DataKey {
    DataKey::from_random([9; 32])
}

fn epoch_key() -> EpochKey {
    data_key().epoch_key(CONTEXT, &Salt([2; 32]))
}

fn seal(key: &EpochKey, mask: u64, pages: &[u8]) -> Record {
    let mut sealer = Sealer::new(1).expect("level 1 exists");
    let (data, zero) = (PageMask(mask), PageMask::FULL.without(PageMask(mask)));
    sealer.seal_block(key, BlockIndex(3), data, zero, 1, pages, Compression::Try).expect("pages match the mask")
}

fn open(key: &EpochKey, record: &Record) -> Result<Vec<u8>, SealError> {
    let mut out = vec![1, 2, 3];
    Opener::new().expect("memory").open(key, record, &mut out).map(|()| out)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_sealed_opens_to_the_same_pages(mask in any::<u64>(), seed in any::<u8>(), random in any::<bool>()) {
        let mut state = u64::from(seed) | 1;
        let pages: Vec<u8> = (0..mask.count_ones() as usize * limits::PAGE_BYTES)
            .map(|index| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                if random { (state >> 56) as u8 } else { (index / 100) as u8 ^ seed }
            })
            .collect();
        let record = seal(&epoch_key(), mask, &pages);
        let parsed = Record::parse(record.bytes().clone());
        prop_assert_eq!(parsed.as_ref(), Ok(&record));
        prop_assert_eq!(open(&epoch_key(), &record), Ok(pages));
    }

    /// The checksum is made right again after the flip: it is the seal that must notice.
    #[test]
    fn a_flipped_bit_that_passes_the_checksum_does_not_open(at in any::<prop::sample::Index>(), bit in 0_u32..8) {
        let record = seal(&epoch_key(), 0b11, &[7; 8192]);
        let mut bytes = record.bytes().to_vec();
        let index = at.index(bytes.len());
        bytes[index] ^= 1_u8 << bit;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..100]), &bytes[104..]);
        bytes[100..104].copy_from_slice(&crc.to_le_bytes());
        if let Ok(altered) = Record::parse(bytes.into()) && altered != record {
            prop_assert!(open(&epoch_key(), &altered).is_err());
        }
    }
}

#[test]
fn compressible_pages_shrink_and_random_ones_stay_raw() {
    let key = epoch_key();
    let compressed = seal(&key, u64::MAX, &[7; limits::BLOCK_BYTES]);
    assert_eq!(compressed.header().codec, Codec::Zstd);
    assert!(compressed.bytes().len() < 1024);
    let mut state = 1_u64;
    let random: Vec<u8> = (0..limits::PAGE_BYTES)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect();
    let raw = seal(&key, 1, &random);
    assert_eq!(raw.header().codec, Codec::Raw);
    assert_eq!(raw.bytes().len(), limits::RECORD_HEADER_BYTES + limits::PAGE_BYTES + limits::SEAL_TAG_BYTES);
}

#[test]
fn zero_ranges_are_authenticated_too() {
    let key = epoch_key();
    let record = Sealer::new(1).expect("level").seal_zero_range(&key, BlockIndex(10), 500, 2);
    assert_eq!(open(&key, &record), Ok(Vec::new()));
    let other = data_key().epoch_key(CONTEXT, &Salt([3; 32]));
    assert!(matches!(open(&other, &record), Err(SealError::NotAuthentic { .. })));
}

#[test]
fn a_record_does_not_open_in_another_epoch_volume_or_incarnation() {
    let record = seal(&epoch_key(), 1, &[7; 4096]);
    let salt = Salt([2; 32]);
    for context in [
        EpochContext { epoch: Epoch(6), ..CONTEXT },
        EpochContext { volume: VolumeId([2; 16]), ..CONTEXT },
        EpochContext { incarnation: Incarnation(2), ..CONTEXT },
    ] {
        assert!(matches!(open(&data_key().epoch_key(context, &salt), &record), Err(SealError::WrongPlace { .. })));
    }
}

#[test]
fn keys_of_different_salts_epochs_and_volumes_differ() {
    let base = data_key().derive(&[2; 32], b"a");
    assert_ne!(*base, *data_key().derive(&[3; 32], b"a"));
    assert_ne!(*base, *data_key().derive(&[2; 32], b"b"));
    assert_ne!(*base, *DataKey::from_random([8; 32]).derive(&[2; 32], b"a"));
}

#[test]
fn the_root_depends_on_every_record_and_on_their_order() {
    for count in [0, 1, 2, 3, 5, 9, 40] {
        let metas = samples::metas(count);
        let whole = root(&metas).expect("ascending");
        for skip in 0..metas.len() {
            let rest = metas.iter().enumerate().filter(|(index, _)| *index != skip).map(|(_, meta)| meta);
            assert_ne!(root(rest).expect("ascending"), whole);
            let mut altered = metas.clone();
            altered[skip].digest.0[5] ^= 1;
            assert_ne!(root(&altered).expect("ascending"), whole);
        }
    }
    let mut metas = samples::metas(3);
    metas.swap(1, 2);
    assert!(root(&metas).is_err(), "records out of order are refused");
}

#[test]
fn overlapping_records_are_refused_by_the_tree() {
    let mut range = samples::metas(1)[0];
    range.block_count = 10;
    let mut tree = MetaTree::default();
    tree.push(&range).expect("the first is in order");
    let mut inside = range;
    inside.block = BlockIndex(9);
    inside.block_count = 1;
    assert!(tree.push(&inside).is_err());
    inside.block = BlockIndex(10);
    assert!(tree.push(&inside).is_ok());
}

#[test]
fn a_close_verifies_with_its_volumes_key_alone() {
    let signer = data_key().signer(CONTEXT.volume);
    let close = signer.sign(samples::statement());
    assert_eq!(verify_close(&close, &signer.public()), Ok(()));
    let other = DataKey::from_random([1; 32]).signer(CONTEXT.volume).public();
    assert!(verify_close(&close, &other).is_err());
    let mut statement = samples::statement();
    statement.parent.0[0] ^= 1;
    let spliced = Close::new(statement, *close.signature());
    assert!(verify_close(&spliced, &signer.public()).is_err());
}

#[test]
fn a_data_key_comes_out_of_its_wrapping_with_the_same_key_file_only() {
    let file = KeyFile::from_random([1; 16], [2; 32]);
    let (volume, key_id) = (CONTEXT.volume, KeyId(1));
    let wrapped = file.wrap(&data_key(), volume, key_id, Salt([3; 32]));
    let copies = [wrapped.clone()];
    assert_eq!(*file.unwrap(&copies, volume, key_id).expect("the same file").expose(), *data_key().expose());
    let other = KeyFile::from_random([9; 16], [2; 32]);
    assert!(matches!(other.unwrap(&copies, volume, key_id), Err(SealError::WrongKeyFile { .. })));
    let same_id = KeyFile::from_random([1; 16], [7; 32]);
    assert!(matches!(same_id.unwrap(&copies, volume, key_id), Err(SealError::Unwrap { .. })));
    assert!(matches!(file.unwrap(&copies, VolumeId([8; 16]), key_id), Err(SealError::Unwrap { .. })));
    for index in 0..wrapped.wrapped.len() {
        let mut altered = wrapped.clone();
        altered.wrapped[index] ^= 1;
        assert!(file.unwrap(&[altered], volume, key_id).is_err());
    }
}

#[test]
fn a_key_file_is_parsed_as_written_and_every_altered_byte_is_noticed() {
    let file = KeyFile::from_random([0x1a; 16], [0x2b; 32]);
    let text = file.encode();
    let parsed = KeyFile::parse(&text).expect("as written");
    assert_eq!(parsed.encode(), text);
    for index in 0..text.len() {
        let mut bytes = text.as_bytes().to_vec();
        bytes[index] ^= 1;
        if let Ok(altered) = std::str::from_utf8(&bytes) {
            assert!(KeyFile::parse(altered).is_err(), "byte {index} altered went unnoticed");
        }
        assert!(KeyFile::parse(&text[..index]).is_err(), "cut at {index} went unnoticed");
    }
    assert!(KeyFile::parse(&format!("{}\n", *text)).is_err(), "a line too many went unnoticed");
    assert!(!format!("{file:?}").contains("2b2b"), "the key is printed");
}
