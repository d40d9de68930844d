#![expect(clippy::cast_possible_truncation, reason = "the numbers of these tests are small")]

use proptest::prelude::*;

use super::*;
use crate::format::tests::golden;

fn identity() -> VolumeIdentity {
    VolumeIdentity {
        fleet: FleetId([1; 16]),
        volume: VolumeId([2; 16]),
        incarnation: Incarnation(3),
        key_id: KeyId(4),
        disk_bytes: (1 << 30) + 4097,
        sector_bytes: 512,
        name: "root".to_owned(),
        source_path: b"/dev/sda".to_vec(),
        source: SourceIdentity::Device { serial: "S3R1AL".to_owned() },
        hash_key: [5; 32],
    }
}

fn header(sequence: u64) -> HashesHeader {
    let identity = identity();
    HashesHeader {
        sequence,
        volume: identity.volume,
        incarnation: identity.incarnation,
        disk_bytes: identity.disk_bytes,
        hash_key_check: identity.hash_key_check(),
        applied_epoch: Epoch(7),
        applied_close: CloseId([6; 32]),
    }
}

fn entry() -> HashEntry {
    let mut entry = HashEntry::ZERO;
    entry.0[3] = [9; 16];
    entry.0[4] = UNKNOWN_HASH;
    entry
}

fn parts() -> [JournalPart; 3] {
    [
        JournalPart::Head(JournalHead {
            volume: VolumeId([2; 16]),
            incarnation: Incarnation(3),
            hash_key_check: [7; 16],
            epoch: Epoch(8),
        }),
        JournalPart::Batch(JournalBatch {
            epoch: Epoch(8),
            index: 0,
            changes: vec![
                HashChange::Pages {
                    block: BlockIndex(5),
                    mask: PageMask(0b101),
                    hashes: vec![[1; 16], ZERO_PAGE_HASH],
                },
                HashChange::ZeroBlocks { first: BlockIndex(100), count: 65_536 },
            ],
        }),
        JournalPart::End(JournalEnd {
            epoch: Epoch(8),
            close: CloseId([9; 32]),
            parent: CloseId([6; 32]),
            point: Some(Consistency::Crash),
            batches: 1,
            changes: 2,
        }),
    ]
}

fn refuses_every_flip(bytes: &[u8], decodes: impl Fn(&[u8]) -> bool) {
    assert!(decodes(bytes), "the untouched bytes decode");
    let mut copy = bytes.to_vec();
    for index in 0..copy.len() {
        for flip in [1, 0x80, 0xff] {
            copy[index] ^= flip;
            assert!(!decodes(&copy), "byte {index} of {} xor {flip:#x} went unnoticed", copy.len());
            copy[index] ^= flip;
        }
    }
}

fn refuses_every_truncation(bytes: &[u8], decodes: impl Fn(&[u8]) -> bool) {
    for length in 0..bytes.len() {
        assert!(!decodes(&bytes[..length]), "{length} of {} bytes decoded", bytes.len());
    }
    assert!(!decodes(&[bytes, &[0]].concat()), "a byte too many decoded");
}

#[test]
fn sender_state_is_as_it_was_first_written() {
    let bytes = golden("sender-volume-v1.bin", &identity().encode());
    assert_eq!(VolumeIdentity::decode(&bytes), Ok(identity()));

    let mut hashes = [header(1).encode_slot(), header(2).encode_slot()].concat();
    let mut encoded = [0; HASH_ENTRY_BYTES];
    for (block, hash_entry) in [entry(), HashEntry::ZERO].into_iter().enumerate() {
        hash_entry.encode(BlockIndex(block as u64), &mut encoded);
        hashes.extend_from_slice(&encoded);
    }
    let bytes = golden("sender-hashes-v1.bin", &hashes);
    assert_eq!(HashesHeader::newest(&bytes[..HASHES_ENTRIES_OFFSET as usize]), Ok(header(2)));
    let start = HashEntry::offset(BlockIndex(1)) as usize;
    encoded.copy_from_slice(&bytes[start..start + HASH_ENTRY_BYTES]);
    assert_eq!(HashEntry::decode(BlockIndex(1), &encoded), Ok(HashEntry::ZERO));

    let bytes = golden("sender-journal-v1.bin", &parts().iter().flat_map(JournalPart::encode).collect::<Vec<_>>());
    let mut rest = &bytes[..];
    for part in parts() {
        let prefix = rest[..JournalPart::PREFIX_BYTES].try_into().expect("a prefix");
        let (bytes, after) = rest.split_at(JournalPart::encoded_len(prefix).expect("a valid part"));
        assert_eq!(JournalPart::decode(bytes), Ok(part));
        rest = after;
    }
    assert!(rest.is_empty());
}

#[test]
fn every_flipped_or_missing_byte_of_the_identity_and_the_journal_is_noticed() {
    refuses_every_flip(&identity().encode(), |bytes| VolumeIdentity::decode(bytes).is_ok());
    refuses_every_truncation(&identity().encode(), |bytes| VolumeIdentity::decode(bytes).is_ok());
    for part in parts() {
        refuses_every_flip(&part.encode(), |bytes| JournalPart::decode(bytes).is_ok());
        refuses_every_truncation(&part.encode(), |bytes| JournalPart::decode(bytes).is_ok());
    }
}

#[test]
fn every_flipped_byte_of_a_header_slot_is_noticed() {
    refuses_every_flip(&header(1).encode_slot(), |bytes| HashesHeader::decode_slot(bytes).is_ok());
}

#[test]
fn every_flipped_byte_of_an_entry_and_an_entry_of_another_block_is_noticed() {
    let mut bytes = [0; HASH_ENTRY_BYTES];
    entry().encode(BlockIndex(12), &mut bytes);
    let decodes =
        |bytes: &[u8]| HashEntry::decode(BlockIndex(12), bytes.try_into().expect("an entry's length")).is_ok();
    refuses_every_flip(&bytes, decodes);
    assert_eq!(HashEntry::decode(BlockIndex(13), &bytes), Err(FormatError::Checksum { what: "page hashes entry" }));
}

#[test]
fn an_entry_that_was_never_written_is_unknown_and_its_flipped_bytes_are_noticed() {
    assert_eq!(HashEntry::decode(BlockIndex(1), &[0; HASH_ENTRY_BYTES]), Ok(HashEntry::UNKNOWN));
    let decodes = |bytes: &[u8]| HashEntry::decode(BlockIndex(1), bytes.try_into().expect("length")).is_ok();
    refuses_every_flip(&[0; HASH_ENTRY_BYTES], decodes);
}

#[test]
fn the_slot_with_the_higher_sequence_counts_and_a_torn_one_does_not() {
    let slots = |first: &HashesHeader, second: &HashesHeader| [first.encode_slot(), second.encode_slot()].concat();
    assert_eq!(HashesHeader::newest(&slots(&header(4), &header(3))), Ok(header(4)));
    assert_eq!(HashesHeader::newest(&slots(&header(4), &header(5))), Ok(header(5)));
    let mut torn = slots(&header(4), &header(5));
    torn[HASHES_SLOT_BYTES + 40..HASHES_SLOT_BYTES + 60].fill(0);
    assert_eq!(HashesHeader::newest(&torn), Ok(header(4)));
    torn[40..60].fill(0);
    assert_eq!(HashesHeader::newest(&torn), Err(FormatError::Checksum { what: "page hashes" }));
}

#[test]
fn another_version_is_named_before_the_checksum_in_every_file() {
    let version = |what| FormatError::UnknownVersion { what, found: 9, known: 1 };
    let mut bytes = identity().encode();
    bytes[8] = 9;
    assert_eq!(VolumeIdentity::decode(&bytes), Err(version("volume state")));
    let mut slots = [header(4).encode_slot(), header(5).encode_slot()].concat();
    slots[HASHES_SLOT_BYTES + 8] = 9;
    assert_eq!(HashesHeader::newest(&slots), Err(version("page hashes")));
    let mut bytes = parts()[0].encode();
    bytes[8] = 9;
    assert_eq!(JournalPart::decode(&bytes), Err(version("journal")));
    assert_eq!(JournalPart::encoded_len(bytes[..20].try_into().expect("20")), Err(version("journal")));
}

#[test]
fn printing_an_identity_does_not_print_the_hash_key() {
    assert!(!format!("{:?}", identity()).contains("5, 5"));
}

fn any_change() -> impl Strategy<Value = HashChange> {
    prop_oneof![
        (0_u64..1 << 30, 1..=u64::MAX, any::<[u8; 16]>()).prop_map(|(block, mask, hash)| HashChange::Pages {
            block: BlockIndex(block),
            mask: PageMask(mask),
            hashes: vec![hash; mask.count_ones() as usize],
        }),
        (0_u64..1 << 29, 1..=limits::RANGE_BLOCKS_MAX)
            .prop_map(|(first, count)| HashChange::ZeroBlocks { first: BlockIndex(first), count }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_batch_is_read_as_it_was_written(changes in prop::collection::vec(any_change(), 0..=JOURNAL_BATCH_CHANGES_MAX)) {
        let part = JournalPart::Batch(JournalBatch { epoch: Epoch(1), index: 2, changes });
        let bytes = part.encode();
        let prefix = bytes[..20].try_into().expect("20");
        prop_assert_eq!(JournalPart::encoded_len(prefix), Ok(bytes.len()));
        prop_assert_eq!(JournalPart::decode(&bytes), Ok(part));
    }

    #[test]
    fn an_identity_is_read_as_it_was_written(name in ".{0,30}", path in prop::collection::vec(any::<u8>(), 0..200), device in any::<bool>(), disk in 1..=limits::DISK_BYTES_MAX) {
        let source = if device { SourceIdentity::Device { serial: name.clone() } } else { SourceIdentity::File { device: disk, inode: 7 } };
        let identity = VolumeIdentity { name, source_path: path, source, disk_bytes: disk, ..identity() };
        prop_assert_eq!(VolumeIdentity::decode(&identity.encode()), Ok(identity));
    }

    #[test]
    fn hostile_bytes_are_an_error_and_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..2048), which in 0_usize..6) {
        let mut bytes = bytes;
        let starts: [&[u8]; 6] = [b"", b"BFSTVOL\0\x01\0", b"BFHASHES\x01\0", b"BFJRNHD\0\x01\0", b"BFJRNBT\0\x01\0", b"BFJRNEN\0\x01\0"];
        bytes.splice(0..0, starts[which].iter().copied());
        let _ = VolumeIdentity::decode(&bytes);
        let _ = HashesHeader::newest(&bytes);
        let _ = JournalPart::decode(&bytes);
        if let Some(prefix) = bytes.first_chunk() {
            let _ = JournalPart::encoded_len(prefix);
        }
    }

    /// The checksum is made right again, so that what lies behind it is reached.
    #[test]
    fn a_damaged_body_under_a_right_checksum_never_panics(at in any::<prop::sample::Index>(), value in any::<u8>(), cut in any::<prop::sample::Index>()) {
        let [head, batch, end] = parts().map(|part| part.encode());
        for (kind, bytes) in [(IDENTITY_KIND, identity().encode()), (JOURNAL_HEAD_KIND, head), (JOURNAL_BATCH_KIND, batch), (JOURNAL_END_KIND, end)] {
            let mut body = kind.open(&bytes).expect("a sample is valid").to_vec();
            let index = at.index(body.len());
            body[index] = value;
            body.truncate(cut.index(body.len()) + 1);
            let bytes = kind.seal(&body);
            let _ = VolumeIdentity::decode(&bytes);
            let _ = JournalPart::decode(&bytes);
        }
    }
}
