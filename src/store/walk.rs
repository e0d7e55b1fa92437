//! Walk over the files of a tree, in order of their names: `<tree>/<two digits>/<name>` for records, and
//! `<tree>/<algorithm>/<two digits>/<hex>` for content.
//!
//! A folder that cannot be listed is an error in its place. The caller decides if that ends the walk.

use std::io;
use std::path::{Path, PathBuf};

use super::fs::{Entry, FileSystem};
use crate::oci::{Algorithm, Digest};

/// The files of all folders in `tree`.
pub(super) fn record_files<'a>(
    fs: &'a dyn FileSystem,
    tree: &str,
) -> impl Iterator<Item = io::Result<(PathBuf, Entry)>> + use<'a> {
    files_from(fs, PathBuf::from(tree), String::new())
}

/// The content files in `tree` after `after`, in order of their digests. Skips metadata files, and files that the
/// store would not find under their digest.
pub(super) fn content_files<'a>(
    fs: &'a dyn FileSystem,
    tree: &'static str,
    after: Option<Digest>,
) -> impl Iterator<Item = io::Result<(Digest, Entry)>> + use<'a> {
    let algorithms = [Algorithm::Sha256, Algorithm::Sha512].into_iter();
    let algorithms =
        algorithms.filter(move |algorithm| after.is_none_or(|after| after.algorithm() <= *algorithm));
    algorithms.flat_map(move |algorithm| {
        let within = after.filter(|after| after.algorithm() == algorithm);
        let first = within.map(|after| shard(&after)).unwrap_or_default();
        let files = files_from(fs, Path::new(tree).join(algorithm.as_str()), first);
        files.filter_map(move |file| match file {
            Ok((path, entry)) => {
                let digest = Digest::from_hex(algorithm, &entry.name).ok()?;
                let is_in_place = path
                    .parent()
                    .is_some_and(|folder| folder.ends_with(shard(&digest)));
                let is_after = within.is_none_or(|after| digest > after);
                (is_in_place && is_after).then_some(Ok((digest, entry)))
            }
            Err(error) => Some(Err(error)),
        })
    })
}

/// Name of the folder of a digest.
fn shard(digest: &Digest) -> String {
    let first = digest.as_bytes().first().copied().unwrap_or_default();
    format!("{first:02x}")
}

/// The files of the folders in `tree` from the folder `first` on. Other folders are not the store's.
fn files_from(
    fs: &dyn FileSystem,
    tree: PathBuf,
    first: String,
) -> impl Iterator<Item = io::Result<(PathBuf, Entry)>> + use<'_> {
    let listed = fs.list(&tree);
    let (folders, failed) = match listed {
        Ok(folders) => (folders, None),
        Err(error) => (Vec::new(), Some(Err(at(&tree, &error)))),
    };
    let folders = folders
        .into_iter()
        .filter(move |folder| is_shard(&folder.name) && folder.name >= first);
    let files = folders.flat_map(move |folder| {
        let folder = tree.join(folder.name);
        let (files, failed) = match fs.list(&folder) {
            Ok(files) => (files, None),
            // A file that the store did not create.
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => (Vec::new(), None),
            Err(error) => (Vec::new(), Some(Err(at(&folder, &error)))),
        };
        let files = files
            .into_iter()
            .map(move |entry| Ok((folder.join(&entry.name), entry)));
        failed.into_iter().chain(files)
    });
    failed.into_iter().chain(files)
}

/// Whether the store could have created a folder of this name.
fn is_shard(name: &str) -> bool {
    name.len() == 2
        && name
            .bytes()
            .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
}

/// `error` with its folder.
fn at(folder: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", folder.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;
    use crate::store::content_path;
    use crate::store::fs::{DirectoryFs, MemoryFs};

    fn digests(fs: &dyn FileSystem, after: Option<Digest>) -> Vec<Digest> {
        let files = content_files(fs, "blobs", after);
        files.map(|file| file.unwrap().0).collect()
    }

    #[test]
    fn content_walk_is_in_digest_order_from_any_digest() {
        let fs = MemoryFs::new();
        let mut stored = Vec::new();
        for number in 0..40_u32 {
            for algorithm in [Algorithm::Sha512, Algorithm::Sha256] {
                let digest = Digest::of(algorithm, &number.to_be_bytes());
                fs.write_atomic(&content_path("blobs", &digest), b"x").unwrap();
                stored.push(digest);
            }
        }
        stored.sort_unstable();
        assert_eq!(digests(&fs, None), stored);
        for (at, after) in stored.iter().enumerate() {
            assert_eq!(digests(&fs, Some(*after)), stored.get(at + 1..).unwrap());
        }
    }

    #[test]
    fn content_walk_skips_foreign_and_misplaced_files() {
        let folder = tempfile::tempdir().unwrap();
        skips_foreign_files(&MemoryFs::new());
        skips_foreign_files(&DirectoryFs::open(folder.path()).unwrap());
    }

    fn skips_foreign_files(fs: &dyn FileSystem) {
        let digest = Digest::of(Algorithm::Sha256, b"layer");
        let path = content_path("blobs", &digest);
        let elsewhere = Path::new("blobs/sha256/zz").join(digest.hex());
        let metadata = path.with_extension("meta");
        for path in [&path, &elsewhere, &metadata, Path::new("blobs/sha256/README")] {
            fs.write_atomic(path, b"x").unwrap();
        }
        assert_eq!(digests(fs, None), [digest]);
    }
}
