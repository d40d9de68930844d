//! The machine's key file, and the data keys it wraps.
//!
//! The file is text, made at registration:
//!
//! ```text
//! blockferry-key v1
//! id: <32 hex digits>
//! key: <64 hex digits>
//! check: <first 8 hex digits of BLAKE3 over the three lines above, line feeds included>
//! ```
//!
//! A data key is wrapped by AES-256-GCM with a zero nonce under `HKDF-SHA-256(ikm = file's key, salt, info = "blockferry wrap v1" ∥
//! volume ∥ key id)`, the salt drawn for each wrapping, so no key and nonce pair repeats. The associated data is the info.

use std::fmt;

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::{DataKey, SealError, derive_key, nonce};
use crate::format::volume_header::{WrappedKey, Wrapping};
use crate::ids::{KeyId, Salt, VolumeId};

const FIRST_LINE: &str = "blockferry-key v1";

/// Longest key file that is read; the real one has under 200 bytes.
pub const KEY_FILE_BYTES_MAX: usize = 4096;

/// A key file's content. Wiped when dropped; prints only its id.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct KeyFile {
    id: [u8; 16],
    key: [u8; 32],
}

impl fmt::Debug for KeyFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyFile(id {}, …)", hex(&self.id))
    }
}

impl KeyFile {
    /// A key file from random bytes drawn by the caller.
    #[must_use]
    pub fn from_random(id: [u8; 16], key: [u8; 32]) -> Self {
        Self { id, key }
    }

    /// Its id, in hexadecimal, which is no secret.
    #[must_use]
    pub fn id(&self) -> String {
        hex(&self.id)
    }

    /// The file's text.
    #[must_use]
    pub fn encode(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(format!("{FIRST_LINE}\nid: {}\nkey: ", hex(&self.id)));
        text.push_str(&Zeroizing::new(hex(&self.key)));
        text.push('\n');
        let check = check(&text);
        text.push_str(&format!("check: {check}\n"));
        text
    }

    /// Parses a key file; every byte counts.
    ///
    /// # Errors
    /// [`SealError::KeyFile`], which says what is wrong with it, never its content.
    pub fn parse(text: &str) -> Result<Self, SealError> {
        let wrong = |what: &str| SealError::KeyFile(what.to_owned());
        let mut lines = text.split_inclusive('\n');
        let mut line = |number: usize, prefix: &str| {
            lines.next().and_then(|line| line.strip_suffix('\n')).and_then(|line| line.strip_prefix(prefix)).ok_or_else(
                || SealError::KeyFile(format!("line {number} does not start with \"{prefix}\" or is cut off")),
            )
        };
        if !line(1, FIRST_LINE)?.is_empty() {
            return Err(wrong("line 1 names another version; this software knows \"blockferry-key v1\""));
        }
        let (id, key, found) = (line(2, "id: ")?, line(3, "key: ")?, line(4, "check: ")?);
        if lines.next().is_some() {
            return Err(wrong("there is more after line 4"));
        }
        let covered = text.len() - "check: ".len() - found.len() - 1;
        if check(&text[..covered]) != found {
            return Err(wrong("the check line does not match: a character was altered; use another copy of the file"));
        }
        Ok(Self {
            id: unhex(id).ok_or_else(|| wrong("the id is not 32 hexadecimal digits"))?,
            key: unhex(key).ok_or_else(|| wrong("the key is not 64 hexadecimal digits"))?,
        })
    }

    /// Wraps a data key for a volume's header; `salt` is random and new.
    ///
    /// # Panics
    /// Never: 32 bytes are within AES-GCM's bounds.
    #[must_use]
    pub fn wrap(&self, data_key: &DataKey, volume: VolumeId, key_id: KeyId, salt: Salt) -> WrappedKey {
        let info = info(volume, key_id);
        let cipher = Aes256Gcm::new(&(*derive_key(&self.key, &salt.0, &info)).into());
        let payload = Payload { msg: data_key.expose(), aad: &info };
        let wrapped = cipher.encrypt(&nonce(0).into(), payload).expect("32 bytes are within AES-GCM's bounds");
        WrappedKey { key_id, wrapping: Wrapping::KeyFile, wrapping_id: self.id, salt, parameters: Vec::new(), wrapped }
    }

    /// Opens the data key `key_id` out of the wrapped copies of a volume's header.
    ///
    /// # Errors
    /// [`SealError::WrongKeyFile`] where no copy was made with this file, [`SealError::Unwrap`] where it does not open.
    pub fn unwrap(&self, copies: &[WrappedKey], volume: VolumeId, key_id: KeyId) -> Result<DataKey, SealError> {
        let mut ours = copies.iter().filter(|copy| copy.key_id == key_id && copy.wrapping == Wrapping::KeyFile);
        let Some(copy) = ours.clone().find(|copy| copy.wrapping_id == self.id) else {
            let needed = ours.by_ref().map(|copy| hex(&copy.wrapping_id)).collect::<Vec<_>>().join(", ");
            return Err(SealError::WrongKeyFile { volume, found: self.id(), needed });
        };
        let info = info(volume, key_id);
        let cipher = Aes256Gcm::new(&(*derive_key(&self.key, &copy.salt.0, &info)).into());
        let plain = cipher
            .decrypt(&nonce(0).into(), Payload { msg: &copy.wrapped, aad: &info })
            .map(Zeroizing::new)
            .map_err(|_| SealError::Unwrap { volume })?;
        let key: &[u8; 32] = plain.as_slice().try_into().map_err(|_| SealError::Unwrap { volume })?;
        Ok(DataKey::from_random(*key))
    }
}

fn info(volume: VolumeId, key_id: KeyId) -> Vec<u8> {
    let mut info = b"blockferry wrap v1".to_vec();
    info.extend_from_slice(&volume.0);
    info.extend_from_slice(&key_id.0.to_le_bytes());
    info
}

fn check(text: &str) -> String {
    hex(&blake3::hash(text.as_bytes()).as_bytes()[..4])
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != N * 2 || !text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
        return None;
    }
    let mut bytes = [0; N];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(index * 2..index * 2 + 2)?, 16).ok()?;
    }
    Some(bytes)
}
