//! How often `Register` may be tried. PURE: time comes in as a value.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

/// Tries that one address may make at once, and how soon one more is granted: a whole rack behind one address may start
/// together; guessing a 256-bit secret gets nowhere either way, this bounds the work it makes.
const ADDRESS_BURST: u32 = 30;
const ADDRESS_REFILL: Duration = Duration::from_secs(1);
/// The same for all addresses together.
const ALL_BURST: u32 = 200;
const ALL_REFILL: Duration = Duration::from_millis(50);
/// Addresses that are told apart; the rest share the common bucket alone.
const ADDRESSES_MAX: usize = 1_024;

/// A bucket that holds at most `burst` tokens and gains one each `refill`.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    burst: u32,
    refill: Duration,
    /// From when on the bucket is full again, had nobody asked.
    full_at: Duration,
}

impl TokenBucket {
    /// A full bucket.
    #[must_use]
    pub fn new(burst: u32, refill: Duration) -> Self {
        Self { burst, refill, full_at: Duration::ZERO }
    }

    /// Takes a token at `now` (since any fixed start).
    ///
    /// # Errors
    /// How long until there is one.
    pub fn try_take(&mut self, now: Duration) -> Result<(), Duration> {
        // Each token taken moves the moment of fullness by one refill; the bucket is empty when it is `burst` away.
        let full_at = self.full_at.max(now) + self.refill;
        let latest = now + self.refill * self.burst;
        if full_at > latest {
            return Err(full_at - latest);
        }
        self.full_at = full_at;
        Ok(())
    }

    /// True where nothing is missing at `now`.
    #[must_use]
    pub fn is_full(&self, now: Duration) -> bool {
        self.full_at <= now
    }
}

/// Bounds registrations by address, and in all.
#[derive(Debug)]
pub struct RegisterLimiter {
    all: TokenBucket,
    addresses: HashMap<IpAddr, TokenBucket>,
}

impl Default for RegisterLimiter {
    fn default() -> Self {
        Self { all: TokenBucket::new(ALL_BURST, ALL_REFILL), addresses: HashMap::new() }
    }
}

impl RegisterLimiter {
    /// Takes a token for a try from an address at `now`.
    ///
    /// # Errors
    /// How long the address should wait.
    pub fn try_take(&mut self, from: Option<IpAddr>, now: Duration) -> Result<(), Duration> {
        if let Some(from) = from {
            if self.addresses.len() >= ADDRESSES_MAX && !self.addresses.contains_key(&from) {
                self.addresses.retain(|_, bucket| !bucket.is_full(now));
            }
            if self.addresses.len() < ADDRESSES_MAX || self.addresses.contains_key(&from) {
                let bucket =
                    self.addresses.entry(from).or_insert_with(|| TokenBucket::new(ADDRESS_BURST, ADDRESS_REFILL));
                bucket.try_take(now)?;
            }
        }
        self.all.try_take(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_bucket_gives_its_burst_then_one_each_refill() {
        let mut bucket = TokenBucket::new(3, SECOND);
        let now = SECOND * 100;
        for _ in 0..3 {
            assert_eq!(bucket.try_take(now), Ok(()));
        }
        assert_eq!(bucket.try_take(now), Err(SECOND));
        assert_eq!(bucket.try_take(now + SECOND / 2), Err(SECOND / 2));
        assert_eq!(bucket.try_take(now + SECOND), Ok(()));
        assert_eq!(bucket.try_take(now + SECOND), Err(SECOND));
        assert!(bucket.is_full(now + SECOND * 9));
        for _ in 0..3 {
            assert_eq!(bucket.try_take(now + SECOND * 9), Ok(()));
        }
        assert!(bucket.try_take(now + SECOND * 9).is_err());
    }

    #[test]
    fn one_address_does_not_use_up_anothers_tries() {
        let mut limiter = RegisterLimiter::default();
        let (a, b) = (Some(IpAddr::from([10, 0, 0, 1])), Some(IpAddr::from([10, 0, 0, 2])));
        for _ in 0..ADDRESS_BURST {
            assert!(limiter.try_take(a, SECOND).is_ok());
        }
        assert!(limiter.try_take(a, SECOND).is_err());
        assert!(limiter.try_take(b, SECOND).is_ok());
    }

    #[test]
    fn many_addresses_are_bounded_in_memory_and_in_all() {
        let mut limiter = RegisterLimiter::default();
        let granted =
            (0..5_000_u32).filter(|n| limiter.try_take(Some(IpAddr::from(n.to_be_bytes())), SECOND).is_ok()).count();
        assert_eq!(granted, ALL_BURST as usize);
        assert!(limiter.addresses.len() <= ADDRESSES_MAX);
    }
}
