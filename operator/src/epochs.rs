//! An epoch's metadata, proven by its close: what the catalog offers, under the name that this crate uses.

pub use catalog::volume::epochs::{EpochError, Placed, gather, load};
