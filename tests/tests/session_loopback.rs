//! The sending driver against the accepting driver over real QUIC on loopback, through a relay that can cut the link. The
//! stage, the log and the forwarder are small models in memory that outlive the receiver they serve.

#![allow(
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    clippy::map_entry,
    reason = "a test fails by panicking and prints its seed"
)]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use common::budget::{Budget, MemoryTable, Permit};
use common::clock::{Clock, UnixMillis};
use common::format::close::{Close, CloseStatement};
use common::format::frame::RefusalCode;
use common::format::record::{Codec, Record, RecordHeader, RecordKind, RecordMeta};
use common::format::volume_header::{IncarnationSize, VolumeHeader};
use common::ids::{
    BlockIndex, CloseId, Epoch, FleetId, GroupId, Incarnation, KeyId, MachineId, Nonce, PageMask, Salt, SessionId,
    VolumeId,
};
use common::net::identity::{CertSerial, PeerIdentity, Role, authority_params};
use common::net::quic::{QuicTuning, client_endpoint, server_endpoint};
use common::net::tls::{
    ALPN_DATA, ClientCertificate, Credentials, FleetAuthority, ServerCertificate, client_config, server_config,
};
use common::seal::merkle;
use common::session::{ClosedEpoch, PROTOCOL, SenderConfig, SenderEvent, StagedRecord};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use rcgen::{Issuer, KeyPair};
use receiver::accept::{self, AcceptLimits, Acceptor};
use receiver::drain::Draining;
use receiver::volumes::{
    Catalog, Forwarding, Hold, Intake, Loaded, Pending, Purpose, Recovered, Staging, VolumeError, Volumes,
};
use sender::send::{Choice, KnownReceiver, Route, Sender, VolumeEvents, VolumeSender};
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

const VOLUME: VolumeId = VolumeId([3; 16]);
const DISK_BYTES: u64 = 1 << 30;
const PAGES: u32 = 4;

// ---- identities ----

struct Fleet {
    authority: FleetAuthority,
    issuer: Issuer<'static, KeyPair>,
}

impl Fleet {
    fn new() -> Self {
        let fleet = FleetId::from_random(common::rng::random().expect("random"));
        let key = KeyPair::generate().expect("a key");
        let now = Clock::System.now().0;
        let params = authority_params(fleet, UnixMillis(now - 3_600_000), UnixMillis(now + 3_600_000));
        let ca = params.self_signed(&key).expect("signed").der().clone();
        Self { authority: FleetAuthority { fleet, ca }, issuer: Issuer::new(params, key) }
    }

    fn issue(&self, role: Role, id: [u8; 16]) -> Credentials {
        let now = Clock::System.now().0;
        let identity = PeerIdentity {
            fleet: self.authority.fleet,
            role,
            id,
            name: format!("{role}-{}", id[0]),
            serial: CertSerial::from_random(common::rng::random().expect("random")),
            not_after: UnixMillis(now + 3_600_000),
        };
        let key = KeyPair::generate().expect("a key");
        let params = identity.certificate_params(UnixMillis(now - 3_600_000)).expect("encodable");
        let leaf = params.signed_by(&key, &self.issuer).expect("signed").der().clone();
        Credentials::new(vec![leaf, self.authority.ca.clone()], Zeroizing::new(key.serialize_der()))
    }
}

fn tuning() -> QuicTuning {
    QuicTuning {
        keep_alive: Duration::from_millis(200),
        idle_timeout: Duration::from_millis(1_200),
        stream_window_bytes: 256 << 10,
        connection_window_bytes: 1 << 20,
        send_window_bytes: 1 << 20,
        ..QuicTuning::default()
    }
}

fn budget() -> Budget {
    Budget::new(MemoryTable::new(64 << 20)).expect("not empty")
}

// ---- what outlives a receiver ----

#[derive(Default)]
struct Durable {
    records: BTreeMap<Epoch, BTreeMap<BlockIndex, RecordMeta>>,
    closes: BTreeMap<Epoch, Close>,
    log: Vec<Close>,
    /// Every (epoch, block) that was ever staged, with how often.
    staged: HashMap<(Epoch, BlockIndex), usize>,
}

struct Model {
    fleet: FleetId,
    machine: MachineId,
    durable: Mutex<Durable>,
    /// The stage takes records in.
    open: watch::Sender<bool>,
    /// Closed epochs are committed.
    forwards: watch::Sender<bool>,
    /// Set once this receiver is dead: nothing becomes durable any more.
    dead: AtomicBool,
    volumes: OnceLock<Weak<Volumes>>,
    holding: AtomicUsize,
}

impl Model {
    fn new(fleet: FleetId, machine: MachineId) -> Arc<Self> {
        Arc::new(Self {
            fleet,
            machine,
            durable: Mutex::default(),
            open: watch::Sender::new(true),
            forwards: watch::Sender::new(true),
            dead: AtomicBool::new(false),
            volumes: OnceLock::new(),
            holding: AtomicUsize::new(0),
        })
    }

    /// What a receiver that starts after this one was killed finds.
    fn reborn(&self) -> Arc<Self> {
        let durable = std::mem::take(&mut *self.durable.lock().expect("not poisoned"));
        let next = Self::new(self.fleet, self.machine);
        *next.durable.lock().expect("not poisoned") = durable;
        next
    }

    fn committed(&self) -> usize {
        self.durable.lock().expect("not poisoned").log.len()
    }

    fn staged(&self) -> usize {
        self.durable.lock().expect("not poisoned").staged.len()
    }
}

struct Parts(Arc<Model>);

fn dead() -> VolumeError {
    VolumeError::Failed("this receiver was killed".into())
}

struct Gate(watch::Receiver<bool>);

impl Intake for Gate {
    fn admit(&self) -> BoxFuture<'_, Result<(), VolumeError>> {
        let mut open = self.0.clone();
        async move { open.wait_for(|open| *open).await.map(drop).map_err(|_| dead()) }.boxed()
    }

    fn passed_over<'a>(&'a self, _by: &'a (dyn Fn(VolumeId) -> bool + Send + Sync)) -> BoxFuture<'a, ()> {
        futures::future::pending().boxed()
    }
}

impl Staging for Parts {
    fn intake_of(&self, _volume: VolumeId) -> Box<dyn Intake> {
        Box::new(Gate(self.0.open.subscribe()))
    }

    fn release(&self, _volume: VolumeId, _up_to: Epoch) -> Pending<()> {
        async { Ok(()) }.boxed()
    }

    fn stage(&self, record: Record, meta: RecordMeta, permit: Permit) -> Pending<()> {
        let model = Arc::clone(&self.0);
        model.holding.fetch_add(1, Ordering::Relaxed);
        async move {
            // Batches become durable a little later, and not in the order of the streams.
            tokio::time::sleep(Duration::from_millis(2 + meta.block.0 % 3)).await;
            model.holding.fetch_sub(1, Ordering::Relaxed);
            drop(permit);
            let mut durable = model.durable.lock().expect("not poisoned");
            if model.dead.load(Ordering::Acquire) {
                return Err(dead());
            }
            let key = (record.header().epoch, record.header().block);
            *durable.staged.entry(key).or_default() += 1;
            durable.records.entry(key.0).or_default().insert(key.1, meta);
            Ok(())
        }
        .boxed()
    }

    fn close(&self, _header: Arc<VolumeHeader>, close: Close) -> Pending<()> {
        let model = Arc::clone(&self.0);
        async move {
            let mut durable = model.durable.lock().expect("not poisoned");
            if model.dead.load(Ordering::Acquire) {
                return Err(dead());
            }
            let statement = close.statement();
            let records = durable.records.get(&statement.epoch);
            let root = merkle::root(records.into_iter().flat_map(BTreeMap::values));
            if root.map_err(|error| VolumeError::Bad(error.to_string()))? != statement.meta_root {
                return Err(VolumeError::Bad("another Merkle root".into()));
            }
            durable.closes.insert(statement.epoch, close);
            Ok(())
        }
        .boxed()
    }

    fn drop_epoch(&self, _volume: VolumeId, epoch: Epoch) -> Pending<()> {
        self.0.durable.lock().expect("not poisoned").records.remove(&epoch);
        async { Ok(()) }.boxed()
    }

    fn forget_open(&self, _volume: VolumeId, epoch: Epoch) -> Pending<()> {
        self.0.durable.lock().expect("not poisoned").records.remove(&epoch);
        async { Ok(()) }.boxed()
    }

    fn begin_session(&self, _volume: VolumeId, _session: SessionId) -> Pending<()> {
        async { Ok(()) }.boxed()
    }

    fn recovered(&self, _volume: VolumeId) -> Recovered {
        let durable = self.0.durable.lock().expect("not poisoned");
        let staged = |records: &BTreeMap<BlockIndex, RecordMeta>| {
            records.values().map(|meta| StagedRecord { block: meta.block, tag: meta.tag }).collect()
        };
        let open = durable.records.iter().filter(|(epoch, _)| !durable.closes.contains_key(epoch));
        Recovered {
            closes: durable.closes.values().cloned().collect(),
            open: open.map(|(epoch, records)| (*epoch, staged(records))).collect(),
            next_epoch: Epoch(1),
        }
    }

    fn volumes(&self) -> Vec<VolumeId> {
        vec![VOLUME]
    }
}

impl Forwarding for Parts {
    fn closed(&self, volume: VolumeId, _hold: Hold, close: Close) {
        let model = Arc::clone(&self.0);
        tokio::spawn(async move {
            if model.forwards.subscribe().wait_for(|forwards| *forwards).await.is_err() {
                return;
            }
            loop {
                tokio::time::sleep(Duration::from_millis(3)).await;
                let mut durable = model.durable.lock().expect("not poisoned");
                if model.dead.load(Ordering::Acquire) {
                    return;
                }
                let head = durable.log.last().map_or(CloseId::ZERO, Close::id);
                if head == close.statement().parent {
                    durable.closes.remove(&close.statement().epoch);
                    durable.log.push(close.clone());
                    break;
                }
            }
            if let Some(volumes) = model.volumes.get().and_then(Weak::upgrade) {
                volumes.handle_committed(volume, close.id());
            }
        });
    }
}

impl Catalog for Parts {
    fn header(&self, volume: VolumeId) -> Pending<VolumeHeader> {
        let model = Arc::clone(&self.0);
        async move {
            if volume != VOLUME {
                return Err(VolumeError::NotFound(volume));
            }
            Ok(VolumeHeader {
                nonce: Nonce::ZERO,
                fleet: model.fleet,
                volume,
                machine: model.machine,
                machine_name: "m".into(),
                name: "v".into(),
                created: UnixMillis(0),
                sector_bytes: 512,
                key_id: KeyId(1),
                signing_key: [0; 32],
                incarnations: vec![IncarnationSize { incarnation: Incarnation(1), disk_bytes: DISK_BYTES }],
                wrapped_keys: Vec::new(),
            })
        }
        .boxed()
    }

    fn take(&self, volume: VolumeId, _purpose: Purpose) -> Pending<Option<Loaded>> {
        let (model, header) = (Arc::clone(&self.0), self.header(volume));
        async move {
            let header = header.await?;
            let durable = model.durable.lock().expect("not poisoned");
            let head = durable.log.last();
            let committed = head.map_or(ClosedEpoch::default(), |close| ClosedEpoch {
                epoch: close.statement().epoch,
                close: close.id(),
            });
            Ok(Some(Loaded { header, committed, hold: Hold(1), continues: true }))
        }
        .boxed()
    }

    fn holds(&self, _volume: VolumeId, _hold: Hold) -> Pending<bool> {
        async { Ok(true) }.boxed()
    }
}

// ---- the receiver ----

struct Receiver {
    address: SocketAddr,
    model: Arc<Model>,
    budget: Budget,
    stop: CancellationToken,
    endpoint: quinn::Endpoint,
    running: tokio::task::JoinHandle<()>,
}

impl Receiver {
    fn start(fleet: &Fleet, model: Arc<Model>, revoked: bool) -> Self {
        let certificate = ServerCertificate::new(&fleet.issue(Role::Receiver, [9; 16])).expect("usable");
        let tls = server_config(&fleet.authority, certificate, ClientCertificate::Required, ALPN_DATA).expect("usable");
        let (endpoint, _) = server_endpoint(([127, 0, 0, 1], 0).into(), tls, &tuning()).expect("a free port");
        let parts = || Arc::new(Parts(Arc::clone(&model)));
        let volumes = Arc::new(Volumes::new(parts(), parts(), parts()));
        model.volumes.set(Arc::downgrade(&volumes)).expect("set once");
        let budget = budget();
        let limits = AcceptLimits { pause_time: Duration::from_secs(5), ..AcceptLimits::default() };
        let acceptor = Arc::new(Acceptor {
            volumes,
            budget: budget.clone(),
            revoked: Arc::new(move |_| revoked),
            draining: Draining::default(),
            window_bytes: 16 << 20,
            limits,
        });
        let stop = CancellationToken::new();
        let running = tokio::spawn(accept::run(endpoint.clone(), acceptor, stop.clone()));
        Self { address: endpoint.local_addr().expect("bound"), model, budget, stop, endpoint, running }
    }

    /// As by SIGKILL: nothing becomes durable from this instant on, and nobody is told.
    fn kill(self) -> Arc<Model> {
        let durable = self.model.durable.lock().expect("not poisoned");
        self.model.dead.store(true, Ordering::Release);
        drop(durable);
        self.running.abort();
        self.endpoint.close(0_u32.into(), b"");
        self.model.reborn()
    }

    async fn shut_down(self) -> Arc<Model> {
        self.stop.cancel();
        self.running.await.expect("it stops by itself");
        self.model.dead.store(true, Ordering::Release);
        self.model.reborn()
    }
}

/// Passes datagrams on between whoever writes to it and a target; or drops them all.
struct Relay {
    address: SocketAddr,
    target: watch::Sender<Option<SocketAddr>>,
}

impl Relay {
    async fn start(target: SocketAddr) -> Self {
        let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.expect("bound"));
        let address = front.local_addr().expect("bound");
        let (target, targets) = watch::channel(Some(target));
        tokio::spawn(async move {
            let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
            let mut datagram = vec![0; 65_536];
            while let Ok((len, client)) = front.recv_from(&mut datagram).await {
                let Some(to) = *targets.borrow() else { continue };
                if !backs.contains_key(&client) {
                    let back = Arc::new(UdpSocket::bind("127.0.0.1:0").await.expect("bound"));
                    backs.insert(client, Arc::clone(&back));
                    let (front, targets) = (Arc::clone(&front), targets.clone());
                    tokio::spawn(async move {
                        let mut datagram = vec![0; 65_536];
                        while let Ok((len, from)) = back.recv_from(&mut datagram).await {
                            if *targets.borrow() == Some(from) {
                                let _ = front.send_to(&datagram[..len], client).await;
                            }
                        }
                    });
                }
                let _ = backs[&client].send_to(&datagram[..len], to).await;
            }
        });
        Self { address, target }
    }

    fn cut(&self) {
        self.target.send_replace(None);
    }

    fn lead_to(&self, target: SocketAddr) {
        self.target.send_replace(Some(target));
    }
}

// ---- the sender ----

fn start_sender(fleet: &Fleet, machine: MachineId, receiver: SocketAddr) -> Sender {
    let credentials = fleet.issue(Role::Machine, machine.0);
    let tls = client_config(&fleet.authority, Some(&credentials), ALPN_DATA).expect("usable");
    let (endpoint, _) = client_endpoint(&tuning()).expect("a free port");
    Sender::start(Route {
        endpoint,
        choice: Choice::new(vec![KnownReceiver::at(receiver.into())]),
        tls: watch::channel(Arc::new(tls)).1,
        tuning: tuning(),
    })
}

fn config(session: u8, known: CloseId) -> SenderConfig {
    SenderConfig {
        protocol: PROTOCOL,
        volume: VOLUME,
        incarnation: Incarnation(1),
        session: SessionId([session; 16]),
        streams: 4,
        known,
        journaled: Vec::new(),
        outstanding_bytes_max: 1 << 20,
    }
}

fn record(epoch: u64, block: u64) -> Record {
    let plain_len = PAGES * 4096;
    let header = RecordHeader {
        kind: RecordKind::Delta,
        codec: Codec::Raw,
        volume: VOLUME,
        incarnation: Incarnation(1),
        key_id: KeyId(1),
        epoch: Epoch(epoch),
        block: BlockIndex(block),
        data_mask: PageMask::first(PAGES),
        zero_mask: PageMask::EMPTY,
        block_count: 1,
        plain_len,
        sealed_len: plain_len + 16,
        dictionary_id: 0,
        counter: block,
    };
    let mut state = epoch * 1_000_003 + block;
    let bytes = (0..header.record_len()).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    });
    Record::assemble(header, bytes.collect())
}

fn close(fleet: FleetId, epoch: u64, parent: CloseId, metas: &[RecordMeta]) -> Close {
    let statement = CloseStatement {
        fleet,
        volume: VOLUME,
        incarnation: Incarnation(1),
        key_id: KeyId(1),
        epoch: Epoch(epoch),
        parent,
        salt: Salt::ZERO,
        cut_time: UnixMillis(0),
        point: None,
        disk_bytes: DISK_BYTES,
        records: metas.len() as u64,
        data_pages: metas.len() as u64 * u64::from(PAGES),
        zero_pages: 0,
        record_bytes: metas.iter().map(|meta| u64::from(meta.record_len)).sum(),
        meta_root: merkle::root(metas).expect("in order"),
        group: GroupId::NIL,
        group_point: GroupId::NIL,
    };
    Close::new(statement, [0; 64])
}

/// Sends epochs `epochs` of `blocks` records each, chained from `parent`; gives the last close.
async fn send_epochs(
    sender: &VolumeSender,
    budget: &Budget,
    fleet: FleetId,
    epochs: std::ops::RangeInclusive<u64>,
    blocks: u64,
    mut parent: CloseId,
) -> CloseId {
    for epoch in epochs {
        let mut metas = Vec::new();
        for block in 0..blocks {
            let record = record(epoch, block);
            metas.push(record.meta());
            let permit = budget.acquire(record.bytes().len() as u64).await.expect("fits");
            sender.send_record(record, permit).await.expect("the session lives");
        }
        let made = close(fleet, epoch, parent, &metas);
        parent = made.id();
        sender.close(made).expect("in order");
    }
    parent
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(60), async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("never came true: {what}"));
}

async fn next(events: &mut VolumeEvents) -> Option<SenderEvent> {
    tokio::time::timeout(Duration::from_secs(60), events.next()).await.expect("an event comes, or the end")
}

async fn opened(events: &mut VolumeEvents) -> Epoch {
    loop {
        match next(events).await {
            Some(SenderEvent::Opened { next_epoch, .. }) => return next_epoch,
            Some(_) => {}
            None => panic!("the session ended"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_or_sent_twice_over_cut_links_and_restarted_receivers() {
    const EPOCHS: u64 = 20;
    const BLOCKS: u64 = 40;
    let fleet = Fleet::new();
    let machine = MachineId([1; 16]);
    let mut receiver = Receiver::start(&fleet, Model::new(fleet.authority.fleet, machine), false);
    let relay = Relay::start(receiver.address).await;
    let sender = start_sender(&fleet, machine, relay.address);
    let (volume, mut events) = sender.open_volume("v", config(1, CloseId::ZERO)).expect("room");
    assert_eq!(opened(&mut events).await, Epoch(1));

    let memory = budget();
    let (feeder, feeder_memory) = (volume.clone(), memory.clone());
    let fleet_id = fleet.authority.fleet;
    let feeding = tokio::spawn(async move {
        let mut parent = CloseId::ZERO;
        for epoch in 1..=EPOCHS {
            eventually("an epoch may begin", || feeder.epochs_in_flight() < 12).await;
            parent = send_epochs(&feeder, &feeder_memory, fleet_id, epoch..=epoch, BLOCKS, parent).await;
        }
        parent
    });

    // A link that dies silently in the middle of an epoch.
    eventually("two epochs and a bit are staged", || receiver.model.staged() > 90).await;
    relay.cut();
    eventually("the sender notices", || !sender.state().borrow().connected).await;
    relay.lead_to(receiver.address);
    // A receiver that is killed with records on their way into its stage, and one stopped in good order.
    for (staged, kill) in [(200, true), (380, false), (560, true)] {
        eventually("more is staged", || receiver.model.staged() > staged).await;
        relay.cut();
        let model = if kill { receiver.kill() } else { receiver.shut_down().await };
        receiver = Receiver::start(&fleet, model, false);
        relay.lead_to(receiver.address);
    }

    let mut committed = Vec::new();
    while committed.len() < EPOCHS as usize {
        match next(&mut events).await {
            Some(SenderEvent::Committed { closed, records_resent }) => {
                assert_eq!(records_resent, 0);
                committed.push(closed);
            }
            Some(SenderEvent::StageLost { .. }) => panic!("nothing acknowledged was lost"),
            Some(SenderEvent::Refused { code, .. }) => {
                assert!(matches!(code, RefusalCode::GoingAway | RefusalCode::Draining), "{code:?}");
            }
            Some(_) => {}
            None => panic!("the session ended"),
        }
    }
    let head = feeding.await.expect("the feeder finishes");
    assert_eq!(committed.last().map(|closed| closed.close), Some(head));
    let durable = receiver.model.durable.lock().expect("not poisoned");
    assert_eq!(durable.log.len() as u64, EPOCHS);
    let expected: BTreeSet<_> =
        (1..=EPOCHS).flat_map(|e| (0..BLOCKS).map(move |b| (Epoch(e), BlockIndex(b)))).collect();
    assert_eq!(durable.staged.keys().copied().collect::<BTreeSet<_>>(), expected);
    assert!(durable.staged.values().all(|times| *times == 1), "a record was staged twice");
    drop(durable);
    assert_eq!((memory.used(), volume.unacked_bytes()), (0, 0), "the sender's permits are given back");
    assert_eq!(receiver.budget.used(), 0, "the receiver's permits are given back");
    assert!(volume.sent().records >= EPOCHS * BLOCKS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_stage_stops_the_sender_within_its_bounds_and_lets_it_go_on() {
    let fleet = Fleet::new();
    let machine = MachineId([1; 16]);
    let receiver = Receiver::start(&fleet, Model::new(fleet.authority.fleet, machine), false);
    receiver.model.open.send_replace(false);
    let sender = start_sender(&fleet, machine, receiver.address);
    let (volume, mut events) = sender.open_volume("v", config(1, CloseId::ZERO)).expect("room");
    opened(&mut events).await;
    let memory = budget();
    let (feeder, feeder_memory, fleet_id) = (volume.clone(), memory.clone(), fleet.authority.fleet);
    let feeding = tokio::spawn(async move {
        send_epochs(&feeder, &feeder_memory, fleet_id, 1..=1, 300, CloseId::ZERO).await;
    });
    eventually("the sender has as much outstanding as it may", || volume.unacked_bytes() >= 1 << 20).await;
    assert_eq!(receiver.model.holding.load(Ordering::Relaxed), 0, "nothing passed the gate");
    assert_eq!(receiver.budget.used(), 0, "who waits for the stage holds no memory");
    assert!(volume.unacked_bytes() < (1 << 20) + (64 << 10));
    assert!(!feeding.is_finished());
    receiver.model.open.send_replace(true);
    feeding.await.expect("it goes on");
    eventually("it is committed", || receiver.model.committed() == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_machines_volume_is_refused_like_one_that_does_not_exist() {
    let fleet = Fleet::new();
    let receiver = Receiver::start(&fleet, Model::new(fleet.authority.fleet, MachineId([1; 16])), false);
    let mut texts = Vec::new();
    for volume in [VOLUME, VolumeId([4; 16])] {
        let sender = start_sender(&fleet, MachineId([2; 16]), receiver.address);
        let config = SenderConfig { volume, ..config(1, CloseId::ZERO) };
        let (_volume, mut events) = sender.open_volume("v", config).expect("room");
        let Some(SenderEvent::Refused { code, text }) = next(&mut events).await else { panic!("it is refused") };
        assert_eq!(code, RefusalCode::NotYours);
        texts.push(text.replace(&volume.to_string(), "V"));
        assert_eq!(next(&mut events).await, None, "and not tried again");
        sender.stop();
    }
    assert_eq!(texts[0], texts[1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_certificate_gets_no_session() {
    let fleet = Fleet::new();
    let machine = MachineId([1; 16]);
    let receiver = Receiver::start(&fleet, Model::new(fleet.authority.fleet, machine), true);
    let sender = start_sender(&fleet, machine, receiver.address);
    let (_volume, _events) = sender.open_volume("v", config(1, CloseId::ZERO)).expect("room");
    let state = sender.state();
    let said = || state.borrow().last_error.clone().is_some_and(|error| error.contains("revoked"));
    eventually("the sender is told why", said).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_later_start_of_the_sender_takes_over_and_the_earlier_one_ends() {
    let fleet = Fleet::new();
    let machine = MachineId([1; 16]);
    let receiver = Receiver::start(&fleet, Model::new(fleet.authority.fleet, machine), false);
    let first = start_sender(&fleet, machine, receiver.address);
    let (volume, mut events) = first.open_volume("v", config(1, CloseId::ZERO)).expect("room");
    opened(&mut events).await;
    let memory = budget();
    let head = send_epochs(&volume, &memory, fleet.authority.fleet, 1..=1, 5, CloseId::ZERO).await;
    let permit = memory.acquire(1 << 20).await.expect("fits");
    volume.send_record(record(2, 0), permit).await.expect("the session lives");
    eventually("all of it is staged", || receiver.model.staged() == 6 && receiver.model.committed() == 1).await;

    let second = start_sender(&fleet, machine, receiver.address);
    let (_volume, mut later) = second.open_volume("v", config(2, head)).expect("room");
    assert_eq!(opened(&mut later).await, Epoch(3), "epoch numbers are not used again");
    let mut last = None;
    while let Some(event) = next(&mut events).await {
        last = Some(event);
    }
    assert!(matches!(last, Some(SenderEvent::Refused { code: RefusalCode::Superseded, .. })), "{last:?}");
    assert!(volume.send_record(record(2, 1), memory.acquire(1).await.expect("fits")).await.is_err());
    eventually("its open epoch is gone", || {
        !receiver.model.durable.lock().expect("not poisoned").records.contains_key(&Epoch(2))
    })
    .await;
}
