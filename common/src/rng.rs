//! Chance as a handle. Pure modules take random bytes as values; the rim draws them here.

/// The operating system had no randomness to give; without it no key, salt or identifier may be made.
#[derive(Debug, thiserror::Error)]
#[error("the operating system gave no random bytes: {0}")]
pub struct RngError(getrandom::Error);

/// Cryptographically secure random bytes from the operating system.
///
/// # Errors
/// [`RngError`] where the system call fails.
#[expect(clippy::disallowed_methods, reason = "the one place where OS randomness enters")]
pub fn random<const N: usize>() -> Result<[u8; N], RngError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(RngError)?;
    Ok(bytes)
}
