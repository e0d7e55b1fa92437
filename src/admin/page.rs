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

use axum::extract::State;
use axum::response::{Html, IntoResponse, Redirect};
use http::HeaderMap;
use http::header::{CONTENT_TYPE, HOST};
use maud::{DOCTYPE, Markup, html};
use serde::Deserialize;

use super::events::Filter;
use super::extract::{FormBody, Params, number};
use super::format::{bytes, describe_refresh, duration};
use super::image_ref::ImageRef;
use super::images::{self, ListQuery};
use super::pull_jobs::Platforms;
use super::response::{Problem, blocking, removing};
use super::transfers::running;
use super::{Admin, status};

/// The stylesheet of the page.
pub(super) async fn style() -> impl IntoResponse {
    (
        [(CONTENT_TYPE, "text/css; charset=utf-8")],
        include_str!("page/style.css"),
    )
}

/// The script of the page.
pub(super) async fn script() -> impl IntoResponse {
    (
        [(CONTENT_TYPE, "text/javascript; charset=utf-8")],
        include_str!("page/live.js"),
    )
}

/// The icon of the page.
pub(super) async fn icon() -> impl IntoResponse {
    ([(CONTENT_TYPE, "image/svg+xml")], include_str!("page/icon.svg"))
}

/// Images per page.
const IMAGES_SHOWN: usize = 50;

/// Decisions shown.
const DECISIONS_SHOWN: usize = 15;

/// The page at `/`.
pub(super) async fn page(
    State(admin): State<Admin>,
    Params(shown): Params<PageQuery>,
    headers: HeaderMap,
) -> Result<Html<String>, Problem> {
    let now = admin.clock.now();
    let registry = admin.registry.load_full();
    let from = shown.from.unwrap_or_default();
    let listed = {
        let (registry, admin, wanted) = (
            registry.clone(),
            admin.clone(),
            ListQuery::by_name(&shown.images, from, IMAGES_SHOWN),
        );
        let list = blocking(move || Ok(images::list(&registry, &admin.orders, &wanted, now))).await?;
        (list.images, list.total)
    };
    let confirm = match &*shown.remove {
        "" => None,
        image => Some(removal_preview(&admin, image).await?),
    };
    let secret = admin.auth.form_secret();
    let status = admin.status(now);
    let host = headers
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
                    @if let Some(text) = admin.flash.get(shown.notice.unwrap_or_default()) { p.notice role="status" { (text) } }
                    @if let Some(trial) = &confirm { (sections::confirm(trial, &secret)) }
                    (sections::numbers(&status))
                    (plot::section(&admin.series(status::HOUR, now), &admin.series(status::DAY, now)))
                    (sections::transfers(&running(&registry), &admin.pull_jobs.list(registry.proxy.downloads())))
                    (sections::decisions(&admin.decisions(&Filter::newest(DECISIONS_SHOWN, &shown.decisions)), &shown))
                    (sections::images(&listed, &shown, IMAGES_SHOWN, &secret))
                    (verdicts::section(&registry, &secret))
                    div.pair {
                        (upstreams::section(&super::upstreams::views(&registry, now), super::shared::view(&admin).as_ref()))
                        (sections::clients(&admin.clients_seen(now)))
                    }
                    (snippets::section(&snippets::address(&admin, host), admin.ca.is_some()))
                }
                (sections::footer(&status))
            }
        }
    };
    Ok(Html(markup.into_string()))
}

/// Query parameters of the page.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct PageQuery {
    images: String,
    #[serde(deserialize_with = "number")]
    from: Option<usize>,
    decisions: String,
    remove: String,
    #[serde(deserialize_with = "number")]
    notice: Option<u64>,
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

/// A form of the page.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct ActionForm {
    /// The CSRF secret.
    secret: String,
    action: String,
    image: String,
    reason: Option<String>,
}

/// Executes a form action and redirects back to the page.
pub(super) async fn submit_form(
    State(admin): State<Admin>,
    FormBody(form): FormBody<ActionForm>,
) -> Result<Redirect, Problem> {
    admin.auth.authorize_form(&form.secret)?;
    let image = &*form.image;
    let message = match &*form.action {
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
            removing(move || {
                let removed = images::remove(&registry, &named, false, false)?;
                Ok(format!("Removed {named}; {} freed.", bytes(removed.bytes_freed)))
            })
            .await?
        }
        action @ ("pin" | "unpin") => {
            let (name, _) = admin.pin(image, action == "pin").await?;
            match action {
                "pin" => format!("{name} is pinned: it is excluded from eviction."),
                _ => format!("{name} is no longer pinned."),
            }
        }
        action @ ("block" | "unblock" | "approve" | "disapprove") => {
            verdicts::submit(&admin, action, image, form.reason.as_deref()).await?
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
    Ok(Redirect::to(&format!("/?notice={notice}")))
}

/// A relative time.
fn ago(seconds: u64) -> Markup {
    let words = match seconds {
        0 => "now".to_owned(),
        seconds => format!("{} ago", duration(std::time::Duration::from_secs(seconds))),
    };
    html! { (words) }
}
