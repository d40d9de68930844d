//! What was proven of a volume's recovery points, and when: one small object for each volume, compare-and-swapped.
//!
//! Kept in an envelope with magic `BFPROOFS`. Body: nonce 16, volume 16, count 4; each point: close 32, proof 1, zero 7, when 8;
//! ascending by close. A point that is not in it is committed, and nothing more is known of it.

use std::collections::BTreeMap;

use super::FormatError;
use super::envelope::Kind;
use super::wire::{Reader, Writer};
use crate::clock::UnixMillis;
use crate::ids::{CloseId, Nonce, VolumeId};

/// Most points whose proofs are kept.
pub const PROVEN_POINTS_MAX: usize = 262_144;
/// Bytes of one point.
const POINT_BYTES: usize = 48;

/// Envelope of a volume's proofs.
pub const KIND: Kind =
    Kind { what: "proofs", magic: *b"BFPROOFS", version: 1, body_bytes_max: 64 + PROVEN_POINTS_MAX * POINT_BYTES };

/// How much is proven of a point; each includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Proof {
    /// It is in the log, signed, in its place in the chain of closes.
    Committed,
    /// All of its bytes are in the store and unaltered.
    Verified,
    /// All of its records open with the key.
    Opened,
    /// It was restored, and its file systems were found sound.
    Checked,
    /// A machine booted from it.
    Booted,
}

impl Proof {
    /// Its word, as `points` prints it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Committed => "committed",
            Self::Verified => "verified",
            Self::Opened => "opened",
            Self::Checked => "checked",
            Self::Booted => "booted",
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Committed => 0,
            Self::Verified => 1,
            Self::Opened => 2,
            Self::Checked => 3,
            Self::Booted => 4,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        [Self::Verified, Self::Opened, Self::Checked, Self::Booted].into_iter().find(|proof| proof.number() == number)
    }
}

/// What was proven of a volume's points.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proofs {
    /// Unique in each version of the object.
    pub nonce: Nonce,
    /// The volume.
    pub volume: VolumeId,
    /// The strongest proof of each point, and when it was last given, by the clock of the machine that gave it.
    pub points: BTreeMap<CloseId, (Proof, UnixMillis)>,
}

impl Proofs {
    /// Nothing but that all points are committed.
    #[must_use]
    pub fn none(volume: VolumeId) -> Self {
        Self { nonce: Nonce::ZERO, volume, points: BTreeMap::new() }
    }

    /// Records a proof: the stronger of two stays, of equal ones the later.
    pub fn raise(&mut self, point: CloseId, proof: Proof, at: UnixMillis) {
        let known = self.points.entry(point).or_insert((proof, at));
        if proof >= known.0 {
            *known = (proof, at);
        }
    }

    /// The strongest proof of a point, and when it was given; `None` where it is only committed.
    #[must_use]
    pub fn of(&self, point: CloseId) -> Option<(Proof, UnixMillis)> {
        self.points.get(&point).copied()
    }

    /// The encoded object.
    ///
    /// # Panics
    /// With more than [`PROVEN_POINTS_MAX`] points, or one that is merely committed: bugs of the caller.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Writer::with_capacity(64 + self.points.len() * POINT_BYTES);
        body.raw(&self.nonce.0).raw(&self.volume.0).count(self.points.len());
        for (point, (proof, at)) in &self.points {
            assert!(*proof > Proof::Committed, "points that are merely committed are left out");
            body.raw(&point.0).u8(proof.number()).raw(&[0; 7]).i64(at.0);
        }
        KIND.seal(body.as_slice())
    }

    /// Parses an encoded object that fills `bytes`.
    ///
    /// # Errors
    /// Any [`FormatError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(KIND.what, KIND.open(bytes)?);
        let (nonce, volume) = (Nonce(reader.array()?), VolumeId(reader.array()?));
        let count = reader.u32()? as usize;
        if count > PROVEN_POINTS_MAX {
            return Err(FormatError::OverLimit {
                what: "proven points",
                found: count as u64,
                limit: PROVEN_POINTS_MAX as u64,
            });
        }
        let mut points = BTreeMap::new();
        for _ in 0..count {
            let (point, number) = (CloseId(reader.array()?), reader.u8()?);
            let proof =
                Proof::from_number(number).ok_or(FormatError::Invalid { what: "proof", found: number.into() })?;
            if reader.array::<7>()? != [0; 7] {
                return Err(FormatError::Invalid { what: "reserved bytes of a proof", found: 1 });
            }
            let at = UnixMillis(reader.i64()?);
            if points.last_key_value().is_some_and(|(last, _)| *last >= point) {
                return Err(FormatError::Invalid { what: "order of proven points", found: count as u64 });
            }
            points.insert(point, (proof, at));
        }
        reader.finish()?;
        Ok(Self { nonce, volume, points })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proofs() -> Proofs {
        let mut proofs = Proofs { nonce: Nonce([1; 16]), ..Proofs::none(VolumeId([2; 16])) };
        proofs.raise(CloseId([9; 32]), Proof::Booted, UnixMillis(1_700_000_000_123));
        proofs.raise(CloseId([8; 32]), Proof::Verified, UnixMillis(1_700_000_000_000));
        proofs
    }

    /// Fails where the encoding changes: old objects could not be read any more.
    const GOLDEN: &[u8] = include_bytes!("golden/proofs-v1.bin");

    #[test]
    fn proofs_read_back_and_are_as_they_were_first_written() {
        assert_eq!(proofs().encode(), GOLDEN);
        assert_eq!(Proofs::decode(GOLDEN), Ok(proofs()));
    }

    #[test]
    fn any_flipped_byte_and_any_cut_is_an_error() {
        let bytes = proofs().encode();
        for at in 0..bytes.len() {
            let mut broken = bytes.clone();
            broken[at] ^= 0x20;
            assert!(Proofs::decode(&broken).is_err(), "byte {at}");
            assert!(Proofs::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn the_strongest_proof_stays_and_of_equal_ones_the_later() {
        let (point, mut proofs) = (CloseId([1; 32]), Proofs::none(VolumeId([2; 16])));
        assert_eq!(proofs.of(point), None);
        for (proof, at, expected) in [
            (Proof::Opened, 5, (Proof::Opened, 5)),
            (Proof::Verified, 7, (Proof::Opened, 5)),
            (Proof::Opened, 8, (Proof::Opened, 8)),
            (Proof::Checked, 6, (Proof::Checked, 6)),
        ] {
            proofs.raise(point, proof, UnixMillis(at));
            assert_eq!(proofs.of(point), Some((expected.0, UnixMillis(expected.1))));
        }
    }
}
