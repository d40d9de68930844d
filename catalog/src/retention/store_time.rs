//! What time the store says it is: ages are counted from the times that the store gave its objects to the time it gives one
//! just written, so that a machine with a wrong clock expires nothing too early.
//!
//! Promises: a store and a machine that disagree, and a store whose time ran backwards, are errors, and nothing may be expired
//! or deleted then. Leaves nothing behind; what a killed call left is removed by a later one.
//! Never: takes this machine's time for the store's.

use std::time::Duration;

use common::clock::{Clock, UnixMillis};
use common::error::{Dispose, Disposition};
use common::units::DurationText;
use futures::StreamExt as _;

use crate::store::{Store, StoreError};

/// How far store and machine may disagree: clocks that are kept by NTP differ by far less, and against the
/// days of a grace period it is nothing.
pub const CLOCKS_DISAGREE: Duration = Duration::from_secs(600);
/// How far back the store's time may go, in milliseconds: a cloud's servers have their own clocks, and times of whole seconds.
pub const STORE_JITTER_MS: i64 = 5_000;
/// Leftovers of killed calls are removed from this age on, in milliseconds.
const LEFTOVER_MS: i64 = 24 * 3_600_000;
/// Most leftovers looked at in one call.
const LEFTOVERS_MAX: usize = 10_000;

const FOLDER: &str = "v1/probe";
const PREFIX: &str = "time-";

/// Why there is no time to count by.
#[derive(Debug, thiserror::Error)]
pub enum StoreTimeError {
    /// The store failed.
    #[error("asking the store for its time: {0}")]
    Store(#[from] StoreError),
    /// Store and machine are further apart than any two clocks should be.
    #[error(
        "clocks disagree: the store says {store}, this machine {machine}, expected at most {} between them: nothing is expired \
         or deleted; correct the wrong clock (`timedatectl` shows this machine's) and run it again",
        DurationText(*bound)
    )]
    ClockDisagrees {
        /// The store's time.
        store: UnixMillis,
        /// The machine's time.
        machine: UnixMillis,
        /// How much is allowed.
        bound: Duration,
    },
    /// An object known to be older has a later time.
    #[error(
        "the store's time runs backwards: it says {store} now, and wrote an entry at {known} before: nothing is expired or \
         deleted; correct the clock of the store's machine and run it again"
    )]
    RunsBackwards {
        /// The store's time now.
        store: UnixMillis,
        /// The time of something it wrote before.
        known: UnixMillis,
    },
    /// The store does not list what lies there.
    #[error("the store does not list {path}, which it has: nothing is expired or deleted; is its listing consistent?")]
    NotListed {
        /// The object.
        path: String,
    },
    /// No random bytes.
    #[error(transparent)]
    Rng(#[from] common::rng::RngError),
}

impl Dispose for StoreTimeError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Store(error) => error.disposition(),
            Self::ClockDisagrees { .. } | Self::RunsBackwards { .. } => Disposition::BadInput,
            Self::NotListed { .. } | Self::Rng(_) => Disposition::Retry,
        }
    }
}

/// Where the store's time comes from.
#[derive(Debug, Clone)]
pub enum StoreTime {
    /// From the store itself, compared with this clock.
    Asked(Clock),
    /// Said from outside, for simulations: nothing is asked and nothing is compared with a clock.
    Fixed(UnixMillis),
}

impl StoreTime {
    /// The store's time now, not before `known`: the newest time that the store is known to have given anything, if any.
    ///
    /// # Errors
    /// [`StoreTimeError`]: nothing may be expired or deleted then.
    pub async fn now(&self, store: &Store, known: Option<UnixMillis>) -> Result<UnixMillis, StoreTimeError> {
        let now = match self {
            Self::Fixed(now) => *now,
            Self::Asked(clock) => {
                let before = clock.now();
                let found = ask(store).await?;
                compare(found, before, clock.now())?;
                found
            }
        };
        not_before(now, known)
    }
}

/// Checks that the store's time lies within the bound of the machine's times before and after it was asked.
fn compare(store: UnixMillis, before: UnixMillis, after: UnixMillis) -> Result<(), StoreTimeError> {
    // A slow store is no wrong clock: any instant of the asking will do.
    let machine = UnixMillis(store.0.clamp(before.0.min(after.0), after.0.max(before.0)));
    if u128::from(store.0.abs_diff(machine.0)) > CLOCKS_DISAGREE.as_millis() {
        return Err(StoreTimeError::ClockDisagrees { store, machine, bound: CLOCKS_DISAGREE });
    }
    Ok(())
}

fn not_before(store: UnixMillis, known: Option<UnixMillis>) -> Result<UnixMillis, StoreTimeError> {
    match known {
        Some(known) if store.0.saturating_add(STORE_JITTER_MS) < known.0 => {
            Err(StoreTimeError::RunsBackwards { store, known })
        }
        Some(known) => Ok(store.max(known)),
        None => Ok(store),
    }
}

/// Writes an object of a name of its own, reads its time from a listing and removes it.
async fn ask(store: &Store) -> Result<UnixMillis, StoreTimeError> {
    let random = u128::from_le_bytes(common::rng::random()?);
    let path = format!("{FOLDER}/{PREFIX}{random:032x}");
    store.put_new(&path, random.to_le_bytes().to_vec().into()).await?;
    let listed = list(store, &path).await;
    // The object goes in either case; what failed first is what counts.
    let removed = store.delete(&path).await;
    let (now, leftovers) = listed?;
    removed?;
    let now = now.ok_or(StoreTimeError::NotListed { path })?;
    for (leftover, modified) in leftovers {
        if now.0.saturating_sub(modified.0) >= LEFTOVER_MS {
            store.delete(&leftover).await?;
        }
    }
    Ok(now)
}

/// The time of the object at `path`, and what others like it there are.
async fn list(store: &Store, path: &str) -> Result<(Option<UnixMillis>, Vec<(String, UnixMillis)>), StoreTimeError> {
    let own = format!("{FOLDER}/{PREFIX}");
    let (mut now, mut others) = (None, Vec::new());
    let mut listing = store.list_stream(FOLDER)?;
    while let Some(meta) = listing.next().await {
        let meta = meta?;
        if meta.path == path {
            now = Some(meta.modified);
        } else if meta.path.starts_with(&own) && others.len() < LEFTOVERS_MAX {
            others.push((meta.path, meta.modified));
        }
    }
    Ok((now, others))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn world() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(&format!("file://{}/store", dir.path().display())).await.expect("a store");
        (dir, store)
    }

    /// Makes the object at `path` as old as `age` says, for the store.
    fn age(dir: &tempfile::TempDir, path: &str, age: Duration) {
        let file = std::fs::File::open(dir.path().join("store").join(path)).expect("the object");
        let now = file.metadata().and_then(|meta| meta.modified()).expect("a time");
        file.set_modified(now - age).expect("set");
    }

    #[tokio::test]
    async fn the_store_says_when_it_is_and_nothing_stays_behind() {
        let (dir, store) = world().await;
        store.put_new("v1/a", "a".into()).await.expect("written");
        let known = store.list("v1").await.expect("listed")[0].modified;
        let now = StoreTime::Asked(Clock::System).now(&store, Some(known)).await.expect("a time");
        assert!(now >= known);
        store.put_new("v1/b", "b".into()).await.expect("written");
        let later = store.list("v1").await.expect("listed").into_iter().find(|meta| meta.path == "v1/b");
        assert!(now <= later.expect("b").modified);
        assert!(store.list("v1/probe").await.expect("listed").is_empty());
        drop(dir);
    }

    #[tokio::test]
    async fn clocks_that_disagree_by_more_than_the_bound_are_an_error_that_says_both() {
        let (_dir, store) = world().await;
        let now = Clock::System.now();
        for (off, fine) in [(-1_200_000, false), (-300_000, true), (300_000, true), (1_200_000, false)] {
            let machine = UnixMillis(now.0 + off);
            let asked = StoreTime::Asked(Clock::manual(machine)).now(&store, None).await;
            match asked {
                Ok(_) => assert!(fine, "{off} ms"),
                Err(StoreTimeError::ClockDisagrees { machine: found, bound, .. }) => {
                    assert!(!fine && found == machine && bound == CLOCKS_DISAGREE, "{off} ms");
                }
                Err(other) => panic!("{other}"),
            }
        }
        assert!(store.list("v1/probe").await.expect("listed").is_empty());
    }

    #[tokio::test]
    async fn a_store_whose_time_ran_backwards_is_an_error_and_a_jitter_is_none() {
        let (_dir, store) = world().await;
        let fixed = StoreTime::Fixed(UnixMillis(1_000_000));
        let after = |ms| Some(UnixMillis(1_000_000 + ms));
        assert_eq!(fixed.now(&store, None).await.expect("a time"), UnixMillis(1_000_000));
        assert_eq!(fixed.now(&store, after(STORE_JITTER_MS)).await.expect("a time"), UnixMillis(1_005_000));
        let error = fixed.now(&store, after(STORE_JITTER_MS + 1)).await.expect_err("backwards");
        assert!(matches!(error, StoreTimeError::RunsBackwards { known: UnixMillis(1_005_001), .. }), "{error}");
        let asked = StoreTime::Asked(Clock::System);
        let known = UnixMillis(Clock::System.now().0 + 60_000);
        assert!(matches!(asked.now(&store, Some(known)).await, Err(StoreTimeError::RunsBackwards { .. })));
    }

    #[tokio::test]
    async fn what_a_killed_call_left_goes_after_a_day_and_nothing_else_does() {
        let (dir, store) = world().await;
        for name in ["time-old", "time-young", "other"] {
            store.put_new(&format!("v1/probe/{name}"), "x".into()).await.expect("written");
        }
        age(&dir, "v1/probe/time-old", Duration::from_secs(25 * 3_600));
        age(&dir, "v1/probe/time-young", Duration::from_secs(23 * 3_600));
        age(&dir, "v1/probe/other", Duration::from_secs(25 * 3_600));
        StoreTime::Asked(Clock::System).now(&store, None).await.expect("a time");
        let mut left: Vec<String> = store.list("v1/probe").await.expect("listed").into_iter().map(|m| m.path).collect();
        left.sort();
        assert_eq!(left, ["v1/probe/other", "v1/probe/time-young"]);
    }

    #[test]
    fn a_slow_store_is_no_wrong_clock() {
        let minutes = |minutes: i64| UnixMillis(minutes * 60_000);
        compare(minutes(0), minutes(0), minutes(60)).expect("its time lies within the asking");
        compare(minutes(60), minutes(0), minutes(60)).expect("its time lies within the asking");
        compare(minutes(71), minutes(0), minutes(60)).expect_err("eleven minutes off");
    }
}
