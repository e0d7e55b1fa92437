//! Garbage collection of the bucket, by age and by total size.
//!
//! The rules are pure. Each object is checked again before its deletion, and kept if it was written since it was listed. An
//! object that is written between the two requests is deleted although it is young: storages have no conditional deletion that
//! all of them support. A cache then fetches it once more.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use super::clock::{ClockError, check_clock};
use super::delete::{BATCH, Deletes, Deletion, delete_batch};
use super::inventory::{Inventory, ROOT};
use super::kind::ObjectKind;
use super::objects::Objects;
use crate::bucket::{BucketError, Listed, ObjectStorage};

/// Age at which claims, parts and objects of probes are deleted: a cache that ended left them behind. A claim in use is
/// written every 3 s.
pub const LEFT_BEHIND_AFTER: Duration = Duration::from_secs(24 * 60 * 60);

/// Hours that are distinguished by the limit of the total size: seven years. Older objects count as of that age.
const HOURS_MAX: u64 = 65_536;

/// The rules of deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GcRules {
    /// Blobs, manifests and records of a greater age are deleted.
    pub older: Option<Duration>,
    /// The oldest blobs and manifests beyond this total of bytes are deleted.
    pub size_max: Option<u64>,
    /// Age at which the bucket deletes objects by its lifecycle rule. No younger record is deleted: caches write records
    /// in use again before that, and a denial or a deletion counts as long.
    pub keep: Duration,
}

impl GcRules {
    /// Whether an object is deleted for its age.
    fn is_expired(&self, kind: ObjectKind, age: Option<Duration>) -> bool {
        let Some(age) = age else { return false };
        match kind {
            ObjectKind::Blob | ObjectKind::Manifest => self.older.is_some_and(|older| age > older),
            ObjectKind::Record(_) => self.older.is_some_and(|older| age > older.max(self.keep)),
            ObjectKind::Claim | ObjectKind::Part | ObjectKind::Probe => age > LEFT_BEHIND_AFTER,
            ObjectKind::Foreign => false,
        }
    }
}

/// The bytes of blobs and manifests that are not expired, by the hour in which they were written.
#[derive(Debug, Default)]
struct Hours {
    blobs: BTreeMap<u64, u64>,
    /// Bytes of everything that is not expired.
    current: u64,
    /// Bytes of everything.
    total: u64,
}

impl Hours {
    /// Adds an object. Fails if a storage states more hours than there can be.
    fn add(&mut self, kind: ObjectKind, listed: &Listed, is_expired: bool) -> Result<(), BucketError> {
        self.total = self.total.saturating_add(listed.size);
        if is_expired {
            return Ok(());
        }
        self.current = self.current.saturating_add(listed.size);
        if let Some(hour) = hour_of(kind, listed) {
            let bytes = self.blobs.entry(hour).or_default();
            *bytes = bytes.saturating_add(listed.size);
        }
        let is_possible = self.blobs.len() as u64 <= 2 * HOURS_MAX;
        is_possible.then_some(()).ok_or(BucketError::Malformed)
    }

    fn excess(&self, size_max: u64) -> Excess {
        let bytes = self.current.saturating_sub(size_max);
        let (mut before, mut last_hour) = (0_u64, None);
        for (hour, of_hour) in &self.blobs {
            if before >= bytes {
                break;
            }
            last_hour = Some((*hour, bytes - before));
            before = before.saturating_add(*of_hour);
        }
        Excess {
            total: self.total,
            size_max,
            last_hour,
        }
    }
}

/// The oldest blobs and manifests beyond a total size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Excess {
    /// Bytes of all objects, without those that were deleted.
    total: u64,
    /// The total size that is allowed.
    size_max: u64,
    /// The last hour of which objects are deleted, and how many of its bytes.
    last_hour: Option<(u64, u64)>,
}

impl Excess {
    /// Whether this object is one of them.
    fn take(&mut self, kind: ObjectKind, listed: &Listed) -> bool {
        let (Some((last, of_last)), Some(hour)) = (&mut self.last_hour, hour_of(kind, listed)) else {
            return false;
        };
        let is_taken = hour < *last || hour == *last && *of_last > 0;
        if is_taken && hour == *last {
            *of_last = of_last.saturating_sub(listed.size);
        }
        is_taken
    }

    /// An object is gone, or was kept, so that others of the last hour are deleted instead.
    fn count(&mut self, listed: &Listed, deletion: Deletion) {
        match (deletion, &mut self.last_hour) {
            (Deletion::Deleted | Deletion::Absent, _) => self.total = self.total.saturating_sub(listed.size),
            (Deletion::Rewritten, Some((_, of_last))) => *of_last = of_last.saturating_add(listed.size),
            (Deletion::Rewritten, None) => {}
        }
    }
}

/// The hour in which a blob or a manifest was written. `None`: the object does not count, or the hour is not known.
fn hour_of(kind: ObjectKind, listed: &Listed) -> Option<u64> {
    if !matches!(kind, ObjectKind::Blob | ObjectKind::Manifest) {
        return None;
    }
    let now = listed.date?.duration_since(UNIX_EPOCH).ok()?.as_secs();
    let age = listed.age?.as_secs().min(HOURS_MAX * 3600);
    Some(now.saturating_sub(age) / 3600)
}

/// A garbage collection: its lists and deletions so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GarbageCollection {
    /// Objects that were listed in the last pass.
    pub listed: Inventory,
    /// Objects that were deleted, or would be.
    pub deleted: Inventory,
    /// Objects that were written after they were listed, and are kept.
    pub rewritten: u64,
    /// The limit of the total size, if there is one and the bucket was listed to its end.
    excess: Option<Excess>,
    /// The operator has interrupted it.
    pub is_interrupted: bool,
    /// The storage has a right time.
    is_clock_checked: bool,
}

impl GarbageCollection {
    /// Bytes beyond the total size that remain: neither blobs nor manifests, of unknown age, or written since they were listed.
    pub fn excess(&self) -> u64 {
        self.excess
            .map_or(0, |excess| excess.total.saturating_sub(excess.size_max))
    }

    /// Lists the bucket and deletes by the rules; with a limit of the total size, it lists the bucket before that too.
    /// `is_trial`: deletes nothing. `progress` is called after each object that was listed. `interrupt` ends it after the
    /// deletions that run. After a failure, this says what was deleted before.
    pub async fn run(
        &mut self,
        bucket: &Arc<dyn ObjectStorage>,
        rules: &GcRules,
        is_trial: bool,
        mut progress: impl FnMut(&Self),
        interrupt: impl Future<Output = ()>,
    ) -> Result<(), ClockError> {
        let mut interrupt = std::pin::pin!(interrupt);
        if let Some(size_max) = rules.size_max {
            let counting = self.count(bucket, rules, &mut progress);
            let hours = tokio::select! {
                hours = counting => Some(hours?),
                () = &mut interrupt => None,
            };
            let Some(hours) = hours else {
                self.is_interrupted = true;
                return Ok(());
            };
            self.excess = Some(hours.excess(size_max));
            self.listed = Inventory::default();
        }
        let mut objects = Objects::new(bucket, ROOT);
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let next = tokio::select! {
                biased;
                () = &mut interrupt => {
                    self.is_interrupted = true;
                    return Ok(());
                }
                next = objects.next() => next.transpose()?,
            };
            let is_end = next.is_none();
            if let Some(listed) = next {
                let kind = self.count_listed(&listed);
                let mut is_excess = || {
                    self.excess
                        .as_mut()
                        .is_some_and(|excess| excess.take(kind, &listed))
                };
                if rules.is_expired(kind, listed.age) || is_excess() {
                    batch.push(listed);
                }
                progress(self);
            }
            if batch.len() >= BATCH || is_end {
                if is_trial {
                    for listed in &batch {
                        self.count_deletion(listed, Deletion::Deleted);
                    }
                } else {
                    self.delete(bucket, &batch, interrupt.as_mut()).await?;
                }
                batch.clear();
            }
            if is_end || self.is_interrupted {
                return Ok(());
            }
        }
    }

    /// Deletes a batch. Before the first one, the time of the storage is checked.
    async fn delete(
        &mut self,
        bucket: &Arc<dyn ObjectStorage>,
        batch: &[Listed],
        mut interrupt: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<(), ClockError> {
        if batch.is_empty() {
            return Ok(());
        }
        if !self.is_clock_checked {
            tokio::select! {
                biased;
                () = interrupt.as_mut() => {
                    self.is_interrupted = true;
                    return Ok(());
                }
                checked = check_clock(bucket) => checked?,
            }
            self.is_clock_checked = true;
        }
        let count = |listed: &Listed, deletion| self.count_deletion(listed, deletion);
        let deleting = delete_batch((bucket, Deletes::Unchanged), batch, count, interrupt);
        self.is_interrupted = deleting.await?;
        Ok(())
    }

    /// The first pass.
    async fn count(
        &mut self,
        bucket: &Arc<dyn ObjectStorage>,
        rules: &GcRules,
        progress: &mut impl FnMut(&Self),
    ) -> Result<Hours, BucketError> {
        let (mut hours, mut objects) = (Hours::default(), Objects::new(bucket, ROOT));
        while let Some(listed) = objects.next().await {
            let listed = listed?;
            let kind = self.count_listed(&listed);
            hours.add(kind, &listed, rules.is_expired(kind, listed.age))?;
            progress(self);
        }
        Ok(hours)
    }

    fn count_listed(&mut self, listed: &Listed) -> ObjectKind {
        let kind = ObjectKind::of(&listed.key);
        self.listed.add(kind, listed);
        kind
    }

    fn count_deletion(&mut self, listed: &Listed, deletion: Deletion) {
        if let Some(excess) = &mut self.excess {
            excess.count(listed, deletion);
        }
        match deletion {
            Deletion::Deleted => self.deleted.add(ObjectKind::of(&listed.key), listed),
            Deletion::Rewritten => self.rewritten += 1,
            Deletion::Absent => {}
        }
    }
}
