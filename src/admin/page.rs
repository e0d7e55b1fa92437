//! HTML page of the admin listener. It is rendered on the server and works without scripts. The script reloads the page
//! and updates changed sections.
//!
//! It shows health, savings, clients and the reasons of recent decisions, and offers the actions of the API. Forms
//! carry a CSRF secret. A removal shows first what it would free.

mod plot;
mod sections;
mod snippets;
mod upstreams;
mod verdicts;

use http::StatusCode;
use http::header::HOST;
use http::request::Parts;
use maud::{DOCTYPE, Markup, html};

use super::events::Filter;
use super::format::{bytes, describe_youth, duration};
use super::image_ref::ImageRef;
use super::images::{self, ListQuery};
use super::pull_jobs::Platforms;
use super::response::{ApiResponse, Problem, full, see_other};
use super::router::blocking;
use super::{Admin, status};
use crate::oci::Query;
use crate::proxy::Refreshed;

pub(super) const STYLE: &str = include_str!("page/style.css");
pub(super) const SCRIPT: &str = include_str!("page/live.js");
pub(super) const ICON: &str = include_str!("page/icon.svg");

/// Images per page.
const IMAGES_SHOWN: usize = 50;

/// Decisions shown.
const DECISIONS_SHOWN: usize = 15;

/// The page at `/`.
pub(super) async fn page(admin: &Admin, query: &Query, head: &Parts) -> Result<ApiResponse, Problem> {
    let now = admin.clock.now();
    let registry = admin.registry.load_full();
    let shown = PageQuery::read(query)?;
    let listed = {
        let (registry, wanted) = (
            registry.clone(),
            ListQuery::by_name(&shown.images, shown.from, IMAGES_SHOWN),
        );
        blocking(move || Ok(images::list(&registry, &wanted, now))).await?
    };
    let confirm = match &shown.remove {
        Some(image) => Some(removal_preview(admin, image).await?),
        None => None,
    };
    let secret = admin.auth.form_secret();
    let status = admin.status(now);
    let host = head
        .headers
        .get(HOST)
        .and_then(|host| host.to_str().ok())
        .unwrap_or_default();
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { "ifnewer" }
                link rel="icon" href="/icon.svg" type="image/svg+xml";
                link rel="stylesheet" href="/style.css";
                script src="/live.js" defer {}
            }
            body {
                a.skip href="#main" { "Skip to the content" }
                (sections::header(&status, &secret))
                main #main {
                    @if let Some(text) = admin.flash.get(shown.notice) { p.notice role="status" { (text) } }
                    @if let Some(trial) = &confirm { (sections::confirm(trial, &secret)) }
                    (sections::numbers(&status))
                    (plot::section(&admin.series(status::HOUR, now), &admin.series(status::DAY, now)))
                    (sections::transfers(&status::transfers(&registry), &admin.pull_jobs.list(registry.proxy.downloads())))
                    (sections::decisions(&admin.decisions(&Filter::newest(DECISIONS_SHOWN, &shown.decisions)), &shown))
                    (sections::images(&listed, &shown, IMAGES_SHOWN, &secret))
                    (verdicts::section(&registry, &secret))
                    div.pair {
                        (upstreams::section(&super::upstreams::to_json(&registry, now)))
                        (sections::clients(&admin.clients_seen(now)))
                    }
                    (snippets::section(&snippets::address(admin, host), admin.ca.is_some()))
                }
                (sections::footer(&status))
            }
        }
    };
    Ok(full(
        StatusCode::OK,
        "text/html; charset=utf-8",
        markup.into_string(),
    ))
}

/// Query parameters of the page.
pub(super) struct PageQuery {
    images: String,
    from: usize,
    decisions: String,
    remove: Option<String>,
    notice: u64,
}

impl PageQuery {
    fn read(query: &Query) -> Result<Self, Problem> {
        let text = |name: &str| query.get(name).unwrap_or_default().to_owned();
        let number = |name: &str| match query.get(name).unwrap_or_default() {
            "" => Ok(0),
            text => text
                .parse::<u64>()
                .map_err(|_| Problem::bad_request(format!("`{name}` is a number, not `{text}`"))),
        };
        Ok(Self {
            images: text("images"),
            from: usize::try_from(number("from")?).unwrap_or(usize::MAX),
            decisions: text("decisions"),
            remove: query
                .get("remove")
                .filter(|image| !image.is_empty())
                .map(str::to_owned),
            notice: number("notice")?,
        })
    }
}

/// What a removal would free.
struct RemovalPreview {
    image: String,
    tags: u64,
    blobs: u64,
    bytes: u64,
}

async fn removal_preview(admin: &Admin, image: &str) -> Result<RemovalPreview, Problem> {
    let registry = admin.registry.load_full();
    let named = ImageRef::parse(image, &registry)?;
    let Some(key) = named.tag_key() else {
        return Err(Problem::bad_request("a tag is required"));
    };
    let freed = blocking(move || Ok(registry.proxy.store().blocking().delete_images(&[key], true)?)).await?;
    Ok(RemovalPreview {
        image: named.to_string(),
        tags: freed.tags,
        blobs: freed.blobs,
        bytes: freed.bytes,
    })
}

/// Executes a form action and redirects back to the page.
pub(super) async fn submit_form(admin: &Admin, body: &[u8]) -> Result<ApiResponse, Problem> {
    let body = std::str::from_utf8(body).map_err(|_| Problem::bad_request("the form is not UTF-8"))?;
    // A form encodes a space as `+`, which API queries do not use.
    let (form, _) = Query::parse(Some(&body.replace('+', "%20")))
        .map_err(|error| Problem::bad_request(error.to_string()))?;
    admin
        .auth
        .authorize_form(form.get("secret").unwrap_or_default())?;
    let image = form.get("image").unwrap_or_default();
    let message = match form.get("action").unwrap_or_default() {
        "pull" => {
            admin.begin_pull(image, Platforms::local(), None)?;
            format!("Pulling {image}.")
        }
        "refresh" => {
            let (named, refreshed) = admin.refresh(image, None).await?;
            format!(
                "{named}: {}.",
                describe_refresh(refreshed, named.upstream_registry.name())
            )
        }
        "remove" => {
            let registry = admin.registry.load_full();
            let named = ImageRef::parse(image, &registry)?;
            let Some(key) = named.tag_key() else {
                return Err(Problem::bad_request("a tag is required"));
            };
            let freed =
                blocking(move || Ok(registry.proxy.store().blocking().delete_images(&[key], false)?)).await?;
            format!("Removed {named}; {} freed.", bytes(freed.bytes))
        }
        action @ ("pin" | "unpin") => {
            let (name, _) = admin.pin(image, action == "pin").await?;
            match action {
                "pin" => format!("{name} is pinned: it is excluded from eviction."),
                _ => format!("{name} is no longer pinned."),
            }
        }
        action @ ("block" | "unblock" | "approve" | "disapprove") => {
            verdicts::submit(admin, action, image, form.get("reason")).await?
        }
        "offline" => {
            admin.switch_offline(true).await?;
            "Offline: no upstream requests until this is switched off.".to_owned()
        }
        "online" => {
            admin.switch_offline(false).await?;
            "Online again.".to_owned()
        }
        other => return Err(Problem::bad_request(format!("unknown action `{other}`"))),
    };
    let notice = admin.flash.add(message);
    Ok(see_other(&format!("/?notice={notice}")))
}

/// Describes the result of a revalidation.
pub(super) fn describe_refresh(refreshed: Refreshed, upstream: &str) -> String {
    match refreshed {
        Refreshed::Unchanged(_) => format!("unchanged at {upstream}"),
        Refreshed::Newer(_) => format!("{upstream} has a newer image, which is cached now"),
        Refreshed::TooYoung(youth) => format!(
            "younger at {upstream} than `min_age` allows: {}",
            describe_youth(&youth)
        ),
        Refreshed::Blocked(digest) => format!("{upstream} names {digest}, which is blocked and not fetched"),
        Refreshed::NotFound => format!("deleted at {upstream}; retained until a client requests it"),
        Refreshed::Denied => format!("{upstream} does not authorize this credential"),
        Refreshed::Unavailable(cause) => format!("{upstream} {cause}; the cached image is kept"),
        Refreshed::FetchFailed(cause) => {
            format!("a newer image could not be fetched: {upstream} {cause}")
        }
    }
}

/// A relative time.
fn ago(seconds: u64) -> Markup {
    let words = match seconds {
        0 => "now".to_owned(),
        seconds => format!("{} ago", duration(std::time::Duration::from_secs(seconds))),
    };
    html! { (words) }
}
