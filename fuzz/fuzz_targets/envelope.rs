//! An envelope of any kind opens to its body, or is an error; what opens is what `seal` would write, but for ignorable flags.
#![no_main]

use blockferry_fuzz::enveloped;
use common::format::{checkpoint, close, lifecycle, log, state, volume_header, volume_name};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for kind in [
        close::KIND,
        log::KIND,
        checkpoint::KIND,
        volume_header::KIND,
        volume_name::KIND,
        lifecycle::KIND,
        state::IDENTITY_KIND,
        state::HASHES_KIND,
        state::JOURNAL_HEAD_KIND,
        state::JOURNAL_BATCH_KIND,
        state::JOURNAL_END_KIND,
    ] {
        if let Ok((body, rest)) = kind.open_prefix(data) {
            assert_eq!(kind.open(&kind.seal(body)), Ok(body));
            assert_eq!(kind.open(data).is_ok(), rest.is_empty());
        }
        if let Some(sealed) = enveloped(&kind, data) {
            let body = kind.open(&sealed).expect("what was just sealed opens");
            assert_eq!(kind.seal(body), sealed);
        }
    }
});
