//! `/ca.pem`: the certificate of the CA.

use axum::extract::State;
use http::HeaderName;
use http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};

use super::Admin;
use super::response::{Problem, blocking};

/// Certificate of the CA that TLS clients must trust.
#[utoipa::path(
    get,
    path = "/ca.pem",
    responses(
        (status = 200, body = String, content_type = "application/x-pem-file"),
        (status = 404, description = "Not found."),
    )
)]
pub(super) async fn ca(
    State(admin): State<Admin>,
) -> Result<([(HeaderName, &'static str); 2], Vec<u8>), Problem> {
    let Some(path) = admin.ca.clone() else {
        return Err(Problem::not_found(
            "the certificate is configured by the operator; its CA is not known here",
        ));
    };
    let read = blocking(move || Ok(std::fs::read(path))).await?;
    let pem = read.map_err(|error| Problem::not_found(format!("the CA cannot be read: {error}")))?;
    let headers = [
        (CONTENT_TYPE, "application/x-pem-file"),
        (CONTENT_DISPOSITION, "attachment; filename=\"ifnewer-ca.pem\""),
    ];
    Ok((headers, pem))
}
