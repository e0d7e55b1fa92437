//! Section `[limits]`: ranges of each limit, and contradictory combinations.

use std::time::Duration;

use super::Limits;
use super::diagnostic::{Report, Reported};
use super::parsers;
use super::table::Table;

/// Maximum file descriptors of a process (default of Linux `fs.nr_open`).
const DESCRIPTORS_MAX: usize = 1 << 20;

/// Upper bound of downloads: each buffers up to 256 KiB, so 1024 buffer 256 MiB.
const DOWNLOADS_MAX: usize = 1024;

/// Upper bound of connections for one blob. Registries count connections of an address as abuse.
const PARALLEL_CONNECTIONS_MAX: usize = 16;

/// Upper bound of numbers without a specific one.
const MANY: usize = 1_000_000;

pub(super) fn read(table: &Table, report: &mut Report<'_>) -> Result<Limits, Reported> {
    let descriptors = "a process has at most 1048576 file descriptors, and each connection needs five";
    let connections_max = number(
        table,
        report,
        "connections_max",
        (DESCRIPTORS_MAX / 5, descriptors),
    );
    let per_peer = number(
        table,
        report,
        "connections_per_peer_max",
        (DESCRIPTORS_MAX / 5, descriptors),
    );
    let streams = number(
        table,
        report,
        "streams_per_connection_max",
        (MANY, "no client sends as many"),
    );
    let tunnels_max = number(table, report, "tunnels_max", (DESCRIPTORS_MAX / 10, descriptors));
    let memory = "each download uses up to 256 KiB of memory, two files and a connection";
    let downloads_max = number(table, report, "downloads_max", (DOWNLOADS_MAX, memory));
    let per_upstream = number(
        table,
        report,
        "downloads_per_upstream_max",
        (DOWNLOADS_MAX, memory),
    );
    let connections = table.number(report, "parallel_connections", 1..PARALLEL_CONNECTIONS_MAX + 1);
    let blob_bytes_min = table.text(report, "parallel_min", &parsers::PARALLEL_SIZE);
    let handshake_timeout = table.text(report, "handshake_timeout", &parsers::TIMEOUT);
    let header_timeout = table.text(report, "header_timeout", &parsers::TIMEOUT);
    let idle_timeout = table.text(report, "idle_timeout", &parsers::TIMEOUT);
    let write_timeout = table.text(report, "write_timeout", &parsers::TIMEOUT);
    let drain = table.text(report, "drain", &parsers::DURATION);
    let limits = Limits {
        connections_max: connections_max?,
        connections_per_peer_max: per_peer?,
        streams_per_connection_max: streams.and_then(|number| u32::try_from(number).map_err(|_| Reported))?,
        tunnels_max: tunnels_max?,
        downloads_max: downloads_max?,
        downloads_per_upstream_max: per_upstream?,
        parallel_connections: connections?,
        parallel_bytes_min: blob_bytes_min?,
        handshake_timeout: handshake_timeout?,
        header_timeout: header_timeout?,
        idle_timeout: idle_timeout?,
        write_timeout: write_timeout?,
        drain: drain?,
    };
    check_header_timeout(table, &limits, report);
    Ok(Limits {
        connections_per_peer_max: part(
            table,
            report,
            ("connections_per_peer_max", limits.connections_per_peer_max),
            ("connections_max", limits.connections_max),
        ),
        tunnels_max: part(
            table,
            report,
            ("tunnels_max", limits.tunnels_max),
            ("connections_max", limits.connections_max),
        ),
        downloads_per_upstream_max: part(
            table,
            report,
            ("downloads_per_upstream_max", limits.downloads_per_upstream_max),
            ("downloads_max", limits.downloads_max),
        ),
        ..limits
    })
}

/// Reads a number from 1 to `max`; the error names the reason of the maximum.
fn number(
    table: &Table,
    report: &mut Report<'_>,
    key: &str,
    (max, why): (usize, &str),
) -> Result<usize, Reported> {
    let number = table.number(report, key, 1..MANY + 1)?;
    if number <= max {
        return Ok(number);
    }
    let message = format!("{number} is more than a process can have: {why}");
    let help = format!("{max} at most");
    Err(report.emit(table.at(key), table.path(key), message, Some(help)))
}

/// Limits a number to a total that includes it. A default above the total is lowered; a configured value is an error.
fn part(
    table: &Table,
    report: &mut Report<'_>,
    (key, number): (&str, usize),
    (of, total): (&str, usize),
) -> usize {
    if number > total && table.is_set(key) {
        let message = format!("{number} is more than `{of}` ({total}), which includes it");
        let help = format!("lower it to {total} at most, or raise `{of}`");
        report.emit(table.at(key), table.path(key), message, Some(help));
    }
    number.min(total)
}

/// `first_byte_timeout` starts with the request, so it includes the connection.
pub(super) fn check_connect_timeout(
    table: &Table,
    connect: Duration,
    first_byte: Duration,
    report: &mut Report<'_>,
) {
    let (key, total) = ("connect_timeout", "first_byte_timeout");
    if connect <= first_byte || !table.is_set(key) || !table.is_set(total) {
        return;
    }
    let words = |duration: Duration| humantime::format_duration(duration);
    let message = format!(
        "{} is never reached: `{total}` ({}) starts with the request and includes it",
        words(connect),
        words(first_byte)
    );
    let help = format!("make it shorter than `{total}`");
    report.emit(table.at(key), table.path(key), message, Some(help));
}

/// An idle connection ends after the longer of two other timeouts, so a longer header timeout has no effect.
fn check_header_timeout(table: &Table, limits: &Limits, report: &mut Report<'_>) {
    let key = "header_timeout";
    let (header, quiet) = (
        limits.header_timeout,
        limits.idle_timeout.max(limits.write_timeout),
    );
    if !table.is_set(key) || header <= quiet {
        return;
    }
    let words = |duration: Duration| humantime::format_duration(duration);
    let message = format!(
        "{} is never reached: a connection ends when nothing has moved on it for {}, the longer of `idle_timeout` and \
         `write_timeout`",
        words(header),
        words(quiet)
    );
    let help = "make it shorter, or one of those longer".to_owned();
    report.emit(table.at(key), table.path(key), message, Some(help));
}
