//! The fleet as a sender knows it: which receivers there are, kept in the state directory and asked for again while it runs, and
//! this machine's certificate, renewed at whichever of them answers.
//!
//! Promises: the list survives the receiver that told it; the receiver in use is tried first at the next start; an address once
//! known is kept until the fleet's own list is there in its place.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::net::enrolment::Enrolment;
use common::net::resolve::HostPort;
use common::rng;
use tokio::sync::watch;
use tokio::time::Instant;

use super::control::Control;
use super::{AgentError, Shared, data_tls};
use crate::send::KnownReceiver;

/// How often a long run looks whether its certificate is due for renewal.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(6 * 3600);
/// Longest time from one look at the fleet's list to the next; half of it is left to chance. A look costs the receiver a request to
/// the store, and an idle machine is to cause no more than 24 a day.
const LIST_INTERVAL: Duration = Duration::from_secs(2 * 3600);
/// Addresses that are kept.
const HOSTS_MAX: usize = 64;

/// All receivers that are known: those that the fleet lists, and addresses of the registration that are in no such list.
pub(super) fn candidates(registered: &[HostPort], listed: &[KnownReceiver]) -> Vec<KnownReceiver> {
    let mut known = listed.to_vec();
    for host in registered {
        if !known.iter().any(|receiver| receiver.hosts.contains(host)) {
            known.push(KnownReceiver { stale: !listed.is_empty(), ..KnownReceiver::at(host.clone()) });
        }
    }
    known
}

/// Keeps the addresses of `known` in the state directory where they are others than before; that of the receiver in use first.
/// A failure is only logged: the list is a help, not a promise.
pub(super) fn remember(
    enrolment: &mut Enrolment,
    known: &[KnownReceiver],
    in_use: Option<&HostPort>,
    state_dir: &Path,
) {
    let hosts = hosts_to_keep(known, in_use);
    if hosts == enrolment.receivers || hosts.is_empty() {
        return;
    }
    let before = std::mem::replace(&mut enrolment.receivers, hosts);
    if let Err(error) = enrolment.store_receivers(state_dir) {
        tracing::warn!(%error, "could not keep the list of the fleet's receivers");
        enrolment.receivers = before;
    }
}

/// Addresses worth keeping, the best first.
fn hosts_to_keep(known: &[KnownReceiver], in_use: Option<&HostPort>) -> Vec<HostPort> {
    let mut hosts: Vec<HostPort> = in_use.cloned().into_iter().collect();
    let by_worth =
        known.iter().filter(|receiver| !receiver.stale).chain(known.iter().filter(|receiver| receiver.stale));
    for host in by_worth.flat_map(|receiver| &receiver.hosts) {
        if !hosts.contains(host) && hosts.len() < HOSTS_MAX {
            hosts.push(host.clone());
        }
    }
    hosts
}

/// Keeps list and certificate of a long run fresh: asks a receiver every hour or two, and whenever there is a new connection.
/// A certificate is renewed ten days before its end: it is kept for the next start, and every connection made from then on
/// shows it.
pub(super) async fn keep(mut enrolment: Enrolment, shared: Arc<Shared>, tls: watch::Sender<Arc<rustls::ClientConfig>>) {
    let state_dir = shared.config.state_dir.clone();
    let mut link = shared.sender.state();
    let mut next_renewal = Instant::now() + RENEWAL_INTERVAL;
    loop {
        let share = rng::random().map_or(0, |bytes: [u8; 2]| u32::from(u16::from_le_bytes(bytes)));
        let pause = LIST_INTERVAL / 2 + LIST_INTERVAL / 2 * share / u32::from(u16::MAX);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = connected(&mut link) => {}
        }
        let in_use: Option<HostPort> = link.borrow().receiver.parse().ok();
        let looked = async {
            let mut control = Control::connect(&enrolment).await?;
            let known = candidates(&enrolment.receivers, control.receivers());
            remember(&mut enrolment, &known, in_use.as_ref(), &state_dir);
            shared.sender.choice().learn(known);
            if next_renewal <= Instant::now() {
                next_renewal = Instant::now() + RENEWAL_INTERVAL;
                if control.renew_if_due(&mut enrolment, &state_dir, shared.clock.now()).await? {
                    tls.send_replace(data_tls(&enrolment)?);
                }
            }
            Ok::<_, AgentError>(())
        };
        if let Err(error) = looked.await {
            tracing::warn!(%error, "could not ask a receiver for the fleet's list; trying again later");
        }
    }
}

/// Done once a new connection stands.
async fn connected(link: &mut watch::Receiver<crate::send::LinkState>) {
    let mut before = link.borrow_and_update().connected;
    while link.changed().await.is_ok() {
        let now = link.borrow_and_update().connected;
        if now && !before {
            return;
        }
        before = now;
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(text: &str) -> HostPort {
        text.parse().expect("a host")
    }

    #[test]
    fn what_the_fleet_lists_is_kept_and_what_only_the_registration_knows_is_tried_last() {
        let registered = [host("old:1"), host("b:1")];
        let listed = [KnownReceiver::at(host("a:1")), KnownReceiver::at(host("b:1"))];
        let known = candidates(&registered, &listed);
        assert_eq!(known.len(), 3);
        assert!(known[2].stale && !known[0].stale);
        assert_eq!(hosts_to_keep(&known, Some(&host("b:1"))), [host("b:1"), host("a:1"), host("old:1")]);
        assert_eq!(hosts_to_keep(&known, None), [host("a:1"), host("b:1"), host("old:1")]);
    }

    #[test]
    fn a_receiver_that_lists_nothing_leaves_what_is_known_as_it_is() {
        let known = candidates(&[host("b:1"), host("a:1")], &[]);
        assert!(known.iter().all(|receiver| !receiver.stale));
        assert_eq!(hosts_to_keep(&known, None), [host("b:1"), host("a:1")]);
    }
}
