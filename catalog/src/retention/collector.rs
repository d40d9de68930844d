//! Collection: plan what is given up of a volume, then say so in its log, then delete it once the grace has passed.
//!
//! ```text
//! read log ▶ which points does the policy keep ▶ which records do these need ▶ plan
//! plan ▶ delete what the log gave up long ago ▶ write new segments ▶ one entry of maintenance
//! ```
//!
//! Everything is serialised by the log itself; there is no lease. Whoever creates an entry has read all before it, so an entry
//! of maintenance can't give up what an earlier entry names, and whoever writes a later one has seen what was given up. Collectors, a writer
//! and readers may run at once and be killed anywhere: a new segment that no entry names is an orphan and condemned later, and
//! what is deleted follows from the log and a listing alone.
//!
//! Promises: the newest recovery point, and the newest state, never go; nothing that an offered point needs is given up; an
//! object that was replaced stays for the grace, counted in the store's time, for readers that read the log before. Never: deletes a log
//! entry, a checkpoint or metadata (decision 0015).

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use common::clock::{Clock, UnixMillis};
use common::error::{Dispose, Disposition};
use common::format::checkpoint::PointSummary;
use common::format::log::{LogEntry, Maintenance, Replacement};
use common::format::volume_header::VolumeHeader;
use common::ids::{BlockIndex, CloseId, LogSeq, Nonce, ReceiverId};
use common::limits;
use futures::StreamExt as _;

use super::live::{self, Live};
use super::policy::{Decision, PolicyPoint};
use super::policy_object::{self, PolicyObjectError};
use super::rewrite;
use super::store_time::{StoreTime, StoreTimeError};
use crate::store::{ObjectMeta, PutOutcome, Store, StoreError};
use crate::volume::epochs::EpochError;
use crate::volume::history::History;
use crate::volume::log::{LogError, LogPosition, LogReader};
use crate::volume::paths;
use crate::volume::segment::SegmentError;

/// Numbers that are tried before a collector gives way to busy writers.
const APPEND_ATTEMPTS: usize = 64;
/// Memory for a collection where nothing speaks for less: whole segments, and their indexes.
pub const COLLECT_MEMORY_BYTES: u64 = 96 << 20;
/// Blocks named for refreshing.
const REFRESH_MAX: usize = 4096;

/// Why a collection did not go on.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// An epoch's metadata.
    #[error(transparent)]
    Epoch(#[from] EpochError),
    /// A segment.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// A record that is still needed is damaged: nothing is rewritten, so that it can still be looked into.
    #[error(
        "{path}: record at byte {offset}: {what}; bring the object back from another copy, `verify` tells which points need it"
    )]
    Damaged {
        /// Segment.
        path: String,
        /// Where the record starts.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// Something that a retained point needs is not there.
    #[error(
        "{path} does not hold a record any more that a retained point needs: nothing is collected; run `blockferry verify`"
    )]
    Gone {
        /// Segment.
        path: String,
    },
    /// Other entries took each number that was tried.
    #[error("the log of volume {volume} moved on {attempts} times while it was to be collected: try again later")]
    Busy {
        /// Volume.
        volume: common::ids::VolumeId,
        /// Numbers tried.
        attempts: usize,
    },
    /// The policy can't be read.
    #[error(transparent)]
    Policy(#[from] PolicyObjectError),
    /// There is no time to count ages by.
    #[error(transparent)]
    Time(#[from] StoreTimeError),
    /// No random bytes.
    #[error(transparent)]
    Rng(#[from] common::rng::RngError),
}

impl Dispose for CollectError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::Log(error) => error.disposition(),
            Self::Epoch(error) => error.disposition(),
            Self::Segment(error) => error.disposition(),
            Self::Policy(error) => error.disposition(),
            Self::Time(error) => error.disposition(),
            Self::Damaged { .. } | Self::Gone { .. } => Disposition::Corrupt,
            Self::Busy { .. } | Self::Rng(_) => Disposition::Retry,
        }
    }
}

/// A point, and when the store says that its log entry was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatedPoint {
    /// The point.
    pub point: PointSummary,
    /// When its log entry was stored, by the store's clock.
    pub stored: UnixMillis,
}

/// What a collection would do.
#[derive(Debug, Clone, Default)]
pub struct CollectPlan {
    /// Points that are no longer offered.
    pub expired: Vec<PointSummary>,
    /// Points that stay.
    pub kept: usize,
    /// Segments that are written anew, as groups of their places in the history that each become one.
    pub rewrites: Vec<Vec<u32>>,
    /// Bytes of the segments rewritten.
    pub rewrite_bytes: u64,
    /// Bytes of them that are copied.
    pub copied_bytes: u64,
    /// Objects that no entry names.
    pub condemned: Vec<String>,
    /// Objects whose time has come, with their sizes.
    pub deleted: Vec<(String, u64)>,
    /// Blocks that the sender would best send whole, most waste first.
    pub refresh: Vec<BlockIndex>,
    /// Bytes of records that retained points need.
    pub needed_bytes: u64,
    /// Pages of the disk that these are needed for: live data and retained changes, without what records hold beside them.
    pub needed_pages: u64,
    /// Bytes of segments in the store, those included whose time has not come.
    pub stored_bytes: u64,
}

/// What a collection did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Collected {
    /// Points expired.
    pub expired: usize,
    /// Segments that were replaced.
    pub replaced: usize,
    /// Segments written.
    pub written: usize,
    /// Bytes written.
    pub written_bytes: u64,
    /// Objects condemned.
    pub condemned: usize,
    /// Objects deleted.
    pub deleted: usize,
    /// Bytes deleted.
    pub deleted_bytes: u64,
}

/// How to collect.
#[derive(Debug, Clone, Copy)]
pub struct CollectOptions {
    /// How long what was given up stays for those who still read it.
    pub grace: Duration,
    /// The store's time.
    pub now: UnixMillis,
    /// Memory to stay near, in bytes, beside what the log itself takes: a third each for indexes, for the records of a new
    /// segment, and for what is read ahead.
    pub memory_bytes: u64,
    /// Names the collector in its entries.
    pub collector: ReceiverId,
}

/// What is asked of [`collect`].
#[derive(Debug, Clone)]
pub struct CollectRequest {
    /// How long what was given up stays for those who still read it.
    pub grace: Duration,
    /// Where the store's time comes from.
    pub time: StoreTime,
    /// Names the collector in its entries.
    pub collector: ReceiverId,
    /// As in [`CollectOptions`].
    pub memory_bytes: u64,
    /// Plan only.
    pub dry_run: bool,
}

/// Plans a collection of the volume by the policy that lies in the store, and does it unless only the plan was asked for. Without a
/// policy no point expires.
///
/// # Errors
/// [`CollectError`].
pub async fn collect(
    store: &Store,
    header: &VolumeHeader,
    request: &CollectRequest,
    clock: &Clock,
) -> Result<(CollectPlan, Option<Collected>), CollectError> {
    let policy = policy_object::read(store, header.volume).await?.map(|stored| stored.policy).unwrap_or_default();
    let entries = list(store, &paths::log_folder(header.volume)).await?;
    let newest = entries.values().map(|meta| meta.modified).max();
    let now = request.time.now(store, newest).await?;
    let CollectRequest { grace, collector, memory_bytes, .. } = *request;
    let options = CollectOptions { grace, now, collector, memory_bytes };
    let keep = |points: &[DatedPoint]| {
        let asked: Vec<PolicyPoint> = points
            .iter()
            .map(|dated| PolicyPoint {
                id: dated.point.id,
                committed: dated.stored,
                consistency: dated.point.consistency,
                epoch: dated.point.epoch,
            })
            .collect();
        let decided = policy.plan(now, &asked);
        decided.into_iter().filter(Decision::keeps).map(|decision| decision.point.id).collect()
    };
    let collection = Collection::plan(store, header, options, keep).await?;
    let plan = collection.planned().clone();
    let done = if request.dry_run { None } else { Some(collection.apply(clock).await?) };
    Ok((plan, done))
}

/// A collection of one volume, planned.
#[derive(Debug)]
pub struct Collection {
    store: Store,
    header: VolumeHeader,
    options: CollectOptions,
    history: History,
    live: Live,
    plan: CollectPlan,
}

impl Collection {
    /// Reads the volume's log, has `keep` choose among its points (oldest first), and plans. Reads nothing but metadata and
    /// writes nothing. The newest point that is not fuzzy, and the newest of all, stay whatever `keep` says.
    ///
    /// # Errors
    /// [`CollectError`].
    pub async fn plan(
        store: &Store,
        header: &VolumeHeader,
        options: CollectOptions,
        keep: impl FnOnce(&[DatedPoint]) -> HashSet<CloseId>,
    ) -> Result<Self, CollectError> {
        let listed = list(store, &paths::segment_folder(header.volume)).await?;
        let dated = list(store, &paths::log_folder(header.volume)).await?;
        // Read after the listing: whatever an entry names by now was stored before.
        let history = History::read(store, header).await?;
        let stored =
            |seq: LogSeq| dated.get(&paths::log_entry(header.volume, seq)).map_or(options.now, |meta| meta.modified);
        let seqs: HashMap<CloseId, LogSeq> = history.epochs.iter().map(|epoch| (epoch.close.id(), epoch.seq)).collect();
        let points: Vec<DatedPoint> = history
            .points()
            .into_iter()
            .map(|point| DatedPoint { point, stored: seqs.get(&point.id).map_or(options.now, |&seq| stored(seq)) })
            .collect();
        let mut kept = keep(&points);
        kept.extend(points.last().map(|dated| dated.point.id));
        let solid = |dated: &&DatedPoint| dated.point.consistency != common::format::close::Consistency::Fuzzy;
        kept.extend(points.iter().rfind(solid).map(|dated| dated.point.id));
        let mut plan = CollectPlan::default();
        for dated in &points {
            if kept.contains(&dated.point.id) {
                plan.kept += 1;
            } else if plan.expired.len() < limits::LOG_ENTRY_EXPIRED_MAX {
                plan.expired.push(dated.point);
            }
        }
        let gone: HashSet<CloseId> = plan.expired.iter().map(|point| point.id).collect();
        let needing: Vec<usize> = (0..history.epochs.len())
            .filter(|&at| {
                let close = &history.epochs[at].close;
                let id = close.id();
                close.statement().point.is_some() && !history.is_expired(id) && !gone.contains(&id)
            })
            .collect();
        let live =
            live::find(store, &history, &needing, (options.memory_bytes / 3).min(live::INDEX_CACHE_BYTES)).await?;
        if let Some(gone) = live.gone.first() {
            return Err(CollectError::Gone { path: gone.path.clone() });
        }
        (plan.needed_bytes, plan.needed_pages) = (live.bytes, live.pages);
        plan.refresh = live.refresh.iter().take(REFRESH_MAX).map(|(block, _)| BlockIndex(*block)).collect();
        let payload_max = (options.memory_bytes / 3).clamp(1 << 20, limits::SEGMENT_BYTES_DEFAULT);
        plan.rewrites = rewrite::groups(&history, &live.segments, payload_max);
        for place in plan.rewrites.iter().flatten() {
            plan.rewrite_bytes += history.segments[*place as usize].size;
            plan.copied_bytes += live.segments[place].bytes;
        }
        let due = |time: UnixMillis| time.0.saturating_add(millis(options.grace)) <= options.now.0;
        for (path, meta) in &listed {
            plan.stored_bytes += meta.size;
            match history.given_up().get(path) {
                Some(&seq) if due(stored(seq)) && !history.names(path) => {
                    plan.deleted.push((path.clone(), meta.size));
                }
                None if !history.names(path) && due(meta.modified) => plan.condemned.push(path.clone()),
                _ => {}
            }
        }
        plan.deleted.sort();
        plan.condemned.sort();
        plan.condemned.truncate(limits::LOG_ENTRY_SEGMENTS_MAX);
        Ok(Self { store: store.clone(), header: header.clone(), options, history, live, plan })
    }

    /// What it would do.
    #[must_use]
    pub fn planned(&self) -> &CollectPlan {
        &self.plan
    }

    /// Does it. Killed anywhere, the volume is as readable as before, and a later collection goes on.
    ///
    /// # Errors
    /// [`CollectError`].
    pub async fn apply(self, clock: &Clock) -> Result<Collected, CollectError> {
        let mut done = Collected::default();
        for (path, bytes) in &self.plan.deleted {
            self.store.delete(path).await?;
            done.deleted += 1;
            done.deleted_bytes += bytes;
        }
        let mut stated = Maintenance {
            expired: self.plan.expired.iter().map(|point| point.id).collect(),
            replaced: Vec::new(),
            condemned: self.plan.condemned.clone(),
        };
        for group in &self.plan.rewrites {
            let paths: usize = stated.replaced.iter().map(|replacement| replacement.old.len()).sum();
            if paths + group.len() > limits::LOG_ENTRY_PATHS_MAX
                || stated.replaced.len() == limits::LOG_ENTRY_SEGMENTS_MAX
            {
                break;
            }
            let volume = self.header.volume;
            let written = rewrite::rewrite(&self.store, volume, &self.history, &self.live.segments, group).await?;
            if let Some(replacement) = written {
                done.written += 1;
                done.written_bytes += replacement.new.size;
                stated.replaced.push(replacement);
            }
        }
        if stated.is_empty() {
            return Ok(done);
        }
        let stated =
            state(&self.store, &self.header, &self.options, clock, self.history.position.clone(), stated).await?;
        (done.expired, done.condemned) = (stated.expired.len(), stated.condemned.len());
        done.replaced = stated.replaced.iter().map(|replacement| replacement.old.len()).sum();
        Ok(done)
    }
}

/// Creates the entry that says `stated` behind `position`, or behind what came meanwhile: then without what that makes
/// untrue. Returns what was said in the end.
async fn state(
    store: &Store,
    header: &VolumeHeader,
    options: &CollectOptions,
    clock: &Clock,
    mut position: LogPosition,
    mut stated: Maintenance,
) -> Result<Maintenance, CollectError> {
    for _ in 0..APPEND_ATTEMPTS {
        if stated.is_empty() {
            return Ok(stated);
        }
        let Some(seq) = position.next_seq() else { break };
        let entry = LogEntry {
            volume: header.volume,
            seq,
            generation: position.generation,
            writer: options.collector,
            previous: position.digest,
            nonce: Nonce(common::rng::random()?),
            written: clock.now(),
            segments: Vec::new(),
            epochs: Vec::new(),
            maintenance: Some(stated.clone()),
        };
        let encoded = Bytes::from(entry.encode());
        let digest = LogEntry::digest_of(&encoded);
        let created = store.put_if_absent(&paths::log_entry(header.volume, seq), encoded).await;
        // A reply may have been lost: whose entry it is, reading tells.
        if matches!(created, Ok(PutOutcome::Created)) {
            return Ok(stated);
        }
        let before = position.seq;
        let mut reader = LogReader::open(store, header, position).await?;
        while let Some(read) = reader.next().await? {
            if read.digest == digest {
                return Ok(stated);
            }
            withdraw(&mut stated, &read.entry);
        }
        position = reader.position().clone();
        if position.seq == before {
            // Nothing is there, so the create failed.
            created?;
        }
    }
    Err(CollectError::Busy { volume: header.volume, attempts: APPEND_ATTEMPTS })
}

/// Takes back what `entry`, made meanwhile by another, makes untrue. PURE.
fn withdraw(stated: &mut Maintenance, entry: &LogEntry) {
    let named: HashSet<&String> = entry.segments.iter().map(|segment| &segment.path).collect();
    stated.condemned.retain(|path| !named.contains(path));
    let Some(other) = &entry.maintenance else { return };
    let expired: HashSet<&CloseId> = other.expired.iter().collect();
    stated.expired.retain(|close| !expired.contains(close));
    let mut gone: HashSet<&String> = other.condemned.iter().collect();
    let mut made: HashSet<&String> = HashSet::new();
    for Replacement { new, old } in &other.replaced {
        gone.extend(old);
        made.insert(&new.path);
    }
    // Another collector may have condemned our new segments, or rewritten the same old ones: ours are orphans then.
    stated.replaced.retain(|ours| !gone.contains(&ours.new.path) && ours.old.iter().all(|path| !gone.contains(path)));
    stated.condemned.retain(|path| !gone.contains(path) && !made.contains(path));
}

async fn list(store: &Store, folder: &str) -> Result<HashMap<String, ObjectMeta>, StoreError> {
    let mut found = HashMap::new();
    let mut listing = store.list_stream(folder)?;
    while let Some(meta) = listing.next().await {
        let meta = meta?;
        found.insert(meta.path.clone(), meta);
    }
    Ok(found)
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
