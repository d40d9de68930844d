//! Every bound of the system in one place, with assertions that relate them.

/// Unit of change tracking, in bytes.
pub const PAGE_BYTES: usize = 4096;
/// Pages in a block: one bit each of a [`crate::ids::PageMask`].
pub const PAGES_PER_BLOCK: usize = 64;
/// Unit of sealing, in bytes. 64 KiB blocks cost 5 % of compression ratio, larger ones memory.
pub const BLOCK_BYTES: usize = PAGE_BYTES * PAGES_PER_BLOCK;
/// Largest disk, in bytes: 2^48 (256 TiB), which keeps block numbers within 30 bits.
pub const DISK_BYTES_MAX: u64 = 1 << 48;

/// Fixed length of a version 1 record header.
pub const RECORD_HEADER_BYTES: usize = 104;
/// AES-GCM tag.
pub const SEAL_TAG_BYTES: usize = 16;
/// Largest sealed part of a record: incompressible pages are stored raw, so never more than a block and the tag.
pub const SEALED_BYTES_MAX: usize = BLOCK_BYTES + SEAL_TAG_BYTES;
/// Largest record.
pub const RECORD_BYTES_MAX: usize = RECORD_HEADER_BYTES + SEALED_BYTES_MAX;
/// Fixed length of a record's metadata.
pub const RECORD_META_BYTES: usize = 96;
/// Most blocks that one range record may cover: 16 GiB.
pub const RANGE_BLOCKS_MAX: u32 = 65_536;

/// Sealed bytes after which an epoch is closed, with or without a point, so that a dead sender loses little.
pub const EPOCH_SEALED_BYTES_MAX: u64 = 256 << 20;
/// Records after which an epoch is closed: bounds the memory that holds its metadata (96 B and an index entry each).
pub const EPOCH_RECORDS_MAX: usize = 32_768;
/// What a decoder accepts, a little over what a sender makes (workers overshoot the bounds above by what is in flight).
pub const EPOCH_RECORDS_DECODE_MAX: usize = EPOCH_RECORDS_MAX + 4_096;
/// Epochs that may be closed and not yet committed, per volume.
pub const EPOCHS_IN_FLIGHT_MAX: usize = 16;

/// Blocks under one leaf of a close's Merkle tree: 4,096 blocks are 1 GiB of disk.
pub const MERKLE_RANGE_BLOCKS: u64 = 4_096;

/// Largest body of an enveloped object (header, log entry, close, fleet objects); checkpoints have their own bound.
pub const ENVELOPE_BODY_BYTES_MAX: usize = 16 << 20;
/// Largest body of an encoded close.
pub const CLOSE_BYTES_MAX: usize = 1_024;
/// Largest frame on a stream: a record and its frame fields, or an `OpenReply` with a long list of staged records.
pub const FRAME_BYTES_MAX: usize = 512 << 10;
/// Staged records listed in one `StagedRecords` frame.
pub const STAGED_LIST_MAX: usize = 4_096;
/// Data streams of one volume session.
pub const STREAMS_PER_SESSION_MAX: usize = 16;
/// Volume sessions of one connection.
pub const SESSIONS_PER_CONNECTION_MAX: usize = 64;

/// Default and bounds of a segment's size in bytes.
pub const SEGMENT_BYTES_DEFAULT: u64 = 32 << 20;
/// Smallest segment size that may be asked for.
pub const SEGMENT_BYTES_MIN: u64 = 16 << 20;
/// Largest segment size that may be asked for.
pub const SEGMENT_BYTES_MAX: u64 = 64 << 20;
/// Records in one segment that a decoder accepts.
pub const SEGMENT_RECORDS_MAX: usize = 1 << 20;
/// Segments that one log entry may name.
pub const LOG_ENTRY_SEGMENTS_MAX: usize = 4_096;
/// Epochs that one log entry may commit.
pub const LOG_ENTRY_EPOCHS_MAX: usize = 1_024;
/// Points that one entry of maintenance may expire.
pub const LOG_ENTRY_EXPIRED_MAX: usize = 65_536;
/// Segments that one entry of maintenance may replace.
pub const LOG_ENTRY_PATHS_MAX: usize = 8_192;
/// Log entries after which a checkpoint is made.
pub const CHECKPOINT_INTERVAL_ENTRIES: u64 = 64;

/// Longest name of a machine, volume or receiver, in bytes.
pub const NAME_BYTES_MAX: usize = 128;
/// Longest path of an object in the store, in bytes.
pub const STORE_PATH_BYTES_MAX: usize = 512;
/// Wrapped copies of one data key that a volume header may hold.
pub const WRAPPED_KEYS_MAX: usize = 64;
/// Longest text of an error sent to a peer, in bytes.
pub const ERROR_TEXT_BYTES_MAX: usize = 1_024;

/// Smallest memory budget with which a process starts.
pub const MEMORY_BUDGET_BYTES_MIN: u64 = 64 << 20;
/// Default share of effective memory, in percent (the product's range is 6 to 10).
pub const MEMORY_BUDGET_PERCENT_DEFAULT: u64 = 8;

const _: () = assert!(usize::BITS == 64, "lengths of files and records are taken for usize");
const _: () = assert!(BLOCK_BYTES == 262_144);
const _: () = assert!(RECORD_BYTES_MAX + 64 <= FRAME_BYTES_MAX);
const _: () = assert!(STAGED_LIST_MAX * 32 + 64 <= FRAME_BYTES_MAX);
const _: () = assert!((RECORD_BYTES_MAX as u64) < SEGMENT_BYTES_MIN);
const _: () = assert!(EPOCH_SEALED_BYTES_MAX.div_ceil(SEGMENT_BYTES_MIN) < LOG_ENTRY_SEGMENTS_MAX as u64);
const _: () = assert!(EPOCH_RECORDS_DECODE_MAX <= SEGMENT_RECORDS_MAX);
const _: () = assert!(
    LOG_ENTRY_EPOCHS_MAX * CLOSE_BYTES_MAX + LOG_ENTRY_SEGMENTS_MAX * (STORE_PATH_BYTES_MAX + 128)
        <= ENVELOPE_BODY_BYTES_MAX
);
const _: () = assert!(
    LOG_ENTRY_EXPIRED_MAX * 32
        + LOG_ENTRY_PATHS_MAX * (STORE_PATH_BYTES_MAX + 4)
        + LOG_ENTRY_SEGMENTS_MAX * (2 * STORE_PATH_BYTES_MAX + 128)
        <= ENVELOPE_BODY_BYTES_MAX
);
const _: () = assert!(EPOCH_RECORDS_DECODE_MAX * RECORD_META_BYTES <= ENVELOPE_BODY_BYTES_MAX);
