//! Which 64 KiB clusters of a disk hold data, and how many before a place. PURE.

use common::ids::PageMask;

/// Bytes of a cluster: QEMU's default.
pub(super) const CLUSTER_BYTES: u64 = 1 << 16;
/// Pages of a block that lie in one cluster.
const CLUSTER_PAGES: u32 = 16;
/// Clusters of a block.
const BLOCK_CLUSTERS: u64 = 4;

/// One bit for each cluster: 2 MiB for a disk of 1 TiB, and half as much again once it is counted.
#[derive(Debug, Clone, Default)]
pub struct ClusterMap {
    words: Vec<u64>,
    /// Marked clusters before each word; filled by [`Self::count`].
    before: Vec<u32>,
}

impl ClusterMap {
    /// A map of a disk of this size with no data.
    #[must_use]
    pub fn new(disk_bytes: u64) -> Self {
        let words = disk_bytes.div_ceil(CLUSTER_BYTES).div_ceil(64) as usize;
        Self { words: vec![0; words], before: Vec::new() }
    }

    /// Bytes of memory that the map of a disk of this size takes, counted.
    #[must_use]
    pub fn memory_bytes(disk_bytes: u64) -> u64 {
        disk_bytes.div_ceil(CLUSTER_BYTES).div_ceil(64) * 12
    }

    /// Says that a cluster holds data.
    pub fn mark(&mut self, cluster: u64) {
        if let Some(word) = self.words.get_mut((cluster / 64) as usize) {
            *word |= 1 << (cluster % 64);
        }
    }

    /// Says which pages of a block hold data.
    pub fn mark_pages(&mut self, block: u64, data: PageMask) {
        for part in 0..BLOCK_CLUSTERS {
            if data.0 >> (part as u32 * CLUSTER_PAGES) & u64::from(u16::MAX) != 0 {
                self.mark(block * BLOCK_CLUSTERS + part);
            }
        }
    }

    /// Counts, so that [`Self::rank`] knows. Marks made later are not counted.
    pub fn count(&mut self) {
        let mut marked = 0;
        self.before.clear();
        self.before.extend(self.words.iter().map(|word| {
            let before = marked;
            marked += word.count_ones();
            before
        }));
    }

    /// Whether a cluster holds data.
    #[must_use]
    pub fn holds(&self, cluster: u64) -> bool {
        self.words.get((cluster / 64) as usize).is_some_and(|word| word >> (cluster % 64) & 1 == 1)
    }

    /// Whether any of the clusters `from..from + count` holds data, both multiples of 64.
    #[must_use]
    pub fn any(&self, from: u64, count: u64) -> bool {
        let words = (from / 64) as usize..((from + count) / 64) as usize;
        self.words[words.start.min(self.words.len())..words.end.min(self.words.len())].iter().any(|word| *word != 0)
    }

    /// Clusters with data before this one.
    #[must_use]
    pub fn rank(&self, cluster: u64) -> u64 {
        let at = (cluster / 64) as usize;
        match (self.words.get(at), self.before.get(at)) {
            (Some(word), Some(before)) => u64::from(before + (word & ((1 << (cluster % 64)) - 1)).count_ones()),
            _ => self.total(),
        }
    }

    /// Clusters with data.
    #[must_use]
    pub fn total(&self) -> u64 {
        match (self.before.last(), self.words.last()) {
            (Some(before), Some(word)) => u64::from(*before) + u64::from(word.count_ones()),
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_rank_of_a_cluster_is_the_number_of_marked_ones_before_it(
            marked in proptest::collection::btree_set(0_u64..1_000, 0..300),
        ) {
            let mut map = ClusterMap::new(1_000 * CLUSTER_BYTES);
            marked.iter().for_each(|cluster| map.mark(*cluster));
            map.count();
            for cluster in 0..1_000 {
                prop_assert_eq!(map.rank(cluster), marked.range(..cluster).count() as u64);
                prop_assert_eq!(map.holds(cluster), marked.contains(&cluster));
            }
            prop_assert_eq!(map.total(), marked.len() as u64);
            for start in (0..960).step_by(64) {
                prop_assert_eq!(map.any(start, 64), marked.range(start..start + 64).next().is_some());
            }
        }
    }

    #[test]
    fn pages_of_a_block_mark_the_clusters_that_they_lie_in() {
        let mut map = ClusterMap::new(8 * CLUSTER_BYTES);
        map.mark_pages(1, PageMask(1 << 15 | 1 << 63));
        let held: Vec<u64> = (0..8).filter(|cluster| map.holds(*cluster)).collect();
        assert_eq!(held, [4, 7]);
        map.mark(1_000_000);
        assert!(!map.holds(1_000_000), "beyond the disk");
    }
}
