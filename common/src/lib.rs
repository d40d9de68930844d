//! Blockferry's shared core.
//!
//! Pure modules (no sockets, files, wall clock or OS randomness): [`ids`], [`units`], [`limits`], [`error`], [`format`],
//! [`nbd`], [`seal`], [`session`]. Impure rim: [`budget`] (reads cgroups), [`clock`] and [`rng`] (the handles through which time and
//! chance enter), [`net`] (QUIC, TLS identity, generated gRPC types) and [`ops`] (logs, metrics endpoint, exit codes).
//! `tests/tidy.rs` keeps the line, and so does a build without the feature `rim`, which leaves out `budget`, `net` and `ops`
//! with all they depend on.

#[cfg(feature = "rim")]
pub mod budget;
pub mod clock;
pub mod error;
pub mod format;
pub mod ids;
pub mod limits;
pub mod nbd;
#[cfg(feature = "rim")]
pub mod net;
#[cfg(feature = "rim")]
pub mod ops;
pub mod pages;
pub mod rng;
pub mod seal;
pub mod session;
pub mod units;
