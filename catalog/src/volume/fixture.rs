//! Writes real volumes for tests: real records, closes, segments and log entries, from images in memory.
//!
//! What the sender and the receiver do together, without network and stage. Panics where anything fails: for tests only.

#![allow(clippy::cast_possible_truncation, reason = "images of tests are small")]

use std::collections::BTreeMap;

use bytes::Bytes;
use common::clock::{Clock, UnixMillis};
use common::format::close::{Close, CloseStatement, Consistency};
use common::format::log::{CommittedEpoch, SegmentRef};
use common::format::record::Record;
use common::format::segment::{SegmentEntry, SegmentGroup, SegmentIndex, preamble};
use common::format::volume_header::{IncarnationSize, VolumeHeader};
use common::ids::{
    BlockIndex, CloseId, Digest, Epoch, FleetId, Geometry, GroupId, Incarnation, KeyId, MachineId, Nonce, PageMask,
    ReceiverId, Salt, VolumeId,
};
use common::limits::{BLOCK_BYTES, PAGE_BYTES};
use common::seal::keyfile::KeyFile;
use common::seal::{Compression, DataKey, EpochContext, Sealer, merkle};

use super::{LogWriter, VolumeView, header, paths};
use crate::store::Store;

/// A volume and everything that its sender and receiver would know.
pub struct FixtureVolume {
    /// Where it lies.
    pub store: Store,
    /// Its header.
    pub header: VolumeHeader,
    /// The key file that wraps its data key.
    pub key_file: KeyFile,
    /// Its data key.
    pub data_key: DataKey,
    /// Its log's writer.
    pub log: LogWriter,
    /// What the log said when it was opened.
    pub view: VolumeView,
    /// The clock that labels points; set it to move time.
    pub clock: Clock,
    /// Segments that the next epoch's records are spread over.
    pub segments_per_epoch: usize,
    /// Pages, by number on the disk, that the next capture leaves out: an incomplete first replication.
    pub left_out: Vec<u64>,
    /// The instant that the next points say they share with other volumes'.
    pub group_point: GroupId,
    content: Option<Vec<u8>>,
    next_epoch: u64,
}

impl FixtureVolume {
    /// Makes a volume of `disk_bytes` bytes in `store`, named `name` on `machine`; ids derive from the two names.
    pub async fn create(store: &Store, machine: &str, name: &str, disk_bytes: u64) -> Self {
        let id = |text: &str| {
            let mut id = [0; 16];
            id.copy_from_slice(&blake3::hash(text.as_bytes()).as_bytes()[..16]);
            id
        };
        let volume = VolumeId::from_random(id(&format!("{machine}/{name}")));
        let key_file = KeyFile::from_random(id(machine), *blake3::hash(machine.as_bytes()).as_bytes());
        let data_key = DataKey::from_random(*blake3::hash(volume.to_string().as_bytes()).as_bytes());
        let header = VolumeHeader {
            nonce: Nonce::ZERO,
            fleet: FleetId::from_random([1; 16]),
            volume,
            machine: MachineId::from_random(id(machine)),
            machine_name: machine.into(),
            name: name.into(),
            created: UnixMillis(1_700_000_000_000),
            sector_bytes: 512,
            key_id: KeyId(1),
            signing_key: data_key.signer(volume).public(),
            incarnations: vec![IncarnationSize { incarnation: Incarnation(1), disk_bytes }],
            wrapped_keys: vec![key_file.wrap(&data_key, volume, KeyId(1), Salt([7; 32]))],
        };
        let (stored, _) = header::create(store, &header).await.expect("the volume is new");
        let clock = Clock::manual(UnixMillis(1_700_000_000_000));
        let (log, view) =
            LogWriter::open(store, &stored.header, ReceiverId([5; 16]), &clock).await.expect("the log is new");
        Self {
            store: store.clone(),
            header: stored.header,
            key_file,
            data_key,
            log,
            view,
            clock,
            segments_per_epoch: 1,
            group_point: GroupId::NIL,
            left_out: Vec::new(),
            content: None,
            next_epoch: 1,
        }
    }

    /// Commits one epoch that takes the volume to `content`: the pages that differ, all pages the first time.
    pub async fn capture(&mut self, content: &[u8], point: Option<Consistency>) -> Close {
        let records = self.seal(content);
        self.content = Some(content.to_vec());
        self.commit(records, point).await
    }

    /// Replaces the disk by one of another size: the next capture sends everything.
    pub async fn resize(&mut self, disk_bytes: u64) {
        self.grow(disk_bytes).await;
        self.content = None;
    }

    /// Grows the disk: the next capture sends what differs from the smaller disk followed by zeros, and all new pages.
    pub async fn grow(&mut self, disk_bytes: u64) {
        let stored = header::read(&self.store, self.header.volume).await.expect("a header");
        let next = Incarnation(stored.header.current().incarnation.0 + 1);
        let size = IncarnationSize { incarnation: next, disk_bytes };
        let stored =
            header::update(&self.store, &stored, |header| header.incarnations.push(size)).await.expect("unchanged");
        self.header = stored.header;
        let (log, view) =
            LogWriter::open(&self.store, &self.header, ReceiverId([5; 16]), &self.clock).await.expect("a log");
        (self.log, self.view) = (log, view);
    }

    fn context(&self) -> (EpochContext, Salt) {
        let epoch = Epoch(self.next_epoch);
        let context = EpochContext {
            volume: self.header.volume,
            incarnation: self.header.current().incarnation,
            epoch,
            key_id: self.header.key_id,
        };
        (context, Salt(*blake3::hash(&epoch.0.to_le_bytes()).as_bytes()))
    }

    /// The key of the next epoch's records.
    pub fn epoch_key(&self) -> common::seal::EpochKey {
        let (context, salt) = self.context();
        self.data_key.epoch_key(context, &salt)
    }

    /// The records that take the disk from what was captured last to `content`, in block order.
    pub fn seal(&mut self, content: &[u8]) -> Vec<Record> {
        let geometry = Geometry::new(self.header.current().disk_bytes).expect("a disk");
        assert_eq!(content.len() as u64, geometry.disk_bytes());
        let (context, salt) = self.context();
        let key = self.data_key.epoch_key(context, &salt);
        let mut sealer = Sealer::new(1).expect("level 1");
        let (mut records, mut zero_run, mut counter) = (Vec::new(), 0..0_u64, 0);
        for block in 0..geometry.blocks() {
            let (mut data, mut zero, mut pages) = (PageMask::EMPTY, PageMask::EMPTY, Vec::new());
            for page in geometry.pages_of(BlockIndex(block)).iter() {
                let number = block * 64 + u64::from(page);
                let start = number as usize * PAGE_BYTES;
                let end = (start + PAGE_BYTES).min(content.len());
                let same = self.content.as_ref().is_some_and(|old| {
                    let known = end.min(old.len());
                    let padded = || content[known..end].iter().all(|byte| *byte == 0);
                    start < known && old[start..known] == content[start..known] && padded()
                });
                if same || self.left_out.contains(&number) {
                    continue;
                }
                if content[start..end].iter().all(|byte| *byte == 0) {
                    zero = zero.with(page);
                } else {
                    data = data.with(page);
                    pages.extend_from_slice(&content[start..end]);
                    pages.resize(data.count() as usize * PAGE_BYTES, 0);
                }
            }
            if zero == PageMask::FULL {
                if zero_run.end != block {
                    records.extend(zero_range(&mut sealer, &key, &mut zero_run, &mut counter));
                    zero_run = block..block;
                }
                zero_run.end = block + 1;
                continue;
            }
            records.extend(zero_range(&mut sealer, &key, &mut zero_run, &mut counter));
            if !data.or(zero).is_empty() {
                counter += 1;
                let sealed = sealer.seal_block(&key, BlockIndex(block), data, zero, counter, &pages, Compression::Try);
                records.push(sealed.expect("pages fit the mask"));
            }
        }
        records.extend(zero_range(&mut sealer, &key, &mut zero_run, &mut counter));
        self.left_out.clear();
        records
    }

    /// Stores records, signs the close over them and commits both.
    pub async fn commit(&mut self, records: Vec<Record>, point: Option<Consistency>) -> Close {
        let close = loop {
            let (segments, epochs) = self.prepare(records.clone(), point).await;
            let close = epochs[0].close.clone();
            match self.log.append(segments, epochs).await {
                // A collector without grace was faster: once more under fresh names.
                Err(super::LogError::Condemned { .. }) => {}
                appended => {
                    appended.expect("the writer owns the log");
                    break close;
                }
            }
        };
        self.next_epoch += 1;
        close
    }

    /// Stores records and signs the close over them, but does not commit them.
    pub async fn prepare(
        &mut self,
        records: Vec<Record>,
        point: Option<Consistency>,
    ) -> (Vec<SegmentRef>, Vec<CommittedEpoch>) {
        let (context, salt) = self.context();
        let metas: Vec<_> = records.iter().map(Record::meta).collect();
        let count = |f: fn(&common::format::record::RecordMeta) -> u64| metas.iter().map(f).sum();
        let close = self.data_key.signer(self.header.volume).sign(CloseStatement {
            fleet: self.header.fleet,
            volume: context.volume,
            incarnation: context.incarnation,
            key_id: context.key_id,
            epoch: context.epoch,
            parent: self.log.position().head_id(),
            salt,
            cut_time: self.clock.now(),
            point,
            disk_bytes: self.header.current().disk_bytes,
            records: metas.len() as u64,
            data_pages: count(|meta| u64::from(meta.data_mask.count())),
            zero_pages: count(|meta| u64::from(meta.zero_mask.count()) * u64::from(meta.block_count)),
            record_bytes: count(|meta| meta.record_len.into()),
            meta_root: merkle::root(&metas).expect("in block order"),
            group: GroupId::NIL,
            group_point: self.group_point,
        });
        // Dealt out in turn, so that an epoch's blocks are scattered over its segments.
        let mut dealt: BTreeMap<usize, Vec<Record>> = BTreeMap::new();
        for (number, record) in records.into_iter().enumerate() {
            dealt.entry(number % self.segments_per_epoch).or_default().push(record);
        }
        let mut segments = Vec::new();
        for records in dealt.into_values() {
            segments.push(self.put_segment(context, &records).await);
        }
        let places = (0..segments.len() as u32).collect();
        (segments, vec![CommittedEpoch { close, segments: places }])
    }

    async fn put_segment(&self, context: EpochContext, records: &[Record]) -> SegmentRef {
        let (mut bytes, mut entries) = (preamble().to_vec(), Vec::new());
        for record in records {
            entries.push(SegmentEntry { offset: bytes.len() as u64, meta: record.meta() });
            bytes.extend_from_slice(record.bytes());
        }
        let index_offset = bytes.len() as u64;
        let index = SegmentIndex {
            groups: vec![SegmentGroup {
                volume: context.volume,
                incarnation: context.incarnation,
                epoch: context.epoch,
                entries,
            }],
        };
        bytes.extend_from_slice(&index.encode(index_offset));
        let name = ulid::Ulid::from_bytes(common::rng::random().expect("randomness")).to_string();
        let segment = SegmentRef {
            path: paths::segment(context.volume, &name),
            size: bytes.len() as u64,
            digest: Digest(*blake3::hash(&bytes).as_bytes()),
            index_offset,
            records: records.len() as u32,
        };
        self.store.put_segment(&segment.path, vec![Bytes::from(bytes)]).await.expect("the store is writable");
        segment
    }

    /// The newest committed close.
    pub fn head(&self) -> CloseId {
        self.log.position().head_id()
    }
}

fn zero_range(
    sealer: &mut Sealer,
    key: &common::seal::EpochKey,
    run: &mut std::ops::Range<u64>,
    counter: &mut u64,
) -> Option<Record> {
    let (first, count) = (run.start, run.end - run.start);
    *run = 0..0;
    (count > 0).then(|| {
        *counter += 1;
        sealer.seal_zero_range(key, BlockIndex(first), count as u32, *counter)
    })
}

/// An image of `disk_bytes` bytes: mostly noise and text, with zero pages and zero runs, from a seed.
#[must_use]
pub fn image(disk_bytes: usize, seed: u64) -> Vec<u8> {
    let mut content = vec![0; disk_bytes];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut content);
    for (number, page) in content.chunks_mut(PAGE_BYTES).enumerate() {
        let kind = page[0];
        if kind < 60 || (number / 64) % 7 == (seed % 7) as usize {
            page.fill(0);
        } else if kind < 160 {
            let text = format!("page {number} of image {seed}. ");
            page.iter_mut().zip(text.bytes().cycle()).for_each(|(byte, letter)| *byte = letter);
        }
    }
    content
}

/// `content` with some of its pages changed: rewritten, or zeroed, `changes` of them, from a seed.
#[must_use]
pub fn change(content: &[u8], changes: usize, seed: u64) -> Vec<u8> {
    let (mut content, pages) = (content.to_vec(), content.len().div_ceil(PAGE_BYTES));
    for number in 0..changes {
        let hash = blake3::hash(&[seed.to_le_bytes(), (number as u64).to_le_bytes()].concat());
        let (mut at, mut kind) = ([0; 8], [0; 8]);
        at.copy_from_slice(&hash.as_bytes()[..8]);
        kind.copy_from_slice(&hash.as_bytes()[8..16]);
        let start = (u64::from_le_bytes(at) % pages as u64) as usize * PAGE_BYTES;
        let end = (start + PAGE_BYTES).min(content.len());
        match u64::from_le_bytes(kind) % 4 {
            0 => content[start..end].fill(0),
            // A whole block zeroed, which becomes a range record.
            1 => {
                let block = start / BLOCK_BYTES * BLOCK_BYTES;
                let end = (block + BLOCK_BYTES).min(content.len());
                content[block..end].fill(0);
            }
            _ => content[start..end].iter_mut().zip(hash.as_bytes().iter().cycle()).for_each(|(b, h)| *b = *h),
        }
    }
    content
}
