//! Tests of the bucket client: over storage in memory, and against a scripted server that may misbehave.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use object_store::memory::InMemory;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::s3::S3;
use super::*;
use crate::oci::{Algorithm, UpstreamFailure};

fn digest(content: &str) -> Digest {
    Digest::of(Algorithm::Sha256, content.as_bytes())
}

fn in_memory() -> S3 {
    S3::over(Arc::new(InMemory::new()), "team-a", Duration::from_secs(1))
}

async fn read(object: &mut Object) -> Result<Vec<u8>, BucketError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = object.body.chunk().await {
        bytes.extend_from_slice(&chunk?);
    }
    Ok(bytes)
}

/// A server that answers each request with the next response, then closes the connection. It records the requests.
struct Front {
    origin: Origin,
    requests: Arc<Mutex<Vec<String>>>,
}

async fn front(responses: Vec<&'static str>) -> Front {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = format!("http://{}", listener.local_addr().unwrap())
        .parse()
        .unwrap();
    let requests = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&requests);
    tokio::spawn(async move {
        for response in responses {
            let (mut stream, _) = listener.accept().await.unwrap();
            let request = receive(&mut stream).await;
            seen.lock().push(request);
            stream.write_all(response.as_bytes()).await.unwrap();
        }
        // Further connections are accepted and get no response.
        let mut silent = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            silent.push(stream);
        }
    });
    Front { origin, requests }
}

/// The head of a request, after its body was read.
async fn receive(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length")
                    .then(|| value.trim().parse::<usize>().unwrap())
            });
            if body.len() >= length.unwrap_or(0) {
                return head.to_owned();
            }
        }
        let count = stream.read(&mut buffer).await.unwrap();
        assert!(count > 0, "the request is complete");
        bytes.extend_from_slice(&buffer[..count]);
    }
}

fn settings(front: &Front) -> BucketSettings {
    BucketSettings {
        bucket: "images".into(),
        prefix: "team-a".into(),
        endpoint: front.origin.clone(),
        region: "eu-central-1".into(),
        credential: BucketCredential::Key {
            id: "AKIAEXAMPLE".into(),
            secret: Zeroizing::new("canary-secret".into()),
            token: None,
        },
        encryption: Encryption::Bucket,
        roots: Vec::new(),
        proxy: ProxyChoice::None,
        timeout: Duration::from_secs(10),
        client_endpoint: None,
    }
}

fn bucket(front: &Front) -> Arc<dyn ObjectStorage> {
    open(&settings(front), &Transport::system()).unwrap()
}

const ABSENT: &str = "HTTP/1.1 404 Not Found\r\nContent-Length: 40\r\nConnection: close\r\n\r\n\
    <Error><Code>NoSuchKey</Code></Error>   ";

#[test]
fn object_names_are_made_of_the_digest() {
    let digest = digest("a");
    let hex = digest.hex();
    let name = format!("v1/blobs/sha256/{}/{hex}", &hex[..2]);
    assert_eq!(ObjectKey::blob(&digest).as_str(), name);
    assert_eq!(
        ObjectKey::claim(&digest).as_str(),
        name.replace("blobs", "claims")
    );
    assert_eq!(
        ObjectKey::part(&digest, 1024).as_str(),
        format!("{}/0000000000001024", name.replace("blobs", "parts"))
    );
    assert!(ObjectKey::manifest(&digest).as_str().starts_with("v1/manifests/"));
    assert_eq!(
        ObjectKey::probe(&[7; 16]).as_str(),
        format!("v1/probe/{}", "07".repeat(16))
    );
}

#[test]
fn part_size_grows_with_the_object() {
    assert_eq!(part_bytes(1), PART_BYTES);
    assert_eq!(part_bytes(PART_BYTES as u64 * 10_000), PART_BYTES);
    let large = PART_BYTES as u64 * 10_000 + 1;
    assert!(large.div_ceil(part_bytes(large) as u64) <= 10_000);
}

#[test]
fn debug_output_contains_no_secret() {
    let credential = BucketCredential::Key {
        id: "canary".into(),
        secret: Zeroizing::new("canary".into()),
        token: Some(Zeroizing::new("canary".into())),
    };
    assert_eq!(format!("{credential:?}"), "access key");
}

#[tokio::test]
async fn object_is_read_from_any_offset() {
    let (bucket, key) = (in_memory(), ObjectKey::blob(&digest("0123456789")));
    assert_eq!(bucket.get(&key, 0).await.err(), Some(BucketError::Absent));
    bucket
        .create(&key, Bytes::from_static(b"0123456789"), None)
        .await
        .unwrap();
    for from in [0, 1, 9] {
        let mut object = bucket.get(&key, from).await.unwrap();
        let expected = &b"0123456789"[usize::try_from(from).unwrap()..];
        assert_eq!(
            (object.info.size, read(&mut object).await.unwrap()),
            (10, expected.to_vec())
        );
    }
    assert_eq!(bucket.head(&key).await.unwrap().size, 10);
    bucket.delete(&key).await.unwrap();
    bucket.delete(&key).await.unwrap();
    assert_eq!(bucket.head(&key).await.err(), Some(BucketError::Absent));
}

#[tokio::test]
async fn object_is_created_once_and_updated_by_version() {
    let (bucket, key) = (in_memory(), ObjectKey::probe(&[1; 16]));
    let create = |text| bucket.create(&key, Bytes::from_static(text), None);
    let first = create(b"1").await.unwrap().unwrap();
    assert_eq!(create(b"2").await, Err(BucketError::Exists));
    let update = |etag| {
        let (bucket, key) = (&bucket, &key);
        async move { bucket.update(key, Bytes::from_static(b"3"), etag).await }
    };
    update(&first).await.unwrap();
    assert_eq!(
        update(&first).await,
        Err(BucketError::Exists),
        "it has another version"
    );
    bucket.put(&key, Bytes::from_static(b"4"), None).await.unwrap();
    let mut object = bucket.get(&key, 0).await.unwrap();
    assert_eq!(read(&mut object).await.unwrap(), b"4");
}

#[tokio::test]
async fn upload_of_parts_makes_one_object() {
    let (bucket, key) = (in_memory(), ObjectKey::blob(&digest("parts")));
    let mut upload = bucket.upload(&key).await.unwrap();
    upload.part(Bytes::from(vec![1; PART_BYTES])).await.unwrap();
    upload.part(Bytes::from_static(b"end")).await.unwrap();
    assert_eq!(
        bucket.head(&key).await.err(),
        Some(BucketError::Absent),
        "not before the end"
    );
    upload.complete().await.unwrap();
    assert_eq!(bucket.head(&key).await.unwrap().size, PART_BYTES as u64 + 3);
    let mut other = bucket.upload(&ObjectKey::blob(&digest("aborted"))).await.unwrap();
    other.part(Bytes::from_static(b"x")).await.unwrap();
    other.abort().await.unwrap();
}

#[tokio::test]
async fn requests_are_path_style_and_signed() {
    let front = front(vec![ABSENT]).await;
    let key = ObjectKey::blob(&digest("a"));
    assert_eq!(bucket(&front).get(&key, 0).await.err(), Some(BucketError::Absent));
    let request = front.requests.lock()[0].to_ascii_lowercase();
    let path = format!("get /images/team-a/{key} http/1.1");
    assert!(request.starts_with(&path), "{request}");
    assert!(
        request.contains("authorization: aws4-hmac-sha256 credential=akiaexample/"),
        "{request}"
    );
    assert!(
        !request.contains("canary-secret") && !request.contains("traceparent"),
        "{request}"
    );
}

#[tokio::test]
async fn age_is_by_the_clock_of_the_storage() {
    let front = front(vec![
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nETag: \"e\"\r\nConnection: close\r\n\
         Last-Modified: Thu, 01 Jan 1998 00:00:00 GMT\r\nDate: Thu, 01 Jan 1998 01:00:00 GMT\r\n\r\nab",
    ])
    .await;
    let key = ObjectKey::blob(&digest("a"));
    let mut object = bucket(&front).get(&key, 0).await.unwrap();
    assert_eq!(object.info.age, Some(Duration::from_secs(3600)));
    assert_eq!(read(&mut object).await.unwrap(), b"ab");
}

#[tokio::test]
async fn truncated_body_is_an_error() {
    let front = front(vec![
        "HTTP/1.1 200 OK\r\nContent-Length: 10\r\nETag: \"e\"\r\nConnection: close\r\n\r\nabcde",
    ])
    .await;
    let key = ObjectKey::blob(&digest("a"));
    let mut object = bucket(&front).get(&key, 0).await.unwrap();
    let silent = BucketError::Silent(UpstreamFailure::ConnectionReset);
    assert_eq!(read(&mut object).await, Err(silent));
    assert!(object.body.chunk().await.is_none(), "nothing follows an error");
}

#[tokio::test]
async fn ignored_or_wrong_range_is_malformed() {
    let responses = vec![
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nETag: \"e\"\r\nConnection: close\r\n\r\nab",
        "HTTP/1.1 206 Partial Content\r\nContent-Length: 1\r\nContent-Range: bytes 0-0/2\r\nETag: \"e\"\r\n\
         Connection: close\r\n\r\na",
        "HTTP/1.1 206 Partial Content\r\nContent-Length: 1\r\nContent-Range: bytes 1-18446744073709551615/2\r\n\
         ETag: \"e\"\r\nConnection: close\r\n\r\na",
    ];
    let count = responses.len();
    let front = front(responses).await;
    let (bucket, key) = (bucket(&front), ObjectKey::blob(&digest("a")));
    for _ in 0..count {
        let error = bucket.get(&key, 1).await.err().unwrap();
        assert!(
            matches!(
                error,
                BucketError::Malformed | BucketError::Silent(UpstreamFailure::Malformed)
            ),
            "{error}"
        );
    }
}

#[tokio::test]
async fn redirect_is_an_error_and_not_followed() {
    let front = front(vec![
        "HTTP/1.1 301 Moved Permanently\r\nLocation: http://127.0.0.1:1/x\r\nx-amz-bucket-region: us-west-2\r\n\
         Content-Length: 0\r\nConnection: close\r\n\r\n",
    ])
    .await;
    let key = ObjectKey::blob(&digest("a"));
    let error = bucket(&front).get(&key, 0).await.err();
    assert_eq!(error, Some(BucketError::Region("us-west-2".into())));
}

#[tokio::test]
async fn silent_bucket_costs_one_timeout() {
    let front = front(Vec::new()).await;
    let short = BucketSettings {
        timeout: Duration::from_millis(50),
        ..settings(&front)
    };
    let bucket = open(&short, &Transport::system()).unwrap();
    let error = bucket.get(&ObjectKey::blob(&digest("a")), 0).await.err();
    assert_eq!(error, Some(BucketError::Silent(UpstreamFailure::Timeout)));
}

#[tokio::test]
async fn error_document_without_end_is_limited() {
    let front = front(vec![
        "HTTP/1.1 503 Slow Down\r\nContent-Length: 9999999999\r\nConnection: close\r\n\r\n<Error>",
    ])
    .await;
    let error = bucket(&front)
        .get(&ObjectKey::blob(&digest("a")), 0)
        .await
        .err()
        .unwrap();
    assert!(
        matches!(error, BucketError::Silent(_) | BucketError::Busy(503)),
        "{error}"
    );
}

#[tokio::test]
async fn missing_credential_is_named() {
    let front = front(Vec::new()).await;
    let unreadable = BucketSettings {
        credential: BucketCredential::WebIdentity {
            token_file: "/nonexistent/token".into(),
            role: "arn:aws:iam::1:role/r".into(),
            session: None,
            sts: "https://sts.example".parse().unwrap(),
        },
        ..settings(&front)
    };
    let bucket = open(&unreadable, &Transport::system()).unwrap();
    let error = bucket.get(&ObjectKey::blob(&digest("a")), 0).await.err();
    assert!(matches!(error, Some(BucketError::Credential(_))), "{error:?}");
    assert!(front.requests.lock().is_empty());
}

#[tokio::test]
async fn bucket_without_credential_is_not_opened() {
    let front = front(Vec::new()).await;
    let without = BucketSettings {
        credential: BucketCredential::Missing,
        ..settings(&front)
    };
    let error = open(&without, &Transport::system()).err().unwrap();
    assert!(error.to_string().contains("AWS_ACCESS_KEY_ID"), "{error}");
}

#[tokio::test]
async fn client_for_one_origin_requests_no_other() {
    let front = front(Vec::new()).await;
    let settings = crate::upstream::PlainSettings {
        origins: vec![front.origin.clone()],
        roots: &[],
        proxy: &ProxyChoice::None,
        connect_timeout: Duration::from_secs(1),
    };
    let client = crate::upstream::PlainClient::new(settings, &Transport::system()).unwrap();
    for url in [
        "http://127.0.0.1:1/",
        "http://169.254.169.254/latest",
        "https://127.0.0.1/",
    ] {
        let sent = client.send(
            http::Method::GET,
            url.parse().unwrap(),
            http::HeaderMap::new(),
            (Bytes::new(), Duration::from_secs(1)),
        );
        let failure = sent.await.err().unwrap();
        assert!(
            matches!(failure.cause, UpstreamFailure::Redirects(_)),
            "{url}: {failure}"
        );
    }
}

#[tokio::test]
async fn presigned_url_is_of_the_endpoint_for_clients() {
    let front = front(vec![]).await;
    let key = ObjectKey::probe(&[1; 16]);
    let own = bucket(&front)
        .presign(&key, Duration::from_secs(60))
        .await
        .unwrap();
    assert!(
        own.starts_with(&format!("{}/images/team-a/v1/probe/", front.origin)),
        "{own}"
    );
    assert!(
        own.contains("X-Amz-Expires=60") && !own.contains("canary-secret"),
        "{own}"
    );
    let settings = BucketSettings {
        client_endpoint: Some("https://storage.example.org".parse().unwrap()),
        ..settings(&front)
    };
    let opened = open(&settings, &Transport::system()).unwrap();
    let url = opened.presign(&key, Duration::from_secs(60)).await.unwrap();
    assert!(
        url.starts_with("https://storage.example.org/images/team-a/v1/"),
        "{url}"
    );
}

/// A page of a listing with these objects, each of 10 bytes and written at 00:00.
fn page(date: &str, next: Option<&str>, keys: &[String]) -> &'static str {
    let written = "<LastModified>2026-11-28T00:00:00.000Z</LastModified>";
    let objects = keys.iter().fold(String::new(), |all, key| {
        all + "<Contents><Key>" + key + "</Key><Size>10</Size>" + written + "</Contents>"
    });
    let next = next.map(|token| format!("<NextContinuationToken>{token}</NextContinuationToken>"));
    let next = next.unwrap_or_default();
    let body = format!("<ListBucketResult>{objects}{next}</ListBucketResult>");
    let text = format!(
        "HTTP/1.1 200 OK\r\n{date}Content-Type: application/xml\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    Box::leak(text.into_boxed_str())
}

async fn listed(listing: &mut Box<dyn Listing>) -> Vec<Result<(String, Option<u64>), BucketError>> {
    let mut all = Vec::new();
    while let Some(next) = listing.next().await {
        all.push(next.map(|listed| (listed.key.to_string(), listed.age.map(|age| age.as_secs()))));
    }
    all
}

#[tokio::test]
async fn listing_has_ages_by_the_date_of_each_page() {
    let key = |name: &str| format!("team-a/v1/blobs/{name}");
    let front = front(vec![
        page(
            "Date: Sat, 28 Nov 2026 01:00:00 GMT\r\n",
            Some("more"),
            &[key("a"), key("b")],
        ),
        page("Date: Fri, 27 Nov 2026 23:00:00 GMT\r\n", None, &[key("c")]),
    ])
    .await;
    let objects = listed(&mut bucket(&front).list("v1", None)).await;
    let expected = [("a", 3600), ("b", 3600), ("c", 0)];
    let expected = expected.map(|(name, age)| Ok((format!("v1/blobs/{name}"), Some(age))));
    assert_eq!(objects, expected, "a time in the future has the age 0");
    let requests = front.requests.lock().clone();
    assert!(requests[0].contains("prefix=team-a%2Fv1%2F"), "{}", requests[0]);
    assert!(requests[1].contains("continuation-token=more"), "{}", requests[1]);
}

#[tokio::test]
async fn listing_without_a_date_has_no_ages() {
    let front = front(vec![page("", None, &["team-a/v1/blobs/a".to_owned()])]).await;
    let after = ObjectKey::listed("v1/blobs/0").unwrap();
    let objects = listed(&mut bucket(&front).list("v1/blobs", Some(&after))).await;
    assert_eq!(objects, [Ok(("v1/blobs/a".to_owned(), None))]);
    let request = front.requests.lock()[0].clone();
    assert!(
        request.contains("start-after=team-a%2Fv1%2Fblobs%2F0"),
        "{request}"
    );
}

#[tokio::test]
async fn listing_of_other_objects_is_malformed() {
    for foreign in ["team-b/v1/blobs/a", "team-a/v2/blobs/a", "team-ab/v1/blobs/a"] {
        let keys = [foreign.to_owned(), "team-a/v1/blobs/b".to_owned()];
        let front = front(vec![page("", None, &keys)]).await;
        let objects = listed(&mut bucket(&front).list("v1", None)).await;
        assert_eq!(objects, [Err(BucketError::Malformed)], "{foreign}");
    }
}

#[tokio::test]
async fn folder_marker_is_not_listed() {
    let keys = ["team-a/v1/".to_owned(), "team-a/v1/blobs/b".to_owned()];
    let front = front(vec![page("", None, &keys)]).await;
    let objects = listed(&mut bucket(&front).list("v1", None)).await;
    assert_eq!(objects, [Ok(("v1/blobs/b".to_owned(), None))]);
}

#[tokio::test]
async fn name_that_cannot_be_listed_is_reported() {
    for (key, escaped) in [
        ("team-a/v1/blobs//a", "team-a/v1/blobs//a"),
        ("team-a/v1/../\u{1b}[2J", "team-a/v1/../\\u{1b}[2J"),
    ] {
        let front = front(vec![page("", None, &[key.to_owned()])]).await;
        let objects = listed(&mut bucket(&front).list("v1", None)).await;
        assert_eq!(objects, [Err(BucketError::Name(escaped.into()))]);
        assert_eq!(BucketError::Name(escaped.into()).fault(), Fault::Operator);
    }
}

#[tokio::test]
async fn denied_page_ends_the_listing() {
    let denied = "HTTP/1.1 403 Forbidden\r\nContent-Length: 40\r\nConnection: close\r\n\r\n\
        <Error><Code>AccessDenied</Code></Error>";
    let front = front(vec![
        page("", Some("more"), &["team-a/v1/blobs/a".to_owned()]),
        denied,
    ])
    .await;
    let objects = listed(&mut bucket(&front).list("v1", None)).await;
    assert_eq!(objects.len(), 2);
    assert_eq!(objects[1], Err(BucketError::Denied("AccessDenied".into())));
}
