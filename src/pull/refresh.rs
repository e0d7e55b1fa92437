//! A tag asked about at the operator's wish, whatever the rule says about freshness.

use std::sync::Arc;

use super::asking::Asked;
use super::copies::Copies;
use super::fetching::Wanted;
use super::{Pull, Request};
use crate::oci::{Cause, Digest, Operation};
use crate::policy::{Heard, Standing};
use crate::store::refs::TagReader;

/// What came of asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refreshed {
    /// The tag still names what is held.
    Unchanged(Digest),
    /// It names something else, which is held now; its layers are on their way if the rule says `prefetch`.
    Newer(Digest),
    /// There is no such tag upstream. It is kept here until a client is told so.
    Absent,
    /// The upstream refuses the credential used.
    Refused,
    /// The upstream gave no usable answer.
    Silent(Cause),
    /// There is something newer, and it could not be had.
    Undelivered(Cause),
}

impl Pull {
    /// Asks the upstream what the tag of `request` names now, and fetches it if that is not held. What is asked about by
    /// digest cannot change: that is answered with [`Refreshed::Silent`] and [`Cause::Malformed`].
    pub async fn refresh(self: &Arc<Self>, request: &Request) -> Refreshed {
        let (Some(tag), Operation::Manifest { repository, .. }) = (request.tag(), &request.operation) else {
            return Refreshed::Silent(Cause::Malformed);
        };
        let context = self.context(request, repository);
        let copies = self.copies_of_tag(&request.site, repository, tag, TagReader::Client(&request.accept));
        let held = copies.as_ref().map(Copies::held);
        let wanted = Wanted::of(request, repository, &context.caller);
        let Some(answer) = self.question(&wanted).landed().await else {
            return Refreshed::Silent(Cause::Busy);
        };
        // Whoever could be told something is the operator, who is entitled to all that is held.
        let heard = self.heard_by(&wanted, &answer, Standing::Vouched);
        let asked = Asked {
            heard,
            answer: Some(answer),
        };
        match (asked.heard, held) {
            (Heard::Named { digest, .. }, Some(held)) if digest == held.digest => {
                Refreshed::Unchanged(digest)
            }
            (Heard::Named { .. } | Heard::Unnamed, _) => self.refetch(&wanted, &asked).await,
            (Heard::Absent, _) => Refreshed::Absent,
            (Heard::Refused(_), _) => Refreshed::Refused,
            (Heard::Silent(cause) | Heard::Undelivered(cause), _) => Refreshed::Silent(cause),
            (Heard::Nothing, _) => Refreshed::Silent(Cause::Malformed),
        }
    }

    async fn refetch(self: &Arc<Self>, wanted: &Wanted, asked: &Asked) -> Refreshed {
        let brought = match &asked.answer {
            Some(answer) => self.brought(wanted, answer).await,
            None => None,
        };
        let fetched = match brought {
            Some(manifest) => Ok(manifest),
            None => self.fetch_manifest(wanted.clone()).await,
        };
        match fetched {
            Ok(manifest) => {
                self.prefetch(wanted.clone(), &manifest);
                Refreshed::Newer(manifest.digest)
            }
            Err(answer) => Refreshed::Undelivered(answer.cause()),
        }
    }
}
