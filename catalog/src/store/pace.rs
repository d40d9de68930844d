//! How fast requests may go out: a cap per second, and a pause that a store asked for. PURE: `now` comes in as a value.

use std::time::Duration;

/// Longest pause that a store's `Retry-After` may ask for.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Spreads requests: never more than a second's worth at once, and on average never more than the cap. Times count from any
/// fixed instant.
#[derive(Debug)]
pub(super) struct Pace {
    /// Between requests at the cap; zero where there is none.
    interval: Duration,
    /// When the next request could go if each had waited its interval.
    due: Duration,
    /// Nothing goes before this.
    paused_until: Duration,
}

impl Pace {
    /// At most `per_second` requests a second, or without a cap.
    pub(super) fn new(per_second: Option<u32>) -> Self {
        let interval = per_second.filter(|&n| n > 0).map_or(Duration::ZERO, |n| Duration::from_secs(1) / n);
        Self { interval, due: Duration::ZERO, paused_until: Duration::ZERO }
    }

    /// Takes the next place in line: how long to wait from `now` before sending.
    pub(super) fn next(&mut self, now: Duration) -> Duration {
        // Unused places of more than a second are lost.
        let place = self.due.max(now.saturating_sub(Duration::from_secs(1)));
        self.due = place + self.interval;
        place.max(self.paused_until).saturating_sub(now)
    }

    /// The store asked for a pause from `now`.
    pub(super) fn pause(&mut self, now: Duration, asked: Duration) {
        self.paused_until = self.paused_until.max(now + asked.min(PAUSE_MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// When each of `count` requests asked for at `now` may go.
    fn starts(pace: &mut Pace, now: Duration, count: usize) -> Vec<Duration> {
        (0..count).map(|_| now + pace.next(now)).collect()
    }

    #[test]
    fn a_second_of_unused_places_may_be_caught_up_and_then_the_cap_holds() {
        let mut pace = Pace::new(Some(10));
        let now = 100 * SECOND;
        let starts = starts(&mut pace, now, 50);
        assert_eq!(starts.iter().filter(|&&start| start == now).count(), 11);
        assert_eq!(*starts.last().expect("50"), now + Duration::from_millis(3900));
    }

    #[test]
    fn without_a_cap_nothing_waits() {
        assert!(starts(&mut Pace::new(None), SECOND, 1000).iter().all(|&start| start == SECOND));
    }

    #[test]
    fn a_pause_holds_all_requests_and_is_bounded() {
        let mut pace = Pace::new(None);
        pace.pause(SECOND, 5 * SECOND);
        assert_eq!(pace.next(2 * SECOND), 4 * SECOND);
        pace.pause(SECOND, Duration::from_secs(86_400));
        assert_eq!(pace.next(SECOND), PAUSE_MAX);
    }
}
