use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const PAGES: u64 = limits::PAGES_PER_BLOCK as u64;

fn geometry(pages: u64) -> Geometry {
    Geometry::new(pages * limits::PAGE_BYTES as u64).expect("a size within the limits")
}

fn pages(set: &PageSet) -> BTreeSet<u64> {
    set.iter().flat_map(|(block, mask)| mask.iter().map(move |page| block.0 * PAGES + u64::from(page))).collect()
}

#[test]
fn a_full_set_has_exactly_the_pages_of_the_disk_and_costs_little() {
    let geometry = geometry(3 * 65_536 + 65);
    let mut set = PageSet::full(geometry);
    assert_eq!(set.len(), geometry.pages());
    assert!(set.memory_bytes() < 4096);
    assert_eq!(pages(&set).len() as u64, geometry.pages());
    let last = BlockIndex(geometry.blocks() - 1);
    assert_eq!(set.mask(last), PageMask(1));
    assert_eq!(set.remove(last, PageMask::FULL), PageMask(1));
    assert_eq!(set.next_block(last), None);
    assert_eq!(set.insert(last, PageMask::FULL), 1, "pages beyond the end do not count");
    assert_eq!(set, PageSet::full(geometry));
}

proptest! {
    #[test]
    fn it_behaves_as_a_set_of_page_numbers(
        size in 1_u64..140_000,
        operations in proptest::collection::vec((0_u8..4, 0_u64..2_200, any::<u64>(), 1_u64..1_500), 0..40),
    ) {
        let geometry = geometry(size);
        let mut set = PageSet::empty(geometry);
        let mut model = BTreeSet::new();
        for (operation, block, mask, count) in operations {
            let named = |mask: u64| PageMask(mask).iter().map(move |page| block * PAGES + u64::from(page));
            match operation {
                0 => {
                    set.insert(BlockIndex(block), PageMask(mask));
                    model.extend(named(mask).filter(|page| *page < size));
                }
                1 => {
                    set.insert_blocks(BlockIndex(block), count);
                    model.extend((block * PAGES..(block + count) * PAGES).filter(|page| *page < size));
                }
                2 => {
                    let removed = set.remove(BlockIndex(block), PageMask(mask));
                    let expected: Vec<u64> = named(mask).filter(|page| model.remove(page)).collect();
                    prop_assert_eq!(named(removed.0).collect::<Vec<_>>(), expected);
                }
                _ => {
                    let taken = set.take_next(BlockIndex(block));
                    let first = model.range(block * PAGES..).next().map(|page| page / PAGES);
                    prop_assert_eq!(taken.map(|(block, _)| block.0), first);
                    if let Some(first) = first {
                        model.retain(|page| page / PAGES != first);
                    }
                }
            }
            prop_assert_eq!(set.len(), model.len() as u64);
        }
        prop_assert_eq!(pages(&set), model.clone());
        let mut joined = PageSet::empty(geometry);
        joined.insert_blocks(BlockIndex(3), 1_100);
        joined.extend(&set);
        model.extend((3 * PAGES..1_103 * PAGES).filter(|page| *page < size));
        prop_assert_eq!(pages(&joined), model);
    }
}
