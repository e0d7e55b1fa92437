//! One request's claim on a place: its client, its flow and its class.

use std::hash::{BuildHasher as _, Hash, RandomState};
use std::sync::LazyLock;

use super::Peer;

/// Priority class, the highest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Revalidation of what is cached for the client that waits.
    Held,
    /// Manifests that are not cached, small blobs, lists.
    Interactive,
    /// Large blobs, and content by a digest that no manifest here names.
    Bulk,
    /// Prefetch and refresh.
    Background,
}

impl Class {
    /// All of them, the highest first.
    pub const ALL: [Self; 4] = [Self::Held, Self::Interactive, Self::Bulk, Self::Background];

    /// The label in the metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Interactive => "interactive",
            Self::Bulk => "bulk",
            Self::Background => "background",
        }
    }
}

/// What one request asks of admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Demand {
    /// The client that waits.
    pub peer: Peer,
    /// Tells the flows of one client apart: see [`flow`].
    pub flow: u64,
    /// How urgent it is.
    pub class: Class,
}

impl Demand {
    /// Work of the cache itself.
    pub const BACKGROUND: Self = Self {
        peer: Peer::Background,
        flow: 0,
        class: Class::Background,
    };
}

/// The flow of these parts: a principal in a repository, say. Two flows of one value share a turn, which harms neither
/// beyond that; the hash is keyed, so a client cannot choose to share another's.
pub fn flow(parts: impl Hash) -> u64 {
    static KEYED: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    KEYED.hash_one(parts)
}
