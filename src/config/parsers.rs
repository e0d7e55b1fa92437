//! Types of values: how each is written, and the errors in it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use serde::de::{Deserialize, Deserializer, Error as _};

use super::address::{address, host, proxy_url, url};
use super::network::{Network, TunnelRule, network, redirect, tunnel};
use super::shared::{BucketUrl, bucket_url, endpoint_url};
use super::value::{Text, ValueError, Written, invalid, text};
use super::{Admin, Proxy};
use crate::oci::Repository;
use crate::policy::min_age::MIN_AGE_MAX;
use crate::policy::refresh::{INTERVAL_MAX, INTERVAL_MIN, QuotaFloor, RefreshInterval};
use crate::policy::rules::{ImagePattern, StaleLimit};
use crate::upstream::{HelperName, HelperNameError, RedirectRule};

/// Upper bound of numbers without a specific one.
pub(super) const MANY: usize = 1_000_000;

/// Minimum store size; a smaller one holds no image.
const STORE_BYTES_MIN: u64 = 1024 * 1024;

/// Smaller blobs gain nothing: the measurement before each further connection takes a quarter of a second.
const PARALLEL_BYTES_MIN: u64 = 16 * 1024 * 1024;

/// Whole number from 1 to `MAX`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Count<const MAX: usize>(pub(super) usize);

impl<'de, const MAX: usize> Deserialize<'de> for Count<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = i64::deserialize(deserializer)?;
        match usize::try_from(number) {
            Ok(count) if (1..=MAX).contains(&count) => Ok(Self(count)),
            _ => Err(D::Error::custom(format!("{number} is outside of 1 to {MAX}"))),
        }
    }
}

text! { struct Lifetime(Duration), "a duration", r#""5m""#, duration }

text! {
    /// Timeout; "0s" is rejected because every operation would fail.
    struct Timeout(Duration), "a duration", r#""10s""#, |text| match duration(text)? {
        Duration::ZERO => invalid("a timeout of zero would fail every request", r#"write a timeout, as in "10s""#),
        time => Ok(time),
    }
}

text! {
    /// Minimum age; "0s" for none.
    struct MinAge(Duration), "a duration", r#""3d""#, |text| match duration(text)? {
        age if age <= MIN_AGE_MAX => Ok(age),
        _ => invalid(format!("a minimum age of {text} is too long"), r#"write "365d" at most, or "0s" for none"#),
    }
}

text! { StaleLimit, "a duration or \"forever\"", r#""7d""#, |text| match text {
    "forever" => Ok(StaleLimit::Unlimited),
    text => duration(text).map(StaleLimit::Within),
} }

text! { RefreshInterval, "a duration or \"off\"", r#""1h""#, |text| {
    if text == "off" {
        return Ok(RefreshInterval::Off);
    }
    let interval = duration(text)?;
    if interval < INTERVAL_MIN {
        let message = format!("an interval of {text} is too short for a registry");
        return invalid(message, r#"write "1m" or more, or "off""#);
    }
    if interval > INTERVAL_MAX {
        return invalid(format!("an interval of {text} is too long"), r#"write "30d" or less, or "off""#);
    }
    Ok(RefreshInterval::Every(interval))
} }

text! { QuotaFloor, "a share in percent", r#""25%""#, |text| {
    let number = text.strip_suffix('%').map(str::trim_end);
    let Some(percent) = number.and_then(|number| number.parse::<u32>().ok()) else {
        let help = r#"write a whole number with its sign, as in "25%""#;
        return invalid(format!("`{text}` is not a share in percent"), help);
    };
    match u8::try_from(percent).ok().and_then(QuotaFloor::new) {
        Some(floor) => Ok(floor),
        None => invalid(format!("{percent}% is more than the quota"), r#"write "100%" or less"#),
    }
} }

text! { struct Size(u64), "a size", r#""50 GiB""#, size }

text! {
    /// Bytes per second; 0 for "off".
    struct Rate(u64), "a rate or \"off\"", r#""20 MiB/s""#, |text| {
        if text == "off" {
            return Ok(0);
        }
        let Some(bytes) = text.strip_suffix("/s") else {
            let help = r#"write bytes per second, as in "20 MiB/s", or "off""#;
            return invalid(format!("`{text}` is not a rate"), help);
        };
        match size(bytes.trim_end())? {
            0 => invalid("a rate of zero verifies nothing", r#"write "off""#),
            bytes => Ok(bytes),
        }
    }
}

text! { struct StoreSize(u64), "a size", r#""50 GiB""#, |text| {
    let bytes = size(text)?;
    if bytes >= STORE_BYTES_MIN {
        return Ok(bytes);
    }
    let message = format!("{} is too small to hold an image", ByteSize(bytes));
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        return invalid(message, format!("did you mean \"{text} GiB\"?"));
    }
    invalid(message, "a store holds at least \"1 MiB\"")
} }

text! { struct ParallelSize(u64), "a size", r#""64 MiB""#, |text| {
    let bytes = size(text)?;
    if bytes >= PARALLEL_BYTES_MIN {
        return Ok(bytes);
    }
    let message = format!("{} is less than a further connection is worth", ByteSize(bytes));
    invalid(message, "write \"16 MiB\" or more; `parallel_connections = 1` turns further connections off")
} }

/// Listen address of the registry.
#[derive(Clone, PartialEq)]
pub(super) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

text! { Address, "an address with its port, or \"unix:/path\"", r#""127.0.0.1:5000""#, |text| {
    match text.strip_prefix("unix:") {
        Some(path) => unix(path, "registry").map(Address::Unix),
        None => address(text).map(Address::Tcp),
    }
} }

text! { Admin, "an address with its port, \"unix:/path\" or \"off\"", r#""127.0.0.1:5001""#, |text| {
    match (text, text.strip_prefix("unix:")) {
        ("off", _) => Ok(Admin::Off),
        (_, Some(path)) => unix(path, "admin").map(Admin::Unix),
        (_, None) => address(text).map(Admin::Tcp),
    }
} }

fn unix(path: &str, example: &str) -> Result<PathBuf, ValueError> {
    if path.starts_with('/') {
        return Ok(PathBuf::from(path));
    }
    let help = format!("as in \"unix:/run/ifnewer/{example}.sock\"");
    invalid("the path of a unix socket must be absolute", help)
}

text! { Network, "a network", r#""10.0.0.0/8""#, network }

text! { TunnelRule, "a host or a glob over hosts", r#""auth.example.org""#, tunnel }

text! { RedirectRule, "a host or a network", r#""http://minio.internal:9000""#, redirect }

text! { struct FilePath(PathBuf), "a path", r#""/var/cache/ifnewer""#, |text| match text {
    "" => invalid("an empty path", "remove the key, or name a file or directory"),
    text if text.contains('\0') => invalid("a path cannot contain a NUL", "remove it"),
    text if text.starts_with('~') => invalid("`~` is not expanded here", "write the full path"),
    text => Ok(PathBuf::from(text)),
} }

text! { struct UpstreamUrl(String), "a URL", r#""https://registry.example.org""#, url }

text! {
    /// Repository prefix at another registry; empty: none.
    struct RepositoryPrefix(Option<Repository>), "the beginning of a repository's name", r#""hub-proxy""#, |text| {
        if text.is_empty() {
            return Ok(None);
        }
        if text.contains("://") {
            return invalid("the prefix is not a URL", "remove the scheme and the host");
        }
        let trimmed = text.trim_matches('/');
        if trimmed != text {
            return invalid("the prefix begins or ends with a slash", format!("write \"{trimmed}\""));
        }
        let help = r#"write it as it stands between the host and the image's own name, as in "hub-proxy""#;
        let prefix = text.parse().map(Some);
        prefix.or_else(|error| invalid(format!("not the beginning of a repository's name: {error}"), help))
    }
}

text! {
    /// Token service URL as it appears in challenges, with its path.
    struct TokenServiceUrl(String), "the URL of a token service", r#""https://auth.example.org/token""#, |text| {
        let text = url(text)?;
        if text.strip_prefix("https://").is_some_and(|rest| rest.contains('/')) {
            return Ok(text);
        }
        let message = "a token service URL needs https and a path, as in the upstream's challenges";
        invalid(message, r#"write the realm in full, as in "https://auth.example.org/token""#)
    }
}

text! { BucketUrl, "a bucket", r#""s3://acme-images/team-a""#, bucket_url }

text! { struct EndpointUrl(String), "a URL", r#""https://s3.example.org""#, endpoint_url }

text! { struct Region(String), "a region", r#""eu-central-1""#, |text| {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if text.is_empty() || text.len() > 63 || !text.bytes().all(is_plain) {
        return invalid(format!("`{text}` is not a region"), r#"write it as in "eu-central-1""#);
    }
    Ok(text.to_owned())
} }

text! { struct KmsKey(String), "the ARN or id of a key", r#""arn:aws:kms:eu-central-1:123456789012:key/1""#, |text| {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return invalid("not the ARN or id of a key", "remove the key to use the default of the bucket");
    }
    Ok(text.to_owned())
} }

text! { Proxy, "\"environment\", \"none\" or a URL", r#""http://proxy.example.org:3128""#, |text| match text {
    "environment" => Ok(Proxy::Environment),
    "none" => Ok(Proxy::None),
    text if text.contains("://") => proxy_url(text).map(Proxy::Url),
    text => Err(ValueError::no_choice(text, &["environment", "none"])),
} }

text! { struct HostName(String), "a host name", r#""registry.example.org""#, host }

text! {
    /// Host name or address in a certificate, without a port.
    struct CertificateName(String), "a host name or an address", r#""cache.example.org""#, |text| {
        if text.parse::<IpAddr>().is_err() {
            if text.contains(':') {
                return invalid(format!("`{text}` is not a name for a certificate"), "remove the scheme and the port");
            }
            host(text.strip_prefix("*.").unwrap_or(text))?;
        }
        Ok(text.to_owned())
    }
}

text! { struct UserName(String), "a user name", r#""robot""#, |text| {
    if text.is_empty() {
        return invalid("an empty user name", "remove the key to use no credential");
    }
    if text.contains(':') || text.chars().any(char::is_control) {
        let help = "put the password into a file and set `password_file`";
        return invalid("a user name cannot contain `:` or control characters", help);
    }
    Ok(text.to_owned())
} }

text! {
    /// User name (a URI in some certificates); a trailing `*` matches any suffix.
    struct UserPattern(String), "a user's name", r#""ci-*""#, |text| {
        let name = text.strip_suffix('*').unwrap_or(text);
        if text.is_empty() || name.contains('*') || name.chars().any(char::is_control) {
            let message = format!("`{text}` is not a user name");
            return invalid(message, "write a name, or a prefix with `*` as in \"ci-*\"");
        }
        Ok(text.to_owned())
    }
}

text! { HelperName, "the name of a credential helper", r#""ecr-login""#, |text| {
    let help = r#"write what follows `docker-credential-` in the program's name, as in "ecr-login""#;
    text.parse().or_else(|error: HelperNameError| invalid(error.to_string(), help))
} }

text! { ImagePattern, "a glob over images", r#""ghcr.io/acme/*:nightly-*""#, |text| {
    let help = r#"write it as in "ghcr.io/acme/*:nightly-*""#;
    ImagePattern::from_str(text).or_else(|error| invalid(error.to_string(), help))
} }

text! { struct LogLevel(String), "a level or a filter", r#""info""#, |text| {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let word = text.to_lowercase();
    if LEVELS.contains(&word.as_str()) {
        return Ok(word);
    }
    if !text.contains('=') && !text.contains(',') {
        // The filter syntax would read it as a target, and then nothing would be logged.
        return Err(ValueError::no_choice(text, &LEVELS));
    }
    let help = r#"write it as in "info,ifnewer::upstream=debug""#;
    let filter = tracing_subscriber::EnvFilter::builder().parse(text);
    filter.map(|_| text.to_owned()).or_else(|_| invalid(format!("`{text}` is not a filter"), help))
} }

fn duration(text: &str) -> Result<Duration, ValueError> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        let help = format!("did you mean \"{text}s\"?");
        return invalid(format!("the duration `{text}` has no unit"), help);
    }
    if text == "forever" {
        return invalid("`forever` is not valid here", "write a duration, as in \"30d\"");
    }
    let help = r#"write a number and its unit: "500ms", "30s", "5m", "12h", "7d""#;
    humantime::parse_duration(text).or_else(|_| invalid(format!("`{text}` is not a duration"), help))
}

fn size(text: &str) -> Result<u64, ValueError> {
    let help = r#"write a number and its unit: "500 MiB", "50 GiB", "1 TB""#;
    let size = ByteSize::from_str(text).map(|size| size.as_u64());
    size.or_else(|_| invalid(format!("`{text}` is not a size"), help))
}
