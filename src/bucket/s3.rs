//! Client for S3 and storages with its API. Only its files and its connector name `object_store`.
//!
//! The crate signs, obtains credentials and speaks XML. Its retries are off, because they last minutes and a pull goes on
//! from the upstream instead.

mod list;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::path::Path;
use object_store::signer::Signer;
use object_store::{
    Attribute, Attributes, GetOptions, GetRange, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, RetryConfig, UpdateVersion,
};
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};

use self::list::Pages;
use super::connector::{Connector, EXCHANGE, Exchange};
use super::listing::Listing;
use super::{
    BucketCredential, BucketError, BucketFuture, BucketSettings, BucketSettingsError, Encryption, Object,
    ObjectBody, ObjectChunk, ObjectInfo, ObjectKey, ObjectStorage, StorageClock, Upload,
};
use crate::oci::UpstreamFailure;
use crate::upstream::{PlainFailure, Transport};

/// Limit of a write, which sends at most one part.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest pause within an object that is being read.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// A bucket with the API of S3.
pub(super) struct S3 {
    store: Arc<dyn ObjectStore>,
    /// Signs URLs for clients.
    signer: Option<Arc<dyn Signer>>,
    prefix: String,
    /// Limit of a read up to its first byte, and of a request without content.
    timeout: Duration,
    clock: Arc<StorageClock>,
}

impl S3 {
    pub(super) fn new(settings: &BucketSettings, transport: &Transport) -> Result<S3, BucketSettingsError> {
        if settings.credential == BucketCredential::Missing {
            return Err(BucketSettingsError::NoCredential);
        }
        let connector = Connector::new(settings, transport)?;
        let builder = AmazonS3Builder::new()
            .with_http_connector(connector)
            .with_bucket_name(&settings.bucket)
            .with_endpoint(settings.endpoint.to_string())
            .with_region(&settings.region)
            .with_allow_http(settings.endpoint.is_plain())
            // TLS protects the bytes. Without it, the signature covers them.
            .with_unsigned_payload(!settings.endpoint.is_plain())
            .with_disable_tagging(true)
            .with_disable_bulk_delete(true)
            .with_retry(RetryConfig {
                max_retries: 0,
                ..RetryConfig::default()
            });
        let builder = with_credential(builder, &settings.credential);
        let builder = match &settings.encryption {
            Encryption::Bucket => builder,
            Encryption::S3 => match "aws_server_side_encryption".parse() {
                Ok(key) => builder.with_config(key, "AES256"),
                Err(error) => return Err(BucketSettingsError::Settings(error.to_string())),
            },
            Encryption::Kms(key) => builder.with_sse_kms_encryption(key),
        };
        let build = |builder: AmazonS3Builder| {
            let store = builder.build();
            store.map_err(|error| BucketSettingsError::Settings(error.to_string()))
        };
        let for_clients = settings.client_endpoint.as_ref().map(|endpoint| {
            let builder = builder.clone().with_endpoint(endpoint.to_string());
            build(builder.with_allow_http(endpoint.is_plain()))
        });
        let store = Arc::new(build(builder)?);
        let signer: Arc<dyn Signer> = match for_clients {
            Some(store) => Arc::new(store?),
            None => Arc::<AmazonS3>::clone(&store),
        };
        Ok(S3 {
            signer: Some(signer),
            ..Self::over(store, &settings.prefix, settings.timeout)
        })
    }

    /// A bucket over a given client.
    pub(super) fn over(store: Arc<dyn ObjectStore>, prefix: &str, timeout: Duration) -> S3 {
        S3 {
            store,
            prefix: prefix.to_owned(),
            timeout,
            clock: Arc::default(),
            signer: None,
        }
    }

    fn path(&self, key: &ObjectKey) -> Path {
        Path::from(format!("{}/{key}", self.prefix))
    }

    async fn get_from(&self, key: &ObjectKey, from: u64) -> Result<Object, BucketError> {
        let path = self.path(key);
        let options = GetOptions {
            range: (from > 0).then_some(GetRange::Offset(from)),
            ..GetOptions::default()
        };
        let (result, date) = within(self.timeout, &self.clock, self.store.get_opts(&path, options)).await?;
        let info = info(&result.meta, &result.attributes, date);
        let left = result.range.end.saturating_sub(result.range.start);
        if result.range.start != from {
            return Err(BucketError::Malformed);
        }
        let body = Body {
            stream: result.into_stream(),
            left,
        };
        Ok(Object {
            info,
            body: Box::new(body),
        })
    }

    async fn head_of(&self, key: &ObjectKey) -> Result<ObjectInfo, BucketError> {
        let options = GetOptions {
            head: true,
            ..GetOptions::default()
        };
        let path = self.path(key);
        let (result, date) = within(self.timeout, &self.clock, self.store.get_opts(&path, options)).await?;
        Ok(info(&result.meta, &result.attributes, date))
    }

    async fn write(
        &self,
        key: &ObjectKey,
        bytes: Bytes,
        (mode, media_type): (PutMode, Option<&str>),
    ) -> Result<Option<String>, BucketError> {
        let mut attributes = Attributes::new();
        if let Some(media_type) = media_type {
            attributes.insert(Attribute::ContentType, media_type.to_owned().into());
        }
        let options = PutOptions {
            mode,
            attributes,
            ..PutOptions::default()
        };
        let path = self.path(key);
        let writing = self.store.put_opts(&path, PutPayload::from_bytes(bytes), options);
        Ok(within(WRITE_TIMEOUT, &self.clock, writing).await?.0.e_tag)
    }

    async fn begin_upload(&self, key: &ObjectKey) -> Result<Box<dyn Upload>, BucketError> {
        let path = self.path(key);
        let beginning = self
            .store
            .put_multipart_opts(&path, PutMultipartOptions::default());
        let (upload, _) = within(WRITE_TIMEOUT, &self.clock, beginning).await?;
        Ok(Box::new(Multipart(upload, Arc::clone(&self.clock))))
    }

    async fn sign(&self, key: &ObjectKey, valid: Duration) -> Result<String, BucketError> {
        let signer = self.signer.as_ref().ok_or(BucketError::Malformed)?;
        let path = self.path(key);
        // The credential may have to be requested first.
        let signing = signer.signed_url(http::Method::GET, &path, valid);
        Ok(within(self.timeout, &self.clock, signing).await?.0.into())
    }

    async fn remove(&self, key: &ObjectKey) -> Result<(), BucketError> {
        let one = futures_util::stream::iter([Ok(self.path(key))]).boxed();
        let deleting = self.store.delete_stream(one).try_collect::<Vec<_>>();
        match within(self.timeout, &self.clock, deleting).await {
            Ok(_) | Err(BucketError::Absent) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl ObjectStorage for S3 {
    fn get<'a>(&'a self, key: &'a ObjectKey, from: u64) -> BucketFuture<'a, Object> {
        Box::pin(self.get_from(key, from))
    }

    fn head<'a>(&'a self, key: &'a ObjectKey) -> BucketFuture<'a, ObjectInfo> {
        Box::pin(self.head_of(key))
    }

    fn create<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        media_type: Option<&'a str>,
    ) -> BucketFuture<'a, Option<String>> {
        Box::pin(self.write(key, bytes, (PutMode::Create, media_type)))
    }

    fn update<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        etag: &'a str,
    ) -> BucketFuture<'a, Option<String>> {
        let version = UpdateVersion {
            e_tag: Some(etag.to_owned()),
            version: None,
        };
        Box::pin(self.write(key, bytes, (PutMode::Update(version), None)))
    }

    fn put<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        media_type: Option<&'a str>,
    ) -> BucketFuture<'a, ()> {
        Box::pin(async move {
            let written = self.write(key, bytes, (PutMode::Overwrite, media_type)).await;
            written.map(drop)
        })
    }

    fn upload<'a>(&'a self, key: &'a ObjectKey) -> BucketFuture<'a, Box<dyn Upload>> {
        Box::pin(self.begin_upload(key))
    }

    fn delete<'a>(&'a self, key: &'a ObjectKey) -> BucketFuture<'a, ()> {
        Box::pin(self.remove(key))
    }

    fn list(&self, folder: &str, after: Option<&ObjectKey>) -> Box<dyn Listing> {
        let folder = Path::from(format!("{}/{folder}", self.prefix));
        let stream = match after {
            Some(after) => self.store.list_with_offset(Some(&folder), &self.path(after)),
            None => self.store.list(Some(&folder)),
        };
        Box::new(Pages {
            stream,
            prefix: self.prefix.clone(),
            clock: Arc::clone(&self.clock),
            date: None,
        })
    }

    fn clock(&self) -> Option<&StorageClock> {
        Some(&self.clock)
    }

    fn presign<'a>(&'a self, key: &'a ObjectKey, valid: Duration) -> BucketFuture<'a, String> {
        Box::pin(self.sign(key, valid))
    }
}

fn with_credential(builder: AmazonS3Builder, credential: &BucketCredential) -> AmazonS3Builder {
    use AmazonS3ConfigKey as K;
    match credential {
        BucketCredential::Key { id, secret, token } => {
            let builder = builder
                .with_access_key_id(id)
                .with_secret_access_key(secret.as_str());
            match token {
                Some(token) => builder.with_token(token.as_str()),
                None => builder,
            }
        }
        BucketCredential::WebIdentity {
            token_file,
            role,
            session,
            sts,
        } => {
            let builder = builder
                .with_config(K::WebIdentityTokenFile, token_file.display().to_string())
                .with_config(K::RoleArn, role)
                .with_config(K::StsEndpoint, sts.to_string());
            match session {
                Some(session) => builder.with_config(K::RoleSessionName, session),
                None => builder,
            }
        }
        BucketCredential::Container { path } => builder.with_config(K::ContainerCredentialsRelativeUri, path),
        BucketCredential::Pod { url, token_file, .. } => builder
            .with_config(K::ContainerCredentialsFullUri, url)
            .with_config(
                K::ContainerAuthorizationTokenFile,
                token_file.display().to_string(),
            ),
        // The default of the crate if it is given no other source.
        BucketCredential::Instance | BucketCredential::Missing => builder,
    }
}

/// Runs an operation with a time limit. Also returns the time of day at the storage, if it states one.
async fn within<T>(
    limit: Duration,
    clock: &StorageClock,
    operation: impl Future<Output = object_store::Result<T>>,
) -> Result<(T, Option<SystemTime>), BucketError> {
    let exchange = Arc::new(Mutex::new(Exchange::default()));
    let sent = Instant::now();
    let done = timeout(limit, EXCHANGE.scope(Arc::clone(&exchange), operation)).await;
    let exchange = exchange.lock();
    if let Some(date) = exchange.date {
        clock.learn(date, sent, Instant::now());
    }
    match done {
        Err(_) => Err(BucketError::Silent(UpstreamFailure::Timeout)),
        Ok(Ok(done)) => Ok((done, exchange.date)),
        Ok(Err(error)) => Err(exchange.error(&error)),
    }
}

fn info(meta: &ObjectMeta, attributes: &Attributes, date: Option<SystemTime>) -> ObjectInfo {
    ObjectInfo {
        size: meta.size,
        etag: meta.e_tag.clone(),
        age: age_at(date, meta),
        media_type: attributes
            .get(&Attribute::ContentType)
            .map(|value| value.as_ref().to_owned()),
    }
}

/// Age of an object at this time of the storage.
fn age_at(date: Option<SystemTime>, meta: &ObjectMeta) -> Option<Duration> {
    let written = SystemTime::from(meta.last_modified);
    // The crate reports a missing `Last-Modified` as the epoch.
    let written = Some(written).filter(|written| *written > SystemTime::UNIX_EPOCH)?;
    Some(date?.duration_since(written).unwrap_or_default())
}

/// Body of an object.
struct Body {
    stream: BoxStream<'static, object_store::Result<Bytes>>,
    /// Bytes that are still to come.
    left: u64,
}

impl ObjectBody for Body {
    fn chunk(&mut self) -> ObjectChunk<'_> {
        Box::pin(async move {
            let next = match timeout(IDLE_TIMEOUT, self.stream.next()).await {
                Err(_) => Some(Err(BucketError::Silent(UpstreamFailure::Timeout))),
                Ok(Some(Err(error))) => Some(Err(BucketError::Silent(cause_of(&error)))),
                Ok(None) if self.left > 0 => Some(Err(BucketError::Silent(UpstreamFailure::ConnectionReset))),
                Ok(None) => None,
                Ok(Some(Ok(bytes))) => match self.left.checked_sub(bytes.len() as u64) {
                    Some(left) => {
                        self.left = left;
                        Some(Ok(bytes))
                    }
                    None => Some(Err(BucketError::Malformed)),
                },
            };
            if matches!(next, Some(Err(_))) {
                // Nothing follows an error.
                self.stream = futures_util::stream::empty().boxed();
                self.left = 0;
            }
            next
        })
    }
}

/// The failure of the HTTP client behind an error.
fn cause_of(error: &object_store::Error) -> UpstreamFailure {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(one) = next {
        if let Some(failure) = one.downcast_ref::<PlainFailure>() {
            return failure.cause;
        }
        next = one.source();
    }
    UpstreamFailure::ConnectionReset
}

/// A multipart upload.
struct Multipart(Box<dyn MultipartUpload>, Arc<StorageClock>);

impl Upload for Multipart {
    fn part(&mut self, bytes: Bytes) -> BucketFuture<'_, ()> {
        let part = self.0.put_part(PutPayload::from_bytes(bytes));
        Box::pin(async move { within(WRITE_TIMEOUT, &self.1, part).await.map(drop) })
    }

    fn complete(&mut self) -> BucketFuture<'_, ()> {
        Box::pin(async move {
            let completing = self.0.complete();
            within(WRITE_TIMEOUT, &self.1, completing).await.map(drop)
        })
    }

    fn abort(&mut self) -> BucketFuture<'_, ()> {
        Box::pin(async move { within(WRITE_TIMEOUT, &self.1, self.0.abort()).await.map(drop) })
    }
}

/// A bucket in memory, for tests of other modules.
#[cfg(test)]
pub(crate) fn in_memory() -> Arc<dyn ObjectStorage> {
    let store = Arc::new(object_store::memory::InMemory::new());
    Arc::new(S3::over(store, "", Duration::from_secs(1)))
}
