use std::os::unix::fs::MetadataExt as _;

use catalog::volume::fixture::{FixtureVolume, change, image};
use catalog::volume::history::History;
use common::clock::UnixMillis;
use common::format::close::Consistency;
use common::ops::exit::ExitCode;
use common::seal::keyfile::KeyFile;
use proptest::prelude::*;

use super::*;
use crate::testing::{World, wanted};

mod formats;

const DISK: usize = 5 * 262_144 + 3 * 4096 + 777;

async fn restore(world: &World, request: &RestoreRequest) -> Result<serde_json::Value, OperatorError> {
    let mut out = Vec::new();
    run(&world.store, request, &mut out).await?;
    Ok(serde_json::from_slice(&out).expect("JSON"))
}

#[tokio::test]
async fn each_point_restores_to_the_exact_bytes_of_its_cut() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    volume.segments_per_epoch = 3;
    let first = image(DISK, 1);
    let second = change(&first, 12, 2);
    let third = change(&second, 7, 3);
    let one = volume.capture(&first, Some(Consistency::Crash)).await;
    volume.capture(&second, None).await;
    let three = volume.capture(&third, Some(Consistency::Filesystem)).await;
    for (close, content) in [(one, first), (three, third)] {
        let to = world.path(&format!("{}.img", close.statement().epoch));
        let mut request = world.restore_request(&volume, "latest", &to);
        request.point = wanted(&close);
        let report = restore(&world, &request).await.expect("restored");
        assert!(std::fs::read(&to).expect("there") == content, "epoch {}", close.statement().epoch);
        assert_eq!((report["bytes"].as_u64(), report["resumed"].as_bool()), (Some(DISK as u64), Some(false)));
        assert_eq!(report["head"], volume.head().to_string());
        assert!(!to.with_extension("img.blockferry-partial").exists());
        assert!(!to.with_extension("img.blockferry-partial.state").exists());
    }
}

#[tokio::test]
async fn zero_pages_take_no_space_in_a_file() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", 64 << 20).await;
    let mut content = vec![0; 64 << 20];
    content[40 << 20] = 1;
    volume.capture(&content, Some(Consistency::Crash)).await;
    let to = world.path("sparse.img");
    restore(&world, &world.restore_request(&volume, "latest", &to)).await.expect("restored");
    let metadata = std::fs::metadata(&to).expect("there");
    assert_eq!(metadata.len(), 64 << 20);
    assert!(metadata.blocks() * 512 < 1 << 20, "{} bytes used", metadata.blocks() * 512);
    assert!(std::fs::read(&to).expect("there") == content);
}

#[tokio::test]
async fn after_the_disk_grew_each_point_has_its_own_size() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", 300_000).await;
    let small = image(300_000, 1);
    let one = volume.capture(&small, Some(Consistency::Crash)).await;
    volume.resize(700_001).await;
    let large = image(700_001, 2);
    let two = volume.capture(&large, Some(Consistency::Crash)).await;
    for (close, content) in [(one, small), (two, large)] {
        let to = world.path(&format!("{}.img", content.len()));
        let mut request = world.restore_request(&volume, "latest", &to);
        request.point = wanted(&close);
        restore(&world, &request).await.expect("restored");
        assert!(std::fs::read(&to).expect("there") == content);
    }
}

#[tokio::test]
async fn a_disk_that_grew_is_restored_from_records_of_both_its_sizes() {
    // The last page of the smaller disk is partial; what lies behind its end stays zero, or does not.
    for (seed, behind_the_end) in [(1, 0), (2, 7)] {
        let world = World::new().await;
        let mut volume = FixtureVolume::create(&world.store, "web", "root", 300_001).await;
        let small = image(300_001, seed);
        let one = volume.capture(&small, Some(Consistency::Crash)).await;
        volume.grow(1_700_001).await;
        let mut large = small.clone();
        large.resize(1_700_001, 0);
        large[300_001] = behind_the_end;
        large[900_000] = 1;
        let two = volume.capture(&large, Some(Consistency::Crash)).await;
        assert!(two.statement().data_pages < 4, "{} pages were sent again", two.statement().data_pages);
        large[5000] ^= 1;
        let three = volume.capture(&large, Some(Consistency::Crash)).await;
        large[5000] ^= 1;
        for (close, content) in [(one, &small), (two, &large)] {
            let to = world.path(&format!("{}.img", content.len()));
            let mut request = world.restore_request(&volume, "latest", &to);
            request.point = wanted(&close);
            restore(&world, &request).await.expect("restored");
            assert!(std::fs::read(&to).expect("there") == *content, "{} bytes", content.len());
        }
        let mut out = Vec::new();
        crate::verify::run(&world.store, &world.verify_request(&volume, true), &mut out).await.expect("good");
        let report: serde_json::Value = serde_json::from_slice(&out).expect("JSON");
        assert_eq!((report["points"].as_u64(), report["head"].as_str()), (Some(3), Some(&*three.id().to_string())));
    }
}

#[tokio::test]
async fn the_wrong_key_writes_nothing() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    volume.capture(&image(DISK, 1), Some(Consistency::Crash)).await;
    let to = world.path("out.img");
    let request = world.restore_request(&volume, "latest", &to);
    let same_id_other_key = {
        let text = volume.key_file.encode();
        let id = text.lines().nth(1).and_then(|line| line.strip_prefix("id: ")).expect("an id").to_owned();
        let mut bytes = [0; 16];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&id[index * 2..index * 2 + 2], 16).expect("hex");
        }
        KeyFile::from_random(bytes, [1; 32])
    };
    for key_file in [KeyFile::from_random([9; 16], [9; 32]), same_id_other_key] {
        std::fs::write(&request.key_file, key_file.encode().as_bytes()).expect("writable");
        let error = restore(&world, &request).await.expect_err("the wrong key");
        assert!(matches!(error, OperatorError::Key(_)), "{error}");
        assert!(error.to_string().contains("blockferry.key"), "{error}");
    }
    std::fs::write(&request.key_file, "blockferry-key v1\nrubbish\n").expect("writable");
    assert!(matches!(restore(&world, &request).await, Err(OperatorError::Key(_))));
    std::fs::remove_file(&request.key_file).expect("removed");
    assert!(matches!(restore(&world, &request).await, Err(OperatorError::Key(_))));
    let left: Vec<_> =
        std::fs::read_dir(world.dir.path()).expect("a folder").map(|e| e.expect("one").file_name()).collect();
    assert_eq!(left, ["store"], "nothing was written");
}

#[tokio::test]
async fn an_incomplete_point_is_refused_before_anything_is_written() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    volume.left_out = vec![70];
    volume.capture(&image(DISK, 1), Some(Consistency::Crash)).await;
    let to = world.path("out.img");
    let error = restore(&world, &world.restore_request(&volume, "latest", &to)).await.expect_err("incomplete");
    assert!(error.to_string().contains("web/root") && error.to_string().contains(&(70 * 4096).to_string()), "{error}");
    assert!(!to.exists() && !state::with_suffix(&to, target::PARTIAL_SUFFIX).exists());
}

#[tokio::test]
async fn an_existing_file_is_replaced_only_with_force() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    let content = image(DISK, 1);
    volume.capture(&content, Some(Consistency::Crash)).await;
    let to = world.path("out.img");
    std::fs::write(&to, "precious").expect("writable");
    let mut request = world.restore_request(&volume, "latest", &to);
    let error = restore(&world, &request).await.expect_err("exists");
    assert!(error.to_string().contains("out.img") && error.to_string().contains("--force"), "{error}");
    assert_eq!(std::fs::read(&to).expect("there"), b"precious");
    request.force = true;
    restore(&world, &request).await.expect("replaced");
    assert!(std::fs::read(&to).expect("there") == content);

    request.to = world.dir.path().into();
    assert!(restore(&world, &request).await.expect_err("a folder").to_string().contains("a folder"));
    request.to = world.path("missing/out.img");
    assert!(restore(&world, &request).await.expect_err("no folder").to_string().contains("missing/out.img"));
}

#[tokio::test]
async fn a_partial_file_of_another_point_is_not_taken_over() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    let content = image(DISK, 1);
    volume.capture(&content, Some(Consistency::Crash)).await;
    let to = world.path("out.img");
    let partial = state::with_suffix(&to, target::PARTIAL_SUFFIX);
    std::fs::write(&partial, "left over").expect("writable");
    let mut request = world.restore_request(&volume, "latest", &to);
    let error = restore(&world, &request).await.expect_err("left over");
    assert!(error.to_string().contains("blockferry-partial"), "{error}");
    // While somebody holds it, force does not help.
    let held = std::fs::File::open(&partial).expect("there");
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).expect("locked");
    request.force = true;
    assert!(restore(&world, &request).await.expect_err("held").to_string().contains("another restore"));
    drop(held);
    restore(&world, &request).await.expect("started over");
    assert!(std::fs::read(&to).expect("there") == content);
}

#[tokio::test]
async fn a_dry_run_writes_nothing_and_tells_what_it_would_do() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    volume.capture(&image(DISK, 1), Some(Consistency::Crash)).await;
    let to = world.path("out.img");
    let mut request = world.restore_request(&volume, "latest", &to);
    request.dry_run = true;
    let report = restore(&world, &request).await.expect("planned");
    assert_eq!((report["dry_run"].as_bool(), report["bytes"].as_u64()), (Some(true), Some(DISK as u64)));
    assert!(report["fetch_bytes"].as_u64() > Some(1000));
    assert!(!to.exists() && !world.path("state").exists());
}

#[tokio::test]
async fn a_fuzzy_point_is_restored_only_when_asked_for() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    let content = image(DISK, 1);
    volume.clock.set(UnixMillis(1_000));
    volume.capture(&content, Some(Consistency::Fuzzy)).await;
    let to = world.path("out.img");
    let error = restore(&world, &world.restore_request(&volume, "latest", &to)).await.expect_err("only fuzzy");
    assert!(error.to_string().contains("latest-any"), "{error}");
    assert_eq!(error.exit(), ExitCode::Failed);
    restore(&world, &world.restore_request(&volume, "latest-any", &to)).await.expect("asked for");
    assert!(std::fs::read(&to).expect("there") == content);
}

#[tokio::test]
async fn a_flipped_byte_in_a_needed_segment_is_named_and_no_file_of_that_name_appears() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    volume.capture(&image(DISK, 1), Some(Consistency::Crash)).await;
    let (path, file) = world.objects().into_iter().find(|(path, _)| path.contains("/segments/")).expect("a segment");
    let good = std::fs::read(&file).expect("there");
    let fails = async |name: &str| {
        // A new name each time: a restore that is run again rightly keeps what it had finished.
        let to = world.path(name);
        let error = restore(&world, &world.restore_request(&volume, "latest", &to)).await.expect_err(name);
        assert!(error.to_string().contains(&path), "{name}: {error}");
        assert!(!to.exists());
    };
    for at in [16, 60, 200, good.len() / 2, good.len() - 100, good.len() - 20] {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        std::fs::write(&file, &bad).expect("writable");
        fails(&format!("flipped-{at}.img")).await;
    }
    std::fs::write(&file, &good[..good.len() - 1]).expect("writable");
    fails("truncated.img").await;
    std::fs::remove_file(&file).expect("removed");
    fails("missing.img").await;
}

#[tokio::test]
async fn a_record_of_an_older_epoch_spliced_into_a_newer_index_is_not_taken() {
    // The store's owner copies an older segment over a newer one: the log's reference tells them apart.
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    let first = image(DISK, 1);
    volume.capture(&first, Some(Consistency::Crash)).await;
    volume.capture(&image(DISK, 2), Some(Consistency::Crash)).await;
    let history = History::read(&world.store, &volume.header).await.expect("readable");
    let (old, new) = (&history.segments[0].path, &history.segments[1].path);
    let bytes = world.store.get(old).await.expect("there");
    world.store.put_new(new, bytes).await.expect("put");
    let to = world.path("out.img");
    let error = restore(&world, &world.restore_request(&volume, "latest", &to)).await.expect_err("replaced");
    assert!(error.to_string().contains(new.as_str()), "{error}");
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn restoring_what_was_captured_gives_what_was_written(
        bytes in 1_usize..700_000,
        epochs in proptest::collection::vec((0_usize..20, any::<u64>(), 0_u8..3, 1_usize..4), 1..7),
    ) {
        runtime().block_on(async {
            let world = World::new().await;
            let mut volume = FixtureVolume::create(&world.store, "web", "root", bytes as u64).await;
            let mut content = image(bytes, epochs[0].1);
            let mut points = Vec::new();
            for (changes, seed, point, segments) in epochs {
                volume.segments_per_epoch = segments;
                let point = [None, Some(Consistency::Crash), Some(Consistency::Fuzzy)][usize::from(point)];
                let close = volume.capture(&content, point).await;
                if point.is_some() {
                    points.push((close, content.clone()));
                }
                content = change(&content, changes, seed);
            }
            for (close, content) in points {
                let to = world.path(&format!("{}.img", close.statement().epoch));
                let mut request = world.restore_request(&volume, "latest", &to);
                request.point = wanted(&close);
                restore(&world, &request).await.expect("restored");
                assert!(std::fs::read(&to).expect("there") == content, "epoch {}", close.statement().epoch);
            }
        });
    }
}
