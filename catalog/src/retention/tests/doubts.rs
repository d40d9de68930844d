//! Doubts that a review of collection had: each tries to break it in one way.

use super::*;
use crate::volume::log::LogError;

fn all(points: &[DatedPoint]) -> HashSet<CloseId> {
    points.iter().map(|dated| dated.point.id).collect()
}

async fn collected(store: &Store, volume: &FixtureVolume, options: CollectOptions) -> Collected {
    let collection = Collection::plan(store, &volume.header, options, all).await.expect("a plan");
    collection.apply(&volume.clock).await.expect("collected")
}

/// Of two segments under way, the entry that the writer follows for the sake of the first condemns the second.
#[tokio::test]
async fn a_segment_that_was_condemned_before_an_earlier_entry_was_made_is_refused_all_the_same() {
    let (_dir, store) = store().await;
    let (mut volume, known) = volume_with_points(&store, 2).await;
    let content = change(&known[1].1, 5, 7);
    let records = volume.seal(&content);
    let (early, epochs) = volume.prepare(records.clone(), Some(Consistency::Crash)).await;
    let done = collected(&store, &volume, options(FAR)).await;
    assert_eq!(done.condemned, 1, "what the sleeping writer stored");
    // An entry that names nothing that was condemned goes through, and the writer follows the collector's for it.
    volume.log.append(Vec::new(), Vec::new()).await.expect("the writer owns the log");
    for attempt in 0..2 {
        let late = volume.log.append(early.clone(), epochs.clone()).await;
        let refused = matches!(&late, Err(LogError::Condemned { path, .. }) if *path == early[0].path);
        assert!(refused, "attempt {attempt}: {late:?}");
    }
    // It is deleted, and the same records under a fresh name commit and read.
    assert_eq!(collected(&store, &volume, options(UnixMillis(FAR.0 * 2))).await.deleted, 1);
    let close = volume.commit(records, Some(Consistency::Crash)).await;
    let history = History::read(&store, &volume.header).await.expect("a log");
    let at = history.find(close.id()).expect("an epoch");
    assert_eq!(read_point(&store, &history, &volume.data_key, at).await, Ok(content));
}

/// The policy was changed between two plans that were made of one log.
#[tokio::test]
async fn collectors_that_keep_different_points_of_one_log_lose_nothing_that_is_still_offered() {
    for first in 0..2 {
        let (_dir, store) = store().await;
        let (volume, known) = volume_with_points(&store, 9).await;
        let kept = [[1, 4, 6], [2, 4, 7]];
        let plan = |which: usize| Collection::plan(&store, &volume.header, options(FAR), keep(&known, &kept[which]));
        let mut plans = [Some(plan(0).await.expect("a plan")), Some(plan(1).await.expect("a plan"))];
        plans[first].take().expect("planned").apply(&volume.clock).await.expect("collected");
        let mut offered = kept[first].to_vec();
        offered.push(8);
        check(&store, &volume, &known, &offered).await;
        plans[1 - first].take().expect("planned").apply(&volume.clock).await.expect("collected");
        // What the first one kept and the second did not has expired by now.
        check(&store, &volume, &known, &[4, 8]).await;
        let late = Collection::plan(&store, &volume.header, options(UnixMillis(FAR.0 * 2)), keep(&known, &[4])).await;
        late.expect("a plan").apply(&volume.clock).await.expect("collected");
        check(&store, &volume, &known, &[4, 8]).await;
    }
}

/// A collector that planned, and slept until others had collected twice and deleted what they gave up.
#[tokio::test]
async fn a_collector_that_wakes_after_others_collected_and_deleted_breaks_nothing() {
    let (_dir, store) = store().await;
    let (mut volume, mut known) = volume_with_points(&store, 10).await;
    let slept = Collection::plan(&store, &volume.header, options(FAR), keep(&known, &[3])).await.expect("a plan");
    assert!(!slept.planned().rewrites.is_empty());
    for round in 1..4 {
        let now = UnixMillis(FAR.0 + round * 7_200_000);
        let other = Collection::plan(&store, &volume.header, options(now), keep(&known, &[3, 5])).await;
        other.expect("a plan").apply(&volume.clock).await.expect("collected");
        let content = change(&known.last().expect("some").1, 20, 100 + round.unsigned_abs());
        known.push((volume.capture(&content, Some(Consistency::Crash)).await.id(), content));
    }
    // Its old segments are gone, which it may say; it may not make it worse.
    match slept.apply(&volume.clock).await {
        Ok(done) => assert_eq!(done.replaced, 0, "{done:?}"),
        Err(CollectError::Segment(error)) => assert!(error.bad_object().is_some(), "{error}"),
        Err(CollectError::Store(error)) => assert!(error.is_not_found(), "{error}"),
        Err(other) => panic!("{other}"),
    }
    let history = History::read(&store, &volume.header).await.expect("a log");
    let offered: Vec<CloseId> = history.points().iter().map(|point| point.id).collect();
    assert!(offered.contains(&known[12].0) && offered.contains(&known[3].0));
    for (close, content) in known.iter().filter(|(close, _)| offered.contains(close)) {
        let at = history.find(*close).expect("an epoch");
        assert!(read_point(&store, &history, &volume.data_key, at).await.as_ref() == Ok(content));
    }
}

/// The stretch of a point that was kept from before the disk grew is of another size than the newest state's.
#[tokio::test]
async fn a_point_from_before_the_disk_grew_reads_after_collections() {
    let (_dir, store) = store().await;
    let (mut volume, mut known) = volume_with_points(&store, 5).await;
    for (turn, blocks) in [(0, 9_usize), (1, 12)] {
        let mut content = known.last().expect("some").1.clone();
        content.resize(blocks * BLOCK_BYTES + 1000, 0);
        volume.grow(content.len() as u64).await;
        for seed in 0..4 {
            content = change(&content, 60, 1000 * turn + seed);
            known.push((volume.capture(&content, Some(Consistency::Crash)).await.id(), content.clone()));
        }
    }
    let mut now = FAR;
    for kept in [vec![2, 6, 9, 10], vec![2, 6, 10], vec![2, 10], vec![2]] {
        let plan = Collection::plan(&store, &volume.header, options(now), keep(&known, &kept)).await.expect("a plan");
        plan.apply(&volume.clock).await.expect("collected");
        let mut offered = kept.clone();
        offered.push(12);
        check(&store, &volume, &known, &offered).await;
        now = UnixMillis(now.0 + 7_200_000);
    }
    let end = Collection::plan(&store, &volume.header, options(now), keep(&known, &[2])).await.expect("a plan");
    assert!(end.apply(&volume.clock).await.expect("collected").deleted > 0);
    check(&store, &volume, &known, &[2, 12]).await;
}

/// The store lists an entry with a time that its own clock has not reached: it ran ahead once.
#[tokio::test]
async fn a_store_whose_clock_ran_ahead_once_gives_up_nothing_until_it_is_later() {
    let (dir, store) = store().await;
    let (volume, known) = volume_with_points(&store, 4).await;
    let policy = "latest 1".parse().expect("a policy");
    crate::retention::policy_object::write(&store, volume.header.volume, &policy).await.expect("set");
    let entry = crate::volume::paths::log_entry(volume.header.volume, common::ids::LogSeq(3));
    let file = std::fs::File::open(dir.path().join("store").join(entry)).expect("the entry");
    let ahead = Clock::System.now().0.unsigned_abs() / 1000 + 3 * 86_400;
    file.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(ahead)).expect("set");
    let request = CollectRequest {
        grace: Duration::ZERO,
        time: crate::retention::store_time::StoreTime::Asked(Clock::System),
        collector: ReceiverId([9; 16]),
        memory_bytes: COLLECT_MEMORY_BYTES,
        dry_run: false,
    };
    let error = crate::retention::collect(&store, &volume.header, &request, &volume.clock).await.expect_err("no time");
    assert!(error.to_string().contains("runs backwards"), "{error}");
    check(&store, &volume, &known, &[0, 1, 2, 3]).await;
}
