//! `GetStatus`: what an operator is told, who has no access to the store, by a receiver that has.
//!
//! Promises: reads only; a volume that can't be read is named among the problems and hides no other. Costs the store two to four
//! requests for each volume that this receiver has loaded, and only when it is asked.

use std::sync::Arc;

use catalog::fleet::receivers::ReceiverState;
use catalog::store::Store;
use catalog::volume::log::LogError;
use catalog::volume::open_view;
use catalog::volume::owner::owner;
use common::format::close::Consistency;
use common::net::pb;
use futures::StreamExt as _;

use crate::registry::Registry;
use crate::volumes::{Volume, Volumes};

/// Volumes looked at; the answer says so where there are more.
const VOLUMES_MAX: usize = 1_000;
/// Logs read at a time.
const READS_IN_PARALLEL: usize = 4;

/// How this receiver, its fleet and its volumes stand.
pub(crate) async fn answer(store: &Store, registry: &Registry, volumes: &Volumes) -> pb::GetStatusReply {
    let own = registry.own();
    let mut loaded = volumes.all();
    loaded.sort_by_cached_key(|volume| {
        let header = volume.header();
        (header.machine_name.clone(), header.name.clone())
    });
    let (found, mut problems) = (loaded.len(), Vec::new());
    loaded.truncate(VOLUMES_MAX);
    if found > loaded.len() {
        problems.push(format!(
            "{found} volumes are loaded, the first {VOLUMES_MAX} are shown: see `blockferry status --store`"
        ));
    }
    let looks = loaded.into_iter().map(|volume| async move { (volume.header(), look(store, &volume).await) });
    let mut looks = futures::stream::iter(looks).buffered(READS_IN_PARALLEL);
    let mut rows = Vec::new();
    while let Some((header, look)) = looks.next().await {
        match look {
            Ok(row) => rows.push(row),
            Err(error) => problems.push(format!("{}/{}: {error}", header.machine_name, header.name)),
        }
    }
    pb::GetStatusReply {
        receiver: Some(pb::FleetReceiver {
            id: own.receiver.0.to_vec().into(),
            name: own.name.clone(),
            addresses: own.addresses.clone(),
            draining: own.state == ReceiverState::Draining,
            stale: false,
            load_percent: own.load_percent(),
        }),
        software_version: own.software.clone(),
        started: own.started.0,
        stage_used_bytes: own.stage_used,
        stage_capacity_bytes: own.stage_capacity,
        sessions: own.sessions,
        fleet: registry.receivers().await,
        volumes: rows,
        problems,
    }
}

async fn look(store: &Store, volume: &Arc<Volume>) -> Result<pb::VolumeStatus, LogError> {
    let header = volume.header();
    let view = open_view(store, &header).await?;
    let owner = owner(store, header.volume, view.position.seq).await?;
    let newest = view.points.iter().rev().find(|point| point.consistency != Consistency::Fuzzy);
    Ok(pb::VolumeStatus {
        id: header.volume.0.to_vec().into(),
        machine: header.machine_name.clone(),
        name: header.name.clone(),
        session: volume.has_session(),
        newest_point: newest.map(|point| point.id.0.to_vec().into()).unwrap_or_default(),
        newest_time: newest.map_or(0, |point| point.cut_time.0),
        owner: owner.map(|owner| owner.0.to_vec().into()).unwrap_or_default(),
        generation: view.position.generation.0,
    })
}
