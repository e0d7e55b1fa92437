//! The downloads under way.

use serde::Serialize;

use crate::server::Registry;

/// A download under way.
#[derive(Serialize)]
pub(super) struct Transfer {
    pub(super) digest: String,
    pub(super) size: Option<u64>,
    pub(super) received: u64,
    /// Since it began, on average.
    pub(super) bytes_per_second: u64,
    pub(super) seconds: f64,
    /// Clients that read it now.
    pub(super) readers: usize,
    /// Whether it waits for a place.
    pub(super) queued: bool,
}

/// The longest running first.
pub(super) fn list(registry: &Registry) -> Vec<Transfer> {
    let transfers = registry.pull.downloads().transfers();
    transfers
        .into_iter()
        .map(|transfer| {
            let ms = u64::try_from(transfer.elapsed.as_millis())
                .unwrap_or(u64::MAX)
                .max(1);
            Transfer {
                digest: transfer.digest.to_string(),
                size: transfer.size,
                received: transfer.received,
                bytes_per_second: transfer.received.saturating_mul(1_000) / ms,
                seconds: transfer.elapsed.as_secs_f64(),
                readers: transfer.readers,
                queued: transfer.is_queued,
            }
        })
        .collect()
}
