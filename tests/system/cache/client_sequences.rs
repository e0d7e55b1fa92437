//! Scripted request sequences of the clients of 2026, taken from their sources, because Debian's packages are older.

mod m01;
mod m03;
mod m06;
mod m07;
mod scripts;

use crate::proxy::Proxy;
use crate::registry::{Image, Upstream};
use scripts::APP;

/// An image of two platforms with attestations.
fn attested(version: &str) -> Image {
    let image = |platform: &str| {
        let layers = ["base", "app"].map(|layer| format!("{layer} {platform} {version}"));
        Image::with_layers(&layers)
    };
    Image::attested(&["amd64", "arm64"].map(image))
}

/// A registry without a referrers API and without referrers, as most are.
async fn registry() -> (Upstream, Image) {
    let upstream = Upstream::start().await;
    upstream.has_no_referrers_api();
    let image = upstream.push(APP, "1", attested("1"));
    (upstream, image)
}

/// Pulls the platforms that single-platform clients skip.
async fn fills(proxy: &Proxy, index: &Image) {
    for child in &index.children {
        proxy.pull(APP, &child.digest, child).await;
    }
}
