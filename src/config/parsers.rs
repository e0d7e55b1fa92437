//! Value parsers: the syntax of each kind of value.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;

use super::address::{address, host, proxy_url, url};
use super::network::{Network, TunnelRule, network, redirect, tunnel};
use super::{Admin, AuthMode, LogFormat, PlainHttp, Proxy};
use crate::oci::Repository;
use crate::policy::min_age::{MIN_AGE_MAX, OnUnknownAge};
use crate::policy::refresh::{INTERVAL_MAX, INTERVAL_MIN, QuotaFloor, RefreshInterval};
use crate::policy::rules::{ImagePattern, StaleLimit};
use crate::policy::{OnNotFound, Policy};
use crate::upstream::{HelperName, HelperNameError, RedirectRule};

/// Parser of a value that is written as a string.
pub(super) struct ValueParser<T> {
    /// Kind of value, with its article.
    pub(super) expected: &'static str,
    /// Example, as written in the file.
    pub(super) example: &'static str,
    /// Parses the string.
    pub(super) parse: fn(&str) -> Result<T, ParseError>,
}

/// Why a string is not the expected value.
#[derive(Debug)]
pub(super) struct ParseError {
    pub(super) message: String,
    pub(super) help: Option<String>,
}

/// Builds an error from a message and a hint.
pub(super) fn invalid<T>(message: impl Into<String>, help: impl Into<String>) -> Result<T, ParseError> {
    Err(ParseError {
        message: message.into(),
        help: Some(help.into()),
    })
}

pub(super) const DURATION: ValueParser<Duration> = ValueParser {
    expected: "a duration",
    example: r#""5m""#,
    parse: duration,
};

pub(super) const STALE_LIMIT: ValueParser<StaleLimit> = ValueParser {
    expected: "a duration or \"forever\"",
    example: r#""7d""#,
    parse: |text| match text {
        "forever" => Ok(StaleLimit::Unlimited),
        text => duration(text).map(StaleLimit::Within),
    },
};

/// Interval of scheduled refreshes.
pub(super) const REFRESH: ValueParser<RefreshInterval> = ValueParser {
    expected: "a duration or \"off\"",
    example: r#""1h""#,
    parse: |text| match text {
        "off" => Ok(RefreshInterval::Off),
        text => match duration(text)? {
            interval if interval < INTERVAL_MIN => invalid(
                format!("an interval of {text} is too short for a registry"),
                r#"write "1m" or more, or "off""#,
            ),
            interval if interval > INTERVAL_MAX => invalid(
                format!("an interval of {text} is too long"),
                r#"write "30d" or less, or "off""#,
            ),
            interval => Ok(RefreshInterval::Every(interval)),
        },
    },
};

pub(super) const QUOTA_FLOOR: ValueParser<QuotaFloor> = ValueParser {
    expected: "a share in percent",
    example: r#""25%""#,
    parse: |text| {
        let percent = text.strip_suffix('%').map(str::trim_end);
        match percent.and_then(|percent| percent.parse::<u32>().ok()) {
            Some(percent) => match u8::try_from(percent).ok().and_then(QuotaFloor::new) {
                Some(floor) => Ok(floor),
                None => invalid(
                    format!("{percent}% is more than the quota"),
                    r#"write "100%" or less"#,
                ),
            },
            None => invalid(
                format!("`{text}` is not a share in percent"),
                r#"write a whole number with its sign, as in "25%""#,
            ),
        }
    },
};

/// Timeout; "0s" is rejected because every operation would fail.
pub(super) const TIMEOUT: ValueParser<Duration> = ValueParser {
    expected: "a duration",
    example: r#""10s""#,
    parse: |text| match duration(text)? {
        Duration::ZERO => invalid(
            "a timeout of zero would fail every request",
            r#"write a timeout, as in "10s""#,
        ),
        time => Ok(time),
    },
};

pub(super) const SIZE: ValueParser<u64> = ValueParser {
    expected: "a size",
    example: r#""50 GiB""#,
    parse: size,
};

/// Bytes per second; 0 for "off".
pub(super) const RATE: ValueParser<u64> = ValueParser {
    expected: "a rate or \"off\"",
    example: r#""20 MiB/s""#,
    parse: |text| match (text, text.strip_suffix("/s")) {
        ("off", _) => Ok(0),
        (_, Some(bytes)) => match size(bytes.trim_end())? {
            0 => invalid("a rate of zero verifies nothing", r#"write "off""#),
            bytes => Ok(bytes),
        },
        (text, None) => invalid(
            format!("`{text}` is not a rate"),
            r#"write bytes per second, as in "20 MiB/s", or "off""#,
        ),
    },
};

/// Minimum store size; a smaller one holds no image.
const STORE_BYTES_MIN: u64 = 1024 * 1024;

pub(super) const STORE_SIZE: ValueParser<u64> = ValueParser {
    expected: "a size",
    example: r#""50 GiB""#,
    parse: |text| match size(text)? {
        bytes if bytes < STORE_BYTES_MIN => {
            let help = if text.bytes().all(|b| b.is_ascii_digit()) {
                format!("did you mean \"{text} GiB\"?")
            } else {
                "a store holds at least \"1 MiB\"".to_owned()
            };
            invalid(format!("{} is too small to hold an image", ByteSize(bytes)), help)
        }
        bytes => Ok(bytes),
    },
};

/// Smaller blobs gain nothing: the measurement before each further connection takes a quarter of a second.
const PARALLEL_BYTES_MIN: u64 = 16 * 1024 * 1024;

pub(super) const PARALLEL_SIZE: ValueParser<u64> = ValueParser {
    expected: "a size",
    example: r#""64 MiB""#,
    parse: |text| match size(text)? {
        bytes if bytes < PARALLEL_BYTES_MIN => invalid(
            format!("{} is less than a further connection is worth", ByteSize(bytes)),
            "write \"16 MiB\" or more; `parallel_connections = 1` turns further connections off",
        ),
        bytes => Ok(bytes),
    },
};

/// Listen address of the registry.
pub(super) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

pub(super) const ADDRESS: ValueParser<Address> = ValueParser {
    expected: "an address with its port, or \"unix:/path\"",
    example: r#""127.0.0.1:5000""#,
    parse: |text| match text.strip_prefix("unix:") {
        Some(path) => unix(path).map(Address::Unix),
        None => address(text).map(Address::Tcp),
    },
};

fn unix(path: &str) -> Result<PathBuf, ParseError> {
    if path.starts_with('/') {
        return Ok(PathBuf::from(path));
    }
    invalid(
        "the path of a unix socket must be absolute",
        r#"as in "unix:/run/ifnewer/registry.sock""#,
    )
}

pub(super) const NETWORK: ValueParser<Network> = ValueParser {
    expected: "a network",
    example: r#""10.0.0.0/8""#,
    parse: network,
};

pub(super) const TUNNEL: ValueParser<TunnelRule> = ValueParser {
    expected: "a host or a glob over hosts",
    example: r#""auth.example.org""#,
    parse: tunnel,
};

pub(super) const REDIRECT: ValueParser<RedirectRule> = ValueParser {
    expected: "a host or a network",
    example: r#""http://minio.internal:9000""#,
    parse: redirect,
};

pub(super) const ADMIN: ValueParser<Admin> = ValueParser {
    expected: "an address with its port, \"unix:/path\" or \"off\"",
    example: r#""127.0.0.1:5001""#,
    parse: |text| match (text, text.strip_prefix("unix:")) {
        ("off", _) => Ok(Admin::Off),
        (_, Some(path)) if path.starts_with('/') => Ok(Admin::Unix(PathBuf::from(path))),
        (_, Some(_)) => invalid(
            "the path of a unix socket must be absolute",
            r#"as in "unix:/run/ifnewer/admin.sock""#,
        ),
        (text, None) => address(text).map(Admin::Tcp),
    },
};

pub(super) const PLAIN_HTTP: ValueParser<PlainHttp> = ValueParser {
    expected: "a choice",
    example: r#""loopback""#,
    parse: |text| {
        let choices = [
            ("loopback", PlainHttp::Loopback),
            ("any", PlainHttp::Any),
            ("off", PlainHttp::Off),
        ];
        choice(text, &choices)
    },
};

pub(super) const POLICY: ValueParser<Policy> = ValueParser {
    expected: "a policy",
    example: r#""if-newer""#,
    parse: |text| choice(text, &Policy::ALL.map(|policy| (policy.name(), policy))),
};

/// Minimum age; "0s" for none.
pub(super) const MIN_AGE: ValueParser<Duration> = ValueParser {
    expected: "a duration",
    example: r#""3d""#,
    parse: |text| match duration(text)? {
        age if age > MIN_AGE_MAX => invalid(
            format!("a minimum age of {text} is too long"),
            r#"write "365d" at most, or "0s" for none"#,
        ),
        age => Ok(age),
    },
};

pub(super) const ON_UNKNOWN_AGE: ValueParser<OnUnknownAge> = ValueParser {
    expected: "a choice",
    example: r#""refuse""#,
    parse: |text| choice(text, &OnUnknownAge::ALL.map(|action| (action.name(), action))),
};

pub(super) const ON_NOT_FOUND: ValueParser<OnNotFound> = ValueParser {
    expected: "a choice",
    example: r#""refuse""#,
    parse: |text| choice(text, &OnNotFound::ALL.map(|absence| (absence.name(), absence))),
};

pub(super) const AUTH: ValueParser<AuthMode> = ValueParser {
    expected: "a choice",
    example: r#""per-client""#,
    parse: |text| {
        choice(
            text,
            &[("per-client", AuthMode::PerClient), ("shared", AuthMode::Shared)],
        )
    },
};

pub(super) const LOG_FORMAT: ValueParser<LogFormat> = ValueParser {
    expected: "a choice",
    example: r#""human""#,
    parse: |text| choice(text, &[("human", LogFormat::Human), ("json", LogFormat::Json)]),
};

pub(super) const LOG_LEVEL: ValueParser<String> = ValueParser {
    expected: "a level or a filter",
    example: r#""info""#,
    parse: log_level,
};

pub(super) const PATH: ValueParser<PathBuf> = ValueParser {
    expected: "a path",
    example: r#""/var/cache/ifnewer""#,
    parse: |text| match text {
        "" => invalid("an empty path", "remove the key, or name a file or directory"),
        text if text.contains('\0') => invalid("a path cannot contain a NUL", "remove it"),
        text if text.starts_with('~') => invalid("`~` is not expanded here", "write the full path"),
        text => Ok(PathBuf::from(text)),
    },
};

pub(super) const URL: ValueParser<String> = ValueParser {
    expected: "a URL",
    example: r#""https://registry.example.org""#,
    parse: url,
};

/// Repository prefix at another registry; empty: none.
pub(super) const REPOSITORY_PREFIX: ValueParser<Option<Repository>> = ValueParser {
    expected: "the beginning of a repository's name",
    example: r#""hub-proxy""#,
    parse: |text| {
        let example = r#"write it as it stands between the host and the image's own name, as in "hub-proxy""#;
        if text.is_empty() {
            return Ok(None);
        }
        if text.contains("://") {
            return invalid("the prefix is not a URL", "remove the scheme and the host");
        }
        if text.starts_with('/') || text.ends_with('/') {
            let trimmed = text.trim_matches('/');
            return invalid(
                "the prefix begins or ends with a slash",
                format!("write \"{trimmed}\""),
            );
        }
        match text.parse::<Repository>() {
            Ok(prefix) => Ok(Some(prefix)),
            Err(error) => invalid(
                format!("not the beginning of a repository's name: {error}"),
                example,
            ),
        }
    },
};

/// Token service URL as it appears in challenges, with its path.
pub(super) const REALM: ValueParser<String> = ValueParser {
    expected: "the URL of a token service",
    example: r#""https://auth.example.org/token""#,
    parse: |text| {
        let text = url(text)?;
        let rest = text.strip_prefix("https://");
        let has_path = rest.and_then(|rest| rest.split_once('/')).is_some();
        if has_path {
            return Ok(text);
        }
        invalid(
            "a token service URL needs https and a path, as in the upstream's challenges",
            r#"write the realm in full, as in "https://auth.example.org/token""#,
        )
    },
};

pub(super) const PROXY: ValueParser<Proxy> = ValueParser {
    expected: "\"environment\", \"none\" or a URL",
    example: r#""http://proxy.example.org:3128""#,
    parse: |text| match text {
        "environment" => Ok(Proxy::Environment),
        "none" => Ok(Proxy::None),
        text if text.contains("://") => proxy_url(text).map(Proxy::Url),
        text => choice(
            text,
            &[("environment", Proxy::Environment), ("none", Proxy::None)],
        ),
    },
};

pub(super) const HOST: ValueParser<String> = ValueParser {
    expected: "a host name",
    example: r#""registry.example.org""#,
    parse: host,
};

/// Host name or address in a certificate, without a port.
pub(super) const CERTIFICATE_NAME: ValueParser<String> = ValueParser {
    expected: "a host name or an address",
    example: r#""cache.example.org""#,
    parse: |text| match text.parse::<std::net::IpAddr>() {
        Ok(_) => Ok(text.to_owned()),
        Err(_) if text.contains(':') => invalid(
            format!("`{text}` is not a name for a certificate"),
            "remove the scheme and the port",
        ),
        Err(_) => host(text.strip_prefix("*.").unwrap_or(text)).map(|_| text.to_owned()),
    },
};

pub(super) const USERNAME: ValueParser<String> = ValueParser {
    expected: "a user name",
    example: r#""robot""#,
    parse: |text| match text {
        "" => invalid("an empty user name", "remove the key to use no credential"),
        text if text.contains(':') || text.chars().any(char::is_control) => invalid(
            "a user name cannot contain `:` or control characters",
            "put the password into a file and set `password_file`",
        ),
        text => Ok(text.to_owned()),
    },
};

/// User name (a URI in some certificates); a trailing `*` matches any suffix.
pub(super) const USER: ValueParser<String> = ValueParser {
    expected: "a user's name",
    example: r#""ci-*""#,
    parse: |text| {
        let name = text.strip_suffix('*').unwrap_or(text);
        if text.is_empty() || name.contains('*') || name.chars().any(char::is_control) {
            return invalid(
                format!("`{text}` is not a user name"),
                "write a name, or a prefix with `*` as in \"ci-*\"",
            );
        }
        Ok(text.to_owned())
    },
};

pub(super) const HELPER: ValueParser<HelperName> = ValueParser {
    expected: "the name of a credential helper",
    example: r#""ecr-login""#,
    parse: |text| {
        let help = r#"write what follows `docker-credential-` in the program's name, as in "ecr-login""#;
        text.parse()
            .or_else(|error: HelperNameError| invalid(error.to_string(), help))
    },
};

pub(super) const PATTERN: ValueParser<ImagePattern> = ValueParser {
    expected: "a glob over images",
    example: r#""ghcr.io/acme/*:nightly-*""#,
    parse: |text| match ImagePattern::from_str(text) {
        Ok(pattern) => Ok(pattern),
        Err(error) => invalid(error.to_string(), r#"write it as in "ghcr.io/acme/*:nightly-*""#),
    },
};

/// Renamed choices: old name, new name.
const RENAMED_CHOICES: &[(&str, &str)] = &[
    ("serve", "serve-stale"),
    ("proven", "per-client"),
    ("nobody", "off"),
];

/// Parses a choice; the error names the nearest choice and all choices.
pub(super) fn choice<T: Clone>(text: &str, choices: &[(&'static str, T)]) -> Result<T, ParseError> {
    if let Some((_, value)) = choices.iter().find(|(name, _)| *name == text) {
        return Ok(value.clone());
    }
    let names = choices.iter().map(|(name, _)| *name);
    if let Some((_, new)) = RENAMED_CHOICES.iter().find(|(old, _)| *old == text)
        && names.clone().any(|name| name == *new)
    {
        return invalid(format!("`{text}` is now `{new}`"), format!("write \"{new}\""));
    }
    let quoted: Vec<String> = names.clone().map(|name| format!("\"{name}\"")).collect();
    let help = match nearest(&text.replace('_', "-"), names) {
        Some(name) => format!("did you mean \"{name}\"?"),
        None => format!("the choices are {}", quoted.join(", ")),
    };
    invalid(format!("`{text}` is none of {}", quoted.join(", ")), help)
}

/// Nearest candidate by edit distance; `None` if none is close.
pub(super) fn nearest<'a>(text: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let text = text.to_lowercase();
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&text, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= candidate.chars().count().max(3) / 3)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

fn duration(text: &str) -> Result<Duration, ParseError> {
    let bare = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match humantime::parse_duration(text) {
        Ok(duration) if !bare => Ok(duration),
        _ if bare => invalid(
            format!("the duration `{text}` has no unit"),
            format!("did you mean \"{text}s\"?"),
        ),
        _ if text == "forever" => invalid("`forever` is not valid here", "write a duration, as in \"30d\""),
        _ => invalid(
            format!("`{text}` is not a duration"),
            r#"write a number and its unit: "500ms", "30s", "5m", "12h", "7d""#,
        ),
    }
}

fn size(text: &str) -> Result<u64, ParseError> {
    match ByteSize::from_str(text) {
        Ok(size) => Ok(size.as_u64()),
        Err(_) => invalid(
            format!("`{text}` is not a size"),
            r#"write a number and its unit: "500 MiB", "50 GiB", "1 TB""#,
        ),
    }
}

fn log_level(text: &str) -> Result<String, ParseError> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let word = text.to_lowercase();
    if LEVELS.contains(&word.as_str()) {
        return Ok(word);
    }
    if !text.contains('=') && !text.contains(',') {
        // The filter syntax would read it as a target, and then nothing would be logged.
        return choice(text, &LEVELS.map(|level| (level, level.to_owned())));
    }
    match tracing_subscriber::EnvFilter::builder().parse(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => invalid(
            format!("`{text}` is not a filter"),
            r#"write it as in "info,ifnewer::upstream=debug""#,
        ),
    }
}
