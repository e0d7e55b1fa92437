//! Hostile fronts: a host that responds in the registry's place, directly or after a redirect. Its response must not
//! reveal a private byte, nor whether one is cached.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, LOCATION};
use http::{Response, StatusCode};
use http_body_util::Full;

use super::cache::{Cache, ClientRequest, Got, PROVEN};
use super::random_walk::{basic, rules};
use super::registry::{Condition, OCI_MANIFEST, Registry, of};

/// Redirect target.
pub const ELSEWHERE: &str = "elsewhere.test";

/// A host in front of the registry.
#[derive(Clone, Debug)]
pub struct Front {
    status: u16,
    media_type: &'static str,
    body: Bytes,
    /// The response comes from another host after a redirect.
    redirects: bool,
    /// Whether the front also responds to authorized clients.
    is_for_all: bool,
}

impl Front {
    /// Response to a request for `site` by a client that `may` read there or not; `None`: the registry responds.
    pub fn answer(&self, site: &str, path: &str, may: bool) -> Option<Response<Full<Bytes>>> {
        if may && !self.is_for_all {
            return None;
        }
        let builder = Response::builder();
        let builder = if self.redirects && site != ELSEWHERE {
            return builder
                .status(StatusCode::FOUND)
                .header(LOCATION, format!("http://{ELSEWHERE}{path}"))
                .body(Full::default())
                .ok();
        } else {
            builder.status(self.status)
        };
        let builder = if self.media_type.is_empty() {
            builder
        } else {
            builder.header(CONTENT_TYPE, self.media_type)
        };
        builder.body(Full::new(self.body.clone())).ok()
    }
}

fn fronts(size: usize) -> Vec<Front> {
    let mut fronts = Vec::new();
    let bodies = ["", "<html>log in</html>", r#"{"errors":[]}"#].map(str::to_owned);
    for body in bodies.into_iter().chain(["x".repeat(size)]) {
        for status in [200, 202, 203, 206, 401, 403, 404, 405, 500] {
            for media_type in [
                "",
                "text/html",
                "application/octet-stream",
                "application/json",
                OCI_MANIFEST,
            ] {
                // Other statuses than 200 are judged by the status, whatever their body.
                let is_one_of_many = body.is_empty() && media_type.contains("json");
                if !(matches!(status, 200 | 206) || is_one_of_many) {
                    continue;
                }
                for (redirects, is_for_all) in [(false, false), (true, false), (true, true)] {
                    fronts.push(Front {
                        status,
                        media_type,
                        body: Bytes::from(body.clone()),
                        redirects,
                        is_for_all,
                    });
                }
            }
        }
    }
    fronts
}

fn client_request(path: String, head: bool, shows: &str) -> ClientRequest {
    ClientRequest {
        site: PROVEN,
        path,
        head,
        shows: shows.to_owned(),
    }
}

/// What a client learns: the kind of response, and for content whether it has bytes.
fn learned(got: &Got) -> String {
    match got {
        Got::Content(_, bytes) => format!("content {}", bytes.is_some()),
        Got::List => "a list".to_owned(),
        Got::No(why) => format!("no: {why}"),
    }
}

#[tokio::test(start_paused = true)]
async fn r01_front_reveals_no_private_image() {
    let registry = Registry::new();
    for user in ["alice", "bob"] {
        registry.user(user, &format!("{user}-secret"));
    }
    registry.lets("alice", "acme/app");
    registry.lets("bob", "bob/own");
    let image = registry.push("acme/app", "1", "one", &[40, 90_000]);
    registry.push("bob/own", "1", "bob's", &[40]);
    let cache = Cache::new(&registry, rules(false));
    let (alice, bob) = (basic("alice", "alice-secret"), basic("bob", "bob-secret"));
    let blobs: Vec<_> = registry.state().shelves["acme/app"]
        .blobs
        .keys()
        .copied()
        .collect();
    let held: Vec<String> = blobs
        .iter()
        .map(|blob| format!("blobs/{blob}"))
        .chain([format!("manifests/{image}"), "manifests/1".to_owned()])
        .collect();
    let all = |repository: &str| {
        held.iter()
            .map(|path| format!("/v2/{repository}/{path}"))
            .collect::<Vec<_>>()
    };
    for path in all("acme/app").into_iter().rev() {
        let got = cache.get(&client_request(path, false, &alice)).await;
        assert!(matches!(got, Got::Content(..)), "{got:?}");
    }
    cache
        .get(&client_request("/v2/bob/own/manifests/1".to_owned(), false, &bob))
        .await;
    let absent = of(b"unknown content");
    for front in fronts(40) {
        registry.state().front = Some(front.clone());
        for shows in ["", bob.as_str(), "Bearer made-up"] {
            for repository in ["acme/app", "bob/own"] {
                for path in all(repository) {
                    for head in [true, false] {
                        let got = cache.get(&client_request(path.clone(), head, shows)).await;
                        let is_bobs = shows == bob && path == "/v2/bob/own/manifests/1";
                        let is_given = matches!(got, Got::Content(_, Some(_)));
                        assert!(is_bobs || !is_given, "{front:?}: {path} to {shows}: {got:?}");
                        let of_nothing =
                            path.replace(path.rsplit('/').next().unwrap_or_default(), &absent.to_string());
                        if path.contains("sha256") && repository == "acme/app" {
                            let other = cache.get(&client_request(of_nothing, head, shows)).await;
                            assert_eq!(learned(&got), learned(&other), "{front:?}: {path} to {shows}");
                        }
                    }
                }
            }
        }
    }
    // Nothing recorded meanwhile may open it either.
    for condition in [Condition::Healthy, Condition::Down] {
        registry.state().front = None;
        registry.set_condition(condition);
        for shows in ["", bob.as_str(), "Bearer made-up"] {
            for path in all("acme/app") {
                let got = cache.get(&client_request(path.clone(), false, shows)).await;
                assert!(
                    matches!(got, Got::No(_)),
                    "{condition:?}: {path} to {shows}: {got:?}"
                );
            }
        }
    }
    let got = cache
        .get(&client_request(
            "/v2/acme/app/manifests/1".to_owned(),
            false,
            &alice,
        ))
        .await;
    assert!(
        matches!(got, Got::Content(_, Some(_))),
        "a page revoked a grant: {got:?}"
    );
}
