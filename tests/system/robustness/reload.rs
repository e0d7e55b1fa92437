//! Reload: SIGHUP applies a new configuration, and an invalid one changes nothing.

use crate::proxy::{Proxy, Setup};
use crate::registry::{Image, Upstream};

#[tokio::test]
async fn a_new_configuration_applies_to_the_next_request() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let setup = Setup::over(&upstream);
    let proxy = setup.clone().start().await;
    proxy.pull("library/demo", "latest", &image).await;
    setup.clone().file(
        "ifnewer.toml",
        &setup.default_keys("policy = \"if-not-present\"").toml(),
    );
    proxy.program().reload();

    let ask = |proxy: &Proxy| proxy.manifest("library/demo", "latest");
    let reply = proxy
        .until("the policy", ask, |reply| {
            reply.cache_status().contains("not-revalidated")
        })
        .await;
    reply.is_image(&image);
}

#[tokio::test]
async fn invalid_configuration_keeps_current_one_and_is_logged() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    proxy.setup().file("ifnewer.toml", "polcy = 1");
    proxy.program().reload();

    proxy.program().says("polcy").await;
    proxy.pull("library/demo", "latest", &image).await.is_unchanged();
}
