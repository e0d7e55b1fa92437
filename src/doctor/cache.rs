//! Checks of the cache: listener, TLS certificate, readiness, upstreams and shared storage.

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::Value;
use tokio::task::JoinSet;

use super::http_probe::{self, Target};
use super::{Check, CheckContext, State};
use crate::config::{PlainHttp, UpstreamConfig};
use crate::oci::{Accept, Endpoint, Reference, Repository, Tag, TlsFailure, UpstreamFailure};
use crate::process;
use crate::queue::{Class, Peer};
use crate::trace_context::TraceContext;
use crate::upstream::{Caller, Credential, LearnedState, Transport, Upstream};

/// A repository that does not exist: any response shows that the registry is available.
const PROBE_REPOSITORY: &str = "ifnewer/doctor";

/// Requests the registry listener as a client of this host: plain HTTP if allowed, and TLS with the cache's CA.
pub(super) async fn listeners(context: &CheckContext<'_>) -> Vec<Check> {
    const NAME: &str = "listener";
    let endpoint = match &context.endpoint {
        Ok(endpoint) => endpoint,
        Err(refused) => return vec![Check::failed(NAME, refused.to_string(), "")],
    };
    let address = endpoint.host_port();
    let mut checks = Vec::new();
    let speaks_plain = match context.config.listen.plain_http {
        PlainHttp::Any => true,
        PlainHttp::Loopback => endpoint.is_loopback(),
        PlainHttp::Off => false,
    };
    if speaks_plain {
        checks.push(
            match http_probe::get(Target::Plain(&endpoint.host, endpoint.port), "/v2/").await {
                Ok(reply) if reply.status == 200 => Check::ok(NAME, format!("http://{address} responds")),
                Ok(reply) => Check::failed(
                    NAME,
                    format!("http://{address}/v2/ responds {}", reply.status),
                    "is another program listening there? see `ifnewer check` and listen.registry",
                ),
                Err(error) => Check::failed(
                    NAME,
                    format!("http://{address}: {error}"),
                    "start ifnewer, or set the address with --address",
                ),
            },
        );
    }
    checks.push(tls(context, &endpoint.host, endpoint.port).await);
    checks
}

async fn tls(context: &CheckContext<'_>, host: &str, port: u16) -> Check {
    const NAME: &str = "listener-tls";
    let config = context.config;
    let path = match (&context.options.ca, &config.tls.certificate) {
        (Some(path), _) => path.clone(),
        (None, Some(_)) => {
            return Check::skipped(
                NAME,
                "the server certificate is configured by the operator; set its CA with --ca to check it",
            );
        }
        (None, None) => config.tls.folder.join("ca.pem"),
    };
    let roots = CertificateDer::pem_file_iter(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let roots = match roots {
        Ok(roots) => roots,
        Err(error) => {
            return Check::failed(
                NAME,
                format!("{}: {error}", path.display()),
                "ifnewer creates it at the first start; if the service has settings of its own (IFNEWER_TLS_FOLDER in its \
                 unit), use the same for this command",
            );
        }
    };
    match http_probe::get(Target::Tls(host, port, &roots), "/v2/").await {
        Ok(reply) if reply.status == 200 => Check::ok(
            NAME,
            format!("https://{host}:{port} responds, verified with {}", path.display()),
        ),
        Ok(reply) => Check::failed(
            NAME,
            format!("https://{host}:{port}/v2/ responds {}", reply.status),
            "",
        ),
        Err(error) => Check::failed(
            NAME,
            format!("https://{host}:{port}, verified with {}: {error}", path.display()),
            "reload ifnewer (kill -HUP) if the CA is new; add a missing name to `names` of [tls]",
        ),
    }
}

/// Checks `/readyz`.
pub(super) async fn ready(context: &CheckContext<'_>) -> Check {
    const NAME: &str = "ready";
    let mut host = String::new();
    let Some(target) = Target::admin(&context.config.listen.admin, &mut host) else {
        return Check::skipped(NAME, "listen.admin is off");
    };
    match http_probe::get(target, "/readyz").await {
        Ok(reply) if reply.status == 200 => {
            let text = reply.text();
            let lines: Vec<&str> = text.lines().collect();
            match lines.iter().find(|line| line.starts_with("degraded")) {
                Some(line) => Check::failed(NAME, *line, "see the log"),
                None => Check::ok(NAME, lines.join(", ")),
            }
        }
        Ok(reply) => Check::failed(
            NAME,
            format!("/readyz responds {}: {}", reply.status, reply.text()),
            "see the log",
        ),
        Err(error) => Check::failed(
            NAME,
            format!("the admin listener: {error}"),
            "start ifnewer; does listen.admin match the running process?",
        ),
    }
}

/// Requests each upstream from this process with the configured proxy and roots, and reports its rate limit.
pub(super) async fn upstreams(context: &CheckContext<'_>) -> Vec<Check> {
    let connector = Transport::system();
    let mut tasks = JoinSet::new();
    for (position, upstream) in context.config.upstreams.iter().enumerate() {
        let name = format!("upstream {}", upstream.name);
        match process::upstream(
            upstream,
            4,
            (&connector, &LearnedState::default()),
            Default::default(),
        ) {
            Ok(client) => {
                let endpoint = endpoint(upstream, &context.options.canary);
                tasks.spawn(async move { (position, self::upstream(name, &client, endpoint).await) });
            }
            Err(error) => {
                let check = Check::failed(
                    name,
                    error.to_string(),
                    "correct its section in the configuration",
                );
                tasks.spawn(async move { (position, check) });
            }
        }
    }
    let mut checks = tasks.join_all().await;
    checks.sort_by_key(|(position, _)| *position);
    let seen = upstream_states(context).await;
    let names = context.config.upstreams.iter().map(|upstream| &*upstream.name);
    let checks = checks.into_iter().map(|(_, check)| check).zip(names);
    checks
        .map(|(check, name)| merge_results(check, name, seen.as_ref()))
        .collect()
}

/// State of the upstreams as reported by the running cache, if it is reachable.
async fn upstream_states(context: &CheckContext<'_>) -> Option<Value> {
    let mut host = String::new();
    let target = Target::admin(&context.config.listen.admin, &mut host)?;
    http_probe::get(target, "/api/v1/upstreams").await.ok()?.json()
}

/// State of the shared storage as reported by the running cache, because its credential may be in the environment of the
/// service alone.
pub(super) async fn shared_storage(context: &CheckContext<'_>) -> Option<Check> {
    const NAME: &str = "shared storage";
    context.config.shared.as_ref()?;
    let mut host = String::new();
    let Some(target) = Target::admin(&context.config.listen.admin, &mut host) else {
        return Some(Check::skipped(NAME, "listen.admin is off"));
    };
    let reply = http_probe::get(target, "/api/v1/shared").await.ok();
    Some(match reply.and_then(|reply| reply.json()) {
        Some(seen) => judge_shared_storage(NAME, &seen),
        None => Check::skipped(NAME, "the running cache cannot be asked; see the check `ready`"),
    })
}

/// The check of this `/api/v1/shared`.
pub(super) fn judge_shared_storage(name: &str, seen: &Value) -> Check {
    const REMEDY: &str = "see `ifnewer shared check`, with the variables of the service";
    let Some(storage) = seen.get("storage").filter(|storage| storage.is_object()) else {
        return Check::failed(
            name,
            "configured, and the running cache does not use it",
            "reload ifnewer",
        );
    };
    let bucket = storage["name"].as_str().unwrap_or_default();
    let failure = |kind: &str| storage.pointer(&format!("/{kind}_stopped/failure"))?.as_str();
    if let Some(failure) = failure("reads") {
        return Check::failed(name, format!("{bucket} cannot be read: {failure}"), REMEDY);
    }
    if let Some(failure) = failure("writes") {
        return Check::failed(name, format!("{bucket} accepts no uploads: {failure}"), REMEDY);
    }
    let note = match storage["conditions_kept"].as_bool() {
        Some(false) => "; it ignores conditions of simultaneous writes (docs/shared.md)",
        _ => "",
    };
    Check::ok(name, format!("{bucket} is used{note}"))
}

/// Combines the local result with that of the running cache, which may use another network path or credential.
pub(super) fn merge_results(mut check: Check, name: &str, seen: Option<&Value>) -> Check {
    let all = seen.and_then(|seen| seen.get("upstreams")?.as_array());
    let seen = all
        .into_iter()
        .flatten()
        .find(|upstream| upstream["name"] == *name);
    let (Some(seen), State::Ok) = (seen, check.state) else {
        return check;
    };
    if let Some(text) = seen.pointer("/unavailable/text").and_then(Value::as_str) {
        let detail = seen.pointer("/unavailable/detail").and_then(Value::as_str);
        let detail = detail.map_or_else(String::new, |detail| format!(" ({detail})"));
        return Check::failed(
            check.name,
            format!("responds to this command, but not to the running cache: {text}{detail}"),
            "do both use the same proxy and DNS?",
        );
    }
    let limits = seen
        .get("rate_limits")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    let left = limits.filter_map(|limit| Some((limit.get("remaining")?.as_u64()?, limit)));
    match left.min_by_key(|(left, _)| *left) {
        Some((0, limit)) => Check::failed(
            check.name,
            format!("no pulls left for {} ({})", limit["credential"], limit["limit"]),
            "wait, or have clients log in; cached images are still served",
        ),
        Some((left, limit)) => {
            check.found = format!(
                "available; {left} of {} pulls left for {}",
                limit["limit"], limit["credential"]
            );
            check
        }
        None => check,
    }
}

/// The canary image if it belongs to this upstream, because a registry counts its rate limit by pulls.
fn endpoint(upstream: &UpstreamConfig, canary: &str) -> Option<Endpoint> {
    let image = super::canary::Image::read(canary);
    let (repository, tag) = match image {
        Some(image) if upstream.has_name(&image.registry) && !image.reference.contains(':') => {
            (image.repository, image.reference)
        }
        _ => (PROBE_REPOSITORY.to_owned(), "latest".to_owned()),
    };
    let repository: Repository = repository.parse().ok()?;
    let tag: Tag = tag.parse().ok()?;
    Some(Endpoint::Manifest {
        repository,
        reference: Reference::Tag(tag),
    })
}

async fn upstream(name: String, upstream: &Upstream, endpoint: Option<Endpoint>) -> Check {
    let Some(endpoint) = endpoint else {
        return Check::skipped(name, "the canary image has no tag");
    };
    let anonymous = Caller {
        principal: [0; 32],
        credential: Credential::Anonymous,
        peer: Peer::Local,
        class: Class::Interactive,
        waiters: None,
        trace: TraceContext::new_root(),
        wait_deadline: None,
    };
    let response = upstream.head(&anonymous, &endpoint, &Accept::any()).await;
    if let Some(cause) = response.failure() {
        let registry = upstream.name();
        let detail = response.detail.as_deref();
        let detail = detail.map_or_else(String::new, |detail| format!(" ({detail})"));
        return Check::failed(
            name,
            format!("{registry} {cause}{detail}"),
            remedy(registry, cause),
        );
    }
    let quotas = upstream.status().quotas;
    let limit = quotas
        .iter()
        .find_map(|quota| Some((quota.limit.remaining?, quota.limit.limit?)));
    match limit {
        Some((0, limit)) => Check::failed(
            name,
            format!("available, but none of the {limit} anonymous pulls of this address are left"),
            "wait, or have clients log in; cached images are still served",
        ),
        Some((left, limit)) => Check::ok(name, format!("available; {left} of {limit} anonymous pulls left")),
        None => Check::ok(name, "available"),
    }
}

/// Remedy for an unavailable upstream.
fn remedy(registry: &str, cause: UpstreamFailure) -> String {
    let section = format!("[upstream.\"{registry}\"]");
    match (cause, cause.setting()) {
        (UpstreamFailure::InsecureRealm, _) => {
            "ask its operator to set the registry's external URL to https (Harbor: external_url; Artifactory: the base \
             URL, or X-Forwarded-Proto at its load balancer)"
                .to_owned()
        }
        (UpstreamFailure::Tls(TlsFailure::NotYetValid | TlsFailure::Expired), _) => {
            "have its operator renew the certificate; if its dates are right, this machine's clock is wrong".to_owned()
        }
        (UpstreamFailure::Tls(TlsFailure::WrongName), _) => {
            format!(
                "use a name of its certificate in `url` of {section}, or have its operator reissue the certificate"
            )
        }
        (UpstreamFailure::Tls(TlsFailure::ClientCertificate), _) => {
            format!("set `client_certificate` and `client_key` of {section}")
        }
        (UpstreamFailure::Timeout | UpstreamFailure::ConnectTimeout, Some(setting)) => {
            format!("check the network path to it, or raise `{setting}` of {section}")
        }
        (_, Some(setting)) => format!("set `{setting}` of {section}"),
        (_, None) => {
            format!("check DNS, firewall and `proxy`; if you do not use this registry, set enabled = false in {section}")
        }
    }
}
