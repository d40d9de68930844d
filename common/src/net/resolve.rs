//! Where a receiver is: `HOST[:PORT]` as people write it, resolved anew at each attempt.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use crate::error::{Dispose, Disposition};

/// The port of both protocols where none is given.
pub const PORT_DEFAULT: u16 = 9443;
/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 16;
/// Longest host name in DNS.
const HOST_BYTES_MAX: usize = 253;

/// A text that is no `HOST[:PORT]`, or a host that has no address now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// Not in the form that is taken.
    #[error("\"{text}\" is not a host: {why}; expected NAME, NAME:PORT, IPv4[:PORT], [IPv6] or [IPv6]:PORT")]
    Syntax {
        /// As given.
        text: String,
        /// What is wrong.
        why: &'static str,
    },
    /// The name has no address, or the resolver did not answer.
    #[error("can't resolve {host}: {reason}; check the name and this machine's DNS")]
    Resolve {
        /// As given.
        host: String,
        /// The resolver's words.
        reason: String,
    },
}

impl Dispose for HostError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Syntax { .. } => Disposition::BadInput,
            Self::Resolve { .. } => Disposition::Retry,
        }
    }
}

/// A host and a port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostPort {
    host: Host,
    port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Host {
    Name(String),
    Address(IpAddr),
}

impl HostPort {
    /// Parses `text`, with `port_default` where it names no port.
    ///
    /// # Errors
    /// [`HostError::Syntax`].
    pub fn parse(text: &str, port_default: u16) -> Result<Self, HostError> {
        let bad = |why| HostError::Syntax { text: text.chars().take(300).collect(), why };
        let port = |digits: &str| match digits.parse::<u16>() {
            Ok(port) if port > 0 && digits.bytes().all(|byte| byte.is_ascii_digit()) => Ok(port),
            _ => Err(bad("the port is not a number from 1 to 65535")),
        };
        if let Some(rest) = text.strip_prefix('[') {
            let (address, after) = rest.split_once(']').ok_or_else(|| bad("\"[\" without \"]\""))?;
            let address: Ipv6Addr = address.parse().map_err(|_| bad("no IPv6 address in the brackets"))?;
            let port = match after.strip_prefix(':') {
                Some(digits) => port(digits)?,
                None if after.is_empty() => port_default,
                None => return Err(bad("something other than a port after \"]\"")),
            };
            return Ok(Self { host: Host::Address(address.into()), port });
        }
        if text.parse::<Ipv6Addr>().is_ok() {
            return Err(bad("an IPv6 address needs brackets"));
        }
        let (name, port) = match text.split_once(':') {
            Some((name, digits)) => (name, port(digits)?),
            None => (text, port_default),
        };
        if let Ok(address) = name.parse::<Ipv4Addr>() {
            return Ok(Self { host: Host::Address(address.into()), port });
        }
        if name.is_empty() {
            return Err(bad("the name is empty"));
        }
        if name.len() > HOST_BYTES_MAX {
            return Err(bad("the name is longer than 253 bytes"));
        }
        if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_')) {
            return Err(bad("the name has a character that host names don't have"));
        }
        if name.split('.').all(|label| label.bytes().all(|byte| byte.is_ascii_digit())) {
            return Err(bad("neither an IPv4 address nor a name"));
        }
        Ok(Self { host: Host::Name(name.to_owned()), port })
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The addresses that the host has now, in the resolver's order, at most 16. Safe to cancel.
    ///
    /// # Errors
    /// [`HostError::Resolve`].
    pub async fn resolve(&self) -> Result<Vec<SocketAddr>, HostError> {
        let name = match &self.host {
            Host::Address(address) => return Ok(vec![SocketAddr::new(*address, self.port)]),
            Host::Name(name) => name,
        };
        let failed = |reason: String| HostError::Resolve { host: name.clone(), reason };
        let found = tokio::net::lookup_host((name.as_str(), self.port)).await;
        let addresses: Vec<SocketAddr> =
            found.map_err(|error| failed(error.to_string()))?.take(ADDRESSES_MAX).collect();
        if addresses.is_empty() { Err(failed("it has no address".into())) } else { Ok(addresses) }
    }
}

impl FromStr for HostPort {
    type Err = HostError;

    /// As [`HostPort::parse`] with [`PORT_DEFAULT`].
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text, PORT_DEFAULT)
    }
}

impl From<SocketAddr> for HostPort {
    fn from(address: SocketAddr) -> Self {
        Self { host: Host::Address(address.ip()), port: address.port() }
    }
}

impl std::fmt::Display for HostPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.host {
            Host::Name(name) => write!(f, "{name}:{}", self.port),
            Host::Address(address) => SocketAddr::new(*address, self.port).fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_names_ipv4_or_bracketed_ipv6_with_or_without_a_port() {
        let cases = [
            ("receiver", "receiver:9443"),
            ("dr-1.example.org:80", "dr-1.example.org:80"),
            ("10.0.0.7", "10.0.0.7:9443"),
            ("10.0.0.7:1", "10.0.0.7:1"),
            ("[::1]", "[::1]:9443"),
            ("[2001:db8::7]:65535", "[2001:db8::7]:65535"),
        ];
        for (text, shown) in cases {
            let parsed: HostPort = text.parse().expect(text);
            assert_eq!(parsed.to_string(), shown);
            assert_eq!(shown.parse(), Ok(parsed));
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            ":80",
            "a:",
            "a:0",
            "a:65536",
            "a:+1",
            "a:1:2",
            "::1",
            "[::1",
            "[::1]x",
            "[a]",
            "a b",
            "1.2.3",
            "https://a",
        ] {
            assert!(text.parse::<HostPort>().is_err(), "{text:?}");
        }
    }

    #[tokio::test]
    async fn a_name_resolves_to_addresses_with_the_port() {
        let found = HostPort::parse("localhost", 7).expect("a name").resolve().await.expect("resolved");
        assert!(found.iter().all(|address| address.ip().is_loopback() && address.port() == 7), "{found:?}");
    }
}
