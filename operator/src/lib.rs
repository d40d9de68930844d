//! The operator's tool: lists, restores and verifies recovery points from the store alone.
//!
//! Everything that decides what a restore takes is read from the log and the segments' indexes and checked against the signed
//! closes: the checkpoint, which nobody countersigns yet, is not asked (decision 0004).

pub mod cli;
pub mod drill;
pub mod epochs;
pub mod error;
pub mod intact;
pub mod keys;
pub mod lifecycle;
pub mod open;
pub mod point;
pub mod points;
pub mod policy;
pub mod prune;
pub mod restore;
pub mod select;
pub mod serve;
pub mod status;
#[cfg(test)]
mod testing;
pub mod verify;
pub mod volumes;
