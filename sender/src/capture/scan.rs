//! Comparing a block with what is known of it, and handing out the disk in chunks. Pure but for the lock.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use common::format::state::{HashChange, HashEntry, PageHash, ZERO_PAGE_HASH};
use common::ids::{BlockIndex, Geometry, PageMask};
use common::limits::{BLOCK_BYTES, PAGE_BYTES, RANGE_BLOCKS_MAX};

/// Blocks read at a time: 1 MiB reads are where disks and kernels stop gaining.
pub const CHUNK_BLOCKS: usize = 4;
/// Bytes read at a time.
pub const CHUNK_BYTES: usize = CHUNK_BLOCKS * BLOCK_BYTES;
/// Chunks that may be handed out beyond the oldest that is still being compared.
const CHUNKS_AHEAD_MAX: u64 = 256;

static ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// How a block differs from what is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDifference {
    /// Pages with new content.
    pub data: PageMask,
    /// Pages that became zero.
    pub zero: PageMask,
    /// Every page of the block is zero, and it has all 64.
    pub all_zero: bool,
    /// New hashes of the pages of both masks, ascending.
    pub hashes: Vec<PageHash>,
}

impl BlockDifference {
    /// Pages that differ.
    #[must_use]
    pub fn changed(&self) -> PageMask {
        self.data.or(self.zero)
    }

    /// What it changes in the page hashes, once a record of it is committed.
    #[must_use]
    pub fn into_change(self, block: BlockIndex) -> HashChange {
        HashChange::Pages { block, mask: self.changed(), hashes: self.hashes }
    }
}

/// The hash of a page: keyed BLAKE3, truncated to 128 bits; a constant for a page of zeros.
#[must_use]
pub fn page_hash(key: &[u8; 32], page: &[u8]) -> PageHash {
    if page == ZERO_PAGE {
        return ZERO_PAGE_HASH;
    }
    let mut hash = [0; 16];
    hash.copy_from_slice(&blake3::keyed_hash(key, page).as_bytes()[..16]);
    hash
}

/// Compares the pages of `existing`, which lie at their places in `bytes`, with their known hashes.
#[must_use]
pub fn compare(key: &[u8; 32], bytes: &[u8], existing: PageMask, known: &HashEntry) -> BlockDifference {
    let (mut data, mut zero, mut zeros) = (PageMask::EMPTY, PageMask::EMPTY, 0);
    let mut hashes = Vec::new();
    for index in existing.iter() {
        let start = index as usize * PAGE_BYTES;
        let hash = page_hash(key, &bytes[start..start + PAGE_BYTES]);
        let is_zero = hash == ZERO_PAGE_HASH;
        zeros += u32::from(is_zero);
        if hash != known.0[index as usize] {
            if is_zero {
                zero = zero.with(index);
            } else {
                data = data.with(index);
            }
            hashes.push(hash);
        }
    }
    BlockDifference { data, zero, all_zero: zeros == PageMask::FULL.count(), hashes }
}

/// Puts the pages of `mask` behind one another: `bytes` itself where it needs no copy, else `scratch`.
#[must_use]
pub fn gather<'a>(bytes: &'a [u8], mask: PageMask, scratch: &'a mut Vec<u8>) -> &'a [u8] {
    let (first, count) = (mask.0.trailing_zeros() as usize, mask.count() as usize);
    if count == 0 {
        return &[];
    }
    if mask.0 >> first == PageMask::first(mask.count()).0 {
        return &bytes[first * PAGE_BYTES..(first + count) * PAGE_BYTES];
    }
    scratch.clear();
    for index in mask.iter() {
        let start = index as usize * PAGE_BYTES;
        scratch.extend_from_slice(&bytes[start..start + PAGE_BYTES]);
    }
    scratch
}

/// Consecutive blocks that became zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZeroRun {
    /// The first.
    pub first: BlockIndex,
    /// How many, at most [`RANGE_BLOCKS_MAX`].
    pub count: u32,
}

#[derive(Debug, Default)]
struct ChunkState {
    next: u64,
    /// The oldest chunk whose zero blocks are not known yet.
    low: u64,
    /// Zero blocks of chunks after it, a bit each.
    ahead: BTreeMap<u64, u8>,
    run: Option<ZeroRun>,
    stopped: bool,
}

/// Hands a disk out in chunks, in order, to several threads, and joins the blocks that they find to be zero to runs.
///
/// Promises: each chunk once; each zero block in one run; never more than [`CHUNKS_AHEAD_MAX`] chunks ahead.
#[derive(Debug)]
pub struct Chunks {
    chunks: u64,
    state: Mutex<ChunkState>,
    moved: Condvar,
}

impl Chunks {
    /// All chunks of a disk.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        let chunks = geometry.blocks().div_ceil(CHUNK_BLOCKS as u64);
        Self { chunks, state: Mutex::default(), moved: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, ChunkState> {
        // Nothing that holds the lock panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next chunk, or `None` at the end or after [`Self::stop`]. Waits while it would get too far ahead.
    pub fn take(&self) -> Option<u64> {
        let mut state = self.lock();
        while !state.stopped && state.next < self.chunks && state.next >= state.low + CHUNKS_AHEAD_MAX {
            state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.stopped || state.next >= self.chunks {
            return None;
        }
        state.next += 1;
        Some(state.next - 1)
    }

    /// Ends the handing out, also for those who wait.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.moved.notify_all();
    }

    /// True after [`Self::stop`].
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.lock().stopped
    }

    /// Says which blocks of a chunk became zero as a whole, a bit each, the first one lowest. Returns runs that are now
    /// complete; the caller seals them.
    #[must_use]
    pub fn compared(&self, chunk: u64, zero_blocks: u8) -> Vec<ZeroRun> {
        let mut state = self.lock();
        state.ahead.insert(chunk, zero_blocks);
        let mut complete = Vec::new();
        while let Some(bits) = {
            let low = state.low;
            state.ahead.remove(&low)
        } {
            let first = state.low * CHUNK_BLOCKS as u64;
            for index in 0..CHUNK_BLOCKS as u64 {
                if bits >> index & 1 == 0 {
                    complete.extend(state.run.take());
                    continue;
                }
                match &mut state.run {
                    Some(run) if run.count < RANGE_BLOCKS_MAX => run.count += 1,
                    run => complete.extend(run.replace(ZeroRun { first: BlockIndex(first + index), count: 1 })),
                }
            }
            state.low += 1;
        }
        if state.low == self.chunks {
            complete.extend(state.run.take());
        }
        drop(state);
        self.moved.notify_all();
        complete
    }
}
