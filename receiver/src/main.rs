//! `blockferry-receiver`: parses, dispatches, and turns the outcome into an exit code.

use clap::Parser;
use common::ops::exit::{self, ExitCode};
use receiver::cli::{Cli, Command, ConfigCommand};
use receiver::config::{ConfigError, FileConfig, RunConfig};
use receiver::fleet_commands::{self, CommandError};
use receiver::server::{self, ServerError};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
common::configure_jemalloc!();

/// Threads for file work. Each has a stack of its own in memory; who waits for a turn at the stage or the local store holds
/// one meanwhile.
const BLOCKING_THREADS_MAX: usize = 256;

/// Why the command failed, by what its exit code is.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Logging(#[from] common::ops::logging::LoggingError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error("cannot start the runtime: {0}")]
    Runtime(std::io::Error),
}

impl Error {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Config(_) | Self::Logging(_) | Self::Command(CommandError::Config(_)) => ExitCode::Usage,
            Self::Command(_) | Self::Server(_) | Self::Runtime(_) => ExitCode::Failed,
        }
    }
}

fn main() -> std::process::ExitCode {
    // clap prints help and usage errors itself, and exits with 0 or 2.
    let cli = Cli::parse();
    common::ops::panic_guard::install();
    common::net::tls::install_provider();
    match run(&cli) {
        Ok(code) => code.into(),
        Err(error) => {
            exit::report_error(&error);
            error.exit_code().into()
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode, Error> {
    let file = FileConfig::load(cli.config.as_deref())?;
    let (level, format) = cli.log.effective(file.log_level.clone(), file.log_format);
    common::ops::logging::init(&level, format)?;
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.max_blocking_threads(BLOCKING_THREADS_MAX).enable_all().build().map_err(Error::Runtime)
    };
    match &cli.command {
        Command::Run(args) => {
            let config = RunConfig::resolve(args, &file)?;
            return Ok(runtime()?.block_on(server::run(config))?);
        }
        Command::Passphrase(command) => runtime()?.block_on(fleet_commands::passphrase(command, &file))?,
        Command::Machines(command) => runtime()?.block_on(fleet_commands::machines(command, &file))?,
        Command::Operator(command) => runtime()?.block_on(fleet_commands::operator(command, &file))?,
        Command::Receivers(command) => runtime()?.block_on(fleet_commands::receivers(command, &file))?,
        Command::Drain(args) => runtime()?.block_on(fleet_commands::drain(args, &file))?,
        Command::Config(ConfigCommand::Check(args)) => print_config(&RunConfig::resolve(args, &file)?),
    }
    Ok(ExitCode::Ok)
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
fn print_config(config: &RunConfig) {
    print!("{config}");
}
