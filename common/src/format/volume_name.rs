//! The name claim: one object per machine and volume name, created only if absent, so that a name is given once.
//!
//! Kept in an envelope with magic `BFVOLNAM`. Body: nonce 16, volume 16, machine 16, machine name text, name text.

use super::FormatError;
use super::envelope::Kind;
use super::wire::{Reader, Writer};
use crate::ids::{MachineId, Nonce, VolumeId};
use crate::limits;

/// Envelope of a name claim.
pub const KIND: Kind = Kind { what: "volume name", magic: *b"BFVOLNAM", version: 1, body_bytes_max: 1024 };

/// Which volume a machine calls by a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeName {
    /// Unique in each version of the object.
    pub nonce: Nonce,
    /// The volume so named.
    pub volume: VolumeId,
    /// The machine within which the name is unique.
    pub machine: MachineId,
    /// That machine's name.
    pub machine_name: String,
    /// The volume's name.
    pub name: String,
}

impl VolumeName {
    /// The encoded claim.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Writer::with_capacity(256);
        body.raw(&self.nonce.0)
            .raw(&self.volume.0)
            .raw(&self.machine.0)
            .block(self.machine_name.as_bytes())
            .block(self.name.as_bytes());
        KIND.seal(body.as_slice())
    }

    /// Parses an encoded claim that fills `bytes`.
    ///
    /// # Errors
    /// Any [`FormatError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new("volume name", KIND.open(bytes)?);
        let claim = Self {
            nonce: Nonce(reader.array()?),
            volume: VolumeId(reader.array()?),
            machine: MachineId(reader.array()?),
            machine_name: reader.text("machine name", limits::NAME_BYTES_MAX)?,
            name: reader.text("volume name", limits::NAME_BYTES_MAX)?,
        };
        reader.finish()?;
        Ok(claim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim() -> VolumeName {
        VolumeName {
            nonce: Nonce([1; 16]),
            volume: VolumeId([2; 16]),
            machine: MachineId([3; 16]),
            machine_name: "db-1".into(),
            name: "data".into(),
        }
    }

    /// Fails where the encoding changes: old claims could not be read any more.
    const GOLDEN: &[u8] = include_bytes!("golden/volume-name-v1.bin");

    #[test]
    fn a_claim_reads_back_and_is_as_it_was_first_written() {
        assert_eq!(claim().encode(), GOLDEN);
        assert_eq!(VolumeName::decode(GOLDEN), Ok(claim()));
    }

    #[test]
    fn any_flipped_byte_and_any_cut_is_an_error() {
        let bytes = claim().encode();
        for at in 0..bytes.len() {
            let mut broken = bytes.clone();
            broken[at] ^= 0x20;
            assert!(VolumeName::decode(&broken).is_err(), "byte {at}");
            assert!(VolumeName::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
    }
}
