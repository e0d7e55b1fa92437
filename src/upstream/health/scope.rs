//! Scopes of a failure: what of an upstream it concerns.

use std::fmt;

use crate::oci::endpoint::Endpoint;
use crate::oci::name::Repository;

/// Kinds of request that fail apart from each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RequestKind {
    /// Which digest a tag names.
    Head,
    /// A manifest.
    Get,
    /// A blob, or whether it may be read.
    Blob,
    /// A list of tags or referrers.
    List,
    /// `/v2/`.
    Ping,
    /// A token for any of these.
    Token,
}

impl RequestKind {
    pub(super) const COUNT: usize = 6;
    /// All of them, those that most pulls need first.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Head,
        Self::Get,
        Self::Blob,
        Self::List,
        Self::Ping,
        Self::Token,
    ];

    /// The kind of a request for `endpoint`; `is_head`: without its content.
    pub(in crate::upstream) fn of_request(endpoint: &Endpoint, is_head: bool) -> Self {
        match endpoint {
            Endpoint::Manifest { .. } if is_head => Self::Head,
            Endpoint::Manifest { .. } => Self::Get,
            Endpoint::Blob { .. } => Self::Blob,
            Endpoint::Tags { .. } | Endpoint::Referrers { .. } => Self::List,
            Endpoint::Ping => Self::Ping,
        }
    }

    /// The name in the log, the metrics and the API.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Head => "head",
            Self::Get => "get",
            Self::Blob => "blob",
            Self::List => "list",
            Self::Ping => "ping",
            Self::Token => "token",
        }
    }

    /// The one of this kind.
    pub(super) const fn of<T>(self, [head, get, blob, list, ping, token]: &[T; Self::COUNT]) -> &T {
        match self {
            Self::Head => head,
            Self::Get => get,
            Self::Blob => blob,
            Self::List => list,
            Self::Ping => ping,
            Self::Token => token,
        }
    }

    pub(super) const fn of_mut<T>(
        self,
        [head, get, blob, list, ping, token]: &mut [T; Self::COUNT],
    ) -> &mut T {
        match self {
            Self::Head => head,
            Self::Get => get,
            Self::Blob => blob,
            Self::List => list,
            Self::Ping => ping,
            Self::Token => token,
        }
    }
}

/// What of an upstream a failure concerns.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum FailureScope {
    /// Every request: no connection comes about.
    Connection,
    /// Requests of one kind, for any repository.
    RequestKind(RequestKind),
    /// Requests of one kind in one repository.
    Repository(RequestKind, Repository),
}

impl FailureScope {
    /// Whether all of this is of `other` as well.
    pub(super) fn is_within(&self, other: &Self) -> bool {
        match (self, other) {
            (_, Self::Connection) => true,
            (Self::Repository(kind, _), Self::RequestKind(other)) => kind == other,
            _ => self == other,
        }
    }

    /// The label in metrics, without the repository.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::RequestKind(kind) | Self::Repository(kind, _) => kind.name(),
        }
    }
}

/// `connection`, `head`, `head library/demo`.
impl fmt::Display for FailureScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Self::Repository(_, repository) => write!(f, " {repository}"),
            Self::Connection | Self::RequestKind(_) => Ok(()),
        }
    }
}
