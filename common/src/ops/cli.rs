//! Flags that every binary has, and the version text.
//!
//! Flags stay `Option`s here: they override the environment, which overrides the TOML file, which overrides the default, and
//! only the merge of all four knows.

use super::logging::{LogFormat, LogLevel};
use crate::units::BudgetSpec;

/// `--log-level` and `--log-format`.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct LogArgs {
    /// What is logged: error, warn, info, debug, trace, or a filter such as info,quinn=debug [default: info]
    #[arg(long, global = true, value_name = "LEVEL", env = "BLOCKFERRY_LOG_LEVEL", help_heading = "Logs")]
    pub log_level: Option<LogLevel>,
    /// The shape of log lines: text or json [default: text]
    #[arg(long, global = true, value_name = "text|json", env = "BLOCKFERRY_LOG_FORMAT", help_heading = "Logs")]
    pub log_format: Option<LogFormat>,
}

impl LogArgs {
    /// The values to use where the TOML file says `file_level` and `file_format`.
    #[must_use]
    pub fn effective(&self, file_level: Option<LogLevel>, file_format: Option<LogFormat>) -> (LogLevel, LogFormat) {
        let level = self.log_level.clone().or(file_level).unwrap_or_default();
        (level, self.log_format.or(file_format).unwrap_or_default())
    }
}

/// `--memory-budget`.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct MemoryArgs {
    /// Memory that the process may use: a share of effective memory, or a size of at least 64MiB [default: 8%]
    #[arg(long, value_name = "PERCENT|SIZE", env = "BLOCKFERRY_MEMORY_BUDGET")]
    pub memory_budget: Option<BudgetSpec>,
}

impl MemoryArgs {
    /// The budget to use where the TOML file says `file`.
    #[must_use]
    pub fn effective(self, file: Option<BudgetSpec>) -> BudgetSpec {
        self.memory_budget.or(file).unwrap_or_default()
    }
}

/// The text of `--version` after the program's name: release, protocol and format versions.
///
/// `1.2.0 (protocol 1-2; formats: record 1, close 1)`
#[must_use]
pub fn version_text(release: &str, protocols: std::ops::RangeInclusive<u32>, formats: &[(&str, u32)]) -> String {
    let (first, last) = (protocols.start(), protocols.end());
    let protocols = if first == last { first.to_string() } else { format!("{first}-{last}") };
    let formats: Vec<String> = formats.iter().map(|(name, version)| format!("{name} {version}")).collect();
    format!("{release} (protocol {protocols}; formats: {})", formats.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, clap::Parser)]
    struct Program {
        #[command(flatten)]
        log: LogArgs,
        #[command(flatten)]
        memory: MemoryArgs,
    }

    #[test]
    fn a_flag_overrides_the_file_which_overrides_the_default() {
        let given = Program::try_parse_from(["x", "--log-level", "debug", "--memory-budget", "9%"]).expect("valid");
        let (level, format) = given.log.effective(Some("trace".parse().expect("a level")), Some(LogFormat::Json));
        assert_eq!((level.to_string().as_str(), format), ("debug", LogFormat::Json));
        assert_eq!(given.memory.effective(Some(BudgetSpec::Percent(7))), BudgetSpec::Percent(9));
        let bare = Program::try_parse_from(["x"]).expect("valid");
        assert_eq!(bare.memory.effective(Some(BudgetSpec::Percent(7))), BudgetSpec::Percent(7));
        assert_eq!(bare.memory.effective(None), BudgetSpec::Percent(8));
    }

    #[test]
    fn a_wrong_value_is_a_usage_error_that_says_what_was_expected() {
        let error = Program::try_parse_from(["x", "--memory-budget", "80%"]).expect_err("out of range");
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("1% to 50%"), "{error}");
    }

    #[test]
    fn the_version_tells_protocols_and_formats() {
        assert_eq!(
            version_text("1.2.0", 1..=1, &[("record", 1), ("close", 2)]),
            "1.2.0 (protocol 1; formats: record 1, close 2)"
        );
        assert!(version_text("1.2.0", 1..=2, &[]).contains("protocol 1-2"));
    }
}
