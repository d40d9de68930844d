//! The whole of it over real sockets and files: what a client wrote is what the cuts come to.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use common::budget::MemoryTable;
use common::limits::{BLOCK_BYTES, PAGE_BYTES};

use super::super::cut::CutPages;
use super::super::scan::CHUNK_BYTES;
use super::*;
use crate::capture::PageBuffer;

const DISK_BYTES: u64 = 8 << 20;

pub(super) fn budget(bytes: u64) -> Budget {
    Budget::new(MemoryTable::new(bytes)).expect("not empty")
}

/// Puts the pages of a cut on a replica. Returns how many bytes were read from the source.
pub(super) fn replay(pages: &dyn CutPages, replica: &mut [u8]) -> u64 {
    let mut buffer = PageBuffer::new(CHUNK_BYTES);
    let mut source_bytes = 0;
    while let Some(piece) = pages.next() {
        let read = pages.read(&piece, buffer.bytes_mut()).expect("readable");
        source_bytes += read.source_bytes;
        for (place, mask) in read.masks.iter().enumerate() {
            for index in mask.iter() {
                let from = place * BLOCK_BYTES + index as usize * PAGE_BYTES;
                let to = (piece.first.0 as usize + place) * BLOCK_BYTES + index as usize * PAGE_BYTES;
                let length = PAGE_BYTES.min(replica.len() - to);
                replica[to..to + length].copy_from_slice(&buffer.bytes()[from..from + length]);
            }
        }
    }
    source_bytes
}

struct Bench {
    directory: tempfile::TempDir,
    server: NbdServer,
}

impl Bench {
    async fn new(content: &[u8]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join("disk"), content).expect("a disk");
        Self { directory, server: NbdServer::start().await.expect("a runtime") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn config(&self, known: Known) -> NbdConfig {
        NbdConfig {
            name: "disk".to_owned(),
            volume: VolumeId([1; 16]),
            incarnation: Incarnation(1),
            path: self.path("disk"),
            listen: vec![ListenAddr::Unix(self.path("socket"))],
            state_dir: self.directory.path().to_owned(),
            epoch_interval: Duration::ZERO,
            overload: Overload::Bitmap,
            budget: budget(64 << 20),
            payload_max: 16 << 20,
            clock: Clock::System,
            hooks: None,
            events: Events::new(Clock::System),
            known,
        }
    }

    fn disk(&self) -> Vec<u8> {
        std::fs::read(self.path("disk")).expect("the disk")
    }
}

/// A client that knows no more than it has to.
struct Client(UnixStream);

impl Client {
    fn connect(path: &Path, name: &str) -> Self {
        let mut stream = UnixStream::connect(path).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).expect("a greeting");
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend_from_slice(b"IHAVEOPT");
        hello.extend_from_slice(&1_u32.to_be_bytes());
        hello.extend_from_slice(&(name.len() as u32).to_be_bytes());
        hello.extend_from_slice(name.as_bytes());
        stream.write_all(&hello).expect("taken");
        stream.read_exact(&mut [0; 10]).expect("size and flags");
        Self(stream)
    }

    fn send(&mut self, flags: u16, command: u16, offset: u64, length: u32, payload: &[u8]) {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&7_u64.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(payload);
        self.0.write_all(&bytes).expect("taken");
    }

    fn answer(&mut self) -> u32 {
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply).expect("a reply");
        assert_eq!(reply[..4], 0x6744_6698_u32.to_be_bytes());
        u32::from_be_bytes(reply[4..8].try_into().expect("four"))
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> u32 {
        self.send(0, 1, offset, bytes.len() as u32, bytes);
        self.answer()
    }

    fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>, u32> {
        self.send(0, 0, offset, length as u32, &[]);
        match self.answer() {
            0 => {
                let mut bytes = vec![0; length];
                self.0.read_exact(&mut bytes).expect("the bytes");
                Ok(bytes)
            }
            error => Err(error),
        }
    }

    fn command(&mut self, command: u16, offset: u64, length: u32) -> u32 {
        self.send(0, command, offset, length, &[]);
        self.answer()
    }
}

/// Takes cuts until one asserts a point, and replays and commits them.
async fn to_point(capture: &mut NbdCapture, replica: &mut [u8]) -> u64 {
    let mut source_bytes = 0;
    loop {
        let cut = tokio::time::timeout(Duration::from_secs(60), capture.next()).await.expect("in time").expect("a cut");
        source_bytes += replay(&*cut.pages, replica);
        capture.committed(cut.id).expect("noted");
        if cut.asserts == Asserts::Point(Consistency::Crash) {
            return source_bytes;
        }
    }
}

fn content(seed: u8) -> Vec<u8> {
    (0..DISK_BYTES).map(|at| (at / 512) as u8 ^ (at % 251) as u8 ^ seed).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_wrote_is_what_the_cuts_come_to() {
    let bench = Bench::new(&content(1)).await;
    let mut capture = bench.server.add_export(bench.config(Known::Nothing)).expect("served");
    let mut client = Client::connect(&bench.path("socket"), "disk");
    let mut replica = vec![0; DISK_BYTES as usize];
    assert_eq!(client.write(5000, &[7; 100]), 0, "it answers before the first replication");
    let read = to_point(&mut capture, &mut replica).await;
    assert!(read <= DISK_BYTES);
    assert!(replica == bench.disk(), "the first replication");
    // Whole pages, parts of pages over page borders, large, zeros, trims, at the ends.
    assert_eq!(client.write(0, &[1; PAGE_BYTES]), 0);
    assert_eq!(client.write(PAGE_BYTES as u64 * 10 - 3, &[2; 6]), 0);
    assert_eq!(client.write(1 << 20, &content(9)[..3 << 20]), 0);
    assert_eq!(client.command(6, (2 << 20) + 100, 300_000), 0);
    assert_eq!(client.command(4, (3 << 20) + 100, 500_000), 0);
    assert_eq!(client.write(DISK_BYTES - 1, &[3]), 0);
    assert_eq!(client.command(3, 0, 0), 0, "flush");
    let read = to_point(&mut capture, &mut replica).await;
    assert_eq!(read, 0, "contents were kept");
    assert!(replica == bench.disk());
    assert_eq!(client.read(PAGE_BYTES as u64 * 10 - 3, 6), Ok(vec![2; 6]));
    assert_eq!(client.read(0, 8 << 20).expect("readable"), bench.disk());
    assert_eq!(client.read(DISK_BYTES - 1, 2), Err(22));
    assert_eq!(client.write(DISK_BYTES - 1, &[0; 2]), 28);
    assert_eq!(client.command(4, DISK_BYTES, 1), 22);
    assert_eq!(client.read(DISK_BYTES - 1, 1), Ok(vec![3]), "an error does not put it out of step");
}
