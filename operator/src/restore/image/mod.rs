//! What a restored disk looks like as a file: raw, qcow2 or fixed VHD. PURE.
//!
//! An [`Image`] is planned before the first byte is written, from the pages that hold data. So ranges may be written in any order
//! and by a run that goes on where another stopped: both come to the same places. What is not data (headers, tables, a
//! footer) is written last, when all data is there.
//!
//! Never: allocates while data is written, or says where a page lies that was not planned as data.

#![allow(
    clippy::cast_possible_truncation,
    reason = "positions are within a disk of at most 2^48 bytes, in 64 KiB units"
)]

mod clusters;
mod qcow2;
mod vhd;

use common::clock::UnixMillis;
use common::ids::CloseId;
use common::units::ByteCount;

pub use clusters::ClusterMap;
use qcow2::Qcow2;

/// Formats of a restored disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk's bytes, with holes where it is zero.
    #[default]
    Raw,
    /// QEMU's format, version 3: only clusters with data take space.
    Qcow2,
    /// Fixed VHD, of a size that is a multiple of 1 MiB: what Azure takes.
    Vhd,
}

impl Format {
    /// Its name, as `--format` takes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vhd",
        }
    }

    /// What files of it are usually called.
    #[must_use]
    pub fn extension(self) -> &'static str {
        match self {
            Self::Raw => "img",
            other => other.as_str(),
        }
    }

    /// How the restore's state names it; never changes.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Qcow2 => 1,
            Self::Vhd => 2,
        }
    }

    /// The format with this number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        [Self::Raw, Self::Qcow2, Self::Vhd].into_iter().find(|format| format.number() == number)
    }
}

/// Why a disk can't be had in a format.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ImageError {
    /// The format ends before the disk does.
    #[error("a {} file holds at most {}, the point has {}: restore it with another --format", format.as_str(), ByteCount(*most), ByteCount(*found))]
    TooLarge {
        /// Format.
        format: Format,
        /// Most bytes that it holds.
        most: u64,
        /// Bytes of the disk.
        found: u64,
    },
}

/// A file of a format for one disk.
#[derive(Debug, Clone)]
pub struct Image {
    disk_bytes: u64,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Raw,
    Qcow2(Qcow2),
    Vhd(Box<[u8; vhd::FOOTER_BYTES]>),
}

impl Image {
    /// The file in `format` for a disk of `disk_bytes` bytes whose data lies in the clusters of `data`. The same disk, point and
    /// data give the same file.
    ///
    /// # Errors
    /// [`ImageError::TooLarge`].
    pub fn plan(
        format: Format,
        disk_bytes: u64,
        data: ClusterMap,
        point: CloseId,
        cut_time: UnixMillis,
    ) -> Result<Self, ImageError> {
        let kind = match format {
            Format::Raw => Kind::Raw,
            Format::Qcow2 => Kind::Qcow2(Qcow2::plan(disk_bytes, data)),
            Format::Vhd => {
                let most = vhd::DISK_BYTES_MAX;
                if disk_bytes > most {
                    return Err(ImageError::TooLarge { format, most, found: disk_bytes });
                }
                Kind::Vhd(Box::new(vhd::footer(vhd::rounded(disk_bytes), point, cut_time)))
            }
        };
        Ok(Self { disk_bytes, kind })
    }

    /// Its format.
    #[must_use]
    pub fn format(&self) -> Format {
        match self.kind {
            Kind::Raw => Format::Raw,
            Kind::Qcow2(_) => Format::Qcow2,
            Kind::Vhd(_) => Format::Vhd,
        }
    }

    /// Bytes of the whole file.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        match &self.kind {
            Kind::Raw => self.disk_bytes,
            Kind::Qcow2(image) => image.file_bytes(),
            Kind::Vhd(_) => vhd::rounded(self.disk_bytes) + vhd::FOOTER_BYTES as u64,
        }
    }

    /// Where byte `offset` of the disk lies in the file, and how many of the `len` bytes from there on lie side by side; `None`
    /// for the place where the file keeps nothing of these bytes, because all of them are zero.
    #[must_use]
    pub fn place(&self, offset: u64, len: u64) -> (Option<u64>, u64) {
        match &self.kind {
            Kind::Raw | Kind::Vhd(_) => (Some(offset), len),
            Kind::Qcow2(image) => image.place(offset, len),
        }
    }

    /// All that is not the disk's data: (place in the file, bytes), each of bounded size.
    pub fn metadata(&self) -> Box<dyn Iterator<Item = (u64, Vec<u8>)> + '_> {
        match &self.kind {
            Kind::Raw => Box::new(std::iter::empty()),
            Kind::Qcow2(image) => Box::new(image.metadata()),
            Kind::Vhd(footer) => Box::new(std::iter::once((vhd::rounded(self.disk_bytes), footer.to_vec()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn image(format: Format, disk_bytes: u64, marked: &[u64]) -> Image {
        let mut data = ClusterMap::new(disk_bytes);
        marked.iter().for_each(|cluster| data.mark(*cluster));
        Image::plan(format, disk_bytes, data, CloseId([3; 32]), UnixMillis(1_700_000_000_000)).expect("it fits")
    }

    proptest! {
        #[test]
        fn planned_data_of_any_format_has_places_of_its_own_and_metadata_has_others(
            clusters in 1_u64..3_000,
            marked in proptest::collection::btree_set(0_u64..3_000, 0..200),
        ) {
            let disk = clusters * 65_536 - 777;
            let marked: Vec<u64> = marked.into_iter().filter(|cluster| *cluster < clusters).collect();
            for format in [Format::Raw, Format::Qcow2, Format::Vhd] {
                let image = image(format, disk, &marked);
                let mut used: Vec<(u64, u64)> = Vec::new();
                for cluster in &marked {
                    let (start, len) = (cluster * 65_536, (disk - cluster * 65_536).min(65_536));
                    let (place, side_by_side) = image.place(start, len);
                    prop_assert_eq!(side_by_side, len);
                    used.push((place.expect("planned"), len));
                }
                used.extend(image.metadata().map(|(at, bytes)| (at, bytes.len() as u64)));
                used.sort_unstable();
                for pair in used.windows(2) {
                    prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{format:?}: {pair:?}");
                }
                if let Some((at, len)) = used.last() {
                    prop_assert!(at + len <= image.file_bytes());
                }
            }
        }
    }

    #[test]
    fn only_what_a_vhd_can_hold_is_promised_as_one() {
        let most = vhd::DISK_BYTES_MAX;
        let plan = |bytes| {
            Image::plan(Format::Vhd, bytes, ClusterMap::default(), CloseId::ZERO, UnixMillis(0))
                .map(|image| image.file_bytes())
        };
        assert_eq!(plan(1), Ok((1 << 20) + 512));
        assert_eq!(plan(most), Ok(most + 512));
        let error = plan(most + 1).expect_err("too large").to_string();
        assert!(error.contains("vhd") && error.contains("1.99 TiB"), "{error}");
    }

    #[test]
    fn every_format_has_a_number_of_its_own() {
        for format in [Format::Raw, Format::Qcow2, Format::Vhd] {
            assert_eq!(Format::from_number(format.number()), Some(format));
        }
        assert_eq!(Format::from_number(3), None);
    }
}
