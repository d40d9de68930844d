use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::format::close::Consistency;
use common::format::state::{HashChange, HashEntry, SourceIdentity, UNKNOWN_HASH, ZERO_PAGE_HASH};
use common::ids::{BlockIndex, PageMask};
use common::limits::{BLOCK_BYTES, PAGE_BYTES};

use super::scan::{compare, gather};
use super::*;

/// Bytes that neither repeat nor compress, different for each seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect()
}

/// A file under a loop device, detached when dropped. Needs root.
pub(crate) struct LoopDevice {
    pub(crate) path: PathBuf,
}

impl LoopDevice {
    pub(crate) fn attach(file: &Path) -> Self {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().expect("losetup runs");
        assert!(output.status.success(), "losetup (this test needs root): {}", String::from_utf8_lossy(&output.stderr));
        Self { path: PathBuf::from(String::from_utf8(output.stdout).expect("text").trim()) }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

/// A file that is closed again, so that nobody has it open for writing.
pub(crate) fn image(bytes: &[u8]) -> tempfile::TempPath {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(bytes).expect("room");
    file.into_temp_path()
}

pub(crate) fn overwrite(path: &Path, offset: u64, bytes: &[u8]) {
    let file = std::fs::OpenOptions::new().write(true).open(path).expect("there");
    file.write_all_at(bytes, offset).expect("room");
    file.sync_all().expect("it syncs");
}

fn read_all(source: &Source) -> Vec<u8> {
    let mut buffer = PageBuffer::new(5 * PAGE_BYTES);
    let mut bytes = Vec::new();
    for offset in (0..source.geometry().disk_bytes()).step_by(5 * PAGE_BYTES) {
        buffer.bytes_mut().fill(0xee);
        source.read_at(offset, buffer.bytes_mut()).expect("readable");
        bytes.extend_from_slice(buffer.bytes());
    }
    bytes
}

#[test]
fn an_image_file_is_read_exactly_cached_or_not_and_padded_with_zeros() {
    for length in [PAGE_BYTES, PAGE_BYTES + 1, 100_000, BLOCK_BYTES * 2 + 512 + 7] {
        let bytes = noise(length as u64, length);
        let path = image(&bytes);
        let source = Source::open(&path).expect("an image");
        assert_eq!(source.geometry().disk_bytes(), length as u64);
        let mut padded = bytes;
        padded.resize(length.next_multiple_of(5 * PAGE_BYTES), 0);
        assert_eq!(read_all(&source), padded, "from the page cache, {length} bytes");
        let file = std::fs::File::open(&path).expect("there");
        file.sync_all().expect("it syncs");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("a hint");
        assert_eq!(read_all(&source), padded, "from the disk, {length} bytes");
        // Some of it cached, some not.
        let mut page = [0; PAGE_BYTES];
        file.read_exact_at(&mut page[..1], length as u64 / 2).expect("there");
        assert_eq!(read_all(&source), padded, "from both, {length} bytes");
    }
}

#[test]
fn a_block_device_is_read_exactly_and_sees_buffered_writes() {
    let mut bytes = noise(1, BLOCK_BYTES * 2 + 512 * 3);
    let path = image(&bytes);
    let device = LoopDevice::attach(&path);
    let source = Source::open(&device.path).expect("a device");
    assert_eq!((source.geometry().disk_bytes(), source.sector_bytes()), (bytes.len() as u64, 512));
    assert!(matches!(source.identity(), SourceIdentity::Device { .. }));
    let padded = |bytes: &[u8]| {
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().next_multiple_of(5 * PAGE_BYTES), 0);
        padded
    };
    assert_eq!(read_all(&source), padded(&bytes));
    // Written through the device's page cache, not synced: direct reads have to see it all the same.
    let writer = std::fs::OpenOptions::new().write(true).open(&device.path).expect("writable");
    writer.write_all_at(&[7; 3000], 70_000).expect("room");
    bytes[70_000..73_000].fill(7);
    assert_eq!(read_all(&source), padded(&bytes));
}

#[test]
fn what_is_no_disk_is_refused_with_a_reason() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let missing = directory.path().join("missing");
    assert!(matches!(Source::open(&missing), Err(CaptureError::Missing { path }) if path == missing));
    assert!(matches!(Source::open(directory.path()), Err(CaptureError::NotADisk { found: "directory", .. })));
    assert!(matches!(
        Source::open(Path::new("/dev/null")),
        Err(CaptureError::NotADisk { found: "character device", .. })
    ));
    assert!(matches!(Source::open(&image(&[])), Err(CaptureError::TooSmall { found: 0, .. })));
    assert!(matches!(Source::open(&image(&[1; 4095])), Err(CaptureError::TooSmall { found: 4095, .. })));
}

#[test]
fn a_disk_of_another_size_or_serial_than_registered_is_refused_by_name() {
    let path = image(&[1; 8192]);
    let source = Source::open(&path).expect("an image");
    source.check(8192, source.identity()).expect("the same");
    source.check(8192, &SourceIdentity::File { device: 0, inode: 0 }).expect("an image may be a copy");
    let error = source.check(4096, source.identity()).expect_err("it grew");
    assert!(matches!(error, CaptureError::SizeChanged { expected: 4096, found: 8192, .. }));
    assert!(error.to_string().contains(path.to_str().expect("text")), "{error}");
}

#[test]
fn a_file_that_shrinks_or_grows_under_a_pass_is_an_error() {
    let path = image(&[1; 3 * PAGE_BYTES]);
    let source = Source::open(&path).expect("an image");
    source.check_size().expect("unchanged");
    let file = std::fs::OpenOptions::new().write(true).open(&path).expect("there");
    file.set_len(PAGE_BYTES as u64 + 5).expect("it shrinks");
    let mut buffer = PageBuffer::new(3 * PAGE_BYTES);
    let error = source.read_at(0, buffer.bytes_mut()).expect_err("too short");
    assert!(matches!(error, CaptureError::SizeChanged { expected: 12_288, found: 4_101, .. }), "{error}");
    file.set_len(10 * PAGE_BYTES as u64).expect("it grows");
    assert!(matches!(source.check_size(), Err(CaptureError::SizeChanged { .. })));
    file.write_all_at(&[9; PAGE_BYTES], 3 * PAGE_BYTES as u64).expect("room");
    let mut buffer = PageBuffer::new(4 * PAGE_BYTES);
    source.read_at(0, buffer.bytes_mut()).expect("the registered bytes are there");
    assert!(buffer.bytes()[3 * PAGE_BYTES..].iter().all(|byte| *byte == 0), "nothing from beyond the end");
}

#[test]
fn a_file_that_nobody_touched_is_at_rest_and_one_that_was_written_or_is_open_for_writing_is_not() {
    let path = image(&[1; 8192]);
    let source = Source::open(&path).expect("an image");
    let rest = source.watch_rest().finish();
    assert_eq!(rest.consistency(), Consistency::Crash, "{rest}");

    let probe = source.watch_rest();
    overwrite(&path, 0, &[2; 10]);
    let rest = probe.finish();
    assert_eq!(rest.consistency(), Consistency::Fuzzy, "written: {rest}");

    // The same, at once after another write: the times must differ all the same.
    overwrite(&path, 0, &[3; 10]);
    let probe = source.watch_rest();
    overwrite(&path, 0, &[4; 10]);
    assert_eq!(probe.finish().consistency(), Consistency::Fuzzy, "written right after a write");

    let writer = std::fs::OpenOptions::new().write(true).open(&path).expect("there");
    assert_eq!(source.watch_rest().finish().consistency(), Consistency::Fuzzy, "open for writing");
    drop(writer);
    let probe = source.watch_rest();
    let writer = std::fs::OpenOptions::new().write(true).open(&path).expect("there");
    assert_eq!(probe.finish().consistency(), Consistency::Fuzzy, "opened for writing meanwhile");
    drop(writer);
    // Another test that starts a process holds a copy of the descriptor for a moment.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while source.watch_rest().finish().consistency() != Consistency::Crash {
        assert!(std::time::Instant::now() < deadline, "at rest again");
    }
}

#[test]
fn an_image_under_a_loop_device_is_not_at_rest() {
    let path = image(&[1; 65_536]);
    let _device = LoopDevice::attach(&path);
    let rest = Source::open(&path).expect("an image").watch_rest().finish();
    assert_eq!(rest.consistency(), Consistency::Fuzzy, "{rest}");
}

#[test]
fn a_device_is_at_rest_unless_it_is_written_or_held_by_someone() {
    let path = image(&noise(1, 1 << 20));
    let device = LoopDevice::attach(&path);
    let source = Source::open(&device.path).expect("a device");
    let mut buffer = PageBuffer::new(BLOCK_BYTES);
    let probe = source.watch_rest();
    source.read_at(0, buffer.bytes_mut()).expect("readable");
    let rest = probe.finish();
    assert_eq!(rest.consistency(), Consistency::Crash, "{rest}");

    // Written into the page cache only: the kernel has not counted it yet.
    let probe = source.watch_rest();
    let writer = std::fs::OpenOptions::new().write(true).open(&device.path).expect("writable");
    writer.write_all_at(&[7; 512], 0).expect("room");
    let rest = probe.finish();
    assert_eq!(rest.consistency(), Consistency::Fuzzy, "{rest}");

    // Dirty from before: flushed first, so the pass's own reads do not count as writes.
    writer.write_all_at(&[8; 512], 0).expect("room");
    let probe = source.watch_rest();
    source.read_at(0, buffer.bytes_mut()).expect("readable");
    let rest = probe.finish();
    assert_eq!(rest.consistency(), Consistency::Crash, "{rest}");

    let _holder = source.watch_rest();
    let rest = source.watch_rest().finish();
    assert_eq!(rest.consistency(), Consistency::Fuzzy, "held exclusively: {rest}");
}

#[test]
fn only_pages_that_differ_are_found_and_zeros_are_told_apart() {
    let key = [5; 32];
    let mut block = noise(3, BLOCK_BYTES);
    block[2 * PAGE_BYTES..4 * PAGE_BYTES].fill(0);
    let first = compare(&key, &block, PageMask::FULL, PageMask::FULL, &HashEntry::UNKNOWN);
    assert_eq!((first.data, first.zero, first.all_zero), (PageMask(!0b1100), PageMask(0b1100), false));
    let mut known = HashEntry::UNKNOWN;
    known.0.copy_from_slice(&first.hashes);
    assert_eq!(known.0[2], ZERO_PAGE_HASH);
    assert!(compare(&key, &block, PageMask::FULL, PageMask::FULL, &known).changed().is_empty(), "nothing changed");
    assert_eq!(
        compare(&[6; 32], &block, PageMask::FULL, PageMask::FULL, &known).data,
        PageMask(!0b1100),
        "another key"
    );

    block[PAGE_BYTES - 1] ^= 1; // the last byte of page 0
    block[63 * PAGE_BYTES] ^= 1; // the first of page 63
    block[3 * PAGE_BYTES + 7] = 1; // zero no more
    block[9 * PAGE_BYTES..10 * PAGE_BYTES].fill(0);
    let second = compare(&key, &block, PageMask::FULL, PageMask::FULL, &known);
    assert_eq!((second.data, second.zero), (PageMask(1 | 1 << 63 | 1 << 3), PageMask(1 << 9)));
    assert_eq!(second.hashes.len(), 4);
    assert_eq!(second.hashes[2], ZERO_PAGE_HASH, "ascending: pages 0, 3, 9, 63");
    let HashChange::Pages { mask, .. } = second.into_change(BlockIndex(1)) else { panic!("pages of a block") };
    assert_eq!(mask, PageMask(1 | 1 << 3 | 1 << 9 | 1 << 63));
}

#[test]
fn a_page_that_may_not_be_compared_differs_whatever_its_hash_says() {
    let block = noise(3, BLOCK_BYTES);
    let first = compare(&[5; 32], &block, PageMask::FULL, PageMask::FULL, &HashEntry::UNKNOWN);
    let known = HashEntry(first.hashes.try_into().expect("all 64"));
    let comparable = PageMask(!0b101);
    assert_eq!(compare(&[5; 32], &block, PageMask::FULL, comparable, &known).data, PageMask(0b101));
    assert_eq!(
        compare(&[5; 32], &block, PageMask(0b11), comparable, &known).data,
        PageMask(0b1),
        "only pages asked for"
    );
}

#[test]
fn a_block_of_zeros_is_all_zero_only_where_it_has_all_its_pages() {
    let block = vec![0; BLOCK_BYTES];
    assert!(compare(&[5; 32], &block, PageMask::FULL, PageMask::FULL, &HashEntry::UNKNOWN).all_zero);
    let partial = compare(&[5; 32], &block, PageMask::first(63), PageMask::FULL, &HashEntry::UNKNOWN);
    assert_eq!((partial.all_zero, partial.zero), (false, PageMask::first(63)));
    let mut known = HashEntry::ZERO;
    known.0[7] = UNKNOWN_HASH;
    let difference = compare(&[5; 32], &block, PageMask::FULL, PageMask::FULL, &known);
    assert_eq!((difference.all_zero, difference.zero), (true, PageMask(1 << 7)));
}

#[test]
fn pages_are_gathered_in_order() {
    let block = noise(4, BLOCK_BYTES);
    let page = |index: usize| &block[index * PAGE_BYTES..(index + 1) * PAGE_BYTES];
    let mut scratch = Vec::new();
    assert_eq!(gather(&block, PageMask::EMPTY, &mut scratch), &[] as &[u8]);
    assert_eq!(gather(&block, PageMask::FULL, &mut scratch), block);
    assert_eq!(gather(&block, PageMask(0b110), &mut scratch), [page(1), page(2)].concat());
    assert_eq!(gather(&block, PageMask(1 << 63), &mut scratch), page(63));
    assert_eq!(gather(&block, PageMask(1 << 63 | 0b101), &mut scratch), [page(0), page(2), page(63)].concat());
}
