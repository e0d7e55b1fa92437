//! Admin page without a browser: complete without scripts, escaped, and its forms work.

use crate::proxy::{Ask, Proxy, Reply};
use crate::registry::{Image, OCI_INDEX, OCI_MANIFEST, Upstream};
use serde_json::json;

async fn page(proxy: &Proxy, path: &str) -> String {
    let reply = proxy.admin(path).await;
    assert_eq!(reply.status, 200, "{reply:#?}");
    assert_eq!(reply.header("content-type"), Some("text/html; charset=utf-8"));
    let policy = reply.header("content-security-policy").unwrap();
    assert!(
        policy.starts_with("default-src 'none'; ") && !policy.contains("unsafe"),
        "{policy}"
    );
    let text = String::from_utf8(reply.body.to_vec()).unwrap();
    for foreign in [" style=", "onclick", "<style", "src=\"http", "href=\"http"] {
        assert!(!text.contains(foreign), "{foreign}");
    }
    text
}

/// The CSRF token in the forms.
fn secret(page: &str) -> String {
    let (_, rest) = page.split_once("name=\"secret\" value=\"").unwrap();
    rest.split('"').next().unwrap().to_owned()
}

async fn submit(proxy: &Proxy, fields: &str) -> Reply {
    Ask::new(proxy.admin_address(), "POST", "/act")
        .header("content-type", "application/x-www-form-urlencoded")
        .body(fields.as_bytes())
        .unchecked()
        .await
}

#[tokio::test]
async fn the_page_says_it_all_without_scripts_and_its_forms_work() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    let shown = page(&proxy, "/").await;
    for part in [
        "Healthy",
        "Byte hit ratio",
        "not cached: fetched from docker.io",
        &image.digest,
        "registry-mirrors",
        "/ca.pem",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let registry = proxy.registry_address().to_string();
    assert!(shown.contains(&registry), "the snippets name this cache");
    // Podman does not tell a mirror which registry it means.
    let mirror = format!("{registry}/docker.io");
    assert!(shown.contains(&mirror), "{shown}");

    let secret = secret(&shown);
    let offline = submit(&proxy, &format!("secret={secret}&action=offline")).await;
    assert_eq!(offline.status, 303, "{offline:#?}");
    let after = page(&proxy, offline.header("location").unwrap()).await;
    assert!(
        after.contains("Offline: no upstream requests until") && after.contains("Go online"),
        "{after}"
    );
    submit(&proxy, &format!("secret={secret}&action=online")).await;
    let asked = page(&proxy, "/?remove=docker.io/library/demo:latest").await;
    assert!(asked.contains("This frees"), "{asked}");
    let removed = submit(
        &proxy,
        &format!("secret={secret}&action=remove&image=docker.io%2Flibrary%2Fdemo%3Alatest"),
    )
    .await;
    let after = page(&proxy, removed.header("location").unwrap()).await;
    assert!(
        after.contains("Removed docker.io/library/demo:latest") && after.contains("No image is cached yet."),
        "{after}"
    );
}

#[tokio::test]
async fn digests_are_blocked_and_approved_by_the_form() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    let shown = page(&proxy, "/").await;
    let secret = secret(&shown);
    let named = format!("docker.io/library/demo@{}", image.digest);
    assert!(shown.contains(&format!("value=\"{named}\"")), "{shown}");
    let evil = "%3Cscript%3Ealert(1)";
    for (action, fields, notice, is_served) in [
        (
            "block",
            format!("image={named}&reason={evil}"),
            "is blocked",
            false,
        ),
        ("approve", format!("image={named}"), "but it is blocked", false),
        ("unblock", format!("image={named}"), "is no longer blocked", true),
        (
            "disapprove",
            format!("image={named}"),
            "is no longer approved",
            true,
        ),
    ] {
        let fields = fields.replace('@', "%40").replace(':', "%3A");
        let done = submit(&proxy, &format!("secret={secret}&action={action}&{fields}")).await;
        assert_eq!(done.status, 303, "{done:#?}");
        let after = page(&proxy, done.header("location").unwrap()).await;
        assert!(after.contains(notice), "{action}: {after}");
        assert!(!after.contains("<script>alert"), "{after}");
        assert_eq!(
            after.contains("mark denied\">blocked"),
            !is_served,
            "{action}: {after}"
        );
        let reply = proxy.manifest("library/demo", "latest").await;
        assert_eq!(reply.status == 200, is_served, "{reply:#?}");
    }
    let everywhere = format!("secret={secret}&action=approve&image={}", image.digest);
    submit(&proxy, &everywhere.replace(':', "%3A")).await;
    let here = format!("secret={secret}&action=disapprove&image={named}");
    let done = submit(&proxy, &here.replace('@', "%40").replace(':', "%3A")).await;
    let after = page(&proxy, done.header("location").unwrap()).await;
    assert!(after.contains("is still approved in every repository"), "{after}");
    let wrong = submit(&proxy, &format!("secret={secret}&action=block&image=demo")).await;
    assert_eq!(wrong.status, 400, "{wrong:#?}");
}

#[tokio::test]
async fn notice_of_a_blocked_index_names_the_images_it_leaves() {
    let upstream = Upstream::start().await;
    let digests: Vec<String> = (0..34).map(|number| format!("sha256:{number:064x}")).collect();
    let listed = |digest| json!({"mediaType": OCI_MANIFEST, "digest": digest, "size": 2});
    let manifests: Vec<_> = digests.iter().map(listed).collect();
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).to_string();
    let index = upstream.push("library/demo", "latest", Image::raw(OCI_INDEX, index.as_bytes()));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await.is_image(&index);
    let secret = secret(&page(&proxy, "/").await);
    let block = async |digest: &str| {
        let digest = digest.replace(':', "%3A");
        let done = submit(&proxy, &format!("secret={secret}&action=block&image={digest}")).await;
        let after = page(&proxy, done.header("location").unwrap()).await;
        let notice = after.split_once("<p class=\"notice\"").unwrap().1;
        notice.split_once("</p>").unwrap().0.to_owned()
    };
    assert!(!block(&digests[0]).await.contains("still served"));
    let notice = block(&index.digest).await;
    assert!(notice.contains("still served by their own digests"), "{notice}");
    assert!(notice.contains(" and 1 more"), "{notice}");
    for (number, is_named) in [(0, false), (1, true), (32, true), (33, false)] {
        assert_eq!(notice.contains(&digests[number]), is_named, "{number}: {notice}");
    }
}

#[tokio::test]
async fn long_list_of_blocks_is_cut_and_counted() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let secret = secret(&page(&proxy, "/").await);
    for number in 0..101 {
        let fields = format!("secret={secret}&action=block&image=sha256%3A{number:064x}");
        assert_eq!(submit(&proxy, &fields).await.status, 303);
    }
    let shown = page(&proxy, "/").await;
    assert!(shown.contains("<span class=\"count\">101</span>"), "{shown}");
    assert!(shown.contains("More are listed by"), "{shown}");
    for (number, is_shown) in [(0, true), (99, true), (100, false)] {
        assert_eq!(shown.contains(&format!("sha256:{number:064x}")), is_shown);
    }
    let listed = proxy.admin("/api/v1/blocks").await.json();
    assert_eq!(listed["blocks"].as_array().unwrap().len(), 101);
}

#[tokio::test]
async fn form_without_csrf_secret_is_rejected() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    for fields in [
        "action=offline",
        "secret=&action=offline",
        "secret=AAAA&action=offline",
    ] {
        assert_eq!(submit(&proxy, fields).await.status, 403, "{fields}");
    }
    assert_eq!(proxy.admin("/api/v1/offline").await.json()["offline"], false);
}

#[tokio::test]
async fn client_text_is_escaped_on_the_page() {
    let upstream = Upstream::start().await;
    let proxy = Proxy::over(&upstream).await;
    let evil = "<script>alert(1)</script>\"'";
    proxy
        .manifest("library/absent", "latest")
        .header("user-agent", evil)
        .await;
    for path in ["/", "/?images=%3Cscript%3E&decisions=%22%3E%3Cscript%3E"] {
        let shown = page(&proxy, path).await;
        assert!(
            !shown.contains("<script>alert") && !shown.contains("\"><script>"),
            "{shown}"
        );
    }
}

#[tokio::test]
async fn image_names_break_between_components_and_not_inside_words() {
    let upstream = Upstream::start().await;
    let image = upstream.push("team/service/api", "v1", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("team/service/api", "v1", &image).await;
    let page = page(&proxy, "/").await;
    let (name, tag) = ("team/<wbr>service/<wbr>api", "<wbr>:");
    assert!(page.contains(&format!("{name}{tag}v1")), "the decisions");
    assert!(page.contains(&format!("{name}{tag}<strong>v1")), "the images");
}
