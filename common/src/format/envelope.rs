//! The frame around every small object and state file: magic, version, flags, length, body, checksum.
//!
//! ```text
//! 0   8  magic
//! 8   2  version
//! 10  2  critical flags (unknown ones are refused)
//! 12  2  ignorable flags
//! 14  2  reserved, zero
//! 16  4  body length
//! 20  n  body
//! +n  4  CRC-32C of everything before
//! ```

use super::FormatError;
use super::wire::Reader;

/// Bytes before the body.
pub const HEAD_BYTES: usize = 20;
/// Bytes around the body.
pub const OVERHEAD_BYTES: usize = HEAD_BYTES + 4;

/// A format that is kept in an envelope.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Name in errors.
    pub what: &'static str,
    /// First eight bytes.
    pub magic: [u8; 8],
    /// Version that is written, and the newest that is read.
    pub version: u16,
    /// Largest body accepted.
    pub body_bytes_max: usize,
}

impl Kind {
    /// The body in its envelope.
    ///
    /// # Panics
    /// If the body is over the kind's own bound: a bug of the writer, which has to stay within `limits`.
    #[must_use]
    pub fn seal(&self, body: &[u8]) -> Vec<u8> {
        assert!(body.len() <= self.body_bytes_max, "{}: body of {} bytes is over the limit", self.what, body.len());
        let mut bytes = Vec::with_capacity(OVERHEAD_BYTES + body.len());
        bytes.extend_from_slice(&self.magic);
        bytes.extend_from_slice(&self.version.to_le_bytes());
        bytes.extend_from_slice(&[0; 6]);
        bytes.extend_from_slice(&u32::try_from(body.len()).expect("bounded above").to_le_bytes());
        bytes.extend_from_slice(body);
        let crc = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The version that an envelope at the front of `bytes` says it is of; `None` where they are too short.
    #[must_use]
    pub fn version_of(bytes: &[u8]) -> Option<u16> {
        bytes.get(8..10).map(|version| u16::from_le_bytes([version[0], version[1]]))
    }

    /// The body of an envelope that fills `bytes` exactly.
    ///
    /// # Errors
    /// Any [`FormatError`]: the version is judged before the checksum, since another version may check otherwise.
    pub fn open<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], FormatError> {
        let (body, rest) = self.open_prefix(bytes)?;
        if !rest.is_empty() {
            return Err(FormatError::TrailingBytes { what: self.what, extra: rest.len() as u64 });
        }
        Ok(body)
    }

    /// The body of an envelope at the front of `bytes`, and what follows it.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_prefix<'a>(&self, bytes: &'a [u8]) -> Result<(&'a [u8], &'a [u8]), FormatError> {
        let what = self.what;
        let mut reader = Reader::new(what, bytes);
        if reader.array::<8>()? != self.magic {
            return Err(FormatError::WrongMagic { what });
        }
        let version = reader.u16()?;
        if version == 0 || version > self.version {
            return Err(FormatError::UnknownVersion { what, found: version, known: self.version });
        }
        let critical = reader.u16()?;
        if critical != 0 {
            return Err(FormatError::UnknownFlags { what, found: critical });
        }
        let _ignorable = reader.u16()?;
        let _reserved = reader.u16()?;
        let body = reader.block(what, self.body_bytes_max)?;
        let covered = HEAD_BYTES + body.len();
        if reader.u32()? != crc32c::crc32c(&bytes[..covered]) {
            return Err(FormatError::Checksum { what });
        }
        Ok((body, &bytes[covered + 4..]))
    }
}
