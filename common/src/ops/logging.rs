//! Structured logs on standard error, as text for people or JSON lines for machines.
//!
//! Promises: colour only on a terminal and without `NO_COLOR`; a line never tears a progress bar; libraries below us speak
//! from WARN on unless a filter names them. Never logs keys, tokens or contents: that is on those who call.

use crate::error::{Dispose, Disposition};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::str::FromStr;
use tracing_subscriber::EnvFilter;

/// Why logs could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The level is none of the five and no filter.
    #[error(
        "expected a log level (error, warn, info, debug, trace) or a filter such as info,quinn=debug, found {found:?}: correct --log-level"
    )]
    Level {
        /// What was given.
        found: String,
    },
    /// The format is unknown.
    #[error("expected log format text or json, found {found:?}: correct --log-format")]
    Format {
        /// What was given.
        found: String,
    },
    /// Logs were set up before.
    #[error("logs were set up twice in one process")]
    Twice,
}

impl Dispose for LoggingError {
    fn disposition(&self) -> Disposition {
        match self {
            Self::Level { .. } | Self::Format { .. } => Disposition::BadInput,
            Self::Twice => Disposition::Bug,
        }
    }
}

/// The shape of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object in each line.
    Json,
}

impl FromStr for LogFormat {
    type Err = LoggingError;

    fn from_str(text: &str) -> Result<Self, LoggingError> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(LoggingError::Format { found: text.to_owned() }),
        }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// What is logged: a level for our own crates, or a whole filter (`info,quinn=debug`). Valid by construction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LogLevel(String);

/// Crates of this project as they appear in log targets.
const OWN_TARGETS: [&str; 7] = [
    "blockferry",
    "blockferry_common",
    "blockferry_catalog",
    "blockferry_sender",
    "blockferry_receiver",
    "blockferry_operator",
    "blockferry_tests",
];

impl LogLevel {
    fn filter_text(&self) -> String {
        let Self(text) = self;
        match text.as_str() {
            // An EnvFilter directive is a prefix of targets, so "blockferry" covers all our crates; "common" and its
            // siblings are their library names within the workspace.
            "error" | "off" => text.clone(),
            "warn" | "info" | "debug" | "trace" => {
                let own = ["common", "catalog", "sender", "receiver", "operator"];
                let mut filter = String::from("warn");
                for target in OWN_TARGETS.iter().chain(&own) {
                    filter.push_str(&format!(",{target}={text}"));
                }
                filter
            }
            _ => text.clone(),
        }
    }
}

impl Default for LogLevel {
    fn default() -> Self {
        Self("info".to_owned())
    }
}

impl FromStr for LogLevel {
    type Err = LoggingError;

    fn from_str(text: &str) -> Result<Self, LoggingError> {
        let lower = text.trim().to_ascii_lowercase();
        let level = ["off", "error", "warn", "info", "debug", "trace"].contains(&lower.as_str());
        // A lone word that is no level would be taken by the filter as the name of a target: a typing error, not a wish.
        let filter = text.contains('=') && EnvFilter::builder().parse(text).is_ok();
        match (level, filter) {
            (true, _) => Ok(Self(lower)),
            (false, true) => Ok(Self(text.trim().to_owned())),
            (false, false) => Err(LoggingError::Level { found: text.to_owned() }),
        }
    }
}

impl TryFrom<String> for LogLevel {
    type Error = LoggingError;

    fn try_from(text: String) -> Result<Self, LoggingError> {
        text.parse()
    }
}

impl From<LogLevel> for String {
    fn from(level: LogLevel) -> Self {
        level.0
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// True where colour may be used on standard error: a terminal, and no `NO_COLOR` in the environment.
#[must_use]
pub fn colour_wanted() -> bool {
    colour_decision(std::env::var_os("NO_COLOR").as_deref(), io::stderr().is_terminal())
}

fn colour_decision(no_color: Option<&std::ffi::OsStr>, terminal: bool) -> bool {
    // no-color.org: present and not empty, whatever its value.
    terminal && no_color.is_none_or(std::ffi::OsStr::is_empty)
}

/// Standard error, with a progress bar out of the way while a line is written.
struct Lines;

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        super::progress::suspended(|| io::stderr().lock().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Sets up logs for the whole process, once, in `main`.
///
/// # Errors
/// [`LoggingError::Twice`] on a second call, [`LoggingError::Level`] for a filter that the subscriber refuses.
pub fn init(level: &LogLevel, format: LogFormat) -> Result<(), LoggingError> {
    let filter = EnvFilter::builder()
        .parse(level.filter_text())
        .map_err(|_| LoggingError::Level { found: level.to_string() })?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Lines);
    let set = match format {
        LogFormat::Text => subscriber.with_ansi(colour_wanted()).with_target(false).try_init(),
        LogFormat::Json => subscriber.json().flatten_event(true).with_ansi(false).try_init(),
    };
    set.map_err(|_| LoggingError::Twice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    #[test]
    fn colour_needs_a_terminal_and_no_no_color() {
        assert!(colour_decision(None, true));
        assert!(colour_decision(Some(OsStr::new("")), true));
        assert!(!colour_decision(Some(OsStr::new("1")), true));
        assert!(!colour_decision(None, false));
    }

    #[test]
    fn levels_and_filters_parse_and_typing_errors_do_not() {
        for text in ["info", "DEBUG", "info,quinn=debug", "off"] {
            text.parse::<LogLevel>().expect("a level or filter");
        }
        for text in ["", "verbose", "inof", "info,quinn=loud"] {
            let error = text.parse::<LogLevel>().expect_err("neither").to_string();
            assert!(error.contains("--log-level"), "{error}");
        }
        assert!("xml".parse::<LogFormat>().is_err());
    }

    #[test]
    fn libraries_speak_from_warn_on_at_a_plain_level() {
        let filter = LogLevel("debug".to_owned()).filter_text();
        assert!(filter.starts_with("warn,") && filter.contains(",sender=debug"), "{filter}");
        assert!(EnvFilter::builder().parse(&filter).is_ok());
    }
}
