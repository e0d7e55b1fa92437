//! One process for one data folder.
//!
//! The lock is on our own file and advisory: the kernel releases it with the process, however that ends.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::OpenError;

const NAME: &str = "LOCK";

/// Holds the folder until dropped.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
}

impl Lock {
    /// Takes the folder for this process, or says which one has it.
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
            // A disk that became read-only still serves, and is still one process's.
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
            // The pid is for the eye only; a full disk must not keep the program from starting.
            let _ = write_pid(&mut file);
        }
        Ok(Self { file })
    }
}

impl Drop for Lock {
    /// By name, not by closing the file: a process that is just being started (a credential helper) has it open too until it
    /// runs its own program, and would hold the folder as long.
    fn drop(&mut self) {
        // What cannot be unlocked is unlocked by the end of the process.
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
