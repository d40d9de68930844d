//! Snapshots of logical volumes, by `lvs`, `lvcreate` and `lvremove`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{SnapshotError, Snapshotter};
use crate::capture::hooks::run::{self, Ended};
use crate::capture::rest::RestProbe;
use crate::capture::{CaptureError, Disk, Source};
use common::ids::Geometry;

/// How long a tool may take: it waits for locks of other tools, and for writes under way.
const TOOL_TIMEOUT: Duration = Duration::from_secs(60);
/// Output of a tool that is looked at.
const OUTPUT_BYTES_MAX: usize = 256 << 10;
/// Snapshots of ours begin like this, so that those of a killed sender are found.
const PREFIX: &str = "blockferry-";
/// Room of a snapshot for what is written while it lives, in percent of the volume. Thin volumes need none set aside.
const ROOM_PERCENT: u32 = 10;

/// How LVM's tools are started.
#[derive(Debug, Clone, Default)]
pub struct LvmTools {
    /// Directory of the tools; empty to search `PATH`.
    pub directory: PathBuf,
}

/// A logical volume.
#[derive(Debug, Clone)]
pub struct LvmVolume {
    tools: LvmTools,
    path: PathBuf,
    group: String,
    name: String,
    thin: bool,
    /// Makes the names of this sender's snapshots its own.
    tag: String,
}

impl LvmVolume {
    /// The logical volume at `path`; `None` where it is something else, or LVM's tools are missing. `tag` names the sender's
    /// volume: snapshots with it that an earlier run left are removed.
    ///
    /// # Errors
    /// [`SnapshotError::Lvm`].
    pub fn of(path: &Path, tag: &str, tools: LvmTools) -> Result<Option<Self>, SnapshotError> {
        let Ok(number) = crate::capture::freeze::mounts::DeviceNumber::of_path(path) else { return Ok(None) };
        let uuid = std::fs::read_to_string(format!("/sys/dev/block/{number}/dm/uuid")).unwrap_or_default();
        if !uuid.starts_with("LVM-") {
            return Ok(None);
        }
        Self::look(path, tag, tools).map(Some)
    }

    pub(super) fn look(path: &Path, tag: &str, tools: LvmTools) -> Result<Self, SnapshotError> {
        let tag: String = tag.chars().filter(char::is_ascii_alphanumeric).take(40).collect();
        let mut volume =
            Self { tools, path: path.to_owned(), group: String::new(), name: String::new(), thin: false, tag };
        let path = path.to_string_lossy().into_owned();
        let said =
            volume.run("lvs", &["--noheadings", "--separator", "|", "--options", "vg_name,lv_name,segtype", &path])?;
        let mut fields = said.lines().last().unwrap_or_default().split('|').map(str::trim);
        let (Some(group), Some(name), Some(kind)) = (fields.next(), fields.next(), fields.next()) else {
            let said = format!("it answered \"{said}\"");
            return Err(SnapshotError::Lvm { tool: "lvs", volume: volume.path, said });
        };
        (volume.group, volume.name, volume.thin) = (group.to_owned(), name.to_owned(), kind == "thin");
        volume.remove_left()?;
        Ok(volume)
    }

    /// Removes what a killed sender left.
    fn remove_left(&self) -> Result<(), SnapshotError> {
        let said = self.run("lvs", &["--noheadings", "--options", "lv_name", &self.group])?;
        let prefix = format!("{PREFIX}{}-", self.tag);
        for name in said.lines().map(str::trim).filter(|name| name.starts_with(&prefix)) {
            self.run("lvremove", &["--yes", &format!("{}/{name}", self.group)])?;
        }
        Ok(())
    }

    fn run(&self, tool: &'static str, arguments: &[&str]) -> Result<String, SnapshotError> {
        let failed = |said: String| SnapshotError::Lvm { tool, volume: self.path.clone(), said };
        let mut command = Command::new(self.tools.directory.join(tool));
        command.args(arguments).env("LC_ALL", "C");
        let finished = run::run(&mut command, TOOL_TIMEOUT, OUTPUT_BYTES_MAX)
            .map_err(|error| failed(format!("it can't be started: {error}")))?;
        let said = finished.text();
        match finished.ended {
            Ended::Status(status) if status.success() => Ok(said),
            Ended::Status(status) => Err(failed(format!("{status}; {}", said.lines().last().unwrap_or_default()))),
            Ended::Late => Err(failed(format!("it took longer than {} s", TOOL_TIMEOUT.as_secs()))),
        }
    }
}

impl Snapshotter for LvmVolume {
    fn take(&self) -> Result<Box<dyn Disk>, SnapshotError> {
        let random: [u8; 4] = common::rng::random().map_err(|error| SnapshotError::Lvm {
            tool: "lvcreate",
            volume: self.path.clone(),
            said: error.to_string(),
        })?;
        let name = format!("{PREFIX}{}-{:08x}", self.tag, u32::from_le_bytes(random));
        let origin = format!("{}/{}", self.group, self.name);
        let room = format!("{ROOM_PERCENT}%ORIGIN");
        let mut arguments = vec!["--snapshot", "--permission", "r", "--name", &name];
        if self.thin {
            // Thin snapshots are not activated unless told so.
            arguments.extend(["--setactivationskip", "n"]);
        } else {
            arguments.extend(["--extents", &room]);
        }
        arguments.push(&origin);
        self.run("lvcreate", &arguments)?;
        let removal = Removal { volume: self.clone(), name };
        let source = Source::open(&PathBuf::from(format!("/dev/{}/{}", self.group, removal.name)))?;
        Ok(Box::new(Snapshot { source, _removal: removal }))
    }
}

/// A snapshot, removed when dropped.
#[derive(Debug)]
struct Snapshot {
    /// Before the removal: it is closed first.
    source: Source,
    _removal: Removal,
}

impl Disk for Snapshot {
    fn geometry(&self) -> Geometry {
        self.source.geometry()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CaptureError> {
        self.source.read_at(offset, buffer)
    }

    fn check_size(&self) -> Result<(), CaptureError> {
        self.source.check_size()
    }

    fn watch_rest(&self) -> RestProbe {
        self.source.watch_rest()
    }
}

/// Removes a snapshot.
#[derive(Debug)]
struct Removal {
    volume: LvmVolume,
    name: String,
}

impl Drop for Removal {
    fn drop(&mut self) {
        if let Err(error) = self.volume.run("lvremove", &["--yes", &format!("{}/{}", self.volume.group, self.name)]) {
            tracing::warn!(%error, snapshot = %self.name, "a snapshot could not be removed; the next start tries again");
        }
    }
}
