//! Sealing and opening, by what the pages are like: a whole block and a single page each.
#![allow(missing_docs, reason = "what criterion's macros make")]

use std::hint::black_box;

use blockferry_benches::pages::{Content, block};
use common::format::record::Record;
use common::ids::{BlockIndex, Epoch, Incarnation, KeyId, PageMask, Salt, VolumeId};
use common::limits::{BLOCK_BYTES, PAGE_BYTES};
use common::seal::{Compression, DataKey, EpochContext, EpochKey, Opener, Sealer};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

fn key() -> EpochKey {
    let context =
        EpochContext { volume: VolumeId([1; 16]), incarnation: Incarnation(1), epoch: Epoch(1), key_id: KeyId(1) };
    DataKey::from_random([7; 32]).epoch_key(context, &Salt([9; 32]))
}

fn seal(sealer: &mut Sealer, key: &EpochKey, counter: u64, pages: &[u8], compression: Compression) -> Record {
    let mask = PageMask::first(u32::try_from(pages.len() / PAGE_BYTES).expect("at most a block"));
    sealer
        .seal_block(key, BlockIndex(5), mask, PageMask::EMPTY, counter, pages, compression)
        .expect("the pages are those of the mask")
}

fn sealing(c: &mut Criterion) {
    let mut group = c.benchmark_group("seal");
    let key = key();
    for content in Content::ALL {
        let bytes = block(content);
        for (size, pages) in [("block", &bytes[..BLOCK_BYTES]), ("page", &bytes[..PAGE_BYTES])] {
            group.throughput(Throughput::Bytes(pages.len() as u64));
            group.bench_with_input(BenchmarkId::new(content.name(), size), pages, |b, pages| {
                let mut sealer = Sealer::new(1).expect("level 1");
                let mut counter = 0;
                b.iter(|| {
                    counter += 1;
                    seal(&mut sealer, &key, counter, black_box(pages), Compression::Try)
                });
            });
        }
    }
    // What is left of random pages once compression is no longer tried: encryption and one copy.
    let bytes = block(Content::Random);
    group.throughput(Throughput::Bytes(BLOCK_BYTES as u64));
    group.bench_function("random, not tried/block", |b| {
        let mut sealer = Sealer::new(1).expect("level 1");
        let mut counter = 0;
        b.iter(|| {
            counter += 1;
            seal(&mut sealer, &key, counter, black_box(&bytes), Compression::Skip)
        });
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("zero range", |b| {
        let mut sealer = Sealer::new(1).expect("level 1");
        let mut counter = 0;
        b.iter(|| {
            counter += 1;
            sealer.seal_zero_range(&key, BlockIndex(0), 65_536, counter)
        });
    });
    group.finish();
}

fn opening(c: &mut Criterion) {
    let mut group = c.benchmark_group("open");
    let key = key();
    for content in Content::ALL {
        let bytes = block(content);
        for (size, pages) in [("block", &bytes[..BLOCK_BYTES]), ("page", &bytes[..PAGE_BYTES])] {
            let record = seal(&mut Sealer::new(1).expect("level 1"), &key, 1, pages, Compression::Try);
            group.throughput(Throughput::Bytes(pages.len() as u64));
            group.bench_with_input(BenchmarkId::new(content.name(), size), &record, |b, record| {
                let mut opener = Opener::new().expect("memory");
                let mut out = Vec::new();
                b.iter(|| opener.open(&key, black_box(record), &mut out).expect("what was sealed opens"));
            });
        }
    }
    group.finish();
}

criterion_group!(seal_benches, sealing, opening);
criterion_main!(seal_benches);
