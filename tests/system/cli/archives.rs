//! Export and import of images, for hosts that reach no registry.

use std::fs;
use std::path::{Path, PathBuf};

use crate::proxy::{Ask, Proxy, Setup};
use crate::registry::{Image, Upstream, noise, within};
use serde_json::Value;

const DEMO: &str = "docker.io/library/demo:latest";

async fn run(proxy: &Proxy, words: &[&str]) -> (Option<i32>, String, String) {
    let admin = proxy.admin_address().to_string();
    let words: Vec<&str> = words.iter().copied().chain(["--admin", &admin]).collect();
    let mut program = proxy.setup().run(&words);
    let code = program.exit().await;
    (code, program.stdout(), program.stderr())
}

async fn done(proxy: &Proxy, words: &[&str]) -> String {
    let (code, out, err) = run(proxy, words).await;
    assert_eq!(code, Some(0), "{words:?}: {out}{err}");
    out
}

fn file(proxy: &Proxy, name: &str) -> String {
    proxy.setup().folder().join(name).to_str().unwrap().to_owned()
}

/// A cache that holds an image of two platforms.
async fn seeded() -> (Upstream, Proxy, Image) {
    let upstream = Upstream::start().await;
    let children = [Image::of_noise(1, 300_000), Image::with_layers(&["arm", "both"])];
    let image = upstream.push("library/demo", "latest", Image::index(&children));
    let proxy = Proxy::over(&upstream).await;
    done(&proxy, &["pull", "--platform", "all", "demo"]).await;
    for blob in image.children.iter().flat_map(|child| &child.blobs) {
        proxy.until_kept(&blob.digest).await;
    }
    (upstream, proxy, image)
}

/// Another cache, whose registry is unreachable.
async fn cut_off() -> (Upstream, Proxy) {
    let upstream = Upstream::start().await;
    upstream.refuses();
    let proxy = Proxy::over(&upstream).await;
    (upstream, proxy)
}

async fn pulls_all(proxy: &Proxy, image: &Image) {
    let reply = proxy.manifest("library/demo", "latest").await;
    reply.is_imported().is_image(image);
    for child in &image.children {
        proxy
            .manifest("library/demo", &child.digest)
            .await
            .is_image(child);
        for blob in &child.blobs {
            proxy.blob("library/demo", &blob.digest).await.is_blob(blob);
        }
    }
}

#[tokio::test]
async fn an_image_is_carried_to_a_cache_that_no_registry_reaches() {
    let (_upstream, from, image) = seeded().await;
    let archive = file(&from, "demo.tar");
    let told = done(&from, &["export", "demo", "-o", &archive]).await;
    assert!(told.starts_with(&archive), "{told}");
    let (_nobody, to) = cut_off().await;
    let told = done(&to, &["import", "--public", &archive]).await;
    let line = told.lines().next().unwrap();
    assert!(
        line.starts_with(DEMO) && line.contains("linux/amd64, linux/arm64") && line.ends_with(": imported"),
        "{told}"
    );
    pulls_all(&to, &image).await;
    assert!(done(&to, &["ls"]).await.contains("never (imported)"));
    assert!(done(&to, &["show", "demo"]).await.contains("never (imported)"));
    assert!(
        done(&to, &["why", "demo"])
            .await
            .contains("imported, not confirmed")
    );

    let again: Value = serde_json::from_str(&done(&to, &["import", "--json", &archive]).await).unwrap();
    assert_eq!(
        (&again["new_bytes"], &again["images"][0]["already_cached"]),
        (&0.into(), &true.into())
    );
    let told = done(&to, &["import", &archive]).await;
    assert!(told.lines().next().unwrap().ends_with("already cached"), "{told}");

    let second = file(&to, "again.tar");
    done(&to, &["export", "demo", "-o", &second]).await;
    assert_eq!(
        fs::read(&archive).unwrap(),
        fs::read(&second).unwrap(),
        "the same to the byte"
    );
    let to = to.restart().await;
    pulls_all(&to, &image).await;
}

#[tokio::test]
async fn imported_image_needs_a_grant_of_the_registry() {
    let (_upstream, from, image) = seeded().await;
    let archive = file(&from, "demo.tar");
    done(&from, &["export", "demo", "-o", &archive]).await;
    let (registry, to) = cut_off().await;
    done(&to, &["import", &archive]).await;
    let layer = image.children[0].layer(0);
    for path in [
        "/v2/library/demo/manifests/latest".to_owned(),
        format!("/v2/library/demo/manifests/{}", image.digest),
        format!("/v2/library/demo/blobs/{}", layer.digest),
    ] {
        for ask in [to.get(&path), to.get(&path).basic("alice", "wonder")] {
            let reply = ask.await;
            assert!(reply.status >= 400, "{reply:#?}");
        }
    }
    // The registry is back: its responses decide, and no byte is fetched.
    registry.recovers();
    registry.push("library/demo", "latest", image.clone());
    registry.clear_log();
    to.until(
        "the registry to be asked again",
        |to| to.manifest("library/demo", "latest").unchecked(),
        |reply| reply.status == 200,
    )
    .await;
    to.blob("library/demo", &layer.digest).await.is_blob(layer);
    assert_eq!(
        (registry.all_blob_gets(), registry.manifest_gets("library/demo")),
        (0, 0)
    );
}

#[tokio::test]
async fn registry_denial_overrides_imported_public_mark() {
    let (_upstream, from, image) = seeded().await;
    let archive = file(&from, "demo.tar");
    done(&from, &["export", "demo", "-o", &archive]).await;
    let registry = Upstream::start().await;
    registry.push("library/demo", "latest", image.clone());
    registry.answers_status(403);
    let to = Proxy::over(&registry).await;
    done(&to, &["import", "--public", &archive]).await;
    let layer = &image.children[0].layer(0).digest;
    to.blob("library/demo", layer).await.is_refused(403);
    to.manifest("library/demo", "latest").await.is_refused(403);
    registry.refuses();
    let reply = to.blob("library/demo", layer).await;
    assert!(reply.status >= 400, "public no more: {reply:#?}");
}

#[tokio::test]
async fn a_folder_a_pipe_and_a_part_of_it_are_as_good() {
    let (_upstream, from, image) = seeded().await;
    let folder = file(&from, "layout");
    done(
        &from,
        &["export", "demo", "--platform", "linux/arm64", "-o", &folder],
    )
    .await;
    let layout = fs::read(Path::new(&folder).join("oci-layout")).unwrap();
    assert_eq!(layout, br#"{"imageLayoutVersion":"1.0.0"}"#);
    let index: Value =
        serde_json::from_slice(&fs::read(Path::new(&folder).join("index.json")).unwrap()).unwrap();
    assert_eq!(index["manifests"][0]["digest"], image.digest);
    assert_eq!(
        index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"],
        DEMO
    );
    let (_nobody, to) = cut_off().await;
    let told = done(&to, &["import", "--public", "--as", "demo:arm", &folder]).await;
    assert!(
        told.starts_with("docker.io/library/demo:arm ") && told.contains("(linux/arm64)"),
        "{told}"
    );
    to.manifest("library/demo", "arm")
        .await
        .is_imported()
        .is_image(&image);
    for blob in &image.children[1].blobs {
        to.blob("library/demo", &blob.digest).await.is_blob(blob);
    }
    let (code, _, err) = run(&to, &["export", "demo:arm", "--platform", "linux/amd64"]).await;
    assert!(code == Some(1) && err.contains("is incomplete"), "{err}");
}

#[tokio::test]
async fn aborted_export_leaves_no_file() {
    let (_upstream, from, image) = seeded().await;
    let layer = &image.children[0].layer(0).digest;
    let path = from.setup().kept_blob(layer).unwrap();
    let archive = PathBuf::from(file(&from, "demo.tar"));
    let left = || {
        (
            archive.exists(),
            PathBuf::from(format!("{}.part", archive.display())).exists(),
        )
    };
    let mut bytes = fs::read(&path).unwrap();
    bytes[100_000] ^= 1;
    let mut permissions = fs::metadata(&path).unwrap().permissions();
    #[expect(clippy::permissions_set_readonly_false, reason = "a file of this test")]
    permissions.set_readonly(false);
    fs::set_permissions(&path, permissions).unwrap();
    fs::write(&path, bytes).unwrap();
    let (code, out, err) = run(&from, &["export", "demo", "-o", archive.to_str().unwrap()]).await;
    assert!(code == Some(1) && err.contains("is incomplete"), "{out}{err}");
    assert_eq!(left(), (false, false));
    from.program().says("does not match its digest").await;
    within("the damaged blob to be set aside", async {
        while path.exists() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await;
    // The missing content is reported before the first byte.
    let words = [
        "export",
        "demo",
        "--platform",
        "linux/amd64",
        "-o",
        archive.to_str().unwrap(),
    ];
    let (code, out, err) = run(&from, &words).await;
    assert!(code == Some(1) && err.contains(layer), "{out}{err}");
    assert_eq!(left(), (false, false));
}

#[tokio::test]
async fn an_archive_that_is_refused_says_why_and_leaves_nothing() {
    let (_upstream, from, _image) = seeded().await;
    let archive = file(&from, "demo.tar");
    done(&from, &["export", "demo", "-o", &archive]).await;
    let whole = fs::read(&archive).unwrap();
    let (_nobody, to) = cut_off().await;
    let broken = file(&to, "broken.tar");
    fs::write(&broken, &whole[..200_000]).unwrap();
    let (code, _, err) = run(&to, &["import", &broken]).await;
    assert!(code == Some(1) && err.contains("cannot be read"), "{err}");
    fs::write(&broken, b"{}".repeat(1_000_000)).unwrap();
    let (code, _, err) = run(&to, &["import", &broken]).await;
    assert!(
        code == Some(1) && err.contains("an uncompressed tar is expected"),
        "{err}"
    );
    let (code, _, err) = run(&to, &["import", "/nowhere.tar"]).await;
    assert!(code == Some(1) && err.contains("/nowhere.tar"), "{err}");
    let status = to.admin("/api/v1/status").await.json();
    assert_eq!(status["store"]["blobs"], 0, "{status}");
    assert_eq!(
        done(&to, &["ls", "--json"]).await.matches("\"image\":").count(),
        0
    );
}

#[tokio::test]
async fn an_import_into_a_store_that_is_full_leaves_it_as_it_was() {
    let source = Upstream::start().await;
    let image = source.push(
        "library/demo",
        "latest",
        Image::with_layers(&[noise(1, 700_000), noise(2, 700_000)]),
    );
    let from = Proxy::over(&source).await;
    done(&from, &["pull", "demo"]).await;
    let archive = file(&from, "demo.tar");
    done(&from, &["export", "demo", "-o", &archive]).await;
    let registry = Upstream::start().await;
    registry.refuses();
    let to = Setup::over(&registry)
        .tail("[store]\nsize = \"1 MiB\"\nfree = \"0\"\n")
        .start()
        .await;
    let (code, _, err) = run(&to, &["import", "--public", &archive]).await;
    assert!(code == Some(1) && err.contains("no space for"), "{err}");
    let status = to.admin("/api/v1/status").await.json();
    assert_eq!(status["store"]["blobs"], 0, "{status}");
    let reply = to.manifest("library/demo", &image.digest).await;
    assert!(reply.status >= 400, "{reply:#?}");
}

#[tokio::test]
async fn from_elsewhere_both_need_the_token() {
    let upstream = Upstream::start().await;
    let setup = Setup::over(&upstream);
    let token = setup.file("admin.token", &"t".repeat(32));
    let proxy = setup
        .listen_keys(&format!("admin_token_file = {token:?}"))
        .start()
        .await;
    let export = Ask::new(proxy.admin_address(), "GET", "/api/v1/export?image=demo").unchecked();
    assert_eq!(export.await.status, 401);
    let import = || {
        Ask::new(proxy.admin_address(), "POST", "/api/v1/import")
            .header("content-type", "application/x-tar")
            .body(b"x")
            .unchecked()
    };
    assert_eq!(import().await.status, 401);
    assert_eq!(import().bearer(&"t".repeat(32)).await.status, 422);
    let page = import()
        .bearer(&"t".repeat(32))
        .header("origin", "http://evil.example");
    assert_eq!(page.await.status, 403);
}

/// Terminal control characters in a name: a window title, C1, a direction override and a zero-width character.
const HOSTILE: &str = "x\u{1b}]0;t\u{7}\u{9b}2J\u{202e}gnp\u{200b}";

fn tar_of(name: &str, size: &[u8; 12]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_mode(0o644);
    header.as_gnu_mut().unwrap().size = *size;
    header.set_cksum();
    let mut archive = header.as_bytes().to_vec();
    archive.resize(archive.len() + 1536, 0);
    archive
}

#[tokio::test]
async fn t15_import_prints_no_control_characters_of_an_archive() {
    let (_upstream, proxy) = cut_off().await;
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{HOSTILE}","digest":"{HOSTILE}","size":1,"annotations":{{"org.opencontainers.image.ref.name":"{HOSTILE}"}}}}]}}"#
    )
    .replace('\u{1b}', "\\u001b")
    .replace('\u{7}', "\\u0007");
    let size = format!("{:011o}\0", index.len());
    let mut layout = tar_of("index.json", size.as_bytes().try_into().unwrap());
    layout[512..512 + index.len()].copy_from_slice(index.as_bytes());
    let archives = [
        ("name.tar", tar_of(HOSTILE, b"00000000000\0")),
        ("number.tar", tar_of("index.json", b"\x1b]0;t\x07\xc2\x9b2J\0\0")),
        ("layout.tar", layout),
    ];
    let named = file(&proxy, &format!("{HOSTILE}.tar"));
    for (name, bytes) in archives {
        let path = file(&proxy, name);
        fs::write(&path, bytes).unwrap();
        let (code, out, err) = run(&proxy, &["import", &path]).await;
        assert_ne!(code, Some(0), "{name}");
        is_printable(&(out + &err));
    }
    for words in [
        &["import", &named][..],
        &["show", HOSTILE],
        &["why", HOSTILE],
        &["log", HOSTILE],
        &["log", "--json", HOSTILE],
        &["ls", HOSTILE],
        &["pull", HOSTILE],
        &["doctor", HOSTILE],
        &[HOSTILE],
        &["check", "--config", &named],
        &["setup", "docker", "--ca", &named],
    ] {
        let (_, out, err) = run(&proxy, words).await;
        is_printable(&(out + &err));
    }
    is_printable(&proxy.program().stderr());
}

fn is_printable(text: &str) {
    let steers = |c: char| (c.is_control() && c != '\n' && c != '\t') || matches!(c, '\u{202e}' | '\u{200b}');
    assert!(!text.chars().any(steers), "{text:?}");
}
