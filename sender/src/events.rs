//! Events: what a person wants to know of a sender's volumes, kept for `status` and `events`, logged and counted.
//!
//! Promises: the newest [`EVENTS_MAX`] are kept, in order, with ascending numbers; a text is cut at [`TEXT_BYTES_MAX`].
//! Clones share one ring. Never: waits for anything but a short lock, or keeps contents of disks or keys.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use common::clock::{Clock, UnixMillis};
use serde::{Deserialize, Serialize};

/// Events that are kept; older ones are forgotten (the log has them).
pub const EVENTS_MAX: usize = 1000;
/// Longest text of an event, in bytes.
pub const TEXT_BYTES_MAX: usize = 1024;

/// How much an event matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// A state changed.
    Info,
    /// Something is weaker than asked for; replication goes on.
    Warning,
    /// A person must act.
    Error,
}

impl Severity {
    /// The word in texts.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

macro_rules! event_kinds {
    ($($(#[$doc:meta])* $kind:ident, $word:literal, $severity:ident;)*) => {
        /// What happened.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum EventKind {
            $($(#[$doc])* #[serde(rename = $word)] $kind,)*
        }

        impl EventKind {
            /// All kinds.
            pub const ALL: &[Self] = &[$(Self::$kind,)*];

            /// The word used in texts, JSON and the metric's label.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$kind => $word,)* }
            }

            /// How much it matters.
            #[must_use]
            pub const fn severity(self) -> Severity {
                match self { $(Self::$kind => Severity::$severity,)* }
            }
        }
    };
}

event_kinds! {
    /// The sender runs.
    Started, "started", Info;
    /// The first recovery point, or one that somebody asked for, is committed. Ordinary points are no events.
    PointCommitted, "point-committed", Info;
    /// A point that somebody asked for could not be made.
    PointFailed, "point-failed", Warning;
    /// A point is weaker than what was asked for.
    WeakerPoint, "weaker-point", Warning;
    /// The budget is full: the overload policy acts.
    Overload, "overload", Warning;
    /// What gathered under overload is captured.
    CaughtUp, "caught-up", Info;
    /// A hook failed or took too long.
    HookFailed, "hook-failed", Warning;
    /// A freeze was given up or ran into its limit.
    FreezeFailed, "freeze-failed", Warning;
    /// The disk, or a part of it, is compared with known hashes.
    Verifying, "verifying", Info;
    /// That comparison ended.
    Verified, "verified", Info;
    /// Tracking could not go on where it was: a reboot, another disk, damaged pins. A verification follows.
    TrackingLost, "tracking-lost", Warning;
    /// The volume's disk was found under another name.
    DiskMoved, "disk-moved", Info;
    /// The disk grew: a new incarnation of the volume begins.
    Grown, "grown", Info;
    /// The volume was taken over after a clone, a rollback or on another machine.
    Adopted, "adopted", Warning;
    /// Protection of the volume ended as asked.
    Detached, "detached", Info;
    /// An error stopped this volume; the others go on.
    VolumeStopped, "volume-stopped", Error;
    /// The link to the receiver broke.
    Disconnected, "disconnected", Warning;
    /// There is a link again.
    Reconnected, "reconnected", Info;
    /// Another receiver of the fleet is in use: the one before died, drains, or goes on failing.
    Moved, "moved", Info;
    /// UDP is blocked: records travel over another transport.
    Fallback, "fallback", Warning;
    /// The receiver lost what it had staged; those pages travel again.
    StageLost, "stage-lost", Warning;
    /// An nbd client came or went.
    Client, "client", Info;
    /// The configuration was read again.
    Reloaded, "reloaded", Info;
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Ascending within this run of the sender, from 1.
    pub number: u64,
    /// Milliseconds since 1970.
    pub time_ms: i64,
    /// The volume; empty for what concerns the whole sender.
    pub volume: String,
    /// What happened.
    pub kind: EventKind,
    /// How much it matters.
    pub severity: Severity,
    /// In words, with the next step where one is needed.
    pub text: String,
}

impl Event {
    /// When it happened.
    #[must_use]
    pub const fn time(&self) -> UnixMillis {
        UnixMillis(self.time_ms)
    }
}

impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:7} {} ", self.time(), self.severity.as_str(), self.kind.as_str())?;
        if !self.volume.is_empty() {
            write!(f, "{}: ", self.volume)?;
        }
        f.write_str(&self.text)
    }
}

#[derive(Debug, Default)]
struct Ring {
    last: u64,
    events: VecDeque<Event>,
}

/// The sender's events. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Events {
    clock: Clock,
    ring: Arc<Mutex<Ring>>,
}

impl Events {
    /// None yet; times come from `clock`.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        Self { clock, ring: Arc::default() }
    }

    /// Keeps, logs and counts an event. `volume` is empty for what concerns the whole sender. Callers that may repeat
    /// themselves say a thing once for each change.
    pub fn note(&self, volume: &str, kind: EventKind, text: impl Into<String>) {
        let mut text: String = text.into();
        text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
        let (word, severity) = (kind.as_str(), kind.severity());
        match severity {
            Severity::Info => tracing::info!(volume, event = word, "{text}"),
            Severity::Warning => tracing::warn!(volume, event = word, "{text}"),
            Severity::Error => tracing::error!(volume, event = word, "{text}"),
        }
        metrics::counter!("blockferry_sender_events_total", "kind" => word).increment(1);
        let time_ms = self.clock.now().0;
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.last += 1;
        let event = Event { number: ring.last, time_ms, volume: volume.to_owned(), kind, severity, text };
        if ring.events.len() == EVENTS_MAX {
            ring.events.pop_front();
        }
        ring.events.push_back(event);
    }

    /// The newest `most` events, oldest first.
    #[must_use]
    pub fn recent(&self, most: usize) -> Vec<Event> {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.events.iter().skip(ring.events.len().saturating_sub(most)).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_thousand_are_kept_in_order_by_all_clones() {
        let events = Events::new(Clock::manual(UnixMillis(7)));
        let clone = events.clone();
        for number in 0..EVENTS_MAX + 5 {
            clone.note("root", EventKind::Overload, format!("event {number}"));
        }
        let kept = events.recent(usize::MAX);
        assert_eq!((kept.len(), kept[0].number), (EVENTS_MAX, 6));
        assert!(kept.windows(2).all(|pair| pair[0].number + 1 == pair[1].number));
        let newest = &events.recent(1)[0];
        assert_eq!(
            (newest.text.as_str(), newest.time(), newest.severity),
            ("event 1004", UnixMillis(7), Severity::Warning)
        );
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let events = Events::default();
        events.note("", EventKind::VolumeStopped, "ä".repeat(TEXT_BYTES_MAX));
        assert_eq!(events.recent(1)[0].text.len(), TEXT_BYTES_MAX);
        events.note("", EventKind::VolumeStopped, format!("a{}", "ä".repeat(TEXT_BYTES_MAX)));
        assert_eq!(events.recent(1)[0].text.len(), TEXT_BYTES_MAX - 1);
    }

    #[test]
    fn kinds_have_words_of_their_own_and_read_back() {
        let mut words: Vec<_> = EventKind::ALL.iter().map(|kind| kind.as_str()).collect();
        for kind in EventKind::ALL {
            let text = serde_json::to_string(kind).expect("a word");
            assert_eq!(text, format!("\"{}\"", kind.as_str()));
            assert_eq!(serde_json::from_str::<EventKind>(&text).expect("it reads back"), *kind);
        }
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), EventKind::ALL.len());
    }
}
