//! The RocksDB underneath: options, families, durable writes, scans and deletions. Blocking; knows nothing of epochs.
//!
//! # Durability of an ingested file
//!
//! By RocksDB 11.8's sources: `SstFileWriter::Finish` syncs the file before it closes it; ingestion links it into the
//! database's directory, syncs it again (`SyncFile`), syncs the directory (`FsyncWithDirOptions`), and then appends to the
//! manifest and syncs that. So once [`Database::ingest`] returns, file, name and manifest are durable; no sync of our own
//! is needed but for the directories that this process created, whose names RocksDB does not sync in their parents.
//!
//! # Rows about volumes
//!
//! The family `rows` holds what must outlive a restart beside records: for each volume its session and how far it is
//! released, which epochs were dropped, and a ceiling under which batch numbers may be given out. Each value is kept in an
//! envelope of `common::format`.

use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use common::format::envelope::Kind;
use common::format::stage_key::{STAGE_KEY_BYTES, StageKey};
use common::format::wire::{Reader, Writer};
use common::ids::{BatchId, BlockIndex, Epoch, SessionId, VolumeId};
use rocksdb::{
    BlockBasedOptions, BottommostLevelCompaction, Cache, ColumnFamily, ColumnFamilyDescriptor, CompactOptions, DB,
    DBCompressionType, DBRecoveryMode, IngestExternalFileOptions, LogLevel, Options, ReadOptions, SstFileWriter,
    WriteBatch, WriteOptions,
};

use super::error::StageError;
use super::index::{Family, VolumeRow};
use super::wal::{self, Look, Note, Noted};

const RECORDS: &str = "records";
const TRICKLE: &str = "trickle";
const ROWS: &str = "rows";
/// Files on their way into the database.
const INCOMING: &str = "incoming";
/// The note of what was acknowledged through the log.
const NOTE: &str = "acknowledged";
/// Log files as they were before they were mended.
const KEPT: &str = "damaged";

const ROW_KIND: Kind = Kind { what: "stage row of a volume", magic: *b"BFSTGVOL", version: 1, body_bytes_max: 64 };
const CEILING_KIND: Kind = Kind { what: "stage batch ceiling", magic: *b"BFSTGCEI", version: 1, body_bytes_max: 64 };
const CEILING_KEY: &[u8] = b"c";
const ROW_PREFIX: u8 = b'v';
const DROPPED_PREFIX: u8 = b'd';

/// Files that stay open. A table reader costs some 10 KiB here (its index has an entry for each record).
const OPEN_FILES: i32 = 256;
/// One read covers several records.
pub(super) const READAHEAD_BYTES: usize = 2 << 20;

/// What RocksDB may hold in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DatabaseMemory {
    pub(super) write_buffer_bytes: usize,
    pub(super) cache_bytes: usize,
}

/// An open database.
pub(super) struct Database {
    db: DB,
    dir: PathBuf,
    sst_options: Options,
    note: Note,
    log_damage: Option<StageError>,
    /// Held for reading by synced writes and for writing by others, so that the note counts none that is not synced.
    unsynced: RwLock<()>,
}

/// One key and value of a scan; a damaged place gives the key range that it hides, if the database itself noticed.
pub(super) enum Scanned<'a> {
    Value { key: StageKey, value: &'a [u8] },
    BadKey { reason: String },
    Unreadable { after: Option<StageKey>, reason: String },
}

fn table_options(cache: &Cache) -> BlockBasedOptions {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    // Records are mostly larger than a block: each then is one block, read and checked alone.
    table.set_block_size(16 << 10);
    table.set_format_version(6);
    table
}

fn family_options(cache: &Cache, memory: DatabaseMemory) -> Options {
    let mut options = Options::default();
    options.set_compression_type(DBCompressionType::None);
    options.set_bottommost_compression_type(DBCompressionType::None);
    options.set_block_based_table_factory(&table_options(cache));
    options.set_write_buffer_size(memory.write_buffer_bytes);
    options.set_max_write_buffer_number(2);
    options
}

impl Database {
    pub(super) fn open(dir: &Path, memory: DatabaseMemory) -> Result<Self, StageError> {
        let io = |error: std::io::Error| StageError::from_io(dir, &error);
        let incoming = dir.join(INCOMING);
        std::fs::create_dir_all(&incoming).map_err(io)?;
        // Left over from a crash between writing and ingesting: nobody was told that these are staged.
        for file in std::fs::read_dir(&incoming).map_err(io)? {
            std::fs::remove_file(file.map_err(io)?.path()).map_err(io)?;
        }
        let cache = Cache::new_lru_cache(memory.cache_bytes);
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_max_open_files(OPEN_FILES);
        options.set_max_background_jobs(2);
        options.set_max_total_wal_size(4 * memory.write_buffer_bytes as u64);
        options.set_db_write_buffer_size(3 * memory.write_buffer_bytes);
        // A power cut leaves a torn tail behind the last synced write, which is where replay has to stop; what else can't be
        // read was found, and taken out, before (see `wal`).
        options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
        options.set_keep_log_file_num(4);
        options.set_max_log_file_size(4 << 20);
        options.set_log_level(LogLevel::Warn);
        options.set_stats_dump_period_sec(0);
        options.set_skip_stats_update_on_db_open(true);
        options.set_max_manifest_file_size(8 << 20);
        let mut records = family_options(&cache, memory);
        // Files arrive sorted, disjoint and at the bottom; there is nothing to compact on its own.
        records.set_disable_auto_compactions(true);
        records.set_target_file_size_base(1 << 30);
        // 0 would let RocksDB rewrite files for their age alone.
        records.set_periodic_compaction_seconds(0);
        records.set_ttl(0);
        let mut trickle = family_options(&cache, memory);
        trickle.set_target_file_size_base(8 << 20);
        let rows = family_options(&cache, memory);
        let families = [
            ColumnFamilyDescriptor::new(rocksdb::DEFAULT_COLUMN_FAMILY_NAME, family_options(&cache, memory)),
            ColumnFamilyDescriptor::new(RECORDS, records),
            ColumnFamilyDescriptor::new(TRICKLE, trickle),
            ColumnFamilyDescriptor::new(ROWS, rows),
        ];
        let database = dir.join("db");
        let (noted, note_damage) = match Note::read(&dir.join(NOTE)) {
            Ok(noted) => (noted, None),
            Err(reason) => (None, Some(StageError::DamagedLog { file: dir.join(NOTE), reason })),
        };
        let look = noted.map(|noted| wal::look(&database, noted)).transpose().map_err(io)?.unwrap_or_default();
        wal::mend(&look, &dir.join(KEPT)).map_err(io)?;
        let db = DB::open_cf_descriptors(&options, dir.join("db"), families)
            .map_err(|error| StageError::from_rocksdb(dir, &error))?;
        let acknowledged = db.latest_sequence_number();
        let first_log = wal::newest_log(&database).map_err(io)?;
        let log_damage = note_damage.or_else(|| log_damage(&database, noted, look, acknowledged));
        let note = Note::begin(&dir.join(NOTE), Noted { acknowledged, first_log }).map_err(io)?;
        for place in [Some(incoming.as_path()), Some(dir), dir.parent()].into_iter().flatten() {
            let place = if place.as_os_str().is_empty() { Path::new(".") } else { place };
            std::fs::File::open(place).and_then(|file| file.sync_all()).map_err(io)?;
        }
        let mut sst_options = family_options(&cache, memory);
        // Starts writing out early, so that the sync at the end has little left to do.
        sst_options.set_bytes_per_sync(1 << 20);
        Ok(Self { db, dir: dir.to_path_buf(), sst_options, note, log_damage, unsynced: RwLock::default() })
    }

    /// What was found wrong with the log, if anything was.
    pub(super) fn log_damage(&self) -> Option<&StageError> {
        self.log_damage.as_ref()
    }

    /// Writes through the log. Durable once it returns, and noted as such.
    fn write_synced(&self, batch: WriteBatch) -> Result<(), StageError> {
        let _order = self.unsynced.read().unwrap_or_else(PoisonError::into_inner);
        self.db.write_opt(batch, &synced()).map_err(|error| self.error(&error))?;
        // Published once synced, with all that was written before; so nothing in it can still be lost.
        let acknowledged = self.db.latest_sequence_number();
        self.note.raise(acknowledged).map_err(|error| StageError::from_io(&self.dir, &error))
    }

    /// Writes through the log; durable only with the next synced write.
    fn write_unsynced(&self, batch: WriteBatch) -> Result<(), StageError> {
        let _order = self.unsynced.write().unwrap_or_else(PoisonError::into_inner);
        self.db.write(batch).map_err(|error| self.error(&error))
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn error(&self, error: &rocksdb::Error) -> StageError {
        StageError::from_rocksdb(&self.dir, error)
    }

    fn family(&self, name: &str) -> Result<&ColumnFamily, StageError> {
        self.db
            .cf_handle(name)
            .ok_or_else(|| StageError::Damaged { dir: self.dir.clone(), reason: format!("it has no family {name}") })
    }

    fn family_of(&self, family: Family) -> Result<&ColumnFamily, StageError> {
        self.family(match family {
            Family::Records => RECORDS,
            Family::Trickle => TRICKLE,
        })
    }

    /// Writes entries, sorted by key and all of one batch, as one file and takes it in. Durable once it returns.
    pub(super) fn ingest<'a>(
        &self,
        batch: BatchId,
        entries: impl Iterator<Item = (StageKey, &'a [u8])>,
    ) -> Result<(), StageError> {
        let path = self.dir.join(INCOMING).join(format!("{:020}.sst", batch.0));
        let result = self.write_and_ingest(self.family(RECORDS)?, &path, entries);
        if result.is_err() {
            // The failure is what counts; at the next start the folder is emptied anyway.
            drop(std::fs::remove_file(&path));
        }
        result.map_err(|error| self.error(&error))
    }

    fn write_and_ingest<'a>(
        &self,
        family: &ColumnFamily,
        path: &Path,
        entries: impl Iterator<Item = (StageKey, &'a [u8])>,
    ) -> Result<(), rocksdb::Error> {
        let mut writer = SstFileWriter::create(&self.sst_options);
        writer.open(path)?;
        for (key, value) in entries {
            writer.put(key.encode(), value)?;
        }
        writer.finish()?;
        let mut options = IngestExternalFileOptions::default();
        options.set_move_files(true);
        // Nobody reads through snapshots, so no file needs a sequence number of its own.
        options.set_snapshot_consistency(false);
        self.db.ingest_external_file_cf_opts(&family, &options, vec![path])
    }

    /// Writes entries through the log. Durable once it returns.
    pub(super) fn write<'a>(&self, entries: impl Iterator<Item = (StageKey, &'a [u8])>) -> Result<(), StageError> {
        let family = self.family(TRICKLE)?;
        let mut batch = WriteBatch::default();
        for (key, value) in entries {
            batch.put_cf(family, key.encode(), value);
        }
        self.write_synced(batch)
    }

    /// Deletes single keys of the trickle family; not durable at once, which only means that they may be found again.
    pub(super) fn delete_keys(&self, keys: &[StageKey]) -> Result<(), StageError> {
        let family = self.family(TRICKLE)?;
        let mut batch = WriteBatch::default();
        for key in keys {
            batch.delete_cf(family, key.encode());
        }
        self.write_unsynced(batch)
    }

    /// Deletes the files of the batches from `first` to `last`; true where nothing of them is left.
    pub(super) fn delete_batches(&self, first: BatchId, last: BatchId) -> Result<bool, StageError> {
        let family = self.family(RECORDS)?;
        let (from, to) = batch_bounds(first, last);
        self.db.delete_file_in_range_cf(family, from, to).map_err(|error| self.error(&error))?;
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        options.set_iterate_upper_bound(to.to_vec());
        let mut iterator = self.db.raw_iterator_cf_opt(family, options);
        iterator.seek(from);
        Ok(!iterator.valid())
    }

    /// Deletes the keys of the batches from `first` to `last` where [`Self::delete_batches`] could not.
    pub(super) fn delete_range(&self, first: BatchId, last: BatchId) -> Result<(), StageError> {
        let (from, to) = batch_bounds(first, last);
        self.delete_span(&from, &to)?;
        self.compact(first, last)
    }

    /// Marks the keys of one epoch in one batch as deleted; [`Self::compact`] then frees their space.
    pub(super) fn delete_epoch_in_batch(
        &self,
        batch: BatchId,
        volume: VolumeId,
        epoch: Epoch,
    ) -> Result<(), StageError> {
        let from = StageKey { batch, volume, epoch, block: BlockIndex(0) }.encode();
        let mut to = StageKey { batch, volume, epoch, block: StageKey::CLOSE }.encode().to_vec();
        to.push(0);
        self.delete_span(&from, &to)
    }

    fn delete_span(&self, from: &[u8], to: &[u8]) -> Result<(), StageError> {
        let mut span = WriteBatch::default();
        span.delete_range_cf(self.family(RECORDS)?, from, to);
        self.write_unsynced(span)
    }

    /// Rewrites the files of the batches from `first` to `last` without what was deleted.
    pub(super) fn compact(&self, first: BatchId, last: BatchId) -> Result<(), StageError> {
        let (from, to) = batch_bounds(first, last);
        let mut options = CompactOptions::default();
        options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
        options.set_exclusive_manual_compaction(false);
        self.db.compact_range_cf_opt(self.family(RECORDS)?, Some(&from), Some(&to), &options);
        Ok(())
    }

    /// Every volume and epoch of which keys lie in a batch.
    pub(super) fn epochs_of_batch(&self, batch: BatchId) -> Result<Vec<(VolumeId, Epoch)>, StageError> {
        let family = self.family(RECORDS)?;
        let (from, to) = batch_bounds(batch, batch);
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        options.set_iterate_upper_bound(to.to_vec());
        let mut iterator = self.db.raw_iterator_cf_opt(family, options);
        let mut found = Vec::new();
        iterator.seek(from);
        while let Some(key) = iterator.key().and_then(|key| StageKey::decode(key).ok()) {
            found.push((key.volume, key.epoch));
            let mut next =
                StageKey { batch, volume: key.volume, epoch: key.epoch, block: StageKey::CLOSE }.encode().to_vec();
            next.push(0);
            iterator.seek(next);
        }
        iterator.status().map_err(|error| self.error(&error))?;
        Ok(found)
    }

    /// Calls `each` for every key from `from` on, in order, until it says stop or `to` (exclusive) is reached.
    ///
    /// `check` has RocksDB check its blocks' checksums. An unreadable place is reported once and ends the scan.
    pub(super) fn scan(
        &self,
        family: Family,
        from: &[u8],
        to: Option<Vec<u8>>,
        check: bool,
        mut each: impl FnMut(Scanned<'_>) -> bool,
    ) -> Result<(), StageError> {
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        options.set_verify_checksums(check);
        options.set_readahead_size(READAHEAD_BYTES);
        if let Some(to) = to {
            options.set_iterate_upper_bound(to);
        }
        let mut iterator = self.db.raw_iterator_cf_opt(self.family_of(family)?, options);
        iterator.seek(from);
        let mut last = None;
        while let (Some(key), Some(value)) = (iterator.key(), iterator.value()) {
            let go_on = match StageKey::decode(key) {
                Ok(key) => {
                    last = Some(key);
                    each(Scanned::Value { key, value })
                }
                Err(error) => each(Scanned::BadKey { reason: error.to_string() }),
            };
            if !go_on {
                return Ok(());
            }
            iterator.next();
        }
        if let Err(error) = iterator.status() {
            match self.error(&error) {
                StageError::Damaged { reason, .. } => {
                    each(Scanned::Unreadable { after: last, reason });
                }
                other => return Err(other),
            }
        }
        Ok(())
    }

    /// Reserves batch numbers up to `ceiling`, which are then never given out again. Durable once it returns.
    pub(super) fn set_ceiling(&self, ceiling: BatchId) -> Result<(), StageError> {
        let mut body = Writer::with_capacity(8);
        body.u64(ceiling.0);
        self.put_row(CEILING_KEY, &CEILING_KIND.seal(body.as_slice()))
    }

    /// The smallest batch number that was never given out.
    pub(super) fn ceiling(&self) -> Result<BatchId, StageError> {
        let family = self.family(ROWS)?;
        let Some(value) = self.db.get_cf(family, CEILING_KEY).map_err(|error| self.error(&error))? else {
            return Ok(BatchId(1));
        };
        let read = |value: &[u8]| {
            let mut reader = Reader::new("stage batch ceiling", CEILING_KIND.open(value)?);
            let ceiling = reader.u64()?;
            reader.finish().map(|()| BatchId(ceiling))
        };
        read(&value).map_err(|error| self.version(&error))
    }

    /// Stores what is known of a volume. Durable once it returns.
    pub(super) fn set_row(&self, volume: VolumeId, row: VolumeRow) -> Result<(), StageError> {
        self.put_row(&row_key(volume), &encode_row(row))
    }

    /// Stores that an epoch was dropped, and the volume's row. Durable once it returns.
    pub(super) fn set_dropped(&self, volume: VolumeId, epochs: &[Epoch], row: VolumeRow) -> Result<(), StageError> {
        let family = self.family(ROWS)?;
        let mut batch = WriteBatch::default();
        for &epoch in epochs {
            batch.put_cf(family, dropped_key(volume, epoch), []);
        }
        batch.put_cf(family, row_key(volume), encode_row(row));
        self.write_synced(batch)
    }

    /// Stores a volume's row and forgets drop marks that it covers. Durable once it returns.
    pub(super) fn set_released(&self, volume: VolumeId, row: VolumeRow, marks: &[Epoch]) -> Result<(), StageError> {
        let family = self.family(ROWS)?;
        let mut batch = WriteBatch::default();
        batch.put_cf(family, row_key(volume), encode_row(row));
        for &epoch in marks {
            batch.delete_cf(family, dropped_key(volume, epoch));
        }
        self.write_synced(batch)
    }

    /// All rows of volumes, and all drop marks.
    #[expect(clippy::type_complexity, reason = "two lists, read once at start")]
    pub(super) fn rows(&self) -> Result<(Vec<(VolumeId, VolumeRow)>, Vec<(VolumeId, Epoch)>), StageError> {
        let (mut rows, mut dropped) = (Vec::new(), Vec::new());
        let mut iterator = self.db.raw_iterator_cf(self.family(ROWS)?);
        iterator.seek_to_first();
        while let (Some(key), Some(value)) = (iterator.key(), iterator.value()) {
            let (prefix, rest) = key.split_at_checked(1).unwrap_or_default();
            let mut reader = Reader::new("stage row key", rest);
            match prefix.first() {
                Some(&ROW_PREFIX) => {
                    let volume = VolumeId(reader.array().map_err(|error| self.version(&error))?);
                    rows.push((volume, decode_row(value).map_err(|error| self.version(&error))?));
                }
                Some(&DROPPED_PREFIX) => {
                    let volume = VolumeId(reader.array().map_err(|error| self.version(&error))?);
                    let epoch = u64::from_be_bytes(reader.array().map_err(|error| self.version(&error))?);
                    dropped.push((volume, Epoch(epoch)));
                }
                _ => {}
            }
            iterator.next();
        }
        iterator.status().map_err(|error| self.error(&error))?;
        Ok((rows, dropped))
    }

    pub(super) fn put_row(&self, key: &[u8], value: &[u8]) -> Result<(), StageError> {
        let mut batch = WriteBatch::default();
        batch.put_cf(self.family(ROWS)?, key, value);
        self.write_synced(batch)
    }

    fn version(&self, error: &common::format::FormatError) -> StageError {
        use common::error::{Dispose as _, Disposition};
        let (dir, reason) = (self.dir.clone(), error.to_string());
        match error.disposition() {
            Disposition::BadInput => StageError::Version { dir, reason },
            _ => StageError::Damaged { dir, reason },
        }
    }
}

/// Whether the log lost what was acknowledged: by what was found in it, and by where RocksDB came to.
fn log_damage(database: &Path, noted: Option<Noted>, look: Look, replayed: u64) -> Option<StageError> {
    let acknowledged = noted?.acknowledged;
    if let Some(wal::Damage { file, offset }) = look.lost {
        let reason = format!("it can't be read at byte {offset}, and acknowledged writes follow");
        return Some(StageError::DamagedLog { file, reason });
    }
    if replayed >= acknowledged {
        return None;
    }
    let reason = format!("it ends at write {replayed}, up to {acknowledged} were acknowledged");
    Some(match look.tail {
        Some(wal::Damage { file, offset }) => {
            StageError::DamagedLog { file, reason: format!("it can't be read at byte {offset}: {reason}") }
        }
        None => StageError::DamagedLog { file: database.join("*.log"), reason },
    })
}

fn synced() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(true);
    options
}

/// First key of batch `first`, and the key behind the last of batch `last`.
fn batch_bounds(first: BatchId, last: BatchId) -> ([u8; STAGE_KEY_BYTES], [u8; STAGE_KEY_BYTES]) {
    let start = |batch| StageKey { batch, volume: VolumeId::NIL, epoch: Epoch(0), block: BlockIndex(0) }.encode();
    (start(first), start(BatchId(last.0.saturating_add(1))))
}

fn row_key(volume: VolumeId) -> Vec<u8> {
    let mut key = vec![ROW_PREFIX];
    key.extend_from_slice(&volume.0);
    key
}

fn dropped_key(volume: VolumeId, epoch: Epoch) -> Vec<u8> {
    let mut key = vec![DROPPED_PREFIX];
    key.extend_from_slice(&volume.0);
    key.extend_from_slice(&epoch.0.to_be_bytes());
    key
}

fn encode_row(row: VolumeRow) -> Vec<u8> {
    let mut body = Writer::with_capacity(32);
    body.raw(&row.session.0).u64(row.released.0).u64(row.next_epoch.0);
    ROW_KIND.seal(body.as_slice())
}

fn decode_row(value: &[u8]) -> Result<VolumeRow, common::format::FormatError> {
    let mut reader = Reader::new("stage row of a volume", ROW_KIND.open(value)?);
    let row = VolumeRow {
        session: SessionId(reader.array()?),
        released: Epoch(reader.u64()?),
        next_epoch: Epoch(reader.u64()?),
    };
    reader.finish()?;
    Ok(row)
}
