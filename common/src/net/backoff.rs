//! When to try again. PURE: chance comes in as a value.

use std::time::Duration;

/// Capped exponential backoff with full jitter: attempt *n* waits between nothing and `min(cap, base · 2ⁿ)`, evenly.
///
/// Full jitter spreads the senders of a fleet over the whole interval when a receiver comes back, so that they don't all
/// arrive at once.
#[derive(Debug, Clone)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    attempt: u32,
}

impl Backoff {
    /// A backoff whose first wait is at most `base` and whose longest is at most `cap`.
    #[must_use]
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, attempt: 0 }
    }

    /// For connections: at most half a second at first, at most thirty in the end.
    #[must_use]
    pub fn for_connections() -> Self {
        Self::new(Duration::from_millis(500), Duration::from_secs(30))
    }

    /// How long to wait before the next attempt; `random` is 64 evenly random bits.
    pub fn next_wait(&mut self, random: u64) -> Duration {
        let longest = self.base.saturating_mul(1_u32.checked_shl(self.attempt).unwrap_or(u32::MAX)).min(self.cap);
        self.attempt = self.attempt.saturating_add(1).min(31);
        let nanos = u64::try_from(longest.as_nanos()).unwrap_or(u64::MAX);
        // The high half of a 128-bit product maps 64 random bits evenly onto 0..=nanos.
        let scaled = (u128::from(random) * (u128::from(nanos) + 1)) >> 64;
        Duration::from_nanos(u64::try_from(scaled).unwrap_or(nanos))
    }

    /// Failed attempts since the last [`Self::reset`].
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.attempt
    }

    /// After a success that lasted: the next wait is short again.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_wait_doubles_up_to_the_cap_and_starts_again_after_a_reset() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let longest: Vec<u128> = (0..40).map(|_| backoff.next_wait(u64::MAX).as_millis()).collect();
        assert_eq!(longest[..5], [100, 200, 400, 800, 1000]);
        assert!(longest[5..].iter().all(|&wait| wait == 1000));
        backoff.reset();
        assert_eq!(backoff.next_wait(u64::MAX).as_millis(), 100);
    }

    #[test]
    fn jitter_covers_the_whole_interval() {
        let wait = |random| Backoff::new(Duration::from_secs(4), Duration::from_secs(9)).next_wait(random);
        assert_eq!(wait(0), Duration::ZERO);
        assert_eq!(wait(1 << 63).as_secs_f64().round(), 2.0);
    }
}
