//! Sealing: whatever the pages, they come back; nothing else opens; and a record made up of the input opens under no key.
#![no_main]

use blockferry_fuzz::{fix_record, owned};
use common::format::record::Record;
use common::ids::{BlockIndex, Epoch, Incarnation, KeyId, PageMask, Salt, VolumeId};
use common::limits::PAGE_BYTES;
use common::seal::{Compression, DataKey, EpochContext, Opener, Sealer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (mut sealer, mut opener) = (Sealer::new(1).expect("level 1"), Opener::new().expect("memory"));
    let context =
        EpochContext { volume: VolumeId([0x11; 16]), incarnation: Incarnation(1), epoch: Epoch(7), key_id: KeyId(1) };
    let key = DataKey::from_random([9; 32]).epoch_key(context, &Salt([2; 32]));
    let mut out = Vec::new();

    // The golden record is of this place, so that mutations of it get as far as to the seal.
    let mut fixed = data.to_vec();
    fix_record(&mut fixed);
    if let Ok(record) = Record::parse(owned(&fixed)) {
        assert!(opener.open(&key, &record, &mut out).is_err(), "a seal was forged");
        assert!(out.is_empty());
    }

    let count = data.len() / PAGE_BYTES;
    let pages = &data[..count * PAGE_BYTES];
    let mask = PageMask::first(u32::try_from(count).expect("few pages"));
    let compression = if data.len() % 2 == 0 { Compression::Try } else { Compression::Skip };
    let zero = PageMask::FULL.without(mask);
    let record = sealer.seal_block(&key, BlockIndex(5), mask, zero, 1, pages, compression).expect("pages fit the mask");
    let parsed = Record::parse(record.bytes().clone()).expect("what is sealed parses");
    opener.open(&key, &parsed, &mut out).expect("what is sealed opens");
    assert_eq!(out, pages);
    let mut altered = record.bytes().to_vec();
    let at = data.len() * 31 % altered.len();
    altered[at] ^= 1;
    fix_record(&mut altered);
    if let Ok(altered) = Record::parse(altered.into())
        && altered != record
    {
        assert!(opener.open(&key, &altered, &mut out).is_err(), "byte {at} was altered unnoticed");
    }
});
