//! Configuration files of each container client: the desired content for a cache endpoint.

pub(super) mod buildkit;
pub(super) mod containerd;
pub(super) mod docker;
pub(super) mod gitlab;
pub(super) mod k3s;
pub(super) mod podman;
pub(super) mod proxy;
