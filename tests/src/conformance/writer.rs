//! The writer: several threads that write numbered sectors, few pages again and again, and now and then await others.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::history::{History, Kind, Moment};
use super::stamp::{PAGE_SECTORS, SECTOR, fill};
use super::target::Target;
use crate::images::Random;
use crate::pair::PATIENCE;

/// How the writer behaves.
#[derive(Debug, Clone)]
pub struct Habits {
    /// Sectors of the disk, whole pages.
    pub sectors: u64,
    /// Threads, each with one write under way.
    pub lanes: usize,
    /// Longest pause of a thread between two writes.
    pub pause_max: Duration,
    /// Seed of its choices.
    pub seed: u64,
}

impl Habits {
    /// Eight threads on a disk of this many bytes.
    #[must_use]
    pub fn new(bytes: u64, seed: u64) -> Self {
        Self { sectors: bytes / SECTOR as u64, lanes: 8, pause_max: Duration::from_millis(4), seed }
    }

    /// Where the next write goes, and what it does.
    fn choose(&self, random: &mut Random) -> (Kind, Range<u64>) {
        let pages = self.sectors / PAGE_SECTORS;
        // Hot pages lie far apart, so that they are in different blocks and, late or not, in different records.
        let page = match random.below(10) {
            0..4 => random.below(8) * (pages / 8),
            4..7 => (random.below(256) * 31) % pages,
            _ => random.below(pages),
        };
        let start = page * PAGE_SECTORS;
        let (start, len) = match random.below(20) {
            // Less than a page, anywhere in it.
            0..3 => (start + random.below(PAGE_SECTORS), 1 + random.below(PAGE_SECTORS - 1)),
            // Several pages, or several with parts at the ends.
            3..6 => (start, (1 + random.below(16)) * PAGE_SECTORS),
            6 => (start + random.below(PAGE_SECTORS), PAGE_SECTORS + random.below(100)),
            _ => (start, PAGE_SECTORS),
        };
        let kind = match random.below(40) {
            0 | 1 => Kind::Zero,
            2 => Kind::Trim,
            _ => Kind::Stamp,
        };
        (kind, start..(start + len).min(self.sectors))
    }
}

/// Stamps the whole disk with write 0.
///
/// # Panics
/// If it can't be written.
pub fn initialise(path: &Path, bytes: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().create(true).truncate(false).write(true).open(path).expect("it can be made");
    let mut chunk = vec![0; 1 << 20];
    for offset in (0..bytes).step_by(chunk.len()) {
        let len = chunk.len().min(usize::try_from(bytes - offset).expect("small"));
        for (at, sector) in chunk[..len].chunks_mut(SECTOR).enumerate() {
            fill(sector, 0, 0, offset / SECTOR as u64 + at as u64);
        }
        file.write_all_at(&chunk[..len], offset).expect("room");
    }
    file.sync_all().expect("it can be synced");
}

/// Writing threads. Stopped when dropped.
#[derive(Debug)]
pub struct Writer {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Writer {
    /// Starts them. `round` makes the choices of one start differ from those of another.
    #[must_use]
    pub fn start(habits: &Habits, target: &Arc<dyn Target>, history: &Arc<History>, round: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..habits.lanes).map(|lane| {
            let (habits, target, history) = (habits.clone(), Arc::clone(target), Arc::clone(history));
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || write_until(&habits, lane, target.as_ref(), &history, round, &stop))
        });
        Self { threads: threads.collect(), stop }
    }

    /// Lets each thread finish its write and flush; a moment after which nothing is under way.
    ///
    /// # Panics
    /// If a write failed.
    pub fn rest(mut self, history: &History) -> Moment {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("no write fails");
        }
        history.moment()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn write_until(habits: &Habits, lane: usize, target: &dyn Target, history: &History, round: u64, stop: &AtomicBool) {
    let mut random = Random(habits.seed ^ (round << 32) ^ ((lane as u64) << 16));
    let pause_max = u64::try_from(habits.pause_max.as_micros()).expect("short");
    let mut buffer = Vec::new();
    let mut own = 0;
    while !stop.load(Ordering::Relaxed) {
        let mut awaited = own;
        if random.below(3) == 0 {
            let others = history.log().under_way.clone();
            if !others.is_empty() {
                awaited = others[usize::try_from(random.below(others.len() as u64)).expect("small")];
                assert!(history.await_completion(awaited, PATIENCE), "write {awaited} takes longer than {PATIENCE:?}");
            }
        }
        let (kind, sectors) = habits.choose(&mut random);
        let stamped = |kind| {
            let number = history.log().submit(kind, sectors.clone(), awaited);
            (number, kind)
        };
        let len = usize::try_from(sectors.end - sectors.start).expect("small");
        let mut done = None;
        if kind != Kind::Stamp {
            let (number, kind) = stamped(kind);
            let attempt = if kind == Kind::Zero {
                target.zero(lane, sectors.clone())
            } else {
                target.trim(lane, sectors.clone())
            };
            match attempt {
                Some(result) => done = Some((number, result)),
                // The log has a write then that nothing came of: one that did not happen, and completes never.
                None => history.log().forget(number),
            }
        }
        let (number, result) = done.unwrap_or_else(|| {
            let (number, _) = stamped(Kind::Stamp);
            buffer.resize(len * SECTOR, 0);
            for (bytes, sector) in buffer.chunks_mut(SECTOR).zip(sectors.clone()) {
                fill(bytes, number, awaited, sector);
            }
            (number, target.write(lane, sectors.start, &buffer))
        });
        result.unwrap_or_else(|error| panic!("write {number} of sectors {sectors:?} failed: {error}"));
        history.complete(number);
        own = number;
        if random.below(64) == 0 {
            target.flush(lane).expect("a flush succeeds");
        }
        std::thread::sleep(Duration::from_micros(random.below(pause_max.max(1))));
    }
    target.flush(lane).expect("a flush succeeds");
}

#[cfg(test)]
mod tests {
    use super::super::oracle::{Oracle, Window};
    use super::super::target::Cached;
    use super::*;

    #[test]
    fn what_the_writer_leaves_is_what_its_log_says() {
        let file = tempfile::NamedTempFile::new_in("/var/tmp").expect("a file");
        let bytes = 8 << 20;
        initialise(file.path(), bytes);
        let habits = Habits { pause_max: Duration::from_micros(200), ..Habits::new(bytes, 7) };
        let history = Arc::new(History::default());
        let target: Arc<dyn Target> = Arc::new(Cached::open(file.path()));
        let writer = Writer::start(&habits, &target, &history, 0);
        crate::pair::wait_for("some writes", || (history.log().writes.len() > 2000).then_some(()));
        let rested = writer.rest(&history);
        let log = history.log();
        let oracle = Oracle::new(&log, habits.sectors);
        let mut image = std::fs::File::open(file.path()).expect("there");
        let window = Window { floor: rested, ceiling: rested };
        oracle.judge(&mut image, window, None).expect("the disk itself keeps the promise");
        let awaited = log.writes.iter().filter(|write| write.awaited != 0).count();
        assert!(awaited > 1000 && log.under_way.is_empty());
    }
}
