//! Metrics as their readers parse them: Debian's promtool, and a Prometheus that scrapes the real program and
//! evaluates the queries of the dashboard and the rules.

use crate::proxy::{Ask, Proxy, Setup};
use crate::registry::{Image, Upstream, noise, within};
use serde_json::Value;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A cache in which every counted event has occurred.
async fn busy() -> (Upstream, Proxy, Image) {
    let (upstream, elsewhere) = (Upstream::start().await, Upstream::start_tls().await);
    let target = elsewhere.address().to_string();
    let proxy = Setup::over(&upstream)
        .tail(&format!(
            "[store]\nsize = \"1.5 MB\"\nfree = \"0 B\"\n[connect]\ntunnel = [\"{target}\"]"
        ))
        .start()
        .await;
    upstream.tells_rate_limit(100, 73);
    let demo = upstream.push("library/demo", "latest", Image::with_layers(&["one"]));
    proxy.pull("library/demo", "latest", &demo).await;
    proxy.pull("library/demo", "latest", &demo).await;
    let tunnelled = proxy.get("/v2/").tls(elsewhere.ca_pem(), &["http/1.1"]);
    let tunnelled = tunnelled.through_connect(&target).unchecked();
    assert_eq!(tunnelled.await.status, 200);
    // More than the quota. Everything is younger than the minimum age, so the eviction runs and removes nothing.
    for seed in 0..3 {
        let image = Image::with_layers(&[noise(seed, 600_000)]);
        let image = upstream.push("library/large", &seed.to_string(), image);
        proxy.manifest("library/large", &seed.to_string()).await;
        let layer = image.layer(0);
        proxy.blob("library/large", &layer.digest).await.is_blob(layer);
    }
    upstream.refuses();
    proxy.manifest("library/demo", "latest").await.is_stale();
    (upstream, proxy, demo)
}

async fn plain(proxy: &Proxy) -> String {
    let reply = proxy.admin("/metrics").await;
    assert!(
        reply
            .header("content-type")
            .unwrap()
            .starts_with("text/plain; version=0.0.4")
    );
    String::from_utf8(reply.body.to_vec()).unwrap()
}

/// The value of a sample, by name and labels as printed.
fn sample(text: &str, name: &str) -> f64 {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name}: {text}"))
        .parse()
        .unwrap()
}

#[tokio::test]
async fn both_metrics_formats_are_valid() {
    let (_upstream, proxy, _demo) = busy().await;
    let open = proxy
        .admin("/metrics")
        .header(
            "accept",
            "application/openmetrics-text;version=1.0.0,text/plain;q=0.5",
        )
        .await;
    let kind = open.header("content-type").unwrap();
    assert!(
        kind.starts_with("application/openmetrics-text; version=1.0.0"),
        "{kind}"
    );
    assert!(open.body.ends_with(b"# EOF\n"));
    let text = plain(&proxy).await;
    assert!(!text.contains("# EOF") && !text.contains("# UNIT"), "{text}");
    let Some(mut promtool) = started("promtool", &["check", "metrics"], Stdio::piped()) else {
        return;
    };
    let mut input = promtool.stdin.take().unwrap();
    input.write_all(text.as_bytes()).unwrap();
    drop(input);
    let output = promtool.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(
        output.status.success(),
        "promtool: {}",
        String::from_utf8_lossy(&said)
    );
}

#[tokio::test]
#[expect(
    clippy::disallowed_methods,
    reason = "moments are held against the machine's own clock"
)]
async fn certificates_and_quotas_say_when_they_end() {
    let (_upstream, proxy, _demo) = busy().await;
    let text = plain(&proxy).await;
    let now = std::time::SystemTime::now()
        .duration_since(std::time::SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs_f64();
    let left = |name: &str| sample(&text, name) - now;
    let day = 86_400.0;
    let server = left("ifnewer_cert_expiry_timestamp_seconds{certificate=\"server\"}");
    assert!((823.0 * day..826.0 * day).contains(&server), "{server}");
    let ca = left("ifnewer_cert_expiry_timestamp_seconds{certificate=\"ca\"}");
    assert!((3_648.0 * day..3_651.0 * day).contains(&ca), "{ca}");
    let quota = left(
        "ifnewer_upstream_ratelimit_reset_timestamp_seconds{upstream=\"docker.io\",credential=\"anonymous\"}",
    );
    assert!((21_000.0..=21_601.0).contains(&quota), "{quota}");
    let idle = sample(&text, "ifnewer_longest_idle_seconds");
    assert!((0.0..3_600.0).contains(&idle), "{idle}");
}

#[tokio::test]
async fn every_dashboard_and_alert_query_returns_data() {
    let (_upstream, proxy, demo) = busy().await;
    let Some(prometheus) = Prometheus::over(&proxy) else {
        return;
    };
    let questions = questions();
    assert!(questions.len() > 20, "{questions:?}");
    for question in questions {
        let ask = || prometheus.ask(&question);
        let has_answer = |answer: &Value| {
            answer["data"]["result"]
                .as_array()
                .is_some_and(|all| !all.is_empty())
        };
        within(&format!("an answer to {question}"), async {
            loop {
                let answer = ask().await;
                assert_eq!(answer["status"], "success", "{question}: {answer}");
                if has_answer(&answer) {
                    return;
                }
                // A rate needs two scrapes with a change between them.
                prometheus.next_scrape().await;
                let blob = proxy.blob("library/demo", &demo.blobs[0].digest);
                blob.await.is_blob(&demo.blobs[0]);
            }
        })
        .await;
    }
}

/// Queries of the dashboard and the rules. Of an alert only the compared expression, because an alert that does not
/// fire is an empty result.
fn questions() -> Vec<String> {
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging");
    let read = |name: &str| std::fs::read_to_string(packaging.join(name)).unwrap();
    let dashboard: Value = serde_json::from_str(&read("grafana/ifnewer.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().unwrap());
    let asked = targets.map(|target| target["expr"].as_str().unwrap());
    let mut questions: Vec<String> = asked
        .map(|expression| expression.replace("$instance", ".*").replace("$__range", "1h"))
        .collect();
    let rules = read("prometheus/rules.yml");
    let names = rules
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        // The tests of the shared storage check its metrics, because they exist with a bucket alone.
        .filter(|word| word.starts_with("ifnewer_") && !word.starts_with("ifnewer_shared_"));
    questions.extend(names.map(str::to_owned));
    questions
}

/// Debian's Prometheus, scraping the program twice a second. Killed on drop.
struct Prometheus {
    process: Child,
    address: SocketAddr,
    _folder: tempfile::TempDir,
}

impl Prometheus {
    fn over(proxy: &Proxy) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("prometheus.yml");
        let text = format!(
            "global: {{scrape_interval: 500ms}}\nscrape_configs: [{{job_name: ifnewer, static_configs: [{{targets: [\"{}\"]}}]}}]\n",
            proxy.admin_address()
        );
        std::fs::write(&config, text).unwrap();
        let words = [
            format!("--config.file={}", config.display()),
            format!("--storage.tsdb.path={}", folder.path().join("data").display()),
            "--web.listen-address=127.0.0.1:0".to_owned(),
        ];
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut process = started("prometheus", &words, Stdio::null())?;
        let mut said = BufReader::new(process.stderr.take().unwrap())
            .lines()
            .map_while(Result::ok);
        let address = said.find_map(|line| {
            let (_, address) = line.split_once("msg=\"Listening on\" address=")?;
            address.trim().parse().ok()
        });
        // Its further output must be read, or the pipe blocks it.
        std::thread::spawn(move || said.for_each(drop));
        Some(Self {
            process,
            address: address.expect("prometheus listens"),
            _folder: folder,
        })
    }

    async fn ask(&self, question: &str) -> Value {
        let escaped = question
            .bytes()
            .fold(String::new(), |text, byte| text + &format!("%{byte:02X}"));
        let path = format!("/api/v1/query?query={escaped}");
        loop {
            let reply = Ask::new(self.address, "GET", &path).unchecked().await;
            // The listener opens before Prometheus is ready.
            if reply.status != 503 {
                return reply.json();
            }
            tokio::task::yield_now().await;
        }
    }

    /// Waits for one more scrape.
    async fn next_scrape(&self) {
        let last = async || self.ask("timestamp(up)").await["data"]["result"][0]["value"][1].clone();
        let before = last().await;
        while last().await == before {
            tokio::task::yield_now().await;
        }
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A Debian program. If absent, prints a notice and returns `None`.
#[expect(
    clippy::disallowed_methods,
    reason = "CI says by a variable that nothing may be skipped"
)]
fn started(program: &str, words: &[&str], input: Stdio) -> Option<Child> {
    let child = Command::new(program)
        .args(words)
        .stdin(input)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    if child.is_err() {
        assert!(std::env::var_os("CI").is_none(), "{program} is not here");
        eprintln!("SKIPPED: {program} is not here");
    }
    child.ok()
}
