//! The receiver: whether it can be reached over TCP and UDP, and whether this machine is registered.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::clock::Clock;
use common::net::enrolment::{Enrolment, EnrolmentError};
use common::net::quic::{self, QuicTuning};
use common::net::resolve::HostPort;
use common::net::tls;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{Finding, Level};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) async fn look(state_dir: &Path, chosen: Option<&HostPort>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let enrolment = match Enrolment::load(state_dir) {
        Ok(enrolment) => {
            findings.push(registration(&enrolment));
            Some(enrolment)
        }
        Err(EnrolmentError::NotRegistered { .. }) => {
            let text = "this machine is not registered yet";
            let next = "blockferry-sender register -i HOST -P PASSPHRASE_FILE";
            findings.push(Finding::new(Level::Notice, "registration", text, next));
            None
        }
        Err(error) => {
            let next = "restore the state directory from a backup, or register again";
            findings.push(Finding::new(Level::Error, "registration", error.to_string(), next));
            None
        }
    };
    let hosts: Vec<HostPort> = match (chosen, &enrolment) {
        (Some(host), _) => vec![host.clone()],
        (None, Some(enrolment)) => enrolment.receivers.clone(),
        (None, None) => Vec::new(),
    };
    for host in &hosts {
        findings.push(over_tcp(host).await);
        if let Some(enrolment) = &enrolment {
            findings.push(over_udp(host, enrolment).await);
        }
    }
    findings
}

fn registration(enrolment: &Enrolment) -> Finding {
    let identity = enrolment.identity();
    let left = identity.not_after.0.saturating_sub(Clock::System.now().0);
    let text = format!("registered as {}, certificate valid until {}", identity.name, identity.not_after);
    if left <= 0 {
        let next = "set the clock if it is wrong; else register again with a new passphrase file";
        return Finding::new(Level::Error, "registration", text, next);
    }
    Finding::ok("registration", text)
}

async fn over_tcp(host: &HostPort) -> Finding {
    let subject = "receiver";
    let addresses = match host.resolve().await {
        Ok(addresses) => addresses,
        Err(error) => {
            return Finding::new(
                Level::Error,
                subject,
                error.to_string(),
                "correct the name, or this machine's resolver",
            );
        }
    };
    let mut tried = Vec::new();
    for address in addresses {
        match timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(_)) => return Finding::ok(subject, format!("{host} answers on TCP ({address})")),
            Ok(Err(error)) => tried.push(format!("{address}: {error}")),
            Err(_) => tried.push(format!("{address}: no answer in {} s", CONNECT_TIMEOUT.as_secs())),
        }
    }
    let text = format!("{host} can't be reached on TCP ({})", tried.join(", "));
    Finding::new(Level::Error, subject, text, "check that the receiver runs, and firewalls on the way")
}

/// A handshake tells: QUIC answers nobody without a certificate.
async fn over_udp(host: &HostPort, enrolment: &Enrolment) -> Finding {
    let subject = "receiver";
    let tuning = QuicTuning::default();
    let connect = async {
        let credentials = enrolment.credentials();
        let config = tls::client_config(enrolment.authority(), Some(&credentials), tls::ALPN_DATA)
            .map_err(|error| error.to_string())?;
        let (endpoint, _) = quic::client_endpoint(&tuning).map_err(|error| error.to_string())?;
        let connection =
            quic::connect(&endpoint, host, Arc::new(config), &tuning).await.map_err(|error| error.to_string())?;
        connection.close(quinn::VarInt::from_u32(0), b"preflight");
        endpoint.wait_idle().await;
        Ok::<_, String>(())
    };
    match connect.await {
        Ok(()) => Finding::ok(subject, format!("{host} answers on UDP (QUIC)")),
        Err(reason) => Finding::new(
            Level::Warning,
            subject,
            reason,
            "open the port for UDP on the way to the receiver; records travel over TCP meanwhile where both ends can",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_receiver_that_answers_and_one_that_does_not_are_told_apart() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("it binds");
        let host: HostPort = listener.local_addr().expect("bound").to_string().parse().expect("a host");
        let found = look(dir.path(), Some(&host)).await;
        assert!(found.iter().any(|finding| finding.subject == "receiver" && finding.level == Level::Ok), "{found:?}");
        drop(listener);
        let found = look(dir.path(), Some(&host)).await;
        assert!(
            found.iter().any(|finding| finding.subject == "receiver" && finding.level == Level::Error),
            "{found:?}"
        );
    }
}
