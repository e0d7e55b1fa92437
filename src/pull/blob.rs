//! Blobs: held, joined, or led.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::Instant;

use super::asking::Asked;
use super::fetching::Wanted;
use super::manifest::refused;
use super::source::Upstreamed;
use super::{Content, Context, How, Outcome, Pull, Reason, Request, passing};
use crate::download::{Failure, Joined, Reader, WITHHELD_BYTES};
use crate::oci::{AnyDigest, Cause, Digest, Repository};
use crate::policy::rules::Rule;
use crate::policy::{
    Heard, Held, Refusal, Rest, Served, Situation, Standing, Subject, Verdict, Whose, Why, decide,
};
use crate::upstream::Answer;

/// How often one joins again after a leader failed on a right that was its own. Each time another leads.
const JOINS_MAX: usize = 4;

/// How long the answer with a blob waits for its first byte. Clients give up on an answer after 30 s.
const BEGINS_WITHIN: Duration = Duration::from_secs(20);

/// How long the answer with a blob of unknown size is kept back, in the hope to learn it. Clients give up on an answer
/// after 30 s.
const UNSIZED_WITHIN: Duration = Duration::from_secs(5);

impl Pull {
    pub(super) async fn blob(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        digest: AnyDigest,
    ) -> Outcome {
        let context = self.context(request, repository);
        let digest = match digest {
            AnyDigest::Known(digest) => digest,
            AnyDigest::Foreign(_) => {
                return passing::unverifiable(request, &context.caller, u64::MAX).await;
            }
        };
        let rule = request.site.rule(repository, None);
        let road = Road {
            pull: self,
            request,
            repository,
            context: &context,
            rule,
            digest,
        };
        if context.is_stranger(rule, request.now) {
            return road.introduced().await;
        }
        let copy = self.held_content(request, repository, &digest);
        let situation = road.situation(copy.is_some());
        match (decide(&situation), copy) {
            (Verdict::Serve(served), Some((_, size))) if request.for_push => {
                road.for_push(&situation, size, served).await
            }
            (Verdict::Serve(served), Some((bytes, size))) => road.serve(bytes, size, served),
            (Verdict::Refuse(refusal), _) => refused(refusal, None, false),
            (Verdict::Ask, copy) => road.after_asking(situation, copy).await,
            (Verdict::Fetch(_) | Verdict::Serve(_) | Verdict::Check(_), _) => road.fetch(situation).await,
        }
    }

    fn held_content(
        &self,
        request: &Request,
        repository: &Repository,
        digest: &Digest,
    ) -> Option<(Content, u64)> {
        if let Some(bytes) = self.store.small_blob(digest) {
            let size = bytes.len() as u64;
            return Some((Content::Memory(bytes), size));
        }
        let image = format_args!("{repository}@{digest}");
        let held = self.cached(&request.site, &image, self.store.blob(digest))?;
        let size = held.size;
        Some((
            if request.head {
                Content::Head
            } else {
                Content::File(held)
            },
            size,
        ))
    }
}

struct Road<'a> {
    pull: &'a Arc<Pull>,
    request: &'a Request,
    repository: &'a Repository,
    context: &'a Context,
    rule: &'a Rule,
    digest: Digest,
}

impl Road<'_> {
    fn situation(&self, is_held: bool) -> Situation {
        let held = is_held.then_some(Held {
            digest: self.digest,
            confirmed_at: self.request.now,
            is_moved: false,
            rest: Rest::Held,
            is_in_doubt: self
                .pull
                .is_in_doubt(&self.request.site, self.repository, self.digest.into()),
        });
        let seen = self.pull.seen(
            &self.request.site,
            self.repository,
            &AnyDigest::Known(self.digest),
        );
        self.context
            .situation(self.rule, Subject::Blob, held, seen, self.request.now)
    }

    /// For one who has shown no right here: see [`Context::is_stranger`].
    async fn introduced(&self) -> Outcome {
        let now = self.request.now;
        let unseen = self.context.situation(self.rule, Subject::Blob, None, false, now);
        if let Verdict::Refuse(refusal) = decide(&unseen) {
            return refused(refusal, None, false);
        }
        let asked = self.ask(&unseen).await;
        if !matches!(asked.heard, Heard::Named { .. } | Heard::Unnamed) {
            return refuse_unheld(unseen, asked.heard, asked.answer);
        }
        match self
            .pull
            .held_content(self.request, self.repository, &self.digest)
        {
            Some((_, size)) if self.request.for_push => self.serve(Content::Head, size, Served::Immutable),
            Some((content, size)) => self.serve(content, size, Served::Immutable),
            None if self.request.head => self.head_said(unseen, asked),
            None => {
                let standing = Standing::Vouched;
                self.fetch(Situation { standing, ..unseen }).await
            }
        }
    }

    async fn after_asking(&self, situation: Situation, content: Option<(Content, u64)>) -> Outcome {
        let asked = self.ask(&situation).await;
        match (decide(&situation.having_heard(asked.heard)), content) {
            (Verdict::Serve(served), Some((content, size))) => self.serve(content, size, served),
            (Verdict::Refuse(refusal), _) => refused(refusal, asked.answer, is_own(asked.heard)),
            // The copy went away while the question was out.
            _ => self.fetch(situation).await,
        }
    }

    /// A held blob may have been collected by the registry, and a push that leaves it out would fail there. While the
    /// registry is silent there is no push to spoil.
    async fn for_push(&self, situation: &Situation, size: u64, served: Served) -> Outcome {
        let asked = self.ask(situation).await;
        match asked.heard {
            Heard::Absent => {
                let (store, own) = (Arc::clone(&self.pull.store), Arc::clone(&self.request.site));
                let (repository, digest) = (self.repository.clone(), self.digest);
                let gone = spawn_blocking(move || store.note_gone(own.name(), &repository, &digest)).await;
                super::asking::report(gone, "forget a blob that the registry no longer has");
                refused(Refusal::Absent, asked.answer, false)
            }
            Heard::Refused(_) => refused(Refusal::Forbidden, asked.answer, is_own(asked.heard)),
            _ => self.serve(Content::Head, size, served),
        }
    }

    /// Asks whether this principal may read this blob here. A yes is the proof that the upstream has it here.
    async fn ask(&self, situation: &Situation) -> Asked {
        self.pull
            .ask(
                self.request,
                self.repository,
                self.context,
                situation,
                self.rule.budget,
            )
            .await
    }

    fn serve(&self, content: Content, size: u64, served: Served) -> Outcome {
        self.outcome(content, Some(size), Reason::Held(served))
    }

    fn outcome(&self, content: Content, size: Option<u64>, reason: Reason) -> Outcome {
        let content = if self.request.head { Content::Head } else { content };
        Outcome::Blob {
            digest: self.digest,
            size,
            content,
            how: How {
                reason,
                confirmed_at: None,
            },
        }
    }

    async fn fetch(&self, situation: Situation) -> Outcome {
        if self.request.head {
            return self.head(situation).await;
        }
        let mut last = None;
        for _ in 0..JOINS_MAX {
            match self.join(situation).await {
                Ok(outcome) => return outcome,
                // The leader's right was not ours: join again, perhaps to lead.
                Err(failure) => last = Some(failure),
            }
        }
        let cause = match last.as_deref() {
            Some(Failure::Refused(answer)) => answer.cause(),
            _ => Cause::Busy,
        };
        refused(Refusal::Silent(cause), None, false)
    }

    async fn head(&self, situation: Situation) -> Outcome {
        let asked = self.ask(&situation).await;
        self.head_said(situation, asked)
    }

    fn head_said(&self, situation: Situation, asked: Asked) -> Outcome {
        match (asked.heard, &asked.answer) {
            (Heard::Named { .. } | Heard::Unnamed, Some(answer)) => {
                let stated = || {
                    self.pull
                        .sizes
                        .of(&self.request.site, self.repository, self.digest)
                };
                let size = answer.length.or_else(stated);
                self.outcome(Content::Head, size, Reason::Fetched(Why::NotHeld))
            }
            (heard, _) => refuse_unheld(situation, heard, asked.answer),
        }
    }

    async fn join(&self, situation: Situation) -> Result<Outcome, Arc<Failure>> {
        let of = Wanted::of(self.request, self.repository, &self.context.caller);
        match self.pull.downloads.join(self.digest, of.requester()) {
            Joined::Leader(leader) => {
                let reader = leader.start(Upstreamed::new(self.pull, of, self.digest));
                self.read(reader, Reason::Fetched(Why::NotHeld), situation, true)
                    .await
            }
            Joined::Follower {
                reader,
                began_by_same: Some(began),
            } if self.still_holds(&of, began) => self.read(reader, Reason::Joined, situation, true).await,
            Joined::Follower { reader, .. } => {
                if let Some(refusal) = self.own_right(situation).await {
                    return Ok(refusal);
                }
                self.read(reader, Reason::Joined, situation, false).await
            }
            Joined::Held(held) => {
                if let Some(refusal) = self.own_right(situation).await {
                    return Ok(refusal);
                }
                let size = held.size;
                Ok(self.outcome(Content::File(held), Some(size), Reason::Joined))
            }
        }
    }

    /// Whether a transfer that this principal began here is still its own to read: the `GET` of the transfer is the
    /// question about its right, unless the upstream has refused it since or a grant would have lapsed by now.
    fn still_holds(&self, of: &Wanted, began: Instant) -> bool {
        began.elapsed() < self.rule.grant && !self.pull.refused_since(of, began)
    }

    /// Nobody follows on another's right: `None` if this principal has its own, else the refusal.
    async fn own_right(&self, situation: Situation) -> Option<Outcome> {
        if situation.standing == Standing::Vouched {
            return None;
        }
        let asked = self.ask(&situation).await;
        match asked.heard {
            Heard::Named { .. } | Heard::Unnamed => None,
            heard => Some(refuse_unheld(situation, heard, asked.answer)),
        }
    }

    async fn read(
        &self,
        mut reader: Reader,
        reason: Reason,
        situation: Situation,
        leads: bool,
    ) -> Result<Outcome, Arc<Failure>> {
        let failure = match opened_with_size(&mut reader).await {
            Ok(size) => {
                let of = Wanted::of(self.request, self.repository, &self.context.caller);
                let reader = reader.with_ahead(Upstreamed::new(self.pull, of, self.digest));
                return Ok(self.outcome(Content::Download(reader), size, reason));
            }
            Err(failure) => failure,
        };
        match failure.as_ref() {
            Failure::Refused(answer) if leads => {
                let heard = self.pull.heard(&self.request.site, self.repository, answer);
                let answer = Arc::new(answer.as_ref().clone());
                Ok(refuse_unheld(situation, heard, Some(answer)))
            }
            Failure::Refused(_) | Failure::Abandoned => Err(failure),
            Failure::Unstorable(fault) => {
                tracing::warn!(digest = %self.digest, %fault, "passing a blob through without storing it");
                Ok(self.pass_through(situation).await)
            }
            Failure::Broken(cause) => Ok(refused(Refusal::Silent(*cause), None, false)),
            Failure::Wrong(_) => Ok(refused(Refusal::Silent(Cause::WrongDigest), None, false)),
            Failure::Store(_) | Failure::Stranded(_) => Ok(self.pass_through(situation).await),
        }
    }

    /// The cache never fails a pull because it cannot store it.
    async fn pass_through(&self, situation: Situation) -> Outcome {
        let Request {
            site,
            operation,
            accept,
            ..
        } = self.request;
        match site
            .upstream()
            .get(&self.context.caller, operation, accept, None)
            .await
        {
            Ok(fetched) => {
                let size = fetched.length;
                let content = Content::Passing(Box::new(passing::Passing::new(self.digest, fetched)));
                self.outcome(content, size, Reason::Passed)
            }
            Err(answer) => {
                let heard = self.pull.heard(site, self.repository, &answer);
                refuse_unheld(situation, heard, Some(Arc::new(answer)))
            }
        }
    }
}

/// Waits until the blob's answer can begin: its size, where it is known by then.
async fn opened_with_size(reader: &mut Reader) -> Result<Option<u64>, Arc<Failure>> {
    match reader.opened().await?.size {
        // Nothing of a small blob can be sent before it is verified, so its answer can still be an honest error.
        Some(size) if size <= WITHHELD_BYTES => reader.settled().await.map(Some),
        // As long as there is not a byte, an upstream that breaks off is still an honest error, and no 200 that cannot be kept.
        Some(size) => match tokio::time::timeout(BEGINS_WITHIN, reader.begun()).await {
            Ok(begun) => begun.map(|()| Some(size)),
            Err(_) => Ok(Some(size)),
        },
        // Many clients want a length, and neither the upstream nor a manifest has said it: if the transfer ends soon, it is known.
        None => match tokio::time::timeout(UNSIZED_WITHIN, reader.settled()).await {
            Ok(settled) => settled.map(Some),
            Err(_) => Ok(None),
        },
    }
}

fn refuse_unheld(situation: Situation, heard: Heard, answer: Option<Arc<Answer>>) -> Outcome {
    let situation = Situation {
        held: None,
        ..situation
    }
    .having_heard(heard);
    match decide(&situation) {
        Verdict::Refuse(refusal) => refused(refusal, answer, is_own(heard)),
        // A yes where a no was expected: the upstream contradicts itself.
        _ => refused(Refusal::Silent(Cause::Malformed), answer, false),
    }
}

fn is_own(heard: Heard) -> bool {
    heard == Heard::Refused(Whose::Proxy)
}
