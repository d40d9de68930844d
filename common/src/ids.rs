//! Distinct types for the things that are counted or named, so that an epoch is never taken for a block.

use std::fmt;
use std::str::FromStr;

use crate::limits;

/// A text that was not an identifier of the expected kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}, found \"{found}\"")]
pub struct ParseIdError {
    expected: &'static str,
    found: String,
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub [u8; 16]);

        impl $name {
            /// The identifier whose bytes are all zero: "none".
            pub const NIL: Self = Self([0; 16]);

            /// A random (version 4) UUID from 16 random bytes, drawn by the caller.
            #[must_use]
            pub fn from_random(random: [u8; 16]) -> Self {
                Self(uuid::Builder::from_random_bytes(random).into_uuid().into_bytes())
            }

            /// True for [`Self::NIL`].
            #[must_use]
            pub fn is_nil(&self) -> bool {
                *self == Self::NIL
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                uuid::Uuid::from_bytes(self.0).hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                uuid::Uuid::try_parse(text)
                    .map(|id| Self(id.into_bytes()))
                    .map_err(|_| ParseIdError { expected: "a UUID", found: text.chars().take(80).collect() })
            }
        }
    };
}

uuid_id! {
    /// One protected disk (block device or image file).
    VolumeId
}
uuid_id! {
    /// One authority and all that it certified: receivers, machines, operators.
    FleetId
}
uuid_id! {
    /// One registered sender.
    MachineId
}
uuid_id! {
    /// One receiver (process server), fixed at the first start of its data directory.
    ReceiverId
}
uuid_id! {
    /// One sender's claim to write one volume; drawn anew at each start of a sender.
    SessionId
}
uuid_id! {
    /// A consistency group, or the point that the disks of a group were cut at together.
    GroupId
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl $name {
            /// The following number, or `None` at the end of the range.
            #[must_use]
            pub fn next(self) -> Option<Self> {
                self.0.checked_add(1).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// Identity and exact size of a volume's disk; growing or replacing the disk starts the next one. Starts at 1.
    Incarnation(u32)
}
number! {
    /// Number of a set of changes between two cuts. Starts at 1, never reused within a volume, gaps allowed.
    Epoch(u64)
}
number! {
    /// Fencing: the number under which one receiver may write a volume's log.
    Generation(u64)
}
number! {
    /// Position of an entry in a volume's log. The first entry is 1.
    LogSeq(u64)
}
number! {
    /// Index of a 256 KiB block on a volume.
    BlockIndex(u64)
}
number! {
    /// Number of a batch of the stage; only grows.
    BatchId(u64)
}
number! {
    /// Number of a volume's data key; grows at each key rotation. Starts at 1.
    KeyId(u32)
}

macro_rules! bytes_id {
    ($(#[$doc:meta])* $name:ident($len:expr)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// All bytes zero: "none".
            pub const ZERO: Self = Self([0; $len]);
        }

        impl Default for $name {
            fn default() -> Self {
                Self::ZERO
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let error = || ParseIdError {
                    expected: concat!(stringify!($name), " in lower-case hexadecimal"),
                    found: text.chars().take(80).collect(),
                };
                let digits = text.as_bytes();
                if digits.len() != $len * 2 {
                    return Err(error());
                }
                let mut bytes = [0_u8; $len];
                for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
                    let pair = std::str::from_utf8(pair).map_err(|_| error())?;
                    *byte = u8::from_str_radix(pair, 16).map_err(|_| error())?;
                }
                Ok(Self(bytes))
            }
        }
    };
}

bytes_id! {
    /// A BLAKE3 digest (digest algorithm 1).
    Digest(32)
}
bytes_id! {
    /// The BLAKE3 digest of an encoded close, which names it. Zero where a first close names its parent.
    CloseId(32)
}
bytes_id! {
    /// The AES-GCM tag at the end of a record's sealed bytes.
    SealTag(16)
}
bytes_id! {
    /// The random salt from which, with the data key, an epoch's key is derived.
    Salt(32)
}
bytes_id! {
    /// Makes the bodies of compare-and-swapped objects differ, so that their ETags do.
    Nonce(16)
}

/// Which of a block's 64 pages are meant: bit *i* is the page at `block * 256 KiB + i * 4 KiB`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct PageMask(pub u64);

impl PageMask {
    /// No page.
    pub const EMPTY: Self = Self(0);
    /// All 64 pages.
    pub const FULL: Self = Self(u64::MAX);

    /// The first `pages` pages of a block (at most 64).
    #[must_use]
    pub fn first(pages: u32) -> Self {
        if pages >= 64 { Self::FULL } else { Self((1 << pages) - 1) }
    }

    /// Number of pages in the mask.
    #[must_use]
    pub fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// True where no page is in the mask.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// True where page `index` (0 to 63) is in the mask.
    #[must_use]
    pub fn contains(self, index: u32) -> bool {
        self.0 >> index & 1 == 1
    }

    /// The mask with page `index` (0 to 63) added.
    #[must_use]
    pub fn with(self, index: u32) -> Self {
        Self(self.0 | 1 << index)
    }

    /// Pages in both masks.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Pages in either mask.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Pages in this mask and not in the other.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The indexes of the pages in the mask, ascending.
    pub fn iter(self) -> impl Iterator<Item = u32> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            (rest != 0).then(|| {
                let index = rest.trailing_zeros();
                rest &= rest - 1;
                index
            })
        })
    }
}

impl fmt::Debug for PageMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.0)
    }
}

/// How a disk of an exact byte size divides into blocks and pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    disk_bytes: u64,
}

impl Geometry {
    /// The geometry of a disk of `disk_bytes` bytes; `None` for an empty disk or one over [`limits::DISK_BYTES_MAX`].
    #[must_use]
    pub fn new(disk_bytes: u64) -> Option<Self> {
        (disk_bytes > 0 && disk_bytes <= limits::DISK_BYTES_MAX).then_some(Self { disk_bytes })
    }

    /// Exact size in bytes.
    #[must_use]
    pub fn disk_bytes(self) -> u64 {
        self.disk_bytes
    }

    /// Number of pages; the last may be partly beyond the end of the disk and is then zero-padded.
    #[must_use]
    pub fn pages(self) -> u64 {
        self.disk_bytes.div_ceil(limits::PAGE_BYTES as u64)
    }

    /// Number of blocks; the last may be partial.
    #[must_use]
    pub fn blocks(self) -> u64 {
        self.disk_bytes.div_ceil(limits::BLOCK_BYTES as u64)
    }

    /// The pages that exist in `block`: all 64 but in the last block; none beyond the end.
    #[must_use]
    pub fn pages_of(self, block: BlockIndex) -> PageMask {
        let first = block.0.saturating_mul(limits::PAGES_PER_BLOCK as u64);
        let rest = self.pages().saturating_sub(first).min(limits::PAGES_PER_BLOCK as u64);
        PageMask::first(u32::try_from(rest).unwrap_or(64))
    }

    /// Bytes of the disk that lie in `block` (less than a whole block only in the last one).
    #[must_use]
    pub fn bytes_of(self, block: BlockIndex) -> usize {
        let first = block.0.saturating_mul(limits::BLOCK_BYTES as u64);
        let rest = self.disk_bytes.saturating_sub(first).min(limits::BLOCK_BYTES as u64);
        usize::try_from(rest).unwrap_or(limits::BLOCK_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_last_block_has_only_the_pages_that_exist() {
        let geometry = Geometry::new(limits::BLOCK_BYTES as u64 + 4097).expect("not empty");
        assert_eq!(geometry.blocks(), 2);
        assert_eq!(geometry.pages(), 66);
        assert_eq!(geometry.pages_of(BlockIndex(0)), PageMask::FULL);
        assert_eq!(geometry.pages_of(BlockIndex(1)), PageMask(0b11));
        assert_eq!(geometry.pages_of(BlockIndex(2)), PageMask::EMPTY);
        assert_eq!(geometry.bytes_of(BlockIndex(1)), 4097);
    }

    #[test]
    fn identifiers_parse_what_they_print() {
        let volume = VolumeId::from_random([7; 16]);
        assert_eq!(volume.to_string().parse(), Ok(volume));
        let close = CloseId([0xab; 32]);
        assert_eq!(close.to_string().parse(), Ok(close));
        assert!("xyz".parse::<CloseId>().is_err());
        assert!("+f".repeat(32).parse::<CloseId>().is_err() || CloseId([0xf; 32]).to_string() != "+f".repeat(32));
    }

    #[test]
    fn mask_iteration_yields_ascending_bits() {
        assert_eq!(PageMask(1 << 63 | 0b101).iter().collect::<Vec<_>>(), vec![0, 2, 63]);
    }
}
