//! Blockferry's benches: parts by criterion, the whole path beside its peers.

pub mod pages;
