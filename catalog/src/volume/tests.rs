//! Header, log, checkpoint and opening together, on a local store.

#![allow(clippy::cast_possible_truncation, reason = "images of tests are small")]

mod many_points;

use common::clock::{Clock, UnixMillis};
use common::error::{Dispose as _, Disposition};
use common::format::checkpoint::CheckpointHead;
use common::format::close::Consistency;
use common::format::log::CommittedEpoch;
use common::ids::{Generation, Incarnation, LogSeq, MachineId, ReceiverId, VolumeId};

use super::checkpoint::{CheckpointBounds, write_checkpoint};
use super::fixture::{FixtureVolume, change, image};
use super::header::{self, HeaderError};
use super::history::History;
use super::*;
use crate::store::{PutOutcome, Store};

async fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = Store::open(&format!("file://{}/store", dir.path().display())).expect_ready().await;
    (dir, store)
}

trait Ready {
    async fn expect_ready(self) -> Store;
}

impl<F: Future<Output = Result<Store, crate::store::StoreError>>> Ready for F {
    async fn expect_ready(self) -> Store {
        self.await.expect("the store opens")
    }
}

const DISK: usize = 3 * 262_144 + 5000;

async fn two_points(store: &Store) -> (FixtureVolume, Vec<u8>) {
    let mut volume = FixtureVolume::create(store, "web", "root", DISK as u64).await;
    let first = image(DISK, 1);
    volume.capture(&first, Some(Consistency::Crash)).await;
    let second = change(&first, 9, 2);
    volume.capture(&second, None).await;
    volume.capture(&change(&second, 3, 3), Some(Consistency::Filesystem)).await;
    (volume, second)
}

#[tokio::test]
async fn a_volume_is_found_by_name_by_machine_and_name_and_by_id() {
    let (_dir, store) = store().await;
    let web = FixtureVolume::create(&store, "web", "root", 4096).await.header;
    let database = FixtureVolume::create(&store, "db", "root", 4096).await.header;
    let data = FixtureVolume::create(&store, "db", "data", 4096).await.header;
    for (text, expected) in [
        ("data", data.volume),
        ("web/root", web.volume),
        ("db/root", database.volume),
        (&web.volume.to_string(), web.volume),
    ] {
        assert_eq!(header::find(&store, text).await.expect("found").header.volume, expected, "{text}");
    }
    let error = header::find(&store, "root").await.expect_err("two machines have one");
    assert!(matches!(&error, HeaderError::Ambiguous { candidates, .. } if candidates.len() == 2), "{error}");
    assert!(error.to_string().contains("db/root") && error.to_string().contains("web/root"), "{error}");
    let error = header::find(&store, "swap").await.expect_err("nobody has one");
    assert!(error.to_string().contains("db/data"), "{error}");
    assert!(matches!(
        header::find(&store, &VolumeId::from_random([1; 16]).to_string()).await,
        Err(HeaderError::NoVolume { .. })
    ));
    let (all, errors) = header::list(&store).await.expect("listed");
    assert_eq!(all.iter().map(|h| h.volume).collect::<Vec<_>>(), [data.volume, database.volume, web.volume]);
    assert!(errors.is_empty());
}

#[tokio::test]
async fn a_name_is_given_once_within_a_machine_and_creation_may_be_repeated() {
    let (_dir, store) = store().await;
    let made = FixtureVolume::create(&store, "web", "root", 4096).await.header;
    let (again, outcome) = header::create(&store, &made).await.expect("repeatable");
    assert_eq!((again.header.volume, outcome), (made.volume, PutOutcome::Exists));
    let mut other = made.clone();
    other.volume = VolumeId::from_random([9; 16]);
    assert!(
        matches!(header::create(&store, &other).await, Err(HeaderError::NameTaken { volume, .. }) if volume == made.volume)
    );
    // The same name on another machine is another name.
    other.machine = MachineId::from_random([8; 16]);
    header::create(&store, &other).await.expect("another machine's");
    let mut moved = made.clone();
    moved.name = "data".into();
    assert!(matches!(header::create(&store, &moved).await, Err(HeaderError::VolumeTaken { .. })));
    let found = header::find_in_machine(&store, made.machine, "root").await.expect("read").expect("there");
    assert_eq!(found.header.volume, made.volume);
}

#[tokio::test]
async fn a_claim_whose_creator_died_is_taken_over() {
    let (_dir, store) = store().await;
    let mut header = FixtureVolume::create(&store, "web", "root", 4096).await.header;
    store.delete(&paths::header(header.volume)).await.expect("deleted");
    header.volume = VolumeId::from_random([9; 16]);
    let (stored, outcome) = header::create(&store, &header).await.expect("the claim is abandoned");
    assert_eq!((stored.header.volume, outcome), (header.volume, PutOutcome::Created));
    assert_eq!(header::find(&store, "root").await.expect("found").header.volume, header.volume);
}

#[tokio::test]
async fn of_two_header_updates_from_the_same_version_one_is_told() {
    let (_dir, store) = store().await;
    let volume = FixtureVolume::create(&store, "web", "root", 4096).await.header.volume;
    let read = header::read(&store, volume).await.expect("there");
    let first = header::update(&store, &read, |header| header.sector_bytes = 4096).await.expect("unchanged");
    assert!(matches!(
        header::update(&store, &read, |header| header.sector_bytes = 1024).await,
        Err(HeaderError::Changed { .. })
    ));
    header::update(&store, &first, |header| header.sector_bytes = 1024).await.expect("the newest version");
    assert_eq!(header::read(&store, volume).await.expect("there").header.sector_bytes, 1024);
}

#[tokio::test]
async fn an_earlier_writer_is_fenced_and_told_who_won() {
    let (_dir, store) = store().await;
    let (mut volume, content) = two_points(&store).await;
    let (mut later, view) =
        LogWriter::open(&store, &volume.header, ReceiverId([6; 16]), &Clock::System).await.expect("opened");
    assert_eq!(later.generation(), Generation(2));
    assert_eq!(view.position, *later.position());
    assert_eq!((view.position.head_id(), view.next_epoch().0, view.points.len()), (volume.head(), 4, 2));

    let records = volume.seal(&change(&content, 1, 8));
    assert!(!records.is_empty());
    let error = volume.log.append(Vec::new(), Vec::new()).await.expect_err("fenced");
    assert!(matches!(error, LogError::Fenced { winner: ReceiverId(w), generation: Generation(2), .. } if w == [6; 16]));
    assert_eq!(error.disposition(), Disposition::Fenced);
    // And stays fenced, although the next number is free by now.
    assert!(matches!(volume.log.append(Vec::new(), Vec::new()).await, Err(LogError::Fenced { .. })));
    later.append(Vec::new(), Vec::new()).await.expect("the later one goes on");
}

#[tokio::test]
async fn many_writers_that_open_at_once_get_generations_of_their_own() {
    let (_dir, store) = store().await;
    let header = FixtureVolume::create(&store, "web", "root", 4096).await.header;
    let open = |n: u8| {
        let (store, header) = (store.clone(), header.clone());
        tokio::spawn(async move { LogWriter::open(&store, &header, ReceiverId([n; 16]), &Clock::System).await })
    };
    let tasks: Vec<_> = (0..6).map(open).collect();
    let mut writers = Vec::new();
    for task in tasks {
        writers.push(task.await.expect("no panic").expect("opened").0);
    }
    let mut generations: Vec<_> = writers.iter().map(|w| w.generation().0).collect();
    generations.sort_unstable();
    assert_eq!(generations, [2, 3, 4, 5, 6, 7]);
    let mut winners = 0;
    for writer in &mut writers {
        winners += usize::from(writer.append(Vec::new(), Vec::new()).await.is_ok());
    }
    assert_eq!(winners, 1);
}

#[tokio::test]
async fn a_close_that_does_not_follow_the_head_is_refused_before_anything_is_written() {
    let (_dir, store) = store().await;
    let (mut volume, _) = two_points(&store).await;
    let history = History::read(&store, &volume.header).await.expect("readable");
    let before = store.list("v1").await.expect("listed").len();
    let old = history.epochs[1].close.clone();
    let error = volume.log.append(Vec::new(), vec![CommittedEpoch { close: old, segments: vec![] }]).await;
    assert!(matches!(error, Err(LogError::WrongParent { .. })));
    assert_eq!(store.list("v1").await.expect("listed").len(), before);
    volume.log.append(Vec::new(), Vec::new()).await.expect("still the writer");
}

#[tokio::test]
async fn a_missing_moved_or_damaged_entry_is_named() {
    let (_dir, store) = store().await;
    let (volume, _) = two_points(&store).await;
    let id = volume.header.volume;
    let entry = |seq| paths::log_entry(id, LogSeq(seq));
    let third = store.get(&entry(3)).await.expect("there");
    let second = store.get(&entry(2)).await.expect("there");

    store.delete(&entry(3)).await.expect("deleted");
    let error = History::read(&store, &volume.header).await.expect_err("a hole");
    assert!(matches!(&error, LogError::Missing { path, later } if *path == entry(3) && *later == entry(4)), "{error}");

    store.put_new(&entry(3), second.clone()).await.expect("put");
    let error = History::read(&store, &volume.header).await.expect_err("moved");
    assert_eq!(error.bad_object(), Some(entry(3).as_str()));

    let mut broken = third.to_vec();
    broken[100] ^= 1;
    store.put_new(&entry(3), broken.into()).await.expect("put");
    let error = History::read(&store, &volume.header).await.expect_err("damaged");
    assert!(matches!(&error, LogError::Damaged { path, .. } if *path == entry(3)), "{error}");

    store.put_new(&entry(3), third).await.expect("put");
    assert_eq!(History::read(&store, &volume.header).await.expect("whole again").epochs.len(), 3);

    // A volume whose header pins another key believes none of it.
    let mut other = volume.header.clone();
    other.signing_key = [1; 32];
    assert!(matches!(History::read(&store, &other).await, Err(LogError::Signature { .. })));
}

#[tokio::test]
async fn points_carry_the_bytes_since_the_one_before() {
    let (_dir, store) = store().await;
    let mut volume = FixtureVolume::create(&store, "web", "root", DISK as u64).await;
    volume.clock.set(UnixMillis(1_800_000_000_000));
    let first = image(DISK, 1);
    let one = volume.capture(&first, None).await;
    let two = volume.capture(&change(&first, 4, 2), Some(Consistency::Crash)).await;
    let points = History::read(&store, &volume.header).await.expect("readable").points();
    assert_eq!(points.len(), 1);
    assert_eq!(points[0].id, two.id());
    assert_eq!(points[0].new_bytes, one.statement().record_bytes + two.statement().record_bytes);
    assert_eq!((points[0].cut_time, points[0].committed.0), (UnixMillis(1_800_000_000_000), 1_800_000_000_000));
}

/// Pages of the newest content that a checkpoint's index says are live, as (block, page) → epoch.
async fn live(store: &Store, volume: &FixtureVolume, at: LogSeq) -> Vec<(u64, u32, u64)> {
    let bytes = store.get(&paths::checkpoint(volume.header.volume, at)).await.expect("there");
    let head = CheckpointHead::check_whole(&bytes).expect("valid");
    let (_, head_len) = CheckpointHead::decode_prefix(&bytes).expect("valid");
    let mut found = Vec::new();
    for page in head.pages.as_ref().expect("indexed") {
        let start = head_len + page.offset as usize;
        for entry in head.decode_page(page, &bytes[start..start + page.length as usize]).expect("valid") {
            // Each live record is where the checkpoint says it is.
            let segment = &head.segments[entry.segment as usize];
            let end = entry.offset + u64::from(entry.meta.record_len);
            let record = store.get_range(&segment.path, entry.offset..end).await.expect("in range");
            let record = common::format::record::Record::parse(record).expect("a record");
            assert!(entry.meta.describes(&record));
            let epoch = head.epochs[entry.epoch as usize];
            assert_eq!(record.header().epoch, epoch.epoch);
            for block in entry.block.0..entry.block.0 + u64::from(entry.block_count) {
                found.extend(entry.live.iter().map(|page| (block, page, epoch.epoch.0)));
            }
        }
    }
    found.sort_unstable();
    found
}

#[tokio::test]
async fn a_checkpoint_made_from_the_one_before_says_the_same_as_one_made_from_the_whole_log() {
    let (_dir, store) = store().await;
    let mut volume = FixtureVolume::create(&store, "web", "root", DISK as u64).await;
    volume.segments_per_epoch = 2;
    let mut content = image(DISK, 1);
    for epoch in 0..4 {
        volume.capture(&content, (epoch % 2 == 1).then_some(Consistency::Crash)).await;
        content = change(&content, 5, epoch);
    }
    let mut view = open_view(&store, &volume.header).await.expect("readable");
    assert_eq!((view.checkpoint_at, view.entries_since_checkpoint), (LogSeq(0), 5));
    let clock = Clock::manual(UnixMillis(5));
    let written = write_checkpoint(&store, &mut view, &clock, CheckpointBounds::default()).await.expect("written");
    assert_eq!((written.at, written.indexed, written.outcome), (LogSeq(5), true, PutOutcome::Created));

    for epoch in 4..7 {
        volume.capture(&content, Some(Consistency::Crash)).await;
        content = change(&content, 5, epoch);
    }
    let mut view = open_view(&store, &volume.header).await.expect("readable");
    assert_eq!((view.checkpoint_at, view.entries_since_checkpoint), (LogSeq(5), 3));
    assert_eq!(view.position, *volume.log.position());
    assert_eq!(view.points, History::read(&store, &volume.header).await.expect("readable").points());
    assert_eq!(view.next_epoch().0, 8);
    let again = write_checkpoint(&store, &mut view, &clock, CheckpointBounds::default()).await.expect("written");
    assert_eq!(again.at, LogSeq(8));
    let merged = live(&store, &volume, LogSeq(8)).await;

    for at in [5, 8] {
        store.delete(&paths::checkpoint(volume.header.volume, LogSeq(at))).await.expect("deleted");
    }
    let mut view = open_view(&store, &volume.header).await.expect("readable");
    let tight = CheckpointBounds { merge_bytes_max: 1, ..CheckpointBounds::default() };
    write_checkpoint(&store, &mut view, &clock, tight).await.expect("written");
    assert_eq!(live(&store, &volume, LogSeq(8)).await, merged);
    assert_eq!(merged.len(), DISK.div_ceil(4096), "every page is live once");
}

#[tokio::test]
async fn after_growth_a_checkpoint_holds_records_of_both_incarnations() {
    let (_dir, store) = store().await;
    let mut volume = FixtureVolume::create(&store, "web", "root", DISK as u64).await;
    let mut content = image(DISK, 1);
    volume.capture(&content, Some(Consistency::Crash)).await;
    let mut view = open_view(&store, &volume.header).await.expect("readable");
    let clock = Clock::manual(UnixMillis(5));
    write_checkpoint(&store, &mut view, &clock, CheckpointBounds::default()).await.expect("written");
    let (stale, grown) = (volume.header.clone(), DISK + 3 * 4096);
    volume.grow(grown as u64).await;
    content.resize(grown, 0);
    content[0] ^= 1;
    volume.capture(&content, Some(Consistency::Crash)).await;
    // A header from before the growth is read anew by whoever meets the first close behind it.
    let mut view = open_view(&store, &stale).await.expect("readable");
    let at = view.position.seq;
    assert!(write_checkpoint(&store, &mut view, &clock, CheckpointBounds::default()).await.expect("written").indexed);
    let live = live(&store, &volume, at).await;
    assert_eq!(live.len(), grown.div_ceil(4096), "every page is live once");
    assert_eq!(live.iter().map(|(.., epoch)| *epoch).collect::<std::collections::BTreeSet<_>>().len(), 2);
}

#[tokio::test]
async fn a_volume_grows_once_however_often_it_is_asked_and_never_shrinks() {
    let (_dir, store) = store().await;
    let volume = FixtureVolume::create(&store, "web", "root", DISK as u64).await;
    let (id, larger) = (volume.header.volume, DISK as u64 + 512);
    for _ in 0..2 {
        let grown = header::grow(&store, id, Incarnation(1), larger).await.expect("grown");
        assert_eq!(grown.header.incarnations.len(), 2);
        assert_eq!((grown.header.current().incarnation, grown.header.current().disk_bytes), (Incarnation(2), larger));
    }
    for (incarnation, bytes) in [(1, larger + 1), (2, larger), (2, larger - 1), (3, larger + 1), (2, u64::MAX)] {
        let error = header::grow(&store, id, Incarnation(incarnation), bytes).await.expect_err("not grown");
        assert!(matches!(error, HeaderError::NotGrown { .. }), "{error}");
    }
}

#[tokio::test]
async fn an_index_that_would_be_too_large_is_left_out_and_opening_works_all_the_same() {
    let (_dir, store) = store().await;
    let (volume, _) = two_points(&store).await;
    let mut view = open_view(&store, &volume.header).await.expect("readable");
    let points = view.points.clone();
    let bounds = CheckpointBounds { index_bytes_max: 100, ..CheckpointBounds::default() };
    assert!(!write_checkpoint(&store, &mut view, &Clock::System, bounds).await.expect("written").indexed);
    let view = open_view(&store, &volume.header).await.expect("readable");
    assert_eq!((view.checkpoint_at, view.points, view.position.head_id()), (LogSeq(4), points, volume.head()));
}

#[tokio::test]
async fn a_checkpoint_that_does_not_fit_the_log_is_not_believed() {
    let (_dir, store) = store().await;
    let (volume, _) = two_points(&store).await;
    let id = volume.header.volume;
    let mut view = open_view(&store, &volume.header).await.expect("readable");
    write_checkpoint(&store, &mut view, &Clock::System, CheckpointBounds::default()).await.expect("written");
    let path = paths::checkpoint(id, LogSeq(4));
    let bytes = store.get(&path).await.expect("there");
    let (head, _) = CheckpointHead::decode_prefix(&bytes).expect("valid");

    let lies = [
        CheckpointHead { entry_digest: Default::default(), ..head.clone() },
        CheckpointHead { generation: Generation(7), ..head.clone() },
        CheckpointHead { head: None, ..head.clone() },
        CheckpointHead { pages: None, volume: VolumeId::from_random([3; 16]), ..head.clone() },
    ];
    for lie in lies {
        store.put_new(&path, lie.encode().expect("within limits").into()).await.expect("put");
        let view = open_view(&store, &volume.header).await.expect("the log is enough");
        assert_eq!((view.checkpoint_at, view.points.len()), (LogSeq(0), 2));
    }
    // Nor is a log that lost the entry which the checkpoint summarises.
    store.put_new(&path, bytes).await.expect("put");
    store.delete(&paths::log_entry(id, LogSeq(4))).await.expect("deleted");
    assert!(matches!(open_view(&store, &volume.header).await, Err(LogError::Missing { .. })));
}

#[tokio::test]
async fn the_owner_of_a_log_is_who_took_the_newest_generation_also_behind_entries_that_only_maintain_it() {
    let (_dir, store) = store().await;
    let (volume, _) = two_points(&store).await;
    let id = volume.header.volume;
    let (first, second) = (ReceiverId([8; 16]), ReceiverId([9; 16]));
    for receiver in [first, second] {
        LogWriter::open(&store, &volume.header, receiver, &Clock::System).await.expect("free to take");
    }
    let newest = open_view(&store, &volume.header).await.expect("readable").position;
    assert_eq!(owner::owner(&store, id, newest.seq).await.expect("readable"), Some(second));
    assert_eq!(owner::owner(&store, id, LogSeq(newest.seq.0 - 1)).await.expect("readable"), Some(first));
    assert_eq!(owner::owner(&store, id, LogSeq(0)).await.expect("readable"), None);
    // Somebody's entry under the generation of the one before, which commits nothing.
    let mut entry = owner::entry(&store, id, newest.seq).await.expect("readable").expect("there");
    entry.seq = LogSeq(newest.seq.0 + 1);
    entry.writer = first;
    store.put_new(&paths::log_entry(id, entry.seq), entry.encode().into()).await.expect("put");
    assert_eq!(owner::owner(&store, id, entry.seq).await.expect("readable"), Some(second));
}
