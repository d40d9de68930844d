//! The control calls of a sender: versions, volumes, and the certificate's renewal.
//!
//! Promises: a volume is made once for a name, however often the call is repeated; each attempt resolves and tries all of the
//! fleet's receivers.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::clock::UnixMillis;
use common::error::{Dispose, Disposition};
use common::format::volume_header::{IncarnationSize, VolumeHeader};
use common::ids::{CloseId, Epoch, Incarnation, KeyId, Nonce, Salt, VolumeId};
use common::net::enrolment::Enrolment;
use common::net::resolve::HostPort;
use common::net::{grpc, pb, tls, version};
use common::rng;
use common::seal::DataKey;
use common::seal::keyfile::KeyFile;
use pb::control_client::ControlClient;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::AgentError;
use crate::send::KnownReceiver;

/// Longest wait for one answer: the receiver reads and writes its store meanwhile.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// A certificate with less than this left is renewed: a third of the thirty days that one lasts.
const RENEW_BEFORE: Duration = Duration::from_secs(10 * 24 * 3600);

/// A receiver that this sender has agreed on a protocol with.
pub(crate) struct Control {
    client: ControlClient<Channel>,
    host: HostPort,
    receivers: Vec<KnownReceiver>,
}

/// Receivers that a fleet may list, and addresses of one.
const RECEIVERS_MAX: usize = 64;
const ADDRESSES_MAX: usize = 8;

/// What the store says of a volume of this machine.
pub(crate) struct KnownVolume {
    /// Its header.
    pub(crate) header: VolumeHeader,
    /// Newest committed close; zero for none.
    pub(crate) head: CloseId,
    /// Its epoch.
    pub(crate) head_epoch: Epoch,
}

impl Control {
    /// Connects to the first of the fleet's receivers that answers, and agrees on versions.
    ///
    /// # Errors
    /// [`AgentError::Unreachable`], to be tried again; [`AgentError::Refused`], which will not get better.
    pub(crate) async fn connect(enrolment: &Enrolment) -> Result<Self, AgentError> {
        let credentials = enrolment.credentials();
        let config = tls::client_config(enrolment.authority(), Some(&credentials), tls::ALPN_CONTROL)
            .map_err(|error| AgentError::Setup(error.to_string()))?;
        let config = Arc::new(config);
        let (mut tried, mut refused) = (Vec::new(), None);
        for host in &enrolment.receivers {
            let channel = match grpc::connect(host, Arc::clone(&config)).await {
                Ok(channel) => channel,
                Err(error) if error.disposition() == Disposition::Retry => {
                    tried.push(error.to_string());
                    continue;
                }
                // An address may be somebody else's by now; another receiver may know better.
                Err(error) => {
                    refused = Some(AgentError::Refused { host: host.clone(), reason: error.to_string() });
                    continue;
                }
            };
            let mut control = Self { client: ControlClient::new(channel), host: host.clone(), receivers: Vec::new() };
            match control.hello().await {
                Ok(()) => return Ok(control),
                Err(AgentError::Unreachable { tried: reason }) => tried.push(reason),
                Err(error) => refused = Some(error),
            }
        }
        match refused {
            Some(refused) if tried.is_empty() => Err(refused),
            refused => {
                tried.extend(refused.map(|error| error.to_string()));
                Err(AgentError::Unreachable { tried: tried.join("; ") })
            }
        }
    }

    /// The fleet's receivers, as the one that answered lists them; the address at which it answered is the first of its own.
    pub(crate) fn receivers(&self) -> &[KnownReceiver] {
        &self.receivers
    }

    async fn hello(&mut self) -> Result<(), AgentError> {
        let request = pb::HelloRequest {
            protocol_min: version::OURS.min,
            protocol_max: version::OURS.max,
            software_version: env!("CARGO_PKG_VERSION").into(),
        };
        let reply = self.client.hello(timed(request)).await;
        let reply = reply.map_err(|status| self.failed(&status))?.into_inner();
        if !(version::OURS.min..=version::OURS.max).contains(&reply.protocol) {
            let reason = format!("it chose protocol version {}, this sender speaks {}", reply.protocol, version::OURS);
            return Err(AgentError::Refused { host: self.host.clone(), reason });
        }
        self.receivers = known_receivers(&self.host, &reply);
        tracing::debug!(
            receiver = %self.host, protocol = reply.protocol, software = %reply.software_version, fleet = self.receivers.len(),
            "a receiver answers"
        );
        Ok(())
    }

    /// The volume that this machine calls `name`, if there is one.
    ///
    /// # Errors
    /// [`AgentError::Unreachable`], [`AgentError::Refused`], [`AgentError::Answer`].
    pub(crate) async fn find_volume(&mut self, name: &str) -> Result<Option<KnownVolume>, AgentError> {
        let reply = self.client.list_volumes(timed(pb::ListVolumesRequest {})).await;
        let volumes = reply.map_err(|status| self.failed(&status))?.into_inner().volumes;
        let Some(volume) = volumes.into_iter().find(|volume| volume.name == name) else { return Ok(None) };
        let reply = self.client.get_volume(timed(pb::GetVolumeRequest { id: volume.id })).await;
        let reply = reply.map_err(|status| self.failed(&status))?.into_inner();
        let header = self.header(&reply.header)?;
        let head =
            reply.head_close[..].try_into().map(CloseId).map_err(|_| self.answer("a close id of another length"))?;
        Ok(Some(KnownVolume { header, head, head_epoch: Epoch(reply.head_epoch) }))
    }

    /// Makes a volume of this machine, with a new data key wrapped by `key_file`; or gives the one that bears the name.
    ///
    /// # Errors
    /// As [`Self::find_volume`].
    pub(crate) async fn create_volume(
        &mut self,
        enrolment: &Enrolment,
        key_file: &KeyFile,
        name: &str,
        disk_bytes: u64,
        sector_bytes: u32,
        now: UnixMillis,
    ) -> Result<VolumeHeader, AgentError> {
        let volume = VolumeId::from_random(rng::random()?);
        let data_key = DataKey::from_random(rng::random()?);
        let key_id = KeyId(1);
        let header = VolumeHeader {
            nonce: Nonce(rng::random()?),
            fleet: enrolment.fleet(),
            volume,
            machine: enrolment.machine(),
            machine_name: enrolment.identity().name.clone(),
            name: name.to_owned(),
            created: now,
            sector_bytes,
            key_id,
            signing_key: data_key.signer(volume).public(),
            incarnations: vec![IncarnationSize { incarnation: Incarnation(1), disk_bytes }],
            wrapped_keys: vec![key_file.wrap(&data_key, volume, key_id, Salt(rng::random()?))],
        };
        let request = pb::CreateVolumeRequest { header: header.encode().into() };
        let reply = self.client.create_volume(timed(request)).await;
        let reply = reply.map_err(|status| self.failed(&status))?.into_inner();
        self.header(&reply.header)
    }

    /// Begins an incarnation of `disk_bytes` bytes behind `incarnation`: the volume's disk grew. Idempotent.
    ///
    /// # Errors
    /// As [`Self::find_volume`].
    pub(crate) async fn grow_volume(
        &mut self,
        volume: VolumeId,
        incarnation: Incarnation,
        disk_bytes: u64,
    ) -> Result<VolumeHeader, AgentError> {
        let request = pb::GrowVolumeRequest { id: volume.0.to_vec().into(), incarnation: incarnation.0, disk_bytes };
        let reply = self.client.grow_volume(timed(request)).await;
        let reply = reply.map_err(|status| self.failed(&status))?.into_inner();
        let header = self.header(&reply.header)?;
        if header.volume != volume || header.current().disk_bytes != disk_bytes {
            return Err(self.answer("a header of another volume or size"));
        }
        Ok(header)
    }

    /// Renews this machine's certificate where it has little time left, and keeps it in `state_dir`. True where it did.
    ///
    /// # Errors
    /// As [`Self::find_volume`]; [`AgentError::Enrolment`] where it can't be kept.
    pub(crate) async fn renew_if_due(
        &mut self,
        enrolment: &mut Enrolment,
        state_dir: &Path,
        now: UnixMillis,
    ) -> Result<bool, AgentError> {
        let left = enrolment.identity().not_after.0.saturating_sub(now.0);
        if left > i64::try_from(RENEW_BEFORE.as_millis()).unwrap_or(i64::MAX) {
            return Ok(false);
        }
        let request = pb::RenewRequest { csr_der: enrolment.key().request()?.into() };
        let reply = self.client.renew(timed(request)).await.map_err(|status| self.failed(&status))?.into_inner();
        let chain = reply.certificate_chain_der.iter().map(|der| der.to_vec().into()).collect();
        enrolment.renew(chain).map_err(|reason| self.answer(&reason))?;
        enrolment.store(state_dir)?;
        tracing::info!(until = %enrolment.identity().not_after, "renewed this machine's certificate");
        Ok(true)
    }

    fn header(&self, bytes: &[u8]) -> Result<VolumeHeader, AgentError> {
        VolumeHeader::decode(bytes).map_err(|error| self.answer(&error.to_string()))
    }

    fn answer(&self, reason: &str) -> AgentError {
        AgentError::Answer { host: self.host.clone(), reason: reason.to_owned() }
    }

    fn failed(&self, status: &Status) -> AgentError {
        let reason = status.message().to_owned();
        match status.code() {
            Code::Unavailable
            | Code::ResourceExhausted
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Aborted
            | Code::Internal
            | Code::Unknown => AgentError::Unreachable { tried: format!("{}: {reason}", self.host) },
            _ => AgentError::Refused { host: self.host.clone(), reason },
        }
    }
}

/// What a reply lists; addresses that can't be parsed are left out.
fn known_receivers(answered: &HostPort, reply: &pb::HelloReply) -> Vec<KnownReceiver> {
    let mut found = Vec::new();
    for receiver in reply.fleet.iter().take(RECEIVERS_MAX) {
        let mut hosts: Vec<HostPort> = Vec::new();
        if receiver.id == reply.receiver_id {
            hosts.push(answered.clone());
        }
        for host in receiver.addresses.iter().take(ADDRESSES_MAX).filter_map(|text| text.parse().ok()) {
            if !hosts.contains(&host) {
                hosts.push(host);
            }
        }
        if !hosts.is_empty() {
            let (draining, stale) = (receiver.draining, receiver.stale);
            found.push(KnownReceiver { hosts, load_percent: receiver.load_percent, draining, stale });
        }
    }
    found
}

fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}
