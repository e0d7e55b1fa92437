//! `export` and `import` commands: transfer of archives between the API and files, folders or pipes.
//!
//! An export gets its final name only when it is complete.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use tokio::task::spawn_blocking;

use super::{CommandError, Export, Import, Output, Style, list, number, text};
use crate::admin::client::{Client, Download};
use crate::admin::format::{bytes, short_digest};
use crate::archive::layout::EntryKind;
use crate::archive::pipe::{PipeReader, PipeWriter, pipe};
use crate::oci::percent;
use crate::terminal;

const STANDARD: &str = "-";

pub(super) async fn export(
    client: &Client,
    args: &Export,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let target = Target::of(&args.output)?;
    let mut path = format!(
        "/api/v1/export?image={}",
        percent::query_value(&args.images.join(","))
    );
    if !args.platform.is_empty() {
        path.push_str("&platform=");
        path.extend(percent::query_value(&args.platform.join(",")));
    }
    let mut download = client.download(&path).await?;
    let bar = bar(
        output.progress && !matches!(target, Target::Standard),
        download.bytes,
    );
    let written = match &target {
        Target::Standard => {
            copy(
                &mut download,
                &bar,
                &mut terminal::raw_stdout(),
                Path::new(STANDARD),
            )
            .await
        }
        Target::File { part, .. } => {
            let mut file = File::create(part).map_err(|error| failed(part, error))?;
            let copied = copy(&mut download, &bar, &mut file, part).await;
            copied.and_then(|()| file.sync_all().map_err(|error| failed(part, error)))
        }
        Target::Folder { part, .. } => unpacked(&mut download, &bar, part).await,
    };
    bar.finish_and_clear();
    target.settle(written)?;
    if !matches!(target, Target::Standard) {
        let size = bytes(download.bytes.unwrap_or_default());
        output.line(&format!(
            "{}: {}",
            args.output.display(),
            output.paint(Style::Bold, &size)
        ))?;
    }
    Ok(())
}

pub(super) async fn import(
    client: &Client,
    args: &Import,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let mut path = format!("/api/v1/import?public={}", args.public);
    if let Some(name) = &args.name {
        path.push_str("&image=");
        path.extend(percent::query_value(name));
    }
    let source = Source::of(&args.archive)?;
    let bar = bar(output.progress, source.bytes());
    let (chunks, archive) = pipe();
    let mut writer = PipeWriter::new(chunks);
    let reading = {
        let bar = bar.clone();
        spawn_blocking(move || {
            let read = source.write(&mut bar.wrap_write(&mut writer));
            let result = read.as_ref().copied();
            writer.finish(result.map_err(|error| error.kind().into()));
            read
        })
    };
    let imported = client.upload(&path, archive).await;
    bar.finish_and_clear();
    let imported = match imported {
        Ok(imported) => imported,
        // An unreadable local archive is not an error of the cache.
        Err(_) if reading.is_finished() => match (reading.await, imported) {
            (Ok(Err(error)), _) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(failed(&args.archive, error));
            }
            (_, imported) => imported?,
        },
        Err(error) => return Err(error.into()),
    };
    if args.json {
        return output.json(&imported);
    }
    for image in list(&imported, "images") {
        output.line(&line(image, output))?;
    }
    let (all, new) = (number(&imported, "objects"), number(&imported, "new_objects"));
    let summary = format!(
        "{} new in {new} of {all} manifests and blobs",
        bytes(number(&imported, "new_bytes"))
    );
    output.line(&output.paint(Style::Dim, &summary))
}

fn line(image: &Value, output: &Output<'_>) -> String {
    let was_cached = image.get("already_cached").and_then(Value::as_bool) == Some(true);
    let platforms: Vec<&str> = list(image, "platforms")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let platforms = if platforms.is_empty() {
        String::new()
    } else {
        format!(" ({})", platforms.join(", "))
    };
    format!(
        "{} {}{platforms}: {}",
        text(image, "image"),
        short_digest(text(image, "digest")),
        output.paint(
            Style::Success,
            if was_cached { "already cached" } else { "imported" }
        )
    )
}

/// Destination of an export.
enum Target {
    Standard,
    File { part: PathBuf, complete: PathBuf },
    Folder { part: PathBuf, complete: PathBuf },
}

impl Target {
    fn of(path: &Path) -> Result<Self, CommandError> {
        if path.as_os_str() == STANDARD {
            if terminal::is_stdout_terminal() {
                return Err(CommandError::Incomplete(
                    "refusing to write an archive to a terminal; use --output".to_owned(),
                ));
            }
            return Ok(Self::Standard);
        }
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let (part, complete) = (PathBuf::from(part), path.to_owned());
        if path.extension().is_some_and(|extension| extension == "tar") {
            return Ok(Self::File { part, complete });
        }
        let is_free = match fs::read_dir(path) {
            Ok(mut entries) => entries.next().is_none(),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        if is_free {
            Ok(Self::Folder { part, complete })
        } else {
            Err(failed(path, io::ErrorKind::AlreadyExists.into()))
        }
    }

    /// Renames the complete export to its final name, or removes it on failure.
    fn settle(&self, written: Result<(), CommandError>) -> Result<(), CommandError> {
        let (part, complete) = match self {
            Self::Standard => return written,
            Self::File { part, complete } | Self::Folder { part, complete } => (part, complete),
        };
        let named =
            written.and_then(|()| fs::rename(part, complete).map_err(|error| failed(complete, error)));
        if named.is_err() {
            // Report the first error.
            let _ = match self {
                Self::Folder { .. } => fs::remove_dir_all(part),
                _ => fs::remove_file(part),
            };
        }
        named
    }
}

async fn copy(
    download: &mut Download,
    bar: &ProgressBar,
    into: &mut dyn Write,
    path: &Path,
) -> Result<(), CommandError> {
    while let Some(chunk) = download.next().await? {
        into.write_all(&chunk).map_err(|error| failed(path, error))?;
        bar.inc(chunk.len() as u64);
    }
    into.flush().map_err(|error| failed(path, error))
}

async fn unpacked(download: &mut Download, bar: &ProgressBar, folder: &Path) -> Result<(), CommandError> {
    let (chunks, archive) = pipe();
    let mut archive = PipeReader::new(archive);
    let into = folder.to_owned();
    let unpacking = spawn_blocking(move || unpack(&mut archive, &into));
    let mut broken = Ok(());
    loop {
        match download.next().await {
            Ok(None) => break,
            Ok(Some(chunk)) => {
                bar.inc(chunk.len() as u64);
                if chunks.send(Ok(chunk)).await.is_err() {
                    break;
                }
            }
            Err(error) => {
                broken = Err(error.into());
                break;
            }
        }
    }
    drop(chunks);
    let unpacked = unpacking
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)));
    broken.and(unpacked.map_err(|error| failed(folder, error)))
}

/// Unpacks files of an OCI image layout only, so that no name leads out of the folder.
fn unpack(archive: &mut impl Read, folder: &Path) -> io::Result<()> {
    let mut archive = tar::Archive::new(archive);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        if !matches!(
            EntryKind::of(&name),
            Some(EntryKind::Layout | EntryKind::Index | EntryKind::Blob(_))
        ) {
            return Err(io::Error::other(format!(
                "`{name}` is not part of an OCI image layout"
            )));
        }
        let path = folder.join(&name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let mut file = File::create(&path)?;
        io::copy(&mut entry, &mut file)?;
        file.sync_all()?;
    }
    Ok(())
}

/// Source of an import.
enum Source {
    Stream(Box<dyn Read + Send>, Option<u64>),
    Folder(Vec<(String, PathBuf, u64)>),
}

impl Source {
    fn of(path: &Path) -> Result<Self, CommandError> {
        if path.as_os_str() == STANDARD {
            return Ok(Self::Stream(Box::new(io::stdin()), None));
        }
        let metadata = fs::metadata(path).map_err(|error| failed(path, error))?;
        if metadata.is_dir() {
            let mut files = Vec::new();
            gather(path, "", &mut files).map_err(|error| failed(path, error))?;
            return Ok(Self::Folder(files));
        }
        let file = File::open(path).map_err(|error| failed(path, error))?;
        Ok(Self::Stream(Box::new(file), Some(metadata.len())))
    }

    fn bytes(&self) -> Option<u64> {
        match self {
            Self::Stream(_, bytes) => *bytes,
            Self::Folder(files) => Some(files.iter().map(|(_, _, bytes)| bytes).sum()),
        }
    }

    fn write(self, out: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Stream(mut from, _) => io::copy(&mut from, out).map(drop),
            Self::Folder(files) => {
                let mut archive = tar::Builder::new(out);
                for (name, path, bytes) in files {
                    let mut header = tar::Header::new_gnu();
                    header.set_size(bytes);
                    header.set_mode(0o644);
                    archive.append_data(&mut header, &name, File::open(path)?.take(bytes))?;
                }
                archive.into_inner()?.flush()
            }
        }
    }
}

/// The layout files of a folder, sorted by name. Other files are ignored.
fn gather(folder: &Path, name: &str, files: &mut Vec<(String, PathBuf, u64)>) -> io::Result<()> {
    let mut entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let Ok(own) = entry.file_name().into_string() else {
            continue;
        };
        let (name, metadata) = (format!("{name}{own}"), entry.metadata()?);
        match EntryKind::of(&name) {
            Some(EntryKind::Folder) if metadata.is_dir() => {
                gather(&entry.path(), &format!("{name}/"), files)?;
            }
            Some(EntryKind::Layout | EntryKind::Index | EntryKind::Blob(_)) if metadata.is_file() => {
                files.push((name, entry.path(), metadata.len()));
            }
            _ => {}
        }
    }
    Ok(())
}

fn bar(is_shown: bool, bytes: Option<u64>) -> ProgressBar {
    if !is_shown {
        return ProgressBar::hidden();
    }
    let bar = bytes.map_or_else(ProgressBar::no_length, ProgressBar::new);
    let style = ProgressStyle::with_template(
        "{wide_bar:.cyan/dim} {binary_bytes:>11} of {binary_total_bytes:<11} {binary_bytes_per_sec:>13}",
    );
    // The template is constant. If it were invalid, a plain bar would be used.
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn failed(path: &Path, error: io::Error) -> CommandError {
    CommandError::File {
        path: path.to_owned(),
        error,
    }
}
