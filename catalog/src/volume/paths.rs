//! Where a volume's objects lie in the store. PURE.

use common::ids::{LogSeq, MachineId, VolumeId};

/// Folder of all volumes.
pub const VOLUMES: &str = "v1/volumes";
/// Folder of all name claims.
pub const NAMES: &str = "v1/authority/volumes";

/// Folder of a volume.
#[must_use]
pub fn volume(volume: VolumeId) -> String {
    format!("{VOLUMES}/{volume}")
}

/// A volume's header.
#[must_use]
pub fn header(volume: VolumeId) -> String {
    format!("{VOLUMES}/{volume}/header")
}

/// What was proven of a volume's points.
#[must_use]
pub fn proofs(volume: VolumeId) -> String {
    format!("{VOLUMES}/{volume}/proofs")
}

/// What is to become of a volume.
#[must_use]
pub fn lifecycle(volume: VolumeId) -> String {
    format!("{VOLUMES}/{volume}/lifecycle")
}

/// Folder of a volume's log.
#[must_use]
pub fn log_folder(volume: VolumeId) -> String {
    format!("{VOLUMES}/{volume}/log")
}

/// One log entry: twenty decimal digits, so that names sort as numbers do.
#[must_use]
pub fn log_entry(volume: VolumeId, seq: LogSeq) -> String {
    format!("{VOLUMES}/{volume}/log/{:020}", seq.0)
}

/// Folder of a volume's checkpoints.
#[must_use]
pub fn checkpoint_folder(volume: VolumeId) -> String {
    format!("{VOLUMES}/{volume}/checkpoints")
}

/// The checkpoint of a volume's log up to an entry.
#[must_use]
pub fn checkpoint(volume: VolumeId, seq: LogSeq) -> String {
    format!("{VOLUMES}/{volume}/checkpoints/{:020}", seq.0)
}

/// Folder of a volume's segments.
#[must_use]
pub fn segment_folder(volume: VolumeId) -> String {
    format!("{VOLUMES}/{volume}/segments")
}

/// A segment named by a fresh ULID (26 characters).
#[must_use]
pub fn segment(volume: VolumeId, ulid: &str) -> String {
    format!("{VOLUMES}/{volume}/segments/{ulid}")
}

/// Folder of a machine's name claims.
#[must_use]
pub fn name_folder(machine: MachineId) -> String {
    format!("{NAMES}/{machine}")
}

/// The claim of `name` within a machine. A hash, since a name may hold what a path may not.
#[must_use]
pub fn name_claim(machine: MachineId, name: &str) -> String {
    format!("{NAMES}/{machine}/{}", blake3::hash(name.as_bytes()).to_hex())
}

/// The sequence number that a log entry's or a checkpoint's path ends in; `None` for any other path.
#[must_use]
pub fn sequence(path: &str) -> Option<LogSeq> {
    let digits = path.rsplit('/').next()?;
    (digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit()))
        .then(|| digits.parse().ok().map(LogSeq))
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_yields_the_sequence_number_it_was_made_from() {
        let id = VolumeId::from_random([9; 16]);
        for seq in [0, 1, 12_345, u64::MAX] {
            assert_eq!(sequence(&log_entry(id, LogSeq(seq))), Some(LogSeq(seq)));
            assert_eq!(sequence(&checkpoint(id, LogSeq(seq))), Some(LogSeq(seq)));
        }
        assert_eq!(sequence("v1/volumes/x/log/1"), None);
        assert_eq!(sequence(&segment(id, "01ARZ3NDEKTSV4RRFFQ69G5FAV")), None);
        assert_eq!(sequence("99999999999999999999"), None, "over 64 bits");
    }
}
