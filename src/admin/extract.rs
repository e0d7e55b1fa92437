//! Extractors: query, JSON and form of a request. Rejections are problem documents.

use std::str::FromStr;
use std::time::Duration;

use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{Form, FromRequest, FromRequestParts, Query, Request};
use bytes::Bytes;
use http::StatusCode;
use http::request::Parts;
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error};
use tokio::time::timeout;

use super::response::Problem;
use crate::oci;

/// Maximum size of a request body, except of an archive.
pub(super) const BODY_BYTES_MAX: usize = 64 * 1024;

/// Timeout for reading a request body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// The query of a request.
pub(super) struct Params<T>(pub(super) T);

impl<T: DeserializeOwned, S: Sync> FromRequestParts<S> for Params<T> {
    type Rejection = Problem;

    async fn from_request_parts(head: &mut Parts, _state: &S) -> Result<Self, Problem> {
        // Limits the size and the number of parameters.
        oci::Query::parse(head.uri.query()).map_err(|error| Problem::bad_request(error.to_string()))?;
        match Query::try_from_uri(&head.uri) {
            Ok(Query(params)) => Ok(Self(params)),
            Err(rejection) => Err(Problem::bad_request(describe(&rejection))),
        }
    }
}

/// The cause of a rejection is `name: message`; the messages are those of this module.
fn describe(rejection: &QueryRejection) -> String {
    let text = cause(rejection);
    match text.split_once(": ") {
        Some((name, message)) => format!("`{name}` {message}"),
        None => text,
    }
}

/// A JSON body. The framework's own extractor responds 422 to unknown or missing members, and this API 400.
pub(super) struct JsonBody<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let body = in_time(Bytes::from_request(request, state)).await?;
        let body = body.map_err(|rejection| unread(&rejection))?;
        serde_json::from_slice(&body)
            .map(Self)
            .map_err(|error| Problem::bad_request(format!("the body is invalid: {error}")))
    }
}

/// A submitted form.
pub(super) struct FormBody<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for FormBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let (head, body) = request.into_parts();
        let body = Bytes::from_request(Request::from_parts(head.clone(), body), state);
        let body = in_time(body).await?.map_err(|rejection| unread(&rejection))?;
        check_encoding(&body)?;
        let form = Form::from_request(Request::from_parts(head, body.into()), state).await;
        form.map(|Form(form)| Self(form)).map_err(|rejection| {
            let error = cause(&rejection);
            Problem::bad_request(format!("the form is invalid: {error}"))
        })
    }
}

/// Limits the size and the number of fields. The framework would replace invalid bytes and take an invalid escape as text.
fn check_encoding(form: &[u8]) -> Result<(), Problem> {
    let text = std::str::from_utf8(form).map_err(|_| Problem::bad_request("the form is not UTF-8"))?;
    oci::Query::parse(Some(&text.replace('+', "%20")))
        .map(drop)
        .map_err(|error| Problem::bad_request(format!("the form is invalid: {error}")))
}

async fn in_time<T>(reading: impl Future<Output = T>) -> Result<T, Problem> {
    timeout(BODY_TIMEOUT, reading).await.map_err(|_| {
        Problem::new(
            StatusCode::REQUEST_TIMEOUT,
            format!("the body was not received within {} s", BODY_TIMEOUT.as_secs()),
        )
    })
}

fn unread(rejection: &BytesRejection) -> Problem {
    if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
        return Problem::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body is larger than {BODY_BYTES_MAX} bytes"),
        );
    }
    let error = cause(rejection);
    Problem::bad_request(format!("the body could not be read: {error}"))
}

/// The cause of a rejection, without what the framework says before it.
fn cause(rejection: &dyn std::error::Error) -> String {
    rejection
        .source()
        .map_or_else(|| rejection.to_string(), ToString::to_string)
}

/// A number in a query. Empty counts as absent.
pub(super) fn number<'de, D: Deserializer<'de>, T: FromStr>(query: D) -> Result<Option<T>, D::Error> {
    let text = String::deserialize(query)?;
    if text.is_empty() {
        return Ok(None);
    }
    let number = text.parse().map(Some);
    number.map_err(|_| D::Error::custom(format!("is a number, not `{text}`")))
}

/// `true` or `false` in a query. Empty counts as absent.
pub(super) fn flag<'de, D: Deserializer<'de>>(query: D) -> Result<bool, D::Error> {
    match &*String::deserialize(query)? {
        "" | "false" => Ok(false),
        "true" => Ok(true),
        other => Err(D::Error::custom(format!("is true or false, not `{other}`"))),
    }
}

/// A text that is compared without case.
pub(super) fn lowercase<'de, D: Deserializer<'de>>(query: D) -> Result<String, D::Error> {
    Ok(String::deserialize(query)?.to_lowercase())
}

/// A list in a query, separated by commas. Empty counts as absent.
pub(super) fn list<'de, D: Deserializer<'de>>(query: D) -> Result<Vec<String>, D::Error> {
    let text = String::deserialize(query)?;
    if text.is_empty() {
        return Ok(Vec::new());
    }
    Ok(text.split(',').map(str::to_owned).collect())
}
