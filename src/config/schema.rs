//! Schema: all configuration keys with their defaults and descriptions.
//!
//! This table supplies defaults, suggestions for unknown keys and names of variables. A test compares
//! `config/ifnewer.toml` with it.

/// Section of the configuration file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Section {
    /// Before the first `[section]`.
    Top,
    /// `[listen]`
    Listen,
    /// `[tls]`
    Tls,
    /// `[store]`
    Store,
    /// `[default]`
    Default,
    /// `[upstream."name"]`
    Upstream,
    /// `[[rule]]`
    Rule,
    /// `[access]`
    Access,
    /// `[[allow]]`
    Allow,
    /// `[connect]`
    Connect,
    /// `[log]`
    Log,
    /// `[limits]`
    Limits,
}

impl Section {
    /// Sections that occur at most once. Their keys have environment variables.
    pub const FIXED: [Self; 9] = [
        Self::Top,
        Self::Listen,
        Self::Tls,
        Self::Store,
        Self::Default,
        Self::Access,
        Self::Connect,
        Self::Log,
        Self::Limits,
    ];

    /// Table name; empty for the top.
    pub fn name(self) -> &'static str {
        match self {
            Self::Top => "",
            Self::Listen => "listen",
            Self::Tls => "tls",
            Self::Store => "store",
            Self::Default => "default",
            Self::Upstream => "upstream",
            Self::Rule => "rule",
            Self::Access => "access",
            Self::Allow => "allow",
            Self::Connect => "connect",
            Self::Log => "log",
            Self::Limits => "limits",
        }
    }

    /// Section header as written in the file.
    pub fn header(self) -> &'static str {
        match self {
            Self::Top => "the top, before the first `[section]`",
            Self::Listen => "`[listen]`",
            Self::Tls => "`[tls]`",
            Self::Store => "`[store]`",
            Self::Default => "`[default]`",
            Self::Upstream => "`[upstream.\"name\"]`",
            Self::Rule => "`[[rule]]`",
            Self::Access => "`[access]`",
            Self::Allow => "`[[allow]]`",
            Self::Connect => "`[connect]`",
            Self::Log => "`[log]`",
            Self::Limits => "`[limits]`",
        }
    }

    /// Keys of the section.
    pub fn keys(self) -> impl Iterator<Item = &'static Key> + Clone {
        KEYS.iter().filter(move |key| key.section == self)
    }

    /// Finds a key by name.
    pub fn key(self, name: &str) -> Option<&'static Key> {
        self.keys().find(|key| key.name == name)
    }
}

/// Configuration key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Section of the key.
    pub section: Section,
    /// Name in the section.
    pub name: &'static str,
    /// Default as written in the file; `None`: unset, or described in `doc`.
    pub default: Option<&'static str>,
    /// Description.
    pub doc: &'static str,
}

impl Key {
    /// Full name, such as `store.size`.
    pub fn path(&self) -> String {
        match self.section {
            Top => self.name.to_owned(),
            section => format!("{}.{}", section.name(), self.name),
        }
    }

    /// Environment variable that overrides the file; `None` for upstreams and rules.
    pub fn variable(&self) -> Option<String> {
        Section::FIXED
            .contains(&self.section)
            .then(|| format!("IFNEWER_{}", self.path().replace('.', "_").to_uppercase()))
    }
}

const fn key(section: Section, name: &'static str, default: Option<&'static str>, doc: &'static str) -> Key {
    Key {
        section,
        name,
        default,
        doc,
    }
}

use Section::{Access, Allow, Connect, Default, Limits, Listen, Log, Rule, Store, Tls, Top, Upstream};

/// All keys.
#[rustfmt::skip] // One key per line, for readability.
pub const KEYS: &[Key] = &[
    key(Top, "data", None, "Cache directory; one process at a time. Default: the user's cache directory, or /var/cache/ifnewer for root."),
    key(Top, "default_upstream", Some(r#""docker.io""#), "Upstream of a request that names none, such as those of dockerd with `registry-mirrors`."),

    key(Listen, "registry", Some(r#"["127.0.0.1:5000"]"#), "Listen addresses for clients, or \"unix:/path\". Each accepts TLS and plain HTTP. Sockets passed by the service manager (LISTEN_FDS) replace them."),
    key(Listen, "plain_http", Some(r#""loopback""#), "Clients that may connect without TLS: \"loopback\", \"any\" or \"off\"."),
    key(Listen, "proxy_protocol_from", Some("[]"), "Networks of load balancers that send a PROXY protocol header (version 1 or 2). The header gives the client address and is mandatory from these networks."),
    key(Listen, "admin", Some(r#""127.0.0.1:5001""#), "Address of health checks, metrics and the admin API: an address, \"unix:/path\" or \"off\"."),
    key(Listen, "admin_token_file", None, "File with the token of the admin API. Required if the admin address is reachable from other hosts."),

    key(Tls, "folder", Some(r#""certs""#), "Directory of ca.pem, ca.key, server.pem and server.key, created at the first start; relative to this file. Without a configuration file: `certs` in the working directory if it is empty or holds a CA of this program, else `certs` in the cache directory."),
    key(Tls, "names", Some("[]"), "Additional host names and addresses in the server certificate."),
    key(Tls, "constrained", Some("true"), "Limit a new CA by name constraints to the cache's names and the upstream hosts configured at that time."),
    key(Tls, "certificate", None, "Your own server certificate, PEM with its chain; requires `key`."),
    key(Tls, "key", None, "Private key of `certificate`, PEM."),

    key(Store, "size", Some(r#""50 GiB""#), "Maximum size of the cache. Least recently used images are evicted first."),
    key(Store, "free", Some(r#""5 GiB""#), "Minimum free space on the disk."),
    key(Store, "scrub", Some(r#""20 MiB/s""#), "Read rate of the weekly scrub that verifies all cached content; or \"off\"."),

    key(Default, "policy", Some(r#""if-newer""#), "Pull policy: \"always\", \"if-newer\", \"if-not-present\" or \"never\"."),
    key(Default, "max_age", Some(r#""0s""#), "Freshness lifetime of a tag: after a revalidation, the tag is served for this long without another upstream request."),
    key(Default, "stale_if_error", Some(r#""forever""#), "Maximum time since the last revalidation at which a tag is still served while the upstream is unavailable: a duration or \"forever\"."),
    key(Default, "revalidate_timeout", Some(r#""2s""#), "Time a client waits for a revalidation if a cached copy can be served instead."),
    key(Default, "on_not_found", Some(r#""refuse""#), "Response for a cached tag that the upstream reports as deleted (404): \"refuse\" or \"serve-stale\"."),
    key(Default, "grant_ttl", Some(r#""5m""#), "Lifetime of an authorization while the upstream is available, and of its referrers list for a cached manifest."),
    key(Default, "grant_ttl_offline", Some(r#""12h""#), "Lifetime of an authorization while the upstream is unavailable."),
    key(Default, "prefetch", Some("true"), "Download all layers of an image once the first one is requested; or, if a tag moved and its old image was pulled here, once the new manifest is fetched."),
    key(Default, "refresh", Some(r#""off""#), "How often tags in use are revalidated in the background: \"off\", or from \"1m\" to \"30d\". A tag that moved is fetched, so that the next pull finds it. The cache uses its own credential or, for public repositories, none."),
    key(Default, "refresh_used_within", Some(r#""7d""#), "A tag is in use, and refreshed, if a client pulled it within this time."),
    key(Default, "refresh_quota_floor", Some(r#""25%""#), "Share of the upstream's pull quota that is left to clients: below it, nothing is refreshed."),
    key(Default, "min_age", Some(r#""0s""#), "Minimum age: a tag is answered with the newest digest that it has named for at least this long, up to \"365d\". Counts from the time at which this cache first saw the tag name the digest or, if older, from the `Last-Modified` of its storage. \"0s\" for none. Pulls by digest: see `min_age_by_digest`."),
    key(Default, "on_unknown_age", Some(r#""refuse""#), "With `min_age`, the action for a digest that is new to this cache and of which nothing shows the age: \"refuse\" until it is old enough here, or \"serve\"."),
    key(Default, "min_age_by_digest", Some("false"), "Whether `min_age` applies to manifests requested by digest too. A digest is as old as under its oldest tag in the repository, or as its first request. The images of an index that was served are not delayed, and blobs never are."),
    key(Default, "trust_created", Some("false"), "With `min_age`, whether `created` in the config of an image is evidence of its age. Its publisher can write any time there."),

    key(Upstream, "url", None, "URL of the registry, or a list tried in order until one has the image. Default: https:// and the upstream's name."),
    key(Upstream, "repository_prefix", None, "Prefix of each repository name at the registry, for an upstream that is a project of another registry: \"hub-proxy\". A list has one prefix for each URL."),
    key(Upstream, "hosts", None, "Additional host names of this upstream."),
    key(Upstream, "enabled", Some("true"), "If false, the upstream does not exist. Use it to remove a well-known upstream."),
    key(Upstream, "auth", Some(r#""per-client""#), "Authorization of reads: \"per-client\", the upstream authorizes each client by its own credential; or \"shared\", every client that reaches the listener may read whatever the cache can read."),
    key(Upstream, "username", None, "User name of the cache's credential at this upstream; requires `password_file` and auth = \"shared\"."),
    key(Upstream, "password_file", None, "File with the password of `username`."),
    key(Upstream, "docker_config", None, "Docker's config.json with the cache's credentials, by host and path, and credential helpers; requires auth = \"shared\"."),
    key(Upstream, "credential_helper", None, "Credential helper that supplies the cache's credential: \"ecr-login\" for docker-credential-ecr-login; requires auth = \"shared\"."),
    key(Upstream, "token_hosts", Some("[]"), "Additional hosts that may receive credentials for this upstream: token services named by its challenges, and registries that it redirects to. Always allowed: its own host, token services of the same site, and for registry.k8s.io the hosts below pkg.dev."),
    key(Upstream, "local_tokens", None, "URL of the upstream's token service, as in \"https://auth.docker.io/token\". Clients reach that service through the cache. While it is unavailable, the cache issues local tokens for content that the client was authorized to read before. See docs/security.md first."),
    key(Upstream, "ca_file", None, "PEM certificates to trust for this upstream in addition to the system's: CAs, or the server's certificate, self-signed or not."),
    key(Upstream, "client_certificate", None, "Client certificate for this upstream, PEM with its chain; requires `client_key`. It is not sent to redirect targets or token services on other hosts."),
    key(Upstream, "client_key", None, "Private key of `client_certificate`, PEM."),
    key(Upstream, "redirects", Some("[]"), "Additional redirect targets: hosts, globs over hosts, networks; with http:// for plain HTTP. Without an entry, a redirect needs https and an address in the same scope as the registry or a wider one."),
    key(Upstream, "proxy", Some(r#""environment""#), "Proxy for requests to this upstream: \"environment\" (HTTPS_PROXY, NO_PROXY), \"none\" or a URL."),
    key(Upstream, "connect_timeout", Some(r#""3s""#), "Timeout for a connection to this upstream."),
    key(Upstream, "first_byte_timeout", Some(r#""25s""#), "Timeout from a request to its response header. Increase it for a registry that first fetches the content itself. If a cached copy exists, clients wait `revalidate_timeout` at most."),
    key(Upstream, "policy", None, "As in [default], for this upstream."),
    key(Upstream, "max_age", None, "As in [default], for this upstream."),
    key(Upstream, "stale_if_error", None, "As in [default], for this upstream."),
    key(Upstream, "revalidate_timeout", None, "As in [default], for this upstream."),
    key(Upstream, "on_not_found", None, "As in [default], for this upstream."),
    key(Upstream, "grant_ttl", None, "As in [default], for this upstream."),
    key(Upstream, "grant_ttl_offline", None, "As in [default], for this upstream."),
    key(Upstream, "prefetch", None, "As in [default], for this upstream."),
    key(Upstream, "refresh", None, "As in [default], for this upstream."),
    key(Upstream, "refresh_used_within", None, "As in [default], for this upstream."),
    key(Upstream, "refresh_quota_floor", None, "As in [default], for this upstream."),
    key(Upstream, "min_age", None, "As in [default], for this upstream."),
    key(Upstream, "on_unknown_age", None, "As in [default], for this upstream."),
    key(Upstream, "min_age_by_digest", None, "As in [default], for this upstream."),
    key(Upstream, "trust_created", None, "As in [default], for this upstream."),

    key(Rule, "images", None, "Globs over upstream/repository:tag; `*` also matches `/`."),
    key(Rule, "policy", None, "As in [default], for these images."),
    key(Rule, "max_age", None, "As in [default], for these images."),
    key(Rule, "stale_if_error", None, "As in [default], for these images."),
    key(Rule, "revalidate_timeout", None, "As in [default], for these images."),
    key(Rule, "on_not_found", None, "As in [default], for these images."),
    key(Rule, "prefetch", None, "As in [default], for these images."),
    key(Rule, "refresh", None, "As in [default], for these images."),
    key(Rule, "refresh_used_within", None, "As in [default], for these images."),
    key(Rule, "min_age", None, "As in [default], for these images."),
    key(Rule, "on_unknown_age", None, "As in [default], for these images."),
    key(Rule, "min_age_by_digest", None, "As in [default], for these images. A glob with a tag does not apply to pulls by digest."),
    key(Rule, "trust_created", None, "As in [default], for these images."),

    key(Access, "htpasswd", None, "File with the users of the cache and their bcrypt password hashes."),
    key(Access, "client_ca", None, "PEM certificates of the CAs that issue client certificates. Without this and `htpasswd`, every client that reaches the listener has access."),

    key(Allow, "users", None, "Users of `access.htpasswd`, or names in client certificates. A trailing `*` matches any suffix."),
    key(Allow, "images", None, "Globs over upstream/repository that these users may pull; `*` also matches `/`. If there is any [[allow]], an image that none allows is denied."),

    key(Connect, "tunnel", Some("[]"), "Hosts, or globs over hosts, to which CONNECT may open a tunnel; port 443 unless another is given."),

    key(Log, "level", Some(r#""info""#), "Log level: \"error\", \"warn\", \"info\", \"debug\", \"trace\", or a filter such as \"info,ifnewer::upstream=debug\"."),
    key(Log, "format", Some(r#""human""#), "Log format: \"human\" or \"json\"."),

    key(Limits, "connections_max", Some("4096"), "Maximum concurrent connections. At the limit, the oldest connection without a request in flight is closed; if there is none, the new connection waits to be accepted. A low limit of file descriptors lowers this: each connection needs five."),
    key(Limits, "connections_per_peer_max", Some("256"), "Maximum concurrent connections of one client address (from the PROXY protocol header, if a balancer sends it). As many more wait; connections beyond those are closed."),
    key(Limits, "streams_per_connection_max", Some("100"), "Maximum concurrent requests on one HTTP/2 connection."),
    key(Limits, "tunnels_max", Some("256"), "Maximum concurrent CONNECT tunnels. Further requests get 503."),
    key(Limits, "downloads_max", Some("256"), "Maximum concurrent blob downloads from all upstreams. Further ones are queued. One upstream gets three quarters of them at most."),
    key(Limits, "parallel_connections", Some("4"), "Connections over which one large blob is fetched, if each further one raises the throughput and no other download waits. 1 turns that off."),
    key(Limits, "parallel_min", Some("\"64 MiB\""), "Smaller blobs are fetched over one connection; at least \"16 MiB\"."),
    key(Limits, "downloads_per_upstream_max", Some("64"), "Maximum concurrent requests to one upstream, and as many blob downloads. Further ones are queued."),
    key(Limits, "handshake_timeout", Some(r#""10s""#), "Timeout of a TLS handshake."),
    key(Limits, "header_timeout", Some(r#""10s""#), "Timeout of a request header; for HTTP/1.1 it starts at the end of the previous response."),
    key(Limits, "idle_timeout", Some(r#""60s""#), "Timeout of a connection in the queue of its address, of a tunnel without traffic, and of an unanswered HTTP/2 ping."),
    key(Limits, "write_timeout", Some(r#""60s""#), "Timeout of a response of which the client reads no byte."),
    key(Limits, "drain", Some(r#""30s""#), "Time that requests in flight have to complete after SIGTERM."),
];

/// Short variable names that match the flags.
pub(super) const VARIABLE_ALIASES: &[(&str, &str)] = &[
    ("IFNEWER_LISTEN", "IFNEWER_LISTEN_REGISTRY"),
    ("IFNEWER_ADMIN", "IFNEWER_LISTEN_ADMIN"),
    ("IFNEWER_LOG", "IFNEWER_LOG_LEVEL"),
];

/// Variables that the command line reads; they are not settings.
pub(super) const NON_SETTING_VARIABLES: &[&str] = &["IFNEWER_CONFIG"];

/// Renamed keys: old name, new name.
pub(super) const RENAMED: &[(&str, &str)] = &[
    ("fresh", "max_age"),
    ("stale", "stale_if_error"),
    ("budget", "revalidate_timeout"),
    ("absent", "on_not_found"),
    ("grant", "grant_ttl"),
    ("offline_grant", "grant_ttl_offline"),
    ("access", "auth"),
    ("plain", "plain_http"),
    ("who", "users"),
    ("fetches_max", "downloads_max"),
    ("fetches_per_upstream_max", "downloads_per_upstream_max"),
];

impl Section {
    /// Finds the key of this section that was renamed from `old`.
    pub(super) fn renamed(self, old: &str) -> Option<&'static Key> {
        let (_, new) = RENAMED.iter().find(|(name, _)| *name == old)?;
        self.key(new)
    }
}
