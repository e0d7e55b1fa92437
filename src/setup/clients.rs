//! Configuration files of each container client: the desired content for a cache endpoint.

pub(super) mod buildkit;
pub(super) mod containerd;
pub(super) mod docker;
pub(super) mod gitlab;
pub(super) mod k3s;
pub(super) mod podman;
pub(super) mod proxy;

use super::edit::json::Object;
use super::edit::toml::{self as edit_toml, Place};
use super::edit::{Text, without_userinfo};
use super::endpoint::{CacheEndpoint, Registry, Scheme};
use super::plan::{Context, FileSource, Plan};
use super::{Client, SetupError};
