//! `Cache-Status` (RFC 9211), `Age` and `Warning` headers.

use std::borrow::Cow;
use std::cell::RefCell;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::header::{AGE, DATE, WARNING};
use http::{HeaderMap, HeaderValue};

use super::{ResponseContext, set_header};
use crate::oci::header::{CACHE_STATUS, COOLING_UNTIL};
use crate::policy::{HitReason, MissReason};
use crate::proxy::{ServeInfo, ServeReason};
use crate::store::tags::NEVER_CONFIRMED;

/// Sets `Cache-Status`: the members of the caches before this one, then `own` (RFC 9211 §2). `Age` and `Warning` of
/// those caches are kept, because this cache does not see the registry behind them.
pub(super) fn set_cache_status(headers: &mut HeaderMap, own: Cow<'static, str>, context: &ResponseContext) {
    let Some(before) = context.upstream_caches.get() else {
        match own {
            Cow::Borrowed(own) => {
                headers.insert(CACHE_STATUS, HeaderValue::from_static(own));
            }
            Cow::Owned(own) => set_header(headers, CACHE_STATUS, &own),
        }
        return;
    };
    let status = match &before.status {
        Some(status) => [status.as_bytes(), b", ", own.as_bytes()].concat(),
        None => own.as_bytes().to_vec(),
    };
    if let Ok(status) = HeaderValue::from_bytes(&status) {
        headers.insert(CACHE_STATUS, status);
    }
    if let Some(age) = before.age_s {
        set_age(headers, age, context.now);
    }
    if let Some(warning) = &before.warning {
        headers.insert(WARNING, warning.clone());
    }
}

/// Sets `Age`, and the `Date` on which the response was generated (RFC 9110 §6.6.1): a cache behind this one takes their
/// sum for the present time of the registry.
fn set_age(headers: &mut HeaderMap, age_s: u64, now: SystemTime) {
    headers.insert(AGE, age(age_s));
    let date = now.checked_sub(Duration::from_secs(age_s));
    let date = date.and_then(|date| date.duration_since(UNIX_EPOCH).ok());
    if let Some(date) = date.and_then(|date| http_date(date.as_secs())) {
        // A response has one date, also if the age is set twice.
        headers.insert(DATE, date);
    }
}

thread_local! {
    /// The last second that this thread formatted, and its text.
    static LAST_DATE: RefCell<Option<(u64, HeaderValue)>> = const { RefCell::new(None) };
    /// The last age that this thread formatted, and its text.
    static LAST_AGE: RefCell<Option<(u64, HeaderValue)>> = const { RefCell::new(None) };
}

/// An `Age`. That of an image changes once a second.
fn age(age_s: u64) -> HeaderValue {
    LAST_AGE.with_borrow_mut(|last| match last {
        Some((formatted, text)) if *formatted == age_s => text.clone(),
        _ => last.insert((age_s, age_s.into())).1.clone(),
    })
}

/// A date (RFC 9110 §5.6.7), in seconds since 1970. Responses of one second mostly have the same one.
fn http_date(second: u64) -> Option<HeaderValue> {
    LAST_DATE.with_borrow_mut(|last| {
        if let Some((formatted, text)) = last
            && *formatted == second
        {
            return Some(text.clone());
        }
        let date = UNIX_EPOCH + Duration::from_secs(second);
        let text = HeaderValue::try_from(httpdate::fmt_http_date(date)).ok()?;
        *last = Some((second, text.clone()));
        Some(text)
    })
}

/// `Age` of the upstream's response, if a cache sent it.
fn upstream_age_s(context: &ResponseContext) -> u64 {
    let before = context.upstream_caches.get();
    before.and_then(|before| before.age_s).unwrap_or(0)
}

/// The member of this cache in `Cache-Status`. Constant for the most frequent reasons.
fn own_status(reason: ServeReason) -> Cow<'static, str> {
    match reason {
        ServeReason::Cached(HitReason::Immutable) => "ifnewer; hit; detail=immutable".into(),
        ServeReason::Cached(HitReason::Fresh) => "ifnewer; hit; detail=fresh".into(),
        ServeReason::Cached(HitReason::Revalidated) => "ifnewer; hit; detail=revalidated".into(),
        ServeReason::Cached(served) => match served.cause() {
            Some(cause) => format!("ifnewer; hit; detail={}-{}", served.name(), cause.name()).into(),
            None => format!("ifnewer; hit; detail={}", served.name()).into(),
        },
        ServeReason::Fetched(MissReason::NewDigest) => "ifnewer; fwd=stale; detail=new-digest".into(),
        ServeReason::Fetched(why) => format!("ifnewer; fwd=miss; detail={}", why.name()).into(),
        ServeReason::Shared => "ifnewer; hit; detail=shared".into(),
        ServeReason::Redirected => "ifnewer; hit; detail=redirected".into(),
        ServeReason::Collapsed => "ifnewer; fwd=miss; collapsed; detail=collapsed".into(),
        ServeReason::Passthrough => "ifnewer; fwd=bypass; detail=passthrough".into(),
    }
}

/// Sets `Cache-Status` and `Age`, and `Warning` if the content may be stale.
pub(super) fn set_cache_headers(headers: &mut HeaderMap, info: ServeInfo, context: &ResponseContext) {
    set_cache_status(headers, own_status(info.reason), context);
    if let Some(until) = info.reason.youth().and_then(|youth| youth.served_from) {
        set_header(headers, COOLING_UNTIL, &httpdate::fmt_http_date(until));
    }
    let Some(confirmed_at) = info.confirmed_at else {
        return;
    };
    let age = (confirmed_at != NEVER_CONFIRMED)
        .then(|| context.now.duration_since(confirmed_at).unwrap_or_default());
    if let ServeReason::Cached(served) = info.reason {
        if let Some(age) = age {
            let age_s = age.as_secs().saturating_add(upstream_age_s(context));
            set_age(headers, age_s, context.now);
        }
        if served.may_be_outdated() {
            let own = HeaderValue::from_str(&warning(served, context.upstream(), age));
            if let Ok(own) = own {
                headers.append(WARNING, own);
            }
        }
    }
}

/// Warning 299 (RFC 7234 §5.5.7), which podman and containerd show to the user.
fn warning(served: HitReason, upstream: &str, age: Option<Duration>) -> String {
    let confirmed = match age {
        Some(age) => {
            let age = humantime::format_duration(Duration::from_secs(age.as_secs()));
            format!("confirmed {age} ago")
        }
        None => "imported and never confirmed".to_owned(),
    };
    let why = match served {
        HitReason::StaleOnFetchError(cause) => {
            format!("{upstream} has a newer image that could not be fetched: it {cause}")
        }
        HitReason::PreviousComplete(cause) => {
            let cause = cause.map_or_else(|| "is not contacted".to_owned(), |cause| cause.to_string());
            format!(
                "the newest image is incomplete in the cache and {upstream} {cause}; this is the last complete one"
            )
        }
        HitReason::RetainedDeleted => format!("{upstream} no longer has this tag"),
        HitReason::CacheCredentialRejected => format!("{upstream} rejected the credential of the cache"),
        other => match other.cause() {
            Some(cause) => format!("{upstream} {cause}"),
            None => format!("{upstream} was not contacted"),
        },
    };
    let text: String = why.chars().filter(|c| !matches!(c, '"' | '\\')).collect();
    format!("299 ifnewer \"served from the cache, {confirmed}: {text}\"")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn date_and_age_add_up_to_the_present_time() {
        let now = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        for age_s in [0, 1, 86_400] {
            let mut headers = HeaderMap::new();
            // As for a response whose own age follows that of another cache.
            set_age(&mut headers, 7, now);
            set_age(&mut headers, age_s, now);
            assert_eq!(headers.get_all(DATE).iter().count(), 1);
            let date = headers.get(DATE).unwrap().to_str().unwrap();
            assert_eq!(headers.get(AGE).unwrap(), &age_s.to_string());
            let date = httpdate::parse_http_date(date).unwrap();
            assert_eq!(date + Duration::from_secs(age_s), now);
        }
    }

    #[test]
    fn constant_status_has_the_name_of_its_reason() {
        for served in [HitReason::Immutable, HitReason::Fresh, HitReason::Revalidated] {
            let status = own_status(ServeReason::Cached(served));
            assert_eq!(status, format!("ifnewer; hit; detail={}", served.name()));
        }
    }

    #[test]
    fn impossible_age_sets_no_date() {
        for age_s in [1_700_000_001, u64::MAX] {
            let mut headers = HeaderMap::new();
            set_age(
                &mut headers,
                age_s,
                UNIX_EPOCH + Duration::from_secs(1_700_000_000),
            );
            assert_eq!(headers.get(DATE), None);
        }
    }
}
