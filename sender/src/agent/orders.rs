//! What people and scripts ask of a running sender, brought to the volumes' agents.

use std::collections::BTreeMap;
use std::sync::Arc;

use common::format::close::Consistency;
use common::ids::{GroupId, VolumeId};
use common::rng;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::Shared;
use super::cuts::{Point, PointRequest};
use super::volume::Order;
use crate::capture::cut::PointWish;
use crate::capture::group::GroupCut;
use crate::control::commands::detach::remove_pins;
use crate::control::{DetachReply, PointReply, Request};
use crate::events::EventKind;
use crate::spec::CaptureMode;
use crate::state::StateDir;

/// How an agent is reached.
pub(super) struct Reach {
    pub(super) volume: VolumeId,
    pub(super) capture: CaptureMode,
    pub(super) orders: mpsc::Sender<Order>,
}

/// Takes requests until the sender ends.
pub(super) async fn serve(
    shared: Arc<Shared>,
    state: Arc<StateDir>,
    mut volumes: BTreeMap<String, Reach>,
    mut requests: mpsc::Receiver<Request>,
) {
    while let Some(request) = requests.recv().await {
        match request {
            Request::Point { volume, consistency, reply } => {
                let chosen = choose(&volumes, volume.as_deref());
                match chosen {
                    Ok(names) => {
                        let answers = order_points(&shared, &volumes, &names, consistency);
                        // Commits take their time; others are served meanwhile.
                        tokio::spawn(answer_points(answers, consistency, Arc::clone(&shared), reply));
                    }
                    Err((volume, error)) => {
                        let _ = reply.send(vec![PointReply { volume, error, ..PointReply::default() }]);
                    }
                }
            }
            Request::Detach { volume, reply } => {
                let mut replies = Vec::new();
                match choose(&volumes, volume.as_deref()) {
                    Ok(names) => {
                        for name in names {
                            let error = detach(&shared, &state, &mut volumes, &name).await.err().unwrap_or_default();
                            replies.push(DetachReply { volume: name, error });
                        }
                    }
                    Err((volume, error)) => replies.push(DetachReply { volume, error }),
                }
                let _ = reply.send(replies);
            }
        }
    }
}

/// The volumes meant; an unknown one with what to say of it.
fn choose(volumes: &BTreeMap<String, Reach>, volume: Option<&str>) -> Result<Vec<String>, (String, String)> {
    match volume {
        None => Ok(volumes.keys().cloned().collect()),
        Some(name) if volumes.contains_key(name) => Ok(vec![name.to_owned()]),
        Some(name) => {
            let known: Vec<_> = volumes.keys().map(String::as_str).collect();
            let text = format!("this sender has no volume {name}; it has {}", known.join(", "));
            Err((name.to_owned(), text))
        }
    }
}

type Awaited = Vec<(String, oneshot::Receiver<Point>)>;

/// Asks each volume for a point; more than one at one instant.
fn order_points(
    shared: &Shared,
    volumes: &BTreeMap<String, Reach>,
    names: &[String],
    consistency: Option<Consistency>,
) -> Awaited {
    let together = names.len() > 1 && names.iter().all(|name| volumes[name].capture != CaptureMode::Scan);
    let group = together.then(|| match (rng::random(), rng::random()) {
        (Ok(set), Ok(instant)) => {
            Some(GroupCut::new(GroupId::from_random(set), GroupId::from_random(instant), names.len()))
        }
        _ => None,
    });
    let group = group.flatten();
    if names.len() > 1 && group.is_none() {
        let text = "the disks of a scan volume can't be cut with others at one instant; each has a point of its own";
        shared.events.note("", EventKind::WeakerPoint, text);
    }
    let mut awaited = Vec::new();
    for name in names {
        let (reply, answer) = oneshot::channel();
        let wish = PointWish { consistency: consistency.unwrap_or(best(volumes[name].capture)), group: group.clone() };
        if volumes[name].orders.try_send(Order::Point(PointRequest { wish, reply })).is_err()
            && let Some(group) = &group
        {
            group.give_up();
        }
        awaited.push((name.clone(), answer));
    }
    awaited
}

/// The best that a capture gives without being asked for more.
fn best(capture: CaptureMode) -> Consistency {
    match capture {
        CaptureMode::Scan | CaptureMode::Nbd => Consistency::Crash,
        CaptureMode::Ebpf => Consistency::Filesystem,
    }
}

async fn answer_points(
    awaited: Awaited,
    consistency: Option<Consistency>,
    shared: Arc<Shared>,
    reply: oneshot::Sender<Vec<PointReply>>,
) {
    let mut tasks = JoinSet::new();
    for (volume, answer) in awaited {
        tasks.spawn(async move { (volume, answer.await) });
    }
    let mut replies = Vec::new();
    while let Some(joined) = tasks.join_next().await {
        let Ok((volume, point)) = joined else { continue };
        let Ok(point) = point else {
            let error = "the volume stopped before its point was committed; see status and the log".to_owned();
            shared.events.note(&volume, EventKind::PointFailed, error.clone());
            replies.push(PointReply { volume, error, ..PointReply::default() });
            continue;
        };
        let mut weaker = point.weaker.clone();
        if let Some(asked) = consistency.filter(|asked| point.consistency < *asked)
            && weaker.is_empty()
        {
            weaker = format!("the capture gives {}, not {}", point.consistency.as_str(), asked.as_str());
        }
        if !weaker.is_empty() {
            shared.events.note(&volume, EventKind::WeakerPoint, weaker.clone());
        }
        replies.push(PointReply { volume, point: Some(point.status()), weaker, error: String::new() });
    }
    replies.sort_by(|a, b| a.volume.cmp(&b.volume));
    // The client may be gone.
    let _ = reply.send(replies);
}

async fn detach(
    shared: &Shared,
    state: &StateDir,
    volumes: &mut BTreeMap<String, Reach>,
    name: &str,
) -> Result<(), String> {
    let Some(reach) = volumes.get(name) else { return Ok(()) };
    let (reply, answer) = oneshot::channel();
    // A volume that stopped has no agent any more, and nothing that would have to be ended before the state goes.
    if reach.orders.send(Order::Detach(reply)).await.is_ok() {
        match answer.await {
            Ok(result) => result?,
            Err(_) => tracing::debug!(volume = name, "its agent ended before it answered"),
        }
    }
    // The agent holds the volume's lock until it is gone.
    reach.orders.closed().await;
    let volume = reach.volume;
    let removed = tokio::task::block_in_place(|| {
        remove_pins(volume).map_err(|error| error.to_string())?;
        state.remove(volume).map_err(|error| error.to_string())
    });
    removed?;
    volumes.remove(name);
    shared.board.remove(name);
    shared.points.forget(name);
    shared.events.note(name, EventKind::Detached, "its protection ended; what is in the store stays");
    Ok(())
}
