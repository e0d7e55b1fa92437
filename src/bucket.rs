//! Object storage: the bucket of the shared storage, by the API of S3.
//!
//! A bucket has bytes that several caches share. A blob and a manifest are named by their digest, which each reader verifies, and
//! may be deleted at any moment, because caches fetch them again; except that the bucket may have the only copy in an outage and
//! under the policy `never`. A record is named and sealed by a key. The deletion of one may take back a denial or the deletion of
//! a tag that it states.
//!
//! * `clock`: the storage's time of day. `listing`: its objects, page by page.
//! * `s3`: the API, over the crate `object_store`. `connector`: its HTTP client, which is that of upstreams. Both exist
//!   only in builds with the feature `shared`. `over`: fakes of tests.

mod clock;
#[cfg(feature = "shared")]
mod connector;
mod listing;
#[cfg(all(test, feature = "shared"))]
pub(crate) mod over;
#[cfg(feature = "shared")]
mod s3;
#[cfg(all(test, feature = "shared"))]
mod tests;

use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use zeroize::Zeroizing;

pub use self::clock::StorageClock;
pub use self::listing::{Listed, Listing, ListingNext};

use crate::oci::{Digest, UpstreamFailure};
use crate::upstream::{Origin, ProxyChoice, SettingsError, Transport};
#[cfg(all(test, feature = "shared"))]
pub(crate) use s3::in_memory;

/// Size of a part of a multipart upload. S3 allows no part below 5 MiB but the last one.
pub const PART_BYTES: usize = 5 * 1024 * 1024;

/// Maximum number of parts of an upload in S3.
const PARTS_MAX: u64 = 10_000;

/// Settings of a bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BucketSettings {
    /// Name of the bucket.
    pub bucket: String,
    /// Prefix of every object name, without slashes at its ends; empty for none.
    pub prefix: String,
    /// Base URL of the API. Requests are path-style: `https://endpoint/bucket/object`.
    pub endpoint: Origin,
    /// Region in the signatures.
    pub region: String,
    /// Source of the credential.
    pub credential: BucketCredential,
    /// Encryption at rest.
    pub encryption: Encryption,
    /// Further trusted roots, DER.
    pub roots: Vec<Vec<u8>>,
    /// Outbound proxy.
    pub proxy: ProxyChoice,
    /// Limit of a read up to its first byte, and of a request without content.
    pub timeout: Duration,
    /// Base URL of the API for clients that are redirected, if it is not the endpoint.
    pub client_endpoint: Option<Origin>,
}

impl BucketSettings {
    /// Name of the bucket with its prefix, as in the configuration.
    pub fn name(&self) -> String {
        let separator = if self.prefix.is_empty() { "" } else { "/" };
        format!("s3://{}{separator}{}", self.bucket, self.prefix)
    }
}

/// Source of the credential of a bucket.
#[derive(Clone, PartialEq, Eq)]
pub enum BucketCredential {
    /// An access key.
    Key {
        /// Id of the key.
        id: String,
        /// The secret key.
        secret: Zeroizing<String>,
        /// Session token of a temporary key.
        token: Option<Zeroizing<String>>,
    },
    /// A token of an identity provider, exchanged at the security token service (STS): IAM roles for service accounts.
    WebIdentity {
        /// File with the token.
        token_file: PathBuf,
        /// ARN of the role.
        role: String,
        /// Name of the session.
        session: Option<String>,
        /// The security token service.
        sts: Origin,
    },
    /// The credential service of a container, at a path below 169.254.170.2 (ECS).
    Container {
        /// Path and query.
        path: String,
    },
    /// The credential service of a pod, with a token (EKS Pod Identity).
    Pod {
        /// URL of the service.
        url: String,
        /// Its origin.
        origin: Origin,
        /// File with the token.
        token_file: PathBuf,
    },
    /// The metadata service of the virtual machine (version 2).
    Instance,
    /// None: the variables are not set in this environment. Commands run without those of the service.
    Missing,
}

impl BucketCredential {
    /// Name of the source, for the operator.
    pub fn source(&self) -> &'static str {
        match self {
            Self::Key { .. } => "access key",
            Self::WebIdentity { .. } => "web identity",
            Self::Container { .. } => "container credentials",
            Self::Pod { .. } => "pod identity",
            Self::Instance => "instance metadata",
            Self::Missing => "no credential in this environment",
        }
    }
}

/// Shows no secret.
impl fmt::Debug for BucketCredential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.source())
    }
}

/// Encryption at rest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Encryption {
    /// The default of the bucket.
    #[default]
    Bucket,
    /// SSE-S3: keys of the storage.
    S3,
    /// SSE-KMS with this key.
    Kms(String),
}

/// Why a bucket cannot be set up. A configuration error.
#[derive(Debug, thiserror::Error)]
pub enum BucketSettingsError {
    /// This program has no client for buckets.
    #[error("this program was built without the feature `shared`")]
    NotBuilt,
    /// There is no credential.
    #[error(
        "the environment has no credential for the bucket; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or \
         `credentials_file`; or allow the metadata service by credentials = \"instance\""
    )]
    NoCredential,
    /// The HTTP client cannot be set up.
    #[error(transparent)]
    Client(#[from] SettingsError),
    /// The client for S3 rejects the settings.
    #[error("{0}")]
    Settings(String),
}

/// Why a request to the bucket failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BucketError {
    /// There is no such object.
    #[error("the bucket has no such object")]
    Absent,
    /// The object exists and cannot be read: it is archived, or its key is gone. With the error code of the storage.
    #[error("the object cannot be read ({0})")]
    Unreadable(Arc<str>),
    /// The object exists or has another version, so a conditional write was not done.
    #[error("the object exists already, or has changed")]
    Exists,
    /// The credential may not do this. With the error code of the storage.
    #[error("the bucket denies access ({0})")]
    Denied(Arc<str>),
    /// The bucket does not exist.
    #[error("the bucket does not exist")]
    NoBucket,
    /// The bucket is in another region.
    #[error("the bucket is in another region: {0}")]
    Region(Arc<str>),
    /// No credential could be obtained.
    #[error("no credential for the bucket could be obtained: {0}")]
    Credential(Arc<str>),
    /// The storage limits the request rate, or has an internal error. With the status.
    #[error("the bucket responded with status {0}")]
    Busy(u16),
    /// No response, or its remainder did not arrive.
    #[error("the bucket {0}")]
    Silent(UpstreamFailure),
    /// The response is not one of S3.
    #[error("the response of the bucket is malformed")]
    Malformed,
    /// An object has a name that the client cannot represent, with an empty segment or `..`. With the escaped name.
    #[error("the bucket has an object with a name that cannot be listed, rename or delete it: {0}")]
    Name(Arc<str>),
}

/// The party that must act on a [`BucketError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// None: an expected response.
    None,
    /// The operator: the settings, the credential or its rights are wrong. Another attempt has the same result.
    Operator,
    /// The storage or the network. A later attempt may succeed.
    Service,
}

impl BucketError {
    /// The party that must act.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Absent | Self::Unreadable(_) | Self::Exists => Fault::None,
            Self::Denied(_) | Self::NoBucket | Self::Region(_) | Self::Name(_) => Fault::Operator,
            Self::Credential(_) | Self::Busy(_) | Self::Silent(_) | Self::Malformed => Fault::Service,
        }
    }

    /// Label in the metrics. Stable.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Unreadable(_) => "unreadable",
            Self::Exists => "exists",
            Self::Denied(_) => "denied",
            Self::NoBucket => "no-bucket",
            Self::Region(_) => "region",
            Self::Credential(_) => "credential",
            Self::Busy(_) => "busy",
            Self::Silent(_) => "silent",
            Self::Malformed => "malformed",
            Self::Name(_) => "name",
        }
    }
}

/// Name of an object below the prefix.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ObjectKey(String);

impl ObjectKey {
    /// The object of a blob.
    pub fn blob(digest: &Digest) -> ObjectKey {
        Self::of("blobs", digest)
    }

    /// The object of a manifest.
    pub fn manifest(digest: &Digest) -> ObjectKey {
        Self::of("manifests", digest)
    }

    /// The claim of a cache over the download of a blob.
    pub fn claim(digest: &Digest) -> ObjectKey {
        Self::of("claims", digest)
    }

    /// The claim of a cache over the request of a manifest.
    pub fn manifest_claim(digest: &Digest) -> ObjectKey {
        let ObjectKey(claim) = Self::of("claims", digest);
        ObjectKey(claim.replacen("claims/", "claims/m-", 1))
    }

    /// The claim of no blob, by which a process with this unique id finds out whether claims can be written.
    pub fn claim_probe(id: &str) -> ObjectKey {
        ObjectKey(format!("v1/claims/probe/{id}"))
    }

    /// The part of a blob from the byte `start` on, while a cache downloads it.
    pub fn part(digest: &Digest, start: u64) -> ObjectKey {
        ObjectKey(format!("{}/{start:016}", Self::parts(digest)))
    }

    /// An object of one probe of the bucket. `random` is unique, so that no two processes write to one object.
    pub fn probe(random: &[u8; 16]) -> ObjectKey {
        ObjectKey(format!("v1/probe/{:032x}", u128::from_be_bytes(*random)))
    }

    /// A record of this class, with a name that reveals nothing.
    pub fn record(class: &str, name: &[u8; 32]) -> ObjectKey {
        let hex = Digest::Sha256(*name).hex();
        let first = hex.get(..2).unwrap_or_default();
        ObjectKey(format!("v1/records/{class}/{first}/{hex}"))
    }

    /// An object in a listing. `None`: not one of a cache, by its first folder.
    pub fn listed(name: &str) -> Option<ObjectKey> {
        name.starts_with("v1/").then(|| ObjectKey(name.to_owned()))
    }

    /// The folder of the parts of a blob.
    pub fn parts(digest: &Digest) -> String {
        let ObjectKey(parts) = Self::of("parts", digest);
        parts
    }

    fn of(kind: &str, digest: &Digest) -> ObjectKey {
        let hex = digest.hex();
        let first = hex.get(..2).unwrap_or_default();
        ObjectKey(format!("v1/{kind}/{}/{first}/{hex}", digest.algorithm()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A pending operation on a bucket.
pub type BucketFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, BucketError>> + Send + 'a>>;

/// Properties of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Size in bytes.
    pub size: u64,
    /// Version for a conditional write.
    pub etag: Option<String>,
    /// Time since it was written, by the clock of the storage alone.
    pub age: Option<Duration>,
    /// `Content-Type`.
    pub media_type: Option<String>,
}

/// An object that is being read.
pub struct Object {
    /// Its properties.
    pub info: ObjectInfo,
    /// Its bytes from the requested offset on. A truncated body is an error.
    pub body: Box<dyn ObjectBody>,
}

/// A pending read of the next bytes.
pub type ObjectChunk<'a> = Pin<Box<dyn Future<Output = Option<Result<Bytes, BucketError>>> + Send + 'a>>;

/// Bytes of an object.
pub trait ObjectBody: Send {
    /// The next bytes, or `None` at the end.
    fn chunk(&mut self) -> ObjectChunk<'_>;
}

/// A multipart upload. It must be completed or aborted, because storages charge for parts that are left over.
pub trait Upload: Send {
    /// Uploads the next part. Every part but the last one has the same size.
    fn part(&mut self, bytes: Bytes) -> BucketFuture<'_, ()>;

    /// Makes an object of the parts.
    fn complete(&mut self) -> BucketFuture<'_, ()>;

    /// Deletes the parts.
    fn abort(&mut self) -> BucketFuture<'_, ()>;
}

/// A bucket.
pub trait ObjectStorage: Send + Sync {
    /// Reads an object from the byte `from` on.
    fn get<'a>(&'a self, key: &'a ObjectKey, from: u64) -> BucketFuture<'a, Object>;

    /// Checks whether an object exists.
    fn head<'a>(&'a self, key: &'a ObjectKey) -> BucketFuture<'a, ObjectInfo>;

    /// Writes an object unless it exists ([`BucketError::Exists`]). Returns its version.
    fn create<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        media_type: Option<&'a str>,
    ) -> BucketFuture<'a, Option<String>>;

    /// Replaces the version `etag` of an object, or fails with [`BucketError::Exists`].
    fn update<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        etag: &'a str,
    ) -> BucketFuture<'a, Option<String>>;

    /// Writes an object, whether it exists or not.
    fn put<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        media_type: Option<&'a str>,
    ) -> BucketFuture<'a, ()>;

    /// Begins a multipart upload. It replaces an object that exists.
    fn upload<'a>(&'a self, key: &'a ObjectKey) -> BucketFuture<'a, Box<dyn Upload>>;

    /// Deletes an object; there may be none.
    fn delete<'a>(&'a self, key: &'a ObjectKey) -> BucketFuture<'a, ()>;

    /// Lists the objects below a folder of the prefix, such as `v1/blobs`, on request those after this name.
    fn list(&self, _folder: &str, _after: Option<&ObjectKey>) -> Box<dyn Listing> {
        Box::new(listing::Unlisted)
    }

    /// The clock of the storage, if its responses have dates.
    fn clock(&self) -> Option<&StorageClock> {
        None
    }

    /// The URL by which anyone can `GET` the object for this long. Any range may be requested, because the signature does
    /// not cover it. Storage without a signer has none.
    fn presign<'a>(&'a self, _key: &'a ObjectKey, _valid: Duration) -> BucketFuture<'a, String> {
        Box::pin(async { Err(BucketError::Malformed) })
    }
}

/// Size of the parts of an upload of `size` bytes.
pub fn part_bytes(size: u64) -> usize {
    let needed = size.div_ceil(PARTS_MAX);
    usize::try_from(needed).unwrap_or(usize::MAX).max(PART_BYTES)
}

/// Opens a bucket. Sends no request.
#[cfg(feature = "shared")]
pub fn open(
    settings: &BucketSettings,
    transport: &Transport,
) -> Result<Arc<dyn ObjectStorage>, BucketSettingsError> {
    Ok(Arc::new(s3::S3::new(settings, transport)?))
}

/// Fails: this program has no client for buckets.
#[cfg(not(feature = "shared"))]
pub fn open(_: &BucketSettings, _: &Transport) -> Result<Arc<dyn ObjectStorage>, BucketSettingsError> {
    Err(BucketSettingsError::NotBuilt)
}
