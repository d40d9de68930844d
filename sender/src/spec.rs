//! Values of the command line and the configuration file that are more than a number: volumes, and choices by name.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use common::net::resolve::HostPort;
use common::units::DurationText;

/// How a volume's changes are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CaptureMode {
    /// The disk is read and compared, again and again.
    #[default]
    Scan,
    /// The sender serves the disk over NBD and sees every write.
    Nbd,
    /// The kernel's block tracepoints tell which pages change.
    Ebpf,
}

impl FromStr for CaptureMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "scan" => Ok(Self::Scan),
            "nbd" => Ok(Self::Nbd),
            "ebpf" => Ok(Self::Ebpf),
            other => Err(format!("capture={other}: expected scan, nbd or ebpf")),
        }
    }
}

impl std::fmt::Display for CaptureMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Scan => "scan",
            Self::Nbd => "nbd",
            Self::Ebpf => "ebpf",
        })
    }
}

/// Where a volume is served over NBD.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// A Unix socket.
    Unix(PathBuf),
    /// A host and port.
    Tcp(HostPort),
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.starts_with('/') || text.starts_with("./") {
            return Ok(Self::Unix(text.into()));
        }
        text.parse()
            .map(Self::Tcp)
            .map_err(|error| format!("listen={text}: expected a socket's path or HOST:PORT: {error}"))
    }
}

impl std::fmt::Display for Listen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(host) => host.fmt(f),
        }
    }
}

/// `NAME=PATH[,capture=MODE][,listen=SOCKET|HOST:PORT]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeSpec {
    /// The volume's name.
    pub name: String,
    /// Its block device or image file.
    pub path: PathBuf,
    /// How its changes are captured.
    pub capture: CaptureMode,
    /// Where it is served, with `capture=nbd`.
    pub listen: Option<Listen>,
}

impl FromStr for VolumeSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, rest) = text.split_once('=').ok_or("expected NAME=PATH")?;
        // Options follow the last commas; a path may hold commas as long as what follows is no option.
        let (mut path, mut capture, mut listen) = (rest, CaptureMode::default(), None);
        while let Some((before, option)) = path.rsplit_once(',') {
            match option.split_once('=') {
                Some(("capture", mode)) => capture = mode.parse()?,
                Some(("listen", address)) => listen = Some(address.parse()?),
                _ => break,
            }
            path = before;
        }
        Self::new(name, path.into(), capture, listen)
    }
}

impl VolumeSpec {
    /// A volume of this name and path.
    ///
    /// # Errors
    /// In words, where the name is not one, the path is empty, or `capture` and `listen` do not fit.
    pub fn new(name: &str, path: PathBuf, capture: CaptureMode, listen: Option<Listen>) -> Result<Self, String> {
        common::net::identity::check_name(name).map_err(|error| error.to_string())?;
        if path.as_os_str().is_empty() {
            return Err(format!("volume {name} has no path: expected NAME=PATH"));
        }
        match (capture, &listen) {
            (CaptureMode::Nbd, None) => {
                Err(format!("volume {name}: capture=nbd needs listen=SOCKET or listen=HOST:PORT"))
            }
            (CaptureMode::Scan | CaptureMode::Ebpf, Some(_)) => {
                Err(format!("volume {name}: listen= goes with capture=nbd, not with capture={capture}"))
            }
            _ => Ok(Self { name: name.to_owned(), path, capture, listen }),
        }
    }
}

/// `bitmap|throttle`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overload {
    /// Only which pages change is kept; they are read later. Writers never wait.
    #[default]
    Bitmap,
    /// Writers wait.
    Throttle,
}

impl FromStr for Overload {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "bitmap" => Ok(Self::Bitmap),
            "throttle" => Ok(Self::Throttle),
            other => Err(format!("expected bitmap or throttle, found \"{other}\"")),
        }
    }
}

impl std::fmt::Display for Overload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Self::Bitmap { "bitmap" } else { "throttle" })
    }
}

/// `TIME|off`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AppPoints(pub Option<Duration>);

impl Default for AppPoints {
    fn default() -> Self {
        Self(Some(Duration::from_secs(3600)))
    }
}

impl FromStr for AppPoints {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "off" {
            return Ok(Self(None));
        }
        let time: DurationText = text.parse().map_err(|error| format!("expected a time or off: {error}"))?;
        Ok(Self(Some(time.get())))
    }
}

impl std::fmt::Display for AppPoints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(time) => f.write_str(&DurationText(time).exact()),
            None => f.write_str("off"),
        }
    }
}

/// `auto|N`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ZstdLevel {
    /// Level 1, and none while the data doesn't shrink.
    #[default]
    Auto,
    /// Always this level.
    Fixed(i32),
}

impl FromStr for ZstdLevel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        text.parse()
            .ok()
            .filter(|level| (-7..=19).contains(level))
            .map(Self::Fixed)
            .ok_or_else(|| format!("expected auto or a level from -7 to 19, found \"{text}\""))
    }
}

impl std::fmt::Display for ZstdLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(level) => level.fmt(f),
        }
    }
}

/// `auto|quic`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Transport {
    /// What works; in this release QUIC.
    #[default]
    Auto,
    /// QUIC.
    Quic,
}

impl FromStr for Transport {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "quic" => Ok(Self::Quic),
            other => {
                Err(format!("expected auto or quic, found \"{other}\"; this release does not speak another transport"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_a_name_and_a_path_that_may_hold_commas_and_equals_signs() {
        let spec: VolumeSpec = "root=/dev/disk/by-id/a=b,c,capture=scan".parse().expect("valid");
        assert_eq!((spec.name.as_str(), spec.path), ("root", PathBuf::from("/dev/disk/by-id/a=b,c")));
        for wrong in [
            "root",
            "=/dev/vda",
            "root=",
            "a b=/dev/vda",
            "root=/dev/vda,capture=nbd",
            "root=,capture=scan",
            "root=/dev/vda,capture=magic",
            "root=/dev/vda,listen=/run/a",
            "root=/dev/vda,capture=nbd,listen=nowhere:x",
        ] {
            assert!(wrong.parse::<VolumeSpec>().is_err(), "{wrong} was taken");
        }
    }

    #[test]
    fn an_nbd_volume_is_served_at_a_socket_or_a_port() {
        let spec: VolumeSpec = "root=/srv/a,b.img,capture=nbd,listen=/run/root.sock".parse().expect("valid");
        assert_eq!(spec.path, PathBuf::from("/srv/a,b.img"));
        assert_eq!(spec.listen, Some(Listen::Unix("/run/root.sock".into())));
        let spec: VolumeSpec = "root=/srv/a.img,listen=[::1]:10809,capture=nbd".parse().expect("valid");
        assert_eq!(spec.listen.map(|listen| listen.to_string()), Some("[::1]:10809".to_owned()));
    }
}
