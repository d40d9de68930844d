//! The suite that every capture mode passes: a writer whose writes can be told apart, a log of when each was submitted and
//! when it was known to be complete, and an oracle over what a recovery point holds.
//!
//! The promise under test: if write A completed before write B was submitted, a point holds neither, only A, or both; never
//! B without A. And the last point after the writer rests equals the disk.
//!
//! ```text
//! Writer ─▶ Target (nbd client, file, device) ─▶ … ─▶ point ─▶ restored image ─▶ Oracle
//!    └─────▶ History: number, place, submitted, completed ──────────────────────────┘
//! ```
//!
//! The unit is the sector of 512 bytes, since no disk writes less in one piece: each sector that the writer writes says which
//! write it belongs to and where it lies ([`stamp`]), so that torn, misplaced, stale and too new pages all show.

pub mod drive;
pub mod history;
pub mod oracle;
pub mod stamp;
pub mod target;
pub mod writer;
