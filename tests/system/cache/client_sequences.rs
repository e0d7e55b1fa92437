//! The clients of 2026, scripted: each asks exactly as its current source does, for Debian's packages are older.

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

/// A registry as most are: it has no referrers API, and nothing refers to anything.
async fn registry() -> (Upstream, Image) {
    let upstream = Upstream::start().await;
    upstream.has_no_referrers_api();
    let image = upstream.push(APP, "1", attested("1"));
    (upstream, image)
}

/// Pulls what clients of one platform leave out.
async fn fills(proxy: &Proxy, index: &Image) {
    for child in &index.children {
        proxy.pull(APP, &child.digest, child).await;
    }
}
