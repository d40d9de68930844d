//! The passphrase file: what an operator carries from the fleet to a machine, so that each can prove itself to the other.
//!
//! ```text
//! blockferry-passphrase v1
//! fleet: 6f0f…                          the fleet's UUID
//! fingerprint: sha256:<64 digits>       of the authority's certificate: the machine takes no other receiver
//! id: 91c2…                             which passphrase, a UUID
//! secret: <64 digits>                   what the machine shows the receiver, once it has proved itself
//! checksum: <8 digits>                  CRC-32C of all bytes above
//! ```
//!
//! Every byte counts: six lines, each ended by one newline, digits in lower case, nothing before, between or after.

use std::path::Path;

use zeroize::Zeroizing;

use super::secret_file::{self, FileError};
use super::tls::Fingerprint;
use crate::error::{Dispose, Disposition};
use crate::ids::{Digest, FleetId, MachineId, ParseIdError};

const FIRST_LINE: &str = "blockferry-passphrase v1";
const MAGIC: &str = "blockferry-passphrase ";
const KEYS: [&str; 5] = ["fleet: ", "fingerprint: ", "id: ", "secret: ", "checksum: "];

/// Which passphrase: a UUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PassphraseId(pub [u8; 16]);

impl PassphraseId {
    /// An id from 16 random bytes.
    #[must_use]
    pub fn from_random(random: [u8; 16]) -> Self {
        Self(MachineId::from_random(random).0)
    }
}

impl std::fmt::Display for PassphraseId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        MachineId(self.0).fmt(f)
    }
}

impl std::str::FromStr for PassphraseId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse::<MachineId>().map(|id| Self(id.0))
    }
}

/// A parsed passphrase file. Prints nothing; its secret is wiped when dropped.
pub struct PassphraseFile {
    /// The fleet that a machine joins with it.
    pub fleet: FleetId,
    /// Of the fleet's authority.
    pub fingerprint: Fingerprint,
    /// Which passphrase.
    pub id: PassphraseId,
    /// What redeems it.
    pub secret: Zeroizing<[u8; 32]>,
}

/// What is wrong with a passphrase file, to the line. Never holds any of its contents.
#[derive(Debug, thiserror::Error)]
pub enum PassphraseError {
    /// The file can't be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// Something else.
    #[error("it is not a passphrase file: expected \"{FIRST_LINE}\" as its first line")]
    NotOne,
    /// Of another release.
    #[error("its version is \"{found}\", this release reads v1: upgrade this machine's Blockferry")]
    Version {
        /// What stands after the magic.
        found: String,
    },
    /// Not what this line holds.
    #[error("line {line}: expected \"{expected}…\"; copy the file again, every byte of it counts")]
    Line {
        /// From 1.
        line: usize,
        /// How the line starts.
        expected: &'static str,
    },
    /// The right key with a value that is none.
    #[error("line {line}: expected {expected} after \"{key}\"; copy the file again, every byte of it counts")]
    Value {
        /// From 1.
        line: usize,
        /// How the line starts.
        key: &'static str,
        /// What the value is.
        expected: &'static str,
    },
    /// The file ends too early.
    #[error("it ends before line {line} (\"{expected}…\"); copy the file again, every byte of it counts")]
    Ended {
        /// The line that is missing.
        line: usize,
        /// How it starts.
        expected: &'static str,
    },
    /// The last line has no end.
    #[error("the newline at its end is missing; copy the file again, every byte of it counts")]
    NoNewline,
    /// Something follows.
    #[error("line {line} is one too many: the file ends after its checksum; copy it again, every byte of it counts")]
    LineTooMany {
        /// The first line that should not be there.
        line: usize,
    },
    /// A text file of another system.
    #[error("line {line} ends with a carriage return: copy the file as binary, every byte of it counts")]
    CarriageReturn {
        /// From 1.
        line: usize,
    },
    /// A byte was changed.
    #[error("its checksum is wrong: a byte of it was changed; copy the file again, every byte of it counts")]
    Checksum,
}

impl Dispose for PassphraseError {
    fn disposition(&self) -> Disposition {
        Disposition::BadInput
    }
}

impl PassphraseFile {
    /// The file's text.
    #[must_use]
    pub fn render(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(512));
        text.push_str(FIRST_LINE);
        let secret = Zeroizing::new(Digest(*self.secret).to_string());
        let values = [self.fleet.to_string(), self.fingerprint.to_string(), self.id.to_string()];
        for (key, value) in KEYS.iter().zip(values.iter().chain(std::iter::once(&*secret))) {
            text.push('\n');
            text.push_str(key);
            text.push_str(value);
        }
        text.push('\n');
        let checksum = format!("{}{:08x}\n", KEYS[4], crc32c::crc32c(text.as_bytes()));
        text.push_str(&checksum);
        text
    }

    /// Reads and parses a file.
    ///
    /// # Errors
    /// [`PassphraseError`].
    pub fn read(path: &Path) -> Result<Self, PassphraseError> {
        Self::parse(&secret_file::read(path)?)
    }

    /// Parses a file's bytes.
    ///
    /// # Errors
    /// [`PassphraseError`], which names the defect and its line.
    pub fn parse(bytes: &[u8]) -> Result<Self, PassphraseError> {
        let text = std::str::from_utf8(bytes).map_err(|_| PassphraseError::NotOne)?;
        let mut lines = text.split('\n').enumerate().map(|(index, line)| (index + 1, line));
        let first = lines.next().map_or("", |(_, line)| line);
        match first.strip_suffix('\r').unwrap_or(first) {
            FIRST_LINE if first.ends_with('\r') => return Err(PassphraseError::CarriageReturn { line: 1 }),
            FIRST_LINE => {}
            other => {
                return Err(match other.strip_prefix(MAGIC) {
                    Some(found) => PassphraseError::Version { found: found.chars().take(20).collect() },
                    None => PassphraseError::NotOne,
                });
            }
        }
        let mut next = |expected: &'static str| match lines.next() {
            None => Err(PassphraseError::NoNewline),
            Some((line, "")) if lines.clone().next().is_none() => Err(PassphraseError::Ended { line, expected }),
            Some((line, text)) if text.ends_with('\r') => Err(PassphraseError::CarriageReturn { line }),
            Some((line, text)) => {
                text.strip_prefix(expected).map(|value| (line, value)).ok_or(PassphraseError::Line { line, expected })
            }
        };
        let bad = |line, index: usize, expected| PassphraseError::Value { line, key: KEYS[index], expected };
        let (line, value) = next(KEYS[0])?;
        let fleet: FleetId = value.parse().map_err(|_| bad(line, 0, "a UUID"))?;
        let (line, value) = next(KEYS[1])?;
        let fingerprint: Fingerprint = value.parse().map_err(|_| bad(line, 1, "sha256: and 64 hexadecimal digits"))?;
        let (line, value) = next(KEYS[2])?;
        let id: PassphraseId = value.parse().map_err(|_| bad(line, 2, "a UUID"))?;
        let (line, value) = next(KEYS[3])?;
        let secret: Digest = value.parse().map_err(|_| bad(line, 3, "64 hexadecimal digits"))?;
        let (line, value) = next(KEYS[4])?;
        if value.len() != 8 || !value.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(bad(line, 4, "8 hexadecimal digits"));
        }
        match (lines.next(), lines.next()) {
            (None, _) => return Err(PassphraseError::NoNewline),
            (Some((_, "")), None) => {}
            (Some((line, _)), _) => return Err(PassphraseError::LineTooMany { line }),
        }
        let file = Self { fleet, fingerprint, id, secret: Zeroizing::new(secret.0) };
        // One spelling only, and the checksum with it.
        if file.render().as_bytes() == bytes { Ok(file) } else { Err(PassphraseError::Checksum) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> String {
        let file = PassphraseFile {
            fleet: FleetId::from_random([1; 16]),
            fingerprint: Fingerprint([0xa2; 32]),
            id: PassphraseId::from_random([3; 16]),
            secret: Zeroizing::new([0xd4; 32]),
        };
        file.render().to_string()
    }

    fn defect(text: &str) -> String {
        PassphraseFile::parse(text.as_bytes()).err().expect("a defect").to_string()
    }

    #[test]
    fn a_rendered_file_parses_to_the_same() {
        let parsed = PassphraseFile::parse(text().as_bytes()).expect("parsed");
        assert_eq!(parsed.render().as_str(), text());
        assert_eq!(text().lines().count(), 6);
    }

    #[test]
    fn any_changed_added_or_missing_byte_is_refused() {
        let good = text().into_bytes();
        for at in 0..good.len() {
            for flip in [1_u8, 0x20, 0x80] {
                let mut bad = good.clone();
                bad[at] ^= flip;
                assert!(PassphraseFile::parse(&bad).is_err(), "byte {at} ^ {flip:#x}");
            }
            let mut short = good.clone();
            short.remove(at);
            assert!(PassphraseFile::parse(&short).is_err(), "without byte {at}");
            let mut long = good.clone();
            long.insert(at, b' ');
            assert!(PassphraseFile::parse(&long).is_err(), "a space before byte {at}");
            assert!(PassphraseFile::parse(&good[..at]).is_err(), "{at} bytes");
        }
    }

    #[test]
    fn each_defect_is_named_with_its_line() {
        let good = text();
        assert!(defect(&format!("{good}\n")).contains("line 7 is one too many"));
        assert!(defect(&format!("{good}note: x\n")).contains("line 7 is one too many"));
        assert!(defect(good.trim_end()).contains("newline at its end"));
        assert!(defect(&good.replace('\n', "\r\n")).contains("line 1 ends with a carriage return"));
        assert!(defect(&good.replace("v1", "v2")).contains("version is \"v2\""));
        assert!(defect("hello\n").contains("not a passphrase file"));
        assert!(defect("").contains("not a passphrase file"));
        assert!(defect(&good.replace("\nid: ", "\n\nid: ")).contains("line 4: expected \"id: "));
        assert!(defect(&good.replace("sha256:", "md5:")).contains("line 3: expected sha256:"));
        assert!(defect(&good.replace("d4d4", "D4d4")).contains("checksum"));
        let until_secret = good.find("secret").expect("there");
        assert!(defect(&good[..until_secret]).contains("ends before line 5"));
        let error = PassphraseFile::read(Path::new("/no/such/file")).err().expect("missing").to_string();
        assert!(error.contains("/no/such/file"), "{error}");
    }

    #[test]
    fn no_defect_shows_the_secret() {
        assert!(!defect(&text().replace("secret: d4", "secret: x4")).contains("d4d4"));
    }
}
