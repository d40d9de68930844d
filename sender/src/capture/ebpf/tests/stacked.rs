//! Devices that take bios instead of requests. A zram disk stands for device mapper and md, which a test kernel may not have;
//! where it has them, `BLOCKFERRY_TEST_BIO_DEVICES` names some, separated by commas. Their content is lost.

use super::*;

/// A zram disk that goes at the end.
struct Zram {
    number: String,
    folder: tempfile::TempDir,
    pins: PathBuf,
}

impl Zram {
    fn new(bytes: u64) -> Self {
        let number = std::fs::read_to_string("/sys/class/zram-control/hot_add")
            .expect("the tests of stacked devices need a kernel with zram (CONFIG_ZRAM)");
        let number = number.trim().to_owned();
        std::fs::write(format!("/sys/block/zram{number}/disksize"), bytes.to_string()).expect("a size");
        let name = common::ids::VolumeId::from_random(common::rng::random().expect("random bytes")).to_string();
        Self { number, folder: tempfile::tempdir().expect("a directory"), pins: default_directory(&name) }
    }

    fn device(&self) -> PathBuf {
        let path = PathBuf::from(format!("/dev/zram{}", self.number));
        if !path.exists() {
            let number = std::fs::read_to_string(format!("/sys/block/zram{}/dev", self.number)).expect("a number");
            let (major, minor) = number.trim().split_once(':').expect("a pair");
            run("mknod", &[path.to_str().expect("UTF-8"), "b", major, minor]);
        }
        path
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let _ = remove_pins(&self.pins, &self.folder.path().join("state"));
        let _ = std::fs::write(format!("/sys/block/zram{}/reset", self.number), "1");
        let _ = std::fs::write("/sys/class/zram-control/hot_remove", &self.number);
    }
}

#[test]
fn devices_that_take_bios_are_tracked_by_them_at_queueing_and_at_completion() {
    match std::env::var("BLOCKFERRY_TEST_BIO_DEVICES") {
        Ok(devices) => devices.split(',').for_each(|device| {
            let folder = tempfile::tempdir().expect("a directory");
            let name = common::ids::VolumeId::from_random(common::rng::random().expect("random bytes")).to_string();
            println!("{device}");
            write_restart_and_compare(Path::new(device), &default_directory(&name), &folder.path().join("state"));
        }),
        Err(_) => {
            let zram = Zram::new(64 * MIB);
            write_restart_and_compare(&zram.device(), &zram.pins, &zram.folder.path().join("state"));
        }
    }
}

fn write_restart_and_compare(device: &Path, pins: &Path, state: &Path) {
    let id = DeviceId::of(device).expect("a device");
    assert_eq!(id.kind, DeviceKind::Bios);
    let (mut tracker, adopted) = Tracker::attach(&id, pins, state).expect("attached");
    assert_eq!(adopted, Adopted::Fresh);
    settled(&mut tracker);
    let before = read_all(&id.path);
    let file = open_direct(&id.path);
    let mut numbers = Numbers::new();
    let mut written = PageSet::empty(tracker.geometry());
    let marks = tracker.counts().expect("counted").marks;
    for _ in 0..300 {
        let pages = 1 + numbers.below(380);
        let page = numbers.below(tracker.geometry().pages() - pages);
        let length = usize::try_from(pages).expect("small") * PAGE_BYTES;
        write_direct(&file, page * 4096, length, u8::try_from(1 + numbers.below(255)).expect("a byte"));
        written.extend(&range(tracker.geometry(), page, page + pages));
    }
    file.sync_all().expect("flushed");
    let swapped = tracker.swap().expect("swapped").pages;
    let missing: Vec<_> =
        differing(&before, &read_all(&id.path)).into_iter().filter(|page| !contains(&swapped, *page)).collect();
    assert!(missing.is_empty(), "changed and not marked: {missing:?}");
    assert_eq!(swapped.len(), written.len(), "{} events unknown", tracker.counts().expect("counted").unknown);
    assert_eq!(swapped, written);
    let counts = tracker.counts().expect("counted");
    assert!(counts.marks - marks >= 600, "{counts:?}");
    assert_eq!(counts.unknown, 0);
    let device = id.path.to_str().expect("UTF-8");
    if device::read_number(&id.disk_folder().join("queue/discard_max_bytes")) > Some(0) {
        run("blkdiscard", &["--force", "--offset", "4096", "--length", "50003968", device]);
        let pages = tracker.swap().expect("swapped").pages;
        assert_eq!(pages, range(tracker.geometry(), 1, 1 + 50_003_968 / 4096));
    }
    tracker.forget(tracker.sequence()).expect("forgotten");
    drop(tracker);
    write_direct(&file, 0, 4096, 7);
    let (tracker, adopted) = Tracker::attach(&id, pins, state).expect("attached");
    assert_eq!(adopted, Adopted::Pins(range(tracker.geometry(), 0, 1)));
    tracker.detach().expect("detached");
}
