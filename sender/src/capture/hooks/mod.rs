//! Programs of the operator that bring an application to rest before a cut and let it go on after.
//!
//! A hook directory holds `pre.d` and `post.d`. The executables of `pre.d` run before the freeze, those of `post.d` after the
//! thaw, one after the other, in the order of their names. `docs/operations.md` is the operator's page, `deploy/hooks` holds
//! ready ones. What a hook finds in its environment:
//!
//! | variable | |
//! | --- | --- |
//! | `BLOCKFERRY_PHASE` | `pre` or `post` |
//! | `BLOCKFERRY_VOLUME` | name of the volume |
//! | `BLOCKFERRY_POINT` | names the attempt: the same in `pre` and `post`, another one each time |
//! | `BLOCKFERRY_DEVICE` | path of the block device or image file |
//! | `BLOCKFERRY_RUN_DIR` | an empty directory that only the sender's user may enter, there from the first `pre` hook to the last `post` hook |
//! | `BLOCKFERRY_TIMEOUT_SECONDS` | whole seconds that this hook may take |
//! | `BLOCKFERRY_OUTCOME` | in `post` only: `cut` where the disk was cut while the application rested, else `failed` |
//!
//! Promises: a hook that takes longer than the limit is killed with its process group; once the first `pre` hook was started,
//! the `post` hooks run, whatever comes, also where the future that waits for them is dropped; what hooks print is kept up to
//! [`OUTPUT_BYTES_MAX`], the rest is read and thrown away, so that a hook never waits for us.
//! Never: runs a file that somebody but root or this user could have written.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::error::{Dispose, Disposition};
use tracing::{debug, info, warn};

pub(in crate::capture) mod run;

#[cfg(test)]
mod tests;

use run::Ended;

/// How long a hook may take unless told otherwise.
pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);
/// Output of one hook that is kept for the log; what databases say about a failure fits many times over.
pub const OUTPUT_BYTES_MAX: usize = 16 << 10;
/// Hooks of one phase: more is a directory that was meant for something else.
const HOOKS_MAX: usize = 64;

/// Why hooks can't be used.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// The directory or something in it can't be read.
    #[error("hooks: {} can't be read: {source}; check --hook-dir", path.display())]
    Unreadable {
        /// What.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// Somebody else could have written it.
    #[error(
        "hooks: {} belongs to user {owner} and has mode {mode:04o}: a hook runs with this process's rights, so it must belong to root or to user {user}, and group and others must not be allowed to write it",
        path.display()
    )]
    Writable {
        /// The file or directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its permission bits.
        mode: u32,
        /// The user that this process runs as.
        user: u32,
    },
    /// Too many.
    #[error("hooks: {} holds more than {HOOKS_MAX} executables; is it a hook directory?", path.display())]
    TooMany {
        /// The directory.
        path: PathBuf,
    },
}

impl Dispose for HookError {
    fn disposition(&self) -> Disposition {
        Disposition::BadInput
    }
}

/// The hooks of one directory. Clones are the same hooks.
#[derive(Debug, Clone)]
pub struct Hooks(Arc<Programs>);

#[derive(Debug)]
struct Programs {
    pre: Vec<PathBuf>,
    post: Vec<PathBuf>,
    timeout: Duration,
}

/// What hooks are told.
#[derive(Debug, Clone)]
pub struct HookContext {
    /// Name of the volume.
    pub volume: String,
    /// Names the attempt.
    pub point: String,
    /// Its device or file.
    pub device: PathBuf,
}

impl Hooks {
    /// Looks for hooks below `dir`; `None` where there are none, also where `dir` has neither `pre.d` nor `post.d`. Files that
    /// are not executable, or whose name starts with a dot or ends with `~`, are left out. `timeout` is for each hook.
    ///
    /// # Errors
    /// [`HookError::Unreadable`] where `dir` is not there, [`HookError::Writable`], [`HookError::TooMany`].
    pub fn load(dir: &Path, timeout: Duration) -> Result<Option<Self>, HookError> {
        check_owner(dir)?;
        let (pre, post) = (programs(&dir.join("pre.d"))?, programs(&dir.join("post.d"))?);
        if pre.is_empty() && post.is_empty() {
            return Ok(None);
        }
        info!(dir = %dir.display(), pre = pre.len(), post = post.len(), "hooks found");
        Ok(Some(Self(Arc::new(Programs { pre, post, timeout }))))
    }

    /// Runs the `pre` hooks, up to the first that fails. What it returns has to be ended with [`Session::post`]; where it is
    /// dropped instead, the `post` hooks run on a thread of their own. So this is safe to cancel.
    pub async fn pre(&self, context: &HookContext) -> Session {
        let (programs, context) = (Arc::clone(&self.0), context.clone());
        let started = tokio::task::spawn_blocking(move || Session::begin(programs, context)).await;
        started.unwrap_or_else(|error| Session {
            begun: None,
            problem: Some(format!("the pre hooks could not be run: {error}")),
        })
    }
}

#[derive(Debug)]
struct Begun {
    programs: Arc<Programs>,
    context: HookContext,
    /// Removed when the last `post` hook has ended.
    run_dir: Option<PathBuf>,
    cut: bool,
}

/// Hooks between `pre` and `post`: the application rests, as far as [`Session::problem`] has nothing to say.
#[derive(Debug)]
#[must_use = "post hooks have to run"]
pub struct Session {
    begun: Option<Begun>,
    problem: Option<String>,
}

impl Session {
    fn begin(programs: Arc<Programs>, context: HookContext) -> Self {
        let run_dir = match make_run_dir() {
            Ok(dir) => Some(dir),
            Err(error) => {
                return Self {
                    begun: None,
                    problem: Some(format!("no directory for the hooks could be made: {error}")),
                };
            }
        };
        let begun = Begun { programs: Arc::clone(&programs), context, run_dir, cut: false };
        let problem = begun.run("pre", &programs.pre, true).err();
        Self { begun: Some(begun), problem }
    }

    /// Why the application is not known to be at rest; `None` where all `pre` hooks succeeded.
    #[must_use]
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Runs the `post` hooks, all of them whatever one says. `cut` says whether the disk was cut meanwhile. Returns what went
    /// wrong in them. Safe to cancel: they run to their end all the same.
    pub async fn post(mut self, cut: bool) -> Option<String> {
        let mut begun = self.begun.take()?;
        begun.cut = cut;
        let ended = tokio::task::spawn_blocking(move || begun.post().err()).await;
        ended.unwrap_or_else(|error| Some(format!("the post hooks could not be run: {error}")))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(mut begun) = self.begun.take() {
            let spawned = std::thread::Builder::new().name("post-hooks".to_owned()).spawn(move || begun.post());
            if let Err(error) = spawned {
                warn!(%error, "no thread for the post hooks: the application may still be at rest");
            }
        }
    }
}

impl Begun {
    fn post(&mut self) -> Result<(), String> {
        let result = self.run("post", &self.programs.post, false);
        if let Some(dir) = self.run_dir.take() {
            let _ = std::fs::remove_dir_all(dir);
        }
        result
    }

    /// Runs programs one after the other; the first problem is returned.
    fn run(&self, phase: &'static str, programs: &[PathBuf], stop_at_failure: bool) -> Result<(), String> {
        let mut result = Ok(());
        for program in programs {
            if let Err(problem) = self.run_one(phase, program) {
                warn!(volume = %self.context.volume, phase, "{problem}");
                metrics::counter!("blockferry_sender_hook_failures_total", "phase" => phase).increment(1);
                if result.is_ok() {
                    result = Err(problem);
                }
                if stop_at_failure {
                    break;
                }
            }
        }
        result
    }

    fn run_one(&self, phase: &'static str, program: &Path) -> Result<(), String> {
        // Once more: it may have been replaced since it was found.
        check_owner(program).map_err(|error| error.to_string())?;
        let timeout = self.programs.timeout;
        let mut command = std::process::Command::new(program);
        command
            .env("BLOCKFERRY_PHASE", phase)
            .env("BLOCKFERRY_VOLUME", &self.context.volume)
            .env("BLOCKFERRY_POINT", &self.context.point)
            .env("BLOCKFERRY_DEVICE", &self.context.device)
            .env("BLOCKFERRY_TIMEOUT_SECONDS", timeout.as_secs().max(1).to_string())
            .current_dir("/");
        if let Some(dir) = &self.run_dir {
            command.env("BLOCKFERRY_RUN_DIR", dir);
        }
        if phase == "post" {
            command.env("BLOCKFERRY_OUTCOME", if self.cut { "cut" } else { "failed" });
        }
        let shown = program.display();
        let finished = run::run(&mut command, timeout, OUTPUT_BYTES_MAX)
            .map_err(|error| format!("hook {shown} can't be run: {error}"))?;
        let output = finished.text();
        if !output.is_empty() {
            debug!(volume = %self.context.volume, phase, hook = %shown, %output, "a hook said");
        }
        let said = output.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing");
        let said: String = said.trim().chars().take(200).collect();
        match finished.ended {
            Ended::Status(status) if status.success() => Ok(()),
            Ended::Status(status) => Err(format!("hook {shown} failed ({status}); it said: {said}")),
            Ended::Late => {
                let seconds = timeout.as_secs_f64();
                Err(format!("hook {shown} took longer than {seconds} s and was killed; it said: {said}"))
            }
        }
    }
}

/// A directory with an unguessable name that only this user may enter.
fn make_run_dir() -> std::io::Result<PathBuf> {
    use std::os::unix::fs::DirBuilderExt;
    let random: [u8; 8] = common::rng::random().map_err(std::io::Error::other)?;
    let name = format!("blockferry-hooks-{:016x}", u64::from_le_bytes(random));
    // `/run` is memory: what hooks leave there never lies on a disk that is about to be frozen.
    let mut failed = None;
    for parent in [PathBuf::from("/run"), std::env::temp_dir()] {
        let dir = parent.join(&name);
        match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => return Ok(dir),
            Err(error) => failed = Some(error),
        }
    }
    Err(failed.unwrap_or_else(|| std::io::ErrorKind::NotFound.into()))
}

/// Executables of a directory, by name; none where it is not there.
fn programs(dir: &Path) -> Result<Vec<PathBuf>, HookError> {
    let unreadable = |source| HookError::Unreadable { path: dir.to_owned(), source };
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(unreadable)?,
    };
    check_owner(dir)?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') || name.ends_with('~') {
            continue;
        }
        let metadata =
            std::fs::metadata(&path).map_err(|source| HookError::Unreadable { path: path.clone(), source })?;
        if !metadata.is_file() {
            continue;
        }
        if metadata.permissions().mode() & 0o111 == 0 {
            warn!(file = %path.display(), "a file among the hooks is not executable and is left out");
            continue;
        }
        check_owner(&path)?;
        found.push(path);
        if found.len() > HOOKS_MAX {
            return Err(HookError::TooMany { path: dir.to_owned() });
        }
    }
    found.sort();
    Ok(found)
}

/// Refuses what somebody else may write. Follows links: what counts is what would run.
fn check_owner(path: &Path) -> Result<(), HookError> {
    let metadata = std::fs::metadata(path).map_err(|source| HookError::Unreadable { path: path.to_owned(), source })?;
    let user = rustix::process::geteuid().as_raw();
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    if (owner != 0 && owner != user) || mode & 0o022 != 0 {
        return Err(HookError::Writable { path: path.to_owned(), owner, mode, user });
    }
    Ok(())
}
