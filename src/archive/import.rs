//! Import: every object is verified, and nothing is referenced before the complete archive is stored.
//!
//! Files come in any order, so all are first stored as blobs under their own digests. Then the images of `index.json`
//! are resolved. If all are complete, the import stores their manifests, then the repository memberships, and the tags
//! last, if nothing was removed meanwhile. New objects that no image needs are removed, and all of a failed import are,
//! but not those that another image uses by then.
//!
//! Objects of a running import count as used, also those that were cached before. So it evicts none of them.
//!
//! An import has the authority of the operator only:
//!
//! * No upstream has confirmed the tag ([`crate::store::tags::NEVER_CONFIRMED`]). It is never fresh, and is
//!   revalidated as soon as an upstream is available.
//! * A digest whose bytes the archive *contains* may be read through the repository by clients that may read the
//!   repository. A digest that it only names becomes no member, even if it is cached. Otherwise an archive could name
//!   another repository's private layer and make it readable.
//! * It creates no grants. With [`ImportOptions::is_public`] the repository counts as public until the upstream denies
//!   access. While the upstream is available, it is asked before a client is served.

mod resolve;
mod unpack;

use std::collections::HashMap;
use std::io::{self, Read};
use std::time::{Duration, SystemTime};

use super::{Image, list_missing};
use crate::oci::Digest;
use crate::store::access_times::ContentId;
use crate::store::{EVICTION_MIN_AGE, Store, StoreError};

use self::resolve::{ResolvedImage, ResolvedImport};
use self::unpack::unpack;

/// Maximum number of files and folders in an archive.
pub const ENTRIES_MAX: usize = 100_000;

/// Maximum number of images in an archive.
pub const IMAGES_MAX: usize = 1_000;

/// Error of an import.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The archive is truncated or not a tar archive. A compressed one must be decompressed first.
    #[error("the archive cannot be read (an uncompressed tar is expected): {0}")]
    Unreadable(#[from] io::Error),
    /// An entry that is not part of an OCI image layout: a link, a device, a path outside it, or a file of another
    /// format.
    #[error(
        "`{name}` is {what} that is not part of an OCI image layout; convert an old `docker save` archive with `skopeo copy docker-archive:FILE oci-archive:OUT`"
    )]
    UnexpectedEntry {
        /// The name in the archive.
        name: String,
        /// The kind of the entry.
        what: &'static str,
    },
    /// A duplicate file.
    #[error("`{0}` is a duplicate in the archive")]
    Duplicate(String),
    /// A limit is exceeded.
    #[error("the archive exceeds the limit of {1} {0}")]
    TooMany(&'static str, u64),
    /// The content does not match its digest.
    #[error("the archive is damaged: {0}")]
    DigestMismatch(String),
    /// A document of the layout is missing or invalid.
    #[error("{file}: {reason}")]
    Document {
        /// Which one.
        file: &'static str,
        /// The reason.
        reason: String,
    },
    /// A manifest is missing, invalid or of an unknown type.
    #[error("manifest {digest}: {reason}")]
    Manifest {
        /// Which one.
        digest: Digest,
        /// The reason.
        reason: String,
    },
    /// An image has no name, or a name without a registry.
    #[error("{digest} is named {}: set its name with `--as` (`image=`), as in docker.io/library/alpine:3.20", quoted(.name.as_deref()))]
    Unnamed {
        /// Which one.
        digest: Digest,
        /// The name in the archive.
        name: Option<String>,
    },
    /// The name does not resolve to an image.
    #[error("{0}")]
    Unknown(String),
    /// An image is incomplete in the archive.
    #[error("{image} is incomplete in the archive: {}", list_missing(.missing))]
    Incomplete {
        /// The image.
        image: String,
        /// The missing digests.
        missing: Vec<String>,
    },
    /// An object was removed during the import: deleted, or found damaged.
    #[error("{0} was removed during the import; import the archive again")]
    Removed(Digest),
    /// The store failed, for example because the disk is full.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn quoted(name: Option<&str>) -> String {
    name.map_or_else(|| "nothing".to_owned(), |name| format!("`{name}`"))
}

/// Options of an import.
pub struct ImportOptions<'a> {
    /// Resolves a name of the archive to an image, or explains why it cannot.
    pub resolve: &'a dyn Fn(&str) -> Result<Image, String>,
    /// The name for the only image of the archive, instead of its own.
    pub name: Option<String>,
    /// Whether the repositories become readable for all clients, until their upstream denies access.
    pub is_public: bool,
    /// The wall-clock time.
    pub now: SystemTime,
}

/// The result of an import.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// The images.
    pub images: Vec<ImportedImage>,
    /// Number of required manifests and blobs in the archive.
    pub objects: u64,
    /// Number of those that were not cached before.
    pub new_objects: u64,
    /// Bytes of the new objects.
    pub new_bytes: u64,
}

/// An imported image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportedImage {
    /// The full name.
    pub name: String,
    /// The digest.
    pub digest: Digest,
    /// The complete platforms of an index.
    pub platforms: Vec<String>,
    /// Whether the tag already named this image and all of it was cached.
    pub was_cached: bool,
}

/// Imports the archive. Blocks.
pub fn import(
    store: &Store,
    archive: impl Read,
    options: &ImportOptions<'_>,
) -> Result<Imported, ImportError> {
    let mut transaction = ImportTransaction::new(store);
    let index = unpack(archive, &mut transaction)?;
    let found = ResolvedImport::of(store, &transaction, &index, options)?;
    found.store_content(store, options)?;
    // From here on, the stored manifests and their recent use protect the content.
    found.require_stored(store)?;
    found.store_tags(store, options.now)?;
    Ok(transaction.commit(&found))
}

/// Uses of the objects are recorded again after this time.
const USE_INTERVAL: Duration = Duration::from_secs(EVICTION_MIN_AGE.as_secs() / 4);

/// An object of the archive.
#[derive(Clone, Copy)]
struct Object {
    bytes: u64,
    /// Written by this import.
    is_new: bool,
}

/// The objects of this import. Dropping it before the commit removes the new ones.
struct ImportTransaction<'a> {
    store: &'a Store,
    objects: HashMap<Digest, Object>,
    /// When the uses of the objects were recorded.
    used_at: SystemTime,
}

impl<'a> ImportTransaction<'a> {
    fn new(store: &'a Store) -> Self {
        Self {
            store,
            objects: HashMap::new(),
            used_at: store.now(),
        }
    }

    fn add(&mut self, digest: Digest, object: Object) {
        record_use(self.store, digest);
        self.objects.insert(digest, object);
    }

    /// Records uses of all objects, if the last ones are not recent.
    fn record_uses(&mut self) {
        let now = self.store.now();
        if now
            .duration_since(self.used_at)
            .is_ok_and(|age| age < USE_INTERVAL)
        {
            return;
        }
        self.used_at = now;
        for digest in self.objects.keys() {
            record_use(self.store, *digest);
        }
    }

    /// Removes objects that no image needs, and blobs whose bytes are stored as manifests.
    fn commit(mut self, found: &ResolvedImport) -> Imported {
        let mut imported = Imported {
            images: found.images.iter().map(ResolvedImage::report).collect(),
            ..Imported::default()
        };
        let mut objects = std::mem::take(&mut self.objects);
        for (digest, is_manifest) in found.needed() {
            let Some(object) = objects.get(&digest).copied() else {
                continue;
            };
            imported.objects += 1;
            imported.new_objects += u64::from(object.is_new);
            imported.new_bytes += if object.is_new { object.bytes } else { 0 };
            if !is_manifest {
                objects.remove(&digest);
            }
        }
        self.objects = objects;
        imported
    }
}

impl Drop for ImportTransaction<'_> {
    fn drop(&mut self) {
        let new = self.objects.iter().filter(|(_, object)| object.is_new);
        let new: Vec<Digest> = new.map(|(digest, _)| *digest).collect();
        self.store.remove_unreferenced_blobs(&new);
    }
}

/// An object is stored as a blob, a manifest or both.
fn record_use(store: &Store, digest: Digest) {
    for content in [ContentId::Blob(digest), ContentId::Manifest(digest)] {
        store.touch(content, store.now());
    }
}
