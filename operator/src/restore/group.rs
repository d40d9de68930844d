//! A machine's volumes of one instant: what a group point names is restored together, a file for each volume.
//!
//! Promises: every volume that has a point of that instant is restored, each as [`super::run`] does it; volumes of the machine
//! that have none are named, those that are deleted are not looked at. Files bear the volumes' names.

use std::collections::BTreeMap;
use std::path::PathBuf;

use catalog::store::Store;
use catalog::volume::history::History;
use catalog::volume::lifecycle::{self, Known};
use common::clock::UnixMillis;
use common::format::checkpoint::PointSummary;
use common::format::close::Consistency;
use common::format::lifecycle::Phase;
use common::ids::GroupId;
use common::net::identity::check_name;

use super::image::Format;
use super::{RestoreError, RestoreRequest};
use crate::error::OperatorError;
use crate::lifecycle::ChangeError;
use crate::select::PointWanted;

/// What to restore, and where to.
#[derive(Debug, Clone)]
pub struct GroupRequest {
    /// Name or id of the machine.
    pub machine: String,
    /// The instant: a group point's id, or the latest.
    pub point: PointWanted,
    /// The machine's key file.
    pub key_file: PathBuf,
    /// Folder for the files, made if it is not there.
    pub to_dir: PathBuf,
    /// What the files are written as.
    pub format: Format,
    /// Read back and compare what was written.
    pub verify: bool,
    /// Stop before anything is written.
    pub dry_run: bool,
    /// Overwrite files.
    pub force: bool,
    /// As for one volume.
    pub state_dir: PathBuf,
    /// Print JSON, a line for each volume.
    pub json: bool,
    /// Memory to stay within, in bytes.
    pub budget_bytes: u64,
}

/// Restores all of a machine's volumes that have a point of the instant.
///
/// # Errors
/// [`OperatorError`]; volumes restored before the failing one are whole, and named.
pub async fn run(
    store: &Store,
    request: &GroupRequest,
    out: &mut (dyn std::io::Write + Send),
) -> Result<(), OperatorError> {
    let (known_volumes, errors) = lifecycle::list(store).await.map_err(ChangeError::from)?;
    // One of another machine must not be in the way; one of this machine is missed below and named by `points`.
    for error in errors {
        tracing::warn!(%error, "a volume can't be looked at");
    }
    let (mut volumes, mut known) = (BTreeMap::new(), Vec::new());
    let there = known_volumes.into_iter().filter(|known| known.phase != Phase::Deleted);
    for Known { header, .. } in there {
        if header.machine_name == request.machine || header.machine.to_string() == request.machine {
            let points = History::read(store, &header).await?.points();
            known.extend(points.iter().copied());
            volumes.insert(header.name.clone(), (header, points));
        }
    }
    let machine = || request.machine.clone();
    if volumes.is_empty() {
        return Err(RestoreError::NoMachine { machine: machine() }.into());
    }
    let wanted = choose(&request.point, &known)
        .ok_or_else(|| RestoreError::NoGroupPoint { machine: machine(), known: recent(&known) })?;
    if !request.dry_run {
        let failed = |source| OperatorError::File { path: request.to_dir.display().to_string(), source };
        std::fs::create_dir_all(&request.to_dir).map_err(failed)?;
    }
    let mut left_out = Vec::new();
    for (name, (header, points)) in volumes {
        let Some(point) = points.iter().rfind(|point| point.group_point == wanted) else {
            left_out.push(name);
            continue;
        };
        // The name comes from the store and becomes a path.
        check_name(&name).map_err(|error| RestoreError::BadName { name: name.clone(), why: error.to_string() })?;
        let one = RestoreRequest {
            volume: header.volume.to_string(),
            point: PointWanted::Id(point.id.to_string()),
            key_file: request.key_file.clone(),
            to: request.to_dir.join(format!("{name}.{}", request.format.extension())),
            format: request.format,
            verify: request.verify,
            dry_run: request.dry_run,
            force: request.force,
            state_dir: request.state_dir.clone(),
            json: request.json,
            budget_bytes: request.budget_bytes,
        };
        super::run(store, &one, out).await?;
    }
    if !left_out.is_empty() && !request.json {
        let (left_out, machine) = (left_out.join(", "), &request.machine);
        writeln!(out, "group point {wanted} has no point of these volumes of {machine}: {left_out}")
            .map_err(OperatorError::Output)?;
    }
    Ok(())
}

/// The instant that is meant. PURE.
fn choose(wanted: &PointWanted, points: &[PointSummary]) -> Option<GroupId> {
    let grouped = points.iter().filter(|point| !point.group_point.is_nil());
    let sure = |point: &&PointSummary| point.consistency != Consistency::Fuzzy;
    let newest = |limit: Option<UnixMillis>| {
        let in_time = |point: &&PointSummary| limit.is_none_or(|limit| point.cut_time <= limit);
        grouped.clone().filter(sure).filter(in_time).max_by_key(|point| point.cut_time).map(|point| point.group_point)
    };
    match wanted {
        PointWanted::Group(id) => points.iter().any(|point| point.group_point == *id).then_some(*id),
        PointWanted::Latest => newest(None),
        PointWanted::At(time) => newest(Some(*time)),
        PointWanted::LatestAny => grouped.max_by_key(|point| point.cut_time).map(|point| point.group_point),
        // A volume's own point names the instant that it belongs to.
        PointWanted::Id(id) => {
            grouped.clone().find(|point| point.id.to_string().starts_with(id.as_str())).map(|point| point.group_point)
        }
    }
}

/// Some of the newest instants, as a clause.
fn recent(points: &[PointSummary]) -> String {
    let mut times = BTreeMap::new();
    for point in points.iter().filter(|point| !point.group_point.is_nil()) {
        times.insert((point.cut_time, point.group_point), ());
    }
    let newest: Vec<String> = times.keys().rev().take(3).map(|(time, id)| format!("{id} ({time})")).collect();
    if newest.is_empty() {
        return "it has none: ask its sender for one with `blockferry-sender point --all`".to_owned();
    }
    format!("the newest are {}", newest.join(", "))
}

#[cfg(test)]
mod tests {
    use catalog::volume::fixture::{FixtureVolume, image};

    use super::*;
    use crate::testing::World;

    #[tokio::test]
    async fn a_deleted_volume_is_not_restored_with_its_machine() {
        let world = World::new().await;
        let (mut key_file, mut gone) = (None, None);
        for name in ["data", "gone"] {
            let mut volume = FixtureVolume::create(&world.store, "web", name, 300_000).await;
            volume.group_point = GroupId([1; 16]);
            volume.capture(&image(300_000, 1), Some(Consistency::Crash)).await;
            key_file.get_or_insert_with(|| world.key_file(&volume));
            gone = Some(volume);
        }
        let gone = gone.expect("made");
        lifecycle::set(&world.store, &gone.header, Phase::Deleted, "test", &gone.clock).await.expect("deleted");
        let request = GroupRequest {
            machine: "web".into(),
            point: PointWanted::Latest,
            key_file: key_file.expect("made"),
            to_dir: world.path("restored"),
            format: Format::Raw,
            verify: false,
            dry_run: false,
            force: false,
            state_dir: world.path("state"),
            json: false,
            budget_bytes: 64 << 20,
        };
        let mut out = Vec::new();
        run(&world.store, &request, &mut out).await.expect("restored");
        let files: Vec<_> = std::fs::read_dir(world.path("restored")).expect("a folder").flatten().collect();
        assert_eq!(files.iter().map(std::fs::DirEntry::file_name).collect::<Vec<_>>(), ["data.img"]);
        let said = String::from_utf8_lossy(&out).into_owned();
        assert!(!said.contains("gone"), "{said}");
    }

    #[tokio::test]
    async fn the_volumes_of_one_instant_are_restored_together_and_no_others() {
        let world = World::new().await;
        let instants = [GroupId([1; 16]), GroupId([2; 16])];
        let (mut expected, mut key_file) = (Vec::new(), None);
        for (seed, name) in (0..).zip(["root", "data", "alone"]) {
            let mut volume = FixtureVolume::create(&world.store, "web", name, 300_000).await;
            for (turn, instant) in instants.into_iter().enumerate() {
                volume.group_point = if name == "alone" { GroupId::NIL } else { instant };
                let content = image(300_000, 10 * seed + turn as u64);
                volume.capture(&content, Some(Consistency::Crash)).await;
                expected.push((name, turn, content));
            }
            key_file.get_or_insert_with(|| world.key_file(&volume));
        }
        for (turn, point) in [(0, PointWanted::Group(instants[0])), (1, PointWanted::Latest)] {
            let to_dir = world.path(&format!("restored-{turn}"));
            let request = GroupRequest {
                machine: "web".into(),
                point,
                key_file: key_file.clone().expect("made"),
                to_dir: to_dir.clone(),
                format: Format::Raw,
                verify: false,
                dry_run: false,
                force: false,
                state_dir: world.path("state"),
                json: false,
                budget_bytes: 64 << 20,
            };
            let mut out = Vec::new();
            run(&world.store, &request, &mut out).await.expect("restored");
            assert!(String::from_utf8_lossy(&out).contains("web: alone"), "what is left out is named");
            for (name, at, content) in &expected {
                let file = to_dir.join(format!("{name}.img"));
                if *name == "alone" {
                    assert!(!file.exists());
                } else if *at == turn {
                    assert!(std::fs::read(file).expect("there") == *content, "{name}");
                }
            }
            let unknown = GroupRequest { point: PointWanted::Group(GroupId([9; 16])), ..request.clone() };
            let error = run(&world.store, &unknown, &mut out).await.expect_err("no such instant").to_string();
            assert!(error.contains(&instants[1].to_string()), "{error}");
            let elsewhere = GroupRequest { machine: "db".into(), ..request };
            assert!(run(&world.store, &elsewhere, &mut out).await.expect_err("no machine").to_string().contains("db"));
        }
    }
}
