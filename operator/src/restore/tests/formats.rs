//! qcow2 and VHD as QEMU's own tools see them, and reading back.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::restore::image::Format;

/// What `qemu-img` prints.
fn qemu_img(arguments: &[&str], files: &[&Path]) -> String {
    let output = Command::new("qemu-img").args(arguments).args(files).output().expect("make test-deps installs it");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{arguments:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

fn info(format: &str, file: &Path) -> serde_json::Value {
    serde_json::from_str(&qemu_img(&["info", "--output=json", "-f", format], &[file])).expect("JSON")
}

/// Lets QEMU judge a restored file: sound, and the same bytes as `content`.
fn judge(world: &World, format: Format, file: &Path, content: &[u8]) {
    let raw = world.path("expected.raw");
    std::fs::write(&raw, content).expect("writable");
    let (len, rounded) = (content.len() as u64, (content.len() as u64).next_multiple_of(512));
    if format == Format::Qcow2 {
        let check: serde_json::Value =
            serde_json::from_str(&qemu_img(&["check", "--output=json", "-f", "qcow2"], &[file])).expect("JSON");
        for bad in ["leaks", "corruptions", "check-errors"] {
            assert!(check[bad].as_u64().unwrap_or(0) == 0, "{check}");
        }
        assert_eq!(info("qcow2", file)["virtual-size"].as_u64(), Some(rounded));
        qemu_img(&["compare", "-f", "raw", "-F", "qcow2"], &[&raw, file]);
    } else {
        assert_eq!(info("vpc", file)["virtual-size"].as_u64(), Some(len.next_multiple_of(1 << 20)));
        qemu_img(&["compare", "-f", "raw", "-F", "vpc"], &[&raw, file]);
        assert_eq!(std::fs::metadata(file).expect("there").len(), len.next_multiple_of(1 << 20) + 512);
    }
}

#[tokio::test]
async fn each_format_is_what_qemu_takes_for_it_and_holds_the_disk() {
    for disk in [1, DISK, 65_536 * 40] {
        let world = World::new().await;
        let mut volume = FixtureVolume::create(&world.store, "web", "root", disk as u64).await;
        volume.segments_per_epoch = 2;
        let first = image(disk, 1);
        volume.capture(&first, Some(Consistency::Crash)).await;
        let second = change(&first, 9, 2);
        volume.capture(&second, Some(Consistency::Crash)).await;
        for (format, verify) in [(Format::Qcow2, false), (Format::Vhd, true), (Format::Qcow2, true)] {
            let to = world.path(&format!("{disk}-{verify}.{}", format.extension()));
            let request = RestoreRequest { format, verify, ..world.restore_request(&volume, "latest", &to) };
            let report = restore(&world, &request).await.expect("restored");
            assert_eq!(
                (report["format"].as_str(), report["verified"].as_bool()),
                (Some(format.as_str()), Some(verify))
            );
            judge(&world, format, &to, &second);
        }
    }
}

#[tokio::test]
async fn a_disk_of_zeros_and_a_large_one_with_little_on_it_take_next_to_no_space() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", 192 << 20).await;
    let mut content = vec![0; 192 << 20];
    for (format, at) in [(Format::Qcow2, None), (Format::Qcow2, Some(100 << 20)), (Format::Vhd, Some((192 << 20) - 1))]
    {
        if let Some(at) = at {
            content[at] = 1;
        }
        volume.capture(&content, Some(Consistency::Crash)).await;
        let to = world.path(&format!("{at:?}.{}", format.extension()));
        let request = RestoreRequest { format, verify: true, ..world.restore_request(&volume, "latest", &to) };
        restore(&world, &request).await.expect("restored");
        judge(&world, format, &to, &content);
        let used = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&to).expect("there")) * 512;
        assert!(used < 1 << 20, "{used} bytes used by {format:?}");
    }
}

#[tokio::test]
async fn the_same_restore_gives_the_same_file() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    volume.capture(&image(DISK, 1), Some(Consistency::Crash)).await;
    for format in [Format::Qcow2, Format::Vhd] {
        let mut files = Vec::new();
        for turn in 0..2 {
            let to = world.path(&format!("{turn}.{}", format.extension()));
            let request = RestoreRequest { format, ..world.restore_request(&volume, "latest", &to) };
            restore(&world, &request).await.expect("restored");
            files.push(std::fs::read(to).expect("there"));
        }
        assert!(files[0] == files[1], "{format:?}");
    }
}

/// Restores once the threads of a failed restore in this process have let go of the target.
async fn again(world: &World, request: &RestoreRequest) -> Result<serde_json::Value, OperatorError> {
    let deadline = Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let restored = restore(world, request).await;
        let busy = matches!(restored, Err(OperatorError::Restore(RestoreError::Target(TargetError::Busy { .. }))));
        if !busy || Instant::now() > deadline {
            return restored;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn what_an_interrupted_restore_had_written_is_kept_for_its_own_format_only_and_verified() {
    let world = World::new().await;
    // More than one item of 4 MiB, so that something can be done before something fails.
    let disk = 24_usize << 20;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", disk as u64).await;
    volume.segments_per_epoch = 2;
    let content: Vec<u8> = {
        let mut content = vec![0; disk];
        blake3::Hasher::new().finalize_xof().fill(&mut content);
        content
    };
    volume.capture(&content, Some(Consistency::Crash)).await;
    let segments: Vec<_> = world.objects().into_iter().filter(|(path, _)| path.contains("/segments/")).collect();
    let history = History::read(&world.store, &volume.header).await.expect("readable");
    let last = &history.segments[1];
    let (_, file) = segments.iter().find(|(path, _)| *path == last.path).expect("there");
    let good = std::fs::read(file).expect("readable");
    let mut bad = good.clone();
    // A record near the end of the last segment: all before it are written by then.
    let index = usize::try_from(last.index_offset).expect("small");
    bad[index - 100] ^= 1;
    for (format, other) in [(Format::Qcow2, Format::Raw), (Format::Vhd, Format::Qcow2), (Format::Raw, Format::Vhd)] {
        let to = world.path(&format!("interrupted.{}", format.extension()));
        let mut request = RestoreRequest { format, verify: true, ..world.restore_request(&volume, "latest", &to) };
        std::fs::write(file, &bad).expect("writable");
        restore(&world, &request).await.expect_err("damaged");
        assert!(!to.exists());
        std::fs::write(file, &good).expect("writable");
        request.format = other;
        let error = again(&world, &request).await.expect_err("another format").to_string();
        assert!(error.contains("left from another restore"), "{error}");
        request.format = format;
        again(&world, &request).await.expect("restored");
        match format {
            Format::Raw => assert!(std::fs::read(&to).expect("there") == content),
            _ => judge(&world, format, &to, &content),
        }
    }
}

#[tokio::test]
async fn a_target_that_does_not_keep_what_is_written_is_noticed_and_written_again() {
    let world = World::new().await;
    let mut volume = FixtureVolume::create(&world.store, "web", "root", DISK as u64).await;
    let content = image(DISK, 1);
    volume.capture(&content, Some(Consistency::Crash)).await;
    let source = PointSource::open(
        &world.store,
        &volume.header.volume.to_string(),
        &"latest".parse().expect("a point"),
        &world.key_file(&volume),
    )
    .await
    .expect("a point");
    let point = source.point;
    let plan = Arc::new(plan_window(&source, 0).await.expect("whole"));
    let data = plan.records.iter().map(|record| record.page_at(record.live.iter().next().expect("one"))).max();
    let zero = plan.zero_ranges(true).map(|range| range.start).max();
    // Both ways of comparing, by hash and by opening once more, notice both kinds of damage.
    for (damaged, resumed) in [(data, false), (data, true), (zero, false), (zero, true)] {
        let at = damaged.expect("the image has both");
        let to = world.path(&format!("{at}-{resumed}.img"));
        let wanted = RestoreState::new(volume.header.volume, point.id, DISK as u64, Format::Raw);
        let planned =
            Image::plan(Format::Raw, DISK as u64, ClusterMap::default(), point.id, point.cut_time).expect("fits");
        let (target, mut state) = Target::open(&to, &wanted, planned, false, &world.path("state")).expect("open");
        state.enter(0, plan.digest(), plan.items.len());
        let budget = Budget::new(MemoryTable::new(64 << 20)).expect("enough");
        let hidden = || Arc::new(Progress::hidden());
        let history = Arc::clone(&source.history);
        let opener = RecordOpener::new(Arc::clone(&history), source.data_key.clone());
        let fetcher = Arc::new(Fetcher::new(world.store.clone(), opener, history, Arc::new(target), budget, hidden()));
        let sums = Arc::new(Sums::new(plan.records.len()));
        fetcher.run(&plan, &mut state, (!resumed).then_some(&sums)).await.expect("restored");
        read_back(&fetcher, &plan, &mut state, &sums, &hidden()).await.expect("as written");
        let partial = state::with_suffix(&to, target::PARTIAL_SUFFIX);
        let file = std::fs::File::options().write(true).open(partial).expect("there");
        file.write_all_at(&[0xa5], at).expect("writable");
        let error = read_back(&fetcher, &plan, &mut state, &sums, &hidden()).await.expect_err("altered").to_string();
        assert!(error.contains("does not hold what was written"), "{error}");
        assert!(!state.done.contains(&true), "it is written again by the next run");
    }
}
