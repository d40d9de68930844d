//! Retention: which recovery points a volume keeps, since when by the store's time, and what of its objects goes.
//!
//! ```text
//! v1/volumes/<uuid>/policy      compare-and-swapped: the volume's policy; without one every point is kept
//! v1/probe/time-<random>        there for a moment: what the store says is now
//! ```
//!
//! Promises: deciding is pure and can be shown before it is done; ages are counted in the store's time alone, and clocks that
//! disagree stop expiry with an error; what an offered point needs is never given up. Never: expires a volume's newest point by
//! time alone.

mod collector;
pub mod live;
pub mod points;
pub mod policy;
pub mod policy_object;
mod rewrite;
pub mod store_time;
#[cfg(test)]
mod tests;

pub use collector::{
    COLLECT_MEMORY_BYTES, CollectError, CollectOptions, CollectPlan, CollectRequest, Collected, Collection, DatedPoint,
    collect,
};
