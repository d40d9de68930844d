//! What outlives a kill, and what a power cut.

use super::*;

const DISK: u64 = 3 * 262_144 + 5 * 4096 + 512;
const BOOT: Option<[u8; 16]> = Some([1; 16]);

fn geometry() -> Geometry {
    Geometry::new(DISK).expect("not empty")
}

fn binding() -> Binding {
    Binding { volume: VolumeId::from_random([3; 16]), point: CloseId([4; 32]), disk_bytes: DISK }
}

fn read(overlay: &Overlay, range: std::ops::Range<u64>) -> (Vec<u8>, u32) {
    let mut pages = Pages::of(geometry(), &range);
    overlay.read(&mut pages).expect("readable");
    let missing = pages.blocks().map(|block| pages.wanted(block).count()).sum();
    (pages.into_bytes(), missing)
}

#[test]
fn the_header_is_byte_for_byte_what_it_was_when_first_written() {
    let golden = include_bytes!("../golden/overlay-v1.bin");
    assert_eq!(binding().encode(), golden);
    assert_eq!(Binding::decode(golden), Ok(binding()));
    for at in 0..golden.len() {
        let mut broken = golden.to_vec();
        broken[at] ^= 4;
        assert!(Binding::decode(&broken).is_err(), "byte {at}: the checksum covers all");
    }
}

#[test]
fn what_was_written_outlives_a_kill_and_what_was_flushed_a_power_cut() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let path = dir.path().join("overlay");
    let overlay = Overlay::open_in_boot(&path, &binding(), geometry(), BOOT).expect("a new one");
    overlay.write(4096, &[7; 8192]).expect("writable");
    overlay.flush().expect("synced");
    overlay.write(300_000 / 4096 * 4096, &[8; 4096]).expect("writable");
    overlay.zero(262_144 * 2, 262_144, true).expect("zeroed");
    drop(overlay);
    // Killed: all is there.
    let overlay = Overlay::open_in_boot(&path, &binding(), geometry(), BOOT).expect("the same");
    assert_eq!(overlay.pages(), 2 + 1 + 64);
    let (bytes, missing) = read(&overlay, 0..12_288);
    assert_eq!((missing, &bytes[4096..]), (1, &[7; 8192][..]), "the first page is the point's");
    drop(overlay);
    // Another boot: only what was flushed.
    let overlay = Overlay::open_in_boot(&path, &binding(), geometry(), Some([2; 16])).expect("the same");
    assert_eq!(overlay.pages(), 2);
    assert_eq!(read(&overlay, 0..12_288).1, 1);
    overlay.write(0, &[9; 4096]).expect("writable");
    drop(overlay);
    let overlay = Overlay::open_in_boot(&path, &binding(), geometry(), Some([2; 16])).expect("the same");
    assert_eq!(read(&overlay, 0..12_288).1, 0, "written in this boot");
    overlay.flush().expect("synced");
    drop(overlay);
    let overlay = Overlay::open_in_boot(&path, &binding(), geometry(), None).expect("the same");
    assert_eq!(overlay.pages(), 3, "what a later run flushes that an earlier one wrote is durable too");
}

#[test]
fn an_overlay_of_another_point_or_in_use_or_of_rubbish_is_refused() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let path = dir.path().join("overlay");
    let overlay = Overlay::open(&path, &binding(), geometry()).expect("a new one");
    assert!(matches!(Overlay::open(&path, &binding(), geometry()), Err(OverlayError::InUse { .. })));
    drop(overlay);
    let other = Binding { point: CloseId([5; 32]), ..binding() };
    let error = Overlay::open(&path, &other, geometry()).expect_err("of another point");
    assert!(error.to_string().contains(&format!("--point {}", binding().point)), "{error}");
    assert_eq!(Binding::read(&path).expect("readable"), Some(binding()));
    std::fs::write(&path, "a letter to my aunt").expect("writable");
    assert!(matches!(Overlay::open(&path, &binding(), geometry()), Err(OverlayError::NotOne { .. })));
    assert_eq!(Binding::read(&dir.path().join("none")).expect("no error"), None);
}

#[test]
fn the_end_of_a_disk_that_ends_within_a_page_can_be_written() {
    let overlay = Overlay::temporary(Path::new("/var/tmp"), geometry()).expect("a file");
    let last = DISK / 4096 * 4096;
    overlay.write(last, &[5; 512]).expect("writable");
    let (bytes, missing) = read(&overlay, last..DISK);
    assert_eq!((missing, bytes.len()), (0, 4096));
    assert!(bytes[..512].iter().all(|byte| *byte == 5));
}
