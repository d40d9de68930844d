//! A passphrase file is an error or exactly what would be written.
//!
//! Its parser lies in the network rim, with which this workspace does not build; it is compiled in by path, with stand-ins for
//! the two types that it takes from there.
#![no_main]

use common::{error, ids};
use libfuzzer_sys::fuzz_target;

mod tls {
    /// As `common::net::tls::Fingerprint` parses and prints it.
    pub struct Fingerprint(pub [u8; 32]);

    impl std::fmt::Display for Fingerprint {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("sha256:")?;
            self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
        }
    }

    impl std::str::FromStr for Fingerprint {
        type Err = crate::ids::ParseIdError;

        fn from_str(text: &str) -> Result<Self, Self::Err> {
            let digits = text.strip_prefix("sha256:").unwrap_or("");
            digits.parse::<crate::ids::Digest>().map(|digest| Self(digest.0))
        }
    }
}

mod secret_file {
    #[derive(Debug, thiserror::Error)]
    #[error("not read here")]
    pub struct FileError;

    pub fn read(_: &std::path::Path) -> Result<Vec<u8>, FileError> {
        Err(FileError)
    }
}

#[allow(dead_code)]
#[path = "../../common/src/net/passphrase.rs"]
mod passphrase;

use passphrase::PassphraseFile;

/// The checksum line made right, where the input has one.
fn fixed(data: &[u8]) -> Option<Vec<u8>> {
    const LINE: &[u8] = b"\nchecksum: ";
    let at = data.windows(LINE.len()).position(|window| window == LINE)? + 1;
    let mut bytes = data[..at].to_vec();
    let line = format!("checksum: {:08x}\n", crc32c::crc32c(&bytes));
    bytes.extend_from_slice(line.as_bytes());
    Some(bytes)
}

fn check(data: &[u8]) {
    if let Ok(file) = PassphraseFile::parse(data) {
        assert_eq!(file.render().as_bytes(), data);
    }
}

fuzz_target!(|data: &[u8]| {
    check(data);
    if let Some(fixed) = fixed(data) {
        check(&fixed);
    }
});
