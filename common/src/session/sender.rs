//! The sender's half: what is queued, in flight, staged, closed and committed. See the module above for the protocol.
//!
//! Records are pulled: [`SenderSession::poll_frame`] gives the next record of the lowest epoch to whichever stream has room,
//! so that streams balance themselves.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{Claim, ClosedEpoch, SessionError, kind};
use crate::error::{Dispose, Disposition};
use crate::format::close::Close;
use crate::format::frame::{Frame, RefusalCode};
use crate::format::record::Record;
use crate::ids::{BlockIndex, CloseId, Epoch, Incarnation, SealTag, SessionId, VolumeId};
use crate::limits;

/// What a session is made for.
#[derive(Debug, Clone)]
pub struct SenderConfig {
    /// Protocol version agreed with the receiver.
    pub protocol: u16,
    /// Volume.
    pub volume: VolumeId,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// This start of the sender.
    pub session: SessionId,
    /// Streams to use, 1 to [`limits::STREAMS_PER_SESSION_MAX`].
    pub streams: u8,
    /// The newest close whose commit the sender has applied to its durable state; [`CloseId::ZERO`] for none.
    pub known: CloseId,
    /// Closes journaled after it, in parent order.
    pub journaled: Vec<ClosedEpoch>,
    /// Bytes of records that may be offered and not yet staged before [`SenderSession::wants_records`] says no.
    pub outstanding_bytes_max: u64,
}

/// What a session tells its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SenderEvent {
    /// The claim is granted. Closes journaled after `tip` by an earlier start of the sender were never staged: discard them.
    /// `Committed` follows for each close that was committed meanwhile.
    Opened {
        /// Newest committed close.
        committed: CloseId,
        /// Newest close that the receiver holds.
        tip: CloseId,
        /// New epochs take this number or a greater one.
        next_epoch: Epoch,
    },
    /// Records became durable at the receiver; their permits are given back.
    Staged {
        /// Records.
        records: u64,
        /// Their bytes.
        bytes: u64,
    },
    /// An epoch and its close are durable at the receiver.
    Closed(ClosedEpoch),
    /// A close is committed. In parent order, each once per session.
    Committed {
        /// What is committed.
        closed: ClosedEpoch,
        /// Records that the receiver held already when they came again, over the session's life.
        records_resent: u64,
    },
    /// The receiver lost what it had acknowledged. Everything after `tip` is forgotten; its pages are to be sent anew in
    /// epochs from `next_epoch` on. Offers are void until [`SenderSession::restart`].
    StageLost {
        /// Newest close that the receiver holds.
        tip: CloseId,
        /// New epochs take this number or a greater one.
        next_epoch: Epoch,
    },
    /// The receiver ended the session.
    Refused {
        /// Reason.
        code: RefusalCode,
        /// For people.
        text: String,
    },
}

/// What became of an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offer {
    /// It will be sent.
    Taken,
    /// Its epoch was dropped or lost: it was discarded, its permit given back.
    Void,
}

/// An offer that breaks the order of things: a bug of the sender.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// A second record of one block in one epoch.
    #[error("epoch {epoch} has a record of block {block} already")]
    Duplicate {
        /// Epoch.
        epoch: Epoch,
        /// Block.
        block: BlockIndex,
    },
    /// A record or close of another volume or incarnation.
    #[error("record or close of volume {0} offered to another's session")]
    WrongVolume(VolumeId),
    /// A record or close of an epoch that is closed, or older than one that is.
    #[error("epoch {0} is closed or older than a closed one")]
    Closed(Epoch),
    /// A close that does not follow the newest one, or overtakes an open epoch.
    #[error("close of epoch {epoch} names parent {found}, expected {expected}; or an older epoch is still open")]
    OutOfOrder {
        /// Epoch.
        epoch: Epoch,
        /// Newest close.
        expected: CloseId,
        /// Parent named.
        found: CloseId,
    },
    /// A close with another number of records than were offered.
    #[error("close of epoch {epoch} states {stated} records, {offered} were offered")]
    RecordCount {
        /// Epoch.
        epoch: Epoch,
        /// Stated.
        stated: u64,
        /// Offered.
        offered: u64,
    },
}

impl Dispose for OfferError {
    fn disposition(&self) -> Disposition {
        Disposition::Bug
    }
}

/// One record of an open epoch: its tag, and its place among the unacknowledged ones.
#[derive(Debug, Clone, Copy)]
struct Slot {
    tag: SealTag,
    /// `None` once acknowledged.
    order: Option<u64>,
}

#[derive(Debug)]
struct OpenEpoch<P> {
    slots: BTreeMap<BlockIndex, Slot>,
    unacked: BTreeMap<u64, (Record, P)>,
    /// Places in `unacked` that are not on any stream.
    pending: VecDeque<u64>,
    closing: bool,
    /// Records that the receiver listed; counts during a resume.
    listed: u64,
}

impl<P> Default for OpenEpoch<P> {
    fn default() -> Self {
        Self { slots: BTreeMap::new(), unacked: BTreeMap::new(), pending: VecDeque::new(), closing: false, listed: 0 }
    }
}

/// A close from the journal or offered since, not yet committed.
#[derive(Debug)]
struct ChainLink {
    closed: ClosedEpoch,
    /// To be sent; `None` for one that an earlier start of the sender made.
    close: Option<Box<Close>>,
    sent: bool,
    /// The receiver said that it is staged.
    staged: bool,
}

#[derive(Debug, Default)]
struct Stream {
    attached: bool,
    next_seq: u64,
    in_flight: VecDeque<(Epoch, u64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Down,
    /// Connected; `Open` is to be sent.
    Claiming,
    /// `Open` was sent.
    Waiting,
    /// `Opened` came, lists are still to come.
    Listing {
        left: u32,
        committed: CloseId,
        tip: CloseId,
        next_epoch: Epoch,
    },
    Up,
    /// The receiver refused.
    Ended,
}

/// The sender's half of a session. `P` travels with each record and is dropped once the record is durable at the receiver.
#[derive(Debug)]
pub struct SenderSession<P> {
    config: SenderConfig,
    link: Link,
    opened_before: bool,
    /// Newest committed close.
    known: CloseId,
    /// Closes after it, in parent order.
    chain: VecDeque<ChainLink>,
    /// Epoch of the newest close offered or journaled.
    newest_closed: Epoch,
    epochs: BTreeMap<Epoch, OpenEpoch<P>>,
    dropped: BTreeSet<Epoch>,
    /// After a loss: offers are void until restarted.
    lost: bool,
    /// Offers of older epochs are void.
    valid_from: Epoch,
    next_order: u64,
    unacked_bytes: u64,
    streams: Vec<Stream>,
    drops: VecDeque<Epoch>,
    events: VecDeque<SenderEvent>,
    resent_before: u64,
    resent: u64,
}

impl<P> SenderSession<P> {
    /// A session, not connected.
    ///
    /// # Panics
    /// If `config.streams` is 0 or over [`limits::STREAMS_PER_SESSION_MAX`].
    #[must_use]
    pub fn new(mut config: SenderConfig) -> Self {
        assert!(
            config.streams > 0 && usize::from(config.streams) <= limits::STREAMS_PER_SESSION_MAX,
            "the configuration was validated"
        );
        let chain: VecDeque<_> = std::mem::take(&mut config.journaled)
            .into_iter()
            .map(|closed| ChainLink { closed, close: None, sent: false, staged: false })
            .collect();
        Self {
            link: Link::Down,
            opened_before: false,
            known: config.known,
            newest_closed: chain.back().map_or(Epoch(0), |link| link.closed.epoch),
            chain,
            epochs: BTreeMap::new(),
            dropped: BTreeSet::new(),
            lost: false,
            valid_from: Epoch(0),
            next_order: 0,
            unacked_bytes: 0,
            streams: Vec::new(),
            drops: VecDeque::new(),
            events: VecDeque::new(),
            resent_before: 0,
            resent: 0,
            config,
        }
    }

    /// True while more records may be offered; a soft bound, offers beyond it are taken too.
    #[must_use]
    pub fn wants_records(&self) -> bool {
        self.unacked_bytes < self.config.outstanding_bytes_max
    }

    /// Bytes of records offered and not yet durable at the receiver.
    #[must_use]
    pub fn unacked_bytes(&self) -> u64 {
        self.unacked_bytes
    }

    /// Epoch and block of each record offered and not yet durable.
    #[cfg(test)]
    pub(super) fn unacked(&self) -> impl Iterator<Item = (u64, u64)> {
        self.epochs.values().flat_map(|open| open.unacked.values()).map(|(record, _)| {
            let header = record.header();
            (header.epoch.0, header.block.0)
        })
    }

    /// Epochs begun and not yet committed. Epochs beyond [`limits::EPOCHS_IN_FLIGHT_MAX`] wait in the queue.
    #[must_use]
    pub fn epochs_in_flight(&self) -> usize {
        self.epochs.len() + self.chain.iter().filter(|link| !self.epochs.contains_key(&link.closed.epoch)).count()
    }

    /// True once the receiver granted the claim of this connection.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.link == Link::Up
    }

    /// Streams of the session.
    #[must_use]
    pub fn streams(&self) -> u8 {
        self.config.streams
    }

    /// The session's id.
    #[must_use]
    pub fn id(&self) -> SessionId {
        self.config.session
    }

    /// Takes over a sealed record and its permit. Records of an epoch may come in any order, but before its close.
    ///
    /// # Errors
    /// [`OfferError`]; the record is discarded then.
    pub fn offer_record(&mut self, record: Record, permit: P) -> Result<Offer, OfferError> {
        let header = record.header();
        let (epoch, block) = (header.epoch, header.block);
        if header.volume != self.config.volume || header.incarnation != self.config.incarnation {
            return Err(OfferError::WrongVolume(header.volume));
        }
        if self.is_void(epoch) {
            return Ok(Offer::Void);
        }
        if epoch <= self.newest_closed {
            return Err(OfferError::Closed(epoch));
        }
        let tag = tag_of(&record);
        let open = self.epochs.entry(epoch).or_default();
        if open.slots.contains_key(&block) {
            return Err(OfferError::Duplicate { epoch, block });
        }
        let order = self.next_order;
        self.next_order += 1;
        self.unacked_bytes += record.bytes().len() as u64;
        open.slots.insert(block, Slot { tag, order: Some(order) });
        open.unacked.insert(order, (record, permit));
        open.pending.push_back(order);
        Ok(Offer::Taken)
    }

    /// Takes over a close; the caller has journaled it durably. It may come before its records are acknowledged, but after
    /// all of them were offered, and closes come in parent order.
    ///
    /// # Errors
    /// [`OfferError`]; the close is discarded then.
    pub fn offer_close(&mut self, close: Close) -> Result<Offer, OfferError> {
        let statement = close.statement();
        let epoch = statement.epoch;
        if statement.volume != self.config.volume || statement.incarnation != self.config.incarnation {
            return Err(OfferError::WrongVolume(statement.volume));
        }
        if self.is_void(epoch) {
            return Ok(Offer::Void);
        }
        if epoch <= self.newest_closed {
            return Err(OfferError::Closed(epoch));
        }
        let expected = self.chain.back().map_or(self.known, |link| link.closed.close);
        let overtakes = self.epochs.range(..epoch).any(|(_, open)| !open.closing);
        if statement.parent != expected || overtakes {
            return Err(OfferError::OutOfOrder { epoch, expected, found: statement.parent });
        }
        let offered = self.epochs.get(&epoch).map_or(0, |open| open.slots.len() as u64);
        if statement.records != offered {
            return Err(OfferError::RecordCount { epoch, stated: statement.records, offered });
        }
        self.epochs.entry(epoch).or_default().closing = true;
        self.newest_closed = epoch;
        self.chain.push_back(ChainLink {
            closed: ClosedEpoch { epoch, close: close.id() },
            close: Some(Box::new(close)),
            sent: false,
            staged: false,
        });
        Ok(Offer::Taken)
    }

    /// Gives up an open epoch: its records are forgotten here and at the receiver, later offers of it are void. No effect on
    /// an epoch whose close was offered.
    pub fn drop_epoch(&mut self, epoch: Epoch) {
        if epoch <= self.newest_closed || self.is_void(epoch) {
            return;
        }
        self.dropped.insert(epoch);
        if let Some(open) = self.epochs.remove(&epoch) {
            self.forget(&open);
            self.drops.push_back(epoch);
        }
    }

    /// After [`SenderEvent::StageLost`]: offers count again, those of epochs before `from` stay void.
    pub fn restart(&mut self, from: Epoch) {
        self.lost = false;
        self.valid_from = from;
        self.dropped = self.dropped.split_off(&from);
    }

    /// The next claim goes to another receiver than the last one: under another id, so that a receiver can tell whether the
    /// session that it granted last may have been elsewhere since. No effect while a connection stands.
    pub fn renew(&mut self, session: SessionId) {
        if self.link == Link::Down {
            self.config.session = session;
        }
    }

    /// A connection is there; `Open` comes out of stream 0 next.
    pub fn handle_connected(&mut self) {
        self.handle_disconnected();
        self.link = Link::Claiming;
        self.streams = (0..self.config.streams).map(|_| Stream { next_seq: 1, ..Stream::default() }).collect();
    }

    /// The connection is gone; what is not acknowledged waits for the next one.
    pub fn handle_disconnected(&mut self) {
        self.link = Link::Down;
        self.streams.clear();
        self.drops.clear();
        for open in self.epochs.values_mut() {
            open.pending = open.unacked.keys().copied().collect();
            open.listed = 0;
        }
        for link in &mut self.chain {
            link.sent = false;
        }
    }

    /// Takes a frame that came on `stream`.
    ///
    /// # Errors
    /// [`SessionError`]: tell the receiver by a `Refused` frame and close the connection.
    pub fn handle_frame(&mut self, stream: u8, frame: Frame) -> Result<(), SessionError> {
        if usize::from(stream) >= self.streams.len() {
            return Err(SessionError::NoSuchStream { stream, streams: self.config.streams });
        }
        let unexpected = |frame: &Frame| Err(SessionError::Unexpected { frame: kind(frame), stream });
        match (self.link, frame) {
            (Link::Up, Frame::Staged { seq }) => self.handle_staged(stream, seq),
            (_, other) if stream != 0 => unexpected(&other),
            (Link::Waiting, Frame::Opened { committed, tip, next_epoch, lists }) => {
                let limit = (limits::EPOCHS_IN_FLIGHT_MAX
                    * limits::EPOCH_RECORDS_DECODE_MAX.div_ceil(limits::STAGED_LIST_MAX))
                    as u64;
                if u64::from(lists) > limit {
                    return Err(SessionError::OverLimit { what: "staged lists", found: lists.into(), limit });
                }
                self.link = Link::Listing { left: lists, committed, tip, next_epoch };
                self.try_open()
            }
            (Link::Listing { left, committed, tip, next_epoch }, Frame::StagedRecords { epoch, records }) => {
                self.handle_list(epoch, &records);
                self.link = Link::Listing { left: left - 1, committed, tip, next_epoch };
                self.try_open()
            }
            (Link::Up, Frame::Closed { epoch, close }) => self.handle_closed(ClosedEpoch { epoch, close }),
            (Link::Up, Frame::Committed { epoch, close, records_resent }) => {
                if records_resent < self.resent {
                    // Another process answers now and counts from zero.
                    self.resent_before += self.resent;
                }
                self.resent = records_resent;
                let staged = |link: &ChainLink| link.staged && link.closed == ClosedEpoch { epoch, close };
                let at = self.chain.iter().position(staged).ok_or(SessionError::UnknownClose { close })?;
                self.commit_through(at);
                Ok(())
            }
            (Link::Waiting | Link::Listing { .. } | Link::Up, Frame::Refused { code, text }) => {
                self.link = Link::Ended;
                self.events.push_back(SenderEvent::Refused { code, text });
                Ok(())
            }
            (_, other) => unexpected(&other),
        }
    }

    /// The session can't go on: its owner is told as if the receiver had refused it.
    pub fn fail(&mut self, error: &SessionError) {
        self.link = Link::Ended;
        self.events.push_back(SenderEvent::Refused { code: error.refusal(), text: error.to_string() });
    }

    /// The next frame to send on `stream`. The driver must send what it takes, in order.
    pub fn poll_frame(&mut self, stream: u8) -> Option<Frame> {
        let index = usize::from(stream);
        if index >= self.streams.len() {
            return None;
        }
        match self.link {
            Link::Claiming if stream == 0 => {
                self.link = Link::Waiting;
                return Some(self.claim().into_frame());
            }
            Link::Up => {}
            _ => return None,
        }
        if stream == 0 {
            if let Some(epoch) = self.drops.pop_front() {
                return Some(Frame::Drop { epoch });
            }
            if let Some(close) = self.next_close() {
                return Some(Frame::Close(close));
            }
        } else if !self.streams[index].attached {
            self.streams[index].attached = true;
            return Some(Frame::Attach { session: self.config.session, stream });
        }
        let allowed = self.epochs_allowed();
        let (&epoch, open) = self.epochs.iter_mut().take(allowed).find(|(_, open)| !open.pending.is_empty())?;
        let order = open.pending.pop_front()?;
        let record = open.unacked.get(&order)?.0.clone();
        let state = &mut self.streams[index];
        let seq = state.next_seq;
        state.next_seq += 1;
        state.in_flight.push_back((epoch, order));
        Some(Frame::Record { seq, record })
    }

    /// What happened since; call until `None`.
    pub fn poll_event(&mut self) -> Option<SenderEvent> {
        self.events.pop_front()
    }

    fn is_void(&self, epoch: Epoch) -> bool {
        self.lost || epoch < self.valid_from || self.dropped.contains(&epoch)
    }

    /// How many of the lowest open epochs may be under way.
    fn epochs_allowed(&self) -> usize {
        let closed = self.chain.iter().filter(|link| link.staged).count();
        limits::EPOCHS_IN_FLIGHT_MAX.saturating_sub(closed)
    }

    fn claim(&self) -> Claim {
        Claim {
            protocol: self.config.protocol,
            volume: self.config.volume,
            incarnation: self.config.incarnation,
            session: self.config.session,
            streams: self.config.streams,
            known: self.known,
            // What can have been sent: an earlier start's closes, or as many as may be in flight.
            journaled: self.chain.iter().take(limits::EPOCHS_IN_FLIGHT_MAX * 4).map(|link| link.closed.close).collect(),
            resume: self.epochs.keys().copied().take(limits::EPOCHS_IN_FLIGHT_MAX).collect(),
        }
    }

    fn next_close(&mut self) -> Option<Close> {
        let allowed = self.epochs_allowed();
        let last = self.epochs.keys().copied().take(allowed).next_back()?;
        let link = self.chain.iter_mut().find(|link| !link.sent && !link.staged)?;
        if link.closed.epoch > last {
            return None;
        }
        link.sent = true;
        link.close.as_deref().cloned()
    }

    fn handle_staged(&mut self, stream: u8, seq: u64) -> Result<(), SessionError> {
        let state = &mut self.streams[usize::from(stream)];
        let first = state.next_seq - state.in_flight.len() as u64;
        if seq >= state.next_seq {
            return Err(SessionError::Sequence { stream, expected: state.next_seq - 1, found: seq });
        }
        let count = usize::try_from((seq + 1).saturating_sub(first)).unwrap_or(usize::MAX);
        let done: Vec<_> = state.in_flight.drain(..count.min(state.in_flight.len())).collect();
        for (epoch, order) in done {
            // An epoch that was dropped, or closed on stream 0 meanwhile, is no longer there.
            self.acknowledge(epoch, order);
        }
        Ok(())
    }

    fn acknowledge(&mut self, epoch: Epoch, order: u64) {
        let Some(open) = self.epochs.get_mut(&epoch) else { return };
        let Some((record, _permit)) = open.unacked.remove(&order) else { return };
        if let Some(slot) = open.slots.get_mut(&record.header().block) {
            slot.order = None;
        }
        let bytes = record.bytes().len() as u64;
        self.unacked_bytes -= bytes;
        self.note_staged(1, bytes);
    }

    fn note_staged(&mut self, more_records: u64, more_bytes: u64) {
        if let Some(SenderEvent::Staged { records, bytes }) = self.events.back_mut() {
            *records += more_records;
            *bytes += more_bytes;
        } else if more_records > 0 {
            self.events.push_back(SenderEvent::Staged { records: more_records, bytes: more_bytes });
        }
    }

    fn handle_list(&mut self, epoch: Epoch, records: &[(BlockIndex, SealTag)]) {
        for (block, tag) in records {
            // An epoch dropped meanwhile is of no interest; a record that is not ours makes the count differ below.
            let Some(open) = self.epochs.get_mut(&epoch) else { return };
            let Some(slot) = open.slots.get(block).filter(|slot| slot.tag == *tag) else { continue };
            open.listed += 1;
            if let Some(order) = slot.order {
                self.acknowledge(epoch, order);
            }
        }
    }

    /// Once all lists are there: settles what the receiver holds, and opens.
    fn try_open(&mut self) -> Result<(), SessionError> {
        let Link::Listing { left: 0, committed, tip, next_epoch } = self.link else { return Ok(()) };
        // Number of chain links that the receiver holds, or that are committed.
        let through = |close: CloseId| match self.chain.iter().position(|link| link.closed.close == close) {
            Some(at) => Some(at + 1),
            None => (close == self.known).then_some(0),
        };
        let held = through(tip).ok_or(SessionError::UnknownClose { close: tip })?;
        let done = through(committed).ok_or(SessionError::UnknownClose { close: committed })?;
        if done > held {
            return Err(SessionError::UnknownClose { close: committed });
        }
        self.link = Link::Up;
        self.events.push_back(SenderEvent::Opened { committed, tip, next_epoch });
        if !self.opened_before {
            self.opened_before = true;
            while self.chain.len() > held && self.chain.back().is_some_and(|link| link.close.is_none()) {
                self.chain.pop_back();
            }
            // Closes of earlier starts that never arrived leave their numbers free to be skipped, not to be taken.
            self.newest_closed = self.chain.back().map_or(Epoch(0), |link| link.closed.epoch);
        }
        let close_lost = self.chain.iter().skip(held).any(|link| link.staged);
        for at in 0..held {
            self.close_link(at);
        }
        let records_lost =
            self.epochs.values().any(|open| open.listed != (open.slots.len() - open.unacked.len()) as u64);
        if done > 0 {
            self.commit_through(done - 1);
        }
        if close_lost || records_lost {
            self.lose(held - done, tip, next_epoch);
            return Ok(());
        }
        for open in self.epochs.values_mut() {
            open.pending = open.unacked.keys().copied().collect();
        }
        Ok(())
    }

    fn lose(&mut self, kept: usize, tip: CloseId, next_epoch: Epoch) {
        self.chain.truncate(kept);
        for (epoch, open) in std::mem::take(&mut self.epochs) {
            self.forget(&open);
            self.drops.push_back(epoch);
        }
        self.newest_closed = self.chain.back().map_or(Epoch(0), |link| link.closed.epoch);
        self.lost = true;
        self.events.push_back(SenderEvent::StageLost { tip, next_epoch });
    }

    fn forget(&mut self, open: &OpenEpoch<P>) {
        self.unacked_bytes -= open.unacked.values().map(|(record, _)| record.bytes().len() as u64).sum::<u64>();
    }

    fn handle_closed(&mut self, closed: ClosedEpoch) -> Result<(), SessionError> {
        let at = self.chain.iter().position(|link| !link.staged);
        let at = at.filter(|at| self.chain[*at].closed == closed && self.chain[*at].sent);
        let at = at.ok_or(SessionError::UnknownClose { close: closed.close })?;
        if self.epochs.get(&closed.epoch).is_some_and(|open| !open.pending.is_empty()) {
            return Err(SessionError::Unexpected { frame: "Closed", stream: 0 });
        }
        self.close_link(at);
        Ok(())
    }

    /// The receiver holds link `at`, and so all records of its epoch, whether their acknowledgements have come or not.
    fn close_link(&mut self, at: usize) {
        let link = &mut self.chain[at];
        if std::mem::replace(&mut link.staged, true) {
            return;
        }
        let (closed, own) = (link.closed, link.close.take().is_some());
        if let Some(open) = self.epochs.remove(&closed.epoch) {
            self.forget(&open);
            let bytes = open.unacked.values().map(|(record, _)| record.bytes().len() as u64).sum();
            self.note_staged(open.unacked.len() as u64, bytes);
        }
        if own {
            self.events.push_back(SenderEvent::Closed(closed));
        }
    }

    fn commit_through(&mut self, at: usize) {
        for link in self.chain.drain(..=at) {
            self.known = link.closed.close;
            let records_resent = self.resent_before + self.resent;
            self.events.push_back(SenderEvent::Committed { closed: link.closed, records_resent });
            self.dropped = self.dropped.split_off(&link.closed.epoch);
        }
    }
}

/// A record's seal tag: its last bytes.
pub(super) fn tag_of(record: &Record) -> SealTag {
    let bytes = record.bytes();
    let mut tag = [0; limits::SEAL_TAG_BYTES];
    tag.copy_from_slice(&bytes[bytes.len() - limits::SEAL_TAG_BYTES..]);
    SealTag(tag)
}
