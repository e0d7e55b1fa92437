//! The upstream as the source of a download, and of parts that lie far ahead of one.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use tokio::time::Instant;

use super::ProxyService;
use super::manifest_fetch::UpstreamRequest;
use crate::download::{self, Ahead, Chunks, Failure, Leader, Source, Stream};
use crate::oci::{Digest, UpstreamFailure};
use crate::queue::{Class, Demand, Waiters};
use crate::telemetry::{self, SpanKind};
use crate::upstream::{Credential, RangeSpec, ResponseKind, ResponseStream, UpstreamResponse, UrlIndex};

/// How long a rate limit is waited out in the middle of a transfer. Clients that have had bytes wait longer than for a
/// response.
const RESUME_LIMIT_WITHIN: Duration = Duration::from_secs(120);

/// Asked with the leader's own credential, whose yes is kept as its grant.
pub(super) struct UpstreamSource {
    pull: Arc<ProxyService>,
    of: UpstreamRequest,
    digest: Digest,
    /// When it was first asked: what follows from the answer is learned once.
    asked_at: Option<Instant>,
    /// Where the bytes came from last.
    last: Option<UrlIndex>,
    began: Instant,
    /// The requests that wait for what it brings.
    waiters: Option<Waiters>,
}

impl UpstreamSource {
    pub(super) fn new(pull: &Arc<ProxyService>, mut of: UpstreamRequest, digest: Digest) -> Self {
        of.caller.trace = of.caller.trace.child();
        Self {
            pull: Arc::clone(pull),
            of,
            digest,
            asked_at: None,
            last: None,
            began: Instant::now(),
            waiters: None,
        }
    }

    /// The source of this leader's download.
    pub(super) fn for_leader(mut self, leader: &Leader) -> Self {
        let waiters = leader.waiters().clone();
        if !self.pull.may_be_made_up(&self.of) {
            waiters.detach();
        }
        self.waiters = Some(waiters);
        self
    }

    /// A client's token may be too old by the time a transfer has to be resumed. It opened the transfer, so its right is not in
    /// question; the rest may yet be had as anyone may have it. Says whether there was a credential.
    fn forgo_credential(&mut self) -> bool {
        let had_one = matches!(self.of.caller.credential, Credential::Client(_));
        if had_one {
            self.of.caller = self.of.site.caller(
                &self.pull.principals,
                None,
                (self.of.caller.peer, &self.of.caller.trace),
            );
        }
        had_one
    }

    async fn get(&self, part: RangeSpec) -> Result<ResponseStream, UpstreamResponse> {
        let UpstreamRequest {
            site,
            endpoint,
            accept,
            caller,
            ..
        } = &self.of;
        site.upstream().get_part(caller, endpoint, accept, part).await
    }

    /// A transfer of its own, in its turn among the others.
    async fn whole(&self, part: RangeSpec) -> Option<Box<dyn Chunks>> {
        let UpstreamRequest {
            site,
            endpoint,
            caller,
            ..
        } = &self.of;
        let demand = Demand {
            class: Class::Bulk,
            ..caller.demand(endpoint)
        };
        let place = self.pull.downloads.admit(site.name(), demand).await.ok()?;
        let asked_at = Instant::now();
        match self.get(part).await {
            Ok(fetched) => Some(Box::new(fetched.holding(place))),
            Err(answer) => {
                self.pull.learn(&self.of, &answer, asked_at).await;
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
            after: self.last,
        };
        let first = self.asked_at.is_none();
        let now = Instant::now();
        let asked_at = *self.asked_at.get_or_insert(now);
        if !first {
            self.of.caller.wait_deadline = Some(now + RESUME_LIMIT_WITHIN);
        }
        let mut answer = match &self.waiters {
            // What follows from an answer is learned whoever waits for it.
            Some(waiters) if first => match waiters.while_wanted(self.get(part)).await {
                Some(answer) => answer,
                None => return Err(UpstreamResponse::unavailable(UpstreamFailure::Busy)),
            },
            _ => self.get(part).await,
        };
        if !first
            && matches!(&answer, Err(answer) if answer.kind == ResponseKind::Denied)
            && self.forgo_credential()
        {
            answer = self.get(part).await;
        }
        let UpstreamRequest { site, repository, .. } = &self.of;
        match answer {
            Ok(fetched) => {
                self.last = Some(fetched.url);
                if first {
                    self.pull.arriving.note(site, repository, self.digest);
                }
                let start = fetched.start;
                let total = fetched.total.or(fetched.length.map(|length| start + length));
                Ok(Stream {
                    start,
                    total,
                    body: Box::new(fetched),
                })
            }
            Err(answer) => {
                if first {
                    self.pull.learn(&self.of, &answer, asked_at).await;
                }
                Err(answer)
            }
        }
    }

    fn stated_size(&self) -> Option<u64> {
        let UpstreamRequest { site, repository, .. } = &self.of;
        self.pull.sizes.of(site, repository, self.digest)
    }

    /// Only the bytes prove that it was the registry that said yes.
    async fn verified(&mut self, size: u64) {
        if let Some(asked_at) = self.asked_at {
            self.pull
                .learn_blob(&self.of, (self.digest, size), asked_at)
                .await;
        }
    }

    fn ended(&self, failure: Option<&Failure>) {
        let UpstreamRequest {
            site,
            repository,
            caller,
            ..
        } = &self.of;
        self.pull.arriving.forget(site, repository, self.digest);
        self.pull
            .telemetry
            .record_span(&caller.trace, || telemetry::Span {
                trace: caller.trace.clone(),
                name: "download",
                kind: SpanKind::Internal,
                ended: self.pull.clock.now(),
                took: self.began.elapsed(),
                attributes: vec![
                    ("ifnewer.upstream", site.name().to_owned()),
                    ("ifnewer.image", format!("{repository}@{}", self.digest)),
                ],
                error: failure.map(ToString::to_string),
            });
    }
}

impl Ahead for UpstreamSource {
    /// A whole answer (200) is no part: reading it up to the part would take as long as the fill.
    fn open(&mut self, from: u64, until: Option<u64>) -> download::Part<'_> {
        Box::pin(async move {
            let is_whole = from == 0 && until.is_none();
            let part = RangeSpec {
                from,
                until,
                after: None,
            };
            if is_whole {
                return self.whole(part).await;
            }
            let fetched = self.get(part).await.ok()?;
            let is_part = fetched.status == StatusCode::PARTIAL_CONTENT;
            is_part.then(|| Box::new(fetched) as Box<dyn Chunks>)
        })
    }
}
