//! A sender that runs until it is told to end, as a real process beside a [`Pair`]'s receiver: killed, started again, stopped in
//! its tracks, asked for points and for its status.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::process::{Child, Command, Output};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::cgroup::MemoryGroup;
use crate::pair::{Pair, http_get, metric, program, terminate, wait_for};

/// A running `blockferry-sender run`. Killed when dropped, and its pins removed.
#[derive(Debug)]
pub struct Protected {
    state: PathBuf,
    log: PathBuf,
    /// `--volume`'s values.
    pub volumes: Vec<String>,
    /// Further flags.
    pub flags: Vec<String>,
    /// Set for it, beside what the harness sets.
    pub environment: Vec<(String, String)>,
    /// Where the sender's memory is limited, from its next start on.
    pub group: Option<MemoryGroup>,
    child: Option<Child>,
    /// Length of the log before this life.
    log_start: u64,
}

impl Protected {
    /// Starts a sender of the pair's machine with these volumes (`NAME=PATH,capture=…`) and flags.
    #[must_use]
    pub fn start(pair: &Pair, volumes: &[&str], flags: &[&str]) -> Self {
        let mut sender = Self::prepare(pair, volumes, flags);
        sender.restart();
        sender
    }

    /// As [`Self::start`], without starting it.
    #[must_use]
    pub fn prepare(pair: &Pair, volumes: &[&str], flags: &[&str]) -> Self {
        let strings = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
        Self {
            state: pair.state.clone(),
            log: pair.file("sender.log"),
            volumes: strings(volumes),
            flags: strings(flags),
            environment: Vec::new(),
            group: None,
            child: None,
            log_start: 0,
        }
    }

    /// Its command line.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = program("blockferry-sender");
        command.args(["run", "--metrics-listen", "127.0.0.1:0"]).arg("--state-dir").arg(&self.state);
        for volume in &self.volumes {
            command.arg("--volume").arg(volume);
        }
        if !self.flags.iter().any(|flag| flag == "--memory-budget") {
            command.args(["--memory-budget", "256MiB"]);
        }
        command.args(&self.flags).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Starts it where it does not run.
    ///
    /// # Panics
    /// If it can't be started.
    pub fn restart(&mut self) {
        if self.child.is_some() {
            return;
        }
        let log = File::options().create(true).append(true).open(&self.log).expect("a log");
        self.log_start = log.metadata().expect("a file").len();
        let plain = self.command();
        let mut command = if let Some(group) = &self.group { group.command(&plain) } else { plain };
        self.child =
            Some(command.stdout(log.try_clone().expect("a second handle")).stderr(log).spawn().expect("it starts"));
    }

    /// Its process id.
    ///
    /// # Panics
    /// If it does not run.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the sender runs").id()
    }

    /// Checks that it has not ended by itself.
    ///
    /// # Panics
    /// If it has, with its log.
    pub fn assert_running(&mut self) {
        let child = self.child.as_mut().expect("the sender runs");
        if let Some(status) = child.try_wait().expect("a child can be asked") {
            panic!("the sender ended with {status}:\n{}", self.log());
        }
    }

    /// SIGKILL, and waits for its end.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM; waits for its end, which has to be an orderly one.
    ///
    /// # Panics
    /// If it does not run, does not end, or ends otherwise.
    pub fn stop(&mut self) {
        let mut child = self.child.take().expect("the sender runs");
        terminate(&child);
        let status = wait_for("the sender to end", || child.try_wait().expect("a child can be asked"));
        assert_eq!(status.code(), Some(143), "128 + SIGTERM; the sender's log:\n{}", self.log());
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// If it does not run.
    pub fn signal(&self, signal: Signal) {
        signal_process(self.pid(), signal);
    }

    /// What it wrote in this life.
    #[must_use]
    pub fn log(&self) -> String {
        let mut text = Vec::new();
        if let Ok(mut file) = File::open(&self.log) {
            let _ = file.seek(SeekFrom::Start(self.log_start));
            let _ = file.read_to_end(&mut text);
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// One of the sender's commands on this state directory.
    #[must_use]
    pub fn tool(&self, command: &str) -> Command {
        let mut tool = program("blockferry-sender");
        tool.arg(command).arg("--state-dir").arg(&self.state);
        tool
    }

    /// Asks for a point now; returns when it is committed, or the command failed.
    ///
    /// # Panics
    /// If the command can't be started.
    #[must_use]
    pub fn point(&self, volume: &str, flags: &[&str]) -> Output {
        self.tool("point").args(["--volume", volume]).args(flags).output().expect("it runs")
    }

    /// What `status --json` says; `None` while the sender does not answer.
    #[must_use]
    pub fn status(&self) -> Option<Value> {
        let output = self.tool("status").arg("--json").output().expect("it runs");
        output.status.success().then(|| serde_json::from_slice(&output.stdout).ok()).flatten()
    }

    /// Where its metrics are.
    #[must_use]
    pub fn metrics_address(&self) -> String {
        wait_for("the sender's metrics", || {
            let log = self.log();
            let line = log.lines().find(|line| line.contains("metrics endpoint open"))?.to_owned();
            let address = line.split("address=").nth(1)?.split_whitespace().next()?.to_owned();
            http_get(&address, "/metrics").is_ok().then_some(address)
        })
    }

    /// The value of one of its metrics, summed over labels.
    #[must_use]
    pub fn metric(&self, name: &str) -> f64 {
        metric(&self.metrics_address(), name)
    }
}

impl Drop for Protected {
    fn drop(&mut self) {
        self.kill();
        if self.volumes.iter().any(|volume| volume.contains("capture=ebpf")) {
            // Pins outlive processes, and tests.
            let _ = self.tool("detach").arg("--all").output();
        }
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<_> = log.lines().rev().take(40).collect();
            eprintln!("the end of the sender's log:\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
    }
}

/// Sends a process a signal.
///
/// # Panics
/// If it is gone.
pub fn signal_process(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a process id")).expect("not zero");
    kill_process(pid, signal).expect("the process is there");
}
