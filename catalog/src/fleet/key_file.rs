//! `DATA_DIR/authority.key`: the key that unseals the fleet's authority.
//!
//! ```text
//! blockferry-authority-key v1
//! fleet: <UUID>
//! key: <64 digits>
//! checksum: <8 digits>      CRC-32C of all bytes above
//! ```
//!
//! While a fleet is being made the key lies in `authority.key.new`: it becomes `authority.key` only once the store holds the
//! fleet. So a key file always means that its fleet exists, and a store without it is the wrong store.

use std::path::{Path, PathBuf};

use common::ids::{Digest, FleetId};
use common::net::secret_file;
use zeroize::Zeroizing;

use super::FleetError;

const FIRST_LINE: &str = "blockferry-authority-key v1\n";
const MAGIC: &str = "blockferry-authority-key ";

/// The key of one fleet. Prints nothing, is wiped when dropped.
pub(super) struct AuthorityKey {
    pub(super) fleet: FleetId,
    pub(super) key: Zeroizing<[u8; 32]>,
}

impl AuthorityKey {
    /// Where it lies.
    pub(super) fn path(data_dir: &Path) -> PathBuf {
        data_dir.join("authority.key")
    }

    /// Where it lies while its fleet is being made.
    pub(super) fn path_new(data_dir: &Path) -> PathBuf {
        data_dir.join("authority.key.new")
    }

    fn render(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(256));
        text.push_str(FIRST_LINE);
        text.push_str(&format!("fleet: {}\nkey: ", self.fleet));
        text.push_str(&Zeroizing::new(Digest(*self.key).to_string()));
        text.push('\n');
        let checksum = crc32c::crc32c(text.as_bytes());
        text.push_str(&format!("checksum: {checksum:08x}\n"));
        text
    }

    fn parse(bytes: &[u8]) -> Result<Self, &'static str> {
        let text = std::str::from_utf8(bytes).map_err(|_| "it is not an authority key file")?;
        if !text.starts_with(MAGIC) {
            return Err("it is not an authority key file");
        }
        let rest = text.strip_prefix(FIRST_LINE).ok_or("its version is not v1, the one that this release reads")?;
        let rest = rest.strip_prefix("fleet: ").ok_or("line 2 is not \"fleet: …\"")?;
        let (fleet, rest) = rest.split_once('\n').ok_or("it ends before line 3")?;
        let fleet = fleet.parse().map_err(|_| "line 2 holds no fleet's UUID")?;
        let rest = rest.strip_prefix("key: ").ok_or("line 3 is not \"key: …\"")?;
        let (key, _) = rest.split_once('\n').ok_or("it ends before line 4")?;
        let key: Digest = key.parse().map_err(|_| "line 3 holds no key of 64 digits")?;
        let parsed = Self { fleet, key: Zeroizing::new(key.0) };
        if parsed.render().as_bytes() == bytes { Ok(parsed) } else { Err("its checksum is wrong: a byte was changed") }
    }

    /// Reads the file at `path`; `None` where there is none.
    pub(super) fn read(path: &Path) -> Result<Option<Self>, FleetError> {
        let bytes = match secret_file::read(path) {
            Err(secret_file::FileError::Missing { .. }) => return Ok(None),
            other => other?,
        };
        if secret_file::is_open_to_others(path) {
            tracing::warn!(path = %path.display(), "the fleet's key, and others may read it: chmod 600 it");
        }
        Self::parse(&bytes).map(Some).map_err(|why| FleetError::KeyMalformed { file: path.into(), why })
    }

    /// Writes the file at `path`, durable, for its owner alone.
    pub(super) fn write(&self, path: &Path) -> Result<(), FleetError> {
        Ok(secret_file::write(path, self.render().as_bytes())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_reads_back_and_no_changed_byte_passes() {
        let key = AuthorityKey { fleet: FleetId::from_random([1; 16]), key: Zeroizing::new([0xab; 32]) };
        let bytes = key.render().as_bytes().to_vec();
        let parsed = AuthorityKey::parse(&bytes).expect("parsed");
        assert!(parsed.fleet == key.fleet && parsed.key == key.key);
        for at in 0..bytes.len() {
            let mut broken = bytes.clone();
            broken[at] ^= 1;
            assert!(AuthorityKey::parse(&broken).is_err(), "byte {at}");
            assert!(AuthorityKey::parse(&bytes[..at]).is_err(), "cut at {at}");
        }
        assert!(AuthorityKey::parse(&[&bytes[..], b"\n"].concat()).is_err());
    }
}
