//! Disk images for tests: a real ext4 filled with this machine's own files, and churn over its pages. The same for the same
//! seed and machine.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::pair::check;

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// A small generator (splitmix64), so that a seed gives the same bytes for ever.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }

    /// A page: every other one random, the rest of the kind that compresses.
    pub fn page(&mut self) -> Vec<u8> {
        if self.number() & 1 == 0 {
            (0..PAGE / 8).flat_map(|_| self.number().to_le_bytes()).collect()
        } else {
            format!("{:020} blockferry ", self.number()).into_bytes().into_iter().cycle().take(PAGE).collect()
        }
    }
}

/// Builds an ext4 image of `mib` MiB, about half full, every block allocated.
///
/// # Panics
/// If mkfs.ext4 fails or the disk is full.
pub fn build(image: &Path, mib: u64) {
    let tree = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let mut budget = mib << 19;
    let mut folders = vec![PathBuf::from("/usr/share"), PathBuf::from("/usr/bin")];
    let mut number = 0;
    while let Some(folder) = folders.pop().filter(|_| budget > 0) {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        let mut entries: Vec<_> = entries.filter_map(Result::ok).collect();
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let Ok(kind) = entry.file_type() else { continue };
            let size = entry.metadata().map_or(0, |meta| meta.len().next_multiple_of(PAGE as u64));
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file()
                && size > 0
                && size <= budget
                && std::fs::copy(entry.path(), tree.path().join(number.to_string())).is_ok()
            {
                number += 1;
                budget -= size;
            }
        }
    }
    File::create(image).and_then(|file| file.set_len(mib << 20)).expect("the image can be made");
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d"]).arg(tree.path()).arg(image);
    check("mkfs.ext4", &mkfs.output().expect("e2fsprogs is installed by make deps"));
}

/// Overwrites `pages` pages of the image at random places; returns the bytes that were written at least once.
///
/// # Panics
/// If the image can't be written.
pub fn churn(image: &Path, pages: u64, seed: u64) -> u64 {
    let mut random = Random(seed);
    let file = File::options().write(true).open(image).expect("the image is there");
    let count = file.metadata().expect("a file").len() / PAGE as u64;
    let mut chosen: Vec<u64> = (0..pages).map(|_| random.below(count)).collect();
    chosen.sort_unstable();
    chosen.dedup();
    for page in &chosen {
        file.write_all_at(&random.page(), page * PAGE as u64).expect("the image can be written");
    }
    file.sync_all().expect("the image can be synced");
    chosen.len() as u64 * PAGE as u64
}
