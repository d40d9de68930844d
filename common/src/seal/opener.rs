//! From records to page contents.

use aes_gcm::AeadInOut;
use aes_gcm::aead::inout::InOutBuf;

use super::{EpochKey, SealError, nonce};
use crate::format::record::{Codec, Record, RecordHeader};
use crate::limits;

/// Opens records. Holds one zstd context and one scratch buffer; one per worker thread.
pub struct Opener {
    zstd: zstd::bulk::Decompressor<'static>,
    scratch: Vec<u8>,
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Opener(…)")
    }
}

impl Opener {
    /// An opener.
    ///
    /// # Errors
    /// [`SealError::Zstd`] where zstd has no memory for a context.
    pub fn new() -> Result<Self, SealError> {
        let zstd = zstd::bulk::Decompressor::new().map_err(|error| SealError::Zstd(error.to_string()))?;
        Ok(Self { zstd, scratch: vec![0; limits::BLOCK_BYTES] })
    }

    /// Authenticates and opens a record: `out` holds its data pages afterwards, ascending, and nothing else. For a record
    /// without data pages it is left empty, and the record is authenticated all the same.
    ///
    /// # Errors
    /// [`SealError::WrongPlace`], [`SealError::NotAuthentic`], [`SealError::Decompression`]; `out` is empty then.
    pub fn open(&mut self, key: &EpochKey, record: &Record, out: &mut Vec<u8>) -> Result<(), SealError> {
        out.clear();
        let header = record.header();
        check_place(key, header)?;
        let sealed = &record.bytes()[limits::RECORD_HEADER_BYTES..];
        let (ciphertext, tag) = sealed.split_at(sealed.len() - limits::SEAL_TAG_BYTES);
        let mut tag_bytes = [0; limits::SEAL_TAG_BYTES];
        tag_bytes.copy_from_slice(tag);
        let plain_len = header.plain_len as usize;
        let decrypted = &mut self.scratch[..ciphertext.len()];
        let buffers = InOutBuf::new(ciphertext, decrypted).expect("both have the ciphertext's length");
        key.cipher
            .decrypt_inout_detached(&nonce(header.counter).into(), &header.aad(), buffers, &tag_bytes.into())
            .map_err(|_| SealError::NotAuthentic {
                volume: header.volume,
                epoch: header.epoch,
                block: header.block.0,
            })?;
        match header.codec {
            Codec::Raw => out.extend_from_slice(decrypted),
            Codec::Zstd => {
                // Authenticated length, at most a block: nothing larger is ever reserved or written.
                out.resize(plain_len, 0);
                let length = self.zstd.decompress_to_buffer(decrypted, &mut out[..]).unwrap_or(usize::MAX);
                if length != plain_len {
                    out.clear();
                    return Err(SealError::Decompression { block: header.block.0, expected: header.plain_len });
                }
            }
        }
        Ok(())
    }
}

fn check_place(key: &EpochKey, header: &RecordHeader) -> Result<(), SealError> {
    let context = key.context();
    let found = (header.volume, header.incarnation, header.epoch, header.key_id);
    let expected = (context.volume, context.incarnation, context.epoch, context.key_id);
    if found == expected {
        return Ok(());
    }
    let name = |(volume, incarnation, epoch, key): (_, _, _, _)| {
        format!("volume {volume} incarnation {incarnation} epoch {epoch} key {key}")
    };
    Err(SealError::WrongPlace { expected: name(expected), found: name(found) })
}
