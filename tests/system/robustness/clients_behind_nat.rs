//! Many clients behind one address: NAT, or a load balancer without the PROXY protocol.

use crate::proxy::{Proxy, Session, Setup, manifest_path};
use crate::registry::{Image, Upstream};

/// A cache with a limit of three connections per address.
async fn narrow() -> (Upstream, Proxy, Image) {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let limits = "[limits]\nconnections_per_peer_max = 3\n";
    let proxy = Setup::over(&upstream).tail(limits).start().await;
    (upstream, proxy, image)
}

#[tokio::test]
async fn r17_connections_beyond_the_limit_of_an_address_wait() {
    let (upstream, proxy, image) = narrow().await;
    let path = manifest_path("library/demo", "latest");
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut session = Session::open(proxy.registry_address()).await;
        session.ask("GET", &path).await.is_image(&image);
        open.push(session);
    }
    upstream.clear_log();
    // As many may wait. The rejection of one more shows that three are connected.
    let clients: Vec<_> = (0..4)
        .map(|_| tokio::spawn(proxy.manifest("library/demo", "latest").tried()))
        .collect();
    proxy
        .until(
            "one connection to be refused",
            |proxy| proxy.admin("/metrics"),
            |reply| String::from_utf8_lossy(&reply.body).contains("ifnewer_connections_refused_total 1\n"),
        )
        .await;
    // A response would have been confirmed by the upstream.
    assert_eq!(upstream.requests().len(), 0, "{:#?}", upstream.requests());
    drop(open);
    let mut answered = 0;
    for client in clients {
        if let Some(reply) = client.await.unwrap() {
            reply.is_image(&image);
            answered += 1;
        }
    }
    assert_eq!(answered, 3);
    assert_ne!(upstream.requests().len(), 0);
}

#[tokio::test]
async fn r17_a_refused_connection_is_logged_and_counted() {
    let (_upstream, proxy, image) = narrow().await;
    let path = manifest_path("library/demo", "latest");
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut session = Session::open(proxy.registry_address()).await;
        session.ask("GET", &path).await.is_image(&image);
        open.push(session);
    }
    // Three wait, and each further one is closed.
    let clients: Vec<_> = (0..6)
        .map(|_| tokio::spawn(proxy.manifest("library/demo", "latest").tried()))
        .collect();
    proxy
        .program()
        .says("raise limits.connections_per_peer_max")
        .await;
    proxy
        .until(
            "three connections to be counted",
            |proxy| proxy.admin("/metrics"),
            |reply| String::from_utf8_lossy(&reply.body).contains("ifnewer_connections_refused_total 3\n"),
        )
        .await;
    drop(open);
    let mut answered = 0;
    for client in clients {
        answered += usize::from(client.await.unwrap().is_some());
    }
    assert_eq!(answered, 3);
}
