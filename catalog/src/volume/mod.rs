//! One volume's objects in the store: header, log, checkpoints, segment indexes.
//!
//! ```text
//! v1/authority/volumes/<machine>/<hash of name>   name claim: which volume a machine calls by a name
//! v1/volumes/<uuid>/header                        compare-and-swapped
//! v1/volumes/<uuid>/lifecycle                     compare-and-swapped: active, retired, deleted
//! v1/volumes/<uuid>/log/<20 digits>               create-if-absent, one after the other: the volume's history
//! v1/volumes/<uuid>/checkpoints/<20 digits>       create-if-absent: summary of the log up to that entry
//! v1/volumes/<uuid>/segments/<ulid>               records, immutable
//! v1/volumes/<uuid>/proofs                        compare-and-swapped: what was proven of points, and when
//! ```
//!
//! Promises: what is read is checked (checksum, place, previous digest, parent, signature) before it is believed, and an error
//! names the object; the head is found by reading, listings are hints; of two writers of a log one is told that it lost.
//! Never: holds a data key; deletes anything but volumes that were deleted ([`lifecycle::purge`]).

pub mod checkpoint;
pub mod epochs;
#[cfg(any(test, feature = "fixture"))]
pub mod fixture;
pub mod header;
pub mod history;
pub mod lifecycle;
pub mod log;
pub mod owner;
pub mod paths;
pub mod proofs;
pub mod segment;
#[cfg(test)]
mod tests;
mod writer;

pub use checkpoint::{VolumeView, open_view};
pub use log::{LogError, LogPosition, LogReader, ReadEntry};
pub use writer::{Appended, LogWriter};
