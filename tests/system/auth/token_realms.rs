//! Token realms with a wrong scheme: `http` behind a TLS-terminating load balancer.

use crate::proxy::{Setup, manifest_path};
use crate::registry::{Image, Upstream};

#[tokio::test]
async fn r16_a_http_realm_of_an_https_registry_is_asked_by_https() {
    let registry = Upstream::start_tls().await;
    let port = registry.address().port();
    registry.requires_token();
    registry.lets("amy", "pw", "team/app");
    let image = registry.push("team/app", "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&registry).start().await;
    for realm in [
        format!("http://127.0.0.1:{port}/token"),
        "http://127.0.0.1/token".to_owned(),
    ] {
        registry.names_realm(&realm);
        registry.expires_tokens();
        proxy
            .manifest("team/app", "latest")
            .basic("amy", "pw")
            .await
            .is_image(&image);
    }
    assert!(registry.token_requests().len() >= 2);
}

#[tokio::test]
async fn r16_no_credential_goes_to_a_realm_in_clear_text() {
    let (registry, plain) = (Upstream::start_tls().await, Upstream::start().await);
    let port = plain.address().port();
    registry.requires_token();
    registry.names_realm(&format!("http://localhost:{port}/token"));
    registry.push("team/app", "latest", Image::with_layers(&["one"]));
    let proxy = Setup::over(&registry).start().await;
    let reply = proxy
        .get(&manifest_path("team/app", "latest"))
        .basic("amy", "pw")
        .await;
    assert_eq!(reply.status, 502, "{reply:#?}");
    assert!(reply.message().contains("http://"), "{}", reply.message());
    assert_eq!(plain.requests().len(), 0, "nothing is said without TLS");
    proxy
        .program()
        .says("ask its operator to set the registry's external URL to https")
        .await;
}
