//! Policies: the section `[default]`, its overrides by upstreams and `[[rule]]`s, and contradictory combinations.

use std::sync::Arc;
use std::time::Duration;

use super::diagnostic::{Checked, Origin, Report, Reported, Subject};
use super::document::Document;
use super::schema::{PolicyKeys, Rule};
use super::upstreams::ParsedUpstream;
use super::validate;
use crate::policy::Policy;
use crate::policy::min_age::{AgeLimit, AgeOverrides};
use crate::policy::refresh::{RefreshOverrides, RefreshPolicy};
use crate::policy::rules::{EffectivePolicy, ImagePattern, PolicyOverrides, Rules};

impl PolicyKeys {
    /// The values that are set or have a default.
    pub(super) fn overrides(&self) -> Checked<PolicyOverrides> {
        Ok(PolicyOverrides {
            policy: self.policy.get()?,
            max_age: self.max_age.get()?.map(Into::into),
            stale_if_error: self.stale_if_error.get()?,
            revalidate_timeout: self.revalidate_timeout.get()?.map(Into::into),
            on_not_found: self.on_not_found.get()?,
            grant_ttl: self.grant_ttl.get()?.map(Into::into),
            grant_ttl_offline: self.grant_ttl_offline.get()?.map(Into::into),
            prefetch: self.prefetch.get()?,
            refresh: RefreshOverrides {
                interval: self.refresh.get()?,
                used_within: self.refresh_used_within.get()?.map(Into::into),
                quota_floor: self.refresh_quota_floor.get()?,
            },
            age_limit: AgeOverrides {
                min_age: self.min_age.get()?.map(Into::into),
                on_unknown_age: self.on_unknown_age.get()?,
                trust_created: self.trust_created.get()?,
                by_digest: self.min_age_by_digest.get()?,
            },
        })
    }
}

/// Effective policy of `[default]`, where each key has a default.
pub(super) fn default(document: &Document<'_>, report: &mut Report<'_>) -> Checked<EffectivePolicy> {
    let keys = PolicyKeys::of(document, report);
    let policy = effective(&keys.overrides()?).ok_or(Reported)?;
    check_grant_ttls(&keys, &policy, report);
    check(&keys, &policy, report);
    Ok(policy)
}

/// The policy in which each key has a value.
fn effective(all: &PolicyOverrides) -> Option<EffectivePolicy> {
    Some(EffectivePolicy {
        name: Arc::from("default"),
        policy: all.policy?,
        max_age: all.max_age?,
        stale_if_error: all.stale_if_error?.limit(),
        revalidate_timeout: all.revalidate_timeout?,
        on_not_found: all.on_not_found?,
        grant_ttl: all.grant_ttl?,
        grant_ttl_offline: all.grant_ttl_offline?,
        prefetch: all.prefetch?,
        refresh: RefreshPolicy::OFF.with_overrides(&all.refresh),
        age_limit: AgeLimit::default().with_overrides(&all.age_limit),
    })
}

/// Rules in their order, over the policies of the upstreams.
pub(super) fn rules(
    document: &Document<'_>,
    default: Checked<EffectivePolicy>,
    configured: &[ParsedUpstream],
    report: &mut Report<'_>,
) -> Checked<Rules> {
    let mut seen: Vec<(String, String)> = Vec::new();
    let mut rules = Vec::new();
    for table in &document.rules {
        let keys = PolicyKeys::read(table, report);
        let images = Rule::read(table, report).images;
        let Ok(globs) = images.get() else {
            continue;
        };
        if globs.0.is_empty() {
            let help = r#"add them, as in images = ["ghcr.io/acme/*"]"#;
            report.emit(&images.subject, "a rule without images never applies", help);
        }
        for (subject, pattern) in &globs.0 {
            check_reachable(subject, pattern, configured, &seen, report);
            seen.push((pattern.to_string(), table.name.clone()));
        }
        let globs = globs.values();
        if let Ok(changes) = keys.overrides() {
            check_by_digest(&keys, &globs, &changes, report);
            if let Ok(default) = &default {
                let base = policy_of(default, &globs, configured);
                check(&keys, &base.with_overrides(Arc::from(""), &changes), report);
            }
            rules.push((globs, changes));
        }
    }
    let default = default?;
    for upstream in configured {
        let policy = default.with_overrides(Arc::from(""), &upstream.changes);
        check(&upstream.policy, &policy, report);
        if upstream.changes.grant_ttl.is_some() || upstream.changes.grant_ttl_offline.is_some() {
            check_grant_ttls(&upstream.policy, &policy, report);
        }
    }
    let upstreams = configured
        .iter()
        .map(|upstream| (Arc::clone(&upstream.name), upstream.changes));
    let rules = Rules::new(default, upstreams, rules);
    rules.map_err(|error| report.emit(&Subject::new(Origin::Default, "rule"), error.to_string(), ""))
}

/// The policy that a rule for these images overrides: of their upstream, if all name one, else the default.
fn policy_of(
    default: &EffectivePolicy,
    images: &[ImagePattern],
    configured: &[ParsedUpstream],
) -> EffectivePolicy {
    let mut names = images.iter().map(ImagePattern::upstream);
    let first = names.next().flatten();
    let only = first.filter(|first| names.all(|name| name == Some(first)));
    let upstream = configured.iter().find(|upstream| only == Some(&*upstream.name));
    match upstream {
        Some(upstream) => default.with_overrides(Arc::from(""), &upstream.changes),
        None => default.clone(),
    }
}

/// Rejects a glob that can never be the first match.
fn check_reachable(
    subject: &Subject,
    pattern: &ImagePattern,
    configured: &[ParsedUpstream],
    seen: &[(String, String)],
    report: &mut Report<'_>,
) {
    if let Some(upstream) = pattern.upstream() {
        let _ = validate::find(upstream, subject, configured, report);
    }
    if let Some((_, rule)) = seen.iter().find(|(earlier, _)| *earlier == pattern.as_str()) {
        let message = format!("never reached: `{pattern}` is already in rule {rule}");
        report.emit(
            subject,
            message,
            "the first matching rule applies; remove one of them",
        );
    }
}

/// Rejects a minimum age by digest in a rule that applies to no pull by digest.
fn check_by_digest(
    keys: &PolicyKeys,
    images: &[ImagePattern],
    changes: &PolicyOverrides,
    report: &mut Report<'_>,
) {
    if changes.age_limit.by_digest == Some(true) && images.iter().all(ImagePattern::has_tag) {
        let message = "`min_age_by_digest` for globs with a tag, which apply to no pull by digest";
        let help = "remove the tag from a glob, or set it in another rule";
        report.emit(&keys.min_age_by_digest.subject, message, help);
    }
}

/// Rejects what a section turns on and what can never happen under `policy`, its effective policy: refreshes, and a minimum
/// age where no age can become known.
fn check(keys: &PolicyKeys, policy: &EffectivePolicy, report: &mut Report<'_>) {
    if keys.min_age.is_set && policy.age_limit.is_on() && policy.policy == Policy::Never {
        let message = "`min_age` with policy = \"never\", which forbids the requests that show an age";
        let help = "write min_age = \"0s\", or another policy";
        report.emit(&keys.min_age.subject, message, help);
    }
    let Some(interval) = policy.refresh.interval else {
        return;
    };
    if keys.refresh.is_set && policy.policy == Policy::Never {
        let message = "`refresh` with policy = \"never\", which forbids requests to the registry";
        report.emit(
            &keys.refresh.subject,
            message,
            "write refresh = \"off\", or another policy",
        );
    }
    if let Some(subject) = keys.refresh_used_within.set().or(keys.refresh.set())
        && policy.refresh.used_within < interval
    {
        let message = format!(
            "`refresh_used_within` ({}) is shorter than `refresh` ({}): a tag would be out of use before its refresh",
            words(policy.refresh.used_within),
            words(interval)
        );
        report.emit(
            subject,
            message,
            "increase `refresh_used_within`, or refresh more often",
        );
    }
}

/// A grant must last at least as long in an outage, otherwise `grant_ttl` would exceed its offline limit.
fn check_grant_ttls(keys: &PolicyKeys, policy: &EffectivePolicy, report: &mut Report<'_>) {
    if policy.grant_ttl <= policy.grant_ttl_offline {
        return;
    }
    let subject = keys.grant_ttl.set().unwrap_or(&keys.grant_ttl_offline.subject);
    let message = format!(
        "`grant_ttl` ({}) is longer than `grant_ttl_offline` ({})",
        words(policy.grant_ttl),
        words(policy.grant_ttl_offline)
    );
    let help = "a grant must last at least as long in an outage: increase `grant_ttl_offline`";
    report.emit(subject, message, help);
}

/// A duration as in the configuration.
pub(super) fn words(duration: Duration) -> humantime::FormattedDuration {
    humantime::format_duration(duration)
}
