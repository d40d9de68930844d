//! A receiver and a sender as real processes, with a local store, in one folder. Ports are the kernel's choice.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cgroup::MemoryGroup;
use crate::servers::StoreAt;

/// Longest wait for anything; a deadline against hanging, not an expectation.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// The folder with the binaries under test: `BLOCKFERRY_BIN_DIR`, or where this test's own binary was built.
#[must_use]
pub fn bin_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("BLOCKFERRY_BIN_DIR") {
        return dir.into();
    }
    let own = std::env::current_exe().expect("a test knows its own path");
    own.ancestors().nth(2).expect("tests lie in PROFILE/deps").to_owned()
}

/// A command for one of the product's binaries, quiet and without the caller's settings.
#[must_use]
pub fn program(name: &str) -> Command {
    let path = bin_dir().join(name);
    assert!(path.exists(), "{} is not built: run `make build` first", path.display());
    let mut command = Command::new(path);
    for (variable, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("BLOCKFERRY_")) {
        command.env_remove(variable);
    }
    command.env("NO_COLOR", "1").stdin(Stdio::null());
    command
}

/// Polls `ready` until it gives a value.
///
/// # Panics
/// After [`PATIENCE`], naming `what`.
pub fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What `run --once --json` says of a volume.
#[derive(Debug, Clone)]
pub struct Summary(pub Value);

impl Summary {
    /// A number of the summary.
    ///
    /// # Panics
    /// If it has none of this name.
    #[must_use]
    pub fn number(&self, name: &str) -> u64 {
        self.0[name].as_u64().unwrap_or_else(|| panic!("no number {name} in {}", self.0))
    }
}

/// A receiver, a sender's state, and a store.
#[derive(Debug)]
pub struct Pair {
    /// Holds all of it; removed at the end.
    pub dir: tempfile::TempDir,
    /// The receiver's data directory.
    pub data: PathBuf,
    /// The sender's state directory.
    pub state: PathBuf,
    /// The store's directory.
    pub store: PathBuf,
    /// The store, where it is not that directory.
    pub remote: Option<StoreAt>,
    /// Added to the receiver's command line at each start.
    pub receiver_flags: Vec<String>,
    /// Where the receiver's memory is limited, from its next start on.
    pub receiver_group: Option<MemoryGroup>,
    receiver: Option<Child>,
    listen: Option<String>,
    metrics: Option<String>,
}

impl Pair {
    /// Starts a receiver and registers a sender named `machine`.
    #[must_use]
    pub fn start() -> Self {
        Self::start_in(tempfile::tempdir_in("/var/tmp").expect("a temporary directory"), None, &[])
    }

    /// As [`Self::start`], with the receiver's data directory elsewhere and flags for the receiver.
    #[must_use]
    pub fn start_in(dir: tempfile::TempDir, data: Option<PathBuf>, flags: &[&str]) -> Self {
        Self::start_at(dir, data, None, None, flags)
    }

    /// As [`Self::start`], with its store on a server, and flags for the receiver.
    #[must_use]
    pub fn start_with_store(remote: &StoreAt, flags: &[&str]) -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
        let mut pair = Self::new(dir, flags);
        pair.remote = Some(remote.clone());
        pair.begin()
    }

    /// As [`Self::start_in`], with the sender's state directory elsewhere, and the receiver in a group of limited memory.
    #[must_use]
    pub fn start_at(
        dir: tempfile::TempDir,
        data: Option<PathBuf>,
        state: Option<PathBuf>,
        receiver_group: Option<MemoryGroup>,
        flags: &[&str],
    ) -> Self {
        let mut pair = Self::new(dir, flags);
        if let Some(data) = data {
            pair.data = data;
        }
        if let Some(state) = state {
            pair.state = state;
        }
        pair.receiver_group = receiver_group;
        pair.begin()
    }

    fn new(dir: tempfile::TempDir, flags: &[&str]) -> Self {
        let at = |name: &str| dir.path().join(name);
        Self {
            data: at("receiver"),
            state: at("sender"),
            store: at("store"),
            remote: None,
            receiver_flags: flags.iter().map(|&flag| flag.to_owned()).collect(),
            receiver_group: None,
            receiver: None,
            listen: None,
            metrics: None,
            dir,
        }
    }

    fn begin(mut self) -> Self {
        self.start_receiver();
        let passphrase = self.passphrase(&[]);
        let state = self.state.clone();
        check("register", &self.register(&state, &passphrase, "machine").output().expect("it runs"));
        self
    }

    /// The store's URL.
    #[must_use]
    pub fn store_url(&self) -> String {
        self.remote.as_ref().map_or_else(|| format!("file://{}", self.store.display()), |remote| remote.url.clone())
    }

    /// A command for one of the product's binaries that uses the store.
    fn store_program(&self, name: &str) -> Command {
        let mut command = program(name);
        if let Some(remote) = &self.remote {
            command.envs(remote.env.iter().map(|(name, value)| (name, value)));
        }
        command
    }

    /// The key file that registration made.
    #[must_use]
    pub fn key_file(&self) -> PathBuf {
        self.state.join("blockferry.key")
    }

    /// Where the receiver listens.
    ///
    /// # Panics
    /// Before its first start.
    #[must_use]
    pub fn listen(&self) -> &str {
        self.listen.as_deref().expect("the receiver was started")
    }

    /// A file of this name in the pair's folder.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The receiver's command line, for tests of how it fails.
    #[must_use]
    pub fn receiver_command(&self) -> Command {
        let mut command = self.store_program("blockferry-receiver");
        command.arg("run").arg("--data-dir").arg(&self.data).arg("--store").arg(self.store_url());
        command.args(["--metrics-listen", "127.0.0.1:0"]).args(&self.receiver_flags);
        let chosen = |name: &str| self.receiver_flags.iter().any(|flag| flag == name);
        if !chosen("--memory-budget") {
            command.args(["--memory-budget", "256MiB"]);
        }
        if let Some(listen) = self.listen.as_deref().or((!chosen("--listen")).then_some("127.0.0.1:0")) {
            command.arg("--listen").arg(listen);
        }
        command
    }

    /// Starts the receiver, at the same address as before, and waits until it is ready.
    pub fn start_receiver(&mut self) {
        let endpoint = self.data.join("endpoint.json");
        let _ = std::fs::remove_file(&endpoint);
        let log = File::options().create(true).append(true).open(self.file("receiver.log")).expect("a log");
        let plain = self.receiver_command();
        let mut command = if let Some(group) = &self.receiver_group { group.command(&plain) } else { plain };
        let mut child = command.stderr(log).spawn().expect("the receiver starts");
        let where_it_is: Value = wait_for("the receiver", || {
            if let Some(status) = child.try_wait().expect("a child can be asked") {
                panic!("the receiver ended with {status}; its log:\n{}", self.log());
            }
            serde_json::from_slice(&std::fs::read(&endpoint).ok()?).ok()
        });
        self.listen = where_it_is["listen"].as_str().map(str::to_owned);
        self.metrics = where_it_is["metrics"].as_str().map(str::to_owned);
        self.receiver = Some(child);
    }

    /// The receiver's process id.
    ///
    /// # Panics
    /// If it does not run.
    #[must_use]
    pub fn receiver_pid(&self) -> u32 {
        self.receiver.as_ref().expect("the receiver runs").id()
    }

    /// The receiver's log so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.file("receiver.log")).unwrap_or_default()
    }

    /// SIGKILL to the receiver.
    ///
    /// # Panics
    /// If it does not run.
    pub fn kill_receiver(&mut self) {
        let mut child = self.receiver.take().expect("the receiver runs");
        child.kill().expect("a child can be killed");
        child.wait().expect("a child can be waited for");
    }

    /// SIGTERM to the receiver; waits for its end and returns its exit code.
    ///
    /// # Panics
    /// If it does not run, or does not end.
    pub fn stop_receiver(&mut self) -> Option<i32> {
        let mut child = self.receiver.take().expect("the receiver runs");
        terminate(&child);
        wait_for("the receiver to drain", || child.try_wait().expect("a child can be asked")).code()
    }

    /// Where the receiver's metrics endpoint is.
    ///
    /// # Panics
    /// Before its first start.
    #[must_use]
    pub fn metrics_address(&self) -> &str {
        self.metrics.as_deref().expect("the receiver was started")
    }

    /// The value of a metric of the receiver, summed over labels.
    #[must_use]
    pub fn receiver_metric(&self, name: &str) -> f64 {
        metric(self.metrics_address(), name)
    }

    /// A new passphrase file.
    #[must_use]
    pub fn passphrase(&self, flags: &[&str]) -> PathBuf {
        let mut command = self.store_program("blockferry-receiver");
        command.args(["passphrase", "create"]).arg("--data-dir").arg(&self.data).arg("--store").arg(self.store_url());
        let output = command.args(flags).output().expect("it runs");
        check("passphrase create", &output);
        let mut file = tempfile::Builder::new().prefix("passphrase").tempfile_in(self.dir.path()).expect("a file");
        std::io::Write::write_all(&mut file, &output.stdout).expect("writable");
        file.keep().expect("it stays").1
    }

    /// Runs one of the receiver's commands on this fleet.
    ///
    /// # Panics
    /// If it can't be started.
    #[must_use]
    pub fn receiver_tool(&self, command: &[&str]) -> Output {
        let mut tool = self.store_program("blockferry-receiver");
        tool.args(command).arg("--data-dir").arg(&self.data).arg("--store").arg(self.store_url());
        tool.output().expect("it runs")
    }

    /// A registration's command line.
    #[must_use]
    pub fn register(&self, state: &Path, passphrase: &Path, name: &str) -> Command {
        let mut command = program("blockferry-sender");
        command.args(["register", "-i", self.listen(), "--name", name]).arg("-P").arg(passphrase);
        command.arg("--state-dir").arg(state);
        command
    }

    /// The command line of a run to one point of each of these volumes.
    #[must_use]
    pub fn sender_command(&self, volumes: &[(&str, &Path)]) -> Command {
        self.sender_command_within("256MiB", volumes)
    }

    /// As [`Self::sender_command`], with another memory budget.
    #[must_use]
    pub fn sender_command_within(&self, budget: &str, volumes: &[(&str, &Path)]) -> Command {
        let mut command = program("blockferry-sender");
        command.args(["run", "--once", "--json", "--metrics-listen", "127.0.0.1:0", "--memory-budget", budget]);
        command.arg("--state-dir").arg(&self.state);
        for (name, path) in volumes {
            command.arg("--volume").arg(format!("{name}={}", path.display()));
        }
        command
    }

    /// Replicates a volume to one point.
    #[must_use]
    pub fn run_once(&self, name: &str, path: &Path) -> Summary {
        let output = self.sender_command(&[(name, path)]).output().expect("it runs");
        check("run --once", &output);
        Summary(serde_json::from_slice(&output.stdout).expect("one JSON object"))
    }

    /// A command line of the operator's tool on this store.
    #[must_use]
    pub fn operator_command(&self, command: &str) -> Command {
        let mut tool = self.store_program("blockferry");
        tool.arg(command).arg("--store").arg(self.store_url());
        tool
    }

    /// The recovery points of a volume, oldest first.
    #[must_use]
    pub fn points(&self, volume: &str) -> Vec<Value> {
        let output = self.operator_command("points").args(["--json", "--volume", volume]).output().expect("it runs");
        check("points", &output);
        let points: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        points.as_array().expect("an array").clone()
    }

    /// The recovery points of all volumes.
    #[must_use]
    pub fn points_of_all(&self) -> Vec<Value> {
        let output = self.operator_command("points").arg("--json").output().expect("it runs");
        check("points", &output);
        let points: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        points.as_array().expect("an array").clone()
    }

    /// A restore's command line.
    #[must_use]
    pub fn restore_command(&self, volume: &str, point: &str, to: &Path) -> Command {
        let mut command = self.operator_command("restore");
        command.args(["--volume", volume, "--point", point]).arg("--key-file").arg(self.key_file()).arg("--to").arg(to);
        command
    }

    /// Restores a point and compares it with `expected`.
    ///
    /// # Panics
    /// If they differ.
    pub fn restores_to(&self, volume: &str, point: &str, expected: &Path) {
        self.restores_with(&self.key_file(), volume, point, expected);
    }

    /// As [`Self::restores_to`], with another key file.
    ///
    /// # Panics
    /// If they differ.
    pub fn restores_with(&self, key_file: &Path, volume: &str, point: &str, expected: &Path) {
        let target = self.file("restored.img");
        let _ = std::fs::remove_file(&target);
        let mut command = self.operator_command("restore");
        command.args(["--volume", volume, "--point", point]).arg("--key-file").arg(key_file).arg("--to").arg(&target);
        check("restore", &command.output().expect("it runs"));
        assert_same_content(&target, expected);
        std::fs::remove_file(&target).expect("it is there");
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if let Some(mut child) = self.receiver.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let tail = log.lines().rev().take(40).collect::<Vec<_>>();
            eprintln!("the end of the receiver's log:\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
    }
}

/// SIGTERM.
///
/// # Panics
/// If the child is gone.
pub fn terminate(child: &Child) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("a child can be signalled");
}

/// A metric at `address`, summed over labels; 0 where there is none yet, or no answer.
#[must_use]
pub fn metric(address: &str, name: &str) -> f64 {
    let text = http_get(address, "/metrics").unwrap_or_default();
    let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']));
    let value = |line: &str| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok());
    text.lines().filter(of_name).filter_map(value).sum()
}

/// The body of an HTTP answer.
///
/// # Errors
/// The system's.
pub fn http_get(address: &str, path: &str) -> std::io::Result<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.split_once("\r\n\r\n").map_or_else(String::new, |(_, body)| body.to_owned()))
}

/// Checks that a command succeeded.
///
/// # Panics
/// If it did not, with what it printed.
pub fn check(what: &str, output: &Output) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{what}: {}\n{}\n{}", output.status, text(&output.stdout), text(&output.stderr));
}

/// Checks that a command failed with `code`, and that the last line on standard error holds each of `named`.
///
/// # Panics
/// If not.
pub fn check_fails(what: &str, output: &Output, code: i32, named: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{what}: wrong exit code; standard error:\n{stderr}");
    let last = stderr.lines().last().unwrap_or_default();
    for text in named {
        assert!(last.contains(text), "{what}: the last line does not name {text:?}:\n{stderr}");
    }
}

/// Compares two files byte for byte.
///
/// # Panics
/// At the first difference.
pub fn assert_same_content(left: &Path, right: &Path) {
    use std::io::Read;
    let size = |path: &Path| std::fs::metadata(path).expect("it is there").len();
    assert_eq!(size(left), size(right), "{} and {} differ in size", left.display(), right.display());
    let (mut a, mut b) = (File::open(left).expect("readable"), File::open(right).expect("readable"));
    let (mut chunk_a, mut chunk_b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut offset = 0;
    loop {
        let read = a.read(&mut chunk_a).expect("readable");
        if read == 0 {
            return;
        }
        b.read_exact(&mut chunk_b[..read]).expect("as long as the other");
        if let Some(at) = (0..read).find(|&at| chunk_a[at] != chunk_b[at]) {
            panic!("{} and {} differ at byte {}", left.display(), right.display(), offset + at);
        }
        offset += read;
    }
}
