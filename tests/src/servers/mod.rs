//! Real object stores for tests, fakes where there is no real one, and a proxy that makes them fail on command.
//!
//! Programs come from `make test-deps`. Each listens on loopback, on ports found free when it starts, and ends with this process,
//! however that ends.

pub mod azurite;
pub mod gcs;
pub mod http;
pub mod proxy;
pub mod seaweed;

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, OnceLock, mpsc};

use catalog::store::{Environment, Store, StoreOptions};

/// Where a store is: what a program's command line and environment say.
#[derive(Debug, Clone)]
pub struct StoreAt {
    /// Its URL.
    pub url: String,
    /// Variables with endpoint and credentials.
    pub env: Vec<(String, String)>,
}

impl StoreAt {
    /// A store at `url` with these variables.
    #[must_use]
    pub fn new(url: &str, env: &[(&str, &str)]) -> Self {
        Self {
            url: url.to_owned(),
            env: env.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect(),
        }
    }

    /// A folder of it, as a store of its own.
    #[must_use]
    pub fn within(&self, folder: &str) -> Self {
        Self { url: format!("{}/{folder}", self.url), env: self.env.clone() }
    }

    /// The same with one variable changed or added.
    #[must_use]
    pub fn with(&self, name: &str, value: &str) -> Self {
        let mut env = self.env.clone();
        env.retain(|(other, _)| other != name);
        env.push((name.to_owned(), value.to_owned()));
        Self { url: self.url.clone(), env }
    }

    /// How to open it in this process.
    #[must_use]
    pub fn options(&self) -> StoreOptions {
        StoreOptions { environment: Some(self.env.iter().cloned().collect::<Environment>()), ..StoreOptions::default() }
    }

    /// Opens it in this process.
    ///
    /// # Panics
    /// If it can't be opened.
    pub async fn open(&self) -> Store {
        Store::open_with(&self.url, self.options()).await.expect("a store opens without sending anything")
    }
}

/// Where `make test-deps` puts programs.
#[must_use]
pub fn tools_dir() -> PathBuf {
    std::env::var_os("BLOCKFERRY_TOOLS_DIR").map_or_else(|| "/var/cache/blockferry".into(), PathBuf::from)
}

/// A program that `make test-deps` installs.
fn tool(path: &str) -> PathBuf {
    let path = tools_dir().join(path);
    assert!(path.exists(), "{} is not there: run `make test-deps` first", path.display());
    path
}

/// So many ports, each free now together with the one 10,000 above it. Below the range from which the kernel gives ports to
/// connections, so that a server that was stopped finds its port free again.
fn free_ports(count: usize) -> Vec<u16> {
    static GIVEN: Mutex<Vec<u16>> = Mutex::new(Vec::new());
    let mut given = GIVEN.lock().expect("nobody panics here");
    let free = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    let mut found = Vec::new();
    for _ in 0..10_000 {
        if found.len() == count {
            break;
        }
        let random = u16::from_le_bytes(common::rng::random().expect("the system gives random bytes"));
        let port = 10_000 + random % 12_000;
        if !given.contains(&port) && free(port) && free(port + 10_000) {
            given.push(port);
            found.push(port);
        }
    }
    assert_eq!(found.len(), count, "no free ports");
    found
}

/// Starts a program that is killed when this process ends, whichever way.
///
/// The kernel kills a child when the *thread* that made it ends, so a thread that never ends makes them all.
fn spawn(command: Command) -> Child {
    type Order = (Command, mpsc::Sender<std::io::Result<Child>>);
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Order>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, answer) in inbox {
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let mut tied = Command::new("setpriv");
    tied.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => tied.env(name, value),
            None => tied.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        tied.current_dir(dir);
    }
    tied.stdin(std::process::Stdio::null());
    // What it prints goes where the caller's log file is.
    if let Some(log) = command.get_envs().find(|(name, _)| *name == "LOG_FILE").and_then(|(_, value)| value) {
        let log = std::fs::File::create(Path::new(log)).expect("a log file");
        tied.stdout(log.try_clone().expect("a second handle")).stderr(log);
    }
    let (answer, child) = mpsc::channel();
    spawner.lock().expect("nobody panics here").send((tied, answer)).expect("the thread never ends");
    child.recv().expect("it answers").expect("util-linux is installed by make deps")
}
