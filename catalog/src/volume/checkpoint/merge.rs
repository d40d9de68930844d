//! Which records are live in one page of blocks. PURE.

#![allow(clippy::cast_possible_truncation, reason = "a page has 4,096 blocks")]

use std::cmp::Reverse;

use common::format::checkpoint::{LiveEntry, PAGE_BLOCKS};
use common::format::record::RecordMeta;
use common::ids::{BlockIndex, Geometry, PageMask};

/// A record that may be live.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    /// Index into the epochs table; higher is newer.
    pub epoch: u32,
    /// Index into the segments table.
    pub segment: u32,
    /// Offset in the segment.
    pub offset: u64,
    /// Metadata.
    pub meta: RecordMeta,
}

/// The live entries of the page from `first_block` on: `newer` records, of which higher epochs win and which in one epoch don't
/// overlap, over the entries of an older checkpoint, whose epochs are lower than all of these. In page order.
#[must_use]
pub fn merge_page(
    geometry: Geometry,
    first_block: BlockIndex,
    mut newer: Vec<Candidate>,
    older: &[LiveEntry],
) -> Vec<LiveEntry> {
    let end = first_block.0.saturating_add(PAGE_BLOCKS).min(geometry.blocks());
    let mut covered = vec![PageMask::EMPTY; usize::try_from(end.saturating_sub(first_block.0)).unwrap_or(0)];
    let mut live = Vec::new();
    newer.sort_unstable_by_key(|candidate| (Reverse(candidate.epoch), candidate.meta.block));
    for candidate in &newer {
        let whole = LiveEntry {
            block: candidate.meta.block,
            block_count: candidate.meta.block_count,
            epoch: candidate.epoch,
            segment: candidate.segment,
            offset: candidate.offset,
            live: candidate.meta.pages(),
            meta: candidate.meta,
        };
        uncovered(geometry, first_block.0..end, &mut covered, &whole, &mut live);
    }
    let mut older: Vec<&LiveEntry> = older.iter().collect();
    older.sort_by_key(|entry| Reverse(entry.epoch));
    for entry in older {
        uncovered(geometry, first_block.0..end, &mut covered, entry, &mut live);
    }
    live.sort_unstable_by_key(|entry| (entry.block, Reverse(entry.epoch)));
    live
}

/// Adds what of `entry` nothing newer covers, as runs of blocks with equal live pages, and marks it as covered.
fn uncovered(
    geometry: Geometry,
    page: std::ops::Range<u64>,
    covered: &mut [PageMask],
    entry: &LiveEntry,
    live: &mut Vec<LiveEntry>,
) {
    let start = entry.block.0.max(page.start);
    let end = entry.block.0.saturating_add(entry.block_count.into()).min(page.end);
    let mut run: Option<LiveEntry> = None;
    for block in start..end {
        let slot = &mut covered[(block - page.start) as usize];
        let fresh = entry.live.and(geometry.pages_of(BlockIndex(block))).without(*slot);
        *slot = slot.or(fresh);
        match &mut run {
            Some(run) if run.live == fresh => run.block_count += 1,
            _ => {
                live.extend(run.take().filter(|run| !run.live.is_empty()));
                run = Some(LiveEntry { block: BlockIndex(block), block_count: 1, live: fresh, ..*entry });
            }
        }
    }
    live.extend(run.filter(|run| !run.live.is_empty()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::format::record::{Codec, RecordKind};
    use common::ids::{Digest, SealTag};
    use common::limits;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn meta(block: u64, count: u32, data: u64, zero: u64) -> RecordMeta {
        RecordMeta {
            kind: if count == 1 { RecordKind::Delta } else { RecordKind::ZeroRange },
            codec: Codec::Raw,
            block_count: count,
            block: BlockIndex(block),
            data_mask: PageMask(data),
            zero_mask: PageMask(zero),
            counter: block,
            record_len: limits::RECORD_HEADER_BYTES as u32 + 16 + data.count_ones() * limits::PAGE_BYTES as u32,
            tag: SealTag([0; 16]),
            digest: Digest([0; 32]),
        }
    }

    fn record() -> impl Strategy<Value = RecordMeta> {
        prop_oneof![
            (0..12_u64, any::<u64>(), any::<u64>()).prop_map(|(block, data, zero)| meta(
                block,
                1,
                data,
                zero & !data | u64::from(data == 0)
            )),
            (0..8_u64, 2..5_u32).prop_map(|(block, count)| meta(block, count, 0, u64::MAX)),
        ]
    }

    /// Page by page: which epoch is the newest that sets it.
    fn model(geometry: Geometry, epochs: &[Vec<RecordMeta>]) -> HashMap<(u64, u32), u32> {
        let mut newest = HashMap::new();
        for (epoch, records) in epochs.iter().enumerate() {
            for meta in records {
                for block in meta.block.0..meta.block.0 + u64::from(meta.block_count) {
                    for page in meta.pages().and(geometry.pages_of(BlockIndex(block))).iter() {
                        newest.insert((block, page), epoch as u32);
                    }
                }
            }
        }
        newest
    }

    fn disjoint(records: Vec<RecordMeta>) -> Vec<RecordMeta> {
        let mut taken = std::collections::HashSet::new();
        let covers = |meta: &RecordMeta| (meta.block.0..meta.block.0 + u64::from(meta.block_count)).collect::<Vec<_>>();
        records
            .into_iter()
            .filter(|meta| {
                let blocks = covers(meta);
                blocks.iter().all(|block| !taken.contains(block)) && {
                    taken.extend(blocks);
                    true
                }
            })
            .collect()
    }

    proptest! {
        #[test]
        fn merging_in_two_steps_gives_the_newest_epoch_of_each_page(
            epochs in proptest::collection::vec(proptest::collection::vec(record(), 0..6).prop_map(disjoint), 1..6),
            cut in 0_usize..6,
            last_pages in 1_u64..64,
        ) {
            let geometry = Geometry::new((9 * 64 + last_pages) * 4096).expect("not empty");
            let candidates = |range: std::ops::Range<usize>| -> Vec<Candidate> {
                range.flat_map(|epoch| epochs[epoch].iter().map(move |&meta| Candidate {
                    epoch: epoch as u32, segment: 0, offset: 16, meta,
                })).collect()
            };
            let cut = cut.min(epochs.len());
            let first = merge_page(geometry, BlockIndex(0), candidates(0..cut), &[]);
            let both = merge_page(geometry, BlockIndex(0), candidates(cut..epochs.len()), &first);
            let mut found = HashMap::new();
            for entry in &both {
                for block in entry.block.0..entry.block.0 + u64::from(entry.block_count) {
                    for page in entry.live.iter() {
                        prop_assert!(found.insert((block, page), entry.epoch).is_none(), "covered twice");
                    }
                }
            }
            prop_assert_eq!(found, model(geometry, &epochs));
            prop_assert!(both.windows(2).all(|w| (w[0].block, Reverse(w[0].epoch)) < (w[1].block, Reverse(w[1].epoch))));
        }
    }
}
