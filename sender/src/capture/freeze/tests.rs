//! On real file systems over loop devices, as root. The watchdog and the sender that fails are this test program again.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

use super::mounts::find;
use super::*;
use crate::capture::tests::LoopDevice;

/// Tells a copy of this program what it is to be.
const ROLE: &str = "BLOCKFERRY_TEST_ROLE";
const PATIENCE: Duration = Duration::from_secs(60);

/// A file system on a loop device, mounted.
pub(crate) struct MountedDisk {
    pub(crate) point: PathBuf,
    pub(crate) device: LoopDevice,
    _dir: tempfile::TempDir,
}

impl MountedDisk {
    pub(crate) fn new(fs_type: &str, mib: u64) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let image = dir.path().join("image");
        let file = std::fs::File::create(&image).expect("room");
        file.set_len(mib << 20).expect("room");
        let device = LoopDevice::attach(&image);
        run(Command::new(format!("mkfs.{fs_type}"))
            .args(if fs_type == "ext4" { &["-q", "-F"] } else { &["-q", "-f"][..] })
            .arg(&device.path));
        let point = dir.path().join("mounted");
        std::fs::create_dir(&point).expect("room");
        run(Command::new("mount").arg(&device.path).arg(&point));
        Self { point, device, _dir: dir }
    }
}

impl Drop for MountedDisk {
    fn drop(&mut self) {
        let thawed = Command::new("fsfreeze").arg("--unfreeze").arg(&self.point).stderr(Stdio::null()).status();
        if thawed.is_ok_and(|status| status.success()) && !std::thread::panicking() {
            panic!("{} was left frozen", self.point.display());
        }
        let _ = Command::new("umount").arg("--lazy").arg(&self.point).status();
    }
}

pub(crate) fn run(command: &mut Command) {
    let output = command.output().expect("it is installed");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// This program again, as the test `name` in the role `role`.
fn again(name: &str, role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", &format!("capture::freeze::tests::{name}"), "--nocapture"]).env(ROLE, role);
    command
}

pub(crate) fn watchdog() -> WatchdogCommand {
    let exe = std::env::current_exe().expect("this program");
    let args =
        [&format!("{ROLE}=watchdog"), exe.to_str().expect("text"), "--exact", "capture::freeze::tests::as_watchdog"];
    WatchdogCommand { program: "/usr/bin/env".into(), args: args.iter().map(|arg| (*arg).to_owned()).collect() }
}

/// Not a test: the watchdog's process.
#[test]
fn as_watchdog() {
    if std::env::var(ROLE).as_deref() == Ok("watchdog") {
        assert_eq!(watchdog::serve(), 0);
    }
}

/// Not a test: a sender that freezes and then hangs.
#[test]
fn as_sender_that_hangs() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let Some((limit, point)) = role.split_once(':') else { return };
    let limit = Duration::from_millis(limit.parse().expect("milliseconds"));
    let mounts = mounts_of(Path::new(point));
    let frozen = Prepared::new(&mounts, limit, &watchdog()).expect("prepared").freeze().expect("frozen");
    println!("\nfrozen");
    std::thread::sleep(Duration::from_secs(5));
    // Only a sender that was stopped and goes on comes here: its freeze is over, and it knows.
    println!("\n{:?}", frozen.thaw());
}

fn mounts_of(point: &Path) -> Vec<Mount> {
    let output = Command::new("findmnt").args(["-n", "-o", "SOURCE"]).arg(point).output().expect("findmnt runs");
    let device = String::from_utf8(output.stdout).expect("text");
    find(Path::new(device.trim())).expect("readable").mounts
}

/// Writes and syncs a file on another thread; the receiver hears when it is done.
fn write_on(point: &Path) -> mpsc::Receiver<Instant> {
    let (done, when) = mpsc::channel();
    let path = point.join("written");
    std::thread::spawn(move || {
        let written = std::fs::write(&path, "after").and_then(|()| File::open(&path)?.sync_all());
        if written.is_ok() {
            let _ = done.send(Instant::now());
        }
    });
    when
}

#[test]
fn a_mounted_file_system_is_found_on_its_device_and_rests_while_it_is_frozen() {
    for fs_type in ["ext4", "xfs", "btrfs"] {
        let disk = MountedDisk::new(fs_type, 320);
        let second = tempfile::tempdir().expect("a temporary directory");
        run(Command::new("mount").arg("--bind").arg(&disk.point).arg(second.path()));
        let users = find(&disk.device.path).expect("readable");
        run(Command::new("umount").arg(second.path()));
        assert_eq!(users.mounts.len(), 1, "mounted twice is one file system: {users:?}");
        assert_eq!(users.mounts[0].fs_type, fs_type);
        assert_eq!(users.raw, Vec::<String>::new());

        let mounts = find(&disk.device.path).expect("readable").mounts;
        let frozen = Prepared::new(&mounts, PATIENCE, &watchdog()).expect("prepared").freeze().expect("frozen");
        let write = write_on(&disk.point);
        assert!(write.recv_timeout(Duration::from_millis(200)).is_err(), "{fs_type}: a write went through");
        let thawed = frozen.thaw();
        assert!(matches!(thawed, Thawed::Held { .. }), "{thawed:?}");
        write.recv_timeout(PATIENCE).expect("the write goes on");
    }
}

#[test]
fn two_file_systems_of_one_disk_are_frozen_together_or_not_at_all() {
    let (one, two) = (MountedDisk::new("ext4", 64), MountedDisk::new("xfs", 320));
    let mounts = [mounts_of(&one.point), mounts_of(&two.point)].concat();
    let frozen = Prepared::new(&mounts, PATIENCE, &watchdog()).expect("prepared").freeze().expect("frozen");
    let writes = [write_on(&one.point), write_on(&two.point)];
    assert!(writes.iter().all(|write| write.recv_timeout(Duration::from_millis(100)).is_err()));
    drop(frozen);
    assert!(writes.iter().all(|write| write.recv_timeout(PATIENCE).is_ok()), "dropping it thaws");

    run(Command::new("fsfreeze").arg("--freeze").arg(&two.point));
    let refused = Prepared::new(&mounts[..1], PATIENCE, &watchdog()).map(drop);
    assert!(refused.is_ok());
    // The second can't be flushed while it is frozen, so it is not prepared but frozen directly.
    let opened = open(&mounts).expect("opened");
    let files: Vec<&File> = opened.iter().map(|(_, file)| file).collect();
    let watchdog = Watchdog::arm(&watchdog(), &files, PATIENCE).expect("armed");
    let prepared = Prepared { mounts: opened, watchdog, limit: PATIENCE };
    let error = prepared.freeze().expect_err("the second is frozen by somebody else");
    assert!(matches!(&error, FreezeError::Busy { point } if *point == mounts[1].point), "{error}");
    write_on(&one.point).recv_timeout(PATIENCE).expect("the first was thawed again");
    run(Command::new("fsfreeze").arg("--unfreeze").arg(&two.point));
}

fn hanging_sender(disk: &MountedDisk, limit: Duration) -> (Child, BufReader<std::process::ChildStdout>) {
    let role = format!("{}:{}", limit.as_millis(), disk.point.display());
    let mut child =
        again("as_sender_that_hangs", &role).stdout(Stdio::piped()).stdin(Stdio::null()).spawn().expect("this program");
    let mut said = BufReader::new(child.stdout.take().expect("piped"));
    wait_for(&mut said, "frozen");
    (child, said)
}

fn wait_for(said: &mut BufReader<std::process::ChildStdout>, word: &str) -> String {
    let mut line = String::new();
    while !line.starts_with(word) {
        line.clear();
        assert_ne!(said.read_line(&mut line).expect("readable"), 0, "it ended without {word}");
    }
    line
}

fn signal(child: &Child, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).expect("it lives");
}

/// The product's promise is in time: a write completes within twice the limit.
#[test]
fn a_sender_killed_or_stopped_between_freeze_and_thaw_holds_no_write_for_longer_than_twice_the_limit() {
    for fs_type in ["ext4", "xfs"] {
        let disk = MountedDisk::new(fs_type, 320);
        let limit = Duration::from_secs(2);
        for fatal in [rustix::process::Signal::KILL, rustix::process::Signal::STOP] {
            let (mut child, mut said) = hanging_sender(&disk, limit);
            let frozen = Instant::now();
            signal(&child, fatal);
            let done = write_on(&disk.point).recv_timeout(PATIENCE).expect("the watchdog thawed");
            assert!(done - frozen < 2 * limit, "{fs_type}, {fatal:?}: {:?}", done - frozen);
            if fatal == rustix::process::Signal::STOP {
                signal(&child, rustix::process::Signal::CONT);
                let end = wait_for(&mut said, "Broken");
                assert!(end.contains("reason"), "{end}");
            }
            child.wait().expect("it ended");
        }
    }
}

#[test]
fn a_sender_that_only_takes_too_long_is_told_that_its_freeze_did_not_hold() {
    let disk = MountedDisk::new("ext4", 64);
    let mounts = find(&disk.device.path).expect("readable").mounts;
    let limit = Duration::from_millis(50);
    let frozen = Prepared::new(&mounts, limit, &watchdog()).expect("prepared").freeze().expect("frozen");
    write_on(&disk.point).recv_timeout(PATIENCE).expect("the watchdog thawed");
    let thawed = frozen.thaw();
    assert!(matches!(&thawed, Thawed::Broken { reason, .. } if !reason.is_empty()), "{thawed:?}");
}

#[test]
fn a_freeze_that_somebody_else_ended_is_not_held() {
    let disk = MountedDisk::new("ext4", 64);
    let mounts = find(&disk.device.path).expect("readable").mounts;
    let frozen = Prepared::new(&mounts, PATIENCE, &watchdog()).expect("prepared").freeze().expect("frozen");
    run(Command::new("fsfreeze").arg("--unfreeze").arg(&disk.point));
    let thawed = frozen.thaw();
    assert!(matches!(&thawed, Thawed::Broken { reason, .. } if reason.contains("no longer frozen")), "{thawed:?}");
}

#[test]
fn nothing_is_frozen_without_a_watchdog() {
    let disk = MountedDisk::new("ext4", 64);
    let mounts = find(&disk.device.path).expect("readable").mounts;
    for program in ["/no/such/program", "/bin/false"] {
        let command = WatchdogCommand { program: program.into(), args: Vec::new() };
        let error = Prepared::new(&mounts, PATIENCE, &command).expect_err("no watchdog");
        assert!(matches!(error, FreezeError::Watchdog(_)), "{error}");
    }
    write_on(&disk.point).recv_timeout(PATIENCE).expect("not frozen");
}

#[test]
fn a_raw_writer_and_a_file_system_that_is_gone_are_noticed() {
    let disk = MountedDisk::new("ext4", 64);
    let mut mounts = find(&disk.device.path).expect("readable").mounts;
    let mut writer = Command::new("sh")
        .args(["-c", "exec 9<>\"$0\"; echo ready; read line"])
        .arg(&disk.device.path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a shell");
    let mut said = BufReader::new(writer.stdout.take().expect("piped"));
    wait_for(&mut said, "ready");
    let users = find(&disk.device.path).expect("readable");
    writer.kill().and_then(|()| writer.wait()).expect("it ends");
    assert!(users.raw.iter().any(|user| user.contains(&format!("process {}", writer.id()))), "{users:?}");
    mounts[0].id += 1;
    let error = Prepared::new(&mounts, PATIENCE, &watchdog()).expect_err("another mount");
    assert!(matches!(error, FreezeError::Open { .. }), "{error}");
}
