//! Parsers of addresses, URLs and host names, with hints for common mistakes.

use std::borrow::Cow;
use std::net::{Ipv6Addr, SocketAddr};
use std::str::FromStr;

use http::uri::{Authority, Uri};

use super::value::{ValueError, invalid};

/// Port of https, which registry names omit.
const DEFAULT_PORT: u16 = 443;

/// Parses an IP address with a port.
pub(super) fn address(text: &str) -> Result<SocketAddr, ValueError> {
    if let Ok(address) = SocketAddr::from_str(text) {
        return Ok(address);
    }
    let port = text.rsplit(':').next().unwrap_or(text);
    let is_port = port.parse::<u16>().is_ok();
    let help = match text.rsplit_once(':') {
        Some(("" | "*", _)) if is_port => {
            format!("for every address of this host, write \"0.0.0.0:{port}\"")
        }
        Some(("localhost", _)) if is_port => format!("write \"127.0.0.1:{port}\""),
        None if is_port => format!("write \"127.0.0.1:{port}\" for this host alone"),
        None if text.parse::<std::net::IpAddr>().is_ok() => format!("the port is missing: \"{text}:5000\""),
        _ => r#"write an IP address and a port, as in "127.0.0.1:5000" or "[::1]:5000""#.to_owned(),
    };
    invalid(format!("`{text}` is not an address with a port"), help)
}

/// Parses an absolute http(s) URL; removes trailing slashes. Errors do not quote it, because it may contain a password.
pub(super) fn url(text: &str) -> Result<String, ValueError> {
    let example = r#"write it as in "https://registry.example.org""#;
    if !text.contains("://") {
        return invalid("the URL has no scheme", example);
    }
    if text.contains('#') || text.contains('?') {
        return invalid("an upstream's URL has no query and no fragment", example);
    }
    let Ok(uri) = Uri::from_str(text) else {
        return invalid("not a URL", example);
    };
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return invalid("an upstream's URL begins with https:// or http://", example);
    }
    if uri
        .authority()
        .is_none_or(|authority| authority.as_str().contains('@'))
    {
        return invalid(
            "a URL with a user or password is not accepted here",
            "use `username` and `password_file`, with auth = \"shared\"",
        );
    }
    if !uri.authority().is_some_and(is_host) {
        return invalid("the URL's host or port is wrong", example);
    }
    let text = text.trim_end_matches('/');
    if text.ends_with("/v2") {
        return invalid("`/v2` is added automatically", "remove `/v2`");
    }
    Ok(text.to_owned())
}

pub(super) fn proxy_url(text: &str) -> Result<String, ValueError> {
    let example = r#"write it as in "http://proxy.example.org:3128""#;
    let Ok(uri) = Uri::from_str(text) else {
        return invalid("not a URL", example);
    };
    if !matches!(uri.scheme_str(), Some("http" | "https" | "socks5" | "socks5h")) {
        return invalid(
            "a proxy's URL begins with http://, https:// or socks5://",
            example,
        );
    }
    match uri.authority() {
        Some(authority) if authority.as_str().contains('@') => invalid(
            "a URL with a user or password is not accepted here",
            "set HTTPS_PROXY for the process, and proxy = \"environment\"",
        ),
        Some(authority) if is_host(authority) => Ok(text.trim_end_matches('/').to_owned()),
        _ => invalid("the URL's host or port is wrong", example),
    }
}

/// Parses a host name as in image names, with a port unless it is the default.
pub(super) fn host(text: &str) -> Result<String, ValueError> {
    let example = r#"write it as in "registry.example.org" or "registry.example.org:5000""#;
    if text.contains("://") || text.contains('/') {
        return invalid(
            format!("`{}` is not a host name", without_secret(text)),
            "remove the scheme and the path",
        );
    }
    if text.chars().any(char::is_uppercase) {
        return invalid(
            format!("the host name `{text}` has capitals"),
            format!("write \"{}\"", text.to_lowercase()),
        );
    }
    match Authority::from_str(text) {
        Ok(authority) if is_host(&authority) => match authority.host().strip_suffix('.') {
            None => Ok(text.to_owned()),
            Some(name) => {
                let port = authority
                    .port()
                    .map_or_else(String::new, |port| format!(":{port}"));
                invalid(
                    format!("the host name `{text}` ends in a dot"),
                    format!("write \"{name}{port}\""),
                )
            }
        },
        _ => invalid(format!("`{}` is not a host name", without_secret(text)), example),
    }
}

/// Host name without the port; IPv6 address without brackets.
pub fn host_part(name: &str) -> &str {
    if let Some(address) = name.strip_prefix('[') {
        return address.split(']').next().unwrap_or(address);
    }
    name.split_once(':').map_or(name, |(host, _)| host)
}

/// Canonical form of a registry's host (RFC 3986 §6.2.2.1 and §6.2.3): lower case, without a trailing dot and without
/// port 443; an IPv6 address in its shortest form. `None` if the text is not a host with an optional port.
pub fn canonical(text: &str) -> Option<Cow<'_, str>> {
    // Most names are canonical, and each request has one at least: its host, or the first component of its path.
    let is_simple = |byte: u8| is_name_byte(byte) && !byte.is_ascii_uppercase();
    if !text.is_empty() && !text.ends_with('.') && text.bytes().all(is_simple) {
        return Some(Cow::Borrowed(text));
    }
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (address, port) = rest.split_once(']')?;
        (
            Cow::Owned(format!("[{}]", address.parse::<Ipv6Addr>().ok()?)),
            port,
        )
    } else {
        let (host, port) = text.split_at(text.find(':').unwrap_or(text.len()));
        (Cow::Borrowed(canonical_name(host)?), port)
    };
    let is_lower = !host.bytes().any(|byte| byte.is_ascii_uppercase());
    Some(match (host, port_or_usual(port)?) {
        (host, DEFAULT_PORT) if is_lower => host,
        // Most hosts with a port are canonical, and each request names one.
        (Cow::Borrowed(host), _) if is_lower && is_unpadded(text, host) => Cow::Borrowed(text),
        (host, DEFAULT_PORT) => Cow::Owned(host.to_ascii_lowercase()),
        (host, port) => Cow::Owned(format!("{}:{port}", host.to_ascii_lowercase())),
    })
}

/// Whether `text` is `host` and a port without leading zeros.
fn is_unpadded(text: &str, host: &str) -> bool {
    let port = text.strip_prefix(host).and_then(|after| after.strip_prefix(':'));
    port.is_some_and(|port| !port.starts_with('0'))
}

/// Parses `:port`; empty text is 443. `None` for other text.
fn port_or_usual(text: &str) -> Option<u16> {
    let digits = text.strip_prefix(':').unwrap_or(text);
    if digits.is_empty() {
        return Some(DEFAULT_PORT);
    }
    let is_port = text.starts_with(':') && digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|_| is_port)
}

/// Host name without a trailing dot.
fn canonical_name(host: &str) -> Option<&str> {
    let host = host.strip_suffix('.').unwrap_or(host);
    let is_name = !host.is_empty() && !host.ends_with('.') && host.bytes().all(is_name_byte);
    is_name.then_some(host)
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_')
}

/// Whether both names have the same canonical form.
pub(super) fn is_same_host(one: &str, other: &str) -> bool {
    one == other || canonical(one).is_some_and(|one| canonical(other).is_some_and(|other| one == other))
}

fn is_host(authority: &Authority) -> bool {
    let text = authority.as_str();
    let port_is_right = match text.strip_prefix(authority.host()) {
        Some("") => true,
        Some(port) => port
            .strip_prefix(':')
            .is_some_and(|port| port.parse::<u16>().is_ok()),
        None => false,
    };
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '_');
    !host.is_empty() && port_is_right && host.chars().all(allowed)
}

fn without_secret(text: &str) -> &str {
    text.rsplit('@').next().unwrap_or(text)
}

#[cfg(test)]
mod tests;
