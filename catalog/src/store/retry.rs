//! Whether a request that failed is made again, and when. PURE: time and chance come in as values.
//!
//! This is the one place that retries requests to a cloud; the client library below is told not to. What a caller does once
//! this gives up (a forwarder goes on for ever, a command ends) is the caller's.

use std::time::Duration;

use common::net::backoff::Backoff;

/// First wait is at most this.
const WAIT_BASE: Duration = Duration::from_millis(100);
/// Longest wait.
const WAIT_MAX: Duration = Duration::from_secs(15);
/// Attempts at one request beyond the first.
const RETRIES_MAX: u32 = 8;
/// No attempt starts later than this after the first: a caller wants to know that the store is down.
const WINDOW: Duration = Duration::from_secs(3 * 60);

/// The attempts at one request.
#[derive(Debug)]
pub(super) struct Retries {
    backoff: Backoff,
    made: u32,
}

impl Retries {
    pub(super) fn new() -> Self {
        Self { backoff: Backoff::new(WAIT_BASE, WAIT_MAX), made: 0 }
    }

    /// After a failure: how long to wait before the next attempt, or `None` where there is to be none. `transient` says
    /// whether the same request may work later, `elapsed` counts from the first attempt, `random` is 64 random bits.
    pub(super) fn after(&mut self, transient: bool, elapsed: Duration, random: u64) -> Option<Duration> {
        if !transient || self.made == RETRIES_MAX {
            return None;
        }
        let wait = self.backoff.next_wait(random);
        self.made += 1;
        (elapsed + wait <= WINDOW).then_some(wait)
    }

    /// Attempts made beyond the first.
    pub(super) fn made(&self) -> u32 {
        self.made
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_work_later_is_tried_a_bounded_number_of_times_and_the_rest_never() {
        let mut retries = Retries::new();
        let waits: Vec<_> = std::iter::from_fn(|| retries.after(true, Duration::ZERO, u64::MAX)).collect();
        assert_eq!(waits.len(), 8);
        assert!(waits.windows(2).all(|pair| pair[0] <= pair[1]) && waits[7] <= WAIT_MAX, "{waits:?}");
        assert_eq!(Retries::new().after(false, Duration::ZERO, 0), None);
    }

    #[test]
    fn no_attempt_starts_after_the_window() {
        assert_eq!(Retries::new().after(true, WINDOW + Duration::from_secs(1), 0), None);
        assert_eq!(Retries::new().after(true, WINDOW, 0), Some(Duration::ZERO));
    }

    #[test]
    fn waits_are_spread_by_chance() {
        assert_eq!(Retries::new().after(true, Duration::ZERO, 0), Some(Duration::ZERO));
        assert_eq!(Retries::new().after(true, Duration::ZERO, u64::MAX), Some(WAIT_BASE));
    }
}
