//! A way to hosts that are no upstreams: bytes that are carried and not read.

use http::Uri;

use super::dial::{Connector, Stream};
use super::line::{Line, LineSettings};
use super::route::{ProxyChoice, Routes};
use super::settings::{SettingsError, Timeouts};
use super::zone::Zone;
use crate::oci::cause::Cause;

/// The way out of a tunnel: straight, or through the proxy of the environment.
#[derive(Clone)]
pub struct Way(Line);

impl Way {
    /// Makes no connection.
    pub fn new(connector: &Connector) -> Result<Way, SettingsError> {
        let settings = LineSettings {
            roots: &[],
            routes: Routes::new(&ProxyChoice::Environment)?,
            origins: Vec::new(),
            hosts: Vec::new(),
            client_certificate: None,
            redirects: Vec::new(),
            patience: Timeouts::default().connect,
        };
        Ok(Way(Line::new(connector, settings)?))
    }

    /// A stream to a host and port, no nearer than `nearest`; [`Cause::Redirects`] if it were. A name is judged by the
    /// address that is connected to, so one that changes its mind gains nothing.
    pub async fn open(&self, host: &str, port: u16, nearest: Zone) -> Result<Box<dyn Stream>, Cause> {
        let host = if host.contains(':') {
            format!("[{host}]")
        } else {
            host.to_owned()
        };
        let to: Uri = format!("https://{host}:{port}/")
            .parse()
            .map_err(|_| Cause::Malformed)?;
        self.0.raw(&to, nearest).await.map_err(|error| error.cause)
    }
}
