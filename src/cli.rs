//! The command line, and what of the environment belongs to it. Only arguments become values here; what a command does
//! is elsewhere.

pub mod commands;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory as _, Parser, Subcommand};
pub use clap_complete::Shell;

use crate::ca::TrustStore;
use crate::config::{
    self, Config, Diagnostic, Diagnostics, Flag, Location, ROOT_DATA_DIR, Sources, TEXT_BYTES_MAX,
};
use crate::setup::Client;

/// Read when neither `--config` nor `IFNEWER_CONFIG` names a file; it need not exist.
pub const CONFIG_OF_SYSTEM: &str = "/etc/ifnewer/ifnewer.toml";

/// What the program was asked to do.
#[derive(Clone, Debug, Parser, PartialEq, Eq)]
#[command(name = "ifnewer", version, about, max_term_width = 100)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.")]
pub struct Cli {
    /// The command; without one, `serve`.
    #[command(subcommand)]
    command: Option<Command>,
    /// What every command takes.
    #[command(flatten)]
    pub options: Options,
}

impl Cli {
    /// The command given, or the default.
    pub fn wanted(&self) -> Command {
        self.command.clone().unwrap_or(Command::Serve)
    }
}

/// Writes completions for a shell.
pub fn completions(shell: Shell, out: &mut dyn std::io::Write) {
    let mut command = Cli::command();
    clap_complete::generate(shell, &mut command, "ifnewer", &mut { out });
}

/// Writes the manual page to `out`, or all pages into a folder.
pub fn manual(folder: Option<&Path>, out: &mut dyn std::io::Write) -> std::io::Result<()> {
    match folder {
        Some(folder) => {
            std::fs::create_dir_all(folder)?;
            clap_mangen::generate_to(Cli::command(), folder)
        }
        None => clap_mangen::Man::new(Cli::command()).render(&mut { out }),
    }
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Run the cache (the default)
    Serve,
    /// Check the configuration and print what is in effect
    Check,
    /// Every setting: what it is now and where it comes from, or what there is to set
    #[command(subcommand)]
    Config(Settings),
    /// Ask the running cache whether it is ready; exit 0 if it is
    Healthcheck,
    /// Make a container client on this host use the cache: print what to write, write it, or take it back
    Setup(Setup),
    /// The cache's certificate authority: hand it out, let this host trust it, replace it
    #[command(subcommand)]
    Ca(Ca),
    /// Check whether the cache is really used: configuration, trust, disk, upstreams, and a pull through Docker that must
    /// appear in the cache's own log; exits with the number of failed checks
    Doctor(Doctor),
    /// What a running cache is asked and told
    #[command(flatten)]
    Operate(commands::Command),
    /// Play the whole story on this machine alone: a registry, a cache, an outage; exit 1 if a line is wrong
    Demo {
        /// Leave the page up at the end, until Ctrl-C
        #[arg(long)]
        stay: bool,
    },
    /// Print completions for a shell
    Completions {
        /// Which shell
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Print the manual page, or write one for each command
    Man {
        /// Write `ifnewer.1` and one page for each command into this folder
        #[arg(long, value_name = "FOLDER")]
        out: Option<PathBuf>,
    },
}

/// `ifnewer config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub enum Settings {
    /// Print the settings in effect, as a configuration file
    Show {
        /// Say for each where it comes from: a flag, a variable, a line of the file, or the default
        #[arg(long)]
        origin: bool,
    },
    /// Print the reference of all settings (Markdown)
    Reference,
}

/// `ifnewer doctor`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Doctor {
    /// The image to pull through Docker; removed again if it was not there
    #[arg(
        long,
        value_name = "IMAGE",
        default_value = "docker.io/library/hello-world:latest"
    )]
    pub canary: String,
    /// One JSON object instead of lines
    #[arg(long)]
    pub json: bool,
    /// Where clients reach the cache, if not as the configuration says
    #[arg(long, value_name = "HOST:PORT|URL")]
    pub address: Option<String>,
    /// The certificate authority (PEM), if not this cache's own
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Docker's socket
    #[arg(long, value_name = "FILE", default_value = "/var/run/docker.sock")]
    pub docker: PathBuf,
    /// A folder in the place of `/`
    #[arg(long, value_name = "FOLDER", default_value = "/")]
    pub root: PathBuf,
}

impl Doctor {
    /// What to look at.
    pub fn options(&self) -> crate::doctor::Options {
        crate::doctor::Options {
            address: self.address.clone(),
            ca: self.ca.clone(),
            canary: self.canary.clone(),
            docker: self.docker.clone(),
        }
    }
}

/// `ifnewer setup`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub struct Setup {
    /// The client
    #[arg(value_enum)]
    pub client: Client,
    /// Write it, keeping what was there
    #[arg(long, conflicts_with = "undo")]
    pub apply: bool,
    /// Put back what was there before, byte for byte
    #[arg(long)]
    pub undo: bool,
    /// Where the client reaches the cache, if not as the configuration says
    #[arg(long, value_name = "HOST:PORT|URL")]
    pub address: Option<String>,
    /// The certificate authority to trust (PEM), if not this cache's own
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// By `HTTPS_PROXY` instead of mirrors: every registry, also private ones, and no way around it
    #[arg(long)]
    pub proxy: bool,
    /// Go before mirrors that are already there; undo although a file was changed since
    #[arg(long)]
    pub force: bool,
    /// A folder in the place of `/`, as for an image
    #[arg(long, value_name = "FOLDER", default_value = "/")]
    pub root: PathBuf,
}

impl Setup {
    /// What to set up, and how.
    pub fn options(&self) -> crate::setup::Options {
        crate::setup::Options {
            client: self.client,
            address: self.address.clone(),
            ca: self.ca.clone(),
            by_proxy: self.proxy,
            force: self.force,
        }
    }
}

/// `ifnewer ca`.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum Ca {
    /// Print the certificate (PEM), never the key
    Export {
        /// Write it there instead
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Let this host trust the cache's certificates
    Install(Trust),
    /// Take that back
    Uninstall(Trust),
    /// Make a new certificate authority and server certificate, keeping the old ones beside them
    Rotate,
}

/// Who is to trust the certificate authority, and where.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Trust {
    /// Whose trust store
    #[arg(long, value_enum, default_value = "system")]
    pub into: TrustStore,
    /// Where docker or containerd reaches the cache, if not as the configuration says
    #[arg(long, value_name = "HOST:PORT|URL")]
    pub address: Option<String>,
    /// The certificate authority (PEM), if not this cache's own
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Go over objections: a file that was changed since
    #[arg(long)]
    pub force: bool,
    /// A folder in the place of `/`, as for an image
    #[arg(long, value_name = "FOLDER", default_value = "/")]
    pub root: PathBuf,
}

/// What every command takes. Each overrides the environment, which overrides the file.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The configuration file [default: /etc/ifnewer/ifnewer.toml if it exists]
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "IFNEWER_CONFIG",
        hide_env_values = true
    )]
    pub config: Option<PathBuf>,
    /// The cache's folder
    #[arg(long, global = true, value_name = "FOLDER")]
    pub data: Option<String>,
    /// An address for clients; may be given several times
    #[arg(long, global = true, value_name = "ADDRESS:PORT")]
    pub listen: Vec<String>,
    /// The address for health, metrics and the admin API; or "off", or a unix socket as `unix:/path`
    #[arg(long, global = true, value_name = "ADDRESS:PORT")]
    pub admin: Option<String>,
    /// How much is told: error, warn, info, debug, trace, or a filter
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log: Option<String>,
}

impl Options {
    fn flags(&self) -> Vec<Flag> {
        let flag = |name, key, value: &Option<String>| value.clone().map(|value| Flag { name, key, value });
        let listen = (!self.listen.is_empty()).then(|| self.listen.join(","));
        [
            flag("--data", "data", &self.data),
            flag("--listen", "listen.registry", &listen),
            flag("--admin", "listen.admin", &self.admin),
            flag("--log", "log.level", &self.log),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// Whether a terminal may be given colours, by <https://no-color.org>.
pub fn wants_colour() -> bool {
    #[expect(clippy::disallowed_methods, reason = "the one variable besides our own")]
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    !refused
}

/// Settings of glibc's allocator, which reads them from the environment at the start of a program and nowhere else.
const HEAP: [(&str, &str); 3] = [
    ("MALLOC_ARENA_MAX", "1"),
    ("MALLOC_MMAP_THRESHOLD_", "131072"),
    ("MALLOC_TRIM_THRESHOLD_", "131072"),
];

/// Whether the program has started itself again. glibc takes its own variables out of the environment of a program with
/// capabilities of its file (`AT_SECURE`), so they cannot say it.
const STARTED_AGAIN: (&str, &str) = ("_IFNEWER_STARTED_AGAIN", "1");

/// Variables that a server needs for its allocator and was not started with; none where it was started with any of them, or
/// has started itself again.
pub fn heap_settings() -> Option<impl Iterator<Item = (&'static str, &'static str)>> {
    #[expect(
        clippy::disallowed_methods,
        reason = "variables of the C library, not our own"
    )]
    let is_set = |(name, _): &(&str, &str)| std::env::var_os(name).is_some();
    let has_any = HEAP.iter().chain([&STARTED_AGAIN]).any(is_set);
    let settings = HEAP.into_iter().chain([STARTED_AGAIN]);
    (cfg!(target_env = "gnu") && !has_any).then_some(settings)
}

/// Where traces are sent, and as which service, by the variables that every program with OpenTelemetry reads. `None`: nowhere.
pub fn collector() -> Option<(String, String)> {
    #[expect(
        clippy::disallowed_methods,
        reason = "named by OpenTelemetry's specification, for whoever sets them for all programs of a host"
    )]
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let is_off = variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"))
        || variable("OTEL_TRACES_EXPORTER").is_some_and(|value| value == "none");
    if is_off {
        return None;
    }
    let of_all = || variable("OTEL_EXPORTER_OTLP_ENDPOINT");
    let url = variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        .or_else(|| Some(format!("{}/v1/traces", of_all()?.trim_end_matches('/'))))?;
    let service = variable("OTEL_SERVICE_NAME").unwrap_or_else(|| "ifnewer".to_owned());
    Some((url, service))
}

/// Reads the file, the environment and the flags. Called again on SIGHUP.
pub fn load(options: &Options) -> Result<Config, Diagnostics> {
    gathered(options, Config::gather)
}

/// The settings in effect, from the same sources.
pub fn settings(options: &Options) -> Result<config::Settings, Diagnostics> {
    gathered(options, config::Settings::read)
}

fn gathered<T>(
    options: &Options,
    read: impl FnOnce(&Sources<'_>) -> Result<T, Diagnostics>,
) -> Result<T, Diagnostics> {
    #[allow(
        clippy::disallowed_methods,
        reason = "the one place where the environment is read for the configuration"
    )]
    let environment = std::env::vars_os();
    gathered_from(options, environment, rustix::process::geteuid().is_root(), read)
}

/// The same with an environment of one's own.
fn gathered_from<T>(
    options: &Options,
    environment: impl Iterator<Item = (OsString, OsString)>,
    is_root: bool,
    read: impl FnOnce(&Sources<'_>) -> Result<T, Diagnostics>,
) -> Result<T, Diagnostics> {
    let mut variables = Vec::new();
    let mut surroundings = Surroundings {
        is_root,
        ..Surroundings::default()
    };
    for (name, value) in environment {
        let Some(name) = name.to_str() else { continue };
        match name {
            "HOME" => surroundings.home = Some(PathBuf::from(value)),
            "XDG_CACHE_HOME" => surroundings.cache = Some(PathBuf::from(value)),
            name if name.starts_with("IFNEWER_") => match value.into_string() {
                Ok(value) => variables.push((name.to_owned(), value)),
                Err(_) => {
                    return Err(fault(
                        Location::Variable(name.to_owned()),
                        name,
                        "the value is not UTF-8",
                        None,
                    ));
                }
            },
            _ => {}
        }
    }
    variables.sort();
    let (origin, text) = read_config(
        options
            .config
            .as_deref()
            .filter(|path| !path.as_os_str().is_empty()),
    )?;
    let data = surroundings.data();
    let flags = options.flags();
    let here = Path::new(CERTIFICATES_HERE);
    read(&Sources {
        data,
        working_dir_certs: may_be_ours(here).then(|| here.to_owned()),
        text: &text,
        origin: &origin,
        variables,
        flags,
    })
}

/// The folder that a checkout has for certificates.
const CERTIFICATES_HERE: &str = "certs";

/// What may lie in it beside what we write.
const BESIDE_CERTIFICATES: [&str; 3] = ["README.md", ".gitignore", ".gitkeep"];

/// Whether our CA is in this folder, or the folder is empty enough to be meant for it. `/etc/ssl/certs` is not.
fn may_be_ours(folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return false;
    };
    let mut names = entries.filter_map(|entry| Some(entry.ok()?.file_name()));
    folder.join("ca.key").exists()
        || names.all(|name| BESIDE_CERTIFICATES.iter().any(|beside| name == *beside))
}

/// What decides where a cache is that nobody has placed.
#[derive(Default)]
struct Surroundings {
    home: Option<PathBuf>,
    cache: Option<PathBuf>,
    is_root: bool,
}

impl Surroundings {
    /// The user's cache folder by the XDG base directory specification, which says that relative paths are ignored.
    fn data(&self) -> PathBuf {
        let usable = |path: &Option<PathBuf>| path.clone().filter(|path| path.is_absolute());
        let of_user = || usable(&self.cache).or_else(|| usable(&self.home).map(|home| home.join(".cache")));
        match of_user() {
            Some(cache) if !self.is_root => cache.join("ifnewer"),
            _ => PathBuf::from(ROOT_DATA_DIR),
        }
    }
}

/// The file's name and text; both empty without one.
fn read_config(given: Option<&Path>) -> Result<(PathBuf, String), Diagnostics> {
    let path = given.unwrap_or(Path::new(CONFIG_OF_SYSTEM));
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path)
        .and_then(|file| file.take(TEXT_BYTES_MAX as u64 + 1).read_to_end(&mut bytes));
    match read {
        Ok(_) => {}
        Err(error) if given.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
            return Ok((PathBuf::new(), String::new()));
        }
        Err(error) => {
            let help = given
                .map(|_| "`ifnewer` needs no file: without --config the built-in settings hold".to_owned());
            return Err(fault(
                Location::File(path.to_owned()),
                "",
                &format!("cannot be read: {error}"),
                help,
            ));
        }
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok((path.to_owned(), text)),
        Err(_) => Err(fault(
            Location::File(path.to_owned()),
            "",
            "is not UTF-8 text",
            None,
        )),
    }
}

fn fault(place: Location, key: &str, message: &str, help: Option<String>) -> Diagnostics {
    Diagnostics::one(Diagnostic {
        location: place,
        key: key.to_owned(),
        message: message.to_owned(),
        help,
    })
}
