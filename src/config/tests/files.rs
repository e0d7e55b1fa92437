//! The files that a configuration names.

use crate::config::{Config, Credential};

#[test]
fn a_credential_is_read_from_its_file_and_never_printed() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("password"), "s3cret\n").unwrap();
    let text =
        "[upstream.\"ghcr.io\"]\naccess = \"shared\"\nusername = \"robot\"\npassword_file = \"password\"";
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
fn what_is_wrong_with_dockers_configuration_is_told_and_none_of_it_shown() {
    let folder = tempfile::tempdir().unwrap();
    let text = "[upstream.\"ghcr.io\"]\naccess = \"shared\"\ndocker_config = \"config.json\"";
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
            "line 1 is not what docker writes",
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
fn files_that_cannot_be_used_are_told() {
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
    let credential = "access = \"shared\"\nusername = \"robot\"\npassword_file =";
    let table = [
        (format!("{credential} \"empty\""), "5:17", "the file is empty"),
        (format!("{credential} \"missing\""), "5:17", "cannot read "),
        (
            "ca_file = \"text\"".to_owned(),
            "3:11",
            "there is no certificate in the file",
        ),
        ("ca_file = \"broken\"".to_owned(), "3:11", "the file is not PEM"),
        ("ca_file = \".\"".to_owned(), "3:11", "cannot read "),
    ];
    for (lines, place, message) in table {
        let text = format!("\n[upstream.\"ghcr.io\"]\n{lines}");
        let faults = Config::read(&text, &folder.path().join("f.toml"))
            .unwrap_err()
            .to_string();
        assert!(faults.contains(&format!("f.toml:{place}: {message}")), "{faults}");
    }
}
