//! Planning pass: the slots of all tags in use within the next window.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::{ProxyService, TagCounts, Upstreams};
use crate::policy::refresh::{Phase, Plan, Run, Slot, TagFacts};
use crate::store::View;
use crate::store::tags::{TagKey, TagRecord};

/// Most refreshes a minute, of all upstreams together. If more tags are due, all are refreshed less often.
pub const RUNS_PER_MINUTE_MAX: u32 = 600;

/// Most tags that the planning reads a minute, on average. For a larger store, the planning window is longer.
pub const TAGS_PER_MINUTE_MAX: u32 = 20_000;

const WINDOW_MIN: Duration = Duration::from_secs(30);
const WINDOW_MAX: Duration = Duration::from_secs(300);
const MINUTE: Duration = Duration::from_secs(60);

/// Tags read at once.
const PAGE: usize = 256;

/// Planned refreshes.
pub(super) struct Planned {
    /// In the order of their slots.
    pub(super) runs: Vec<Run<TagKey>>,
    /// Number of tags in the store.
    pub(super) seen: u64,
}

/// What the planning found in one page of tags.
#[derive(Default)]
struct Page {
    due: Vec<(TagKey, Phase, Slot)>,
    census: TagCounts,
    last: Option<TagKey>,
    seen: usize,
}

/// Length of a planning window for this shortest interval and number of tags.
pub(super) fn window(shortest: Duration, tags: u64) -> Duration {
    let reading =
        MINUTE.saturating_mul(u32::try_from(tags / u64::from(TAGS_PER_MINUTE_MAX)).unwrap_or(u32::MAX));
    (shortest / 2).clamp(WINDOW_MIN, WINDOW_MAX).max(reading)
}

fn runs_max(window: Duration) -> usize {
    let runs = window.as_secs().saturating_mul(u64::from(RUNS_PER_MINUTE_MAX)) / 60;
    usize::try_from(runs).unwrap_or(usize::MAX)
}

impl ProxyService {
    /// Plans the refreshes of this period. `None` if the index is incomplete.
    pub(super) async fn plan_refreshes(
        self: &Arc<Self>,
        period: (SystemTime, SystemTime),
        length: Duration,
    ) -> Option<Planned> {
        let upstreams = self.scheduled.upstreams();
        let mut plan = Plan::new(runs_max(length));
        let (mut census, mut seen, mut after) = (TagCounts::default(), 0_u64, None);
        loop {
            let (proxy, upstreams) = (Arc::clone(self), Arc::clone(&upstreams));
            let page = self.store.on_disk(move |view| {
                let page = view.indexed_tags(after.as_ref(), PAGE)?;
                Some(proxy.plan_page(view, &upstreams, page, period))
            });
            let page = page.await?;
            census.in_use += page.census.in_use;
            census.unused += page.census.unused;
            census.private += page.census.private;
            seen += page.seen as u64;
            for (key, phase, slot) in page.due {
                plan.add(key, phase, slot);
            }
            if page.seen < PAGE {
                break;
            }
            after = page.last;
        }
        census.stride = plan.stride();
        let before = std::mem::replace(&mut *self.scheduled.census.lock(), census);
        if census.stride > 1 && before.stride <= 1 {
            tracing::warn!(
                tags = census.in_use,
                runs_per_minute_max = RUNS_PER_MINUTE_MAX,
                longer_by = census.stride,
                "too many tags to refresh, all are refreshed less often"
            );
        }
        Some(Planned {
            runs: plan.into_runs(),
            seen,
        })
    }

    /// The refreshes of one page of tags. Blocks.
    fn plan_page(
        &self,
        view: &View<'_>,
        upstreams: &Upstreams,
        tags: Vec<(TagKey, TagRecord)>,
        (from, until): (SystemTime, SystemTime),
    ) -> Page {
        let mut page = Page {
            last: tags.last().map(|(key, _)| key.clone()),
            seen: tags.len(),
            ..Page::default()
        };
        for (key, record) in tags {
            let Some(upstream) = upstreams.get(&key.upstream) else {
                continue;
            };
            let policy = upstream.rule(&key.repository, Some(&key.tag)).scheduled_refresh();
            let Some(interval) = policy.interval else { continue };
            let hash = self.tag_hash(&key);
            let facts = TagFacts {
                policy,
                phase: Phase::of_hash(hash),
                confirmed_at: record.confirmed_at(),
                used_at: view.last_use(&record),
                failures: self.scheduled.failing.get(&hash).map(|failing| failing.failures),
            };
            if !facts.is_in_use(from) {
                page.census.unused += 1;
                continue;
            }
            if !upstream.is_shared() && view.public_since(&key.upstream, &key.repository).is_none() {
                page.census.private += 1;
                continue;
            }
            page.census.in_use += 1;
            for slot in facts.phase.slots(interval, (from, until)) {
                if facts.is_due(slot.at, from) {
                    page.due.push((key.clone(), facts.phase, slot));
                }
            }
        }
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window_is_short_for_short_intervals_and_few_tags() {
        let hour = 60 * MINUTE;
        for (shortest, tags, expected) in [
            (MINUTE, 0, WINDOW_MIN),
            (4 * MINUTE, 0, 2 * MINUTE),
            (hour, 10_000, WINDOW_MAX),
            (hour, 1_000_000, 50 * MINUTE),
            (MINUTE, 1_000_000, 50 * MINUTE),
        ] {
            assert_eq!(window(shortest, tags), expected, "{shortest:?} {tags}");
        }
        assert_eq!(runs_max(WINDOW_MAX), 3000);
    }
}
