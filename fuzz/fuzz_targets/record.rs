//! A record parses to what it says, byte for byte, or is an error.
#![no_main]

use blockferry_fuzz::{fix_record, owned};
use common::format::record::{AAD_BYTES, Record, RecordMeta};
use common::format::wire::{Reader, Writer};
use common::ids::Geometry;
use libfuzzer_sys::fuzz_target;

fn check(data: &[u8]) {
    let Ok(record) = Record::parse(owned(data)) else { return };
    let header = record.header();
    assert_eq!(header.aad(), data[..AAD_BYTES]);
    assert_eq!(header.record_len(), data.len());
    assert_eq!(Record::assemble(*header, data.to_vec()), record);
    let _ = header.fits(Geometry::new(1 << 20).expect("a size"));
    let meta = record.meta();
    assert!(meta.describes(&record));
    let mut writer = Writer::default();
    meta.encode(&mut writer);
    assert_eq!(RecordMeta::decode(&mut Reader::new("metadata", writer.as_slice())), Ok(meta));
}

fuzz_target!(|data: &[u8]| {
    check(data);
    let mut fixed = data.to_vec();
    fix_record(&mut fixed);
    check(&fixed);
});
