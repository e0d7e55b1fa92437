//! Who may use whom, as data, held against every file of `src/`. The compiler cannot see this: inside one crate every
//! module may use every other.
//!
//! Read are the imports (`use crate::{a::b, c}`), the paths inside the code (`crate::x::…`, `super::…` up to the root),
//! the crates of others, and the clock. Test code is not: it may use what it likes. A name made by a macro escapes;
//! we write no such macros.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use std::fs;
use std::path::Path;

/// A top-level module. It may use those of lower layers, but for `not`, and those of its own layer in `beside`.
struct Module {
    name: &'static str,
    layer: u8,
    beside: &'static [&'static str],
    not: &'static [&'static str],
}

const fn module(
    name: &'static str,
    layer: u8,
    beside: &'static [&'static str],
    not: &'static [&'static str],
) -> Module {
    Module {
        name,
        layer,
        beside,
        not,
    }
}

const MODULES: &[Module] = &[
    // Values.
    module("oci", 1, &[], &[]),
    module("clock", 1, &[], &[]),
    module("age", 1, &[], &["oci", "clock"]),
    module("trace_context", 1, &[], &[]),
    module("terminal", 1, &[], &[]),
    // Judgement. Time is an argument.
    module("policy", 2, &[], &["clock"]),
    // Resources. They know neither each other nor what is decided about them; admission is what all wait for.
    module("store", 3, &[], &["policy", "clock"]),
    module("queue", 3, &[], &["oci", "clock", "trace_context", "policy"]),
    module("upstream", 3, &["queue"], &["policy", "clock"]),
    module("telemetry", 3, &[], &["clock"]),
    module("single_flight", 3, &["queue"], &["oci", "clock", "policy"]),
    // Joint work. It takes the upstream's answers and no decision.
    module("download", 4, &[], &["policy", "clock"]),
    module("archive", 4, &[], &["policy", "clock", "upstream"]),
    // The road.
    module("proxy", 5, &[], &[]),
    // The edge.
    module("config", 6, &[], &["store", "download", "proxy", "clock"]),
    module(
        "setup",
        6,
        &["config"],
        &["store", "upstream", "download", "proxy", "clock"],
    ),
    module(
        "ca",
        6,
        &["config", "server", "setup"],
        &["store", "upstream", "download", "proxy"],
    ),
    module(
        "doctor",
        6,
        &["config", "setup", "process"],
        &["store", "download", "proxy", "clock"],
    ),
    module(
        "cli",
        6,
        &["config", "setup", "ca", "doctor", "admin"],
        &["store", "download", "proxy", "clock"],
    ),
    module(
        "demo",
        6,
        &["admin", "config"],
        &["store", "download", "proxy", "clock"],
    ),
    module("server", 6, &["config"], &[]),
    module("admin", 6, &["config", "server"], &[]),
    module("otlp", 6, &["config"], &["store", "download", "proxy", "clock"]),
    module("process", 6, &["config", "server", "admin"], &[]),
    module(
        "main",
        6,
        &[
            "config", "cli", "server", "admin", "process", "setup", "ca", "doctor", "demo", "otlp",
        ],
        &[],
    ),
];

/// A crate of others, and the only files that may name it. A path that ends in `/` is a folder.
const VENDORS: &[(&str, &[&str])] = &[
    ("sled", &["store/index.rs", "store/index/"]),
    ("rustls", TLS),
    (
        "tokio_rustls",
        &["server/tls.rs", "upstream/tls.rs", "doctor/wire.rs"],
    ),
    ("hyper", HTTP),
    ("hyper_util", HTTP),
    ("sha2", &["oci/digest.rs"]),
    ("tar", &["archive/", "cli/commands/archive.rs"]),
    ("hmac", &["oci/digest.rs"]),
    ("bcrypt", &["server/entry.rs"]),
    ("rcgen", &["server/tls.rs", "server/tls/", "server/mint.rs"]),
    ("x509_parser", &["server/certificate.rs", "upstream/tls/"]),
    ("opentelemetry", &["otlp.rs"]),
    ("opentelemetry_otlp", &["otlp.rs"]),
    ("opentelemetry_sdk", &["otlp.rs"]),
];

/// The doctor speaks for itself: what it asks must not go by the ways that it looks at.
const TLS: &[&str] = &[
    "server/tls.rs",
    "server/tls/",
    "server/mint.rs",
    "server/certificate.rs",
    "upstream/tls.rs",
    "upstream/tls/",
    "doctor/wire.rs",
];

/// Outwards it takes five: the client and what it hands on (`pass`), the connector it is given (`line`), the resolver beneath it (`tcp`), and the
/// rules for proxies (`route`), which hyper-util reads from the environment as every other program does.
const HTTP: &[&str] = &[
    "server.rs",
    "server/",
    "admin.rs",
    "admin/",
    "demo/registry.rs",
    "upstream/http_client.rs",
    "upstream/connector.rs",
    "upstream/forward.rs",
    "upstream/tcp.rs",
    "upstream/proxy_rules.rs",
    "doctor/wire.rs",
];

/// The only file that reads the time of day.
const CLOCK: &str = "clock.rs";

/// Below this layer nothing waits and nothing measures: no `tokio`, and so no `tokio::time::Instant`.
const TOKIO_FROM_LAYER: u8 = 3;

#[test]
fn every_layer_uses_only_what_is_below_it() {
    let sources = sources();
    let breaches: Vec<_> = sources
        .iter()
        .flat_map(|(file, text)| breaches(file, text))
        .collect();
    assert!(breaches.is_empty(), "\n{}\n", breaches.join("\n"));
}

#[test]
fn the_whole_tree_is_read() {
    let sources = sources();
    for module in MODULES {
        let file = format!("{}.rs", module.name);
        assert!(
            sources.iter().any(|(found, _)| *found == file),
            "{file} is in the table only"
        );
    }
    let uses = |file: &str, of: &str| {
        let (_, text) = sources.iter().find(|(found, _)| found == file).unwrap();
        used_modules(file, &product_code(text))
            .iter()
            .any(|used| used == of)
    };
    assert!(
        uses("download.rs", "store"),
        "a `mod tests;` at the top hides nothing below it"
    );
    assert!(uses("proxy.rs", "policy"));
    assert!(uses("store/blobs.rs", "oci"));
    for (vendor, _) in VENDORS {
        let named = sources
            .iter()
            .any(|(_, text)| names_crate(&product_code(text), vendor));
        assert!(named, "{vendor} is nowhere; its row is out of date");
    }
}

#[test]
fn an_upward_use_is_caught() {
    for text in [
        "use crate::store::Store;",
        "use crate::{oci::Digest, store::Store};",
        "use crate::{\n    oci::{Digest, Hasher},\n    store::{\n        Store,\n    },\n};",
        "pub(crate) use crate::store as disk;",
        "fn f() { let _ = crate::store::Store::open(); }",
        "fn f(x: &crate :: store :: Store) {}",
        "use super::store::Store;",
        "#[cfg(test)]\nmod tests;\n\nuse crate::store::Store;",
        "#[cfg(test)]\nmod tests {\n    use super::*;\n}\nuse crate::store::Store;",
    ] {
        assert_eq!(
            breaches("policy.rs", text),
            ["policy.rs: `policy` may not use `store`"],
            "{text}"
        );
    }
    let nested = breaches("policy/rules.rs", "use super::super::store::Store;");
    assert_eq!(nested, ["policy/rules.rs: `policy` may not use `store`"]);
}

#[test]
fn resources_do_not_know_each_other() {
    for (file, text) in [
        ("store/blobs.rs", "use crate::upstream::UpstreamResponse;"),
        ("store/blobs.rs", "use crate::policy::Decision;"),
        ("upstream/http_client.rs", "use crate::{oci, store};"),
        ("telemetry.rs", "use crate::store::StoreError;"),
    ] {
        assert_eq!(breaches(file, text).len(), 1, "{file}: {text}");
    }
}

#[test]
fn what_cannot_be_told_is_a_breach() {
    assert_eq!(breaches("policy.rs", "use crate::*;").len(), 1);
    assert_eq!(breaches("policy.rs", "use crate::{self as all};").len(), 1);
    assert_eq!(
        breaches("stranger.rs", "").len(),
        1,
        "a module that is in no layer"
    );
}

#[test]
fn what_is_allowed_is_not_caught() {
    for (file, text) in [
        (
            "proxy.rs",
            "use crate::{download::Reader, oci, store::{StoreError, blobs}};",
        ),
        (
            "policy/rules.rs",
            "use super::EffectivePolicy;\nuse crate::oci::Tag;",
        ),
        (
            "store/index/keeper.rs",
            "use super::super::StoreError;\nuse sled::Db;",
        ),
        (
            "oci/digest.rs",
            "use sha2::Digest as _; // not crate::store::x\n/// [`crate::store`]",
        ),
        (
            "policy.rs",
            "fn f() {}\n\n#[cfg(test)]\nmod tests {\n    use crate::store::Store;\n}\n",
        ),
        (
            "upstream/health.rs",
            "use tokio::time::{Duration, Instant};\nfn f() { Instant::now(); }",
        ),
        ("server.rs", "fn f() { tokio::time::Instant::now(); }"),
        ("clock.rs", "fn f() { SystemTime::now(); }"),
    ] {
        assert_eq!(breaches(file, text), Vec::<String>::new(), "{file}: {text}");
    }
}

#[test]
fn a_crate_outside_its_file_is_caught() {
    for (file, text) in [
        ("store/tags.rs", "use sled::Tree;"),
        ("proxy/blob.rs", "fn f(_: hyper::Error) {}"),
        ("upstream/auth_client.rs", "use {bytes::Bytes, hyper_util::rt};"),
        ("upstream/http_client.rs", "use ::rustls::ClientConfig;"),
        ("process.rs", "use tokio_rustls::rustls::ServerConfig;"),
        ("policy/authz.rs", "use hmac;"),
        ("policy.rs", "use tokio::sync::Mutex;"),
        ("oci/name.rs", "async fn f() { tokio::task::yield_now().await }"),
    ] {
        assert!(!breaches(file, text).is_empty(), "{file}: {text}");
    }
}

#[test]
fn a_hidden_clock_is_caught() {
    for (file, text) in [
        ("policy.rs", "fn f() { std::time::SystemTime::now(); }"),
        ("proxy.rs", "fn f() { let read = SystemTime::now; }"),
        ("proxy.rs", "fn f() { SystemTime\n    ::now(); }"),
        (
            "server.rs",
            "use std::time::{Duration, Instant};\nfn f() { Instant::now(); }",
        ),
        ("store.rs", "fn f() { std::time::Instant::now(); }"),
        (
            "store.rs",
            "use std::time::SystemTime as Time;\nfn f() { Time::now(); }",
        ),
        ("policy/authz.rs", "fn f() { SystemTime::UNIX_EPOCH.elapsed(); }"),
        (
            "policy/authz.rs",
            "use tokio::time::Instant;\nfn f() { Instant::now(); }",
        ),
    ] {
        assert!(!breaches(file, text).is_empty(), "{file}: {text}");
    }
}

#[test]
fn t15_everything_printed_goes_through_one_module() {
    let ways = [
        "io::stdout",
        "io::stderr",
        "io::Stdout",
        "io::Stderr",
        "/dev/std",
        "/dev/tty",
    ];
    let prints = |code: &str| ways.iter().any(|way| code.contains(way));
    let sources = sources();
    let found = sources.iter().filter(|(_, text)| prints(&product_code(text)));
    let found: Vec<&str> = found.map(|(file, _)| file.as_str()).collect();
    assert_eq!(
        found,
        ["terminal.rs"],
        "`terminal` is the one way (`print!` and its kin are denied by clippy)"
    );
}

/// Debug text is for who writes the code. Here it is the input of a hash, a quoted string in a file of TOML, or a `Debug`.
const DEBUG_TEXT: &[&str] = &[
    "proxy/local_tokens.rs",
    "process.rs",
    "setup/gitlab.rs",
    "upstream/settings.rs",
];

#[test]
fn no_debug_text_of_rust_reaches_an_answer_a_page_or_a_log() {
    let formats = |text: &str| {
        product_code(text)
            .lines()
            .any(|line| line.contains(":?}") || line.contains(":#?}"))
    };
    let sources = sources();
    let found = sources.iter().filter(|(_, text)| formats(text));
    let found: Vec<&str> = found.map(|(file, _)| file.as_str()).collect();
    let unexpected = found.iter().filter(|file| !DEBUG_TEXT.contains(file));
    assert_eq!(unexpected.collect::<Vec<_>>(), Vec::<&&str>::new());
    assert!(formats("fn f() { format!(\"{:?}\", 1); }"), "it can fail");
}

/// Every file of `src/` that is no test, by its path below `src/`.
fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut found) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() {
                if name != "tests" {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs")
                && !matches!(name, "tests.rs" | "lib.rs")
            {
                let below = path
                    .strip_prefix(&root)
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .replace('\\', "/");
                found.push((below, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

/// What `file` does that the tables do not allow.
fn breaches(file: &str, text: &str) -> Vec<String> {
    let code = product_code(text);
    let top = file.split(['/', '.']).next().unwrap();
    let Some(own) = MODULES.iter().find(|module| module.name == top) else {
        return vec![format!("{file}: `{top}` is in no layer")];
    };
    let mut found = Vec::new();
    for used in used_modules(file, &code) {
        let allowed = used == own.name
            || MODULES.iter().any(|other| {
                let below = other.layer < own.layer && !own.not.contains(&other.name);
                other.name == used && (below || own.beside.contains(&other.name))
            });
        if !allowed {
            found.push(format!("{file}: `{}` may not use `{used}`", own.name));
        }
    }
    for (vendor, homes) in VENDORS {
        let at_home = homes
            .iter()
            .any(|home| *home == file || home.ends_with('/') && file.starts_with(home));
        if !at_home && names_crate(&code, vendor) {
            found.push(format!("{file}: `{vendor}` is named outside {homes:?}"));
        }
    }
    if own.layer < TOKIO_FROM_LAYER && names_crate(&code, "tokio") {
        found.push(format!("{file}: `tokio` in a pure layer"));
    }
    if file != CLOCK && reads_clock(&code) {
        found.push(format!("{file}: reads the clock; time is an argument"));
    }
    found.dedup();
    found
}

/// The code without comments and test modules, and without blanks around `::`.
fn product_code(text: &str) -> String {
    let mut code = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.starts_with("#[cfg(test)]") {
            // The item it belongs to: one line, or all until a brace at the start of a line.
            let item = lines.by_ref().find(|line| !line.starts_with("#["));
            if item.is_some_and(|item| !item.trim_end().ends_with([';', '}'])) {
                let _ = lines.by_ref().find(|line| line.starts_with('}'));
            }
        } else if !line.trim_start().starts_with("//") {
            code.push_str(line.split(" // ").next().unwrap());
            code.push('\n');
        }
    }
    let parts: Vec<_> = code.split("::").map(str::trim).collect();
    parts.join("::")
}

/// The top-level modules that `code` names.
fn used_modules(file: &str, code: &str) -> Vec<String> {
    let depth = file.matches('/').count() + 1;
    let root_by_super = "super::".repeat(depth);
    let mut used = Vec::new();
    for (at, root) in roots(code, "crate::").chain(roots(code, &root_by_super)) {
        let rest = &code[at + root..];
        match rest.strip_prefix('{') {
            Some(group) => used.extend(heads(group)),
            None => used.push(head(rest)),
        }
    }
    used.sort();
    used.dedup();
    used
}

/// Where a path begins with `root`, and how long that is.
fn roots<'a>(code: &'a str, root: &'a str) -> impl Iterator<Item = (usize, usize)> + 'a {
    code.match_indices(root)
        .filter(|(at, _)| {
            !code[..*at].ends_with(|before: char| is_word(before) || matches!(before, ':' | '$'))
        })
        .map(|(at, found)| (at, found.len()))
}

/// The first name of each part of a group, of which the opening brace is already read.
fn heads(group: &str) -> Vec<String> {
    let (mut depth, mut part, mut found) = (0, String::new(), Vec::new());
    for letter in group.chars() {
        match letter {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                found.push(head(&part));
                part.clear();
                continue;
            }
            _ => {}
        }
        part.push(letter);
    }
    if !part.trim().is_empty() {
        found.push(head(&part));
    }
    found
}

/// The first name of a path. `*`, which could be anything, stays `*`.
fn head(path: &str) -> String {
    let path = path.trim_start();
    let end = path.find(|letter| !is_word(letter)).unwrap_or(path.len());
    path[..end.max(1).min(path.len())].to_owned()
}

/// Whether `code` names the crate `name`: at the head of a path, or imports it whole.
fn names_crate(code: &str, name: &str) -> bool {
    code.match_indices(name).any(|(at, _)| {
        let (before, after) = (&code[..at], &code[at + name.len()..]);
        let before = before.strip_suffix("::").unwrap_or(before);
        // Without its blanks, `use ::name` is `use::name`.
        let is_head = before.ends_with("use") || !before.ends_with(is_word);
        let imported = before.trim_end().ends_with("use") && after.starts_with([';', ' ']);
        is_head && after.starts_with("::") || imported
    })
}

fn reads_clock(code: &str) -> bool {
    let std_instant = code.contains("std::time::Instant") || imports(code, "std::time::{", "Instant");
    let tokio_instant = code.contains("tokio::time::Instant") || imports(code, "tokio::time::{", "Instant");
    [
        "SystemTime::now",
        "SystemTime as ",
        "Instant as ",
        "UNIX_EPOCH.elapsed",
    ]
    .iter()
    .any(|sign| code.contains(sign))
        || std_instant
        || code.contains("Instant::now") && !tokio_instant
}

/// Whether a group that begins with `opening` has `name` in it.
fn imports(code: &str, opening: &str, name: &str) -> bool {
    code.match_indices(opening).any(|(at, _)| {
        heads(&code[at + opening.len()..])
            .iter()
            .any(|found| found == name)
    })
}

fn is_word(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}
