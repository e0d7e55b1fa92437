//! Command-line arguments and the environment variables that belong to them. Commands are implemented elsewhere.

pub mod commands;
pub mod shared_storage;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory as _, Parser, Subcommand};
pub use clap_complete::Shell;

use crate::ca::TrustStore;
use crate::config::{self, Config, Diagnostics, Flag, ROOT_DATA_DIR, Sources, TEXT_BYTES_MAX};
use crate::setup::Client;

/// System configuration file, used if neither `--config` nor `IFNEWER_CONFIG` names one. It need not exist.
pub const SYSTEM_CONFIG_FILE: &str = "/etc/ifnewer/ifnewer.toml";

/// Parsed command line.
#[derive(Clone, Debug, Parser, PartialEq, Eq)]
#[command(name = "ifnewer", version, about, max_term_width = 100)]
#[command(after_help = "Exit codes: 0 success, 1 failure, 2 wrong usage or configuration.")]
pub struct Cli {
    /// The command; `serve` if none is given.
    #[command(subcommand)]
    command: Option<Command>,
    /// Options of every command.
    #[command(flatten)]
    pub options: Options,
}

impl Cli {
    /// The given command, or the default.
    pub fn selected_command(&self) -> Command {
        self.command.clone().unwrap_or(Command::Serve)
    }
}

/// Writes shell completions.
pub fn completions(shell: Shell, out: &mut dyn std::io::Write) {
    let mut command = Cli::command();
    clap_complete::generate(shell, &mut command, "ifnewer", &mut { out });
}

/// Writes the manual page to `out`, or all pages to a folder.
pub fn manual(folder: Option<&Path>, out: &mut dyn std::io::Write) -> std::io::Result<()> {
    match folder {
        Some(folder) => {
            std::fs::create_dir_all(folder)?;
            clap_mangen::generate_to(Cli::command(), folder)
        }
        None => clap_mangen::Man::new(Cli::command()).render(&mut { out }),
    }
}

/// A command.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Run the cache (the default)
    Serve,
    /// Check the configuration and print the effective settings
    Check,
    /// Print the effective settings with their origin, or the reference of all settings
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Check whether the running cache is ready; exit 0 if it is
    Healthcheck,
    /// Configure a container client on this host to use the cache: print the changes, apply them, or undo them
    Setup(Setup),
    /// Manage the cache's certificate authority: export it, trust it on this host, replace it
    #[command(subcommand)]
    Ca(Ca),
    /// Check whether clients use the cache: configuration, trust, disk, upstreams, and a pull through Docker that must
    /// appear in the cache's log. The exit code is the number of failed checks
    Doctor(Doctor),
    /// Check the bucket of the shared storage, print the rights that it needs, count or delete its objects
    #[command(subcommand)]
    Shared(Shared),
    /// Commands for a running cache
    #[command(flatten)]
    Remote(commands::Command),
    /// Run a demo on this machine with a local registry, a cache and an outage; exit 1 if a step fails
    Demo {
        /// Keep the admin page running at the end, until Ctrl-C
        #[arg(long)]
        stay: bool,
    },
    /// Print completions for a shell
    Completions {
        /// The shell
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Print the manual page, or write one page per command
    Man {
        /// Write `ifnewer.1` and one page per command into this folder
        #[arg(long, value_name = "FOLDER")]
        out: Option<PathBuf>,
    },
}

/// `ifnewer shared`.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum Shared {
    /// Read from the bucket and, unless `write = false`, write to it; exit 1 if a cache cannot use it
    Check,
    /// Print the IAM policy of the credential and the lifecycle rule of the bucket
    Policy {
        /// For a cache with `write = false`
        #[arg(long)]
        read_only: bool,
        /// For `shared ls`, `rm` and `gc`
        #[arg(long, conflicts_with = "read_only")]
        maintenance: bool,
    },
    /// Commands for the objects of the bucket
    #[command(flatten)]
    Objects(shared_storage::ObjectCommand),
    /// Keys of the records (`key_file`)
    #[command(subcommand)]
    Key(SharedKey),
}

/// `ifnewer shared key`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub enum SharedKey {
    /// Print a fresh key, as a line of the file that `key_file` names
    New,
}

/// `ifnewer config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub enum ConfigCommand {
    /// Print the effective settings as a configuration file
    Show {
        /// Show the origin of each: flag, environment variable, line of the file, or default
        #[arg(long)]
        origin: bool,
    },
    /// Print the reference of all settings (Markdown)
    Reference,
}

/// `ifnewer doctor`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Doctor {
    /// The image to pull through Docker; removed afterwards if it was not present
    #[arg(
        long,
        value_name = "IMAGE",
        default_value = "docker.io/library/hello-world:latest"
    )]
    pub canary: String,
    /// Print one JSON object instead of lines
    #[arg(long)]
    pub json: bool,
    /// The address at which clients reach the cache, if different from the configuration
    #[arg(long, value_name = "HOST:PORT|URL")]
    pub address: Option<String>,
    /// The certificate authority (PEM), if not that of this cache
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Docker socket
    #[arg(long, value_name = "FILE", default_value = "/var/run/docker.sock")]
    pub docker: PathBuf,
    /// A folder to use instead of `/`, for example the root of an image
    #[arg(long, value_name = "FOLDER", default_value = "/")]
    pub root: PathBuf,
}

impl Doctor {
    /// The options of `doctor`.
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
    /// Apply the changes, with a backup of the current files
    #[arg(long, conflicts_with = "undo")]
    pub apply: bool,
    /// Restore the previous files byte for byte
    #[arg(long)]
    pub undo: bool,
    /// The address at which the client reaches the cache, if different from the configuration
    #[arg(long, value_name = "HOST:PORT|URL")]
    pub address: Option<String>,
    /// The certificate authority to trust (PEM), if not that of this cache
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Use `HTTPS_PROXY` instead of mirrors: covers every registry, also private ones, without a fallback
    #[arg(long)]
    pub proxy: bool,
    /// Put the cache before existing mirrors; undo although a file was modified since
    #[arg(long)]
    pub force: bool,
    /// A folder to use instead of `/`, for example the root of an image
    #[arg(long, value_name = "FOLDER", default_value = "/")]
    pub root: PathBuf,
}

impl Setup {
    /// The options of `setup`.
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
    /// Print the CA certificate (PEM), never the key
    Export {
        /// Write it to this file instead
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Trust the cache's certificates on this host
    Install(Trust),
    /// Undo `ca install`
    Uninstall(Trust),
    /// Create a new certificate authority and server certificate, and keep the old ones beside them
    Rotate,
}

/// Options of `ca install` and `ca uninstall`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Trust {
    /// The trust store
    #[arg(long, value_enum, default_value = "system")]
    pub into: TrustStore,
    /// The address at which docker or containerd reaches the cache, if different from the configuration
    #[arg(long, value_name = "HOST:PORT|URL")]
    pub address: Option<String>,
    /// The certificate authority (PEM), if not that of this cache
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Proceed although a file was modified since
    #[arg(long)]
    pub force: bool,
    /// A folder to use instead of `/`, for example the root of an image
    #[arg(long, value_name = "FOLDER", default_value = "/")]
    pub root: PathBuf,
}

/// Options of every command.
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
    /// The data folder of the cache
    #[arg(long, global = true, value_name = "FOLDER")]
    pub data: Option<String>,
    /// A listening address for clients; may be given several times
    #[arg(long, global = true, value_name = "ADDRESS:PORT")]
    pub listen: Vec<String>,
    /// The listening address for health, metrics and the admin API; or "off", or a unix socket as `unix:/path`
    #[arg(long, global = true, value_name = "ADDRESS:PORT")]
    pub admin: Option<String>,
    /// The log level: error, warn, info, debug, trace, or a filter
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

/// Whether colours are allowed on a terminal, see <https://no-color.org>.
pub fn colour_allowed() -> bool {
    #[expect(clippy::disallowed_methods, reason = "the one variable besides our own")]
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    !refused
}

/// Name of the user who runs a command, for the record. The user can choose it.
fn user_name() -> Option<String> {
    #[expect(
        clippy::disallowed_methods,
        reason = "variables of sudo and of the login shell, not our own"
    )]
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    ["SUDO_USER", "USER", "LOGNAME"].into_iter().find_map(variable)
}

/// Allocator settings that glibc reads from the environment at program start only.
const ALLOCATOR_VARIABLES: [(&str, &str); 3] = [
    ("MALLOC_ARENA_MAX", "1"),
    ("MALLOC_MMAP_THRESHOLD_", "131072"),
    ("MALLOC_TRIM_THRESHOLD_", "131072"),
];

/// Marks a re-executed program. glibc removes its own variables from the environment of a program with file
/// capabilities (`AT_SECURE`), so they cannot serve as the mark.
const REEXECUTED: (&str, &str) = ("_IFNEWER_STARTED_AGAIN", "1");

/// Allocator variables to set before re-executing the server. `None` if any of them is set already or the program was
/// re-executed.
pub fn allocator_settings() -> Option<impl Iterator<Item = (&'static str, &'static str)>> {
    #[expect(
        clippy::disallowed_methods,
        reason = "variables of the C library, not our own"
    )]
    let is_set = |(name, _): &(&str, &str)| std::env::var_os(name).is_some();
    let has_any = ALLOCATOR_VARIABLES.iter().chain([&REEXECUTED]).any(is_set);
    let settings = ALLOCATOR_VARIABLES.into_iter().chain([REEXECUTED]);
    (cfg!(target_env = "gnu") && !has_any).then_some(settings)
}

/// Trace endpoint and service name from the standard OpenTelemetry variables. `None` disables tracing.
pub fn otlp_endpoint() -> Option<(String, String)> {
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

/// Loads the configuration from the file, the environment and the flags. Called again on SIGHUP.
pub fn load(options: &Options) -> Result<Config, Diagnostics> {
    with_sources(options, Config::gather)
}

/// The effective settings from the same sources, on request with their origins.
pub fn effective_settings(options: &Options, with_origin: bool) -> Result<String, Diagnostics> {
    with_sources(options, |sources| config::show(sources, with_origin))
}

fn with_sources<T>(
    options: &Options,
    read: impl FnOnce(&Sources<'_>) -> Result<T, Diagnostics>,
) -> Result<T, Diagnostics> {
    #[allow(
        clippy::disallowed_methods,
        reason = "the one place where the environment is read for the configuration"
    )]
    let environment = std::env::vars_os();
    with_sources_from(options, environment, rustix::process::geteuid().is_root(), read)
}

/// Like [`with_sources`], with a given environment.
fn with_sources_from<T>(
    options: &Options,
    environment: impl Iterator<Item = (OsString, OsString)>,
    is_root: bool,
    read: impl FnOnce(&Sources<'_>) -> Result<T, Diagnostics>,
) -> Result<T, Diagnostics> {
    let mut variables = Vec::new();
    let mut environment_dirs = Environment {
        is_root,
        ..Environment::default()
    };
    for (name, value) in environment {
        let Some(name) = name.to_str() else { continue };
        match name {
            "HOME" => environment_dirs.home = Some(PathBuf::from(value)),
            "XDG_CACHE_HOME" => environment_dirs.cache = Some(PathBuf::from(value)),
            name if name.starts_with("IFNEWER_") => {
                let text = value.into_string().map_err(|_| {
                    let message = "the value is not UTF-8";
                    Diagnostics::of_source(Path::new(name), message, None)
                })?;
                variables.push((name.to_owned(), text));
            }
            // The credential of a bucket.
            name if name.starts_with("AWS_") => {
                if let Ok(text) = value.into_string() {
                    variables.push((name.to_owned(), text));
                }
            }
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
    let data = environment_dirs.data();
    let flags = options.flags();
    let here = Path::new(LOCAL_CERTIFICATE_FOLDER);
    read(&Sources {
        data,
        working_dir_certs: is_certificate_folder(here).then(|| here.to_owned()),
        text: &text,
        origin: &origin,
        variables,
        flags,
    })
}

/// Certificate folder of a source checkout.
const LOCAL_CERTIFICATE_FOLDER: &str = "certs";

/// Files allowed in it besides generated ones.
const ALLOWED_BESIDE_CERTIFICATES: [&str; 3] = ["README.md", ".gitignore", ".gitkeep"];

/// Whether the folder contains the cache's CA, or nothing that belongs to something else. `/etc/ssl/certs` does not
/// qualify.
fn is_certificate_folder(folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return false;
    };
    let mut names = entries.filter_map(|entry| Some(entry.ok()?.file_name()));
    folder.join("ca.key").exists()
        || names.all(|name| ALLOWED_BESIDE_CERTIFICATES.iter().any(|beside| name == *beside))
}

/// Environment values that determine the default data folder.
#[derive(Default)]
struct Environment {
    home: Option<PathBuf>,
    cache: Option<PathBuf>,
    is_root: bool,
}

impl Environment {
    /// The user's cache folder by the XDG base directory specification, which ignores relative paths.
    fn data(&self) -> PathBuf {
        let usable = |path: &Option<PathBuf>| path.clone().filter(|path| path.is_absolute());
        let of_user = || usable(&self.cache).or_else(|| usable(&self.home).map(|home| home.join(".cache")));
        match of_user() {
            Some(cache) if !self.is_root => cache.join("ifnewer"),
            _ => PathBuf::from(ROOT_DATA_DIR),
        }
    }
}

/// Name and text of the configuration file; both empty if there is none.
fn read_config(given: Option<&Path>) -> Result<(PathBuf, String), Diagnostics> {
    let path = given.unwrap_or(Path::new(SYSTEM_CONFIG_FILE));
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
            return Err(Diagnostics::of_source(
                path,
                &format!("the file cannot be read: {error}"),
                help,
            ));
        }
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok((path.to_owned(), text)),
        Err(_) => Err(Diagnostics::of_source(path, "the file is not UTF-8 text", None)),
    }
}
