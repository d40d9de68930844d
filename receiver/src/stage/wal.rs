//! Whether RocksDB's log still holds all that was acknowledged through it.
//!
//! RocksDB can't tell a write that the disk lost or altered from one that a power cut left unfinished: it leaves out both. So
//! the stage keeps a note beside the database: the sequence number of the newest write that was synced, and so may have been
//! acknowledged. At a start this module reads the log files on its own, before RocksDB replays them. Damage in front of an
//! acknowledged write, or a log that ends before the noted one, is named; a torn tail behind it is what power cuts leave.
//!
//! # The note
//! A file of a few bytes, overwritten in place before each acknowledgement. It is synced once a second and not each time: a
//! kill leaves it exact, a power cut may take it back by the last moments. It is never ahead of what was synced.
//!
//! # Mending
//! A log file with damage is written anew with the writes that can be read, in order, and the old one is kept aside. Left to
//! itself RocksDB would drop everything behind the damage, refuse to open where a family's files are ahead of that, or (where it
//! is told to skip what it can't read) loop for ever on a tail of nonsense. Each write stands for itself, keys are never used
//! twice, and an epoch that lost a record is found when its close is counted; so what lies behind damage is good to have.
//!
//! # RocksDB's log format
//! Blocks of 32 KiB; in them fragments of writes: masked CRC-32C of what follows the length, length (2), type (1), payload.
//! A write starts with its first sequence number (8) and its count (4).

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::format::envelope::Kind;
use common::format::wire::{Reader, Writer};

const NOTE_KIND: Kind =
    Kind { what: "stage note of what was acknowledged", magic: *b"BFSTGACK", version: 1, body_bytes_max: 64 };
/// Longest that the note stays unsynced while writes go on.
const NOTE_SYNC_INTERVAL: Duration = Duration::from_secs(1);

const BLOCK_BYTES: usize = 32 << 10;
const HEAD_BYTES: usize = 7;
/// Fragments of log files that are used again have the file's number behind the head.
const NUMBER_BYTES: usize = 4;
/// Sequence number and count.
const WRITE_HEAD_BYTES: usize = 12;

/// What the note says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Noted {
    /// Sequence number of the newest synced write.
    pub(super) acknowledged: u64,
    /// Number of the oldest log file that counts; earlier ones were written to tables.
    pub(super) first_log: u64,
}

/// The note, open for being raised.
pub(super) struct Note {
    file: File,
    state: Mutex<(Noted, Instant)>,
}

impl Note {
    /// What the note at `path` says; `None` where there is none.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn read(path: &Path) -> Result<Option<Noted>, String> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let read = || {
            let mut reader = Reader::new(NOTE_KIND.what, NOTE_KIND.open(&bytes)?);
            let noted = Noted { acknowledged: reader.u64()?, first_log: reader.u64()? };
            reader.finish().map(|()| noted)
        };
        read().map(Some).map_err(|error| error.to_string())
    }

    /// Opens the note with what holds now. Durable but for its name.
    pub(super) fn begin(path: &Path, noted: Noted) -> std::io::Result<Self> {
        let file = File::options().create(true).truncate(false).write(true).open(path)?;
        let bytes = encode(noted);
        file.write_all_at(&bytes, 0)?;
        file.set_len(bytes.len() as u64)?;
        file.sync_all()?;
        Ok(Self { file, state: Mutex::new((noted, Instant::now())) })
    }

    /// Notes that all up to `acknowledged` is synced.
    pub(super) fn raise(&self, acknowledged: u64) -> std::io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (noted, synced) = &mut *state;
        if acknowledged <= noted.acknowledged {
            return Ok(());
        }
        noted.acknowledged = acknowledged;
        self.file.write_all_at(&encode(*noted), 0)?;
        if synced.elapsed() >= NOTE_SYNC_INTERVAL {
            self.file.sync_data()?;
            *synced = Instant::now();
        }
        Ok(())
    }
}

fn encode(noted: Noted) -> Vec<u8> {
    let mut body = Writer::with_capacity(16);
    body.u64(noted.acknowledged).u64(noted.first_log);
    NOTE_KIND.seal(body.as_slice())
}

/// A place in a log file that can't be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Damage {
    pub(super) file: PathBuf,
    /// Where in the file, in bytes.
    pub(super) offset: u64,
}

/// What a look at the log files found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Look {
    /// Damage in front of a write that was acknowledged.
    pub(super) lost: Option<Damage>,
    /// The first damage, or unfinished write, behind all that was acknowledged.
    pub(super) tail: Option<Damage>,
    /// Files with damage of any kind.
    damaged: Vec<PathBuf>,
}

/// Reads the log files in `dir` that count.
pub(super) fn look(dir: &Path, noted: Noted) -> std::io::Result<Look> {
    let mut found = Look::default();
    for (number, path) in log_files(dir)? {
        if number < noted.first_log {
            continue;
        }
        for piece in pieces(&std::fs::read(&path)?) {
            match piece {
                Piece::Unreadable { offset } => {
                    found.tail.get_or_insert_with(|| Damage { file: path.clone(), offset: offset as u64 });
                    if found.damaged.last() != Some(&path) {
                        found.damaged.push(path.clone());
                    }
                }
                Piece::Write { first, .. } if first <= noted.acknowledged => {
                    if let Some(damage) = found.tail.take() {
                        found.lost.get_or_insert(damage);
                    }
                }
                Piece::Write { .. } => {}
            }
        }
    }
    Ok(found)
}

/// Writes the damaged files anew without what can't be read. The old ones go to the folder `kept`, in place of earlier ones.
pub(super) fn mend(look: &Look, kept: &Path) -> std::io::Result<()> {
    if look.damaged.is_empty() {
        return Ok(());
    }
    if kept.exists() {
        std::fs::remove_dir_all(kept)?;
    }
    std::fs::create_dir_all(kept)?;
    for path in &look.damaged {
        let bytes = std::fs::read(path)?;
        let name = path.file_name().unwrap_or_default();
        std::fs::write(kept.join(name), &bytes)?;
        let mut fresh = Vec::with_capacity(bytes.len());
        for piece in pieces(&bytes) {
            if let Piece::Write { payload, .. } = piece {
                append(&mut fresh, &payload);
            }
        }
        let place = kept.join("mended");
        std::fs::write(&place, &fresh)?;
        File::open(&place)?.sync_all()?;
        std::fs::rename(&place, path)?;
        if let Some(dir) = path.parent() {
            File::open(dir)?.sync_all()?;
        }
    }
    Ok(())
}

/// Appends a write to a log, in as many fragments as it takes.
fn append(log: &mut Vec<u8>, mut payload: &[u8]) {
    let mut first = true;
    loop {
        let mut left = BLOCK_BYTES - log.len() % BLOCK_BYTES;
        if left < HEAD_BYTES {
            log.resize(log.len() + left, 0);
            left = BLOCK_BYTES;
        }
        let (part, rest) = payload.split_at(payload.len().min(left - HEAD_BYTES));
        let kind = match (first, rest.is_empty()) {
            (true, true) => 1,
            (true, false) => 2,
            (false, false) => 3,
            (false, true) => 4,
        };
        let start = log.len();
        // A part lies in a block, so its length fits.
        let len = u16::try_from(part.len()).unwrap_or(u16::MAX).to_le_bytes();
        log.extend_from_slice(&[0, 0, 0, 0, len[0], len[1], kind]);
        log.extend_from_slice(part);
        let crc = masked_crc(&log[start + HEAD_BYTES - 1..]);
        log[start..start + 4].copy_from_slice(&crc.to_le_bytes());
        if rest.is_empty() {
            return;
        }
        (payload, first) = (rest, false);
    }
}

/// RocksDB stores checksums so, since a log may hold logs.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The newest log file's number; zero for none.
pub(super) fn newest_log(dir: &Path) -> std::io::Result<u64> {
    Ok(log_files(dir)?.last().map_or(0, |(number, _)| *number))
}

/// All log files, oldest first.
fn log_files(dir: &Path) -> std::io::Result<Vec<(u64, PathBuf)>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let number = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
        if let Some(number) = number.filter(|_| path.extension().is_some_and(|ending| ending == "log")) {
            files.push((number, path));
        }
    }
    files.sort_unstable();
    Ok(files)
}

#[derive(Debug, PartialEq, Eq)]
enum Piece {
    /// A whole write, and its first sequence number.
    Write { first: u64, payload: Vec<u8> },
    /// Not what RocksDB wrote, or nothing at all.
    Unreadable { offset: usize },
}

enum Part {
    Full,
    First,
    Middle,
    Last,
    /// Of the log's own bookkeeping.
    Other,
}

/// What lies in a log file, in order. Behind damage it goes on with the next block, as RocksDB does.
fn pieces(bytes: &[u8]) -> Vec<Piece> {
    let mut found = Vec::new();
    let whole = |payload: Vec<u8>| Some(Piece::Write { first: first_of(&payload)?, payload });
    // The begin of a write of which more is to come, and where it lies.
    let mut open: Option<(usize, Vec<u8>)> = None;
    let mut at = 0;
    while at < bytes.len() {
        let block_end = (at / BLOCK_BYTES + 1) * BLOCK_BYTES;
        if block_end - at < HEAD_BYTES {
            at = block_end;
            continue;
        }
        let Some((part, payload, len)) = fragment(&bytes[at..block_end.min(bytes.len())]) else {
            let offset = open.take().map_or(at, |(start, _)| start);
            found.push(Piece::Unreadable { offset });
            at = block_end;
            continue;
        };
        match part {
            Part::Full | Part::First => {
                if let Some((offset, _)) = open.take() {
                    found.push(Piece::Unreadable { offset });
                }
                if matches!(part, Part::Full) {
                    found.extend(whole(payload.to_vec()));
                } else {
                    open = Some((at, payload.to_vec()));
                }
            }
            Part::Middle | Part::Last => {
                if let Some((_, begin)) = &mut open {
                    begin.extend_from_slice(payload);
                }
                if matches!(part, Part::Last)
                    && let Some((_, begin)) = open.take()
                {
                    found.extend(whole(begin));
                }
            }
            Part::Other => {}
        }
        at += len;
    }
    if let Some((offset, _)) = open {
        found.push(Piece::Unreadable { offset });
    }
    found
}

fn first_of(head: &[u8]) -> Option<u64> {
    head.get(..WRITE_HEAD_BYTES)?.first_chunk().map(|first| u64::from_le_bytes(*first))
}

/// The fragment at the front of a block's rest, and its length with its head; `None` where there is none that checks.
fn fragment(block: &[u8]) -> Option<(Part, &[u8], usize)> {
    let head = block.get(..HEAD_BYTES)?;
    let stored = u32::from_le_bytes(*head.first_chunk()?);
    let len = usize::from(u16::from_le_bytes([head[4], head[5]]));
    let (part, extra) = match head[6] {
        0 => return None,
        1 => (Part::Full, 0),
        2 => (Part::First, 0),
        3 => (Part::Middle, 0),
        4 => (Part::Last, 0),
        5 => (Part::Full, NUMBER_BYTES),
        6 => (Part::First, NUMBER_BYTES),
        7 => (Part::Middle, NUMBER_BYTES),
        8 => (Part::Last, NUMBER_BYTES),
        11 => (Part::Other, NUMBER_BYTES),
        _ => (Part::Other, 0),
    };
    let start = HEAD_BYTES + extra;
    let payload = block.get(start..start + len)?;
    (masked_crc(&block[HEAD_BYTES - 1..start + len]) == stored).then_some((part, payload, start + len))
}

#[cfg(test)]
mod tests;
