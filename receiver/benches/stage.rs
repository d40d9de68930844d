//! The stage under fifty volumes that write random blocks at once, beside its log path and a plain append and sync of the same
//! bytes. Each variant runs in a process of its own; they take turns, three rounds, and the table shows medians.
//!
//! `cargo bench -p blockferry-receiver --bench stage`; `STAGE_BENCH_MIB` sets the payload of a run (default 512),
//! `STAGE_BENCH_DIR` where it is written.

#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "figures for a table")]

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use common::format::record::{Codec, Record, RecordHeader, RecordKind};
use common::ids::{BlockIndex, Epoch, Incarnation, KeyId, PageMask, VolumeId};
use common::limits::{PAGE_BYTES, RECORD_HEADER_BYTES, SEAL_TAG_BYTES};
use receiver::stage::{Stage, StageConfig};
use tokio::sync::{Semaphore, oneshot};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
common::configure_jemalloc!();

const VOLUMES: u8 = 50;
/// Records of one volume that wait to be acknowledged.
const WINDOW: usize = 32;
const ROUNDS: usize = 3;
const VARIANTS: [&str; 3] = ["ingest", "log", "append"];

/// What one run came to.
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
struct Figures {
    mb_per_s: f64,
    written_per_byte: f64,
    cpu_s_per_gib: f64,
    resident_mib: f64,
    p50_ms: f64,
    p99_ms: f64,
    free_ms: f64,
}

#[expect(clippy::print_stdout, reason = "the bench's output")]
fn main() -> Result<()> {
    if let Ok(variant) = std::env::var("STAGE_BENCH_VARIANT") {
        println!("{}", serde_json::to_string(&run(&variant)?)?);
        return Ok(());
    }
    let mut found: Vec<Vec<Figures>> = vec![Vec::new(); VARIANTS.len()];
    for _ in 0..ROUNDS {
        for (variant, found) in VARIANTS.iter().zip(&mut found) {
            let output = Command::new(std::env::current_exe()?).env("STAGE_BENCH_VARIANT", variant).output()?;
            anyhow::ensure!(output.status.success(), "{variant}: {}", String::from_utf8_lossy(&output.stderr));
            found.push(serde_json::from_slice(&output.stdout)?);
        }
    }
    println!("{VOLUMES} volumes, random blocks, records of 4 to 64 KiB, {} MiB a run, medians of {ROUNDS}", mib());
    println!(
        "| path | MB/s | device bytes per byte | CPU-s per GiB | peak resident MiB | ack p50 / p99 ms | freeing ms |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for (variant, runs) in VARIANTS.iter().zip(&found) {
        let median = |of: fn(&Figures) -> f64| {
            let mut values: Vec<f64> = runs.iter().map(of).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        println!(
            "| {variant} | {:.0} | {:.2} | {:.2} | {:.0} | {:.1} / {:.1} | {:.0} |",
            median(|run| run.mb_per_s),
            median(|run| run.written_per_byte),
            median(|run| run.cpu_s_per_gib),
            median(|run| run.resident_mib),
            median(|run| run.p50_ms),
            median(|run| run.p99_ms),
            median(|run| run.free_ms),
        );
    }
    Ok(())
}

fn mib() -> u64 {
    std::env::var("STAGE_BENCH_MIB").ok().and_then(|text| text.parse().ok()).unwrap_or(512)
}

/// Noise that records are cut from.
struct Noise(Vec<u8>);

impl Noise {
    fn new() -> Self {
        let mut bytes = vec![0; 4 << 20];
        blake3::Hasher::new().update(b"noise").finalize_xof().fill(&mut bytes);
        Self(bytes)
    }

    fn record(&self, volume: u8, epoch: u64, number: u64) -> Record {
        // A multiplicative hash scatters blocks over a terabyte and sizes over 1 to 16 pages.
        let mixed =
            (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(volume).wrapping_mul(0xd6e8_feb8_6659_fd93);
        let pages = (mixed >> 60) as u32 + 1;
        let plain_len = pages * PAGE_BYTES as u32;
        let header = RecordHeader {
            kind: RecordKind::Delta,
            codec: Codec::Raw,
            volume: VolumeId([volume; 16]),
            incarnation: Incarnation(1),
            key_id: KeyId(1),
            epoch: Epoch(epoch),
            block: BlockIndex((mixed >> 20) % (1 << 22)),
            data_mask: PageMask::first(pages),
            zero_mask: PageMask::EMPTY,
            block_count: 1,
            plain_len,
            sealed_len: plain_len + SEAL_TAG_BYTES as u32,
            dictionary_id: 0,
            counter: number,
        };
        let mut buffer = Vec::with_capacity(header.record_len());
        buffer.resize(RECORD_HEADER_BYTES, 0);
        let at = (mixed % (3 << 20)) as usize;
        buffer.extend_from_slice(&self.0[at..at + header.sealed_len as usize]);
        Record::assemble(header, buffer)
    }
}

/// Where a variant puts records; resolves once they are durable.
#[derive(Clone)]
enum Target {
    Stage(Stage),
    Append(Arc<Append>),
}

impl Target {
    async fn put(&self, record: Record) -> Result<oneshot::Receiver<()>> {
        let (done, wait) = oneshot::channel();
        match self {
            Self::Stage(stage) => {
                let ticket = stage.submit(record, None).await?;
                tokio::spawn(async move {
                    if ticket.await.is_ok() {
                        let _ = done.send(());
                    }
                });
            }
            Self::Append(append) => {
                // Hashed like the stage does.
                std::hint::black_box(record.meta());
                let slot = Arc::clone(&append.slots).acquire_many_owned(record.bytes().len() as u32).await?;
                append.queue.send((record, done, slot)).ok().context("the writer ended")?;
            }
        }
        Ok(wait)
    }
}

type Queued = (Record, oneshot::Sender<()>, tokio::sync::OwnedSemaphorePermit);

/// Group commit to one file: the limit of what any stage can do.
struct Append {
    queue: mpsc::Sender<Queued>,
    slots: Arc<Semaphore>,
}

impl Append {
    fn start(path: &Path) -> Result<Self> {
        let mut file = File::create(path)?;
        let (queue, work) = mpsc::channel::<Queued>();
        std::thread::spawn(move || {
            while let Ok(first) = work.recv() {
                let (mut bytes, mut batch) = (0, vec![first]);
                while bytes < 32 << 20
                    && let Ok(next) = work.try_recv()
                {
                    bytes += next.0.bytes().len();
                    batch.push(next);
                }
                let mut buffer = Vec::with_capacity(1 << 20);
                for (record, _, _) in &batch {
                    buffer.extend_from_slice(record.bytes());
                    if buffer.len() >= 1 << 20 {
                        file.write_all(&buffer).expect("the bench's disk works");
                        buffer.clear();
                    }
                }
                file.write_all(&buffer).expect("the bench's disk works");
                file.sync_data().expect("the bench's disk works");
                for (_, done, _) in batch {
                    let _ = done.send(());
                }
            }
        });
        Ok(Self { queue, slots: Arc::new(Semaphore::new(64 << 20)) })
    }
}

fn run(variant: &str) -> Result<Figures> {
    let base =
        std::env::var("STAGE_BENCH_DIR").map_or_else(|_| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
    let dir = tempfile::tempdir_in(base)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(measure(variant, dir.path()))
}

async fn measure(variant: &str, dir: &Path) -> Result<Figures> {
    let mut config = StageConfig::new(16 << 30, 64 << 20)?;
    if variant == "log" {
        config.ingest_bytes_min = usize::MAX;
    }
    let target = match variant {
        "append" => Target::Append(Arc::new(Append::start(&dir.join("file"))?)),
        _ => Target::Stage(Stage::open(&dir.join("stage"), config)?.0),
    };
    let noise = Arc::new(Noise::new());
    let per_volume = (mib() << 20) / u64::from(VOLUMES);
    let before = (written_bytes()?, cpu_seconds()?);
    let started = Instant::now();
    let mut tasks = Vec::new();
    for volume in 1..=VOLUMES {
        tasks.push(tokio::spawn(write_volume(target.clone(), Arc::clone(&noise), volume, per_volume)));
    }
    let (mut bytes, mut waits) = (0_u64, Vec::new());
    for task in tasks {
        let (written, mut latencies) = task.await??;
        bytes += written;
        waits.append(&mut latencies);
    }
    let wall = started.elapsed();
    let (written, cpu) = (written_bytes()? - before.0, cpu_seconds()? - before.1);
    waits.sort_unstable();
    let at = |permille: usize| waits[(waits.len() - 1) * permille / 1000].as_secs_f64() * 1e3;
    let freeing = Instant::now();
    if let Target::Stage(stage) = &target {
        for volume in 1..=VOLUMES {
            stage.drop_epoch(VolumeId([volume; 16]), Epoch(1)).await?;
        }
        while stage.used_bytes() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    Ok(Figures {
        mb_per_s: bytes as f64 / 1e6 / wall.as_secs_f64(),
        written_per_byte: written as f64 / bytes as f64,
        cpu_s_per_gib: cpu * f64::from(1 << 30) / bytes as f64,
        resident_mib: peak_resident_kib()? as f64 / 1024.0,
        p50_ms: at(500),
        p99_ms: at(990),
        free_ms: freeing.elapsed().as_secs_f64() * 1e3,
    })
}

async fn write_volume(target: Target, noise: Arc<Noise>, volume: u8, bytes_max: u64) -> Result<(u64, Vec<Duration>)> {
    let (mut bytes, mut number, mut latencies) = (0, 0, Vec::new());
    let window = Arc::new(Semaphore::new(WINDOW));
    let mut waiting = tokio::task::JoinSet::new();
    let mut used = std::collections::HashSet::new();
    while bytes < bytes_max {
        let place = Arc::clone(&window).acquire_owned().await?;
        number += 1;
        let record = noise.record(volume, 1, number);
        if !used.insert(record.header().block) {
            continue;
        }
        bytes += record.bytes().len() as u64;
        let sent = Instant::now();
        let durable = target.put(record).await?;
        waiting.spawn(async move {
            let result = durable.await;
            drop(place);
            result.map(|()| sent.elapsed())
        });
        while let Some(done) = waiting.try_join_next() {
            latencies.push(done??);
        }
    }
    while let Some(done) = waiting.join_next().await {
        latencies.push(done??);
    }
    Ok((bytes, latencies))
}

fn field(file: &str, name: &str) -> Result<u64> {
    let text = std::fs::read_to_string(file)?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name} in {file}"))?;
    Ok(line.split_whitespace().next().unwrap_or_default().parse()?)
}

fn written_bytes() -> Result<u64> {
    field("/proc/self/io", "write_bytes:")
}

fn peak_resident_kib() -> Result<u64> {
    field("/proc/self/status", "VmHWM:")
}

fn cpu_seconds() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/self/stat")?;
    // proc(5): fields 14 and 15 are user and system time; the name in parentheses may hold spaces.
    let rest = text.rsplit_once(") ").context("no name in /proc/self/stat")?.1;
    let ticks: Vec<u64> = rest.split(' ').skip(11).take(2).map(str::parse).collect::<Result<_, _>>()?;
    Ok(ticks.iter().sum::<u64>() as f64 / rustix::param::clock_ticks_per_second() as f64)
}
