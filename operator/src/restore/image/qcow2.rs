//! qcow2, version 3, as QEMU's `docs/interop/qcow2.txt` describes it. PURE.
//!
//! ```text
//! header │ refcount table │ refcount blocks │ L1 table │ L2 tables with data │ data clusters, in the disk's order
//! ```
//! Every cluster of the file is used once, so every refcount is 1. A cluster without data has no L2 entry and reads as zeros.

use super::clusters::{CLUSTER_BYTES, ClusterMap};

const CLUSTER_BITS: u32 = 16;
/// Entries of an L2 table, of 8 bytes.
const L2_ENTRIES: u64 = CLUSTER_BYTES / 8;
/// Refcounts of 16 bits in a refcount block.
const REFCOUNTS_PER_BLOCK: u64 = CLUSTER_BYTES / 2;
/// Refcount width of 16 bits, as a power of two.
const REFCOUNT_ORDER: u32 = 4;
/// Set in entries of clusters whose refcount is one.
const COPIED: u64 = 1 << 63;
const HEADER_BYTES: u32 = 104;

/// A planned qcow2 file: where its parts begin, in clusters.
#[derive(Debug, Clone)]
pub(super) struct Qcow2 {
    virtual_bytes: u64,
    data: ClusterMap,
    refcount_table_clusters: u64,
    refcount_blocks: u64,
    l1_entries: u64,
    l2_at: u64,
    data_at: u64,
    clusters: u64,
}

impl Qcow2 {
    /// Plans the file for a disk of `disk_bytes` bytes. QEMU counts in sectors of 512 bytes, so the last one is filled up with zeros.
    pub(super) fn plan(disk_bytes: u64, mut data: ClusterMap) -> Self {
        data.count();
        let l1_entries = disk_bytes.div_ceil(CLUSTER_BYTES).div_ceil(L2_ENTRIES).max(1);
        let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER_BYTES);
        let l2_tables = (0..l1_entries).filter(|entry| data.any(entry * L2_ENTRIES, L2_ENTRIES)).count() as u64;
        let others = 1 + l1_clusters + l2_tables + data.total();
        // Refcount blocks count themselves and their table, so their number is approached from below.
        let (mut blocks, mut table) = (1, 1);
        loop {
            let needed = (others + blocks + table).div_ceil(REFCOUNTS_PER_BLOCK);
            let needed_table = (needed * 8).div_ceil(CLUSTER_BYTES);
            if (needed, needed_table) == (blocks, table) {
                break;
            }
            (blocks, table) = (needed, needed_table);
        }
        let l2_at = 1 + table + blocks + l1_clusters;
        Self {
            virtual_bytes: disk_bytes.next_multiple_of(512),
            refcount_table_clusters: table,
            refcount_blocks: blocks,
            l1_entries,
            l2_at,
            data_at: l2_at + l2_tables,
            clusters: others + blocks + table,
            data,
        }
    }

    pub(super) fn file_bytes(&self) -> u64 {
        self.clusters * CLUSTER_BYTES
    }

    /// As [`super::Image::place`].
    pub(super) fn place(&self, offset: u64, len: u64) -> (Option<u64>, u64) {
        let (first, within) = (offset / CLUSTER_BYTES, offset % CLUSTER_BYTES);
        let held = self.data.holds(first);
        // Neighbours on the disk that are both planned are neighbours in the file.
        let mut end = first + 1;
        while end * CLUSTER_BYTES < offset + len && self.data.holds(end) == held {
            end += 1;
        }
        let side_by_side = (end * CLUSTER_BYTES - offset).min(len);
        (held.then(|| (self.data_at + self.data.rank(first)) * CLUSTER_BYTES + within), side_by_side)
    }

    fn l1_at(&self) -> u64 {
        1 + self.refcount_table_clusters + self.refcount_blocks
    }

    /// As [`super::Image::metadata`]; the largest piece is the L1 table, 4 MiB for the largest disk.
    pub(super) fn metadata(&self) -> impl Iterator<Item = (u64, Vec<u8>)> + '_ {
        let tables = (0..self.l1_entries).filter(|entry| self.data.any(entry * L2_ENTRIES, L2_ENTRIES)).enumerate();
        let l2 = tables.map(move |(number, entry)| {
            let table = (0..L2_ENTRIES).flat_map(move |at| {
                let cluster = entry * L2_ENTRIES + at;
                let place = (self.data_at + self.data.rank(cluster)) * CLUSTER_BYTES;
                (if self.data.holds(cluster) { place | COPIED } else { 0 }).to_be_bytes()
            });
            ((self.l2_at + number as u64) * CLUSTER_BYTES, table.collect())
        });
        let refcounts = (0..self.refcount_blocks).map(|number| {
            let first = number * REFCOUNTS_PER_BLOCK;
            let counts = (first..first + REFCOUNTS_PER_BLOCK)
                .flat_map(|cluster| u16::from(cluster < self.clusters).to_be_bytes());
            ((1 + self.refcount_table_clusters + number) * CLUSTER_BYTES, counts.collect())
        });
        l2.chain(refcounts)
            .chain(std::iter::once_with(|| (self.l1_at() * CLUSTER_BYTES, self.l1())))
            .chain(std::iter::once_with(|| (CLUSTER_BYTES, self.refcount_table())))
            .chain(std::iter::once_with(|| (0, self.header())))
    }

    fn l1(&self) -> Vec<u8> {
        let mut next = self.l2_at;
        let entries = (0..self.l1_entries).flat_map(|entry| {
            if !self.data.any(entry * L2_ENTRIES, L2_ENTRIES) {
                return 0_u64.to_be_bytes();
            }
            next += 1;
            (((next - 1) * CLUSTER_BYTES) | COPIED).to_be_bytes()
        });
        padded(entries.collect())
    }

    fn refcount_table(&self) -> Vec<u8> {
        let blocks = (0..self.refcount_blocks).map(|block| (1 + self.refcount_table_clusters + block) * CLUSTER_BYTES);
        padded(blocks.flat_map(u64::to_be_bytes).collect())
    }

    fn header(&self) -> Vec<u8> {
        let mut header = Vec::with_capacity(CLUSTER_BYTES as usize);
        header.extend(b"QFI\xfb");
        header.extend(3_u32.to_be_bytes());
        header.extend([0; 12]); // no backing file
        header.extend(CLUSTER_BITS.to_be_bytes());
        header.extend(self.virtual_bytes.to_be_bytes());
        header.extend([0; 4]); // not encrypted
        header.extend((self.l1_entries as u32).to_be_bytes());
        header.extend((self.l1_at() * CLUSTER_BYTES).to_be_bytes());
        header.extend(CLUSTER_BYTES.to_be_bytes()); // refcount table
        header.extend((self.refcount_table_clusters as u32).to_be_bytes());
        header.extend([0; 12]); // no snapshots
        header.extend([0; 24]); // no features
        header.extend(REFCOUNT_ORDER.to_be_bytes());
        header.extend(HEADER_BYTES.to_be_bytes());
        padded(header)
    }
}

/// Filled up with zeros to whole clusters.
fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(CLUSTER_BYTES as usize), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_lie_one_after_the_other_without_gaps_and_all_are_counted() {
        for (disk, marked) in [(1_u64, vec![]), (1 << 30, vec![0, 8191, 8192, 9000]), ((1 << 45) + 1, vec![5, 1 << 28])]
        {
            let mut data = ClusterMap::new(disk);
            marked.iter().for_each(|cluster| data.mark(*cluster));
            let image = Qcow2::plan(disk, data);
            let mut pieces: Vec<(u64, u64)> = image.metadata().map(|(at, bytes)| (at, bytes.len() as u64)).collect();
            pieces.extend(
                marked
                    .iter()
                    .map(|cluster| (image.place(cluster * CLUSTER_BYTES, 1).0.expect("marked"), CLUSTER_BYTES)),
            );
            pieces.sort_unstable();
            let mut end = 0;
            for (at, len) in pieces {
                assert_eq!(at, end, "disk of {disk}");
                end += len;
            }
            assert_eq!(end, image.file_bytes());
        }
    }

    #[test]
    fn a_range_is_cut_where_data_begins_or_ends() {
        let mut data = ClusterMap::new(100 * CLUSTER_BYTES);
        [2, 3, 7].iter().for_each(|cluster| data.mark(*cluster));
        let image = Qcow2::plan(100 * CLUSTER_BYTES, data);
        let c = CLUSTER_BYTES;
        assert_eq!(image.place(10, 5 * c), (None, 2 * c - 10));
        assert_eq!(image.place(2 * c + 5, 10 * c), (Some(image.data_at * c + 5), 2 * c - 5));
        assert_eq!(image.place(7 * c, 100), (Some((image.data_at + 2) * c), 100));
    }
}
