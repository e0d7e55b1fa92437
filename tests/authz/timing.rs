//! Timing of denials: a client without a grant requests a cached digest, an unknown one and a blocked one. Neither the
//! work done nor its time may differ.

use std::sync::Arc;
use std::time::Instant;

use ifnewer::store::verdicts::{VerdictKey, VerdictKind, VerdictNote, VerdictScope};

use super::cache::{Cache, ClientRequest, Got, PROVEN};
use super::counting_disk::Counted;
use super::random_walk::rules;
use super::registry::{Condition, Registry, of};

const PAIRS: usize = 10_000;
/// Below this probability, two samples count as different.
const P_MIN: f64 = 0.01;
/// With equal distributions one round in a hundred reports a difference, and more do on a busy machine. A real
/// difference shows in every round.
const ROUNDS: usize = 5;
const DIGESTS: usize = 32;

type Path = fn(&str) -> String;

const BLOB: Path = |digest| format!("/v2/acme/app/blobs/{digest}");
const MANIFEST: Path = |digest| format!("/v2/acme/app/manifests/{digest}");

struct Stage {
    registry: Registry,
    disk: Arc<Counted>,
    cache: Cache,
    /// Digests of cached manifests.
    held_manifests: Vec<String>,
    /// Digests of cached blobs that are large enough for a file.
    held_blobs: Vec<String>,
    absent: Vec<String>,
    /// Credential of bob's client.
    bob: String,
}

/// Alice has pulled all of `acme/app`, where bob has no access.
async fn stage() -> Stage {
    let registry = Registry::new();
    registry.user("alice", "alice-secret");
    registry.user("bob", "bob-secret");
    registry.lets("alice", "acme/app");
    let disk = Arc::new(Counted::default());
    let cache = Cache::over(&registry, rules(false), &disk);
    let alice = registry.bearer("alice");
    let held_manifests: Vec<_> = (0..DIGESTS)
        .map(|n| {
            let digest = registry.push("acme/app", &format!("t{n}"), &format!("mark {n}"), &[100_000 + n]);
            digest.to_string()
        })
        .collect();
    let held_blobs: Vec<_> = registry.state().shelves["acme/app"]
        .blobs
        .iter()
        .filter(|(_, bytes)| bytes.len() >= 100_000)
        .map(|(digest, _)| digest.to_string())
        .collect();
    assert_eq!(held_blobs.len(), DIGESTS);
    let tasks = tokio::runtime::Handle::current().metrics();
    let tasks_before = tasks.num_alive_tasks();
    let paths = held_manifests
        .iter()
        .map(|digest| MANIFEST(digest))
        .chain(held_blobs.iter().map(|digest| BLOB(digest)));
    for path in paths {
        let got = cache.get(&client_request(path, &alice)).await;
        assert!(matches!(got, Got::Content(_, Some(_))), "{got:?}");
    }
    cache.proxy.downloads().idle().await;
    // Memberships are written after the response, by tasks of their own: their writes are no lookups for bob.
    while tasks.num_alive_tasks() > tasks_before {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    let absent = (0..DIGESTS).map(|n| of(format!("unknown {n}").as_bytes()).to_string());
    Stage {
        bob: registry.bearer("bob"),
        absent: absent.collect(),
        registry,
        disk,
        cache,
        held_manifests,
        held_blobs,
    }
}

fn client_request(path: String, shows: &str) -> ClientRequest {
    ClientRequest {
        site: PROVEN,
        path,
        head: false,
        shows: shows.to_owned(),
    }
}

#[tokio::test(start_paused = true)]
async fn denial_does_same_work_for_cached_and_unknown() {
    let stage = stage().await;
    for digest in [&stage.held_manifests[2], &stage.held_blobs[2], &stage.absent[2]] {
        let key = VerdictKey {
            kind: VerdictKind::Blocked,
            scope: VerdictScope::Everywhere,
            digest: digest.parse().unwrap(),
        };
        let note = VerdictNote {
            at: std::time::SystemTime::UNIX_EPOCH,
            by: "alice".to_owned(),
            reason: None,
        };
        let put = stage
            .cache
            .proxy
            .store()
            .write(move |store| store.put_verdict(&key, note));
        assert!(put.await.unwrap());
    }
    for condition in [Condition::Healthy, Condition::Down] {
        stage.registry.set_condition(condition);
        for (path, held) in [(BLOB, &stage.held_blobs), (MANIFEST, &stage.held_manifests)] {
            for head in [false, true] {
                let mut done = Vec::new();
                // The first request also detects the registry's quirks.
                for digest in [
                    &stage.absent[1],
                    &held[0],
                    &stage.absent[0],
                    &held[1],
                    &held[2],
                    &stage.absent[2],
                ] {
                    let asked = stage.registry.request_log().len();
                    let looks = stage.disk.reads();
                    let client_request = ClientRequest {
                        head,
                        ..client_request(path(digest), &stage.bob)
                    };
                    let Got::No(why) = stage.cache.get(&client_request).await else {
                        panic!("bob was served")
                    };
                    let asked = stage.registry.request_log()[asked..].join(", ");
                    done.push((
                        why,
                        asked.replace(digest.as_str(), "…"),
                        stage.disk.reads() - looks,
                    ));
                }
                assert_eq!(done[1], done[2], "{condition:?}");
                assert_eq!(done[2], done[3], "{condition:?}");
                assert_eq!(done[3], done[4], "{condition:?}: a cached and blocked one");
                assert_eq!(done[4], done[5], "{condition:?}: an unknown and blocked one");
                assert!(
                    done.iter().all(|(_, _, looks)| *looks == 0),
                    "{condition:?}: a lookup happened before authorization"
                );
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn denial_time_does_not_reveal_cached_content() {
    let stage = stage().await;
    for condition in [Condition::Healthy, Condition::Down] {
        stage.registry.set_condition(condition);
        let mut p_values = Vec::new();
        for round in 0..ROUNDS {
            let p = kolmogorov_smirnov(pairs(&stage, round).await);
            p_values.push(p);
            if p > P_MIN {
                break;
            }
        }
        eprintln!("{condition:?}: p = {p_values:.3?}");
        assert!(
            p_values.last().is_some_and(|p| *p > P_MIN),
            "{condition:?}: denial time reveals cached content in each of {ROUNDS} rounds: p = {p_values:?}"
        );
    }
}

/// The check detects a difference of one fifth, about the cost of one disk read.
#[test]
fn timing_check_detects_a_difference() {
    let noise = |n: u64| (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as f64;
    let sample = |from: u64| {
        (0..PAIRS as u64)
            .map(move |n| noise(n + from))
            .collect::<Vec<_>>()
    };
    assert!(kolmogorov_smirnov((sample(0), sample(1 << 30))) > P_MIN);
    let slower = sample(1 << 30).into_iter().map(|time| time * 1.2).collect();
    assert!(kolmogorov_smirnov((sample(0), slower)) < P_MIN);
}

/// Durations in nanoseconds, cached and unknown. Interleaved in a varying order, so that other load affects both
/// equally.
async fn pairs(stage: &Stage, round: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut held, mut absent) = (Vec::with_capacity(PAIRS), Vec::with_capacity(PAIRS));
    for n in 0..PAIRS {
        let first_held = (n ^ (n >> 3) ^ (n >> 7) ^ round).is_multiple_of(2);
        for is_held in [first_held, !first_held] {
            let digests = if is_held { &stage.held_blobs } else { &stage.absent };
            let client_request = client_request(BLOB(&digests[n % DIGESTS]), &stage.bob);
            let began = Instant::now();
            let got = stage.cache.get(&client_request).await;
            let took = began.elapsed().as_nanos() as f64;
            assert!(matches!(got, Got::No(_)), "{got:?}");
            if is_held {
                held.push(took);
            } else {
                absent.push(took);
            }
        }
        stage.registry.state().responses.clear();
        stage.registry.state().request_log.clear();
    }
    (held, absent)
}

/// The probability that two samples of one size come from one distribution and differ as much as these
/// (Press et al., Numerical Recipes, §14.3.3).
fn kolmogorov_smirnov((mut one, mut other): (Vec<f64>, Vec<f64>)) -> f64 {
    one.sort_by(f64::total_cmp);
    other.sort_by(f64::total_cmp);
    let size = one.len() as f64;
    let (mut i, mut k, mut largest) = (0, 0, 0.0_f64);
    while i < one.len() && k < other.len() {
        let least = one[i].min(other[k]);
        while i < one.len() && one[i] <= least {
            i += 1;
        }
        while k < other.len() && other[k] <= least {
            k += 1;
        }
        largest = largest.max((i as f64 - k as f64).abs() / size);
    }
    let effective = (size / 2.0).sqrt();
    let lambda = (effective + 0.12 + 0.11 / effective) * largest;
    if lambda < 0.2 {
        return 1.0;
    }
    let terms = (1..=100).map(|j| {
        let sign = if j % 2 == 1 { 2.0 } else { -2.0 };
        sign * (-2.0 * f64::from(j * j) * lambda * lambda).exp()
    });
    terms.sum::<f64>().clamp(0.0, 1.0)
}
