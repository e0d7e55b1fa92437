//! Scopes of a failure: which requests to an upstream it affects.

use std::fmt;

use crate::oci::endpoint::Endpoint;
use crate::oci::name::Repository;

/// Kinds of request that fail independently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RequestKind {
    /// HEAD of a manifest.
    Head,
    /// GET of a manifest.
    Get,
    /// HEAD or GET of a blob.
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
    /// All kinds, those that most pulls need first.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Head,
        Self::Get,
        Self::Blob,
        Self::List,
        Self::Ping,
        Self::Token,
    ];

    /// The kind of a request for `endpoint`; `is_head`: without content.
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

    /// The element for this kind.
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

/// Which requests to an upstream a failure affects.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum FailureScope {
    /// All requests: no connection can be established.
    Connection,
    /// Requests of one kind, in any repository.
    Kind(RequestKind),
    /// Requests of one kind in one repository.
    Repository(RequestKind, Repository),
}

impl FailureScope {
    /// Whether `other` includes this scope.
    pub(super) fn is_within(&self, other: &Self) -> bool {
        match (self, other) {
            (_, Self::Connection) => true,
            (Self::Repository(kind, _), Self::Kind(other)) => kind == other,
            _ => self == other,
        }
    }

    /// The label in metrics, without the repository.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::Kind(kind) | Self::Repository(kind, _) => kind.name(),
        }
    }
}

/// `connection`, `head`, `head library/demo`.
impl fmt::Display for FailureScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Self::Repository(_, repository) => write!(f, " {repository}"),
            Self::Connection | Self::Kind(_) => Ok(()),
        }
    }
}
