//! Into the store: every byte verified, nothing known of it until all of it is there.
//!
//! The files come in any order, so all of them are received first, as blobs, each under the digest that it has. Then
//! `index.json` is followed. Only when every image turned out whole is anything said about it: first its manifests, then
//! that its digests are in its repository, its tag last. What the archive transaction and did not need goes again; and
//! all that it transaction, if it is refused.
//!
//! What an import says is the operator's word, and no more than that:
//!
//! * The tag is there, and no upstream has confirmed it ([`crate::store::tags::NEVER_CONFIRMED`]): it is never fresh, and asked about as soon
//!   as anyone answers.
//! * The digests whose bytes the archive *transaction* may be read through the repository, by those who may read that. What it
//!   only names proves nothing, also where it is held: else an archive could name another's private layer and open it.
//! * It grants nobody anything. With [`ImportOptions::is_public`] the repository counts as public until the upstream says no, which
//!   is asked first wherever it answers.

mod resolve;
mod unpack;

use std::collections::HashMap;
use std::io::{self, Read};
use std::time::SystemTime;

use super::{Image, list_missing};
use crate::oci::Digest;
use crate::store::{Store, StoreError};

use self::resolve::{ResolvedImage, ResolvedImport};
use self::unpack::unpack;

/// Files and folders in an archive.
pub const ENTRIES_MAX: usize = 100_000;

/// Images in an archive.
pub const IMAGES_MAX: usize = 1_000;

/// Why an archive is not imported. No name of it is known.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// It ended early, or is no tar archive. A compressed one has to be unpacked first.
    #[error("the archive cannot be read (an uncompressed tar is expected): {0}")]
    Unreadable(#[from] io::Error),
    /// Something that no layout has: a link, a device, a way out of it, a file of another format.
    #[error(
        "`{name}` is {what}, which no OCI image layout has; was it written by an old `docker save`? then use `skopeo copy docker-archive:FILE oci-archive:OUT`"
    )]
    UnexpectedEntry {
        /// As the archive calls it.
        name: String,
        /// What is wrong.
        what: &'static str,
    },
    /// The same file twice.
    #[error("`{0}` is in the archive twice")]
    Duplicate(String),
    /// More than is taken.
    #[error("the archive has too many or too large {0}: at most {1} are taken")]
    TooMany(&'static str, u64),
    /// The bytes are not those of the name.
    #[error("the archive is damaged: {0}")]
    DigestMismatch(String),
    /// A document of the layout is missing or wrong.
    #[error("{file}: {reason}")]
    Document {
        /// Which.
        file: &'static str,
        /// Why.
        reason: String,
    },
    /// A manifest is missing, wrong, or of an unknown type.
    #[error("manifest {digest}: {reason}")]
    Manifest {
        /// Which.
        digest: Digest,
        /// Why.
        reason: String,
    },
    /// An image has no name, or a short one.
    #[error("{digest} is called {}: say what it is with `--as` (`image=`), as in docker.io/library/alpine:3.20", quoted(.name.as_deref()))]
    Unnamed {
        /// Which.
        digest: Digest,
        /// As the archive calls it.
        name: Option<String>,
    },
    /// The name is not one of an image here.
    #[error("{0}")]
    Unknown(String),
    /// Something of an image is not in the archive.
    #[error("{image} is not whole in the archive: {}", list_missing(.missing))]
    Incomplete {
        /// The image.
        image: String,
        /// What is missing.
        missing: Vec<String>,
    },
    /// Our own fault: no room, or a disk that refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn quoted(name: Option<&str>) -> String {
    name.map_or_else(|| "nothing".to_owned(), |name| format!("`{name}`"))
}

/// How it is to be imported.
pub struct ImportOptions<'a> {
    /// What an image is that has this name in the archive; or why there is none.
    pub resolve: &'a dyn Fn(&str) -> Result<Image, String>,
    /// The name of the archive's only image, whatever it says.
    pub name: Option<String>,
    /// Whether everybody may read the repositories, until their upstream says otherwise.
    pub is_public: bool,
    /// The time of day.
    pub now: SystemTime,
}

/// What an archive transaction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Each image.
    pub images: Vec<ImportedImage>,
    /// Manifests and blobs in the archive that were needed, and their bytes.
    pub objects: u64,
    /// Of those, the ones that were not held before.
    pub new_objects: u64,
    /// Their bytes.
    pub new_bytes: u64,
}

/// What became of one image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportedImage {
    /// Its full name.
    pub name: String,
    /// What it names.
    pub digest: Digest,
    /// The platforms that can be pulled, of an index.
    pub platforms: Vec<String>,
    /// Whether the tag named this before, with all of it held.
    pub was_held: bool,
}

/// Imports the archive. Blocks.
pub fn import(
    store: &Store,
    archive: impl Read,
    options: &ImportOptions<'_>,
) -> Result<Imported, ImportError> {
    let mut transaction = ImportTransaction::new(store);
    let index = unpack(store, archive, &mut transaction)?;
    let found = ResolvedImport::of(store, &transaction, &index, options)?;
    found.store_content(store, options)?;
    let imported = transaction.commit(&found);
    found.store_tags(store, options.now)?;
    Ok(imported)
}

/// Something the archive transaction.
#[derive(Clone, Copy)]
struct Object {
    bytes: u64,
    /// Written by this import.
    is_new: bool,
}

/// What the archive transaction. Dropped, all that is new goes again; whoever reads it reads it to its end.
struct ImportTransaction<'a> {
    store: &'a Store,
    objects: HashMap<Digest, Object>,
}

impl<'a> ImportTransaction<'a> {
    fn new(store: &'a Store) -> Self {
        Self {
            store,
            objects: HashMap::new(),
        }
    }

    /// Lets go of what no image needs, and of the blobs whose bytes are manifests.
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
        for (digest, _) in self.objects.iter().filter(|(_, object)| object.is_new) {
            // What cannot be removed is named by nothing, and goes like everything that is not used.
            let _ = self.store.remove_blob(digest);
        }
    }
}
