/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Marks the pages of one disk that are written, from the kernel's block tracepoints.
 *
 * Promises: a page is marked before a write to it is handed to the driver, and again before its writer can learn that it is
 * complete. Where the pages can't be known, the whole disk is marked.
 * Never: changes a request, waits, or looks at content.
 *
 * A buffer is an array of 64-bit words: one word per block of 256 KiB with a bit per page; behind them one bit per block
 * that stands for all of its pages, so that a discard of gigabytes is a few hundred words; and one last word whose bit 0
 * stands for the whole disk. `buffers[0]` is the buffer in use. User space replaces it, and the replacement returns only
 * when no program runs any more that saw the old one.
 *
 * Why each program is there three times. The kernel does not run a tracing program on a processor on which the same program
 * is already running: an interrupt that completes requests while a task is in the middle of the completion program would
 * go unseen, and its mark would be lost. Such runs nest at most three deep (task, soft interrupt, hard interrupt), so at most
 * two of three copies can be under way when an event comes, and at least one runs. Marking twice is the same as once. Telling
 * the level of an event, so that one copy suffices, would need the preemption count, whose address many kernels keep to
 * themselves.
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Same layout as `Config` in sender/src/capture/ebpf/program.rs. */
struct config {
	__u64 start_sector; /* of the device on its disk, in sectors of 512 bytes */
	__u64 end_sector; /* first sector beyond it */
	__u32 blocks; /* words with page bits; block bits start here */
	__u32 words; /* all words of a buffer; the last holds FLAG_EVERYTHING */
	__u32 major; /* of the whole disk */
	__u32 first_minor;
};
const volatile struct config config = {};

#define FLAG_EVERYTHING 1ull

#define PAGE_SECTORS_SHIFT 3 /* 8 sectors of 512 bytes */
#define BLOCK_PAGES_SHIFT 6 /* 64 pages */

/* Whole blocks that are marked page by page; a longer range is marked with block bits. A write rarely spans more than four. */
#define DIRECT_BLOCKS 32
/* Words of block bits that the longest request (4 GiB less a sector) touches: 16,384 blocks, and one for its start. */
#define BLOCK_WORDS 258
/* Ranges of one discard: NVMe, the most generous, has 256. */
#define DISCARD_RANGES 256

/* linux/blk_types.h, the same in all kernels since 4.10. */
#define OP_MASK 0xff
#define OP_READ 0
#define OP_WRITE 1
#define OP_FLUSH 2
#define OP_DISCARD 3
#define OP_PASSTHROUGH_FIRST 32

#define COPIES 3

/* The buffer in use. The inner map is given by the loader, since its size is the disk's. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} buffers SEC(".maps");

/* Per processor. Same layout as `Counts` in sender/src/capture/ebpf/program.rs. */
struct counts {
	__u64 marks[COPIES]; /* events that a copy marked for, counted before the bits are set */
	__u64 unknown[COPIES]; /* of them, events whose pages could not be known */
};
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counts);
} counts SEC(".maps");

/*
 * Bios of a stacked device that are on their way: where a bio was headed is known only when it is queued, since drivers
 * advance and redirect it.
 */
struct place {
	__u64 sector;
	__u64 sectors;
};
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384); /* 2 MiB; more are on their way only where something is badly wrong */
	__type(key, __u64);
	__type(value, struct place);
} bios SEC(".maps");

static __always_inline void set_bits(void *buffer, __u32 index, __u64 bits)
{
	__u64 *word = bpf_map_lookup_elem(buffer, &index);

	/* Bits of the buffer in use are never cleared, so one that is seen set stays set. */
	if (word && (*(volatile __u64 *)word & bits) != bits)
		__sync_fetch_and_or(word, bits);
}

/* Bits from `first` to the end of the word. */
#define BITS_FROM(first) (~0ull << ((first) & 63))
/* Bits up to and with `last`. */
#define BITS_TO(last) (~0ull >> (63 - ((last) & 63)))

/* Everything is dirty: what this event changed can't be told. */
__noinline int mark_everything(void)
{
	__u32 zero = 0;
	void *buffer = bpf_map_lookup_elem(&buffers, &zero);

	if (buffer)
		set_bits(buffer, config.words - 1, FLAG_EVERYTHING);
	return 0;
}

/* Marks the pages of sectors of the disk, as far as they are the device's. Global, so that it is verified once. */
__noinline int mark_sectors(__u64 sector, __u64 sectors)
{
	__u64 end = sector + sectors, first, last, first_block, last_block, block, word, last_word;
	__u32 zero = 0;
	void *buffer;
	int i;

	if (end < sector || end > config.end_sector)
		end = config.end_sector;
	if (sector < config.start_sector)
		sector = config.start_sector;
	if (sector >= end)
		return 0;
	buffer = bpf_map_lookup_elem(&buffers, &zero);
	if (!buffer)
		return 0;

	first = (sector - config.start_sector) >> PAGE_SECTORS_SHIFT;
	last = (end - 1 - config.start_sector) >> PAGE_SECTORS_SHIFT;
	first_block = first >> BLOCK_PAGES_SHIFT;
	last_block = last >> BLOCK_PAGES_SHIFT;
	if (first_block == last_block) {
		set_bits(buffer, first_block, BITS_FROM(first) & BITS_TO(last));
		return 0;
	}
	set_bits(buffer, first_block, BITS_FROM(first));
	set_bits(buffer, last_block, BITS_TO(last));
	/* Between them: whole blocks. */
	block = first_block + 1;
	if (last_block - block <= DIRECT_BLOCKS) {
		for (i = 0; i < DIRECT_BLOCKS; i++, block++) {
			if (block >= last_block)
				break;
			set_bits(buffer, block, ~0ull);
		}
		return 0;
	}
	last_block--;
	word = block >> 6;
	last_word = last_block >> 6;
	if (last_word - word >= BLOCK_WORDS) {
		/* No request is as long. */
		set_bits(buffer, config.words - 1, FLAG_EVERYTHING);
		return 0;
	}
	for (i = 0; i < BLOCK_WORDS; i++) {
		__u64 at = word + i, bits = ~0ull;

		if (at > last_word)
			break;
		if (at == word)
			bits &= BITS_FROM(block);
		if (at == last_word)
			bits &= BITS_TO(last_block);
		set_bits(buffer, config.blocks + at, bits);
	}
	return 0;
}

/* Counts an event that is going to be marked. Atomic: an interrupt may count in between. */
static __always_inline struct counts *count(int copy)
{
	__u32 zero = 0;
	struct counts *here = bpf_map_lookup_elem(&counts, &zero);

	if (here)
		__sync_fetch_and_add(&here->marks[copy], 1);
	return here;
}

static __always_inline int is_ours(struct gendisk *disk)
{
	return disk->major == config.major && disk->first_minor == config.first_minor;
}

/* True where an operation can change what the disk holds. Whatever is not known to be harmless counts. */
static __always_inline int changes(__u32 op)
{
	return op != OP_READ && op != OP_FLUSH;
}

static __always_inline void unknown(int copy)
{
	struct counts *here = count(copy);

	if (here)
		__sync_fetch_and_add(&here->unknown[copy], 1);
	mark_everything();
}

static __always_inline int on_request(struct request *rq, int copy)
{
	struct gendisk *disk;
	struct bio *bio;
	__u32 op, bytes;
	int i;

	if (bpf_core_field_exists(((struct request___before_5_17 *)rq)->rq_disk))
		disk = ((struct request___before_5_17 *)rq)->rq_disk;
	else
		disk = rq->q->disk;
	if (!is_ours(disk))
		return 0;
	op = rq->cmd_flags & OP_MASK;
	if (!changes(op))
		return 0;
	bytes = rq->__data_len;
	if (op >= OP_PASSTHROUGH_FIRST) {
		/* A command that somebody passed through. What it writes is in its own words; what carries no data out is not
		 * told apart from the many that are harmless (preflight says so). */
		if (!(op & 1) || !bytes)
			return 0;
		unknown(copy);
		return 0;
	}
	if (!bytes) {
		if (op != OP_WRITE) /* else a flush in the shape of a write */
			unknown(copy); /* a zone is reset or finished */
		return 0;
	}
	count(copy);
	if (op != OP_DISCARD) {
		/* At completion too this is the whole rest of the request: a failed one may have written any of it. */
		mark_sectors(rq->__sector, bytes >> 9);
		return 0;
	}
	/* Discards of ranges that do not touch may be merged: sector and length of the request then say nothing. */
	bio = rq->bio;
	for (i = 0; i < DISCARD_RANGES; i++) {
		if (!bio)
			return 0;
		mark_sectors(bio->bi_iter.bi_sector, bio->bi_iter.bi_size >> 9);
		bio = bio->bi_next;
	}
	if (bio)
		unknown(copy);
	return 0;
}

static __always_inline int on_bio_queued(struct bio *bio, int copy, __u64 flags)
{
	struct place place, *known;
	__u64 key = (__u64)bio;
	__u32 op, bytes;

	if (!is_ours(bio->bi_bdev->bd_disk))
		return 0;
	op = bio->bi_opf & OP_MASK;
	if (!changes(op))
		return 0;
	bytes = bio->bi_iter.bi_size;
	if (!bytes) {
		if (op != OP_WRITE)
			unknown(copy);
		return 0;
	}
	count(copy);
	place.sector = bio->bi_iter.bi_sector;
	place.sectors = bytes >> 9;
	known = bpf_map_lookup_elem(&bios, &key);
	if (!known || known->sector != place.sector || known->sectors != place.sectors)
		/* Where there is no room, the completion finds nothing and marks everything. */
		bpf_map_update_elem(&bios, &key, &place, flags);
	mark_sectors(place.sector, place.sectors);
	return 0;
}

/*
 * True where a bio that was not seen being queued is a part of one that was: drivers split bios without a word, and chain the
 * front to the rest, which keeps its place and completes last. Bios of a long discard are chained too, each to the one behind
 * it: those are not part of each other, hence the look at the sector. It is the part's first sector or, once the driver has
 * advanced it, the one behind its last.
 */
static __always_inline int is_part(struct bio *bio)
{
	__u64 key = (__u64)bio->bi_private, sector = bio->bi_iter.bi_sector, end;
	struct place *whole = bpf_map_lookup_elem(&bios, &key);

	if (!whole)
		return 0;
	end = whole->sector + whole->sectors;
	if (bio->bi_iter.bi_size)
		return whole->sector <= sector && sector < end;
	return whole->sector < sector && sector <= end;
}

static __always_inline int on_bio_completed(struct bio *bio, int copy)
{
	struct place *place;
	__u64 key = (__u64)bio;
	__u32 op = bio->bi_opf & OP_MASK;

	if (!changes(op))
		return 0;
	/* Looked up before anything else: a driver may have redirected it to another disk. */
	place = bpf_map_lookup_elem(&bios, &key);
	if (place) {
		count(copy);
		mark_sectors(place->sector, place->sectors);
		/* The last copy clears up for all; where it does not run, the place is overwritten at the bio's next use. */
		if (copy == COPIES - 1)
			bpf_map_delete_elem(&bios, &key);
		return 0;
	}
	if (!is_ours(bio->bi_bdev->bd_disk))
		return 0;
	/* A flush in the shape of a write leaves no place; its size was and is nothing. */
	if (op == OP_WRITE && !bio->bi_iter.bi_size && !bio->bi_iter.bi_sector)
		return 0;
	if (is_part(bio))
		return 0;
	/* It was queued before tracking began, or found no room. */
	unknown(copy);
	return 0;
}

#define PROGRAMS(name, tracepoint, call)                                                                                    \
	SEC("tp_btf/" tracepoint) int name##_0(__u64 *ctx) { const int copy = 0; return call; }                           \
	SEC("tp_btf/" tracepoint) int name##_1(__u64 *ctx) { const int copy = 1; return call; }                           \
	SEC("tp_btf/" tracepoint) int name##_2(__u64 *ctx) { const int copy = 2; return call; }

PROGRAMS(rq_issue, "block_rq_issue", on_request((struct request *)ctx[0], copy))
PROGRAMS(rq_complete, "block_rq_complete", on_request((struct request *)ctx[0], copy))
PROGRAMS(bio_queue, "block_bio_queue", on_bio_queued((struct bio *)ctx[0], copy, BPF_ANY))
/* A bio that was split: the front is a bio of its own, or, in device mapper, the rest is the same one; then its first place holds. */
PROGRAMS(bio_split, "block_split", on_bio_queued((struct bio *)ctx[0], copy, BPF_NOEXIST))
PROGRAMS(bio_complete, "block_bio_complete", on_bio_completed((struct bio *)ctx[1], copy))
