#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use super::*;
use crate::config::Admin;

type Variables = &'static [(&'static str, &'static str)];

fn parse(words: &str) -> Cli {
    Cli::try_parse_from(words.split(' ')).unwrap_or_else(|error| panic!("{error}"))
}

fn environment(variables: &[(&str, &str)]) -> impl Iterator<Item = (OsString, OsString)> {
    let owned: Vec<_> = variables
        .iter()
        .map(|(name, value)| (name.into(), value.into()))
        .collect();
    owned.into_iter()
}

/// Options that do not depend on files in /etc.
fn options_with_empty_file(folder: &tempfile::TempDir) -> Options {
    let config = folder.path().join("ifnewer.toml");
    std::fs::write(&config, "").unwrap();
    Options {
        config: Some(config),
        ..Options::default()
    }
}

#[test]
fn the_command_line_is_well_formed() {
    use clap::CommandFactory;
    <Cli as CommandFactory>::command().debug_assert();
}

#[test]
fn serve_is_the_default() {
    assert_eq!(parse("ifnewer").selected_command(), Command::Serve);
    assert_eq!(parse("ifnewer serve").selected_command(), Command::Serve);
    assert_eq!(parse("ifnewer check").selected_command(), Command::Check);
    assert_eq!(
        parse("ifnewer healthcheck").selected_command(),
        Command::Healthcheck
    );
}

#[test]
fn global_options_work_before_and_after_the_command() {
    let before = parse("ifnewer --config c.toml --listen 127.0.0.1:1 --listen 127.0.0.1:2 --admin off serve");
    let after = parse("ifnewer serve --config c.toml --listen 127.0.0.1:1 --listen 127.0.0.1:2 --admin off");
    let without = parse("ifnewer --config c.toml --listen 127.0.0.1:1 --listen 127.0.0.1:2 --admin off");
    assert_eq!(before.options, after.options);
    assert_eq!(before.options, without.options);
    assert_eq!(before.options.listen, ["127.0.0.1:1", "127.0.0.1:2"]);
}

#[test]
fn wrong_usage_ends_with_2() {
    for words in ["ifnewer sreve", "ifnewer --confg x", "ifnewer --data"] {
        assert_eq!(
            Cli::try_parse_from(words.split(' ')).unwrap_err().exit_code(),
            2,
            "{words}"
        );
    }
}

#[test]
fn every_flag_sets_its_key() {
    let folder = tempfile::tempdir().unwrap();
    let cli = parse("ifnewer --data d --listen 127.0.0.1:1 --listen [::1]:2 --admin off --log trace");
    let options = Options {
        config: options_with_empty_file(&folder).config,
        ..cli.options
    };
    let variables = [
        ("IFNEWER_DATA", "x"),
        ("IFNEWER_LOG", "error"),
        ("IFNEWER_LISTEN_ADMIN", "x"),
    ];
    let config = with_sources_from(&options, environment(&variables), false, Config::gather).unwrap();
    assert_eq!(config.data, Path::new("d"));
    assert_eq!(
        config.listen.registry,
        ["127.0.0.1:1".parse().unwrap(), "[::1]:2".parse().unwrap()]
    );
    assert_eq!(config.listen.admin, Admin::Off);
    assert_eq!(config.log.level, "trace");
    assert_eq!(config.tls.folder, folder.path().join("certs"));
}

#[test]
fn a_file_that_was_named_must_exist() {
    let options = parse("ifnewer --config /nowhere/ifnewer.toml").options;
    let faults = with_sources_from(&options, environment(&[]), false, Config::gather)
        .unwrap_err()
        .to_string();
    assert!(faults.starts_with("error: the file cannot be read: "), "{faults}");
    assert!(faults.contains("--> /nowhere/ifnewer.toml\n"), "{faults}");
}

#[test]
fn the_cache_is_in_the_users_folder() {
    let folder = tempfile::tempdir().unwrap();
    let options = options_with_empty_file(&folder);
    let table: [(Variables, bool, &str); 6] = [
        (&[("HOME", "/home/ann")], false, "/home/ann/.cache/ifnewer"),
        (
            &[("HOME", "/home/ann"), ("XDG_CACHE_HOME", "/fast")],
            false,
            "/fast/ifnewer",
        ),
        (
            &[("HOME", "/home/ann"), ("XDG_CACHE_HOME", "relative")],
            false,
            "/home/ann/.cache/ifnewer",
        ),
        (
            &[("HOME", "/home/ann"), ("XDG_CACHE_HOME", "")],
            false,
            "/home/ann/.cache/ifnewer",
        ),
        (
            &[("HOME", "/root"), ("XDG_CACHE_HOME", "/fast")],
            true,
            "/var/cache/ifnewer",
        ),
        (&[], false, "/var/cache/ifnewer"),
    ];
    for (variables, is_root, expected) in table {
        let config = with_sources_from(&options, environment(variables), is_root, Config::gather).unwrap();
        assert_eq!(config.data, Path::new(expected), "{variables:?}");
    }
}

#[test]
fn what_is_not_text_is_told() {
    use std::os::unix::ffi::OsStringExt;
    let folder = tempfile::tempdir().unwrap();
    let options = options_with_empty_file(&folder);
    let variable = (OsString::from("IFNEWER_DATA"), OsString::from_vec(vec![0xff]));
    let faults = with_sources_from(&options, [variable].into_iter(), false, Config::gather).unwrap_err();
    assert_eq!(
        faults.to_string(),
        "error: the value is not UTF-8\n--> IFNEWER_DATA"
    );

    std::fs::write(options.config.as_ref().unwrap(), [0xff]).unwrap();
    let faults = with_sources_from(&options, environment(&[]), false, Config::gather)
        .unwrap_err()
        .to_string();
    assert!(
        faults.starts_with("error: the file is not UTF-8 text\n"),
        "{faults}"
    );
    assert!(faults.ends_with("/ifnewer.toml"), "{faults}");
}

#[test]
fn setup_only_prints_without_apply_or_undo() {
    let Command::Setup(words) =
        parse("ifnewer setup gitlab-runner --address cache:1 --proxy").selected_command()
    else {
        panic!("not setup");
    };
    assert!(!words.apply && !words.undo && !words.force);
    assert_eq!(words.root, Path::new("/"));
    let options = words.options();
    assert_eq!(options.client, Client::GitlabRunner);
    assert_eq!(
        (options.address.as_deref(), options.by_proxy),
        (Some("cache:1"), true)
    );
    for wrong in [
        "ifnewer setup",
        "ifnewer setup docker podman",
        "ifnewer setup docker --apply --undo",
        "ifnewer ca",
        "ifnewer ca install --into windows",
    ] {
        assert_eq!(
            Cli::try_parse_from(wrong.split(' ')).unwrap_err().exit_code(),
            2,
            "{wrong}"
        );
    }
}

#[test]
fn o05_foreign_certificate_folder_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let certs = folder.path().join("certs");
    assert!(!is_certificate_folder(&certs), "it is not there");
    std::fs::create_dir(&certs).unwrap();
    assert!(is_certificate_folder(&certs));
    std::fs::write(certs.join("README.md"), "").unwrap();
    assert!(is_certificate_folder(&certs), "as a checkout has it");
    std::fs::write(certs.join("ca-certificates.crt"), "").unwrap();
    assert!(!is_certificate_folder(&certs), "as /etc/ssl has it");
    std::fs::write(certs.join("ca.key"), "").unwrap();
    assert!(is_certificate_folder(&certs));
}

#[test]
fn objects_of_the_bucket_are_deleted_with_yes_only() {
    use shared_storage::ObjectCommand;
    let objects = |words: &str| match parse(words).selected_command() {
        Command::Shared(Shared::Objects(command)) => command,
        other => panic!("{other:?}"),
    };
    let ObjectCommand::Gc(gc) = objects("ifnewer shared gc --older 28d --size 2TiB") else {
        panic!("not gc");
    };
    assert_eq!(
        (gc.older, gc.size, gc.yes),
        (
            Some(std::time::Duration::from_secs(28 * 86_400)),
            Some(2 << 40),
            false
        )
    );
    let ObjectCommand::Rm(rm) = objects("ifnewer shared rm alpine:3 sha256:00 --yes") else {
        panic!("not rm");
    };
    assert_eq!((rm.images.len(), rm.blobs, rm.yes), (2, false, true));
    for wrong in [
        "ifnewer shared rm",
        "ifnewer shared gc --older 28",
        "ifnewer shared gc --older",
        "ifnewer shared gc --size much",
        "ifnewer shared gc --size 500",
        "ifnewer shared policy --read-only --maintenance",
    ] {
        let error = Cli::try_parse_from(wrong.split(' ')).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{wrong}");
    }
}
