//! Download source: one blob from its upstream, from a given offset, or in ranges over further connections.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use tokio::time::Instant;

use super::ProxyService;
use super::manifest_fetch::UpstreamRequest;
use crate::download::{self, ByteStream, DownloadError, Leader, RangeSource, Source, Stream};
use crate::oci::{CacheHeaders, Digest, UpstreamFailure};
use crate::queue::{Class, Demand, Waiters};
use crate::telemetry::{self, SpanKind};
use crate::upstream::{Credential, RangeSpec, ResponseKind, ResponseStream, UpstreamResponse, UrlIndex};

/// Longest wait for a rate limit during a download. Clients that have received bytes wait longer than for a response
/// head.
const RESUME_RATE_LIMIT_WAIT_MAX: Duration = Duration::from_secs(120);

/// A blob at its upstream. Requests carry the leader's own credential, and a success is recorded as the leader's grant.
pub(super) struct UpstreamSource {
    proxy: Arc<ProxyService>,
    upstream_request: UpstreamRequest,
    digest: Digest,
    /// Time of the first request. Its response is recorded once.
    sent_at: Option<Instant>,
    /// URL of the last successful request.
    last_url: Option<UrlIndex>,
    started_at: Instant,
    /// Requests waiting for this download.
    waiters: Option<Waiters>,
    /// Set in a source of ranges only: the size that the blob must have.
    total: Option<u64>,
}

impl UpstreamSource {
    pub(super) fn new(
        proxy: &Arc<ProxyService>,
        mut upstream_request: UpstreamRequest,
        digest: Digest,
    ) -> Self {
        upstream_request.caller.trace = upstream_request.caller.trace.child();
        Self {
            proxy: Arc::clone(proxy),
            upstream_request,
            digest,
            sent_at: None,
            last_url: None,
            started_at: Instant::now(),
            waiters: None,
            total: None,
        }
    }

    /// The source of this leader's download.
    pub(super) fn for_leader(mut self, leader: &Leader) -> Self {
        let waiters = leader.waiters().clone();
        if !self.proxy.may_be_fabricated(&self.upstream_request) {
            waiters.detach();
        }
        self.waiters = Some(waiters);
        self
    }

    /// Drops the client's credential, and returns whether there was one. When a download is resumed, the client's token
    /// may have expired. It authorized the download, so the rest may be fetched anonymously.
    fn drop_credential(&mut self) -> bool {
        let had_one = matches!(self.upstream_request.caller.credential, Credential::Client(_));
        if had_one {
            self.upstream_request.caller = self.upstream_request.registry.caller(
                &self.proxy.principals,
                None,
                (
                    self.upstream_request.caller.peer,
                    &self.upstream_request.caller.trace,
                ),
            );
        }
        had_one
    }

    async fn get(&self, part: RangeSpec) -> Result<ResponseStream, UpstreamResponse> {
        let UpstreamRequest {
            registry,
            endpoint,
            accept,
            caller,
            ..
        } = &self.upstream_request;
        registry.upstream().get_part(caller, endpoint, accept, part).await
    }

    /// Opens the complete blob on this connection. That is a download of its own, so it waits for a permit.
    async fn open_complete(&self, part: RangeSpec) -> Option<Box<dyn ByteStream>> {
        let UpstreamRequest {
            registry,
            endpoint,
            caller,
            ..
        } = &self.upstream_request;
        let demand = Demand {
            class: Class::Bulk,
            ..caller.demand(endpoint)
        };
        let permit = self.proxy.downloads.admit(registry.name(), demand).await.ok()?;
        let sent_at = Instant::now();
        match self.get(part).await {
            Ok(fetched) => Some(Box::new(fetched.holding(permit))),
            Err(response) => {
                self.proxy
                    .record_response(&self.upstream_request, &response, sent_at)
                    .await;
                None
            }
        }
    }
}

impl Source for UpstreamSource {
    async fn open(&mut self, from: u64) -> Result<Stream, UpstreamResponse> {
        let part = RangeSpec {
            from,
            until: None,
            after: self.last_url,
            is_optional: false,
        };
        let first = self.sent_at.is_none();
        let now = Instant::now();
        let sent_at = *self.sent_at.get_or_insert(now);
        if !first {
            self.upstream_request.caller.wait_deadline = Some(now + RESUME_RATE_LIMIT_WAIT_MAX);
        }
        let mut response = match &self.waiters {
            // The first response is recorded even without a waiting request.
            Some(waiters) if first => match waiters.while_waited_for(self.get(part)).await {
                Some(response) => response,
                None => return Err(UpstreamResponse::unavailable(UpstreamFailure::Abandoned)),
            },
            _ => self.get(part).await,
        };
        if !first
            && matches!(&response, Err(response) if response.kind == ResponseKind::Denied)
            && self.drop_credential()
        {
            response = self.get(part).await;
        }
        let UpstreamRequest {
            registry, repository, ..
        } = &self.upstream_request;
        match response {
            Ok(fetched) => {
                self.last_url = Some(fetched.url);
                let caches = CacheHeaders::read(&fetched.headers);
                self.upstream_request.upstream_caches.record(caches.as_ref());
                if first {
                    self.proxy
                        .active_downloads
                        .insert(registry, repository, self.digest);
                }
                let start = fetched.start;
                let total = fetched.total.or(fetched.length.map(|length| start + length));
                Ok(Stream {
                    start,
                    total,
                    body: Box::new(fetched),
                })
            }
            Err(response) => {
                if first {
                    self.proxy
                        .record_response(&self.upstream_request, &response, sent_at)
                        .await;
                }
                Err(response)
            }
        }
    }

    fn stated_size(&self) -> Option<u64> {
        let UpstreamRequest {
            registry, repository, ..
        } = &self.upstream_request;
        self.proxy.size_hints.get(registry, repository, self.digest)
    }

    fn segments(&self, total: u64) -> Option<Box<dyn RangeSource>> {
        let mut request = self.upstream_request.clone();
        // A rate limit is not waited out: the download goes on without this connection.
        request.caller.wait_deadline = Some(Instant::now());
        let mut source = Self::new(&self.proxy, request, self.digest);
        source.total = Some(total);
        Some(Box::new(source))
    }

    /// Only verified bytes prove that the registry sent the response.
    async fn verified(&mut self, size: u64) {
        if let Some(sent_at) = self.sent_at {
            self.proxy
                .record_verified_blob(&self.upstream_request, (self.digest, size), sent_at)
                .await;
        }
    }

    fn ended(&self, failure: Option<&DownloadError>) {
        let UpstreamRequest {
            registry,
            repository,
            caller,
            ..
        } = &self.upstream_request;
        self.proxy
            .active_downloads
            .remove(registry, repository, self.digest);
        self.proxy
            .telemetry
            .record_span(&caller.trace, || telemetry::Span {
                trace: caller.trace.clone(),
                name: "download",
                kind: SpanKind::Internal,
                ended: self.proxy.clock.now(),
                took: self.started_at.elapsed(),
                attributes: vec![
                    ("ifnewer.upstream", registry.name().to_owned()),
                    ("ifnewer.image", format!("{repository}@{}", self.digest)),
                ],
                error: failure.map(ToString::to_string),
            });
    }
}

impl RangeSource for UpstreamSource {
    /// A complete response (200) is not used as a range: reading up to the offset would take as long as the download.
    fn open(&mut self, from: u64, until: Option<u64>) -> download::RangeFuture<'_> {
        Box::pin(async move {
            let is_whole = from == 0 && until.is_none();
            let part = RangeSpec {
                from,
                until,
                after: None,
                is_optional: self.total.is_some(),
            };
            if is_whole {
                return self.open_complete(part).await;
            }
            let fetched = self.get(part).await.ok()?;
            let is_part = fetched.status == StatusCode::PARTIAL_CONTENT
                && fetched.start == from
                && self.total.is_none_or(|total| fetched.total == Some(total));
            is_part.then(|| Box::new(fetched) as Box<dyn ByteStream>)
        })
    }
}
