use proptest::prelude::*;

use super::*;
use crate::format::record::{Codec, RecordKind};
use crate::format::tests::{close, log_entry};
use crate::ids::SealTag;

/// Fails where the encoding changes: old checkpoints could not be read any more.
const GOLDEN: &str = "src/format/golden/checkpoint-v1.bin";

fn entry(block: u64, epoch: u32, live: u64) -> LiveEntry {
    LiveEntry {
        block: BlockIndex(block),
        block_count: 1,
        epoch,
        segment: 0,
        offset: 16,
        live: PageMask(live),
        meta: RecordMeta {
            kind: RecordKind::Delta,
            codec: Codec::Raw,
            block_count: 1,
            block: BlockIndex(block),
            data_mask: PageMask(live),
            zero_mask: PageMask(1 << 63),
            counter: 3,
            record_len: (limits::RECORD_HEADER_BYTES + limits::SEAL_TAG_BYTES) as u32
                + live.count_ones() * limits::PAGE_BYTES as u32,
            tag: SealTag([5; 16]),
            digest: Digest([6; 32]),
        },
    }
}

fn sample() -> (CheckpointHead, Vec<u8>) {
    let epoch = |number| EpochRef {
        epoch: Epoch(number),
        incarnation: Incarnation(1),
        key_id: KeyId(1),
        salt: Salt([9; 32]),
        close: CloseId([8; 32]),
    };
    let first_bytes = encode_page(&[entry(3, 1, 0b10), entry(3, 0, 0b01), entry(7, 0, 0b11)]);
    let second_bytes = encode_page(&[entry(PAGE_BLOCKS, 1, 0b100)]);
    let first = page_ref(BlockIndex(0), 0, &first_bytes);
    let second = page_ref(BlockIndex(PAGE_BLOCKS), first.length.into(), &second_bytes);
    let head = CheckpointHead {
        volume: VolumeId([0x11; 16]),
        at: LogSeq(64),
        entry_digest: Digest([1; 32]),
        generation: Generation(2),
        nonce: Nonce([3; 16]),
        written: UnixMillis(1_700_000_000_123),
        unpointed_bytes: 77,
        head: Some(close()),
        points: vec![PointSummary {
            id: close().id(),
            incarnation: Incarnation(1),
            epoch: Epoch(7),
            cut_time: UnixMillis(1_700_000_000_000),
            consistency: Consistency::Crash,
            disk_bytes: 1 << 30,
            new_bytes: 4096,
            committed: UnixMillis(1_700_000_000_100),
            group_point: GroupId::NIL,
        }],
        segments: log_entry().segments,
        epochs: vec![epoch(6), epoch(7)],
        pages: Some(vec![first, second]),
    };
    let mut bytes = head.encode().expect("within limits");
    bytes.extend_from_slice(&first_bytes);
    bytes.extend_from_slice(&second_bytes);
    (head, bytes)
}

#[test]
fn checkpoint_is_as_it_was_first_written() {
    let path = std::path::Path::new(&std::env::var("CARGO_MANIFEST_DIR").expect("cargo says it")).join(GOLDEN);
    let (head, bytes) = sample();
    if !path.exists() && std::env::var_os("BLOCKFERRY_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, &bytes).expect("the golden folder is writable");
    }
    let golden = std::fs::read(&path).expect("the golden file");
    assert!(golden == bytes, "the encoding changed; old data could not be read any more");
    assert_eq!(CheckpointHead::check_whole(&golden), Ok(head));
}

#[test]
fn any_flipped_byte_and_any_cut_is_an_error() {
    let (_, bytes) = sample();
    for at in 0..bytes.len() {
        let mut broken = bytes.clone();
        broken[at] ^= 0x10;
        assert!(CheckpointHead::check_whole(&broken).is_err(), "byte {at}");
        assert!(CheckpointHead::check_whole(&bytes[..at]).is_err(), "cut at {at}");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(CheckpointHead::check_whole(&longer).is_err());
}

#[test]
fn a_checkpoint_without_index_or_head_close_reads_back() {
    let (mut head, _) = sample();
    (head.pages, head.head) = (None, None);
    let bytes = head.encode().expect("within limits");
    assert_eq!(CheckpointHead::check_whole(&bytes), Ok(head));
}

#[test]
fn a_page_that_points_beyond_the_tables_or_is_out_of_order_is_refused() {
    let (head, _) = sample();
    let wrong = [
        vec![entry(3, 2, 1)],
        vec![LiveEntry { segment: 9, ..entry(3, 1, 1) }],
        vec![entry(4, 1, 1), entry(3, 1, 1)],
        vec![entry(3, 0, 1), entry(3, 1, 2)],
        vec![LiveEntry { live: PageMask(1 << 40), ..entry(3, 1, 1) }],
        vec![LiveEntry { block_count: 2, ..entry(3, 1, 1) }],
        vec![entry(PAGE_BLOCKS, 1, 1)],
    ];
    for entries in wrong {
        let bytes = encode_page(&entries);
        let page = page_ref(BlockIndex(0), 0, &bytes);
        assert!(head.decode_page(&page, &bytes).is_err(), "{entries:?}");
    }
}

#[test]
fn renumbering_changes_only_the_table_indexes() {
    let entries = [entry(3, 5, 0b10), entry(3, 2, 0b01)];
    let mut bytes = encode_page(&entries);
    renumber_page(&mut bytes, &[9, 9, 0, 9, 9, 1], &[4]);
    let expected = [(1, entries[0]), (0, entries[1])].map(|(epoch, entry)| LiveEntry { epoch, segment: 4, ..entry });
    assert_eq!(bytes, encode_page(&expected));
}

proptest! {
    #[test]
    fn hostile_bytes_are_an_error_and_never_a_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), fix in any::<bool>()) {
        if fix && bytes.len() > 24 {
            // A valid envelope around rubbish, so that the body's decoder is reached.
            bytes = KIND.seal(&bytes);
        }
        prop_assert!(CheckpointHead::check_whole(&bytes).is_err());
    }

    #[test]
    fn any_body_of_the_right_shape_with_edits_is_an_error_or_reads_back(at in 0_usize..400, value in any::<u8>()) {
        let (head, bytes) = sample();
        let head_bytes = head.encode().expect("within limits");
        let mut body = KIND.open(&head_bytes).expect("valid").to_vec();
        let at = at % body.len();
        body[at] = value;
        let mut edited = KIND.seal(&body);
        edited.extend_from_slice(&bytes[head_bytes.len()..]);
        if let Ok(head) = CheckpointHead::check_whole(&edited) {
            prop_assert_eq!(head.encode().expect("within limits"), KIND.seal(&body));
        }
    }
}
