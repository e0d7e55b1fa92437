//! `OpenAPI` document, generated from the handlers, their parameters and their response types.
//!
//! The checks before the handlers (`auth`, `extract`) have responses of their own; they are added here.

use std::sync::LazyLock;

use axum::response::IntoResponse;
use http::header::CONTENT_TYPE;
use utoipa::OpenApi;
use utoipa::openapi::path::{Operation, ParameterIn};
use utoipa::openapi::schema::{Schema, SchemaType, Type};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{Content, OpenApi as Document, Ref, RefOr, Response};

use super::response::{PROBLEM, ProblemDocument};
use super::{health, router};

static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
    let mut document = router::api().merge(router::health()).into_openapi();
    complete(&mut document);
    document.to_json().unwrap_or_default()
});

/// The part of the document that no handler has.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "ifnewer admin API",
        version = "1",
        description = "Admin API of the cache, on a separate listener, which is on loopback by default. If \
                       listen.admin_token_file is set, requests over TCP need the token, except health and metrics. \
                       Errors are problem documents (RFC 9457).",
    ),
    components(schemas(ProblemDocument)),
    security((), ("token" = [])),
)]
pub(super) struct Frame;

/// This document.
#[utoipa::path(get, path = "/api/openapi.json", responses((status = 200, body = Object)))]
pub(super) async fn openapi() -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], DOCUMENT.as_str())
}

fn complete(document: &mut Document) {
    for (path, item) in &mut document.paths.paths {
        let is_health = health::PATHS.contains(&path.as_str());
        let operations = [
            (&mut item.get, false),
            (&mut item.post, true),
            (&mut item.delete, true),
        ];
        for (operation, is_change) in operations {
            if let Some(operation) = operation {
                if !is_health {
                    add_checks(operation, is_change);
                }
                describe_responses(operation);
            }
        }
    }
    if let Some(components) = &mut document.components {
        let token = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        components.add_security_scheme("token", token);
        for (name, schema) in &mut components.schemas {
            if let (RefOr::T(schema), false) = (schema, name.ends_with("Request")) {
                require_nullable(schema);
            }
        }
    }
}

/// Adds the responses of the checks before a handler.
fn add_checks(operation: &mut Operation, is_change: bool) {
    let takes_json = match &operation.request_body {
        Some(RefOr::T(body)) => body.content.contains_key("application/json"),
        _ => false,
    };
    let has_query = operation.parameters.iter().flatten().any(
        |parameter| matches!(parameter, RefOr::T(parameter) if parameter.parameter_in == ParameterIn::Query),
    );
    let checks = [
        ("400", takes_json || has_query, "The request is invalid."),
        ("401", true, "The admin token is missing or wrong."),
        ("403", is_change, "Cross-site request rejected."),
        ("413", takes_json, "The body is too large."),
        ("415", takes_json, "The body must be JSON."),
        ("421", true, "The Host header does not name this machine."),
    ];
    for (status, applies, description) in checks {
        if applies {
            let responses = &mut operation.responses.responses;
            let response = responses.entry(status.to_owned());
            response.or_insert_with(|| Response::new(description).into());
        }
    }
}

/// A success needs no words, and every error is a problem document.
fn describe_responses(operation: &mut Operation) {
    for (status, response) in &mut operation.responses.responses {
        let RefOr::T(response) = response else { continue };
        if status.as_str() >= "400" {
            let document = Content::new(Some(Ref::from_schema_name("Problem")));
            response.content.insert(PROBLEM.to_owned(), document.into());
        } else if response.description.is_empty() {
            "Success.".clone_into(&mut response.description);
        }
    }
}

/// A response has each of its members, also those that are null. Requests may leave them out.
fn require_nullable(schema: &mut Schema) {
    match schema {
        Schema::AllOf(parts) => {
            for part in &mut parts.items {
                if let RefOr::T(part) = part {
                    require_nullable(part);
                }
            }
        }
        Schema::Object(object) => {
            let nullable = object.properties.iter().filter(|(_, member)| is_nullable(member));
            object.required.extend(nullable.map(|(name, _)| name.clone()));
        }
        _ => {}
    }
}

fn is_nullable(member: &RefOr<Schema>) -> bool {
    let has_null = |kind: &SchemaType| match kind {
        SchemaType::Type(kind) => *kind == Type::Null,
        SchemaType::Array(kinds) => kinds.contains(&Type::Null),
        SchemaType::AnyValue => false,
    };
    match member {
        RefOr::T(Schema::Object(object)) => has_null(&object.schema_type),
        RefOr::T(Schema::Array(array)) => has_null(&array.schema_type),
        RefOr::T(Schema::OneOf(any)) => any.items.iter().any(is_nullable),
        _ => false,
    }
}
