//! The real binary: exit codes, last lines, kills in the middle, and block devices.

#![allow(clippy::panic, clippy::print_stderr, clippy::cast_possible_truncation, reason = "a test")]

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use blockferry_operator::restore::state::{RestoreState, with_suffix};
use catalog::store::Store;
use catalog::volume::fixture::{FixtureVolume, change, image};
use common::format::close::Consistency;

const SMALL: usize = 5 * 262_144 + 3 * 512;
/// Large enough that a restore saves its progress several times.
const LARGE: usize = 160 << 20;

struct World {
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
        Self { dir, runtime }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn url(&self) -> String {
        format!("file://{}", self.path("store").display())
    }

    /// A volume `machine/root` with one point of this content, and its key file.
    fn volume(&self, machine: &str, content: &[u8], segments: usize) -> FixtureVolume {
        self.runtime.block_on(async {
            let store = Store::open(&self.url()).await.expect("a store");
            let mut volume = FixtureVolume::create(&store, machine, "root", content.len() as u64).await;
            volume.segments_per_epoch = segments;
            volume.capture(content, Some(Consistency::Crash)).await;
            std::fs::write(self.path(&format!("{machine}.key")), volume.key_file.encode().as_bytes())
                .expect("writable");
            volume
        })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blockferry"));
        command.args(arguments).args(["--store", &self.url()]).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the binary runs")
    }

    fn restore_arguments(&self, to: &Path) -> Vec<String> {
        let (key, to, state) = (self.path("web.key"), to.display().to_string(), self.path("state"));
        let texts = ["restore", "--volume", "web/root", "--json", "--key-file"].map(str::to_owned);
        let rest = [key.display().to_string(), "--to".into(), to, "--state-dir".into(), state.display().to_string()];
        texts.into_iter().chain(rest).collect()
    }

    fn restore(&self, to: &Path, more: &[&str]) -> Output {
        let arguments = self.restore_arguments(to);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(more.iter().copied()).collect();
        self.run(&arguments)
    }

    fn start_restore(&self, to: &Path, more: &[&str]) -> Child {
        let arguments = self.restore_arguments(to);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(more.iter().copied()).collect();
        self.command(&arguments).spawn().expect("the binary starts")
    }
}

fn last_line(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default().to_owned()
}

fn json(output: &Output) -> serde_json::Value {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Kills a restore once its state file says that some of it is done; false where it was faster than we are.
fn kill_in_the_middle(mut child: Child, state: &Path) -> bool {
    let deadline = Instant::now() + Duration::from_secs(120);
    while Instant::now() < deadline {
        if child.try_wait().expect("our child").is_some() {
            return false;
        }
        if let Ok(Some(state)) = RestoreState::load(state)
            && state.done.contains(&true)
        {
            child.kill().expect("our child");
            return child.wait().expect("our child").code().is_none();
        }
        std::thread::yield_now();
    }
    panic!("the restore did not get anywhere");
}

#[test]
fn points_prints_the_rows_that_scripts_rely_on() {
    let world = World::new();
    let content = image(SMALL, 1);
    let mut volume = world.volume("web", &content, 1);
    world.volume("db", &content, 1);
    world.runtime.block_on(volume.capture(&change(&content, 3, 4), Some(Consistency::Fuzzy)));
    let rows = json(&world.run(&["points", "--json", "--volume", "web/root"]));
    let rows = rows.as_array().expect("an array");
    assert_eq!(rows.len(), 2);
    let mut keys: Vec<_> = rows[0].as_object().expect("an object").keys().map(String::as_str).collect();
    keys.sort_unstable();
    let expected = [
        "bytes_new",
        "committed",
        "consistency",
        "epoch",
        "group",
        "group_point",
        "id",
        "machine",
        "proof",
        "proof_time",
        "time",
        "volume",
    ];
    assert_eq!(keys, expected);
    assert_eq!((rows[0]["consistency"].as_str(), rows[1]["consistency"].as_str()), (Some("crash"), Some("fuzzy")));
    assert_eq!((rows[0]["machine"].as_str(), rows[0]["volume"].as_str()), (Some("web"), Some("root")));
    assert_eq!(rows[1]["id"], volume.head().to_string());
    assert_eq!(json(&world.run(&["points", "--json"])).as_array().map(Vec::len), Some(3));
    let table = world.run(&["points"]);
    assert_eq!(String::from_utf8_lossy(&table.stdout).lines().count(), 4);
    assert_eq!(json(&world.run(&["volume", "list", "--json"])).as_array().map(Vec::len), Some(2));
}

#[test]
fn exit_codes_and_last_lines_name_what_is_wrong() {
    let world = World::new();
    world.volume("web", &image(SMALL, 1), 1);
    world.volume("db", &image(SMALL, 2), 1);
    let to = world.path("out.img");
    let to = to.to_str().expect("UTF-8");
    let key = world.path("web.key");
    let key = key.to_str().expect("UTF-8");
    let restore =
        |volume: &str, more: &[&str]| world.run(&[&["restore", "--volume", volume, "--to", to], more].concat());
    for (output, code, words) in [
        (restore("root", &["--key-file", key]), 2, &["ambiguous", "db/root", "web/root"][..]),
        (restore("swap", &["--key-file", key]), 1, &["swap", "volume list"]),
        (restore("web/root", &["--key-file", "/nonexistent.key"]), 1, &["/nonexistent.key", "--key-file"]),
        (restore("db/root", &["--key-file", key]), 1, &["web.key", "db/root"]),
        (restore("web/root", &["--key-file", key, "--point", "2026-01-01T00:00:00"]), 2, &["offset"]),
        (restore("web/root", &["--key-file", key, "--point", "00000000"]), 1, &["00000000", "blockferry points"]),
        (restore("web/root", &["--key-file", key, "--memory-budget", "1MiB"]), 2, &["--memory-budget"]),
        (restore("web/root", &[]), 2, &[]),
        (world.run(&["verify", "--volume", "web/root", "--frobnicate"]), 2, &[]),
    ] {
        let line = last_line(&output);
        assert_eq!(output.status.code(), Some(code), "{line}");
        assert!(words.iter().all(|word| line.contains(word)), "{line}: expected {words:?}");
        assert!(!Path::new(to).exists());
    }
    let output =
        Command::new(env!("CARGO_BIN_EXE_blockferry")).args(["points", "--store", "ftp://x/y"]).output().expect("runs");
    assert_eq!(output.status.code(), Some(2));
    assert!(last_line(&output).contains("ftp://x/y"));
    for flags in [&["--version"][..], &["--help"], &["restore", "--help"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_blockferry")).args(flags).output().expect("runs");
        assert_eq!(output.status.code(), Some(0));
        assert!(!output.stdout.is_empty());
    }
}

#[test]
fn verify_names_a_bad_object_in_its_last_line() {
    let world = World::new();
    let volume = world.volume("web", &image(SMALL, 1), 2);
    let key = world.path("web.key");
    let arguments = ["verify", "--volume", "web/root", "--json", "--key-file", key.to_str().expect("UTF-8")];
    let report = json(&world.run(&arguments));
    assert_eq!(report["records"], report["records_opened"]);
    let folder = world.path(&format!("store/v1/volumes/{}/segments", volume.header.volume));
    let segment = std::fs::read_dir(folder).expect("a folder").next().expect("a segment").expect("an entry").path();
    let mut bytes = std::fs::read(&segment).expect("there");
    bytes[1000] ^= 1;
    std::fs::write(&segment, bytes).expect("writable");
    let output = world.run(&arguments);
    assert_eq!(output.status.code(), Some(1));
    let name = segment.strip_prefix(world.path("store")).expect("below").to_str().expect("UTF-8").to_owned();
    assert!(last_line(&output).contains(&name), "{}", last_line(&output));
}

#[test]
fn a_killed_restore_leaves_nothing_that_looks_finished_and_goes_on_where_it_stopped() {
    let world = World::new();
    let content = image(LARGE, 3);
    world.volume("web", &content, 8);
    for attempt in 0..8 {
        let to = world.path(&format!("{attempt}.img"));
        let partial = with_suffix(&to, ".blockferry-partial");
        let state = with_suffix(&partial, ".state");
        if !kill_in_the_middle(world.start_restore(&to, &[]), &state) {
            std::fs::remove_file(&to).expect("it finished");
            continue;
        }
        assert!(!to.exists() && partial.exists());
        // Another point, or the same under another name, does not mix with it.
        let done = RestoreState::load(&state).expect("readable").expect("there").done;
        assert!(done.contains(&true) && done.contains(&false));
        let report = json(&world.restore(&to, &[]));
        assert_eq!(report["resumed"], true);
        assert!(std::fs::read(&to).expect("there") == content);
        assert!(!partial.exists() && !state.exists());
        return;
    }
    panic!("the restore was always faster than the kill");
}

/// A loop device over a file; gone when dropped.
struct Loop {
    device: PathBuf,
    file: PathBuf,
}

impl Loop {
    /// `None` where this machine lets us have none.
    fn new(file: PathBuf, bytes: u64, fill: u8) -> Option<Self> {
        let backing = std::fs::File::create(&file).expect("a file");
        backing.set_len(bytes).expect("sized");
        if fill != 0 {
            backing.write_all_at(&vec![fill; bytes as usize], 0).expect("written");
        }
        let output = Command::new("losetup").args(["--find", "--show"]).arg(&file).output().ok()?;
        let device = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if !output.status.success() {
            eprintln!("skipped: no loop devices here: {}", String::from_utf8_lossy(&output.stderr));
            return None;
        }
        Some(Self { device: device.into(), file })
    }

    fn read(&self) -> Vec<u8> {
        std::fs::read(&self.device).expect("readable")
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
        let _ = std::fs::remove_file(&self.file);
    }
}

#[test]
fn an_empty_device_is_written_and_what_lies_behind_the_disk_is_left_alone() {
    let world = World::new();
    let content = image(SMALL, 1);
    world.volume("web", &content, 1);
    let Some(device) = Loop::new(world.path("disk"), SMALL as u64 + (1 << 20), 0) else { return };
    json(&world.restore(&device.device, &[]));
    let read = device.read();
    assert!(read[..SMALL] == content);
    assert!(read[SMALL..].iter().all(|byte| *byte == 0));
    assert_eq!(std::fs::read_dir(world.path("state")).expect("a folder").count(), 0, "no state is left");
    // Now it is not empty any more.
    let again = world.restore(&device.device, &[]);
    assert_eq!(again.status.code(), Some(1));
    assert!(last_line(&again).contains("--force") && last_line(&again).contains("not empty"), "{}", last_line(&again));
}

#[test]
fn a_device_with_content_is_overwritten_only_with_force_zeros_included() {
    let world = World::new();
    let content = image(SMALL, 1);
    world.volume("web", &content, 1);
    let Some(device) = Loop::new(world.path("disk"), SMALL as u64 + 512, 0xee) else { return };
    let refused = world.restore(&device.device, &[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(device.read().iter().all(|byte| *byte == 0xee), "nothing was written");
    world.volume("db", &content, 1);
    let wrong_key = world.path("db.key");
    std::fs::copy(&wrong_key, world.path("web.key")).expect("copied");
    let refused = world.restore(&device.device, &["--force"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(device.read().iter().all(|byte| *byte == 0xee), "the wrong key writes nothing");
    let web = common::seal::keyfile::KeyFile::from_random(
        {
            let mut id = [0; 16];
            id.copy_from_slice(&blake3::hash(b"web").as_bytes()[..16]);
            id
        },
        *blake3::hash(b"web").as_bytes(),
    );
    std::fs::write(world.path("web.key"), web.encode().as_bytes()).expect("writable");
    json(&world.restore(&device.device, &["--force"]));
    let read = device.read();
    assert!(read[..SMALL] == content);
    assert!(read[SMALL..].iter().all(|byte| *byte == 0xee), "what lies behind the disk is left alone");
}

#[test]
fn a_mounted_device_and_one_that_is_too_small_are_refused() {
    let world = World::new();
    let content = image(SMALL, 1);
    world.volume("web", &content, 1);
    let Some(small) = Loop::new(world.path("small"), SMALL as u64 - 512, 0) else { return };
    for more in [&[][..], &["--force"]] {
        let output = world.restore(&small.device, more);
        assert_eq!(output.status.code(), Some(1));
        assert!(last_line(&output).contains("at least as large"), "{}", last_line(&output));
    }
    let Some(device) = Loop::new(world.path("disk"), 16 << 20, 0) else { return };
    let made = Command::new("mkfs.ext4").arg("-q").arg(&device.device).status();
    let place = world.path("mnt");
    std::fs::create_dir(&place).expect("a folder");
    let mounted = Command::new("mount").arg(&device.device).arg(&place).status();
    if !matches!((made, mounted), (Ok(made), Ok(mounted)) if made.success() && mounted.success()) {
        eprintln!("skipped: cannot mount here");
        return;
    }
    std::fs::write(place.join("precious"), "content").expect("writable");
    let output = world.restore(&device.device, &[]);
    let read = std::fs::read_to_string(place.join("precious"));
    assert!(Command::new("umount").arg(&place).status().expect("umount runs").success());
    assert_eq!(output.status.code(), Some(1));
    assert!(last_line(&output).contains("mounted on"), "{}", last_line(&output));
    assert_eq!(read.expect("still there"), "content");
    let output = world.restore(&device.device, &[]);
    assert!(last_line(&output).contains("an ext file system"), "{}", last_line(&output));
}

#[test]
fn a_killed_restore_to_a_device_has_no_first_block_and_goes_on() {
    let world = World::new();
    let content = image(LARGE, 4);
    assert!(content[..262_144].iter().any(|byte| *byte != 0));
    world.volume("web", &content, 8);
    for attempt in 0..8 {
        let Some(device) = Loop::new(world.path(&format!("disk-{attempt}")), LARGE as u64, 0x77) else { return };
        let name = blake3::hash(device.device.as_os_str().as_encoded_bytes()).to_hex();
        let state = world.path("state").join(format!("{}.state", &name[..32]));
        if !kill_in_the_middle(world.start_restore(&device.device, &["--force"]), &state) {
            continue;
        }
        assert!(device.read()[..262_144].iter().all(|byte| *byte == 0), "the first block is written last");
        // Known as our own half-done work: no force needed to go on.
        let report = json(&world.restore(&device.device, &[]));
        assert_eq!(report["resumed"], true);
        assert!(device.read() == content);
        assert!(!state.exists());
        return;
    }
    panic!("the restore was always faster than the kill");
}

#[test]
fn a_volume_is_renamed_retired_deleted_and_brought_back_and_keeps_its_policy() {
    let world = World::new();
    let content = image(SMALL, 1);
    world.volume("web", &content, 1);
    let volume = |command: &str, name: &str, more: &[&str]| {
        let arguments = [&["volume", command, "--volume", name], more].concat();
        world.run(&arguments)
    };
    let states = |all: bool| {
        let flags: &[&str] = if all { &["volume", "list", "--json", "--all"] } else { &["volume", "list", "--json"] };
        let rows = json(&world.run(flags));
        let row =
            |row: &serde_json::Value| format!("{}:{}", row["volume"].as_str().unwrap(), row["state"].as_str().unwrap());
        rows.as_array().expect("an array").iter().map(row).collect::<Vec<_>>()
    };
    assert_eq!(json(&volume("rename", "web/root", &["--to", "shop", "--json"]))["volume"], "shop");
    assert_eq!(states(false), ["shop:active"]);
    assert_eq!(
        json(&world.run(&["points", "--volume", "root", "--json"]))[0]["volume"],
        "shop",
        "the old name finds it"
    );

    let policy = |arguments: &[&str]| world.run(&[&["policy"], arguments].concat());
    assert!(String::from_utf8_lossy(&policy(&["get", "--volume", "shop"]).stdout).contains("all points are kept"));
    let text = "all for 24h, hourly for 7d, latest 3";
    assert_eq!(policy(&["set", "--volume", "shop", text]).status.code(), Some(0));
    assert_eq!(json(&policy(&["get", "--volume", "shop", "--json"]))["policy"], text);
    assert_eq!(policy(&["set", "--volume", "shop", "sometimes"]).status.code(), Some(2));

    assert_eq!(volume("retire", "shop", &[]).status.code(), Some(0));
    assert_eq!(states(false), ["shop:retired"]);
    let unconfirmed = volume("delete", "shop", &[]);
    assert_eq!(unconfirmed.status.code(), Some(2));
    assert!(last_line(&unconfirmed).contains("--confirm web/shop"), "{}", last_line(&unconfirmed));
    assert_eq!(volume("delete", "shop", &["--confirm", "web/root"]).status.code(), Some(2), "another name");
    assert_eq!(states(false), ["shop:retired"]);
    assert_eq!(volume("delete", "shop", &["--confirm", "web/shop"]).status.code(), Some(0));
    assert_eq!((states(false), states(true)), (vec![], vec!["shop:deleted".to_owned()]));
    assert_eq!(json(&world.run(&["points", "--json"])), serde_json::json!([]));
    let refused = volume("unretire", "shop", &[]);
    assert!(last_line(&refused).contains("is deleted, not retired"), "{}", last_line(&refused));
    assert_eq!(volume("restore", "shop", &[]).status.code(), Some(0));
    assert_eq!(states(false), ["shop:active"]);
    let output = world.restore(&world.path("back.img"), &[]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(std::fs::read(world.path("back.img")).expect("readable") == content);
}
