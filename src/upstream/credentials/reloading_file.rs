//! File that is reloaded when it changes.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::CredentialUnavailable;
use crate::blocking::{self, Operation};

/// Minimum interval between two checks of the file.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// Maximum size of the file.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Permits of [`Operation::CredentialFile`].
static PERMITS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Operation::CredentialFile.permits());

/// Parses the file, or describes the error without quoting the text.
type Parse<T> = Box<dyn Fn(&str) -> Result<T, String> + Send + Sync>;

/// The parsed content of a file, as of its last check.
pub(super) struct ReloadingFile<T> {
    path: PathBuf,
    parse: Parse<T>,
    loaded: Mutex<Loaded<T>>,
    /// Allows one check at a time.
    checking: tokio::sync::Mutex<()>,
}

struct Loaded<T> {
    value: Option<Arc<T>>,
    version: Option<FileVersion>,
    checked_at: Option<Instant>,
}

/// Identifies a version of the file.
#[derive(Clone, Copy, PartialEq, Eq)]
struct FileVersion {
    file: u64,
    bytes: u64,
    modified: Option<SystemTime>,
}

impl<T> ReloadingFile<T> {
    pub(super) fn new(path: PathBuf, parse: Parse<T>) -> Self {
        Self {
            path,
            parse,
            loaded: Mutex::new(Loaded {
                value: None,
                version: None,
                checked_at: None,
            }),
            checking: tokio::sync::Mutex::default(),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The parsed content. If the file cannot be read, the previous content.
    pub(super) async fn get(&self) -> Result<Arc<T>, CredentialUnavailable> {
        if let Some(value) = self.recent() {
            return Ok(value);
        }
        let _one = self.checking.lock().await;
        if let Some(value) = self.recent() {
            return Ok(value);
        }
        let (path, known) = (self.path.clone(), self.loaded.lock().version);
        let read = blocking::run(&PERMITS, move || read_if_changed(&path, known)).await;
        let update = match read {
            Ok(Ok(None)) => Ok(None),
            Ok(Ok(Some((version, text)))) => (self.parse)(&text).map(|value| Some((version, value))),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("reading it was cancelled".to_owned()),
        };
        let mut loaded = self.loaded.lock();
        loaded.checked_at = Some(Instant::now());
        match update {
            Ok(None) => {}
            Ok(Some((version, value))) => {
                loaded.version = Some(version);
                loaded.value = Some(Arc::new(value));
            }
            Err(error) => {
                let path = self.path.display();
                tracing::warn!(%path, error, "failed to reload credential file");
            }
        }
        loaded.value.clone().ok_or(CredentialUnavailable)
    }

    /// The next call checks the file.
    pub(super) fn check_soon(&self) {
        self.loaded.lock().checked_at = None;
    }

    fn recent(&self) -> Option<Arc<T>> {
        let loaded = self.loaded.lock();
        let is_recent = |at: Instant| at.elapsed() < CHECK_INTERVAL;
        loaded
            .value
            .clone()
            .filter(|_| loaded.checked_at.is_some_and(is_recent))
    }
}

fn read_if_changed(
    path: &PathBuf,
    known: Option<FileVersion>,
) -> io::Result<Option<(FileVersion, Zeroizing<String>)>> {
    let file = File::open(path)?;
    let about = file.metadata()?;
    let version = FileVersion {
        file: about.ino(),
        bytes: about.len(),
        modified: about.modified().ok(),
    };
    if known == Some(version) {
        return Ok(None);
    }
    let mut text = Zeroizing::new(String::new());
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("longer than {FILE_BYTES_MAX} bytes"),
        ));
    }
    Ok(Some((version, text)))
}
