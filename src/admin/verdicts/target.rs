//! What a verdict is about: a digest, in one repository or in every one.

use super::super::image_ref::ImageRef;
use super::super::response::Problem;
use crate::oci::manifest::DescriptorKind;
use crate::oci::{Algorithm, AnyDigest, Digest, Reference};
use crate::server::ServingState;
use crate::store::verdicts::{VerdictKey, VerdictKind, VerdictScope};
use crate::store::{Store, StoreError};

/// What a verdict is about.
pub(super) enum Target {
    /// A digest in every repository.
    Digest(Digest),
    /// A digest in one repository.
    Image(ImageRef, Digest),
}

impl Target {
    pub(super) fn parse(text: &str, registry: &ServingState) -> Result<Self, Problem> {
        let algorithm = text.split(':').next().unwrap_or_default();
        if !text.contains(['@', '/']) && algorithm.parse::<Algorithm>().is_ok() {
            let digest = text.parse::<Digest>();
            return digest
                .map(Self::Digest)
                .map_err(|error| Problem::bad_request(format!("`{text}` is not a digest: {error}")));
        }
        let named = ImageRef::parse(text, registry)?;
        match named.reference {
            Reference::Digest(AnyDigest::Supported(digest)) => Ok(Self::Image(named, digest)),
            Reference::Digest(AnyDigest::Unsupported(_)) => Err(Problem::bad_request(
                "digests of this algorithm cannot be verified, so they are not cached",
            )),
            Reference::Tag(_) => Err(Problem::bad_request(format!(
                "a digest is required, as in {}/{}@sha256:…, or sha256:… for every repository; a tag names another \
                 digest tomorrow",
                named.upstream_registry.name(),
                named.repository
            ))),
        }
    }

    pub(super) fn digest(&self) -> Digest {
        match self {
            Self::Digest(digest) | Self::Image(_, digest) => *digest,
        }
    }

    pub(super) fn name(&self) -> String {
        match self {
            Self::Digest(digest) => digest.to_string(),
            Self::Image(named, _) => named.to_string(),
        }
    }

    pub(super) fn key(&self, kind: VerdictKind) -> VerdictKey {
        let scope = match self {
            Self::Digest(_) => VerdictScope::Everywhere,
            Self::Image(named, _) => VerdictScope::Repository {
                upstream: named.upstream_registry.name().into(),
                repository: named.repository.clone(),
            },
        };
        VerdictKey {
            kind,
            scope,
            digest: self.digest(),
        }
    }

    /// Takes the verdict back, in every repository if none is named. Returns whether one existed.
    pub(super) fn remove(&self, kind: VerdictKind, store: &Store) -> Result<bool, StoreError> {
        match self {
            Self::Image(..) => store.remove_verdict(&self.key(kind)),
            Self::Digest(digest) => store.remove_verdicts_of(kind, digest),
        }
    }

    /// The manifests that this digest lists, if it is a cached index, and that are not blocked.
    pub(super) fn unblocked_images(&self, store: &Store) -> Result<Vec<String>, StoreError> {
        let Some(held) = store.manifest(&self.digest())? else {
            return Ok(Vec::new());
        };
        let children = held.manifest.descriptors.iter();
        let manifests = children.filter(|child| child.kind == DescriptorKind::Manifest);
        let digests = manifests.filter_map(|child| match child.digest {
            AnyDigest::Supported(digest) => Some(digest),
            AnyDigest::Unsupported(_) => None,
        });
        let named = digests.map(|digest| match self {
            Self::Digest(_) => Self::Digest(digest),
            Self::Image(named, _) => {
                let reference = Reference::Digest(AnyDigest::Supported(digest));
                Self::Image(
                    ImageRef {
                        reference,
                        ..named.clone()
                    },
                    digest,
                )
            }
        });
        Ok(named
            .filter(|image| !image.has(VerdictKind::Blocked, store))
            .map(|image| image.name())
            .collect())
    }

    /// Whether a verdict of this kind holds: for an image, in its repository or everywhere; for a digest, in any.
    pub(super) fn has(&self, kind: VerdictKind, store: &Store) -> bool {
        match self {
            Self::Image(named, digest) => store
                .verdict(kind, named.upstream_registry.name(), &named.repository, digest)
                .is_some(),
            Self::Digest(digest) => store.has_verdict(kind, digest),
        }
    }
}
