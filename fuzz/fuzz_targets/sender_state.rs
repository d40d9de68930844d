//! The sender's state: identity, header slots and entries of the page hashes, parts of a journal. Each is an error or survives
//! being encoded.
#![no_main]

use blockferry_fuzz::enveloped;
use common::format::envelope::Kind;
use common::format::state::{
    HASH_ENTRY_BYTES, HASHES_KIND, HASHES_SLOT_BYTES, HashEntry, HashesHeader, IDENTITY_KIND, JOURNAL_BATCH_KIND,
    JOURNAL_END_KIND, JOURNAL_HEAD_KIND, JournalPart, VolumeIdentity,
};
use common::ids::BlockIndex;
use libfuzzer_sys::fuzz_target;

fn check_identity(data: &[u8]) {
    if let Ok(identity) = VolumeIdentity::decode(data) {
        let _ = (identity.geometry(), identity.hash_key_check());
        assert_eq!(VolumeIdentity::decode(&identity.encode()), Ok(identity));
    }
}

fn check_slot(slot: &[u8]) {
    if let Ok(header) = HashesHeader::decode_slot(slot) {
        assert_eq!(HashesHeader::decode_slot(&header.encode_slot()), Ok(header));
    }
}

/// A journal, part by part, as it is read from a file.
fn check_journal(mut rest: &[u8]) {
    while let Some(prefix) = rest.first_chunk() {
        let Ok(length) = JournalPart::encoded_len(prefix) else { return };
        let Some((bytes, tail)) = rest.split_at_checked(length) else { return };
        let Ok(part) = JournalPart::decode(bytes) else { return };
        assert_eq!(JournalPart::decode(&part.encode()), Ok(part));
        rest = tail;
    }
}

fn sealed(kind: &Kind, data: &[u8], check: impl Fn(&[u8])) {
    if let Some(sealed) = enveloped(kind, data) {
        check(&sealed);
    }
}

fuzz_target!(|data: &[u8]| {
    check_identity(data);
    check_slot(data);
    check_journal(data);
    let _ = HashesHeader::newest(data);
    sealed(&IDENTITY_KIND, data, check_identity);
    sealed(&HASHES_KIND, data, |slot| {
        let mut slot = slot.to_vec();
        slot.resize(HASHES_SLOT_BYTES, 0);
        check_slot(&slot);
    });
    for kind in [JOURNAL_HEAD_KIND, JOURNAL_BATCH_KIND, JOURNAL_END_KIND] {
        sealed(&kind, data, check_journal);
    }
    for (block, entry) in data.as_chunks::<HASH_ENTRY_BYTES>().0.iter().enumerate() {
        let block = BlockIndex(block as u64);
        if let Ok(hashes) = HashEntry::decode(block, entry) {
            let mut again = [0; HASH_ENTRY_BYTES];
            hashes.encode(block, &mut again);
            assert_eq!(HashEntry::decode(block, &again), Ok(hashes));
        }
    }
});
