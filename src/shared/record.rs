//! Records: what caches with one key tell each other through the bucket, beside the bytes.
//!
//! The bucket decides nothing. A record is evidence, as if this cache had asked the upstream itself at that time.
//!
//! * `key`: names and seals. `state`: the content of records, and how two of them are merged.
//! * `queue`: updates that wait; `worker`: the task that writes them. `exchange`: reads, and updates by compare-and-swap.
//! * `records`: the records of one bucket. `notes`: reads of them, and what this cache notes. `recent`: what was read lately.
//! * `tag_reads`: reads of tag records before the upstream is asked.
//! * `grant`: records of the rights of principals.

mod exchange;
mod grant;
mod key;
mod notes;
mod queue;
mod recent;
mod records;
mod state;
mod tag_reads;
#[cfg(all(test, feature = "shared"))]
pub(super) mod tests;
mod worker;

pub use self::grant::{GrantState, RecordPrincipal};
pub(super) use self::key::{CLASS_NAMES, Class};
pub use self::key::{KEYS_MAX, KeyFileError, RecordKeys};
pub(super) use self::notes::SETTLE_TIMEOUT;
pub(super) use self::queue::{Closed, Denial, RecordId, Update};
pub(super) use self::records::Records;
pub use self::records::{Dated, RecordPlace, RecordRead, RecordSettings};
pub use self::state::{CHILDREN_MAX, ContentState, PublicState, TagState, TagVariant};
pub use self::tag_reads::RecordReader;
pub(super) use self::worker::{PUBLIC_RENEWAL, work};
