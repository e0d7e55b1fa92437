//! Routes of the admin listener. The paths and methods of the API are those of the handlers' descriptions.

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::header::ALLOW;
use http::{Method, StatusCode, Uri};
use utoipa::OpenApi as _;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::BODY_BYTES_MAX;
use super::openapi::{self, Frame};
use super::response::Problem;
use super::{
    Admin, archive, ca, events, explain, health, images, maintenance, offline, page, pins, pull_jobs,
    refreshes, shared, status, transfers, upstreams, verdicts,
};

/// `Allow` of paths that accept no changes.
pub(super) const READ_METHODS: &str = "GET, HEAD";

/// Routes that the admin thread serves.
pub(super) fn health() -> OpenApiRouter<Admin> {
    OpenApiRouter::new()
        .routes(routes!(health::healthz))
        .routes(routes!(health::readyz))
        .routes(routes!(health::metrics))
}

/// Routes of the API.
pub(super) fn api() -> OpenApiRouter<Admin> {
    OpenApiRouter::with_openapi(Frame::openapi())
        .routes(routes!(status::status))
        .routes(routes!(status::series))
        .routes(routes!(images::list_images, images::delete_image))
        .routes(routes!(images::image))
        .routes(routes!(explain::why, explain::why_with_credential))
        .routes(routes!(upstreams::upstreams))
        .routes(routes!(shared::shared))
        .routes(routes!(transfers::transfers))
        .routes(routes!(events::events))
        .routes(routes!(events::stream_events))
        .routes(routes!(events::clients))
        .routes(routes!(pull_jobs::pulls, pull_jobs::start_pull))
        .routes(routes!(pull_jobs::pull))
        .routes(routes!(pins::pins, pins::pin))
        .routes(routes!(verdicts::blocks, verdicts::block))
        .routes(routes!(verdicts::approvals, verdicts::approve))
        .routes(routes!(refreshes::refresh))
        .routes(routes!(offline::offline, offline::switch_offline))
        .routes(routes!(maintenance::collect))
        .routes(routes!(maintenance::verification, maintenance::verify))
        .routes(routes!(archive::export))
        .routes(routes!(archive::import))
        .routes(routes!(openapi::openapi))
        .routes(routes!(ca::ca))
}

/// The service of the admin thread.
pub(super) fn health_service(admin: &Admin) -> Router {
    let (router, _) = health().split_for_parts();
    router.with_state(admin.clone())
}

/// The service of the main runtime: the API and the page.
pub(super) fn api_service(admin: &Admin) -> Router {
    let (router, _) = api().split_for_parts();
    router
        .route("/", get(page::page))
        .route("/act", post(page::submit_form))
        .route("/style.css", get(page::style))
        .route("/live.js", get(page::script))
        .route("/icon.svg", get(page::icon))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(admin.clone())
}

async fn unknown_path(method: Method, uri: Uri) -> Response {
    let path = uri.path();
    if matches!(method, Method::GET | Method::HEAD) {
        return Problem::not_found(format!(
            "unknown path {path}; the API is described in /api/openapi.json"
        ))
        .into_response();
    }
    let problem = Problem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("{path} does not accept changes"),
    );
    ([(ALLOW, READ_METHODS)], problem).into_response()
}

/// The framework adds `Allow`.
async fn wrong_method(method: Method, uri: Uri) -> Problem {
    let path = uri.path();
    Problem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("{path} does not accept {method}"),
    )
}
