//! The Merkle root over an epoch's metadata.
//!
//! Records are taken in ascending order of their first block. Those whose first block lies in the same
//! [`limits::MERKLE_RANGE_BLOCKS`] blocks make one leaf: BLAKE3 of `"blockferry leaf v1"`, the range's number (8 bytes,
//! little-endian) and the 96-byte metadata of each. Pairs of nodes are joined by BLAKE3 of `"blockferry node v1"` and both
//! children; an odd last node rises as it is. The root of no records is BLAKE3 of `"blockferry empty v1"`.

use crate::format::record::RecordMeta;
use crate::format::wire::Writer;
use crate::ids::{BlockIndex, Digest};
use crate::limits;

/// Metadata out of order: a record does not start behind the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("metadata of block {found} comes at or after block {after} was covered: records overlap or are out of order")]
pub struct OrderError {
    /// Block found.
    pub found: BlockIndex,
    /// First block that would have been in order.
    pub after: BlockIndex,
}

/// Takes metadata in ascending order and gives the root; keeps one hash per range and level at most.
#[derive(Debug)]
pub struct MetaTree {
    /// Subtree roots with their heights, heights falling: a binary counter.
    nodes: Vec<(u32, Digest)>,
    leaf: Option<(u64, blake3::Hasher)>,
    next: BlockIndex,
}

impl Default for MetaTree {
    fn default() -> Self {
        Self { nodes: Vec::new(), leaf: None, next: BlockIndex(0) }
    }
}

impl MetaTree {
    /// Adds the next record's metadata.
    ///
    /// # Errors
    /// [`OrderError`] where it overlaps what came before; the tree is unchanged then.
    pub fn push(&mut self, meta: &RecordMeta) -> Result<(), OrderError> {
        if meta.block < self.next {
            return Err(OrderError { found: meta.block, after: self.next });
        }
        self.next = BlockIndex(meta.block.0 + u64::from(meta.block_count));
        let range = meta.block.0 / limits::MERKLE_RANGE_BLOCKS;
        if self.leaf.as_ref().is_some_and(|(current, _)| *current != range) {
            self.end_leaf();
        }
        let (_, hasher) = self.leaf.get_or_insert_with(|| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(b"blockferry leaf v1").update(&range.to_le_bytes());
            (range, hasher)
        });
        let mut writer = Writer::with_capacity(limits::RECORD_META_BYTES);
        meta.encode(&mut writer);
        hasher.update(writer.as_slice());
        Ok(())
    }

    fn end_leaf(&mut self) {
        if let Some((_, hasher)) = self.leaf.take() {
            let mut node = (0, Digest(*hasher.finalize().as_bytes()));
            while let Some(&(height, left)) = self.nodes.last() {
                if height != node.0 {
                    break;
                }
                self.nodes.pop();
                node = (height + 1, join(left, node.1));
            }
            self.nodes.push(node);
        }
    }

    /// The root over all that was added.
    #[must_use]
    pub fn finish(mut self) -> Digest {
        self.end_leaf();
        let mut nodes = self.nodes.into_iter().rev().map(|(_, digest)| digest);
        match nodes.next() {
            None => Digest(*blake3::hash(b"blockferry empty v1").as_bytes()),
            Some(last) => nodes.fold(last, |right, left| join(left, right)),
        }
    }
}

fn join(left: Digest, right: Digest) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"blockferry node v1").update(&left.0).update(&right.0);
    Digest(*hasher.finalize().as_bytes())
}

/// The root over metadata in ascending order.
///
/// # Errors
/// [`OrderError`] where records overlap or are out of order.
pub fn root<'a>(metas: impl IntoIterator<Item = &'a RecordMeta>) -> Result<Digest, OrderError> {
    let mut tree = MetaTree::default();
    metas.into_iter().try_for_each(|meta| tree.push(meta))?;
    Ok(tree.finish())
}
