//! Rendering of diagnostics.

use std::path::Path;

use crate::config::Config;

fn printed(text: &str) -> String {
    Config::read(text, Path::new("config/ifnewer.toml"))
        .map(|_| "accepted")
        .unwrap_err()
        .to_string()
}

#[test]
fn an_unknown_key_with_the_nearest_one() {
    let text = "[store]\nsize = \"1 GiB\"\n\n[default]\n  polcy = \"always\" # for now\n";
    let expected = r#"
error: unknown key `polcy`
 --> config/ifnewer.toml:5:3
  |
5 |   polcy = "always" # for now
  |   ^^^^^
  |
  = help: did you mean `policy`?"#;
    assert_eq!(printed(text), expected.trim_start());
}

#[test]
fn a_key_in_the_wrong_section() {
    let text = "[listen]\ndefault_upstream = \"ghcr.io\"\npolcy = \"never\"";
    let expected = r#"
error: unknown key `default_upstream`
 --> config/ifnewer.toml:2:1
  |
2 | default_upstream = "ghcr.io"
  | ^^^^^^^^^^^^^^^^
  |
  = help: `default_upstream` belongs to the top, before the first `[section]`

error: unknown key `polcy`
 --> config/ifnewer.toml:3:1
  |
3 | polcy = "never"
  | ^^^^^
  |
  = help: did you mean `policy`? It belongs to `[default]`"#;
    assert_eq!(printed(text), expected.trim_start());
}

#[test]
fn caret_aligns_after_tabs_and_wide_characters() {
    let text = "\n".repeat(9) + "[upstream.\"ghcr.io\"]\n\t\"max_age\" = \"5 müde\" # so";
    let expected = "
error: `5 müde` is not a duration
  --> config/ifnewer.toml:11:14
   |
11 |     \"max_age\" = \"5 müde\" # so
   |                 ^^^^^^^^
   |
   = help: write a number and its unit: \"500ms\", \"30s\", \"5m\", \"12h\", \"7d\"";
    assert_eq!(printed(&text), expected.trim_start());
}

#[test]
fn secrets_are_masked() {
    let text = "[upstream.\"ghcr.io\"]\npassword = \"hunter2\"\nurl = [\"https://robot:hunter2@ghcr.io\", \"http://a:hunter2@b\"]\n";
    let expected = r#"
error: unknown key `password`
 --> config/ifnewer.toml:2:1
  |
2 | password = ***
  | ^^^^^^^^
  |
  = help: passwords are not accepted here; put it into a file and set `password_file`

error: a URL with a user or password is not accepted here
 --> config/ifnewer.toml:3:8
  |
3 | url = ["https://***@ghcr.io", "http://***@b"]
  |        ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  |
  = help: use `username` and `password_file`, with auth = "shared""#;
    let printed = printed(text);
    assert!(printed.starts_with(expected.trim_start()), "{printed}");
    assert!(!printed.contains("hunter2"), "{printed}");
}

#[test]
fn secrets_of_invalid_settings_are_not_printed() {
    for text in [
        "password = hunter2",
        "[upstream]\n\"r.test\" = { password = \"hunter2\" }",
        "[upstream.\"r.test\"]\npassword = \"\"\"\nhunter2\nx\u{1}\"\"\"",
        "[upstream.\"r.test\"]\nredirects = [\"https://user:hunter2@minio.test/x\"]",
        "[upstream.\"r.test\"]\nurl = \"https://user:a,b hunter2@host\"",
        "[upstream.\"r.test\"]\nurl = \"user:hunter2@host\"",
        "[upstream.\"r.test\"]\nproxy = \"user:hunter2@proxy:3128\"",
        "[upstream.\"r.test\"]\nhosts = [\"user:Hunter2@h\"]",
        "[listen]\nadmin = \"http://user:hunter2@127.0.0.1:5001\"",
        "[tls]\nnames = [\"user:Hunter2@h\"]",
    ] {
        let printed = printed(text).to_lowercase();
        assert!(printed.contains("error: "), "{text}");
        assert!(!printed.contains("hunter2"), "{text}\n{printed}");
    }
}

#[test]
fn value_far_in_a_line_is_reported() {
    let networks = "\"10.0.0.0/8\", ".repeat(6_000);
    let text = format!("[listen]\nproxy_protocol_from = [{networks}\"bad\"]");
    let printed = printed(&text);
    assert!(printed.contains("bad"), "{printed:.300}");
    let text = format!("listen = {{ proxy_protocol_from = [{networks}], plain_http = \"of\" }}");
    assert!(Config::read(&text, Path::new("ifnewer.toml")).is_err());
}

#[test]
fn masked_line_keeps_the_column() {
    let printed = printed("[upstream.\"ghcr.io\"]\ntoken_hosts = [\"a.io\", \"b host\"]");
    let expected = r#"
error: `b host` is not a host name
 --> config/ifnewer.toml:2:24
  |
2 | token_hosts = ***
  |                        ^
  |
  = help: write it as in "registry.example.org" or "registry.example.org:5000""#;
    let printed: Vec<_> = printed.lines().map(str::trim_end).collect();
    assert_eq!(printed.join("\n"), expected.trim_start());
}

#[test]
fn hint_for_list_quotes_no_value() {
    let printed = printed("[upstream.\"ghcr.io\"]\nredirects = \"http://a:hunter2@b\"");
    assert!(
        printed.contains("help: write [\"http://minio.internal:9000\"]"),
        "{printed}"
    );
    assert!(!printed.contains("hunter2"), "{printed}");
}

#[test]
fn cache_credential_requires_shared_auth() {
    let text = "[upstream.\"ghcr.io\"]\nusername = \"robot\"\npassword_file = \"/run/secrets/ghcr\"\n";
    let expected = r#"
error: a credential of the cache would make this upstream's private images readable by every client
 --> config/ifnewer.toml:2:12
  |
2 | username = "robot"
  |            ^^^^^^^
  |
  = help: if every client that reaches the listener may read them, add auth = "shared"; otherwise remove the credential, and clients use their own"#;
    assert_eq!(printed(text), expected.trim_start());
}

#[test]
fn a_choice_with_the_nearest_one() {
    let expected = r#"
error: `if_newer` is none of "always", "if-newer", "if-not-present", "never"
 --> config/ifnewer.toml:1:20
  |
1 | default = { policy="if_newer" }
  |                    ^^^^^^^^^^
  |
  = help: did you mean "if-newer"?"#;
    assert_eq!(
        printed("default = { policy=\"if_newer\" }"),
        expected.trim_start()
    );
}

#[test]
fn control_characters_do_not_reach_the_terminal() {
    let printed = printed("[default]\npolicy = \"a\u{9b}b\"\r\n# \u{85}");
    assert!(printed.contains("policy = \"a\u{fffd}b\"\n"), "{printed:?}");
    assert!(
        printed.starts_with("error: `a\u{fffd}b` is none of"),
        "{printed:?}"
    );
}

#[test]
fn variable_is_named() {
    let expected = "
error: 50 B is too small to hold an image
--> IFNEWER_STORE_SIZE
 = help: did you mean \"50 GiB\"?";
    let faults = super::gather("", &[("IFNEWER_STORE_SIZE", "50")], &[]).unwrap_err();
    assert_eq!(faults.to_string(), expected.trim_start());
}
