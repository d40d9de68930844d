//! The write-intent log: which regions of the disk may hold writes that the store does not have.
//!
//! A file of one bit for each region of 1 MiB. After a crash of this process, or of the machine, only marked regions have to
//! be compared with what the store has.
//!
//! ```text
//! page 0:   0 magic "BFINTENT"   8 version u32   12 length of this header u32   16 volume   32 incarnation u32
//!          36 bytes of a region u32   40 bytes of the disk u64   48 zeros   4092 CRC-32C of the 4,092 bytes before
//! page n:   0 CRC-32C of the 4,092 bytes after it   4 zeros   8 n u64   16 bits of 32,640 regions, lowest bit first
//! ```
//! All numbers are little-endian.
//!
//! Promises
//! - A region's bit is durable before [`IntentLog::ensure`] returns; requests that come together share one `fdatasync`.
//! - A page that is damaged or torn counts as all set; a file that is missing, or of another disk, says nothing: everything has
//!   to be compared.
//! - A bit is cleared in memory first. A write that comes after that sets it anew, durably.
//! - Where the file can't be written any more it is removed durably, which says the same as all bits set. Only where that
//!   fails too does a write fail.
//!
//! Never: decides when a bit may be cleared; that is [`super::export`]'s.

#[cfg(test)]
pub(super) mod tests;

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use common::ids::{BlockIndex, Geometry, Incarnation, VolumeId};
use common::limits::{BLOCK_BYTES, PAGE_BYTES};
use common::pages::PageSet;

/// Bytes of a region. A random write costs comparing this much after a crash; smaller regions cost more `fdatasync`.
pub(super) const REGION_BYTES: u64 = REGION_BYTES_U32 as u64;
const REGION_BYTES_U32: u32 = 1 << 20;
/// Pages of a region.
pub(super) const REGION_PAGES: u64 = REGION_BYTES / PAGE_BYTES as u64;
const REGION_BLOCKS: u64 = REGION_BYTES / BLOCK_BYTES as u64;

const MAGIC: [u8; 8] = *b"BFINTENT";
const VERSION: u32 = 1;
const PAGE_HEADER_BYTES: usize = 16;
/// Words of bits in a page of the log.
const PAGE_WORDS: usize = (PAGE_BYTES - PAGE_HEADER_BYTES) / 8;
const WORD_BITS: u64 = 64;
const _: () = assert!(PAGE_BYTES == 4096);

/// Whose log it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LogIdentity {
    /// The volume.
    pub(super) volume: VolumeId,
    /// Its incarnation.
    pub(super) incarnation: Incarnation,
    /// Its disk.
    pub(super) geometry: Geometry,
}

impl LogIdentity {
    fn regions(&self) -> u64 {
        self.geometry.disk_bytes().div_ceil(REGION_BYTES)
    }

    fn file_bytes(&self) -> usize {
        (self.pages() + 1) * PAGE_BYTES
    }

    fn pages(&self) -> usize {
        let words = self.regions().div_ceil(WORD_BITS);
        usize::try_from(words.div_ceil(PAGE_WORDS as u64)).unwrap_or(usize::MAX)
    }

    fn header(&self) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        page[..8].copy_from_slice(&MAGIC);
        page[8..12].copy_from_slice(&VERSION.to_le_bytes());
        page[12..16].copy_from_slice(&4096_u32.to_le_bytes());
        page[16..32].copy_from_slice(&self.volume.0);
        page[32..36].copy_from_slice(&self.incarnation.0.to_le_bytes());
        page[36..40].copy_from_slice(&REGION_BYTES_U32.to_le_bytes());
        page[40..48].copy_from_slice(&self.geometry.disk_bytes().to_le_bytes());
        let sum = crc32c::crc32c(&page[..PAGE_BYTES - 4]);
        page[PAGE_BYTES - 4..].copy_from_slice(&sum.to_le_bytes());
        page
    }
}

/// The bytes of a page of the log.
fn encode_page(number: usize, words: &[u64]) -> [u8; PAGE_BYTES] {
    let mut page = [0; PAGE_BYTES];
    page[8..16].copy_from_slice(&(number as u64).to_le_bytes());
    for (place, word) in page[PAGE_HEADER_BYTES..].chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    let sum = crc32c::crc32c(&page[4..]);
    page[..4].copy_from_slice(&sum.to_le_bytes());
    page
}

/// The bits of a page of the log; `None` where it is damaged.
fn decode_page(number: usize, page: &[u8]) -> Option<impl Iterator<Item = u64>> {
    let sum = crc32c::crc32c(page.get(4..PAGE_BYTES)?);
    let sound = page[..4] == sum.to_le_bytes() && page[8..16] == (number as u64).to_le_bytes();
    let words = page[PAGE_HEADER_BYTES..PAGE_BYTES].chunks_exact(8);
    sound.then(|| words.map(|word| word.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))))
}

/// The bits that a log's bytes state, and the numbers of its damaged pages, whose bits are all set.
///
/// # Errors
/// A text, where the bytes say nothing of this disk.
pub(super) fn parse(bytes: &[u8], identity: &LogIdentity) -> Result<(Vec<u64>, BTreeSet<usize>), String> {
    let header = bytes.first_chunk::<PAGE_BYTES>().ok_or("the write-intent log has no whole header")?;
    if header[..8] == MAGIC && header[8..12] != VERSION.to_le_bytes() {
        let found = header[8..12].iter().rev().fold(0, |number: u32, byte| number << 8 | u32::from(*byte));
        return Err(format!("the write-intent log has version {found}, this program knows {VERSION}"));
    }
    if *header != identity.header() {
        return Err("the write-intent log is damaged, or of another disk".to_owned());
    }
    let mut words = Vec::with_capacity(identity.pages() * PAGE_WORDS);
    let mut damaged = BTreeSet::new();
    for number in 1..=identity.pages() {
        let page = bytes.get(number * PAGE_BYTES..(number + 1) * PAGE_BYTES);
        match page.and_then(|page| decode_page(number, page)) {
            Some(decoded) => words.extend(decoded),
            None => {
                words.extend([u64::MAX; PAGE_WORDS]);
                damaged.insert(number);
            }
        }
    }
    clip(&mut words, identity.regions());
    Ok((words, damaged))
}

/// The bits of a log that marks everything, and its bytes.
pub(super) fn all_set(identity: &LogIdentity) -> (Vec<u64>, Vec<u8>) {
    let mut words = vec![u64::MAX; identity.pages() * PAGE_WORDS];
    clip(&mut words, identity.regions());
    let mut bytes = identity.header().to_vec();
    for (number, words) in (1..).zip(words.chunks(PAGE_WORDS)) {
        bytes.extend_from_slice(&encode_page(number, words));
    }
    (words, bytes)
}

/// The pages that bits mark.
pub(super) fn marked_pages(words: &[u64], geometry: Geometry) -> PageSet {
    let mut marked = PageSet::empty(geometry);
    for region in set_bits(words) {
        marked.insert_blocks(BlockIndex(region * REGION_BLOCKS), REGION_BLOCKS);
    }
    marked
}

/// Where the log's bytes go; tests put faults in.
pub(super) trait LogStore: Send + Sync {
    /// Writes bytes at a place.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes what was written durable.
    fn sync(&self) -> io::Result<()>;
    /// Makes it durable that there is no log any more.
    fn remove(&self) -> io::Result<()>;
}

/// The log's file.
struct LogFile {
    file: File,
    path: PathBuf,
}

impl LogStore for LogFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn remove(&self) -> io::Result<()> {
        remove_file(&self.path)
    }
}

/// Removes a log's file, durably; no effect where there is none.
pub(super) fn remove_file(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => sync_parent(path),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

#[derive(Debug, Default)]
struct Flush {
    /// The bits as they are to be on disk.
    wanted: Vec<u64>,
    /// Pages whose bits on disk are others.
    dirty: BTreeSet<usize>,
    /// Counts requests; and which of them are durable.
    asked: u64,
    done: u64,
    running: bool,
}

/// The log of one volume.
pub(super) struct IntentLog {
    store: Box<dyn LogStore>,
    /// Bits that are set, durably.
    durable: Vec<AtomicU64>,
    /// Regions written since the last look, for [`Self::quiet`].
    recent: Vec<AtomicU64>,
    flush: Mutex<Flush>,
    flushed: Condvar,
    abandoned: AtomicBool,
    /// Where the next look for quiet regions begins.
    look_from: AtomicU64,
}

impl std::fmt::Debug for IntentLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IntentLog").field("marked", &self.marked()).finish_non_exhaustive()
    }
}

impl IntentLog {
    /// Opens the log at `path` and says which pages it marks. `Err` with a reason where it can't tell: everything is to be
    /// compared then, and the log to be created anew.
    pub(super) fn open(path: &Path, identity: &LogIdentity) -> Result<(Self, PageSet), String> {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => "there is no write-intent log".to_owned(),
            _ => format!("the write-intent log can't be opened: {error}"),
        })?;
        let unreadable = |error| format!("the write-intent log can't be read: {error}");
        let mut bytes = vec![0; identity.file_bytes()];
        let mut length = 0;
        while length < bytes.len() {
            match file.read_at(&mut bytes[length..], length as u64) {
                Ok(0) => break,
                Ok(read) => length += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(unreadable(error)),
            }
        }
        let (words, damaged) = parse(&bytes[..length], identity)?;
        let marked = marked_pages(&words, identity.geometry);
        let store = LogFile { file, path: path.to_owned() };
        let log = Self::with_store(Box::new(store), words);
        if !damaged.is_empty() {
            // Bits that are set as a whole on a damaged page hold by its damage; it is made whole again with them.
            log.lock().dirty = damaged;
            log.write_out().map_err(unreadable)?;
        }
        Ok((log, marked))
    }

    /// Makes a new log, with every bit set, in the place of what is there. Durable, name included.
    pub(super) fn create(path: &Path, identity: &LogIdentity) -> io::Result<Self> {
        let (words, bytes) = all_set(identity);
        let fresh = path.with_extension("new");
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all_at(&bytes, 0)?;
        file.sync_all()?;
        std::fs::rename(&fresh, path)?;
        sync_parent(path)?;
        Ok(Self::with_store(Box::new(LogFile { file, path: path.to_owned() }), words))
    }

    /// A log whose bits on `store` are `words`.
    pub(super) fn with_store(store: Box<dyn LogStore>, words: Vec<u64>) -> Self {
        Self {
            store,
            durable: words.iter().map(|word| AtomicU64::new(*word)).collect(),
            recent: words.iter().map(|_| AtomicU64::new(0)).collect(),
            flush: Mutex::new(Flush { wanted: words, ..Flush::default() }),
            flushed: Condvar::new(),
            abandoned: AtomicBool::new(false),
            look_from: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Flush> {
        // Nothing that holds the lock panics half-way through a change.
        self.flush.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True where the bits of all regions of pages `first` to `last` are durable.
    pub(super) fn is_durable(&self, first: u64, last: u64) -> bool {
        (first / REGION_PAGES..=last / REGION_PAGES).all(|region| {
            let (word, bit) = place(region);
            self.durable[word].load(Ordering::Acquire) & bit != 0
        }) || self.abandoned.load(Ordering::Acquire)
    }

    /// Notes that pages `first` to `last` are being written.
    pub(super) fn touch(&self, first: u64, last: u64) {
        for region in first / REGION_PAGES..=last / REGION_PAGES {
            let (word, bit) = place(region);
            if self.recent[word].load(Ordering::Relaxed) & bit == 0 {
                self.recent[word].fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// Makes the bits of all regions of pages `first` to `last` durable. Blocks.
    ///
    /// # Errors
    /// Where the log can neither be written nor removed: the write must not be submitted.
    pub(super) fn ensure(&self, first: u64, last: u64) -> io::Result<()> {
        if self.is_durable(first, last) {
            return Ok(());
        }
        let mut flush = self.lock();
        let mut set = false;
        for region in first / REGION_PAGES..=last / REGION_PAGES {
            let (word, bit) = place(region);
            if flush.wanted[word] & bit == 0 {
                flush.wanted[word] |= bit;
                flush.dirty.insert(word / PAGE_WORDS + 1);
                set = true;
            }
        }
        flush.asked += u64::from(set);
        self.write_out_locked(flush)
    }

    /// Writes out what is not on disk as it should be.
    fn write_out(&self) -> io::Result<()> {
        let mut flush = self.lock();
        flush.asked += 1;
        self.write_out_locked(flush)
    }

    /// Waits until everything asked for so far is durable. The first to come writes for all that came meanwhile.
    fn write_out_locked<'a>(&'a self, mut flush: MutexGuard<'a, Flush>) -> io::Result<()> {
        let asked = flush.asked;
        loop {
            if flush.done >= asked || self.abandoned.load(Ordering::Acquire) {
                return Ok(());
            }
            if flush.running {
                flush = self.flushed.wait(flush).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            flush.running = true;
            let target = flush.asked;
            let dirty = std::mem::take(&mut flush.dirty);
            let pages: Vec<(usize, Vec<u64>)> =
                dirty.iter().map(|number| (*number, page_words(&flush.wanted, *number).to_vec())).collect();
            drop(flush);
            let written = pages
                .iter()
                .try_for_each(|(number, words)| {
                    self.store.write_at(*number as u64 * PAGE_BYTES as u64, &encode_page(*number, words))
                })
                .and_then(|()| self.store.sync());
            flush = self.lock();
            flush.running = false;
            match written {
                Ok(()) => {
                    flush.done = target;
                    for (number, words) in &pages {
                        let start = (number - 1) * PAGE_WORDS;
                        for ((durable, wanted), word) in
                            self.durable[start..].iter().zip(&flush.wanted[start..]).zip(words)
                        {
                            // Without what was cleared meanwhile.
                            durable.store(word & wanted, Ordering::Release);
                        }
                    }
                    self.flushed.notify_all();
                }
                Err(error) => {
                    flush.dirty.extend(dirty);
                    self.flushed.notify_all();
                    // Without a log everything is compared after a crash: that is as good as all bits set.
                    self.store.remove().map_err(|_| error)?;
                    self.abandoned.store(true, Ordering::Release);
                }
            }
        }
    }

    /// True where the log could not be written and was removed.
    pub(super) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// Regions whose bit is set and that were not written since the call before, at most `most`; the next call goes on after
    /// them.
    pub(super) fn quiet(&self, most: usize) -> Vec<u64> {
        let recent: Vec<u64> = self.recent.iter().map(|word| word.swap(0, Ordering::Relaxed)).collect();
        let words = self.durable.iter().zip(&recent).map(|(durable, recent)| durable.load(Ordering::Acquire) & !recent);
        let words: Vec<u64> = words.collect();
        let from = self.look_from.load(Ordering::Relaxed);
        let after = set_bits(&words).filter(|region| *region >= from);
        let found: Vec<u64> = after.chain(set_bits(&words).filter(|region| *region < from)).take(most).collect();
        self.look_from.store(found.last().map_or(0, |last| last + 1), Ordering::Relaxed);
        found
    }

    /// True where the region was written since [`Self::quiet`].
    pub(super) fn is_recent(&self, region: u64) -> bool {
        let (word, bit) = place(region);
        self.recent[word].load(Ordering::Relaxed) & bit != 0
    }

    /// Clears a region's bit in memory; [`Self::write_cleared`] writes it out. To be called with the lock of the admissions
    /// held, so that no write is between its look at the bit and its admission.
    pub(super) fn clear(&self, region: u64) {
        let (word, bit) = place(region);
        let mut flush = self.lock();
        flush.wanted[word] &= !bit;
        flush.dirty.insert(word / PAGE_WORDS + 1);
        self.durable[word].fetch_and(!bit, Ordering::AcqRel);
    }

    /// Writes out which bits were cleared.
    ///
    /// # Errors
    /// As for [`Self::ensure`]; nothing is lost, the bits stay set on disk.
    pub(super) fn write_cleared(&self) -> io::Result<()> {
        self.write_out()
    }

    /// Regions whose bit is set.
    pub(super) fn marked(&self) -> u64 {
        self.durable.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }

    /// Removes the log's file, durably.
    ///
    /// # Errors
    /// Where it stays.
    pub(super) fn remove(&self) -> io::Result<()> {
        self.store.remove()
    }
}

fn place(region: u64) -> (usize, u64) {
    (usize::try_from(region / WORD_BITS).unwrap_or(usize::MAX), 1 << (region % WORD_BITS))
}

fn page_words(words: &[u64], number: usize) -> &[u64] {
    &words[(number - 1) * PAGE_WORDS..number * PAGE_WORDS]
}

/// Clears the bits beyond the last region.
fn clip(words: &mut [u64], regions: u64) {
    for (word, first) in words.iter_mut().zip((0..).step_by(64)) {
        let rest = regions.saturating_sub(first).min(WORD_BITS);
        *word &= if rest == WORD_BITS { u64::MAX } else { (1 << rest) - 1 };
    }
}

fn set_bits(words: &[u64]) -> impl Iterator<Item = u64> {
    words.iter().zip((0..).step_by(64)).filter(|(word, _)| **word != 0).flat_map(|(word, first)| {
        let word = *word;
        (0..WORD_BITS).filter(move |bit| word >> bit & 1 == 1).map(move |bit| first + bit)
    })
}
