//! The memory budget of a process: how much memory there really is, and byte permits that bound every payload in flight.
//!
//! Promises: permits held never exceed the payload share of the budget; waiting requests are served first come, first
//! served, so that a large one is not starved by small ones; a request that could never be served is an error at once, not a
//! hang; everything comes back when permits are dropped, also where a waiting request is cancelled.
//! Never: allocates memory itself. A permit is the right to hold so many bytes; it travels with them and is dropped with
//! them.

use crate::error::{Dispose, Disposition};
use crate::limits;
use crate::units::{BudgetSpec, ByteCount};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{oneshot, watch};

/// Why memory could not be budgeted or charged.
#[derive(Debug, thiserror::Error)]
pub enum BudgetError {
    /// The budget asked for, or the share of this machine's memory, is too small to work with.
    #[error(
        "memory budget {spec} is {found} of {effective} effective memory, the minimum is {minimum}: \
         pass --memory-budget {flag} or more", flag = .minimum.exact()
    )]
    BelowMinimum {
        /// The budget as asked for.
        spec: BudgetSpec,
        /// What it comes to.
        found: ByteCount,
        /// Effective memory.
        effective: ByteCount,
        /// [`limits::MEMORY_BUDGET_BYTES_MIN`].
        minimum: ByteCount,
    },
    /// The budget asked for is more than there is.
    #[error("memory budget {spec} is more than the effective memory of {effective}: pass a smaller --memory-budget")]
    AboveEffective {
        /// The budget as asked for.
        spec: BudgetSpec,
        /// Effective memory.
        effective: ByteCount,
    },
    /// The fixed parts leave nothing for payload.
    #[error("the memory budget of {total} is used up by its fixed parts ({fixed}): pass a larger --memory-budget")]
    NoPayload {
        /// The whole budget.
        total: ByteCount,
        /// Sum of the fixed parts.
        fixed: ByteCount,
    },
    /// One request is for more than could ever be free.
    #[error(
        "{asked} were asked for at once and the memory budget has {total} for payload: pass a larger --memory-budget"
    )]
    LargerThanTotal {
        /// Bytes asked for.
        asked: ByteCount,
        /// Bytes for payload.
        total: ByteCount,
    },
    /// The kernel's account of memory could not be read.
    #[error("cannot read the size of this machine's memory from {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Dispose for BudgetError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::BelowMinimum { .. } | Self::AboveEffective { .. } | Self::NoPayload { .. } => Disposition::BadInput,
            Self::LargerThanTotal { .. } => Disposition::Bug,
            Self::Unreadable { .. } => Disposition::Retry,
        }
    }
}

/// How much memory this process can really have, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EffectiveMemory {
    /// The smaller of the host's memory and every limit of the cgroups that this process is in.
    pub bytes: ByteCount,
    /// The host's memory.
    pub host: ByteCount,
    /// The file that holds the smallest cgroup limit, if one is below the host's memory.
    pub limited_by: Option<PathBuf>,
}

/// Effective memory of this process.
///
/// # Errors
/// [`BudgetError::Unreadable`] where `/proc/meminfo` is missing or makes no sense.
pub fn effective_memory() -> Result<EffectiveMemory, BudgetError> {
    effective_memory_under(Path::new("/"))
}

/// Like [`effective_memory`], with `/proc` and `/sys` looked up under `root`.
///
/// Limits are read of the process's own cgroup and of all its ancestors, version 2 (`memory.max`) and version 1
/// (`memory.limit_in_bytes`). Missing mounts and files are no limit.
///
/// # Errors
/// [`BudgetError::Unreadable`] where `proc/meminfo` is missing or makes no sense.
pub fn effective_memory_under(root: &Path) -> Result<EffectiveMemory, BudgetError> {
    let path = root.join("proc/meminfo");
    let unreadable = |source| BudgetError::Unreadable { path: path.clone(), source };
    let meminfo = std::fs::read_to_string(&path).map_err(unreadable)?;
    let host = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .and_then(|kib| kib.checked_mul(1024))
        .ok_or_else(|| unreadable(io::Error::new(io::ErrorKind::InvalidData, "it has no line MemTotal")))?;
    let limit = limit_files(root).into_iter().filter_map(|file| Some((read_limit(&file)?, file))).min();
    let limit = limit.filter(|(bytes, _)| *bytes < host);
    let (bytes, limited_by) = limit.map_or((host, None), |(bytes, file)| (bytes, Some(file)));
    Ok(EffectiveMemory { bytes: ByteCount(bytes), host: ByteCount(host), limited_by })
}

/// A limit in bytes; `None` for `max`, a missing file, or anything else that is no number.
fn read_limit(file: &Path) -> Option<u64> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// Every file that may hold a memory limit of this process: its own cgroups' and their ancestors'.
fn limit_files(root: &Path) -> Vec<PathBuf> {
    let memberships = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mountinfo = std::fs::read_to_string(root.join("proc/self/mountinfo")).unwrap_or_default();
    let mut files = Vec::new();
    for line in memberships.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(number), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let (mounts, file) = if number == "0" && controllers.is_empty() {
            (mounts_of(&mountinfo, "cgroup2", None, &["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]), "memory.max")
        } else if controllers.split(',').any(|name| name == "memory") {
            (mounts_of(&mountinfo, "cgroup", Some("memory"), &["/sys/fs/cgroup/memory"]), "memory.limit_in_bytes")
        } else {
            continue;
        };
        for (mount_root, mount_point) in mounts {
            // Inside a container the mount may show only a part of the tree, while the path may be the host's.
            let path = Path::new(path);
            let below = path.strip_prefix(&mount_root).unwrap_or(path);
            let mut folder = root.join(mount_point.strip_prefix("/").unwrap_or(&mount_point));
            files.push(folder.join(file));
            // "/.." stands for a cgroup outside of the namespace, which can't be seen from here.
            for name in below.components().filter_map(|part| match part {
                Component::Normal(name) => Some(name),
                _ => None,
            }) {
                folder.push(name);
                files.push(folder.join(file));
            }
        }
    }
    files
}

/// Root and mount point of each mounted cgroup hierarchy of one kind; the usual places where none is listed.
fn mounts_of(mountinfo: &str, kind: &str, option: Option<&str>, usual: &[&str]) -> Vec<(PathBuf, PathBuf)> {
    let found: Vec<_> = mountinfo
        .lines()
        .filter_map(|line| {
            // proc(5): id parent major:minor root mount-point options [tags] - type source super-options
            let (left, right) = line.split_once(" - ")?;
            let (mut left, mut right) = (left.split(' ').skip(3), right.split(' '));
            let (mount_root, mount_point) = (left.next()?, left.next()?);
            let (mount_kind, _source, options) = (right.next()?, right.next()?, right.next()?);
            let matches =
                mount_kind == kind && option.is_none_or(|wanted| options.split(',').any(|found| found == wanted));
            matches.then(|| (PathBuf::from(mount_root), PathBuf::from(mount_point)))
        })
        .collect();
    if found.is_empty() {
        usual.iter().map(|place| (PathBuf::from("/"), PathBuf::from(place))).collect()
    } else {
        found
    }
}

/// The budget in bytes that `spec` comes to on a machine with `effective` memory.
///
/// # Errors
/// [`BudgetError::BelowMinimum`] and [`BudgetError::AboveEffective`]; both name `--memory-budget`.
pub fn resolve(spec: BudgetSpec, effective: &EffectiveMemory) -> Result<ByteCount, BudgetError> {
    let effective = effective.bytes;
    let bytes = match spec {
        BudgetSpec::Percent(percent) => {
            ByteCount(u64::try_from(u128::from(effective.0) * u128::from(percent) / 100).unwrap_or(u64::MAX))
        }
        BudgetSpec::Bytes(bytes) => bytes,
    };
    let minimum = ByteCount(limits::MEMORY_BUDGET_BYTES_MIN);
    if bytes < minimum {
        return Err(BudgetError::BelowMinimum { spec, found: bytes, effective, minimum });
    }
    if bytes > effective {
        return Err(BudgetError::AboveEffective { spec, effective });
    }
    Ok(bytes)
}

/// One named, fixed share of the budget: buffers, windows, contexts or caches sized at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryPart {
    /// What it is for, for people: `quic windows`.
    pub name: &'static str,
    /// Its most bytes.
    pub bytes: u64,
}

/// The budget's shares, as shown at start and by `config check`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryTable {
    total: u64,
    parts: Vec<MemoryPart>,
}

impl MemoryTable {
    /// A table of a whole budget with no fixed part yet.
    #[must_use]
    pub fn new(total_bytes: u64) -> Self {
        Self { total: total_bytes, parts: Vec::new() }
    }

    /// Sets `bytes` aside under `name`.
    #[must_use]
    pub fn with(mut self, name: &'static str, bytes: u64) -> Self {
        self.parts.push(MemoryPart { name, bytes });
        self
    }

    /// The whole budget in bytes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The fixed parts.
    #[must_use]
    pub fn parts(&self) -> &[MemoryPart] {
        &self.parts
    }

    /// Sum of the fixed parts in bytes.
    #[must_use]
    pub fn fixed(&self) -> u64 {
        self.parts.iter().fold(0, |sum, part| sum.saturating_add(part.bytes))
    }

    /// What the fixed parts leave for payload, in bytes.
    #[must_use]
    pub fn payload(&self) -> u64 {
        self.total.saturating_sub(self.fixed())
    }
}

impl fmt::Display for MemoryTable {
    /// One line for each part, then payload and total, without a newline at the end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in &self.parts {
            writeln!(f, "{:<28}{:>12}", part.name, ByteCount(part.bytes))?;
        }
        writeln!(f, "{:<28}{:>12}", "payload", ByteCount(self.payload()))?;
        write!(f, "{:<28}{:>12}", "memory budget", ByteCount(self.total))
    }
}

/// A request that waits for its turn.
struct Waiter {
    ticket: u64,
    bytes: u64,
    reply: oneshot::Sender<Permit>,
}

struct State {
    used: u64,
    peak: u64,
    next_ticket: u64,
    waiters: VecDeque<Waiter>,
}

struct Shared {
    table: MemoryTable,
    payload: u64,
    state: Mutex<State>,
    /// True from three quarters of the payload share on.
    pressed: watch::Sender<bool>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock can panic half-way, so the numbers hold even if poisoned.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells listeners if the threshold was crossed; called with the lock held, so that the last word is the true one.
    fn signal(&self, state: &State) {
        let pressed = state.used >= self.threshold();
        self.pressed.send_if_modified(|told| std::mem::replace(told, pressed) != pressed);
    }

    fn threshold(&self) -> u64 {
        self.payload - self.payload / 4
    }

    fn charge(self: &Arc<Self>, state: &mut State, bytes: u64) -> Permit {
        state.used += bytes;
        state.peak = state.peak.max(state.used);
        Permit { shared: Arc::clone(self), bytes }
    }

    fn release(self: &Arc<Self>, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let mut state = self.lock();
        state.used -= bytes;
        self.serve(state);
    }

    /// Serves waiters from the front as far as bytes are free, and gives the lock back.
    fn serve(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        let mut granted = Vec::new();
        while state.waiters.front().is_some_and(|next| next.bytes <= self.payload - state.used) {
            let Some(waiter) = state.waiters.pop_front() else { break };
            let permit = self.charge(&mut state, waiter.bytes);
            granted.push((waiter.reply, permit));
        }
        self.signal(&state);
        drop(state);
        for (reply, permit) in granted {
            // A waiter that has gone away gives its permit back here, which serves the next.
            drop(reply.send(permit));
        }
    }
}

/// The byte budget of a process; clones share it.
#[derive(Clone)]
pub struct Budget {
    shared: Arc<Shared>,
}

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Budget({} of {} bytes)", self.used(), self.payload())
    }
}

impl Budget {
    /// A budget of `table.total()` bytes whose fixed parts are set aside; the rest is handed out as permits.
    ///
    /// # Errors
    /// [`BudgetError::NoPayload`] where the parts leave nothing.
    pub fn new(table: MemoryTable) -> Result<Self, BudgetError> {
        let payload = table.payload();
        if payload == 0 {
            return Err(BudgetError::NoPayload { total: ByteCount(table.total), fixed: ByteCount(table.fixed()) });
        }
        let state = Mutex::new(State { used: 0, peak: 0, next_ticket: 0, waiters: VecDeque::new() });
        Ok(Self { shared: Arc::new(Shared { table, payload, state, pressed: watch::Sender::new(false) }) })
    }

    /// The whole budget and its fixed parts.
    #[must_use]
    pub fn table(&self) -> &MemoryTable {
        &self.shared.table
    }

    /// The whole budget of the process in bytes, fixed parts and payload together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.shared.table.total
    }

    /// Bytes that permits may hold together.
    #[must_use]
    pub fn payload(&self) -> u64 {
        self.shared.payload
    }

    /// Bytes that permits hold now.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.shared.lock().used
    }

    /// Most bytes that permits held at one time so far.
    #[must_use]
    pub fn peak(&self) -> u64 {
        self.shared.lock().peak
    }

    /// How hard the budget is pressed: 0 below three quarters of the payload share, rising evenly to 1000 where it is used
    /// up or somebody waits. A pipeline slows down in proportion.
    #[must_use]
    pub fn pressure_permille(&self) -> u32 {
        let state = self.shared.lock();
        if !state.waiters.is_empty() {
            return 1000;
        }
        let threshold = self.shared.threshold();
        let (over, span) = (state.used.saturating_sub(threshold), self.shared.payload - threshold);
        if span == 0 {
            return 0;
        }
        u32::try_from(u128::from(over) * 1000 / u128::from(span)).unwrap_or(1000)
    }

    /// True while permits hold three quarters of the payload share or more; changes wake the listener.
    #[must_use]
    pub fn pressed(&self) -> watch::Receiver<bool> {
        self.shared.pressed.subscribe()
    }

    /// Waits for its turn and for `bytes` to be free. Cancel safe: a cancelled request leaves the queue.
    ///
    /// # Errors
    /// [`BudgetError::LargerThanTotal`] at once, where it could never be served.
    pub async fn acquire(&self, bytes: u64) -> Result<Permit, BudgetError> {
        let (ticket, reply) = match self.enter(bytes)? {
            Entered::Served(permit) => return Ok(permit),
            Entered::Waiting(ticket, reply) => (ticket, reply),
        };
        let mut place = Place { shared: Arc::clone(&self.shared), ticket: Some(ticket) };
        let permit = reply.await;
        place.ticket = None;
        permit.map_err(|_| self.larger(bytes))
    }

    /// Like [`Budget::acquire`], for threads outside the async runtime.
    ///
    /// # Errors
    /// [`BudgetError::LargerThanTotal`] at once, where it could never be served.
    pub fn acquire_blocking(&self, bytes: u64) -> Result<Permit, BudgetError> {
        match self.enter(bytes)? {
            Entered::Served(permit) => Ok(permit),
            Entered::Waiting(_, reply) => reply.blocking_recv().map_err(|_| self.larger(bytes)),
        }
    }

    /// A permit if it can be had now, without overtaking anyone who waits.
    #[must_use]
    pub fn try_acquire(&self, bytes: u64) -> Option<Permit> {
        let mut state = self.shared.lock();
        if !state.waiters.is_empty() || bytes > self.shared.payload - state.used {
            return None;
        }
        let permit = self.shared.charge(&mut state, bytes);
        self.shared.signal(&state);
        Some(permit)
    }

    fn larger(&self, bytes: u64) -> BudgetError {
        BudgetError::LargerThanTotal { asked: ByteCount(bytes), total: ByteCount(self.shared.payload) }
    }

    fn enter(&self, bytes: u64) -> Result<Entered, BudgetError> {
        if bytes > self.shared.payload {
            return Err(self.larger(bytes));
        }
        let mut state = self.shared.lock();
        if state.waiters.is_empty() && bytes <= self.shared.payload - state.used {
            let permit = self.shared.charge(&mut state, bytes);
            self.shared.signal(&state);
            return Ok(Entered::Served(permit));
        }
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        let (reply, answer) = oneshot::channel();
        state.waiters.push_back(Waiter { ticket, bytes, reply });
        Ok(Entered::Waiting(ticket, answer))
    }
}

enum Entered {
    Served(Permit),
    Waiting(u64, oneshot::Receiver<Permit>),
}

/// A place in the queue; leaving it lets those behind move up.
struct Place {
    shared: Arc<Shared>,
    ticket: Option<u64>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let mut state = self.shared.lock();
        state.waiters.retain(|waiter| waiter.ticket != ticket);
        self.shared.serve(state);
    }
}

/// The right to hold some bytes of payload; given back when dropped.
#[must_use = "a permit that is dropped is given back at once"]
pub struct Permit {
    shared: Arc<Shared>,
    bytes: u64,
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Permit({} bytes)", self.bytes)
    }
}

impl Permit {
    /// The bytes it stands for.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes `bytes` (at most all) out into a permit of their own.
    pub fn split(&mut self, bytes: u64) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Self { shared: Arc::clone(&self.shared), bytes }
    }

    /// Joins another permit of the same budget to this one. One of another budget is given back to that budget unchanged, as
    /// an error.
    ///
    /// # Errors
    /// The other permit, where it is of another budget.
    pub fn merge(&mut self, mut other: Self) -> Result<(), Self> {
        if !Arc::ptr_eq(&self.shared, &other.shared) {
            return Err(other);
        }
        self.bytes += std::mem::take(&mut other.bytes);
        Ok(())
    }

    /// Gives back all but `bytes`; no effect where it holds fewer.
    pub fn shrink(&mut self, bytes: u64) {
        let surplus = self.bytes.saturating_sub(bytes);
        self.bytes -= surplus;
        self.shared.release(surplus);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.shared.release(self.bytes);
    }
}

#[cfg(test)]
mod tests;
