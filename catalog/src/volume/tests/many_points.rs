//! A volume of ten thousand points: what opening it costs does not grow with them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, SharedString, Unit};

use super::*;
use crate::volume::open_view;

const POINTS: u64 = 10_000;

/// Counts requests to the store by operation, of this thread alone.
#[derive(Debug, Default, Clone)]
struct Requests {
    counters: Arc<Mutex<BTreeMap<String, Arc<AtomicU64>>>>,
}

impl Requests {
    fn take(&self) -> BTreeMap<String, u64> {
        let counters = self.counters.lock().expect("no panic");
        let taken = counters.iter().map(|(op, count)| (op.clone(), count.swap(0, Ordering::Relaxed)));
        taken.filter(|(_, count)| *count > 0).collect()
    }
}

impl metrics::Recorder for Requests {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        if key.name() != "blockferry_store_requests_total" {
            return Counter::noop();
        }
        let op = key.labels().next().expect("an operation").value().to_owned();
        Counter::from_arc(self.counters.lock().expect("no panic").entry(op).or_default().clone())
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

/// One page, another each time.
async fn capture(volume: &mut FixtureVolume, number: u64) {
    let mut content = vec![1; 4096];
    content[..8].copy_from_slice(&number.to_le_bytes());
    volume.clock.set(UnixMillis(1_700_000_000_000 + i64::try_from(number).expect("small") * 1_000));
    volume.capture(&content, Some(Consistency::Crash)).await;
}

// One thread, so that the recorder sees every request.
#[tokio::test(flavor = "current_thread")]
async fn opening_a_volume_of_ten_thousand_points_reads_one_checkpoint_and_the_entries_after_it() {
    // In memory where there is such a folder: twenty thousand objects, each synced, are no test of a disk.
    let memory = std::path::Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    let dir = dir.expect("a temporary directory");
    let store = Store::open(&format!("file://{}/store", dir.path().display())).await.expect("a store");
    let mut volume = FixtureVolume::create(&store, "m", "many", 4096).await;
    for number in 1..=POINTS {
        capture(&mut volume, number).await;
    }

    let requests = Requests::default();
    let recorder = metrics::set_default_local_recorder(&requests);
    let mut whole = open_view(&store, &volume.header).await.expect("opened by the log alone");
    // The log's first entry claims it and commits nothing.
    let newest = LogSeq(POINTS + 1);
    assert_eq!(whole.entries_since_checkpoint, newest.0);
    let counted = requests.take();
    assert!(counted["get"] >= POINTS, "the count must be able to tell: {counted:?}");
    let written = write_checkpoint(&store, &mut whole, &volume.clock, CheckpointBounds::default()).await.expect("made");
    assert!(written.bytes < 2 << 20, "{written:?}");
    for number in 1..=3 {
        capture(&mut volume, POINTS + number).await;
    }
    requests.take();

    let view = open_view(&store, &volume.header).await.expect("opened by the checkpoint");
    let counted = requests.take();
    assert_eq!((view.checkpoint_at, view.entries_since_checkpoint), (newest, 3));
    assert_eq!(view.position.head_id(), volume.head());
    // The entry that the checkpoint names, the three after it, and the one that is not there; the checkpoint's head in two
    // pieces; checkpoints listed, and what lies behind this one in both folders.
    let expected = BTreeMap::from([("get".to_owned(), 5), ("get_range".to_owned(), 2), ("list".to_owned(), 3)]);
    assert_eq!(counted, expected);
    drop(recorder);

    // Every point is there, as the log has it.
    let history = History::read(&store, &volume.header).await.expect("a history");
    assert_eq!(view.points, history.points());
    assert_eq!(view.points.len() as u64, POINTS + 3);

    // Nothing older is needed: it opens the same without.
    for seq in 1..newest.0 {
        store.delete(&paths::log_entry(volume.header.volume, LogSeq(seq))).await.expect("deleted");
    }
    let view = open_view(&store, &volume.header).await.expect("opened by the checkpoint alone");
    assert_eq!(view.points, history.points());
}
