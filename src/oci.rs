//! The words of the registry protocol as values: what a digest, a name, a request or a manifest *is*.
//!
//! Every type here is made by parsing and by nothing else, so whoever holds one holds a right one. Nothing
//! here knows a clock, a file or a socket, and nothing here decides: what to do with a request is judged
//! elsewhere.
//!
//! * [`digest`]: content digests and the hashing that proves them; the only place that hashes.
//! * [`name`]: repositories, tags and references.
//! * [`operation`]: one validated read request; [`path`]: how it is spelled; [`query`]: its parameters.
//! * [`manifest`]: what of a manifest we must understand, and media types.
//! * [`accept`]: the set of media types a client takes.
//! * [`range`]: byte ranges asked for and answered.
//! * [`challenge`]: how a registry wants to be authenticated to (`WWW-Authenticate`).
//! * [`error`]: error codes and bodies; [`cause`]: why a registry gave no usable answer.
//! * [`header`]: header names and the small headers that need reading.
//!
//! Clauses are those of the OCI distribution specification 1.1 ("spec") and image specification 1.1
//! ("image-spec").

pub mod accept;
pub mod cause;
pub mod challenge;
pub mod digest;
pub mod error;
pub mod header;
pub mod login;
pub mod manifest;
pub mod name;
pub mod operation;
pub mod path;
pub mod query;
pub mod range;

pub use accept::{Accept, AcceptError};
pub use cause::{Cause, RedirectFault, TlsFault};
pub use challenge::Challenge;
pub use digest::{Algorithm, AnyDigest, Digest, DigestError, ForeignDigest, Hasher};
pub use error::{ErrorCode, Problem};
pub use header::RateLimit;
pub use login::LoginRequest;
pub use manifest::{Descriptor, Kind, Manifest, ManifestError, MediaType, MediaTypeError, Platform, Role};
pub use name::{NameError, Reference, ReferenceError, Repository, Tag};
pub use operation::{Malformed, Operation};
pub use query::{Query, QueryError};
pub use range::{ByteRange, RangeRequest, Span};
