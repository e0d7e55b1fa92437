//! Canary check: pulls an image through dockerd and searches for it in the cache's log. Only this proves that the
//! cache is used.

use std::io;
use std::path::Path;
use std::time::Duration;

use http::Method;
use serde_json::Value;

use super::http_probe::{self, Target};
use super::{Check, CheckContext};

/// Timeout for pulling a small image.
const PULL_TIMEOUT: Duration = Duration::from_secs(180);

/// An image reference as users write it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) registry: String,
    /// With `library/` for official images of Docker Hub.
    pub(super) repository: String,
    pub(super) reference: String,
}

impl Image {
    /// Docker's defaults: Docker Hub without a registry, `latest` without a tag.
    pub(super) fn read(text: &str) -> Option<Self> {
        let (name, reference) = match (text.split_once('@'), text.rsplit_once(':')) {
            (Some((name, digest)), _) => (name, digest),
            (None, Some((name, tag))) if !tag.contains('/') => (name, tag),
            _ => (text, "latest"),
        };
        let (registry, rest) = match name.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (first, rest),
            _ => ("docker.io", name),
        };
        let registry = match registry {
            "index.docker.io" | "registry-1.docker.io" => "docker.io",
            other => other,
        };
        let repository = if registry == "docker.io" && !rest.contains('/') {
            format!("library/{rest}")
        } else {
            rest.to_owned()
        };
        let plain = |text: &str| {
            text.chars()
                .all(|c| c.is_ascii_alphanumeric() || "._-/:@".contains(c))
        };
        let image = Self {
            registry: registry.to_owned(),
            repository,
            reference: reference.to_owned(),
        };
        let is_valid = !rest.is_empty() && !reference.is_empty() && plain(text);
        is_valid.then_some(image)
    }

    fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    fn full_name(&self) -> String {
        let mark = if self.reference.contains(':') { '@' } else { ':' };
        format!("{}{mark}{}", self.name(), self.reference)
    }
}

/// A skipped canary check.
pub(super) fn canary_skipped(why: &str) -> Check {
    Check::skipped(
        "canary",
        format!("{why}: it is NOT proven that the cache is used"),
    )
}

/// Pulls the image through dockerd and searches for it in the cache's log.
pub(super) async fn pull_canary(context: &CheckContext<'_>, socket: &Path) -> Check {
    const NAME: &str = "canary";
    let Some(image) = Image::read(&context.options.canary) else {
        return Check::failed(
            NAME,
            format!("`{}` is not an image reference", context.options.canary),
            "set an image with --canary",
        );
    };
    let before = match last_event(context).await {
        Ok(Some(id)) => id,
        Ok(None) => return canary_skipped("listen.admin is off, so the log of the cache cannot be read"),
        Err(error) => return canary_skipped(&format!("the admin listener: {error}")),
    };
    let name = image.full_name();
    let present = http_probe::get(Target::Unix(socket), &format!("/images/{name}/json")).await;
    let present = present.is_ok_and(|reply| reply.status == 200);
    let pulled = pull(socket, &image).await;
    let events = events_after(context, before).await.unwrap_or_default();
    if !present && pulled.is_ok() {
        // The image was not present before. If the removal fails, an unused image remains.
        let _ = http_probe::request(
            Target::Unix(socket),
            Method::DELETE,
            &format!("/images/{name}"),
            PULL_TIMEOUT,
        )
        .await;
    }
    result(&image, &pulled, &events)
}

/// The result from the pull and the log.
pub(super) fn result(image: &Image, pulled: &Result<(), String>, events: &[Value]) -> Check {
    const NAME: &str = "canary";
    let name = image.full_name();
    let field = |event: &Value, name: &str| {
        event
            .get(name)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    // Events are newest first; the tag is requested before its content.
    let seen = events.iter().rev().find(|event| {
        let reference = field(event, "reference");
        field(event, "repository") == image.repository
            && (reference == image.reference || reference.contains(':'))
    });
    let decision = |event: &Value| {
        format!(
            "{} ({}, route {})",
            field(event, "result"),
            field(event, "reason"),
            field(event, "route")
        )
    };
    match (pulled, seen) {
        (Ok(()), Some(event)) if field(event, "result") == "denied" => Check::failed(
            NAME,
            format!(
                "this cache denied {name} ({}), and the daemon pulled it without the cache",
                field(event, "reason")
            ),
            "see /api/v1/why for the image",
        ),
        (Ok(()), Some(event)) => Check::ok(
            NAME,
            format!("{name} was pulled through this cache: {}", decision(event)),
        ),
        (Ok(()), None) => Check::failed(
            NAME,
            format!("{name} was pulled, but NOT through this cache"),
            if image.registry == "docker.io" {
                "see the checks above: the daemon does not use it"
            } else {
                "Docker mirrors only docker.io; run ifnewer setup docker --proxy, or choose another --canary"
            },
        ),
        (Err(error), Some(event)) => Check::failed(
            NAME,
            format!(
                "this cache was requested for {name}: {}; the pull failed: {error}",
                decision(event)
            ),
            "see the log for the reason; set an existing image with --canary",
        ),
        (Err(error), None) => Check::failed(
            NAME,
            format!("{name} could not be pulled, and the daemon did not request it from this cache: {error}"),
            "see the checks above; without a network, set a cached image with --canary",
        ),
    }
}

async fn pull(socket: &Path, image: &Image) -> Result<(), String> {
    let tag = image.reference.replace(':', "%3A");
    let path = format!(
        "/images/create?fromImage={}&tag={tag}",
        image.name().replace(':', "%3A")
    );
    let reply = http_probe::request(Target::Unix(socket), Method::POST, &path, PULL_TIMEOUT)
        .await
        .map_err(|error| error.to_string())?;
    let text = reply.text();
    // One JSON object per line; an error after the status is one of them.
    let lines = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let fault = lines
        .filter_map(|line| {
            line.get("error")
                .or(line.get("message"))?
                .as_str()
                .map(str::to_owned)
        })
        .next_back();
    match fault {
        Some(fault) => Err(fault),
        None if reply.status == 200 => Ok(()),
        None => Err(format!("the daemon responded {}", reply.status)),
    }
}

/// Id of the latest decision; `None` without an admin listener.
async fn last_event(context: &CheckContext<'_>) -> io::Result<Option<u64>> {
    let mut host = String::new();
    let Some(target) = Target::admin(&context.config.listen.admin, &mut host) else {
        return Ok(None);
    };
    let reply = http_probe::get(target, "/api/v1/events?limit=1").await?;
    let events = reply.json().filter(|_| reply.status == 200);
    let events =
        events.ok_or_else(|| io::Error::other(format!("/api/v1/events responds {}", reply.status)))?;
    let id = events.pointer("/events/0/id").and_then(Value::as_u64);
    Ok(Some(id.unwrap_or(0)))
}

async fn events_after(context: &CheckContext<'_>, id: u64) -> Option<Vec<Value>> {
    let mut host = String::new();
    let target = Target::admin(&context.config.listen.admin, &mut host)?;
    let reply = http_probe::get(target, &format!("/api/v1/events?limit=1000&after={id}"))
        .await
        .ok()?;
    reply.json()?.get("events")?.as_array().cloned()
}
