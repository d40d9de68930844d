//! Blockferry's end-to-end tests over real binaries, devices and stores.

#![allow(clippy::panic, clippy::print_stderr, clippy::print_stdout, reason = "a harness of tests fails by panicking")]

pub mod cgroup;
pub mod conformance;
pub mod exported;
pub mod images;
pub mod loops;
pub mod lossy;
pub mod members;
pub mod mounts;
pub mod nbd;
pub mod pair;
pub mod postgres;
pub mod protected;
pub mod servers;
