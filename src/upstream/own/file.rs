//! A file that is read again when it changed.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::task::spawn_blocking;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::Unavailable;

/// A file looked at less than this ago is taken not to have changed.
const LOOK_AFTER: Duration = Duration::from_secs(5);

/// Longer files are something else.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Understands the text of a file, or says what is wrong with it, without quoting it.
type Understand<T> = Box<dyn Fn(&str) -> Result<T, String> + Send + Sync>;

/// What a file says, as it was when last looked at.
pub(super) struct Watched<T> {
    path: PathBuf,
    understand: Understand<T>,
    kept: Mutex<Kept<T>>,
    /// One look at a time.
    look: tokio::sync::Mutex<()>,
}

struct Kept<T> {
    value: Option<Arc<T>>,
    mark: Option<Mark>,
    looked_at: Option<Instant>,
}

/// What changes when a file is written or exchanged.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Mark {
    file: u64,
    bytes: u64,
    modified: Option<SystemTime>,
}

impl<T> Watched<T> {
    pub(super) fn new(path: PathBuf, understand: Understand<T>) -> Self {
        Self {
            path,
            understand,
            kept: Mutex::new(Kept {
                value: None,
                mark: None,
                looked_at: None,
            }),
            look: tokio::sync::Mutex::default(),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What the file says. While it cannot be read, what it said before.
    pub(super) async fn get(&self) -> Result<Arc<T>, Unavailable> {
        if let Some(value) = self.recent() {
            return Ok(value);
        }
        let _one = self.look.lock().await;
        if let Some(value) = self.recent() {
            return Ok(value);
        }
        let (path, known) = (self.path.clone(), self.kept().mark);
        let read = spawn_blocking(move || read_if_changed(&path, known)).await;
        let news = match read {
            Ok(Ok(None)) => Ok(None),
            Ok(Ok(Some((mark, text)))) => (self.understand)(&text).map(|value| Some((mark, value))),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("reading it ended without an answer".to_owned()),
        };
        let mut kept = self.kept();
        kept.looked_at = Some(Instant::now());
        match news {
            Ok(None) => {}
            Ok(Some((mark, value))) => {
                kept.mark = Some(mark);
                kept.value = Some(Arc::new(value));
            }
            Err(error) => {
                let path = self.path.display();
                tracing::warn!(%path, error, "the file with the proxy's own credential cannot be used; what it said before stays");
            }
        }
        kept.value.clone().ok_or(Unavailable)
    }

    /// The next one who asks looks at the file.
    pub(super) fn look_again(&self) {
        self.kept().looked_at = None;
    }

    fn recent(&self) -> Option<Arc<T>> {
        let kept = self.kept();
        let is_recent = |at: Instant| at.elapsed() < LOOK_AFTER;
        kept.value
            .clone()
            .filter(|_| kept.looked_at.is_some_and(is_recent))
    }

    /// Every change under this lock is complete in itself.
    fn kept(&self) -> std::sync::MutexGuard<'_, Kept<T>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read_if_changed(path: &PathBuf, known: Option<Mark>) -> io::Result<Option<(Mark, Zeroizing<String>)>> {
    let file = File::open(path)?;
    let about = file.metadata()?;
    let mark = Mark {
        file: about.ino(),
        bytes: about.len(),
        modified: about.modified().ok(),
    };
    if known == Some(mark) {
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
    Ok(Some((mark, text)))
}
