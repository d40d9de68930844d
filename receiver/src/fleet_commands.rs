//! `passphrase …`, `machines …`, `operator …` and `receivers …`: what an operator does with the fleet, from the store and `authority.key` alone; and
//! `drain`, which asks the running receiver.

use catalog::fleet::{Fleet, FleetError, receivers};
use catalog::store::StoreError;
use common::clock::Clock;
use common::net::identity::Role;
use common::net::passphrase::PassphraseId;

use crate::cli::{DrainArgs, MachinesCommand, OperatorCommand, OperatorRole, PassphraseCommand, ReceiversCommand};
use crate::config::{self, ConfigError, FileConfig, FleetConfig};
use crate::drain::{self, DrainError};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The command line or configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The fleet.
    #[error(transparent)]
    Fleet(#[from] FleetError),
    /// The running receiver.
    #[error(transparent)]
    Drain(#[from] DrainError),
}

async fn open(config: &FleetConfig) -> Result<Fleet, CommandError> {
    let store = config.open_store().await?;
    Ok(Fleet::open_or_create(&store, &config.data_dir, Clock::System).await?)
}

/// Runs a passphrase command; the answer goes to standard output.
///
/// # Errors
/// [`CommandError`].
#[expect(clippy::print_stdout, reason = "the command's answer")]
pub async fn passphrase(command: &PassphraseCommand, file: &FileConfig) -> Result<(), CommandError> {
    match command {
        PassphraseCommand::Create { fleet, ttl, uses } => {
            if *uses == 0 || ttl.get().is_zero() {
                let text = "a passphrase for no machine or no time is of no use: pass --uses 1 or more, and a --ttl such as 24h";
                return Err(ConfigError::Invalid(text.into()).into());
            }
            let fleet = open(&FleetConfig::resolve(fleet, file)?).await?;
            let passphrase = fleet.passphrases.create(&fleet.authority, ttl.get(), *uses).await?;
            print!("{}", *passphrase.render());
        }
        PassphraseCommand::List { fleet, json } => {
            let list = open(&FleetConfig::resolve(fleet, file)?).await?.passphrases.list().await?;
            if *json {
                let rows: Vec<_> = list
                    .iter()
                    .map(|p| {
                        serde_json::json!({
                            "id": p.id.to_string(), "created": p.created.to_string(), "expires": p.expires.to_string(),
                            "uses": p.uses, "uses_left": p.uses_left, "revoked": p.revoked,
                        })
                    })
                    .collect();
                println!("{}", serde_json::Value::from(rows));
            } else {
                println!("{:<38}{:>6}{:>6}  {:<26}state", "id", "uses", "left", "expires");
                let now = Clock::System.now();
                for p in list {
                    let state = match () {
                        () if p.revoked => "revoked",
                        () if p.expires <= now => "expired",
                        () if p.uses_left == 0 => "used up",
                        () => "good",
                    };
                    println!(
                        "{:<38}{:>6}{:>6}  {:<26}{state}",
                        p.id.to_string(),
                        p.uses,
                        p.uses_left,
                        p.expires.to_string()
                    );
                }
            }
        }
        PassphraseCommand::Revoke { fleet, id } => {
            let id: PassphraseId = id.parse().map_err(|_| {
                ConfigError::Invalid(format!(
                    "\"{id}\" is not a passphrase id: `passphrase list` shows those there are"
                ))
            })?;
            open(&FleetConfig::resolve(fleet, file)?).await?.passphrases.revoke(id).await?;
            println!("revoked passphrase {id}");
        }
    }
    Ok(())
}

/// Runs a machines command; the answer goes to standard output.
///
/// # Errors
/// [`CommandError`].
#[expect(clippy::print_stdout, reason = "the command's answer")]
pub async fn machines(command: &MachinesCommand, file: &FileConfig) -> Result<(), CommandError> {
    match command {
        MachinesCommand::List { fleet, json } => {
            let list = open(&FleetConfig::resolve(fleet, file)?).await?.machines.list().await?;
            let now = Clock::System.now();
            if *json {
                let rows: Vec<_> = list
                    .iter()
                    .map(|m| {
                        serde_json::json!({
                            "id": m.machine.to_string(), "name": m.name, "registered": m.created.to_string(),
                            "active": m.is_active(now),
                        })
                    })
                    .collect();
                println!("{}", serde_json::Value::from(rows));
            } else {
                println!("{:<38}{:<26}{:<10}name", "id", "registered", "state");
                for m in list {
                    let state = if m.is_active(now) { "active" } else { "revoked" };
                    println!("{:<38}{:<26}{state:<10}{}", m.machine.to_string(), m.created.to_string(), m.name);
                }
            }
        }
        MachinesCommand::Revoke { fleet, name } => {
            let machine = open(&FleetConfig::resolve(fleet, file)?).await?.machines.revoke(name).await?;
            println!(
                "revoked machine {name} ({machine}): it is cut off within {} s",
                catalog::fleet::REVOCATION_LAG.as_secs()
            );
        }
    }
    Ok(())
}

/// Makes a person's certificate; it goes to standard output with its key, and is kept nowhere.
///
/// # Errors
/// [`CommandError`].
#[expect(clippy::print_stdout, reason = "the command's answer")]
pub async fn operator(command: &OperatorCommand, file: &FileConfig) -> Result<(), CommandError> {
    let OperatorCommand::Create { fleet, name, role } = command;
    let role = match role {
        OperatorRole::Operator => Role::Operator,
        OperatorRole::Administrator => Role::Administrator,
    };
    let fleet = open(&FleetConfig::resolve(fleet, file)?).await?;
    print!("{}", *fleet.authority.issue_operator(role, name)?);
    Ok(())
}

/// Lists the fleet's receivers on standard output.
///
/// # Errors
/// [`CommandError`].
#[expect(clippy::print_stdout, reason = "the command's answer")]
pub async fn receivers(command: &ReceiversCommand, file: &FileConfig) -> Result<(), CommandError> {
    let ReceiversCommand::List { fleet, json } = command;
    let store = FleetConfig::resolve(fleet, file)?.open_store().await?;
    let (listed, mut errors) = receivers::list(&store).await?;
    if *json {
        let rows: Vec<_> = listed
            .iter()
            .map(|listed| {
                let receiver = &listed.receiver;
                serde_json::json!({
                    "id": receiver.receiver.to_string(), "name": receiver.name, "addresses": receiver.addresses,
                    "state": receiver.state.as_str(), "stage_capacity_bytes": receiver.stage_capacity,
                    "stage_used_bytes": receiver.stage_used, "volumes": receiver.volumes, "sessions": receiver.sessions,
                    "heartbeat": receiver.heartbeat, "heartbeat_time": listed.meta.modified.to_string(),
                    "started": receiver.started.to_string(), "software": receiver.software,
                })
            })
            .collect();
        println!("{}", serde_json::Value::from(rows));
    } else {
        println!(
            "{:<24}{:<10}{:>6}{:>9}{:>9}  {:<26}address",
            "name", "state", "stage", "volumes", "sessions", "heartbeat"
        );
        for receivers::Listed { receiver, meta } in &listed {
            println!(
                "{:<24}{:<10}{:>5}%{:>9}{:>9}  {:<26}{}",
                receiver.name,
                receiver.state.as_str(),
                receiver.load_percent(),
                receiver.volumes,
                receiver.sessions,
                meta.modified.to_string(),
                receiver.addresses.join(", ")
            );
        }
    }
    errors.pop().map_or(Ok(()), |error| Err(error.into()))
}

/// Has the running receiver drain; returns once it has.
///
/// # Errors
/// [`CommandError::Drain`].
#[expect(clippy::print_stdout, reason = "the command's answer")]
pub async fn drain(args: &DrainArgs, file: &FileConfig) -> Result<(), CommandError> {
    let data_dir = config::data_dir(args.data_dir.as_deref(), file)?;
    let progress = |left| tracing::info!(left, "draining: closed epochs and sessions that are left");
    drain::request(&data_dir, args.timeout.get(), progress).await?;
    println!(
        "drained: senders are told to go elsewhere, and nothing that is closed is left here; stop it now, or start it again"
    );
    Ok(())
}
