use catalog::volume::checkpoint::{CheckpointBounds, write_checkpoint};
use catalog::volume::fixture::{FixtureVolume, change, image};
use catalog::volume::{open_view, paths};
use common::clock::Clock;
use common::format::close::Consistency;
use common::format::envelope::Kind;
use common::ids::LogSeq;

use super::*;
use crate::testing::World;

const DISK: usize = 2 * 262_144 + 5000;

/// A store with two points, a checkpoint in between and an object of the fleet.
async fn world() -> (World, FixtureVolume) {
    let world = World::new().await;
    let fleet = Kind { what: "authority", magic: *b"BFAUTHOR", version: 1, body_bytes_max: 100 };
    world.store.put_new("v1/authority/authority", fleet.seal(b"sealed").into()).await.expect("put");
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    volume.segments_per_epoch = 2;
    let first = image(DISK, 1);
    volume.capture(&first, Some(Consistency::Crash)).await;
    let mut view = open_view(&world.store, &volume.header).await.expect("readable");
    write_checkpoint(&world.store, &mut view, &Clock::System, CheckpointBounds::default()).await.expect("written");
    volume.capture(&change(&first, 9, 2), Some(Consistency::Crash)).await;
    (world, volume)
}

async fn verify(world: &World, request: &VerifyRequest) -> Result<serde_json::Value, OperatorError> {
    let mut out = Vec::new();
    run(&world.store, request, &mut out).await?;
    Ok(serde_json::from_slice(&out).expect("JSON"))
}

#[tokio::test]
async fn a_good_volume_is_good_with_and_without_the_key() {
    let (world, volume) = world().await;
    let without = verify(&world, &world.verify_request(&volume, false)).await.expect("good");
    let with = verify(&world, &world.verify_request(&volume, true)).await.expect("good");
    assert_eq!(without["records_opened"], 0);
    assert_eq!(with["records_opened"], with["records"]);
    assert!(with["records"].as_u64() > Some(3));
    assert_eq!(
        (with["points"].as_u64(), with["segments"].as_u64(), with["log_entries"].as_u64()),
        (Some(2), Some(4), Some(3))
    );
    // Every object in the store was read: header, claim, fleet object, 3 log entries, checkpoint, 4 segments.
    assert_eq!(with["objects"].as_u64(), Some(world.objects().len() as u64));
    assert_eq!(with["head"], volume.head().to_string());
    let bytes: u64 = world.objects().iter().map(|(_, file)| file.metadata().expect("there").len()).sum();
    assert_eq!(with["bytes"].as_u64(), Some(bytes), "every byte was read");
}

#[tokio::test]
async fn a_flipped_byte_in_any_object_is_found_and_the_object_named() {
    let (world, volume) = world().await;
    let mut flips = 0;
    for (path, file) in world.objects() {
        let good = std::fs::read(&file).expect("there");
        // Every byte of small objects would take minutes with segments read each time: every byte of the first and last
        // hundred, and a prime step in between.
        let step = if path.contains("/segments/") { 4999 } else { 13 };
        let places = (0..good.len()).filter(|at| (*at < 40 || good.len() - at <= 40) && at % 3 == 0 || at % step == 0);
        for at in places {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            std::fs::write(&file, &bad).expect("writable");
            let error = verify(&world, &world.verify_request(&volume, false)).await.expect_err("damaged");
            assert!(error.to_string().contains(&path), "{path} byte {at}: {error}");
            assert_eq!(error.exit(), common::ops::exit::ExitCode::Failed);
            flips += 1;
        }
        std::fs::write(&file, &good).expect("writable");
    }
    assert!(flips > 300, "{flips}");
    verify(&world, &world.verify_request(&volume, true)).await.expect("good again");
}

#[tokio::test]
async fn a_missing_or_truncated_object_is_named() {
    let (world, volume) = world().await;
    for (path, file) in world.objects() {
        let good = std::fs::read(&file).expect("there");
        // What may be missing: the newest entry (nobody here witnesses it), a checkpoint, a name, the fleet's objects.
        let entry = |seq| paths::log_entry(volume.header.volume, LogSeq(seq));
        let optional = path == entry(3) || path.contains("/checkpoints/") || path.starts_with("v1/authority");
        std::fs::write(&file, &good[..good.len() - 1]).expect("writable");
        let error = verify(&world, &world.verify_request(&volume, false)).await.expect_err("truncated");
        assert!(error.to_string().contains(&path), "{path}: {error}");
        std::fs::remove_file(&file).expect("removed");
        if !optional {
            let error = verify(&world, &world.verify_request(&volume, false)).await.expect_err("missing");
            let header = path.ends_with("/header");
            assert!(
                error.to_string().contains(&path) || header && error.to_string().contains("header"),
                "{path}: {error}"
            );
        }
        std::fs::write(&file, &good).expect("writable");
    }
}

#[tokio::test]
async fn all_bad_objects_are_named_at_once() {
    let (world, volume) = world().await;
    let mut expected = Vec::new();
    for (path, file) in world.objects() {
        if path.contains("/segments/")
            || path.ends_with("log/00000000000000000002")
            || path.contains("authority/authority")
        {
            let mut bytes = std::fs::read(&file).expect("there");
            let at = bytes.len() / 2;
            bytes[at] ^= 1;
            std::fs::write(&file, bytes).expect("writable");
            expected.push(path);
        }
    }
    let error = verify(&world, &world.verify_request(&volume, false)).await.expect_err("damaged").to_string();
    // The first point's segments are known from its log entry alone, which is bad itself.
    let named: Vec<_> = expected.iter().filter(|path| error.contains(path.as_str())).collect();
    assert_eq!(named.len(), expected.len() - 2, "{error}\n{expected:?}");
    assert!(error.contains("log/00000000000000000002") && error.contains("v1/authority/authority"), "{error}");
}

#[tokio::test]
async fn a_log_without_its_newest_entry_is_noticed_by_whoever_knows_the_head() {
    let (world, volume) = world().await;
    let mut request = world.verify_request(&volume, false);
    request.expect_head = Some(volume.head());
    verify(&world, &request).await.expect("the head is there");
    world.store.delete(&paths::log_entry(volume.header.volume, LogSeq(3))).await.expect("deleted");
    let report = verify(&world, &world.verify_request(&volume, false)).await.expect("nobody knows better");
    assert_eq!(report["unreferenced"].as_u64(), Some(2));
    let error = verify(&world, &request).await.expect_err("a witness");
    assert!(matches!(error, OperatorError::Verify(VerifyError::HeadMissing { .. })), "{error}");
}

#[tokio::test]
async fn a_point_of_which_pages_were_never_sent_is_bad() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    volume.left_out = vec![3];
    volume.capture(&image(DISK, 1), Some(Consistency::Crash)).await;
    let error = verify(&world, &world.verify_request(&volume, false)).await.expect_err("incomplete");
    assert!(error.to_string().contains("log/00000000000000000002"), "{error}");
}

#[tokio::test]
async fn one_point_can_be_verified_alone() {
    let (world, volume) = world().await;
    let history = catalog::volume::history::History::read(&world.store, &volume.header).await.expect("readable");
    let mut request = world.verify_request(&volume, true);
    request.point = Some(crate::testing::wanted(&history.epochs[0].close));
    let report = verify(&world, &request).await.expect("good");
    assert_eq!((report["segments"].as_u64(), report["points"].as_u64()), (Some(2), Some(1)));
    // What a later epoch lost does not concern it.
    world.store.delete(&history.segments[3].path).await.expect("deleted");
    verify(&world, &request).await.expect("good");
    request.point = Some(PointWanted::Latest);
    verify(&world, &request).await.expect_err("the later point needs it");
}

#[tokio::test]
async fn the_wrong_key_is_an_error_of_its_own() {
    let (world, volume) = world().await;
    let request = world.verify_request(&volume, true);
    let other = common::seal::keyfile::KeyFile::from_random([1; 16], [2; 32]);
    std::fs::write(request.key_file.as_ref().expect("a key"), other.encode().as_bytes()).expect("writable");
    assert!(matches!(verify(&world, &request).await, Err(OperatorError::Key(_))));
}

/// A world of three points; the whole log as it was.
async fn three() -> (World, FixtureVolume, Vec<common::ids::CloseId>) {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    let mut content = image(DISK, 1);
    let mut points = Vec::new();
    for seed in 2..5 {
        points.push(volume.capture(&content, Some(Consistency::Crash)).await.id());
        content = change(&content, 3, seed);
    }
    (world, volume, points)
}

/// What `points --json` says of each point.
async fn proofs_of(world: &World) -> (Vec<(String, bool)>, Option<String>) {
    let mut out = Vec::new();
    let error = crate::points::run(&world.store, None, true, &mut out).await.err().map(|error| error.to_string());
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&out).expect("an array");
    let proof =
        |row: &serde_json::Value| (row["proof"].as_str().expect("a word").to_owned(), row["proof_time"].is_string());
    (rows.iter().map(proof).collect(), error)
}

#[tokio::test]
async fn what_was_proven_of_a_point_is_remembered_and_shown() {
    let (world, volume, _) = three().await;
    let all = |word: &str, timed| vec![(word.to_owned(), timed); 3];
    assert_eq!(proofs_of(&world).await, (all("committed", false), None));
    verify(&world, &world.verify_request(&volume, false)).await.expect("good");
    assert_eq!(proofs_of(&world).await, (all("verified", true), None));
    verify(&world, &world.verify_request(&volume, true)).await.expect("good");
    assert_eq!(proofs_of(&world).await, (all("opened", true), None));
    // A weaker proof takes nothing away.
    verify(&world, &world.verify_request(&volume, false)).await.expect("good");
    assert_eq!(proofs_of(&world).await, (all("opened", true), None));
    // Damage of the note is named, and hinders nobody from seeing the points.
    let path = paths::proofs(volume.header.volume);
    world.store.put_new(&path, bytes::Bytes::from_static(b"rubbish")).await.expect("written");
    let error = verify(&world, &world.verify_request(&volume, false)).await.expect_err("damaged").to_string();
    assert!(error.contains(&path), "{error}");
    assert_eq!(proofs_of(&world).await, (all("committed", false), None));
}

#[tokio::test]
async fn only_points_that_are_intact_are_proven_and_the_newest_of_them_is_told() {
    let (world, volume, points) = three().await;
    let history = catalog::volume::history::History::read(&world.store, &volume.header).await.expect("readable");
    let newest = &history.segments[2].path;
    let file = world.path("store").join(newest);
    let good = std::fs::read(&file).expect("there");
    let mut bad = good.clone();
    bad[200] ^= 1;
    for damage in [Some(bad), None] {
        match &damage {
            Some(bad) => std::fs::write(&file, bad).expect("writable"),
            None => std::fs::remove_file(&file).expect("removed"),
        }
        let error = verify(&world, &world.verify_request(&volume, true)).await.expect_err("damaged").to_string();
        assert!(error.contains(newest) && error.contains(&format!("newest intact point: {}", points[1])), "{error}");
        let proven: Vec<String> = proofs_of(&world).await.0.into_iter().map(|(word, _)| word).collect();
        assert_eq!(proven, ["opened", "opened", "committed"]);
        // A restore of the latest names the object, and the point to take instead; that one restores.
        let to = world.path("latest.img");
        let mut out = Vec::new();
        let request = world.restore_request(&volume, "latest", &to);
        let error = crate::restore::run(&world.store, &request, &mut out).await.expect_err("damaged").to_string();
        assert!(error.contains(newest) && error.contains(&format!("--point {}", points[1])), "{error}");
        let _ = std::fs::remove_file(world.path("latest.img.blockferry-partial"));
        let mut request = world.restore_request(&volume, "latest", &world.path(&format!("{}.img", damage.is_some())));
        request.point = PointWanted::Id(points[1].to_string());
        crate::restore::run(&world.store, &request, &mut out).await.expect("intact");
    }
}

#[tokio::test]
async fn a_damaged_record_that_newer_epochs_have_overwritten_spoils_older_points_only() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    let mut points = Vec::new();
    for seed in 1..4 {
        let close = volume.capture(&image(DISK, seed), Some(Consistency::Crash)).await;
        points.push(close.id().to_string());
    }
    let history = catalog::volume::history::History::read(&world.store, &volume.header).await.expect("readable");
    // The first epoch is overwritten nearly everywhere, the second not: the last point may still need either.
    for (number, segment) in history.segments.iter().enumerate() {
        let file = world.path("store").join(&segment.path);
        let good = std::fs::read(&file).expect("there");
        let mut bad = good.clone();
        bad[150] ^= 1;
        std::fs::write(&file, &bad).expect("writable");
        let error = verify(&world, &world.verify_request(&volume, false)).await.expect_err("damaged").to_string();
        std::fs::write(&file, &good).expect("writable");
        for (at, point) in points.iter().enumerate() {
            if error.contains(&format!("newest intact point: {point}")) {
                assert_ne!(at, number, "a point needs its own epoch's records: {error}");
            }
        }
        let expected = if number == 2 { &points[1] } else { &points[2] };
        let all_new = (0..DISK.div_ceil(4096)).all(|page| {
            let of = |seed| image(DISK, seed)[page * 4096..(page * 4096 + 4096).min(DISK)].to_vec();
            of(2) != of(3)
        });
        if number != 1 && (number == 2 || all_new) {
            assert!(error.contains(&format!("newest intact point: {expected}")), "{number}: {error}");
        }
    }
}

#[tokio::test]
async fn points_before_a_missing_log_entry_are_listed_and_restored_by_their_id_alone() {
    let (world, volume, points) = three().await;
    // Entry 1 takes the generation, 2 to 4 are the points'.
    let gone = paths::log_entry(volume.header.volume, LogSeq(3));
    world.store.delete(&gone).await.expect("deleted");
    let error = verify(&world, &world.verify_request(&volume, false)).await.expect_err("missing").to_string();
    assert!(error.contains(&gone) && error.contains(&format!("newest intact point: {}", points[0])), "{error}");
    let (listed, error) = proofs_of(&world).await;
    assert_eq!(listed, [("verified".to_owned(), true)]);
    assert!(error.expect("named").contains(&gone));
    let to = world.path("out.img");
    let mut out = Vec::new();
    for wanted in ["latest", "2030-01-01T00:00:00Z"] {
        let request = world.restore_request(&volume, wanted, &to);
        let error = crate::restore::run(&world.store, &request, &mut out).await.expect_err("a gap").to_string();
        assert!(error.contains(&gone) && error.contains(&format!("--point {}", points[0])), "{error}");
    }
    let request = world.restore_request(&volume, &points[0].to_string(), &to);
    crate::restore::run(&world.store, &request, &mut out).await.expect("before the gap");
    assert!(std::fs::read(&to).expect("there") == image(DISK, 1));
    let request = world.restore_request(&volume, &points[2].to_string(), &world.path("lost.img"));
    crate::restore::run(&world.store, &request, &mut out).await.expect_err("behind the gap");
}

/// An entry of maintenance by which the newest point's segment is replaced by one that says of every record that it was collected:
/// what a faulty collector, or whoever can write the store, could do.
async fn collect_what_is_needed(world: &World, volume: &FixtureVolume) -> String {
    use common::format::log::{LogEntry, Maintenance, Replacement, SegmentRef};
    use common::format::segment::{PREAMBLE_BYTES, VERSION_COLLECTED, preamble_of};
    let history = History::read(&world.store, &volume.header).await.expect("readable");
    let place = *history.epochs.last().expect("epochs").segments.last().expect("segments");
    let old = history.segments[place as usize].clone();
    let mut index = catalog::volume::segment::read_index(&world.store, &old).await.expect("an index");
    index.groups.iter_mut().flat_map(|group| &mut group.entries).for_each(|entry| entry.offset = 0);
    let bytes = [&preamble_of(VERSION_COLLECTED)[..], &index.encode(PREAMBLE_BYTES as u64)].concat();
    let new = SegmentRef {
        path: paths::segment(volume.header.volume, "01COLLECTED"),
        size: bytes.len() as u64,
        digest: common::ids::Digest(*blake3::hash(&bytes).as_bytes()),
        index_offset: PREAMBLE_BYTES as u64,
        ..old.clone()
    };
    world.store.put_new(&new.path, bytes.into()).await.expect("put");
    let seq = LogSeq(history.position.seq.0 + 1);
    let entry = LogEntry {
        volume: volume.header.volume,
        seq,
        generation: history.position.generation,
        writer: common::ids::ReceiverId([7; 16]),
        previous: history.position.digest,
        nonce: common::ids::Nonce([8; 16]),
        written: Clock::System.now(),
        segments: Vec::new(),
        epochs: Vec::new(),
        maintenance: Some(Maintenance {
            replaced: vec![Replacement { new: new.clone(), old: vec![old.path] }],
            ..Maintenance::default()
        }),
    };
    let path = paths::log_entry(volume.header.volume, seq);
    world.store.put_new(&path, entry.encode().into()).await.expect("put");
    new.path
}

#[tokio::test]
async fn a_needed_record_that_is_called_collected_is_named_and_not_restored_as_something_else() {
    let (world, volume) = world().await;
    let path = collect_what_is_needed(&world, &volume).await;
    for with_key in [false, true] {
        let error = verify(&world, &world.verify_request(&volume, with_key)).await.expect_err("a point lacks it");
        assert!(error.to_string().contains(&path), "{error}");
    }
    let key_file = world.verify_request(&volume, true).key_file.expect("a key");
    let source = crate::point::PointSource::open(&world.store, "web/root", &PointWanted::Latest, &key_file).await;
    let source = source.expect("the log is in order");
    let error = source.plan(0..source.geometry.blocks()).await.expect_err("it can't be planned");
    assert!(error.to_string().contains("collected"), "{error}");
}
