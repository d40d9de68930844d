//! `blockferry-sender`: parses, dispatches, and turns the outcome into an exit code.

use clap::Parser;
use common::ops::exit::{self, ExitCode};
use sender::agent;
use sender::capture::freeze::watchdog;
use sender::cli::{Cli, Command, ConfigCommand};
use sender::config::{ConfigError, FileConfig, RunConfig};
use sender::control::args::StateArgs;
use sender::control::commands::status::StatusOptions;
use sender::control::commands::{self, CommandError};
use sender::control::preflight::{self, PreflightOptions};
use sender::register;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
common::configure_jemalloc!();

/// Why the command failed, by what its exit code is.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Logging(#[from] common::ops::logging::LoggingError),
    #[error(transparent)]
    Register(#[from] register::Error),
    #[error(transparent)]
    Agent(#[from] agent::AgentError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error("cannot start the runtime: {0}")]
    Runtime(std::io::Error),
}

impl Error {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Config(_) | Self::Logging(_) => ExitCode::Usage,
            Self::Register(_) | Self::Agent(_) | Self::Command(_) | Self::Runtime(_) => ExitCode::Failed,
        }
    }
}

fn main() -> std::process::ExitCode {
    // Started by a sender that is about to freeze file systems: no command line to parse, nothing to log, no runtime.
    if std::env::args_os().nth(1).is_some_and(|first| first == watchdog::SUBCOMMAND) {
        return watchdog::serve().into();
    }
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
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Error::Runtime);
    let state_dir = |args: &StateArgs| file.state_dir(args.state_dir.as_deref());
    match &cli.command {
        Command::Register(args) => {
            runtime()?.block_on(register::register(args))?;
            Ok(ExitCode::Ok)
        }
        Command::Run(args) => {
            let config = RunConfig::resolve(args, &file)?;
            Ok(runtime()?.block_on(agent::run(config))?)
        }
        Command::Preflight(args) => {
            let mut volumes = file.volume_paths();
            if !args.volumes.is_empty() {
                volumes = args.volumes.iter().map(|spec| (spec.name.clone(), spec.path.clone())).collect();
            }
            let (state_dir, receiver) = (state_dir(&args.state), args.receiver.clone());
            let options = PreflightOptions { state_dir, receiver, volumes, json: args.json };
            let done = runtime()?.block_on(preflight::run(&options, &mut std::io::stdout()));
            Ok(done.map_err(CommandError::from)?)
        }
        Command::Point(args) => {
            let volume = args.which.volume.clone();
            let out = &mut std::io::stdout();
            Ok(runtime()?.block_on(commands::point::run(
                &state_dir(&args.state),
                volume,
                args.consistency,
                args.json,
                out,
            ))?)
        }
        Command::Status(args) => {
            let options = StatusOptions { json: args.json, watch: args.watch, memory: args.memory };
            Ok(runtime()?.block_on(commands::status::run(&state_dir(&args.state), options, &mut std::io::stdout()))?)
        }
        Command::Events(args) => Ok(runtime()?.block_on(commands::events::run(
            &state_dir(&args.state),
            args.json,
            &mut std::io::stdout(),
        ))?),
        Command::Adopt(args) => {
            let (name, path) = args.volume.split_once('=').map_or((&*args.volume, None), |(n, p)| (n, Some(p.into())));
            let path = path.or_else(|| file.volume_path(name).map(Into::into));
            Ok(runtime()?.block_on(commands::adopt::run(
                &state_dir(&args.state),
                name,
                path,
                &mut std::io::stdout(),
            ))?)
        }
        Command::Detach(args) => {
            let volume = args.which.volume.clone();
            Ok(runtime()?.block_on(commands::detach::run(&state_dir(&args.state), volume, &mut std::io::stdout()))?)
        }
        Command::Config(ConfigCommand::Check(args)) => {
            print_config(&RunConfig::resolve(args, &file)?);
            Ok(ExitCode::Ok)
        }
    }
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
fn print_config(config: &RunConfig) {
    print!("{config}");
}
