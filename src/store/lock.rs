//! Lock file: one process per data folder.
//!
//! The lock is an advisory `flock` on the file `LOCK`. The kernel releases it when the process ends.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::OpenError;

const NAME: &str = "LOCK";

/// Locks the data folder until dropped.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
}

impl Lock {
    /// Locks the data folder, or returns the process that has locked it.
    pub(super) fn take(folder: &Path) -> Result<Self, OpenError> {
        let path = folder.join(NAME);
        let failed = |error: io::Error| OpenError::Folder {
            folder: folder.to_owned(),
            path: path.clone(),
            kind: error.kind(),
        };
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path);
        let (mut file, is_writable) = match opened {
            Ok(file) => (file, true),
            // The store can still serve from a read-only disk, and still needs the lock.
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                (File::open(&path).map_err(failed)?, false)
            }
            Err(error) => return Err(failed(error)),
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(OpenError::Locked {
                    folder: folder.to_owned(),
                    pid: read_pid(&mut file),
                });
            }
            Err(errno) => return Err(failed(errno.into())),
        }
        if is_writable {
            // The pid is informational. A full disk must not prevent the start.
            let _ = write_pid(&mut file);
        }
        Ok(Self { file })
    }
}

impl Drop for Lock {
    /// Unlocks explicitly. Closing the file is not enough, because a child process between fork and exec (a
    /// credential helper) inherits the descriptor and would keep the lock.
    fn drop(&mut self) {
        // If this fails, the end of the process releases the lock.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

fn write_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}
