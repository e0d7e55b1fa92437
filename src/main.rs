//! The `ifnewer` program: arguments, configuration, run, exit code. 0: done, 1: failed, 2: wrong usage or configuration.

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use ifnewer::cli::commands;
use ifnewer::cli::{Cli, Command, load};
use ifnewer::clock::Clock;
use ifnewer::config::{Config, Log, LogFormat};
#[cfg(feature = "otlp")]
use ifnewer::otlp;
use ifnewer::process::{RunError, serve};
use ifnewer::server::listen::Passed;
use ifnewer::setup::{Done, Refused, Root};
use ifnewer::telemetry::Telemetry;
use ifnewer::{admin, ca, cli, demo, doctor, setup, terminal};
use listenfd::ListenFd;
use tracing_subscriber::EnvFilter;

const FAILED: u8 = 1;
const MISTAKEN: u8 = 2;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // It quotes the command line, which may hold names that others chose.
        Err(error) if error.use_stderr() => {
            let _ = write!(terminal::stderr(), "{error}");
            return ExitCode::from(MISTAKEN);
        }
        Err(help) => help.exit(),
    };
    // Before any port is bound: a wrong configuration must not take a running cache's place.
    let config = match load(&cli.options) {
        Ok(config) => config,
        Err(faults) => return fail(MISTAKEN, &faults),
    };
    match cli.wanted() {
        Command::Check => {
            let mut out = terminal::stdout(false);
            let _ = write!(out, "{}", config.summary());
            if let Some(lowered) = config.limits.lowered_by(take_descriptors()) {
                let _ = writeln!(
                    out,
                    "\nlimits    a process started from here has lower ones: {lowered}"
                );
            }
            ExitCode::SUCCESS
        }
        Command::Config(cli::Settings::Show { origin }) => match cli::settings(&cli.options) {
            Ok(mut settings) => {
                settings.with_origin = origin;
                let _ = write!(terminal::stdout(false), "{settings}");
                ExitCode::SUCCESS
            }
            Err(faults) => fail(MISTAKEN, &faults),
        },
        Command::Config(cli::Settings::Reference) => {
            let _ = write!(terminal::stdout(false), "{}", ifnewer::config::reference());
            ExitCode::SUCCESS
        }
        Command::Healthcheck => run(async {
            match admin::client::check_ready(&config.listen.admin).await {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(FAILED, &format!("ifnewer is not ready: {error}")),
            }
        }),
        Command::Setup(words) => set_up(&config, &words),
        Command::Ca(words) => authority(&config, words),
        Command::Doctor(words) => match Root::at(&words.root) {
            Ok(root) => run(examine(&config, &words, &root)),
            Err(refused) => fail(MISTAKEN, &refused),
        },
        Command::Demo { stay } => run(play(stay)),
        Command::Completions { shell } => {
            cli::completions(shell, &mut terminal::stdout(false));
            ExitCode::SUCCESS
        }
        Command::Man { out } => match cli::manual(out.as_deref(), &mut terminal::stdout(false)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(FAILED, &format!("cannot write the manual: {error}")),
        },
        Command::Operate(command) => run(operate(&config, command)),
        Command::Serve => {
            keep_heap_small();
            log(&config.log);
            let descriptors = take_descriptors();
            write_no_core();
            // Before any thread runs: it reads and clears variables.
            let passed = passed();
            run(serve_until_ended(cli.options, config, passed, descriptors))
        }
    }
}

/// Starts the program again in its own place, with the settings of the allocator that it can only be started with. glibc
/// gives each of many threads an arena of its own, and keeps in it what a peak needed. Measured with 4,000 tags: 400 views
/// of the list leave 68 MiB, and 59 with one arena; 2,000 unread responses leave 92 MiB, and 69.
fn keep_heap_small() {
    use std::os::unix::process::CommandExt as _;
    let (Some(settings), Ok(program)) = (cli::heap_settings(), std::env::current_exe()) else {
        return;
    };
    let mut arguments = std::env::args_os();
    let mut again = std::process::Command::new(program);
    if let Some(name) = arguments.next() {
        again.arg0(name);
    }
    again.args(arguments).envs(settings);
    // It returns only where it failed: then this one serves, in more memory.
    let _ = again.exec();
}

async fn serve_until_ended(
    options: cli::Options,
    config: Config,
    passed: Passed,
    descriptors: usize,
) -> ExitCode {
    let telemetry = Telemetry::new();
    #[cfg(feature = "otlp")]
    let recording = match cli::collector() {
        Some(collector) => match otlp::start(&collector, &telemetry) {
            Ok(recording) => Some(recording),
            Err(error) => return fail(MISTAKEN, &error),
        },
        None => None,
    };
    #[cfg(not(feature = "otlp"))]
    if cli::collector().is_some() {
        tracing::warn!(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, and this program was built without the feature `otlp`: no traces are recorded"
        );
    }
    let served = serve(
        config,
        passed,
        descriptors,
        || load(&options),
        Clock::system(),
        telemetry,
    )
    .await;
    #[cfg(feature = "otlp")]
    if let Some(recording) = recording {
        recording.finish().await;
    }
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(
            error @ (RunError::AdminExposed(_)
            | RunError::AdminToken(_)
            | RunError::Tls(_)
            | RunError::Upstream { .. }),
        ) => fail(MISTAKEN, &error),
        Err(error) => fail(FAILED, &error),
    }
}

async fn examine(config: &Config, words: &cli::Doctor, root: &Root) -> ExitCode {
    let report = doctor::examine(config, &words.options(), root, Clock::system().now()).await;
    let _ = if words.json {
        writeln!(terminal::stdout(false), "{:#}", report.json())
    } else {
        write!(terminal::stdout(false), "{report}")
    };
    ExitCode::from(report.exit_code())
}

fn set_up(config: &Config, words: &cli::Setup) -> ExitCode {
    let root = match Root::at(&words.root) {
        Ok(root) => root,
        Err(refused) => return fail(MISTAKEN, &refused),
    };
    let options = words.options();
    if words.undo {
        return tell(setup::undo(words.client, words.force, &root));
    }
    if words.apply {
        return tell(setup::apply(config, &options, &root));
    }
    let (text, objection) = setup::show(config, &options, &root);
    let _ = write!(terminal::stdout(false), "{text}");
    match objection {
        None => ExitCode::SUCCESS,
        Some(refused) => fail(FAILED, &refused),
    }
}

fn authority(config: &Config, words: cli::Ca) -> ExitCode {
    match words {
        cli::Ca::Export { out } => match (ca::export(config), out) {
            (Ok(authority), None) => {
                let _ = write!(terminal::stdout(false), "{}", authority.pem());
                ExitCode::SUCCESS
            }
            (Ok(authority), Some(path)) => match std::fs::write(&path, authority.pem()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(FAILED, &format!("cannot write {}: {error}", path.display())),
            },
            (Err(refused), _) => fail(FAILED, &refused),
        },
        cli::Ca::Install(words) => tell(Root::at(&words.root).and_then(|root| {
            let cli::Trust {
                into,
                address,
                ca,
                force,
                ..
            } = words;
            ca::install(config, into, &ca::Trust { address, ca, force }, &root)
        })),
        cli::Ca::Uninstall(words) => {
            tell(Root::at(&words.root).and_then(|root| ca::uninstall(words.into, words.force, &root)))
        }
        cli::Ca::Rotate => match ca::rotate(config, Clock::system()) {
            Ok(old) => {
                let _ = write!(terminal::stdout(false), "{}", ca::Rotated { old: &old });
                ExitCode::SUCCESS
            }
            Err(error) => fail(FAILED, &error),
        },
    }
}

fn tell(done: Result<Done, Refused>) -> ExitCode {
    match done {
        Ok(done) => {
            let _ = write!(terminal::stdout(false), "{done}");
            ExitCode::SUCCESS
        }
        Err(refused) => fail(FAILED, &refused),
    }
}

/// The sockets that the service manager opened for us. Those of other kinds are left alone.
fn passed() -> Passed {
    let mut given = ListenFd::from_env();
    let mut passed = Passed::default();
    for index in 0..given.len() {
        if let Ok(Some(listener)) = given.take_tcp_listener(index) {
            passed.tcp.push(listener);
        } else if let Ok(Some(listener)) = given.take_unix_listener(index) {
            passed.unix.push(listener);
        }
    }
    passed
}

/// As many files as the system lets us have: the limit that shells start programs with is meant for `select`. Says how
/// many.
fn take_descriptors() -> usize {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Fewer will do until there are many clients; `doctor` tells.
    let _ = setrlimit(Resource::Nofile, limit);
    let current = getrlimit(Resource::Nofile).current;
    current.map_or(usize::MAX, |current| {
        usize::try_from(current).unwrap_or(usize::MAX)
    })
}

/// A core would hold the credentials that are in memory at that moment.
fn write_no_core() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let _ = setrlimit(Resource::Core, none);
}

async fn play(stay: bool) -> ExitCode {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return fail(FAILED, &format!("this program cannot find itself: {error}")),
    };
    let folder = std::env::temp_dir().join(format!("ifnewer-demo-{}", std::process::id()));
    let stay = stay.then(|| {
        let (end, ended) = tokio::sync::oneshot::channel();
        tokio::spawn(async move {
            // Nobody left to tell is an end too.
            let _ = tokio::signal::ctrl_c().await;
            let _ = end.send(());
        });
        ended
    });
    let colour = terminal::is_stdout_terminal() && cli::wants_colour();
    match demo::play(program, folder, colour, &mut terminal::stdout(colour), stay).await {
        Ok(played) if played.wrong == 0 => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(FAILED),
        Err(error) => fail(FAILED, &error),
    }
}

async fn operate(config: &Config, command: commands::Command) -> ExitCode {
    let token = match admin::token(&config.listen) {
        Ok(token) => token,
        Err(error) => return fail(MISTAKEN, &error),
    };
    let client = admin::client::Client::new(config.listen.admin.clone(), token);
    let is_terminal = terminal::is_stdout_terminal();
    let colour = is_terminal && cli::wants_colour();
    let mut out = terminal::stdout(colour);
    let mut output = commands::Output {
        colour,
        progress: is_terminal && terminal::is_stderr_terminal(),
        out: &mut out,
    };
    match commands::run(&client, &command, &mut output).await {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has enough: `ifnewer ls | head`.
        Err(commands::Failed::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(error) => fail(FAILED, &error),
    }
}

fn run(program: impl Future<Output = ExitCode>) -> ExitCode {
    match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => {
            let code = runtime.block_on(program);
            // Downloads that nobody waits for any more are given up; what they wrote is gone on with after the next start.
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
        .with_ansi(terminal::is_stderr_terminal())
        .with_writer(terminal::Log);
    match log.format {
        LogFormat::Human => subscriber.with_target(false).init(),
        LogFormat::Json => subscriber.json().init(),
    }
}

fn fail(code: u8, why: &dyn Display) -> ExitCode {
    let _ = writeln!(terminal::stderr(), "{why}");
    ExitCode::from(code)
}
