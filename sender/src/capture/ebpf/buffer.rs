//! One of the two bitmaps, mapped into this process. Its layout is described in `bpf/tracker.bpf.c`.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use common::ids::{BlockIndex, Geometry, PageMask};
use common::pages::PageSet;
use rustix::mm::{MapFlags, ProtFlags};

/// In the last word: the whole disk is dirty.
const FLAG_EVERYTHING: u64 = 1;

/// How many words a buffer has, and what they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// Words with a bit for each page, one word for each block.
    pub(super) blocks: u32,
    /// All words: behind the blocks' a bit for each block, then the word with the flag.
    pub(super) words: u32,
}

impl Layout {
    /// `None` for a disk whose words can't be counted in 32 bits (over 2^49 bytes, which no geometry has).
    pub(super) fn of(geometry: Geometry) -> Option<Self> {
        let blocks = geometry.blocks();
        let words = blocks + blocks.div_ceil(64) + 1;
        Some(Self { blocks: u32::try_from(blocks).ok()?, words: u32::try_from(words).ok()? })
    }

    /// Memory of one buffer in the kernel, in bytes.
    pub(super) fn bytes(self) -> usize {
        (self.words as usize * 8).next_multiple_of(4096)
    }
}

/// A bitmap, mapped.
#[derive(Debug)]
pub(super) struct Buffer {
    address: NonNull<AtomicU64>,
    layout: Layout,
}

#[expect(unsafe_code, reason = "memory shared with the kernel has no owner that the compiler knows")]
// SAFETY: the mapping is owned by this value alone and its words are atomics.
unsafe impl Send for Buffer {}
#[expect(unsafe_code, reason = "as above")]
// SAFETY: all access is through atomics.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Maps the array `map`, which has `layout.words` elements of 8 bytes and may be mapped (the kernel checks the length).
    pub(super) fn map(map: BorrowedFd<'_>, layout: Layout) -> std::io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        #[expect(unsafe_code, reason = "there is no safe way to map a file descriptor")]
        // SAFETY: a new mapping at an address that the kernel chooses; nobody else knows it.
        let address =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), layout.bytes(), protection, MapFlags::SHARED, map, 0)? };
        let address = NonNull::new(address.cast()).ok_or(std::io::ErrorKind::InvalidData)?;
        Ok(Self { address, layout })
    }

    fn words(&self) -> &[AtomicU64] {
        #[expect(unsafe_code, reason = "the mapping is seen as what it is")]
        // SAFETY: the mapping is page-aligned, at least `words` times 8 bytes long, lives as long as `self`, and is only
        // written with atomic operations, here and by the programs.
        unsafe {
            std::slice::from_raw_parts(self.address.as_ptr(), self.layout.words as usize)
        }
    }

    fn parts(&self) -> (&[AtomicU64], &[AtomicU64], &AtomicU64) {
        let (pages, rest) = self.words().split_at(self.layout.blocks as usize);
        let (blocks, flags) = rest.split_at(rest.len() - 1);
        (pages, blocks, &flags[0])
    }

    /// Adds the pages that are marked to `into`.
    pub(super) fn collect(&self, into: &mut PageSet) {
        let (pages, blocks, flags) = self.parts();
        if flags.load(Ordering::Acquire) & FLAG_EVERYTHING != 0 {
            *into = PageSet::full(into.geometry());
            return;
        }
        for (index, word) in (0_u64..).zip(blocks) {
            let mut word = word.load(Ordering::Acquire);
            while word != 0 {
                let first = word.trailing_zeros();
                let count = (word >> first).trailing_ones();
                into.insert_blocks(BlockIndex(index * 64 + u64::from(first)), u64::from(count));
                word &= !(PageMask::first(count).0 << first);
            }
        }
        for (index, word) in (0_u64..).zip(pages) {
            let word = word.load(Ordering::Acquire);
            if word != 0 {
                into.insert(BlockIndex(index), PageMask(word));
            }
        }
    }

    /// True where nothing is marked.
    pub(super) fn is_clear(&self) -> bool {
        self.words().iter().all(|word| word.load(Ordering::Acquire) == 0)
    }

    /// Clears all marks. Only for the buffer that no program writes any more.
    pub(super) fn clear(&self) {
        // Words that are zero are not written, so that a large disk at rest costs no memory traffic.
        self.words()
            .iter()
            .filter(|word| word.load(Ordering::Relaxed) != 0)
            .for_each(|word| word.store(0, Ordering::Release));
    }

    /// Marks everything, as the programs do where the pages can't be known.
    #[cfg(test)]
    pub(super) fn mark_everything(&self) {
        self.parts().2.fetch_or(FLAG_EVERYTHING, Ordering::AcqRel);
    }

    /// Takes back that everything is marked, for the time before anybody has read anything.
    pub(super) fn unmark_everything(&self) {
        self.parts().2.fetch_and(!FLAG_EVERYTHING, Ordering::AcqRel);
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "what was mapped is unmapped")]
        // SAFETY: the mapping is this value's, and no reference into it outlives the value.
        let result = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.layout.bytes()) };
        debug_assert!(result.is_ok());
    }
}
