//! Blockferry's sender: captures a disk's changes, seals them and streams them to a receiver.
//!
//! [`agent`] sees all stages and nobody else does: `capture` ─▶ `epoch` ─▶ seal ─▶ `send`; [`state`] is what survives.

pub mod agent;
pub mod capture;
pub mod cli;
pub mod config;
pub mod control;
pub mod epoch;
pub mod events;
pub mod register;
pub mod seal_pool;
pub mod send;
pub mod spec;
pub mod state;

use common::net::version;

/// What `--version` prints after the name.
#[must_use]
pub fn version_text() -> String {
    let formats = [("record", 1), ("close", 1), ("volume header", 1), ("sender state", 1)];
    common::ops::cli::version_text(env!("CARGO_PKG_VERSION"), version::OURS.min..=version::OURS.max, &formats)
}
