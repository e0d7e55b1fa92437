//! Raw sockets, for requests that no HTTP client would send.

use crate::registry::within;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// The bytes received until the peer closed.
#[derive(Clone, Debug)]
pub struct RawReply {
    pub text: String,
}

impl RawReply {
    /// The status of the first reply; `None` if the connection was closed without one.
    pub fn status(&self) -> Option<u16> {
        self.text.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()
    }

    /// The number of responses.
    pub fn replies(&self) -> usize {
        self.text.matches("HTTP/1.1 ").count()
    }
}

/// Sends these bytes and reads until the other side closes.
pub async fn raw(address: SocketAddr, bytes: &[u8]) -> RawReply {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The peer may respond and close before it has read everything.
    let _ = stream.write_all(bytes).await;
    let mut read = Vec::new();
    let _ = within("the connection to be closed", stream.read_to_end(&mut read)).await;
    RawReply {
        text: String::from_utf8_lossy(&read).into_owned(),
    }
}
