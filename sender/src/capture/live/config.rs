//! What a live capture is made with.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::budget::Budget;
use common::clock::Clock;
use common::pages::PageSet;

use crate::capture::freeze::watchdog::WatchdogCommand;
use crate::capture::hooks::Hooks;
use crate::capture::snapshot::Snapshotter;
use crate::events::Events;

/// What is known of the disk when a capture begins.
#[derive(Debug, Clone)]
pub enum Start {
    /// Nothing: all pages are read and sent.
    First,
    /// Hashes, but not what changed since: all pages are read, those that differ are sent.
    Verify,
    /// All but these pages is committed, as after a restart of the sender.
    Pages(PageSet),
}

/// What a live capture works with.
#[derive(Debug, Clone)]
pub struct LiveConfig {
    /// Name of the volume.
    pub name: String,
    /// Its block device.
    pub path: PathBuf,
    /// Time from one point to the next.
    pub point_interval: Duration,
    /// Time from one point with hooks to the next; `None` for only those that somebody asks for.
    pub app_point_interval: Option<Duration>,
    /// Longest freeze.
    pub freeze_limit: Duration,
    /// Hooks that bring an application to rest.
    pub hooks: Option<Hooks>,
    /// Takes snapshots of the disk, where it is one that can be: for points where a freeze is not to be had.
    pub snapshots: Option<Arc<dyn Snapshotter>>,
    /// How the watchdog is started.
    pub watchdog: WatchdogCommand,
    /// Memory of the process.
    pub budget: Budget,
    /// Wall time.
    pub clock: Clock,
    /// Where people look.
    pub events: Events,
    /// What is known of the disk.
    pub start: Start,
}
