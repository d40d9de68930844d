#![expect(clippy::cast_possible_truncation, reason = "the numbers of these tests are small")]

use std::collections::BTreeSet;
use std::sync::mpsc;

use common::format::record::Record;
use common::ids::{BlockIndex, PageMask};
use common::seal::{Compression, Sealer};

use super::*;

fn seed(first: u64) -> EpochSeed {
    let mut drawn = 0;
    EpochSeed {
        data_key: DataKey::from_random([1; 32]),
        volume: VolumeId([2; 16]),
        incarnation: Incarnation(1),
        key_id: KeyId(1),
        first: Epoch(first),
        draw_salt: Box::new(move || {
            drawn += 1;
            Ok(Salt([drawn; 32]))
        }),
    }
}

fn terms() -> CloseTerms {
    CloseTerms {
        fleet: FleetId([3; 16]),
        parent: CloseId([4; 32]),
        cut_time: UnixMillis(5),
        point: Some(Consistency::Crash),
        disk_bytes: 1 << 40,
        group: GroupId::NIL,
        group_point: GroupId::NIL,
    }
}

fn seal(sealer: &mut Sealer, ticket: EpochTicket, block: u64) -> (Epoch, Record) {
    let (mask, pages) = (PageMask(1), [block as u8; limits::PAGE_BYTES]);
    let record = sealer
        .seal_block(ticket.key(), BlockIndex(block), mask, PageMask::EMPTY, ticket.counter(), &pages, Compression::Try)
        .expect("one page for one bit");
    let epoch = ticket.epoch();
    ticket.seal_done(record.bytes().len());
    (epoch, record)
}

#[test]
fn every_record_of_many_threads_is_in_the_close_of_its_epoch_and_no_counter_comes_twice() {
    const BLOCKS: u64 = 1_000;
    let gate = Arc::new(EpochGate::new(seed(7), EpochBounds { records: 60, sealed_bytes: 8_000 }));
    let mut book = EpochBook::new(Arc::clone(&gate));
    let (sender, receiver) = mpsc::sync_channel(4);
    let next = Arc::new(AtomicU64::new(0));
    let workers: Vec<_> = (0..4)
        .map(|_| {
            let (gate, sender, next) = (Arc::clone(&gate), sender.clone(), Arc::clone(&next));
            std::thread::spawn(move || {
                let mut sealer = Sealer::new(1).expect("level 1 exists");
                loop {
                    let block = next.fetch_add(1, Ordering::Relaxed);
                    if block >= BLOCKS {
                        return;
                    }
                    let ticket = gate.ticket().expect("a salt");
                    if block % 97 == 0 {
                        continue; // given up: no record comes
                    }
                    sender.send(seal(&mut sealer, ticket, block)).expect("the agent listens");
                }
            })
        })
        .collect();
    drop(sender);
    let mut records: BTreeMap<Epoch, Vec<Record>> = BTreeMap::new();
    let mut closes = Vec::new();
    let mut close_ready = |book: &mut EpochBook| {
        while let Some(epoch) = book.closable() {
            closes.push(book.close(epoch, terms()).expect("closable"));
        }
    };
    for (epoch, record) in receiver {
        assert!(book.record(epoch, record.meta()));
        records.entry(epoch).or_default().push(record);
        close_ready(&mut book);
    }
    workers.into_iter().for_each(|worker| worker.join().expect("no panic"));
    let last = gate.retire().expect("a salt");
    close_ready(&mut book);

    assert_eq!(closes.last().map(|close| close.epoch), Some(last));
    assert_eq!(book.open_epochs(), 0);
    assert!(closes.len() > 10, "the bounds made many epochs, found {}", closes.len());
    assert!(closes.windows(2).all(|pair| pair[0].epoch.0 + 1 == pair[1].epoch.0), "in order, none left out");
    let salts: BTreeSet<_> = closes.iter().map(|close| close.salt).collect();
    assert_eq!(salts.len(), closes.len(), "a salt for each epoch");
    let mut blocks = BTreeSet::new();
    for close in &closes {
        let mut of_epoch = records.remove(&close.epoch).unwrap_or_default();
        of_epoch.sort_by_key(|record| record.header().block);
        assert!(of_epoch.len() <= 60);
        let counters: BTreeSet<_> = of_epoch.iter().map(|record| record.header().counter).collect();
        assert_eq!(counters.len(), of_epoch.len(), "no counter twice in epoch {}", close.epoch);
        let metas: Vec<_> = of_epoch.iter().map(Record::meta).collect();
        assert_eq!(close.meta_root, merkle::root(&metas).expect("no overlap"));
        assert_eq!(close.records, of_epoch.len() as u64);
        assert_eq!(close.data_pages, of_epoch.len() as u64);
        let bytes: usize = of_epoch.iter().map(|record| record.bytes().len()).sum();
        assert_eq!(close.record_bytes, bytes as u64);
        blocks.extend(of_epoch.iter().map(|record| record.header().block.0));
    }
    assert!(records.is_empty(), "no record outside of a close");
    assert_eq!(blocks, (0..BLOCKS).filter(|block| block % 97 != 0).collect());
}

#[test]
fn an_epoch_closes_only_when_its_last_ticket_has_come_back() {
    let gate = Arc::new(EpochGate::new(seed(1), EpochBounds::default()));
    let mut book = EpochBook::new(Arc::clone(&gate));
    let mut sealer = Sealer::new(1).expect("level");
    let (early, late, given_up) =
        (gate.ticket().expect("salt"), gate.ticket().expect("salt"), gate.ticket().expect("salt"));
    let (epoch, record) = seal(&mut sealer, early, 1);
    assert!(book.record(epoch, record.meta()));
    assert_eq!(book.closable(), None, "not retired");
    assert_eq!(gate.retire().expect("salt"), epoch);
    assert_eq!(book.closable(), None, "two tickets are out");
    drop(given_up);
    let (_, record) = seal(&mut sealer, late, 2);
    assert_eq!(book.closable(), None, "sealed, but not entered");
    assert!(matches!(book.close(epoch, terms()), Err(EpochError::NotClosable(_))));
    assert!(book.record(epoch, record.meta()));
    assert_eq!(book.closable(), Some(epoch));
    assert_eq!(book.close(epoch, terms()).expect("closable").records, 2);
}

#[test]
fn a_newer_epoch_never_closes_before_an_older_one() {
    let gate = Arc::new(EpochGate::new(seed(1), EpochBounds { records: 1, sealed_bytes: u64::MAX }));
    let mut book = EpochBook::new(Arc::clone(&gate));
    let mut sealer = Sealer::new(1).expect("level");
    let first = gate.ticket().expect("salt");
    let second = gate.ticket().expect("salt");
    assert_eq!((first.epoch(), second.epoch()), (Epoch(1), Epoch(2)));
    gate.retire().expect("salt");
    let (epoch, record) = seal(&mut sealer, second, 2);
    assert!(book.record(epoch, record.meta()));
    assert_eq!(book.closable(), None, "epoch 1 is not complete");
    let (epoch, record) = seal(&mut sealer, first, 1);
    assert!(book.record(epoch, record.meta()));
    assert_eq!(book.closable(), Some(Epoch(1)));
    book.close(Epoch(1), terms()).expect("closable");
    assert_eq!(book.closable(), Some(Epoch(2)));
}

#[test]
fn a_pass_without_changes_ends_in_an_empty_epoch_that_can_assert_a_point() {
    let gate = Arc::new(EpochGate::new(seed(9), EpochBounds::default()));
    let mut book = EpochBook::new(Arc::clone(&gate));
    assert_eq!(gate.retire().expect("salt"), Epoch(9));
    let close = book.close(Epoch(9), terms()).expect("closable");
    assert_eq!((close.records, close.point), (0, Some(Consistency::Crash)));
    assert_eq!(close.meta_root, merkle::root([]).expect("empty"));
}

#[test]
fn after_a_restart_numbers_go_on_and_old_tickets_do_not_count() {
    let gate = Arc::new(EpochGate::new(seed(5), EpochBounds::default()));
    let mut book = EpochBook::new(Arc::clone(&gate));
    let stale = gate.ticket().expect("salt");
    assert_eq!(stale.epoch(), Epoch(5));
    book.restart(Epoch(3));
    assert_eq!(gate.ticket().expect("salt").epoch(), Epoch(6), "never a number again");
    book.restart(Epoch(50));
    let (epoch, record) = seal(&mut Sealer::new(1).expect("level"), stale, 1);
    assert!(!book.record(epoch, record.meta()), "void");
    assert_eq!(gate.retire().expect("salt"), Epoch(50));
    assert_eq!(book.closable(), Some(Epoch(50)));
}

#[test]
fn without_a_salt_no_epoch_opens() {
    let gate = EpochGate::new(
        EpochSeed { draw_salt: Box::new(|| Err("no entropy".into())), ..seed(1) },
        EpochBounds::default(),
    );
    assert!(matches!(gate.ticket(), Err(EpochError::NoSalt(_))));
}
