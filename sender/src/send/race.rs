//! Attempts at several receivers, the best one first: who is taken.
//!
//! The first has a head start and then the next is tried beside it, and so on, so that a receiver that is dead costs a second and
//! a half and not the time that a connection may be silent. Where another one answers first, the first is asked once more: an
//! answer from elsewhere shows that the network works, and may only have come sooner because the network has just come back. So a
//! sender goes elsewhere where its receiver does not answer *while another does*, and an outage of the sender's own
//! network moves nobody.
//!
//! [`Race`] decides and is PURE, time comes in as a value; [`race`] drives it. Never: opens a connection itself.

use std::collections::HashMap;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::time::{Instant, sleep_until};

/// What one attempt has for itself before the next begins. A handshake over a long way takes half a second, with a lost packet one
/// and a half.
const HEAD_START: Duration = Duration::from_millis(1_500);
/// How long the first one may take to answer once another has.
const SECOND_CHANCE: Duration = Duration::from_secs(1);

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    /// Begin an attempt at this one.
    Begin(usize),
    /// Wait until an attempt ends, or until then.
    Wait(Option<Duration>),
    /// Use this one.
    Take(usize),
    /// All have failed.
    GiveUp,
}

/// The state of the attempts. Times count from its beginning.
#[derive(Debug, Default)]
struct Race {
    count: usize,
    begun: usize,
    running: usize,
    next_start: Duration,
    first_failed: bool,
    /// Another than the first answered: it is taken then, unless the first answers before.
    answered: Option<(usize, Duration)>,
    asked_again: bool,
    taken: Option<usize>,
}

impl Race {
    fn of(count: usize) -> Self {
        Self { count, ..Self::default() }
    }

    fn next(&mut self, now: Duration) -> Act {
        if let Some(taken) = self.taken {
            return Act::Take(taken);
        }
        if let Some((number, until)) = self.answered {
            if !self.asked_again {
                // A handshake that began while nothing arrived waits for its next retransmission.
                self.asked_again = true;
                self.running += 1;
                return Act::Begin(0);
            }
            return if now >= until || self.running == 0 { Act::Take(number) } else { Act::Wait(Some(until)) };
        }
        if self.begun < self.count && (self.running == 0 || now >= self.next_start) {
            self.begun += 1;
            self.running += 1;
            self.next_start = now + HEAD_START;
            return Act::Begin(self.begun - 1);
        }
        if self.running == 0 {
            return Act::GiveUp;
        }
        Act::Wait((self.begun < self.count).then_some(self.next_start))
    }

    /// An attempt ended; true where it gave a connection.
    fn ended(&mut self, number: usize, connected: bool, now: Duration) {
        self.running = self.running.saturating_sub(1);
        if !connected {
            self.first_failed |= number == 0 && self.answered.is_none();
            // Whose turn is next need not wait for one that failed.
            self.next_start = now;
        } else if number == 0 || self.first_failed {
            self.taken = Some(number);
        } else if self.answered.is_none() {
            self.answered = Some((number, now + SECOND_CHANCE));
        }
    }
}

/// Tries `count` receivers by their numbers, from 0 on, and gives the one to take. What else is under way is dropped.
///
/// # Errors
/// What each attempt said, if none succeeded.
pub(super) async fn race<T, F>(count: usize, mut attempt: impl FnMut(usize) -> F) -> Result<(usize, T), Vec<String>>
where
    F: Future<Output = Result<T, String>>,
{
    let origin = Instant::now();
    let (mut race, mut running) = (Race::of(count), FuturesUnordered::new());
    let (mut found, mut tried): (HashMap<usize, T>, Vec<String>) = (HashMap::new(), Vec::new());
    loop {
        let until = match race.next(origin.elapsed()) {
            Act::Begin(number) => {
                let attempt = attempt(number);
                running.push(async move { (number, attempt.await) });
                continue;
            }
            Act::Take(number) => match found.remove(&number) {
                Some(connection) => return Ok((number, connection)),
                None => return Err(tried),
            },
            Act::GiveUp => return Err(tried),
            Act::Wait(until) => until,
        };
        tokio::select! {
            Some((number, ended)) = running.next() => {
                race.ended(number, ended.is_ok(), origin.elapsed());
                match ended {
                    Ok(connection) => drop(found.insert(number, connection)),
                    Err(error) => tried.push(error),
                }
            }
            () = sleep_until(origin + until.unwrap_or_default()), if until.is_some() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{LINK_TIMEOUT, keep_alive};
    use crate::send::connection::ELSEWHERE_WAIT_MAX;

    /// A receiver of the simulation: it answers what is sent to it from some time on, after a while.
    #[derive(Clone, Copy)]
    struct Simulated {
        /// Reachable from this time on, in milliseconds; `None`: never.
        up: Option<u64>,
        handshake: u64,
        /// It says that it does not serve.
        refuses: bool,
    }

    const DEAD: Simulated = Simulated { up: None, handshake: 0, refuses: false };
    const REFUSES: Simulated = Simulated { up: Some(0), handshake: 5, refuses: true };
    /// As `quic::connect` waits.
    const CONNECT: u64 = 10_000;

    fn alive(handshake: u64) -> Simulated {
        from(0, handshake)
    }

    fn from(up: u64, handshake: u64) -> Simulated {
        Simulated { up: Some(up), handshake, refuses: false }
    }

    /// When an attempt that begins at `start` ends, and whether it succeeds: its first packet is sent again after one second, two
    /// more, four more.
    fn attempt(receiver: Simulated, start: u64) -> (u64, bool) {
        let sent = [0, 1_000, 3_000, 7_000].map(|after| start + after);
        match sent.into_iter().find(|sent| receiver.up.is_some_and(|up| *sent >= up)) {
            Some(sent) => (sent + receiver.handshake, !receiver.refuses),
            None => (start + CONNECT, false),
        }
    }

    /// Who is taken, and after how many milliseconds.
    fn raced(receivers: &[Simulated]) -> (Option<usize>, u64) {
        let (mut race, mut now, mut asked) = (Race::of(receivers.len()), 0, vec![0; receivers.len()]);
        let mut running: Vec<(u64, usize, bool)> = Vec::new();
        loop {
            let until = match race.next(Duration::from_millis(now)) {
                Act::Begin(number) => {
                    asked[number] += 1;
                    assert!(asked[number] <= 2, "nobody is asked over and over");
                    let (end, connected) = attempt(receivers[number], now);
                    running.push((end, number, connected));
                    running.sort_unstable();
                    continue;
                }
                Act::Take(number) => return (Some(number), now),
                Act::GiveUp => return (None, now),
                Act::Wait(until) => until.map_or(u64::MAX, |until| u64::try_from(until.as_millis()).expect("short")),
            };
            match running.first().copied() {
                Some((end, number, connected)) if end <= until => {
                    now = end;
                    running.remove(0);
                    race.ended(number, connected, Duration::from_millis(now));
                }
                _ => now = until,
            }
        }
    }

    #[test]
    fn the_first_is_taken_if_it_answers_however_fast_others_are() {
        assert_eq!(raced(&[alive(400), alive(1)]), (Some(0), 400));
        // Slower than its head start: the other one has answered, and is not taken.
        assert_eq!(raced(&[alive(1_700), alive(1)]), (Some(0), 1_700));
        assert_eq!(raced(&[alive(30)]), (Some(0), 30));
    }

    #[test]
    fn a_dead_receiver_costs_its_head_start_and_a_second_chance() {
        assert_eq!(raced(&[DEAD, alive(40)]), (Some(1), 1_500 + 40 + 1_000));
        assert_eq!(raced(&[DEAD, DEAD, alive(40)]), (Some(2), 2 * 1_500 + 40 + 1_000));
        // One that says so itself costs nothing.
        assert_eq!(raced(&[REFUSES, alive(40)]), (Some(1), 45));
    }

    #[test]
    fn where_nobody_answers_all_were_tried_and_it_ends() {
        assert_eq!(raced(&[DEAD, DEAD, DEAD]), (None, 2 * 1_500 + CONNECT));
        assert_eq!(raced(&[]), (None, 0));
    }

    #[test]
    fn when_the_senders_own_network_comes_back_it_stays_where_it_was() {
        for up in (0..8_500).step_by(50) {
            for handshake in [1, 80, 600] {
                // The other one is nearer, and its attempt retransmits sooner.
                let (taken, _) = raced(&[from(up, handshake), from(up, 1)]);
                assert_eq!(taken, Some(0), "back after {up} ms, a handshake of {handshake} ms");
            }
        }
    }

    #[test]
    fn a_killed_receiver_is_left_within_fifteen_seconds_of_the_last_that_it_said() {
        // It may have been silent for as long as a sign of life is not due, before silence is counted.
        let noticed = keep_alive(LINK_TIMEOUT) + LINK_TIMEOUT;
        let (taken, after) = raced(&[DEAD, alive(200)]);
        assert_eq!(taken, Some(1));
        let all = noticed + ELSEWHERE_WAIT_MAX + Duration::from_millis(after);
        assert!(all <= Duration::from_secs(15), "{all:?}");
    }

    #[tokio::test]
    async fn the_driver_takes_whom_the_race_takes_and_tells_what_each_said() {
        let one_fails =
            |number: usize| async move { if number == 1 { Ok("second") } else { Err(format!("{number} failed")) } };
        assert_eq!(race(3, one_fails).await, Ok((1, "second")));
        let all_fail = |number: usize| async move { Err::<(), _>(format!("{number} failed")) };
        assert_eq!(race(2, all_fail).await, Err(vec!["0 failed".to_owned(), "1 failed".to_owned()]));
    }
}
