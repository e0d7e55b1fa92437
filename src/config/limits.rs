//! Section `[limits]`: ranges of each limit, and contradictory combinations.

use super::Limits;
use super::diagnostic::{Checked, Report, Subject};
use super::document::Document;
use super::parsers::{Count, MANY, Timeout};
use super::policy::words;
use super::schema;
use super::setting::Field;

/// Maximum file descriptors of a process (default of Linux `fs.nr_open`).
const DESCRIPTORS_MAX: usize = 1 << 20;

/// Upper bound of downloads: each buffers up to 256 KiB, so 1024 buffer 256 MiB.
const DOWNLOADS_MAX: usize = 1024;

pub(super) fn read(document: &Document<'_>, report: &mut Report<'_>) -> Checked<Limits> {
    let keys = schema::Limits::of(document, report);
    let descriptors = "a process has at most 1048576 file descriptors, and each connection needs five";
    let memory = "each download uses up to 256 KiB of memory, two files and a connection";
    let mut possible = Ok(());
    for (field, max, why) in [
        (&keys.connections_max, DESCRIPTORS_MAX / 5, descriptors),
        (&keys.connections_per_peer_max, DESCRIPTORS_MAX / 5, descriptors),
        (&keys.tunnels_max, DESCRIPTORS_MAX / 10, descriptors),
        (&keys.downloads_max, DOWNLOADS_MAX, memory),
        (&keys.downloads_per_upstream_max, DOWNLOADS_MAX, memory),
    ] {
        if let Ok(Count(number)) = field.get()
            && number > max
        {
            let message = format!("{number} is more than a process can have: {why}");
            possible = Err(report.emit(&field.subject, message, format!("{max} at most")));
        }
    }
    let mut limits = Limits {
        connections_max: keys.connections_max.get()?.0,
        connections_per_peer_max: keys.connections_per_peer_max.get()?.0,
        streams_per_connection_max: u32::try_from(keys.streams_per_connection_max.get()?.0)
            .unwrap_or(u32::MAX),
        tunnels_max: keys.tunnels_max.get()?.0,
        downloads_max: keys.downloads_max.get()?.0,
        downloads_per_upstream_max: keys.downloads_per_upstream_max.get()?.0,
        parallel_connections: keys.parallel_connections.get()?.0,
        parallel_bytes_min: keys.parallel_min.get()?.into(),
        handshake_timeout: keys.handshake_timeout.get()?.into(),
        header_timeout: keys.header_timeout.get()?.into(),
        idle_timeout: keys.idle_timeout.get()?.into(),
        write_timeout: keys.write_timeout.get()?.into(),
        drain: keys.drain.get()?.into(),
    };
    possible?;
    check_header_timeout(&keys.header_timeout, &limits, report);
    let (connections, downloads) = (&keys.connections_max.subject, &keys.downloads_max.subject);
    for (number, field, total, of) in [
        (
            &mut limits.connections_per_peer_max,
            &keys.connections_per_peer_max,
            limits.connections_max,
            connections,
        ),
        (
            &mut limits.tunnels_max,
            &keys.tunnels_max,
            limits.connections_max,
            connections,
        ),
        (
            &mut limits.downloads_per_upstream_max,
            &keys.downloads_per_upstream_max,
            limits.downloads_max,
            downloads,
        ),
    ] {
        limit_to_total(number, field, total, of, report);
    }
    Ok(limits)
}

/// Limits a number to a total that includes it. A default above the total is lowered; a configured value is an error.
fn limit_to_total(
    number: &mut usize,
    field: &Field<Count<MANY>>,
    total: usize,
    of: &Subject,
    report: &mut Report<'_>,
) {
    if *number > total && field.is_set {
        let of = of.name();
        let message = format!("{number} is more than `{of}` ({total}), which includes it");
        let help = format!("lower it to {total} at most, or raise `{of}`");
        report.emit(&field.subject, message, help);
    }
    *number = total.min(*number);
}

/// `first_byte_timeout` starts with the request, so it includes the connection.
pub(super) fn check_connect_timeout(keys: &schema::Upstream, report: &mut Report<'_>) {
    let (field, total) = (&keys.connect_timeout, &keys.first_byte_timeout);
    if let (Ok(Timeout(connect)), Ok(Timeout(first_byte))) = (field.get(), total.get())
        && connect > first_byte
        && field.is_set
        && total.is_set
    {
        let message = format!(
            "{} is never reached: `first_byte_timeout` ({}) starts with the request and includes it",
            words(connect),
            words(first_byte)
        );
        report.emit(
            &field.subject,
            message,
            "make it shorter than `first_byte_timeout`",
        );
    }
}

/// An idle connection ends after the longer of two other timeouts, so a longer header timeout has no effect.
fn check_header_timeout(field: &Field<Timeout>, limits: &Limits, report: &mut Report<'_>) {
    let quiet = limits.idle_timeout.max(limits.write_timeout);
    if field.is_set && limits.header_timeout > quiet {
        let message = format!(
            "{} is never reached: a connection ends when nothing has moved on it for {}, the longer of `idle_timeout` and \
             `write_timeout`",
            words(limits.header_timeout),
            words(quiet)
        );
        report.emit(&field.subject, message, "make it shorter, or one of those longer");
    }
}
