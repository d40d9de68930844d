//! A sender in small, for the tests of stage and forwarder: real records and signed closes of one volume.

use common::clock::UnixMillis;
use common::format::close::{Close, CloseStatement, Consistency};
use common::format::record::{Record, RecordMeta};
use common::format::volume_header::{IncarnationSize, VolumeHeader};
use common::ids::{
    BlockIndex, CloseId, Epoch, FleetId, GroupId, Incarnation, KeyId, MachineId, Nonce, PageMask, Salt, VolumeId,
};
use common::limits::PAGE_BYTES;
use common::seal::{Compression, DataKey, EpochContext, Sealer, merkle};
use tokio::sync::oneshot;

use super::Stage;
use super::index::Begin;
use super::writer::Job;

/// Size of the volumes' disks.
pub(crate) const DISK_BYTES: u64 = 1 << 30;

/// One volume's sender.
pub(crate) struct Source {
    pub(crate) header: VolumeHeader,
    key: DataKey,
    sealer: Sealer,
    /// Newest close that it made.
    pub(crate) parent: CloseId,
    counter: u64,
}

impl Source {
    pub(crate) fn new(number: u8) -> Self {
        let volume = VolumeId([number; 16]);
        let key = DataKey::from_random([number; 32]);
        let header = VolumeHeader {
            nonce: Nonce::ZERO,
            fleet: FleetId([1; 16]),
            volume,
            machine: MachineId([2; 16]),
            machine_name: "machine".into(),
            name: format!("volume-{number}"),
            created: UnixMillis(0),
            sector_bytes: 512,
            key_id: KeyId(1),
            signing_key: key.signer(volume).public(),
            incarnations: vec![IncarnationSize { incarnation: Incarnation(1), disk_bytes: DISK_BYTES }],
            wrapped_keys: Vec::new(),
        };
        Self { header, key, sealer: Sealer::new(1).expect("level 1"), parent: CloseId::ZERO, counter: 0 }
    }

    pub(crate) fn volume(&self) -> VolumeId {
        self.header.volume
    }

    /// A record of `pages` pages of noise.
    pub(crate) fn record(&mut self, epoch: u64, block: u64, pages: u32) -> Record {
        self.counter += 1;
        let mut content = vec![0; pages as usize * PAGE_BYTES];
        let seed = [epoch.to_le_bytes(), block.to_le_bytes(), self.counter.to_le_bytes()].concat();
        blake3::Hasher::new().update(&self.header.volume.0).update(&seed).finalize_xof().fill(&mut content);
        let context = EpochContext {
            volume: self.header.volume,
            incarnation: Incarnation(1),
            epoch: Epoch(epoch),
            key_id: KeyId(1),
        };
        let key = self.key.epoch_key(context, &Salt([9; 32]));
        let (data, zero) = (PageMask::first(pages), PageMask::EMPTY);
        let sealed =
            self.sealer.seal_block(&key, BlockIndex(block), data, zero, self.counter, &content, Compression::Skip);
        sealed.expect("pages fit the mask")
    }

    /// The close of an epoch with these records; it becomes the parent of the next.
    pub(crate) fn close(&mut self, epoch: u64, records: &[Record], point: Option<Consistency>) -> Close {
        let mut metas: Vec<RecordMeta> = records.iter().map(Record::meta).collect();
        metas.sort_by_key(|meta| meta.block);
        let close = self.key.signer(self.header.volume).sign(CloseStatement {
            fleet: self.header.fleet,
            volume: self.header.volume,
            incarnation: Incarnation(1),
            key_id: KeyId(1),
            epoch: Epoch(epoch),
            parent: self.parent,
            salt: Salt([9; 32]),
            cut_time: UnixMillis(0),
            point,
            disk_bytes: DISK_BYTES,
            records: metas.len() as u64,
            data_pages: metas.iter().map(|meta| u64::from(meta.data_mask.count())).sum(),
            zero_pages: 0,
            record_bytes: metas.iter().map(|meta| u64::from(meta.record_len)).sum(),
            meta_root: merkle::root(&metas).expect("in block order"),
            group: GroupId::NIL,
            group_point: GroupId::NIL,
        });
        self.parent = close.id();
        close
    }
}

/// Stages records as one batch.
pub(crate) async fn stage_together(stage: &Stage, records: Vec<Record>) {
    let (mut jobs, mut answers) = (Vec::new(), Vec::new());
    for record in records {
        let (reply, answer) = oneshot::channel();
        let header = *record.header();
        let begun = stage.shared.lock().index.begin(header.volume, header.epoch, record.meta());
        assert_eq!(begun, Ok(Begin::New));
        let (volume, epoch, block) = (header.volume, header.epoch, header.block);
        jobs.push(Job { volume, epoch, block, value: record.into_bytes(), reply, permit: None, slot: None });
        answers.push(answer);
    }
    stage.shared.queue.push_together(jobs);
    for answer in answers {
        answer.await.expect("it is answered").expect("it is durable");
    }
}
