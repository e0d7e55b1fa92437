//! Outbound proxy rules: whether a connection is direct or goes through a proxy.
//!
//! This is the only file of this layer that reads the environment (`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`,
//! `NO_PROXY`, in upper or lower case). Connections to loopback never use the environment's proxy, because some
//! clients are set up with a `HTTPS_PROXY` that points to ifnewer itself.

use http::{HeaderValue, Uri};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};

use super::no_proxy::NoProxy;
use super::origin::is_loopback;

/// The outbound proxy of an upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ProxyChoice {
    /// From the environment, read as curl does. The default.
    #[default]
    Environment,
    /// No proxy, whatever the environment says.
    None,
    /// This one: `http://`, `https://`, `socks5://` or `socks5h://`, optionally with `user:password@`.
    Url(String),
}

/// An unusable proxy URL. It may contain a password, so the message does not repeat it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the proxy must be an http://, https://, socks5:// or socks5h:// URL")]
pub struct ProxyError;

/// Proxy rules of one upstream.
#[derive(Debug)]
pub(super) struct ProxyRules {
    matcher: Option<Matcher>,
    without: NoProxy,
    /// The proxy is configured for this upstream, so it is also used for loopback addresses.
    named: bool,
}

/// The route to one destination.
#[derive(Clone, Debug)]
pub(super) enum ProxyRoute {
    /// A direct connection.
    Direct,
    /// Through an HTTP proxy that forwards each plain request (absolute form, RFC 9112 §3.2.2).
    Forward(Proxy),
    /// Through an HTTP proxy by `CONNECT`.
    Tunnel(Proxy),
    /// Through a SOCKS5 proxy, which resolves the name if `remote_dns`.
    Socks {
        proxy: Uri,
        login: Option<(String, String)>,
        remote_dns: bool,
    },
}

/// An HTTP proxy and its credential.
#[derive(Clone, Debug)]
pub(super) struct Proxy {
    pub(super) uri: Uri,
    pub(super) authorization: Option<HeaderValue>,
}

impl ProxyRules {
    pub(super) fn new(choice: &ProxyChoice) -> Result<ProxyRules, ProxyError> {
        match choice {
            ProxyChoice::Environment => {
                #[expect(clippy::disallowed_methods, reason = "standard proxy variables")]
                let variable = |name: &str| std::env::var(name).ok();
                Ok(ProxyRules::of_environment(variable))
            }
            ProxyChoice::None => Ok(ProxyRules {
                matcher: None,
                without: NoProxy::default(),
                named: false,
            }),
            ProxyChoice::Url(url) => {
                let matcher = Matcher::builder().all(url.as_str()).build();
                let understood = matcher.intercept(&Uri::from_static("https://registry.invalid/"));
                let understood = understood
                    .is_some_and(|found| !url.starts_with("socks4") && found.uri().host().is_some());
                if !understood {
                    return Err(ProxyError);
                }
                Ok(ProxyRules {
                    matcher: Some(matcher),
                    without: NoProxy::default(),
                    named: true,
                })
            }
        }
    }

    /// An empty variable counts as unset, so the other case applies. In a CGI program `HTTP_PROXY` is a client's
    /// header (CVE-2016-5385), so the environment is ignored there.
    fn of_environment(variable: impl Fn(&str) -> Option<String>) -> ProxyRules {
        let value = |name: &str| {
            let cases = [name.to_owned(), name.to_ascii_lowercase()];
            let values = cases.iter().filter_map(|name| variable(name));
            values
                .map(|value| value.trim().to_owned())
                .find(|value| !value.is_empty())
                .unwrap_or_default()
        };
        let matcher = variable("REQUEST_METHOD").is_none().then(|| {
            Matcher::builder()
                .all(value("ALL_PROXY"))
                .http(value("HTTP_PROXY"))
                .https(value("HTTPS_PROXY"))
                .build()
        });
        ProxyRules {
            matcher,
            without: NoProxy::read(&value("NO_PROXY")),
            named: false,
        }
    }

    /// The route to `destination`.
    pub(super) fn to(&self, destination: &Uri) -> ProxyRoute {
        let host = destination.host().unwrap_or_default();
        if !self.named && (is_loopback(host) || self.without.contains(destination)) {
            return ProxyRoute::Direct;
        }
        match self
            .matcher
            .as_ref()
            .and_then(|matcher| matcher.intercept(destination))
        {
            Some(found) => through(&found, destination),
            None => ProxyRoute::Direct,
        }
    }
}

fn through(found: &Intercept, destination: &Uri) -> ProxyRoute {
    let scheme = found.uri().scheme_str().unwrap_or("http");
    if scheme.starts_with("socks") {
        let login = found
            .raw_auth()
            .map(|(user, password)| (user.to_owned(), password.to_owned()));
        return ProxyRoute::Socks {
            proxy: found.uri().clone(),
            login,
            remote_dns: scheme == "socks5h",
        };
    }
    let mut authorization = found.basic_auth().cloned();
    if let Some(value) = &mut authorization {
        value.set_sensitive(true);
    }
    let proxy = Proxy {
        uri: found.uri().clone(),
        authorization,
    };
    if destination.scheme_str() == Some("https") {
        ProxyRoute::Tunnel(proxy)
    } else {
        ProxyRoute::Forward(proxy)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]
    use super::*;

    fn of(variables: &[(&str, &str)]) -> ProxyRules {
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
        ProxyRules::of_environment(|name| find(name).map(|(_, value)| (*value).to_owned()))
    }

    fn environment() -> ProxyRules {
        of(&[
            ("ALL_PROXY", "http://proxy.example:3128"),
            ("NO_PROXY", "corp.example"),
        ])
    }

    /// The variables, and the ports of the proxies for http and for https.
    type Row = (&'static [(&'static str, &'static str)], Option<u16>, Option<u16>);

    #[test]
    fn r11_empty_proxy_variable_is_unset() {
        let port = |routes: &ProxyRules, url| match routes.to(&Uri::from_static(url)) {
            ProxyRoute::Forward(proxy) | ProxyRoute::Tunnel(proxy) => proxy.uri.port_u16(),
            ProxyRoute::Direct | ProxyRoute::Socks { .. } => None,
        };
        #[rustfmt::skip]
        let table: &[Row] = &[
            (&[], None, None),
            (&[("HTTPS_PROXY", "http://p:1")], None, Some(1)),
            (&[("https_proxy", "http://p:1")], None, Some(1)),
            (&[("HTTPS_PROXY", ""), ("https_proxy", "http://p:1")], None, Some(1)),
            (&[("HTTPS_PROXY", " "), ("https_proxy", "http://p:1")], None, Some(1)),
            (&[("HTTP_PROXY", ""), ("http_proxy", "http://p:1")], Some(1), None),
            (&[("HTTPS_PROXY", "http://p:1"), ("https_proxy", "")], None, Some(1)),
            (&[("HTTPS_PROXY", "http://p:1"), ("https_proxy", "http://p:2")], None, Some(1)),
            (&[("ALL_PROXY", "http://p:1"), ("HTTP_PROXY", "http://p:2")], Some(2), Some(1)),
            (&[("ALL_PROXY", "http://p:1"), ("HTTP_PROXY", "")], Some(1), Some(1)),
            (&[("ALL_PROXY", "http://p:1"), ("NO_PROXY", ""), ("no_proxy", "reg.example")], None, None),
            (&[("ALL_PROXY", "http://p:1"), ("NO_PROXY", "reg.example"), ("no_proxy", "")], None, None),
            (&[("ALL_PROXY", "http://p:1"), ("NO_PROXY", "reg.example:443")], Some(1), None),
            (&[("ALL_PROXY", "http://p:1"), ("NO_PROXY", "*.example")], None, None),
            (&[("ALL_PROXY", "http://p:1"), ("REQUEST_METHOD", "GET")], None, None),
        ];
        for (variables, http, https) in table {
            let routes = of(variables);
            let ports = (
                port(&routes, "http://reg.example/"),
                port(&routes, "https://reg.example/"),
            );
            assert_eq!(ports, (*http, *https), "{variables:?}");
        }
    }

    #[test]
    fn environment_proxy_never_used_for_loopback() {
        for text in [
            "http://localhost:5000/",
            "http://127.0.0.1/",
            "https://[::1]/",
            "http://a.localhost/",
        ] {
            assert!(
                matches!(environment().to(&text.parse().unwrap()), ProxyRoute::Direct),
                "{text}"
            );
        }
    }

    #[test]
    fn proxy_tunnels_https_and_forwards_http() {
        let https = environment().to(&Uri::from_static("https://ghcr.io/"));
        assert!(matches!(https, ProxyRoute::Tunnel(proxy) if proxy.uri == "http://proxy.example:3128/"));
        assert!(matches!(
            environment().to(&Uri::from_static("http://reg.example/")),
            ProxyRoute::Forward(_)
        ));
    }

    #[test]
    fn no_proxy_is_respected() {
        assert!(matches!(
            environment().to(&Uri::from_static("https://reg.corp.example/")),
            ProxyRoute::Direct
        ));
    }

    #[test]
    fn configured_proxy_is_used_for_loopback() {
        let routes = ProxyRules::new(&ProxyChoice::Url("http://user:secret@127.0.0.1:3128".into())).unwrap();
        let ProxyRoute::Forward(proxy) = routes.to(&Uri::from_static("http://127.0.0.1:5000/")) else {
            panic!("not forwarded")
        };
        assert_eq!(proxy.authorization.as_ref().unwrap(), "Basic dXNlcjpzZWNyZXQ=");
        assert!(
            !format!("{proxy:?}").contains("dXNlcjpzZWNyZXQ="),
            "a credential is never shown"
        );
    }

    #[test]
    fn proxy_url_is_validated() {
        for url in [
            "http://proxy:3128",
            "https://proxy",
            "socks5://proxy:1080",
            "socks5h://u:p@proxy:1080",
            "proxy:3128",
        ] {
            assert!(ProxyRules::new(&ProxyChoice::Url(url.into())).is_ok(), "{url}");
        }
        for url in ["", "ftp://proxy", "socks4://proxy", "http://", "not a url"] {
            assert_eq!(
                ProxyRules::new(&ProxyChoice::Url(url.into())).err(),
                Some(ProxyError),
                "{url}"
            );
        }
    }

    #[test]
    fn proxy_none_is_direct() {
        let routes = ProxyRules::new(&ProxyChoice::None).unwrap();
        assert!(matches!(
            routes.to(&Uri::from_static("https://ghcr.io/")),
            ProxyRoute::Direct
        ));
    }
}
