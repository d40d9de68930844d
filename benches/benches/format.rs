//! Records, metadata, roots and frames: what the receiver does with each byte it gets, and what proves an epoch.
#![allow(missing_docs, reason = "what criterion's macros make")]

use std::hint::black_box;

use blockferry_benches::pages::{Content, block};
use bytes::{Bytes, BytesMut};
use common::format::frame::Frame;
use common::format::record::{Record, RecordMeta};
use common::format::wire::{Reader, Writer};
use common::ids::{BlockIndex, Epoch, Incarnation, KeyId, PageMask, Salt, VolumeId};
use common::limits::{EPOCH_RECORDS_MAX, PAGE_BYTES, RECORD_META_BYTES};
use common::seal::{Compression, DataKey, EpochContext, Sealer, merkle};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

/// A sealed record of so many incompressible pages, so that it has their size.
fn record(pages: usize) -> Record {
    let context =
        EpochContext { volume: VolumeId([1; 16]), incarnation: Incarnation(1), epoch: Epoch(1), key_id: KeyId(1) };
    let key = DataKey::from_random([7; 32]).epoch_key(context, &Salt([9; 32]));
    let bytes = block(Content::Random);
    let mask = PageMask::first(u32::try_from(pages).expect("at most a block"));
    Sealer::new(1)
        .expect("level 1")
        .seal_block(&key, BlockIndex(5), mask, PageMask::EMPTY, 1, &bytes[..pages * PAGE_BYTES], Compression::Skip)
        .expect("the pages are those of the mask")
}

fn metas(count: usize) -> Vec<RecordMeta> {
    let meta = record(1).meta();
    (0..count as u64).map(|block| RecordMeta { block: BlockIndex(block * 7), counter: block, ..meta }).collect()
}

fn records(c: &mut Criterion) {
    let mut group = c.benchmark_group("record");
    for (size, pages) in [("block", 64), ("page", 1)] {
        let record = record(pages);
        group.throughput(Throughput::Bytes(record.bytes().len() as u64));
        group.bench_function(format!("parse and checksum/{size}"), |b| {
            b.iter(|| Record::parse(black_box(record.bytes()).clone()).expect("what was sealed parses"));
        });
        group.bench_function(format!("metadata with digest/{size}"), |b| b.iter(|| black_box(&record).meta()));
    }
    group.finish();
}

fn metadata(c: &mut Criterion) {
    let mut group = c.benchmark_group("metadata");
    let metas = metas(EPOCH_RECORDS_MAX);
    group.throughput(Throughput::Elements(metas.len() as u64));
    group.bench_function("root of a full epoch", |b| b.iter(|| merkle::root(black_box(&metas)).expect("in order")));
    let mut writer = Writer::with_capacity(metas.len() * RECORD_META_BYTES);
    metas.iter().for_each(|meta| meta.encode(&mut writer));
    group.bench_function("decode of a full epoch", |b| {
        b.iter(|| {
            let mut reader = Reader::new("metadata", black_box(writer.as_slice()));
            while reader.remaining() > 0 {
                black_box(RecordMeta::decode(&mut reader).expect("what was encoded decodes"));
            }
        });
    });
    group.finish();
}

fn frames(c: &mut Criterion) {
    let mut group = c.benchmark_group("frame");
    for (size, pages) in [("block", 64), ("page", 1)] {
        let frame = Frame::Record { seq: 1, record: record(pages) };
        let (head, payload) = frame.encode();
        let bytes: Bytes = [head, payload.unwrap_or_default()].concat().into();
        // Whatever its size: a record's bytes are not copied.
        group.throughput(Throughput::Elements(1));
        group.bench_function(format!("encode/{size}"), |b| b.iter(|| black_box(&frame).encode()));
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(format!("take/{size}"), |b| {
            // Filling the buffer is what reading off the stream costs anyhow; it is not counted.
            b.iter_batched_ref(
                || BytesMut::from(&bytes[..]),
                |buffer| Frame::take(buffer).expect("what was encoded is taken"),
                criterion::BatchSize::LargeInput,
            );
        });
    }
    let staged = Frame::Staged { seq: 1 };
    group.throughput(Throughput::Elements(1));
    group.bench_function("encode/staged", |b| b.iter(|| black_box(&staged).encode()));
    group.finish();
}

criterion_group!(format_benches, records, metadata, frames);
criterion_main!(format_benches);
