//! The install secret: key of the principal hashes, so that they are useless outside this installation.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::fs::FileSystem;
use super::{OpenError, StoreError};

const NAME: &str = "install-secret";
const RANDOM_SOURCE: &str = "/dev/urandom";

/// Permission bits of group and others.
const GROUP_OTHER_BITS: u32 = 0o077;

/// Reads the secret, or creates it at the first start.
pub(super) fn read_or_create(fs: &dyn FileSystem) -> Result<[u8; 32], OpenError> {
    let path = Path::new(NAME);
    let shown = || {
        fs.folder()
            .map_or_else(|| path.to_owned(), |folder| folder.join(path))
    };
    let failed = |what: &'static str, error: &io::Error| match fs.folder() {
        Some(folder) => OpenError::Folder {
            folder: folder.to_owned(),
            path: shown(),
            kind: error.kind(),
        },
        None => StoreError::io(what, path, error).into(),
    };
    match fs.read_file(path, 32) {
        Ok(bytes) => {
            let mode = fs
                .mode(path)
                .map_err(|error| StoreError::io("read the mode of", path, &error))?;
            if let Some(mode) = mode.filter(|mode| mode & GROUP_OTHER_BITS != 0) {
                return Err(OpenError::SecretReadable { path: shown(), mode });
            }
            bytes
                .try_into()
                .map_err(|_| OpenError::SecretDamaged { path: shown() })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let secret = random().map_err(|error| StoreError::io("read", RANDOM_SOURCE, &error))?;
            fs.write_durable(path, &secret)
                .map_err(|error| failed("write", &error))?;
            Ok(secret)
        }
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
            Err(OpenError::SecretDamaged { path: shown() })
        }
        Err(error) => Err(failed("read", &error)),
    }
}

/// Random bytes from the system.
pub(super) fn random<const BYTES: usize>() -> io::Result<[u8; BYTES]> {
    let mut bytes = [0; BYTES];
    File::open(RANDOM_SOURCE)?.read_exact(&mut bytes)?;
    Ok(bytes)
}
