//! How a sender and its volumes stand: what the agent notes, and what `status` shows of it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::clock::UnixMillis;
use serde::{Deserialize, Serialize};

/// A committed recovery point.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PointStatus {
    /// Its id: 64 hexadecimal digits.
    pub id: String,
    /// Its epoch.
    pub epoch: u64,
    /// Milliseconds since 1970 at its cut.
    pub time_ms: i64,
    /// `fuzzy`, `crash`, `filesystem` or `application`.
    pub consistency: String,
    /// The instant that it shares with other volumes' points; empty for none.
    pub group_point: String,
}

/// One volume, as its agent last said.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct VolumeStatus {
    /// The volume's id.
    pub id: String,
    /// Its disk.
    pub path: String,
    /// `scan`, `nbd` or `ebpf`.
    pub capture: String,
    /// `starting`, `first`, `verifying`, `following`, `overloaded`, `catching-up`, `stopped` or `detached`.
    pub state: String,
    /// Bytes of the disk.
    pub disk_bytes: u64,
    /// Bytes that changed and are not committed yet.
    pub backlog_bytes: u64,
    /// Epochs closed and not committed yet.
    pub epochs_in_flight: u64,
    /// True where sender and receiver agree that nothing is outstanding: the last point is as good as one of now.
    pub settled: bool,
    /// The newest committed point.
    pub last_point: Option<PointStatus>,
    /// Times that the capture was overloaded.
    pub overloads: u64,
    /// What weakens it now; empty where all is well.
    pub warning: String,
    /// Why it stopped; empty while it runs.
    pub error: String,
}

impl VolumeStatus {
    /// Age of the newest committed point in seconds, 0 while nothing is outstanding; `None` before the first.
    #[must_use]
    pub fn rpo_seconds(&self, now: UnixMillis) -> Option<f64> {
        let point = self.last_point.as_ref()?;
        if self.settled {
            return Some(0.0);
        }
        #[expect(clippy::cast_precision_loss, reason = "an age for people")]
        let seconds = now.0.saturating_sub(point.time_ms).max(0) as f64 / 1000.0;
        Some(seconds)
    }
}

/// The link to the fleet's receivers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LinkStatus {
    /// Whether there is a connection.
    pub connected: bool,
    /// The receiver that it leads to; empty where that is not known.
    pub receiver: String,
    /// `quic` or `tcp`; empty while there is none.
    pub transport: String,
    /// Why the last attempt failed; empty where none did.
    pub last_error: String,
}

/// A named part of the memory budget.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPartStatus {
    /// What it is for.
    pub name: String,
    /// Bytes set aside.
    pub bytes: u64,
}

/// Memory now.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryStatus {
    /// What the process may use.
    pub budget_bytes: u64,
    /// What it uses: resident memory.
    pub resident_bytes: u64,
    /// Most that it used so far.
    pub resident_peak_bytes: u64,
    /// Payload that may be in flight.
    pub payload_max_bytes: u64,
    /// Payload in flight.
    pub payload_bytes: u64,
    /// The fixed parts of the budget.
    pub parts: Vec<MemoryPartStatus>,
}

/// All that `status` tells.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SenderStatus {
    /// Whether a sender runs with this state directory.
    pub running: bool,
    /// Its version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Milliseconds since 1970 when it was asked.
    pub time_ms: i64,
    /// Milliseconds since 1970 when it started.
    pub started_ms: i64,
    /// The link.
    pub link: LinkStatus,
    /// Volumes by name.
    pub volumes: BTreeMap<String, VolumeStatus>,
    /// Memory.
    pub memory: MemoryStatus,
}

/// Where the agent notes how things stand. Clones are the same board.
#[derive(Debug, Clone, Default)]
pub struct Board {
    volumes: Arc<Mutex<BTreeMap<String, VolumeStatus>>>,
    link: Arc<Mutex<LinkStatus>>,
}

impl Board {
    /// Changes what is said of a volume; a new name makes a new one.
    pub fn update(&self, volume: &str, change: impl FnOnce(&mut VolumeStatus)) {
        change(lock(&self.volumes).entry(volume.to_owned()).or_default());
    }

    /// Forgets a volume.
    pub fn remove(&self, volume: &str) {
        lock(&self.volumes).remove(volume);
    }

    /// Changes what is said of the link.
    pub fn update_link(&self, change: impl FnOnce(&mut LinkStatus)) {
        change(&mut lock(&self.link));
    }

    /// The volumes as they stand.
    #[must_use]
    pub fn volumes(&self) -> BTreeMap<String, VolumeStatus> {
        lock(&self.volumes).clone()
    }

    /// The link as it stands.
    #[must_use]
    pub fn link(&self) -> LinkStatus {
        lock(&self.link).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
