//! Inventory of the bucket: number, bytes and ages of its objects by kind.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::kind::ObjectKind;
use super::objects::Objects;
use crate::bucket::{BucketError, Listed, ObjectStorage};

/// The folder of every object of a cache.
pub(super) const ROOT: &str = "v1";

/// Objects of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KindCount {
    /// Number.
    pub objects: u64,
    /// Sum of their sizes.
    pub bytes: u64,
    /// The oldest and the newest, as far as the storage states ages.
    pub ages: Option<(Duration, Duration)>,
    /// Number of those whose age the storage does not state.
    pub undated: u64,
}

impl KindCount {
    fn add(&mut self, listed: &Listed) {
        self.objects += 1;
        self.bytes = self.bytes.saturating_add(listed.size);
        let Some(age) = listed.age else {
            self.undated += 1;
            return;
        };
        self.ages = Some(match self.ages {
            Some((oldest, newest)) => (oldest.max(age), newest.min(age)),
            None => (age, age),
        });
    }
}

/// Counts of objects by kind. A few lines, whatever the number of objects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    kinds: BTreeMap<ObjectKind, KindCount>,
}

impl Inventory {
    /// Adds an object.
    pub(super) fn add(&mut self, kind: ObjectKind, listed: &Listed) {
        self.kinds.entry(kind).or_default().add(listed);
    }

    /// The kinds that have objects.
    pub fn kinds(&self) -> impl Iterator<Item = (ObjectKind, KindCount)> {
        self.kinds.iter().map(|(kind, count)| (*kind, *count))
    }

    /// Number of all objects.
    pub fn objects(&self) -> u64 {
        self.kinds.values().map(|count| count.objects).sum()
    }

    /// Number of the objects whose age the storage does not state.
    pub fn undated(&self) -> u64 {
        self.kinds.values().map(|count| count.undated).sum()
    }

    /// Bytes of all objects.
    pub fn bytes(&self) -> u64 {
        self.kinds
            .values()
            .fold(0, |all, count| all.saturating_add(count.bytes))
    }
}

/// Counts all objects. `progress` is called after each.
pub async fn take_inventory(
    bucket: &Arc<dyn ObjectStorage>,
    mut progress: impl FnMut(&Inventory),
) -> Result<Inventory, BucketError> {
    let (mut inventory, mut objects) = (Inventory::default(), Objects::new(bucket, ROOT));
    while let Some(listed) = objects.next().await {
        let listed = listed?;
        inventory.add(ObjectKind::of(&listed.key), &listed);
        progress(&inventory);
    }
    Ok(inventory)
}
