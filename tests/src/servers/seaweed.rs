//! SeaweedFS, which speaks S3: signatures and preconditions enforced. One process with everything in it, telemetry off.

use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::OnceLock;

use super::{StoreAt, free_ports, spawn, tool};
use crate::pair::wait_for;

const ATTEMPTS: usize = 5;
/// The bucket that is there from the start.
pub const BUCKET: &str = "blockferry";

/// A server with one bucket.
#[derive(Debug)]
pub struct SeaweedFs {
    dir: tempfile::TempDir,
    /// S3, master, volume, filer, admin.
    ports: Vec<u16>,
    child: Option<Child>,
    access_key: String,
    secret_key: String,
    data: PathBuf,
    bucket: bool,
}

impl SeaweedFs {
    /// Starts one of its own for the caller.
    #[must_use]
    pub fn start() -> Self {
        for _ in 0..ATTEMPTS {
            let dir = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
            let mut server = Self {
                data: dir.path().join("data"),
                dir,
                ports: free_ports(5),
                child: None,
                access_key: "AKBLOCKFERRYTESTS".into(),
                secret_key: "secret-of-the-tests-0123456789".into(),
                bucket: true,
            };
            if server.try_start() {
                return server;
            }
        }
        panic!("SeaweedFS did not start in {ATTEMPTS} attempts");
    }

    /// One for all tests of this process that neither stop it nor look at the whole bucket: each takes a folder of it.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<SeaweedFs> = OnceLock::new();
        SHARED.get_or_init(Self::start)
    }

    fn try_start(&mut self) -> bool {
        std::fs::create_dir_all(&self.data).expect("a folder");
        let identities = self.dir.path().join("s3.json");
        let config = format!(
            r#"{{"identities":[{{"name":"t","credentials":[{{"accessKey":"{}","secretKey":"{}"}}],"actions":["Admin","Read","Write","List"]}}]}}"#,
            self.access_key, self.secret_key
        );
        std::fs::write(&identities, config).expect("writable");
        let log = self.dir.path().join("log");
        let _ = std::fs::remove_file(&log);
        let mut command = Command::new(tool("venv/bin/weed"));
        command
            .arg("mini")
            .arg(format!("-dir={}", self.data.display()))
            .arg(format!("-s3.config={}", identities.display()));
        command.args([
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-webdav=false",
            "-admin.ui=false",
            "-master.telemetry=false",
        ]);
        command.args(["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"]);
        for (port, name) in self.ports.iter().zip(["s3", "master", "volume", "filer", "admin"]) {
            command.arg(format!("-{name}.port={port}")).arg(format!("-{name}.port.grpc={}", port + 10_000));
        }
        if self.bucket {
            command.arg(format!("-bucket={BUCKET}"));
        }
        // A proxy of this machine is none of its business.
        command.env("LOG_FILE", &log).env("HOME", self.dir.path()).current_dir(self.dir.path());
        let mut child = spawn(command);
        let ready = wait_for("SeaweedFS", || {
            if child.try_wait().expect("a child can be asked").is_some() {
                return Some(false);
            }
            std::fs::read_to_string(&log).ok()?.contains("running and ready to use").then_some(true)
        });
        self.child = Some(child);
        if !ready {
            self.kill();
        }
        ready
    }

    /// `HOST:PORT` of its S3 endpoint.
    #[must_use]
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.ports[0])
    }

    /// Its bucket as a store.
    #[must_use]
    pub fn store(&self) -> StoreAt {
        StoreAt::new(
            &format!("s3://{BUCKET}"),
            &[
                ("AWS_ENDPOINT", &format!("http://{}", self.address())),
                ("AWS_ALLOW_HTTP", "true"),
                ("AWS_REGION", "us-east-1"),
                ("AWS_ACCESS_KEY_ID", &self.access_key),
                ("AWS_SECRET_ACCESS_KEY", &self.secret_key),
            ],
        )
    }

    /// What nobody may ever print.
    #[must_use]
    pub fn secret(&self) -> &str {
        &self.secret_key
    }

    /// Bytes that its data takes on disk.
    #[must_use]
    pub fn data_dir(&self) -> &std::path::Path {
        &self.data
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it again on the same ports and directory.
    ///
    /// # Panics
    /// If it does not start.
    pub fn restart(&mut self) {
        self.kill();
        assert!((0..ATTEMPTS).any(|_| self.try_start()), "SeaweedFS did not start again");
    }

    /// From its next start on it knows another secret for the same access key.
    pub fn set_secret(&mut self, secret: &str) {
        secret.clone_into(&mut self.secret_key);
    }

    /// From its next start on it serves another directory, in which there is no bucket; or again the first one.
    pub fn lose_bucket(&mut self, lost: bool) {
        self.data = self.dir.path().join(if lost { "empty" } else { "data" });
        self.bucket = !lost;
    }
}

impl Drop for SeaweedFs {
    fn drop(&mut self) {
        self.kill();
    }
}
