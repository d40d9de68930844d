//! A panic is a broken promise of our own code: it is logged and ends the process with exit code 1.
//!
//! A process that went on after losing one of its tasks would promise what it no longer keeps; a restart recovers, since
//! everything acknowledged is durable.

use super::exit::ExitCode;
use super::shutdown::end_now;

/// Installs the guard for the whole process, once, in `main`, after logs are set up.
pub fn install() {
    std::panic::set_hook(Box::new(|panic| {
        let text = panic.payload_as_str().unwrap_or("no text");
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let backtrace = std::backtrace::Backtrace::capture();
        tracing::error!(%place, %backtrace, "internal error: {text}; please report this");
        super::exit::report_error(&Panicked { text: text.to_owned(), place });
        end_now(ExitCode::Failed);
    }));
}

#[derive(Debug, thiserror::Error)]
#[error("internal error at {place}: {text}; please report this with the log")]
struct Panicked {
    text: String,
    place: String,
}

#[cfg(test)]
mod tests {
    /// Runs itself as a child process, since the guard ends the process.
    #[test]
    fn a_panic_in_any_thread_is_reported_and_ends_the_process_with_code_1() {
        const CHILD: &str = "BLOCKFERRY_TEST_PANIC_CHILD";
        if std::env::var_os(CHILD).is_some() {
            super::install();
            let _ = std::thread::spawn(|| panic!("on purpose")).join();
            return;
        }
        let own = std::env::current_exe().expect("a path");
        let name = "ops::panic_guard::tests::a_panic_in_any_thread_is_reported_and_ends_the_process_with_code_1";
        let output = std::process::Command::new(own)
            .args([name, "--exact", "--nocapture"])
            .env(CHILD, "1")
            .output()
            .expect("started");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("on purpose") && text.contains("panic_guard.rs"), "{text}");
    }
}
