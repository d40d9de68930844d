//! The fleet's receivers: each says of itself where it is reached, how full it is, and that it lives.
//!
//! One object for each receiver, `v1/authority/receivers/<id>`, compare-and-swapped; its *heartbeat* is a counter that grows
//! with each version. Whether a receiver lives is judged by [`Watch`]: a counter that did not change for a while, by the
//! observer's own monotonic time. Clocks of machines are never compared.
//!
//! Promises: of two processes with one identity (a copied data directory) the second is noticed by the first at its next
//! heartbeat. Never: decides which receiver may write a volume; the volume's log alone does.

use std::collections::HashMap;
use std::time::Duration;

use common::clock::UnixMillis;
use common::format::FormatError;
use common::format::envelope::Kind;
use common::format::wire::{Reader, Writer};
use common::ids::{Nonce, ReceiverId};
use common::limits::NAME_BYTES_MAX;

use super::FleetError;
use super::format::Object;
use super::object;
use crate::store::{ObjectMeta, Store};

/// How often a receiver says that it lives.
pub const HEARTBEAT: Duration = Duration::from_secs(60);
/// How long a heartbeat may stand still before its receiver is shown as stale.
pub const STALE_AFTER: Duration = Duration::from_secs(185);
/// Addresses that a receiver may name.
pub const ADDRESSES_MAX: usize = 8;
/// Longest address: a host name of DNS and a port.
const ADDRESS_BYTES_MAX: usize = 300;
const FOLDER: &str = "v1/authority/receivers";

/// What a receiver does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReceiverState {
    /// Serves senders.
    Serving,
    /// Forwards what is closed, and takes no sessions.
    Draining,
    /// Stopped in order.
    Gone,
}

impl ReceiverState {
    /// The word in texts and JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Draining => "draining",
            Self::Gone => "gone",
        }
    }
}

/// `v1/authority/receivers/<id>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receiver {
    /// Unique in each version of the object.
    pub nonce: Nonce,
    /// The receiver.
    pub receiver: ReceiverId,
    /// Drawn anew at each start of it.
    pub instance: [u8; 16],
    /// Its name.
    pub name: String,
    /// `HOST:PORT` under which senders reach it, the best first.
    pub addresses: Vec<String>,
    /// What it does.
    pub state: ReceiverState,
    /// Bytes that its stage may hold.
    pub stage_capacity: u64,
    /// Bytes that its stage holds.
    pub stage_used: u64,
    /// Volumes that it has loaded.
    pub volumes: u32,
    /// Volumes that a sender writes now.
    pub sessions: u32,
    /// Grows with each version.
    pub heartbeat: u64,
    /// When this process started, by its clock.
    pub started: UnixMillis,
    /// When it wrote this version, by its clock.
    pub written: UnixMillis,
    /// Version of its software.
    pub software: String,
}

const RECEIVER: Kind = Kind { what: "receiver", magic: *b"BFFLTRCV", version: 1, body_bytes_max: 8 << 10 };

impl Receiver {
    /// How full its stage is, in percent.
    #[must_use]
    pub fn load_percent(&self) -> u32 {
        let used = u128::from(self.stage_used) * 100 / u128::from(self.stage_capacity.max(1));
        u32::try_from(used).unwrap_or(u32::MAX).min(100)
    }
}

impl Object for Receiver {
    fn encode(&self) -> Vec<u8> {
        let mut body = Writer::with_capacity(512);
        body.raw(&self.nonce.0).raw(&self.receiver.0).raw(&self.instance).block(self.name.as_bytes());
        body.count(self.addresses.len());
        for address in &self.addresses {
            body.block(address.as_bytes());
        }
        body.u8(match self.state {
            ReceiverState::Serving => 1,
            ReceiverState::Draining => 2,
            ReceiverState::Gone => 3,
        });
        body.u64(self.stage_capacity).u64(self.stage_used).u32(self.volumes).u32(self.sessions);
        body.u64(self.heartbeat).i64(self.started.0).i64(self.written.0).block(self.software.as_bytes());
        RECEIVER.seal(body.as_slice())
    }

    fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(RECEIVER.what, RECEIVER.open(bytes)?);
        let (nonce, receiver) = (Nonce(reader.array()?), ReceiverId(reader.array()?));
        let (instance, name) = (reader.array()?, reader.text("receiver name", NAME_BYTES_MAX)?);
        let count = reader.count("receiver addresses", ADDRESSES_MAX, 4)?;
        let addresses =
            (0..count).map(|_| reader.text("receiver address", ADDRESS_BYTES_MAX)).collect::<Result<_, _>>()?;
        let state = match reader.u8()? {
            1 => ReceiverState::Serving,
            2 => ReceiverState::Draining,
            3 => ReceiverState::Gone,
            other => return Err(FormatError::Invalid { what: "receiver state", found: other.into() }),
        };
        let found = Self {
            nonce,
            receiver,
            instance,
            name,
            addresses,
            state,
            stage_capacity: reader.u64()?,
            stage_used: reader.u64()?,
            volumes: reader.u32()?,
            sessions: reader.u32()?,
            heartbeat: reader.u64()?,
            started: UnixMillis(reader.i64()?),
            written: UnixMillis(reader.i64()?),
            software: reader.text("software version", NAME_BYTES_MAX)?,
        };
        reader.finish()?;
        Ok(found)
    }

    fn nonce(&mut self) -> &mut Nonce {
        &mut self.nonce
    }
}

/// What came of a heartbeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Published {
    /// It is in the store.
    Done,
    /// It is, but since this process's last heartbeat another one wrote as the same receiver: two processes share one
    /// identity.
    SharedIdentity {
        /// The other's name.
        name: String,
        /// Its addresses.
        addresses: Vec<String>,
    },
}

/// Writes what `receiver` says of itself; nonce and heartbeat are set here. `first` is true for a process's first one, which
/// takes over from the process before it.
///
/// # Errors
/// The store's; [`FleetError::Object`], [`FleetError::Contended`].
pub async fn publish(store: &Store, receiver: &Receiver, first: bool) -> Result<Published, FleetError> {
    let path = path(receiver.receiver);
    let mut stranger = None;
    let updated = object::update::<Receiver>(store, &path, |found| {
        stranger = (!first && found.instance != receiver.instance)
            .then(|| Published::SharedIdentity { name: found.name.clone(), addresses: found.addresses.clone() });
        let heartbeat = found.heartbeat.saturating_add(1);
        *found = Receiver { heartbeat, ..receiver.clone() };
        Ok(())
    });
    if updated.await?.is_some() {
        return Ok(stranger.unwrap_or(Published::Done));
    }
    let created = object::create(store, &path, Receiver { heartbeat: 1, ..receiver.clone() }).await?;
    if created { Ok(Published::Done) } else { Err(FleetError::Contended { path }) }
}

/// A receiver's object, and what the store says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The receiver.
    pub receiver: Receiver,
    /// The object: its time is the store's.
    pub meta: ObjectMeta,
}

/// All receivers that ever registered themselves, by name; and objects that can't be read, each with its error.
///
/// # Errors
/// The store's.
pub async fn list(store: &Store) -> Result<(Vec<Listed>, Vec<FleetError>), FleetError> {
    let (mut found, mut errors) = (Vec::new(), Vec::new());
    for meta in store.list(FOLDER).await? {
        match object::read::<Receiver>(store, &meta.path).await {
            Ok(Some((receiver, _))) => found.push(Listed { receiver, meta }),
            Ok(None) => {}
            Err(error @ FleetError::Object { .. }) => errors.push(error),
            Err(error) => return Err(error),
        }
    }
    found.sort_by(|a, b| (&a.receiver.name, a.receiver.receiver).cmp(&(&b.receiver.name, b.receiver.receiver)));
    Ok((found, errors))
}

/// Judges by its own time whether heartbeats go on.
#[derive(Debug, Default)]
pub struct Watch {
    seen: HashMap<ReceiverId, (u64, [u8; 16], Duration)>,
}

impl Watch {
    /// Notes what `receiver` says at `now`, a monotonic time; true where its heartbeat has stood still for
    /// [`STALE_AFTER`]. One that was never seen before counts as alive.
    pub fn observe(&mut self, receiver: &Receiver, now: Duration) -> bool {
        let beat = (receiver.heartbeat, receiver.instance);
        let seen = self.seen.entry(receiver.receiver).or_insert((beat.0, beat.1, now));
        if (seen.0, seen.1) != beat {
            *seen = (beat.0, beat.1, now);
        }
        receiver.state != ReceiverState::Gone && now.saturating_sub(seen.2) >= STALE_AFTER
    }
}

fn path(receiver: ReceiverId) -> String {
    format!("{FOLDER}/{receiver}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Receiver {
        Receiver {
            nonce: Nonce([1; 16]),
            receiver: ReceiverId([2; 16]),
            instance: [3; 16],
            name: "ps-1".into(),
            addresses: vec!["ps-1.example.org:9443".into(), "[2001:db8::1]:9443".into()],
            state: ReceiverState::Draining,
            stage_capacity: 4,
            stage_used: 1,
            volumes: 6,
            sessions: 7,
            heartbeat: 8,
            started: UnixMillis(9),
            written: UnixMillis(10),
            software: "0.1.0".into(),
        }
    }

    #[test]
    fn a_receiver_reads_back_as_first_written_and_no_damage_passes() {
        let bytes = include_bytes!("golden/receiver-v1.bin");
        assert_eq!(sample().encode(), bytes, "the encoding changed: what is stored could not be read any more");
        assert_eq!(Receiver::decode(bytes).expect("decoded"), sample());
        for at in 0..bytes.len() {
            let mut broken = bytes.to_vec();
            broken[at] ^= 0x41;
            assert!(Receiver::decode(&broken).is_err(), "byte {at}");
            assert!(Receiver::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn load_is_the_share_of_the_stage_in_use() {
        assert_eq!(sample().load_percent(), 25);
        assert_eq!(Receiver { stage_capacity: 0, stage_used: 9, ..sample() }.load_percent(), 100);
    }

    #[test]
    fn a_heartbeat_that_stands_still_is_stale_by_the_observers_own_time_and_one_that_stopped_is_not() {
        let mut watch = Watch::default();
        let at = |seconds| Duration::from_secs(seconds);
        assert!(!watch.observe(&sample(), at(1_000)));
        assert!(!watch.observe(&sample(), at(1_184)));
        assert!(watch.observe(&sample(), at(1_185)));
        let gone = Receiver { state: ReceiverState::Gone, ..sample() };
        assert!(!watch.observe(&gone, at(1_186)));
        let next = Receiver { heartbeat: 9, ..sample() };
        assert!(!watch.observe(&next, at(1_187)), "it lives again");
        assert!(!watch.observe(&next, at(1_371)));
    }

    #[tokio::test]
    async fn heartbeats_count_on_and_a_second_process_of_one_identity_is_noticed() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(&format!("file://{}/store", dir.path().display())).await.expect("a store");
        assert_eq!(publish(&store, &sample(), true).await.expect("written"), Published::Done);
        assert_eq!(publish(&store, &sample(), false).await.expect("written"), Published::Done);
        let twin = Receiver { instance: [4; 16], name: "twin".into(), ..sample() };
        assert_eq!(publish(&store, &twin, true).await.expect("written"), Published::Done, "a restart is no twin");
        let noticed = publish(&store, &sample(), false).await.expect("written");
        assert!(matches!(noticed, Published::SharedIdentity { name, .. } if name == "twin"));
        let other = Receiver { receiver: ReceiverId([5; 16]), name: "a".into(), ..sample() };
        publish(&store, &other, true).await.expect("written");
        let (listed, errors) = list(&store).await.expect("listed");
        assert!(errors.is_empty());
        let names: Vec<_> =
            listed.iter().map(|listed| (listed.receiver.name.as_str(), listed.receiver.heartbeat)).collect();
        assert_eq!(names, [("a", 1), ("ps-1", 4)]);
    }
}
