//! What a log says after a restart, a flipped bit, a torn write, a full disk.

#![expect(clippy::cast_possible_truncation, reason = "numbers of tests are small, or cut on purpose")]

use std::sync::Arc;

use super::*;

/// Bytes as written, and as they would be after a power cut.
#[derive(Debug, Default)]
pub(in super::super) struct MemoryLog {
    pub(in super::super) written: Mutex<Vec<u8>>,
    pub(in super::super) durable: Mutex<Vec<u8>>,
    pub(in super::super) syncs: AtomicU64,
    /// Set where writes fail, and where the file can't be removed either.
    pub(in super::super) full: AtomicBool,
    pub(in super::super) stuck: AtomicBool,
    pub(in super::super) removed: AtomicBool,
}

impl MemoryLog {
    pub(in super::super) fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self { written: Mutex::new(bytes.clone()), durable: Mutex::new(bytes), ..Self::default() })
    }
}

impl LogStore for Arc<MemoryLog> {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if self.full.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let offset = offset as usize;
        self.written.lock().expect("sound")[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let written = self.written.lock().expect("sound").clone();
        *self.durable.lock().expect("sound") = written;
        self.syncs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn remove(&self) -> io::Result<()> {
        if self.stuck.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        self.removed.store(true, Ordering::Relaxed);
        Ok(())
    }
}

pub(in super::super) fn identity(bytes: u64) -> LogIdentity {
    LogIdentity {
        volume: VolumeId([7; 16]),
        incarnation: Incarnation(2),
        geometry: Geometry::new(bytes).expect("not empty"),
    }
}

const GIB: u64 = 1 << 30;

fn regions(bytes: &[u8], identity: &LogIdentity) -> Vec<u64> {
    set_bits(&parse(bytes, identity).expect("ours").0).collect()
}

fn empty_log(identity: &LogIdentity) -> (IntentLog, Arc<MemoryLog>) {
    let store = MemoryLog::new(all_set(identity).1);
    let log = IntentLog::with_store(Box::new(Arc::clone(&store)), all_set(identity).0);
    for region in 0..identity.regions() {
        log.clear(region);
    }
    log.write_cleared().expect("written");
    assert!(regions(&store.durable.lock().expect("sound"), identity).is_empty());
    (log, store)
}

#[test]
fn the_bytes_of_a_log_are_these() {
    // docs/formats/write-intent.md: a disk of 3 MiB and a byte, so that bits of four regions are set.
    let (_, bytes) = all_set(&identity((3 << 20) + 1));
    let mut expected = b"BFINTENT\x01\0\0\0\0\x10\0\0".to_vec();
    expected.extend_from_slice(&[7; 16]);
    expected.extend_from_slice(&[2, 0, 0, 0, 0, 0, 0x10, 0, 1, 0, 0x30, 0, 0, 0, 0, 0]);
    expected.resize(4092, 0);
    expected.extend_from_slice(&0x0971_c533_u32.to_le_bytes());
    expected.extend_from_slice(&0x10dc_77cd_u32.to_le_bytes());
    expected.extend_from_slice(&[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0x0f]);
    expected.resize(8192, 0);
    assert!(bytes == expected);
}

#[test]
fn a_bit_is_durable_before_the_write_may_go_on_and_marks_that_region_alone() {
    let identity = identity(40 * GIB + 5);
    let (log, store) = empty_log(&identity);
    // A range over the border of two pages of the log.
    let first = 32_639 * REGION_PAGES + 3;
    assert!(!log.is_durable(first, first + REGION_PAGES));
    log.ensure(first, first + REGION_PAGES).expect("written");
    assert!(log.is_durable(first, first + REGION_PAGES));
    assert_eq!(regions(&store.durable.lock().expect("sound"), &identity), [32_639, 32_640]);
    let syncs = store.syncs.load(Ordering::Relaxed);
    log.ensure(first, first).expect("nothing to do");
    assert_eq!(store.syncs.load(Ordering::Relaxed), syncs, "a marked region costs nothing");
    log.clear(32_639);
    assert!(!log.is_durable(first, first), "in memory first");
    log.ensure(first, first).expect("written");
    assert_eq!(regions(&store.durable.lock().expect("sound"), &identity), [32_639, 32_640]);
}

#[test]
fn a_page_with_a_flipped_bit_counts_as_all_set_and_the_others_hold() {
    let identity = identity(40 * GIB + 5);
    let (log, store) = empty_log(&identity);
    log.ensure(0, 0).expect("written");
    let sound = store.durable.lock().expect("sound").clone();
    for at in [4096, 4100, 4105, 4112, 8191] {
        let mut bytes = sound.clone();
        bytes[at] ^= 4;
        assert_eq!(regions(&bytes, &identity), (0..32_640).collect::<Vec<_>>(), "byte {at}");
    }
    let mut bytes = sound.clone();
    bytes[8192] ^= 1;
    let expected: Vec<u64> = std::iter::once(0).chain(32_640..40 * 1024 + 1).collect();
    assert_eq!(regions(&bytes, &identity), expected, "the second page, up to the disk's end");
    assert_eq!(regions(&sound[..4096 + 10], &identity), (0..40 * 1024 + 1).collect::<Vec<_>>(), "cut off");
}

#[test]
fn a_log_of_another_disk_version_or_with_a_damaged_header_says_nothing() {
    let ours = identity(GIB);
    let (_, sound) = all_set(&ours);
    assert!(parse(&sound, &ours).is_ok());
    assert!(parse(&sound, &LogIdentity { volume: VolumeId([8; 16]), ..ours }).is_err());
    assert!(parse(&sound, &LogIdentity { incarnation: Incarnation(3), ..ours }).is_err());
    assert!(parse(&sound, &identity(GIB + 512)).is_err());
    for at in 0..4096 {
        let mut bytes = sound.clone();
        bytes[at] ^= 0x10;
        assert!(parse(&bytes, &ours).is_err(), "byte {at}");
    }
    let mut other = sound.clone();
    other[8] = 2;
    assert!(parse(&other, &ours).expect_err("refused").contains("version 2"));
    assert!(parse(&[], &ours).is_err());
}

#[test]
fn a_file_says_after_a_restart_what_was_set_and_a_damaged_page_is_made_whole() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("write-intent");
    let identity = identity(GIB);
    assert!(IntentLog::open(&path, &identity).expect_err("none").contains("no write-intent log"));
    let log = IntentLog::create(&path, &identity).expect("made");
    (0..1024).for_each(|region| log.clear(region));
    log.ensure(5 * REGION_PAGES, 6 * REGION_PAGES).expect("written");
    drop(log);
    let (log, marked) = IntentLog::open(&path, &identity).expect("ours");
    assert_eq!(marked.len(), 2 * REGION_PAGES);
    assert_eq!(marked.next_block(BlockIndex(0)), Some(BlockIndex(20)));
    drop(log);
    let mut bytes = std::fs::read(&path).expect("there");
    bytes[5000] ^= 1;
    std::fs::write(&path, &bytes).expect("written");
    let (log, marked) = IntentLog::open(&path, &identity).expect("ours");
    assert_eq!(marked.len(), identity.geometry.pages());
    drop(log);
    let (_, damaged) = parse(&std::fs::read(&path).expect("there"), &identity).expect("ours");
    assert!(damaged.is_empty());
    let (log, _) = IntentLog::open(&path, &identity).expect("ours");
    log.remove().expect("removed");
    assert!(!path.exists());
}

#[test]
fn a_log_that_can_not_be_written_is_removed_and_only_where_that_fails_writes_fail() {
    let identity = identity(GIB);
    let (log, store) = empty_log(&identity);
    store.full.store(true, Ordering::Relaxed);
    store.stuck.store(true, Ordering::Relaxed);
    assert_eq!(log.ensure(0, 0).expect_err("nowhere").kind(), io::ErrorKind::StorageFull);
    assert!(!log.is_durable(0, 0) && !log.is_abandoned());
    store.stuck.store(false, Ordering::Relaxed);
    log.ensure(0, 0).expect("no log is as good as all bits");
    assert!(store.removed.load(Ordering::Relaxed) && log.is_abandoned() && log.is_durable(5000, 9000));
}

#[test]
fn requests_that_come_together_share_a_sync() {
    /// Keeps the first sync waiting until told.
    struct Slow(Arc<MemoryLog>, std::sync::Barrier, AtomicU64);
    impl LogStore for Arc<Slow> {
        fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
            self.0.write_at(offset, bytes)
        }
        fn sync(&self) -> io::Result<()> {
            if self.2.fetch_add(1, Ordering::Relaxed) == 0 {
                self.1.wait();
            }
            self.0.sync()
        }
        fn remove(&self) -> io::Result<()> {
            self.0.remove()
        }
    }
    let identity = identity(GIB);
    let (words, bytes) = all_set(&identity);
    let words = vec![0; words.len()];
    let slow = Arc::new(Slow(MemoryLog::new(bytes), std::sync::Barrier::new(2), AtomicU64::new(0)));
    let log = Arc::new(IntentLog::with_store(Box::new(Arc::clone(&slow)), words));
    let threads: Vec<_> = (0..8)
        .map(|region| {
            let log = Arc::clone(&log);
            std::thread::spawn(move || log.ensure(region * REGION_PAGES, region * REGION_PAGES).expect("written"))
        })
        .collect();
    // All eight have asked; one of them writes.
    while log.lock().asked < 8 {
        std::thread::yield_now();
    }
    slow.1.wait();
    threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    assert!(slow.2.load(Ordering::Relaxed) <= 2 + 1, "one for the first, one for the seven that came meanwhile");
    assert!(log.is_durable(0, 8 * REGION_PAGES - 1));
}

#[test]
fn regions_written_lately_are_not_quiet_and_all_get_their_turn() {
    let identity = identity(GIB);
    let log = IntentLog::with_store(Box::new(MemoryLog::new(all_set(&identity).1)), all_set(&identity).0);
    log.touch(3 * REGION_PAGES, 4 * REGION_PAGES);
    let mut seen: Vec<u64> = log.quiet(600);
    assert!(!seen.contains(&3) && !seen.contains(&4));
    log.touch(700 * REGION_PAGES, 700 * REGION_PAGES);
    assert!(log.is_recent(700) && !log.is_recent(3));
    seen.extend(log.quiet(600));
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 1023, "all but the one written since");
}
