//! Golden files keep code and byte tables together for ever: a change of any encoding fails here.
//!
//! `BLOCKFERRY_WRITE_GOLDEN=1 cargo test -p blockferry-common golden` writes files that are missing; it never replaces one.

use std::path::Path;

use bytes::{Bytes, BytesMut};

use super::samples;
use crate::format::close::Close;
use crate::format::frame::Frame;
use crate::format::log::LogEntry;
use crate::format::record::Record;
use crate::format::segment::SegmentIndex;
use crate::format::volume_header::VolumeHeader;

/// The golden bytes named `name`, which must equal `encoded`.
pub(crate) fn golden(name: &str, encoded: &[u8]) -> Vec<u8> {
    let path = Path::new(&std::env::var("CARGO_MANIFEST_DIR").expect("cargo says where the crate lies"))
        .join("src/format/golden")
        .join(name);
    if !path.exists() && std::env::var_os("BLOCKFERRY_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, encoded).expect("the golden folder is writable");
    }
    let golden = std::fs::read(&path).unwrap_or_else(|error| panic!("golden file {}: {error}", path.display()));
    assert_eq!(golden, encoded, "{name}: the encoding changed; old data could not be read any more");
    golden
}

#[test]
fn record_is_as_it_was_first_written() {
    let record = samples::delta(5, 0b1, 0b110, 0xab);
    let bytes = golden("record-v1.bin", record.bytes());
    assert_eq!(Record::parse(Bytes::from(bytes)), Ok(record));
}

#[test]
fn close_is_as_it_was_first_written() {
    let bytes = golden("close-v1.bin", samples::close().bytes());
    assert_eq!(Close::decode(&bytes), Ok(samples::close()));
}

#[test]
fn log_entry_is_as_it_was_first_written() {
    let bytes = golden("log-entry-v1.bin", &samples::log_entry().encode());
    assert_eq!(LogEntry::decode(&bytes), Ok(samples::log_entry()));
}

#[test]
fn an_entry_of_maintenance_is_as_it_was_first_written() {
    let bytes = golden("log-entry-v2.bin", &samples::maintenance_entry().encode());
    assert_eq!(LogEntry::decode(&bytes), Ok(samples::maintenance_entry()));
}

#[test]
fn a_segment_with_a_collected_record_is_as_it_was_first_written() {
    let (segment, index) = samples::collected_segment(&[samples::delta(5, 1, 0, 1), samples::delta(6, 0, 1, 2)]);
    let bytes = golden("segment-v2.bin", &segment);
    assert_eq!(SegmentIndex::decode_segment(&bytes), Ok(index));
}

#[test]
fn volume_header_is_as_it_was_first_written() {
    let bytes = golden("volume-header-v1.bin", &samples::volume_header().encode());
    assert_eq!(VolumeHeader::decode(&bytes), Ok(samples::volume_header()));
}

#[test]
fn segment_is_as_it_was_first_written() {
    let (segment, index) = samples::segment(&[samples::delta(5, 1, 0, 1), samples::delta(6, 0, 1, 2)]);
    let bytes = golden("segment-v1.bin", &segment);
    assert_eq!(SegmentIndex::decode_segment(&bytes), Ok(index));
}

#[test]
fn frames_are_as_they_were_first_written() {
    let mut bytes = Vec::new();
    for frame in samples::frames() {
        let (head, payload) = frame.encode();
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(&payload.unwrap_or_default());
    }
    let mut buffer = BytesMut::from(&golden("frames-v1.bin", &bytes)[..]);
    for frame in samples::frames() {
        assert_eq!(Frame::take(&mut buffer), Ok(Some(frame)));
    }
    assert!(buffer.is_empty());
}
