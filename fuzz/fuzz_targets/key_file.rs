//! A key file is an error or exactly what would be written; an unwrapping of anything is an error or a key, never a panic.
#![no_main]

use common::format::volume_header::{WrappedKey, Wrapping};
use common::ids::{KeyId, Salt, VolumeId};
use common::seal::keyfile::KeyFile;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(file) = KeyFile::parse(text)
    {
        assert_eq!(file.encode().as_str(), text);
    }
    let file = KeyFile::from_random([1; 16], [2; 32]);
    let copy = WrappedKey {
        key_id: KeyId(1),
        wrapping: Wrapping::KeyFile,
        wrapping_id: [1; 16],
        salt: Salt([3; 32]),
        parameters: Vec::new(),
        wrapped: data.to_vec(),
    };
    assert!(file.unwrap(&[copy], VolumeId([4; 16]), KeyId(1)).is_err(), "a wrapping was forged");
});
