//! Lock of the data folder: one process per folder.

use crate::proxy::Proxy;
use crate::registry::{Image, Upstream};

#[tokio::test]
async fn second_process_on_data_folder_names_lock_owner() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;

    let mut second = proxy.setup().serve();
    assert_eq!(second.exit().await, Some(1), "{}", second.stderr());
    assert!(
        second.stderr().contains(&proxy.program().id().to_string()),
        "the pid: {}",
        second.stderr()
    );
    assert!(
        second.stderr().contains(proxy.setup().data().to_str().unwrap()),
        "the folder: {}",
        second.stderr()
    );
    assert!(!second.stdout().contains("listening on"));
    proxy.pull("library/demo", "latest", &image).await;
}

#[tokio::test]
async fn a_process_that_was_killed_leaves_no_lock() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    let proxy = proxy.crash().await;
    upstream.refuses();
    proxy.pull("library/demo", "latest", &image).await.is_stale();
}
