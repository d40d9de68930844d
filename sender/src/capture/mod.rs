//! Capture: reading a disk, finding which pages changed, and saying how consistent what was read is.
//!
//! A pass reads the whole disk through [`Disk`], block by block, and compares each page with its known hash ([`scan`]).
//! Before and after, a [`RestProbe`] looks whether anyone could have written meanwhile ([`rest`]). The threads that do it are
//! in `seal_pool`, so that a block is read, hashed and sealed while it is in cache.
//!
//! Promises: the exact bytes of the disk, zero-padded to a whole page; a disk of another size than registered is an error.
//! Never: writes to the disk, stalls a writer, or claims a consistency that it can't prove.

pub mod cut;
pub mod ebpf;
mod error;
pub mod find;
pub mod freeze;
pub mod group;
pub mod hooks;
pub mod live;
pub mod nbd;
pub mod rest;
pub mod scan;
pub mod snapshot;
mod source;

#[cfg(test)]
pub(crate) mod tests;

use common::ids::Geometry;

pub use error::CaptureError;
pub use rest::{Rest, RestProbe};
pub use source::{PageBuffer, Source};

/// A disk that can be read by several threads at once.
pub trait Disk: Send + Sync {
    /// Size and layout.
    fn geometry(&self) -> Geometry;

    /// Fills `buffer` with the bytes from `offset` on; what lies beyond the end of the disk is zeroed. Offset and length are
    /// multiples of a page, and the buffer's address is too.
    ///
    /// # Errors
    /// [`CaptureError::Read`]; [`CaptureError::SizeChanged`] where the disk ends early.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CaptureError>;

    /// Checks that the disk still has its size.
    ///
    /// # Errors
    /// [`CaptureError::SizeChanged`], [`CaptureError::Io`].
    fn check_size(&self) -> Result<(), CaptureError>;

    /// Begins to watch whether the disk rests. Call before the first read of a pass.
    fn watch_rest(&self) -> RestProbe;
}
