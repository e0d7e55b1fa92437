//! Values and grammar of the OCI registry protocol: digests, names, endpoints, manifests, ranges.
//!
//! Every type is constructed by parsing only, so a value is always valid. Nothing here uses a clock, a file or
//! a socket, and nothing here decides what to do with a request.
//!
//! * [`digest`]: content digests and the hashing that verifies them; the only module that hashes.
//! * [`name`]: repositories, tags and references.
//! * [`endpoint`]: a validated read request; [`path`]: the accepted spelling of its path; [`query`]: its
//!   parameters.
//! * [`manifest`]: the parts of a manifest that the cache uses, and media types.
//! * [`accept`]: the media types that a client accepts.
//! * [`range`]: byte ranges of requests and responses.
//! * [`challenge`]: `WWW-Authenticate` challenges.
//! * [`token_request`]: requests to a token service.
//! * [`error`]: error codes and bodies; [`failure`]: why a registry gave no usable response.
//! * [`header`]: header names and small headers; [`cdn_loop`]: loop detection between caches.
//!
//! Clauses are those of the OCI distribution specification 1.1 ("spec") and image specification 1.1
//! ("image-spec").

pub mod accept;
pub mod cdn_loop;
pub mod challenge;
pub mod digest;
pub mod endpoint;
pub mod error;
pub mod failure;
pub mod header;
pub mod manifest;
pub mod name;
pub mod path;
pub mod percent;
pub mod query;
pub mod range;
pub mod token_request;

pub use accept::{Accept, AcceptError};
pub use challenge::Challenge;
pub use digest::{Algorithm, AnyDigest, Digest, DigestError, Hasher, UnsupportedDigest};
pub use endpoint::{Endpoint, RequestError};
pub use error::{ErrorBody, ErrorCode};
pub use failure::{RedirectFailure, TlsFailure, UpstreamFailure};
pub use header::{CacheHeaders, RateLimit};
pub use manifest::{
    Descriptor, DescriptorKind, Manifest, ManifestError, ManifestKind, MediaType, MediaTypeError, Platform,
};
pub use name::{NameError, Reference, ReferenceError, Repository, Tag, split_image};
pub use query::{Query, QueryError};
pub use range::{ByteRange, ByteSpan, RangeRequest};
pub use token_request::TokenRequest;
