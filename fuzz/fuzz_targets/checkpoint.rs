//! A checkpoint: its head is an error or encodes to what it was decoded from; what follows the head is taken for a page, its checksum
//! and digest made right, and is an error or encodes to itself.
#![no_main]

use blockferry_fuzz::enveloped;
use common::format::checkpoint::{CheckpointHead, KIND, encode_page, page_ref};
use common::format::envelope::{HEAD_BYTES, OVERHEAD_BYTES};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = CheckpointHead::check_whole(data);
    // The head's own length says where the pages begin.
    let length = data
        .get(16..HEAD_BYTES)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(usize::MAX, |bytes| usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(usize::MAX));
    let head_len = length.saturating_add(OVERHEAD_BYTES).min(data.len());
    let (head, pages) = data.split_at(head_len);
    let Some(sealed) = enveloped(&KIND, head) else { return };
    let Ok((head, decoded_len)) = CheckpointHead::decode_prefix(&sealed) else { return };
    assert_eq!(decoded_len, sealed.len());
    assert_eq!(head.encode().as_deref(), Ok(&sealed[..]));
    for place in head.pages.as_deref().unwrap_or_default() {
        let page = page_ref(place.first_block, place.offset, pages);
        if let Ok(entries) = head.decode_page(&page, pages) {
            assert_eq!(encode_page(&entries), pages);
        }
    }
});
