//! Blockferry's receiver, the process server: verifies, stages and forwards sealed records.
//!
//! [`server`] sees all stages and nobody else does: `accept` ─▶ `verify` ─▶ `stage` ─▶ `forward`; [`volumes`] is where a
//! volume's session, stage and commits meet.

pub mod accept;
pub mod cli;
pub mod config;
pub mod control;
pub mod drain;
pub mod fleet_commands;
pub mod forward;
pub mod registry;
pub mod server;
pub mod stage;
mod status;
pub mod verify;
pub mod volumes;

use common::net::version;

/// What `--version` prints after the name.
#[must_use]
pub fn version_text() -> String {
    let formats = [("record", 1), ("close", 1), ("segment", 2), ("log entry", 2), ("volume header", 1)];
    common::ops::cli::version_text(env!("CARGO_PKG_VERSION"), version::OURS.min..=version::OURS.max, &formats)
}
