//! One machine's connection: takes its streams and finds the session that each belongs to.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use common::format::frame::{Frame, RefusalCode};
use common::ids::{SessionId, VolumeId};
use common::limits;
use common::net::identity::PeerIdentity;
use common::session::Claim;
use quinn::{Connection, RecvStream, SendStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::stream::{self, FrameReader};
use super::{Acceptor, CLOSED_DRAINING, CLOSED_NOT_ALLOWED, CLOSED_SHUTDOWN, CLOSED_UNUSED, DRAINS, count};
use crate::volumes::{Intake, Scope, Volume, VolumeError};

/// A session of this connection.
#[derive(Clone)]
pub(super) struct Session {
    pub(super) volume: Arc<Volume>,
    pub(super) scope: Arc<Scope>,
    /// Ends all of the session's streams.
    pub(super) over: CancellationToken,
}

/// Sessions of this connection by the id that `Attach` frames name.
#[derive(Default)]
pub(super) struct Sessions {
    by_id: Mutex<HashMap<SessionId, Session>>,
    /// Volumes that were claimed over this connection: what one of them leaves unread counts against the window of all.
    volumes: Mutex<HashSet<VolumeId>>,
}

impl Sessions {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<SessionId, Session>> {
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True where the volume was claimed over this connection.
    pub(super) fn shares_window(&self, volume: VolumeId) -> bool {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner).contains(&volume)
    }
}

/// What all streams of a connection share.
struct Peer {
    acceptor: Arc<Acceptor>,
    connection: Connection,
    identity: PeerIdentity,
    sessions: Sessions,
}

/// Serves a connection until it ends; gives the reason for the log.
pub(super) async fn serve(
    acceptor: &Arc<Acceptor>,
    connection: &Connection,
    identity: &PeerIdentity,
    over: &CancellationToken,
) -> String {
    let peer = Arc::new(Peer {
        acceptor: Arc::clone(acceptor),
        connection: connection.clone(),
        identity: identity.clone(),
        sessions: Sessions::default(),
    });
    let mut streams = JoinSet::new();
    let mut used = false;
    let unused = tokio::time::sleep(acceptor.limits.unused_time);
    tokio::pin!(unused);
    let reason = loop {
        tokio::select! {
            accepted = connection.accept_bi() => match accepted {
                Ok((send, recv)) => {
                    let peer = Arc::clone(&peer);
                    streams.spawn(async move { peer.serve_stream(send, recv).await });
                }
                Err(error) => break error.to_string(),
            },
            // Ended streams are taken off at once, so that they don't pile up.
            Some(ended) = streams.join_next() => used |= ended.unwrap_or(false),
            () = &mut unused, if !used => {
                if peer.sessions.lock().is_empty() {
                    connection.close(CLOSED_UNUSED, b"no volume was opened");
                    break "no volume was opened".to_owned();
                }
                used = true;
            }
            () = over.cancelled() => {
                let code = if acceptor.draining.is_asked() { CLOSED_DRAINING } else { CLOSED_SHUTDOWN };
                connection.close(code, b"the receiver ends this connection");
                break "ended from here".to_owned();
            }
        }
    };
    // Sessions learn that their connection is gone; what is on its way into the stage goes on.
    streams.shutdown().await;
    for session in peer.sessions.lock().values() {
        session.volume.disconnect(&session.scope);
    }
    reason
}

impl Peer {
    /// Serves one stream from its first frame on; true where it was a session's.
    async fn serve_stream(&self, send: SendStream, recv: RecvStream) -> bool {
        let limits = &self.acceptor.limits;
        let mut reader = FrameReader::new(recv, limits.pause_time);
        let first = tokio::time::timeout(limits.first_frame_time, reader.first()).await;
        let outcome = match first {
            Ok(Ok(frame)) => frame,
            Ok(Err(error)) => return self.give_up(send, "bad_stream", &error.to_string()),
            Err(_) => return self.give_up(send, "slow_stream", "the first frame took too long"),
        };
        match outcome {
            Frame::Attach { session, stream } => {
                let found = self.sessions.lock().get(&session).cloned();
                let Some(found) = found else {
                    return self.give_up(send, "bad_stream", "no such session on this connection");
                };
                match found.volume.handle_frame(&found.scope, stream, Frame::Attach { session, stream }) {
                    Ok(Ok(())) if stream != 0 => {}
                    _ => return self.give_up(send, "bad_stream", "the stream can't be attached"),
                }
                stream::serve_attached(&self.acceptor, &self.sessions, &found, stream, send, reader).await;
                true
            }
            open @ Frame::Open { .. } => match Claim::from_frame(open) {
                Ok(claim) => self.serve_session(claim, send, reader).await,
                Err(_) => false,
            },
            _ => self.give_up(send, "bad_stream", "the first frame is neither Open nor Attach"),
        }
    }

    fn give_up(&self, mut send: SendStream, kind: &'static str, reason: &str) -> bool {
        count(kind);
        tracing::warn!(machine = self.identity.name, reason, "a stream was refused");
        drop(send.reset(stream::ENDED));
        false
    }

    async fn serve_session(&self, claim: Claim, send: SendStream, reader: FrameReader) -> bool {
        let id = claim.session;
        let (session, _turn) = match self.authorise(claim).await {
            Ok(opened) => opened,
            Err((code, text)) => {
                count(if code == RefusalCode::NotYours { "not_yours" } else { "open" });
                tracing::warn!(machine = self.identity.name, ?code, reason = text, "a claim was refused");
                stream::refuse(send, code, text).await;
                if code == RefusalCode::NotYours {
                    self.connection.close(CLOSED_NOT_ALLOWED, b"not a volume of this machine");
                }
                return false;
            }
        };
        stream::serve_control(&self.acceptor, &self.sessions, &session, send, reader).await;
        session.over.cancel();
        session.volume.disconnect(&session.scope);
        let mut sessions = self.sessions.lock();
        if sessions.get(&id).is_some_and(|known| Arc::ptr_eq(&known.scope, &session.scope)) {
            sessions.remove(&id);
        }
        true
    }

    /// Opens the volume of a claim for this connection, if it is the machine's. A session that gave way to another volume waits
    /// here for its turn, and keeps its place at the stage's gate.
    async fn authorise(&self, claim: Claim) -> Result<(Session, Option<Box<dyn Intake>>), (RefusalCode, String)> {
        if (self.acceptor.revoked)(&self.identity) {
            return Err((RefusalCode::NotYours, "this certificate was revoked".into()));
        }
        if self.acceptor.draining.is_asked() {
            return Err((RefusalCode::Draining, DRAINS.into()));
        }
        if self.sessions.lock().len() >= limits::SESSIONS_PER_CONNECTION_MAX {
            let text = format!("a connection may have {} sessions", limits::SESSIONS_PER_CONNECTION_MAX);
            return Err((RefusalCode::BadMessage, text));
        }
        let id = claim.volume;
        let failed = |error: VolumeError| (error.refusal(), error.to_string());
        // Before the volume is taken: that would end another receiver's part in it.
        match self.acceptor.volumes.header(id).await.map_err(failed) {
            Ok(header) if header.fleet == self.identity.fleet && Some(header.machine) == self.identity.machine() => {}
            // The same words whether it exists or not.
            Ok(_) | Err((RefusalCode::NotYours, _)) => {
                return Err((RefusalCode::NotYours, format!("this machine has no volume {id}")));
            }
            Err(refusal) => return Err(refusal),
        }
        let session = claim.session;
        let volume = self.acceptor.volumes.get_for(id, claim.incarnation, session).await.map_err(failed)?;
        self.sessions.volumes.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
        let mut place = None;
        if let Some(_turn) = volume.turn_of(session) {
            let intake = self.acceptor.volumes.staging().intake_of(id);
            intake.admit().await.map_err(|error| (error.refusal(), error.to_string()))?;
            place = Some(intake);
        }
        let mut sessions = self.sessions.lock();
        let scope = volume
            .open(claim)
            .map_err(|_| (RefusalCode::GoingAway, "the volume is being unloaded; connect again".to_owned()))?;
        let opened = Session { volume, scope, over: CancellationToken::new() };
        sessions.insert(session, opened.clone());
        Ok((opened, place))
    }
}
