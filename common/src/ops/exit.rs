//! Exit codes, and the one way in which an error reaches a person.

use std::error::Error;
use std::io::Write;

/// How a process ends. Scripts rely on the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitCode {
    /// 0: done as asked.
    Ok,
    /// 1: failed.
    Failed,
    /// 2: the command line, environment or configuration was wrong; nothing was tried.
    Usage,
    /// 3: done, but weaker than asked for. A mere notice is not that.
    Weaker,
    /// 128 + n: ended by signal n.
    Signal(u8),
}

impl ExitCode {
    /// The number.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Weaker => 3,
            Self::Signal(number) => 128_u8.saturating_add(number),
        }
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code.code())
    }
}

/// An error and its causes in one line: `outer: inner: innermost`. A cause whose text the outer one holds already is left
/// out, and line breaks become blanks, so that what a script takes as the last line is the whole story.
#[must_use]
pub fn error_line(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let text = inner.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = inner.source();
    }
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Writes `error: …` with all causes as the last line on standard error. The error's texts name the thing and the next step.
pub fn report_error(error: &(dyn Error + 'static)) {
    // Where standard error itself is gone there is nobody to tell.
    let _ = writeln!(std::io::stderr().lock(), "error: {}", error_line(error));
}

/// Like [`report_error`], and adds what the person can do next.
pub fn report_error_with_step(error: &(dyn Error + 'static), next_step: &str) {
    let _ = writeln!(std::io::stderr().lock(), "error: {}; {next_step}", error_line(error));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open key file /k: pass --key-file")]
    struct Outer(#[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("permission\ndenied")]
    struct Inner;

    #[derive(Debug, thiserror::Error)]
    #[error("reading /k: {0}")]
    struct Quoting(#[source] Inner);

    #[test]
    fn codes_are_those_that_scripts_rely_on() {
        let codes = [ExitCode::Ok, ExitCode::Failed, ExitCode::Usage, ExitCode::Weaker, ExitCode::Signal(15)];
        assert_eq!(codes.map(ExitCode::code), [0, 1, 2, 3, 143]);
    }

    #[test]
    fn an_error_is_one_line_with_its_causes() {
        assert_eq!(error_line(&Outer(Inner)), "cannot open key file /k: pass --key-file: permission denied");
    }

    #[test]
    fn a_cause_that_the_outer_text_holds_is_not_said_twice() {
        assert_eq!(error_line(&Quoting(Inner)), "reading /k: permission denied");
    }
}
