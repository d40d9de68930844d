//! Round trips, flipped bytes, truncation, hostile input.

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::samples;
use crate::format::close::Close;
use crate::format::frame::{Frame, FrameHead};
use crate::format::log::LogEntry;
use crate::format::record::{Record, RecordMeta};
use crate::format::segment::{Footer, SegmentIndex};
use crate::format::stage_key::StageKey;
use crate::format::volume_header::VolumeHeader;
use crate::format::wire::{Reader, Writer};
use crate::format::{FormatError, segment};
use crate::ids::*;

fn frame_bytes(frame: &Frame) -> Vec<u8> {
    let (head, payload) = frame.encode();
    [head, payload.unwrap_or_default()].concat()
}

/// Flips each byte of `bytes` in turn, by one bit, and by all; `decodes` must refuse every one of them.
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
fn every_flipped_or_missing_byte_of_a_record_is_noticed() {
    let record = samples::delta(5, 0b1, 0b110, 0xab);
    let decodes = |bytes: &[u8]| Record::parse(Bytes::copy_from_slice(bytes)).is_ok();
    refuses_every_flip(record.bytes(), decodes);
    refuses_every_truncation(record.bytes(), decodes);
}

#[test]
fn every_flipped_or_missing_byte_of_a_close_is_noticed() {
    refuses_every_flip(samples::close().bytes(), |bytes| Close::decode(bytes).is_ok());
    refuses_every_truncation(samples::close().bytes(), |bytes| Close::decode(bytes).is_ok());
}

/// Bytes that are not all zero where the writer left zeros: the ignorable flags of an envelope are the one exception, and
/// they are under the checksum.
#[test]
fn every_flipped_or_missing_byte_of_a_log_entry_is_noticed() {
    for entry in [samples::log_entry(), samples::maintenance_entry()] {
        let bytes = entry.encode();
        refuses_every_flip(&bytes, |bytes| LogEntry::decode(bytes).is_ok());
        refuses_every_truncation(&bytes, |bytes| LogEntry::decode(bytes).is_ok());
    }
}

#[test]
fn every_flipped_or_missing_byte_of_a_volume_header_is_noticed() {
    let bytes = samples::volume_header().encode();
    refuses_every_flip(&bytes, |bytes| VolumeHeader::decode(bytes).is_ok());
    refuses_every_truncation(&bytes, |bytes| VolumeHeader::decode(bytes).is_ok());
}

#[test]
fn every_flipped_byte_of_a_segment_is_noticed_by_its_index_or_its_records() {
    let records = [samples::delta(5, 0, 1, 1), samples::delta(6, 0, 1, 2)];
    let (bytes, _) = samples::segment(&records);
    refuses_every_flip(&bytes, |bytes| {
        let Ok(index) = SegmentIndex::decode_segment(bytes) else { return false };
        index.groups.iter().flat_map(|group| &group.entries).all(|entry| {
            let (start, end) = (entry.offset as usize, entry.offset as usize + entry.meta.record_len as usize);
            let record = bytes.get(start..end).map(Bytes::copy_from_slice).map(Record::parse);
            record.is_some_and(|record| record.is_ok_and(|record| entry.meta.describes(&record)))
        })
    });
    refuses_every_truncation(&bytes, |bytes| SegmentIndex::decode_segment(bytes).is_ok());
}

#[test]
fn every_flipped_byte_of_a_frame_is_noticed() {
    for frame in samples::frames() {
        if matches!(frame, Frame::Record { .. }) {
            continue; // covered by the record's own test; its page would take minutes here
        }
        refuses_every_flip(&frame_bytes(&frame), |bytes| {
            let mut buffer = BytesMut::from(bytes);
            matches!(Frame::take(&mut buffer), Ok(Some(_))) && buffer.is_empty()
        });
    }
}

#[test]
fn a_frame_that_is_not_all_there_is_awaited_not_refused() {
    for frame in samples::frames() {
        let bytes = frame_bytes(&frame);
        for length in [0, 1, 11, 12, bytes.len() - 1] {
            assert_eq!(Frame::take(&mut BytesMut::from(&bytes[..length])), Ok(None));
        }
    }
}

#[test]
fn a_frame_length_over_the_limit_is_refused_before_it_is_awaited() {
    let mut bytes = frame_bytes(&Frame::Staged { seq: 1 });
    bytes[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(FrameHead::peek(&bytes), Err(FormatError::OverLimit { .. })));
}

#[test]
fn an_unknown_version_is_refused_by_its_number() {
    let mut bytes = samples::volume_header().encode();
    bytes[8] = 9;
    let expected = FormatError::UnknownVersion { what: "volume header", found: 9, known: 1 };
    assert_eq!(VolumeHeader::decode(&bytes), Err(expected));
    let mut bytes = samples::volume_header().encode();
    bytes[10] = 4;
    assert_eq!(VolumeHeader::decode(&bytes), Err(FormatError::UnknownFlags { what: "volume header", found: 4 }));
}

#[test]
fn stage_keys_sort_by_batch_then_volume_then_epoch_then_block() {
    let key = |batch, volume, epoch, block| StageKey {
        batch: BatchId(batch),
        volume: VolumeId([volume; 16]),
        epoch: Epoch(epoch),
        block: BlockIndex(block),
    };
    let keys = [key(1, 9, 9, 9), key(2, 1, 300, 0), key(2, 1, 300, 256), key(2, 1, 301, 0), key(256, 0, 0, 0)];
    assert!(keys.windows(2).all(|pair| pair[0].encode() < pair[1].encode() && pair[0] < pair[1]));
    assert!(keys.iter().all(|key| StageKey::decode(&key.encode()) == Ok(*key)));
    assert!(StageKey::decode(&[0; 39]).is_err() && StageKey::decode(&[0; 41]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_record_is_parsed_as_it_was_assembled(record in samples::any_record()) {
        let parsed = Record::parse(record.bytes().clone());
        prop_assert_eq!(parsed.as_ref(), Ok(&record));
        let mut writer = Writer::default();
        record.meta().encode(&mut writer);
        let mut reader = Reader::new("meta", writer.as_slice());
        prop_assert_eq!(RecordMeta::decode(&mut reader), Ok(record.meta()));
        prop_assert_eq!(reader.remaining(), 0);
    }

    #[test]
    fn a_record_with_any_bit_flipped_is_refused(record in samples::any_record(), at in any::<prop::sample::Index>(), bit in 0_u32..8) {
        let mut bytes = record.bytes().to_vec();
        let index = at.index(bytes.len());
        bytes[index] ^= 1_u8 << bit;
        prop_assert!(Record::parse(bytes.into()).is_err());
    }

    #[test]
    fn a_segment_is_read_as_it_was_written(records in prop::collection::vec(samples::any_record(), 0..20)) {
        let (bytes, index) = samples::segment(&records);
        prop_assert_eq!(SegmentIndex::decode_segment(&bytes), Ok(index));
    }

    #[test]
    fn hostile_bytes_are_an_error_and_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..2048), which in 0_usize..7) {
        // Give the random bytes a valid beginning now and then, so that they get past the magic.
        let mut bytes = bytes;
        let starts: [&[u8]; 7] = [b"", b"BFRD\x01\0\x68\0", b"BFCLOSE\0\x01\0", b"BFLOGENT\x01\0", b"BFVOLUME\x01\0", b"BFSEGMT\0\x01\0", b"\x40\0\0\0\x01\0\0\0"];
        bytes.splice(0..0, starts[which].iter().copied());
        let _ = Record::parse(Bytes::copy_from_slice(&bytes));
        let _ = Close::decode(&bytes);
        let _ = LogEntry::decode(&bytes);
        let _ = VolumeHeader::decode(&bytes);
        let _ = SegmentIndex::decode_segment(&bytes);
        let _ = Footer::decode_tail(&bytes, bytes.len() as u64);
        let _ = segment::check_preamble(&bytes);
        let _ = Frame::take(&mut BytesMut::from(&bytes[..]));
    }

    /// The checksum is made right again, so that what lies behind it is reached.
    #[test]
    fn a_damaged_body_under_a_right_checksum_never_panics(at in any::<prop::sample::Index>(), value in any::<u8>(), cut in any::<prop::sample::Index>()) {
        use crate::format::{close, log, volume_header};
        for (kind, bytes) in [
            (close::KIND, samples::close().bytes().to_vec()),
            (log::KIND, samples::log_entry().encode()),
            (volume_header::KIND, samples::volume_header().encode()),
        ] {
            let mut body = kind.open(&bytes).expect("a sample is valid").to_vec();
            let index = at.index(body.len());
            body[index] = value;
            body.truncate(cut.index(body.len()) + 1);
            let bytes = kind.seal(&body);
            let _ = Close::decode(&bytes);
            let _ = LogEntry::decode(&bytes);
            let _ = VolumeHeader::decode(&bytes);
        }
    }
}
