//! Azurite, Microsoft's own emulator of Azure Blob Storage: signatures and preconditions enforced.

use std::process::{Child, Command};
use std::sync::OnceLock;

use super::http::{self, base64, from_base64};
use super::{StoreAt, free_ports, spawn, tool};
use crate::pair::wait_for;

const ATTEMPTS: usize = 5;
/// The account and the key that Azurite's documentation publishes.
const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
/// The container that is there from the start.
pub const CONTAINER: &str = "blockferry";

/// A server with one container.
#[derive(Debug)]
pub struct Azurite {
    dir: tempfile::TempDir,
    port: u16,
    child: Option<Child>,
}

impl Azurite {
    /// Starts one of its own for the caller.
    #[must_use]
    pub fn start() -> Self {
        for _ in 0..ATTEMPTS {
            let dir = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
            let mut server = Self { dir, port: free_ports(1)[0], child: None };
            if server.try_start() {
                server.container("PUT");
                return server;
            }
        }
        panic!("Azurite did not start in {ATTEMPTS} attempts");
    }

    /// One for all tests of this process that do not stop it: each takes a folder of it.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Azurite> = OnceLock::new();
        SHARED.get_or_init(Self::start)
    }

    fn try_start(&mut self) -> bool {
        let mut command = Command::new("node");
        command.arg(tool("node/node_modules/azurite/dist/src/blob/main.js"));
        command.args(["--blobHost", "127.0.0.1", "--silent", "--skipApiVersionCheck", "--disableTelemetry"]);
        command.arg("--blobPort").arg(self.port.to_string()).arg("--location").arg(self.dir.path().join("data"));
        command.env("LOG_FILE", self.dir.path().join("log")).current_dir(self.dir.path());
        let mut child = spawn(command);
        let address = self.address();
        let ready = wait_for("Azurite", || {
            if child.try_wait().expect("a child can be asked").is_some() {
                return Some(false);
            }
            std::net::TcpStream::connect(&address).is_ok().then_some(true)
        });
        self.child = Some(child);
        if !ready {
            self.kill();
        }
        ready
    }

    /// `HOST:PORT` of its blob endpoint.
    #[must_use]
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Its container as a store.
    #[must_use]
    pub fn store(&self) -> StoreAt {
        StoreAt::new(
            &format!("az://{CONTAINER}"),
            &[
                ("AZURE_STORAGE_ENDPOINT", &format!("http://{}/{ACCOUNT}", self.address())),
                ("AZURE_ALLOW_HTTP", "true"),
                ("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT),
                ("AZURE_STORAGE_ACCOUNT_KEY", KEY),
            ],
        )
    }

    /// Its store as it is reached at another endpoint, such as a proxy's.
    #[must_use]
    pub fn store_through(&self, address: &str) -> StoreAt {
        self.store().with("AZURE_STORAGE_ENDPOINT", &format!("http://{address}/{ACCOUNT}"))
    }

    /// What nobody may ever print.
    #[must_use]
    pub fn secret(&self) -> &'static str {
        KEY
    }

    /// Creates (`PUT`) or deletes (`DELETE`) the container.
    ///
    /// # Panics
    /// If that fails.
    pub fn container(&self, method: &str) {
        // Shared Key, as the documentation of Azure's Blob service has it.
        let (date, version) = ("Tue, 24 Nov 2026 00:00:00 GMT", "2021-12-02");
        let resource = format!("/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container");
        let text = format!("{method}\n\n\n\n\n\n\n\n\n\n\n\nx-ms-date:{date}\nx-ms-version:{version}\n{resource}");
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &from_base64(KEY));
        let signature = base64(ring::hmac::sign(&key, text.as_bytes()).as_ref());
        let answer = http::send(
            &self.address(),
            &format!(
                "{method} /{ACCOUNT}/{CONTAINER}?restype=container HTTP/1.1\r\nHost: {}\r\nx-ms-date: {date}\r\n\
                 x-ms-version: {version}\r\nContent-Length: 0\r\nConnection: close\r\n\
                 Authorization: SharedKey {ACCOUNT}:{signature}\r\n\r\n",
                self.address()
            ),
        );
        let answer = answer.expect("Azurite answers");
        assert!(answer.starts_with("HTTP/1.1 20"), "{method} of the container: {answer}");
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM, and waits for its end. Azurite keeps what it knows of its blobs in memory and writes it down at intervals and when
    /// it is told to end: killed, it would lose what it has acknowledged.
    pub fn stop(&mut self) {
        if let Some(child) = &mut self.child {
            crate::pair::terminate(child);
            wait_for("Azurite's end", || child.try_wait().expect("a child can be asked"));
            self.child = None;
        }
    }

    /// Starts it again on the same port and directory.
    ///
    /// # Panics
    /// If it does not start.
    pub fn restart(&mut self) {
        self.stop();
        assert!((0..ATTEMPTS).any(|_| self.try_start()), "Azurite did not start again");
    }
}

impl Drop for Azurite {
    fn drop(&mut self) {
        self.kill();
    }
}
