//! Cache semantics: policies, revalidation, completeness of images, eviction, and the requests of real clients.

pub mod blocked_digests;
pub mod client_checklist;
pub mod client_sequences;
pub mod completeness;
pub mod eviction;
pub mod fallback_urls;
pub mod incomplete_images;
pub mod min_age;
mod moved_tag;
pub mod on_not_found;
pub mod policies;
pub mod registry_quirks;
pub mod repository_prefix;
pub mod revalidation;
pub mod scheduled_refresh;
pub mod tag_by_accept;
pub mod tags_and_referrers;
pub mod unreliable_head;
