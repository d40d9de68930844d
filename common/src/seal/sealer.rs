//! From page contents to records.

use aes_gcm::AeadInOut;
use aes_gcm::aead::inout::InOutBuf;

use super::{EpochKey, SealError, nonce};
use crate::format::record::{AAD_BYTES, Codec, Record, RecordHeader, RecordKind};
use crate::ids::{BlockIndex, PageMask};
use crate::limits;

/// Whether a block is worth an attempt at compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Try; fall back to raw where it does not shrink.
    Try,
    /// Recent blocks did not shrink: store raw at once.
    Skip,
}

/// Seals records. Holds one zstd context and one scratch buffer of a record's size; one per worker thread.
pub struct Sealer {
    zstd: zstd::bulk::Compressor<'static>,
    scratch: Box<[u8]>,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer(…)")
    }
}

impl Sealer {
    /// A sealer that compresses at zstd level `level` (negative levels are faster).
    ///
    /// # Errors
    /// [`SealError::Zstd`] where zstd refuses the level.
    pub fn new(level: i32) -> Result<Self, SealError> {
        let mut zstd = zstd::bulk::Compressor::new(level).map_err(|error| SealError::Zstd(error.to_string()))?;
        // The record's header states the length and the seal protects the content: neither is needed twice.
        let _ = zstd.set_parameter(zstd::zstd_safe::CParameter::ContentSizeFlag(false));
        let _ = zstd.set_parameter(zstd::zstd_safe::CParameter::ChecksumFlag(false));
        Ok(Self { zstd, scratch: vec![0; limits::RECORD_BYTES_MAX].into() })
    }

    /// Seals pages of one block: `data_pages` holds exactly the pages of `data_mask`, ascending. `counter` must not have been
    /// used with this key before.
    ///
    /// # Errors
    /// [`SealError::PageBytes`] where the bytes do not match the mask.
    ///
    /// # Panics
    /// If the masks overlap or are both empty, or the counter is reused: bugs of the caller that this can't see are not
    /// detected, the former are refused by the decoder.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is a field of the record's header; a struct would only move the list"
    )]
    pub fn seal_block(
        &mut self,
        key: &EpochKey,
        block: BlockIndex,
        data_mask: PageMask,
        zero_mask: PageMask,
        counter: u64,
        data_pages: &[u8],
        compression: Compression,
    ) -> Result<Record, SealError> {
        let pages = data_mask.count();
        if data_pages.len() != pages as usize * limits::PAGE_BYTES {
            return Err(SealError::PageBytes { pages, bytes: data_pages.len() });
        }
        let (codec, length) = self.encode(data_pages, compression);
        let header = RecordHeader {
            kind: RecordKind::Delta,
            codec,
            data_mask,
            zero_mask,
            plain_len: data_pages.len() as u32,
            sealed_len: (length + limits::SEAL_TAG_BYTES) as u32,
            ..Self::header(key, RecordKind::Delta, block, 1, counter)
        };
        Ok(self.finish(key, header, length))
    }

    /// Seals the statement that `block_count` whole blocks from `first` on are zero.
    #[must_use]
    pub fn seal_zero_range(&mut self, key: &EpochKey, first: BlockIndex, block_count: u32, counter: u64) -> Record {
        let header = Self::header(key, RecordKind::ZeroRange, first, block_count, counter);
        self.finish(key, header, 0)
    }

    fn header(key: &EpochKey, kind: RecordKind, block: BlockIndex, block_count: u32, counter: u64) -> RecordHeader {
        let context = key.context();
        RecordHeader {
            kind,
            codec: Codec::Raw,
            volume: context.volume,
            incarnation: context.incarnation,
            key_id: context.key_id,
            epoch: context.epoch,
            block,
            data_mask: PageMask::EMPTY,
            zero_mask: PageMask::FULL,
            block_count,
            plain_len: 0,
            sealed_len: limits::SEAL_TAG_BYTES as u32,
            dictionary_id: 0,
            counter,
        }
    }

    /// Puts the encoded pages at the scratch's payload offset and says how, and how long they are.
    fn encode(&mut self, pages: &[u8], compression: Compression) -> (Codec, usize) {
        let payload = &mut self.scratch[limits::RECORD_HEADER_BYTES..];
        if compression == Compression::Try && !pages.is_empty() {
            // Room for less than the plain bytes: where zstd does not shrink them it fails, and they go raw.
            let room = &mut payload[..pages.len() - 1];
            if let Ok(length) = self.zstd.compress_to_buffer(pages, room) {
                return (Codec::Zstd, length);
            }
        }
        payload[..pages.len()].copy_from_slice(pages);
        (Codec::Raw, pages.len())
    }

    /// Encrypts `length` bytes of payload in place and copies the record out, so that it takes no more memory than it needs.
    fn finish(&mut self, key: &EpochKey, header: RecordHeader, length: usize) -> Record {
        let aad: [u8; AAD_BYTES] = header.aad();
        let end = limits::RECORD_HEADER_BYTES + length;
        let payload = &mut self.scratch[limits::RECORD_HEADER_BYTES..end];
        let tag = key
            .cipher
            .encrypt_inout_detached(&nonce(header.counter).into(), &aad, InOutBuf::from(payload))
            .expect("a block is far below AES-GCM's 64 GiB");
        self.scratch[end..end + limits::SEAL_TAG_BYTES].copy_from_slice(&tag);
        Record::assemble(header, self.scratch[..end + limits::SEAL_TAG_BYTES].to_vec())
    }
}
