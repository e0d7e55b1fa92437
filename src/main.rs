//! The `ifnewer` program: arguments, configuration, commands and exit codes. 0: success, 1: failure, 2: usage or
//! configuration error.

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use ifnewer::cli::commands::{self, CommandError};
use ifnewer::cli::shared_storage::{self, PolicyFor};
use ifnewer::cli::{Cli, Command, load};
use ifnewer::clock::Clock;
use ifnewer::config::{Config, Log, LogFormat, SharedConfig};
#[cfg(feature = "otlp")]
use ifnewer::otlp;
use ifnewer::process::{RunError, serve};
use ifnewer::server::listener::InheritedSockets;
use ifnewer::setup::{Applied, RootFs, SetupError};
use ifnewer::shared::RecordKeys;
use ifnewer::shared::maintenance::TagRecordError;
use ifnewer::telemetry::Telemetry;
use ifnewer::terminal::LogThread;
use ifnewer::{admin, blocking, ca, cli, demo, doctor, setup, terminal};
use listenfd::ListenFd;
use tracing_subscriber::EnvFilter;

/// Also for C code, because the build replaces `malloc`.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const FAILED: u8 = 1;
const USAGE_ERROR: u8 = 2;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // The message quotes arguments, which may contain text of others.
        Err(error) if error.use_stderr() => {
            let _ = write!(terminal::stderr(), "{error}");
            return ExitCode::from(USAGE_ERROR);
        }
        Err(help) => help.exit(),
    };
    // Load before binding ports: an invalid configuration must not replace a running cache.
    let config = match load(&cli.options) {
        Ok(config) => config,
        Err(faults) => return fail(USAGE_ERROR, &faults),
    };
    match cli.selected_command() {
        Command::Check => {
            let mut out = terminal::stdout(false);
            let _ = write!(out, "{}", config.summary());
            if let Some(lowered) = config.limits.describe_caps(raise_fd_limit()) {
                let _ = writeln!(
                    out,
                    "\nlimits    lowered by the file descriptor limit of this shell: {lowered}"
                );
            }
            ExitCode::SUCCESS
        }
        Command::Config(cli::ConfigCommand::Show { origin }) => {
            match cli::effective_settings(&cli.options, origin) {
                Ok(settings) => {
                    let _ = write!(terminal::stdout(false), "{settings}");
                    ExitCode::SUCCESS
                }
                Err(faults) => fail(USAGE_ERROR, &faults),
            }
        }
        Command::Config(cli::ConfigCommand::Reference) => {
            let _ = write!(terminal::stdout(false), "{}", ifnewer::config::reference());
            ExitCode::SUCCESS
        }
        Command::Healthcheck => block_on(async {
            match doctor::check_ready(&config.listen.admin).await {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(FAILED, &format!("ifnewer is not ready: {error}")),
            }
        }),
        Command::Setup(args) => cmd_setup(&config, &args),
        Command::Ca(args) => cmd_ca(&config, args),
        Command::Doctor(args) => match RootFs::open(&args.root) {
            Ok(root) => block_on(cmd_doctor(&config, &args, &root)),
            Err(refused) => fail(USAGE_ERROR, &refused),
        },
        Command::Shared(cli::Shared::Key(cli::SharedKey::New)) => match RecordKeys::generate() {
            Ok(key) => {
                let _ = writeln!(terminal::stdout(false), "{}", *key);
                ExitCode::SUCCESS
            }
            Err(error) => fail(FAILED, &error),
        },
        Command::Shared(command) => match &config.shared {
            Some(shared) => block_on(cmd_shared(&config, shared, command)),
            None => fail(USAGE_ERROR, &"no bucket is configured; set `bucket` in [shared]"),
        },
        Command::Demo { stay } => block_on(cmd_demo(stay)),
        Command::Completions { shell } => {
            cli::completions(shell, &mut terminal::stdout(false));
            ExitCode::SUCCESS
        }
        Command::Man { out } => match cli::manual(out.as_deref(), &mut terminal::stdout(false)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(FAILED, &format!("failed to write the manual pages: {error}")),
        },
        Command::Remote(command) => block_on(cmd_operate(&config, command)),
        Command::Serve => {
            if cfg!(not(feature = "jemalloc")) {
                limit_heap();
            }
            // Before any thread starts, because it reads and clears environment variables.
            let inherited = inherited_sockets();
            let log = match init_logging(&config.log) {
                Ok(log) => log,
                Err(error) => {
                    return fail(FAILED, &format!("failed to start the thread of the log: {error}"));
                }
            };
            let descriptors = raise_fd_limit();
            disable_core_dumps();
            block_on(async {
                let served = cmd_serve(cli.options, config, inherited, descriptors).await;
                served.unwrap_or_else(|(code, why)| {
                    log.end_with(&why.to_string());
                    ExitCode::from(code)
                })
            })
        }
    }
}

async fn cmd_shared(config: &Config, shared: &SharedConfig, command: cli::Shared) -> ExitCode {
    let mut out = terminal::stdout(false);
    let is_usable = match command {
        // Needs no bucket.
        cli::Shared::Key(_) => Ok(true),
        cli::Shared::Policy {
            read_only,
            maintenance,
        } => {
            let user = match (read_only, maintenance) {
                (_, true) => PolicyFor::Maintenance,
                (true, false) => PolicyFor::ReadOnlyCache,
                (false, false) => PolicyFor::Cache,
            };
            let text = shared_storage::policy(shared, user);
            out.write_all(text.as_bytes()).map(|()| true)
        }
        cli::Shared::Check => shared_storage::check(shared, &mut out).await,
        cli::Shared::Objects(command) => {
            return with_output(async |output| {
                shared_storage::run(config, shared, &command, output, interrupt()).await
            })
            .await;
        }
    };
    match is_usable {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(FAILED),
        Err(error) => fail(FAILED, &error),
    }
}

/// Waits for Ctrl-C.
async fn interrupt() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Re-executes the program with allocator settings that glibc reads only at program start. By default, glibc gives
/// many threads an arena each, which retain their peak memory. Measured with 4,000 tags: 400 views of the list leave
/// 68 MiB, and 59 with one arena; 2,000 unread responses leave 92 MiB, and 69.
fn limit_heap() {
    use std::os::unix::process::CommandExt as _;
    let (Some(settings), Ok(program)) = (cli::allocator_settings(), std::env::current_exe()) else {
        return;
    };
    let mut arguments = std::env::args_os();
    let mut again = std::process::Command::new(program);
    if let Some(name) = arguments.next() {
        again.arg0(name);
    }
    again.args(arguments).envs(settings);
    // `exec` returns only on failure. Then this process serves, with more memory.
    let _ = again.exec();
}

async fn cmd_serve(
    options: cli::Options,
    config: Config,
    inherited: InheritedSockets,
    descriptors: usize,
) -> Result<ExitCode, (u8, Box<dyn Display>)> {
    let telemetry = Telemetry::new();
    #[cfg(feature = "otlp")]
    let recording = match cli::otlp_endpoint() {
        Some(collector) => match otlp::start(&collector, &telemetry) {
            Ok(recording) => Some(recording),
            Err(error) => return Err((USAGE_ERROR, Box::new(error))),
        },
        None => None,
    };
    #[cfg(not(feature = "otlp"))]
    if cli::otlp_endpoint().is_some() {
        tracing::warn!(
            "OTEL_EXPORTER_OTLP_ENDPOINT is ignored, because this program was built without the feature `otlp`"
        );
    }
    let served = serve(
        config,
        inherited,
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
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(
            error @ (RunError::AdminExposed(_)
            | RunError::AdminToken(_)
            | RunError::Tls(_)
            | RunError::Upstream { .. }),
        ) => Err((USAGE_ERROR, Box::new(error))),
        Err(error) => Err((FAILED, Box::new(error))),
    }
}

async fn cmd_doctor(config: &Config, args: &cli::Doctor, root: &RootFs) -> ExitCode {
    let report = doctor::examine(config, &args.options(), root, Clock::system().now()).await;
    let _ = if args.json {
        writeln!(terminal::stdout(false), "{:#}", report.json())
    } else {
        write!(terminal::stdout(false), "{report}")
    };
    ExitCode::from(report.exit_code())
}

fn cmd_setup(config: &Config, args: &cli::Setup) -> ExitCode {
    let root = match RootFs::open(&args.root) {
        Ok(root) => root,
        Err(refused) => return fail(USAGE_ERROR, &refused),
    };
    let options = args.options();
    if args.undo {
        return print_result(setup::undo(args.client, args.force, &root));
    }
    if args.apply {
        return print_result(setup::apply(config, &options, &root));
    }
    let (text, objection) = setup::show(config, &options, &root);
    let _ = write!(terminal::stdout(false), "{text}");
    match objection {
        None => ExitCode::SUCCESS,
        Some(refused) => fail(FAILED, &refused),
    }
}

fn cmd_ca(config: &Config, args: cli::Ca) -> ExitCode {
    match args {
        cli::Ca::Export { out } => match (ca::export(config), out) {
            (Ok(authority), None) => {
                let _ = write!(terminal::stdout(false), "{}", authority.pem());
                ExitCode::SUCCESS
            }
            (Ok(authority), Some(path)) => match std::fs::write(&path, authority.pem()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(FAILED, &format!("failed to write {}: {error}", path.display())),
            },
            (Err(refused), _) => fail(FAILED, &refused),
        },
        cli::Ca::Install(args) => print_result(RootFs::open(&args.root).and_then(|root| {
            let cli::Trust {
                into,
                address,
                ca,
                force,
                ..
            } = args;
            ca::install(config, into, &ca::InstallOptions { address, ca, force }, &root)
        })),
        cli::Ca::Uninstall(args) => print_result(
            RootFs::open(&args.root).and_then(|root| ca::uninstall(args.into, args.force, &root)),
        ),
        cli::Ca::Rotate => match ca::rotate(config, Clock::system()) {
            Ok(old) => {
                let _ = write!(terminal::stdout(false), "{}", ca::RotateReport { old: &old });
                ExitCode::SUCCESS
            }
            Err(error) => fail(FAILED, &error),
        },
    }
}

fn print_result(done: Result<Applied, SetupError>) -> ExitCode {
    match done {
        Ok(done) => {
            let _ = write!(terminal::stdout(false), "{done}");
            ExitCode::SUCCESS
        }
        Err(refused) => fail(FAILED, &refused),
    }
}

/// Sockets passed by the service manager. Sockets of other types are ignored.
fn inherited_sockets() -> InheritedSockets {
    let mut given = ListenFd::from_env();
    let mut inherited = InheritedSockets::default();
    for index in 0..given.len() {
        if let Ok(Some(listener)) = given.take_tcp_listener(index) {
            inherited.tcp.push(listener);
        } else if let Ok(Some(listener)) = given.take_unix_listener(index) {
            inherited.unix.push(listener);
        }
    }
    inherited
}

/// Raises the file descriptor limit to the hard limit, because the usual soft limit is sized for `select`. Returns the
/// limit.
fn raise_fd_limit() -> usize {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // On failure the lower limit is used; `doctor` reports it.
    let _ = setrlimit(Resource::Nofile, limit);
    let current = getrlimit(Resource::Nofile).current;
    current.map_or(usize::MAX, |current| {
        usize::try_from(current).unwrap_or(usize::MAX)
    })
}

/// Disables core dumps, because a core would contain credentials in memory.
fn disable_core_dumps() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let _ = setrlimit(Resource::Core, none);
}

async fn cmd_demo(stay: bool) -> ExitCode {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => {
            return fail(
                FAILED,
                &format!("failed to determine the path of this program: {error}"),
            );
        }
    };
    let folder = std::env::temp_dir().join(format!("ifnewer-demo-{}", std::process::id()));
    let stay = stay.then(|| {
        let (end, ended) = tokio::sync::oneshot::channel();
        tokio::spawn(async move {
            // A closed receiver means that the demo has ended.
            let _ = tokio::signal::ctrl_c().await;
            let _ = end.send(());
        });
        ended
    });
    let colour = terminal::is_stdout_terminal() && cli::colour_allowed();
    match demo::run(program, folder, colour, &mut terminal::stdout(colour), stay).await {
        Ok(summary) if summary.wrong == 0 => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(FAILED),
        Err(error) => fail(FAILED, &error),
    }
}

async fn cmd_operate(config: &Config, command: commands::Command) -> ExitCode {
    let token = match admin::token(&config.listen) {
        Ok(token) => token,
        Err(error) => return fail(USAGE_ERROR, &error),
    };
    let client = admin::client::Client::new(config.listen.admin.clone(), token);
    with_output(async |output| commands::run(&client, &command, output).await).await
}

/// Runs a command with the output of this process. Returns its exit code.
async fn with_output(
    command: impl AsyncFnOnce(&mut commands::Output<'_>) -> Result<(), CommandError>,
) -> ExitCode {
    let is_terminal = terminal::is_stdout_terminal();
    let colour = is_terminal && cli::colour_allowed();
    let mut out = terminal::stdout(colour);
    let mut output = commands::Output {
        colour,
        progress: is_terminal && terminal::is_stderr_terminal(),
        out: &mut out,
    };
    match command(&mut output).await {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of the output has closed it: `ifnewer ls | head`.
        Err(CommandError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(
            error @ (CommandError::ReadOnly
            | CommandError::Open(_)
            | CommandError::Image(_)
            | CommandError::Digest { .. }
            | CommandError::TagRecord(TagRecordError::NoKey)),
        ) => fail(USAGE_ERROR, &error),
        Err(error) => fail(FAILED, &error),
    }
}

fn block_on(command: impl Future<Output = ExitCode>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(blocking::THREADS_MAX)
        .thread_keep_alive(blocking::THREAD_KEEP_ALIVE)
        .build();
    match runtime {
        Ok(runtime) => {
            let code = runtime.block_on(command);
            // Downloads without readers are aborted. Their partial files are resumed after the next start.
            runtime.shutdown_background();
            code
        }
        Err(error) => fail(FAILED, &format!("failed to start the runtime: {error}")),
    }
}

/// Starts the log. Its lines are written until the returned value is dropped.
fn init_logging(log: &Log) -> io::Result<LogThread> {
    // The level was validated with the configuration.
    let filter = EnvFilter::try_new(&log.level).unwrap_or_else(|_| EnvFilter::new("info"));
    let colour = terminal::is_stderr_terminal();
    let (writer, thread) = terminal::Log::start(colour)?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colour)
        .with_timer(terminal::LogTime {
            now: || Clock::system().now(),
        })
        .with_writer(writer);
    match log.format {
        LogFormat::Human => {
            let fields = terminal::LogFields;
            subscriber.with_target(false).fmt_fields(fields).init();
        }
        LogFormat::Json => subscriber.json().init(),
    }
    Ok(thread)
}

fn fail(code: u8, why: &dyn Display) -> ExitCode {
    let _ = writeln!(terminal::stderr(), "{why}");
    ExitCode::from(code)
}
