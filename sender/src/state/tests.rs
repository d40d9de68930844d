#![expect(clippy::cast_possible_truncation, reason = "the numbers of these tests are small")]

use std::fs;

use common::format::FormatError;
use common::format::state::{HASH_ENTRY_BYTES, HashEntry, PageHash, UNKNOWN_HASH, ZERO_PAGE_HASH};
use common::ids::{BlockIndex, FleetId, Incarnation, KeyId, PageMask};
use common::limits;
use proptest::prelude::*;

use super::*;

const BLOCKS: u64 = 40;

fn identity() -> VolumeIdentity {
    VolumeIdentity {
        fleet: FleetId([1; 16]),
        volume: VolumeId([2; 16]),
        incarnation: Incarnation(1),
        key_id: KeyId(1),
        disk_bytes: BLOCKS * limits::BLOCK_BYTES as u64 - 5,
        sector_bytes: 512,
        name: "root".to_owned(),
        source_path: b"/disk".to_vec(),
        source: SourceIdentity::File { device: 1, inode: 2 },
        hash_key: [3; 32],
    }
}

fn close_id(epoch: u64) -> CloseId {
    let mut id = [0xc1; 32];
    id[..8].copy_from_slice(&epoch.to_le_bytes());
    CloseId(id)
}

fn fresh() -> (tempfile::TempDir, StateDir, VolumeState) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let state = StateDir::open(directory.path()).expect("a fresh directory");
    let volume = VolumeState::create(&state, &identity(), ClosedEpoch::default()).expect("nothing there yet");
    (directory, state, volume)
}

fn pages(block: u64, mask: u64, hash: u8) -> HashChange {
    let mask = PageMask(mask);
    HashChange::Pages { block: BlockIndex(block), mask, hashes: vec![[hash; 16]; mask.count() as usize] }
}

fn close_epoch(volume: &mut VolumeState, epoch: u64, changes: &[HashChange]) -> CloseId {
    let mut journal = volume.begin_journal(Epoch(epoch)).expect("a new epoch");
    changes.iter().for_each(|change| journal.append(change.clone()).expect("room"));
    let (close, parent) = (close_id(epoch), volume.newest().close);
    volume.journal_close(journal, close, parent, None).expect("room");
    close
}

fn all_hashes(volume: &VolumeState) -> Vec<HashEntry> {
    let (reader, mut entries, mut chunk) = (volume.hashes.reader(), Vec::new(), Vec::new());
    for first in (0..BLOCKS).step_by(7) {
        reader.read(BlockIndex(first), 7, &mut chunk).expect("readable");
        entries.append(&mut chunk);
    }
    entries
}

/// What the hashes should be, kept in memory.
#[derive(Debug, Clone)]
struct Model(Vec<HashEntry>);

impl Model {
    fn new() -> Self {
        Self(vec![HashEntry::UNKNOWN; BLOCKS as usize])
    }

    fn apply(&mut self, change: &HashChange) {
        match change {
            HashChange::Pages { block, mask, hashes } => {
                for (page, hash) in mask.iter().zip(hashes) {
                    self.0[block.0 as usize].0[page as usize] = *hash;
                }
            }
            HashChange::ZeroBlocks { first, count } => {
                self.0[first.0 as usize..][..*count as usize].fill(HashEntry::ZERO);
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    /// An epoch is journaled and closed.
    Close(Vec<HashChange>),
    /// The oldest of the journaled closes, up to this one, are committed.
    Commit(usize),
    /// As above, and the power fails after some sectors of the hashes were written: a bit each, by turns.
    CommitCut(usize, u64),
    /// All after the first few journaled closes are discarded.
    Discard(usize),
    /// The power fails while an epoch is open; this much of its journal got to the disk.
    Crash(Vec<HashChange>, prop::sample::Index),
}

fn any_change() -> impl Strategy<Value = HashChange> {
    prop_oneof![
        4 => (0..BLOCKS, 1..=u64::MAX, 1_u8..=255).prop_map(|(block, mask, hash)| pages(block, mask, hash)),
        1 => (0..BLOCKS, 1..=BLOCKS).prop_map(|(first, count)| HashChange::ZeroBlocks {
            first: BlockIndex(first),
            count: count.min(BLOCKS - first) as u32,
        }),
    ]
}

fn any_step() -> impl Strategy<Value = Step> {
    let changes = || prop::collection::vec(any_change(), 0..200);
    prop_oneof![
        4 => changes().prop_map(Step::Close),
        2 => (0_usize..4).prop_map(Step::Commit),
        2 => (0_usize..4, any::<u64>()).prop_map(|(count, sectors)| Step::CommitCut(count, sectors)),
        1 => (0_usize..3).prop_map(Step::Discard),
        2 => (changes(), any::<prop::sample::Index>()).prop_map(|(changes, at)| Step::Crash(changes, at)),
    ]
}

fn reopen(path: &Path, old: (StateDir, VolumeState)) -> (StateDir, VolumeState) {
    drop(old);
    let state = StateDir::open(path).expect("released");
    let volume = VolumeState::open(&state, identity().volume).expect("whole");
    (state, volume)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever happens in between, the hashes are those of the committed epochs; after a power cut in the middle of a commit
    /// they may be unknown, never wrong.
    #[test]
    fn hashes_are_always_those_of_the_committed_epochs(steps in prop::collection::vec(any_step(), 1..20)) {
        let (directory, state, volume) = fresh();
        let path = directory.path();
        let (mut state, mut volume) = (state, volume);
        let mut model = Model::new();
        let mut torn = false;
        let mut journaled: Vec<(ClosedEpoch, Vec<HashChange>)> = Vec::new();
        let mut known = ClosedEpoch::default();
        let mut next = 1;
        for step in steps {
            match step {
                Step::Close(changes) => {
                    let close = close_epoch(&mut volume, next, &changes);
                    journaled.push((ClosedEpoch { epoch: Epoch(next), close }, changes));
                    next += 2; // numbers may be left out
                }
                Step::Commit(count) if !journaled.is_empty() => {
                    let count = count.min(journaled.len() - 1) + 1;
                    known = journaled[count - 1].0;
                    prop_assert_eq!(volume.commit_through(known.close).expect("journaled").len(), count);
                    journaled.drain(..count).flat_map(|(_, changes)| changes).for_each(|change| model.apply(&change));
                }
                Step::CommitCut(count, sectors) if !journaled.is_empty() => {
                    let count = count.min(journaled.len() - 1) + 1;
                    let hashes = volume.directory.join("hashes");
                    let before = fs::read(&hashes).expect("readable");
                    let journals: Vec<_> = journaled[..count]
                        .iter()
                        .map(|(closed, _)| fs::read(journal::closed_path(&volume.journal, closed.epoch)).expect("there"))
                        .collect();
                    known = journaled[count - 1].0;
                    volume.commit_through(known.close).expect("journaled");
                    let mut cut = before;
                    let after = fs::read(&hashes).expect("readable");
                    // The header is written only once the rest is durable: it is as it was.
                    let start = HashEntry::offset(BlockIndex(0)) as usize;
                    let (sectors_cut, sectors_after) = (cut[start..].chunks_mut(512), after[start..].chunks(512));
                    for (index, (cut, after)) in sectors_cut.zip(sectors_after).enumerate() {
                        if sectors >> (index % 64) & 1 == 1 {
                            cut.copy_from_slice(after);
                        }
                    }
                    fs::write(&hashes, cut).expect("writable");
                    for (index, ((closed, _), bytes)) in journaled.iter().zip(journals).enumerate() {
                        // Of the renames only the last need have got to the disk.
                        let renamed = index + 1 == count || sectors >> (index % 64) & 1 == 1;
                        let path = if renamed { journal::committed_path } else { journal::closed_path };
                        fs::write(path(&volume.journal, closed.epoch), bytes).expect("writable");
                    }
                    torn = true;
                    (state, volume) = reopen(path, (state, volume));
                    let mut redone = Model::new();
                    for change in journaled.drain(..count).flat_map(|(_, changes)| changes) {
                        model.apply(&change);
                        redone.apply(&change);
                    }
                    for (block, entry) in all_hashes(&volume).iter().enumerate() {
                        let pages = (0..64).filter(|page| redone.0[block].0[*page] != UNKNOWN_HASH);
                        pages.for_each(|page| assert_eq!(entry.0[page], redone.0[block].0[page], "done again"));
                    }
                }
                Step::Discard(keep) => {
                    let keep = keep.min(journaled.len());
                    let tip = keep.checked_sub(1).map_or(known, |last| journaled[last].0);
                    prop_assert_eq!(volume.discard_after(tip.close).expect("known"), journaled.len() - keep);
                    journaled.truncate(keep);
                }
                Step::Crash(changes, at) => {
                    let mut journal = volume.begin_journal(Epoch(next)).expect("new");
                    changes.into_iter().for_each(|change| journal.append(change).expect("room"));
                    let open = volume.journal.join(format!("{next:020}.open"));
                    let mut bytes = fs::read(&open).expect("written");
                    bytes.truncate(at.index(bytes.len() + 1));
                    drop(journal);
                    fs::write(&open, bytes).expect("writable");
                    (state, volume) = reopen(path, (state, volume));
                    prop_assert!(!open.exists(), "the journal of an open epoch does not stay");
                }
                Step::Commit(_) | Step::CommitCut(..) => {}
            }
            prop_assert_eq!(volume.known(), known);
            prop_assert_eq!(volume.journaled(), journaled.iter().map(|(closed, _)| *closed).collect::<Vec<_>>());
            prop_assert_eq!(volume.begin_pass().is_ok(), journaled.is_empty());
        }
        // Commit the rest: what a cut left half-applied is done again.
        if let Some((last, _)) = journaled.last() {
            volume.commit_through(last.close).expect("journaled");
        }
        journaled.iter().flat_map(|(_, changes)| changes).for_each(|change| model.apply(change));
        let found = all_hashes(&volume);
        if !torn {
            prop_assert_eq!(&found, &model.0);
        }
        for (block, entry) in found.iter().enumerate() {
            for (page, hash) in entry.0.iter().enumerate() {
                let expected: PageHash = model.0[block].0[page];
                prop_assert!(*hash == expected || (torn && *hash == UNKNOWN_HASH),
                    "block {block} page {page}: {hash:?}, expected {expected:?}");
            }
        }
        drop((state, volume));
    }
}

#[test]
fn nothing_is_known_of_a_new_volume_and_what_is_committed_survives_a_restart() {
    let (directory, state, mut volume) = fresh();
    assert!(all_hashes(&volume).iter().all(|entry| *entry == HashEntry::UNKNOWN));
    assert_eq!((volume.known(), volume.next_epoch()), (ClosedEpoch::default(), Epoch(1)));
    let close =
        close_epoch(&mut volume, 1, &[pages(3, 0b11, 7), HashChange::ZeroBlocks { first: BlockIndex(4), count: 3 }]);
    assert!(all_hashes(&volume).iter().all(|entry| *entry == HashEntry::UNKNOWN), "not committed yet");
    volume.commit_through(close).expect("journaled");
    let (state, volume) = reopen(directory.path(), (state, volume));
    assert_eq!(state.volumes().expect("readable"), [identity().volume]);
    assert_eq!(volume.identity(), &identity());
    let hashes = all_hashes(&volume);
    assert_eq!(hashes[3].0[..3], [[7; 16], [7; 16], UNKNOWN_HASH]);
    assert!(hashes[4..7].iter().all(|entry| entry.0 == [ZERO_PAGE_HASH; 64]));
    assert_eq!(hashes[7], HashEntry::UNKNOWN);
    assert_eq!((volume.known(), volume.next_epoch()), (ClosedEpoch { epoch: Epoch(1), close }, Epoch(2)));
    assert_eq!(fs::read_dir(&volume.journal).expect("readable").count(), 0, "the journal is trimmed");
}

#[test]
fn a_close_applied_just_before_a_crash_is_not_listed_again() {
    let (directory, state, mut volume) = fresh();
    let close = close_epoch(&mut volume, 1, &[pages(0, 1, 7)]);
    let journal = journal::closed_path(&volume.journal, Epoch(1));
    let bytes = fs::read(&journal).expect("written");
    volume.commit_through(close).expect("journaled");
    fs::write(&journal, bytes).expect("as if its removal had not got to the disk");
    let (_state, volume) = reopen(directory.path(), (state, volume));
    assert_eq!(volume.journaled(), []);
    assert!(!journal.exists());
}

#[test]
fn a_close_that_was_committed_is_never_discarded_however_far_its_commit_got() {
    let (directory, state, mut volume) = fresh();
    close_epoch(&mut volume, 1, &[pages(0, 1, 7)]);
    let second = close_epoch(&mut volume, 2, &[pages(0, 1, 8)]);
    let third = close_epoch(&mut volume, 3, &[pages(0, 1, 9)]);
    // As if the power had failed once the rename of the second was durable.
    journal::mark_committed(&volume.journal, Epoch(2)).expect("there");
    let (state, mut volume) = reopen(directory.path(), (state, volume));
    assert_eq!(volume.known(), ClosedEpoch { epoch: Epoch(2), close: second });
    assert_eq!(volume.journaled(), [ClosedEpoch { epoch: Epoch(3), close: third }]);
    assert_eq!(all_hashes(&volume)[0].0[0], [8; 16]);

    // A commit that fails half-way: what is marked stays so.
    let path = journal::closed_path(&volume.journal, Epoch(3));
    let whole = fs::read(&path).expect("there");
    fs::write(&path, &whole[..whole.len() - 1]).expect("writable");
    assert!(matches!(volume.commit_through(third), Err(StateError::Damaged { .. })));
    assert!(matches!(volume.discard_after(second), Err(StateError::UnknownClose { .. })));
    fs::write(journal::committed_path(&volume.journal, Epoch(3)), whole).expect("writable");
    volume.commit_through(third).expect("the call can be repeated");
    assert_eq!(all_hashes(&volume)[0].0[0], [9; 16]);
    drop((state, volume));
}

#[test]
fn two_senders_can_not_share_a_state_directory() {
    let (directory, _state, _volume) = fresh();
    match StateDir::open(directory.path()) {
        Err(StateError::InUse { path, pid }) => {
            assert_eq!((path.as_path(), pid), (directory.path(), Some(std::process::id())));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_volume_is_made_once_and_its_removal_leaves_nothing() {
    let (_directory, state, volume) = fresh();
    assert!(matches!(VolumeState::create(&state, &identity(), ClosedEpoch::default()), Err(StateError::Exists { .. })));
    drop(volume);
    state.remove(identity().volume).expect("there");
    assert_eq!(fs::read_dir(state.volumes_path()).expect("readable").count(), 0);
    assert!(matches!(VolumeState::open(&state, identity().volume), Err(StateError::Missing { .. })));
    assert!(matches!(state.remove(identity().volume), Err(StateError::Missing { .. })));
}

#[test]
fn a_file_of_another_version_is_refused_by_name_and_left_as_it_is() {
    for name in ["volume", "hashes", "journal/00000000000000000001.closed"] {
        let (_directory, state, mut volume) = fresh();
        close_epoch(&mut volume, 1, &[pages(0, 1, 7)]);
        let path = volume.directory.join(name);
        drop(volume);
        let mut bytes = fs::read(&path).expect("there");
        bytes[8] = 9;
        fs::write(&path, &bytes).expect("writable");
        let error = VolumeState::open(&state, identity().volume).expect_err("another version");
        assert!(matches!(error, StateError::AnotherVersion { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(path.to_str().expect("text")) && text.contains("version 9"), "{text}");
        assert_eq!(fs::read(&path).expect("there"), bytes);
    }
}

#[test]
fn any_flipped_byte_of_a_file_is_an_error_that_names_it_or_makes_hashes_unknown() {
    let (_directory, state, mut volume) = fresh();
    let close = close_epoch(&mut volume, 1, &[pages(0, u64::MAX, 7), pages(BLOCKS - 1, u64::MAX, 8)]);
    volume.commit_through(close).expect("journaled");
    let second = close_epoch(&mut volume, 2, &[pages(5, 0b101, 9)]);
    let whole = all_hashes(&volume);
    let directory = volume.directory.clone();
    drop(volume);
    for name in ["volume", "journal/00000000000000000002.closed"] {
        let path = directory.join(name);
        let bytes = fs::read(&path).expect("there");
        for index in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[index] ^= 0x10;
            fs::write(&path, &flipped).expect("writable");
            let error = VolumeState::open(&state, identity().volume).expect_err("a flipped byte");
            assert!(error.to_string().contains(path.to_str().expect("text")), "byte {index}: {error}");
        }
        fs::write(&path, &bytes).expect("writable");
    }
    let path = directory.join("hashes");
    let bytes = fs::read(&path).expect("there");
    for index in (0..bytes.len()).step_by(61) {
        let mut flipped = bytes.clone();
        flipped[index] ^= 0x10;
        fs::write(&path, &flipped).expect("writable");
        match VolumeState::open(&state, identity().volume) {
            // One of two header slots: the other one still names a close, and the chain is checked against it.
            Ok(volume) => {
                let known = volume.known().close;
                assert!(known == close || volume.journaled().is_empty(), "byte {index}");
                for (found, expected) in all_hashes(&volume).iter().zip(&whole) {
                    assert!(found == expected || *found == HashEntry::UNKNOWN, "byte {index}: a wrong hash");
                }
            }
            Err(error) => {
                assert!(error.to_string().contains(directory.to_str().expect("text")), "byte {index}: {error}")
            }
        }
    }
    fs::write(&path, &bytes).expect("writable");
    let volume = VolumeState::open(&state, identity().volume).expect("whole again");
    assert_eq!(volume.journaled(), [ClosedEpoch { epoch: Epoch(2), close: second }]);
}

#[test]
fn hashes_of_another_key_or_disk_are_refused() {
    for other in [
        VolumeIdentity { hash_key: [9; 32], ..identity() },
        VolumeIdentity { incarnation: Incarnation(2), ..identity() },
        VolumeIdentity { disk_bytes: identity().disk_bytes - 4096, ..identity() },
    ] {
        let (_directory, state, volume) = fresh();
        let path = volume.directory.join("volume");
        drop(volume);
        fs::write(path, other.encode()).expect("writable");
        let error = VolumeState::open(&state, identity().volume).expect_err("foreign hashes");
        assert!(matches!(error, StateError::Foreign { .. }), "{error}");
    }
}

#[test]
fn a_journal_that_does_not_follow_the_applied_close_is_refused() {
    let (_directory, state, mut volume) = fresh();
    close_epoch(&mut volume, 1, &[]);
    close_epoch(&mut volume, 2, &[]);
    fs::remove_file(journal::closed_path(&volume.journal, Epoch(1))).expect("there");
    drop(volume);
    let error = VolumeState::open(&state, identity().volume).expect_err("a gap");
    assert!(matches!(error, StateError::Foreign { what: "parent close", .. }), "{error}");
}

#[test]
fn epochs_are_not_reused_and_closes_follow_their_parent() {
    let (_directory, _state, mut volume) = fresh();
    let early = volume.begin_journal(Epoch(3)).expect("new");
    let stale = volume.begin_journal(Epoch(2)).expect("new");
    assert!(matches!(
        volume.journal_close(early, close_id(3), close_id(9), None),
        Err(StateError::UnknownClose { .. })
    ));
    close_epoch(&mut volume, 4, &[]);
    assert!(matches!(volume.begin_journal(Epoch(4)), Err(StateError::EpochReused { epoch: 4, newest: 4 })));
    let parent = volume.newest().close;
    assert!(matches!(volume.journal_close(stale, close_id(2), parent, None), Err(StateError::EpochReused { .. })));
    assert!(matches!(volume.commit_through(close_id(77)), Err(StateError::UnknownClose { .. })));
    assert!(matches!(volume.discard_after(close_id(77)), Err(StateError::UnknownClose { .. })));
}

#[test]
fn a_block_whose_entry_is_damaged_is_unknown_until_it_is_committed_again() {
    let (_directory, _state, mut volume) = fresh();
    let close = close_epoch(&mut volume, 1, &[pages(2, u64::MAX, 7)]);
    volume.commit_through(close).expect("journaled");
    let path = volume.directory.join("hashes");
    let mut bytes = fs::read(&path).expect("there");
    bytes[HashEntry::offset(BlockIndex(2)) as usize + HASH_ENTRY_BYTES - 1] ^= 1;
    fs::write(&path, bytes).expect("writable");
    assert_eq!(all_hashes(&volume)[2], HashEntry::UNKNOWN);
    let close = close_epoch(&mut volume, 2, &[pages(2, 0b10, 8)]);
    volume.commit_through(close).expect("journaled");
    let entry = all_hashes(&volume)[2];
    assert_eq!(entry.0[..3], [UNKNOWN_HASH, [8; 16], UNKNOWN_HASH]);
}

/// A file system of its own: `size` bytes, mounted while the value lives. Needs root.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(size: u64) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mounted = Self(directory);
        mounted.mount(&["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]);
        mounted
    }

    fn mount(&self, arguments: &[&str]) {
        let done = std::process::Command::new("mount").args(arguments).arg(self.0.path()).status().expect("mount runs");
        assert!(done.success(), "mount {arguments:?} (these tests need root)");
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_file_system_is_an_error_that_names_the_file_and_leaves_nothing_half_done() {
    let mounted = Mounted::new(64 << 10);
    let state = StateDir::open(mounted.0.path()).expect("room for a lock");
    let large = VolumeIdentity { disk_bytes: 1 << 30, ..identity() };
    let error = VolumeState::create(&state, &large, ClosedEpoch::default()).expect_err("4 MiB do not fit 64 KiB");
    assert!(matches!(error, StateError::Full { .. }) && error.to_string().contains("hashes"), "{error}");
    assert_eq!(fs::read_dir(state.volumes_path()).expect("readable").count(), 0);

    // With room for the hashes but not for a journal, the epoch is not closed, and nothing of it stays.
    mounted.mount(&["-o", "remount,size=128k"]);
    let mut volume = VolumeState::create(&state, &identity(), ClosedEpoch::default()).expect("it fits");
    let mut journal = volume.begin_journal(Epoch(1)).expect("room for a head");
    let full = (0..1000).find_map(|_| journal.append(pages(1, u64::MAX, 7)).err()).expect("the journal outgrows it");
    assert!(matches!(full, StateError::Full { .. }), "{full}");
    drop(journal);
    assert_eq!(fs::read_dir(&volume.journal).expect("readable").count(), 0);
    close_epoch(&mut volume, 1, &[pages(1, 1, 7)]);
}

#[test]
fn a_read_only_file_system_is_an_error_that_names_the_directory() {
    let mounted = Mounted::new(1 << 20);
    let mut volume = {
        let state = StateDir::open(mounted.0.path()).expect("writable");
        VolumeState::create(&state, &identity(), ClosedEpoch::default()).expect("writable")
    };
    let close = close_epoch(&mut volume, 1, &[pages(1, 1, 7)]);
    volume.commit_through(close).expect("journaled");
    drop(volume);
    mounted.mount(&["-o", "remount,ro"]);
    let error = StateDir::open(mounted.0.path()).expect_err("read-only");
    assert!(matches!(error, StateError::NotWritable { .. }), "{error}");
    assert!(error.to_string().contains(mounted.0.path().to_str().expect("text")), "{error}");
}

#[test]
fn a_truncated_journal_of_a_closed_epoch_is_an_error() {
    let (_directory, state, mut volume) = fresh();
    close_epoch(&mut volume, 1, &[pages(1, 1, 7)]);
    let path = journal::closed_path(&volume.journal, Epoch(1));
    drop(volume);
    let bytes = fs::read(&path).expect("there");
    for length in [0, 1, 19, 20, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&path, &bytes[..length]).expect("writable");
        let error = VolumeState::open(&state, identity().volume).expect_err("truncated");
        let truncated = matches!(&error, StateError::Damaged { source: FormatError::Truncated { .. }, .. });
        assert!(truncated, "{length} bytes: {error}");
    }
}

fn grown() -> (Incarnation, u64) {
    (Incarnation(2), BLOCKS * limits::BLOCK_BYTES as u64 + 70_000)
}

#[test]
fn a_grown_volume_keeps_hashes_and_closes_in_flight_and_its_new_pages_are_unknown() {
    let (_directory, state, mut volume) = fresh();
    let first = close_epoch(&mut volume, 1, &[pages(0, 0b11, 7), pages(BLOCKS - 1, 1 << 63, 8)]);
    volume.commit_through(first).expect("committed");
    let second = close_epoch(&mut volume, 2, &[pages(1, 0b1, 9)]);
    let (incarnation, disk_bytes) = grown();
    volume.grow(incarnation, disk_bytes).expect("room");
    drop(volume);
    let mut volume = VolumeState::open(&state, identity().volume).expect("it opens");
    assert_eq!((volume.identity().incarnation, volume.identity().disk_bytes), (incarnation, disk_bytes));
    assert!(volume.must_verify());
    assert_eq!((volume.known().close, volume.newest().close), (first, second));
    volume.commit_through(second).expect("a close of the smaller disk is applied");
    let third = close_epoch(&mut volume, 3, &[pages(BLOCKS, 0b1, 5)]);
    volume.commit_through(third).expect("the new blocks have room");
    let mut entries = Vec::new();
    volume.hashes.reader().read(BlockIndex(0), 2 * BLOCKS as usize, &mut entries).expect("readable");
    assert_eq!(entries.len() as u64, BLOCKS + 1);
    let hash = |block: u64, page: usize| entries[block as usize].0[page];
    assert_eq!((hash(0, 1), hash(1, 0), hash(BLOCKS - 1, 63), hash(BLOCKS, 0)), ([7; 16], [9; 16], [8; 16], [5; 16]));
    assert_eq!(hash(BLOCKS, 1), UNKNOWN_HASH);
    assert!(volume.must_verify(), "no point was made yet");
    let (journal, parent) = (volume.begin_journal(Epoch(4)).expect("a new epoch"), third);
    volume.journal_close(journal, close_id(4), parent, Some(Consistency::Crash)).expect("room");
    volume.commit_through(close_id(4)).expect("committed");
    assert!(!volume.must_verify());
}

#[test]
fn growth_that_a_crash_interrupted_goes_on_at_the_next_start() {
    let (_directory, state, mut volume) = fresh();
    let first = close_epoch(&mut volume, 1, &[pages(0, 0b11, 7)]);
    volume.commit_through(first).expect("committed");
    let directory = volume.directory().to_owned();
    let before = fs::read(directory.join("hashes")).expect("readable");
    let (incarnation, disk_bytes) = grown();
    volume.grow(incarnation, disk_bytes).expect("room");
    drop(volume);
    let after = fs::read(directory.join("hashes")).expect("readable");
    let lengthened = [&before[..], &vec![0; after.len() - before.len()]].concat();
    // The identity was replaced, and the hashes were not touched yet, or only made longer.
    for left in [&before, &lengthened] {
        fs::write(directory.join("hashes"), left).expect("writable");
        fs::write(directory.join("volume.new"), b"half").expect("writable");
        let volume = VolumeState::open(&state, identity().volume).expect("it opens");
        assert_eq!((volume.known().close, volume.hashes.reader().blocks()), (first, BLOCKS + 1));
        drop(volume);
        assert!(fs::read(directory.join("hashes")).expect("readable") == after);
        assert!(!directory.join("volume.new").exists());
    }
}

#[test]
fn a_state_does_not_shrink() {
    let (_directory, _state, mut volume) = fresh();
    let bytes = identity().disk_bytes;
    for (incarnation, disk_bytes) in [(2, bytes), (2, bytes - 1), (1, bytes + 1)] {
        let error = volume.grow(Incarnation(incarnation), disk_bytes).expect_err("not grown");
        assert!(matches!(error, StateError::NotGrown { .. }), "{error}");
    }
    assert!(!volume.must_verify());
}

#[test]
fn a_glance_changes_nothing_and_tells_of_volumes_that_are_in_use_or_damaged() {
    let (directory, _state, mut volume) = fresh();
    let first = close_epoch(&mut volume, 1, &[pages(0, 0b11, 7)]);
    volume.commit_through(first).expect("committed");
    let seen = glance(directory.path()).expect("readable");
    assert_eq!((seen.len(), seen[0].volume), (1, identity().volume));
    assert_eq!(seen[0].applied.map(|applied| applied.close), Some(first));
    assert_eq!(seen[0].identity.as_ref().expect("whole").name, "root");
    fs::write(volume.directory().join("volume"), b"rubbish").expect("writable");
    let seen = glance(directory.path()).expect("readable");
    assert!(seen[0].identity.is_err());
}
