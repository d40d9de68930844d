//! A writer and two collectors at once, each killed at any await; what was committed and kept must read as it was.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::*;

/// Numbers from a seed.
pub(super) struct Dice(blake3::OutputReader);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        Self(hasher.finalize_xof())
    }

    pub(super) fn roll(&mut self, sides: u64) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes) % sides
    }

    /// Noise.
    pub(super) fn fill(&mut self, bytes: &mut [u8]) {
        self.0.fill(bytes);
    }
}

type Known = Arc<Mutex<Vec<(CloseId, Vec<u8>)>>>;

/// Captures points until it has made `count`.
async fn write(mut volume: FixtureVolume, known: Known, seed: u64, count: u64) -> FixtureVolume {
    let mut content = image(DISK, seed);
    for number in 0..count {
        let close = volume.capture(&content, Some(Consistency::Crash)).await;
        known.lock().expect("no test panics with it").push((close.id(), content.clone()));
        content = change(&content, 30, seed * 1000 + number);
    }
    volume
}

/// Rounds of a collector after the writer has ended: the last ones find a quiet log.
const LAST_ROUNDS: usize = 6;

/// Collects over and over until the writer has ended and a little longer, without grace, keeping every third point, and kills
/// itself at some await.
async fn collect(store: Store, volume: FixtureHeader, seed: u64, ended: Arc<AtomicBool>) -> usize {
    let mut dice = Dice::new(seed);
    let (mut killed, mut last, mut rounds) = (0, 0, 0);
    while last < LAST_ROUNDS {
        last += usize::from(ended.load(Ordering::Acquire));
        // Not over and over on the same log, which would only grow by collectors condemning each other's work.
        if last == 0 && rounds >= 2 * volume.known.lock().expect("no test panics with it").len() {
            tokio::time::sleep(Duration::from_millis(1)).await;
            continue;
        }
        rounds += 1;
        let (store, header, clock) = (store.clone(), volume.header.clone(), volume.clock.clone());
        // A crash at some await, which a count of polls finds whatever else the machine does; one in three goes through.
        let polls = if dice.roll(3) == 0 { u64::MAX } else { dice.roll(300) };
        // In the store's eyes everything is old enough.
        let work = async move {
            let options = CollectOptions { grace: Duration::ZERO, ..options(FAR) };
            let third = |points: &[DatedPoint]| {
                let kept = points.iter().filter(|dated| dated.point.epoch.0.is_multiple_of(3));
                kept.map(|dated| dated.point.id).collect()
            };
            let collection = Collection::plan(&store, &header, options, third).await?;
            collection.apply(&clock).await
        };
        match crash_after(polls, work).await {
            None => killed += 1,
            // Without grace a collector may find an object gone that another deleted meanwhile.
            Some(Err(CollectError::Segment(error))) if error.bad_object().is_some() => {}
            Some(Err(CollectError::Epoch(epochs::EpochError::Segment(error)))) if error.bad_object().is_some() => {}
            Some(Err(CollectError::Store(error))) if error.is_not_found() => {}
            Some(result) => drop(result.expect("a collection goes through")),
        }
    }
    killed
}

/// Drops `work` after so many polls; `None` then.
async fn crash_after<T>(mut polls: u64, work: impl Future<Output = T>) -> Option<T> {
    let mut work = Box::pin(work);
    std::future::poll_fn(move |context| {
        polls = polls.saturating_sub(1);
        if polls == 0 { std::task::Poll::Ready(None) } else { work.as_mut().poll(context).map(Some) }
    })
    .await
}

struct FixtureHeader {
    header: common::format::volume_header::VolumeHeader,
    clock: Clock,
    known: Known,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_and_two_collectors_killed_anywhere_lose_nothing_that_is_kept() {
    let (mut killed, mut collected) = (0, 0);
    for seed in 1..=4 {
        let (_dir, store) = store().await;
        let volume = FixtureVolume::create(&store, "web", "root", DISK as u64).await;
        let (known, ended) = (Known::default(), Arc::new(AtomicBool::new(false)));
        let header =
            || FixtureHeader { header: volume.header.clone(), clock: volume.clock.clone(), known: Arc::clone(&known) };
        let start = |seed| tokio::spawn(collect(store.clone(), header(), seed, Arc::clone(&ended)));
        let collectors = [start(seed), start(seed + 100)];
        let volume = write(volume, Arc::clone(&known), seed, 40).await;
        ended.store(true, Ordering::Release);
        for collector in collectors {
            killed += collector.await.expect("no panic");
        }
        let known = known.lock().expect("all tasks ended").clone();
        let history = History::read(&store, &volume.header).await.expect("a log");
        let offered: Vec<CloseId> = history.points().iter().map(|point| point.id).collect();
        collected += known.len() - offered.len();
        for (number, (close, content)) in known.iter().enumerate() {
            let epoch = number as u64 + 1;
            // What no policy ever let go of is offered …
            assert!(offered.contains(close) || !epoch.is_multiple_of(3), "seed {seed}: point {epoch} is gone");
            if offered.contains(close) {
                // … and what is offered reads.
                let at = history.find(*close).expect("an epoch");
                let read = read_point(&store, &history, &volume.data_key, at).await;
                assert!(read.as_ref() == Ok(content), "seed {seed}, point {epoch}: {:?}", read.map(|_| ()));
            }
        }
        let nothing_gone = live::find(&store, &history, &[], 1).await.expect("metadata is proven");
        assert_eq!(nothing_gone.gone, []);
    }
    assert!(killed > 10 && collected > 20, "{killed} kills and {collected} expired points show little");
}
