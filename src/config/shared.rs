//! Section `[shared]`: the bucket that several caches share, its credential, and contradictory combinations.

pub(super) mod redirect;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use zeroize::Zeroizing;

use self::redirect::RedirectChoice;
use super::diagnostic::{Checked, Report, Reported, Subject};
use super::document::Document;
use super::policy::words;
use super::schema::Shared;
use super::value::{ValueError, invalid};
use super::{Proxy, Sources, files};
use crate::bucket::{BucketCredential, BucketSettings, Encryption, ObjectStorage};
use crate::shared::{RecordKeys, RecordSettings, RedirectSettings, SharedSettings};
use crate::upstream::ip_scope::IpScope;
use crate::upstream::{Origin, ProxyChoice};

/// Shortest `keep`: objects are renewed at half of it, and a lifecycle rule counts days.
const KEEP_MIN: Duration = Duration::from_secs(2 * 24 * 60 * 60);

/// Default of `redirect_ttl`.
const REDIRECT_TTL_DEFAULT: Duration = Duration::from_secs(60);

/// Credential services to which plain HTTP does not leave the machine's link: those of ECS and of EKS.
const CREDENTIAL_SERVICES: [IpAddr; 3] = [
    IpAddr::V4(Ipv4Addr::new(169, 254, 170, 2)),
    IpAddr::V4(Ipv4Addr::new(169, 254, 170, 23)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x23)),
];

/// Maximum length of a bucket name and of its prefix.
const NAME_BYTES_MAX: usize = 63;
const PREFIX_BYTES_MAX: usize = 512;

/// Settings of the shared storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedConfig {
    /// The bucket.
    pub bucket: BucketSettings,
    /// Whether this cache writes to the bucket.
    pub write: bool,
    /// Whether blobs are claimed, so that one of several caches fetches them.
    pub claims: bool,
    /// Age at which the bucket deletes objects. They are written again at half of it.
    pub keep: Duration,
    /// Concurrent uploads.
    pub uploads_max: usize,
    /// Keys of the records; without them, only bytes are shared.
    pub record_keys: Option<RecordKeys>,
    /// Whether there are grant records.
    pub grants: bool,
    /// Redirects of clients.
    pub redirect: RedirectSettings,
}

impl SharedConfig {
    /// The settings with this bucket opened.
    pub fn settings(&self, bucket: Arc<dyn ObjectStorage>) -> SharedSettings {
        SharedSettings {
            bucket,
            name: self.bucket.name().into(),
            write: self.write,
            claims: self.claims,
            wait_max: self.bucket.timeout,
            keep: self.keep,
            uploads_max: self.uploads_max,
            records: self.record_keys.clone().map(|keys| RecordSettings {
                keys,
                prefix: self.bucket.prefix.as_str().into(),
                grants: self.grants,
            }),
            redirect: self.redirect.clone(),
        }
    }
}

/// `s3://name/prefix`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BucketUrl {
    pub(super) name: String,
    pub(super) prefix: String,
}

/// Source of the credential.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case", expecting = "a choice")]
pub(super) enum CredentialChoice {
    Environment,
    Instance,
}

/// Encryption at rest.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case", expecting = "a choice")]
pub(super) enum EncryptionChoice {
    Bucket,
    SseS3,
    SseKms,
}

pub(super) fn bucket_url(text: &str) -> Result<BucketUrl, ValueError> {
    let example = r#"write it as in "s3://acme-images/team-a""#;
    let Some(rest) = text.strip_prefix("s3://") else {
        return invalid("a bucket begins with s3://", example);
    };
    let (name, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let is_name =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
    if name.len() < 3 || name.len() > NAME_BYTES_MAX || !name.bytes().all(is_name) {
        let help = "a name has 3 to 63 lower-case letters, digits, dots and hyphens";
        return invalid(format!("`{name}` is not the name of a bucket"), help);
    }
    if name.ends_with("--x-s3") {
        let message = "S3 Express One Zone is not supported";
        return invalid(message, "use a general purpose bucket");
    }
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    let is_segment = |segment: &str| {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        !matches!(segment, "" | "." | "..") && segment.bytes().all(is_plain)
    };
    if !prefix.is_empty() && (prefix.len() > PREFIX_BYTES_MAX || !prefix.split('/').all(is_segment)) {
        let help = "its parts are letters, digits, `-`, `_` and `.`, separated by single slashes";
        return invalid(format!("`{prefix}` is not a prefix for object names"), help);
    }
    Ok(BucketUrl {
        name: name.to_owned(),
        prefix: prefix.to_owned(),
    })
}

/// Base URL of a storage.
pub(super) fn endpoint_url(text: &str) -> Result<String, ValueError> {
    let example = r#"write it as in "https://s3.example.org""#;
    if text.contains('@') {
        let help = "use `credentials` or `credentials_file`";
        return invalid("a URL with a user or password is not accepted here", help);
    }
    match text.parse::<Origin>() {
        Ok(origin) => Ok(origin.to_string()),
        Err(error) => invalid(error.to_string(), example),
    }
}

/// `None` if no bucket is configured. `hosts`: the names by which clients reach this cache.
pub(super) fn read(
    document: &Document<'_>,
    sources: &Sources<'_>,
    hosts: &[&str],
    report: &mut Report<'_>,
) -> Checked<Option<SharedConfig>> {
    let keys = Shared::of(document, report);
    let Some(BucketUrl { name, prefix }) = keys.bucket.get()? else {
        return without_bucket(&keys, report);
    };
    if cfg!(not(feature = "shared")) {
        let message = "this program was built without the feature `shared`";
        let help = "remove the section, or build with --features shared";
        return Err(report.emit(&keys.bucket.subject, message, help));
    }
    let environment = |name: &str| {
        let found = sources.variables.iter().find(|(variable, _)| variable == name);
        found
            .map(|(_, value)| value.as_str())
            .filter(|value| !value.is_empty())
    };
    let region: Option<String> = keys.region.get()?.map(Into::into);
    let region = region.or_else(|| environment("AWS_REGION").map(ToOwned::to_owned));
    let endpoint = endpoint(&keys, region.as_deref(), report);
    let region = region.unwrap_or_else(|| "us-east-1".to_owned());
    let credential = credential(&keys, &region, &environment, report);
    let encryption = encryption(&keys, report);
    let roots = files::roots(&keys.ca_file, report);
    let record_keys = record_keys(&keys, report);
    let grants = keys.grants.get()?;
    if grants && !keys.key_file.is_set {
        let help = "add `key_file`, which keeps what identifies a client from whoever can read the bucket";
        report.emit(&keys.grants.subject, "`grants` without `key_file`", help);
    }
    let keep: Duration = keys.keep.get()?.into();
    if keep < KEEP_MIN {
        let message = format!(
            "{} is too short: objects are written again at half of it",
            words(keep)
        );
        report.emit(&keys.keep.subject, message, "write \"2d\" or more");
    }
    let write = keys.write.get()?;
    let endpoint = endpoint?;
    let (redirect, client_endpoint) = redirect::read(&keys, &endpoint, hosts, report)?;
    Ok(Some(SharedConfig {
        bucket: BucketSettings {
            bucket: name,
            prefix,
            endpoint,
            region,
            credential: credential?,
            encryption: encryption?,
            roots: roots?,
            proxy: match keys.proxy.get()? {
                Proxy::Environment => ProxyChoice::Environment,
                Proxy::None => ProxyChoice::None,
                Proxy::Url(url) => ProxyChoice::Url(url),
            },
            timeout: keys.first_byte_timeout.get()?.into(),
            client_endpoint,
        },
        write,
        claims: keys.claims.get()?,
        keep,
        uploads_max: keys.uploads_max.get()?.0,
        record_keys: record_keys?,
        grants,
        redirect,
    }))
}

/// Without a bucket, no other key may have a value other than its default.
fn without_bucket(keys: &Shared, report: &mut Report<'_>) -> Checked<Option<SharedConfig>> {
    let is_ttl_other = |ttl| Duration::from(ttl) != REDIRECT_TTL_DEFAULT;
    let set = [
        keys.endpoint.set(),
        keys.region.set(),
        keys.credentials_file.set(),
        keys.kms_key.set(),
        keys.ca_file.set(),
        keys.key_file.set(),
        keys.grants
            .set()
            .filter(|_| matches!(keys.grants.get(), Ok(true))),
        keys.redirect
            .set()
            .filter(|_| !matches!(keys.redirect.get(), Ok(RedirectChoice::Never))),
        keys.redirect_ttl
            .set()
            .filter(|_| keys.redirect_ttl.get().is_ok_and(is_ttl_other)),
        keys.redirect_endpoint.set(),
        keys.write.set().filter(|_| matches!(keys.write.get(), Ok(false))),
        keys.claims
            .set()
            .filter(|_| matches!(keys.claims.get(), Ok(false))),
    ];
    match set.into_iter().flatten().next() {
        None => Ok(None),
        Some(subject) => {
            let message = "`[shared]` without `bucket`";
            Err(report.emit(
                subject,
                message,
                r#"add bucket = "s3://name/prefix", or remove the section"#,
            ))
        }
    }
}

/// The endpoint, by default that of AWS in the region.
fn endpoint(keys: &Shared, region: Option<&str>, report: &mut Report<'_>) -> Checked<Origin> {
    let subject = &keys.endpoint.subject;
    let url = match (keys.endpoint.get()?, region) {
        (Some(url), _) => url.into(),
        (None, Some(region)) => format!("https://s3.{region}.amazonaws.com"),
        (None, None) => {
            let help = "add `region` for a bucket of AWS, or `endpoint` for another storage";
            return Err(report.emit(
                &keys.bucket.subject,
                "neither `region` nor `endpoint` is set",
                help,
            ));
        }
    };
    let origin = match url.parse::<Origin>() {
        Ok(origin) => origin,
        Err(error) => return Err(report.emit(subject, error.to_string(), "")),
    };
    let origin = check_transport(origin, subject, keys, report)?;
    if keys.insecure.get()? && !origin.is_plain() {
        let message = "`insecure` with an endpoint that uses https";
        return Err(report.emit(&keys.insecure.subject, message, "remove it"));
    }
    Ok(origin)
}

/// Plain HTTP is accepted within the private network.
fn check_transport(
    origin: Origin,
    subject: &Subject,
    keys: &Shared,
    report: &mut Report<'_>,
) -> Checked<Origin> {
    if origin.is_plain() && !keys.insecure.get()? && !is_local(origin.host()) {
        let message = "plain HTTP to a host that may be outside of the private network";
        let help = "write https://, or an address of the private network, or add insecure = true";
        return Err(report.emit(subject, message, help));
    }
    Ok(origin)
}

/// Whether a host is this machine, an address of a private network, or a name without a dot, which only a private
/// network resolves.
fn is_local(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    match bare.parse() {
        Ok(address) => matches!(IpScope::of(address), IpScope::Private | IpScope::Loopback),
        Err(_) => !bare.contains('.') || bare.ends_with(".localhost") || bare.ends_with(".internal"),
    }
}

fn encryption(keys: &Shared, report: &mut Report<'_>) -> Checked<Encryption> {
    match (keys.encryption.get()?, keys.kms_key.get()?) {
        (EncryptionChoice::SseKms, Some(key)) => Ok(Encryption::Kms(key.into())),
        (EncryptionChoice::SseKms, None) => {
            let message = "encryption = \"sse-kms\" without `kms_key`";
            Err(report.emit(&keys.encryption.subject, message, "add the ARN of the key"))
        }
        (_, Some(_)) => {
            let message = "`kms_key` without encryption = \"sse-kms\"";
            Err(report.emit(&keys.kms_key.subject, message, "remove one of the two"))
        }
        (EncryptionChoice::SseS3, None) => Ok(Encryption::S3),
        (EncryptionChoice::Bucket, None) => Ok(Encryption::Bucket),
    }
}

fn credential<'a>(
    keys: &Shared,
    region: &str,
    environment: &impl Fn(&str) -> Option<&'a str>,
    report: &mut Report<'_>,
) -> Checked<BucketCredential> {
    let choice = keys.credentials.get()?;
    if keys.credentials_file.is_set {
        if let Some(subject) = keys.credentials.set()
            && choice == CredentialChoice::Instance
        {
            let message = "`credentials` and `credentials_file` are two sources of one credential";
            return Err(report.emit(subject, message, "remove one of the two"));
        }
        return credentials_file(keys, report);
    }
    if choice == CredentialChoice::Instance {
        return Ok(BucketCredential::Instance);
    }
    let subject = keys.credentials.set().unwrap_or(&keys.bucket.subject);
    match of_environment(region, environment) {
        Ok(Some(credential)) => Ok(credential),
        // Only `serve` needs it, and other commands often run in another environment.
        Ok(None) => Ok(BucketCredential::Missing),
        Err(message) => Err(report.emit(subject, message, "")),
    }
}

/// Whether a host is this machine or a credential service on its link (ECS, EKS).
fn is_on_link(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    match bare.parse::<IpAddr>() {
        Ok(address) => address.is_loopback() || CREDENTIAL_SERVICES.contains(&address),
        Err(_) => bare.eq_ignore_ascii_case("localhost"),
    }
}

/// The keys of the records.
fn record_keys(keys: &Shared, report: &mut Report<'_>) -> Checked<Option<RecordKeys>> {
    let field = &keys.key_file;
    let Some((_, bytes)) = files::read_private(field, report)? else {
        return Ok(None);
    };
    let text = std::str::from_utf8(&bytes).unwrap_or("-");
    match RecordKeys::parse(text) {
        Ok(keys) => Ok(Some(keys)),
        Err(error) => {
            let help = "`ifnewer shared key new` prints a key; write a key a line, the one that signs first";
            Err(report.emit(&field.subject, error.to_string(), help))
        }
    }
}

/// The key id and the secret key, a line each.
fn credentials_file(keys: &Shared, report: &mut Report<'_>) -> Checked<BucketCredential> {
    let field = &keys.credentials_file;
    let Some((_, bytes)) = files::read(field, report)? else {
        return Err(Reported);
    };
    let lines: Option<Vec<&str>> = std::str::from_utf8(&bytes).ok().map(|text| {
        text.lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .collect()
    });
    let Some([id, secret]) = lines.as_deref() else {
        let message = "the file does not have two lines";
        let help = "write the id of the access key, then the secret key";
        return Err(report.emit(&field.subject, message, help));
    };
    key(id, secret, None).map_err(|message| report.emit(&field.subject, message, ""))
}

fn key(id: &str, secret: &str, token: Option<&str>) -> Result<BucketCredential, String> {
    let is_printable = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
    if !is_printable(id) || !is_printable(secret) || token.is_some_and(|token| !is_printable(token)) {
        return Err("the access key has characters that no access key has".to_owned());
    }
    Ok(BucketCredential::Key {
        id: id.to_owned(),
        secret: Zeroizing::new(secret.to_owned()),
        token: token.map(|token| Zeroizing::new(token.to_owned())),
    })
}

/// The credential that the standard variables name, in the order of the AWS SDKs. Without the metadata service.
fn of_environment<'a>(
    region: &str,
    environment: &impl Fn(&str) -> Option<&'a str>,
) -> Result<Option<BucketCredential>, String> {
    match (
        environment("AWS_ACCESS_KEY_ID"),
        environment("AWS_SECRET_ACCESS_KEY"),
    ) {
        (Some(id), Some(secret)) => return key(id, secret, environment("AWS_SESSION_TOKEN")).map(Some),
        (Some(_), None) => return Err("AWS_ACCESS_KEY_ID is set without AWS_SECRET_ACCESS_KEY".to_owned()),
        (None, Some(_)) => return Err("AWS_SECRET_ACCESS_KEY is set without AWS_ACCESS_KEY_ID".to_owned()),
        (None, None) => {}
    }
    let origin = |variable: &str, url: &str| {
        let uri: Option<http::Uri> = url.parse().ok();
        let origin = uri.and_then(|uri| {
            let base = format!("{}://{}", uri.scheme()?, uri.authority()?);
            base.parse::<Origin>().ok()
        });
        origin.ok_or_else(|| format!("{variable} is not a URL"))
    };
    if let Some((file, role)) = environment("AWS_WEB_IDENTITY_TOKEN_FILE").zip(environment("AWS_ROLE_ARN")) {
        let variable = "AWS_ENDPOINT_URL_STS";
        let sts =
            environment(variable).map_or_else(|| format!("https://sts.{region}.amazonaws.com"), Into::into);
        let sts = origin(variable, &sts)?;
        if sts.is_plain() {
            return Err(format!(
                "{variable} is not an https URL, and the web identity token would be sent in clear text"
            ));
        }
        return Ok(Some(BucketCredential::WebIdentity {
            token_file: file.into(),
            role: role.to_owned(),
            session: environment("AWS_ROLE_SESSION_NAME").map(ToOwned::to_owned),
            sts,
        }));
    }
    if let Some(path) = environment("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI") {
        if !path.starts_with('/') {
            return Err("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI does not begin with a slash".to_owned());
        }
        return Ok(Some(BucketCredential::Container {
            path: path.to_owned(),
        }));
    }
    let variable = "AWS_CONTAINER_CREDENTIALS_FULL_URI";
    if let Some((url, file)) =
        environment(variable).zip(environment("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"))
    {
        let service = origin(variable, url)?;
        if service.is_plain() && !is_on_link(service.host()) {
            return Err(format!(
                "{variable} is plain HTTP to another host than loopback, 169.254.170.2, 169.254.170.23 or fd00:ec2::23, \
                 and the token of the pod would be sent in clear text"
            ));
        }
        return Ok(Some(BucketCredential::Pod {
            url: url.to_owned(),
            origin: service,
            token_file: file.into(),
        }));
    }
    Ok(None)
}
