//! Points as disks, over real volumes in a local store.

#![expect(clippy::cast_possible_truncation, reason = "disks of tests are small")]

use std::time::Duration;

use catalog::volume::fixture::{FixtureVolume, change, image};
use common::budget::{Budget, MemoryTable};
use common::format::close::Consistency;
use common::limits::PAGE_BYTES;
use common::nbd::Errno;

use super::*;
use crate::testing::World;

const DISK: usize = 9 * 262_144 + 3 * 4096 + 777;

async fn source(world: &World, volume: &FixtureVolume, point: &str) -> Arc<PointSource> {
    let (id, point) = (volume.header.volume.to_string(), point.parse().expect("a point"));
    let source = PointSource::open(&world.store, &id, &point, &world.key_file(volume)).await;
    Arc::new(source.expect("it opens"))
}

fn disk(world: &World, source: &Arc<PointSource>, cache_bytes: u64, writable: bool) -> Disk {
    let cache = Cache::new(world.dir.path(), source.geometry, cache_bytes).expect("a file");
    let budget = Budget::new(MemoryTable::new(8 << 20)).expect("enough");
    let point = PointDisk::new(Arc::clone(source), cache, 16 << 20, budget, Duration::ZERO);
    let overlay = writable.then(|| Overlay::temporary(world.dir.path(), source.geometry).expect("a file"));
    Disk::new(Arc::new(point), overlay)
}

async fn read(disk: &Disk, start: usize, len: usize) -> Result<Vec<u8>, Errno> {
    let (bytes, skipped) = disk.read(start as u64..(start + len) as u64).await?;
    Ok(bytes[skipped..skipped + len].to_vec())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_byte_of_a_point_is_read_as_it_was_through_caches_of_any_size() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    volume.segments_per_epoch = 2;
    let first = image(DISK, 1);
    let old = volume.capture(&first, Some(Consistency::Crash)).await;
    let second = change(&first, 40, 2);
    volume.capture(&second, Some(Consistency::Crash)).await;
    for cache_bytes in [0, 300_000, 64 << 20] {
        for (point, content) in [(old.id().to_string(), &first), ("latest".to_owned(), &second)] {
            let disk = disk(&world, &source(&world, &volume, &point).await, cache_bytes, false);
            assert!(read(&disk, 0, DISK).await.expect("readable") == *content, "as a whole");
            for (start, len) in [(0, 1), (4095, 2), (262_143, 300_001), (DISK - 1, 1), (DISK - 9000, 9000)] {
                let bytes = read(&disk, start, len).await.expect("readable");
                assert!(bytes == content[start..start + len], "{len} bytes from {start} on");
            }
            for start in (0..DISK).step_by(65_536) {
                let len = 65_536.min(DISK - start);
                assert!(read(&disk, start, len).await.expect("readable") == content[start..start + len], "{start}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_is_read_back_by_the_byte_and_the_point_stays_as_it_was() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    let content = image(DISK, 3);
    volume.capture(&content, Some(Consistency::Crash)).await;
    let source = source(&world, &volume, "latest").await;
    let disk = disk(&world, &source, 64 << 20, true);
    let mut model = content.clone();
    for turn in 0..200_u64 {
        let hash = blake3::hash(&turn.to_le_bytes());
        let number = |at: usize| u64::from_le_bytes(hash.as_bytes()[at..at + 8].try_into().expect("eight"));
        let start = (number(0) % DISK as u64) as usize;
        let longest = if turn % 5 == 0 { 300_000 } else { 9000 };
        let len = ((number(8) % longest) as usize + 1).min(DISK - start);
        match turn % 4 {
            0 | 1 => {
                let bytes: Vec<u8> = hash.as_bytes().iter().copied().cycle().take(len).collect();
                model[start..start + len].copy_from_slice(&bytes);
                disk.write(start as u64, bytes).await.expect("writable");
            }
            2 => {
                model[start..start + len].fill(0);
                disk.zero(start as u64..(start + len) as u64, turn % 8 == 2).await.expect("zeroed");
            }
            _ => {
                // Whole pages go, the rest stays.
                let (first, end) = (start.next_multiple_of(PAGE_BYTES), (start + len) / PAGE_BYTES * PAGE_BYTES);
                let end = if start + len == DISK { DISK } else { end };
                if first < end {
                    model[first..end].fill(0);
                }
                disk.trim(start as u64..(start + len) as u64).await.expect("trimmed");
            }
        }
        assert!(read(&disk, start, len).await.expect("readable") == model[start..start + len], "turn {turn}");
    }
    assert!(read(&disk, 0, DISK).await.expect("readable") == model);
    let untouched = self::disk(&world, &source, 0, false);
    assert!(read(&untouched, 0, DISK).await.expect("readable") == content);
    assert_eq!(untouched.write(0, vec![1]).await, Err(Errno::NotPermitted));
    assert_eq!(untouched.trim(0..4096).await, Err(Errno::NotPermitted));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_to_parts_of_one_page_at_once_are_all_there_afterwards() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    let content = image(DISK, 5);
    volume.capture(&content, Some(Consistency::Crash)).await;
    let disk = Arc::new(disk(&world, &source(&world, &volume, "latest").await, 64 << 20, true));
    let mut expected = content;
    let mut writes = tokio::task::JoinSet::new();
    for page in 0..64_usize {
        for part in 0..8_usize {
            let start = page * PAGE_BYTES + part * 512;
            let bytes = vec![(page * 8 + part) as u8; 512];
            expected[start..start + 512].copy_from_slice(&bytes);
            let disk = Arc::clone(&disk);
            writes.spawn(async move { disk.write(start as u64, bytes).await });
        }
    }
    while let Some(written) = writes.join_next().await {
        written.expect("no panic").expect("writable");
    }
    assert!(read(&disk, 0, DISK).await.expect("readable") == expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_byte_is_an_error_where_it_lies_and_nowhere_else() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    let content = image(DISK, 7);
    volume.capture(&content, Some(Consistency::Crash)).await;
    let source = source(&world, &volume, "latest").await;
    let (_, file) = world.objects().into_iter().find(|(path, _)| path.contains("/segments/")).expect("a segment");
    let good = std::fs::read(&file).expect("readable");
    let index_at = source.history.segments[0].index_offset as usize;
    let mut failed = std::collections::BTreeSet::new();
    for at in (200..index_at).step_by(index_at / 7) {
        let mut bad = good.clone();
        bad[at] ^= 8;
        std::fs::write(&file, &bad).expect("writable");
        let disk = disk(&world, &source, 64 << 20, false);
        let mut errors = 0;
        for block in 0..DISK.div_ceil(BLOCK_BYTES) {
            let (start, end) = (block * BLOCK_BYTES, ((block + 1) * BLOCK_BYTES).min(DISK));
            match read(&disk, start, end - start).await {
                Ok(bytes) => assert!(bytes == content[start..end], "never wrong data"),
                Err(errno) => {
                    assert_eq!(errno, Errno::Io);
                    errors += 1;
                    failed.insert(block);
                }
            }
        }
        assert_eq!(errors, 1, "byte {at}: one block is lost");
    }
    assert!(failed.len() > 3);
    std::fs::write(&file, &good).expect("writable");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_fetched_twice() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    let content = image(DISK, 9);
    volume.capture(&content, Some(Consistency::Crash)).await;
    let source = source(&world, &volume, "latest").await;
    let disk = disk(&world, &source, 64 << 20, false);
    assert!(read(&disk, 0, DISK).await.expect("readable") == content);
    // Without the store, all is still there.
    let segments = world.path("store/v1");
    std::fs::rename(&segments, world.path("away")).expect("moved");
    assert!(read(&disk, 0, DISK).await.expect("from the cache") == content);
}
