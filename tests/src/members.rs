//! Further receivers of a [`Pair`]'s fleet: same store, a copy of `authority.key`, nothing else in common.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Output};

use rustix::process::Signal;
use serde_json::Value;

use crate::pair::{Pair, metric, program, terminate, wait_for};
use crate::protected::signal_process;

/// A receiver as a real process. Killed when dropped.
#[derive(Debug)]
pub struct Member {
    /// Its name in the fleet.
    pub name: String,
    /// Its data directory.
    pub data: PathBuf,
    /// Added to its command line at each start.
    pub flags: Vec<String>,
    store: String,
    log: PathBuf,
    child: Option<Child>,
    listen: Option<String>,
    metrics: Option<String>,
}

/// As [`Pair::start`], with a receiver that learns of others within a second.
#[must_use]
pub fn pair() -> Pair {
    Pair::start_in(tempfile::tempdir_in("/var/tmp").expect("a temporary directory"), None, &["--heartbeat", "1s"])
}

impl Member {
    /// Starts a receiver that joins the pair's fleet.
    #[must_use]
    pub fn join(pair: &Pair, name: &str) -> Self {
        let data = pair.file(name);
        std::fs::create_dir(&data).expect("a directory");
        std::fs::copy(pair.data.join("authority.key"), data.join("authority.key")).expect("the fleet's key");
        let mut member = Self {
            name: name.to_owned(),
            data,
            flags: vec!["--heartbeat".to_owned(), "1s".to_owned()],
            store: pair.store_url(),
            log: pair.file(&format!("{name}.log")),
            child: None,
            listen: None,
            metrics: None,
        };
        member.start();
        member
    }

    /// Starts it, at the same address as before, and waits until it is ready.
    ///
    /// # Panics
    /// If it ends before.
    pub fn start(&mut self) {
        let endpoint = self.data.join("endpoint.json");
        let _ = std::fs::remove_file(&endpoint);
        let mut command = program("blockferry-receiver");
        command.arg("run").arg("--data-dir").arg(&self.data).args(["--store", &self.store, "--name", &self.name]);
        command.args(["--metrics-listen", "127.0.0.1:0", "--memory-budget", "256MiB"]);
        command.args(["--listen", self.listen.as_deref().unwrap_or("127.0.0.1:0")]).args(&self.flags);
        let log = File::options().create(true).append(true).open(&self.log).expect("a log");
        let mut child = command.stderr(log).spawn().expect("the receiver starts");
        let where_it_is: Value = wait_for("the receiver", || {
            if let Some(status) = child.try_wait().expect("a child can be asked") {
                panic!("{} ended with {status}; its log:\n{}", self.name, self.log());
            }
            serde_json::from_slice(&std::fs::read(&endpoint).ok()?).ok()
        });
        self.listen = where_it_is["listen"].as_str().map(str::to_owned);
        self.metrics = where_it_is["metrics"].as_str().map(str::to_owned);
        self.child = Some(child);
    }

    /// Where it listens.
    ///
    /// # Panics
    /// Before its first start.
    #[must_use]
    pub fn listen(&self) -> &str {
        self.listen.as_deref().expect("it was started")
    }

    /// Its log so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// SIGKILL.
    ///
    /// # Panics
    /// If it does not run.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().expect("a child can be killed");
        child.wait().expect("a child can be waited for");
    }

    /// SIGTERM; waits for its end and returns its exit code.
    ///
    /// # Panics
    /// If it does not run, or does not end.
    pub fn stop(&mut self) -> Option<i32> {
        let mut child = self.child.take().expect("it runs");
        terminate(&child);
        wait_for("the receiver to drain", || child.try_wait().expect("a child can be asked")).code()
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// If it does not run.
    pub fn signal(&self, signal: Signal) {
        signal_process(self.child.as_ref().expect("it runs").id(), signal);
    }

    /// The value of one of its metrics, summed over labels.
    ///
    /// # Panics
    /// Before its first start.
    #[must_use]
    pub fn metric(&self, name: &str) -> f64 {
        metric(self.metrics.as_deref().expect("it was started"), name)
    }

    /// Has it drain.
    ///
    /// # Panics
    /// If the command can't be started.
    #[must_use]
    pub fn drain(&self) -> Output {
        drain(&self.data)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<_> = log.lines().rev().take(30).collect();
            eprintln!("the end of {}'s log:\n{}", self.name, tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
    }
}

/// Has the receiver of a data directory drain.
///
/// # Panics
/// If the command can't be started.
#[must_use]
pub fn drain(data: &std::path::Path) -> Output {
    drain_command(data, "2m").output().expect("it runs")
}

/// The command line of a drain that is waited for this long.
#[must_use]
pub fn drain_command(data: &std::path::Path, timeout: &str) -> Command {
    let mut command = program("blockferry-receiver");
    command.arg("drain").arg("--data-dir").arg(data).args(["--timeout", timeout]);
    command
}

/// What `receivers list --json` says, by name.
///
/// # Panics
/// If it fails.
#[must_use]
pub fn listed(pair: &Pair) -> Vec<Value> {
    let output = pair.receiver_tool(&["receivers", "list", "--json"]);
    crate::pair::check("receivers list", &output);
    let list: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    list.as_array().expect("an array").clone()
}

/// The address of the receiver that a sender's `status` names; `None` while it has no connection.
#[must_use]
pub fn in_use(status: &Value) -> Option<String> {
    let link = &status["link"];
    (link["connected"] == true).then(|| link["receiver"].as_str().map(str::to_owned)).flatten()
}
