//! The nbd path with clients that others wrote: libnbd's tools, QEMU's, fio's engine, and file systems mounted over it; and
//! that a client which connects again sees the sender's end as a pause, never as an error.

#![allow(
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking and prints what it measured"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use blockferry_tests::conformance::drive::{self, find, scaled};
use blockferry_tests::conformance::history::History;
use blockferry_tests::exported::FuseExport;
use blockferry_tests::images::{self, Random};
use blockferry_tests::loops::{LoopDevice, Mounted};
use blockferry_tests::pair::{Pair, assert_same_content, check, wait_for};
use blockferry_tests::protected::Protected;
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// A pair whose sender serves `disk.img` as export `disk`.
struct Served {
    // Dropped before the pair, whose folder its log is in.
    sender: Protected,
    pair: Pair,
    disk: PathBuf,
    socket: PathBuf,
}

impl Served {
    fn start(make: impl FnOnce(&Path), flags: &[&str]) -> Self {
        let pair = Pair::start();
        let (disk, socket) = (pair.file("disk.img"), pair.file("nbd.sock"));
        make(&disk);
        let volume = format!("disk={},capture=nbd,listen={}", disk.display(), socket.display());
        let sender = Protected::start(&pair, &[&volume], flags);
        let served = Self { pair, sender, disk, socket };
        wait_for("the export", || std::os::unix::net::UnixStream::connect(&served.socket).ok());
        served
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket.display())
    }

    /// A point now, which has to equal the disk.
    fn point_equals_disk(&mut self) {
        let (_, id) = drive::ask(&mut self.sender, "disk", &History::default());
        self.pair.restores_to("disk", &id, &self.disk);
    }

    /// The export as a file, by QEMU's storage daemon: it connects again for a minute.
    fn as_file(&self) -> FuseExport {
        FuseExport::start(&self.socket, &self.pair.file("export"))
    }
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|error| panic!("{program} (make deps installs it): {error}"));
    check(&format!("{program} {args:?}"), &output);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn random_image(path: &Path, mib: u64) {
    let file = std::fs::File::create(path).expect("a file");
    file.set_len(mib * MIB).expect("sparse files");
    drop(file);
    let _ = images::churn(path, mib * 128, 3);
}

#[test]
fn tools_of_libnbd_qemu_and_fio_read_and_write_what_is_replicated() {
    let mut served = Served::start(|disk| random_image(disk, 64), &[]);
    let uri = served.uri();

    let list: Value = serde_json::from_str(&run("nbdinfo", &["--json", "--list", &uri])).expect("JSON");
    let export = &list["exports"][0];
    assert_eq!((export["export-name"].as_str(), export["export-size"].as_u64()), (Some("disk"), Some(64 * MIB)));
    for can in ["can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"] {
        assert_eq!(export[can].as_bool(), Some(true), "{can}: {list}");
    }
    assert_eq!(export["is_read_only"].as_bool(), Some(false));
    assert!(export["block_size_maximum"].as_u64().is_some_and(|size| size >= MIB), "block sizes are told: {list}");
    assert_eq!(list["structured"].as_bool(), Some(true), "structured replies: {list}");
    let by_empty_name = format!("nbd+unix:///?socket={}", served.socket.display());
    assert_eq!(run("nbdinfo", &["--size", &by_empty_name]).trim(), (64 * MIB).to_string());

    let copy = served.pair.file("copy.img");
    run("nbdcopy", &["--connections=4", &uri, &copy.to_string_lossy()]);
    assert_same_content(&copy, &served.disk);
    served.point_equals_disk();

    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, &copy.to_string_lossy()]);
    run(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "write -P 0x5a 1M 300k",
            "-c",
            "write -P 0xa5 1049077 777",
            "-c",
            "write -f -P 0x11 20M 4k",
            "-c",
            "write -z 8M 3M",
            "-c",
            "discard 30M 2M",
            "-c",
            "flush",
            "-c",
            "read -P 0xa5 1049077 777",
            "-c",
            "read -P 0 8M 3M",
            &uri,
        ],
    );
    served.point_equals_disk();

    let other = served.pair.file("other.img");
    random_image(&other, 64);
    run("nbdcopy", &["--connections=4", &other.to_string_lossy(), &uri]);
    assert_same_content(&other, &served.disk);
    served.point_equals_disk();

    let fio = [
        "--name=verify",
        "--ioengine=nbd",
        "--rw=randrw",
        "--bsrange=512-64k",
        "--blockalign=512",
        "--iodepth=16",
        "--size=48M",
        "--io_size=48M",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--fsync=64",
        "--output-format=terse",
    ];
    run("fio", &[&fio[..], &[&format!("--uri={uri}")]].concat());
    served.point_equals_disk();
    served.sender.stop();
}

#[test]
fn several_exports_answer_over_a_unix_socket_and_over_tcp() {
    let pair = Pair::start();
    let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
    let mut volumes = Vec::new();
    for (name, listen) in [("a", "shared.sock"), ("b", "shared.sock"), ("c", "")] {
        let disk = pair.file(&format!("{name}.img"));
        random_image(&disk, 8);
        let listen = if listen.is_empty() { free.to_string() } else { pair.file(listen).display().to_string() };
        volumes.push(format!("{name}={},capture=nbd,listen={listen}", disk.display()));
    }
    let mut sender = Protected::start(&pair, &volumes.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    wait_for("the exports", || {
        sender.assert_running();
        std::net::TcpStream::connect(free).ok()
    });
    let shared = |name: &str| format!("nbd+unix:///{name}?socket={}", pair.file("shared.sock").display());
    let list: Value = serde_json::from_str(&run("nbdinfo", &["--json", "--list", &shared("")])).expect("JSON");
    let mut names: Vec<_> = list["exports"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|export| export["export-name"].as_str())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["a", "b"], "{list}");
    for (uri, byte) in [(shared("a"), "0x61"), (shared("b"), "0x62"), (format!("nbd://{free}/c"), "0x63")] {
        run("qemu-io", &["-f", "raw", "-c", &format!("write -P {byte} 64k 1M"), "-c", "flush", &uri]);
    }
    for name in ["a", "b", "c"] {
        let (_, id) = drive::ask(&mut sender, name, &History::default());
        pair.restores_to(name, &id, &pair.file(&format!("{name}.img")));
    }
}

/// A file system over NBD: filled, replicated while mounted, restored, checked, compared.
fn mounted_file_system(mkfs: &str, flags: &[&str], options: &str, fsck: &[&str]) {
    let make = |disk: &Path| {
        std::fs::File::create(disk).and_then(|file| file.set_len(320 * MIB)).expect("sparse files");
    };
    let mut served = Served::start(make, &[]);
    let export = served.as_file();
    let device = LoopDevice::attach(&export.file, false);
    device.format(mkfs, flags);
    let mounted = device.mount(&served.pair.file("mnt"), "");
    let tree = mounted.path().join("tree");
    run("cp", &["-r", "/usr/include", &tree.to_string_lossy()]);
    run("sync", &["-f", &tree.to_string_lossy()]);
    // More is written while the point is cut: what was synced before has to be in it.
    let noise = mounted.path().join("noise");
    let writing = std::thread::spawn(move || {
        for number in 0..200 {
            std::fs::write(noise.with_extension(number.to_string()), vec![7; 50_000]).expect("room");
        }
    });
    let (_, id) = drive::ask(&mut served.sender, "disk", &History::default());
    writing.join().expect("it writes");
    let restored = served.pair.file("restored.img");
    check("restore", &served.pair.restore_command("disk", &id, &restored).output().expect("it runs"));
    {
        // The journal is replayed by mounting, as after a power cut.
        let again = Mounted::mount(&restored, &served.pair.file("again"), options);
        run("diff", &["-r", "--no-dereference", "/usr/include", &again.path().join("tree").to_string_lossy()]);
    }
    run(fsck[0], &[&fsck[1..], &[&restored.to_string_lossy()]].concat());
    drop(mounted);
    drop(device);
    drop(export);
    served.point_equals_disk();
}

#[test]
fn an_ext4_mounted_over_nbd_is_restored_whole() {
    mounted_file_system("mkfs.ext4", &["-q", "-F"], "loop", &["e2fsck", "-f", "-n"]);
}

#[test]
fn an_xfs_mounted_over_nbd_is_restored_whole() {
    mounted_file_system("mkfs.xfs", &["-q", "-f"], "loop,nouuid", &["xfs_repair", "-n"]);
}

#[test]
fn sigkills_of_the_sender_are_pauses_for_a_client_that_reconnects_and_resend_little() {
    const DISK_MIB: u64 = 512;
    const ACTIVE_MIB: u64 = 24;
    let seed = drive::seed();
    let mut random = Random(seed);
    let kills = scaled(10, 50);
    let mut served = Served::start(|disk| random_image(disk, DISK_MIB), &["--epoch-interval", "500ms"]);
    served.point_equals_disk();
    let export = served.as_file();
    // QEMU is the client that connects again; fio writes into its file, verifies, and would end at the first error.
    let mut fio = Command::new("fio");
    fio.args(["--name=load", "--ioengine=psync", "--rw=randwrite", "--bs=4k", "--direct=1", "--numjobs=2", "--thread"]);
    fio.args(["--time_based", "--runtime=3600", "--rate_iops=400", "--exitall_on_error", "--allow_file_create=0"]);
    fio.arg(format!("--size={ACTIVE_MIB}M")).arg("--offset=64M").arg(format!("--filename={}", export.file.display()));
    fio.arg("--output-format=terse").stdout(Stdio::piped());
    let mut fio = fio.stderr(Stdio::piped()).spawn().expect("fio is installed by make deps");
    let (mut read_max, mut sent_max) = (0, 0);
    for kill in 0..kills {
        std::thread::sleep(Duration::from_millis(300 + random.below(900)));
        served.sender.kill();
        std::thread::sleep(Duration::from_millis(random.below(300)));
        served.sender.restart();
        wait_for("the volume to be followed again", || {
            served.sender.assert_running();
            let status = served.sender.status()?;
            (find(&status, "state")?.as_str() == Some("following")).then_some(())
        });
        let bytes = |name: &str| served.sender.metric(name) as u64;
        let read = bytes("blockferry_sender_source_read_bytes_total");
        let sent = bytes("blockferry_sender_sent_bytes_total");
        println!("kill {kill}: {read} bytes read again, {sent} bytes sent until followed again");
        (read_max, sent_max) = (read_max.max(read), sent_max.max(sent));
        assert!(fio.try_wait().expect("a child can be asked").is_none(), "fio ended");
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&fio), rustix::process::Signal::INT)
        .expect("it runs");
    let output = {
        wait_for("fio to end", || fio.try_wait().expect("a child can be asked"));
        fio.wait_with_output().expect("it ended")
    };
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!errors.contains("error"), "the client saw an error:\n{errors}");
    drop(export);
    served.point_equals_disk();
    // What was active, and a region of the log at either end; not the disk.
    let bound = (ACTIVE_MIB + 8) * MIB;
    assert!(read_max <= bound && sent_max <= 2 * bound, "{read_max} read, {sent_max} sent after one kill");
}
