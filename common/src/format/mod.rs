//! Bytes to values and back: every persistent and every wire format. Pure.
//!
//! Promises: little-endian, fixed widths, magic and version first; a decoder checks length, then bounds, then checksum, and
//! only then reserves memory; every flipped byte is an error; no input makes it panic. The byte tables are in
//! `docs/formats/`; the golden files beside this module keep code and pages together.

#![allow(
    clippy::cast_possible_truncation,
    reason = "lengths are within crate::limits, far below 4 GiB, on 64-bit targets alone"
)]

pub mod checkpoint;
pub mod close;
pub mod envelope;
pub mod frame;
pub mod lifecycle;
pub mod log;
pub mod page_set;
pub mod proofs;
pub mod record;
pub mod segment;
pub mod stage_key;
pub mod state;
pub mod volume_header;
pub mod volume_name;
pub mod wire;

#[cfg(test)]
pub(crate) mod tests;

use crate::error::{Dispose, Disposition};

/// Bytes that are not a valid value of the format named.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Fewer bytes than the format needs.
    #[error("{what}: truncated: needs {needed} bytes, found {found}")]
    Truncated {
        /// Format or field.
        what: &'static str,
        /// Bytes needed.
        needed: u64,
        /// Bytes found.
        found: u64,
    },
    /// More bytes than the format has.
    #[error("{what}: {extra} bytes too many")]
    TrailingBytes {
        /// Format or field.
        what: &'static str,
        /// Bytes after the end.
        extra: u64,
    },
    /// Not this kind of object at all.
    #[error("{what}: wrong magic: these bytes are something else")]
    WrongMagic {
        /// Format expected.
        what: &'static str,
    },
    /// A version that this software does not know.
    #[error("{what}: version {found} is not known to this software (it knows up to {known}); use a newer release")]
    UnknownVersion {
        /// Format.
        what: &'static str,
        /// Version found.
        found: u16,
        /// Newest version known.
        known: u16,
    },
    /// A critical flag that this software does not know.
    #[error("{what}: critical flags {found:#06x} are not known to this software; use a newer release")]
    UnknownFlags {
        /// Format.
        what: &'static str,
        /// Flags found.
        found: u16,
    },
    /// A length or number beyond its bound in [`crate::limits`].
    #[error("{what}: {found} is over the limit of {limit}")]
    OverLimit {
        /// Field.
        what: &'static str,
        /// Value found.
        found: u64,
        /// Bound.
        limit: u64,
    },
    /// The checksum does not match: the bytes were altered or damaged.
    #[error("{what}: checksum mismatch: the bytes are damaged")]
    Checksum {
        /// Format.
        what: &'static str,
    },
    /// A field with a value that the format does not allow.
    #[error("{what}: invalid value {found}")]
    Invalid {
        /// Field.
        what: &'static str,
        /// Value found.
        found: u64,
    },
    /// Text that is not UTF-8.
    #[error("{what}: not valid UTF-8")]
    NotText {
        /// Field.
        what: &'static str,
    },
}

impl Dispose for FormatError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::UnknownVersion { .. } | Self::UnknownFlags { .. } => Disposition::BadInput,
            _ => Disposition::Corrupt,
        }
    }
}
