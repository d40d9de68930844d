//! A real PostgreSQL on a file system under test: pgbench, a table of counters whose commits the test remembers, and what a
//! restored data directory shows of them.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::pair::check;

/// Settings for a small, durable server that checkpoints often. Nothing of it weakens a promise.
const SETTINGS: &str = "listen_addresses = ''\nmax_wal_size = 96MB\nmin_wal_size = 64MB\ncheckpoint_timeout = 30s\n\
                        shared_buffers = 32MB\nmax_connections = 40\nwal_level = replica\n";

fn programs() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").expect("make deps installs postgresql");
    let newest = versions.filter_map(Result::ok).map(|entry| entry.path().join("bin")).max();
    newest.expect("make deps installs postgresql")
}

/// A server, its data directory and its socket's directory. Stopped at once when dropped.
#[derive(Debug)]
pub struct Postgres {
    /// The data directory.
    pub data: PathBuf,
    /// Where its socket is.
    pub socket_dir: PathBuf,
}

impl Postgres {
    /// One of its programs, run as the server's user.
    #[must_use]
    pub fn program(&self, name: &str) -> Command {
        let mut command = Command::new("runuser");
        command.args(["-u", "postgres", "--"]).arg(programs().join(name));
        command.env("PGHOST", &self.socket_dir).env("PGUSER", "postgres").current_dir("/").stdin(Stdio::null());
        command
    }

    /// Makes a data directory in `folder` and starts its server.
    ///
    /// # Panics
    /// Without root, or where PostgreSQL is not installed.
    #[must_use]
    pub fn create(folder: &Path, socket_dir: &Path) -> Self {
        let server = Self::at(&folder.join("pgdata"), socket_dir);
        owned_by_postgres(&server.data);
        let output = server.program("initdb").args(["-A", "trust", "-D"]).arg(&server.data).output();
        check("initdb", &output.expect("it runs"));
        let file = std::fs::File::options().append(true).open(server.data.join("postgresql.conf"));
        // Synced: ext4 may show zeros after a crash where somebody appended to a block and did not sync.
        file.and_then(|mut file| file.write_all(SETTINGS.as_bytes()).and_then(|()| file.sync_all()))
            .expect("the configuration is there");
        server.start();
        server
    }

    /// Starts the server of a restored data directory: it recovers.
    #[must_use]
    pub fn recover(data: &Path, socket_dir: &Path) -> Self {
        let server = Self::at(data, socket_dir);
        let _ = std::fs::remove_file(data.join("postmaster.pid"));
        server.start();
        server
    }

    fn at(data: &Path, socket_dir: &Path) -> Self {
        owned_by_postgres(socket_dir);
        Self { data: data.to_owned(), socket_dir: socket_dir.to_owned() }
    }

    fn start(&self) {
        let mut start = self.program("pg_ctl");
        start.arg("start").arg("-D").arg(&self.data).args(["-w", "-t", "120", "-l"]).arg(self.socket_dir.join("log"));
        start.arg("-o").arg(format!("-k {}", self.socket_dir.display()));
        let output = start.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("it runs");
        let log = std::fs::read_to_string(self.socket_dir.join("log")).unwrap_or_default();
        assert!(output.success(), "PostgreSQL does not start:\n{log}");
    }

    /// Runs SQL; the rows, unaligned.
    ///
    /// # Panics
    /// If it fails.
    #[must_use]
    pub fn sql(&self, text: &str) -> String {
        let output =
            self.program("psql").args(["-qAtX", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-c", text]).output();
        let output = output.expect("it runs");
        check("psql", &output);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// `pg_amcheck` over all, every heap tuple looked up in its indexes.
    ///
    /// # Panics
    /// If it finds anything.
    pub fn assert_clean(&self) {
        let output: Output = self
            .program("pg_amcheck")
            .args(["--all", "--install-missing", "--heapallindexed"])
            .output()
            .expect("it runs");
        check("pg_amcheck", &output);
    }

    /// Starts pgbench for an hour, over tables of this scale.
    ///
    /// # Panics
    /// If its tables can't be made.
    #[must_use]
    pub fn bench(&self, scale: u32) -> Bench {
        let output = self.program("pgbench").args(["-i", "-q", "-s", &scale.to_string(), "postgres"]).output();
        check("pgbench -i", &output.expect("it runs"));
        let mut bench = self.program("pgbench");
        bench.args(["-n", "-c", "4", "-T", "3600", "postgres"]).stdout(Stdio::null()).stderr(Stdio::null());
        Bench(bench.spawn().expect("it runs"))
    }

    /// Stops it in order.
    pub fn stop(&self) {
        let output = self.program("pg_ctl").args(["stop", "-m", "fast", "-w", "-D"]).arg(&self.data).output();
        check("pg_ctl stop", &output.expect("it runs"));
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.data.join("postmaster.pid").exists() {
            let _ = self.program("pg_ctl").args(["stop", "-m", "immediate", "-D"]).arg(&self.data).output();
        }
    }
}

fn owned_by_postgres(dir: &Path) {
    std::fs::create_dir_all(dir).expect("it can be made");
    check("chown", &Command::new("chown").arg("postgres:").arg(dir).output().expect("coreutils are installed"));
}

/// A running pgbench. Ended when dropped.
#[derive(Debug)]
pub struct Bench(Child);

impl Drop for Bench {
    fn drop(&mut self) {
        // Its parent is runuser, which hands SIGTERM on.
        let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&self.0), rustix::process::Signal::TERM);
        let _ = self.0.wait();
    }
}

/// Commits that clients were told of.
#[derive(Debug, Default)]
struct Told {
    next: AtomicU64,
    committed: Mutex<Vec<u64>>,
}

/// Clients that insert numbered rows, one transaction each. Every row names an earlier one that was committed before it began.
#[derive(Debug)]
pub struct Counters {
    told: Arc<Told>,
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
}

impl Counters {
    /// Makes the table and starts the clients.
    #[must_use]
    pub fn start(server: &Postgres, clients: u64) -> Self {
        let _ = server.sql(
            "CREATE TABLE counters (id bigint PRIMARY KEY, client int, number bigint, awaited bigint, filling text, \
             UNIQUE (client, number))",
        );
        let (told, stop) = (Arc::new(Told::default()), Arc::new(AtomicBool::new(false)));
        let clients = (0..clients).map(|client| {
            let mut psql = server.program("psql");
            psql.args(["-qAtX", "-v", "ON_ERROR_STOP=1", "-d", "postgres"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped());
            let (told, stop) = (Arc::clone(&told), Arc::clone(&stop));
            std::thread::spawn(move || insert_until(psql, client, &told, &stop))
        });
        Self { clients: clients.collect(), told, stop }
    }

    /// What was committed by now.
    #[must_use]
    pub fn committed(&self) -> Vec<u64> {
        self.told.committed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends the clients.
    ///
    /// # Panics
    /// If one of them failed.
    pub fn finish(mut self) -> Vec<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.clients.drain(..).for_each(|client| client.join().expect("no client fails"));
        self.committed()
    }
}

impl Drop for Counters {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn insert_until(mut psql: Command, client: u64, told: &Told, stop: &AtomicBool) {
    let mut child = psql.spawn().expect("psql runs");
    let mut input = child.stdin.take().expect("piped");
    let mut answers = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let id = told.next.fetch_add(1, Ordering::Relaxed) + 1;
        let awaited = told.committed.lock().unwrap_or_else(PoisonError::into_inner).last().copied().unwrap_or(0);
        let sql = format!(
            "INSERT INTO counters VALUES ({id}, {client}, {number}, {awaited}, repeat(md5('{id}'), 8));\n\\echo done {id}\n"
        );
        input.write_all(sql.as_bytes()).and_then(|()| input.flush()).expect("psql reads");
        let answer = answers.next().expect("psql answers").expect("text");
        assert_eq!(answer, format!("done {id}"));
        told.committed.lock().unwrap_or_else(PoisonError::into_inner).push(id);
    }
    drop(input);
    child.wait().expect("psql ends");
}

/// Checks a recovered server: clean, no gap in any client's numbers, each row's awaited row there, and every row of `committed`.
///
/// # Panics
/// Where it is not so.
pub fn assert_counters(server: &Postgres, committed: &[u64], what: &str) {
    let gaps =
        server.sql("SELECT client FROM counters GROUP BY client HAVING max(number) <> count(*) OR min(number) <> 1");
    assert!(gaps.trim().is_empty(), "{what}: clients with a gap in their commits: {gaps}");
    let orphans = server.sql(
        "SELECT a.id, a.awaited FROM counters a WHERE a.awaited <> 0 AND NOT EXISTS \
         (SELECT FROM counters b WHERE b.id = a.awaited) LIMIT 5",
    );
    assert!(orphans.trim().is_empty(), "{what}: rows without one that was committed before them: {orphans}");
    let ids = server.sql("SELECT id FROM counters");
    let there: std::collections::HashSet<u64> = ids.lines().filter_map(|line| line.trim().parse().ok()).collect();
    let missing: Vec<_> = committed.iter().filter(|id| !there.contains(id)).collect();
    assert!(missing.is_empty(), "{what}: committed before the point, and not in it: {missing:?}");
}
