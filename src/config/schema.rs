//! Schema: each key is declared once, with its type, its default and its description.
//!
//! The declarations yield the typed sections, the reference, the names of variables, and suggestions for unknown keys. A
//! test compares `config/ifnewer.toml` with them.

use std::sync::LazyLock;

use super::diagnostic::Report;
use super::document::Document;
use super::network::{Network, TunnelRule};
use super::parsers::{
    Address, CertificateName, Count, EndpointUrl, FilePath, HostName, KmsKey, Lifetime, LogLevel, MANY,
    MinAge, ParallelSize, Rate, Region, RepositoryPrefix, Size, StoreSize, Timeout, TokenServiceUrl,
    UpstreamUrl, UserName, UserPattern,
};
use super::setting::{Field, List, OneOrMany, Table};
use super::shared::redirect::RedirectChoice;
use super::shared::{BucketUrl, CredentialChoice, EncryptionChoice};
use super::{Admin, AuthMode, LogFormat, PlainHttp, Proxy};
use crate::policy::min_age::OnUnknownAge;
use crate::policy::refresh::{QuotaFloor, RefreshInterval};
use crate::policy::rules::{ImagePattern, StaleLimit};
use crate::policy::{OnNotFound, Policy};
use crate::upstream::{HelperName, RedirectRule};

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
            Section::Top => self.name.to_owned(),
            section => format!("{}.{}", section.name(), self.name),
        }
    }

    /// Environment variable that overrides the file; `None` for upstreams, rules and allow lists.
    pub fn variable(&self) -> Option<String> {
        let name = || format!("IFNEWER_{}", self.path().replace('.', "_").to_uppercase());
        self.section.is_fixed().then(name)
    }
}

/// All keys, in the order of the documentation.
pub static KEYS: LazyLock<Vec<Key>> = LazyLock::new(|| {
    Section::ALL
        .iter()
        .flat_map(|section| section.all_keys())
        .collect()
});

impl Section {
    /// Section header as written in the file.
    pub fn header(self) -> String {
        match self {
            Self::Top => "the top, before the first `[section]`".to_owned(),
            Self::Upstream => "`[upstream.\"name\"]`".to_owned(),
            Self::Rule | Self::Allow => format!("`[[{}]]`", self.name()),
            _ => format!("`[{}]`", self.name()),
        }
    }

    /// Whether the section occurs at most once. Then its keys have environment variables.
    pub fn is_fixed(self) -> bool {
        !matches!(self, Self::Upstream | Self::Rule | Self::Allow)
    }

    /// Keys of the section.
    pub fn keys(self) -> impl Iterator<Item = &'static Key> + Clone {
        KEYS.iter().filter(move |key| key.section == self)
    }

    /// Finds a key by name.
    pub fn key(self, name: &str) -> Option<&'static Key> {
        self.keys().find(|key| key.name == name)
    }

    /// Finds the key of this section that was renamed from `old`.
    pub(super) fn renamed(self, old: &str) -> Option<&'static Key> {
        let (_, new) = RENAMED.iter().find(|(name, _)| *name == old)?;
        self.key(new)
    }

    /// Keys with those of `[default]` that this section overrides.
    fn all_keys(self) -> Vec<Key> {
        let (doc, except) = match self {
            Self::Upstream => ("As in [default], for this upstream.", &[][..]),
            Self::Rule => ("As in [default], for these images.", NOT_IN_RULES),
            _ => return self.own_keys().to_vec(),
        };
        let overrides = PolicyKeys::KEYS.iter().filter(|key| !except.contains(&key.name));
        let overrides = overrides.map(|key| Key {
            section: self,
            default: None,
            doc,
            ..*key
        });
        self.own_keys().iter().copied().chain(overrides).collect()
    }
}

/// Keys of `[default]` that only an upstream's section overrides.
const NOT_IN_RULES: &[&str] = &["grant_ttl", "grant_ttl_offline", "refresh_quota_floor"];

/// Renamed keys: old name, new name.
const RENAMED: &[(&str, &str)] = &[
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

/// Declares the sections, each as `Name "table": Struct { key: type = default, description; }`. The struct reads the
/// keys of the section; a default is written as in the file.
macro_rules! sections {
    ($(
        $(#[$doc:meta])*
        $section:ident $table:literal: $name:ident {
            $($key:ident: $type:ty $(= $default:literal)?, $description:literal;)*
        }
    )*) => {
        /// Section of the configuration file.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Section {
            $($(#[$doc])* $section,)*
        }

        impl Section {
            /// All sections, in the order of the documentation.
            pub const ALL: &[Self] = &[$(Self::$section),*];

            /// Table name; empty for the top.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$section => $table,)*
                }
            }

            /// Keys that are declared for this section, without overrides of the policy.
            fn own_keys(self) -> &'static [Key] {
                match self {
                    $(Self::$section => $name::KEYS,)*
                }
            }
        }

        $(
            pub(super) struct $name {
                $(pub(super) $key: Field<$type>,)*
            }

            impl $name {
                const KEYS: &[Key] = &[$(Key {
                    section: Section::$section,
                    name: stringify!($key),
                    default: [$(Some($default),)? None][0],
                    doc: $description,
                }),*];

                /// Reads all keys of the section of this file.
                #[allow(dead_code, reason = "not for sections that repeat")]
                pub(super) fn of(document: &Document<'_>, report: &mut Report<'_>) -> Self {
                    Self::read(&document.fixed(Section::$section), report)
                }

                /// Reads all keys; invalid values are reported.
                pub(super) fn read(table: &Table<'_>, report: &mut Report<'_>) -> Self {
                    Self {
                        $($key: table.read(stringify!($key), report),)*
                    }
                }
            }
        )*
    };
}

sections! {
    /// Before the first `[section]`.
    Top "": Top {
        data: Option<FilePath>, "Cache directory; one process at a time. Default: the user's cache directory, or /var/cache/ifnewer for root.";
        default_upstream: HostName = r#""docker.io""#, "Upstream of a request that names none, such as those of dockerd with `registry-mirrors`.";
    }
    /// `[listen]`
    Listen "listen": Listen {
        registry: List<Address> = r#"["127.0.0.1:5000"]"#, "Listen addresses for clients, or \"unix:/path\". Each accepts TLS and plain HTTP. Sockets passed by the service manager (LISTEN_FDS) replace them.";
        plain_http: PlainHttp = r#""loopback""#, "Clients that may connect without TLS: \"loopback\", \"any\" or \"off\".";
        proxy_protocol_from: List<Network> = "[]", "Networks of load balancers that send a PROXY protocol header (version 1 or 2). The header gives the client address and is mandatory from these networks.";
        admin: Admin = r#""127.0.0.1:5001""#, "Address of health checks, metrics and the admin API: an address, \"unix:/path\" or \"off\".";
        admin_token_file: Option<FilePath>, "File with the token of the admin API. Required if the admin address is reachable from other hosts.";
    }
    /// `[tls]`
    Tls "tls": Tls {
        folder: Option<FilePath> = r#""certs""#, "Directory of ca.pem, ca.key, server.pem and server.key, created at the first start; relative to this file. Without a configuration file: `certs` in the working directory if it is empty or holds a CA of this program, else `certs` in the cache directory.";
        names: List<CertificateName> = "[]", "Additional host names and addresses in the server certificate.";
        constrained: bool = "true", "Limit a new CA by name constraints to the cache's names and the upstream hosts configured at that time.";
        certificate: Option<FilePath>, "Your own server certificate, PEM with its chain; requires `key`.";
        key: Option<FilePath>, "Private key of `certificate`, PEM.";
    }
    /// `[store]`
    Store "store": Store {
        size: StoreSize = r#""50 GiB""#, "Maximum size of the cache. Least recently used images are evicted first.";
        free: Size = r#""5 GiB""#, "Minimum free space on the disk.";
        scrub: Rate = r#""20 MiB/s""#, "Read rate of the weekly scrub that verifies all cached content; or \"off\".";
    }
    /// `[shared]`
    Shared "shared": Shared {
        bucket: Option<BucketUrl>, "Bucket that several caches share, with an optional prefix: \"s3://name/prefix\". A blob or a manifest that this cache lacks is read from there before it is fetched from the upstream, and written there after it was fetched. Unset: no shared storage.";
        endpoint: Option<EndpointUrl>, "URL of the storage. Default: that of AWS in `region`. Requests are path-style.";
        region: Option<Region>, "Region of the bucket, required for AWS. Default: the variable AWS_REGION; with `endpoint`, else \"us-east-1\".";
        credentials: CredentialChoice = r#""environment""#, "Source of the credential: \"environment\" (the standard variables AWS_*: access key, web identity, container credentials), or \"instance\" (the metadata service of the virtual machine).";
        credentials_file: Option<FilePath>, "File with the id of the access key and the secret key, a line each; instead of `credentials`. Read again on SIGHUP.";
        write: bool = "true", "Whether this cache writes to the bucket.";
        claims: bool = "true", "Whether a blob or a manifest that several caches lack is fetched by one of them, while the others read what it fetches from the bucket. With write = false, this cache reads blobs that others fetch, requests manifests itself, and never fetches for others.";
        keep: Lifetime = r#""28d""#, "Age at which the bucket's lifecycle rule deletes objects. One that is read at more than half of it is written again.";
        first_byte_timeout: Timeout = r#""1s""#, "Time that a request for missing content waits for the bucket before it goes on to the upstream.";
        uploads_max: Count<64> = "3", "Maximum concurrent uploads. Each has a part of 5 MiB in memory.";
        key_file: Option<FilePath>, "File with the key of the records, 64 hexadecimal digits; further lines are keys that are replaced or will be. With the same key, caches share which digest a tag names and which repositories are public: for outages, `max_age`, `if-not-present`, `never` and `min_age`. Only its owner may access the file. Unset: no records. Read again on SIGHUP.";
        grants: bool = "false", "Whether caches also share which clients the upstreams have authorized, by password or by account (`local_tokens`), so that a private image is served in an outage by a cache that has not seen the client, for `grant_ttl_offline`; and which clients were denied since. Requires `key_file`; give all caches the same value. See docs/shared.md, grants of private repositories, first.";
        encryption: EncryptionChoice = r#""bucket""#, "Encryption at rest: \"bucket\" (the default of the bucket), \"sse-s3\", or \"sse-kms\" with `kms_key`.";
        kms_key: Option<KmsKey>, "ARN or id of the key for \"sse-kms\".";
        ca_file: Option<FilePath>, "PEM certificates to trust for the storage in addition to the system's.";
        insecure: bool = "false", "Whether an `http://` endpoint may be outside of the private network.";
        redirect: RedirectChoice = r#""never""#, "Whether a GET of a blob of 1 MiB or more is redirected to the bucket, by a presigned URL: \"never\", \"uncached\" (if the blob is not cached here) or \"always\".";
        redirect_ttl: Timeout = r#""60s""#, "How long the URL of a redirect is valid, at most an hour.";
        redirect_endpoint: Option<EndpointUrl>, "URL of the storage for clients that are redirected. Default: `endpoint`.";
        proxy: Proxy = r#""environment""#, "Proxy for requests to the storage: \"environment\" (HTTPS_PROXY, NO_PROXY), \"none\" or a URL.";
    }
    /// `[default]`
    Default "default": PolicyKeys {
        policy: Option<Policy> = r#""if-newer""#, "Pull policy: \"always\", \"if-newer\", \"if-not-present\" or \"never\".";
        max_age: Option<Lifetime> = r#""0s""#, "Freshness lifetime of a tag: after a revalidation, the tag is served for this long without another upstream request. With `key_file` in [shared], a revalidation by another cache counts too.";
        stale_if_error: Option<StaleLimit> = r#""forever""#, "Maximum time since the last revalidation at which a tag is still served while the upstream is unavailable: a duration or \"forever\".";
        revalidate_timeout: Option<Timeout> = r#""2s""#, "Time a client waits for a revalidation if a cached copy can be served instead.";
        on_not_found: Option<OnNotFound> = r#""refuse""#, "Response for a cached tag that the upstream reports as deleted (404): \"refuse\" or \"serve-stale\".";
        grant_ttl: Option<Lifetime> = r#""5m""#, "Lifetime of an authorization while the upstream is available, and of its referrers list for a cached manifest.";
        grant_ttl_offline: Option<Lifetime> = r#""12h""#, "Lifetime of an authorization while the upstream is unavailable.";
        prefetch: Option<bool> = "true", "Download all layers of an image once the first one is requested; or, if a tag moved and its old image was pulled here, once the new manifest is fetched.";
        refresh: Option<RefreshInterval> = r#""off""#, "How often tags in use are revalidated in the background: \"off\", or from \"1m\" to \"30d\". A tag that moved is fetched, so that the next pull finds it. The cache uses its own credential or, for public repositories, none.";
        refresh_used_within: Option<Lifetime> = r#""7d""#, "A tag is in use, and refreshed, if a client pulled it within this time.";
        refresh_quota_floor: Option<QuotaFloor> = r#""25%""#, "Share of the upstream's pull quota that is left to clients: below it, nothing is refreshed.";
        min_age: Option<MinAge> = r#""0s""#, "Minimum age: a tag is answered with the newest digest that it has named for at least this long, up to \"365d\". Counts from the time at which this cache, or with `key_file` in [shared] another one, first saw the tag name the digest or, if older, from the `Last-Modified` of its storage. \"0s\" for none. Pulls by digest: see `min_age_by_digest`.";
        on_unknown_age: Option<OnUnknownAge> = r#""refuse""#, "With `min_age`, the action for a digest that is new to this cache (with `key_file` in [shared], to all caches) and of which nothing shows the age: \"refuse\" until it is old enough here, or \"serve\".";
        min_age_by_digest: Option<bool> = "false", "Whether `min_age` applies to manifests requested by digest too. A digest is as old as under its oldest tag in the repository, or as its first request. The images of an index that was served are not delayed, and blobs never are.";
        trust_created: Option<bool> = "false", "With `min_age`, whether `created` in the config of an image is evidence of its age. Its publisher can write any time there.";
    }
    /// `[upstream."name"]`
    Upstream "upstream": Upstream {
        url: OneOrMany<UpstreamUrl>, "URL of the registry, or a list tried in order until one has the image. Default: https:// and the upstream's name.";
        repository_prefix: OneOrMany<RepositoryPrefix>, "Prefix of each repository name at the registry, for an upstream that is a project of another registry: \"hub-proxy\". A list has one prefix for each URL.";
        hosts: List<HostName>, "Additional host names of this upstream.";
        enabled: bool = "true", "If false, the upstream does not exist. Use it to remove a well-known upstream.";
        auth: AuthMode = r#""per-client""#, "Authorization of reads: \"per-client\", the upstream authorizes each client by its own credential; or \"shared\", every client that reaches the listener may read whatever the cache can read.";
        username: Option<UserName>, "User name of the cache's credential at this upstream; requires `password_file` and auth = \"shared\".";
        password_file: Option<FilePath>, "File with the password of `username`.";
        docker_config: Option<FilePath>, "Docker's config.json with the cache's credentials, by host and path, and credential helpers; requires auth = \"shared\".";
        credential_helper: Option<HelperName>, "Credential helper that supplies the cache's credential: \"ecr-login\" for docker-credential-ecr-login; requires auth = \"shared\".";
        token_hosts: List<HostName> = "[]", "Additional hosts that may receive credentials for this upstream: token services named by its challenges, and registries that it redirects to. Always allowed: its own host, token services of the same site, and for registry.k8s.io the hosts below pkg.dev.";
        local_tokens: Option<TokenServiceUrl>, "URL of the upstream's token service, as in \"https://auth.docker.io/token\". Clients reach that service through the cache. While it is unavailable, the cache issues local tokens for content that the client was authorized to read before. See docs/security.md first.";
        ca_file: Option<FilePath>, "PEM certificates to trust for this upstream in addition to the system's: CAs, or the server's certificate, self-signed or not.";
        client_certificate: Option<FilePath>, "Client certificate for this upstream, PEM with its chain; requires `client_key`. It is not sent to redirect targets or token services on other hosts.";
        client_key: Option<FilePath>, "Private key of `client_certificate`, PEM.";
        redirects: List<RedirectRule> = "[]", "Additional redirect targets: hosts, globs over hosts, networks; with http:// for plain HTTP. Without an entry, a redirect needs https and an address in the same scope as the registry or a wider one.";
        proxy: Proxy = r#""environment""#, "Proxy for requests to this upstream: \"environment\" (HTTPS_PROXY, NO_PROXY), \"none\" or a URL.";
        connect_timeout: Timeout = r#""3s""#, "Timeout for a connection to this upstream.";
        first_byte_timeout: Timeout = r#""25s""#, "Timeout from a request to its response header. Increase it for a registry that first fetches the content itself. If a cached copy exists, clients wait `revalidate_timeout` at most.";
    }
    /// `[[rule]]`
    Rule "rule": Rule {
        images: OneOrMany<ImagePattern>, "Globs over upstream/repository:tag; `*` also matches `/`. A glob with a tag does not apply to pulls by digest.";
    }
    /// `[access]`
    Access "access": Access {
        htpasswd: Option<FilePath>, "File with the users of the cache and their bcrypt password hashes.";
        client_ca: Option<FilePath>, "PEM certificates of the CAs that issue client certificates. Without this and `htpasswd`, every client that reaches the listener has access.";
    }
    /// `[[allow]]`
    Allow "allow": Allow {
        users: OneOrMany<UserPattern>, "Users of `access.htpasswd`, or names in client certificates. A trailing `*` matches any suffix.";
        images: OneOrMany<ImagePattern>, "Globs over upstream/repository that these users may pull; `*` also matches `/`. If there is any [[allow]], an image that none allows is denied.";
    }
    /// `[connect]`
    Connect "connect": Connect {
        tunnel: List<TunnelRule> = "[]", "Hosts, or globs over hosts, to which CONNECT may open a tunnel; port 443 unless another is given.";
    }
    /// `[log]`
    Log "log": Log {
        level: LogLevel = r#""info""#, "Log level: \"error\", \"warn\", \"info\", \"debug\", \"trace\", or a filter such as \"info,ifnewer::upstream=debug\".";
        format: LogFormat = r#""human""#, "Log format: \"human\" or \"json\".";
    }
    /// `[limits]`
    Limits "limits": Limits {
        connections_max: Count<MANY> = "4096", "Maximum concurrent connections. At the limit, the oldest connection without a request in flight is closed; if there is none, the new connection waits to be accepted. A low limit of file descriptors lowers this: each connection needs five.";
        connections_per_peer_max: Count<MANY> = "256", "Maximum concurrent connections of one client address (from the PROXY protocol header, if a balancer sends it). As many more wait; connections beyond those are closed.";
        streams_per_connection_max: Count<MANY> = "100", "Maximum concurrent requests on one HTTP/2 connection.";
        tunnels_max: Count<MANY> = "256", "Maximum concurrent CONNECT tunnels. Further requests get 503.";
        downloads_max: Count<MANY> = "256", "Maximum concurrent blob downloads from all upstreams. Further ones are queued. One upstream gets three quarters of them at most.";
        parallel_connections: Count<16> = "4", "Connections over which one large blob is fetched, if each further one raises the throughput and no other download waits for its permit. 1 turns that off.";
        parallel_min: ParallelSize = r#""64 MiB""#, "Smaller blobs are fetched over one connection; at least \"16 MiB\".";
        downloads_per_upstream_max: Count<MANY> = "64", "Maximum concurrent requests to one upstream, and as many blob downloads. Further ones are queued.";
        handshake_timeout: Timeout = r#""10s""#, "Timeout of a TLS handshake.";
        header_timeout: Timeout = r#""10s""#, "Timeout of a request header; for HTTP/1.1 it starts at the end of the previous response.";
        idle_timeout: Timeout = r#""60s""#, "Timeout of a connection in the queue of its address, of a tunnel without traffic, and of an unanswered HTTP/2 ping.";
        write_timeout: Timeout = r#""60s""#, "Timeout of a response of which the client reads no byte.";
        drain: Lifetime = r#""30s""#, "Time that requests in flight have to complete after SIGTERM.";
    }
}
