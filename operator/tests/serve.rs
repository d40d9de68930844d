//! `serve` with clients that others wrote: libnbd's tools, QEMU's, and fio; and its ends, orderly and not.

#![allow(clippy::panic, clippy::cast_possible_truncation, reason = "a test")]

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use catalog::store::Store;
use catalog::volume::fixture::{FixtureVolume, change, image};
use common::format::close::Consistency;
use serde_json::Value;

const BLOCK: usize = 262_144;
const DISK: usize = 96 * BLOCK;
/// A deadline against hanging, not an expectation.
const PATIENCE: Duration = Duration::from_secs(120);

struct World {
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    volume: FixtureVolume,
    /// The older point.
    old: String,
    content: Vec<u8>,
}

impl World {
    /// A volume `web/my disk` with two points; the newer one is `content`.
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
        let url = format!("file://{}", dir.path().join("store").display());
        let (volume, old, content) = runtime.block_on(async {
            let store = Store::open(&url).await.expect("a store");
            let mut volume = FixtureVolume::create(&store, "web", "my disk", DISK as u64).await;
            volume.segments_per_epoch = 2;
            let old = image(DISK, 1);
            let point = volume.capture(&old, Some(Consistency::Crash)).await.id().to_string();
            let content = change(&old, 200, 2);
            volume.capture(&content, Some(Consistency::Crash)).await;
            (volume, point, content)
        });
        std::fs::write(dir.path().join("key"), volume.key_file.encode().as_bytes()).expect("writable");
        Self { dir, runtime, volume, old, content }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, command: &str) -> Command {
        let mut tool = Command::new(env!("CARGO_BIN_EXE_blockferry"));
        tool.arg(command).arg("--store").arg(format!("file://{}", self.path("store").display()));
        tool.args(["--volume", "web/my disk", "--key-file"]).arg(self.path("key"));
        tool.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        tool
    }

    /// What `restore` makes of the newest point.
    fn restored(&self) -> PathBuf {
        let path = self.path("restored.img");
        let output = self.command("restore").arg("--to").arg(&path).output().expect("it runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        path
    }

    fn serve(&self, flags: &[&str]) -> Served {
        self.serve_at(&self.path("nbd.sock").display().to_string(), flags)
    }

    fn serve_at(&self, address: &str, flags: &[&str]) -> Served {
        let log = std::fs::File::create(self.path("serve.log")).expect("a file");
        let mut command = self.command("serve");
        command.args(["--json", "--nbd", address, "--memory-budget", "64MiB", "--cache-dir"]).arg(self.dir.path());
        let mut child = command.args(flags).stderr(log).spawn().expect("it starts");
        let mut line = String::new();
        let mut out = std::io::BufReader::new(child.stdout.take().expect("piped"));
        std::io::BufRead::read_line(&mut out, &mut line).expect("readable");
        let log = || std::fs::read_to_string(self.path("serve.log")).unwrap_or_default();
        let ready: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("not ready: {line}{}", log()));
        let uri = ready["uri"].as_str().expect("a text").to_owned();
        Served { child, ready, uri }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("serve.log")).expect("readable")
    }
}

struct Served {
    child: Child,
    ready: Value,
    uri: String,
}

impl Served {
    /// SIGTERM; the exit code.
    fn stop(mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it runs");
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().expect("a child can be asked") {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("it does not end");
    }

    fn kill(&mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it ended");
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn try_run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    output.unwrap_or_else(|error| panic!("{program} (make test-deps installs it): {error}"))
}

fn run(program: &str, args: &[&str]) -> String {
    let output = try_run(program, args);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{program} {args:?}:\n{}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

fn qemu_io(uri: &str, commands: &[&str]) -> Output {
    let mut args = vec!["-f", "raw"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(uri);
    try_run("qemu-io", &args)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn tools_of_libnbd_and_qemu_see_over_socket_and_tcp_what_a_restore_writes() {
    let world = World::new();
    let restored = world.restored();
    assert!(std::fs::read(&restored).expect("readable") == world.content);
    let served = world.serve(&["--read-only"]);
    assert_eq!(served.ready["point"], world.volume.head().to_string());
    assert_eq!(served.ready["head"], world.volume.head().to_string());
    let list: Value = serde_json::from_str(&run("nbdinfo", &["--json", "--list", &served.uri])).expect("JSON");
    let export = &list["exports"][0];
    assert_eq!((export["export-name"].as_str(), export["export-size"].as_u64()), (Some("my disk"), Some(DISK as u64)));
    assert_eq!(export["is_read_only"].as_bool(), Some(true), "{list}");
    assert_eq!(export["can_multi_conn"].as_bool(), Some(true), "{list}");
    assert_eq!(list["structured"].as_bool(), Some(true), "{list}");
    let copy = world.path("copy.img");
    run("nbdcopy", &["--connections=4", &served.uri, &text(&copy)]);
    assert!(std::fs::read(&copy).expect("readable") == world.content);
    assert!(!qemu_io(&served.uri, &["write -P 1 0 4k"]).status.success(), "it is read-only");
    let by_empty_name = format!("nbd+unix:///?socket={}", text(&world.path("nbd.sock")));
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &by_empty_name, &text(&restored)]);
    assert_eq!(served.stop(), Some(143));
    assert!(!world.path("nbd.sock").exists());
    // A cache of next to nothing, a socket that a killed one left.
    let mut killed = world.serve(&[]);
    killed.kill();
    let served = world.serve_at("127.0.0.1:0", &["--read-only", "--cache-size", "1MiB"]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &served.uri, &text(&restored)]);
    let again = world.serve(&["--read-only"]);
    run("nbdcopy", &["--requests=1", &again.uri, &text(&copy)]);
    assert!(std::fs::read(&copy).expect("readable") == world.content);
}

#[test]
fn what_fio_writes_verifies_and_an_overlay_goes_on_after_an_end_and_after_a_kill() {
    let mut world = World::new();
    let restored = world.restored();
    let overlay = text(&world.path("overlay"));
    let mut served = world.serve(&["--overlay", &overlay]);
    let point = served.ready["point"].clone();
    let fio = |uri: &str, more: &[&str]| {
        let uri = format!("--uri={uri}");
        let mut args = vec!["--name=load", "--ioengine=nbd", &uri, "--size=16M", "--rw=randwrite", "--iodepth=8"];
        args.extend(["--bsrange=512-64k", "--blockalign=512", "--bs_unaligned=0", "--verify=crc32c", "--randseed=7"]);
        args.extend(["--thread", "--output-format=terse", "--verify_state_save=0"]);
        args.extend(more);
        run("fio", &args)
    };
    fio(&served.uri, &["--do_verify=1", "--fsync=64"]);
    let commands =
        ["write -P 0x5a 17M 300k", "write -P 0xa5 17826293 777", "write -z 20M 1M", "discard 22M 512k", "flush"];
    let output = qemu_io(&served.uri, &commands);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let before = world.path("before.img");
    run("nbdcopy", &[&served.uri, &text(&before)]);
    // A newer point does not move an overlay.
    let newer = change(&world.content, 20, 9);
    world.runtime.block_on(world.volume.capture(&newer, Some(Consistency::Crash)));
    for kill in [false, true, true] {
        let written = ["write -P 0x77 23M 4k", "write -P 0x11 23068777 100"];
        assert!(qemu_io(&served.uri, &written).status.success());
        std::fs::File::options()
            .write(true)
            .open(&before)
            .and_then(|file| {
                file.write_all_at(&[0x77; 4096], 23 << 20)?;
                file.write_all_at(&[0x11; 100], 23_068_777)
            })
            .expect("writable");
        if kill {
            served.kill();
        } else {
            assert_eq!(served.stop(), Some(143));
        }
        served = world.serve(&["--overlay", &overlay]);
        assert_eq!(served.ready["point"], point);
        assert!(served.ready["overlay_pages"].as_u64().is_some_and(|pages| pages > 1000));
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &served.uri, &text(&before)]);
    }
    fio(&served.uri, &["--verify_only=1"]);
    // In use, or of another point: refused by name.
    for (flags, named) in
        [(&["--overlay", &overlay][..], "in use"), (&["--overlay", &overlay, "--point", "latest"], "holds changes")]
    {
        let output = world.command("serve").args(["--nbd", &text(&world.path("other.sock"))]).args(flags).output();
        let output = output.expect("it runs");
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains(named), "{}", String::from_utf8_lossy(&output.stderr));
    }
    // The point is as it was, and what is written without an overlay is gone.
    let point = point.as_str().expect("a text");
    let other = text(&world.path("other.sock"));
    let forgets = world.serve_at(&other, &["--point", point]);
    assert!(qemu_io(&forgets.uri, &["write -P 0x33 0 1M", "read -P 0x33 0 1M"]).status.success());
    assert_eq!(forgets.stop(), Some(143));
    let pristine = world.serve_at(&other, &["--point", point]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &pristine.uri, &text(&restored)]);
}

#[test]
fn a_bad_record_is_an_input_output_error_named_in_the_log_and_a_store_that_fails_for_a_while_a_delay() {
    let world = World::new();
    let segments = world.path("store").join(format!("v1/volumes/{}/segments", world.volume.header.volume));
    let mut files: Vec<_> =
        std::fs::read_dir(segments).expect("there").map(|file| file.expect("a file").path()).collect();
    files.sort_by_key(|file| std::cmp::Reverse(std::fs::metadata(file).expect("there").len()));
    let file = &files[0];
    let good = std::fs::read(file).expect("readable");
    let mut bad = good.clone();
    bad[2000] ^= 1;
    std::fs::write(file, &bad).expect("writable");
    // All of its records are live at the older point.
    let served = world.serve(&["--point", &world.old]);
    let blocks = DISK / BLOCK;
    let reads: Vec<bool> = (0..blocks)
        .map(|block| qemu_io(&served.uri, &[&format!("read {} {BLOCK}", block * BLOCK)]).status.success())
        .collect();
    let failed: Vec<usize> = (0..blocks).filter(|block| !reads[*block]).collect();
    assert_eq!(failed.len(), 1, "one block is lost");
    let output = qemu_io(&served.uri, &[&format!("read {} 4k", failed[0] * BLOCK)]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() || said.contains("Input/output error"), "{said}");
    let name = file.file_name().expect("a name").to_string_lossy().into_owned();
    assert!(world.log().contains(&name), "{}", world.log());
    assert_eq!(world.log().matches(&name).count(), 1, "told once");
    drop(served);

    // A link to itself fails in a way that may pass.
    let away = world.path("away");
    std::fs::write(&away, &good).expect("writable");
    std::fs::remove_file(file).expect("there");
    std::os::unix::fs::symlink(file, file).expect("made");
    let back = || std::fs::rename(&away, file).expect("moved");
    let served = world.serve(&["--read-only", "--patience", "60s"]);
    let copy = text(&world.path("copy.img"));
    std::thread::scope(|scope| {
        let copied = scope.spawn(|| run("nbdcopy", &[&served.uri, &copy]));
        let deadline = Instant::now() + PATIENCE;
        while !world.log().contains("reads wait for it") {
            assert!(Instant::now() < deadline, "{}", world.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        back();
        copied.join().expect("it got all");
    });
    assert!(std::fs::read(&copy).expect("readable") == world.content);
    drop(served);
    std::fs::rename(file, &away).expect("moved");
    std::os::unix::fs::symlink(file, file).expect("made");
    let served = world.serve(&["--read-only", "--patience", "10ms"]);
    assert!(!try_run("nbdcopy", &[&served.uri, &copy]).status.success(), "beyond its patience it is an error");
    std::fs::remove_file(file).expect("there");
    back();
}
