//! `status`: how a sender stands, and what to do. Works without one too: then it shows what the state directory holds.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use common::clock::{Clock, UnixMillis};
use common::ops::exit::ExitCode;
use common::units::ByteCount;

use super::super::client::{ClientError, ControlClient};
use super::super::protocol::{Answered, AskCommand};
use super::super::status::{MemoryStatus, PointStatus, SenderStatus, VolumeStatus};
use super::{CommandError, Out};
use crate::state::{self, VolumeGlance};

/// Time between two looks of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// What is to be printed.
#[derive(Debug, Clone, Copy)]
pub struct StatusOptions {
    /// JSON instead of text.
    pub json: bool,
    /// Again and again, until a signal.
    pub watch: bool,
    /// The memory table too.
    pub memory: bool,
}

/// Prints the status. Exit code 0 where a sender runs or the state directory can be read.
///
/// # Errors
/// [`CommandError`].
pub async fn run(state_dir: &Path, options: StatusOptions, out: Out<'_>) -> Result<ExitCode, CommandError> {
    loop {
        let status = look(state_dir).await?;
        if options.json {
            serde_json::to_writer(&mut *out, &as_json(&status)).map_err(std::io::Error::from)?;
            writeln!(out)?;
        } else {
            write!(out, "{}", text(&status, state_dir, options.memory))?;
        }
        if !options.watch {
            return Ok(ExitCode::Ok);
        }
        if !options.json {
            writeln!(out)?;
        }
        out.flush()?;
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}

async fn look(state_dir: &Path) -> Result<SenderStatus, CommandError> {
    let mut client = match ControlClient::connect(state_dir).await {
        Ok(client) => client,
        Err(ClientError::NotRunning { .. }) => return at_rest(state_dir),
        Err(error) => return Err(error.into()),
    };
    match client.ask(AskCommand::Status).await? {
        Answered::Status(status) => Ok(*status),
        _ => Err(CommandError::Failed("the sender answered something else; see its log".into())),
    }
}

/// What a state directory tells without a sender.
fn at_rest(state_dir: &Path) -> Result<SenderStatus, CommandError> {
    // An unreadable directory is said to be that, and not taken for one without volumes.
    match std::fs::read_dir(state_dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let text = format!(
                "{} does not exist: nothing is protected from there; check --state-dir, or begin with `blockferry-sender register`",
                state_dir.display()
            );
            return Err(CommandError::Failed(text));
        }
        other => drop(other.map_err(|error| {
            CommandError::Failed(format!("{} can't be read: {error}; run the command as root", state_dir.display()))
        })?),
    }
    let volumes = state::glance(state_dir)?.into_iter().map(|glance| (name_of(&glance), volume_at_rest(&glance)));
    Ok(SenderStatus {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        time_ms: Clock::System.now().0,
        volumes: volumes.collect::<BTreeMap<_, _>>(),
        ..SenderStatus::default()
    })
}

fn name_of(glance: &VolumeGlance) -> String {
    glance.identity.as_ref().map_or_else(|_| glance.volume.to_string(), |identity| identity.name.clone())
}

fn volume_at_rest(glance: &VolumeGlance) -> VolumeStatus {
    let mut status = VolumeStatus { id: glance.volume.to_string(), state: "not running".into(), ..Default::default() };
    match &glance.identity {
        Ok(identity) => {
            status.path = String::from_utf8_lossy(&identity.source_path).into_owned();
            status.disk_bytes = identity.disk_bytes;
        }
        Err(error) => status.error = error.to_string(),
    }
    if let Some(applied) = glance.applied {
        status.last_point = (applied.epoch.0 > 0).then(|| PointStatus {
            id: applied.close.to_string(),
            epoch: applied.epoch.0,
            ..PointStatus::default()
        });
    }
    status
}

/// The status with what is computed at the look: ages and advice.
fn as_json(status: &SenderStatus) -> serde_json::Value {
    let mut value = serde_json::to_value(status).unwrap_or_default();
    for (name, volume) in &status.volumes {
        let entry = &mut value["volumes"][name];
        entry["rpo_seconds"] = volume.rpo_seconds(UnixMillis(status.time_ms)).into();
        entry["advice"] = advice(status, volume).into();
    }
    value
}

/// What to do about a volume; empty where there is nothing to do. PURE.
fn advice(status: &SenderStatus, volume: &VolumeStatus) -> String {
    if !status.running {
        return "start the sender: `systemctl start blockferry-sender`, or `blockferry-sender run`".to_owned();
    }
    if !volume.error.is_empty() {
        return "correct what the error names, then restart the sender; the other volumes go on".to_owned();
    }
    if !status.link.connected {
        return "nothing is lost meanwhile: check that a receiver runs and that its port is open for UDP and TCP"
            .to_owned();
    }
    match volume.state.as_str() {
        "overloaded" => {
            "changes come faster than they leave: intermediate points are lost until it catches up; see link, \
                         receiver and `--memory-budget`"
                .to_owned()
        }
        "first" => "wait: there is no point before the first replication is complete".to_owned(),
        _ => String::new(),
    }
}

/// The text for people. PURE.
fn text(status: &SenderStatus, state_dir: &Path, memory: bool) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write_text(&mut text, status, state_dir, memory);
    text
}

fn write_text(text: &mut String, status: &SenderStatus, state_dir: &Path, memory: bool) -> std::fmt::Result {
    let now = UnixMillis(status.time_ms);
    if status.running {
        let up = age(status.time_ms - status.started_ms);
        writeln!(text, "sender    runs since {up} (version {}, process {})", status.version, status.pid)?;
        let link = &status.link;
        if link.connected {
            let transport = if link.transport.is_empty() { String::new() } else { format!(" over {}", link.transport) };
            let receiver = if link.receiver.is_empty() { "a receiver" } else { &link.receiver };
            writeln!(text, "link      connected to {receiver}{transport}")?;
        } else {
            let why = if link.last_error.is_empty() { "not yet tried" } else { &link.last_error };
            writeln!(text, "link      no connection: {why}")?;
        }
    } else {
        writeln!(text, "sender    does not run with {}", state_dir.display())?;
    }
    if status.volumes.is_empty() {
        writeln!(text, "volumes   none: give the sender one with --volume NAME=PATH")?;
    }
    for (name, volume) in &status.volumes {
        writeln!(text, "\nvolume    {name} ({})", volume.id)?;
        let capture = if volume.capture.is_empty() { String::new() } else { format!(", capture={}", volume.capture) };
        writeln!(text, "  disk    {} ({}{capture})", volume.path, ByteCount(volume.disk_bytes))?;
        writeln!(text, "  state   {}", volume.state)?;
        if status.running {
            let flight = volume.epochs_in_flight;
            writeln!(text, "  backlog {}, {flight} epochs in flight", ByteCount(volume.backlog_bytes))?;
        }
        match &volume.last_point {
            Some(point) if point.time_ms == 0 => writeln!(text, "  last    committed epoch {}", point.epoch)?,
            Some(point) => {
                let ago = if volume.settled {
                    "nothing changed since".to_owned()
                } else {
                    format!("{} ago", age(now.0 - point.time_ms))
                };
                let time = UnixMillis(point.time_ms);
                writeln!(text, "  point   {time} ({ago}), {} consistent, {}", point.consistency, point.id)?;
            }
            None => writeln!(text, "  point   none yet")?,
        }
        if volume.overloads > 0 {
            writeln!(text, "  overload {} times so far", volume.overloads)?;
        }
        if !volume.warning.is_empty() {
            writeln!(text, "  warning {}", volume.warning)?;
        }
        if !volume.error.is_empty() {
            writeln!(text, "  error   {}", volume.error)?;
        }
        let advice = advice(status, volume);
        if !advice.is_empty() {
            writeln!(text, "  next    {advice}")?;
        }
    }
    if memory && status.running {
        write_memory(text, &status.memory)?;
    }
    Ok(())
}

fn write_memory(text: &mut String, memory: &MemoryStatus) -> std::fmt::Result {
    writeln!(text, "\nmemory    {} of {} used", ByteCount(memory.resident_bytes), ByteCount(memory.budget_bytes))?;
    writeln!(text, "  peak    {}", ByteCount(memory.resident_peak_bytes))?;
    for part in &memory.parts {
        writeln!(text, "  fixed   {} for {}", ByteCount(part.bytes), part.name)?;
    }
    writeln!(text, "  payload {} of {}", ByteCount(memory.payload_bytes), ByteCount(memory.payload_max_bytes))
}

/// A time span in its two largest units.
fn age(millis: i64) -> String {
    let seconds = millis.max(0) / 1000;
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume() -> VolumeStatus {
        VolumeStatus {
            state: "following".into(),
            path: "/dev/vda".into(),
            last_point: Some(PointStatus { time_ms: 1_000, consistency: "crash".into(), ..PointStatus::default() }),
            ..VolumeStatus::default()
        }
    }

    fn sender(volume: VolumeStatus) -> SenderStatus {
        SenderStatus {
            running: true,
            time_ms: 91_000,
            link: super::super::super::status::LinkStatus { connected: true, ..Default::default() },
            volumes: BTreeMap::from([("root".to_owned(), volume)]),
            ..SenderStatus::default()
        }
    }

    #[test]
    fn the_text_says_how_old_the_last_point_is_and_what_to_do() {
        let shown = text(&sender(volume()), Path::new("/s"), false);
        assert!(shown.contains("1 min 30 s ago") && !shown.contains("next"), "{shown}");
        let mut cut_off = sender(volume());
        cut_off.link.connected = false;
        assert!(text(&cut_off, Path::new("/s"), false).contains("port is open"));
        let stopped = VolumeStatus { error: "it shrank".into(), state: "stopped".into(), ..volume() };
        let shown = text(&sender(stopped), Path::new("/s"), false);
        assert!(shown.contains("it shrank") && shown.contains("next"), "{shown}");
    }

    #[test]
    fn a_volume_with_nothing_outstanding_does_not_age() {
        let value = as_json(&sender(volume()));
        assert_eq!(value["volumes"]["root"]["rpo_seconds"], 90.0);
        let settled = VolumeStatus { settled: true, ..volume() };
        assert_eq!(as_json(&sender(settled))["volumes"]["root"]["rpo_seconds"], 0.0);
    }

    #[test]
    fn without_a_sender_the_state_directory_is_shown() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let status = at_rest(dir.path()).expect("an empty directory is one");
        assert!(text(&status, dir.path(), true).contains("does not run"));
        assert!(at_rest(&dir.path().join("missing")).is_err());
    }
}
