//! Client for small responses: wrk with one thread.

use crate::Outcome;
use crate::connection::Endpoint;
use crate::content::MANIFEST_TYPE;
use crate::servers::Server;
use std::process::Command;
use std::time::Duration;

/// Result of wrk, with the CPU time of the server.
pub(crate) struct Replied {
    pub(crate) requests: f64,
    pub(crate) seconds: f64,
    pub(crate) cpu_seconds: f64,
    pub(crate) p99_ms: f64,
}

/// Result of wrk alone.
pub(crate) struct Load {
    pub(crate) requests: f64,
    pub(crate) seconds: f64,
    pub(crate) p99_ms: f64,
}

/// Small responses over plain HTTP, by wrk with one thread and these header lines.
pub(crate) fn wrk(
    server: &Server,
    path: &str,
    lines: &[&str],
    connections: usize,
    window: Duration,
) -> Outcome<Replied> {
    let before = server.cpu_seconds()?;
    let options: Vec<&str> = lines.iter().flat_map(|line| ["--header", line]).collect();
    let load = load(&server.plain, path, &options, connections, window)?;
    Ok(Replied {
        requests: load.requests,
        seconds: load.seconds,
        cpu_seconds: server.cpu_seconds()? - before,
        p99_ms: load.p99_ms,
    })
}

/// The same with these options of wrk, for a server whose CPU time the caller reads.
pub(crate) fn load(
    endpoint: &Endpoint,
    path: &str,
    options: &[&str],
    connections: usize,
    window: Duration,
) -> Outcome<Load> {
    let output = Command::new("wrk")
        .args(["--threads", "1", "--connections", &connections.to_string()])
        .args(["--duration", &format!("{}s", window.as_secs()), "--latency"])
        .args(["--header", &format!("Accept: {MANIFEST_TYPE}")])
        .args(options)
        .arg(format!("http://{}{path}", endpoint.address))
        .output()
        .map_err(|e| format!("wrk: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() || text.contains("Non-2xx") || text.contains("Socket errors") {
        return Err(format!("wrk on {path}: {text}").into());
    }
    // "  123456 requests in 2.00s, 98.76MB read" and "Requests/sec:  61728.00"
    let requests: f64 = word_before(&text, " requests in ")?.parse()?;
    let rate: f64 = text
        .rsplit("Requests/sec:")
        .next()
        .and_then(|rest| rest.split_whitespace().next())
        .ok_or("wrk text no rate")?
        .parse()?;
    // "     99%    1.23ms"
    let slowest = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("99%"))
        .ok_or("wrk text no 99%")?;
    Ok(Load {
        requests,
        seconds: requests / rate,
        p99_ms: milliseconds(slowest.trim())?,
    })
}

/// A duration of wrk: `1.23ms`, `45.00us`, `1.20s` or `1.05m`.
fn milliseconds(text: &str) -> Outcome<f64> {
    for (unit, factor) in [("us", 1e-3), ("ms", 1.0), ("s", 1e3), ("m", 60e3)] {
        if let Some(number) = text.strip_suffix(unit) {
            return Ok(number.parse::<f64>()? * factor);
        }
    }
    Err(format!("wrk wrote a duration of another form: {text}").into())
}

fn word_before<'s>(said: &'s str, mark: &str) -> Outcome<&'s str> {
    let (before, _) = said
        .split_once(mark)
        .ok_or_else(|| format!("wrk did not say{mark}"))?;
    Ok(before.rsplit(char::is_whitespace).next().unwrap_or_default())
}
