//! What travels over the control socket: one JSON object a line, one answer line for each request line.
//!
//! `{"version":1,"command":"status"}` is answered by `{"ok":{…}}` or `{"error":"…"}`. Fields are only added; a version that
//! is not known is refused by its number.

use common::format::close::Consistency;
use serde::{Deserialize, Serialize};

use super::status::{PointStatus, SenderStatus};
use crate::events::Event;

/// Version of the lines.
pub const VERSION: u32 = 1;
/// Longest request line.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;
/// Longest answer line: a thousand events of a kibibyte each, and room.
pub const ANSWER_BYTES_MAX: usize = 8 << 20;

/// A request line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// [`VERSION`].
    pub version: u32,
    /// What is asked.
    #[serde(flatten)]
    pub command: AskCommand,
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum AskCommand {
    /// How it stands.
    Status,
    /// The newest events.
    Events {
        /// Only those with a greater number.
        #[serde(default)]
        after: u64,
    },
    /// A recovery point now.
    Point {
        /// The volume; all without one.
        volume: Option<String>,
        /// `crash`, `filesystem` or `application`.
        consistency: Option<String>,
    },
    /// The end of protection.
    Detach {
        /// The volume; all without one.
        volume: Option<String>,
    },
}

/// What became of a volume's point.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PointReply {
    /// The volume.
    pub volume: String,
    /// The committed point; `None` where there is none.
    pub point: Option<PointStatus>,
    /// Why it is weaker than what was asked for; empty where it is not.
    pub weaker: String,
    /// Why there is none, and what to do; empty where there is one.
    pub error: String,
}

/// What became of a volume that was to be detached.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DetachReply {
    /// The volume.
    pub volume: String,
    /// Why it is still protected, and what to do; empty where it is not.
    pub error: String,
}

/// An answer line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Ok(Answered),
    /// Not done: why, and what to do.
    Error(String),
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answered {
    /// How it stands.
    Status(Box<SenderStatus>),
    /// Events, oldest first.
    Events(Vec<Event>),
    /// Points, one for each volume.
    Points(Vec<PointReply>),
    /// What was detached.
    Detached(Vec<DetachReply>),
}

/// A consistency by its word. `fuzzy` can't be asked for.
///
/// # Errors
/// In words.
pub fn parse_consistency(word: &str) -> Result<Consistency, String> {
    match word {
        "crash" => Ok(Consistency::Crash),
        "filesystem" => Ok(Consistency::Filesystem),
        "application" => Ok(Consistency::Application),
        other => Err(format!("expected crash, filesystem or application, found \"{other}\"")),
    }
}

/// A request line of `command`, with its line break.
///
/// # Errors
/// In words, where it is longer than [`REQUEST_BYTES_MAX`].
pub fn encode_ask(command: AskCommand) -> Result<Vec<u8>, String> {
    let mut line =
        serde_json::to_vec(&Ask { version: VERSION, command }).map_err(|error| format!("the request: {error}"))?;
    if line.len() >= REQUEST_BYTES_MAX {
        return Err(format!("the request has {} bytes, at most {REQUEST_BYTES_MAX} are taken", line.len()));
    }
    line.push(b'\n');
    Ok(line)
}

/// Reads a request line.
///
/// # Errors
/// In words: not JSON, another version, an unknown command.
pub fn decode_ask(line: &[u8]) -> Result<AskCommand, String> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let found: Versioned =
        serde_json::from_slice(line).map_err(|error| format!("the request can't be read: {error}"))?;
    if found.version != VERSION {
        return Err(format!(
            "the request is of version {}, this sender speaks {VERSION}: use the command of the release that runs",
            found.version
        ));
    }
    let ask: Ask = serde_json::from_slice(line).map_err(|error| format!("the request can't be read: {error}"))?;
    if let AskCommand::Point { consistency: Some(word), .. } = &ask.command {
        parse_consistency(word)?;
    }
    Ok(ask.command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reads_back_and_another_version_is_refused_by_its_number() {
        let commands = [
            AskCommand::Status,
            AskCommand::Events { after: 7 },
            AskCommand::Point { volume: Some("root".into()), consistency: Some("crash".into()) },
            AskCommand::Detach { volume: None },
        ];
        for command in commands {
            let line = encode_ask(command.clone()).expect("short");
            assert_eq!(decode_ask(&line).expect("valid"), command);
        }
        let error = decode_ask(br#"{"version":9,"command":"status"}"#).expect_err("another version");
        assert!(error.contains('9'), "{error}");
        for wrong in ["", "{}", "[]", r#"{"version":1}"#, r#"{"version":1,"command":"dance"}"#] {
            assert!(decode_ask(wrong.as_bytes()).is_err(), "{wrong} was taken");
        }
        assert!(decode_ask(br#"{"version":1,"command":"point","consistency":"fuzzy"}"#).is_err());
    }
}
