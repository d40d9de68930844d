//! The control service: gRPC calls of machines, answered from the fleet's and the volumes' state in the store.
//!
//! Promises: a machine sees and makes its own volumes only, and operators change nothing; what a call made is in the store before the call is answered.

use std::sync::Arc;

use catalog::fleet::{Fleet, control};
use catalog::store::{PutOutcome, Store};
use catalog::volume::header::{self, HeaderError};
use catalog::volume::log::LogError;
use common::error::{Dispose, Disposition};
use common::format::volume_header::VolumeHeader;
use common::ids::{Incarnation, MachineId, ReceiverId, VolumeId};
use common::net::grpc::require_role;
use common::net::identity::Role;
use common::net::pb;
use common::net::pb::control_server::Control;
use tonic::{Request, Response, Status};

use crate::registry::Registry;
use crate::status;
use crate::volumes::Volumes;

/// Answers control calls.
pub struct ControlService {
    fleet: Arc<Fleet>,
    store: Store,
    volumes: Arc<Volumes>,
    receiver: ReceiverId,
    /// The fleet's receivers; machines keep the list beside the one they registered with.
    registry: Arc<Registry>,
}

impl ControlService {
    /// A service of this receiver.
    #[must_use]
    pub fn new(
        fleet: Arc<Fleet>,
        store: Store,
        volumes: Arc<Volumes>,
        receiver: ReceiverId,
        registry: Arc<Registry>,
    ) -> Self {
        Self { fleet, store, volumes, receiver, registry }
    }

    /// The header of a volume of this machine. Another machine's volume is answered as one that does not exist.
    async fn own_volume(&self, machine: MachineId, volume: VolumeId) -> Result<VolumeHeader, Status> {
        let unknown = || Status::not_found(format!("this machine has no volume {volume}"));
        match header::read(&self.store, volume).await {
            Ok(stored) if stored.header.machine == machine => Ok(stored.header),
            Ok(_) | Err(HeaderError::NoVolume { .. }) => Err(unknown()),
            Err(error) => Err(header_status(&error)),
        }
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn register(&self, request: Request<pb::RegisterRequest>) -> Result<Response<pb::RegisterReply>, Status> {
        control::register(&self.fleet, request, &self.registry.receivers().await).await.map(Response::new)
    }

    async fn hello(&self, request: Request<pb::HelloRequest>) -> Result<Response<pb::HelloReply>, Status> {
        control::hello(&self.fleet, request, self.receiver, &self.registry.receivers().await).await.map(Response::new)
    }

    async fn renew(&self, request: Request<pb::RenewRequest>) -> Result<Response<pb::RenewReply>, Status> {
        control::renew(&self.fleet, request).await.map(Response::new)
    }

    async fn get_status(&self, request: Request<pb::GetStatusRequest>) -> Result<Response<pb::GetStatusReply>, Status> {
        let peer = require_role(&request, &[Role::Operator, Role::Administrator])?;
        tracing::debug!(operator = %peer.name, "tells how it stands");
        Ok(Response::new(status::answer(&self.store, &self.registry, &self.volumes).await))
    }

    async fn create_volume(
        &self,
        request: Request<pb::CreateVolumeRequest>,
    ) -> Result<Response<pb::CreateVolumeReply>, Status> {
        let peer = control::admit(&self.fleet, &request).await?;
        let asked = VolumeHeader::decode(&request.get_ref().header)
            .map_err(|error| Status::invalid_argument(format!("the volume header can't be read: {error}")))?;
        if asked.machine != MachineId(peer.id) || asked.machine_name != peer.name || asked.fleet != self.fleet.id() {
            return Err(Status::permission_denied(
                "the volume header names another machine or fleet than the certificate",
            ));
        }
        // Asking twice gives the volume that is there, whatever id and keys the second asker drew.
        if let Some(found) =
            header::find_in_machine(&self.store, asked.machine, &asked.name).await.map_err(|e| header_status(&e))?
        {
            return Ok(Response::new(created(&found.header, false)));
        }
        let (stored, outcome) = header::create(&self.store, &asked).await.map_err(|error| header_status(&error))?;
        if outcome == PutOutcome::Created {
            let header = &stored.header;
            tracing::info!(volume = %header.volume, name = %header.name, machine = %header.machine_name, "created a volume");
        }
        Ok(Response::new(created(&stored.header, outcome == PutOutcome::Created)))
    }

    async fn list_volumes(
        &self,
        request: Request<pb::ListVolumesRequest>,
    ) -> Result<Response<pb::ListVolumesReply>, Status> {
        let peer = control::admit(&self.fleet, &request).await?;
        let (headers, errors) = header::list(&self.store).await.map_err(|error| header_status(&error))?;
        for error in errors {
            tracing::error!(%error, "a volume can't be listed");
        }
        let own = headers.into_iter().filter(|header| header.machine == MachineId(peer.id));
        let volumes = own
            .map(|header| pb::Volume {
                id: header.volume.0.to_vec().into(),
                name: header.name.clone(),
                header: header.encode().into(),
            })
            .collect();
        Ok(Response::new(pb::ListVolumesReply { volumes }))
    }

    async fn get_volume(&self, request: Request<pb::GetVolumeRequest>) -> Result<Response<pb::GetVolumeReply>, Status> {
        let peer = control::admit(&self.fleet, &request).await?;
        let id =
            request.get_ref().id[..].try_into().map_err(|_| Status::invalid_argument("a volume id has 16 bytes"))?;
        let header = self.own_volume(MachineId(peer.id), VolumeId(id)).await?;
        let view =
            catalog::volume::checkpoint::open_view(&self.store, &header).await.map_err(|error| log_status(&error))?;
        let head = view.position.head.as_ref();
        Ok(Response::new(pb::GetVolumeReply {
            header: header.encode().into(),
            head_close: view.position.head_id().0.to_vec().into(),
            head_epoch: view.position.last_epoch().0,
            head_incarnation: head.map_or(0, |close| close.statement().incarnation.0),
            highest_epoch: view.position.last_epoch().0,
            head_seq: view.position.seq.0,
            generation: view.position.generation.0,
        }))
    }

    async fn grow_volume(
        &self,
        request: Request<pb::GrowVolumeRequest>,
    ) -> Result<Response<pb::GrowVolumeReply>, Status> {
        let peer = control::admit(&self.fleet, &request).await?;
        let asked = request.into_inner();
        let id = asked.id[..].try_into().map_err(|_| Status::invalid_argument("a volume id has 16 bytes"))?;
        let volume = self.own_volume(MachineId(peer.id), VolumeId(id)).await?.volume;
        let grown = header::grow(&self.store, volume, Incarnation(asked.incarnation), asked.disk_bytes).await;
        let header = grown.map_err(|error| header_status(&error))?.header;
        let size = header.current();
        tracing::info!(%volume, incarnation = %size.incarnation, disk_bytes = size.disk_bytes, "a volume's disk grew");
        let encoded = header.encode();
        self.volumes.handle_grown(header);
        Ok(Response::new(pb::GrowVolumeReply { header: encoded.into() }))
    }
}

fn created(header: &VolumeHeader, created: bool) -> pb::CreateVolumeReply {
    pb::CreateVolumeReply { volume_id: header.volume.0.to_vec().into(), header: header.encode().into(), created }
}

fn header_status(error: &HeaderError) -> Status {
    match error {
        HeaderError::NameTaken { .. } | HeaderError::VolumeTaken { .. } => Status::already_exists(error.to_string()),
        HeaderError::BadName { .. } | HeaderError::NotGrown { .. } => Status::invalid_argument(error.to_string()),
        other => state_status(other.disposition(), other),
    }
}

fn log_status(error: &LogError) -> Status {
    state_status(error.disposition(), error)
}

/// In full to the log, in general to the caller, who can't act on it.
fn state_status(disposition: Disposition, error: &dyn std::error::Error) -> Status {
    if disposition == Disposition::Retry {
        tracing::warn!(%error, "could not serve a control call");
        return Status::unavailable("the receiver's object store did not answer; try again");
    }
    tracing::error!(%error, "could not serve a control call");
    Status::internal("the receiver can't use this volume's state in the store; its log says why")
}
