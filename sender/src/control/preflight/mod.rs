//! `preflight`: what protection of this machine needs, what is there of it, and what to do about the rest.
//!
//! Changes nothing and keeps nothing. Every finding names its next step; warnings are what works, but weaker or slower than it
//! could.

mod disks;
mod machine;
mod receiver;

use std::path::PathBuf;

use common::net::resolve::HostPort;
use common::ops::exit::ExitCode;
use serde::Serialize;

use super::commands::Out;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing.
    Notice,
    /// Works, but weaker or slower.
    Warning,
    /// Protection is not possible like this.
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How much it matters.
    pub level: Level,
    /// What it is about: `kernel`, `network`, `state`, `memory`, `receiver`, `clock`, or `volume NAME`.
    pub subject: String,
    /// What was found.
    pub text: String,
    /// What to do; empty where there is nothing to do.
    pub next_step: String,
}

impl Finding {
    fn new(level: Level, subject: &str, text: impl Into<String>, next_step: impl Into<String>) -> Self {
        Self { level, subject: subject.to_owned(), text: text.into(), next_step: next_step.into() }
    }

    fn ok(subject: &str, text: impl Into<String>) -> Self {
        Self::new(Level::Ok, subject, text, "")
    }
}

/// What to look at.
#[derive(Debug, Clone)]
pub struct PreflightOptions {
    /// The state directory.
    pub state_dir: PathBuf,
    /// A receiver to be reached.
    pub receiver: Option<HostPort>,
    /// Names and disks of volumes.
    pub volumes: Vec<(String, PathBuf)>,
    /// JSON instead of text.
    pub json: bool,
}

/// Looks at everything and prints what was found. Exit code 1 with an error among it, 3 with a warning, else 0.
///
/// # Errors
/// Where standard output can't be written.
pub async fn run(options: &PreflightOptions, out: Out<'_>) -> std::io::Result<ExitCode> {
    let mut findings = machine::look();
    findings.extend(disks::look(&options.state_dir, &options.volumes));
    findings.extend(receiver::look(&options.state_dir, options.receiver.as_ref()).await);
    if options.json {
        serde_json::to_writer_pretty(&mut *out, &findings)?;
        writeln!(out)?;
    } else {
        for finding in &findings {
            let level = match finding.level {
                Level::Ok => "ok",
                Level::Notice => "notice",
                Level::Warning => "warning",
                Level::Error => "error",
            };
            writeln!(out, "{level:8}{}: {}", finding.subject, finding.text)?;
            if !finding.next_step.is_empty() {
                writeln!(out, "        next: {}", finding.next_step)?;
            }
        }
    }
    Ok(verdict(&findings))
}

/// What the findings come to. PURE.
fn verdict(findings: &[Finding]) -> ExitCode {
    match findings.iter().map(|finding| finding.level).max() {
        Some(Level::Error) => ExitCode::Failed,
        Some(Level::Warning) => ExitCode::Weaker,
        _ => ExitCode::Ok,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_finding_decides_the_exit_code() {
        let finding = |level| Finding::new(level, "kernel", "text", "");
        let code = |levels: &[Level]| verdict(&levels.iter().map(|level| finding(*level)).collect::<Vec<_>>()).code();
        assert_eq!(code(&[]), 0);
        assert_eq!(code(&[Level::Ok, Level::Notice]), 0);
        assert_eq!(code(&[Level::Warning, Level::Ok]), 3);
        assert_eq!(code(&[Level::Warning, Level::Error, Level::Ok]), 1);
    }
}
