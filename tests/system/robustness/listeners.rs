//! Listeners: addresses, unix sockets, inherited sockets, certificates and the PROXY protocol.

use crate::proxy::{Program, Proxy, Session, Setup, manifest_path, raw};
use crate::registry::{Image, Upstream, within};
use rustix::io::{FdFlags, fcntl_setfd};
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// The response on a unix socket.
fn through(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(bytes).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    reply
}

const PING: &[u8] = b"GET /v2/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";

#[tokio::test]
async fn several_addresses_of_both_families_are_one_registry() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let socket = tempfile::tempdir().unwrap();
    let path = socket.path().join("registry.sock");
    let listen = format!(
        "registry = [\"127.0.0.1:0\", \"[::1]:0\", \"unix:{}\"]",
        path.display()
    );
    let proxy = Setup::over(&upstream).listen_keys(&listen).start().await;
    let line = proxy.program().prints("registry listening on [::1]:").await;
    let v6 = line.rsplit(' ').next().unwrap().parse().unwrap();
    proxy.pull("library/demo", "latest", &image).await;
    let mut session = Session::open(v6).await;
    session
        .ask("GET", &manifest_path("library/demo", "latest"))
        .await
        .is_image(&image)
        .is_hit();
    proxy
        .program()
        .prints(&format!("registry listening on unix:{}", path.display()))
        .await;
    assert!(through(&path, PING).starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn a_unix_socket_speaks_tls_too_and_is_gone_with_the_process() {
    let upstream = Upstream::start().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("registry.sock");
    // The socket file of a killed process.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let listen = format!("registry = [\"127.0.0.1:0\", \"unix:{}\"]", path.display());
    let mut proxy = Setup::over(&upstream).listen_keys(&listen).start().await;
    proxy.program().prints("registry listening on unix:").await;
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o666);
    // An invalid TLS handshake gets an alert, and not an HTTP response.
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(&[22, 3, 1, 0, 4, 1, 0, 0, 0]).unwrap();
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply);
    assert_eq!(reply.first(), Some(&21), "{reply:?}");
    proxy.terminate();
    assert_eq!(proxy.exit().await, Some(0));
    assert!(!path.exists());
}

#[tokio::test]
async fn what_is_no_socket_is_not_replaced() {
    let upstream = Upstream::start().await;
    let setup = Setup::over(&upstream);
    let file = setup.file("precious", "content");
    let listen = format!("registry = [\"unix:{}\"]", file.display());
    let setup = setup.listen_keys(&listen);
    let mut program = setup.serve();
    assert_eq!(program.exit().await, Some(1));
    assert!(
        program.stderr().contains("the file exists and is not a socket"),
        "{}",
        program.stderr()
    );
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "content");
}

#[tokio::test]
async fn both_wildcards_have_a_listener_each() {
    let upstream = Upstream::start().await;
    // A port that is probably free in both address families.
    let free = std::net::TcpListener::bind("[::]:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let listen = format!("registry = [\"0.0.0.0:{port}\", \"[::]:{port}\"]");
    let proxy = Setup::over(&upstream).listen_keys(&listen).start().await;
    for address in [format!("127.0.0.1:{port}"), format!("[::1]:{port}")] {
        let reply = raw(address.parse().unwrap(), PING).await;
        assert_eq!(reply.status(), Some(200), "{address}");
    }
    drop(proxy);
}

/// Starts the program with inherited sockets, as systemd does: descriptors from 3 on, named in the environment.
fn activated(setup: &Setup, sockets: &[BorrowedFd<'_>]) -> Program {
    let config = setup.file("ifnewer.toml", &setup.toml());
    let mut script = format!("export LISTEN_PID=$$ LISTEN_FDS={}\n", sockets.len());
    script += "exec \"$0\" serve --config \"$1\"";
    for (at, socket) in sockets.iter().enumerate() {
        fcntl_setfd(socket, FdFlags::empty()).unwrap();
        write!(script, " {}<&{}", at + 3, socket.as_raw_fd()).unwrap();
    }
    let arguments = [
        "-c",
        &script,
        env!("CARGO_BIN_EXE_ifnewer"),
        config.to_str().unwrap(),
    ];
    Program::start_with("bash", &arguments, setup.folder())
}

#[tokio::test]
async fn inherited_sockets_replace_configured_listeners() {
    let upstream = Upstream::start().await;
    // An address that cannot be bound, because it must not be tried.
    let setup = Setup::over(&upstream).listen_keys("registry = [\"192.0.2.1:1\"]");
    let path = setup.folder().join("handed.sock");
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let unix = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut program = activated(&setup, &[tcp.as_fd(), unix.as_fd()]);
    let address = program.announced("registry listening on ").await;
    assert_eq!(address, tcp.local_addr().unwrap());
    assert_eq!(raw(address, PING).await.status(), Some(200));
    program.prints("registry listening on unix:").await;
    assert!(through(&path, PING).starts_with("HTTP/1.1 200 "));
    program.terminate();
    assert_eq!(program.exit().await, Some(0));
    assert!(path.exists(), "the file is the service manager's");
}

/// The response to a request behind `header`.
async fn after(proxy: &Proxy, header: &[u8]) -> crate::proxy::RawReply {
    raw(proxy.registry_address(), &[header, PING].concat()).await
}

fn version_2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
    let length = u16::try_from(block.len()).unwrap().to_be_bytes();
    [b"\r\n\r\n\0\r\nQUIT\n", &[command, family][..], &length, block].concat()
}

#[tokio::test]
async fn a_balancer_that_is_trusted_says_who_the_client_is() {
    let upstream = Upstream::start().await;
    let proxy = Setup::over(&upstream)
        .listen_keys("proxy_protocol_from = [\"127.0.0.0/8\"]")
        .start()
        .await;
    let v4 = |address: [u8; 4]| [&address[..], &[127, 0, 0, 1], &[0, 80, 1, 187]].concat();
    // Plain HTTP is limited to local clients, by the address behind the load balancer.
    for (what, header, status) in [
        (
            "v1, local",
            b"PROXY TCP4 127.0.0.9 127.0.0.1 1 2\r\n".to_vec(),
            Some(200),
        ),
        (
            "v1, remote",
            b"PROXY TCP4 203.0.113.7 127.0.0.1 1 2\r\n".to_vec(),
            Some(403),
        ),
        (
            "v1, remote v6",
            b"PROXY TCP6 2001:db8::1 ::1 1 2\r\n".to_vec(),
            Some(403),
        ),
        (
            "v1, the balancer itself",
            b"PROXY UNKNOWN\r\n".to_vec(),
            Some(200),
        ),
        ("v2, local", version_2(0x21, 0x11, &v4([127, 0, 0, 9])), Some(200)),
        (
            "v2, remote",
            version_2(0x21, 0x11, &v4([203, 0, 113, 7])),
            Some(403),
        ),
        ("v2, the balancer itself", version_2(0x20, 0, &[]), Some(200)),
        ("none", Vec::new(), None),
        ("nonsense", b"PROXY TCP4 nobody 127.0.0.1 1 2\r\n".to_vec(), None),
        ("endless", [&b"PROXY UNKNOWN "[..], &[b'x'; 4096]].concat(), None),
        ("v2, too long", version_2(0x21, 0x11, &[0; 4096]), None),
        (
            "two of them",
            b"PROXY UNKNOWN\r\nPROXY UNKNOWN\r\n".to_vec(),
            Some(400),
        ),
    ] {
        let reply = after(&proxy, &header).await;
        assert_eq!(reply.status(), status, "{what}: {}", reply.text);
    }
}

#[tokio::test]
async fn from_elsewhere_it_is_not_believed() {
    let upstream = Upstream::start().await;
    let proxy = Setup::over(&upstream)
        .listen_keys("proxy_protocol_from = [\"192.0.2.0/24\"]")
        .start()
        .await;
    let reply = after(&proxy, b"PROXY TCP4 127.0.0.9 127.0.0.1 1 2\r\n").await;
    assert!(matches!(reply.status(), Some(400) | None), "{}", reply.text);
    assert_eq!(after(&proxy, b"").await.status(), Some(200));
}

#[tokio::test]
async fn a_header_that_never_ends_is_closed() {
    let upstream = Upstream::start().await;
    let proxy = Setup::over(&upstream)
        .listen_keys("proxy_protocol_from = [\"127.0.0.1\"]")
        .tail("[limits]\nheader_timeout = \"300ms\"")
        .start()
        .await;
    let reply = raw(proxy.registry_address(), b"PROXY TCP4 127.").await;
    assert_eq!(reply.status(), None, "{}", reply.text);
}

#[tokio::test]
async fn reloaded_certificate_applies_to_new_connections() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&upstream).start().await;
    let (old_ca, path) = (proxy.ca_pem(), manifest_path("library/demo", "latest"));
    let mut session = Session::open_tls(proxy.registry_address(), &old_ca).await;
    session.ask("GET", &path).await.is_image(&image);
    let download = proxy.get(&path).tls(&old_ca, &["h2"]).await;
    download.is_image(&image);

    let certs = proxy.setup().folder().join("certs");
    for file in ["ca.pem", "ca.key", "server.pem", "server.key"] {
        std::fs::remove_file(certs.join(file)).unwrap();
    }
    proxy.program().reload();
    within("the new certificate", async {
        while !certs.join("server.pem").exists() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    proxy.program().says("configuration reloaded").await;
    let new_ca = proxy.ca_pem();
    assert_ne!(old_ca, new_ca);
    proxy.get(&path).tls(&new_ca, &[]).await.is_image(&image);
    proxy.get(&path).tls(&old_ca, &[]).fails().await;
    let minted = proxy.get("/v2/").tls(&new_ca, &[]).server_name("docker.io");
    assert_eq!(minted.unchecked().await.status, 200);
    session.ask("GET", &path).await.is_image(&image).is_hit();
}
