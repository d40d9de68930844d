//! Blockferry's object store side: stores, fleet state, volume headers, log, checkpoints and segments.
//!
//! [`store`] is the one way to objects, local or in a cloud. Everything else here reads and writes through it.

pub mod fleet;
pub mod retention;
pub mod store;
pub mod volume;
