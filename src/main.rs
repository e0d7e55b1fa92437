//! The `ifnewer` program: arguments, configuration, run, exit code. 0: done, 1: failed, 2: wrong usage or configuration.

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use ifnewer::cli::{Cli, Command, load};
use ifnewer::clock::Clock;
use ifnewer::config::{Config, Log, LogFormat};
use ifnewer::run::{RunError, serve};
use ifnewer::{admin, cli};
use tracing_subscriber::EnvFilter;

const FAILED: u8 = 1;
const MISTAKEN: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Before any port is bound: a wrong configuration must not take a running cache's place.
    let config = match load(&cli.options) {
        Ok(config) => config,
        Err(faults) => return fail(MISTAKEN, &faults),
    };
    match cli.command() {
        Command::Check => {
            let _ = write!(std::io::stdout(), "{}", config.summary());
            ExitCode::SUCCESS
        }
        Command::Healthcheck => run(async {
            match admin::probe::ready(&config.listen.admin).await {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(FAILED, &format!("ifnewer is not ready: {error}")),
            }
        }),
        Command::Serve => {
            log(&config.log);
            run(serve_until_ended(cli.options, config))
        }
    }
}

async fn serve_until_ended(options: cli::Options, config: Config) -> ExitCode {
    match serve(config, || load(&options), Clock::system()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ (RunError::AdminExposed(_) | RunError::Tls(_) | RunError::Upstream { .. })) => {
            fail(MISTAKEN, &error)
        }
        Err(error) => fail(FAILED, &error),
    }
}

fn run(program: impl Future<Output = ExitCode>) -> ExitCode {
    match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => {
            let code = runtime.block_on(program);
            // Downloads that nobody waits for any more are given up; what they wrote is cleared at the next start.
            runtime.shutdown_background();
            code
        }
        Err(error) => fail(FAILED, &format!("cannot start: {error}")),
    }
}

fn log(log: &Log) {
    // The level was checked with the configuration.
    let filter = EnvFilter::try_new(&log.level).unwrap_or_else(|_| EnvFilter::new("info"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match log.format {
        LogFormat::Human => subscriber.with_target(false).init(),
        LogFormat::Json => subscriber.json().init(),
    }
}

fn fail(code: u8, why: &dyn Display) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "{why}");
    ExitCode::from(code)
}
