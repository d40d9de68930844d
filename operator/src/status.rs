//! `blockferry status`: the fleet's receivers and the volumes, as the store alone or one receiver tells, and what to do about what
//! is wrong.
//!
//! Whether a receiver lives is judged in the store's time: its heartbeat's against the newest of the fleet. Only where all of
//! them stand still is this machine's clock asked, and said to be. Never: writes anything.

use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;

use catalog::fleet::receivers::{self, Listed, ReceiverState, STALE_AFTER};
use catalog::store::Store;
use catalog::volume::lifecycle::{self, Known};
use catalog::volume::open_view;
use catalog::volume::owner::owner;
use clap::Args;
use common::clock::{Clock, UnixMillis};
use common::format::close::Consistency;
use common::format::lifecycle::Phase;
use common::ids::{CloseId, ReceiverId, VolumeId};
use common::net::operator::{self, OperatorFile};
use common::net::pb;
use common::net::resolve::HostPort;
use common::units::{ByteCount, DurationText};

use crate::error::OperatorError;
use crate::lifecycle::ChangeError;
use crate::volumes::Table;

/// What `status` takes beside the store.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Ask this receiver instead of the store
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "store", requires = "cert")]
    pub(crate) receiver: Option<HostPort>,
    /// Key and certificate of a person, as `blockferry-receiver operator create` writes them
    #[arg(long, value_name = "FILE", env = "BLOCKFERRY_CERT")]
    cert: Option<PathBuf>,
    /// Name a volume whose newest recovery point is older than this
    #[arg(long, value_name = "TIME", default_value = "1h")]
    max_age: DurationText,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// A receiver, as `--json` prints it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ReceiverRow {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Where senders reach it.
    pub addresses: Vec<String>,
    /// `serving`, `draining`, `gone` or `stale`.
    pub state: &'static str,
    /// How full its stage is.
    pub stage_percent: u32,
    /// Bytes that its stage holds; here and below null for what the receiver that was asked does not know of another one.
    pub stage_used_bytes: Option<u64>,
    /// Bytes that it may hold.
    pub stage_capacity_bytes: Option<u64>,
    /// Volumes that a sender writes through it.
    pub sessions: Option<u32>,
    /// When it last said that it lives, by the store's time.
    pub heartbeat_time: Option<String>,
    /// Version of its software.
    pub software: Option<String>,
}

/// A volume, as `--json` prints it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct VolumeRow {
    /// Its id.
    pub id: String,
    /// Machine's name.
    pub machine: String,
    /// Its name.
    pub volume: String,
    /// Newest recovery point that is not fuzzy; null for none.
    pub newest_point: Option<String>,
    /// When that was cut, RFC 3339 in UTC; null for none.
    pub newest_time: Option<String>,
    /// Its age by this machine's clock; null for none.
    pub newest_age_seconds: Option<i64>,
    /// Name or id of the receiver that has the right to write it; null for none yet.
    pub receiver: Option<String>,
    /// The generation under which it does.
    pub generation: u64,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
struct Status {
    receivers: Vec<ReceiverRow>,
    volumes: Vec<VolumeRow>,
    /// What is wrong, each with the next step.
    problems: Vec<String>,
}

/// Prints how fleet and volumes stand.
///
/// # Errors
/// [`OperatorError`]; a single object that can't be read is one of the problems printed.
pub async fn run(store: &Store, args: &StatusArgs, out: &mut (dyn Write + Send)) -> Result<(), OperatorError> {
    let now = Clock::System.now();
    let mut problems = Vec::new();
    let (listed, errors) = receivers::list(store).await?;
    problems.extend(errors.iter().map(ToString::to_string));
    let receivers = judge(&listed, now, &mut problems);
    let names: HashMap<ReceiverId, String> =
        listed.iter().map(|listed| (listed.receiver.receiver, listed.receiver.name.clone())).collect();
    let (known, errors) = lifecycle::list(store).await.map_err(ChangeError::from)?;
    problems.extend(errors.iter().map(ToString::to_string));
    let mut volumes = Vec::with_capacity(known.len());
    for known in known.iter().filter(|known| known.phase != Phase::Deleted) {
        let header = &known.header;
        match volume(store, known, now, &names, args, &mut problems).await {
            Ok(row) => volumes.push(row),
            Err(error) => problems.push(format!("{}/{}: {error}", header.machine_name, header.name)),
        }
    }
    let status = Status { receivers, volumes, problems };
    print(&status, args.json, out).map_err(OperatorError::Output)
}

/// Rows of the receivers, and what is wrong with them.
fn judge(listed: &[Listed], now: UnixMillis, problems: &mut Vec<String>) -> Vec<ReceiverRow> {
    let stale_ms = i64::try_from(STALE_AFTER.as_millis()).unwrap_or(i64::MAX);
    let newest = listed.iter().map(|listed| listed.meta.modified.0).max().unwrap_or(0);
    let rows: Vec<_> = listed
        .iter()
        .map(|Listed { receiver, meta }| {
            let stale = newest.saturating_sub(meta.modified.0) >= stale_ms || now.0.saturating_sub(newest) >= stale_ms;
            let gone = receiver.state == ReceiverState::Gone;
            ReceiverRow {
                id: receiver.receiver.to_string(),
                name: receiver.name.clone(),
                addresses: receiver.addresses.clone(),
                state: if stale && !gone { "stale" } else { receiver.state.as_str() },
                stage_percent: receiver.load_percent(),
                stage_used_bytes: Some(receiver.stage_used),
                stage_capacity_bytes: Some(receiver.stage_capacity),
                sessions: Some(receiver.sessions),
                heartbeat_time: Some(meta.modified.to_string()),
                software: Some(receiver.software.clone()),
            }
        })
        .collect();
    name_stale(&rows, problems);
    if !rows.iter().any(|row| row.state == "serving") {
        let text = "no receiver serves, as far as the store and this machine's clock tell: start one, nothing is replicated \
                    meanwhile";
        problems.push(text.to_owned());
    }
    rows
}

fn name_stale(rows: &[ReceiverRow], problems: &mut Vec<String>) {
    for row in rows.iter().filter(|row| row.state == "stale") {
        let since = row.heartbeat_time.as_ref().map(|time| format!(" since {time}")).unwrap_or_default();
        problems.push(format!(
            "receiver {} ({}) has not said{since} that it lives: check that it runs and reaches the store; its senders go to \
             another receiver by themselves, where there is one",
            row.name,
            row.addresses.join(", "),
        ));
    }
}

/// Asks a receiver and prints what it says of itself, of the fleet, and of the volumes that it has loaded.
///
/// # Errors
/// [`OperatorError::Call`].
pub async fn ask(args: &StatusArgs, out: &mut (dyn Write + Send)) -> Result<(), OperatorError> {
    let (Some(host), Some(cert)) = (&args.receiver, &args.cert) else {
        // clap demands both without --store.
        return Ok(());
    };
    let failed = |error| OperatorError::Call(Box::new(error));
    let file = OperatorFile::load(cert).map_err(failed)?;
    let reply = operator::status(host, &file).await.map_err(failed)?;
    print(&told(&reply, Clock::System.now(), args), args.json, out).map_err(OperatorError::Output)
}

/// What a receiver's answer says. PURE.
fn told(reply: &pb::GetStatusReply, now: UnixMillis, args: &StatusArgs) -> Status {
    let mut problems = reply.problems.clone();
    let own = reply.receiver.as_ref();
    let id = |bytes: &[u8]| bytes.try_into().map(ReceiverId).ok();
    let text = |bytes: &[u8]| id(bytes).map(|id| id.to_string()).unwrap_or_default();
    let others = reply.fleet.iter().filter(|receiver| own.is_none_or(|own| own.id != receiver.id));
    let rows: Vec<ReceiverRow> = own
        .into_iter()
        .chain(others)
        .map(|receiver| {
            // The first row is of the receiver that was asked, which knows more of itself than of others.
            let is_own = own.is_some_and(|own| own.id == receiver.id);
            ReceiverRow {
                id: text(&receiver.id),
                name: receiver.name.clone(),
                addresses: receiver.addresses.clone(),
                state: match () {
                    () if receiver.stale => "stale",
                    () if receiver.draining => "draining",
                    () => "serving",
                },
                stage_percent: receiver.load_percent,
                stage_used_bytes: is_own.then_some(reply.stage_used_bytes),
                stage_capacity_bytes: is_own.then_some(reply.stage_capacity_bytes),
                sessions: is_own.then_some(reply.sessions),
                heartbeat_time: None,
                software: is_own.then(|| reply.software_version.clone()),
            }
        })
        .collect();
    name_stale(&rows, &mut problems);
    let volumes = reply.volumes.iter().map(|volume| {
        let newest: Option<[u8; 32]> = volume.newest_point[..].try_into().ok();
        let age_ms = newest.map(|_| now.0.saturating_sub(volume.newest_time));
        judge_age(&format!("{}/{}", volume.machine, volume.name), age_ms, args, &mut problems);
        let owner = id(&volume.owner);
        let name = |id: ReceiverId| {
            let found = reply.fleet.iter().find(|receiver| receiver.id[..] == id.0);
            found.map_or_else(|| id.to_string(), |receiver| receiver.name.clone())
        };
        VolumeRow {
            id: volume.id[..].try_into().map(|id| VolumeId(id).to_string()).unwrap_or_default(),
            machine: volume.machine.clone(),
            volume: volume.name.clone(),
            newest_point: newest.map(|id| CloseId(id).to_string()),
            newest_time: newest.map(|_| UnixMillis(volume.newest_time).to_string()),
            newest_age_seconds: age_ms.map(|age| age / 1000),
            receiver: owner.map(name),
            generation: volume.generation,
        }
    });
    let volumes = volumes.collect();
    Status { receivers: rows, volumes, problems }
}

async fn volume(
    store: &Store,
    Known { header, phase, .. }: &Known,
    now: UnixMillis,
    names: &HashMap<ReceiverId, String>,
    args: &StatusArgs,
    problems: &mut Vec<String>,
) -> Result<VolumeRow, OperatorError> {
    let view = open_view(store, header).await?;
    let owner = owner(store, header.volume, view.position.seq).await?;
    let newest = view.points.iter().rev().find(|point| point.consistency != Consistency::Fuzzy);
    let age_ms = newest.map(|point| now.0.saturating_sub(point.cut_time.0));
    let name = format!("{}/{}", header.machine_name, header.name);
    // A retired volume grows old, as it should.
    if *phase == Phase::Active {
        judge_age(&name, age_ms, args, problems);
    }
    Ok(VolumeRow {
        id: header.volume.to_string(),
        machine: header.machine_name.clone(),
        volume: header.name.clone(),
        newest_point: newest.map(|point| point.id.to_string()),
        newest_time: newest.map(|point| point.cut_time.to_string()),
        newest_age_seconds: age_ms.map(|age| age / 1000),
        receiver: owner.map(|id| names.get(&id).cloned().unwrap_or_else(|| id.to_string())),
        generation: view.position.generation.0,
    })
}

/// Names a volume whose newest point is too old, or that has none.
fn judge_age(name: &str, age_ms: Option<i64>, args: &StatusArgs, problems: &mut Vec<String>) {
    let max_ms = i64::try_from(args.max_age.get().as_millis()).unwrap_or(i64::MAX);
    match age_ms {
        None => problems.push(format!(
            "{name} has no recovery point yet: look at `blockferry-sender status` on the machine, its first replication may run"
        )),
        Some(age) if age > max_ms => problems.push(format!(
            "{name}: its newest recovery point is {} old: see `blockferry-sender status` on the machine; where nothing changed \
             there since, all is well",
            age_text(age)
        )),
        Some(_) => {}
    }
}

/// An age in its two largest units.
fn age_text(ms: i64) -> String {
    let seconds = ms.max(0) / 1000;
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7_199 => format!("{} min", seconds / 60),
        7_200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

fn print(status: &Status, json: bool, out: &mut (dyn Write + Send)) -> std::io::Result<()> {
    if json {
        serde_json::to_writer_pretty(&mut *out, status)?;
        return writeln!(out);
    }
    let mut table = Table::new(&["RECEIVER", "STATE", "STAGE", "SESSIONS", "HEARTBEAT", "ADDRESS"]);
    for row in &status.receivers {
        table.row(vec![
            row.name.clone(),
            row.state.to_owned(),
            match row.stage_capacity_bytes {
                Some(capacity) => format!("{} % of {}", row.stage_percent, ByteCount(capacity)),
                None => format!("{} %", row.stage_percent),
            },
            row.sessions.map_or_else(String::new, |sessions| sessions.to_string()),
            row.heartbeat_time.clone().unwrap_or_default(),
            row.addresses.join(", "),
        ]);
    }
    table.print(out)?;
    writeln!(out)?;
    let mut table = Table::new(&["MACHINE", "VOLUME", "NEWEST POINT", "AGE", "RECEIVER", "GENERATION"]);
    for row in &status.volumes {
        table.row(vec![
            row.machine.clone(),
            row.volume.clone(),
            row.newest_time.clone().unwrap_or_else(|| "none".to_owned()),
            row.newest_age_seconds.map_or_else(String::new, |age| age_text(age.saturating_mul(1000))),
            row.receiver.clone().unwrap_or_default(),
            row.generation.to_string(),
        ]);
    }
    table.print(out)?;
    if !status.problems.is_empty() {
        writeln!(out)?;
    }
    status.problems.iter().try_for_each(|problem| writeln!(out, "! {problem}"))
}

#[cfg(test)]
mod tests {
    use catalog::fleet::receivers::Receiver;
    use catalog::store::ObjectMeta;
    use common::ids::Nonce;

    use super::*;

    fn listed(name: &str, state: ReceiverState, modified: i64) -> Listed {
        let receiver = Receiver {
            nonce: Nonce::ZERO,
            receiver: ReceiverId([1; 16]),
            instance: [0; 16],
            name: name.into(),
            addresses: vec![format!("{name}:9443")],
            state,
            stage_capacity: 10,
            stage_used: 1,
            volumes: 0,
            sessions: 0,
            heartbeat: 1,
            started: UnixMillis(0),
            written: UnixMillis(0),
            software: "1".into(),
        };
        Listed { receiver, meta: ObjectMeta { path: name.into(), size: 1, modified: UnixMillis(modified) } }
    }

    #[test]
    fn a_receiver_whose_heartbeat_lies_behind_the_fleets_newest_is_stale_whatever_this_machines_clock_says() {
        let fleet = [
            listed("alive", ReceiverState::Serving, 1_000_000),
            listed("still", ReceiverState::Serving, 800_000),
            listed("stopped", ReceiverState::Gone, 100),
        ];
        // This machine's clock is behind the store's.
        let mut problems = Vec::new();
        let rows = judge(&fleet, UnixMillis(5), &mut problems);
        assert_eq!(rows.iter().map(|row| row.state).collect::<Vec<_>>(), ["serving", "stale", "gone"]);
        assert!(problems.len() == 1 && problems[0].contains("still:9443"), "{problems:?}");
    }

    #[test]
    fn a_fleet_in_which_nobody_lives_is_said_to_replicate_nothing() {
        let mut problems = Vec::new();
        let rows = judge(&[listed("a", ReceiverState::Serving, 0)], UnixMillis(10_000_000), &mut problems);
        assert_eq!(rows[0].state, "stale");
        assert!(problems.iter().any(|problem| problem.contains("no receiver serves")), "{problems:?}");
        let mut problems = Vec::new();
        judge(&[], UnixMillis(0), &mut problems);
        assert_eq!(problems.len(), 1);
    }

    #[test]
    fn what_a_receiver_tells_of_itself_the_fleet_and_its_volumes_is_shown_with_what_is_wrong() {
        let args = StatusArgs { receiver: None, cert: None, max_age: "1h".parse().expect("a time"), json: false };
        let receiver = |id: u8, name: &str, stale| pb::FleetReceiver {
            id: vec![id; 16].into(),
            name: name.into(),
            addresses: vec![format!("{name}:9443")],
            draining: false,
            stale,
            load_percent: 7,
        };
        let volume = |name: &str, newest: &[u8], time| pb::VolumeStatus {
            id: vec![1; 16].into(),
            machine: "web".into(),
            name: name.into(),
            session: true,
            newest_point: newest.to_vec().into(),
            newest_time: time,
            owner: vec![2; 16].into(),
            generation: 3,
        };
        let reply = pb::GetStatusReply {
            receiver: Some(receiver(1, "asked", false)),
            stage_used_bytes: 7,
            stage_capacity_bytes: 100,
            fleet: vec![receiver(1, "asked", false), receiver(2, "other", true)],
            volumes: vec![volume("good", &[9; 32], 10_000_000), volume("old", &[9; 32], 0), volume("none", &[], 0)],
            problems: vec!["web/bad: its log is damaged".into()],
            ..pb::GetStatusReply::default()
        };
        let status = told(&reply, UnixMillis(10_000_000), &args);
        let rows: Vec<_> =
            status.receivers.iter().map(|row| (&*row.name, row.state, row.stage_capacity_bytes)).collect();
        assert_eq!(rows, [("asked", "serving", Some(100)), ("other", "stale", None)]);
        assert!(status.volumes.iter().all(|row| row.receiver.as_deref() == Some("other")));
        for (word, problem) in ["web/bad", "other:9443", "web/old", "web/none"].iter().zip(&status.problems) {
            assert!(problem.contains(word), "{problem}");
        }
        assert_eq!(status.problems.len(), 4);
    }

    #[test]
    fn ages_are_told_in_units_that_people_read() {
        assert_eq!(
            [0, 119_000, 120_000, 7_200_000, 172_800_000].map(age_text),
            ["0 s", "119 s", "2 min", "2 h", "2 d"]
        );
    }
}
