//! Page contents to measure with: the same bytes in every run.

use common::limits::{BLOCK_BYTES, PAGE_BYTES};

/// What a block is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Like text: shrinks to some fifth.
    Compressible,
    /// Does not shrink.
    Random,
    /// Page by page one or the other.
    Mixed,
}

impl Content {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Compressible, Self::Random, Self::Mixed];

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Compressible => "compressible",
            Self::Random => "random",
            Self::Mixed => "mixed",
        }
    }
}

/// A block of such pages.
#[must_use]
pub fn block(content: Content) -> Vec<u8> {
    const WORDS: [&str; 16] = [
        "block", "epoch", "the", "of", "a", "close", "record", "page", "stage", "store", "and", "in", "receiver",
        "sender", "volume", "\n",
    ];
    let mut random = Random(1);
    let mut bytes = Vec::with_capacity(BLOCK_BYTES);
    while bytes.len() < BLOCK_BYTES {
        let start = bytes.len();
        let text = match content {
            Content::Compressible => true,
            Content::Random => false,
            Content::Mixed => (start / PAGE_BYTES).is_multiple_of(2),
        };
        while bytes.len() < start + PAGE_BYTES {
            let word = random.next();
            if text {
                bytes.extend_from_slice(WORDS[usize::from(word.to_le_bytes()[0] & 15)].as_bytes());
                bytes.push(b' ');
            } else {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
        }
        bytes.truncate(start + PAGE_BYTES);
    }
    bytes
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}
