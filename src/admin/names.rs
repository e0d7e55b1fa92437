//! Schemas of names: strings that are one of a fixed list.

use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::records::RECORD_STATES;
use crate::policy::{OnNotFound, Policy};
use crate::proxy::RefreshResult;
use crate::telemetry::BodyEnd;

/// Types that stand for these names in a schema. They have no values.
macro_rules! names {
    ($($name:ident = $names:expr;)+) => {$(
        pub(super) enum $name {}

        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                let names = ObjectBuilder::new().schema_type(Type::String).enum_values(Some($names));
                names.into()
            }
        }

        impl ToSchema for $name {}
    )+};
}

names! {
    PolicyName = Policy::ALL.map(Policy::name);
    OnNotFoundName = OnNotFound::ALL.map(OnNotFound::name);
    AuthorizationName = ["unknown", "expired", "granted"];
    Role = ["manifest", "config", "layer"];
    Identity = ["client", "cache", "anonymous"];
    Kind = ["ping", "tag", "manifest", "blob", "listing", "write", "connect", "other"];
    Outcome = ["hit", "stale", "miss", "collapsed", "local", "forwarded", "denied", "aborted", "failed"];
    Ended = BodyEnd::ALL.map(BodyEnd::name);
    RefreshOutcome = RefreshResult::ALL.map(RefreshResult::name);
    RecordStateName = RECORD_STATES;
    RefreshState = ["planned", "unused", "private", "paused"];
    PauseReason = ["offline", "circuit-breaker", "rate-limited", "quota-floor"];
}
