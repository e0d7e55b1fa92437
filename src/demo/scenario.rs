//! Scenario of the demo: its steps with their expected results.

use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use http::HeaderValue;
use serde_json::Value;

use super::client::{Client, PullResult};
use super::registry::{Image, RETRY_AFTER, Registry};
use super::{DemoError, Summary};
use crate::admin::client::Client as AdminClient;
use crate::admin::format::{bytes, short_digest};
use crate::oci::{Digest, Reference, Repository};

/// Name of the upstream in image references.
pub(super) const UPSTREAM: &str = "registry.demo";

const BASE: (&str, usize) = ("base", 3_000_000);

/// Expected result of a step.
struct Expectation {
    /// The expected image; `None` if the request must be denied.
    image: Option<Image>,
    /// The reason in log, metrics and `Cache-Status`.
    reason: &'static str,
    cause: Option<&'static str>,
    /// Expected upstream requests; none reach a stopped registry.
    requests: u64,
    /// Maximum upstream bytes.
    bytes_max: u64,
    status: u16,
}

impl Expectation {
    fn image(image: &Image, reason: &'static str) -> Self {
        Self {
            image: Some(image.clone()),
            reason,
            cause: None,
            requests: 0,
            bytes_max: 0,
            status: 200,
        }
    }

    fn refused(reason: &'static str, status: u16) -> Self {
        Self {
            image: None,
            reason,
            cause: None,
            requests: 0,
            bytes_max: 0,
            status,
        }
    }

    fn with_cause(self, cause: &'static str) -> Self {
        Self {
            cause: Some(cause),
            ..self
        }
    }

    fn with_cost(self, requests: u64, bytes_max: u64) -> Self {
        Self {
            requests,
            bytes_max,
            ..self
        }
    }
}

/// Runs all steps.
pub(super) async fn run(
    registry: &Registry,
    cache: SocketAddr,
    ca: &[u8],
    admin: &AdminClient,
    colour: bool,
    out: &mut dyn Write,
) -> Result<Summary, DemoError> {
    let (alice, bob) = (
        HeaderValue::from_static("Basic YWxpY2U6MQ=="),
        HeaderValue::from_static("Basic Ym9iOjI="),
    );
    let anyone = Client::new(cache, ca, None)?;
    let (as_alice, as_bob) = (
        Client::new(cache, ca, Some(&alice))?,
        Client::new(cache, ca, Some(&bob))?,
    );
    let mut scenario = Scenario {
        registry,
        admin,
        colour,
        out,
        summary: Summary { lines: 0, wrong: 0 },
    };
    scenario.print_header(cache)?;

    let first = registry.push("library/app", "latest", &[BASE, ("code 1", 400_000)]);
    let (app, secret) = ("library/app:latest", "acme/secret:1");
    let cold = Expectation::image(&first, "not-cached").with_cost(4, 3_500_000);
    scenario.step("cold pull", &anyone, app, cold).await?;
    scenario
        .step(
            "unchanged",
            &anyone,
            app,
            Expectation::image(&first, "revalidated").with_cost(1, 0),
        )
        .await?;
    let second = registry.push("library/app", "latest", &[BASE, ("code 2", 400_000)]);
    // Revalidated and fetched; only the changed layer is downloaded.
    let newer = Expectation::image(&second, "new-digest").with_cost(4, 450_000);
    scenario.step("the tag moved", &anyone, app, newer).await?;
    let private = registry.push("acme/secret", "1", &[("secret code", 500_000)]);
    registry.require_auth("acme/secret", &alice);
    let cold = Expectation::image(&private, "not-cached").with_cost(3, 550_000);
    scenario
        .step("private, for alice", &as_alice, secret, cold)
        .await?;
    scenario
        .step(
            "private, for bob",
            &as_bob,
            secret,
            Expectation::refused("forbidden", 401).with_cost(1, 0),
        )
        .await?;
    registry.set_rate_limit(true);
    let stale = |image: &Image, cause| Expectation::image(image, "stale-if-error").with_cause(cause);
    scenario
        .step(
            "rate limited (429)",
            &anyone,
            app,
            stale(&second, "rate-limited").with_cost(1, 0),
        )
        .await?;
    registry.set_rate_limit(false);
    registry.stop();
    // Wait until the rate limit is over, so that the outage is the reason of the next step.
    tokio::time::sleep(RETRY_AFTER + Duration::from_millis(200)).await;
    scenario
        .step(
            "registry down",
            &anyone,
            app,
            stale(&second, "connection-refused"),
        )
        .await?;
    scenario
        .step(
            "down, for alice",
            &as_alice,
            secret,
            stale(&private, "connection-refused"),
        )
        .await?;
    scenario
        .step(
            "down, for bob",
            &as_bob,
            secret,
            Expectation::refused("upstream-unavailable", 502).with_cause("connection-refused"),
        )
        .await?;
    let unseen = Expectation::refused("upstream-unavailable", 502).with_cause("connection-refused");
    scenario
        .step("down, not cached", &anyone, "library/unseen:latest", unseen)
        .await?;
    scenario.finish()
}

struct Scenario<'a> {
    registry: &'a Registry,
    admin: &'a AdminClient,
    colour: bool,
    out: &'a mut dyn Write,
    summary: Summary,
}

impl Scenario<'_> {
    fn print_header(&mut self, cache: SocketAddr) -> Result<(), DemoError> {
        writeln!(
            self.out,
            "ifnewer with TLS at {cache}, in front of a scripted registry on loopback\n"
        )?;
        let heads = (
            "",
            "step",
            "response to the client",
            "upstream traffic",
            "time",
            "reason",
        );
        writeln!(
            self.out,
            "{:<2} {:<20} {:<40} {:<23} {:>7}  {}",
            heads.0, heads.1, heads.2, heads.3, heads.4, heads.5
        )?;
        Ok(())
    }

    async fn step(
        &mut self,
        name: &str,
        client: &Client,
        image: &str,
        expected: Expectation,
    ) -> Result<(), DemoError> {
        let wrong = || DemoError::Client(format!("`{image}` is not an image reference"));
        let (repository, tag) = image.rsplit_once(':').ok_or_else(wrong)?;
        let repository: Repository = repository.parse().map_err(|_| wrong())?;
        let tag: Reference = tag.parse().map_err(|_| wrong())?;
        let before = self.registry.sent();
        let got = client.pull(&repository, &tag).await;
        let after = self.registry.sent();
        let (requests, sent) = (after.0 - before.0, after.1 - before.1);
        let events = self
            .admin
            .get(&format!("/api/v1/events?limit=1&image={image}"))
            .await?;
        let event = events.pointer("/events/0").cloned().unwrap_or_default();
        let mismatches = mismatches(&got, &event, (requests, sent), &expected);
        self.summary.lines += 1;
        self.summary.wrong += usize::from(!mismatches.is_empty());
        let what = match got.digest {
            Some(digest) => format!(
                "{}, {} blobs, {}",
                short_digest(&digest.to_string()),
                got.blobs,
                bytes(got.bytes)
            ),
            None => format!("{} {}", got.status, truncated(&got.message)),
        };
        let cost = match requests {
            0 => "none".to_owned(),
            1 => format!("1 request, {}", bytes(sent)),
            more => format!("{more} requests, {}", bytes(sent)),
        };
        let (mark, code) = if mismatches.is_empty() {
            ("ok", "32")
        } else {
            ("!!", "31")
        };
        let mark = if self.colour {
            format!("\x1b[{code}m{mark}\x1b[0m")
        } else {
            mark.to_owned()
        };
        let sentence = event.get("sentence").and_then(Value::as_str).unwrap_or_default();
        let ms = format!("{} ms", got.took.as_millis());
        writeln!(
            self.out,
            "{mark} {name:<20} {what:<40} {cost:<23} {ms:>7}  {sentence}"
        )?;
        for mismatch in mismatches {
            writeln!(self.out, "   mismatch: {mismatch}")?;
        }
        Ok(())
    }

    fn finish(self) -> Result<Summary, DemoError> {
        let Summary { lines, wrong } = self.summary;
        let words = match wrong {
            0 => format!("all {lines} steps passed"),
            wrong => format!("{wrong} of {lines} steps FAILED"),
        };
        writeln!(self.out, "\n{words}")?;
        Ok(self.summary)
    }
}

fn mismatches(
    got: &PullResult,
    event: &Value,
    (requests, sent): (u64, u64),
    expected: &Expectation,
) -> Vec<String> {
    let mut mismatches = Vec::new();
    let expected_digest = expected.image.as_ref().map(|image| image.digest);
    if got.digest != expected_digest {
        let shown =
            |digest: Option<Digest>| digest.map_or_else(|| "nothing".to_owned(), |digest| digest.to_string());
        mismatches.push(format!(
            "the client got {} instead of {}",
            shown(got.digest),
            shown(expected_digest)
        ));
    }
    if got.status != expected.status {
        mismatches.push(format!(
            "the status is {} instead of {}",
            got.status, expected.status
        ));
    }
    let field = |name: &str| event.get(name).and_then(Value::as_str);
    if field("reason") != Some(expected.reason) || field("cause") != expected.cause {
        mismatches.push(format!(
            "the reason is {} ({}) instead of {}",
            field("reason").unwrap_or("none"),
            field("cause").unwrap_or("no cause"),
            expected.reason
        ));
    }
    if got.digest.is_some() && !got.cache_status.contains(expected.reason) {
        mismatches.push(format!("Cache-Status is `{}`", got.cache_status));
    }
    if requests != expected.requests || sent > expected.bytes_max {
        mismatches.push(format!(
            "upstream had {requests} requests and sent {sent} bytes instead of {} and at most {}",
            expected.requests, expected.bytes_max
        ));
    }
    mismatches
}

/// Truncates an error to the width of a column.
fn truncated(text: &str) -> String {
    const CHARS_MAX: usize = 32;
    if text.chars().count() <= CHARS_MAX {
        return text.to_owned();
    }
    text.chars().take(CHARS_MAX).chain(['…']).collect()
}
