//! The whole of it over real sockets and files: what a client wrote is what the cuts come to.

#![expect(clippy::cast_possible_truncation, reason = "numbers of tests are small, or cut on purpose")]

mod model;

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

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_only_marked_regions_are_read_and_everything_where_the_log_is_damaged() {
    let bench = Bench::new(&content(2)).await;
    let mut replica = vec![0; DISK_BYTES as usize];
    let mut capture = bench.server.add_export(bench.config(Known::Nothing)).expect("served");
    assert_eq!(to_point(&mut capture, &mut replica).await, DISK_BYTES);
    // Two looks, since a bit stays for a while.
    capture.export.sweep().expect("swept");
    capture.export.sweep().expect("swept");
    let mut client = Client::connect(&bench.path("socket"), "");
    assert_eq!(client.write(5 << 20, &[9; 4096]), 0);
    drop(capture);
    let mut capture = bench.server.add_export(bench.config(Known::Hashes)).expect("served");
    assert_eq!(capture.status().state, CaptureState::Verifying);
    assert_eq!(to_point(&mut capture, &mut replica).await, 1 << 20, "one region");
    assert!(replica == bench.disk());
    drop(capture);
    let mut log = std::fs::read(bench.path("write-intent")).expect("the log");
    log[4099] ^= 1;
    std::fs::write(bench.path("write-intent"), &log).expect("damaged");
    let mut capture = bench.server.add_export(bench.config(Known::Hashes)).expect("served");
    assert_eq!(to_point(&mut capture, &mut replica).await, DISK_BYTES);
    capture.detach().expect("removed");
    assert!(!bench.path("write-intent").exists());
    assert!(!bench.path("socket").exists(), "nobody listens");
    let mut capture = bench.server.add_export(bench.config(Known::Hashes)).expect("served");
    assert_eq!(to_point(&mut capture, &mut replica).await, DISK_BYTES, "no log: everything is compared");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_socket_is_replaced_a_live_one_and_another_file_are_not() {
    let bench = Bench::new(&content(3)).await;
    drop(std::os::unix::net::UnixListener::bind(bench.path("socket")).expect("a stale socket"));
    let capture = bench.server.add_export(bench.config(Known::Nothing)).expect("served");
    let mode = std::os::unix::fs::PermissionsExt::mode(&bench.path("socket").metadata().expect("there").permissions());
    assert_eq!(mode & 0o777, 0o600);
    let mut client = Client::connect(&bench.path("socket"), "disk");
    assert_eq!(client.write(0, &[1]), 0);
    std::fs::copy(bench.path("disk"), bench.path("other")).expect("a copy");
    let elsewhere = NbdServer::start().await.expect("a runtime");
    let mut config = NbdConfig { path: bench.path("other"), ..bench.config(Known::Nothing) };
    let refused = elsewhere.add_export(config.clone()).expect_err("in use");
    assert!(matches!(refused, CaptureError::Listen { .. }), "{refused}");
    config.listen = vec![ListenAddr::Unix(bench.path("other"))];
    let refused = elsewhere.add_export(config).expect_err("a file");
    assert!(refused.to_string().contains("no socket"), "{refused}");
    let refused = elsewhere.add_export(bench.config(Known::Nothing)).expect_err("the disk is served");
    assert!(refused.to_string().contains("another process"), "{refused}");
    drop(capture);
    assert!(client.0.read(&mut [0]).is_ok_and(|read| read == 0), "the client is let go without a word");
}

#[tokio::test(flavor = "multi_thread")]
async fn several_exports_share_an_address_and_are_told_by_name() {
    let bench = Bench::new(&content(4)).await;
    std::fs::write(bench.path("second"), vec![5; 1 << 20]).expect("a disk");
    std::fs::create_dir(bench.path("state")).expect("a directory");
    let listen = vec![ListenAddr::Unix(bench.path("socket")), ListenAddr::Tcp("127.0.0.1:0".to_owned())];
    let config = NbdConfig { listen, ..bench.config(Known::Nothing) };
    let second = NbdConfig {
        name: "second".to_owned(),
        path: bench.path("second"),
        state_dir: bench.path("state"),
        ..config.clone()
    };
    let _first = bench.server.add_export(config).expect("served");
    let second = bench.server.add_export(second).expect("served");
    assert_eq!(bench.server.tcp_addresses().len(), 1);
    let mut of_second = Client::connect(&bench.path("socket"), "second");
    assert_eq!(of_second.read(0, 3), Ok(vec![5; 3]));
    let mut of_first = Client::connect(&bench.path("socket"), "disk");
    drop(second);
    assert!(of_second.0.read(&mut [0]).is_ok_and(|read| read == 0));
    assert_eq!(of_first.read(0, 3).expect("still served"), bench.disk()[..3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_hostile_client_sends_ends_its_own_connection_only() {
    let bench = Bench::new(&content(5)).await;
    let capture = bench.server.add_export(bench.config(Known::Nothing)).expect("served");
    let mut good = Client::connect(&bench.path("socket"), "disk");
    let mut wrong = Client::connect(&bench.path("socket"), "disk");
    wrong.0.write_all(&[0x55; 28]).expect("taken");
    assert!(wrong.0.read(&mut [0]).is_ok_and(|read| read == 0), "out of step");
    let mut short = Client::connect(&bench.path("socket"), "disk");
    short.send(0, 1, 0, 4096, &[9; 100]);
    drop(short);
    let mut long = Client::connect(&bench.path("socket"), "disk");
    long.send(0, 1, 0, u32::MAX, &[]);
    assert!(long.0.read(&mut [0]).is_ok_and(|read| read == 0), "too long");
    let mut beyond = Client::connect(&bench.path("socket"), "disk");
    assert_eq!(beyond.write(DISK_BYTES - 100_000, &vec![7; 300_000]), 28);
    assert_eq!(beyond.read(0, 10).expect("in step"), content(5)[..10], "the payload was skipped");
    let mut noise = UnixStream::connect(bench.path("socket")).expect("it listens");
    noise.write_all(&[0xff; 100]).expect("taken");
    assert_eq!(good.write(0, &[1; 10]), 0);
    assert!(bench.disk()[10..] == content(5)[10..], "nothing else was written");
    drop(capture);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_point_runs_hooks_around_the_cut_and_is_weaker_where_they_fail() {
    let bench = Bench::new(&content(6)).await;
    for (name, text) in
        [("pre.d/a", "#!/bin/sh\necho pre >> \"$0.log\"\n"), ("post.d/a", "#!/bin/sh\necho post >> \"$0.log\"\n")]
    {
        let path = bench.path("hooks").join(name);
        std::fs::create_dir_all(path.parent().expect("it has one")).expect("made");
        std::fs::write(&path, text).expect("written");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&path, mode).expect("set");
    }
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(bench.path("hooks"), mode).expect("set");
    let hooks = Hooks::load(&bench.path("hooks"), Duration::from_secs(30)).expect("ours");
    assert!(hooks.is_some());
    let mut capture = bench.server.add_export(NbdConfig { hooks, ..bench.config(Known::Nothing) }).expect("served");
    let mut replica = vec![0; DISK_BYTES as usize];
    to_point(&mut capture, &mut replica).await;
    let wish = PointWish { consistency: Consistency::Application, group: None };
    capture.want_point(wish.clone());
    let cut = capture.next().await.expect("a cut");
    assert_eq!(cut.asserts, Asserts::Point(Consistency::Application));
    assert_eq!(cut.weaker, "");
    replay(&*cut.pages, &mut replica);
    std::fs::write(bench.path("hooks/pre.d/a"), "#!/bin/sh\nexit 3\n").expect("written");
    capture.want_point(wish);
    let cut = capture.next().await.expect("a cut");
    assert_eq!(cut.asserts, Asserts::Point(Consistency::Crash));
    assert!(cut.weaker.contains("pre hook"), "{}", cut.weaker);
}
