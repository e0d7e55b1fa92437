//! The words of the registry protocol as values: what a digest, a name, a request or a manifest *is*.
//!
//! Every type here is made by parsing and by nothing else, so whoever holds one holds a right one. Nothing
//! here knows a clock, a file or a socket, and nothing here decides: what to do with a request is judged
//! elsewhere.
//!
//! * [`digest`]: content digests and the hashing that proves them; the only place that hashes.
//! * [`name`]: repositories, tags and references.
//! * [`endpoint`]: one validated read request; [`path`]: how it is spelled; [`query`]: its parameters.
//! * [`manifest`]: what of a manifest we must understand, and media types.
//! * [`accept`]: the set of media types a client takes.
//! * [`range`]: byte ranges asked for and answered.
//! * [`challenge`]: how a registry wants to be authenticated to (`WWW-Authenticate`).
//! * [`error`]: error codes and bodies; [`failure`]: why a registry gave no usable answer.
//! * [`header`]: header names and the small headers that need reading.
//!
//! Clauses are those of the OCI distribution specification 1.1 ("spec") and image specification 1.1
//! ("image-spec").

pub mod accept;
pub mod challenge;
pub mod digest;
pub mod endpoint;
pub mod error;
pub mod failure;
pub mod header;
pub mod manifest;
pub mod name;
pub mod path;
pub mod query;
pub mod range;
pub mod token_request;

pub use accept::{Accept, AcceptError};
pub use challenge::Challenge;
pub use digest::{Algorithm, AnyDigest, Digest, DigestError, Hasher, UnsupportedDigest};
pub use endpoint::{Endpoint, RequestError};
pub use error::{ErrorBody, ErrorCode};
pub use failure::{RedirectFailure, TlsFailure, UpstreamFailure};
pub use header::RateLimit;
pub use manifest::{
    Descriptor, DescriptorKind, Manifest, ManifestError, ManifestKind, MediaType, MediaTypeError, Platform,
};
pub use name::{NameError, Reference, ReferenceError, Repository, Tag};
pub use query::{Query, QueryError};
pub use range::{ByteRange, ByteSpan, RangeRequest};
pub use token_request::TokenRequest;
