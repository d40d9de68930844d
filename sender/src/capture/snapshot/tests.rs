//! Clones on real file systems, as root; LVM's tools are played by scripts, since device mapper needs a machine of its own.

use std::os::unix::fs::{FileExt, PermissionsExt};

use common::format::close::Consistency;

use super::*;
use crate::capture::cut::Capture;
use crate::capture::freeze::tests::MountedDisk;
use crate::capture::scan::{CHUNK_BYTES, ScanCapture};
use crate::capture::tests::noise;
use crate::capture::{Disk, PageBuffer};

fn read(disk: &dyn Disk) -> Vec<u8> {
    let length = usize::try_from(disk.geometry().disk_bytes()).expect("small");
    let mut buffer = PageBuffer::new(length.next_multiple_of(4096));
    disk.read_at(0, buffer.bytes_mut()).expect("readable");
    buffer.bytes()[..length].to_vec()
}

#[test]
fn a_clone_on_xfs_and_btrfs_is_the_file_at_one_instant_and_leaves_nothing_behind() {
    for fs_type in ["xfs", "btrfs"] {
        let disk = MountedDisk::new(fs_type, 320);
        let path = disk.point.join("image");
        let bytes = noise(1, 3_000_000);
        std::fs::write(&path, &bytes).expect("room");
        // Open for writing, and written through the page cache: a scan of the file itself would be fuzzy.
        let writer = OpenOptions::new().write(true).open(&path).expect("there");
        writer.write_all_at(b"before", 1_000_000).expect("room");
        let clone = clone_image(&path).expect("cloned");
        let probe = clone.watch_rest();
        writer.write_all_at(b"after!", 1_000_000).expect("room");
        writer.write_all_at(&noise(2, 4096), 0).expect("room");
        let mut expected = bytes;
        expected[1_000_000..1_000_006].copy_from_slice(b"before");
        assert!(read(&clone) == expected, "{fs_type}");
        let rest = probe.finish();
        assert_eq!(rest.consistency(), Consistency::Crash, "{fs_type}: {rest}");
        let names: Vec<_> = std::fs::read_dir(&disk.point).expect("mounted").flatten().map(|e| e.file_name()).collect();
        assert_eq!(names, ["image"], "{fs_type}: the clone has no name");
    }
}

#[tokio::test]
async fn a_pass_over_an_image_in_use_is_crash_consistent_where_it_can_be_cloned() {
    for (fs_type, mib, expected) in [("xfs", 320, Consistency::Crash), ("ext4", 32, Consistency::Fuzzy)] {
        let disk = MountedDisk::new(fs_type, mib);
        let path = disk.point.join("image");
        std::fs::write(&path, noise(1, 1 << 20)).expect("room");
        let writer = OpenOptions::new().write(true).open(&path).expect("there");
        let source: std::sync::Arc<dyn Disk> = std::sync::Arc::new(Source::open(&path).expect("an image"));
        let scan = ScanCapture::new(source, common::clock::Clock::System, std::time::Duration::from_secs(3600));
        let cut = scan.with_clones_of(&path).next().await.expect("a pass");
        let mut buffer = PageBuffer::new(CHUNK_BYTES);
        let mut bytes = Vec::new();
        while let Some(piece) = cut.pages.next() {
            writer.write_all_at(&noise(bytes.len() as u64, 4096), 900_000).expect("room");
            cut.pages.read(&piece, buffer.bytes_mut()).expect("readable");
            bytes.extend_from_slice(buffer.bytes());
        }
        assert_eq!(cut.pages.finish().expect("it can tell").0, Some(expected), "{fs_type}");
        assert_eq!(bytes[..1 << 20] == noise(1, 1 << 20), expected == Consistency::Crash, "{fs_type}");
    }
}

#[test]
fn where_blocks_are_not_shared_that_is_said() {
    let disk = MountedDisk::new("ext4", 32);
    let path = disk.point.join("image");
    std::fs::write(&path, noise(1, 100_000)).expect("room");
    let error = clone_image(&path).expect_err("ext4 can't");
    assert!(matches!(&error, SnapshotError::NoClones { path: found } if *found == path), "{error}");
}

#[test]
fn writes_of_one_file_are_in_a_clone_in_the_order_of_their_completion() {
    let disk = MountedDisk::new("xfs", 320);
    let path = disk.point.join("image");
    std::fs::write(&path, vec![0; 64 << 10]).expect("room");
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let file = OpenOptions::new().write(true).open(&path).expect("there");
            let mut number = 1_u64;
            // Slot by slot, one write after the other.
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                file.write_all_at(&number.to_le_bytes(), (number % 16) * 4096).expect("room");
                number += 1;
            }
        });
        for _ in 0..20 {
            let bytes = read(&clone_image(&path).expect("cloned"));
            let slot = |slot: usize| u64::from_le_bytes(bytes[slot * 4096..slot * 4096 + 8].try_into().expect("eight"));
            let newest = (0..16).map(slot).max().expect("sixteen");
            for number in newest.saturating_sub(15).max(1)..=newest {
                assert_eq!(slot(usize::try_from(number % 16).expect("small")), number, "up to {newest}");
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        writer.join().expect("it wrote");
    });
}

/// Scripts that note how they are called.
fn tools(lvs: &str, lvcreate: &str) -> (tempfile::TempDir, LvmTools) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for (name, script) in [("lvs", lvs), ("lvcreate", lvcreate), ("lvremove", "exit 0")] {
        let path = dir.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\necho {name} \"$@\" >> {}/log\n{script}\n", dir.path().display()))
            .expect("room");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("ours");
    }
    let tools = LvmTools { directory: dir.path().to_owned() };
    (dir, tools)
}

#[test]
fn a_logical_volume_is_looked_up_and_snapshots_of_an_earlier_run_are_removed() {
    let lvs = "case \"$*\" in *segtype*) echo '  vg0|root|linear';; *) printf '  root\n  blockferry-a1-00000001\n  blockferry-b2-00000001\n';; esac";
    let (dir, tools) = tools(lvs, "echo 'insufficient free space' >&2; exit 5");
    let volume = LvmVolume::look(Path::new("/dev/vg0/root"), "a-1", tools).expect("a volume");
    let error = volume.take().err().expect("no room");
    assert!(error.to_string().contains("insufficient free space"), "{error}");
    let log = std::fs::read_to_string(dir.path().join("log")).expect("they were called");
    assert!(log.contains("lvremove --yes vg0/blockferry-a1-00000001\n"), "{log}");
    assert!(!log.contains("b2-00000001\n"), "another volume's snapshot stays: {log}");
    assert!(log.contains("lvcreate --snapshot --permission r --name blockferry-a1-"), "{log}");
    assert!(log.trim_end().ends_with("--extents 10%ORIGIN vg0/root"), "{log}");
}

#[test]
fn a_snapshot_that_can_not_be_opened_is_removed_again_and_a_loop_device_is_no_logical_volume() {
    let (dir, tools) = tools("echo '  no-such-group|thin|thin'", "exit 0");
    let volume = LvmVolume::look(Path::new("/dev/no-such-group/thin"), "v", tools.clone()).expect("a volume");
    assert!(matches!(volume.take().err(), Some(SnapshotError::Open(_))));
    let log = std::fs::read_to_string(dir.path().join("log")).expect("they were called");
    assert!(log.contains("--setactivationskip n no-such-group/thin"), "{log}");
    assert!(
        log.lines().last().is_some_and(|line| line.starts_with("lvremove --yes no-such-group/blockferry-v-")),
        "{log}"
    );
    assert!(LvmVolume::of(Path::new("/dev/null"), "v", tools).expect("looked at").is_none());
}
