//! `passphrase …` and `machines …`: what an operator does with the fleet, from the store and `authority.key` alone.

use catalog::fleet::{Fleet, FleetError};
use catalog::store::StoreError;
use common::clock::Clock;
use common::net::passphrase::PassphraseId;

use crate::cli::{MachinesCommand, PassphraseCommand};
use crate::config::{ConfigError, FileConfig, FleetConfig};

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
