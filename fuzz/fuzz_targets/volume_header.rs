//! A volume header is an error or survives being encoded.
#![no_main]

use blockferry_fuzz::enveloped;
use common::format::volume_header::{KIND, VolumeHeader};
use libfuzzer_sys::fuzz_target;

fn check(data: &[u8]) {
    if let Ok(header) = VolumeHeader::decode(data) {
        assert!(header.current().disk_bytes > 0);
        assert_eq!(VolumeHeader::decode(&header.encode()), Ok(header));
    }
}

fuzz_target!(|data: &[u8]| {
    check(data);
    if let Some(sealed) = enveloped(&KIND, data) {
        check(&sealed);
    }
});
