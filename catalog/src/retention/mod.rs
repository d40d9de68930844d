//! Retention: which recovery points a volume keeps, and since when by the store's time.
//!
//! ```text
//! v1/volumes/<uuid>/policy      compare-and-swapped: the volume's policy; without one every point is kept
//! v1/probe/time-<random>        there for a moment: what the store says is now
//! ```
//!
//! Promises: deciding is pure and can be shown before it is done; ages are counted in the store's time alone, and clocks that
//! disagree stop expiry with an error. Never: expires a volume's newest point by time alone.

pub mod points;
pub mod policy;
pub mod policy_object;
pub mod store_time;
