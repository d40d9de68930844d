//! A name claim is an error or encodes to what it was decoded from.
#![no_main]

use blockferry_fuzz::enveloped;
use common::format::volume_name::{KIND, VolumeName};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(name) = VolumeName::decode(data) {
        assert_eq!(VolumeName::decode(&name.encode()), Ok(name));
    }
    let Some(sealed) = enveloped(&KIND, data) else { return };
    if let Ok(name) = VolumeName::decode(&sealed) {
        assert_eq!(name.encode(), sealed);
    }
});
