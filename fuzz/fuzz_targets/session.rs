//! Both halves of the session protocol, driven by the input: offers, deliveries in any order between streams, acknowledgements
//! by the stage, commits, cut links, restarts of the receiver, lost stages, and frames from nowhere.
//!
//! What must hold: neither half panics; without strange frames neither refuses the other; a close is handed out when all of its
//! records are durable; what the sender is told to be committed is what it closed, in order.
#![no_main]

use std::collections::{BTreeMap, VecDeque};

use bytes::BytesMut;
use common::clock::UnixMillis;
use common::format::close::{Close, CloseStatement};
use common::format::frame::Frame;
use common::format::record::{Codec, Record, RecordHeader, RecordKind};
use common::ids::{
    BlockIndex, CloseId, Digest, Epoch, FleetId, Geometry, GroupId, Incarnation, KeyId, PageMask, Salt, SealTag,
    SessionId, VolumeId,
};
use common::session::{
    Claim, ClosedEpoch, Facts, Offer, PROTOCOL, ReceiverEvent, ReceiverSession, SenderConfig, SenderEvent,
    SenderSession, StagedRecord, Ticket,
};
use libfuzzer_sys::fuzz_target;

const VOLUME: VolumeId = VolumeId([0x11; 16]);
const INCARNATION: Incarnation = Incarnation(1);
const DISK_BYTES: u64 = 1 << 30;
const STREAMS: u8 = 3;
const EPOCHS_MAX: u64 = 60;

fn record(epoch: Epoch, block: u64) -> Record {
    let header = RecordHeader {
        kind: RecordKind::Delta,
        codec: Codec::Raw,
        volume: VOLUME,
        incarnation: INCARNATION,
        key_id: KeyId(1),
        epoch,
        block: BlockIndex(block),
        data_mask: PageMask::EMPTY,
        zero_mask: PageMask(1),
        block_count: 1,
        plain_len: 0,
        sealed_len: 16,
        dictionary_id: 0,
        counter: block,
    };
    // The tag, last, tells records apart.
    let mut bytes = vec![0; header.record_len()];
    let at = bytes.len() - 16;
    bytes[at..at + 8].copy_from_slice(&epoch.0.to_le_bytes());
    bytes[at + 8..].copy_from_slice(&block.to_le_bytes());
    Record::assemble(header, bytes)
}

fn close(epoch: Epoch, parent: CloseId, records: u64) -> Close {
    let statement = CloseStatement {
        fleet: FleetId::NIL,
        volume: VOLUME,
        incarnation: INCARNATION,
        key_id: KeyId(1),
        epoch,
        parent,
        salt: Salt::ZERO,
        cut_time: UnixMillis(0),
        point: None,
        disk_bytes: DISK_BYTES,
        records,
        data_pages: 0,
        zero_pages: records,
        record_bytes: 0,
        meta_root: Digest::ZERO,
        group: GroupId::NIL,
        group_point: GroupId::NIL,
    };
    Close::new(statement, [0; 64])
}

/// What of the receiver survives its restart.
#[derive(Default)]
struct Durable {
    records: BTreeMap<Epoch, Vec<StagedRecord>>,
    closes: Vec<ClosedEpoch>,
    committed: ClosedEpoch,
    next_epoch: u64,
}

impl Durable {
    fn facts(&self) -> Facts {
        Facts {
            volume: VOLUME,
            incarnation: INCARNATION,
            geometry: Geometry::new(DISK_BYTES).expect("a size"),
            committed: self.committed,
            uncommitted: self.closes.clone(),
            next_epoch: Epoch(self.next_epoch.max(1)),
            open: self.records.iter().map(|(epoch, records)| (*epoch, records.clone())).collect(),
        }
    }
}

/// Frames under way on one stream, as bytes.
#[derive(Default)]
struct Pipe(BytesMut);

impl Pipe {
    fn send(&mut self, frame: &Frame) {
        let (head, payload) = frame.encode();
        self.0.extend_from_slice(&head);
        self.0.extend_from_slice(&payload.unwrap_or_default());
    }

    fn receive(&mut self) -> Option<Frame> {
        Frame::take(&mut self.0).expect("what was encoded is taken")
    }
}

struct World {
    sender: SenderSession<()>,
    receiver: ReceiverSession<()>,
    durable: Durable,
    up: [Pipe; STREAMS as usize],
    down: [Pipe; STREAMS as usize],
    connected: bool,
    /// Records on their way into the stage.
    staging: VecDeque<(Ticket, Epoch, StagedRecord)>,
    checking: Option<ClosedEpoch>,
    /// Closes that the sender made and was not yet told of, oldest first.
    closed: VecDeque<ClosedEpoch>,
    parent: CloseId,
    epoch: u64,
    block: u64,
    records: u64,
    /// Frames from nowhere were injected: refusals are in order.
    strange: bool,
    ended: bool,
}

impl World {
    fn new() -> Self {
        let config = SenderConfig {
            protocol: PROTOCOL,
            volume: VOLUME,
            incarnation: INCARNATION,
            session: SessionId([7; 16]),
            streams: STREAMS,
            known: CloseId::ZERO,
            journaled: Vec::new(),
            outstanding_bytes_max: 4_000,
        };
        let durable = Durable::default();
        Self {
            sender: SenderSession::new(config),
            receiver: ReceiverSession::new(durable.facts()),
            durable,
            up: Default::default(),
            down: Default::default(),
            connected: false,
            staging: VecDeque::new(),
            checking: None,
            closed: VecDeque::new(),
            parent: CloseId::ZERO,
            epoch: 1,
            block: 0,
            records: 0,
            strange: false,
            ended: false,
        }
    }

    fn disconnect(&mut self) {
        self.connected = false;
        self.up = Default::default();
        self.down = Default::default();
        self.sender.handle_disconnected();
        self.receiver.handle_disconnected();
    }

    fn restart_receiver(&mut self) {
        self.disconnect();
        self.staging.clear();
        self.checking = None;
        self.receiver = ReceiverSession::new(self.durable.facts());
    }

    fn failed(&mut self, error: &dyn std::error::Error) {
        assert!(self.strange, "refused without a reason: {error}");
        self.disconnect();
    }

    fn begin_epoch(&mut self, at_least: u64) {
        self.epoch = (self.epoch + 1).max(at_least);
        (self.block, self.records) = (0, 0);
    }

    fn step(&mut self, op: u8) {
        let stream = usize::from(op >> 4) % usize::from(STREAMS);
        let index = op >> 4 & 3;
        match op & 15 {
            0 | 1 if self.block < 200 => {
                let offered = self.sender.offer_record(record(Epoch(self.epoch), self.block), ());
                if offered.expect("a record in order") == Offer::Taken {
                    self.records += 1;
                }
                self.block += 1;
            }
            2 if self.epoch < EPOCHS_MAX => {
                let made = close(Epoch(self.epoch), self.parent, self.records);
                let closed = ClosedEpoch { epoch: Epoch(self.epoch), close: made.id() };
                if self.sender.offer_close(made).expect("a close in order") == Offer::Taken {
                    self.parent = closed.close;
                    self.closed.push_back(closed);
                }
                self.begin_epoch(0);
            }
            3..=5 => {
                if let Some(frame) = self.sender.poll_frame(index % STREAMS) {
                    self.up[usize::from(index % STREAMS)].send(&frame);
                }
            }
            6..=8 => {
                if let Some(frame) = self.up[stream].receive() {
                    self.at_receiver(u8::try_from(stream).expect("few streams"), frame);
                }
            }
            9 => {
                if let Some(frame) = self.receiver.poll_frame(index % STREAMS) {
                    self.down[usize::from(index % STREAMS)].send(&frame);
                }
            }
            10 | 11 => {
                if let Some(frame) = self.down[stream].receive()
                    && let Err(error) = self.sender.handle_frame(u8::try_from(stream).expect("few streams"), frame)
                {
                    self.failed(&error);
                }
            }
            12 => {
                if let Some((ticket, epoch, staged)) = self.staging.pop_front() {
                    self.durable.records.entry(epoch).or_default().push(staged);
                    self.durable.next_epoch = self.durable.next_epoch.max(epoch.0 + 1);
                    self.receiver.handle_staged(ticket);
                }
                if self.staging.is_empty()
                    && let Some(closed) = self.checking.take()
                {
                    self.durable.records.remove(&closed.epoch);
                    self.durable.closes.push(closed);
                    self.durable.next_epoch = self.durable.next_epoch.max(closed.epoch.0 + 1);
                    self.receiver.handle_close_staged(closed.close);
                }
            }
            13 => {
                if !self.durable.closes.is_empty() {
                    let committed = self.durable.closes.remove(0);
                    self.durable.committed = committed;
                    self.receiver.handle_committed(committed.close);
                }
            }
            14 => match op >> 4 {
                0..=7 if !self.connected => {
                    self.connected = true;
                    self.sender.handle_connected();
                }
                8 | 9 => self.disconnect(),
                10 => self.restart_receiver(),
                11 => {
                    // All that was staged is gone; what is committed is not.
                    self.durable.records.clear();
                    self.durable.closes.clear();
                    self.restart_receiver();
                }
                12 => {
                    self.sender.drop_epoch(Epoch(self.epoch));
                    self.begin_epoch(0);
                }
                _ => {}
            },
            _ => {}
        }
    }

    fn at_receiver(&mut self, stream: u8, frame: Frame) {
        let result = match frame {
            Frame::Record { seq, record } => self.receiver.handle_record(stream, seq, record, ()),
            open @ Frame::Open { .. } if stream == 0 => {
                self.receiver.handle_open(Claim::from_frame(open).expect("an open frame"));
                Ok(())
            }
            other => self.receiver.handle_frame(stream, other),
        };
        if let Err(error) = result {
            self.failed(&error);
        }
    }

    fn events(&mut self) {
        while let Some(event) = self.receiver.poll_event() {
            match event {
                ReceiverEvent::Stage { ticket, record, .. } => {
                    let bytes = record.bytes();
                    let tag = SealTag(bytes[bytes.len() - 16..].try_into().expect("sixteen bytes"));
                    let header = record.header();
                    self.staging.push_back((ticket, header.epoch, StagedRecord { block: header.block, tag }));
                }
                ReceiverEvent::CheckClose(close) => {
                    let (epoch, records) = (close.statement().epoch, close.statement().records);
                    let closed = ClosedEpoch { epoch, close: close.id() };
                    let durable = self.durable.records.get(&epoch).map_or(0, |records| records.len() as u64);
                    assert_eq!(durable, records, "a close is handed out before its records are durable");
                    assert_eq!(self.checking.replace(closed), None, "closes are handed out one at a time");
                }
                ReceiverEvent::DropEpoch(epoch) => {
                    self.durable.records.remove(&epoch);
                }
                ReceiverEvent::ForgetEpoch(epoch) => {
                    self.durable.records.remove(&epoch);
                    self.receiver.handle_forgotten(epoch);
                }
                ReceiverEvent::Opened { .. } => {}
                ReceiverEvent::Ended { code, text } => assert!(self.strange, "ended: {code:?} {text}"),
            }
        }
        while let Some(event) = self.sender.poll_event() {
            match event {
                SenderEvent::Committed { closed, .. } => {
                    assert_eq!(self.closed.pop_front(), Some(closed), "commits come in the order of closes");
                }
                SenderEvent::StageLost { tip, next_epoch } => {
                    while self.closed.back().is_some_and(|closed| closed.close != tip) {
                        self.closed.pop_back();
                    }
                    self.parent = tip;
                    self.begin_epoch(next_epoch.0);
                    self.sender.restart(Epoch(self.epoch));
                }
                SenderEvent::Refused { code, text } => {
                    assert!(self.strange, "refused: {code:?} {text}");
                    self.ended = true;
                }
                SenderEvent::Opened { .. } | SenderEvent::Staged { .. } | SenderEvent::Closed(_) => {}
            }
        }
    }

    /// Frames from nowhere, to either side, after which either may refuse.
    fn strange(&mut self, data: &[u8]) {
        let mut bytes = data.to_vec();
        blockferry_fuzz::fix_frames(&mut bytes);
        let mut buffer = BytesMut::from(&bytes[..]);
        self.strange = true;
        while let Ok(Some(frame)) = Frame::take(&mut buffer) {
            let stream = u8::try_from(buffer.len() % 4).expect("below four");
            let _ = self.sender.handle_frame(stream, frame.clone());
            let _ = match frame {
                Frame::Record { seq, record } => self.receiver.handle_record(stream, seq, record, ()),
                open @ Frame::Open { .. } => {
                    self.receiver.handle_open(Claim::from_frame(open).expect("an open frame"));
                    Ok(())
                }
                other => self.receiver.handle_frame(stream, other),
            };
            while self.sender.poll_event().is_some() {}
            while self.receiver.poll_event().is_some() {}
            for stream in 0..4 {
                while self.sender.poll_frame(stream).is_some() {}
                while self.receiver.poll_frame(stream).is_some() {}
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    // Operations up to the first preamble of a stream, strange frames after it.
    let at = data.windows(6).position(|window| window == b"BFSTRM").unwrap_or(data.len());
    let mut world = World::new();
    for op in data[..at].iter().take(4_000) {
        world.step(*op);
        world.events();
        if world.ended {
            return;
        }
    }
    if let Some(frames) = data.get(at + 6..) {
        world.strange(frames);
    }
});
