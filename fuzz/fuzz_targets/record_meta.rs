//! Metadata of records: each is an error or encodes to the same 96 bytes; a tree over them never panics, and its root depends on
//! each of them.
#![no_main]

use common::format::record::RecordMeta;
use common::format::wire::{Reader, Writer};
use common::limits::RECORD_META_BYTES;
use common::seal::merkle;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut reader = Reader::new("metadata", data);
    let mut metas = Vec::new();
    while reader.remaining() > 0 {
        let at = data.len() - reader.remaining();
        let Ok(meta) = RecordMeta::decode(&mut reader) else { break };
        let mut writer = Writer::default();
        meta.encode(&mut writer);
        assert_eq!(writer.as_slice(), &data[at..at + RECORD_META_BYTES]);
        metas.push(meta);
    }
    if let Ok(root) = merkle::root(&metas)
        && let Some(last) = metas.last_mut()
    {
        last.digest.0[0] ^= 1;
        assert_ne!(merkle::root(&metas), Ok(root));
    }
});
