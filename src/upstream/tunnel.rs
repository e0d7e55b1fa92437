//! Dialer for CONNECT tunnels: direct connections, or through the environment's proxy. Their bytes are not read.

use http::Uri;

use super::connector::{ConnectorSettings, Transport, UpstreamConnector};
use super::dialer::Stream;
use super::ip_scope::IpScope;
use super::proxy_rules::{ProxyChoice, ProxyRules};
use super::settings::{SettingsError, Timeouts};
use crate::oci::failure::UpstreamFailure;

/// Opens the connections of tunnels.
#[derive(Clone)]
pub struct TunnelDialer(UpstreamConnector);

impl TunnelDialer {
    /// Opens no connection.
    pub fn new(transport: &Transport) -> Result<TunnelDialer, SettingsError> {
        let settings = ConnectorSettings {
            roots: &[],
            proxy_rules: ProxyRules::new(&ProxyChoice::Environment)?,
            origins: Vec::new(),
            hosts: Vec::new(),
            client_certificate: None,
            redirects: Vec::new(),
            connect_timeout: Timeouts::default().connect,
        };
        Ok(TunnelDialer(UpstreamConnector::new(transport, settings)?))
    }

    /// Opens a stream to a host and port. `UpstreamFailure::Redirects` if the address is narrower than `narrowest_scope`. The
    /// connected address is checked, so a name that changes between lookups bypasses nothing. A proxy that resolves names
    /// itself (all but `socks5://`) is asked for any name.
    pub async fn open(
        &self,
        host: &str,
        port: u16,
        narrowest_scope: IpScope,
    ) -> Result<Box<dyn Stream>, UpstreamFailure> {
        let host = if host.contains(':') {
            format!("[{host}]")
        } else {
            host.to_owned()
        };
        let to: Uri = format!("https://{host}:{port}/")
            .parse()
            .map_err(|_| UpstreamFailure::Malformed)?;
        self.0
            .connect_raw(&to, narrowest_scope)
            .await
            .map_err(|error| error.cause)
    }
}
