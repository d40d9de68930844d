//! The receiver's half: one value per volume, for as long as the volume is loaded; sessions and connections come and go on it.
//! See the module above for the protocol.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::sender::tag_of;
use super::{Claim, ClosedEpoch, PROTOCOL, SessionError, kind};
use crate::format::close::Close;
use crate::format::frame::{Frame, RefusalCode};
use crate::format::record::Record;
use crate::ids::{BlockIndex, CloseId, Epoch, Geometry, Incarnation, SealTag, SessionId, VolumeId};
use crate::limits;

/// Open epochs that may be known at once: those that a sender may have in flight, and as many that it dropped while records
/// of them were still under way.
const OPEN_EPOCHS_MAX: usize = 2 * limits::EPOCHS_IN_FLIGHT_MAX;
/// Dropped epochs remembered, so that records of them that come late are told from nonsense.
const DROPPED_MAX: usize = 256;

/// A record on its way into the stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// A record that the stage holds: what tells it from another of its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StagedRecord {
    /// First block.
    pub block: BlockIndex,
    /// Seal tag.
    pub tag: SealTag,
}

/// What the receiver holds of a volume when it is loaded, from the log and the recovered stage.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Volume.
    pub volume: VolumeId,
    /// Its current incarnation.
    pub incarnation: Incarnation,
    /// Size of its disk.
    pub geometry: Geometry,
    /// Newest committed epoch; zero for none.
    pub committed: ClosedEpoch,
    /// Staged closes after it, in parent order.
    pub uncommitted: Vec<ClosedEpoch>,
    /// Smallest number that no epoch has had yet.
    pub next_epoch: Epoch,
    /// Staged records of epochs without a close.
    pub open: Vec<(Epoch, Vec<StagedRecord>)>,
}

/// What the driver is to do.
#[derive(Debug)]
pub enum ReceiverEvent<P> {
    /// Stage this record durably, then call [`ReceiverSession::handle_staged`].
    Stage {
        /// To be given back.
        ticket: Ticket,
        /// The record.
        record: Record,
        /// What travelled with it.
        payload: P,
    },
    /// Check this close against its epoch's staged metadata, stage it durably, then call
    /// [`ReceiverSession::handle_close_staged`]; or refuse.
    CheckClose(Box<Close>),
    /// Forget what is staged of this open epoch. Nothing of it is on its way into the stage.
    DropEpoch(Epoch),
    /// Forget what is staged of this open epoch, whose number its sender may still use, then call
    /// [`ReceiverSession::handle_forgotten`]. Nothing of it is on its way into the stage.
    ForgetEpoch(Epoch),
    /// The claim was granted.
    Opened {
        /// Session that writes the volume now.
        session: SessionId,
    },
    /// The session is over on this connection; a `Refused` frame is queued on stream 0 where this side ended it.
    Ended {
        /// Reason.
        code: RefusalCode,
        /// For people.
        text: String,
    },
}

#[derive(Debug, Clone, Copy)]
struct Held {
    tag: SealTag,
    /// `None` once durable.
    ticket: Option<Ticket>,
}

#[derive(Debug, Default)]
struct OpenEpoch {
    records: BTreeMap<BlockIndex, Held>,
    in_flight: usize,
    dropping: bool,
}

#[derive(Debug)]
struct InFlight {
    epoch: Epoch,
    block: BlockIndex,
    /// Where it is to be acknowledged.
    waiters: Vec<(u8, u64)>,
}

/// Acknowledgement state of one stream of the connection.
#[derive(Debug)]
struct Stream {
    attached: bool,
    next_seq: u64,
    /// Everything before this is durable.
    first_open: u64,
    /// From `first_open` on: durable or not.
    done: VecDeque<bool>,
    told: u64,
}

impl Default for Stream {
    fn default() -> Self {
        Self { attached: false, next_seq: 1, first_open: 1, done: VecDeque::new(), told: 0 }
    }
}

impl Stream {
    fn settle(&mut self, seq: u64) {
        let at = usize::try_from(seq - self.first_open).unwrap_or(usize::MAX);
        if let Some(done) = self.done.get_mut(at) {
            *done = true;
        }
        while self.done.front() == Some(&true) {
            self.done.pop_front();
            self.first_open += 1;
        }
    }
}

#[derive(Debug)]
enum Link {
    Down,
    /// A claim waits until nothing is on its way into the stage.
    Claimed(Claim),
    Up,
    Ended,
}

/// The receiver's half, for one volume. `P` travels with each record to the stage.
#[derive(Debug)]
pub struct ReceiverSession<P> {
    facts: Facts,
    uncommitted: VecDeque<ClosedEpoch>,
    /// Session that opened last, if this process has seen one.
    session: Option<SessionId>,
    link: Link,
    streams: Vec<Stream>,
    open: BTreeMap<Epoch, OpenEpoch>,
    dropped: BTreeSet<Epoch>,
    /// Epochs that the stage is about to forget.
    forgetting: BTreeSet<Epoch>,
    tickets: BTreeMap<Ticket, InFlight>,
    next_ticket: u64,
    /// Closes whose records are not all staged yet, or that wait for the one being checked.
    closes: VecDeque<Close>,
    checking: Option<ClosedEpoch>,
    control: VecDeque<Frame>,
    /// Lists still to be made: epoch and the block to go on at.
    lists: VecDeque<(Epoch, BlockIndex)>,
    events: VecDeque<ReceiverEvent<P>>,
    resent: u64,
}

impl<P> ReceiverSession<P> {
    /// A volume with nobody connected.
    #[must_use]
    pub fn new(mut facts: Facts) -> Self {
        let mut open = BTreeMap::new();
        for (epoch, records) in std::mem::take(&mut facts.open) {
            let held = |record: StagedRecord| (record.block, Held { tag: record.tag, ticket: None });
            let records = records.into_iter().map(held).collect();
            open.insert(epoch, OpenEpoch { records, ..OpenEpoch::default() });
            facts.next_epoch = facts.next_epoch.max(Epoch(epoch.0.saturating_add(1)));
        }
        let uncommitted: VecDeque<_> = std::mem::take(&mut facts.uncommitted).into();
        let tip = uncommitted.back().copied().unwrap_or(facts.committed);
        facts.next_epoch = facts.next_epoch.max(Epoch(tip.epoch.0.saturating_add(1)));
        Self {
            facts,
            uncommitted,
            session: None,
            link: Link::Down,
            streams: Vec::new(),
            open,
            dropped: BTreeSet::new(),
            forgetting: BTreeSet::new(),
            tickets: BTreeMap::new(),
            next_ticket: 1,
            closes: VecDeque::new(),
            checking: None,
            control: VecDeque::new(),
            lists: VecDeque::new(),
            events: VecDeque::new(),
            resent: 0,
        }
    }

    /// Newest close held, staged or committed.
    #[must_use]
    pub fn tip(&self) -> ClosedEpoch {
        self.uncommitted.back().copied().unwrap_or(self.facts.committed)
    }

    /// Newest committed close.
    #[must_use]
    pub fn committed(&self) -> ClosedEpoch {
        self.facts.committed
    }

    /// The session that writes the volume, if this process has seen one.
    #[must_use]
    pub fn session(&self) -> Option<SessionId> {
        self.session
    }

    /// True where nothing is on its way into the stage.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.tickets.is_empty() && self.checking.is_none() && self.forgetting.is_empty()
    }

    /// True from a claim on until its connection is gone.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        !matches!(self.link, Link::Down)
    }

    /// Gives up what is staged of open epochs while no sender is connected, because its room is needed. A sender that resumes
    /// them finds nothing of them listed and sends their pages anew. Returns how many; none while a sender is connected or
    /// something is on its way into the stage.
    pub fn shed_open(&mut self) -> usize {
        if self.is_connected() || !self.is_idle() {
            return 0;
        }
        let shed: Vec<Epoch> = self.open_epochs().collect();
        for &epoch in &shed {
            self.open.remove(&epoch);
            self.forgetting.insert(epoch);
            self.events.push_back(ReceiverEvent::ForgetEpoch(epoch));
        }
        shed.len()
    }

    /// The stage has forgotten an epoch, or failed and will never list it again.
    pub fn handle_forgotten(&mut self, epoch: Epoch) {
        self.forgetting.remove(&epoch);
        self.advance();
    }

    /// True while a granted claim's connection stands.
    #[must_use]
    pub fn is_open(&self) -> bool {
        matches!(self.link, Link::Up)
    }

    /// Records that came again though they were held, over the session's life.
    #[must_use]
    pub fn records_resent(&self) -> u64 {
        self.resent
    }

    /// Epochs that have records and no close, oldest first.
    pub fn open_epochs(&self) -> impl Iterator<Item = Epoch> {
        self.open.iter().filter(|(_, epoch)| !epoch.dropping).map(|(epoch, _)| *epoch)
    }

    /// A connection claims the volume, after the driver authorised it and told an earlier connection that it is superseded.
    /// The answer comes out of stream 0 once nothing is on its way into the stage.
    pub fn handle_open(&mut self, claim: Claim) {
        self.handle_disconnected();
        self.streams = (0..claim.streams.max(1)).map(|_| Stream::default()).collect();
        self.streams[0].attached = true;
        self.link = Link::Claimed(claim);
        self.advance();
    }

    /// The connection is gone. What is on its way into the stage goes on.
    pub fn handle_disconnected(&mut self) {
        self.link = Link::Down;
        self.streams.clear();
        self.control.clear();
        self.lists.clear();
        self.closes.clear();
        for flight in self.tickets.values_mut() {
            flight.waiters.clear();
        }
    }

    /// Takes a frame that came on `stream`; records go to [`Self::handle_record`].
    ///
    /// # Errors
    /// [`SessionError`]; the session has ended then, and the peer is told by a frame queued on stream 0.
    pub fn handle_frame(&mut self, stream: u8, frame: Frame) -> Result<(), SessionError> {
        let result = self.apply(stream, frame);
        self.conclude(result)
    }

    /// Takes a record that came on `stream`.
    ///
    /// # Errors
    /// As [`Self::handle_frame`]; the record and its payload are discarded then.
    pub fn handle_record(&mut self, stream: u8, seq: u64, record: Record, payload: P) -> Result<(), SessionError> {
        let result = self.apply_record(stream, seq, record, payload);
        self.conclude(result)
    }

    /// The record of this ticket is durable.
    pub fn handle_staged(&mut self, ticket: Ticket) {
        let Some(flight) = self.tickets.remove(&ticket) else { return };
        if let Some(open) = self.open.get_mut(&flight.epoch) {
            open.in_flight -= 1;
            if let Some(held) = open.records.get_mut(&flight.block) {
                held.ticket = None;
            }
        }
        for (stream, seq) in flight.waiters {
            if let Some(state) = self.streams.get_mut(usize::from(stream)) {
                state.settle(seq);
            }
        }
        self.advance();
    }

    /// The record of this ticket could not be made durable: it is not held, and never acknowledged. The driver ends the session.
    pub fn handle_stage_failed(&mut self, ticket: Ticket) {
        let Some(flight) = self.tickets.remove(&ticket) else { return };
        if let Some(open) = self.open.get_mut(&flight.epoch) {
            open.in_flight -= 1;
            open.records.remove(&flight.block);
        }
        self.advance();
    }

    /// The close handed out last was found right and is durable.
    pub fn handle_close_staged(&mut self, close: CloseId) {
        let Some(closed) = self.checking.take_if(|checking| checking.close == close) else { return };
        self.open.remove(&closed.epoch);
        self.uncommitted.push_back(closed);
        // An epoch that was overtaken can't close any more.
        let overtaken: Vec<_> = self.open.range_mut(..closed.epoch).map(|(epoch, open)| (*epoch, open)).collect();
        for (epoch, open) in overtaken {
            open.dropping = true;
            self.dropped.insert(epoch);
        }
        if matches!(self.link, Link::Up) {
            self.control.push_back(Frame::Closed { epoch: closed.epoch, close: closed.close });
        }
        self.advance();
    }

    /// The close handed out last is wrong, or could not be staged: the session ends with this reason.
    pub fn handle_close_refused(&mut self, close: CloseId, code: RefusalCode, text: String) {
        if self.checking.take_if(|checking| checking.close == close).is_some() {
            self.refuse(code, text);
            self.advance();
        }
    }

    /// A close, and all before it, is committed. Closes that were committed before are no news.
    pub fn handle_committed(&mut self, close: CloseId) {
        let Some(at) = self.uncommitted.iter().position(|closed| closed.close == close) else { return };
        for closed in self.uncommitted.drain(..=at) {
            self.facts.committed = closed;
            if matches!(self.link, Link::Up) {
                let (epoch, close, records_resent) = (closed.epoch, closed.close, self.resent);
                self.control.push_back(Frame::Committed { epoch, close, records_resent });
            }
        }
    }

    /// Ends the session on this connection: the peer is told by a frame on stream 0, which is the last one.
    pub fn refuse(&mut self, code: RefusalCode, text: String) {
        if matches!(self.link, Link::Down | Link::Ended) {
            return;
        }
        self.link = Link::Ended;
        self.lists.clear();
        self.closes.clear();
        self.control.push_back(Frame::Refused { code, text: text.clone() });
        self.events.push_back(ReceiverEvent::Ended { code, text });
    }

    /// The volume's disk has grown: the session ends, and the next one is to be of the new incarnation. What is closed goes on;
    /// epochs that are open are dropped with the next claim, which is of another session.
    pub fn handle_grown(&mut self, incarnation: Incarnation, geometry: Geometry) {
        if incarnation > self.facts.incarnation {
            self.refuse(RefusalCode::WrongIncarnation, "the volume's disk grew: open it anew".to_owned());
            (self.facts.incarnation, self.facts.geometry) = (incarnation, geometry);
        }
    }

    /// True where [`Self::poll_frame`] has something for a stream.
    #[must_use]
    pub fn has_frames(&self) -> bool {
        let untold = |stream: &Stream| stream.first_open - 1 > stream.told;
        !self.control.is_empty() || !self.lists.is_empty() || self.is_open() && self.streams.iter().any(untold)
    }

    /// The next frame to send on `stream`.
    pub fn poll_frame(&mut self, stream: u8) -> Option<Frame> {
        let state = self.streams.get_mut(usize::from(stream))?;
        let staged = state.first_open - 1;
        if matches!(self.link, Link::Up) && staged > state.told {
            state.told = staged;
            return Some(Frame::Staged { seq: staged });
        }
        if stream != 0 {
            return None;
        }
        // Lists directly follow `Opened`, before any other control frame.
        if matches!(self.control.front(), Some(Frame::Opened { .. })) || self.lists.is_empty() {
            return self.control.pop_front();
        }
        let (epoch, from) = self.lists.pop_front()?;
        let records = self.open.get(&epoch).map(|open| &open.records);
        let mut rest = records.into_iter().flat_map(|records| records.range(from..));
        let listed = rest.by_ref().take(limits::STAGED_LIST_MAX).map(|(block, held)| (*block, held.tag)).collect();
        if let Some((block, _)) = rest.next() {
            self.lists.push_front((epoch, *block));
        }
        Some(Frame::StagedRecords { epoch, records: listed })
    }

    /// What is to be done; call until `None`.
    pub fn poll_event(&mut self) -> Option<ReceiverEvent<P>> {
        self.events.pop_front()
    }

    fn conclude(&mut self, result: Result<(), SessionError>) -> Result<(), SessionError> {
        if let Err(error) = &result {
            self.refuse(error.refusal(), error.to_string());
        }
        self.advance();
        result
    }

    fn stream(&mut self, stream: u8) -> Result<&mut Stream, SessionError> {
        let streams = u8::try_from(self.streams.len()).unwrap_or(u8::MAX);
        self.streams.get_mut(usize::from(stream)).ok_or(SessionError::NoSuchStream { stream, streams })
    }

    fn apply(&mut self, stream: u8, frame: Frame) -> Result<(), SessionError> {
        let unexpected = Err(SessionError::Unexpected { frame: kind(&frame), stream });
        match frame {
            Frame::Refused { code, text } if stream == 0 && !matches!(self.link, Link::Down | Link::Ended) => {
                self.link = Link::Ended;
                self.events.push_back(ReceiverEvent::Ended { code, text });
                Ok(())
            }
            _ if !matches!(self.link, Link::Up) => unexpected,
            Frame::Attach { session, stream: index } => {
                let ours = self.session == Some(session) && index == stream;
                let state = self.stream(stream)?;
                if !ours || std::mem::replace(&mut state.attached, true) {
                    return unexpected;
                }
                Ok(())
            }
            Frame::Close(close) if stream == 0 => self.apply_close(close),
            Frame::Drop { epoch } if stream == 0 => self.apply_drop(epoch),
            _ => unexpected,
        }
    }

    fn apply_record(&mut self, stream: u8, seq: u64, record: Record, payload: P) -> Result<(), SessionError> {
        let listing = !self.lists.is_empty() || !matches!(self.link, Link::Up);
        let (volume, incarnation, geometry) = (self.facts.volume, self.facts.incarnation, self.facts.geometry);
        let state = self.stream(stream)?;
        if listing || !state.attached {
            return Err(SessionError::Unexpected { frame: "Record", stream });
        }
        if seq != state.next_seq {
            return Err(SessionError::Sequence { stream, expected: state.next_seq, found: seq });
        }
        let header = record.header();
        let (epoch, block) = (header.epoch, header.block);
        if header.volume != volume || header.incarnation != incarnation || !header.fits(geometry) {
            let (expected, found, incarnation) = (volume, header.volume, header.incarnation);
            return Err(SessionError::WrongPlace { expected, found, incarnation });
        }
        state.next_seq += 1;
        state.done.push_back(false);
        if self.is_dropped(epoch) {
            // Sent before the sender dropped the epoch; it waits for no acknowledgement of it.
            self.stream(stream)?.settle(seq);
            return Ok(());
        }
        let tip = self.tip().epoch;
        if epoch <= tip {
            return Err(SessionError::EpochEnded { found: epoch, tip });
        }
        let known = self.open.get(&epoch).and_then(|open| open.records.get(&block)).copied();
        if let Some(held) = known {
            if held.tag != tag_of(&record) {
                return Err(SessionError::RecordDiffers { epoch, block });
            }
            self.resent += 1;
            match held.ticket.and_then(|ticket| self.tickets.get_mut(&ticket)) {
                Some(flight) => flight.waiters.push((stream, seq)),
                None => self.stream(stream)?.settle(seq),
            }
            return Ok(());
        }
        self.admit_epoch(epoch)?;
        if self.checking.is_some_and(|checking| checking.epoch == epoch) {
            return Err(SessionError::EpochEnded { found: epoch, tip: epoch });
        }
        let stated =
            self.closes.iter().map(Close::statement).find(|close| close.epoch == epoch).map(|close| close.records);
        let open = self.open.entry(epoch).or_default();
        let found = open.records.len() as u64 + 1;
        if let Some(stated) = stated.filter(|stated| found > *stated) {
            return Err(SessionError::RecordCount { epoch, stated, found });
        }
        let limit = limits::EPOCH_RECORDS_DECODE_MAX as u64;
        if found > limit {
            return Err(SessionError::OverLimit { what: "records of an epoch", found, limit });
        }
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        open.records.insert(block, Held { tag: tag_of(&record), ticket: Some(ticket) });
        open.in_flight += 1;
        self.tickets.insert(ticket, InFlight { epoch, block, waiters: vec![(stream, seq)] });
        self.facts.next_epoch = self.facts.next_epoch.max(Epoch(epoch.0.saturating_add(1)));
        self.events.push_back(ReceiverEvent::Stage { ticket, record, payload });
        Ok(())
    }

    fn is_dropped(&self, epoch: Epoch) -> bool {
        self.dropped.contains(&epoch) || self.open.get(&epoch).is_some_and(|open| open.dropping)
    }

    /// Room for one more epoch, if it is a new one.
    fn admit_epoch(&self, epoch: Epoch) -> Result<(), SessionError> {
        if self.open.contains_key(&epoch) {
            return Ok(());
        }
        if self.open.len() >= OPEN_EPOCHS_MAX {
            let (found, limit) = (self.open.len() as u64 + 1, OPEN_EPOCHS_MAX as u64);
            return Err(SessionError::OverLimit { what: "open epochs", found, limit });
        }
        Ok(())
    }

    fn apply_close(&mut self, close: Close) -> Result<(), SessionError> {
        let statement = close.statement();
        let (epoch, records) = (statement.epoch, statement.records);
        if statement.volume != self.facts.volume
            || statement.incarnation != self.facts.incarnation
            || statement.disk_bytes != self.facts.geometry.disk_bytes()
        {
            let (expected, found, incarnation) = (self.facts.volume, statement.volume, statement.incarnation);
            return Err(SessionError::WrongPlace { expected, found, incarnation });
        }
        let tip = self.tip();
        let newest = self.closes.back().map(|close| ClosedEpoch { epoch: close.statement().epoch, close: close.id() });
        let newest = newest.or(self.checking).unwrap_or(tip);
        if epoch <= newest.epoch || self.dropped.contains(&epoch) {
            return Err(SessionError::EpochEnded { found: epoch, tip: newest.epoch });
        }
        if statement.parent != newest.close {
            return Err(SessionError::WrongParent { epoch, expected: newest.close, found: statement.parent });
        }
        let in_flight = self.uncommitted.len() + usize::from(self.checking.is_some()) + self.closes.len() + 1;
        if in_flight > limits::EPOCHS_IN_FLIGHT_MAX {
            let (found, limit) = (in_flight as u64, limits::EPOCHS_IN_FLIGHT_MAX as u64);
            return Err(SessionError::OverLimit { what: "epochs in flight", found, limit });
        }
        self.admit_epoch(epoch)?;
        let open = self.open.entry(epoch).or_default();
        let found = open.records.len() as u64;
        if open.dropping || found > records {
            return Err(SessionError::RecordCount { epoch, stated: records, found });
        }
        self.facts.next_epoch = self.facts.next_epoch.max(Epoch(epoch.0.saturating_add(1)));
        self.closes.push_back(close);
        Ok(())
    }

    fn apply_drop(&mut self, epoch: Epoch) -> Result<(), SessionError> {
        let tip = self.tip().epoch;
        let closing = self.checking.is_some_and(|checking| checking.epoch == epoch)
            || self.closes.iter().any(|close| close.statement().epoch == epoch);
        if epoch <= tip || closing {
            return Err(SessionError::EpochEnded { found: epoch, tip });
        }
        if let Some(open) = self.open.get_mut(&epoch) {
            open.dropping = true;
        }
        self.remember_dropped(epoch);
        Ok(())
    }

    fn remember_dropped(&mut self, epoch: Epoch) {
        self.dropped.insert(epoch);
        if self.dropped.len() > DROPPED_MAX {
            self.dropped.pop_first();
        }
    }

    /// Does what has become possible.
    fn advance(&mut self) {
        let gone: Vec<_> = self
            .open
            .iter()
            .filter(|(_, open)| open.dropping && open.in_flight == 0)
            .map(|(epoch, _)| *epoch)
            .collect();
        for epoch in gone {
            self.open.remove(&epoch);
            self.events.push_back(ReceiverEvent::DropEpoch(epoch));
        }
        if self.is_idle()
            && matches!(self.link, Link::Claimed(_))
            && let Link::Claimed(claim) = std::mem::replace(&mut self.link, Link::Up)
        {
            self.grant(&claim);
        }
        if self.checking.is_none() && matches!(self.link, Link::Up) {
            let ready = |close: &Close| {
                let statement = close.statement();
                let open = self.open.get(&statement.epoch);
                open.is_some_and(|open| open.in_flight == 0 && open.records.len() as u64 == statement.records)
            };
            if self.closes.front().is_some_and(ready)
                && let Some(close) = self.closes.pop_front()
            {
                self.checking = Some(ClosedEpoch { epoch: close.statement().epoch, close: close.id() });
                self.events.push_back(ReceiverEvent::CheckClose(Box::new(close)));
            }
        }
    }

    /// Decides on a claim and answers it. Nothing is on its way into the stage.
    fn grant(&mut self, claim: &Claim) {
        let tip = self.tip();
        let refusal = if claim.protocol != PROTOCOL {
            Some((RefusalCode::Protocol, format!("protocol {} is not spoken here, {PROTOCOL} is", claim.protocol)))
        } else if claim.volume != self.facts.volume {
            Some((RefusalCode::NotYours, format!("volume {} is not the one opened", claim.volume)))
        } else if claim.incarnation != self.facts.incarnation {
            let (found, expected) = (claim.incarnation, self.facts.incarnation);
            Some((RefusalCode::WrongIncarnation, format!("incarnation {found} claimed, {expected} is current")))
        } else if tip.close != claim.known && !claim.journaled.contains(&tip.close) {
            let text = format!(
                "the newest close here is {} (epoch {}), which this sender neither knows nor journaled: its state is a copy, \
                 was rolled back, or another sender wrote the volume; adopt the volume to go on",
                tip.close, tip.epoch
            );
            Some((RefusalCode::Diverged, text))
        } else if claim.resume.len() > OPEN_EPOCHS_MAX {
            Some((RefusalCode::BadMessage, format!("{} epochs to resume are too many", claim.resume.len())))
        } else {
            None
        };
        if let Some((code, text)) = refusal {
            return self.refuse(code, text);
        }
        let same = self.session.is_none_or(|session| session == claim.session);
        if self.session != Some(claim.session) {
            self.resent = 0;
        }
        self.session = Some(claim.session);
        let kept: BTreeSet<_> = claim.resume.iter().copied().filter(|epoch| same && *epoch > tip.epoch).collect();
        let gone: Vec<_> = self.open.keys().copied().filter(|epoch| !kept.contains(epoch)).collect();
        for epoch in gone {
            self.open.remove(&epoch);
            self.events.push_back(ReceiverEvent::DropEpoch(epoch));
        }
        // Frames of an earlier connection no longer come: epochs dropped on it need not be told apart any more.
        self.dropped.clear();
        let mut lists = 0;
        for (epoch, open) in self.open.iter().filter(|(_, open)| !open.records.is_empty()) {
            lists += open.records.len().div_ceil(limits::STAGED_LIST_MAX);
            self.lists.push_back((*epoch, BlockIndex(0)));
        }
        let (committed, next_epoch) = (self.facts.committed.close, self.facts.next_epoch);
        let lists = u32::try_from(lists).unwrap_or(u32::MAX);
        self.control.push_back(Frame::Opened { committed, tip: tip.close, next_epoch, lists });
        self.events.push_back(ReceiverEvent::Opened { session: claim.session });
    }
}
