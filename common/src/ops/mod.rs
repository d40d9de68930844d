//! What every binary needs to be operated: exit codes, logs, metrics endpoint, orderly end, progress, shared flags.
//!
//! Impure rim. Everything written for people goes to standard error; standard output belongs to the facts that were asked for.

pub mod allocator;
pub mod cli;
pub mod config;
pub mod exit;
pub mod http;
pub mod logging;
pub mod panic_guard;
pub mod process_metrics;
pub mod progress;
pub mod shutdown;
