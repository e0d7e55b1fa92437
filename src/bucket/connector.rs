//! HTTP connector of the S3 client: its requests go through the HTTP client for upstreams.
//!
//! It also records how the last request of an operation ended, because `object_store` hides statuses, error codes and
//! `Date` in texts.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use http::header::{CONTENT_RANGE, DATE};
use http::{HeaderMap, Method, StatusCode, Uri};
use http_body_util::{BodyExt as _, Limited};
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody,
    HttpService,
};
use parking_lot::Mutex;
use tokio::time::timeout;

use super::{BucketCredential, BucketError, BucketSettings, BucketSettingsError};
use crate::oci::UpstreamFailure;
use crate::upstream::{Origin, PlainBody, PlainClient, PlainFailure, PlainSettings, ProxyChoice, Transport};

/// Timeout of a connection. A bucket in the region of its caches is a few milliseconds away.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);

/// Timeout of a response after the request was sent. Reads have a shorter one, by their setting.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(60);

/// Maximum size of an error, a credential or another document.
const DOCUMENT_BYTES_MAX: usize = 1024 * 1024;

/// Maximum length of an error code in messages.
const CODE_BYTES_MAX: usize = 64;

/// Longest name of an object in an error.
const NAME_CHARS_MAX: usize = 200;

/// The credential service of containers.
const CONTAINER_SERVICE: &str = "http://169.254.170.2";
/// The metadata service of virtual machines.
const METADATA_SERVICE: &str = "http://169.254.169.254";

tokio::task_local! {
    /// The exchange of the running operation.
    pub(super) static EXCHANGE: Arc<Mutex<Exchange>>;
}

/// How the last request of an operation ended.
#[derive(Debug, Default)]
pub(super) struct Exchange {
    outcome: Option<Outcome>,
    /// Time of day at the storage, by its `Date`.
    pub(super) date: Option<SystemTime>,
}

#[derive(Debug)]
struct Outcome {
    /// Another service than the bucket was requested, for the credential.
    for_credential: bool,
    result: Result<StatusResult, UpstreamFailure>,
}

#[derive(Debug)]
struct StatusResult {
    status: StatusCode,
    code: Option<Arc<str>>,
    region: Option<Arc<str>>,
    /// An object was requested and not written.
    is_read: bool,
}

impl Exchange {
    /// The error of an operation that failed with `error`.
    pub(super) fn error(&self, error: &object_store::Error) -> BucketError {
        use object_store::Error as E;
        if let E::InvalidPath { source } = error {
            return BucketError::Name(invalid_name(source));
        }
        let Some(Outcome {
            for_credential,
            result,
        }) = &self.outcome
        else {
            return match error {
                E::NotFound { .. } => BucketError::Absent,
                E::AlreadyExists { .. } | E::Precondition { .. } => BucketError::Exists,
                E::PermissionDenied { .. } | E::Unauthenticated { .. } => {
                    BucketError::Denied("access denied".into())
                }
                // No request was sent.
                error => BucketError::Credential(error.to_string().into()),
            };
        };
        match result {
            Err(cause) if *for_credential => {
                BucketError::Credential(format!("the credential service {cause}").into())
            }
            Err(cause) => BucketError::Silent(*cause),
            Ok(StatusResult { status, code, .. }) if *for_credential => {
                let code = code.as_ref().map(|code| format!(" ({code})")).unwrap_or_default();
                let status = status.as_u16();
                BucketError::Credential(
                    format!("the credential service responded with status {status}{code}").into(),
                )
            }
            Ok(result) => result.error(),
        }
    }
}

/// The name that cannot be a path, without control characters and of a bounded length.
fn invalid_name(error: &object_store::path::Error) -> Arc<str> {
    use object_store::path::Error as E;
    let name = match error {
        E::EmptySegment { path } | E::BadSegment { path, .. } => path.as_str(),
        _ => "",
    };
    name.escape_debug()
        .take(NAME_CHARS_MAX)
        .collect::<String>()
        .into()
}

impl StatusResult {
    fn error(&self) -> BucketError {
        let code = self.code.as_deref();
        let denied = || BucketError::Denied(code.unwrap_or(self.status.as_str()).into());
        match self.status.as_u16() {
            404 if code == Some("NoSuchBucket") => BucketError::NoBucket,
            // 416: the object ends before the offset.
            404 | 416 => BucketError::Absent,
            409 | 412 => BucketError::Exists,
            301 | 302 | 307 | 308 => {
                BucketError::Region(self.region.clone().unwrap_or_else(|| "not stated".into()))
            }
            400 if code == Some("RequestTimeout") => BucketError::Busy(400),
            // The object alone, which is archived or whose key is gone. A write with such a key fails for every object.
            400 | 403 if self.is_read && code.is_some_and(is_of_object) => {
                BucketError::Unreadable(code.unwrap_or_default().into())
            }
            400 | 401 | 403 => denied(),
            status @ (408 | 429 | 500..) => BucketError::Busy(status),
            _ => BucketError::Malformed,
        }
    }
}

/// HTTP client of one bucket and of the service of its credential.
#[derive(Clone)]
pub(super) struct Connector(Arc<Inner>);

struct Inner {
    bucket: PlainClient,
    /// For the credential, without an outbound proxy where the service is on this machine's link.
    credential: Option<PlainClient>,
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connector")
    }
}

impl Connector {
    pub(super) fn new(
        settings: &BucketSettings,
        transport: &Transport,
    ) -> Result<Connector, BucketSettingsError> {
        let client = |origin: Origin, proxy| {
            let settings = PlainSettings {
                origins: vec![origin],
                roots: &settings.roots,
                proxy,
                connect_timeout: CONNECT_TIMEOUT,
            };
            PlainClient::new(settings, transport)
        };
        let local = |url: &str| {
            url.parse().map_err(|error: crate::upstream::OriginError| {
                BucketSettingsError::Settings(error.to_string())
            })
        };
        let credential = match &settings.credential {
            BucketCredential::Key { .. } | BucketCredential::Missing => None,
            BucketCredential::WebIdentity { sts, .. } => Some(client(sts.clone(), &settings.proxy)?),
            BucketCredential::Container { .. } => {
                Some(client(local(CONTAINER_SERVICE)?, &ProxyChoice::None)?)
            }
            BucketCredential::Pod { origin, .. } => Some(client(origin.clone(), &ProxyChoice::None)?),
            BucketCredential::Instance => Some(client(local(METADATA_SERVICE)?, &ProxyChoice::None)?),
        };
        let bucket = client(settings.endpoint.clone(), &settings.proxy)?;
        Ok(Connector(Arc::new(Inner { bucket, credential })))
    }
}

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for Connector {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let is_object = self.0.bucket.is_for(&parts.uri);
        let client = match &self.0.credential {
            Some(credential) if !is_object => credential,
            _ => &self.0.bucket,
        };
        let is_stream = is_object && parts.method == Method::GET;
        let response = send(client, parts, body, is_stream).await;
        let for_credential = !is_object;
        match response {
            Ok((response, date, result)) => {
                note(Outcome {
                    for_credential,
                    result: Ok(result),
                });
                if let Some(date) = date.filter(|_| is_object) {
                    let _no_operation = EXCHANGE.try_with(|exchange| exchange.lock().date = Some(date));
                }
                Ok(response)
            }
            Err(failure) => {
                tracing::debug!(cause = %failure.cause, detail = failure.detail.as_deref(), "failed to request the bucket");
                note(Outcome {
                    for_credential,
                    result: Err(failure.cause),
                });
                Err(http_error(failure))
            }
        }
    }
}

fn note(outcome: Outcome) {
    // Outside an operation it is not read.
    let _no_operation = EXCHANGE.try_with(|exchange| exchange.lock().outcome = Some(outcome));
}

/// Retries are decided here and not by the crate.
fn http_error(failure: PlainFailure) -> HttpError {
    HttpError::new(HttpErrorKind::Unknown, failure)
}

type Sent = (HttpResponse, Option<SystemTime>, StatusResult);

async fn send(
    client: &PlainClient,
    parts: http::request::Parts,
    body: bytes::Bytes,
    is_stream: bool,
) -> Result<Sent, PlainFailure> {
    let uri: Uri = parts.uri;
    let is_read = matches!(parts.method, Method::GET | Method::HEAD);
    let sending = client.send(parts.method, uri, parts.headers, (body, RESPONSE_TIMEOUT));
    let (head, body) = sending.await?.into_parts();
    check_content_range(&head.headers)?;
    let date = head.headers.get(DATE).and_then(|date| date.to_str().ok());
    let date = date.and_then(|date| httpdate::parse_http_date(date).ok());
    let mut result = StatusResult {
        status: head.status,
        code: None,
        region: header(&head.headers, "x-amz-bucket-region"),
        is_read,
    };
    if head.status.is_success() && is_stream {
        let body = HttpResponseBody::new(body.map_err(http_error));
        return Ok((http::Response::from_parts(head, body), date, result));
    }
    let document = collect(body).await?;
    if !head.status.is_success() {
        result.code = error_code(&document);
    }
    let response = http::Response::from_parts(head, HttpResponseBody::from(document));
    Ok((response, date, result))
}

async fn collect(body: PlainBody) -> Result<bytes::Bytes, PlainFailure> {
    let collecting = Limited::new(body, DOCUMENT_BYTES_MAX).collect();
    match timeout(RESPONSE_TIMEOUT, collecting).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) => Err(match error.downcast::<PlainFailure>() {
            Ok(failure) => *failure,
            Err(_) => UpstreamFailure::TooLarge.into(),
        }),
        Err(_) => Err(UpstreamFailure::Timeout.into()),
    }
}

fn header(headers: &HeaderMap, name: &str) -> Option<Arc<str>> {
    let value = headers.get(name)?.to_str().ok()?;
    is_plain(value).then(|| value.into())
}

/// Whether a name that the storage sent may be shown.
fn is_plain(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= CODE_BYTES_MAX
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
}

/// Whether an error code is about one object and not about the bucket.
fn is_of_object(code: &str) -> bool {
    code == "InvalidObjectState" || code.starts_with("KMS.")
}

/// `<Code>` of an error document of S3.
fn error_code(document: &[u8]) -> Option<Arc<str>> {
    let text = std::str::from_utf8(document).ok()?;
    let (_, rest) = text.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    is_plain(code).then(|| code.into())
}

/// Rejects a range that ends at the largest number, to which `object_store` adds one.
fn check_content_range(headers: &HeaderMap) -> Result<(), PlainFailure> {
    let Some(range) = headers.get(CONTENT_RANGE) else {
        return Ok(());
    };
    let last = range.to_str().ok().and_then(|range| {
        let (range, _) = range.split_once('/')?;
        let (_, last) = range.rsplit_once('-')?;
        last.trim().parse::<u64>().ok()
    });
    // `bytes */123` of a 416 has no range.
    if last == Some(u64::MAX) {
        return Err(UpstreamFailure::Malformed.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    fn of(status: u16, code: Option<&str>) -> BucketError {
        result_of(status, code, true)
    }

    fn result_of(status: u16, code: Option<&str>, is_read: bool) -> BucketError {
        let exchange = Exchange {
            outcome: Some(Outcome {
                for_credential: false,
                result: Ok(StatusResult {
                    status: StatusCode::from_u16(status).unwrap(),
                    code: code.map(Into::into),
                    region: None,
                    is_read,
                }),
            }),
            date: None,
        };
        exchange.error(&object_store::Error::NotImplemented {
            operation: "x".into(),
            implementer: "y".into(),
        })
    }

    #[test]
    fn status_and_code_name_the_fault() {
        use super::super::Fault;
        let table = [
            (404, Some("NoSuchKey"), BucketError::Absent, Fault::None),
            (404, None, BucketError::Absent, Fault::None),
            (404, Some("NoSuchBucket"), BucketError::NoBucket, Fault::Operator),
            (412, None, BucketError::Exists, Fault::None),
            (
                409,
                Some("ConditionalRequestConflict"),
                BucketError::Exists,
                Fault::None,
            ),
            (
                403,
                Some("RequestTimeTooSkewed"),
                BucketError::Denied("RequestTimeTooSkewed".into()),
                Fault::Operator,
            ),
            (403, None, BucketError::Denied("403".into()), Fault::Operator),
            (
                400,
                Some("ExpiredToken"),
                BucketError::Denied("ExpiredToken".into()),
                Fault::Operator,
            ),
            (
                301,
                Some("PermanentRedirect"),
                BucketError::Region("not stated".into()),
                Fault::Operator,
            ),
            (503, Some("SlowDown"), BucketError::Busy(503), Fault::Service),
            (429, None, BucketError::Busy(429), Fault::Service),
            (416, Some("InvalidRange"), BucketError::Absent, Fault::None),
            (
                403,
                Some("InvalidObjectState"),
                BucketError::Unreadable("InvalidObjectState".into()),
                Fault::None,
            ),
            (
                400,
                Some("KMS.DisabledException"),
                BucketError::Unreadable("KMS.DisabledException".into()),
                Fault::None,
            ),
            (200, None, BucketError::Malformed, Fault::Service),
        ];
        for (status, code, error, fault) in table {
            assert_eq!(of(status, code), error, "{status} {code:?}");
            assert_eq!(error.fault(), fault, "{status} {code:?}");
        }
    }

    #[test]
    fn write_with_a_disabled_key_is_denied() {
        let error = result_of(400, Some("KMS.DisabledException"), false);
        assert_eq!(error, BucketError::Denied("KMS.DisabledException".into()));
    }

    #[test]
    fn error_code_is_read_from_the_document() {
        let document = br#"<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>m</Message></Error>"#;
        assert_eq!(error_code(document).as_deref(), Some("SlowDown"));
        for text in ["", "<Code>", "<Code></Code>", "<Code>\u{1b}[2J</Code>"] {
            assert_eq!(error_code(text.as_bytes()), None, "{text:?}");
        }
    }

    #[test]
    fn largest_content_range_is_malformed() {
        let headers = |range: &str| HeaderMap::from_iter([(CONTENT_RANGE, range.parse().unwrap())]);
        assert!(check_content_range(&headers("bytes 0-18446744073709551615/9")).is_err());
        for range in ["bytes 0-9/10", "bytes */10", "bytes 0-99999999999999999999999/9"] {
            assert!(check_content_range(&headers(range)).is_ok(), "{range}");
        }
    }
}
