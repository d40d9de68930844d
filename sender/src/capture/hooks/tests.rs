use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use super::*;

struct HookDir(tempfile::TempDir);

impl HookDir {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for phase in ["pre.d", "post.d"] {
            std::fs::create_dir(dir.path().join(phase)).expect("room");
        }
        Self(dir)
    }

    fn hook(&self, name: &str, script: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("room");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("ours");
        path
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.0.path().join("log")).unwrap_or_default()
    }

    fn load(&self, timeout: Duration) -> Hooks {
        Hooks::load(self.0.path(), timeout).expect("usable").expect("some")
    }
}

fn context() -> HookContext {
    HookContext { volume: "root".into(), point: "p1".into(), device: "/dev/vda".into() }
}

const LONG: Duration = Duration::from_secs(60);

#[tokio::test]
async fn hooks_run_in_the_order_of_their_names_with_their_environment() {
    let dir = HookDir::new();
    let log = dir.0.path().join("log");
    let say = format!(
        "echo $(basename $0) $BLOCKFERRY_PHASE $BLOCKFERRY_VOLUME $BLOCKFERRY_POINT $BLOCKFERRY_DEVICE $BLOCKFERRY_OUTCOME >> {}",
        log.display()
    );
    dir.hook("pre.d/20-b", &say);
    dir.hook("pre.d/10-a", &format!("{say}\necho kept > $BLOCKFERRY_RUN_DIR/state"));
    dir.hook("post.d/10-c", &format!("{say}\ncat $BLOCKFERRY_RUN_DIR/state >> {}", log.display()));
    dir.hook("pre.d/.hidden", "exit 1");
    dir.hook("pre.d/backup~", "exit 1");
    let session = dir.load(LONG).pre(&context()).await;
    assert_eq!(session.problem(), None);
    assert_eq!(session.post(true).await, None);
    assert_eq!(
        dir.log(),
        "10-a pre root p1 /dev/vda\n20-b pre root p1 /dev/vda\n10-c post root p1 /dev/vda cut\nkept\n"
    );
}

#[tokio::test]
async fn a_failing_pre_hook_is_named_with_its_last_words_and_post_hooks_run_all_the_same() {
    let dir = HookDir::new();
    let log = dir.0.path().join("log");
    dir.hook("pre.d/10-a", "echo no such database >&2; exit 3");
    dir.hook("pre.d/20-b", &format!("echo never >> {}", log.display()));
    dir.hook("post.d/10-c", &format!("echo $BLOCKFERRY_OUTCOME >> {}; exit 1", log.display()));
    dir.hook("post.d/20-d", &format!("echo d >> {}", log.display()));
    let session = dir.load(LONG).pre(&context()).await;
    let problem = session.problem().expect("it failed").to_owned();
    assert!(problem.contains("pre.d/10-a") && problem.contains("no such database"), "{problem}");
    let problem = session.post(false).await.expect("10-c failed");
    assert!(problem.contains("post.d/10-c"), "{problem}");
    assert_eq!(dir.log(), "failed\nd\n", "the hook after the failing one does not run in pre.d, but in post.d");
}

#[tokio::test]
async fn a_late_hook_is_killed_with_its_children() {
    let dir = HookDir::new();
    let pids = dir.0.path().join("pids");
    dir.hook("pre.d/10-slow", &format!("sleep 1000 &\necho $! $$ > {}\nwait", pids.display()));
    let started = Instant::now();
    let session = dir.load(Duration::from_millis(500)).pre(&context()).await;
    let problem = session.problem().expect("it was late").to_owned();
    assert!(problem.contains("longer than 0.5 s"), "{problem}");
    assert!(started.elapsed() < LONG);
    let pids = std::fs::read_to_string(pids).expect("it had begun");
    for pid in pids.split_whitespace() {
        let deadline = Instant::now() + LONG;
        // A killed process may stay as a zombie until its parent looks.
        while std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z")) {
            assert!(Instant::now() < deadline, "process {pid} lives");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    assert_eq!(session.post(false).await, None);
}

#[tokio::test]
async fn a_hook_may_print_without_end_and_leave_something_in_the_background() {
    let dir = HookDir::new();
    dir.hook(
        "pre.d/10-loud",
        "head -c 3000000 /dev/zero | tr '\\0' 'x'; echo; sleep 1000 & echo $! > $BLOCKFERRY_RUN_DIR/pid",
    );
    dir.hook("post.d/10-end", "kill $(cat $BLOCKFERRY_RUN_DIR/pid)");
    let session = dir.load(LONG).pre(&context()).await;
    assert_eq!(session.problem(), None);
    assert_eq!(session.post(true).await, None, "what was left in the background was still there");
}

#[tokio::test]
async fn post_hooks_run_where_the_session_is_dropped() {
    let dir = HookDir::new();
    let log = dir.0.path().join("log");
    dir.hook("post.d/10-c", &format!("echo $BLOCKFERRY_OUTCOME >> {}", log.display()));
    drop(dir.load(LONG).pre(&context()).await);
    let deadline = Instant::now() + LONG;
    while dir.log() != "failed\n" {
        assert!(Instant::now() < deadline, "post hooks never ran");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn hooks_that_others_may_write_are_refused_by_name() {
    let dir = HookDir::new();
    assert!(Hooks::load(dir.0.path(), LONG).expect("usable").is_none(), "no hooks");
    let hook = dir.hook("pre.d/10-a", "exit 0");
    for mode in [0o775, 0o757] {
        std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(mode)).expect("ours");
        let error = Hooks::load(dir.0.path(), LONG).expect_err("refused");
        assert!(matches!(&error, HookError::Writable { path, .. } if *path == hook), "{error}");
    }
    std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).expect("ours");
    let folder = dir.0.path().join("pre.d");
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o777)).expect("ours");
    let error = Hooks::load(dir.0.path(), LONG).expect_err("refused");
    assert!(matches!(&error, HookError::Writable { path, .. } if *path == folder), "{error}");
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).expect("ours");
    std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o644)).expect("ours");
    assert!(Hooks::load(dir.0.path(), LONG).expect("usable").is_none(), "not executable: left out");
    assert!(matches!(Hooks::load(&dir.0.path().join("none"), LONG), Err(HookError::Unreadable { .. })));
}

#[tokio::test]
async fn a_hook_replaced_by_one_that_others_may_write_is_not_run() {
    let dir = HookDir::new();
    let log = dir.0.path().join("log");
    let hook = dir.hook("pre.d/10-a", &format!("echo ran >> {}", log.display()));
    let hooks = dir.load(LONG);
    std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o777)).expect("ours");
    let session = hooks.pre(&context()).await;
    assert!(session.problem().is_some_and(|problem| problem.contains("10-a")), "{:?}", session.problem());
    assert_eq!(session.post(false).await, None);
    assert_eq!(dir.log(), "");
}
