//! Invalid configuration: exit code 2 before any port is bound, with the location and the cause.

use crate::proxy::Setup;
use crate::registry::Upstream;

/// The configuration, and the expected parts of the error.
const WRONG: &[(&str, &str, &[&str])] = &[
    ("an unknown key", "polcy = \"always\"", &["polcy", "^"]),
    (
        "a key that is nearly right",
        "[default]\npolcy = \"always\"",
        &["polcy", "policy", "^^^^^"],
    ),
    (
        "an unknown section",
        "[defaults]\npolicy = \"always\"",
        &["defaults", "default", "^"],
    ),
    (
        "an unknown policy",
        "[default]\npolicy = \"sometimes\"",
        &["sometimes", "if-newer", "^"],
    ),
    (
        "a duration without a unit",
        "[default]\nmax_age = \"5\"",
        &["max_age", "^"],
    ),
    ("a size that is none", "[store]\nsize = \"much\"", &["size", "^"]),
    (
        "a wrong type",
        "[default]\nrevalidate_timeout = 2",
        &["revalidate_timeout", "^"],
    ),
    ("no TOML", "data = = 1", &["^"]),
    (
        "an address that is none",
        "[listen]\nregistry = [\"somewhere\"]",
        &["registry", "^"],
    ),
    (
        "a URL with a password",
        "[upstream.\"docker.io\"]\nurl = \"https://me:hunter2@hub.example\"",
        &["url", "^"],
    ),
    (
        "a URL of another kind",
        "[upstream.\"docker.io\"]\nurl = \"ftp://hub.example\"",
        &["url", "^"],
    ),
    (
        "a default that does not exist",
        "default_upstream = \"nowhere.example\"",
        &["default_upstream", "nowhere.example"],
    ),
    (
        "a rule without images",
        "[[rule]]\npolicy = \"always\"",
        &["images"],
    ),
    (
        "own credentials without shared access",
        "[upstream.\"docker.io\"]\nusername = \"me\"\npassword_file = \"/dev/null\"",
        &["auth", "shared"],
    ),
];

#[tokio::test]
async fn each_mistake_is_shown_with_its_place_and_the_program_exits_2() {
    for command in ["serve", "check"] {
        for (what, text, parts) in WRONG {
            let setup = Setup::empty();
            let file = setup.file("wrong.toml", text);
            let mut program = setup.run(&[command, "--config", file.to_str().unwrap()]);
            let code = program.exit().await;
            let said = program.stderr() + &program.stdout();
            assert_eq!(code, Some(2), "{command}, {what}: {said}");
            for part in *parts {
                assert!(said.contains(part), "{command}, {what}: no `{part}` in:\n{said}");
            }
            assert!(
                said.contains("wrong.toml"),
                "{command}, {what}: the file is named: {said}"
            );
            assert!(!said.contains("listening on"), "{command}, {what}: {said}");
            assert!(!said.contains("hunter2"), "a password is not repeated: {said}");
            assert!(!said.contains("panicked"), "{said}");
        }
    }
}

#[tokio::test]
async fn all_mistakes_are_shown_at_once() {
    let setup = Setup::empty();
    let file = setup.file(
        "wrong.toml",
        "[default]\nmax_age = \"soon\"\npolicy = \"sometimes\"\n[store]\nsizes = 1\n",
    );
    let mut program = setup.run(&["check", "--config", file.to_str().unwrap()]);
    assert_eq!(program.exit().await, Some(2));
    let said = program.stderr() + &program.stdout();
    for place in ["wrong.toml:2:", "wrong.toml:3:", "wrong.toml:5:"] {
        assert!(said.contains(place), "{place} in:\n{said}");
    }
}

#[tokio::test]
async fn a_right_configuration_is_checked_and_nothing_is_started() {
    let upstream = Upstream::start().await;
    let setup = Setup::over(&upstream);
    let file = setup.file("right.toml", &setup.toml());
    let mut program = setup.run(&["check", "--config", file.to_str().unwrap()]);
    assert_eq!(program.exit().await, Some(0), "{}", program.stderr());
    assert!(!setup.data().exists(), "checking makes no folder");
    assert_eq!(upstream.connections(), 0);
}

#[tokio::test]
async fn an_empty_file_is_a_right_configuration() {
    let setup = Setup::empty();
    let file = setup.file("empty.toml", "");
    let mut program = setup.run(&["check", "--config", file.to_str().unwrap()]);
    assert_eq!(program.exit().await, Some(0), "{}", program.stderr());
}

#[tokio::test]
async fn a_file_that_is_not_there_is_named() {
    let setup = Setup::empty();
    let mut program = setup.run(&["serve", "--config", "/no/such/ifnewer.toml"]);
    assert_eq!(program.exit().await, Some(2));
    assert!(
        program.stderr().contains("/no/such/ifnewer.toml"),
        "{}",
        program.stderr()
    );
}

#[tokio::test]
async fn a_wrong_variable_is_named() {
    let setup = Setup::empty().environment("IFNEWER_DEFAULT_POLICY", "sometimes");
    let file = setup.file("empty.toml", "");
    let mut program = setup.run(&["check", "--config", file.to_str().unwrap()]);
    assert_eq!(program.exit().await, Some(2));
    assert!(
        program.stderr().contains("IFNEWER_DEFAULT_POLICY"),
        "{}",
        program.stderr()
    );
}

#[tokio::test]
async fn an_unknown_flag_is_wrong_usage() {
    let setup = Setup::empty();
    let mut program = setup.run(&["serve", "--no-such-flag"]);
    assert_eq!(program.exit().await, Some(2));
    assert!(program.stderr().contains("--no-such-flag"));
}

#[tokio::test]
async fn a_port_that_is_taken_is_named_and_the_program_fails() {
    let upstream = Upstream::start().await;
    let other = Upstream::start().await;
    let taken = format!("registry = [\"{}\"]", other.address());
    let setup = Setup::over(&upstream).listen_keys(&taken);
    let mut program = setup.serve();
    assert_eq!(program.exit().await, Some(1), "{}", program.stderr());
    assert!(
        program.stderr().contains(&other.address().to_string()),
        "{}",
        program.stderr()
    );
}
