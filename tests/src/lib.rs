//! Blockferry's end-to-end tests over real binaries, devices and stores.

pub mod images;
pub mod mounts;
pub mod pair;
