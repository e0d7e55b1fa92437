//! Many clients behind one address: NAT, or a balancer that does not say whom it stands for.

use crate::proxy::{Proxy, Session, Setup, manifest_path};
use crate::upstream::{Image, Upstream};

/// A cache that lets three connections of an address in at a time.
async fn narrow() -> (Upstream, Proxy, Image) {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let limits = "[limits]\nconnections_per_peer_max = 3\n";
    let proxy = Setup::over(&upstream).tail(limits).start().await;
    (upstream, proxy, image)
}

#[tokio::test]
async fn r17_connections_beyond_the_limit_of_an_address_wait() {
    let (_upstream, proxy, image) = narrow().await;
    let path = manifest_path("library/demo", "latest");
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut session = Session::open(proxy.registry_address()).await;
        session.ask("GET", &path).await.is_image(&image);
        open.push(session);
    }
    // Two further ones are answered once places are free, in whatever order.
    let waiting: Vec<_> = (0..2)
        .map(|_| tokio::spawn(proxy.manifest("library/demo", "latest").into_reply()))
        .collect();
    proxy
        .until(
            "five connections",
            |proxy| proxy.admin("/healthz"),
            |reply| reply.status == 200,
        )
        .await;
    assert!(waiting.iter().all(|client| !client.is_finished()));
    drop(open);
    for client in waiting {
        client.await.unwrap().is_image(&image);
    }
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
    // Three wait; of the others each is closed.
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
