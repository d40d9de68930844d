//! The object that holds a volume's policy: read by whoever collects, written by an operator, by compare-and-swap.
//!
//! Kept in an envelope with magic `BFPOLICY`. Body: nonce 16, volume 16, text of the policy.
//!
//! Promises: a policy that does not parse is an error, never "keep nothing"; of two writers at once the later one's policy
//! stands whole. Never: says that a volume exists (ask its header).

use common::error::{Dispose, Disposition};
use common::format::FormatError;
use common::format::envelope::Kind;
use common::format::wire::{Reader, Writer};
use common::ids::{Nonce, VolumeId};

use super::policy::{POLICY_TEXT_BYTES_MAX, Policy, PolicyError};
use crate::store::{CasOutcome, PutOutcome, Store, StoreError};
use crate::volume::paths;

/// Envelope of a policy object.
pub const KIND: Kind = Kind { what: "policy", magic: *b"BFPOLICY", version: 1, body_bytes_max: 1024 };
/// Attempts of one write: an operator's command meets another one rarely, and for a moment.
const ATTEMPTS_MAX: u32 = 16;

/// What went wrong with a policy object.
#[derive(Debug, thiserror::Error)]
pub enum PolicyObjectError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The object's bytes are not what was written.
    #[error("{path}: {source}: write the policy again with `blockferry policy set`")]
    Damaged {
        /// The object.
        path: String,
        /// What is wrong with it.
        source: FormatError,
    },
    /// The object is of another volume than its path says.
    #[error(
        "{path} is the policy of volume {found}: it was moved or overwritten; write it again with `blockferry policy set`"
    )]
    WrongPlace {
        /// The object.
        path: String,
        /// The volume it names.
        found: VolumeId,
    },
    /// Its text is no policy that this version knows.
    #[error("{path}: {source}")]
    Text {
        /// The object.
        path: String,
        /// Why not.
        source: PolicyError,
    },
    /// Others changed it again and again.
    #[error("{path} was changed by others {ATTEMPTS_MAX} times meanwhile: look at it and repeat")]
    Contended {
        /// The object.
        path: String,
    },
    /// No random bytes.
    #[error(transparent)]
    Rng(#[from] common::rng::RngError),
}

impl Dispose for PolicyObjectError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Damaged { source, .. } => source.disposition(),
            Self::WrongPlace { .. } => Disposition::Corrupt,
            Self::Text { source, .. } => source.disposition(),
            Self::Contended { .. } | Self::Rng(_) => Disposition::Retry,
        }
    }
}

/// A policy as it lies in the store.
#[derive(Debug, Clone)]
pub struct StoredPolicy {
    /// The policy.
    pub policy: Policy,
    nonce: Nonce,
}

/// Where a volume's policy lies.
#[must_use]
pub fn path(volume: VolumeId) -> String {
    format!("{}/policy", paths::volume(volume))
}

/// The policy of `volume`; `None` where it has none, which keeps all points.
///
/// # Errors
/// [`PolicyObjectError`]; whoever expires points must stop then.
pub async fn read(store: &Store, volume: VolumeId) -> Result<Option<StoredPolicy>, PolicyObjectError> {
    let path = path(volume);
    let body = match store.get(&path).await {
        Ok(found) => found,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let (nonce, found, text) =
        decode(&body).map_err(|source| PolicyObjectError::Damaged { path: path.clone(), source })?;
    if found != volume {
        return Err(PolicyObjectError::WrongPlace { path, found });
    }
    let policy = text.parse().map_err(|source| PolicyObjectError::Text { path, source })?;
    Ok(Some(StoredPolicy { policy, nonce }))
}

/// Makes `policy` the one of `volume`, whatever it had before, also a damaged one.
///
/// # Errors
/// [`PolicyObjectError::Store`], after which it may have been written; [`PolicyObjectError::Contended`].
pub async fn write(store: &Store, volume: VolumeId, policy: &Policy) -> Result<(), PolicyObjectError> {
    let path = path(volume);
    for _ in 0..ATTEMPTS_MAX {
        let nonce = Nonce(common::rng::random()?);
        let body = encode(nonce, volume, policy);
        let wrote = match store.get_versioned(&path).await {
            Ok((_, version)) => match store.compare_and_swap(&path, &version, body.into()).await? {
                CasOutcome::Swapped(_) => true,
                CasOutcome::Changed => false,
            },
            Err(error) if error.is_not_found() => store.put_if_absent(&path, body.into()).await? == PutOutcome::Created,
            Err(error) => return Err(error.into()),
        };
        // "Changed" may be our own write, whose reply was lost inside the store's retries.
        if wrote || matches!(read(store, volume).await, Ok(Some(found)) if found.nonce == nonce) {
            return Ok(());
        }
    }
    Err(PolicyObjectError::Contended { path })
}

fn encode(nonce: Nonce, volume: VolumeId, policy: &Policy) -> Vec<u8> {
    let mut body = Writer::with_capacity(256);
    body.raw(&nonce.0).raw(&volume.0).block(policy.to_string().as_bytes());
    KIND.seal(body.as_slice())
}

fn decode(bytes: &[u8]) -> Result<(Nonce, VolumeId, String), FormatError> {
    let mut reader = Reader::new("policy", KIND.open(bytes)?);
    let found = (Nonce(reader.array()?), VolumeId(reader.array()?), reader.text("policy text", POLICY_TEXT_BYTES_MAX)?);
    reader.finish()?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOLUME: VolumeId = VolumeId([2; 16]);
    /// Fails where the encoding changes: policies in stores could not be read any more.
    const GOLDEN: &[u8] = include_bytes!("golden/policy-v1.bin");

    fn policy(text: &str) -> Policy {
        text.parse().expect("a policy")
    }

    async fn world() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(&format!("file://{}/store", dir.path().display())).await.expect("a store");
        (dir, store)
    }

    #[test]
    fn a_policy_reads_back_and_is_as_it_was_first_written() {
        let text = "all for 24h, hourly for 7d, daily for 30d, latest 10";
        assert_eq!(encode(Nonce([1; 16]), VOLUME, &policy(text)), GOLDEN);
        assert_eq!(decode(GOLDEN), Ok((Nonce([1; 16]), VOLUME, text.to_owned())));
    }

    #[test]
    fn any_flipped_byte_and_any_cut_is_an_error() {
        for at in 0..GOLDEN.len() {
            let mut broken = GOLDEN.to_vec();
            broken[at] ^= 0x20;
            // Flags that a reader may ignore and a reserved field are covered by the checksum alone.
            assert!(decode(&broken).is_err(), "byte {at}");
            assert!(decode(&GOLDEN[..at]).is_err(), "cut at {at}");
        }
    }

    #[tokio::test]
    async fn a_policy_is_none_until_written_and_then_the_last_one_written() {
        let (_dir, store) = world().await;
        assert!(read(&store, VOLUME).await.expect("read").is_none());
        for text in ["latest 3", "keep all", "daily for 7d", "daily for 7d"] {
            write(&store, VOLUME, &policy(text)).await.expect("written");
            let found = read(&store, VOLUME).await.expect("read").expect("there");
            assert_eq!(found.policy, policy(text));
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn of_many_writers_at_once_each_succeeds_and_one_policy_stands_whole() {
        let (_dir, store) = world().await;
        let writers: Vec<_> = (1..=6_u32)
            .map(|count| {
                let store = store.clone();
                tokio::spawn(async move { write(&store, VOLUME, &policy(&format!("latest {count}"))).await })
            })
            .collect();
        for writer in writers {
            writer.await.expect("no panic").expect("written");
        }
        let found = read(&store, VOLUME).await.expect("read").expect("there").policy.to_string();
        assert!(found.starts_with("latest "), "{found}");
    }

    #[tokio::test]
    async fn a_damaged_or_foreign_or_newer_policy_is_an_error_and_can_be_replaced() {
        let (_dir, store) = world().await;
        let other = VolumeId([3; 16]);
        let mut unknown = Writer::with_capacity(64);
        unknown.raw(&[1; 16]).raw(&VOLUME.0).block(b"yearly for 9y");
        for (body, words) in [
            (b"nonsense".to_vec(), "v1/volumes/02020202-0202-0202-0202-020202020202/policy"),
            (encode(Nonce([1; 16]), other, &policy("latest 1")), "is the policy of volume 03030303"),
            (KIND.seal(unknown.as_slice()), "\"yearly\""),
        ] {
            store.put_new(&path(VOLUME), body.into()).await.expect("written");
            let error = read(&store, VOLUME).await.expect_err(words).to_string();
            assert!(error.contains(words), "{error}");
            write(&store, VOLUME, &policy("latest 2")).await.expect("written");
            assert_eq!(read(&store, VOLUME).await.expect("read").expect("there").policy, policy("latest 2"));
        }
    }
}
