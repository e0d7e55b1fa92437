//! Prometheus text format 0.0.4, for scrapers that do not accept `OpenMetrics`:
//! <https://github.com/prometheus/docs/blob/main/content/docs/instrumenting/exposition_formats.md>.
//!
//! The samples are the same. A family has the name of its samples (`…_total`, `…_info`), an info is a gauge, and
//! there is no unit and no end marker.

use std::fmt::Write as _;

/// Converts the `OpenMetrics` text format.
pub(super) fn plain(open: &str) -> String {
    let mut text = String::with_capacity(open.len());
    let mut lines = open.lines().peekable();
    while let Some(line) = lines.next() {
        let Some(about) = line.strip_prefix("# HELP ") else {
            let is_sample = !line.starts_with("# UNIT ") && line != "# EOF";
            if is_sample {
                text.push_str(line);
                text.push('\n');
            }
            continue;
        };
        let (name, help) = about.split_once(' ').unwrap_or((about, ""));
        let kind = lines
            .next_if(|line| line.starts_with("# TYPE "))
            .and_then(|line| line.rsplit(' ').next())
            .unwrap_or("untyped");
        let (ending, kind) = match kind {
            "counter" => ("_total", "counter"),
            "info" => ("_info", "gauge"),
            other => ("", other),
        };
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "# HELP {name}{ending} {help}\n# TYPE {name}{ending} {kind}\n"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_have_the_names_of_their_samples() {
        let open = "# HELP a_bytes Bytes.\n# TYPE a_bytes counter\n# UNIT a_bytes bytes\na_bytes_total{x=\"1\"} 2\n\
                    # HELP build Which.\n# TYPE build info\nbuild_info{version=\"1\"} 1\n\
                    # HELP up Is it.\n# TYPE up gauge\nup 1\n# EOF\n";
        let old = "# HELP a_bytes_total Bytes.\n# TYPE a_bytes_total counter\na_bytes_total{x=\"1\"} 2\n\
                   # HELP build_info Which.\n# TYPE build_info gauge\nbuild_info{version=\"1\"} 1\n\
                   # HELP up Is it.\n# TYPE up gauge\nup 1\n";
        assert_eq!(plain(open), old);
    }
}
