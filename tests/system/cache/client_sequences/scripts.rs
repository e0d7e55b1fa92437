//! Request scripts of each client: method, target, `Accept`. From the clients' sources of November 2026.

use crate::proxy::{Ask, Proxy, Reply, blob_path, manifest_path};
use crate::registry::{Image, OCI_INDEX, OCI_MANIFEST};

pub const APP: &str = "library/app";

/// Targets within an attested multi-platform index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The tag.
    Tag,
    /// The index, by digest.
    Index,
    /// The manifest of the client's platform.
    Image,
    /// The manifests of all platforms, including attestations.
    Manifests,
    /// The attestation of the client's platform.
    Attestation,
    /// The referrers of that attestation.
    Referrers,
    /// The referrers tag, requested after a 404 of the API.
    ReferrersTag,
    /// The config of the client's platform.
    Config,
    /// The configs of all platforms.
    Configs,
    /// The layers of the client's platform.
    Layers,
}

/// One kind of request.
pub type Step = (&'static str, What, &'static [&'static str]);

/// A client.
pub struct Script {
    pub name: &'static str,
    /// It names the registry: `?ns=docker.io`.
    pub with_ns: bool,
    pub steps: &'static [Step],
}

/// containerd's resolver: one line.
pub const RESOLVER: &[&str] = &["application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, */*"];
/// containerd's fetcher: the type that the descriptor states, then anything.
const INDEX: &[&str] = &["application/vnd.oci.image.index.v1+json, */*"];
const MANIFEST: &[&str] = &["application/vnd.oci.image.manifest.v1+json, */*"];
const CONFIG: &[&str] = &["application/vnd.oci.image.config.v1+json, */*"];
const LAYER: &[&str] = &["application/vnd.oci.image.layer.v1.tar, */*"];
/// containers/image: a line for each type, docker's schema 1 among them.
const CONTAINERS_IMAGE: &[&str] = &[
    OCI_MANIFEST,
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    OCI_INDEX,
];
const RENOVATE: &[&str] = &["application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json"];

pub const DOCKERD_29: Script = Script {
    name: "dockerd 29 with the containerd store",
    with_ns: true,
    steps: &[
        ("HEAD", What::Tag, RESOLVER),
        ("GET", What::Index, INDEX),
        ("GET", What::Image, MANIFEST),
        ("GET", What::Attestation, MANIFEST),
        ("GET", What::Referrers, INDEX),
        ("GET", What::ReferrersTag, INDEX),
        ("GET", What::Config, CONFIG),
        ("GET", What::Layers, LAYER),
    ],
};

pub const KUBELET: Script = Script {
    name: "kubelet with containerd 2",
    with_ns: true,
    steps: &[
        ("HEAD", What::Tag, RESOLVER),
        ("GET", What::Index, INDEX),
        ("GET", What::Image, MANIFEST),
        ("GET", What::Config, CONFIG),
        ("GET", What::Layers, LAYER),
    ],
};

pub const CTR_TRANSFER: Script = Script {
    name: "ctr 2 by the transfer service",
    with_ns: true,
    steps: &[
        ("HEAD", What::Tag, RESOLVER),
        ("GET", What::Index, INDEX),
        ("GET", What::Manifests, MANIFEST),
        ("GET", What::Configs, CONFIG),
        ("GET", What::Layers, LAYER),
    ],
};

pub const CTR_LOCAL: Script = Script {
    name: "ctr 2 --local",
    with_ns: true,
    steps: &[
        ("HEAD", What::Tag, RESOLVER),
        ("GET", What::Index, INDEX),
        ("GET", What::Manifests, MANIFEST),
        ("GET", What::Layers, LAYER),
        ("GET", What::Configs, CONFIG),
    ],
};

pub const PODMAN: Script = Script {
    name: "podman 6",
    with_ns: false,
    steps: &[
        ("GET", What::Tag, CONTAINERS_IMAGE),
        ("GET", What::Image, CONTAINERS_IMAGE),
        ("GET", What::Config, &[]),
        ("GET", What::Layers, &[]),
    ],
};

pub const SKOPEO_INSPECT: Script = Script {
    name: "skopeo inspect",
    with_ns: false,
    steps: &[
        ("GET", What::Tag, CONTAINERS_IMAGE),
        ("GET", What::Image, CONTAINERS_IMAGE),
        ("GET", What::Config, &[]),
    ],
};

pub const RENOVATE_LOOKUP: Script = Script {
    name: "Renovate",
    with_ns: false,
    steps: &[
        ("HEAD", What::Tag, RENOVATE),
        ("GET", What::Tag, RENOVATE),
        ("GET", What::Image, RENOVATE),
        ("GET", What::Config, &[]),
    ],
};

/// Clients that read one platform.
pub const OF_ONE_PLATFORM: [&Script; 5] = [&DOCKERD_29, &KUBELET, &PODMAN, &SKOPEO_INSPECT, &RENOVATE_LOOKUP];

/// Clients that read the metadata of every platform and the layers of one.
pub const OF_ALL_PLATFORMS: [&Script; 2] = [&CTR_TRANSFER, &CTR_LOCAL];

pub fn every() -> impl Iterator<Item = &'static Script> {
    OF_ONE_PLATFORM.into_iter().chain(OF_ALL_PLATFORMS)
}

impl Script {
    /// Runs the script for the first platform of `index`, made by [`Image::attested`]. All content must be complete
    /// and right.
    pub async fn pulls(&self, proxy: &Proxy, tag: &str, index: &Image) {
        self.pulls_as(proxy, tag, index, |ask| ask).await;
    }

    /// The same, with each request changed by `dress`.
    pub async fn pulls_as(&self, proxy: &Proxy, tag: &str, index: &Image, dress: impl Fn(Ask) -> Ask) {
        let (image, attestation) = (&index.children[0], &index.children[index.children.len() / 2]);
        let mut has_referrers = false;
        for (method, what, accept) in self.steps {
            let ask = |path: &str| {
                let ns = if self.with_ns { "?ns=docker.io" } else { "" };
                dress(proxy.ask(method, &format!("{path}{ns}")).accept(accept))
            };
            let manifest = |reference: &str| ask(&manifest_path(APP, reference));
            let blob = |digest: &str| ask(&blob_path(APP, digest));
            let is_answer = |reply: &Reply| {
                assert!(
                    matches!(reply.status, 200 | 404),
                    "{}, {what:?}: {reply:#?}",
                    self.name
                );
                reply.status == 200
            };
            match what {
                What::Tag => drop(manifest(tag).await.is_image(index)),
                What::Index => drop(manifest(&index.digest).await.is_image(index)),
                What::Image => drop(manifest(&image.digest).await.is_image(image)),
                What::Manifests => {
                    for child in &index.children {
                        manifest(&child.digest).await.is_image(child);
                    }
                }
                What::Attestation => drop(manifest(&attestation.digest).await.is_image(attestation)),
                What::Referrers => {
                    let path = format!("/v2/{APP}/referrers/{}", attestation.digest);
                    has_referrers = is_answer(&ask(&path).await);
                }
                What::ReferrersTag if has_referrers => {}
                What::ReferrersTag => drop(is_answer(&manifest(&referrers_tag(attestation)).await)),
                What::Config => drop(blob(&image.config().digest).await.is_blob(image.config())),
                What::Configs => {
                    for child in &index.children {
                        blob(&child.config().digest).await.is_blob(child.config());
                    }
                }
                What::Layers => {
                    for layer in &image.blobs[1..] {
                        blob(&layer.digest).await.is_blob(layer);
                    }
                }
            }
        }
    }

    /// Whether it pulls layers. Others read only metadata.
    pub fn wants_layers(&self) -> bool {
        self.steps.iter().any(|(_, what, _)| *what == What::Layers)
    }
}

/// The tag that stands in for the referrers API.
pub fn referrers_tag(subject: &Image) -> String {
    subject.digest.replace(':', "-")
}
