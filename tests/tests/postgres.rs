//! A real PostgreSQL under pgbench, replicated while it works: random points restored, each recovers, `pg_amcheck` is clean,
//! and of the commits that clients were told of none is missing.

#![allow(clippy::panic, clippy::print_stdout, clippy::print_stderr, reason = "a test prints what it measured")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use blockferry_tests::conformance::drive::{self, point_id, scaled};
use blockferry_tests::exported::FuseExport;
use blockferry_tests::images::Random;
use blockferry_tests::loops::{LoopDevice, Mounted};
use blockferry_tests::pair::{Pair, check, wait_for};
use blockferry_tests::postgres::{Counters, Postgres, assert_counters};
use blockferry_tests::protected::Protected;

const DISK: u64 = 1 << 30;

fn hooks(pair: &Pair) -> PathBuf {
    let ready = Path::new(&std::env::var("CARGO_MANIFEST_DIR").expect("cargo says where the crate lies"))
        .parent()
        .expect("the workspace")
        .join("deploy/hooks/postgresql");
    let dir = pair.file("hooks");
    let copy = std::process::Command::new("cp").arg("-r").arg(&ready).arg(&dir).output();
    check("cp of the ready hooks", &copy.expect("coreutils are installed"));
    dir
}

/// A point that was taken, and what clients had been told of before it was asked for.
struct Taken {
    id: String,
    consistency: String,
    committed: Vec<u64>,
}

/// Runs the load, takes points, restores some of them.
fn under_load(pair: &Pair, sender: &mut Protected, mounted: &Mounted, application: bool) {
    let mut random = Random(drive::seed());
    let server = Postgres::create(mounted.path(), &pair.file("run"));
    let bench = server.bench(4);
    let counters = Counters::start(&server, 3);
    let wanted = scaled(4, 20);
    let mut taken = Vec::new();
    let kinds = if application { vec!["application", "crash"] } else { vec!["crash"] };
    wait_for("points under load", || {
        sender.assert_running();
        std::thread::sleep(Duration::from_millis(200 + random.below(1500)));
        let committed = counters.committed();
        let asked = kinds[taken.len() % kinds.len()];
        let output = sender.point("disk", &["--json", "--consistency", asked]);
        let Some(id) = point_id(&output) else {
            eprintln!("no point yet: {}", String::from_utf8_lossy(&output.stderr).trim_end());
            return None;
        };
        let known = pair.points("disk");
        let point = known.iter().find(|point| point["id"] == id.as_str()).expect("it is committed");
        let consistency = point["consistency"].as_str().expect("a word").to_owned();
        if asked == "application" {
            let log = sender.log();
            assert_eq!(consistency, "application", "{}\n{log}", String::from_utf8_lossy(&output.stderr));
        }
        taken.push(Taken { id, consistency, committed });
        (taken.len() >= wanted as usize).then_some(())
    });
    let last = counters.finish();
    drop(bench);
    let all = pair.points("disk");
    println!("{} points, {} commits; {} points restored", all.len(), last.len(), taken.len() + 1);
    // And one that came by itself.
    let by_itself: Vec<_> =
        all.iter().filter(|point| taken.iter().all(|taken| point["id"] != taken.id.as_str())).collect();
    let others = by_itself.iter().filter(|point| {
        // The table has to be there.
        point["consistency"] != "fuzzy"
            && point["epoch"].as_u64()
                > all.iter().find(|p| p["id"] == taken[0].id.as_str()).and_then(|p| p["epoch"].as_u64())
    });
    let other = others.max_by_key(|point| point["epoch"].as_u64()).map(|point| Taken {
        id: point["id"].as_str().expect("an id").to_owned(),
        consistency: point["consistency"].as_str().expect("a word").to_owned(),
        committed: Vec::new(),
    });
    for point in taken.iter().chain(&other) {
        restore_and_recover(pair, point);
    }
    server.stop();
}

fn restore_and_recover(pair: &Pair, point: &Taken) {
    let image = pair.file("restored.img");
    let _ = std::fs::remove_file(&image);
    check("restore", &pair.restore_command("disk", &point.id, &image).output().expect("it runs"));
    let mounted = Mounted::mount(&image, &pair.file("restored"), "loop");
    let server = Postgres::recover(&mounted.path().join("pgdata"), &pair.file("restored-run"));
    let what = format!("{} point {}", point.consistency, point.id);
    server.assert_clean();
    assert_counters(&server, &point.committed, &what);
    server.stop();
}

#[test]
fn postgresql_on_a_tracked_device_recovers_from_each_point_with_every_commit_before_it() {
    let pair = Pair::start();
    let backing = pair.file("backing.img");
    std::fs::File::create(&backing).and_then(|file| file.set_len(DISK)).expect("sparse files");
    let device = LoopDevice::attach(&backing, true);
    device.format("mkfs.ext4", &["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]);
    let mounted = device.mount(&pair.file("mnt"), "");
    let hooks = hooks(&pair);
    let volume = format!("disk={},capture=ebpf", device.device.display());
    let flags = ["--point-interval", "1s", "--freeze-limit", "1s", "--hook-dir", &hooks.to_string_lossy()];

    let mut sender = Protected::prepare(&pair, &[&volume], &flags);
    sender.environment = vec![("BLOCKFERRY_PG_HOST".to_owned(), pair.file("run").display().to_string())];
    sender.restart();
    under_load(&pair, &mut sender, &mounted, true);
    drop(mounted);
}

#[test]
fn postgresql_over_nbd_recovers_from_each_point_with_every_commit_before_it() {
    let pair = Pair::start();
    let (disk, socket) = (pair.file("disk.img"), pair.file("nbd.sock"));
    std::fs::File::create(&disk).and_then(|file| file.set_len(DISK)).expect("sparse files");
    let hooks = hooks(&pair);
    let volume = format!("disk={},capture=nbd,listen={}", disk.display(), socket.display());
    let mut sender = Protected::prepare(&pair, &[&volume], &["--hook-dir", &hooks.to_string_lossy()]);
    sender.environment = vec![("BLOCKFERRY_PG_HOST".to_owned(), pair.file("run").display().to_string())];
    sender.restart();
    wait_for("the export", || std::os::unix::net::UnixStream::connect(&socket).ok());
    let export = FuseExport::start(&socket, &pair.file("export"));
    let device = LoopDevice::attach(&export.file, false);
    device.format("mkfs.ext4", &["-q", "-F"]);
    let mounted = device.mount(&pair.file("mnt"), "");
    under_load(&pair, &mut sender, &mounted, true);
    drop(mounted);
    drop(device);
    drop(export);
}
