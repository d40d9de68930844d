//! A segment's preamble, index and footer: an error, or entries that were collected or lie in order between preamble and
//! index, and encode to the same bytes.
#![no_main]

use blockferry_fuzz::{fix_segment, owned};
use common::format::record::Record;
use common::format::segment::{Footer, PREAMBLE_BYTES, SegmentIndex, VERSION_COLLECTED};
use libfuzzer_sys::fuzz_target;

fn check(data: &[u8]) {
    let Ok(index) = SegmentIndex::decode_segment(data) else { return };
    let footer = Footer::decode_tail(data, data.len() as u64).expect("it was decoded just now");
    let start = usize::try_from(footer.index_offset).expect("within the input");
    assert_eq!(index.encode(footer.index_offset), data[start..]);
    let mut end = PREAMBLE_BYTES;
    for entry in index.groups.iter().flat_map(|group| &group.entries) {
        if entry.is_collected() {
            assert_eq!(footer.version, VERSION_COLLECTED);
            continue;
        }
        let at = usize::try_from(entry.offset).expect("within the input");
        assert!(at >= end);
        end = at + entry.meta.record_len as usize;
        assert!(end <= start);
        if let Ok(record) = Record::parse(owned(&data[at..end])) {
            let _ = entry.meta.describes(&record);
        }
    }
}

fuzz_target!(|data: &[u8]| {
    check(data);
    check(&fix_segment(data));
});
