//! Operator commands against a running cache: output and exit codes.

use crate::proxy::{Proxy, Setup};
use crate::registry::{Image, Upstream};
use serde_json::Value;

/// Runs a command against this cache. Returns its exit code and output.
async fn run(proxy: &Proxy, words: &[&str]) -> (Option<i32>, String, String) {
    let admin = proxy.admin_address().to_string();
    let words: Vec<&str> = words.iter().copied().chain(["--admin", &admin]).collect();
    let mut program = proxy.setup().run(&words);
    let code = program.exit().await;
    (code, program.stdout(), program.stderr())
}

async fn done(proxy: &Proxy, words: &[&str]) -> String {
    let (code, out, err) = run(proxy, words).await;
    assert_eq!(code, Some(0), "{words:?}: {out}{err}");
    assert!(
        !out.contains('\x1b'),
        "colours where no terminal reads them: {out:?}"
    );
    out
}

async fn holding() -> (Upstream, Proxy, Image) {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one", "two"]));
    let proxy = Proxy::over(&upstream).await;
    proxy.pull("library/demo", "latest", &image).await;
    (upstream, proxy, image)
}

#[tokio::test]
async fn what_is_held_is_listed_shown_and_explained() {
    let (_upstream, proxy, image) = holding().await;
    let short = &image.digest[..19];
    let listed = done(&proxy, &["ls"]).await;
    let mut lines = listed.lines();
    assert!(lines.next().unwrap().starts_with("IMAGE "), "{listed}");
    let line = lines.next().unwrap();
    assert!(
        line.starts_with("docker.io/library/demo:latest ")
            && line.contains(short)
            && line.contains("complete"),
        "{listed}"
    );
    let shown = done(&proxy, &["show", "demo"]).await;
    for part in [
        image.digest.as_str(),
        "complete",
        "policy     if-newer",
        "config",
        "layer",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let why = done(&proxy, &["why", "demo"]).await;
    for part in [
        "revalidate at docker.io by HEAD",
        "because",
        "complete",
        "another digest",
    ] {
        assert!(why.contains(part), "{part}: {why}");
    }
    let log = done(&proxy, &["log", "demo"]).await;
    assert!(log.contains("not cached: fetched from docker.io"), "{log}");
    let stats = done(&proxy, &["stats"]).await;
    for part in ["Healthy", "byte hit ratio", "docker.io", "127.0.0.1"] {
        assert!(stats.contains(part), "{part}: {stats}");
    }
}

/// The output with `…` for values that vary: times, ages and durations. Columns are separated by two spaces.
fn timeless(printed: &str) -> String {
    let is_moment = |word: &str| {
        let figures = word.bytes().filter(u8::is_ascii_digit).count();
        let is_clock = figures == 4 && word.len() == 5 && word.contains(':');
        is_clock || (figures >= 6 && word.contains([':', '-']) && !word.contains("sha256"))
    };
    let is_age = |word: &str| {
        let word = word.trim_end_matches(',');
        let number = word.trim_end_matches(['s', 'm', 'h']);
        word == "now" || (number.len() < word.len() && number.parse::<u64>().is_ok())
    };
    let mut text = String::new();
    for line in printed.lines() {
        let indent = line.len() - line.trim_start().len();
        let columns = line.trim_start().split("  ").map(str::trim);
        let columns = columns.filter(|column| !column.is_empty()).map(|column| {
            let column = column.replace(['(', ')'], "");
            let words: Vec<&str> = column.split(' ').collect();
            let shown = words.iter().enumerate().map(|(place, word)| {
                let is_measure = words.get(place + 1) == Some(&"ms");
                if is_age(word) && word.ends_with(',') {
                    "…,"
                } else if is_moment(word) || is_age(word) || is_measure {
                    "…"
                } else {
                    word
                }
            });
            shown.collect::<Vec<_>>().join(" ").replace("… ago", "…")
        });
        let columns: Vec<_> = columns.collect();
        text.push_str(&" ".repeat(indent));
        text.push_str(&columns.join("  "));
        text.push('\n');
    }
    text
}

/// Compares each command's output with `tests/system/cli/printed`. `PRINTED=write` rewrites the files.
#[tokio::test]
#[expect(
    clippy::disallowed_methods,
    reason = "who changes the output says so by a variable"
)]
async fn every_cli_table_matches_its_snapshot() {
    let (upstream, proxy, image) = holding().await;
    upstream.tells_rate_limit(100, 73);
    proxy.pull("library/demo", "latest", &image).await;
    done(&proxy, &["pin", "demo"]).await;
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/system/cli/printed");
    for (name, words) in [
        ("ls", &["ls"][..]),
        ("show", &["show", "demo"]),
        ("why", &["why", "demo"]),
        ("stats", &["stats"]),
        ("log", &["log", "demo"]),
        ("pull", &["pull", "demo"]),
        ("refresh", &["refresh", "demo"]),
        ("rm", &["rm", "demo"]),
        ("gc", &["gc"]),
        ("offline", &["offline"]),
    ] {
        let (_, out, err) = run(&proxy, words).await;
        let printed = timeless(&(out + &err));
        let file = folder.join(format!("{name}.txt"));
        if std::env::var_os("PRINTED").is_some_and(|wanted| wanted == "write") {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(&file, &printed).unwrap();
        }
        let expected = std::fs::read_to_string(&file).unwrap_or_default();
        assert_eq!(printed, expected, "{name}: PRINTED=write keeps it so");
    }
}

#[tokio::test]
async fn settings_are_shown_with_where_they_come_from() {
    let setup = Setup::empty().environment("IFNEWER_STORE_SIZE", "9 GiB");
    let file = setup.file("ifnewer.toml", "[log]\nformat = \"json\"\n");
    let mut program = setup.run(&["config", "show", "--origin", "--config", file.to_str().unwrap()]);
    assert_eq!(program.exit().await, Some(0), "{}", program.stderr());
    let shown = program.stdout();
    for part in [
        "# IFNEWER_STORE_SIZE",
        "ifnewer.toml:2",
        "# default",
        "# not set",
        "# IFNEWER_LOG",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    setup.file("ifnewer.toml", "polcy = 1");
    let mut program = setup.run(&["config", "show", "--config", file.to_str().unwrap()]);
    assert_eq!(program.exit().await, Some(2));
}

#[tokio::test]
async fn each_that_reads_prints_json_too() {
    let (_upstream, proxy, _image) = holding().await;
    for (words, field) in [
        (vec!["ls", "--json"], "/images/0/image"),
        (vec!["show", "demo", "--json"], "/digest"),
        (vec!["why", "demo", "--json"], "/reason"),
        (vec!["stats", "--json"], "/status/summary"),
        (vec!["log", "--json"], "/events/0/sentence"),
        (vec!["offline", "--json"], "/offline"),
    ] {
        let printed = done(&proxy, &words).await;
        let value: Value =
            serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{words:?}: {error}: {printed}"));
        assert!(value.pointer(field).is_some(), "{field}: {printed}");
    }
}

#[tokio::test]
async fn a_pull_tells_what_was_fetched_and_what_was_there() {
    let upstream = Upstream::start().await;
    let image = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    let proxy = Proxy::over(&upstream).await;
    let first = done(&proxy, &["pull", "demo"]).await;
    assert!(
        first.contains("fetched") && first.contains(&image.digest[..19]),
        "{first}"
    );
    for blob in &image.blobs {
        proxy.until_kept(&blob.digest).await;
    }
    let second = done(&proxy, &["pull", "demo"]).await;
    assert!(
        second.lines().last().unwrap().ends_with("already cached"),
        "{second}"
    );
    let (code, out, err) = run(&proxy, &["pull", "library/absent"]).await;
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(out.contains("the image does not exist at docker.io"), "{out}");
    upstream.refuses();
    proxy.pull("library/demo", "latest", &image).await.is_stale();
}

#[tokio::test]
async fn a_removal_is_shown_first_and_done_with_yes() {
    let (_upstream, proxy, _image) = holding().await;
    let trial = done(&proxy, &["rm", "demo"]).await;
    assert!(
        trial.contains("would remove docker.io/library/demo:latest") && trial.contains("--yes"),
        "{trial}"
    );
    assert!(done(&proxy, &["ls"]).await.contains("library/demo"));
    assert!(done(&proxy, &["pin", "demo"]).await.contains("pinned"));
    let (code, _, err) = run(&proxy, &["rm", "demo", "--yes"]).await;
    assert_eq!(code, Some(1));
    assert!(err.contains("is pinned; unpin it first"), "{err}");
    assert!(done(&proxy, &["unpin", "demo"]).await.contains("unpinned"));
    let gone = done(&proxy, &["rm", "demo", "--yes"]).await;
    assert!(gone.contains("removed docker.io/library/demo:latest"), "{gone}");
    assert!(!done(&proxy, &["ls"]).await.contains("library/demo"));
    let (code, _, err) = run(&proxy, &["rm", "demo"]).await;
    assert_eq!(
        (code, err.trim()),
        (Some(1), "docker.io/library/demo:latest is not cached")
    );
}

#[tokio::test]
async fn images_after_a_failed_one_are_changed() {
    let (_upstream, proxy, _image) = holding().await;
    for (words, result) in [
        (
            &["pin", "a//b", "demo"][..],
            "docker.io/library/demo:latest pinned",
        ),
        (
            &["unpin", "a//b", "demo"],
            "docker.io/library/demo:latest unpinned",
        ),
        (&["refresh", "a//b", "demo"], "unchanged at docker.io"),
        (
            &["rm", "--yes", "absent", "demo"],
            "removed docker.io/library/demo:latest",
        ),
    ] {
        let (code, out, err) = run(&proxy, words).await;
        assert_eq!(code, Some(1), "{words:?}: {out}{err}");
        assert!(out.contains(result), "{words:?}: {out}{err}");
        assert!(err.contains("1 of 2 failed"), "{words:?}: {out}{err}");
    }
}

#[tokio::test]
async fn refresh_and_offline_steer_it() {
    let (upstream, proxy, _image) = holding().await;
    assert!(
        done(&proxy, &["refresh", "demo"])
            .await
            .contains("unchanged at docker.io")
    );
    assert!(done(&proxy, &["offline", "on"]).await.starts_with("offline"));
    upstream.clear_log();
    let (code, out, _) = run(&proxy, &["refresh", "demo"]).await;
    assert_eq!(code, Some(1));
    assert!(out.contains("not contacted in offline mode"), "{out}");
    assert_eq!(upstream.requests().len(), 0);
    assert!(done(&proxy, &["offline", "off"]).await.starts_with("online"));
}

#[tokio::test]
async fn a_wrong_word_and_a_cache_that_is_gone_are_told_apart() {
    let (_upstream, proxy, _image) = holding().await;
    let (code, _, err) = run(&proxy, &["show", "docker.io/library/dmo:latest"]).await;
    assert_eq!(code, Some(1));
    assert!(
        err.contains("did you mean docker.io/library/demo:latest?"),
        "{err}"
    );
    let (code, ..) = run(&proxy, &["show"]).await;
    assert_eq!(code, Some(2), "wrong usage");
    let setup = proxy.setup().clone();
    let admin = proxy.admin_address().to_string();
    drop(proxy);
    let mut program = setup.run(&["ls", "--admin", &admin]);
    assert_eq!(program.exit().await, Some(1));
    assert!(
        program.stderr().contains("cannot reach ifnewer at"),
        "{}",
        program.stderr()
    );
}

#[tokio::test]
async fn completions_and_manual_pages_name_every_command() {
    let setup = Setup::empty();
    for shell in ["bash", "zsh", "fish"] {
        let mut program = setup.run(&["completions", shell]);
        assert_eq!(program.exit().await, Some(0), "{}", program.stderr());
        for command in ["refresh", "offline", "why", "demo"] {
            assert!(program.stdout().contains(command), "{command} for {shell}");
        }
    }
    let folder = setup.folder().join("man");
    let mut program = setup.run(&["man", "--out", folder.to_str().unwrap()]);
    assert_eq!(program.exit().await, Some(0), "{}", program.stderr());
    for page in ["ifnewer.1", "ifnewer-pull.1", "ifnewer-why.1"] {
        assert!(folder.join(page).is_file(), "{page}");
    }
}

#[tokio::test]
async fn demo_passes_every_step() {
    let setup = Setup::empty();
    let mut program = setup.run(&["demo"]);
    let code = program.exit().await;
    let told = program.stdout();
    assert_eq!(code, Some(0), "{told}{}", program.stderr());
    for line in [
        "cold pull",
        "unchanged",
        "the tag moved",
        "rate limited",
        "registry down",
        "down, for bob",
        "down, not cached",
    ] {
        assert!(
            told.lines()
                .any(|told| told.starts_with("ok ") && told.contains(line)),
            "{line}: {told}"
        );
    }
    assert!(told.contains("all 10 steps passed"), "{told}");
}

#[tokio::test]
async fn verify_reports_damaged_content() {
    let (_upstream, proxy, image) = holding().await;
    let out = done(&proxy, &["verify", "--rebuild-index"]).await;
    assert!(out.contains("; 0 damaged"), "{out}");
    let blob = &image.blobs[0];
    let path = proxy.until_kept(&blob.digest).await;
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, vec![0; blob.bytes.len()]).unwrap();
    let (code, out, err) = run(&proxy, &["verify"]).await;
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(out.contains(&blob.digest), "{out}");
}

#[tokio::test]
async fn gc_says_what_it_would_free_and_removes_nothing_young() {
    let (_upstream, proxy, _image) = holding().await;
    let out = done(&proxy, &["gc"]).await;
    assert!(out.contains("would free 0 B") && out.contains("--yes"), "{out}");
    let out = done(&proxy, &["gc", "--yes", "--unused-for", "1h"]).await;
    assert!(out.starts_with("freed 0 B"), "{out}");
}

#[tokio::test]
async fn blocks_and_approvals_are_given_listed_and_taken_back() {
    let (_upstream, proxy, image) = holding().await;
    let (digest, in_demo) = (image.digest.as_str(), format!("demo@{}", image.digest));
    let full = format!("docker.io/library/demo@{digest}");
    assert!(done(&proxy, &["blocks"]).await.contains("no digest is blocked"));
    let words = ["block", &in_demo, "--reason", "CVE-2026-1"];
    assert_eq!(done(&proxy, &words).await, format!("{full} blocked\n"));
    assert!(done(&proxy, &words).await.contains("was blocked already"));
    let (code, out, err) = run(&proxy, &["approve", &in_demo]).await;
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(
        out.contains("approved, but it is blocked and not served"),
        "{out}"
    );
    assert!(done(&proxy, &["ls"]).await.contains("complete, blocked"));
    assert!(
        done(&proxy, &["show", "demo"])
            .await
            .contains("blocked    not served")
    );
    let listed = done(&proxy, &["blocks"]).await;
    for part in [
        &format!("blocked   {digest}  docker.io/library/demo  2"),
        &format!("approved  {digest}  docker.io/library/demo  2"),
        "CVE-2026-1",
    ] {
        assert!(listed.contains(part), "{part}: {listed}");
    }
    let json: Value = serde_json::from_str(&done(&proxy, &["blocks", "--json"]).await).unwrap();
    assert_eq!(json["blocks"][0]["image"], full);
    assert_eq!(json["approvals"][0]["digest"], digest);

    done(&proxy, &["block", digest]).await;
    let (code, out, _) = run(&proxy, &["unblock", &in_demo]).await;
    assert_eq!(code, Some(1), "{out}");
    assert!(out.contains("is still blocked in every repository"), "{out}");
    assert_eq!(
        done(&proxy, &["unblock", digest]).await,
        format!("{digest} unblocked\n")
    );
    assert!(
        done(&proxy, &["unblock", digest])
            .await
            .contains("was not blocked")
    );
    done(&proxy, &["approve", digest]).await;
    let (code, out, err) = run(&proxy, &["approve", &in_demo, "--undo"]).await;
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(out.contains("is still approved in every repository"), "{out}");
    assert!(err.contains("1 of 1 are still approved"), "{err}");
    assert!(
        done(&proxy, &["approve", digest, "--undo"])
            .await
            .contains("is no longer approved")
    );
    assert!(
        done(&proxy, &["approve", &in_demo, "--undo"])
            .await
            .contains("was not approved")
    );
    let (code, _, err) = run(&proxy, &["block", "demo:latest"]).await;
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("a digest is required"), "{err}");
    proxy.pull("library/demo", "latest", &image).await;
}

#[tokio::test]
async fn failed_block_does_not_keep_others_from_being_blocked() {
    let proxy = Proxy::over(&Upstream::start().await).await;
    let digests: Vec<String> = (0..2).map(|number| format!("sha256:{number:064x}")).collect();
    let words = |command, more: &[&'static str]| -> Vec<String> {
        let images = ["demo:latest", &digests[0], "nowhere/demo", &digests[1]];
        let words = [command].into_iter().chain(images).chain(more.iter().copied());
        words.map(str::to_owned).collect()
    };
    for (command, more, state) in [
        ("block", &[][..], "blocked"),
        ("approve", &[], "approved"),
        ("approve", &["--undo"], "is no longer approved"),
        ("unblock", &[], "unblocked"),
    ] {
        let words = words(command, more);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let (code, out, err) = run(&proxy, &words).await;
        assert_eq!(code, Some(1), "{out}{err}");
        assert!(err.contains("2 of 4 failed"), "{err}");
        let lines: Vec<&str> = out.lines().collect();
        assert!(lines[0].starts_with("demo:latest: a digest is required"), "{out}");
        assert!(lines[2].starts_with("nowhere/demo: "), "{out}");
        for (line, digest) in [(1, &digests[0]), (3, &digests[1])] {
            assert!(
                lines[line].starts_with(&format!("{digest} {state}")),
                "{command}: {out}"
            );
        }
    }
    let (code, out, err) = run(&proxy, &["block", "demo:latest", &digests[0], "--json"]).await;
    assert_eq!(code, Some(1), "{out}{err}");
    let lines: Vec<Value> = out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines[0]["image"], "demo:latest");
    assert!(
        lines[0]["error"]
            .as_str()
            .unwrap()
            .contains("a digest is required"),
        "{out}"
    );
    assert_eq!(lines[1]["blocked"], true);
}

#[tokio::test]
async fn block_of_an_index_names_the_images_it_leaves() {
    let upstream = Upstream::start().await;
    let children = [Image::with_layers(&["amd64"]), Image::with_layers(&["arm64"])];
    for child in &children {
        upstream.push_untagged("library/demo", child.clone());
    }
    let index = upstream.push("library/demo", "latest", Image::index(&children));
    let proxy = Proxy::over(&upstream).await;
    proxy.manifest("library/demo", "latest").await.is_image(&index);
    done(&proxy, &["block", &children[0].digest]).await;
    let in_demo = |image: &Image| format!("docker.io/library/demo@{}", image.digest);
    let printed = done(&proxy, &["block", &in_demo(&index)]).await;
    let hint = format!("ifnewer block {}\n", in_demo(&children[1]));
    assert!(printed.ends_with(&hint), "{printed}");
    done(&proxy, &["block", &in_demo(&children[1])]).await;
    let printed = done(&proxy, &["block", &in_demo(&index)]).await;
    assert!(!printed.contains("ifnewer block"), "{printed}");
}
