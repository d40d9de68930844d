//! A log entry is an error or encodes to what it was decoded from.
#![no_main]

use blockferry_fuzz::enveloped;
use common::format::log::{KIND, LogEntry};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(entry) = LogEntry::decode(data) {
        assert_eq!(LogEntry::decode(&entry.encode()), Ok(entry));
    }
    let Some(sealed) = enveloped(&KIND, data) else { return };
    if let Ok(entry) = LogEntry::decode(&sealed) {
        assert_eq!(entry.encode(), sealed);
        for epoch in &entry.epochs {
            assert!(epoch.segments.iter().all(|index| (*index as usize) < entry.segments.len()));
        }
    }
});
