//! What is written is marked, and little else.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;

#[test]
fn every_page_that_differs_after_direct_writes_is_marked_and_no_page_that_was_not_written() {
    let disk = Disk::new(64 * MIB);
    let mut tracker = disk.tracked();
    let before = read_all(&disk.device);
    let file = open_direct(&disk.device);
    let mut numbers = Numbers::new();
    let mut written = PageSet::empty(tracker.geometry());
    for step in 0..600 {
        // Sectors, pages, and writes over several blocks, at any sector.
        let sectors = [1, 1 + numbers.below(16), 8, 1 + numbers.below(3000)][usize::try_from(step % 4).expect("small")];
        let sector = numbers.below(64 * MIB / 512 - sectors);
        let length = usize::try_from(sectors * 512).expect("small");
        write_direct(&file, sector * 512, length, u8::try_from(1 + numbers.below(255)).expect("a byte"));
        written.extend(&range(tracker.geometry(), sector / 8, (sector + sectors).div_ceil(8)));
    }
    let swapped = tracker.swap().expect("swapped");
    let missing: Vec<_> = differing(&before, &read_all(&disk.device))
        .into_iter()
        .filter(|page| !contains(&swapped.pages, *page))
        .collect();
    assert!(missing.is_empty(), "changed and not marked: {missing:?}");
    assert_eq!(swapped.pages, written, "what was written is marked, and nothing else");
    assert!(tracker.swap().expect("swapped").pages.is_empty(), "marks are taken once");
    tracker.detach().expect("detached");
}

#[test]
fn every_page_that_a_file_system_changes_is_marked() {
    let disk = Disk::new(96 * MIB);
    let device = disk.device.to_str().expect("UTF-8");
    run("mkfs.ext4", &["-q", "-F", device]);
    let mut tracker = disk.tracked();
    let before = read_all(&disk.device);
    let mount = disk.folder.path().join("mount");
    std::fs::create_dir(&mount).expect("made");
    run("mount", &[device, mount.to_str().expect("UTF-8")]);
    let mut pages = PageSet::empty(tracker.geometry());
    for round in 0..6_u8 {
        for number in 0..40_usize {
            std::fs::write(mount.join(format!("file-{number}")), vec![round; 1000 * (number + 1)]).expect("written");
        }
        std::fs::remove_file(mount.join(format!("file-{round}"))).expect("removed");
        rustix::fs::syncfs(File::open(&mount).expect("open")).expect("synced");
        pages.extend(&tracker.swap().expect("swapped").pages);
    }
    run("umount", &[mount.to_str().expect("UTF-8")]);
    pages.extend(&tracker.swap().expect("swapped").pages);
    let changed = differing(&before, &read_all(&disk.device));
    assert!(changed.len() > 100, "the file system wrote");
    let missing: Vec<_> = changed.into_iter().filter(|page| !contains(&pages, *page)).collect();
    assert!(missing.is_empty(), "changed and not marked: {missing:?}");
    assert!(pages.len() < tracker.geometry().pages() / 2, "{} of {} pages", pages.len(), tracker.geometry().pages());
    tracker.detach().expect("detached");
}

/// Writers overwrite pages all the time; a reader takes sets and copies their pages, while writes are on their way. In the end
/// the copy is the disk: whatever was read too early was marked again.
#[test]
fn a_copy_that_follows_the_sets_equals_the_disk_however_writes_and_swaps_meet() {
    let disk = Disk::new(32 * MIB);
    let mut tracker = disk.tracked();
    let mut copy = read_all(&disk.device);
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut numbers = Numbers::new();
    let seeds: Vec<u64> = (0..3).map(|_| numbers.below(u64::MAX) | 1).collect();
    let follow = |tracker: &mut Tracker, copy: &mut Vec<u8>| {
        let swapped = tracker.swap().expect("swapped");
        let file = open_direct(&disk.device);
        let mut buffer = PageBuffer::new(PAGE_BYTES);
        for (block, mask) in swapped.pages.iter() {
            for page in mask.iter() {
                let offset = block.0 * (PAGES_PER_BLOCK * PAGE_BYTES) as u64 + u64::from(page) * PAGE_BYTES as u64;
                file.read_at(buffer.bytes_mut(), offset).expect("read");
                let at = usize::try_from(offset).expect("small");
                copy[at..at + PAGE_BYTES].copy_from_slice(buffer.bytes());
            }
        }
        tracker.forget(swapped.sequence).expect("forgotten");
        swapped.pages.len()
    };
    std::thread::scope(|scope| {
        for seed in seeds {
            let (disk, stop, writes) = (&disk, &stop, &writes);
            scope.spawn(move || {
                let (file, mut numbers) = (open_direct(&disk.device), Numbers(seed));
                while !stop.load(Ordering::Relaxed) {
                    let pages = 1 + numbers.below(8);
                    // A few pages often, so that a late reader would be caught.
                    let most = if numbers.below(2) == 0 { 64 } else { 8000 };
                    let page = numbers.below(most);
                    let length = usize::try_from(pages).expect("small") * PAGE_BYTES;
                    write_direct(&file, page * PAGE_BYTES as u64, length, numbers.below(256).to_le_bytes()[0]);
                    writes.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut pages = 0;
        for _ in 0..20 {
            pages += follow(&mut tracker, &mut copy);
        }
        stop.store(true, Ordering::Relaxed);
        println!("{} writes, {pages} pages followed", writes.load(Ordering::Relaxed));
    });
    follow(&mut tracker, &mut copy);
    let wrong = differing(&copy, &read_all(&disk.device));
    assert!(wrong.is_empty(), "pages of which the last content was missed: {wrong:?}");
    let counts = tracker.counts().expect("counted");
    // Neighbouring writes of two threads may be one request; but each was marked at issue and at completion.
    assert!(counts.marks > writes.load(Ordering::Relaxed) * 3 / 2, "{counts:?}");
    assert_eq!(counts.unknown, 0);
    tracker.detach().expect("detached");
}

#[test]
fn a_partition_is_tracked_by_its_own_pages_and_its_neighbours_are_not() {
    let disk = Disk::new(64 * MIB);
    let device = disk.device.to_str().expect("UTF-8");
    // The second begins in the middle of a page of the disk.
    let mut table = PageBuffer::new(512);
    for (entry, [start, sectors]) in table.bytes_mut()[446..].chunks_mut(16).zip([[2048_u32, 32768], [40961, 40003]]) {
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&start.to_le_bytes());
        entry[12..16].copy_from_slice(&sectors.to_le_bytes());
    }
    table.bytes_mut()[510..].copy_from_slice(&[0x55, 0xaa]);
    open_direct(&disk.device).write_at(table.bytes(), 0).expect("written");
    run("partx", &["--update", device]);
    let [first, second] = [1, 2].map(|number| PathBuf::from(format!("{device}p{number}")));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !(first.exists() && second.exists()) {
        assert!(std::time::Instant::now() < deadline, "the partitions do not appear");
        std::thread::yield_now();
    }
    let id = DeviceId::of(&second).expect("a partition");
    assert_eq!((id.partition, id.start_sector, id.bytes), (Some(2), 40961, 40003 * 512));
    assert_eq!(id.disk_number, disk.id().number);
    let (mut tracker, adopted) = Tracker::attach(&id, &disk.pins, &disk.state()).expect("attached");
    assert_eq!(adopted, Adopted::Fresh);
    settled(&mut tracker);
    let (file, neighbour, whole) = (open_direct(&second), open_direct(&first), open_direct(&disk.device));
    write_direct(&neighbour, 0, 1 << 20, 1);
    write_direct(&whole, 0, 4096, 1);
    assert!(tracker.swap().expect("swapped").pages.is_empty(), "not this partition");
    write_direct(&file, 0, 512, 2);
    write_direct(&file, 5 * 4096, 2 * 4096, 2);
    // Its last sector, and one written through the whole disk.
    write_direct(&file, 40002 * 512, 512, 2);
    write_direct(&whole, (40961 + 80) * 512, 512, 3);
    let expected = {
        let mut pages = range(id.geometry().expect("a size"), 0, 1);
        for (first, end) in [(5, 7), (40002 / 8, 40002 / 8 + 1), (10, 11)] {
            pages.extend(&range(tracker.geometry(), first, end));
        }
        pages
    };
    assert_eq!(tracker.swap().expect("swapped").pages, expected);
    tracker.detach().expect("detached");
}

#[test]
fn discards_and_zeroed_ranges_are_marked_exactly_up_to_many_gigabytes() {
    let disk = Disk::new(12 << 30);
    let mut tracker = disk.tracked();
    let device = disk.device.to_str().expect("UTF-8");
    let mut check = |option: &[&str], offset: u64, length: u64| {
        let (at, size) = (offset.to_string(), length.to_string());
        let arguments: Vec<&str> =
            option.iter().copied().chain(["--force", "--offset", &at, "--length", &size, device]).collect();
        run("blkdiscard", &arguments);
        let pages = tracker.swap().expect("swapped").pages;
        assert_eq!(
            pages,
            range(tracker.geometry(), offset / 4096, (offset + length).div_ceil(4096)),
            "{option:?} {offset} {length}"
        );
    };
    check(&[], 512 * 9, 512);
    check(&[], 1 << 20, 3 << 20);
    // Just below, at and above what is marked page by page.
    for blocks in [33, 34, 35, 64, 128, 129] {
        check(&[], 7 * 4096, blocks << 18);
        check(&[], 64 << 18, blocks << 18);
    }
    check(&[], (1 << 30) + 512 * 3, (9 << 30) + 512 * 5);
    check(&[], 0, 12 << 30);
    check(&["--zeroout"], (1 << 20) + 4096, 40 << 20);
    assert_eq!(tracker.counts().expect("counted").unknown, 0);
    tracker.detach().expect("detached");
}

#[test]
fn that_nothing_was_written_since_a_moment_can_be_proven() {
    let disk = Disk::new(16 * MIB);
    let tracker = disk.tracked();
    let file = open_direct(&disk.device);
    let mark = tracker.mark().expect("marked");
    let mut buffer = PageBuffer::new(4096);
    file.read_at(buffer.bytes_mut(), 0).expect("read");
    file.sync_all().expect("flushed");
    assert!(!tracker.marks_since(&mark).expect("known"), "reads and flushes change nothing");
    assert_eq!(tracker.dirty_pages().expect("counted"), 0);
    write_direct(&file, 8192, 4096, 0);
    assert!(tracker.marks_since(&mark).expect("known"), "a write does, also of the same content");
    assert_eq!(tracker.dirty_pages().expect("counted"), 1);
    tracker.detach().expect("detached");
}

#[test]
fn what_can_not_be_known_makes_the_whole_disk_dirty_once() {
    let disk = Disk::new(16 * MIB + 512 * 5);
    let mut tracker = disk.tracked();
    tracker.generation.buffers().expect("known").0.mark_everything();
    let all = PageSet::full(tracker.geometry());
    assert_eq!(tracker.dirty_pages().expect("counted"), all.len());
    assert_eq!(tracker.swap().expect("swapped").pages, all);
    assert!(tracker.swap().expect("swapped").pages.is_empty());
    // The last page is a part of one.
    let last = 16 * MIB + 512 * 4;
    write_direct(&open_direct(&disk.device), last, 512, 1);
    assert_eq!(tracker.swap().expect("swapped").pages, range(tracker.geometry(), last / 4096, last / 4096 + 1));
    tracker.detach().expect("detached");
}

#[test]
fn the_memory_that_is_charged_is_two_bits_for_each_page_and_little_more() {
    let tib = Geometry::new(1 << 40).expect("a size");
    let bitmaps = 2 * (1_u64 << 40) / 4096 / 8;
    assert!((bitmaps..bitmaps + bitmaps / 50).contains(&memory_bytes(tib)), "{}", memory_bytes(tib));
}
