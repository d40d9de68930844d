//! Which receiver to connect to. Time and chance come in as values.
//!
//! At first the one with the least load; after that the sender stays where it is. When a connection ends, the receiver that
//! served last is tried first, since what it has staged need not travel again; then the others, by load and then by chance. One
//! that told the sender to go elsewhere, or that goes on refusing, is tried last for a while.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::net::resolve::HostPort;
use tokio::time::Instant;

/// How long a receiver that the sender left is tried last.
const AVOID_TIME: Duration = Duration::from_secs(60);
/// Loads this close together, in percent, count as equal: chance spreads senders then.
const LOAD_STEP_PERCENT: u32 = 10;

/// A receiver, as the fleet's list names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownReceiver {
    /// Where it is reached, the best first.
    pub hosts: Vec<HostPort>,
    /// How full it is.
    pub load_percent: u32,
    /// It drains: it takes no sessions.
    pub draining: bool,
    /// Its heartbeat stands still.
    pub stale: bool,
}

impl KnownReceiver {
    /// One of which nothing is known but where it is.
    #[must_use]
    pub fn at(host: HostPort) -> Self {
        Self { hosts: vec![host], load_percent: 0, draining: false, stale: false }
    }
}

#[derive(Debug)]
struct State {
    known: Vec<KnownReceiver>,
    last_good: Option<HostPort>,
    avoid: Vec<(HostPort, Instant)>,
}

/// The choice, shared by the connection and the volumes' sessions. Clones are the same.
#[derive(Debug, Clone)]
pub struct Choice(Arc<Mutex<State>>);

impl Choice {
    /// Nothing was tried yet.
    #[must_use]
    pub fn new(known: Vec<KnownReceiver>) -> Self {
        Self(Arc::new(Mutex::new(State { known, last_good: None, avoid: Vec::new() })))
    }

    /// Takes a newer list. An empty one is ignored: a fleet without receivers told nobody so.
    pub fn learn(&self, known: Vec<KnownReceiver>) {
        if !known.is_empty() {
            self.lock().known = known;
        }
    }

    /// Where to try, in this order; `random` is 64 evenly random bits.
    #[must_use]
    pub fn order(&self, random: u64, now: Instant) -> Vec<HostPort> {
        let state = self.lock();
        let rank = |(index, receiver): &(usize, &KnownReceiver)| {
            let chance =
                (random ^ (*index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xff51_afd7_ed55_8ccd);
            let good = state.last_good.as_ref().is_some_and(|host| receiver.hosts.contains(host));
            let step = receiver.load_percent / LOAD_STEP_PERCENT;
            (state.is_avoided(receiver, now), receiver.draining, receiver.stale && !good, !good, step, chance)
        };
        let mut receivers: Vec<_> = state.known.iter().enumerate().collect();
        receivers.sort_by_cached_key(rank);
        let mut order: Vec<HostPort> = Vec::new();
        for (_, receiver) in receivers {
            // The address that worked before the others of the same receiver.
            let good = receiver.hosts.iter().filter(|host| state.last_good.as_ref() == Some(host));
            for host in good.chain(&receiver.hosts) {
                if !order.contains(host) {
                    order.push(host.clone());
                }
            }
        }
        order
    }

    /// A connection to `host` stands.
    pub fn connected(&self, host: &HostPort) {
        self.lock().last_good = Some(host.clone());
    }

    /// The receiver connected last is to be left: it drains, or goes on failing.
    pub fn leave(&self, now: Instant) {
        let mut state = self.lock();
        if let Some(host) = state.last_good.take() {
            state.avoid.retain(|(_, until)| *until > now);
            state.avoid.push((host, now + AVOID_TIME));
        }
    }

    /// True where there is a receiver that was not left lately, and that is not known to drain.
    #[must_use]
    pub fn has_alternative(&self, now: Instant) -> bool {
        let state = self.lock();
        state.known.iter().any(|receiver| !receiver.draining && !state.is_avoided(receiver, now))
    }

    /// True where there is a receiver to go to other than the one connected last.
    #[must_use]
    pub fn has_others(&self, now: Instant) -> bool {
        let state = self.lock();
        let is_last =
            |receiver: &KnownReceiver| state.last_good.as_ref().is_some_and(|host| receiver.hosts.contains(host));
        let good = |receiver: &&KnownReceiver| !receiver.draining && !state.is_avoided(receiver, now);
        state.known.iter().filter(good).any(|receiver| !is_last(receiver))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_avoided(&self, receiver: &KnownReceiver, now: Instant) -> bool {
        self.avoid.iter().any(|(host, until)| *until > now && receiver.hosts.contains(host))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> HostPort {
        name.parse().expect("a host")
    }

    fn receiver(name: &str, load_percent: u32) -> KnownReceiver {
        KnownReceiver { load_percent, ..KnownReceiver::at(host(name)) }
    }

    fn names(order: &[HostPort]) -> Vec<String> {
        order.iter().map(|host| host.to_string().split(':').next().unwrap_or_default().to_owned()).collect()
    }

    #[tokio::test]
    async fn the_least_loaded_is_first_at_first_and_then_the_one_that_served_last() {
        let now = Instant::now();
        let choice = Choice::new(vec![receiver("a", 80), receiver("b", 10), receiver("c", 50)]);
        assert_eq!(names(&choice.order(1, now)), ["b", "c", "a"]);
        choice.connected(&host("a"));
        assert_eq!(names(&choice.order(1, now)), ["a", "b", "c"]);
    }

    #[tokio::test]
    async fn one_that_is_to_be_left_is_last_for_a_while_and_one_that_drains_behind_those_that_serve() {
        let now = Instant::now();
        let draining = KnownReceiver { draining: true, ..receiver("c", 0) };
        let choice = Choice::new(vec![receiver("a", 0), receiver("b", 90), draining]);
        choice.connected(&host("a"));
        choice.leave(now);
        assert_eq!(names(&choice.order(1, now)), ["b", "c", "a"]);
        assert!(choice.has_alternative(now));
        choice.connected(&host("b"));
        choice.leave(now);
        assert!(!choice.has_alternative(now), "the third one drains");
        let later = now + AVOID_TIME;
        assert_eq!(names(&choice.order(1, later))[0], "a");
    }

    #[tokio::test]
    async fn chance_spreads_senders_over_receivers_of_equal_load() {
        let choice = Choice::new(vec![receiver("a", 1), receiver("b", 5), receiver("c", 9)]);
        let now = Instant::now();
        let first = |random: u64| names(&choice.order(random.wrapping_mul(0x2545_f491_4f6c_dd1d), now))[0].clone();
        let mut seen: Vec<String> = (1..200).map(first).collect();
        seen.sort();
        seen.dedup();
        assert_eq!(seen, ["a", "b", "c"]);
    }

    #[tokio::test]
    async fn another_address_of_the_one_that_served_is_tried_before_other_receivers() {
        let now = Instant::now();
        let two = KnownReceiver { hosts: vec![host("inside"), host("outside")], ..receiver("x", 60) };
        let choice = Choice::new(vec![two, receiver("b", 0)]);
        choice.connected(&host("outside"));
        assert_eq!(names(&choice.order(1, now)), ["outside", "inside", "b"]);
        choice.learn(Vec::new());
        assert_eq!(choice.order(1, now).len(), 3, "an empty list is no news");
    }
}
