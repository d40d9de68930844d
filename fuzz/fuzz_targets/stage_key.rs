//! A stage key is 40 bytes, which decode and encode to each other and sort as the values do.
#![no_main]

use common::format::stage_key::{STAGE_KEY_BYTES, StageKey};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let key = StageKey::decode(data);
    assert_eq!(key.is_ok(), data.len() == STAGE_KEY_BYTES);
    if let Ok(key) = key {
        assert_eq!(key.encode(), data);
    }
    if let Some((first, second)) = data.split_at_checked(STAGE_KEY_BYTES)
        && let (Ok(one), Ok(two)) = (StageKey::decode(first), StageKey::decode(second))
    {
        assert_eq!(one.cmp(&two), first.cmp(second));
    }
});
