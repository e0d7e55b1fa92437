//! Quarantine of blobs that do not match their digest.
//!
//! Several readers find the same damage. The first one ends it: the blob is moved away and fetched again. A slow reader
//! comes later, and then the name belongs to the new copy. So the file that has the name is read again, and moved only if
//! it is still the same one afterwards.

use std::io;

use super::{Blobs, TREE};
use crate::oci::{Digest, Hasher};
use crate::store::file_read::READ_CHUNK_BYTES;
use crate::store::fs::FsFile;
use crate::store::usage::ContentKind;
use crate::store::{Store, content_path};

/// Most times that a blob is read again. If it is replaced each time, the next reader checks it.
const READS_MAX: u32 = 3;

impl Store {
    /// Moves a blob to the quarantine if it does not match its digest. From then on it is a cache miss. Reads all of it.
    /// Blocks.
    pub fn quarantine_blob(&self, digest: &Digest) {
        self.blobs.quarantine_damaged(digest);
    }
}

impl Blobs {
    /// Moves a blob to the quarantine if it does not match its digest.
    pub(in crate::store) fn quarantine_damaged(&self, digest: &Digest) {
        for _ in 0..READS_MAX {
            let removals = self.removed.count();
            let found = match self.fs.open(&content_path(TREE, digest)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return,
                opened => opened.and_then(|file| hash(file.as_ref(), digest)),
            };
            let is_intact = found.is_ok_and(|found| found == *digest);
            if is_intact || self.quarantine_unless_removed(digest, removals) {
                return;
            }
        }
    }

    /// Moves a blob to the quarantine, unless it was removed since there were so many removals. Returns whether it was
    /// moved.
    fn quarantine_unless_removed(&self, digest: &Digest, removals: u64) -> bool {
        let _rename_lock = self.rename_lock.lock();
        let is_same = !self.removed.is_removed_since(removals, digest);
        if is_same {
            self.quarantine_locked(digest, "blob content does not match its digest");
        }
        is_same
    }

    /// Moves a blob to the quarantine.
    pub(super) fn quarantine(&self, digest: &Digest, why: &str) {
        let _rename_lock = self.rename_lock.lock();
        self.quarantine_locked(digest, why);
    }

    fn quarantine_locked(&self, digest: &Digest, why: &str) {
        let path = content_path(TREE, digest);
        self.usage
            .quarantine(ContentKind::Blob, self.fs.as_ref(), &path, why);
        self.drop_from_caches(digest);
    }
}

/// Hashes a file with the algorithm of `digest`.
fn hash(file: &dyn FsFile, digest: &Digest) -> io::Result<Digest> {
    let mut hasher = Hasher::new(digest.algorithm());
    let mut buffer = vec![0; READ_CHUNK_BYTES];
    let mut at = 0;
    loop {
        let read = match file.read_at(&mut buffer, at) {
            Ok(0) => return Ok(hasher.finish()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        hasher.update(buffer.get(..read).unwrap_or_default());
        at += read as u64;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;
    use crate::store::tests::{Fixture, digest, put_blob, read_blob};

    /// A store with a blob that its disk has damaged.
    fn with_damaged_blob(fixture: &Fixture) -> Store {
        let store = fixture.open();
        put_blob(&store, b"layer").unwrap();
        fixture.overwrite(&content_path(TREE, &digest(b"layer")), b"loyer");
        store
    }

    #[test]
    fn later_finding_of_the_same_damage_keeps_the_new_copy() {
        for fixture in [Fixture::directory(), Fixture::memory()] {
            let store = with_damaged_blob(&fixture);
            store.quarantine_blob(&digest(b"layer"));
            assert!(store.blob(&digest(b"layer")).unwrap().is_none());
            put_blob(&store, b"layer").unwrap();
            store.quarantine_blob(&digest(b"layer"));
            assert_eq!(read_blob(&store, &digest(b"layer")).unwrap(), b"layer");
            assert_eq!(fixture.files("quarantine").len(), 1);
        }
    }

    #[test]
    fn blob_replaced_while_it_is_read_again_stays() {
        let fixture = Fixture::memory();
        let store = with_damaged_blob(&fixture);
        put_blob(&store, b"other").unwrap();
        let removals = store.removed.count();
        store.remove_blob(&digest(b"other")).unwrap();
        store.quarantine_blob(&digest(b"layer"));
        put_blob(&store, b"layer").unwrap();
        assert!(!store.blobs.quarantine_unless_removed(&digest(b"layer"), removals));
        assert_eq!(read_blob(&store, &digest(b"layer")).unwrap(), b"layer");
    }

    #[test]
    fn blob_is_quarantined_while_others_are_removed() {
        let fixture = Fixture::memory();
        let store = with_damaged_blob(&fixture);
        put_blob(&store, b"other").unwrap();
        let removals = store.removed.count();
        store.remove_blob(&digest(b"other")).unwrap();
        assert!(store.blobs.quarantine_unless_removed(&digest(b"layer"), removals));
        assert!(store.blob(&digest(b"layer")).unwrap().is_none());
    }
}
