//! The object store, as all else sees it: a few operations over small paths, local or in a cloud.
//!
//! # What callers may rely on
//!
//! - **Durable.** When `put_new`, `put_if_absent` (either outcome), `compare_and_swap` (`Swapped`) or `put_segment` return
//!   `Ok`, the object survives a power cut, with its name. A cloud promises that by its acknowledgement; the local store
//!   syncs the file, then its directory, then every directory above that this process had not yet synced.
//! - **Whole.** A reader sees an object's whole body or no object. A put that failed, or was cancelled or killed, leaves
//!   either nothing under the path or (where the reply was lost) all of it.
//! - **Create-if-absent** is atomic over all processes and hosts of the store: of many concurrent calls exactly one gets
//!   `Created`. Within a call, an attempt whose reply was lost is cleared up by reading back. Across calls `Exists` says only
//!   that an object is there, maybe our own from a call that ended with an error: whoever must know reads it back and
//!   compares a nonce. The same holds for `compare_and_swap` and an error of kind `Retry`.
//! - **Compare-and-swap**, and create-if-absent, need bodies that differ (each with a fresh nonce): a version may be a content
//!   hash, and an equal body that is read back is taken for our own.
//! - **A listing is a hint.** It may miss what was just written. Decide by reading.
//! - Dropping a future of this module is safe in the sense above: the operation happened whole or not at all.
//!
//! The store retries (bounded in count and in time) what a cloud calls transient, and never for longer than three minutes.
//! Requests to a cloud are counted one by one, retries and parts included (`blockferry_store_requests_total`), and paced.

mod cloud;
#[cfg(any(test, feature = "fixture"))]
pub mod conformance;
mod environment;
mod local;
mod pace;
mod path;
mod probe;
mod retry;
#[cfg(test)]
mod tests;

use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use common::clock::UnixMillis;
use common::error::{Dispose, Disposition};
use futures::StreamExt as _;
use futures::stream::BoxStream;

pub use environment::Environment;

/// Largest object that [`Store::get`] and [`Store::get_versioned`] read: a checkpoint or a segment, and room.
pub const GET_BYTES_MAX: u64 = 256 << 20;

/// What went wrong, where, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No object under this path.
    #[error("no object {path} in the store")]
    NotFound {
        /// The object's path in the store.
        path: String,
    },
    /// The store URL can't be used as it is.
    #[error("store URL \"{url}\": {why}")]
    Url {
        /// The URL as given.
        url: String,
        /// What is wrong with it and what was expected.
        why: String,
    },
    /// A path that could leave the store or that no store takes.
    #[error("object path \"{path}\" is not valid: {why}")]
    Path {
        /// The offending path.
        path: String,
        /// The rule that it breaks.
        why: &'static str,
    },
    /// The environment holds no credentials for a cloud store; nothing was sent.
    #[error("store \"{url}\" has no credentials: set {variables}")]
    NoCredentials {
        /// The URL as given.
        url: String,
        /// The environment variables that would give credentials.
        variables: &'static str,
    },
    /// The store refused the credentials or the operation.
    #[error(
        "the store refused to {op} {path}: {reason}; check the credentials and that they may read, write and delete there"
    )]
    Denied {
        /// What was tried.
        op: &'static str,
        /// The object's path in the store.
        path: String,
        /// The store's own words.
        reason: String,
    },
    /// The local store's file system is full.
    #[error("no space left for {path} in the store at {root}: free space there or enlarge its file system")]
    NoSpace {
        /// The object's path in the store.
        path: String,
        /// The store's directory.
        root: String,
    },
    /// The local store can't be written.
    #[error("the store at {root} can't be written ({reason}): mount it read-write and give this user write permission")]
    ReadOnly {
        /// The store's directory.
        root: String,
        /// The system's words.
        reason: String,
    },
    /// The bucket or container is gone, or was never there.
    #[error("could not {op} {path}: the bucket of the store {url} is not there: create it, or correct the URL")]
    NoBucket {
        /// What was tried.
        op: &'static str,
        /// The object's path in the store.
        path: String,
        /// The store's URL.
        url: String,
    },
    /// An object is larger than a reader of its kind takes, or than this store reads whole.
    #[error("object {path} has {found} bytes, expected at most {max}")]
    TooLarge {
        /// The object's path in the store.
        path: String,
        /// Its size in bytes.
        found: u64,
        /// The bound in bytes.
        max: u64,
    },
    /// An object is shorter than the range asked for.
    #[error("object {path} is truncated: expected bytes up to {expected}, found {found}")]
    Truncated {
        /// The object's path in the store.
        path: String,
        /// End of the range asked for.
        expected: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// The store ignores preconditions: two receivers could overwrite each other's log.
    #[error("the store does not honour {what}: use one that does (S3, Azure Blob, GCS or a local directory do)")]
    NotConditional {
        /// Which promise was broken.
        what: &'static str,
    },
    /// The store did not do it now; the same call may work later.
    #[error("the store could not {op} {path}: {reason}")]
    Unavailable {
        /// What was tried.
        op: &'static str,
        /// The object's path in the store.
        path: String,
        /// The store's or the system's words.
        reason: String,
    },
}

impl StoreError {
    /// True where the error says that there is no such object.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// One word for metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Denied { .. } | Self::NoCredentials { .. } => "store_denied",
            Self::NoBucket { .. } => "store_no_bucket",
            Self::NoSpace { .. } | Self::ReadOnly { .. } => "store_not_writable",
            _ => "store",
        }
    }
}

impl Dispose for StoreError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Unavailable { .. } | Self::NoSpace { .. } | Self::ReadOnly { .. } => Disposition::Retry,
            Self::Truncated { .. } | Self::TooLarge { .. } => Disposition::Corrupt,
            Self::NotFound { .. }
            | Self::NoBucket { .. }
            | Self::Url { .. }
            | Self::NoCredentials { .. }
            | Self::Denied { .. }
            | Self::NotConditional { .. } => Disposition::BadInput,
            Self::Path { .. } => Disposition::Bug,
        }
    }
}

/// Which body an object had when it was read; only of use for [`Store::compare_and_swap`] on the same store and path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version(VersionKind);

#[derive(Debug, Clone, PartialEq, Eq)]
enum VersionKind {
    /// BLAKE3 of the body.
    Local([u8; 32]),
    /// The cloud's own ETag or generation.
    Cloud(object_store::UpdateVersion),
}

/// What a create-if-absent found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutOutcome {
    /// This call created the object.
    Created,
    /// An object was there already; it was left as it is.
    Exists,
}

/// What a compare-and-swap found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CasOutcome {
    /// This call replaced the body; the new version.
    Swapped(Version),
    /// The body was not (or no longer) the one compared with, or the object is gone; it was left as it is.
    Changed,
}

/// One object of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectMeta {
    /// Path in the store.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// When the store says it was last written: the store's time, not this machine's.
    pub modified: UnixMillis,
}

/// How to open a store, beside its URL and the environment.
#[derive(Debug, Clone, Default)]
pub struct StoreOptions {
    /// Further certificate authorities (PEM) to trust for the store's endpoint.
    pub ca_pem: Option<Vec<u8>>,
    /// Most requests a second to a cloud, over all clones of the store; `None` for no cap.
    pub requests_per_second: Option<NonZeroU32>,
    /// The variables that tell endpoints and credentials; `None` for those of this process.
    pub environment: Option<Environment>,
}

/// An object store; cheap to clone, all clones share connections and limits.
#[derive(Debug, Clone)]
pub struct Store {
    backend: Backend,
    url: Arc<str>,
}

#[derive(Debug, Clone)]
enum Backend {
    Local(local::LocalStore),
    Cloud(cloud::CloudStore),
}

impl Store {
    /// Opens the store at `url`: `file:///path`, `s3://bucket/prefix`, `az://container/prefix` or `gs://bucket/prefix`.
    /// Endpoints, credentials and proxies come from the environment. Nothing is sent and nothing is written, but a local
    /// directory must be there (its last component is created).
    ///
    /// # Errors
    /// [`StoreError::Url`], [`StoreError::NoCredentials`]; for a local store also [`StoreError::ReadOnly`].
    pub async fn open(url: &str) -> Result<Self, StoreError> {
        Self::open_with(url, StoreOptions::default()).await
    }

    /// As [`Store::open`], with `options`.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub async fn open_with(url: &str, options: StoreOptions) -> Result<Self, StoreError> {
        let parsed =
            url::Url::parse(url).map_err(|error| StoreError::Url { url: url.into(), why: explain_url(&error) })?;
        let backend = match parsed.scheme() {
            "file" => Backend::Local(local::LocalStore::open(url, &parsed).await?),
            "s3" | "az" | "gs" => Backend::Cloud(cloud::CloudStore::open(url, &parsed, options)?),
            other => {
                return Err(StoreError::Url {
                    url: url.into(),
                    why: format!("expected file://, s3://, az:// or gs://, found {other}://"),
                });
            }
        };
        Ok(Self { backend, url: url.into() })
    }

    /// The URL that the store was opened with.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// True for a directory on this machine.
    #[must_use]
    pub fn is_local(&self) -> bool {
        matches!(self.backend, Backend::Local(_))
    }

    /// The whole body of the object at `path`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::TooLarge`] above [`GET_BYTES_MAX`], before anything is read.
    pub async fn get(&self, path: &str) -> Result<Bytes, StoreError> {
        Ok(self.get_versioned(path).await?.0)
    }

    /// The whole body of the object at `path` and the version to compare with.
    ///
    /// # Errors
    /// As [`Store::get`].
    pub async fn get_versioned(&self, path: &str) -> Result<(Bytes, Version), StoreError> {
        path::check(path)?;
        self.count("get");
        match &self.backend {
            Backend::Local(local) => local.get_versioned(path).await,
            Backend::Cloud(cloud) => Box::pin(cloud.get_versioned(path)).await,
        }
    }

    /// The bytes `range` of the object at `path`, all of them.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Truncated`] where the object ends before `range` does;
    /// [`StoreError::TooLarge`] for a range above [`GET_BYTES_MAX`].
    pub async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        path::check(path)?;
        let len = range.end.saturating_sub(range.start);
        if len > GET_BYTES_MAX {
            return Err(StoreError::TooLarge { path: path.into(), found: len, max: GET_BYTES_MAX });
        }
        if len == 0 {
            return Ok(Bytes::new());
        }
        self.count("get_range");
        match &self.backend {
            Backend::Local(local) => local.get_range(path, range).await,
            Backend::Cloud(cloud) => Box::pin(cloud.get_range(path, range)).await,
        }
    }

    /// Size in bytes of the object at `path`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn size(&self, path: &str) -> Result<u64, StoreError> {
        path::check(path)?;
        self.count("head");
        match &self.backend {
            Backend::Local(local) => local.size(path).await,
            Backend::Cloud(cloud) => Box::pin(cloud.size(path)).await,
        }
    }

    /// Writes an object under a path that nobody else uses (it holds a fresh ULID or UUID). Safe to repeat.
    ///
    /// # Errors
    /// Those of a write: [`StoreError::NoSpace`], [`StoreError::ReadOnly`], [`StoreError::Denied`],
    /// [`StoreError::Unavailable`]. It may still have been written.
    pub async fn put_new(&self, path: &str, body: Bytes) -> Result<(), StoreError> {
        self.put_segment(path, vec![body]).await
    }

    /// Writes one large object from `parts` in order, under a path that nobody else uses; multipart where the store has
    /// it. Holds no second copy of the body: at most one buffer of 1 MiB (local) or one part (cloud) beside it.
    ///
    /// # Errors
    /// As [`Store::put_new`].
    pub async fn put_segment(&self, path: &str, parts: Vec<Bytes>) -> Result<(), StoreError> {
        path::check(path)?;
        self.count("put");
        match &self.backend {
            Backend::Local(local) => local.put(path, parts).await,
            Backend::Cloud(cloud) => Box::pin(cloud.put(path, parts)).await,
        }
    }

    /// Creates the object at `path` unless there is one.
    ///
    /// # Errors
    /// As [`Store::put_new`]; after an error the object may be there, with this body or another's.
    pub async fn put_if_absent(&self, path: &str, body: Bytes) -> Result<PutOutcome, StoreError> {
        path::check(path)?;
        self.count("put_if_absent");
        match &self.backend {
            Backend::Local(local) => local.put_if_absent(path, body).await,
            Backend::Cloud(cloud) => Box::pin(cloud.put_if_absent(path, body)).await,
        }
    }

    /// Replaces the body of the object at `path` if it still is `version`. The new body must differ from every body that
    /// the object ever had (put a fresh nonce in it).
    ///
    /// # Errors
    /// As [`Store::put_new`]; after an error the swap may have happened: read back and compare the nonce.
    pub async fn compare_and_swap(&self, path: &str, version: &Version, body: Bytes) -> Result<CasOutcome, StoreError> {
        path::check(path)?;
        self.count("compare_and_swap");
        match (&self.backend, &version.0) {
            (Backend::Local(local), VersionKind::Local(digest)) => local.compare_and_swap(path, *digest, body).await,
            (Backend::Cloud(cloud), VersionKind::Cloud(version)) => {
                Box::pin(cloud.compare_and_swap(path, version.clone(), body)).await
            }
            // A version of another store is of no object here.
            _ => Ok(CasOutcome::Changed),
        }
    }

    /// Every object whose path lies under the folder `prefix` (no trailing `/` needed), in no order; a hint. Holds the
    /// whole listing in memory: for folders with many objects take [`Store::list_stream`].
    ///
    /// # Errors
    /// Those of a read. A folder that is not there is an empty listing.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>, StoreError> {
        let mut stream = self.list_stream(prefix)?;
        let mut found = Vec::new();
        while let Some(meta) = stream.next().await {
            found.push(meta?);
        }
        Ok(found)
    }

    /// As [`Store::list`], one object after another; at most 1,024 entries wait in memory.
    ///
    /// # Errors
    /// [`StoreError::Path`]; each item may be an error, after which the stream ends.
    pub fn list_stream(&self, prefix: &str) -> Result<BoxStream<'static, Result<ObjectMeta, StoreError>>, StoreError> {
        let prefix = prefix.trim_end_matches('/');
        path::check(prefix)?;
        self.count("list");
        Ok(match &self.backend {
            Backend::Local(local) => local.list(prefix, None),
            Backend::Cloud(cloud) => cloud.list(prefix, None),
        })
    }

    /// As [`Store::list_stream`], but only objects whose path sorts behind `after`. What sorts before is not even transferred,
    /// so that the end of a long log costs one request.
    ///
    /// # Errors
    /// As [`Store::list_stream`].
    pub fn list_stream_after(
        &self,
        prefix: &str,
        after: &str,
    ) -> Result<BoxStream<'static, Result<ObjectMeta, StoreError>>, StoreError> {
        let prefix = prefix.trim_end_matches('/');
        path::check(prefix)?;
        path::check(after)?;
        self.count("list");
        Ok(match &self.backend {
            Backend::Local(local) => local.list(prefix, Some(after)),
            Backend::Cloud(cloud) => cloud.list(prefix, Some(after)),
        })
    }

    /// Removes the object at `path`; that there is none is no error.
    ///
    /// # Errors
    /// Those of a write.
    pub async fn delete(&self, path: &str) -> Result<(), StoreError> {
        path::check(path)?;
        self.count("delete");
        match &self.backend {
            Backend::Local(local) => local.delete(path).await,
            Backend::Cloud(cloud) => Box::pin(cloud.delete(path)).await,
        }
    }

    /// Counts an operation of a local store; what goes to a cloud is counted request by request.
    fn count(&self, op: &'static str) {
        if self.is_local() {
            metrics::counter!("blockferry_store_requests_total", "op" => op).increment(1);
        }
    }

    /// Tries the store: can it be written, read and deleted from, and are create-if-absent and compare-and-swap real?
    /// Uses a few objects of unique names under `v1/probe/` and removes them.
    ///
    /// # Errors
    /// [`StoreError::NotConditional`] for a store that ignores preconditions; else what failed.
    pub async fn probe(&self) -> Result<(), StoreError> {
        probe::probe(self).await
    }
}

fn explain_url(error: &url::ParseError) -> String {
    match error {
        url::ParseError::RelativeUrlWithoutBase => {
            "expected file:///path, s3://bucket/prefix, az://container/prefix or gs://bucket/prefix".into()
        }
        other => other.to_string(),
    }
}
