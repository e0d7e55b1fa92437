//! Faults of a registry and its network path, set by tests.

use super::gate::Gate;
use super::{Seen, Upstream};
use std::sync::Arc;

/// The active faults. All `None` and `false`: none.
#[derive(Default)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "independent knobs, in any combination"
)]
pub(super) struct Faults {
    /// On accepting a connection.
    pub(super) connection: Option<BadConnection>,
    /// Replaces the response to matching requests. The last one set wins.
    pub(super) instead: Vec<(Applies, Instead)>,
    pub(super) head_not_allowed: bool,
    pub(super) blob_head_refused: bool,
    pub(super) digest: DigestHeader,
    pub(super) rate_limit: Option<(u64, u64)>,
    pub(super) gzips: bool,
    pub(super) ignores_range: bool,
    pub(super) unsized_bodies: bool,
    pub(super) blob_cut_at: Option<usize>,
    pub(super) blob_cuts_left: Option<usize>,
    pub(super) blob_ends_at: Option<usize>,
    pub(super) wrong_byte_at: Option<usize>,
    pub(super) range_failures: Option<(u16, usize)>,
    pub(super) pace: Option<u64>,
    pub(super) held_bodies: Vec<(Applies, usize, Gate)>,
    pub(super) held_answers: Vec<(Applies, Gate)>,
    pub(super) late_answers: Vec<(Applies, Gate)>,
    pub(super) oversize_manifest: Option<usize>,
    pub(super) redirect: Option<Redirect>,
    /// Redirects everything under `/v2/` with this status to the same path there.
    pub(super) redirect_all: Option<(u16, String)>,
    pub(super) no_referrers: bool,
    pub(super) lists_lead_to_themselves: bool,
    pub(super) manifest_type: Option<String>,
    pub(super) blob_type: Option<String>,
    pub(super) empty_blobs: bool,
    pub(super) referrers_page: Option<usize>,
}

impl Faults {
    /// The status for further range requests, while failures remain.
    pub(super) fn range_failure(&mut self) -> Option<u16> {
        let (status, left) = self.range_failures.as_mut().filter(|(_, left)| *left > 0)?;
        *left -= 1;
        Some(*status)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum BadConnection {
    Resets,
    Mute,
}

#[derive(Clone)]
pub(super) enum Instead {
    Status(u16),
    Text(u16),
    RateLimited(Option<String>),
    Html,
    Front(super::fronts::Front),
    Hang,
    Drop,
    Scripted(super::Scripted),
}

#[derive(Default)]
pub(super) enum DigestHeader {
    #[default]
    Right,
    Omitted,
    Lie(String),
    LieInHeads(String),
    LieInGets(String),
}

#[derive(Clone)]
pub(super) struct Redirect {
    pub(super) status: u16,
    /// `{digest}` is replaced.
    pub(super) location: String,
}

/// Which requests a fault is for.
pub(super) type Applies = Arc<dyn Fn(&Seen) -> bool + Send + Sync>;

fn registry() -> Applies {
    Arc::new(|seen| seen.path.starts_with("/v2"))
}

impl Upstream {
    /// The listener is closed and every connection with it: connection refused.
    pub fn refuses(&self) {
        if let Some(listener) = self.listener.lock().unwrap().take() {
            listener.abort();
        }
        self.shared.hang_up();
    }

    /// Every connection, open or new, is reset.
    pub fn resets(&self) {
        self.turn(|faults| faults.connection = Some(BadConnection::Resets));
        self.shared.hang_up();
    }

    /// Connections open and get no response.
    pub fn is_mute(&self) {
        self.turn(|faults| faults.connection = Some(BadConnection::Mute));
        self.shared.hang_up();
    }

    /// Requests are logged, and get a response only after recovery.
    pub fn hangs(&self) {
        self.instead(registry(), Instead::Hang);
    }

    /// The same for these requests only.
    pub fn hangs_for(&self, which: fn(&Seen) -> bool) {
        self.instead(Arc::new(which), Instead::Hang);
    }

    /// Requests are logged and the connection closes without a response.
    pub fn drops_requests(&self) {
        self.instead(registry(), Instead::Drop);
    }

    /// Everything under `/v2/` gets this status.
    pub fn answers_status(&self, status: u16) {
        self.instead(registry(), Instead::Status(status));
    }

    /// These requests get this status.
    pub fn answers(&self, which: fn(&Seen) -> bool, status: u16) {
        self.instead(Arc::new(which), Instead::Status(status));
    }

    /// These requests get this status and a text that is not the registry's.
    pub fn answers_text(&self, which: fn(&Seen) -> bool, status: u16) {
        self.instead(Arc::new(which), Instead::Text(status));
    }

    /// Manifests have this type, or none if empty.
    pub fn types_manifests(&self, kind: &str) {
        self.turn(|faults| faults.manifest_type = Some(kind.to_owned()));
    }

    /// Blobs have this type.
    pub fn types_blobs(&self, kind: &str) {
        self.turn(|faults| faults.blob_type = Some(kind.to_owned()));
    }

    /// Blobs are empty, with a length of 0.
    pub fn empties_blobs(&self) {
        self.turn(|faults| faults.empty_blobs = true);
    }

    /// Only `GET`s of manifests get this status.
    pub fn answers_manifest_gets_with(&self, status: u16) {
        self.instead(
            Arc::new(|seen| seen.method == "GET" && seen.path.contains("/manifests/")),
            Instead::Status(status),
        );
    }

    /// Only the token service sends this status.
    pub fn answers_tokens_with(&self, status: u16) {
        self.instead(Arc::new(|seen| seen.path == "/token"), Instead::Status(status));
    }

    /// Too many requests, with or without `Retry-After`.
    pub fn rate_limits(&self, retry_after: Option<&str>) {
        self.instead(registry(), Instead::RateLimited(retry_after.map(str::to_owned)));
    }

    /// The same for manifests alone, as at Docker Hub.
    pub fn rate_limits_manifests(&self, retry_after: Option<&str>) {
        let applies = Arc::new(|seen: &Seen| seen.path.contains("/manifests/"));
        self.instead(applies, Instead::RateLimited(retry_after.map(str::to_owned)));
    }

    /// The same for `GET`s of manifests alone: a quota of pulls, which Docker Hub counts by them.
    pub fn rate_limits_pulls(&self, retry_after: Option<&str>) {
        let applies = Arc::new(|seen: &Seen| seen.method == "GET" && seen.path.contains("/manifests/"));
        self.instead(applies, Instead::RateLimited(retry_after.map(str::to_owned)));
    }

    /// The same for blobs alone.
    pub fn rate_limits_blobs(&self, retry_after: Option<&str>) {
        let applies = Arc::new(|seen: &Seen| seen.path.contains("/blobs/"));
        self.instead(applies, Instead::RateLimited(retry_after.map(str::to_owned)));
    }

    /// Sends its quota on every response, as Docker Hub does.
    pub fn tells_rate_limit(&self, limit: u64, remaining: u64) {
        self.turn(|faults| faults.rate_limit = Some((limit, remaining)));
    }

    /// A captive portal: 200 and a page for every request.
    pub fn answers_html(&self) {
        self.instead(registry(), Instead::Html);
    }

    /// `HEAD` of a manifest: 405.
    pub fn head_not_allowed(&self) {
        self.turn(|faults| faults.head_not_allowed = true);
    }

    /// `HEAD` of a blob: 401, though `GET` works.
    pub fn refuses_blob_heads(&self) {
        self.turn(|faults| faults.blob_head_refused = true);
    }

    /// No `Docker-Content-Digest` anywhere.
    pub fn omits_digest(&self) {
        self.turn(|faults| faults.digest = DigestHeader::Omitted);
    }

    /// `Docker-Content-Digest` always has this value.
    pub fn lies_about_digest(&self, digest: &str) {
        self.turn(|faults| faults.digest = DigestHeader::Lie(digest.to_owned()));
    }

    /// The same in responses to `HEAD` only.
    pub fn lies_about_digest_in_heads(&self, digest: &str) {
        self.turn(|faults| faults.digest = DigestHeader::LieInHeads(digest.to_owned()));
    }

    /// The same in responses to `GET` only.
    pub fn lies_about_digest_in_gets(&self, digest: &str) {
        self.turn(|faults| faults.digest = DigestHeader::LieInGets(digest.to_owned()));
    }

    /// Every blob response is reset after `n` body bytes.
    pub fn truncates_blob_at(&self, n: usize) {
        self.turn(|faults| faults.blob_cut_at = Some(n));
    }

    /// The next `times` blob responses are reset after `n` body bytes.
    pub fn truncates_blobs_at(&self, n: usize, times: usize) {
        self.turn(|faults| {
            faults.blob_cut_at = Some(n);
            faults.blob_cuts_left = Some(times);
        });
    }

    /// Blobs have no length and end cleanly after `n` bytes.
    pub fn ends_blob_early_at(&self, n: usize) {
        self.turn(|faults| faults.blob_ends_at = Some(n));
    }

    /// Responses have no `Content-Length`.
    pub fn omits_length(&self) {
        self.turn(|faults| faults.unsized_bodies = true);
    }

    /// Blobs have the right length and one wrong bit, near the end.
    pub fn corrupts_blob(&self) {
        self.corrupts_blob_at(usize::MAX);
    }

    /// Blobs have the right length and one wrong bit, in byte `n` or near the end.
    #[allow(dead_code, reason = "tests/crash uses it")]
    pub fn corrupts_blob_at(&self, n: usize) {
        self.turn(|faults| faults.wrong_byte_at = Some(n));
    }

    /// `Range` is ignored: always 200 and the full blob.
    pub fn ignores_range(&self) {
        self.turn(|faults| faults.ignores_range = true);
    }

    /// The next `times` range requests for a blob get this status.
    pub fn fails_ranges(&self, status: u16, times: usize) {
        self.turn(|faults| faults.range_failures = Some((status, times)));
    }

    /// Blob bodies are sent at this rate.
    pub fn drips(&self, bytes_per_second: u64) {
        self.turn(|faults| faults.pace = Some(bytes_per_second));
    }

    /// Manifests are padded to this many bytes.
    pub fn oversize_manifest(&self, bytes: usize) {
        self.turn(|faults| faults.oversize_manifest = Some(bytes));
    }

    /// Claims `Content-Encoding: gzip` on every body.
    pub fn gzips(&self) {
        self.turn(|faults| faults.gzips = true);
    }

    /// The referrers API does not exist.
    pub fn has_no_referrers_api(&self) {
        self.turn(|faults| faults.no_referrers = true);
    }

    /// A page of tags names itself as the next one.
    pub fn links_lists_to_themselves(&self) {
        self.turn(|faults| faults.lists_lead_to_themselves = true);
    }

    /// Lists of referrers have at most so many entries a page.
    pub fn pages_referrers_by(&self, entries: usize) {
        self.turn(|faults| faults.referrers_page = Some(entries));
    }

    /// Blobs are redirected (307) to a storage on another host, which refuses any `Authorization`.
    pub fn redirects_blobs_to(&self, other: &Upstream) {
        let held = self.state(|state| {
            state
                .repositories
                .values()
                .flat_map(|held| held.blobs.clone())
                .collect::<Vec<_>>()
        });
        other.state(|state| state.storage.extend(held));
        self.redirects_blobs_with(307, &format!("{}/storage/{{digest}}?signature=s", other.url()));
    }

    /// Blobs are redirected with this status to this `Location`, in which `{digest}` is replaced.
    pub fn redirects_blobs_with(&self, status: u16, location: &str) {
        self.state(|state| {
            let held: Vec<_> = state
                .repositories
                .values()
                .flat_map(|held| held.blobs.clone())
                .collect();
            state.storage.extend(held);
        });
        self.turn(|faults| {
            let location = location.to_owned();
            faults.redirect = Some(Redirect { status, location });
        });
    }

    /// Everything is redirected with this status to the same path at this base.
    pub fn redirects_all_to(&self, status: u16, base: &str) {
        let base = base.to_owned();
        self.turn(|faults| faults.redirect_all = Some((status, base)));
    }

    /// The body of this blob blocks after `n` bytes.
    pub fn holds_blob(&self, digest: &str, n: usize) -> Gate {
        let gate = Gate::new();
        let part = format!("/blobs/{digest}");
        let applies: Applies = Arc::new(move |seen| seen.path.contains(&part));
        self.turn(|faults| faults.held_bodies.push((applies, n, gate.clone())));
        gate
    }

    /// The bodies of these responses block before their first byte. Their content is already decided.
    pub fn holds_bodies(&self, which: impl Fn(&Seen) -> bool + Send + Sync + 'static) -> Gate {
        let gate = Gate::new();
        self.turn(|faults| faults.held_bodies.push((Arc::new(which), 0, gate.clone())));
        gate
    }

    /// The responses to these requests block before their first byte.
    pub fn holds_answers(&self, which: impl Fn(&Seen) -> bool + Send + Sync + 'static) -> Gate {
        let gate = Gate::new();
        self.turn(|faults| faults.held_answers.push((Arc::new(which), gate.clone())));
        gate
    }

    /// The same, with the content decided when the request arrives.
    pub fn delays_answers(&self, which: impl Fn(&Seen) -> bool + Send + Sync + 'static) -> Gate {
        let gate = Gate::new();
        self.turn(|faults| faults.late_answers.push((Arc::new(which), gate.clone())));
        gate
    }

    /// Uses an untrusted certificate from the next connection on.
    pub fn presents_foreign_certificate(&self) {
        let foreign = super::tls::Authority::new().server_config();
        self.state(|state| state.tls = Some(foreign));
        self.shared.hang_up();
    }

    /// Clears every fault and sends blocked responses. Permissions and content stay.
    pub fn recovers(&self) {
        self.turn(|faults| *faults = Faults::default());
        if let Some(authority) = &self.authority {
            self.state(|state| state.tls = Some(authority.server_config()));
        }
        if self.listener.lock().unwrap().is_none() {
            self.listen();
        }
    }

    pub(super) fn instead(&self, applies: Applies, what: Instead) {
        self.turn(|faults| faults.instead.push((applies, what)));
    }

    fn turn(&self, change: impl FnOnce(&mut Faults)) {
        self.state(|state| change(&mut state.faults));
        self.shared.turned.send_replace(());
    }
}
