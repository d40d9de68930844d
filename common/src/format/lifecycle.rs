//! What is to become of a volume: it is written, or only kept, or on its way out. Compare-and-swapped; a volume without this object
//! is active.
//!
//! Kept in an envelope with magic `BFLIFECY`. Body: nonce 16, state 1 (1 active, 2 retired, 3 deleted), reserved 3, time 8, by text.

use super::FormatError;
use super::envelope::Kind;
use super::wire::{Reader, Writer};
use crate::clock::UnixMillis;
use crate::ids::Nonce;
use crate::limits;

/// Envelope of a lifecycle.
pub const KIND: Kind = Kind { what: "volume lifecycle", magic: *b"BFLIFECY", version: 1, body_bytes_max: 1024 };

/// What may be done with a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It is written and read.
    Active,
    /// It is read, and receivers refuse to write it.
    Retired,
    /// As retired, not shown, and its objects go once the grace period is over.
    Deleted,
}

impl Phase {
    /// A word for people and JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Retired => "retired",
            Self::Deleted => "deleted",
        }
    }
}

/// A volume's lifecycle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lifecycle {
    /// Unique in each version of the object.
    pub nonce: Nonce,
    /// What may be done with it.
    pub phase: Phase,
    /// When that was said, by the clock of who said it: a label.
    pub at: UnixMillis,
    /// Who said it: a machine's name. May be empty.
    pub by: String,
}

impl Lifecycle {
    /// The encoded lifecycle.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let phase = match self.phase {
            Phase::Active => 1,
            Phase::Retired => 2,
            Phase::Deleted => 3,
        };
        let mut body = Writer::with_capacity(128);
        body.raw(&self.nonce.0).u8(phase).raw(&[0; 3]).i64(self.at.0).block(self.by.as_bytes());
        KIND.seal(body.as_slice())
    }

    /// Parses an encoded lifecycle that fills `bytes`.
    ///
    /// # Errors
    /// Any [`FormatError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(KIND.what, KIND.open(bytes)?);
        let nonce = Nonce(reader.array()?);
        let phase = match reader.u8()? {
            1 => Phase::Active,
            2 => Phase::Retired,
            3 => Phase::Deleted,
            found => {
                return Err(FormatError::Invalid { what: "phase of a volume's lifecycle", found: found.into() });
            }
        };
        for reserved in reader.array::<3>()? {
            if reserved != 0 {
                let (what, found) = ("reserved bytes of a volume's lifecycle", reserved.into());
                return Err(FormatError::Invalid { what, found });
            }
        }
        let lifecycle =
            Self { nonce, phase, at: UnixMillis(reader.i64()?), by: reader.text("who", limits::NAME_BYTES_MAX)? };
        reader.finish()?;
        Ok(lifecycle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lifecycle() -> Lifecycle {
        Lifecycle {
            nonce: Nonce([1; 16]),
            phase: Phase::Deleted,
            at: UnixMillis(1_700_000_000_123),
            by: "desk-7".into(),
        }
    }

    /// Fails where the encoding changes: old objects could not be read any more.
    const GOLDEN: &[u8] = include_bytes!("golden/lifecycle-v1.bin");

    #[test]
    fn a_lifecycle_reads_back_and_is_as_it_was_first_written() {
        assert_eq!(lifecycle().encode(), GOLDEN);
        assert_eq!(Lifecycle::decode(GOLDEN), Ok(lifecycle()));
        for phase in [Phase::Active, Phase::Retired] {
            let other = Lifecycle { phase, by: String::new(), ..lifecycle() };
            assert_eq!(Lifecycle::decode(&other.encode()), Ok(other));
        }
    }

    #[test]
    fn any_flipped_byte_any_cut_and_any_other_phase_is_an_error() {
        let bytes = lifecycle().encode();
        for at in 0..bytes.len() {
            let mut broken = bytes.clone();
            broken[at] ^= 0x20;
            assert!(Lifecycle::decode(&broken).is_err(), "byte {at}");
            assert!(Lifecycle::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
        let mut body = KIND.open(&bytes).expect("whole").to_vec();
        body[16] = 4;
        assert!(Lifecycle::decode(&KIND.seal(&body)).is_err());
    }
}
