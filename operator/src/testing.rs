//! What the tests of this crate share.

use std::path::{Path, PathBuf};

use catalog::store::Store;
use catalog::volume::fixture::FixtureVolume;

use crate::restore::RestoreRequest;
use crate::restore::image::Format;
use crate::select::PointWanted;
use crate::verify::VerifyRequest;

/// A folder with a local store in it.
pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) store: Store,
}

impl World {
    pub(crate) async fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(&format!("file://{}/store", dir.path().display())).await.expect("a store");
        Self { dir, store }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Every object of the store as a file, by its path in the store.
    pub(crate) fn objects(&self) -> Vec<(String, PathBuf)> {
        fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
            for entry in std::fs::read_dir(folder).expect("a folder") {
                let path = entry.expect("an entry").path();
                if path.is_dir() { walk(&path, found) } else { found.push(path) }
            }
        }
        let mut files = Vec::new();
        walk(&self.path("store/v1"), &mut files);
        files.sort();
        let root = self.path("store");
        files.into_iter().map(|file| (file.strip_prefix(&root).expect("below").display().to_string(), file)).collect()
    }

    pub(crate) fn key_file(&self, volume: &FixtureVolume) -> PathBuf {
        let path = self.path("blockferry.key");
        std::fs::write(&path, volume.key_file.encode().as_bytes()).expect("writable");
        path
    }

    pub(crate) fn restore_request(&self, volume: &FixtureVolume, point: &str, to: &Path) -> RestoreRequest {
        RestoreRequest {
            volume: volume.header.volume.to_string(),
            point: point.parse().expect("a point"),
            key_file: self.key_file(volume),
            to: to.into(),
            format: Format::Raw,
            verify: false,
            dry_run: false,
            force: false,
            state_dir: self.path("state"),
            json: true,
            budget_bytes: 64 << 20,
        }
    }

    pub(crate) fn verify_request(&self, volume: &FixtureVolume, with_key: bool) -> VerifyRequest {
        VerifyRequest {
            volume: volume.header.volume.to_string(),
            point: None,
            key_file: with_key.then(|| self.key_file(volume)),
            expect_head: None,
            json: true,
            budget_bytes: 64 << 20,
        }
    }
}

/// The point that `close` asserts.
pub(crate) fn wanted(close: &common::format::close::Close) -> PointWanted {
    PointWanted::Id(close.id().to_string())
}
