//! Operator commands for a running cache. They use the admin API only.
//!
//! A command that reads prints a table or, with `--json`, the API response. Colours are used on terminals only.
//!
//! * `images`: refresh, removal and pins. `verdicts`: blocks and approvals of digests. `inspect`: lists and details. `stats`: statistics. `pull`: pull jobs with
//!   progress.
//! * `maintenance`: verification, garbage collection, offline mode. `archive`: export and import. `table`: text
//!   tables.

mod archive;
mod changes;
mod images;
mod inspect;
mod maintenance;
mod pull;
mod stats;
pub(super) mod table;
mod verdicts;

use std::io::{Read as _, Write};
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use crate::admin::client::{Client, ClientError};
use crate::bucket::{BucketError, BucketSettingsError};
use crate::config::ImageError;
use crate::oci::DigestError;
use crate::shared::maintenance::{ClockError, TagRecordError};
use crate::terminal::printable;

/// A command for a running cache.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// List cached images
    Ls(Ls),
    /// Show one image: its parts, shared data, last confirmation and policy rule
    Show(Show),
    /// Explain what a client would get now for an image, and why
    Why(Why),
    /// Show statistics: hits, bytes saved, upstreams, rate limits, clients
    Stats(Stats),
    /// Show the latest decisions: the result and reason of each request
    Log(Log),
    /// Pull images into the cache ahead of use
    Pull(Pull),
    /// Revalidate tags at the upstream now, and fetch newer images
    Refresh(Refresh),
    /// Remove images from the cache, and report the freed space
    Rm(Rm),
    /// Pin images: exclude them from eviction; they need not be cached yet
    Pin(Pin),
    /// Remove pins
    Unpin(Pin),
    /// Block digests: never serve them, by tag or digest, also in an outage and offline
    Block(Verdict),
    /// Remove blocks
    Unblock(Unblock),
    /// List blocked and approved digests
    Blocks(Blocks),
    /// Approve digests: serve them although they are younger than `min_age`
    Approve(Approve),
    /// Switch offline mode: send no upstream requests and serve cached images only
    Offline(Offline),
    /// Verify the digests of all cached objects, and quarantine damaged ones
    Verify(Verify),
    /// Export images to an archive (OCI image layout), for a cache without access to a registry
    Export(Export),
    /// Import images from an archive written by another cache or by skopeo
    Import(Import),
    /// Remove unused objects that no tag references, and report the freed space
    Gc(Gc),
}

/// `ifnewer ls`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Ls {
    /// A part of the image name
    pub filter: Option<String>,
    /// The sort order
    #[arg(long, value_enum, default_value = "name")]
    pub sort: Sort,
    /// Print the API response
    #[arg(long)]
    pub json: bool,
}

/// Sort order of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// By name
    Name,
    /// Largest first
    Size,
    /// Most recently confirmed first
    Confirmed,
}

/// `ifnewer show`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Show {
    /// The image, as in docker.io/library/alpine:3.20 or alpine
    pub image: String,
    /// Print the API response
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer why`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Why {
    /// The image, as in docker.io/library/alpine:3.20 or alpine
    pub image: String,
    /// Credential of the client
    #[command(flatten)]
    pub credential: CredentialArgs,
    /// Print the API response
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer stats`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Print the API response
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer log`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// A part of the image name
    pub image: Option<String>,
    /// Maximum number of decisions
    #[arg(short = 'n', long, default_value_t = 20)]
    pub limit: usize,
    /// Print the API response
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer pull`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Pull {
    /// The images
    #[arg(required = true)]
    pub images: Vec<String>,
    /// A platform, as in linux/arm64, or all; may be given several times [default: the platform of the cache's
    /// machine]
    #[arg(long)]
    pub platform: Vec<String>,
    /// Credential for the upstream
    #[command(flatten)]
    pub credential: CredentialArgs,
    /// Print the API response at the end, one object per line
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer refresh`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Refresh {
    /// The images, with tags
    #[arg(required = true)]
    pub images: Vec<String>,
    /// Credential for the upstream
    #[command(flatten)]
    pub credential: CredentialArgs,
    /// Print the API response, one object per line
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer rm`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Rm {
    /// The images
    #[arg(required = true)]
    pub images: Vec<String>,
    /// All tags of the repository
    #[arg(long)]
    pub all_tags: bool,
    /// Apply the removal; without it, only report the space that would be freed
    #[arg(short, long)]
    pub yes: bool,
    /// Print the API response, one object per line
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer pin` and `unpin`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The images: tags, including their later digests, or digests
    #[arg(required = true)]
    pub images: Vec<String>,
    /// Print the API response, one object per line
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer block`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The digests: IMAGE@DIGEST in one repository, or DIGEST in every repository; they need not be cached
    #[arg(required = true, value_name = "IMAGE@DIGEST|DIGEST")]
    pub images: Vec<String>,
    /// Why, for `ifnewer blocks` and the log; clients that are denied by a block read it
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// Print the API response or the error, one object per line
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer unblock`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Unblock {
    /// The digests: IMAGE@DIGEST in one repository, or DIGEST wherever it is blocked
    #[arg(required = true, value_name = "IMAGE@DIGEST|DIGEST")]
    pub images: Vec<String>,
    /// Print the API response or the error, one object per line
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer approve`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Approve {
    /// The digests
    #[command(flatten)]
    pub verdict: Verdict,
    /// Take approvals back
    #[arg(long, conflicts_with = "reason")]
    pub undo: bool,
}

/// `ifnewer blocks`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// Print the API responses
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer offline`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Offline {
    /// On or off; without it, print the current state
    #[arg(value_enum)]
    pub state: Option<OnOff>,
    /// Print the API response
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer verify`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Verify {
    /// Also rebuild the index from the files. Clients must be authorized again at the registry for private images
    #[arg(long)]
    pub rebuild_index: bool,
    /// Print the API response
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer gc`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Gc {
    /// Keep objects used within this time
    #[arg(long, value_name = "TIME", default_value = "7d")]
    pub unused_for: String,
    /// Apply the removal; without it, only report the space that would be freed
    #[arg(short, long)]
    pub yes: bool,
    /// Print the API response
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer export`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The images
    #[arg(required = true)]
    pub images: Vec<String>,
    /// The destination: a file that ends in .tar, a folder, or `-` for standard output
    #[arg(short, long, value_name = "FILE.tar|FOLDER|-", default_value = "-")]
    pub output: PathBuf,
    /// A platform, as in linux/arm64; may be given several times [default: all that are completely cached]
    #[arg(long)]
    pub platform: Vec<String>,
}

/// `ifnewer import`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// The archive: a tar file, a folder, or `-` for standard input
    #[arg(value_name = "FILE.tar|FOLDER|-")]
    pub archive: PathBuf,
    /// The name for the only image in the archive, as in docker.io/library/alpine:3.20
    #[arg(long = "as", value_name = "IMAGE")]
    pub name: Option<String>,
    /// Make the repositories readable for all clients, until their registry denies access. Without this, only clients
    /// that the registry authorizes may read them
    #[arg(long)]
    pub public: bool,
    /// Print the API response
    #[arg(long)]
    pub json: bool,
}

/// An on/off switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    /// Send no upstream requests
    On,
    /// Follow the policy rules
    Off,
}

/// A credential for the upstream. The cache uses it for this request and does not store it.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct CredentialArgs {
    /// The user name at the registry
    #[arg(long, value_name = "USER")]
    pub username: Option<String>,
    /// Read the password from a file; `-` is standard input
    #[arg(long, value_name = "FILE", requires = "username")]
    pub password_file: Option<PathBuf>,
}

impl CredentialArgs {
    /// Adds the credential to a request body.
    fn write_to(&self, body: &mut Value) -> Result<(), CommandError> {
        let (Some(username), Some(fields)) = (&self.username, body.as_object_mut()) else {
            return Ok(());
        };
        fields.insert("username".to_owned(), json!(username));
        if let Some(path) = &self.password_file {
            let mut text = String::new();
            let read = if path.as_os_str() == "-" {
                std::io::stdin().read_to_string(&mut text)
            } else {
                std::fs::File::open(path).and_then(|mut file| file.read_to_string(&mut text))
            };
            read.map_err(|error| CommandError::Password {
                path: path.clone(),
                error,
            })?;
            let password = text.trim_end_matches(['\r', '\n']);
            fields.insert("password".to_owned(), json!(password));
        }
        Ok(())
    }
}

/// Error of a command.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The admin request failed.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The bucket cannot be opened.
    #[error(transparent)]
    Open(#[from] BucketSettingsError),
    /// A request to the bucket failed.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// The image cannot be parsed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The bucket cannot be cleaned by age.
    #[error(transparent)]
    Clock(#[from] ClockError),
    /// The text begins like a digest.
    #[error("`{text}` is not a digest: {error}")]
    Digest {
        /// The text.
        text: String,
        /// The reason.
        error: DigestError,
    },
    /// A tag record cannot be used.
    #[error(transparent)]
    TagRecord(#[from] TagRecordError),
    /// The configuration forbids changes of the bucket.
    #[error("nothing is deleted, because `write = false` in [shared]")]
    ReadOnly,
    /// The command was not completed; its output contains the details.
    #[error("{0}")]
    Incomplete(String),
    /// The password file cannot be read.
    #[error("the password in {}: {error}", .path.display())]
    Password {
        /// The file.
        path: PathBuf,
        /// The reason.
        error: std::io::Error,
    },
    /// A file cannot be read or written.
    #[error("{}: {error}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The reason.
        error: std::io::Error,
    },
    /// The output cannot be written, because its reader has closed it.
    #[error(transparent)]
    Output(#[from] std::io::Error),
}

/// Output of a command.
pub struct Output<'a> {
    /// Standard output.
    pub out: &'a mut dyn Write,
    /// Whether colours are used.
    pub colour: bool,
    /// Whether progress is shown on a terminal.
    pub progress: bool,
}

impl Output<'_> {
    /// Prints one line.
    pub(super) fn line(&mut self, text: &str) -> Result<(), CommandError> {
        writeln!(self.out, "{text}")?;
        Ok(())
    }

    pub(super) fn json(&mut self, value: &Value) -> Result<(), CommandError> {
        self.line(&serde_json::to_string_pretty(value).unwrap_or_default())
    }

    fn json_line(&mut self, value: &Value) -> Result<(), CommandError> {
        self.line(&value.to_string())
    }

    /// `text`, coloured if enabled.
    pub(super) fn paint(&self, style: Style, text: &str) -> String {
        let code = match style {
            Style::Success => "32",
            Style::Warning => "33",
            Style::Error => "31",
            Style::Dim => "2",
            Style::Bold => "1",
        };
        if self.colour {
            format!("\x1b[{code}m{}\x1b[0m", printable(text))
        } else {
            text.to_owned()
        }
    }
}

#[derive(Clone, Copy)]
pub(super) enum Style {
    Success,
    Warning,
    Error,
    Dim,
    Bold,
}

/// Runs a command with `client`.
pub async fn run(client: &Client, command: &Command, output: &mut Output<'_>) -> Result<(), CommandError> {
    match command {
        Command::Ls(args) => inspect::ls(client, args, output).await,
        Command::Show(args) => inspect::show(client, args, output).await,
        Command::Why(args) => inspect::why(client, args, output).await,
        Command::Stats(args) => stats::stats(client, args, output).await,
        Command::Log(args) => inspect::log(client, args, output).await,
        Command::Pull(args) => pull::pull(client, args, output).await,
        Command::Refresh(args) => images::refresh(client, args, output).await,
        Command::Rm(args) => images::rm(client, args, output).await,
        Command::Pin(args) => images::pin(client, args, true, output).await,
        Command::Unpin(args) => images::pin(client, args, false, output).await,
        Command::Block(args) => verdicts::block(client, args, output).await,
        Command::Unblock(args) => verdicts::unblock(client, args, output).await,
        Command::Blocks(args) => verdicts::blocks(client, args, output).await,
        Command::Approve(args) => verdicts::approve(client, args, output).await,
        Command::Offline(args) => maintenance::offline(client, args, output).await,
        Command::Verify(args) => maintenance::verify(client, args, output).await,
        Command::Gc(args) => maintenance::gc(client, args, output).await,
        Command::Export(args) => archive::export(client, args, output).await,
        Command::Import(args) => archive::import(client, args, output).await,
    }
}

/// A text field of a response; empty if absent.
fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// A number field of a response; 0 if absent.
fn number(value: &Value, name: &str) -> u64 {
    value.get(name).and_then(Value::as_u64).unwrap_or_default()
}

/// A list field of a response; empty if absent.
fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value
        .get(name)
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default()
}
