//! The right to write a volume's log, from the forwarder's side: taken when the volume is loaded, and asked about when a sender
//! comes back that may have been elsewhere.
//!
//! Whoever takes it creates the log's next entry under a higher generation, before any claim is granted on what the log says:
//! after that nobody else can commit, so what this receiver does not hold of a volume is lost for good, and its sender may
//! forget it. What a receiver had staged may go on only if the generation before was its own too: else another receiver has
//! granted a claim meanwhile, whose sender may have forgotten what lies here.
//!
//! Promises: a lane writes under the right that was taken with its volume's load, never under a later one; a right once lost is
//! not taken back for what was staged under it.

use catalog::volume::checkpoint::open_view;
use catalog::volume::owner::{entry, owner};
use catalog::volume::{LogError, LogWriter, VolumeView};
use common::format::volume_header::VolumeHeader;
use common::ids::{Generation, LogSeq, VolumeId};

use super::order::Head;
use super::{ForwardHandle, Lost, Patience, Shared, kind_of, may_pass};
use crate::volumes::Hold;

/// The right to write a log that was taken, and what the log says.
#[derive(Debug)]
pub struct Taken {
    /// What is committed now, and stays so until this receiver commits more or another one takes over.
    pub head: Head,
    /// Names this taking.
    pub hold: Hold,
    /// What this receiver has staged may go on: nobody else had the right in between.
    pub continues: bool,
}

/// A right that this process holds, or did.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) hold: Hold,
    generation: Generation,
    /// The newest entry known.
    seq: LogSeq,
    /// Until the volume's lane starts.
    pub(super) parked: Option<Box<Parked>>,
}

/// What a lane starts with.
#[derive(Debug)]
pub(super) struct Parked {
    pub(super) header: VolumeHeader,
    pub(super) writer: LogWriter,
    pub(super) head: Head,
    /// Log entries since the newest checkpoint.
    pub(super) entries: u64,
}

impl Parked {
    pub(super) fn new(header: VolumeHeader, writer: LogWriter, view: &VolumeView) -> Box<Self> {
        let head = Head { epoch: view.position.last_epoch(), close: view.position.head_id() };
        Box::new(Self { header, writer, head, entries: view.entries_since_checkpoint })
    }
}

impl ForwardHandle {
    /// Takes the right to write the volume's log. `leftovers` says that nobody asks for the volume, only its staged epochs are to
    /// go on: where another receiver has the right, it is left there, and `None` comes back.
    ///
    /// # Errors
    /// Those of [`LogWriter::open`].
    pub async fn take(&self, header: VolumeHeader, leftovers: bool) -> Result<Option<Taken>, LogError> {
        let (shared, volume) = (&*self.shared, header.volume);
        let own = shared.config.receiver;
        if leftovers {
            let seq = open_view(&shared.store, &header).await?.position.seq;
            if owner(&shared.store, volume, seq).await?.is_some_and(|owner| owner != own) {
                return Ok(None);
            }
        }
        let (writer, view) = LogWriter::open(&shared.store, &header, own, &shared.clock).await?;
        let before = owner(&shared.store, volume, LogSeq(view.position.seq.0.saturating_sub(1))).await?;
        let continues = before.is_none_or(|owner| owner == own);
        if let Some(before) = before.filter(|before| *before != own) {
            tracing::info!(%volume, generation = %writer.generation(), %before, "took the volume over from another receiver");
            metrics::counter!("blockferry_receiver_takeovers_total").increment(1);
        }
        let mut lanes = shared.lock();
        // What an earlier load had under way meets the new generation, and ends.
        lanes.open.remove(&volume);
        lanes.next_hold += 1;
        let hold = Hold(lanes.next_hold);
        let (generation, seq) = (writer.generation(), view.position.seq);
        let parked = Parked::new(header, writer, &view);
        let head = parked.head;
        lanes.held.insert(volume, Held { hold, generation, seq, parked: Some(parked) });
        Ok(Some(Taken { head, hold, continues }))
    }

    /// True while the right named by `hold` is this receiver's still: no entry of a higher generation is in the log. One request
    /// to the store, and one more for each entry that appeared since.
    ///
    /// # Errors
    /// The store's; [`LogError::Damaged`].
    pub async fn holds(&self, volume: VolumeId, hold: Hold) -> Result<bool, LogError> {
        let shared = &*self.shared;
        let known =
            shared.lock().held.get(&volume).filter(|held| held.hold == hold).map(|held| (held.seq, held.generation));
        let Some((mut seq, generation)) = known else { return Ok(false) };
        loop {
            seq = LogSeq(seq.0.saturating_add(1));
            match entry(&shared.store, volume, seq).await? {
                None => return Ok(true),
                Some(entry) if entry.generation > generation => return Ok(false),
                Some(_) => {}
            }
        }
    }
}

impl Shared {
    /// The log's end as `writer` knows it, so that [`ForwardHandle::holds`] need not walk there.
    pub(super) fn note_position(&self, volume: VolumeId, hold: Hold, writer: &LogWriter) {
        if let Some(held) = self.lock().held.get_mut(&volume).filter(|held| held.hold == hold) {
            (held.seq, held.generation) = (writer.position().seq, writer.generation());
        }
    }
}

/// Opens the log anew for a writer that does not know what became of its attempts.
pub(super) async fn reopen(shared: &Shared, header: &VolumeHeader) -> Result<(LogWriter, VolumeView), Lost> {
    let (writer, view) = super::open_log(shared, header).await?;
    let before = LogSeq(view.position.seq.0.saturating_sub(1));
    let mut patience = Patience::new(header.volume, "read the volume's log");
    loop {
        match owner(&shared.store, header.volume, before).await {
            Ok(Some(winner)) if winner != shared.config.receiver => return Err(Lost::Elsewhere { winner }),
            Ok(_) => return Ok((writer, view)),
            Err(error) if may_pass(&error) => patience.after(&error, kind_of(&error)).await,
            Err(error) => return Err(error.into()),
        }
    }
}
