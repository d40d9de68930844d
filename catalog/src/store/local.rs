//! The store in a directory of this machine (or one that several hosts mount with working locks and renames).
//!
//! # Layout
//!
//! ```text
//! ROOT/v1/…          an object at its path
//! ROOT/.tmp/<random> bodies being written; each locked (flock) by its writer while it lives
//! ROOT/.locks/<hh>   256 lock files; compare-and-swap and delete of a path hold the one that its hash names
//! ```
//!
//! # Why a kill or a power cut at any moment is harmless
//!
//! A body is written to `.tmp` and synced (data and size) before it gets its name by one atomic rename, which for
//! create-if-absent must not replace (`renameat2` with `RENAME_NOREPLACE`; a hard link where a file system lacks that).
//! So a name never stands for a partial body. After the rename the directory is synced, and before it each directory
//! above that this process has not synced itself: only then does the call return. `Exists` syncs the directory too, so
//! that nobody builds on an object which a power cut could still take back. A compare-and-swap holds its lock file
//! from reading the old body to the synced rename of the new one; a kill releases the lock with either the old or the new
//! body in place. What a killed writer leaves in `.tmp` holds no lock any more and is removed by the next writer's start.
//!
//! Large bodies are written past the page cache (`O_DIRECT`, one aligned 1 MiB buffer each) in order, at most four at
//! once: figures.md measured that as best, and it leaves the machine's cache to others.

mod disk;

use std::collections::HashSet;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use tokio::sync::Semaphore;

use super::{CasOutcome, ObjectMeta, PutOutcome, StoreError, Version, VersionKind};

/// Large bodies written at once.
const LARGE_WRITERS_MAX: usize = 4;
/// From this size on a body counts as large.
const LARGE_BYTES_MIN: usize = 1 << 20;
/// Listing entries that wait for their reader.
const LIST_AHEAD_MAX: usize = 1_024;

/// A store in a directory; clones share it.
#[derive(Debug, Clone)]
pub(super) struct LocalStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    /// Directories whose entry in their parent this process has synced. Bounded by `disk::DURABLE_DIRS_MAX`.
    durable_dirs: Mutex<HashSet<PathBuf>>,
    /// Set once this process has made `.tmp` and `.locks` and removed dead writers' leftovers.
    prepared: Mutex<bool>,
    large_writers: Semaphore,
}

impl LocalStore {
    pub(super) async fn open(url: &str, parsed: &url::Url) -> Result<Self, StoreError> {
        let bad = |why: String| StoreError::Url { url: url.into(), why };
        if parsed.query().is_some() || parsed.fragment().is_some() {
            return Err(bad("expected file:///path without '?' and '#'".into()));
        }
        let root = parsed
            .to_file_path()
            .map_err(|()| bad("expected file:///path with three slashes and an absolute path".into()))?;
        let checked = root.clone();
        let found = blocking(move || Ok(disk::check_root(&checked))).await?;
        found.map_err(bad)?;
        Ok(Self {
            inner: Arc::new(Inner {
                root,
                durable_dirs: Mutex::default(),
                prepared: Mutex::default(),
                large_writers: Semaphore::new(LARGE_WRITERS_MAX),
            }),
        })
    }

    pub(super) async fn get_versioned(&self, path: &str) -> Result<(Bytes, Version), StoreError> {
        let (inner, path) = (self.inner.clone(), path.to_owned());
        blocking(move || {
            let body = inner.read(&path)?;
            let digest = *blake3::hash(&body).as_bytes();
            Ok((body, Version(VersionKind::Local(digest))))
        })
        .await
    }

    pub(super) async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let (inner, path) = (self.inner.clone(), path.to_owned());
        blocking(move || inner.read_range(&path, range)).await
    }

    pub(super) async fn size(&self, path: &str) -> Result<u64, StoreError> {
        let (inner, path) = (self.inner.clone(), path.to_owned());
        blocking(move || inner.size(&path)).await
    }

    pub(super) async fn put(&self, path: &str, parts: Vec<Bytes>) -> Result<(), StoreError> {
        let _permit = if parts.iter().map(Bytes::len).sum::<usize>() >= LARGE_BYTES_MIN {
            // The semaphore is never closed; if it were, an unbounded write would still be a correct one.
            self.inner.large_writers.acquire().await.ok()
        } else {
            None
        };
        let (inner, path) = (self.inner.clone(), path.to_owned());
        blocking(move || inner.put(&path, &parts)).await
    }

    pub(super) async fn put_if_absent(&self, path: &str, body: Bytes) -> Result<PutOutcome, StoreError> {
        let (inner, path) = (self.inner.clone(), path.to_owned());
        blocking(move || inner.put_if_absent(&path, &body)).await
    }

    pub(super) async fn compare_and_swap(
        &self,
        path: &str,
        expected: [u8; 32],
        body: Bytes,
    ) -> Result<CasOutcome, StoreError> {
        let (inner, path) = (self.inner.clone(), path.to_owned());
        blocking(move || inner.compare_and_swap(&path, expected, &body)).await
    }

    pub(super) async fn delete(&self, path: &str) -> Result<(), StoreError> {
        let (inner, path) = (self.inner.clone(), path.to_owned());
        blocking(move || inner.delete(&path)).await
    }

    pub(super) fn list(&self, prefix: &str, after: Option<&str>) -> BoxStream<'static, Result<ObjectMeta, StoreError>> {
        let (sender, receiver) = tokio::sync::mpsc::channel(LIST_AHEAD_MAX);
        let (inner, prefix) = (self.inner.clone(), prefix.to_owned());
        let after = after.unwrap_or_default().to_owned();
        // Ends when the walk does or when the stream is dropped, whichever is first.
        tokio::task::spawn_blocking(move || {
            inner.walk(&prefix, &after, &mut |item| sender.blocking_send(item).is_ok());
        });
        futures::stream::unfold(receiver, async |mut receiver| receiver.recv().await.map(|item| (item, receiver)))
            .boxed()
    }
}

/// Runs file work off the async threads. A dropped caller does not stop it half-way.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(StoreError::Unavailable { op: "finish work on", path: "the local store".into(), reason: error.to_string() })
    })
}
