//! Builds the configuration: one function per section, and checks across sections.

use std::path::PathBuf;
use std::sync::Arc;

use super::diagnostic::{Checked, Report};
use super::document::Document;
use super::parsers::Address;
use super::schema::{self, Top};
use super::setting::both;
use super::upstreams::{self, ParsedUpstream};
use super::{Admin, Config, Listen, Log, ServerCertificate, Sources, StoreLimits, Tls};
use super::{access, limits, policy, shared, validate};

/// Default name of the certificate directory.
const CERTIFICATES: &str = "certs";

/// Builds the configuration. All sections are read before returning an error, so that all errors are reported.
pub(super) fn load(
    document: &Document<'_>,
    sources: &Sources<'_>,
    report: &mut Report<'_>,
) -> Checked<Config> {
    let top = Top::of(document, report);
    let data = report
        .path(&top.data)
        .map(|path| path.unwrap_or(sources.data.clone()));
    let listen = listen(document, report);
    let tls = tls(document, sources, data.as_ref().ok(), report);
    let store = store(document, report);
    let log = log(document, report);
    let limits = limits::read(document, report);
    let tunnels = schema::Connect::of(document, report).tunnel.get();

    let default = policy::default(document, report);
    let configured = upstreams::read_all(document, report);
    if let Ok(listen) = &listen {
        validate::check_no_loop(&configured, &listen.registry, report);
    }
    let own_names = tls.as_ref().map_or(&[][..], |tls| &tls.names);
    let of_upstreams = configured.iter().flat_map(|upstream| {
        let hosts = upstream.hosts.iter().map(|(_, host)| &**host);
        hosts.chain(upstream.config.as_ref().map(|config| &*config.name))
    });
    let hosts: Vec<&str> = of_upstreams.chain(own_names.iter().map(|name| &**name)).collect();
    let shared = shared::read(document, sources, &hosts, report);
    let plain_http = listen.as_ref().ok().map(|listen| listen.plain_http);
    let access = access::read(document, plain_http, &configured, report);
    let default_upstream = default_upstream(&top, &configured, report);
    let rules = policy::rules(document, default, &configured, report);
    Ok(Config {
        data: data?,
        default_upstream: default_upstream?,
        listen: listen?,
        access: access?,
        tls: tls?,
        tunnels: tunnels?.values(),
        store: store?,
        shared: shared?,
        upstreams: configured
            .into_iter()
            .filter_map(|upstream| upstream.config)
            .collect(),
        rules: rules?,
        log: log?,
        limits: limits?,
    })
}

fn listen(document: &Document<'_>, report: &mut Report<'_>) -> Checked<Listen> {
    let keys = schema::Listen::of(document, report);
    let addresses = keys.registry.get()?.0;
    if addresses.is_empty() {
        let message = "without an address no client can reach the cache";
        report.emit(&keys.registry.subject, message, r#"write ["127.0.0.1:5000"]"#);
    }
    let (mut registry, mut sockets) = (Vec::new(), Vec::new());
    for (subject, address) in &addresses {
        let is_twice = match address {
            Address::Tcp(address) => {
                registry.push(*address);
                // Each use of port 0 binds another port.
                address.port() != 0 && registry.iter().filter(|other| *other == address).count() > 1
            }
            Address::Unix(path) => {
                sockets.push(path.clone());
                sockets.iter().filter(|other| *other == path).count() > 1
            }
        };
        if is_twice {
            report.emit(subject, format!("`{address}` is listed twice"), "");
        }
    }
    let admin = keys.admin.get()?;
    if let Admin::Tcp(address) = admin
        && address.port() != 0
        && registry.contains(&address)
    {
        let message = format!("`{address}` is already an address of the registry");
        let help = "the admin API needs another address that clients cannot reach";
        report.emit(&keys.admin.subject, message, help);
    }
    Ok(Listen {
        registry,
        sockets,
        proxy_protocol_from: keys.proxy_protocol_from.get()?.values(),
        plain_http: keys.plain_http.get()?,
        admin,
        admin_token_file: report.path(&keys.admin_token_file)?,
    })
}

/// Without a configuration file, the default certificate directory is `certs` in the working directory if that is usable,
/// else in the cache directory `data`, which does not depend on the working directory.
fn tls(
    document: &Document<'_>,
    sources: &Sources<'_>,
    data: Option<&PathBuf>,
    report: &mut Report<'_>,
) -> Checked<Tls> {
    let keys = schema::Tls::of(document, report);
    both(&keys.certificate, &keys.key, "", report)?;
    let certificate = report.path(&keys.certificate)?.zip(report.path(&keys.key)?);
    let mut folder = report.path(&keys.folder)?.unwrap_or_default();
    if sources.origin.as_os_str().is_empty() && !keys.folder.is_set {
        let in_data = || data.map(|data| data.join(CERTIFICATES));
        folder = sources
            .working_dir_certs
            .clone()
            .or_else(in_data)
            .unwrap_or(folder);
    }
    Ok(Tls {
        folder,
        names: keys.names.get()?.values(),
        constrained: keys.constrained.get()?,
        certificate: certificate.map(|(certificate, key)| ServerCertificate { certificate, key }),
    })
}

fn store(document: &Document<'_>, report: &mut Report<'_>) -> Checked<StoreLimits> {
    let keys = schema::Store::of(document, report);
    Ok(StoreLimits {
        bytes_max: keys.size.get()?.into(),
        free_bytes_min: keys.free.get()?.into(),
        scrub_rate: keys.scrub.get()?.into(),
    })
}

fn log(document: &Document<'_>, report: &mut Report<'_>) -> Checked<Log> {
    let keys = schema::Log::of(document, report);
    let (level, format) = (keys.level.get()?.into(), keys.format.get()?);
    Ok(Log { level, format })
}

fn default_upstream(top: &Top, configured: &[ParsedUpstream], report: &mut Report<'_>) -> Checked<Arc<str>> {
    let name: String = top.default_upstream.get()?.into();
    validate::find(&name, &top.default_upstream.subject, configured, report)
}
