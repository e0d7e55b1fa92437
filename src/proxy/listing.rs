//! Tag lists: always fetched, coalesced, with the last page cached for an outage. Referrers lists: see `referrers`.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::time::{Instant, timeout};

use super::list_name::renamed;
use super::manifest_fetch::{CoalesceKey, UpstreamRequest};
use super::pipeline::{ReadContext, denied};
use super::{ProxyResponse, ProxyService, ServeInfo, ServeReason, StreamedList, list_page};
use crate::oci::header::next_link;
use crate::oci::{Endpoint, MediaType, UpstreamFailure};
use crate::policy::{CachedEntry, Completeness, ContentKind, Decision, Policy, Revalidation, decide};
use crate::store::listings::{ListingKey, StoredListing};
use crate::upstream::{ResponseStream, UpstreamResponse};

/// Tag lists up to this size are buffered; longer ones are streamed.
const BUFFERED_LIST_BYTES_MAX: usize = 512 * 1024;
/// Maximum size of a referrers list.
const REFERRERS_BYTES_MAX: usize = 4 * 1024 * 1024;

/// One page of a list.
#[derive(Clone, Debug)]
pub struct Listing {
    /// JSON body as the upstream sent it.
    pub bytes: Bytes,
    /// Media type.
    pub media_type: MediaType,
    /// Path and query of the next page, if any.
    pub next: Option<String>,
    /// Filters that the upstream reports as applied.
    pub filters: Option<String>,
}

/// A page, or the revalidation result and the upstream response.
pub(super) type ListResult = Result<Listing, (Revalidation, Option<Arc<UpstreamResponse>>)>;

/// Revalidation result and upstream response of a failed list request.
pub(super) type ListError = (Revalidation, Option<Arc<UpstreamResponse>>);

/// Response shared by all coalesced callers.
#[derive(Clone)]
pub(super) enum SharedList {
    Buffered(Listing),
    /// A streamed response can be consumed by one client only; the others fetch again.
    Streamed(Arc<Mutex<Option<Box<StreamedList>>>>),
    Failed(ListError),
}

impl ReadContext<'_> {
    pub(super) async fn listing(&self) -> ProxyResponse {
        let (request, rule) = (self.request, self.rule);
        let key = ListingKey {
            upstream: request.registry.shared_name(),
            path: request.endpoint.path_and_query(),
        };
        // Like a tag, a list is a mutable name of the repository. It has no digest to compare, so it is always
        // fetched, and a cached list is served only while the upstream is unavailable.
        let never_revalidates = rule.policy == Policy::Never;
        // A registry may return an empty list to a caller without a grant, or a proxy may respond in its place. So
        // that response is forwarded and not stored, and a cached list does not influence it.
        let has_no_grant = self.has_no_grant();
        let mut stored = None;
        if !has_no_grant {
            stored = self.cached_page(&key, never_revalidates).await;
        }
        let state_with = |stored: Option<&CachedPage>| {
            let entry = stored.map(|(_, source)| CachedEntry {
                digest: source.digest,
                confirmed_at: source.listed_at,
                is_moved: false,
                completeness: Completeness::Complete,
                is_invalidated: false,
            });
            self.state(ContentKind::Tag, entry, true)
        };
        let mut state = state_with(stored.as_ref());
        match decide(&state) {
            Decision::Deny(refusal) => return denied(refusal, None, false),
            Decision::Serve(served) if served.cause().is_none() && never_revalidates => {
                return serve(stored, ServeReason::Cached(served));
            }
            _ => {}
        }
        let mut upstream_request = self.upstream_request();
        let upstream = request.registry.upstream();
        let wait = upstream.wait_limit(
            &upstream_request.caller,
            (&upstream_request.endpoint, false),
            rule.revalidate_timeout,
        );
        if !has_no_grant && stored.is_none() && wait != Ok(rule.revalidate_timeout) {
            stored = self.cached_page(&key, true).await;
            state = state_with(stored.as_ref());
        }
        if stored.is_some() {
            upstream_request.caller.wait_deadline = None;
        }
        let revalidation = match wait {
            Err(cause) if state.has_fallback() => Err((Revalidation::Unavailable(cause), None)),
            wait => {
                let wait = wait.unwrap_or(rule.revalidate_timeout);
                let store_as = (!has_no_grant).then(|| key.clone());
                let listing = self.proxy.coalesced_tags(&upstream_request, store_as);
                tokio::pin!(listing);
                if let Ok(revalidation) = timeout(wait, listing.as_mut()).await {
                    revalidation
                } else {
                    upstream.record_timeout(&upstream_request.caller, &upstream_request.endpoint, wait);
                    if !has_no_grant && stored.is_none() {
                        stored = self.cached_page(&key, true).await;
                        state = state_with(stored.as_ref());
                    }
                    if state.has_fallback() {
                        // Once sent, the request continues, and the next caller uses its result.
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
        if !has_no_grant && stored.is_none() && matches!(revalidation, Err((Revalidation::Unavailable(_), _)))
        {
            stored = self.cached_page(&key, true).await;
            state = state_with(stored.as_ref());
        }
        let info = ServeInfo {
            reason: ServeReason::Fetched(crate::policy::MissReason::NoDigest),
            confirmed_at: Some(request.now),
        };
        match revalidation {
            Ok(FetchedList::Buffered(listing)) => ProxyResponse::Listing(listing, info),
            Ok(FetchedList::Streamed(list)) => ProxyResponse::StreamedList(list, info),
            Err((revalidation, response)) => match decide(&state.with_revalidation(revalidation)) {
                Decision::Serve(served) => serve(stored, ServeReason::Cached(served)),
                Decision::Deny(refusal) => denied(refusal, response, false),
                Decision::Revalidate | Decision::Fetch(_) | Decision::ProbeLayers(_) => denied(
                    crate::policy::DenyReason::UpstreamUnavailable(UpstreamFailure::Malformed),
                    response,
                    false,
                ),
            },
        }
    }

    /// The cached page, or with `derived` a page derived from the cached list, and the cached page that states its
    /// age.
    async fn cached_page(&self, key: &ListingKey, derived: bool) -> Option<CachedPage> {
        let key = key.clone();
        let query = match &self.request.endpoint {
            Endpoint::Tags { query, .. } if derived => Some(query.clone()),
            _ => None,
        };
        let (registry, repository) = (&self.request.registry, self.repository);
        self.proxy
            .read_cache(registry, repository, move |cached| {
                let (proxy, registry, repository) = (cached.proxy, cached.registry, cached.repository);
                if let Some(stored) = proxy.cached(registry, repository, cached.view.listing(&key)) {
                    return Some((page_of(&stored), stored));
                }
                let find_page = |path: &str| {
                    let upstream = Arc::clone(&key.upstream);
                    let path = path.to_owned();
                    cached.view.listing(&ListingKey { upstream, path }).ok().flatten()
                };
                list_page::derive_page(repository, query.as_ref()?, find_page)
            })
            .await
    }
}

impl ProxyService {
    /// A coalesced tag list request, stored under `key` if given. Once sent, the request continues if its clients leave.
    pub(super) async fn coalesced_tags(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        key: Option<ListingKey>,
    ) -> Result<FetchedList, ListError> {
        let call_key = (CoalesceKey::new(self, upstream_request), key.is_some());
        let call = self
            .tag_lists
            .share_queued(call_key, upstream_request.demand(false), |waiters| {
                let (proxy, mut upstream_request, key) =
                    (Arc::clone(self), upstream_request.clone(), key.clone());
                upstream_request.caller.waiters = Some(waiters);
                async move {
                    match proxy.fetch_tags(&upstream_request, key).await {
                        Ok(FetchedList::Buffered(listing)) => SharedList::Buffered(listing),
                        Ok(FetchedList::Streamed(list)) => {
                            SharedList::Streamed(Arc::new(Mutex::new(Some(list))))
                        }
                        Err(unlisted) => SharedList::Failed(unlisted),
                    }
                }
            });
        match call.wait().await {
            Some(SharedList::Buffered(listing)) => Ok(FetchedList::Buffered(listing)),
            Some(SharedList::Failed(unlisted)) => Err(unlisted),
            Some(SharedList::Streamed(list)) => {
                let list = list.lock().take();
                match list {
                    Some(list) => Ok(FetchedList::Streamed(list)),
                    None => self.fetch_tags(upstream_request, key).await,
                }
            }
            None => Err((Revalidation::Unavailable(UpstreamFailure::Abandoned), None)),
        }
    }

    /// Fetches a page of a list and stores it under `key` if given.
    pub(super) async fn fetch_list(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        key: Option<ListingKey>,
    ) -> ListResult {
        let fetched = self.get_list(upstream_request).await?;
        let head = head_of(&fetched, &upstream_request.endpoint).map_err(malformed)?;
        let bytes = fetched.collect(REFERRERS_BYTES_MAX).await.map_err(malformed)?;
        let bytes = with_client_name(upstream_request, bytes);
        self.store_list(key, Listing { bytes, ..head }).await
    }

    /// Like [`Self::fetch_list`], for tags. A long list is streamed.
    pub(super) async fn fetch_tags(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
        key: Option<ListingKey>,
    ) -> Result<FetchedList, ListError> {
        let mut fetched = self.get_list(upstream_request).await?;
        let mut head = head_of(&fetched, &upstream_request.endpoint).map_err(malformed)?;
        let mut begun = Vec::new();
        while begun.len() <= BUFFERED_LIST_BYTES_MAX {
            let Some(chunk) = fetched.chunk().await else {
                head.bytes = with_client_name(upstream_request, begun.into());
                return self.store_list(key, head).await.map(FetchedList::Buffered);
            };
            begun.extend_from_slice(&chunk.map_err(malformed)?);
        }
        // A streamed body cannot be parsed as a whole, so only its beginning is checked. An error page of a proxy
        // begins otherwise.
        if !begins_as_list(&begun) {
            return Err(malformed(UpstreamFailure::Malformed));
        }
        // The `name` precedes the tags.
        let begun = Bytes::from(begun);
        head.bytes = with_client_name(upstream_request, begun.clone());
        let renamed = |size: u64| size.saturating_sub(begun.len() as u64) + head.bytes.len() as u64;
        let size = fetched.length.map(renamed);
        let list = StreamedList::new(self, key, (head, size), fetched);
        Ok(FetchedList::Streamed(Box::new(list)))
    }

    async fn get_list(
        self: &Arc<Self>,
        upstream_request: &UpstreamRequest,
    ) -> Result<ResponseStream, (Revalidation, Option<Arc<UpstreamResponse>>)> {
        let UpstreamRequest {
            registry,
            repository,
            endpoint,
            accept,
            caller,
            ..
        } = upstream_request;
        let sent_at = Instant::now();
        match registry.upstream().get(caller, endpoint, accept, None).await {
            Ok(fetched) => Ok(fetched),
            Err(response) => {
                self.record_response(upstream_request, &response, sent_at).await;
                let revalidation = self.classify(registry, repository, &response).await;
                Err((revalidation, Some(Arc::new(response))))
            }
        }
    }

    /// Stores a list. The body must be a list whatever its status: a captive portal's page or an error with status
    /// 200 is rejected.
    async fn store_list(&self, key: Option<ListingKey>, listing: Listing) -> ListResult {
        if !listing.is_list() {
            return Err(malformed(UpstreamFailure::Malformed));
        }
        let Some(key) = key else { return Ok(listing) };
        let (page, now) = (listing.clone(), self.clock.now());
        let stored = self.store.write(move |store| {
            let Listing {
                bytes,
                media_type,
                next,
                filters,
            } = page;
            store.put_listing(&key, StoredListing::new(bytes, media_type, next, filters, now))
        });
        super::log_store_error(stored.await, "store list");
        Ok(listing)
    }
}

/// A page for an outage, and the stored page that states its age.
type CachedPage = (Listing, Arc<StoredListing>);

/// A tag list from the upstream.
pub(super) enum FetchedList {
    Buffered(Listing),
    Streamed(Box<StreamedList>),
}

/// The list with the client's repository name, if the registry uses another.
fn with_client_name(upstream_request: &UpstreamRequest, list: Bytes) -> Bytes {
    let upstream = upstream_request.registry.upstream();
    let there: Vec<_> = upstream.upstream_names(&upstream_request.repository).collect();
    renamed(list, &there, &upstream_request.repository)
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

/// Whether the body is a tag list of the distribution spec ("Listing Tags").
pub(super) fn is_tags(bytes: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Page {
        // Go encodes an empty list as `null`. With this attribute the field must be present.
        #[serde(rename = "tags", deserialize_with = "Option::deserialize")]
        _tags: Option<Vec<String>>,
        errors: Option<IgnoredAny>,
    }
    is_object(bytes) && serde_json::from_slice(bytes).is_ok_and(|Page { errors, .. }| errors.is_none())
}

/// Whether the body is an image index as the distribution spec returns referrers ("Listing Referrers").
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

/// Whether a tag list may begin like this. An error body begins with `errors`.
fn begins_as_list(bytes: &[u8]) -> bool {
    let first = bytes.trim_ascii_start().strip_prefix(b"{");
    first.is_some_and(|first| !first.trim_ascii_start().starts_with(br#""errors""#))
}

fn serve(stored: Option<CachedPage>, reason: ServeReason) -> ProxyResponse {
    match stored {
        Some((listing, source)) => {
            let confirmed_at = Some(source.listed_at);
            ProxyResponse::Listing(listing, ServeInfo { reason, confirmed_at })
        }
        None => denied(crate::policy::DenyReason::NotCached, None, false),
    }
}

fn page_of(stored: &StoredListing) -> Listing {
    Listing {
        bytes: stored.bytes.clone(),
        media_type: stored.media_type.clone(),
        next: stored.next.clone(),
        filters: stored.filters.clone(),
    }
}

/// Response with a cached page.
pub(super) fn cached_list_response(stored: &StoredListing, reason: ServeReason) -> ProxyResponse {
    let confirmed_at = Some(stored.listed_at);
    ProxyResponse::Listing(page_of(stored), ServeInfo { reason, confirmed_at })
}

/// List metadata from the response headers.
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
