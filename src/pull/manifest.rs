//! Manifests: by tag, where the decision lives, and by digest, where nothing can change.

use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use tokio::task::spawn_blocking;

use super::asking::{Asked, Key};
use super::{Context, How, Outcome, Pull, Reason, Refused, Request, Site, passing};
use crate::oci::manifest::MANIFEST_BYTES_MAX;
use crate::oci::{
    Accept, Algorithm, AnyDigest, Cause, Digest, Manifest, MediaType, Operation, Reference, Repository, Tag,
};
use crate::policy::rules::Rule;
use crate::policy::{
    Heard, Held, Refusal, Served, Situation, Standing, Subject, Verdict, Whose, Why, decide,
};
use crate::store::manifests::HeldManifest;
use crate::store::refs::{TagKey, Variant};
use crate::upstream::{Answer, Caller, Fetched, Said};

impl Pull {
    pub(super) async fn manifest(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        reference: Reference,
    ) -> Outcome {
        let context = self.context(&request.site, repository, request.authorization.as_ref());
        match reference {
            Reference::Tag(tag) => self.by_tag(request, repository, &context, &tag).await,
            Reference::Digest(AnyDigest::Known(digest)) => {
                self.by_digest(request, repository, &context, digest).await
            }
            Reference::Digest(AnyDigest::Foreign(_)) => {
                passing::unverifiable(request, &context.caller, MANIFEST_BYTES_MAX as u64).await
            }
        }
    }

    async fn by_tag(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        context: &Context,
        tag: &Tag,
    ) -> Outcome {
        let rule = self.rule(&request.site, repository, Some(tag));
        let copy = self.held_variant(&request.site, repository, tag, &request.accept);
        let situation = context.situation(
            rule,
            Subject::Tag,
            copy.as_ref().map(|(variant, _)| held(variant)),
            true,
            request.now,
        );
        let road = Road {
            pull: self,
            request,
            repository,
            context,
            rule,
        };
        match copy {
            Some((variant, manifest)) => {
                road.carry_out(situation, Some((manifest, variant.confirmed_at)))
                    .await
            }
            None => road.carry_out(situation, None).await,
        }
    }

    async fn by_digest(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        context: &Context,
        digest: Digest,
    ) -> Outcome {
        let rule = self.rule(&request.site, repository, None);
        let manifest = self.store.manifest(&digest).ok().flatten();
        let seen = self.store.has_seen(request.site.name(), repository, &digest);
        let copy = manifest.map(|manifest| (manifest, request.now));
        let held = copy.as_ref().map(|_| Held {
            digest,
            confirmed_at: request.now,
        });
        let situation = context.situation(rule, Subject::Manifest, held, seen, request.now);
        let road = Road {
            pull: self,
            request,
            repository,
            context,
            rule,
        };
        road.carry_out(situation, copy).await
    }

    /// The copy of a tag that this client could be given: of the variants it accepts, the one confirmed for exactly
    /// its media types, else the newest; and only one whose manifest is in the store.
    pub(super) fn held_variant(
        &self,
        site: &Site,
        repository: &Repository,
        tag: &Tag,
        accept: &Accept,
    ) -> Option<(Variant, Arc<HeldManifest>)> {
        let key = TagKey {
            upstream: site.name().into(),
            repository: repository.clone(),
            tag: tag.clone(),
        };
        let record = self.store.tag(&key).ok().flatten()?;
        let exact = record
            .variants
            .iter()
            .filter(|variant| variant.accept == accept.key());
        let others = record
            .variants
            .iter()
            .filter(|variant| variant.accept != accept.key() && accept.admits(&variant.media_type));
        exact.chain(others).find_map(|variant| {
            let manifest = self.store.manifest(&variant.digest).ok().flatten()?;
            Some((variant.clone(), manifest))
        })
    }

    pub(super) fn digest_situation(
        &self,
        site: &Site,
        context: &Context,
        rule: &Rule,
        repository: &Repository,
        digest: &AnyDigest,
        now: SystemTime,
    ) -> Situation {
        let held = match digest {
            AnyDigest::Known(digest) => {
                let manifest = self.store.manifest(digest).ok().flatten();
                manifest.map(|manifest| Held {
                    digest: manifest.digest,
                    confirmed_at: now,
                })
            }
            AnyDigest::Foreign(_) => None,
        };
        let seen = self.seen(site, repository, digest);
        context.situation(rule, Subject::Manifest, held, seen, now)
    }

    /// Fetches a manifest, keeps it and what it shows; one fetch for all who may share it.
    async fn fetch_manifest(
        self: &Arc<Self>,
        request: &Request,
        repository: &Repository,
        caller: &Caller,
    ) -> Result<Arc<HeldManifest>, Arc<Answer>> {
        let key = Key::new(&request.site, &request.operation, &request.accept, caller);
        let flight = self.manifests.share(key, || {
            let (pull, site, repository) = (Arc::clone(self), Arc::clone(&request.site), repository.clone());
            let (operation, accept, caller) =
                (request.operation.clone(), request.accept.clone(), caller.clone());
            async move {
                match site.upstream().get(&caller, &operation, &accept, None).await {
                    Ok(fetched) => {
                        let anonymous = matches!(caller.credential, crate::upstream::Credential::Anonymous);
                        pull.learn_yes(&site, &repository, &caller, anonymous).await;
                        let received = receive(fetched, &operation).await;
                        pull.keep(&site, &repository, &operation, &accept, received).await
                    }
                    Err(answer) => {
                        pull.learn(&site, &repository, &caller, &answer).await;
                        Err(Arc::new(answer))
                    }
                }
            }
        });
        flight
            .landed()
            .await
            .unwrap_or_else(|| Err(Arc::new(Answer::silent(Cause::Busy))))
    }

    /// Keeps a verified manifest: its bytes, that it was seen here, and the tag that named it. What the disk cannot
    /// take is served all the same.
    async fn keep(
        self: &Arc<Self>,
        site: &Arc<Site>,
        repository: &Repository,
        operation: &Operation,
        accept: &Accept,
        received: Result<HeldManifest, Cause>,
    ) -> Result<Arc<HeldManifest>, Arc<Answer>> {
        let manifest = received.map_err(|cause| {
            if cause == Cause::WrongDigest {
                tracing::error!(upstream = site.name(), %repository, path = %operation.path_and_query(),
                    "the upstream sent a manifest whose digest is not the one it named; nothing was stored");
            }
            Arc::new(Answer::silent(cause))
        })?;
        let manifest = Arc::new(manifest);
        self.sizes.learn(site, repository, &manifest.manifest);
        let kept = {
            let (store, site, repository) = (Arc::clone(&self.store), Arc::clone(site), repository.clone());
            let manifest = Arc::clone(&manifest);
            spawn_blocking(move || {
                let HeldManifest {
                    digest,
                    bytes,
                    media_type,
                    ..
                } = manifest.as_ref();
                store.keep_manifest(
                    bytes.clone(),
                    media_type.clone(),
                    *digest,
                    site.name(),
                    &repository,
                )
            })
            .await
        };
        let served = match &kept {
            Ok(Ok(kept)) => Arc::clone(kept),
            _ => manifest,
        };
        super::asking::report(kept, "keep a manifest");
        if let Operation::Manifest { reference, .. } = operation {
            let media_type = Some(&served.media_type);
            self.learn_name(site, repository, reference, accept, served.digest, media_type)
                .await;
        }
        Ok(served)
    }
}

/// The facts that carrying out a verdict needs.
struct Road<'a> {
    pull: &'a Arc<Pull>,
    request: &'a Request,
    repository: &'a Repository,
    context: &'a Context,
    rule: &'a Rule,
}

type Copy = (Arc<HeldManifest>, SystemTime);

impl Road<'_> {
    /// Decide, ask if need be, decide again, fetch if need be, and decide once more if the fetch failed.
    async fn carry_out(&self, situation: Situation, copy: Option<Copy>) -> Outcome {
        let deadline = tokio::time::Instant::now() + self.rule.budget;
        match decide(&situation) {
            Verdict::Ask => self.after_asking(situation, copy, deadline).await,
            // A head alone is asked for by those who only compare; a GET would count as a pull at Docker Hub.
            Verdict::Fetch(_) if self.request.head => self.head_of_unheld(situation, deadline).await,
            Verdict::Fetch(why) => self.fetch(why, situation, copy, deadline).await,
            Verdict::Serve(served) => self.serve(served, copy, None),
            Verdict::Refuse(refusal) => refused(refusal, None, false),
        }
    }

    async fn after_asking(
        &self,
        situation: Situation,
        copy: Option<Copy>,
        deadline: tokio::time::Instant,
    ) -> Outcome {
        let asked = self.ask(&situation).await;
        let situation = situation.having_heard(asked.heard);
        match decide(&situation) {
            Verdict::Serve(Served::Moved) => self.serve_moved(situation, copy, asked),
            Verdict::Serve(served) => self.serve(served, copy, Some(asked.heard)),
            Verdict::Fetch(why) => match self.brought(asked.answer.as_deref()).await {
                Some(manifest) => self.fetched(manifest, why),
                None => self.fetch(why, situation, copy, deadline).await,
            },
            Verdict::Refuse(refusal) => {
                if refusal == Refusal::Absent {
                    self.forget(&situation).await;
                }
                refused(refusal, asked.answer, own_credential(asked.heard))
            }
            // A law of the decision: nothing is asked twice.
            Verdict::Ask => refused(Refusal::Silent(Cause::Malformed), asked.answer, false),
        }
    }

    /// A tag deleted upstream must not come back with the next outage. Only a principal that may read the repository
    /// is believed: some registries say 404 to all others.
    async fn forget(&self, situation: &Situation) {
        let Operation::Manifest {
            repository,
            reference: Reference::Tag(tag),
        } = &self.request.operation
        else {
            return;
        };
        if situation.standing == Standing::Unknown || situation.held.is_none() {
            return;
        }
        let upstream = self.request.site.name().into();
        let key = TagKey {
            upstream,
            repository: repository.clone(),
            tag: tag.clone(),
        };
        let store = Arc::clone(&self.pull.store);
        let forgotten = spawn_blocking(move || store.remove_tag(&key)).await;
        super::asking::report(forgotten, "forget a tag that was deleted upstream");
    }

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

    /// The digest that the tag names now is held: look it up once more, for it may just have been evicted.
    fn serve_moved(&self, situation: Situation, copy: Option<Copy>, asked: Asked) -> Outcome {
        let named = match asked.heard {
            Heard::Named { digest, .. } => self.pull.store.manifest(&digest).ok().flatten(),
            _ => None,
        };
        match named {
            Some(manifest) => self.serve(Served::Moved, Some((manifest, situation.now)), Some(asked.heard)),
            None => self.instead(situation, copy, Cause::Busy, asked.answer),
        }
    }

    /// The head of something not held, as the upstream gives it; fetched whole where the head does not say enough.
    async fn head_of_unheld(&self, situation: Situation, deadline: tokio::time::Instant) -> Outcome {
        let asked = self.ask(&situation).await;
        if let Some(answer) = &asked.answer
            && let (Said::Is(digest), Some(media_type), Some(size)) =
                (answer.said, &answer.media_type, answer.length)
        {
            return Outcome::ManifestHead {
                digest,
                media_type: media_type.clone(),
                size,
            };
        }
        let situation = situation.having_heard(asked.heard);
        match decide(&situation) {
            Verdict::Refuse(refusal) => refused(refusal, asked.answer, own_credential(asked.heard)),
            _ => self.fetch(Why::Unnamed, situation, None, deadline).await,
        }
    }

    async fn fetch(
        &self,
        why: Why,
        situation: Situation,
        copy: Option<Copy>,
        deadline: tokio::time::Instant,
    ) -> Outcome {
        let fetching = self
            .pull
            .fetch_manifest(self.request, self.repository, &self.context.caller);
        let can_do_without = matches!(
            decide(&situation.having_heard(Heard::Undelivered(Cause::Budget))),
            Verdict::Serve(_)
        );
        let fetched = if can_do_without {
            match tokio::time::timeout_at(deadline, fetching).await {
                Ok(fetched) => fetched,
                // The fetch goes on; the next asker finds its result.
                Err(_) => return self.instead(situation, copy, Cause::Budget, None),
            }
        } else {
            fetching.await
        };
        match fetched {
            Ok(manifest) => self.fetched(manifest, why),
            Err(answer) => self.after_failed_fetch(situation, copy, answer),
        }
    }

    /// The manifest that came with the answer, where a GET had to stand in for the HEAD: it is not fetched twice.
    async fn brought(&self, answer: Option<&Answer>) -> Option<Arc<HeldManifest>> {
        let answer = answer?;
        let (bytes, media_type) = answer.body.clone()?;
        let named = match answer.said {
            Said::Is(digest) => Some(digest),
            _ => None,
        };
        let Request {
            site,
            operation,
            accept,
            ..
        } = self.request;
        let received = verify(bytes, named, Some(media_type), operation);
        self.pull
            .keep(site, self.repository, operation, accept, received)
            .await
            .ok()
    }

    fn fetched(&self, manifest: Arc<HeldManifest>, why: Why) -> Outcome {
        let by_tag = matches!(
            &self.request.operation,
            Operation::Manifest {
                reference: Reference::Tag(_),
                ..
            }
        );
        let confirmed_at = by_tag.then_some(self.request.now);
        Outcome::Manifest(
            manifest,
            How {
                reason: Reason::Fetched(why),
                confirmed_at,
            },
        )
    }

    /// A refusal of the fetch is a refusal; anything else leaves what is held.
    fn after_failed_fetch(&self, situation: Situation, copy: Option<Copy>, answer: Arc<Answer>) -> Outcome {
        let heard = match self.pull.heard(&self.request.site, self.repository, &answer) {
            // Named by the HEAD, absent a moment later: the new one cannot be had.
            Heard::Absent if copy.is_some() => Heard::Undelivered(Cause::Status(404)),
            Heard::Silent(cause) if copy.is_some() => Heard::Undelivered(cause),
            Heard::Named { .. } | Heard::Unnamed | Heard::Nothing => Heard::Undelivered(Cause::Malformed),
            heard => heard,
        };
        match decide(&situation.having_heard(heard)) {
            Verdict::Serve(served) => self.serve(served, copy, Some(heard)),
            Verdict::Refuse(refusal) => refused(refusal, Some(answer), own_credential(heard)),
            // Laws of the decision: no second question, no second fetch.
            Verdict::Ask | Verdict::Fetch(_) => {
                refused(Refusal::Silent(Cause::Malformed), Some(answer), false)
            }
        }
    }

    /// What is held, in place of something newer that could not be had.
    fn instead(
        &self,
        situation: Situation,
        copy: Option<Copy>,
        cause: Cause,
        answer: Option<Arc<Answer>>,
    ) -> Outcome {
        // The upstream has just said yes to this principal, so its standing is as good as can be.
        let heard = Heard::Undelivered(cause);
        match decide(&Situation {
            standing: Standing::Vouched,
            heard,
            ..situation
        }) {
            Verdict::Serve(served) => self.serve(served, copy, Some(heard)),
            _ => refused(Refusal::Silent(cause), answer, false),
        }
    }

    fn serve(&self, served: Served, copy: Option<Copy>, heard: Option<Heard>) -> Outcome {
        let Some((manifest, confirmed_at)) = copy else {
            // A law of the decision: nothing is served that is not held.
            return refused(Refusal::NotHeld, None, false);
        };
        let confirmed_now = matches!(heard, Some(Heard::Named { .. })) && !served.may_be_outdated();
        let confirmed_at = if confirmed_now {
            self.request.now
        } else {
            confirmed_at
        };
        Outcome::Manifest(
            manifest,
            How {
                reason: Reason::Held(served),
                confirmed_at: Some(confirmed_at),
            },
        )
    }
}

pub(super) fn held(variant: &Variant) -> Held {
    Held {
        digest: variant.digest,
        confirmed_at: variant.confirmed_at,
    }
}

fn own_credential(heard: Heard) -> bool {
    heard == Heard::Refused(Whose::Proxy)
}

pub(super) fn refused(refusal: Refusal, answer: Option<Arc<Answer>>, own_credential: bool) -> Outcome {
    Outcome::Refused(Refused {
        refusal,
        answer,
        own_credential,
    })
}

/// Reads a manifest and holds it against everything that was said of it.
///
/// The bytes are believed, never a header: by digest they must hash to it; by tag they must hash to what the same
/// answer's `Docker-Content-Digest` says, where it says anything. And they must be a manifest: an HTML page with
/// status 200 is not one.
async fn receive(fetched: Fetched, operation: &Operation) -> Result<HeldManifest, Cause> {
    let (header, media_type) = (fetched.digest, fetched.media_type.clone());
    let bytes = fetched.collect(MANIFEST_BYTES_MAX).await?;
    verify(bytes, header, media_type, operation)
}

fn verify(
    bytes: Bytes,
    header: Option<Digest>,
    media_type: Option<MediaType>,
    operation: &Operation,
) -> Result<HeldManifest, Cause> {
    let asked = match operation {
        Operation::Manifest {
            reference: Reference::Digest(AnyDigest::Known(digest)),
            ..
        } => Some(*digest),
        _ => None,
    };
    let expected = asked.or(header);
    let algorithm = expected.map_or(Algorithm::Sha256, |digest| digest.algorithm());
    let digest = Digest::of(algorithm, &bytes);
    if expected.is_some_and(|expected| expected != digest) {
        return Err(Cause::WrongDigest);
    }
    let manifest = Manifest::read(&bytes).map_err(|_| Cause::Malformed)?;
    let media_type = manifest_type(media_type, &manifest).ok_or(Cause::Malformed)?;
    Ok(HeldManifest {
        digest,
        bytes,
        media_type,
        manifest,
    })
}

/// The media type of the answer, exactly as sent; where a registry sends none, or one that no manifest has, the type
/// that the manifest states of itself.
fn manifest_type(sent: Option<MediaType>, manifest: &Manifest) -> Option<MediaType> {
    match sent {
        Some(sent) if sent.is_manifest() || manifest.media_type.as_ref() == Some(&sent) => Some(sent),
        _ => manifest.media_type.clone().filter(MediaType::is_manifest),
    }
}
