//! Read errors of the store: logged and counted, and not treated as a cache miss without a trace.

use crate::proxy::{Proxy, files_below};
use crate::registry::{Image, Upstream};
use std::path::PathBuf;

/// Replaces a file by a folder, so that reads fail for every user.
fn made_unreadable(path: &PathBuf) {
    std::fs::remove_file(path).unwrap();
    std::fs::create_dir(path).unwrap();
}

async fn errors(proxy: &Proxy, operation: &str) -> u64 {
    let text = String::from_utf8(proxy.admin("/metrics").await.body.to_vec()).unwrap();
    let name = format!("ifnewer_store_errors_total{{op=\"{operation}\"}} ");
    let line = text.lines().find_map(|line| line.strip_prefix(&name));
    line.unwrap_or_else(|| panic!("no {name}in {text}"))
        .parse()
        .unwrap()
}

#[tokio::test]
async fn e16_store_errors_of_a_pull_are_logged_and_counted() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "1", Image::with_layers(&["one"]));
    let mut proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "1", &image).await;
    assert_eq!(errors(&proxy, "read").await, 0);
    proxy.terminate();
    assert_eq!(proxy.exit().await, Some(0));
    let hex = image.digest.split(':').nth(1).unwrap();
    let files = files_below(&proxy.setup().data().join("manifests"));
    let manifest = files
        .iter()
        .find(|path| path.file_name().is_some_and(|name| name == hex));
    made_unreadable(manifest.unwrap());
    let proxy = proxy.setup().clone().start().await;

    proxy.manifest("library/demo", "1").await.is_image(&image);
    let line = proxy.program().says("failed to read store").await;
    for part in [
        "upstream=\"docker.io\"",
        &format!("image=library/demo@{}", image.digest),
    ] {
        assert!(line.contains(part), "{part}: {line}");
    }
    assert!(errors(&proxy, "read").await > 0);
}
