//! The fleet's part of the control protocol: what `Register`, `Renew` and `Hello` do, and who may call the rest.
//!
//! A registration, in an order in which a kill anywhere loses at most a use: the request is judged (rate, form, version,
//! secret, name); one use is redeemed, unless the machine repeats itself; the name is taken; the certificate is listed;
//! the reply goes out. A machine whose reply was lost asks again with the same key and gets a certificate at no cost.

use std::net::IpAddr;

use common::error::{Dispose as _, Disposition};
use common::ids::{Digest, MachineId, ReceiverId};
use common::net::grpc::{peer_address, require_machine};
use common::net::identity::PeerIdentity;
use common::net::passphrase::PassphraseId;
use common::net::{pb, version};
use common::{limits, rng};
use rustls_pki_types::CertificateDer;
use tonic::{Request, Status};

use super::authority::VerifiedRequest;
use super::machines::Claim;
use super::passphrase::Refused;
use super::{Fleet, FleetError};

/// How often a registration starts over because another took the name or changed the machine in between.
const ATTEMPTS_MAX: usize = 3;

/// The machine that calls: by its certificate, which is of this fleet, of the role machine, and not revoked.
///
/// # Errors
/// `Unauthenticated`, `PermissionDenied`; `Unavailable` where the store could not be asked.
pub async fn admit<T>(fleet: &Fleet, request: &Request<T>) -> Result<PeerIdentity, Status> {
    let peer = require_machine(request)?;
    fleet.admit(&peer).await.map_err(|error| status(&error))?;
    Ok(peer)
}

/// Answers `Register`. `receivers` is what the machine is told to keep.
///
/// # Errors
/// The status to reply; its message says what to do next.
pub async fn register(
    fleet: &Fleet,
    request: Request<pb::RegisterRequest>,
    receivers: &[pb::FleetReceiver],
) -> Result<pb::RegisterReply, Status> {
    let from = peer_address(&request).map(|address| address.ip().to_canonical());
    fleet.may_register(from).map_err(|wait| {
        let seconds = wait.as_secs().saturating_add(1);
        Status::resource_exhausted(format!("too many registrations from this address: try again in {seconds} s"))
    })?;
    let asked = request.into_inner();
    let theirs = version::VersionRange { min: asked.protocol_min, max: asked.protocol_max };
    let protocol =
        version::negotiate(version::OURS, theirs).map_err(|error| Status::failed_precondition(error.to_string()))?;
    let (identity, chain) = match registered(fleet, &asked).await {
        Ok(done) => done,
        Err(error) => {
            tracing::warn!(machine = %printable(&asked.machine_name), from = ?from.map(|ip: IpAddr| ip.to_string()), %error,
                "refused a registration");
            return Err(status(&error));
        }
    };
    tracing::info!(machine = %identity.name, id = %MachineId(identity.id), serial = %identity.serial, "registered a machine");
    Ok(pb::RegisterReply {
        certificate_chain_der: wire(&chain),
        ca_der: fleet.authority.public().ca.to_vec().into(),
        machine_id: identity.id.to_vec().into(),
        fleet_id: fleet.id().0.to_vec().into(),
        protocol,
        receivers: addresses(receivers),
        fleet: receivers.to_vec(),
    })
}

async fn registered(
    fleet: &Fleet,
    asked: &pb::RegisterRequest,
) -> Result<(PeerIdentity, Vec<CertificateDer<'static>>), FleetError> {
    let malformed = |what: &str| FleetError::Request(format!("the {what} has not the length that it must have"));
    let id = PassphraseId(asked.passphrase_id[..].try_into().map_err(|_| malformed("passphrase id"))?);
    if asked.secret.len() != 32 {
        return Err(malformed("secret"));
    }
    let name = asked.machine_name.as_str();
    common::net::identity::check_name(name)?;
    let passphrase = fleet.passphrases.check(id, &asked.secret).await?;
    let request = VerifiedRequest::parse(&asked.csr_der)?;
    let key = key_digest(&request);
    let mut redeemed = false;
    for _ in 0..ATTEMPTS_MAX {
        let claim = fleet.machines.claim(name, key, id).await?;
        if claim == Claim::Taken {
            return Err(FleetError::NameTaken { name: name.into() });
        }
        if !matches!(claim, Claim::Repeated(_)) && !redeemed {
            if passphrase.uses_left == 0 {
                return Err(Refused::UsedUp { id, uses: passphrase.uses }.into());
            }
            fleet.passphrases.redeem(id, &asked.secret).await?;
            redeemed = true;
        }
        let machine = match claim {
            Claim::Repeated(machine) | Claim::Again(machine) => machine,
            Claim::New | Claim::Taken => {
                let machine = MachineId::from_random(rng::random()?);
                if !fleet.machines.take_name(name, machine).await? {
                    continue;
                }
                machine
            }
        };
        let issued = fleet.authority.issue_machine(&request, machine, name)?;
        fleet.machines.enter(&issued.identity, key, id).await?;
        return Ok((issued.identity, issued.chain));
    }
    Err(FleetError::NameTaken { name: name.into() })
}

/// Answers `Renew`: a new certificate for the calling machine, for the same or another key.
///
/// # Errors
/// The status to reply.
pub async fn renew(fleet: &Fleet, request: Request<pb::RenewRequest>) -> Result<pb::RenewReply, Status> {
    let peer = admit(fleet, &request).await?;
    let work = async {
        let request = VerifiedRequest::parse(&request.get_ref().csr_der)?;
        let issued = fleet.authority.issue_machine(&request, MachineId(peer.id), &peer.name)?;
        fleet.machines.renew(&peer, &issued.identity, key_digest(&request)).await?;
        Ok::<_, FleetError>(issued)
    };
    let issued = work.await.map_err(|error| status(&error))?;
    tracing::info!(machine = %peer.name, serial = %issued.identity.serial, "renewed a machine's certificate");
    Ok(pb::RenewReply { certificate_chain_der: wire(&issued.chain) })
}

/// Answers `Hello`.
///
/// # Errors
/// The status to reply: `FailedPrecondition` where no protocol version is common.
pub async fn hello(
    fleet: &Fleet,
    request: Request<pb::HelloRequest>,
    receiver: ReceiverId,
    receivers: &[pb::FleetReceiver],
) -> Result<pb::HelloReply, Status> {
    let peer = admit(fleet, &request).await?;
    let asked = request.into_inner();
    let theirs = version::VersionRange { min: asked.protocol_min, max: asked.protocol_max };
    let protocol = version::negotiate(version::OURS, theirs).map_err(|error| {
        tracing::warn!(machine = %peer.name, software = %printable(&asked.software_version), %error, "refused a machine");
        Status::failed_precondition(error.to_string())
    })?;
    let bound = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    Ok(pb::HelloReply {
        protocol,
        receiver_id: receiver.0.to_vec().into(),
        fleet_id: fleet.id().0.to_vec().into(),
        software_version: env!("CARGO_PKG_VERSION").into(),
        limits: Some(pb::Limits {
            epoch_sealed_bytes_max: limits::EPOCH_SEALED_BYTES_MAX,
            epoch_records_max: bound(limits::EPOCH_RECORDS_MAX),
            epochs_in_flight_max: bound(limits::EPOCHS_IN_FLIGHT_MAX),
            streams_per_session_max: bound(limits::STREAMS_PER_SESSION_MAX),
            sessions_per_connection_max: bound(limits::SESSIONS_PER_CONNECTION_MAX),
            frame_bytes_max: bound(limits::FRAME_BYTES_MAX),
        }),
        receivers: addresses(receivers),
        fleet: receivers.to_vec(),
    })
}

/// A fleet's error as a caller is told it: in full where the caller can act on it, in general where only the receiver's
/// operator can (who finds the rest in the log).
#[must_use]
pub fn status(error: &FleetError) -> Status {
    let text: String = error.to_string().chars().take(limits::ERROR_TEXT_BYTES_MAX).collect();
    match error {
        FleetError::NameTaken { .. } => Status::already_exists(text),
        FleetError::Passphrase(_) | FleetError::Revoked { .. } | FleetError::WrongRole { .. } => {
            Status::permission_denied(text)
        }
        FleetError::Request(_) | FleetError::Name(_) => Status::invalid_argument(text),
        other if other.disposition() == Disposition::Retry => {
            tracing::warn!(%error, "could not serve a control call");
            Status::unavailable("the receiver's object store did not answer; try again")
        }
        _ => {
            tracing::error!(%error, "could not serve a control call");
            Status::internal("the receiver can't use its fleet's state; its log says why")
        }
    }
}

/// Where receivers are reached, those that serve before those that drain.
fn addresses(receivers: &[pb::FleetReceiver]) -> Vec<String> {
    let of = |draining: bool| receivers.iter().filter(move |receiver| receiver.draining == draining);
    let mut found: Vec<String> = Vec::new();
    for address in of(false).chain(of(true)).flat_map(|receiver| &receiver.addresses) {
        if !found.contains(address) {
            found.push(address.clone());
        }
    }
    found
}

fn key_digest(request: &VerifiedRequest) -> Digest {
    Digest(*blake3::hash(request.public_key()).as_bytes())
}

fn wire(chain: &[CertificateDer<'_>]) -> Vec<bytes::Bytes> {
    chain.iter().map(|der| der.to_vec().into()).collect()
}

/// A stranger's text, fit for a log.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(limits::NAME_BYTES_MAX).collect()
}
