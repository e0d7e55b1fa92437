//! Lists of tags: asked of the upstream each time, the last page kept for an outage. Those of referrers: see `referrers`.

use std::sync::Arc;

use bytes::Bytes;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use super::fetching::Wanted;
use super::list_name::renamed;
use super::manifest::refused;
use super::{How, Outcome, Pull, Reason, Request};
use crate::oci::header::next_link;
use crate::oci::{Cause, MediaType, Operation, Repository};
use crate::policy::{Heard, Held, Rest, Subject, Verdict, decide};
use crate::store::listings::{KeptListing, ListingKey};
use crate::upstream::{Answer, Fetched};

/// The largest list kept or passed on. Docker Hub's longest pages are far below it.
const LISTING_BYTES_MAX: usize = 4 * 1024 * 1024;

/// A page of a list.
#[derive(Clone, Debug)]
pub struct Listing {
    /// The JSON, as the upstream sent it.
    pub bytes: Bytes,
    /// Its media type.
    pub media_type: MediaType,
    /// Path and query of the next page, if there is one.
    pub next: Option<String>,
    /// The filters that the upstream says it applied.
    pub filters: Option<String>,
}

/// A page, or what the upstream said instead.
pub(super) type Listed = Result<Listing, (Heard, Option<Arc<Answer>>)>;

impl Pull {
    pub(super) async fn listing(self: &Arc<Self>, request: &Request, repository: &Repository) -> Outcome {
        let context = self.context(request, repository);
        let rule = request.site.rule(repository, None);
        let key = ListingKey {
            upstream: request.site.name().into(),
            path: request.operation.path_and_query(),
        };
        // A list is like a tag: a name of the repository whose content changes. It has no digest of its own that could
        // be compared, so it is always fetched, and what was kept serves only while the upstream is silent.
        let kept = self.cached(&request.site, repository, self.store.listing(&key));
        let digest = |kept: &KeptListing| Held {
            digest: kept.digest,
            confirmed_at: kept.listed_at,
            is_moved: false,
            rest: Rest::Held,
            is_in_doubt: false,
        };
        let situation = context.situation(rule, Subject::Tag, kept.as_deref().map(digest), true, request.now);
        let wanted = Wanted::of(request, repository, &context.caller);
        let heard = match decide(&situation) {
            Verdict::Refuse(refusal) => return refused(refusal, None, false),
            Verdict::Serve(served)
                if served.cause().is_none() && rule.policy == crate::policy::Policy::Never =>
            {
                return serve(kept, Reason::Held(served));
            }
            _ => match request.site.upstream().silent_now().filter(|_| kept.is_some()) {
                Some(cause) => Err((Heard::Silent(cause), None)),
                None => self.list(&wanted, key).await,
            },
        };
        match heard {
            Ok(listing) => {
                let reason = Reason::Fetched(crate::policy::Why::Unnamed);
                Outcome::Listing(
                    listing,
                    How {
                        reason,
                        confirmed_at: Some(request.now),
                    },
                )
            }
            Err((heard, answer)) => match decide(&situation.having_heard(heard)) {
                Verdict::Serve(served) => serve(kept, Reason::Held(served)),
                Verdict::Refuse(refusal) => refused(refusal, answer, false),
                Verdict::Ask | Verdict::Fetch(_) | Verdict::Check(_) => {
                    refused(crate::policy::Refusal::Silent(Cause::Malformed), answer, false)
                }
            },
        }
    }

    /// Fetches a page of a list and keeps it.
    pub(super) async fn list(self: &Arc<Self>, wanted: &Wanted, key: ListingKey) -> Listed {
        let Wanted {
            site,
            repository,
            operation,
            accept,
            caller,
            ..
        } = wanted;
        let asked_at = Instant::now();
        let fetched = match site.upstream().get(caller, operation, accept, None).await {
            Ok(fetched) => fetched,
            Err(answer) => {
                self.learn(wanted, &answer, asked_at).await;
                return Err((self.heard(site, repository, &answer), Some(Arc::new(answer))));
            }
        };
        let mut listing = receive(fetched, operation)
            .await
            .map_err(|cause| (Heard::Silent(cause), None))?;
        let there: Vec<_> = site.upstream().names_there(repository).collect();
        listing.bytes = renamed(listing.bytes, &there, repository);
        let (store, page, now) = (Arc::clone(&self.store), listing.clone(), self.clock.now());
        let kept = spawn_blocking(move || {
            let Listing {
                bytes,
                media_type,
                next,
                filters,
            } = page;
            store.keep_listing(&key, KeptListing::new(bytes, media_type, next, filters, now))
        })
        .await;
        super::asking::report(kept, "keep a list");
        Ok(listing)
    }
}

fn serve(kept: Option<Arc<KeptListing>>, reason: Reason) -> Outcome {
    match kept {
        Some(kept) => given(&kept, reason),
        None => refused(crate::policy::Refusal::NotHeld, None, false),
    }
}

/// A page that was kept.
pub(super) fn given(kept: &KeptListing, reason: Reason) -> Outcome {
    let listing = Listing {
        bytes: kept.bytes.clone(),
        media_type: kept.media_type.clone(),
        next: kept.next.clone(),
        filters: kept.filters.clone(),
    };
    Outcome::Listing(
        listing,
        How {
            reason,
            confirmed_at: Some(kept.listed_at),
        },
    )
}

/// Reads a list. It must be JSON, whatever its status says: a captive portal's page is no list of tags.
async fn receive(fetched: Fetched, operation: &Operation) -> Result<Listing, Cause> {
    let next = next_link(&fetched.headers);
    let filters = fetched.headers.get(crate::oci::header::OCI_FILTERS_APPLIED);
    let filters = filters.and_then(|value| value.to_str().ok()).map(str::to_owned);
    let bytes = fetched.collect(LISTING_BYTES_MAX).await?;
    serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).map_err(|_| Cause::Malformed)?;
    let media_type = match operation {
        Operation::Referrers { .. } => "application/vnd.oci.image.index.v1+json",
        _ => "application/json",
    };
    Ok(Listing {
        bytes,
        media_type: media_type.parse().map_err(|_| Cause::Malformed)?,
        next,
        filters,
    })
}
