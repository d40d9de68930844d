//! Collection on real volumes of a local store.

#![allow(clippy::cast_possible_truncation, reason = "images of tests are small")]

mod doubts;
mod simulation;
mod together;

use std::collections::HashSet;
use std::time::Duration;

use common::clock::{Clock, UnixMillis};
use common::format::close::Consistency;
use common::format::record::Record;
use common::ids::{BlockIndex, CloseId, Geometry, PageMask, ReceiverId};
use common::limits::{BLOCK_BYTES, PAGE_BYTES};
use common::seal::{DataKey, EpochContext, Opener};

use super::*;
use crate::store::Store;
use crate::volume::epochs;
use crate::volume::fixture::{FixtureVolume, change, image};
use crate::volume::history::History;

const DISK: usize = 5 * 262_144 + 5000;
/// Long after everything that a test stores.
const FAR: UnixMillis = UnixMillis(4_000_000_000_000);

async fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = Store::open(&format!("file://{}/store", dir.path().display())).await.expect("the store opens");
    (dir, store)
}

fn options(now: UnixMillis) -> CollectOptions {
    CollectOptions {
        grace: Duration::from_secs(3600),
        now,
        collector: ReceiverId([9; 16]),
        memory_bytes: COLLECT_MEMORY_BYTES,
    }
}

/// The disk at the epoch with this index, read as a restore does: proven metadata, newest record for each page, opened.
async fn read_point(store: &Store, history: &History, key: &DataKey, at: usize) -> Result<Vec<u8>, String> {
    let disk = history.epochs[at].close.statement().disk_bytes;
    let geometry = Geometry::new(disk).expect("a disk");
    let mut covered = vec![PageMask::EMPTY; geometry.blocks() as usize];
    let mut content = vec![0_u8; geometry.blocks() as usize * BLOCK_BYTES];
    let (mut opener, mut pages) = (Opener::new().expect("an opener"), Vec::new());
    for epoch in history.epochs[..=at].iter().rev() {
        let statement = epoch.close.statement();
        let context = EpochContext {
            volume: statement.volume,
            incarnation: statement.incarnation,
            epoch: statement.epoch,
            key_id: statement.key_id,
        };
        let epoch_key = key.epoch_key(context, &statement.salt);
        for (place, entry) in epochs::load(store, history, epoch).await.map_err(|error| error.to_string())? {
            let meta = entry.meta;
            let mut fresh = PageMask::EMPTY;
            for block in meta.block.0..meta.block.0 + u64::from(meta.block_count) {
                fresh = meta.pages().without(covered[block as usize]).and(geometry.pages_of(BlockIndex(block)));
                covered[block as usize] = covered[block as usize].or(meta.pages());
            }
            let data = fresh.and(meta.data_mask);
            if data.is_empty() {
                continue;
            }
            if entry.is_collected() {
                return Err(format!("a record of epoch {} that the point needs was collected", statement.epoch));
            }
            let path = &history.segments[place as usize].path;
            let range = entry.offset..entry.offset + u64::from(meta.record_len);
            let bytes = store.get_range(path, range).await.map_err(|error| error.to_string())?;
            let record = Record::parse(bytes).map_err(|error| error.to_string())?;
            opener.open(&epoch_key, &record, &mut pages).map_err(|error| error.to_string())?;
            for (number, page) in meta
                .data_mask
                .iter()
                .enumerate()
                .filter(|(_, page)| data.and(PageMask::EMPTY.with(*page)) != PageMask::EMPTY)
            {
                let to = meta.block.0 as usize * BLOCK_BYTES + page as usize * PAGE_BYTES;
                content[to..to + PAGE_BYTES].copy_from_slice(&pages[number * PAGE_BYTES..(number + 1) * PAGE_BYTES]);
            }
        }
    }
    content.truncate(disk as usize);
    Ok(content)
}

/// A volume with `count` points, and what the disk was at each.
async fn volume_with_points(store: &Store, count: u64) -> (FixtureVolume, Vec<(CloseId, Vec<u8>)>) {
    let mut volume = FixtureVolume::create(store, "web", "root", DISK as u64).await;
    let (mut content, mut known) = (image(DISK, 1), Vec::new());
    for seed in 0..count {
        let close = volume.capture(&content, Some(Consistency::Crash)).await;
        known.push((close.id(), content.clone()));
        content = if seed % 3 == 2 { image(DISK, seed + 2) } else { change(&content, 40, seed + 2) };
    }
    (volume, known)
}

async fn segments(store: &Store, volume: &FixtureVolume) -> (usize, u64) {
    let listed = store.list(&crate::volume::paths::segment_folder(volume.header.volume)).await.expect("a listing");
    (listed.len(), listed.iter().map(|meta| meta.size).sum())
}

/// Checks that just the `kept` points are offered, and read as they were.
async fn check(store: &Store, volume: &FixtureVolume, known: &[(CloseId, Vec<u8>)], kept: &[usize]) {
    let history = History::read(store, &volume.header).await.expect("a log");
    let offered: Vec<CloseId> = history.points().iter().map(|point| point.id).collect();
    assert_eq!(offered, kept.iter().map(|&at| known[at].0).collect::<Vec<_>>());
    for &at in kept {
        let place = history.find(known[at].0).expect("an epoch");
        let read = read_point(store, &history, &volume.data_key, place).await;
        assert!(read.as_ref() == Ok(&known[at].1), "point {at} differs: {:?}", read.map(|_| ()));
    }
}

fn keep(known: &[(CloseId, Vec<u8>)], which: &[usize]) -> impl Fn(&[DatedPoint]) -> HashSet<CloseId> + use<> {
    let kept: HashSet<CloseId> = which.iter().map(|&at| known[at].0).collect();
    move |_| kept.clone()
}

#[tokio::test]
async fn what_no_kept_point_needs_goes_after_the_grace_and_what_they_need_reads_as_before() {
    let (_dir, store) = store().await;
    let (mut volume, mut known) = volume_with_points(&store, 12).await;
    let before = segments(&store, &volume).await;
    let now = Clock::System.now();
    let collection = Collection::plan(&store, &volume.header, options(now), keep(&known, &[3])).await.expect("a plan");
    assert_eq!(collection.planned().expired.len(), 10);
    assert_eq!(segments(&store, &volume).await, before, "a plan writes nothing");
    let done = collection.apply(&volume.clock).await.expect("collected");
    assert!(done.expired == 10 && done.replaced > 2 && done.written >= 1 && done.deleted == 0, "{done:?}");
    check(&store, &volume, &known, &[3, 11]).await;
    // Within the grace whoever read the log before still finds all it needs.
    assert!(segments(&store, &volume).await.1 > before.1);

    let again = Collection::plan(&store, &volume.header, options(now), keep(&known, &[3])).await.expect("a plan");
    assert_eq!(again.apply(&volume.clock).await.expect("collected"), Collected::default(), "nothing is left to do");
    let late = Collection::plan(&store, &volume.header, options(FAR), keep(&known, &[3])).await.expect("a plan");
    assert_eq!(late.apply(&volume.clock).await.expect("collected").deleted, done.replaced);
    let after = segments(&store, &volume).await;
    assert!(after.1 < before.1 / 10 * 7, "{after:?} of {before:?} are left");
    check(&store, &volume, &known, &[3, 11]).await;

    // The writer goes on where it was, and finds the numbers that the collector took.
    let content = change(&known[11].1, 5, 99);
    let close = volume.capture(&content, Some(Consistency::Crash)).await;
    known.push((close.id(), content));
    check(&store, &volume, &known, &[3, 11, 12]).await;
}

#[tokio::test]
async fn the_newest_state_and_the_newest_solid_point_stay_whatever_the_policy_says() {
    let (_dir, store) = store().await;
    let (mut volume, mut known) = volume_with_points(&store, 3).await;
    let fuzzy = change(&known[2].1, 9, 50);
    known.push((volume.capture(&fuzzy, Some(Consistency::Fuzzy)).await.id(), fuzzy.clone()));
    let unpointed = change(&fuzzy, 9, 51);
    let head = volume.capture(&unpointed, None).await;
    let nothing = |_: &[DatedPoint]| HashSet::new();
    let collection = Collection::plan(&store, &volume.header, options(FAR), nothing).await.expect("a plan");
    collection.apply(&volume.clock).await.expect("collected");
    check(&store, &volume, &known, &[2, 3]).await;
    let history = History::read(&store, &volume.header).await.expect("a log");
    let at = history.find(head.id()).expect("the head");
    assert_eq!(read_point(&store, &history, &volume.data_key, at).await, Ok(unpointed));
}

#[tokio::test]
async fn an_orphan_is_condemned_after_the_grace_and_a_writer_that_names_it_late_is_refused() {
    let (_dir, store) = store().await;
    let (mut volume, known) = volume_with_points(&store, 2).await;
    let content = change(&known[1].1, 5, 7);
    let records = volume.seal(&content);
    // Stored, but its writer sleeps before it creates the entry.
    let (segment, epochs) = volume.prepare(records, Some(Consistency::Crash)).await;
    let all = |points: &[DatedPoint]| points.iter().map(|dated| dated.point.id).collect();
    let young = Collection::plan(&store, &volume.header, options(Clock::System.now()), all).await.expect("a plan");
    assert!(young.planned().condemned.is_empty(), "it may still be named");
    let collection = Collection::plan(&store, &volume.header, options(FAR), all).await.expect("a plan");
    assert_eq!(collection.planned().condemned, [segment[0].path.clone()]);
    collection.apply(&volume.clock).await.expect("collected");
    let late = volume.log.append(segment.clone(), epochs.clone()).await.expect_err("it was condemned");
    assert!(late.to_string().contains(&segment[0].path), "{late}");
    let gone = Collection::plan(&store, &volume.header, options(FAR), all).await.expect("a plan");
    assert_eq!(gone.apply(&volume.clock).await.expect("collected").deleted, 1);
    // Under a fresh name it commits.
    let close = volume.capture(&content, Some(Consistency::Crash)).await;
    let history = History::read(&store, &volume.header).await.expect("a log");
    let at = history.find(close.id()).expect("an epoch");
    assert_eq!(read_point(&store, &history, &volume.data_key, at).await, Ok(content));
}

#[tokio::test]
async fn a_damaged_record_that_is_needed_stops_the_collection_by_name() {
    let (dir, store) = store().await;
    let (volume, known) = volume_with_points(&store, 6).await;
    let collection = Collection::plan(&store, &volume.header, options(FAR), keep(&known, &[0])).await.expect("a plan");
    let history = History::read(&store, &volume.header).await.expect("a log");
    let place = collection.planned().rewrites[0][0];
    let path = history.segments[place as usize].path.clone();
    let file = dir.path().join("store").join(&path);
    let mut bytes = std::fs::read(&file).expect("the segment");
    // Whichever record is copied, one of its bytes is wrong.
    let end = history.segments[place as usize].index_offset as usize;
    for byte in bytes[16..end].iter_mut().step_by(512) {
        *byte ^= 1;
    }
    std::fs::write(&file, bytes).expect("the segment is ours");
    let error = collection.apply(&volume.clock).await.expect_err("damaged");
    assert!(error.to_string().contains(&path), "{error}");
    check_offered(&store, &volume, 6).await;
}

#[tokio::test]
async fn a_record_that_was_replaced_under_a_right_checksum_stops_the_collection_by_name() {
    let (dir, store) = store().await;
    let (volume, known) = volume_with_points(&store, 6).await;
    let collection = Collection::plan(&store, &volume.header, options(FAR), keep(&known, &[0])).await.expect("a plan");
    let history = History::read(&store, &volume.header).await.expect("a log");
    let mut paths = Vec::new();
    for &place in collection.planned().rewrites.iter().flatten() {
        let reference = &history.segments[place as usize];
        let index = crate::volume::segment::read_index(&store, reference).await.expect("an index");
        let file = dir.path().join("store").join(&reference.path);
        let mut bytes = std::fs::read(&file).expect("the segment");
        for entry in index.groups.iter().flat_map(|group| &group.entries) {
            let range = entry.offset as usize..entry.offset as usize + entry.meta.record_len as usize;
            let record = Record::parse(bytes[range.clone()].to_vec().into()).expect("a record");
            let mut other = record.bytes().to_vec();
            *other.last_mut().expect("a seal") ^= 1;
            bytes[range].copy_from_slice(Record::assemble(*record.header(), other).bytes());
        }
        std::fs::write(&file, bytes).expect("the segment is ours");
        paths.push(reference.path.clone());
    }
    let error = collection.apply(&volume.clock).await.expect_err("replaced").to_string();
    assert!(paths.iter().any(|path| error.contains(path)), "{error}");
    check_offered(&store, &volume, 6).await;
}

async fn check_offered(store: &Store, volume: &FixtureVolume, count: usize) {
    let history = History::read(store, &volume.header).await.expect("a log");
    assert_eq!(history.points().len(), count, "nothing was given up");
}

#[tokio::test]
async fn a_checkpoint_after_a_collection_leaves_expired_points_out_and_names_segments_that_are_there() {
    use crate::volume::checkpoint::{CheckpointBounds, open_view, read_head, write_checkpoint};
    let (_dir, store) = store().await;
    let (volume, known) = volume_with_points(&store, 8).await;
    let mut view = open_view(&store, &volume.header).await.expect("a view");
    write_checkpoint(&store, &mut view, &volume.clock, CheckpointBounds::default()).await.expect("a checkpoint");
    let collection = Collection::plan(&store, &volume.header, options(FAR), keep(&known, &[2])).await.expect("a plan");
    collection.apply(&volume.clock).await.expect("collected");
    let mut view = open_view(&store, &volume.header).await.expect("a view");
    assert_eq!(view.points.iter().map(|point| point.id).collect::<Vec<_>>(), [known[2].0, known[7].0]);
    let late = Collection::plan(&store, &volume.header, options(FAR), keep(&known, &[2])).await.expect("a plan");
    late.apply(&volume.clock).await.expect("collected");
    write_checkpoint(&store, &mut view, &volume.clock, CheckpointBounds::default()).await.expect("a checkpoint");
    let (head, _) = read_head(&store, &volume.header, view.checkpoint_at).await.expect("its head");
    assert!(head.pages.is_some() && !head.segments.is_empty());
    for segment in &head.segments {
        assert_eq!(store.size(&segment.path).await.expect("it is there"), segment.size);
    }
}
