//! Records: what caches with one key tell each other through the bucket, beside the bytes.
//!
//! The bucket decides nothing. A record is evidence, as if this cache had asked the upstream itself at that time.
//!
//! * `key`: names and seals. `state`: the content of records, and how two of them are merged.
//! * `queue`: updates that wait. `exchange`: reads, and updates by compare-and-swap. `recent`: what was read lately.
//! * `tag_reads`: reads of tag records before the upstream is asked.
//! * `grant`: records of the rights of principals.

mod exchange;
mod grant;
mod key;
mod queue;
mod recent;
mod state;
mod tag_reads;
#[cfg(all(test, feature = "shared"))]
pub(super) mod tests;

pub use self::exchange::{Dated, RecordPlace, RecordRead, RecordSettings};
pub(super) use self::exchange::{PUBLIC_RENEWAL, Records, SETTLE_TIMEOUT, work};
pub use self::grant::{GrantState, RecordPrincipal};
pub(super) use self::key::{CLASS_NAMES, Class};
pub use self::key::{KEYS_MAX, KeyFileError, RecordKeys};
pub(super) use self::queue::{Closed, Denial, RecordId, Update};
pub use self::state::{CHILDREN_MAX, ContentState, PublicState, TagState, TagVariant};
pub use self::tag_reads::RecordReader;
