//! Shutdown: SIGTERM lets running pulls complete.

use crate::proxy::{Proxy, Setup};
use crate::registry::{Image, Upstream};

#[tokio::test]
async fn a_pull_under_way_is_finished_and_then_it_exits_0() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(1, 2_000_000));
    let mut proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    let layer = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, 1_000_000);
    let mut cold = proxy.blob("library/demo", &layer.digest).stream().await;
    gate.reached().await;

    proxy.terminate();
    proxy.until_closed().await;
    gate.release();
    assert!(cold.rest().await.expect("a whole body") == layer.bytes);
    assert_eq!(proxy.exit().await, Some(0), "{}", proxy.program().stderr());

    let proxy = proxy.setup().clone().start().await;
    proxy
        .blob("library/demo", &layer.digest)
        .await
        .is_blob(layer)
        .is_hit();
    assert_eq!(
        upstream.blob_gets(&layer.digest),
        1,
        "what was fetched while draining is held"
    );
}

#[tokio::test]
async fn an_idle_connection_does_not_delay_the_end() {
    let upstream = Upstream::start().await;
    let mut proxy = Proxy::over(&upstream).await;
    let mut session = crate::proxy::Session::open(proxy.registry_address()).await;
    assert_eq!(session.ask("GET", "/v2/").await.status, 200);
    let _mute = tokio::net::TcpStream::connect(proxy.registry_address())
        .await
        .unwrap();
    proxy.terminate();
    assert_eq!(proxy.exit().await, Some(0));
}

#[tokio::test]
async fn a_pull_that_never_ends_is_cut_when_the_time_is_over() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(2, 2_000_000));
    let mut proxy = Setup::over(&upstream)
        .tail("[limits]\ndrain = \"300ms\"")
        .start()
        .await;
    proxy.manifest("library/demo", "latest").await;
    let layer = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, 1_000_000);
    let mut cold = proxy.blob("library/demo", &layer.digest).stream().await;
    gate.reached().await;

    proxy.terminate();
    proxy.exit().await;
    assert!(
        cold.rest().await.is_err(),
        "a body that was cut is not a whole one"
    );
}

#[tokio::test]
async fn a_second_signal_ends_it_now() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(3, 2_000_000));
    let mut proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    let gate = upstream.holds_blob(&image.layer(0).digest, 1_000_000);
    let mut cold = proxy.blob("library/demo", &image.layer(0).digest).stream().await;
    gate.reached().await;

    proxy.terminate();
    proxy.until_closed().await;
    proxy.terminate();
    proxy.exit().await;
    assert!(cold.rest().await.is_err());
}

#[tokio::test]
async fn reload_during_drain_does_not_abort_a_pull() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::of_noise(4, 2_000_000));
    let mut proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await;
    let layer = image.layer(0);
    let gate = upstream.holds_blob(&layer.digest, 1_000_000);
    let mut cold = proxy.blob("library/demo", &layer.digest).stream().await;
    gate.reached().await;

    proxy.terminate();
    proxy.until_closed().await;
    proxy.program().reload();
    proxy.program().says("reload ignored during shutdown").await;
    gate.release();
    assert!(cold.rest().await.expect("a whole body") == layer.bytes);
    assert_eq!(proxy.exit().await, Some(0), "{}", proxy.program().stderr());
}
