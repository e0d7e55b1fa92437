//! Pushes and deletions: chunked uploads and commits.

use super::body::Piped;
use super::serve::failed;
use super::{Seen, Shared, sha256};
use bytes::Bytes;
use http::header::LOCATION;
use http::{Response, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Uploads in progress and received content.
#[derive(Default)]
pub(super) struct Uploads {
    parts: BTreeMap<String, Vec<u8>>,
    made: usize,
    received: u64,
    /// `Location` without scheme and host.
    relative: bool,
}

impl super::Upstream {
    /// Body bytes of writes received.
    pub fn bytes_received(&self) -> u64 {
        self.state(|state| state.uploads.received)
    }

    /// Sends a relative `Location` for uploads.
    pub fn locates_relatively(&self) {
        self.state(|state| state.uploads.relative = true);
    }
}

pub(super) async fn write(
    shared: &Arc<Shared>,
    seen: &Seen,
    name: &str,
    rest: &str,
    mut body: Incoming,
) -> Response<Piped> {
    let upload = rest.strip_prefix("/blobs/uploads/").filter(|id| !id.is_empty());
    let mut manifest = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else {
            return failed(shared, seen, 400, "BLOB_UPLOAD_INVALID");
        };
        let Ok(bytes) = frame.into_data() else { continue };
        shared.state(|state| {
            state.uploads.received += bytes.len() as u64;
            match upload {
                Some(id) => state
                    .uploads
                    .parts
                    .entry(id.to_owned())
                    .or_default()
                    .extend(&bytes),
                None => manifest.extend(&bytes),
            }
        });
    }
    match (seen.method.as_str(), upload) {
        ("POST", None) => {
            let id = shared.state(|state| {
                state.uploads.made += 1;
                format!("upload-{}", state.uploads.made)
            });
            goes_on(shared, name, &id, 0)
        }
        ("PATCH", Some(id)) => {
            let size = shared.state(|state| state.uploads.parts.get(id).map_or(0, Vec::len));
            goes_on(shared, name, id, size)
        }
        ("PUT", Some(id)) => finish(shared, seen, name, id),
        ("PUT", None) => name_manifest(shared, seen, name, rest, &Bytes::from(manifest)),
        ("DELETE", None) => delete(shared, seen, name, rest),
        ("GET", Some(id)) => goes_on(shared, name, id, 0),
        _ => failed(shared, seen, 405, "UNSUPPORTED"),
    }
}

fn goes_on(shared: &Arc<Shared>, name: &str, id: &str, size: usize) -> Response<Piped> {
    let relative = shared.state(|state| state.uploads.relative);
    let base = if relative { "" } else { shared.base.as_str() };
    Response::builder()
        .status(StatusCode::ACCEPTED)
        .header(
            LOCATION,
            format!("{base}/v2/{name}/blobs/uploads/{id}?_state=secret"),
        )
        .header("docker-upload-uuid", id)
        .header("range", format!("0-{}", size.saturating_sub(1)))
        .body(Piped::empty())
        .unwrap()
}

fn finish(shared: &Arc<Shared>, seen: &Seen, name: &str, id: &str) -> Response<Piped> {
    let bytes = shared.state(|state| state.uploads.parts.remove(id).unwrap_or_default());
    let digest = sha256(&bytes);
    if !seen
        .query
        .as_deref()
        .unwrap_or_default()
        .contains(&digest.replace(':', "%3A"))
        && !seen.query.as_deref().unwrap_or_default().contains(&digest)
    {
        return failed(shared, seen, 400, "DIGEST_INVALID");
    }
    shared.state(|state| {
        let held = state.repositories.entry(name.to_owned()).or_default();
        held.blobs.insert(digest.clone(), bytes.into());
    });
    created(shared, &format!("/v2/{name}/blobs/{digest}"), &digest)
}

fn name_manifest(
    shared: &Arc<Shared>,
    seen: &Seen,
    name: &str,
    rest: &str,
    bytes: &Bytes,
) -> Response<Piped> {
    let Some(reference) = rest.strip_prefix("/manifests/") else {
        return failed(shared, seen, 404, "NAME_UNKNOWN");
    };
    let digest = sha256(bytes);
    let kind = seen.header("content-type").unwrap_or_default().to_owned();
    shared.state(|state| {
        let held = state.repositories.entry(name.to_owned()).or_default();
        held.manifests.insert(digest.clone(), (kind, bytes.clone()));
        let manifest: serde_json::Value = serde_json::from_slice(bytes).unwrap_or_default();
        if let Some(subject) = manifest["subject"]["digest"].as_str() {
            let kind = manifest["artifactType"].as_str().unwrap_or_default();
            held.attached
                .push((subject.to_owned(), kind.to_owned(), digest.clone()));
        }
        if !reference.contains(':') {
            held.tags.insert(reference.to_owned(), vec![digest.clone()]);
        }
        for pair in seen.query.as_deref().unwrap_or_default().split('&') {
            if let Some(tag) = pair.strip_prefix("tag=") {
                held.tags.insert(tag.to_owned(), vec![digest.clone()]);
            }
        }
    });
    created(shared, &format!("/v2/{name}/manifests/{digest}"), &digest)
}

fn created(shared: &Arc<Shared>, path: &str, digest: &str) -> Response<Piped> {
    Response::builder()
        .status(StatusCode::CREATED)
        .header(LOCATION, format!("{}{path}", shared.base))
        .header("docker-content-digest", digest)
        .body(Piped::empty())
        .unwrap()
}

fn delete(shared: &Arc<Shared>, seen: &Seen, name: &str, rest: &str) -> Response<Piped> {
    let was_there = shared.state(|state| {
        let held = state.repositories.entry(name.to_owned()).or_default();
        if let Some(reference) = rest.strip_prefix("/manifests/") {
            let gone = reference.to_owned();
            held.tags
                .retain(|tag, digests| *tag != gone && !digests.contains(&gone));
            held.manifests.remove(reference).is_some() || !reference.contains(':')
        } else {
            let digest = rest.strip_prefix("/blobs/").unwrap_or_default();
            held.blobs.remove(digest).is_some()
        }
    });
    if !was_there {
        return failed(shared, seen, 404, "MANIFEST_UNKNOWN");
    }
    Response::builder()
        .status(StatusCode::ACCEPTED)
        .body(Piped::empty())
        .unwrap()
}
