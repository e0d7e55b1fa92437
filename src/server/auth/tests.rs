#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
use super::*;

fn entry() -> Authenticator {
    entry_of(bcrypt::hash("secret", 5).unwrap(), Arc::default())
}

fn entry_of(hash: String, passwords: Arc<PasswordCache>) -> Authenticator {
    let user = User {
        name: "alice".to_owned(),
        hash,
    };
    let settings = Settings {
        users: vec![user],
        client_roots: Vec::new(),
        allows: Vec::new(),
    };
    Authenticator::new(&settings, [7; 32], passwords).unwrap()
}

/// A connection without credentials.
fn stranger() -> ConnectionInfo {
    ConnectionInfo {
        address: None,
        http_allowed: true,
        is_tls: true,
        server_name: None,
        connect: None,
        credentials: PeerCredentials::default(),
        idle_pause: crate::server::IdlePause::default(),
        connection: crate::server::connections::Handle::default(),
        sendfile: None,
        agent: crate::telemetry::LastAgent::default(),
    }
}

async fn who(entry: &Authenticator, head: &Parts) -> Result<Identity, Rejection> {
    entry
        .authenticate(
            head,
            &stranger(),
            CredentialHeader::Authorization,
            SystemTime::UNIX_EPOCH,
        )
        .await
}

fn head(authorization: &[&str]) -> Parts {
    let request = authorization
        .iter()
        .fold(http::Request::builder(), |request, line| {
            request.header(AUTHORIZATION, *line)
        });
    request.body(()).unwrap().into_parts().0
}

fn basic(pair: &str) -> String {
    format!("Basic {}", BASE64_STANDARD.encode(pair))
}

#[tokio::test]
async fn only_the_correct_password_authenticates() {
    let entry = entry();
    for _ in 0..2 {
        assert_eq!(
            who(&entry, &head(&[&basic("alice:secret")]))
                .await
                .unwrap()
                .name(),
            "alice"
        );
    }
    let (right, bearer) = (basic("alice:secret"), "Bearer secret".to_owned());
    for lines in [
        &[] as &[&str],
        &[&basic("alice:wrong")],
        &[&basic("alice:")],
        &[&basic("bob:secret")],
        &[&basic(":")],
        &["Basic !"],
        &[&bearer],
        &[&right, &right],
    ] {
        let refused = who(&entry, &head(lines)).await;
        assert!(matches!(refused, Err(Rejection::Unauthenticated)), "{lines:?}");
    }
}

#[tokio::test]
async fn verified_password_is_not_hashed_again() {
    let entry = entry();
    who(&entry, &head(&[&basic("alice:secret")])).await.unwrap();
    entry.passwords.checks.close();
    who(&entry, &head(&[&basic("alice:secret")])).await.unwrap();
    assert!(matches!(
        who(&entry, &head(&[&basic("alice:wrong")])).await,
        Err(Rejection::TooManyPasswordChecks)
    ));
}

#[tokio::test]
async fn o03_a_reload_keeps_a_verified_password_while_its_hash_stays() {
    let (hash, passwords) = (
        bcrypt::hash("secret", 5).unwrap(),
        Arc::<PasswordCache>::default(),
    );
    let before = entry_of(hash.clone(), Arc::clone(&passwords));
    who(&before, &head(&[&basic("alice:secret")])).await.unwrap();
    passwords.checks.close();
    let same = entry_of(hash, Arc::clone(&passwords));
    who(&same, &head(&[&basic("alice:secret")])).await.unwrap();
    let changed = entry_of(bcrypt::hash("other", 5).unwrap(), passwords);
    let refused = who(&changed, &head(&[&basic("alice:secret")])).await;
    assert!(
        matches!(refused, Err(Rejection::TooManyPasswordChecks)),
        "it is verified again"
    );
}

#[tokio::test]
async fn t17_a_wrong_password_is_hashed_once_and_stops_nobody() {
    let entry = entry();
    let stale = head(&[&basic("alice:stale")]);
    assert!(matches!(
        who(&entry, &stale).await,
        Err(Rejection::Unauthenticated)
    ));
    entry.passwords.checks.close();
    // No permit is taken for a known wrong credential.
    for _ in 0..3 {
        assert!(matches!(
            who(&entry, &stale).await,
            Err(Rejection::Unauthenticated)
        ));
    }
}

#[tokio::test]
async fn changed_password_is_checked_again_after_rejection() {
    let passwords = Arc::<PasswordCache>::default();
    let before = entry_of(bcrypt::hash("old", 5).unwrap(), Arc::clone(&passwords));
    let new = head(&[&basic("alice:new")]);
    assert!(matches!(
        who(&before, &new).await,
        Err(Rejection::Unauthenticated)
    ));
    let after = entry_of(bcrypt::hash("new", 5).unwrap(), passwords);
    who(&after, &new).await.unwrap();
}

#[tokio::test]
async fn t17_a_password_beyond_72_bytes_is_refused_and_never_cut() {
    let longest = "p".repeat(PASSWORD_BYTES_MAX);
    let entry = entry_of(bcrypt::hash(&longest, 5).unwrap(), Arc::default());
    who(&entry, &head(&[&basic(&format!("alice:{longest}"))]))
        .await
        .unwrap();
    // An unknown user too, so that the response does not reveal user names.
    for name in ["alice", "nobody"] {
        let refused = who(&entry, &head(&[&basic(&format!("{name}:{longest}p"))])).await;
        let Err(turned @ Rejection::PasswordTooLong { to_proxy: false }) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(turned.status(), http::StatusCode::UNAUTHORIZED);
        assert!(turned.to_string().contains("72 bytes"));
    }
    let mut connect = head(&[]);
    let line = basic(&format!("alice:{longest}p")).parse().unwrap();
    connect.headers.insert(PROXY_AUTHORIZATION, line);
    let refused = entry
        .authenticate(
            &connect,
            &stranger(),
            CredentialHeader::ProxyAuthorization,
            SystemTime::UNIX_EPOCH,
        )
        .await;
    let status = http::StatusCode::PROXY_AUTHENTICATION_REQUIRED;
    assert!(matches!(refused, Err(turned) if turned.status() == status));
}

#[test]
fn unknown_user_is_checked_against_a_full_hash() {
    assert!(!bcrypt::verify("x", &entry().dummy_hash).unwrap());
    assert!(
        entry().dummy_hash.starts_with("$2b$05$"),
        "same bcrypt cost as the users' hashes"
    );
}

#[tokio::test]
async fn proxy_authentication_ends_with_password_change() {
    let entry = entry();
    let mut connect = head(&[]);
    let line = basic("alice:secret").parse().unwrap();
    connect.headers.insert(PROXY_AUTHORIZATION, line);
    let mut peer = stranger();
    let credentials = entry
        .authenticate(
            &connect,
            &peer,
            CredentialHeader::ProxyAuthorization,
            SystemTime::UNIX_EPOCH,
        )
        .await
        .unwrap();
    peer.credentials.user = credentials.user();
    let within = |entry: Authenticator, peer: ConnectionInfo| async move {
        let head = head(&[&basic("robot:the-registrys")]);
        let who = entry
            .authenticate(&head, &peer, CredentialHeader::None, SystemTime::UNIX_EPOCH)
            .await;
        who.map(|who| who.name().to_owned())
    };
    assert_eq!(within(entry, peer.clone()).await.unwrap(), "alice");
    // A changed hash may be that of another password, so the authentication of the CONNECT no longer counts.
    let changed = self::entry();
    assert!(matches!(
        within(changed, peer).await,
        Err(Rejection::PasswordNotPossible)
    ));
    let dummy_hash = within(self::entry(), stranger()).await;
    assert!(matches!(dummy_hash, Err(Rejection::PasswordNotPossible)));
}
