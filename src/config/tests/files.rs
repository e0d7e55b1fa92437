//! Files that settings name.

use crate::config::{Config, Credential};

#[test]
fn credential_file_is_read_and_never_printed() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("password"), "s3cret\n").unwrap();
    let text =
        "[upstream.\"ghcr.io\"]\nauth = \"shared\"\nusername = \"robot\"\npassword_file = \"password\"";
    let config = Config::read(text, &folder.path().join("ifnewer.toml")).unwrap();
    let credential = config.upstream("ghcr.io").unwrap().credential.as_ref().unwrap();
    let file = folder.path().join("password");
    let username = "robot".to_owned();
    assert_eq!(*credential, Credential::Password { username, file });
    assert!(!format!("{config:?}").contains("s3cret"));
    assert!(config.summary().to_string().contains("shared, as robot"));
    assert!(!config.summary().to_string().contains("s3cret"));
}

#[test]
fn invalid_docker_config_is_reported_without_secrets() {
    let folder = tempfile::tempdir().unwrap();
    let text = "[upstream.\"ghcr.io\"]\nauth = \"shared\"\ndocker_config = \"config.json\"";
    let told = |content: &str| {
        std::fs::write(folder.path().join("config.json"), content).unwrap();
        let read = Config::read(text, &folder.path().join("ifnewer.toml"));
        read.map(|config| config.summary().to_string())
            .map_err(|faults| faults.to_string())
    };
    assert!(
        told(r#"{"auths":{"ghcr.io":{"auth":"cm9ib3Q6czNjcmV0"}}}"#)
            .unwrap()
            .contains("config.json says")
    );
    for (content, why) in [
        (
            "{\"auths\":{\"ghcr.io\":{\"auth\":\"s3cret",
            "line 1 is not valid in docker's configuration",
        ),
        (
            r#"{"auths":{"ghcr.io":{"auth":"czNjcmV0"}}}"#,
            "`auth` of `ghcr.io` is not the base64",
        ),
        (
            r#"{"credHelpers":{"ghcr.io":"/bin/s3cret x"}}"#,
            "cannot be the name of a credential helper",
        ),
    ] {
        let faults = told(content).unwrap_err();
        assert!(faults.contains(why), "{faults}");
    }
    assert!(
        !told(r#"{"auths":{"ghcr.io":{"auth":"czNjcmV0"}}}"#)
            .unwrap_err()
            .contains("czNjcmV0")
    );
}

#[test]
fn htpasswd_users_are_read_or_rejected() {
    let folder = tempfile::tempdir().unwrap();
    let hash = "$2y$10$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW";
    let told = |users: &str, more: &str| {
        std::fs::write(folder.path().join("users"), users).unwrap();
        let text = format!("[access]\nhtpasswd = \"users\"\n{more}");
        let read = Config::read(&text, &folder.path().join("ifnewer.toml"));
        read.map_err(|faults| faults.to_string())
    };
    let list = "[[allow]]\nusers = [\"alice\", \"ci-*\"]\nimages = [\"docker.io/*\"]";
    let config = told(&format!("# ours\nalice:{hash}\n\nci-7:{hash}\n"), list).unwrap();
    assert!(!format!("{config:?}").contains("CCCC"));
    let allow = &config.access.as_ref().unwrap().allows[0];
    assert!(
        allow.applies_to("alice")
            && allow.applies_to("ci-7")
            && !allow.applies_to("alice2")
            && !allow.applies_to("ci")
    );
    assert!(config.summary().to_string().contains("2 users, 1 allow list"));

    let weak = hash.replace("$10$", "$04$");
    for (users, more, why) in [
        ("\n".to_owned(), "", "the file has no users"),
        (format!("a:{hash}\na:{hash}"), "", "line 2: `a` is listed twice"),
        (
            "a:{SHA}canary".to_owned(),
            "",
            "line 1: the hash of `a` is not a bcrypt hash",
        ),
        (
            "canary".to_owned(),
            "",
            "line 1 is not a name, a colon and a hash",
        ),
        (
            format!("a:{weak}"),
            "",
            "line 1: the hash of `a` has cost 4, outside of 5 to 14",
        ),
        (
            format!("a:{hash}"),
            "[listen]\nplain_http = \"any\"",
            "passwords would cross the network in plain text",
        ),
        (
            format!("a:{hash}"),
            "[[allow]]\nusers = [\"a\"]",
            "an allow list without `images` has no effect",
        ),
        (
            format!("a:{hash}"),
            "[[allow]]\nusers = [\"a\"]\nimages = [\"docker.io/x:1\"]",
            "an allow list applies to repositories",
        ),
        (
            format!("a:{hash}"),
            "[[allow]]\nusers = [\"a\"]\nimages = [\"docker.oi/x\"]",
            "docker.oi",
        ),
    ] {
        let faults = told(&users, more).unwrap_err();
        assert!(faults.contains(why), "{faults}");
        assert!(!faults.contains("canary") && !faults.contains("CCCC"), "{faults}");
    }
    let alone = Config::read(
        "[[allow]]\nusers = [\"a\"]\nimages = [\"docker.io/*\"]",
        &folder.path().join("f"),
    );
    assert!(alone.unwrap_err().to_string().contains("[[allow]] without users"));
}

#[test]
fn client_ca_works_alone_or_with_htpasswd() {
    let folder = tempfile::tempdir().unwrap();
    let make = || {
        let made = rcgen::generate_simple_self_signed(["ca".to_owned()]).unwrap();
        made.cert.pem()
    };
    let told = |pem: &str, more: &str| {
        std::fs::write(folder.path().join("clients.pem"), pem).unwrap();
        let text = format!("[access]\nclient_ca = \"clients.pem\"\n{more}");
        let read = Config::read(&text, &folder.path().join("ifnewer.toml"));
        read.map_err(|faults| faults.to_string())
    };
    // Without passwords, plain HTTP is allowed.
    let list = "[[allow]]\nusers = [\"spiffe://example.org/*\"]\nimages = [\"docker.io/*\"]\n[listen]\nplain_http = \"any\"";
    let config = told(&(make() + &make()), list).unwrap();
    let access = config.access.as_ref().unwrap();
    assert_eq!((access.users.len(), access.client_roots.len()), (0, 2));
    assert!(access.allows[0].applies_to("spiffe://example.org/ci") && !access.allows[0].applies_to("ci"));
    assert!(
        config
            .summary()
            .to_string()
            .contains("0 users, certificates of 2 CAs, 1 allow list")
    );
    for (pem, why) in [
        ("", "the file has no certificate"),
        ("-----BEGIN CERTIFICATE-----\n?", "the file is not PEM"),
    ] {
        let faults = told(pem, "").unwrap_err();
        assert!(faults.contains(why) && faults.contains("client_ca"), "{faults}");
    }
}

#[test]
fn a_bundle_of_certificates_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let make = || {
        rcgen::generate_simple_self_signed(["ca".to_owned()])
            .unwrap()
            .cert
    };
    let (one, two) = (make(), make());
    std::fs::write(
        folder.path().join("ca.pem"),
        format!("# ours\n{}{}", one.pem(), two.pem()),
    )
    .unwrap();
    let config = Config::read(
        "[upstream.\"ghcr.io\"]\nca_file = \"ca.pem\"",
        &folder.path().join("f.toml"),
    )
    .unwrap();
    assert_eq!(
        config.upstream("ghcr.io").unwrap().roots,
        [one.der().to_vec(), two.der().to_vec()]
    );
}

#[test]
fn unusable_files_are_reported() {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in [
        ("empty", "\n"),
        ("text", "no certificate"),
        (
            "broken",
            "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n",
        ),
    ] {
        std::fs::write(folder.path().join(name), content).unwrap();
    }
    let credential = "auth = \"shared\"\nusername = \"robot\"\npassword_file =";
    let table = [
        (format!("{credential} \"empty\""), "5:17", "the file is empty"),
        (format!("{credential} \"missing\""), "5:17", "cannot read "),
        (
            "ca_file = \"text\"".to_owned(),
            "3:11",
            "the file has no certificate",
        ),
        ("ca_file = \"broken\"".to_owned(), "3:11", "the file is not PEM"),
        ("ca_file = \".\"".to_owned(), "3:11", "cannot read "),
    ];
    for (lines, place, message) in table {
        let text = format!("\n[upstream.\"ghcr.io\"]\n{lines}");
        let faults = Config::read(&text, &folder.path().join("f.toml"))
            .unwrap_err()
            .to_string();
        assert!(
            faults.contains(&format!("error: {message}")) && faults.contains(&format!("f.toml:{place}\n")),
            "{faults}"
        );
    }
}
