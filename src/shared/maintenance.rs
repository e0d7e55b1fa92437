//! Maintenance of the bucket by an operator: inventory and garbage collection.
//!
//! Nothing here runs in a cache, and no cache has to be stopped for it. A cache that needs a deleted blob or manifest fetches it
//! again; in an outage of the upstream and under the policy `never`, it cannot. Caches that serve it from their disks do not write
//! it again. A redirect to it fails. Records are deleted only above the age `keep`, and a tag record is replaced. All ages
//! are those of the storage's own clock.
//!
//! * `kind`: kinds of objects, by their names. `objects`: listing with retries. `inventory`: counts by kind.
//! * `gc`: rules and their execution. `clock`: check of the storage's time. `delete`: deletion at a bounded rate.
//! * `image`: the objects and records of one image.

mod clock;
mod delete;
mod gc;
mod image;
mod inventory;
mod kind;
mod objects;
#[cfg(all(test, feature = "shared"))]
mod tests;

use std::time::Duration;

pub use self::clock::ClockError;
pub use self::delete::delete;
pub use self::gc::{GarbageCollection, GcRules, LEFT_BEHIND_AFTER};
pub use self::image::{
    BucketImages, ContentFound, ImageObject, ImageObjects, ObjectRole, ObjectState, TagFound, TagRecordError,
};
pub use self::inventory::{Inventory, KindCount, take_inventory};
pub use self::kind::ObjectKind;

use crate::bucket::{BucketError, Fault};

/// Attempts of a request after a failure of the storage or the network.
const RETRIES_MAX: u32 = 3;

/// Pause before the next attempt of a request that failed so often, if another attempt may succeed.
fn retry_pause(error: &BucketError, failures: u32) -> Option<Duration> {
    let is_worth_it = error.fault() == Fault::Service && failures <= RETRIES_MAX;
    is_worth_it.then(|| Duration::from_secs(1 << failures.min(RETRIES_MAX)) / 2)
}
