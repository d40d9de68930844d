//! Which protocol version two peers speak. PURE.
//!
//! Each release names the versions that it speaks, at least its own and the one before, so that a sender and a receiver one
//! version apart work together both ways. Both tell their range; the highest version in both is spoken.
//!
//! History: 1, the first.

use crate::error::{Dispose, Disposition};

/// An inclusive range of protocol versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VersionRange {
    /// Lowest version spoken, at least 1.
    pub min: u32,
    /// Highest version spoken.
    pub max: u32,
}

/// What this build speaks.
pub const OURS: VersionRange = VersionRange { min: 1, max: 1 };

impl std::fmt::Display for VersionRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.min == self.max { write!(f, "{}", self.max) } else { write!(f, "{} to {}", self.min, self.max) }
    }
}

/// Two peers with no version in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VersionError {
    /// The peer's range is empty or starts at nothing.
    #[error("the peer named protocol versions {min} to {max}, which is no range")]
    NoRange {
        /// As received.
        min: u32,
        /// As received.
        max: u32,
    },
    /// Each is a range, but none lies in both.
    #[error("no protocol version in common: this end speaks {ours}, the peer {theirs}; upgrade the {older} first")]
    NoneInCommon {
        /// This build's.
        ours: VersionRange,
        /// The peer's.
        theirs: VersionRange,
        /// Which end is behind, in words.
        older: &'static str,
    },
}

impl Dispose for VersionError {
    fn disposition(&self) -> Disposition {
        Disposition::BadInput
    }
}

/// The highest version in both ranges.
///
/// # Errors
/// [`VersionError`], which names both ranges.
pub fn negotiate(ours: VersionRange, theirs: VersionRange) -> Result<u32, VersionError> {
    if theirs.min == 0 || theirs.min > theirs.max {
        return Err(VersionError::NoRange { min: theirs.min, max: theirs.max });
    }
    let highest = ours.max.min(theirs.max);
    if highest >= ours.min.max(theirs.min) {
        Ok(highest)
    } else {
        let older = if theirs.max < ours.min { "peer" } else { "side that says this" };
        Err(VersionError::NoneInCommon { ours, theirs, older })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(min: u32, max: u32) -> VersionRange {
        VersionRange { min, max }
    }

    #[test]
    fn peers_one_version_apart_speak_the_older_ones_version_both_ways() {
        let (old, new) = (range(1, 2), range(2, 3));
        assert_eq!(negotiate(old, new), Ok(2));
        assert_eq!(negotiate(new, old), Ok(2));
        assert_eq!(negotiate(OURS, range(OURS.max, OURS.max + 1)), Ok(OURS.max));
        assert_eq!(negotiate(range(OURS.max, OURS.max + 1), OURS), Ok(OURS.max));
    }

    #[test]
    fn peers_without_a_common_version_get_an_error_with_both_ranges() {
        let error = negotiate(range(1, 2), range(3, 5)).expect_err("none in common").to_string();
        assert!(error.contains("speaks 1 to 2") && error.contains("the peer 3 to 5"), "{error}");
        assert!(negotiate(range(3, 5), range(1, 2)).is_err());
    }

    #[test]
    fn what_is_no_range_is_refused() {
        assert!(negotiate(OURS, range(0, 0)).is_err());
        assert!(negotiate(OURS, range(2, 1)).is_err());
    }
}
