//! Sets of pages of one disk: what changed, what is still to be read. Pure.
//!
//! A set is kept in groups of 1,024 blocks (256 MiB of disk). A group that holds no page or every page costs nothing beyond
//! its place in a tree; any other costs 8 KiB. So the set "everything" of a first replication, or a discard of a terabyte,
//! is small, and the most that a set can take is a bit for each page: 32 MiB for each TiB of disk.

use std::collections::BTreeMap;

use crate::ids::{BlockIndex, Geometry, PageMask};
use crate::limits;

#[cfg(test)]
mod tests;

/// Blocks of one group.
const GROUP_BLOCKS: usize = 1024;
/// Most bytes that a group takes.
const GROUP_BYTES: u64 = (GROUP_BLOCKS * size_of::<u64>()) as u64;

type Masks = [u64; GROUP_BLOCKS];

#[derive(Debug, Clone, PartialEq, Eq)]
enum Group {
    /// Every page that the disk has there.
    Full,
    /// Some pages: a mask for each block, and how many are set.
    Some { masks: Box<Masks>, pages: u64 },
}

/// A set of pages of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    geometry: Geometry,
    groups: BTreeMap<u64, Group>,
    pages: u64,
}

impl PageSet {
    /// The empty set of a disk.
    #[must_use]
    pub fn empty(geometry: Geometry) -> Self {
        Self { geometry, groups: BTreeMap::new(), pages: 0 }
    }

    /// All pages of a disk.
    #[must_use]
    pub fn full(geometry: Geometry) -> Self {
        let groups = (0..geometry.blocks().div_ceil(GROUP_BLOCKS as u64)).map(|group| (group, Group::Full)).collect();
        Self { geometry, groups, pages: geometry.pages() }
    }

    /// The disk.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Pages in the set.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.pages
    }

    /// True where it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Bytes of the disk that its pages cover, a partial last page counted as a whole one.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages * limits::PAGE_BYTES as u64
    }

    /// Memory that the set takes beyond a small constant, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.groups.values().map(|group| if matches!(group, Group::Full) { 64 } else { GROUP_BYTES + 64 }).sum()
    }

    /// Most memory that a set of a disk can take, in bytes.
    #[must_use]
    pub fn memory_bytes_max(geometry: Geometry) -> u64 {
        geometry.blocks().div_ceil(GROUP_BLOCKS as u64) * (GROUP_BYTES + 64)
    }

    /// The pages of `block` that are in the set.
    #[must_use]
    pub fn mask(&self, block: BlockIndex) -> PageMask {
        let (group, index) = place(block);
        match self.groups.get(&group) {
            None => PageMask::EMPTY,
            Some(Group::Full) => self.geometry.pages_of(block),
            Some(Group::Some { masks, .. }) => PageMask(masks[index]),
        }
    }

    /// Adds pages of a block; those beyond the disk's end are left out. Returns how many are new.
    pub fn insert(&mut self, block: BlockIndex, mask: PageMask) -> u32 {
        let mask = mask.and(self.geometry.pages_of(block));
        if mask.is_empty() {
            return 0;
        }
        let (number, index) = place(block);
        let group =
            self.groups.entry(number).or_insert_with(|| Group::Some { masks: Box::new([0; GROUP_BLOCKS]), pages: 0 });
        let Group::Some { masks, pages } = group else { return 0 };
        let added = mask.without(PageMask(masks[index])).count();
        masks[index] |= mask.0;
        *pages += u64::from(added);
        let whole = *pages == group_pages(self.geometry, number);
        if whole {
            *group = Group::Full;
        }
        self.pages += u64::from(added);
        added
    }

    /// Adds all pages of consecutive blocks, as far as the disk goes. Costs little for long ranges.
    pub fn insert_blocks(&mut self, first: BlockIndex, count: u64) {
        let end = first.0.saturating_add(count).min(self.geometry.blocks());
        let mut block = first.0;
        while block < end {
            let number = block / GROUP_BLOCKS as u64;
            let group_end = ((number + 1) * GROUP_BLOCKS as u64).min(self.geometry.blocks());
            if block.is_multiple_of(GROUP_BLOCKS as u64) && end >= group_end {
                let had = self.group_len(number);
                self.pages += group_pages(self.geometry, number) - had;
                self.groups.insert(number, Group::Full);
                block = group_end;
            } else {
                self.insert(BlockIndex(block), PageMask::FULL);
                block += 1;
            }
        }
    }

    /// Takes pages of a block out. Returns those that were in the set.
    pub fn remove(&mut self, block: BlockIndex, mask: PageMask) -> PageMask {
        let (number, index) = place(block);
        let Some(group) = self.groups.get_mut(&number) else { return PageMask::EMPTY };
        if matches!(group, Group::Full) {
            if mask.and(self.geometry.pages_of(block)).is_empty() {
                return PageMask::EMPTY;
            }
            let first = number * GROUP_BLOCKS as u64;
            let mut masks = Box::new([0; GROUP_BLOCKS]);
            for (mask, block) in masks.iter_mut().zip(first..self.geometry.blocks()) {
                *mask = self.geometry.pages_of(BlockIndex(block)).0;
            }
            *group = Group::Some { masks, pages: group_pages(self.geometry, number) };
        }
        let Group::Some { masks, pages } = group else { return PageMask::EMPTY };
        let removed = mask.and(PageMask(masks[index]));
        masks[index] &= !removed.0;
        *pages -= u64::from(removed.count());
        if *pages == 0 {
            self.groups.remove(&number);
        }
        self.pages -= u64::from(removed.count());
        removed
    }

    /// Takes the first block at or after `from` that has pages in the set out of it. `None` where there is none.
    pub fn take_next(&mut self, from: BlockIndex) -> Option<(BlockIndex, PageMask)> {
        let block = self.next_block(from)?;
        let mask = self.remove(block, PageMask::FULL);
        Some((block, mask))
    }

    /// The first block at or after `from` that has pages in the set.
    #[must_use]
    pub fn next_block(&self, from: BlockIndex) -> Option<BlockIndex> {
        let (number, index) = place(from);
        for (group, content) in self.groups.range(number..) {
            let first = group * GROUP_BLOCKS as u64;
            let start = if *group == number { index } else { 0 };
            match content {
                Group::Full if first + (start as u64) < self.geometry.blocks() => {
                    return Some(BlockIndex(first + start as u64));
                }
                Group::Full => {}
                Group::Some { masks, .. } => {
                    if let Some(found) = masks[start..].iter().position(|mask| *mask != 0) {
                        return Some(BlockIndex(first + (start + found) as u64));
                    }
                }
            }
        }
        None
    }

    /// The first block at or after `block` that is not known to be in the set with all its pages. Costs nothing: it looks at
    /// `block`'s group alone, so the block found may be whole too.
    #[must_use]
    pub fn whole_until(&self, block: BlockIndex) -> BlockIndex {
        let (number, _) = place(block);
        match self.groups.get(&number) {
            Some(Group::Full) => BlockIndex(((number + 1) * GROUP_BLOCKS as u64).min(self.geometry.blocks())),
            _ if !self.mask(block).is_empty() && self.mask(block) == self.geometry.pages_of(block) => {
                BlockIndex(block.0 + 1)
            }
            _ => block,
        }
    }

    /// Blocks that have pages in the set, ascending, with those pages.
    pub fn iter(&self) -> impl Iterator<Item = (BlockIndex, PageMask)> {
        let mut from = Some(BlockIndex(0));
        std::iter::from_fn(move || {
            let block = self.next_block(from?)?;
            from = Some(BlockIndex(block.0 + 1));
            Some((block, self.mask(block)))
        })
    }

    /// Adds all pages of another set of the same disk.
    pub fn extend(&mut self, other: &Self) {
        for (number, group) in &other.groups {
            let first = number * GROUP_BLOCKS as u64;
            match group {
                Group::Full => self.insert_blocks(BlockIndex(first), GROUP_BLOCKS as u64),
                Group::Some { masks, .. } => {
                    for (block, mask) in (first..).zip(masks.iter()).filter(|(_, mask)| **mask != 0) {
                        self.insert(BlockIndex(block), PageMask(*mask));
                    }
                }
            }
        }
    }

    fn group_len(&self, number: u64) -> u64 {
        match self.groups.get(&number) {
            None => 0,
            Some(Group::Full) => group_pages(self.geometry, number),
            Some(Group::Some { pages, .. }) => *pages,
        }
    }
}

fn place(block: BlockIndex) -> (u64, usize) {
    (block.0 / GROUP_BLOCKS as u64, usize::try_from(block.0 % GROUP_BLOCKS as u64).unwrap_or(0))
}

/// Pages that the disk has in a group.
fn group_pages(geometry: Geometry, number: u64) -> u64 {
    let per_group = (GROUP_BLOCKS * limits::PAGES_PER_BLOCK) as u64;
    geometry.pages().saturating_sub(number * per_group).min(per_group)
}
