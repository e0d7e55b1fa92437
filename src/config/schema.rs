//! Every key of the configuration: its name, its default and its meaning, in one place.
//!
//! The defaults are read from here, unknown keys are compared with these, the variables are named after them, and a
//! test holds `config/ifnewer.toml` against this table.

/// A part of the configuration file.
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
    /// Those that occur once and whose keys are variables as well.
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

    /// The name of its table; empty for the top.
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

    /// How its beginning is written in the file.
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

    /// Its keys.
    pub fn keys(self) -> impl Iterator<Item = &'static Key> + Clone {
        KEYS.iter().filter(move |key| key.section == self)
    }

    /// The key of that name.
    pub fn key(self, name: &str) -> Option<&'static Key> {
        self.keys().find(|key| key.name == name)
    }
}

/// A key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Where it stands.
    pub section: Section,
    /// Its name there.
    pub name: &'static str,
    /// Its default as it would be written in the file; `None`: unset, or taken from elsewhere as `doc` says.
    pub default: Option<&'static str>,
    /// What it does, in one sentence.
    pub doc: &'static str,
}

impl Key {
    /// The full name, as in `store.size`.
    pub fn path(&self) -> String {
        match self.section {
            Top => self.name.to_owned(),
            section => format!("{}.{}", section.name(), self.name),
        }
    }

    /// The environment variable that overrides the file. Upstreams and rules have none.
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

/// Every key.
#[rustfmt::skip] // One key a line: the table is read by its columns.
pub const KEYS: &[Key] = &[
    key(Top, "data", None, "The cache's folder, for one process at a time; the default is the user's cache folder, or /var/cache/ifnewer for root."),
    key(Top, "default_upstream", Some(r#""docker.io""#), "The upstream meant by a client that names none: dockerd with `registry-mirrors`."),

    key(Listen, "registry", Some(r#"["127.0.0.1:5000"]"#), "The addresses for clients, or \"unix:/path\"; each speaks TLS and plain HTTP. Sockets of the service manager (LISTEN_FDS) take their place."),
    key(Listen, "plain_http", Some(r#""loopback""#), "Who may speak without TLS: \"loopback\", \"any\" or \"off\"."),
    key(Listen, "proxy_protocol_from", Some("[]"), "Networks of load balancers whose PROXY protocol header (version 1 or 2) says who the client is; from there it must come."),
    key(Listen, "admin", Some(r#""127.0.0.1:5001""#), "The address for health, metrics and the admin API: an address, \"unix:/path\" or \"off\"."),
    key(Listen, "admin_token_file", None, "The file with the token that the admin API asks for; an admin address that others can reach needs one."),

    key(Tls, "folder", Some(r#""certs""#), "The folder of ca.pem, ca.key, server.pem and server.key, made at the first start; relative to this file. Without a file: `certs` where the program is started, if that folder is empty or has our CA, else `certs` in the cache's folder."),
    key(Tls, "names", Some("[]"), "Further host names and addresses on the server certificate."),
    key(Tls, "constrained", Some("true"), "Whether the CA, when it is made, may vouch only for the cache's names and the hosts of upstreams configured then."),
    key(Tls, "certificate", None, "A server certificate of your own, PEM with its chain; needs `key`."),
    key(Tls, "key", None, "The private key of `certificate`, PEM."),

    key(Store, "size", Some(r#""50 GiB""#), "How much the cache may hold; the least recently used goes first."),
    key(Store, "free", Some(r#""5 GiB""#), "How much is left free on the disk."),
    key(Store, "scrub", Some(r#""20 MiB/s""#), "How fast everything held is read again once a week, to find what the disk changed; or \"off\"."),

    key(Default, "policy", Some(r#""if-newer""#), "The pull policy: \"always\", \"if-newer\", \"if-not-present\" or \"never\"."),
    key(Default, "max_age", Some(r#""0s""#), "How long a tag is served without asking, once the upstream has confirmed it."),
    key(Default, "stale_if_error", Some(r#""forever""#), "How old a copy may be that is served while the upstream is silent."),
    key(Default, "revalidate_timeout", Some(r#""2s""#), "How long a client waits for the upstream's word when there is a copy to serve."),
    key(Default, "on_not_found", Some(r#""refuse""#), "What becomes of a held tag that was deleted upstream: \"refuse\" or \"serve-stale\"."),
    key(Default, "grant_ttl", Some(r#""5m""#), "How long the upstream's yes to a credential holds while the upstream answers, and its answer to what refers to a cached manifest."),
    key(Default, "grant_ttl_offline", Some(r#""12h""#), "How long it holds while the upstream is silent."),
    key(Default, "prefetch", Some("true"), "Whether an image's layers are begun as soon as the first of them is asked for, or, where a tag moved whose image was pulled here before, as soon as its manifest was fetched."),

    key(Upstream, "url", None, "Where the registry is, or a list asked in order until one has the image; the default is https:// and its name."),
    key(Upstream, "repository_prefix", None, "What stands before the name of each repository there, for an upstream below a project of another registry: \"hub-proxy\"; a list has one for each URL."),
    key(Upstream, "hosts", None, "Further host names that mean this upstream."),
    key(Upstream, "enabled", Some("true"), "With false, the upstream does not exist; meant for the well-known ones."),
    key(Upstream, "auth", Some(r#""per-client""#), "Whose right counts: \"per-client\", each client's own; or \"shared\", whoever reaches the listener is entitled."),
    key(Upstream, "username", None, "The user of the proxy's own credential there; needs `password_file` and auth = \"shared\"."),
    key(Upstream, "password_file", None, "The file with the password of `username`."),
    key(Upstream, "docker_config", None, "Docker's config.json with the proxy's own credentials, by host and path, and credential helpers; needs auth = \"shared\"."),
    key(Upstream, "credential_helper", None, "The helper that gives the proxy's own credential: \"ecr-login\" for docker-credential-ecr-login; needs auth = \"shared\"."),
    key(Upstream, "token_hosts", Some("[]"), "Hosts that are trusted with credentials for this upstream when it sends clients there for a token, or redirects to another registry there; its own host, for tokens its site, and for registry.k8s.io the hosts below pkg.dev, are anyway."),
    key(Upstream, "local_tokens", None, "Where its token service is, as in \"https://auth.docker.io/token\": clients reach it through us, and while it is silent get tokens of ours that open what they could read before. Read docs/security.md first."),
    key(Upstream, "ca_file", None, "PEM certificates to trust there, besides the system's: authorities, or the server's own, self-signed or not."),
    key(Upstream, "client_certificate", None, "The client certificate shown to it when it asks for one, PEM with its chain; needs `client_key`. Redirect targets and token services elsewhere are not shown it."),
    key(Upstream, "client_key", None, "The private key of `client_certificate`, PEM."),
    key(Upstream, "redirects", Some("[]"), "Where its redirects may lead besides https and addresses no nearer than its own: hosts, globs over hosts and networks; with http:// before one, by plain HTTP."),
    key(Upstream, "proxy", Some(r#""environment""#), "The proxy on the way there: \"environment\" (HTTPS_PROXY, NO_PROXY), \"none\" or a URL."),
    key(Upstream, "connect_timeout", Some(r#""3s""#), "How long a connection may take to come about."),
    key(Upstream, "first_byte_timeout", Some(r#""25s""#), "How long the head of an answer may take once it was asked for; more for a registry that first fetches for itself. What is held is not waited for longer than `revalidate_timeout`."),
    key(Upstream, "policy", None, "As in [default], for this upstream."),
    key(Upstream, "max_age", None, "As in [default], for this upstream."),
    key(Upstream, "stale_if_error", None, "As in [default], for this upstream."),
    key(Upstream, "revalidate_timeout", None, "As in [default], for this upstream."),
    key(Upstream, "on_not_found", None, "As in [default], for this upstream."),
    key(Upstream, "grant_ttl", None, "As in [default], for this upstream."),
    key(Upstream, "grant_ttl_offline", None, "As in [default], for this upstream."),
    key(Upstream, "prefetch", None, "As in [default], for this upstream."),

    key(Rule, "images", None, "Globs over upstream/repository:tag; `*` also crosses `/`."),
    key(Rule, "policy", None, "As in [default], for these images."),
    key(Rule, "max_age", None, "As in [default], for these images."),
    key(Rule, "stale_if_error", None, "As in [default], for these images."),
    key(Rule, "revalidate_timeout", None, "As in [default], for these images."),
    key(Rule, "on_not_found", None, "As in [default], for these images."),
    key(Rule, "prefetch", None, "As in [default], for these images."),

    key(Access, "htpasswd", None, "The file with the users of the cache itself and their passwords, hashed by bcrypt."),
    key(Access, "client_ca", None, "PEM certificates of the CAs whose client certificates open as well. Without this and `htpasswd`, whoever reaches the listener may ask."),

    key(Allow, "users", None, "Users of `access.htpasswd`, or names in client certificates; a name that ends in `*` stands for all that begin so."),
    key(Allow, "images", None, "Globs over upstream/repository that they may pull; `*` also crosses `/`. With any [[allow]], what none allows is refused."),

    key(Connect, "tunnel", Some("[]"), "Hosts, or globs over hosts, that CONNECT may tunnel to unread; at port 443 unless another is written."),

    key(Log, "level", Some(r#""info""#), "How much is told: \"error\", \"warn\", \"info\", \"debug\", \"trace\", or a filter as in \"info,ifnewer::upstream=debug\"."),
    key(Log, "format", Some(r#""human""#), "How it is written: \"human\" or \"json\"."),

    key(Limits, "connections_max", Some("4096"), "Connections at a time. For a further one the oldest without a request in flight is closed; while each has one, it waits to be accepted. Few file descriptors lower this: five belong to each connection."),
    key(Limits, "connections_per_peer_max", Some("256"), "Connections at a time from one address, which is the client's where a balancer sends the PROXY protocol; as many further ones wait, and beyond those they are closed."),
    key(Limits, "streams_per_connection_max", Some("100"), "Requests at a time on one HTTP/2 connection."),
    key(Limits, "tunnels_max", Some("256"), "Tunnels of CONNECT at a time; further ones are answered with 503."),
    key(Limits, "downloads_max", Some("256"), "Blob transfers at a time from all upstreams together; further ones are queued. One upstream has at most three quarters of them."),
    key(Limits, "downloads_per_upstream_max", Some("64"), "Questions at a time to one upstream, and as many blob transfers; further ones are queued."),
    key(Limits, "handshake_timeout", Some(r#""10s""#), "How long a TLS handshake may take."),
    key(Limits, "header_timeout", Some(r#""10s""#), "How long a client may take to send a request's header; over HTTP/1.1 from the end of the answer before it."),
    key(Limits, "idle_timeout", Some(r#""60s""#), "How long a connection may wait for a place of its address, nothing may move in a tunnel, and an HTTP/2 client may leave a ping unanswered."),
    key(Limits, "write_timeout", Some(r#""60s""#), "How long a client may go without taking a single byte of an answer."),
    key(Limits, "drain", Some(r#""30s""#), "How long requests under way may take to end after SIGTERM."),
];

/// Short forms of variables, named like the flags.
pub(super) const VARIABLE_ALIASES: &[(&str, &str)] = &[
    ("IFNEWER_LISTEN", "IFNEWER_LISTEN_REGISTRY"),
    ("IFNEWER_ADMIN", "IFNEWER_LISTEN_ADMIN"),
    ("IFNEWER_LOG", "IFNEWER_LOG_LEVEL"),
];

/// Variables that are not settings: they are read by the command line.
pub(super) const NON_SETTING_VARIABLES: &[&str] = &["IFNEWER_CONFIG"];

/// Keys by their names before 0.2, each with its name today.
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
    /// The key of this section that had the name `old`.
    pub(super) fn renamed(self, old: &str) -> Option<&'static Key> {
        let (_, new) = RENAMED.iter().find(|(name, _)| *name == old)?;
        self.key(new)
    }
}
