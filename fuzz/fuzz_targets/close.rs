//! A close decodes to its own bytes, or is an error; none of them verifies with a key that did not sign it.
#![no_main]

use blockferry_fuzz::enveloped;
use common::format::close::{Close, KIND};
use common::seal::signing::verify_close;
use libfuzzer_sys::fuzz_target;

fn check(data: &[u8]) -> Option<Close> {
    let close = Close::decode(data).ok()?;
    assert_eq!(close.bytes(), data);
    Some(close)
}

fuzz_target!(|data: &[u8]| {
    check(data);
    let Some(sealed) = enveloped(&KIND, data) else { return };
    if let Some(close) = check(&sealed) {
        let again = Close::new(close.statement().clone(), *close.signature());
        assert_eq!(again, close);
        assert!(verify_close(&close, &[0x42; 32]).is_err());
    }
});
