//! Lists of tags: fetched each time, once for all who may share the response, the last page kept for an outage. Those of referrers: see `referrers`.

use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::time::{Instant, timeout};

use super::list_name::renamed;
use super::manifest::refused;
use super::manifest_fetch::UpstreamRequest;
use super::tag_list::ListError;
use super::{ProxyResponse, ProxyService, Request, ServeInfo, ServeReason, StreamedList, page};
use crate::oci::header::next_link;
use crate::oci::{Endpoint, MediaType, Repository, UpstreamFailure};
use crate::policy::{
    CacheState, CachedEntry, Completeness, ContentKind, Decision, Policy, Revalidation, decide,
};
use crate::store::listings::{ListingKey, StoredListing};
use crate::upstream::{ResponseStream, UpstreamResponse};

/// A list of tags is received whole up to this size; a longer one is passed on as it arrives.
const LISTING_WHOLE_BYTES_MAX: usize = 512 * 1024;
/// The largest list of referrers.
const REFERRERS_BYTES_MAX: usize = 4 * 1024 * 1024;

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
pub(super) type ListResult = Result<Listing, (Revalidation, Option<Arc<UpstreamResponse>>)>;

impl ProxyService {
    pub(super) async fn listing(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
    ) -> ProxyResponse {
        let context = self.context(request, repository).await;
        let rule = request.site.rule(repository, None);
        let key = ListingKey {
            upstream: request.site.name().into(),
            path: request.endpoint.path_and_query(),
        };
        // A list is like a tag: a name of the repository whose content changes. It has no digest of its own that could
        // be compared, so it is always fetched, and what was kept serves only while the upstream is unavailable.
        let is_unasked = rule.policy == Policy::Never;
        // A registry may give a caller without a right an empty list, or a front may answer in its place. So such a
        // response is passed on and not kept, and whether a list is kept changes nothing for such a caller.
        let is_stranger = context.is_stranger(rule, request.now);
        let mut kept = None;
        if !is_stranger {
            kept = self.kept_page(request, repository, (&key, is_unasked)).await;
        }
        let in_situation = |kept: Option<&CachedPage>| {
            let held = kept.map(|(_, source)| CachedEntry {
                digest: source.digest,
                confirmed_at: source.listed_at,
                is_moved: false,
                completeness: Completeness::Complete,
                is_invalidated: false,
            });
            context.situation(rule, ContentKind::Tag, held, true, request.now)
        };
        let mut situation = in_situation(kept.as_ref());
        match decide(&situation) {
            Decision::Deny(refusal) => return refused(refusal, None, false),
            Decision::Serve(served) if served.cause().is_none() && is_unasked => {
                return serve(kept, ServeReason::Cached(served));
            }
            _ => {}
        }
        let mut wanted = UpstreamRequest::of(request, repository, &context.caller);
        let upstream = request.site.upstream();
        let wait = upstream.wait_limit(&wanted.caller, (&wanted.endpoint, false), rule.revalidate_timeout);
        if !is_stranger && kept.is_none() && wait != Ok(rule.revalidate_timeout) {
            kept = self.kept_page(request, repository, (&key, true)).await;
            situation = in_situation(kept.as_ref());
        }
        if kept.is_some() {
            wanted.caller.wait_deadline = None;
        }
        let can_do_without = |situation: &CacheState| {
            let unavailable =
                situation.with_revalidation(Revalidation::Unavailable(UpstreamFailure::RevalidateTimeout));
            matches!(decide(&unavailable), Decision::Serve(_))
        };
        let revalidation = match wait {
            Err(cause) if can_do_without(&situation) => Err((Revalidation::Unavailable(cause), None)),
            wait => {
                let wait = wait.unwrap_or(rule.revalidate_timeout);
                let listing = self.shared_tags(&wanted, (!is_stranger).then(|| key.clone()));
                tokio::pin!(listing);
                if let Ok(revalidation) = timeout(wait, listing.as_mut()).await {
                    revalidation
                } else {
                    upstream.record_timeout(&wanted.caller, &wanted.endpoint, wait);
                    if !is_stranger && kept.is_none() {
                        kept = self.kept_page(request, repository, (&key, true)).await;
                        situation = in_situation(kept.as_ref());
                    }
                    if can_do_without(&situation) {
                        // The request goes on; the next asker finds its result.
                        Err((
                            Revalidation::Unavailable(UpstreamFailure::RevalidateTimeout),
                            None,
                        ))
                    } else {
                        listing.await
                    }
                }
            }
        };
        if !is_stranger && kept.is_none() && matches!(revalidation, Err((Revalidation::Unavailable(_), _))) {
            kept = self.kept_page(request, repository, (&key, true)).await;
            situation = in_situation(kept.as_ref());
        }
        let how = ServeInfo {
            reason: ServeReason::Fetched(crate::policy::MissReason::NoDigest),
            confirmed_at: Some(request.now),
        };
        match revalidation {
            Ok(FetchedList::Buffered(listing)) => ProxyResponse::Listing(listing, how),
            Ok(FetchedList::Streamed(list)) => ProxyResponse::StreamedList(list, how),
            Err((revalidation, answer)) => match decide(&situation.with_revalidation(revalidation)) {
                Decision::Serve(served) => serve(kept, ServeReason::Cached(served)),
                Decision::Deny(refusal) => refused(refusal, answer, false),
                Decision::Revalidate | Decision::Fetch(_) | Decision::ProbeLayers(_) => refused(
                    crate::policy::DenyReason::UpstreamUnavailable(UpstreamFailure::Malformed),
                    answer,
                    false,
                ),
            },
        }
    }

    /// The page as it is kept, or, if it may be `derived`, cut from what is kept of the list; and what confirms it.
    async fn kept_page(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        (key, derived): (&ListingKey, bool),
    ) -> Option<CachedPage> {
        let key = key.clone();
        let query = match &request.endpoint {
            Endpoint::Tags { query, .. } if derived => Some(query.clone()),
            _ => None,
        };
        self.look_up(&request.site, repository, move |cached| {
            let (pull, site, repository) = (cached.pull, cached.site, cached.repository);
            if let Some(kept) = pull.cached(site, repository, cached.view.listing(&key)) {
                return Some((page_of(&kept), kept));
            }
            let kept = |path: &str| {
                let upstream = Arc::clone(&key.upstream);
                let path = path.to_owned();
                cached.view.listing(&ListingKey { upstream, path }).ok().flatten()
            };
            page::derived(repository, query.as_ref()?, kept)
        })
        .await
    }

    /// Fetches a page of a list, and keeps it where there is a key.
    pub(super) async fn list(
        self: &Arc<Self>,
        wanted: &UpstreamRequest,
        key: Option<ListingKey>,
    ) -> ListResult {
        let fetched = self.asked(wanted).await?;
        let head = head_of(&fetched, &wanted.endpoint).map_err(malformed)?;
        let bytes = fetched.collect(REFERRERS_BYTES_MAX).await.map_err(malformed)?;
        let bytes = named_as_here(wanted, bytes);
        self.keep_list(key, Listing { bytes, ..head }).await
    }

    /// The same for tags: a long list is passed on as it arrives.
    pub(super) async fn tags(
        self: &Arc<Self>,
        wanted: &UpstreamRequest,
        key: Option<ListingKey>,
    ) -> Result<FetchedList, ListError> {
        let mut fetched = self.asked(wanted).await?;
        let mut head = head_of(&fetched, &wanted.endpoint).map_err(malformed)?;
        let mut begun = Vec::new();
        while begun.len() <= LISTING_WHOLE_BYTES_MAX {
            let Some(chunk) = fetched.chunk().await else {
                head.bytes = named_as_here(wanted, begun.into());
                return self.keep_list(key, head).await.map(FetchedList::Buffered);
            };
            begun.extend_from_slice(&chunk.map_err(malformed)?);
        }
        // Whether it is a list can no longer be told by its end: a page of something in front begins otherwise.
        if !begins_as_list(&begun) {
            return Err(malformed(UpstreamFailure::Malformed));
        }
        // The name stands before the tags.
        let begun = Bytes::from(begun);
        head.bytes = named_as_here(wanted, begun.clone());
        let renamed = |size: u64| size.saturating_sub(begun.len() as u64) + head.bytes.len() as u64;
        let size = fetched.length.map(renamed);
        let list = StreamedList::new(self, key, (head, size), fetched);
        Ok(FetchedList::Streamed(Box::new(list)))
    }

    async fn asked(
        self: &Arc<Self>,
        wanted: &UpstreamRequest,
    ) -> Result<ResponseStream, (Revalidation, Option<Arc<UpstreamResponse>>)> {
        let UpstreamRequest {
            site,
            repository,
            endpoint,
            accept,
            caller,
            ..
        } = wanted;
        let asked_at = Instant::now();
        match site.upstream().get(caller, endpoint, accept, None).await {
            Ok(fetched) => Ok(fetched),
            Err(answer) => {
                self.learn(wanted, &answer, asked_at).await;
                let revalidation = self.heard(site, repository, &answer).await;
                Err((revalidation, Some(Arc::new(answer))))
            }
        }
    }

    /// It must be a list, whatever its status says: neither a captive portal's page nor an error with status 200 is one.
    async fn keep_list(&self, key: Option<ListingKey>, listing: Listing) -> ListResult {
        if !listing.is_list() {
            return Err(malformed(UpstreamFailure::Malformed));
        }
        let Some(key) = key else { return Ok(listing) };
        let (page, now) = (listing.clone(), self.clock.now());
        let kept = self.store.write(move |store| {
            let Listing {
                bytes,
                media_type,
                next,
                filters,
            } = page;
            store.put_listing(&key, StoredListing::new(bytes, media_type, next, filters, now))
        });
        super::revalidate::report(kept.await, "keep a list");
        Ok(listing)
    }
}

/// A page for an outage, and the kept page that says how old it is.
type CachedPage = (Listing, Arc<StoredListing>);

/// A list of tags from the upstream.
pub(super) enum FetchedList {
    Buffered(Listing),
    Streamed(Box<StreamedList>),
}

/// With the client's name of the repository, where it is another one at the registry.
fn named_as_here(wanted: &UpstreamRequest, list: Bytes) -> Bytes {
    let upstream = wanted.site.upstream();
    let there: Vec<_> = upstream.upstream_names(&wanted.repository).collect();
    renamed(list, &there, &wanted.repository)
}

fn malformed(cause: UpstreamFailure) -> (Revalidation, Option<Arc<UpstreamResponse>>) {
    (Revalidation::Unavailable(cause), None)
}

impl Listing {
    fn is_list(&self) -> bool {
        if self.media_type.is_index() {
            is_referrers(&self.bytes)
        } else {
            is_tags(&self.bytes)
        }
    }
}

/// Whether these are tags as the distribution spec lists them ("Listing Tags").
pub(super) fn is_tags(bytes: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Page {
        // Go writes an empty list as `null`. Named so, it may not be missing.
        #[serde(rename = "tags", deserialize_with = "Option::deserialize")]
        _tags: Option<Vec<String>>,
        errors: Option<IgnoredAny>,
    }
    is_object(bytes) && serde_json::from_slice(bytes).is_ok_and(|Page { errors, .. }| errors.is_none())
}

/// Whether this is an image index as the distribution spec lists referrers ("Listing Referrers").
fn is_referrers(bytes: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Page {
        #[serde(rename = "manifests", deserialize_with = "Option::deserialize")]
        _manifests: Option<Vec<Referrer>>,
        errors: Option<IgnoredAny>,
    }
    #[derive(Deserialize)]
    struct Referrer {
        #[serde(rename = "digest")]
        _digest: String,
    }
    is_object(bytes) && serde_json::from_slice(bytes).is_ok_and(|Page { errors, .. }| errors.is_none())
}

fn is_object(bytes: &[u8]) -> bool {
    bytes.trim_ascii_start().first() == Some(&b'{')
}

/// Whether a list of tags may begin so. An error names itself first.
fn begins_as_list(bytes: &[u8]) -> bool {
    let first = bytes.trim_ascii_start().strip_prefix(b"{");
    first.is_some_and(|first| !first.trim_ascii_start().starts_with(br#""errors""#))
}

fn serve(kept: Option<CachedPage>, reason: ServeReason) -> ProxyResponse {
    match kept {
        Some((listing, source)) => {
            let confirmed_at = Some(source.listed_at);
            ProxyResponse::Listing(listing, ServeInfo { reason, confirmed_at })
        }
        None => refused(crate::policy::DenyReason::NotCached, None, false),
    }
}

fn page_of(kept: &StoredListing) -> Listing {
    Listing {
        bytes: kept.bytes.clone(),
        media_type: kept.media_type.clone(),
        next: kept.next.clone(),
        filters: kept.filters.clone(),
    }
}

/// A page that was kept.
pub(super) fn given(kept: &StoredListing, reason: ServeReason) -> ProxyResponse {
    let confirmed_at = Some(kept.listed_at);
    ProxyResponse::Listing(page_of(kept), ServeInfo { reason, confirmed_at })
}

/// What the headers say of a list.
fn head_of(fetched: &ResponseStream, endpoint: &Endpoint) -> Result<Listing, UpstreamFailure> {
    let filters = fetched.headers.get(crate::oci::header::OCI_FILTERS_APPLIED);
    let media_type = match endpoint {
        Endpoint::Referrers { .. } => "application/vnd.oci.image.index.v1+json",
        _ => "application/json",
    };
    Ok(Listing {
        bytes: Bytes::new(),
        media_type: media_type.parse().map_err(|_| UpstreamFailure::Malformed)?,
        next: next_link(&fetched.headers),
        filters: filters.and_then(|value| value.to_str().ok()).map(str::to_owned),
    })
}
