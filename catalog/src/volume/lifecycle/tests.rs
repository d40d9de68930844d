//! Names that move, writers that are fenced, and objects that go.

use common::format::close::Consistency;

use super::super::fixture::{FixtureVolume, image};
use super::super::history::History;
use super::*;

const DISK: usize = 2 * 262_144;

async fn world() -> (tempfile::TempDir, Store, FixtureVolume) {
    let dir = tempfile::tempdir().expect("a folder");
    let store = Store::open(&format!("file://{}", dir.path().display())).await.expect("a store");
    let mut volume = FixtureVolume::create(&store, "web", "data", DISK as u64).await;
    volume.capture(&image(DISK, 1), Some(Consistency::Crash)).await;
    (dir, store, volume)
}

#[tokio::test]
async fn a_renamed_volume_is_found_by_both_names_and_listed_once() {
    let (_dir, store, volume) = world().await;
    let id = volume.header.volume;
    let other = FixtureVolume::create(&store, "web", "taken", DISK as u64).await;
    assert!(matches!(
        rename(&store, id, "taken").await,
        Err(LifecycleError::Header(HeaderError::NameTaken { volume, .. })) if volume == other.header.volume
    ));
    for _ in 0..2 {
        assert_eq!(rename(&store, id, "www").await.expect("renamed").header.name, "www");
    }
    for name in ["data", "www", "web/www", "web/data"] {
        assert_eq!(header::find(&store, name).await.expect("found").header.volume, id, "{name}");
    }
    let (listed, errors) = header::list(&store).await.expect("listed");
    let names: Vec<_> = listed.iter().map(|header| header.name.as_str()).collect();
    assert_eq!((names, errors.len()), (vec!["taken", "www"], 0));
    // The machine's sender still asks for the old name.
    let found = header::find_in_machine(&store, volume.header.machine, "data").await.expect("readable");
    assert_eq!(found.map(|stored| stored.header.volume), Some(id));
    assert_eq!(rename(&store, id, "data").await.expect("back").header.name, "data");
}

#[tokio::test]
async fn a_rename_that_was_cut_off_is_completed_by_running_it_again() {
    let (_dir, store, volume) = world().await;
    header::claim(&store, &VolumeHeader { name: "www".into(), ..volume.header.clone() }).await.expect("claimed");
    for name in ["www", "data"] {
        let found = header::find(&store, name).await.expect("it still resolves").header;
        assert_eq!((found.volume, found.name.as_str()), (volume.header.volume, "data"));
    }
    assert_eq!(header::list(&store).await.expect("listed").0.len(), 1);
    rename(&store, volume.header.volume, "www").await.expect("completed");
    assert_eq!(header::find(&store, "www").await.expect("found").header.name, "www");
}

#[tokio::test]
async fn a_retired_volume_fences_its_writer_keeps_its_points_and_comes_back() {
    let (_dir, store, mut volume) = world().await;
    let (header, clock) = (volume.header.clone(), volume.clock.clone());
    let retired = set(&store, &header, Phase::Retired, "desk", &clock).await.expect("said");
    assert_eq!((retired.phase, retired.by.as_str()), (Phase::Retired, "desk"));
    assert_eq!(phase(&store, header.volume).await.expect("readable"), Phase::Retired);
    let fenced = volume.log.append(Vec::new(), Vec::new()).await;
    assert!(matches!(fenced, Err(LogError::Fenced { .. })), "{fenced:?}");
    assert_eq!(History::read(&store, &header).await.expect("readable").points().len(), 1);
    let again = set(&store, &header, Phase::Retired, "other", &clock).await.expect("said");
    assert_eq!(again, retired, "who said it first stays");
    set(&store, &header, Phase::Deleted, "desk", &clock).await.expect("said");
    assert!(matches!(set(&store, &header, Phase::Retired, "desk", &clock).await, Err(LifecycleError::Deleted { .. })));
    assert!(matches!(rename(&store, header.volume, "x").await, Err(LifecycleError::Deleted { .. })));
    set(&store, &header, Phase::Active, "desk", &clock).await.expect("said");
    assert_eq!(list(&store).await.expect("listed").0[0].phase, Phase::Active);
}

#[tokio::test]
async fn what_was_deleted_goes_after_the_grace_and_not_before_also_when_cut_off() {
    let (dir, store, volume) = world().await;
    let (header, clock) = (volume.header.clone(), volume.clock.clone());
    let id = header.volume;
    rename(&store, id, "www").await.expect("renamed");
    let lone = FixtureVolume::create(&store, "web", "other", DISK as u64).await;
    let now = UnixMillis(i64::MAX);
    assert_eq!(purge(&store, id, 1000, now, false).await.expect("read"), Purged::Kept);
    set(&store, &header, Phase::Deleted, "desk", &clock).await.expect("said");
    assert_eq!(deleted(&store).await.expect("read"), [id]);
    let early = purge(&store, id, i64::MAX, UnixMillis(0), false).await.expect("read");
    assert!(matches!(early, Purged::Waiting { .. }), "{early:?}");
    let folder = dir.path().join(paths::volume(id));
    let count = || walk(&folder);
    let all = count();
    let Purged::Gone { objects, .. } = purge(&store, id, 1000, now, true).await.expect("counted") else {
        panic!("it would go");
    };
    assert_eq!((objects, count()), (all, all), "a dry run removes nothing");
    // Cut off: some objects are gone already.
    std::fs::remove_dir_all(folder.join("segments")).expect("there");
    assert_eq!(deleted(&store).await.expect("read"), [id]);
    assert!(matches!(purge(&store, id, 1000, now, false).await, Ok(Purged::Gone { .. })));
    assert_eq!((count(), deleted(&store).await.expect("read")), (0, vec![]));
    assert_eq!(purge(&store, id, 1000, now, false).await.expect("nothing to do"), Purged::Kept);
    assert!(matches!(header::find(&store, "web/www").await, Err(HeaderError::NotFound { .. })));
    assert_eq!(header::find(&store, "other").await.expect("not touched").header.volume, lone.header.volume);
    // Both names can be had again.
    for name in ["data", "www"] {
        let asked = VolumeHeader { volume: VolumeId::from_random([9; 16]), name: name.into(), ..header.clone() };
        let made = header::create(&store, &VolumeHeader { volume: new_id(name), ..asked }).await;
        assert_eq!(made.expect("the name is free").0.header.name, name);
    }
}

fn new_id(name: &str) -> VolumeId {
    let mut id = [0; 16];
    id.copy_from_slice(&blake3::hash(name.as_bytes()).as_bytes()[..16]);
    VolumeId::from_random(id)
}

fn walk(folder: &std::path::Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let entry = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.expect("an entry").path();
        if path.is_dir() { walk(&path) } else { 1 }
    };
    entries.map(entry).sum()
}
