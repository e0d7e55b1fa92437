//! The operator's commands: what a running cache is asked and told from the command line. All of it goes through the
//! admin API; nothing here knows more than that says.
//!
//! Each command that reads prints a table for people or, with `--json`, the API's own answer. Colours are for terminals.
//!
//! * `table`: columns. * `pull`: progress. * `upkeep`: what the store is to do. * `archive`: images in files. * `show`: the rest.

mod archive;
mod pull;
mod show;
mod stats;
mod steer;
mod table;
mod upkeep;

use std::io::{Read as _, Write};
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use crate::admin::client::{Client, ClientError};
use crate::terminal::printable;

/// What can be asked and told.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// List the images held
    Ls(Ls),
    /// Show one image: what it is made of, what it shares, when it was confirmed, which rule holds
    Show(Show),
    /// Explain what a client would get now for an image, and why
    Why(Why),
    /// Show how the cache is doing: hits, bytes saved, upstreams, quotas, clients
    Stats(Stats),
    /// Show the last decisions: what each client got, and why
    Log(Log),
    /// Bring images into the cache before anybody asks
    Pull(Pull),
    /// Ask the upstream now what a tag names, and fetch what is newer
    Refresh(Refresh),
    /// Let go of an image, and say what that frees
    Rm(Rm),
    /// Keep images, whatever else has to go; they need not be held yet
    Pin(Pin),
    /// End that
    Unpin(Pin),
    /// Ask no upstream at all, serve what is held; or end that
    Offline(Offline),
    /// Read everything held, and set aside what is not what its name says
    Verify(Verify),
    /// Write images into an archive (an OCI image layout), for a cache that no registry reaches
    Export(Export),
    /// Read images out of such an archive, from another cache or by skopeo
    Import(Import),
    /// Let go of what no tag leads to and nobody uses, and say what that frees
    Gc(Gc),
}

/// `ifnewer ls`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Ls {
    /// A part of the name
    pub filter: Option<String>,
    /// In which order
    #[arg(long, value_enum, default_value = "name")]
    pub sort: Sort,
    /// Print the API's answer
    #[arg(long)]
    pub json: bool,
}

/// The order of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sort {
    /// By name
    Name,
    /// The largest first
    Size,
    /// The last confirmed first
    Confirmed,
}

/// `ifnewer show`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Show {
    /// The image, as in docker.io/library/alpine:3.20 or alpine
    pub image: String,
    /// Print the API's answer
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer why`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Why {
    /// The image, as in docker.io/library/alpine:3.20 or alpine
    pub image: String,
    /// For a client with which credential
    #[command(flatten)]
    pub login: Login,
    /// Print the API's answer
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer stats`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Print the API's answer
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer log`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// A part of the image's name
    pub image: Option<String>,
    /// How many
    #[arg(short = 'n', long, default_value_t = 20)]
    pub limit: usize,
    /// Print the API's answer
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer pull`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Pull {
    /// The images
    #[arg(required = true)]
    pub images: Vec<String>,
    /// A platform, as in linux/arm64, or all; may be given several times [default: that of the cache's machine]
    #[arg(long)]
    pub platform: Vec<String>,
    /// With which credential
    #[command(flatten)]
    pub login: Login,
    /// Print the API's answer at the end, one object a line
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer refresh`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Refresh {
    /// The images, with tags
    #[arg(required = true)]
    pub images: Vec<String>,
    /// With which credential
    #[command(flatten)]
    pub login: Login,
    /// Print the API's answer, one object a line
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
    /// Do it; without this, only say what it would free
    #[arg(short, long)]
    pub yes: bool,
    /// Print the API's answer, one object a line
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer pin` and `unpin`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The images: tags, with what they name now and later, or digests
    #[arg(required = true)]
    pub images: Vec<String>,
    /// Print the API's answer, one object a line
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer offline`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Offline {
    /// On or off; without it, say which
    #[arg(value_enum)]
    pub state: Option<OnOff>,
    /// Print the API's answer
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer verify`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Verify {
    /// Make the index anew from the files too; who pulled private images is asked for at the registry again
    #[arg(long)]
    pub rebuild_index: bool,
    /// Print the API's answer
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer gc`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Gc {
    /// What was used within this time stays
    #[arg(long, value_name = "TIME", default_value = "7d")]
    pub unused_for: String,
    /// Do it; without this, only say what it would free
    #[arg(short, long)]
    pub yes: bool,
    /// Print the API's answer
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer export`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The images
    #[arg(required = true)]
    pub images: Vec<String>,
    /// Where to: a file that ends in .tar, a folder, or `-` for the standard output
    #[arg(short, long, value_name = "FILE.tar|FOLDER|-", default_value = "-")]
    pub output: PathBuf,
    /// A platform, as in linux/arm64; may be given several times [default: all that are held whole]
    #[arg(long)]
    pub platform: Vec<String>,
}

/// `ifnewer import`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// The archive: a tar file, a folder, or `-` for the standard input
    #[arg(value_name = "FILE.tar|FOLDER|-")]
    pub archive: PathBuf,
    /// What the only image in it is called here, as in docker.io/library/alpine:3.20
    #[arg(long = "as", value_name = "IMAGE")]
    pub name: Option<String>,
    /// Everybody may read the repositories, until their registry says otherwise. Without this, only those to whom the
    /// registry says yes
    #[arg(long)]
    pub public: bool,
    /// Print the API's answer
    #[arg(long)]
    pub json: bool,
}

/// A switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    /// No upstream is asked
    On,
    /// As the rules say
    Off,
}

/// A credential at the upstream. It is given to the cache for this once, and kept by nobody.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Login {
    /// The user at the registry
    #[arg(long, value_name = "USER")]
    pub username: Option<String>,
    /// Read the password from a file; `-` is the standard input
    #[arg(long, value_name = "FILE", requires = "username")]
    pub password_file: Option<PathBuf>,
}

impl Login {
    /// Adds the credential to a request's body.
    fn add_to(&self, body: &mut Value) -> Result<(), Failed> {
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
            read.map_err(|error| Failed::Password {
                path: path.clone(),
                error,
            })?;
            let password = text.trim_end_matches(['\r', '\n']);
            fields.insert("password".to_owned(), json!(password));
        }
        Ok(())
    }
}

/// Why a command is not done.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    /// The cache said no, or nothing.
    #[error(transparent)]
    Ask(#[from] ClientError),
    /// What was asked for did not come about, and has been told.
    #[error("{0}")]
    Undone(String),
    /// The password cannot be read.
    #[error("the password in {}: {error}", .path.display())]
    Password {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A file of the operator's cannot be read or written.
    #[error("{}: {error}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The output cannot be written, for whoever read it is gone.
    #[error(transparent)]
    Output(#[from] std::io::Error),
}

/// Where the answer goes, and how it may look there.
pub struct Output<'a> {
    /// Standard output.
    pub out: &'a mut dyn Write,
    /// Whether that takes colours.
    pub colour: bool,
    /// Whether a terminal shows progress.
    pub progress: bool,
}

impl Output<'_> {
    /// One line.
    fn line(&mut self, text: &str) -> Result<(), Failed> {
        writeln!(self.out, "{text}")?;
        Ok(())
    }

    fn json(&mut self, value: &Value) -> Result<(), Failed> {
        self.line(&serde_json::to_string_pretty(value).unwrap_or_default())
    }

    fn json_line(&mut self, value: &Value) -> Result<(), Failed> {
        self.line(&value.to_string())
    }

    /// `text`, coloured where that is wanted.
    fn paint(&self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Good => "32",
            Tone::Warm => "33",
            Tone::Bad => "31",
            Tone::Dim => "2",
            Tone::Strong => "1",
        };
        if self.colour {
            format!("\x1b[{code}m{}\x1b[0m", printable(text))
        } else {
            text.to_owned()
        }
    }
}

#[derive(Clone, Copy)]
enum Tone {
    Good,
    Warm,
    Bad,
    Dim,
    Strong,
}

/// Runs a command against the cache that `client` reaches.
pub async fn run(client: &Client, command: &Command, output: &mut Output<'_>) -> Result<(), Failed> {
    match command {
        Command::Ls(words) => show::ls(client, words, output).await,
        Command::Show(words) => show::show(client, words, output).await,
        Command::Why(words) => show::why(client, words, output).await,
        Command::Stats(words) => stats::stats(client, words, output).await,
        Command::Log(words) => show::log(client, words, output).await,
        Command::Pull(words) => pull::pull(client, words, output).await,
        Command::Refresh(words) => steer::refresh(client, words, output).await,
        Command::Rm(words) => steer::rm(client, words, output).await,
        Command::Pin(words) => steer::pin(client, words, true, output).await,
        Command::Unpin(words) => steer::pin(client, words, false, output).await,
        Command::Offline(words) => steer::offline(client, words, output).await,
        Command::Verify(words) => upkeep::verify(client, words, output).await,
        Command::Gc(words) => upkeep::gc(client, words, output).await,
        Command::Export(words) => archive::export(client, words, output).await,
        Command::Import(words) => archive::import(client, words, output).await,
    }
}

/// For a query.
fn escaped(text: &str) -> String {
    let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_' | b'/' | b':');
    let part = |c: u8| {
        if plain(c) {
            char::from(c).to_string()
        } else {
            format!("%{c:02X}")
        }
    };
    text.bytes().map(part).collect()
}

/// A field of an answer as text; empty where there is none.
fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// A field of an answer as a number; 0 where there is none.
fn number(value: &Value, name: &str) -> u64 {
    value.get(name).and_then(Value::as_u64).unwrap_or_default()
}

/// A field of an answer as a list; empty where there is none.
fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value
        .get(name)
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default()
}
