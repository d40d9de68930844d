//! The volume header: identity, sizes, wrapped keys and the signing key pinned at registration. Compare-and-swapped.
//!
//! Kept in an envelope with magic `BFVOLUME`. Body: nonce 16, fleet 16, volume 16, machine 16, machine name text, name text,
//! created 8, page bytes 4, block bytes 4, sector bytes 4, current key id 4, signing public key 32, incarnation count 4, per
//! incarnation: number 4, disk bytes 8; wrapped key count 4, per wrapped key: key id 4, kind 1, reserved 3, wrapping id 16,
//! salt 32, parameters block, wrapped bytes block.

use super::FormatError;
use super::envelope::Kind;
use super::wire::{Reader, Writer};
use crate::clock::UnixMillis;
use crate::ids::{FleetId, Incarnation, KeyId, MachineId, Nonce, Salt, VolumeId};
use crate::limits;

/// Envelope of a volume header.
pub const KIND: Kind = Kind { what: "volume header", magic: *b"BFVOLUME", version: 1, body_bytes_max: 1 << 20 };
const INCARNATIONS_MAX: usize = 4096;
const WRAPPED_BYTES_MAX: usize = 4096;

/// How a data key is wrapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrapping {
    /// By the machine's key file.
    KeyFile,
    /// By a passphrase (Argon2id). Reserved: no release writes it yet.
    Passphrase,
    /// By an escrow public key. Reserved: no release writes it yet.
    Escrow,
}

/// One wrapped copy of a data key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrappedKey {
    /// The data key inside.
    pub key_id: KeyId,
    /// How it is wrapped.
    pub wrapping: Wrapping,
    /// Names the wrapping key: the key file's id.
    pub wrapping_id: [u8; 16],
    /// Salt of the wrapping.
    pub salt: Salt,
    /// Parameters of the wrapping; empty for a key file.
    pub parameters: Vec<u8>,
    /// Ciphertext and tag.
    pub wrapped: Vec<u8>,
}

/// One identity of the volume's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IncarnationSize {
    /// Its number.
    pub incarnation: Incarnation,
    /// Exact size in bytes.
    pub disk_bytes: u64,
}

/// A volume's header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeHeader {
    /// Unique in each version of the object.
    pub nonce: Nonce,
    /// Fleet.
    pub fleet: FleetId,
    /// Volume.
    pub volume: VolumeId,
    /// The machine that may write it.
    pub machine: MachineId,
    /// That machine's name when the volume was made.
    pub machine_name: String,
    /// The volume's name, unique within the machine.
    pub name: String,
    /// When it was made.
    pub created: UnixMillis,
    /// The disk's logical sector size in bytes.
    pub sector_bytes: u32,
    /// The data key in use.
    pub key_id: KeyId,
    /// Ed25519 public key that verifies the volume's closes.
    pub signing_key: [u8; 32],
    /// Sizes, oldest first; the last is the current one. Never empty.
    pub incarnations: Vec<IncarnationSize>,
    /// Wrapped copies of the data keys.
    pub wrapped_keys: Vec<WrappedKey>,
}

impl VolumeHeader {
    /// The current incarnation.
    ///
    /// # Panics
    /// Never for a decoded header, which has at least one.
    #[must_use]
    pub fn current(&self) -> IncarnationSize {
        *self.incarnations.last().expect("a header has at least one incarnation")
    }

    /// The encoded header.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Writer::with_capacity(1024);
        body.raw(&self.nonce.0)
            .raw(&self.fleet.0)
            .raw(&self.volume.0)
            .raw(&self.machine.0)
            .block(self.machine_name.as_bytes())
            .block(self.name.as_bytes())
            .i64(self.created.0)
            .u32(limits::PAGE_BYTES as u32)
            .u32(limits::BLOCK_BYTES as u32)
            .u32(self.sector_bytes)
            .u32(self.key_id.0)
            .raw(&self.signing_key)
            .count(self.incarnations.len());
        for size in &self.incarnations {
            body.u32(size.incarnation.0).u64(size.disk_bytes);
        }
        body.count(self.wrapped_keys.len());
        for key in &self.wrapped_keys {
            body.u32(key.key_id.0)
                .u8(match key.wrapping {
                    Wrapping::KeyFile => 1,
                    Wrapping::Passphrase => 2,
                    Wrapping::Escrow => 3,
                })
                .raw(&[0; 3])
                .raw(&key.wrapping_id)
                .raw(&key.salt.0)
                .block(&key.parameters)
                .block(&key.wrapped);
        }
        KIND.seal(body.as_slice())
    }

    /// Parses an encoded header that fills `bytes`.
    ///
    /// # Errors
    /// Any [`FormatError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new("volume header", KIND.open(bytes)?);
        let mut header = Self {
            nonce: Nonce(reader.array()?),
            fleet: FleetId(reader.array()?),
            volume: VolumeId(reader.array()?),
            machine: MachineId(reader.array()?),
            machine_name: reader.text("machine name", limits::NAME_BYTES_MAX)?,
            name: reader.text("volume name", limits::NAME_BYTES_MAX)?,
            created: UnixMillis(reader.i64()?),
            sector_bytes: {
                expect("page size", reader.u32()?, limits::PAGE_BYTES as u32)?;
                expect("block size", reader.u32()?, limits::BLOCK_BYTES as u32)?;
                reader.u32()?
            },
            key_id: KeyId(reader.u32()?),
            signing_key: reader.array()?,
            incarnations: Vec::new(),
            wrapped_keys: Vec::new(),
        };
        let incarnations = reader.count("incarnations", INCARNATIONS_MAX, 12)?;
        for _ in 0..incarnations {
            let size = IncarnationSize { incarnation: Incarnation(reader.u32()?), disk_bytes: reader.u64()? };
            if size.disk_bytes == 0 || size.disk_bytes > limits::DISK_BYTES_MAX {
                return Err(FormatError::OverLimit {
                    what: "disk size",
                    found: size.disk_bytes,
                    limit: limits::DISK_BYTES_MAX,
                });
            }
            header.incarnations.push(size);
        }
        if header.incarnations.is_empty() {
            return Err(FormatError::Invalid { what: "incarnation count", found: 0 });
        }
        let keys = reader.count("wrapped keys", limits::WRAPPED_KEYS_MAX, 4 + 4 + 16 + 32 + 8)?;
        for _ in 0..keys {
            let key_id = KeyId(reader.u32()?);
            let wrapping = match reader.u8()? {
                1 => Wrapping::KeyFile,
                2 => Wrapping::Passphrase,
                3 => Wrapping::Escrow,
                other => return Err(FormatError::Invalid { what: "key wrapping", found: other.into() }),
            };
            reader.take(3)?;
            header.wrapped_keys.push(WrappedKey {
                key_id,
                wrapping,
                wrapping_id: reader.array()?,
                salt: Salt(reader.array()?),
                parameters: reader.block("wrapping parameters", WRAPPED_BYTES_MAX)?.to_vec(),
                wrapped: reader.block("wrapped key", WRAPPED_BYTES_MAX)?.to_vec(),
            });
        }
        reader.finish()?;
        Ok(header)
    }
}

fn expect(what: &'static str, found: u32, expected: u32) -> Result<(), FormatError> {
    if found == expected { Ok(()) } else { Err(FormatError::Invalid { what, found: found.into() }) }
}
