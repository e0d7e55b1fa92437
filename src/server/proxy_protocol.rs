//! PROXY protocol v1/v2 parser (haproxy, "The PROXY protocol").
//!
//! The parser is strict, because the address decides on plain HTTP and on connection limits. It accepts exactly one
//! header of the specified form and reads no byte beyond it. Headers are read only from trusted load balancers, which
//! must send one.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt};

/// §2.1: longest v1 header, with CR LF.
const V1_BYTES_MAX: usize = 107;
/// §2.2: signature of a v2 header.
const V2_SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Limit for addresses and attributes of a v2 header. Load balancers send some 100 bytes.
const V2_BYTES_MAX: usize = 2048;

/// The client's address. `None` if the load balancer itself opened the connection (`LOCAL`, `UNKNOWN`).
pub(super) async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<SocketAddr>> {
    let mut start = [0; 12];
    from.read_exact(&mut start).await?;
    if start == V2_SIGNATURE {
        let mut rest = [0; 4];
        from.read_exact(&mut rest).await?;
        let [version_and_command, family, high, low] = rest;
        let length = usize::from(u16::from_be_bytes([high, low]));
        if length > V2_BYTES_MAX {
            return Err(invalid("PROXY v2 header is too long"));
        }
        let mut block = vec![0; length];
        from.read_exact(&mut block).await?;
        return version_2(version_and_command, family, &block);
    }
    let mut line = start.to_vec();
    while !line.ends_with(b"\r\n") {
        if line.len() >= V1_BYTES_MAX {
            return Err(invalid("PROXY v1 header is too long"));
        }
        line.push(from.read_u8().await?);
    }
    version_1(&line)
}

fn version_1(line: &[u8]) -> io::Result<Option<SocketAddr>> {
    let not_one = || invalid("invalid PROXY v1 header");
    let text = std::str::from_utf8(line).map_err(|_| not_one())?;
    let text = text
        .strip_prefix("PROXY ")
        .and_then(|text| text.strip_suffix("\r\n"))
        .filter(|text| !text.contains(['\r', '\n']))
        .ok_or_else(not_one)?;
    if text == "UNKNOWN" || text.starts_with("UNKNOWN ") {
        return Ok(None);
    }
    let words: Vec<_> = text.split(' ').collect();
    let [family, source, destination, source_port, destination_port] = words[..] else {
        return Err(not_one());
    };
    let address = |text: &str| -> Option<IpAddr> {
        match family {
            "TCP4" => text.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
            "TCP6" => text.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
            _ => None,
        }
    };
    let port = |text: &str| -> Option<u16> {
        let canonical = text == "0" || !text.starts_with(['0', '+']);
        text.parse().ok().filter(|_| canonical)
    };
    let read = || {
        address(destination)?;
        port(destination_port)?;
        Some(SocketAddr::new(address(source)?, port(source_port)?))
    };
    read().map(Some).ok_or_else(not_one)
}

fn version_2(version_and_command: u8, family: u8, block: &[u8]) -> io::Result<Option<SocketAddr>> {
    match version_and_command {
        0x20 => return Ok(None),
        0x21 => {}
        _ => return Err(invalid("unknown version or command in PROXY v2 header")),
    }
    let short = || invalid("PROXY v2 header is too short for its addresses");
    match family {
        // AF_INET and AF_INET6, STREAM; then source, destination, source port, destination port.
        0x11 => {
            let source: [u8; 4] = part(block, 0).ok_or_else(short)?;
            let [high, low] = part(block, 8).ok_or_else(short)?;
            part::<2>(block, 10).ok_or_else(short)?;
            Ok(Some(
                (Ipv4Addr::from(source), u16::from_be_bytes([high, low])).into(),
            ))
        }
        0x21 => {
            let source: [u8; 16] = part(block, 0).ok_or_else(short)?;
            let [high, low] = part(block, 32).ok_or_else(short)?;
            part::<2>(block, 34).ok_or_else(short)?;
            Ok(Some(
                (Ipv6Addr::from(source), u16::from_be_bytes([high, low])).into(),
            ))
        }
        // UNSPEC: no address.
        0x00 => Ok(None),
        _ => Err(invalid("PROXY v2 header for a protocol other than TCP")),
    }
}

fn part<const N: usize>(block: &[u8], at: usize) -> Option<[u8; N]> {
    block.get(at..at + N)?.try_into().ok()
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use proptest::prelude::*;

    use super::*;

    /// The parsed address, and the bytes left unread.
    fn understood(bytes: &[u8]) -> (io::Result<Option<SocketAddr>>, Vec<u8>) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut rest = bytes;
        let read = runtime.block_on(read(&mut rest));
        (read, rest.to_vec())
    }

    fn second(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
        let length = u16::try_from(block.len()).unwrap().to_be_bytes();
        [&V2_SIGNATURE[..], &[command, family], &length, block].concat()
    }

    #[test]
    fn v1_header_gives_client_address_and_reads_no_further() {
        for (line, address) in [
            (
                "PROXY TCP4 203.0.113.7 10.0.0.1 56324 443",
                Some("203.0.113.7:56324"),
            ),
            (
                "PROXY TCP6 2001:db8::7 2001:db8::1 1 65535",
                Some("[2001:db8::7]:1"),
            ),
            ("PROXY UNKNOWN", None),
            ("PROXY UNKNOWN ffff::1 ffff::2 1 2", None),
        ] {
            let (read, rest) = understood(format!("{line}\r\nGET / HTTP/1.1\r\n").as_bytes());
            assert_eq!(
                read.unwrap(),
                address.map(|address| address.parse().unwrap()),
                "{line}"
            );
            assert_eq!(rest, b"GET / HTTP/1.1\r\n", "{line}");
        }
    }

    #[test]
    fn v2_header_gives_client_address_and_reads_no_further() {
        let v4 = [&[203, 0, 113, 7, 10, 0, 0, 1][..], &[0, 80, 1, 187]].concat();
        let with_attributes = [&v4[..], &[0x04, 0, 1, 9]].concat();
        let mut v6 = vec![0; 36];
        v6[15] = 1;
        v6[33] = 80;
        for (bytes, address) in [
            (second(0x21, 0x11, &v4), Some("203.0.113.7:80")),
            (second(0x21, 0x11, &with_attributes), Some("203.0.113.7:80")),
            (second(0x21, 0x21, &v6), Some("[::1]:80")),
            (second(0x20, 0x00, &[]), None),
            (second(0x20, 0x11, &v4), None),
            (second(0x21, 0x00, &[]), None),
        ] {
            let (read, rest) = understood(&[&bytes[..], &[0x16, 3, 1]].concat());
            assert_eq!(
                read.unwrap(),
                address.map(|address| address.parse().unwrap()),
                "{bytes:?}"
            );
            assert_eq!(rest, [0x16, 3, 1]);
        }
    }

    #[test]
    fn malformed_header_is_rejected() {
        let long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(200));
        for bytes in [
            &b"GET /v2/ HTTP/1.1\r\n\r\n"[..],
            b"PROXY TCP4 203.0.113.7 10.0.0.1 56324\r\n",
            b"PROXY TCP4 203.0.113.7 10.0.0.1 56324 443 1\r\n",
            b"PROXY TCP4  203.0.113.7 10.0.0.1 56324 443\r\n",
            b"PROXY TCP4 2001:db8::7 10.0.0.1 56324 443\r\n",
            b"PROXY TCP6 203.0.113.7 10.0.0.1 56324 443\r\n",
            b"PROXY TCP4 203.0.113.7 10.0.0.1 65536 443\r\n",
            b"PROXY TCP4 203.0.113.7 10.0.0.1 +1 443\r\n",
            b"PROXY TCP4 203.0.113.7 10.0.0.1 01 443\r\n",
            b"PROXY TCP4 203.0.113.7 10.0.0.1 1\n443\r\n",
            b"PROXY UDP4 203.0.113.7 10.0.0.1 1 443\r\n",
            b"proxy TCP4 203.0.113.7 10.0.0.1 1 443\r\n",
            b"PROXY UNKNOWNx\r\n",
            long.as_bytes(),
            &second(0x11, 0x11, &[0; 12]),
            &second(0x22, 0x11, &[0; 12]),
            &second(0x21, 0x12, &[0; 12]),
            &second(0x21, 0x11, &[0; 11]),
            &second(0x21, 0x21, &[0; 35]),
            &second(0x21, 0x11, &[0; V2_BYTES_MAX + 1]),
            b"PROXY TCP4",
        ] {
            assert!(
                understood(bytes).0.is_err(),
                "{:?}",
                String::from_utf8_lossy(bytes)
            );
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic_or_over_read(bytes in proptest::collection::vec(any::<u8>(), 0..300), version_2: bool) {
            let bytes = if version_2 { [&V2_SIGNATURE[..], &bytes].concat() } else { bytes };
            let (read, rest) = understood(&bytes);
            prop_assert!(read.is_err() || bytes.len() - rest.len() <= 16 + V2_BYTES_MAX);
        }
    }
}
