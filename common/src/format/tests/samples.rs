//! Values of each format: fixed ones for the golden files, arbitrary ones for the properties.

use proptest::prelude::*;

use crate::clock::UnixMillis;
use crate::format::close::{Close, CloseStatement, Consistency};
use crate::format::frame::{Frame, RefusalCode};
use crate::format::log::{CommittedEpoch, LogEntry, Maintenance, Replacement, SegmentRef};
use crate::format::record::{Codec, Record, RecordHeader, RecordKind, RecordMeta};
use crate::format::segment::{
    PREAMBLE_BYTES, SegmentEntry, SegmentGroup, SegmentIndex, VERSION_COLLECTED, preamble, preamble_of,
};
use crate::format::volume_header::{IncarnationSize, VolumeHeader, WrappedKey, Wrapping};
use crate::ids::*;
use crate::limits;

/// A delta record with one raw page per bit of `data`, filled with `fill`; not truly sealed.
pub(crate) fn delta(block: u64, data: u64, zero: u64, fill: u8) -> Record {
    let plain_len = data.count_ones() * limits::PAGE_BYTES as u32;
    let header = RecordHeader {
        kind: RecordKind::Delta,
        codec: Codec::Raw,
        volume: VolumeId([0x11; 16]),
        incarnation: Incarnation(1),
        key_id: KeyId(1),
        epoch: Epoch(7),
        block: BlockIndex(block),
        data_mask: PageMask(data),
        zero_mask: PageMask(zero),
        block_count: 1,
        plain_len,
        sealed_len: plain_len + limits::SEAL_TAG_BYTES as u32,
        dictionary_id: 0,
        counter: block + 1,
    };
    Record::assemble(header, vec![fill; header.record_len()])
}

pub(crate) fn statement() -> CloseStatement {
    CloseStatement {
        fleet: FleetId([0x22; 16]),
        volume: VolumeId([0x11; 16]),
        incarnation: Incarnation(1),
        key_id: KeyId(1),
        epoch: Epoch(7),
        parent: CloseId([0x33; 32]),
        salt: Salt([0x44; 32]),
        cut_time: UnixMillis(1_700_000_000_123),
        point: Some(Consistency::Crash),
        disk_bytes: 1 << 30,
        records: 2,
        data_pages: 2,
        zero_pages: 1,
        record_bytes: 4096,
        meta_root: Digest([0x55; 32]),
        group: GroupId::NIL,
        group_point: GroupId::NIL,
    }
}

pub(crate) fn close() -> Close {
    Close::new(statement(), [0x66; 64])
}

pub(crate) fn log_entry() -> LogEntry {
    LogEntry {
        volume: VolumeId([0x11; 16]),
        seq: LogSeq(3),
        generation: Generation(2),
        writer: ReceiverId([0x77; 16]),
        previous: Digest([0x88; 32]),
        nonce: Nonce([0x99; 16]),
        written: UnixMillis(1_700_000_000_456),
        segments: vec![SegmentRef {
            path: "v1/volumes/x/segments/01J".to_owned(),
            size: 1 << 20,
            digest: Digest([0xaa; 32]),
            index_offset: 1 << 19,
            records: 2,
        }],
        epochs: vec![CommittedEpoch { close: close(), segments: vec![0] }],
        maintenance: None,
    }
}

pub(crate) fn maintenance_entry() -> LogEntry {
    let LogEntry { segments, .. } = log_entry();
    let replaced = segments
        .into_iter()
        .map(|new| Replacement {
            new,
            old: vec!["v1/volumes/x/segments/01A".into(), "v1/volumes/x/segments/01B".into()],
        })
        .collect();
    let maintenance = Maintenance {
        expired: vec![CloseId([0x31; 32]), CloseId([0x32; 32])],
        replaced,
        condemned: vec!["v1/volumes/x/segments/01C".into()],
    };
    LogEntry { segments: Vec::new(), epochs: Vec::new(), maintenance: Some(maintenance), ..log_entry() }
}

pub(crate) fn volume_header() -> VolumeHeader {
    VolumeHeader {
        nonce: Nonce([0x99; 16]),
        fleet: FleetId([0x22; 16]),
        volume: VolumeId([0x11; 16]),
        machine: MachineId([0xbb; 16]),
        machine_name: "web-1".to_owned(),
        name: "root".to_owned(),
        created: UnixMillis(1_700_000_000_000),
        sector_bytes: 512,
        key_id: KeyId(1),
        signing_key: [0xcc; 32],
        incarnations: vec![IncarnationSize { incarnation: Incarnation(1), disk_bytes: 1 << 30 }],
        wrapped_keys: vec![WrappedKey {
            key_id: KeyId(1),
            wrapping: Wrapping::KeyFile,
            wrapping_id: [0xdd; 16],
            salt: Salt([0xee; 32]),
            parameters: Vec::new(),
            wrapped: vec![0xff; 48],
        }],
    }
}

/// A whole segment of these records.
pub(crate) fn segment(records: &[Record]) -> (Vec<u8>, SegmentIndex) {
    let mut bytes = preamble().to_vec();
    assert_eq!(bytes.len(), PREAMBLE_BYTES);
    let entries = records
        .iter()
        .map(|record| {
            let entry = SegmentEntry { offset: bytes.len() as u64, meta: record.meta() };
            bytes.extend_from_slice(record.bytes());
            entry
        })
        .collect();
    let index = SegmentIndex {
        groups: vec![SegmentGroup {
            volume: VolumeId([0x11; 16]),
            incarnation: Incarnation(1),
            epoch: Epoch(7),
            entries,
        }],
    };
    let tail = index.encode(bytes.len() as u64);
    bytes.extend_from_slice(&tail);
    (bytes, index)
}

/// As [`segment`], with the first record collected.
pub(crate) fn collected_segment(records: &[Record]) -> (Vec<u8>, SegmentIndex) {
    let (_, mut index) = segment(&records[1..]);
    index.groups[0].entries.insert(0, SegmentEntry { offset: 0, meta: records[0].meta() });
    let mut bytes = preamble_of(VERSION_COLLECTED).to_vec();
    for record in &records[1..] {
        bytes.extend_from_slice(record.bytes());
    }
    let tail = index.encode(bytes.len() as u64);
    bytes.extend_from_slice(&tail);
    (bytes, index)
}

pub(crate) fn open_frame() -> Frame {
    Frame::Open {
        protocol: 1,
        volume: VolumeId([0x11; 16]),
        incarnation: Incarnation(1),
        session: SessionId([0x12; 16]),
        streams: 4,
        known: CloseId([0x33; 32]),
        journaled: vec![CloseId([0x34; 32])],
        resume: vec![Epoch(8), Epoch(9)],
    }
}

/// Every kind of frame.
pub(crate) fn frames() -> Vec<Frame> {
    vec![
        open_frame(),
        Frame::Attach { session: SessionId([0x12; 16]), stream: 1 },
        Frame::Opened { committed: CloseId([1; 32]), tip: CloseId([2; 32]), next_epoch: Epoch(10), lists: 1 },
        Frame::StagedRecords { epoch: Epoch(8), records: vec![(BlockIndex(5), SealTag([6; 16]))] },
        Frame::Record { seq: 1, record: delta(5, 0b11, 0b100, 0xab) },
        Frame::Staged { seq: 1 },
        Frame::Close(close()),
        Frame::Closed { epoch: Epoch(7), close: close().id() },
        Frame::Committed { epoch: Epoch(7), close: close().id(), records_resent: 0 },
        Frame::Drop { epoch: Epoch(8) },
        Frame::Refused { code: RefusalCode::Diverged, text: "a clone".to_owned() },
    ]
}

prop_compose! {
    /// A record of any valid shape.
    pub(crate) fn any_record()(
        block in 0_u64..1 << 30,
        masks in any::<(u64, u64)>(),
        range in proptest::option::weighted(0.2, 1_u32..limits::RANGE_BLOCKS_MAX),
        zstd_len in proptest::option::of(1_u32..4096),
        counter in any::<u64>(),
        fill in any::<u8>(),
    ) -> Record {
        let mut header = *delta(0, 1, 0, 0).header();
        header.counter = counter;
        if let Some(count) = range {
            header.kind = RecordKind::ZeroRange;
            header.block = BlockIndex(block.min((1 << 30) - u64::from(count)));
            header.block_count = count;
            (header.data_mask, header.zero_mask) = (PageMask::EMPTY, PageMask::FULL);
        } else {
            header.block = BlockIndex(block);
            // Few data pages keep the cases small.
            header.data_mask = PageMask(masks.0 & 0x8000_0000_0000_0101 | u64::from(masks.1 == 0));
            header.zero_mask = PageMask(masks.1).without(header.data_mask);
        }
        if header.pages().is_empty() {
            header.zero_mask = PageMask(1);
        }
        header.plain_len = header.data_mask.count() * limits::PAGE_BYTES as u32;
        header.sealed_len = header.plain_len + limits::SEAL_TAG_BYTES as u32;
        if let Some(length) = zstd_len.filter(|&length| length < header.plain_len) {
            header.codec = Codec::Zstd;
            header.sealed_len = length + limits::SEAL_TAG_BYTES as u32;
        }
        Record::assemble(header, vec![fill; header.record_len()])
    }
}

/// Metadata of blocks 0, 1, 2, … so that it is in order.
pub(crate) fn metas(count: u64) -> Vec<RecordMeta> {
    (0..count).map(|block| delta(block * 1000, 0, 1, block as u8).meta()).collect()
}
