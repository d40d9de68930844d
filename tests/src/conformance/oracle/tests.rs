//! The oracle on histories that keep the promise and on such as break it: an oracle that can't fail shows nothing.

#![allow(clippy::cast_possible_truncation, reason = "small numbers")]

use std::ops::Range;

use super::super::stamp::fill;
use super::*;
use crate::images::Random;

const PAGES: u64 = 16;
const SECTORS: u64 = PAGES * PAGE_SECTORS;

/// A disk in memory, and the log of what was written to it.
#[derive(Debug, Clone)]
struct Disk {
    bytes: Vec<u8>,
}

impl Disk {
    fn new() -> Self {
        let mut disk = Self { bytes: vec![0; SECTORS as usize * SECTOR] };
        (0..SECTORS).for_each(|sector| disk.stamp(0, 0, sector));
        disk
    }

    fn stamp(&mut self, number: u64, awaited: u64, sector: u64) {
        let at = sector as usize * SECTOR;
        fill(&mut self.bytes[at..at + SECTOR], number, awaited, sector);
    }

    fn apply(&mut self, log: &Log, number: u64) {
        let write = &log.writes[number as usize - 1];
        for sector in write.sectors.clone() {
            match write.kind {
                Kind::Stamp => self.stamp(number, write.awaited, sector),
                Kind::Zero | Kind::Trim => self.bytes[sector as usize * SECTOR..][..SECTOR].fill(0),
            }
        }
    }

    fn copy_page(&mut self, from: &Self, page: u64) {
        let range = (page * PAGE_SECTORS) as usize * SECTOR..((page + 1) * PAGE_SECTORS) as usize * SECTOR;
        self.bytes[range.clone()].copy_from_slice(&from.bytes[range]);
    }
}

fn page(page: u64) -> Range<u64> {
    page * PAGE_SECTORS..(page + 1) * PAGE_SECTORS
}

/// A write from submission to completion with nothing between.
fn write(log: &mut Log, sectors: Range<u64>, disk: &mut Disk) -> u64 {
    let number = log.submit(Kind::Stamp, sectors, 0);
    disk.apply(log, number);
    log.complete(number);
    number
}

fn judge(log: &Log, disk: &Disk, window: Window) -> Result<Shown, Violation> {
    Oracle::new(log, SECTORS).judge(&mut disk.bytes.as_slice(), window, None)
}

fn refused(log: &Log, disk: &Disk, window: Window, because: &str) {
    let violation = judge(log, disk, window).expect_err("the oracle has to see it");
    assert!(violation.to_string().contains(because), "{violation}");
}

#[test]
fn any_prefix_of_writes_one_after_the_other_is_a_point() {
    let (mut log, mut disk) = (Log::default(), Disk::new());
    let mut points = vec![disk.clone()];
    for at in [3, 5, 3, 3, 9] {
        write(&mut log, page(at), &mut disk);
        points.push(disk.clone());
    }
    let oracle = Oracle::new(&log, SECTORS);
    let mut previous = None;
    for point in &points {
        let shown = oracle.judge(&mut point.bytes.as_slice(), Window::ANY, previous.as_ref()).expect("a prefix");
        previous = Some(shown);
    }
}

#[test]
fn a_write_without_one_that_completed_before_it_is_refused() {
    let (mut log, mut disk, mut point) = (Log::default(), Disk::new(), Disk::new());
    write(&mut log, page(1), &mut disk);
    let second = write(&mut log, page(2), &mut disk);
    point.apply(&log, second);
    refused(&log, &point, Window::ANY, "page 1, sector 8: shows what was there before, but write 1");
}

#[test]
fn an_older_write_of_a_page_beside_a_newer_one_of_another_is_refused() {
    let (mut log, mut disk, mut point) = (Log::default(), Disk::new(), Disk::new());
    for at in [1, 1, 2] {
        write(&mut log, page(at), &mut disk);
    }
    point.apply(&log, 1);
    point.apply(&log, 3);
    refused(&log, &point, Window::ANY, "shows write 1, but write 2");
}

#[test]
fn a_page_read_after_the_cut_is_refused_where_others_were_read_before() {
    let (mut log, mut disk) = (Log::default(), Disk::new());
    write(&mut log, page(1), &mut disk);
    let mut point = disk.clone();
    write(&mut log, page(2), &mut disk);
    write(&mut log, page(1), &mut disk);
    // The late reader: page 1 as it is now, page 2 as it was at the cut.
    point.copy_page(&disk, 1);
    refused(&log, &point, Window::ANY, "page 2");
}

#[test]
fn writes_under_way_together_may_be_there_in_any_order_or_torn_or_not_at_all() {
    let (mut log, disk) = (Log::default(), Disk::new());
    let first = log.submit(Kind::Stamp, 8..24, 0);
    let second = log.submit(Kind::Stamp, 8..16, 0);
    for order in [vec![], vec![first], vec![second], vec![first, second], vec![second, first]] {
        let mut point = disk.clone();
        order.iter().for_each(|number| point.apply(&log, *number));
        judge(&log, &point, Window::ANY).expect("nothing says which came first");
    }
    let mut torn = disk;
    torn.stamp(first, 0, 20);
    judge(&log, &torn, Window::ANY).expect("it was never complete");
}

#[test]
fn a_complete_write_is_there_as_a_whole_once_a_later_one_is() {
    let (mut log, mut disk) = (Log::default(), Disk::new());
    write(&mut log, 8..24, &mut disk);
    write(&mut log, page(5), &mut disk);
    let mut point = disk;
    point.stamp(0, 0, 20);
    refused(&log, &point, Window::ANY, "sector 20: shows what was there before, but write 1");
}

#[test]
fn content_that_nobody_wrote_there_is_refused() {
    let (mut log, mut disk) = (Log::default(), Disk::new());
    let number = write(&mut log, page(1), &mut disk);
    let mut damaged = disk.clone();
    damaged.bytes[8 * SECTOR + 100] ^= 1;
    refused(&log, &damaged, Window::ANY, "holds what nobody wrote");
    let mut moved = disk.clone();
    moved.stamp(number, 0, 50);
    refused(&log, &moved, Window::ANY, "never made there");
    let mut unknown = disk.clone();
    unknown.stamp(number + 1, 0, 8);
    refused(&log, &unknown, Window::ANY, "never made there");
    let mut other = disk;
    other.stamp(number, 77, 8);
    refused(&log, &other, Window::ANY, "never made there");
}

#[test]
fn zeros_that_nobody_made_are_refused_and_those_of_a_write_are_not() {
    let (mut log, mut disk) = (Log::default(), Disk::new());
    write(&mut log, page(1), &mut disk);
    let stamped = disk.clone();
    let zeroed = log.submit(Kind::Zero, page(1), 0);
    disk.apply(&log, zeroed);
    log.complete(zeroed);
    write(&mut log, page(2), &mut disk);
    judge(&log, &disk, Window::ANY).expect("as it was written");
    let mut without = disk.clone();
    without.copy_page(&stamped, 1);
    refused(&log, &without, Window::ANY, "shows write 1, but write 2");
    let mut lost = disk.clone();
    lost.bytes[16 * SECTOR..24 * SECTOR].fill(0);
    refused(&log, &lost, Window::ANY, "page 2, sector 16: shows zeros, and nobody made it");
    write(&mut log, page(1), &mut disk);
    let mut stale = disk.clone();
    stale.bytes[8 * SECTOR..16 * SECTOR].fill(0);
    judge(&log, &stale, Window::ANY).expect("a point before the last write");
    let floor = log.moment();
    refused(&log, &stale, Window { floor, ..Window::ANY }, "shows zeros, but write 4");
}

#[test]
fn a_trim_allows_zeros_and_asks_for_none() {
    let (mut log, mut disk) = (Log::default(), Disk::new());
    write(&mut log, page(1), &mut disk);
    let left = disk.clone();
    let trim = log.submit(Kind::Trim, page(1), 0);
    disk.apply(&log, trim);
    log.complete(trim);
    let floor = log.moment();
    for point in [&disk, &left] {
        judge(&log, point, Window { floor, ..Window::ANY }).expect("either");
    }
}

#[test]
fn a_point_holds_what_completed_before_it_was_asked_for_and_nothing_submitted_after_it_was_there() {
    let (mut log, mut disk) = (Log::default(), Disk::new());
    write(&mut log, page(1), &mut disk);
    let early = disk.clone();
    write(&mut log, page(1), &mut disk);
    let now = log.moment();
    judge(&log, &disk, Window { floor: now, ceiling: now }).expect("exactly then");
    refused(&log, &early, Window { floor: now, ..Window::ANY }, "shows write 1, but write 2");
    write(&mut log, page(3), &mut disk);
    refused(&log, &disk, Window { ceiling: now, ..Window::ANY }, "submitted after the point was there");
}

#[test]
fn a_point_that_goes_back_behind_an_earlier_one_is_refused() {
    let (mut log, mut disk) = (Log::default(), Disk::new());
    write(&mut log, page(1), &mut disk);
    let first = disk.clone();
    write(&mut log, page(2), &mut disk);
    let oracle = Oracle::new(&log, SECTORS);
    let later = oracle.judge(&mut disk.bytes.as_slice(), Window::ANY, None).expect("a prefix");
    let violation = oracle.judge(&mut first.bytes.as_slice(), Window::ANY, Some(&later)).expect_err("it went back");
    assert!(violation.what.contains("earlier point showed write 2"), "{violation}");
}

/// Several writers at once, writes applied at a random moment between submission and completion, cut after each step.
/// `spoil` makes of the truth at a cut and at a later time what the broken capture would store.
fn simulate(seed: u64, spoil: impl Fn(&mut Random, &Disk, &Disk) -> Disk) -> Result<(), Violation> {
    let mut random = Random(seed);
    let (mut log, mut disk) = (Log::default(), Disk::new());
    let (mut waiting, mut applied): (Vec<u64>, Vec<u64>) = (Vec::new(), Vec::new());
    let mut states = Vec::new();
    for _ in 0..300 {
        match random.below(3) {
            0 => {
                let start = random.below(4) * PAGE_SECTORS + random.below(8);
                let sectors = start..(start + 1 + random.below(16)).min(SECTORS);
                waiting.push(log.submit(Kind::Stamp, sectors, 0));
            }
            1 if !waiting.is_empty() => {
                let at = random.below(waiting.len() as u64) as usize;
                let number = waiting.swap_remove(at);
                disk.apply(&log, number);
                applied.push(number);
            }
            2 if !applied.is_empty() => {
                let at = random.below(applied.len() as u64) as usize;
                log.complete(applied.swap_remove(at));
            }
            _ => {}
        }
        let moment = log.moment();
        states.push((disk.clone(), moment));
    }
    let oracle = Oracle::new(&log, SECTORS);
    let mut previous = None;
    for at in (0..states.len() - 20).step_by(7) {
        let (truth, moment) = &states[at];
        let point = spoil(&mut random, truth, &states[at + 20].0);
        let window = Window { floor: *moment, ceiling: NEVER };
        previous = Some(oracle.judge(&mut point.bytes.as_slice(), window, previous.as_ref())?);
    }
    Ok(())
}

#[test]
fn true_cuts_of_many_writers_always_pass() {
    for seed in 0..50 {
        simulate(seed, |_, truth, _| truth.clone()).unwrap_or_else(|violation| panic!("seed {seed}: {violation}"));
    }
}

#[test]
fn a_capture_that_reads_a_page_late_or_loses_one_is_caught() {
    let late = |random: &mut Random, truth: &Disk, later: &Disk| {
        let mut point = truth.clone();
        point.copy_page(later, random.below(4));
        point
    };
    let lost = |random: &mut Random, truth: &Disk, _: &Disk| {
        let mut point = truth.clone();
        point.copy_page(&Disk::new(), random.below(4));
        point
    };
    for seed in 0..20 {
        simulate(seed, late).expect_err("pages were read late");
        simulate(seed, lost).expect_err("pages were lost");
    }
}
