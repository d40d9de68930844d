//! One sealing thread.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::budget::Permit;
use common::format::record::Record;
use common::format::state::{HashChange, HashEntry};
use common::ids::{BlockIndex, Epoch};
use common::limits;
use common::seal::Sealer;

use super::order::ZeroRun;
use super::{Inner, Job, PassError, PassOutput, SealedRecord, Unwanted, Work};
use crate::capture::PageBuffer;
use crate::capture::cut::{Piece, PieceRead};
use crate::capture::scan::{self, BlockDifference, CHUNK_BLOCKS, CHUNK_BYTES};

/// Why a worker leaves a piece.
enum Stop {
    Failed(PassError),
    Unwanted,
}

impl From<Unwanted> for Stop {
    fn from(Unwanted: Unwanted) -> Self {
        Self::Unwanted
    }
}

impl<E: Into<PassError>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

pub(super) struct Worker {
    pool: Arc<Inner>,
    sealer: Sealer,
    chunk: PageBuffer,
    gathered: Vec<u8>,
    known: Vec<HashEntry>,
}

impl Worker {
    pub(super) fn new(pool: Arc<Inner>, sealer: Sealer) -> Self {
        Self {
            pool,
            sealer,
            chunk: PageBuffer::new(CHUNK_BYTES),
            gathered: Vec::with_capacity(limits::BLOCK_BYTES),
            known: Vec::with_capacity(CHUNK_BLOCKS),
        }
    }

    pub(super) fn run(mut self) {
        let pool = Arc::clone(&self.pool);
        while let Some((job, work)) = pool.take() {
            // A cut whose reading panics fails alone: the other volumes go on with this thread.
            let result = catch_unwind(AssertUnwindSafe(|| self.work(&job, work)));
            job.done(match result {
                Ok(Ok(()) | Err(Stop::Unwanted)) => Ok(()),
                Ok(Err(Stop::Failed(error))) => Err(error),
                Err(_) => Err(PassError::Died),
            });
            pool.wake();
        }
    }

    fn work(&mut self, job: &Job, work: Work) -> Result<(), Stop> {
        match work {
            Work::Piece { number, piece } => self.piece(job, number, &piece),
            Work::Run(run) => self.seal_run(job, run),
            Work::Finish => Ok(job.put_out(job.ending())?),
        }
    }

    fn piece(&mut self, job: &Job, number: u64, piece: &Piece) -> Result<(), Stop> {
        let pool = Arc::clone(&self.pool);
        let PieceRead { masks, comparable, source_bytes, mut permits } =
            job.config.pages.read(piece, self.chunk.bytes_mut())?;
        job.progress.bytes_read.fetch_add(source_bytes, Ordering::Relaxed);
        job.read_counter.increment(source_bytes);
        self.known.clear();
        if comparable.iter().any(|mask| !mask.is_empty()) {
            job.config.hashes.read(piece.first, CHUNK_BLOCKS, &mut self.known)?;
        }
        self.known.resize(CHUNK_BLOCKS, HashEntry::UNKNOWN);

        let _cpu = pool.cpu.enter();
        let mut zero_blocks = 0_u8;
        let mut differences = Vec::with_capacity(CHUNK_BLOCKS);
        for (index, known) in self.known.iter().enumerate() {
            let block = BlockIndex(piece.first.0 + index as u64);
            let bytes = &self.chunk.bytes()[index * limits::BLOCK_BYTES..][..limits::BLOCK_BYTES];
            let difference = scan::compare(&job.config.hash_key, bytes, masks[index], comparable[index], known);
            job.progress.pages_done.fetch_add(piece.masks[index].count().into(), Ordering::Relaxed);
            if difference.changed().is_empty() {
                continue;
            }
            let changed = u64::from(difference.changed().count());
            job.progress.pages_changed.fetch_add(changed, Ordering::Relaxed);
            job.progress.zero_pages.fetch_add(difference.zero.count().into(), Ordering::Relaxed);
            job.captured_counter.increment(changed * limits::PAGE_BYTES as u64);
            if difference.all_zero {
                zero_blocks |= 1 << index;
            } else {
                differences.push((index, block, difference));
            }
        }
        // Told before sealing, which may have to wait for the budget.
        let runs = job.lock().order.compared(number, piece.first, zero_blocks);
        for (index, block, difference) in differences {
            self.seal_block(job, index, block, difference, permits[index].take())?;
        }
        drop(permits);
        runs.into_iter().try_for_each(|run| self.seal_run(job, run))
    }

    /// `charged` is what the block's pages were charged with while they were in memory: it goes on to the record.
    fn seal_block(
        &mut self,
        job: &Job,
        index: usize,
        block: BlockIndex,
        difference: BlockDifference,
        charged: Option<Permit>,
    ) -> Result<(), Stop> {
        let bytes = &self.chunk.bytes()[index * limits::BLOCK_BYTES..][..limits::BLOCK_BYTES];
        let pages = scan::gather(bytes, difference.data, &mut self.gathered);
        let most = (limits::RECORD_HEADER_BYTES + limits::SEAL_TAG_BYTES + pages.len()) as u64;
        let permit = match charged {
            Some(permit) if permit.bytes() >= most => permit,
            other => {
                drop(other);
                job.config.budget.acquire_blocking(most)?
            }
        };
        let ticket = job.config.gate.ticket()?;
        let compression = job.guess.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
        let record = self.sealer.seal_block(
            ticket.key(),
            block,
            difference.data,
            difference.zero,
            ticket.counter(),
            pages,
            compression,
        )?;
        if !pages.is_empty() {
            let mut guess = job.guess.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            guess.learn(compression, record.header().codec);
        }
        let epoch = ticket.epoch();
        let length = record.bytes().len();
        put_out(job, epoch, record, difference.into_change(block), permit)?;
        ticket.seal_done(length);
        Ok(())
    }

    fn seal_run(&mut self, job: &Job, run: ZeroRun) -> Result<(), Stop> {
        let most = limits::RECORD_HEADER_BYTES + limits::SEAL_TAG_BYTES;
        let permit = job.config.budget.acquire_blocking(most as u64)?;
        let ticket = job.config.gate.ticket()?;
        let record = self.sealer.seal_zero_range(ticket.key(), run.first, run.count, ticket.counter());
        let change = HashChange::ZeroBlocks { first: run.first, count: run.count };
        let epoch = ticket.epoch();
        let length = record.bytes().len();
        put_out(job, epoch, record, change, permit)?;
        ticket.seal_done(length);
        Ok(())
    }
}

fn put_out(job: &Job, epoch: Epoch, record: Record, change: HashChange, mut permit: Permit) -> Result<(), Unwanted> {
    let meta = record.meta();
    permit.shrink(u64::from(meta.record_len));
    job.progress.records.fetch_add(1, Ordering::Relaxed);
    job.progress.record_bytes.fetch_add(meta.record_len.into(), Ordering::Relaxed);
    job.put_out(PassOutput::Sealed(SealedRecord { epoch, record, meta, change, permit }))
}
