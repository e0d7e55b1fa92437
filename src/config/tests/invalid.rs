//! Invalid settings: message and location.

use std::path::Path;

use super::gather;
use crate::config::diagnostic::Diagnostic;
use crate::config::{Config, Diagnostics};

fn faults(text: &str) -> Diagnostics {
    Config::read(text, Path::new("f.toml"))
        .map(|config| panic!("accepted {text}: {config:?}"))
        .unwrap_err()
}

/// Location and message of each diagnostic, without the file name.
fn first_lines(faults: &Diagnostics) -> Vec<String> {
    let line = |fault: &Diagnostic| match &fault.position {
        Some(position) => format!("{}:{}: {}", position.line, position.columns.start, fault.message),
        None => format!("{}: {}", fault.source, fault.message),
    };
    faults.0.iter().map(line).collect()
}

/// Location, message and hint of the only diagnostic of a variable or a flag.
fn of_override(variables: &[(&str, &str)], flags: &[(&'static str, &'static str, &str)]) -> String {
    let faults = gather("", variables, flags).unwrap_err();
    let help = faults.0[0].help.iter().map(|help| format!("\nhelp: {help}"));
    first_lines(&faults).into_iter().chain(help).collect()
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table, one mistake a line")]
fn invalid_setting_reports_its_location() {
    #[rustfmt::skip]
    let table = [
        // The grammar of TOML.
        ("data = always", "1:8: a string needs quotes"),
        ("[listen\nplain_http = \"any\"", "1:8: unclosed table, expected `]`"),
        ("data = \"a\"\ndata = \"b\"", "2:1: duplicate key"),
        ("[store]\nsize = \"1 GiB", "2:14: invalid basic string, expected `\"`"),
        // Unknown keys and sections.
        ("polcy = \"always\"", "1:1: unknown key `polcy`"),
        ("\n[default]\n  polcy = \"always\"", "3:3: unknown key `polcy`"),
        ("[defualt]\npolicy = \"always\"", "1:2: unknown key `defualt`"),
        ("[listen]\ndefault_upstream = \"ghcr.io\"", "2:1: unknown key `default_upstream`"),
        ("[upstream.\"ghcr.io\"]\ncredential_helper = \"ecr-login\"", "2:21: a credential of the cache would make this upstream's private images readable by every client"),
        ("[upstream.\"ghcr.io\"]\nauth = \"shared\"\ncredential_helper = \"../evil\"", "3:21: the name of a credential helper has letters, digits, `-`, `_` and `.` only"),
        ("[upstream.\"ghcr.io\"]\nauth = \"shared\"\ncredential_helper = \"a\"\ndocker_config = \"b\"", "3:21: several credentials for one upstream: docker_config, credential_helper"),
        ("[upstream.\"ghcr.io\"]\ndocker_config = \"x\"", "2:17: a credential of the cache would make this upstream's private images readable by every client"),
        ("[upstream.\"ghcr.io\"]\npassword = \"x\"", "2:1: unknown key `password`"),
        ("[[rule]]\nimages = [\"*\"]\ngrant_ttl = \"5m\"", "3:1: unknown key `grant_ttl`"),
        // Sections of the wrong shape.
        ("listen = 5", "1:1: `listen` is a section"),
        ("[rule]\nimages = []", "1:2: `rule` is a list of sections"),
        ("rule = [1]", "1:9: a rule is a section"),
        ("upstream = []", "1:1: `upstream` is a list of sections"),
        ("[upstream]\n\"ghcr.io\" = 1", "2:1: an upstream is a section of its own"),
        ("[upstream.ghcr.io]\npolicy = \"always\"", "1:11: an upstream's name with dots needs quotes"),
        ("[upstream.registry.k8s.io]", "1:11: an upstream's name with dots needs quotes"),
        // Kinds.
        ("data = 5", "1:8: expected a path, found a number"),
        ("[listen]\nregistry = \"127.0.0.1:5000\"", "2:12: expected a list, found a string"),
        ("[default]\nrevalidate_timeout = 2", "2:22: expected a duration, found a number"),
        ("[default]\nrevalidate_timeout = 2.5", "2:22: expected a duration, found a fraction"),
        ("[limits]\nconnections_max = \"many\"", "2:19: expected a whole number, found a string"),
        ("[limits]\nconnections_max = 0", "2:19: 0 is outside of 1 to 1000000"),
        ("[limits]\nconnections_max = 209716", "2:19: 209716 is more than a process can have: a process has at most 1048576 file descriptors, and each connection needs five"),
        ("[limits]\ndownloads_max = 1025", "2:17: 1025 is more than a process can have: each download uses up to 256 KiB of memory, two files and a connection"),
        ("[limits]\nconnections_max = 100\nconnections_per_peer_max = 101", "3:28: 101 is more than `connections_max` (100), which includes it"),
        ("[limits]\nconnections_per_peer_max = 5000", "2:28: 5000 is more than `connections_max` (4096), which includes it"),
        ("[limits]\nconnections_max = 100\ntunnels_max = 200", "3:15: 200 is more than `connections_max` (100), which includes it"),
        ("[limits]\ndownloads_max = 8\ndownloads_per_upstream_max = 9", "3:30: 9 is more than `downloads_max` (8), which includes it"),
        ("[limits]\nheader_timeout = \"2m\"", "2:18: 2m is never reached: a connection ends when nothing has moved on it for 1m, the longer of `idle_timeout` and `write_timeout`"),
        ("[upstream.\"ghcr.io\"]\nconnect_timeout = \"10s\"\nfirst_byte_timeout = \"5s\"", "2:19: 10s is never reached: `first_byte_timeout` (5s) starts with the request and includes it"),
        ("[limits]\nparallel_min = \"1 MiB\"", "2:16: 1.0 MiB is less than a further connection is worth"),
        ("[limits]\nparallel_connections = 17", "2:24: 17 is outside of 1 to 16"),
        ("[limits]\ndownloads_max = -5", "2:17: -5 is outside of 1 to 1000000"),
        ("[limits]\ndownloads_max = 99999999999999999999", "2:17: expected a whole number, found a number that is too large"),
        ("[upstream.\"ghcr.io\"]\nenabled = \"no\"", "2:11: expected true or false, found a string"),
        ("[tls]\nnames = [\"a.example.org\", 5]", "2:27: expected a host name or an address, found a number"),
        // Durations and sizes.
        ("[default]\nmax_age = \"5\"", "2:11: the duration `5` has no unit"),
        ("[default]\nmax_age = \"5 parsecs\"", "2:11: `5 parsecs` is not a duration"),
        ("[default]\nmax_age = \"forever\"", "2:11: `forever` is not valid here"),
        ("[default]\nrevalidate_timeout = \"0s\"", "2:22: a timeout of zero would fail every request"),
        ("[store]\nsize = \"big\"", "2:8: `big` is not a size"),
        ("[store]\nsize = \"50\"", "2:8: 50 B is too small to hold an image"),
        // Choices.
        ("[default]\npolicy = \"if-never\"", "2:10: `if-never` is none of \"always\", \"if-newer\", \"if-not-present\", \"never\""),
        ("[default]\non_not_found = \"keep\"", "2:16: `keep` is none of \"refuse\", \"serve-stale\""),
        ("[listen]\nplain_http = \"all\"", "2:14: `all` is none of \"loopback\", \"any\", \"off\""),
        ("[log]\nlevel = \"verbose\"", "2:9: `verbose` is none of \"off\", \"error\", \"warn\", \"info\", \"debug\", \"trace\""),
        ("[log]\nlevel = \"info,ifnewer=loud\"", "2:9: `info,ifnewer=loud` is not a filter"),
        ("[log]\nformat = \"xml\"", "2:10: `xml` is none of \"human\", \"json\""),
        // Addresses.
        ("[listen]\nregistry = [\"127.0.0.1\"]", "2:13: `127.0.0.1` is not an address with a port"),
        ("[listen]\nregistry = [\"127.0.0.1:1\", \":5000\"]", "2:28: `:5000` is not an address with a port"),
        ("[listen]\nregistry = []", "2:12: without an address no client can reach the cache"),
        ("[listen]\nregistry = [\"127.0.0.1:1\", \"127.0.0.1:1\"]", "2:28: `127.0.0.1:1` is listed twice"),
        ("[listen]\nadmin = \"unix:admin.sock\"", "2:9: the path of a unix socket must be absolute"),
        ("[listen]\nadmin = \"127.0.0.1:5000\"", "2:9: `127.0.0.1:5000` is already an address of the registry"),
        ("data = \"\"", "1:8: an empty path"),
        ("data = \"~/cache\"", "1:8: `~` is not expanded here"),
        ("[tls]\ncertificate = \"~/c.pem\"", "2:15: `~` is not expanded here"),
        ("[tls]\ncertificate = \"c.pem\"", "2:15: `certificate` without `key`"),
        ("[tls]\nnames = [\"https://cache\"]", "2:10: `https://cache` is not a name for a certificate"),
        ("[connect]\ntunnel = [\"https://example.org\"]", "2:11: `https://example.org` is not a host name"),
        // Upstreams.
        ("default_upstream = \"dcker.io\"", "1:20: the upstream `dcker.io` is not configured"),
        ("default_upstream = \"index.docker.io\"", "1:20: the upstream `index.docker.io` is not configured"),
        ("default_upstream = \"quay.io\"\n[upstream.\"quay.io\"]\nenabled = false", "1:20: the upstream `quay.io` is disabled"),
        ("[upstream.\"https://a.example.org\"]", "1:11: `https://a.example.org` is not a host name"),
        ("[upstream.\"Example.org\"]", "1:11: the host name `Example.org` has capitals"),
        ("[upstream.\"example.org.\"]", "1:11: the host name `example.org.` ends in a dot"),
        ("[upstream.\"a.io\"]\n[upstream.\"a.io:443\"]", "2:11: `a.io:443` and `a.io` are one registry"),
        ("[upstream.\"ghcr.io:443\"]", "1:11: `ghcr.io:443` and `ghcr.io` are one registry"),
        ("[upstream.\"[::1]:5000\"]\n[upstream.\"[0:0::1]:5000\"]", "2:11: `[0:0::1]:5000` and `[::1]:5000` are one registry"),
        ("[upstream.\"a.io\"]\nhosts = [\"ghcr.io:443\"]", "2:10: `ghcr.io:443` already means the upstream `ghcr.io`"),
        ("[upstream.\"mirror\"]", "1:11: `mirror` looks like a repository name"),
        ("[upstream.\"ghcr.io\"]\nurl = \"ghcr.io\"", "2:7: the URL has no scheme"),
        ("[upstream.\"ghcr.io\"]\nurl = \"ftp://ghcr.io\"", "2:7: an upstream's URL begins with https:// or http://"),
        ("[upstream.\"ghcr.io\"]\nurl = \"https://ghcr.io?x=y\"", "2:7: an upstream's URL has no query and no fragment"),
        ("[upstream.\"ghcr.io\"]\nurl = \"https://ghcr.io#x\"", "2:7: an upstream's URL has no query and no fragment"),
        ("[upstream.\"ghcr.io\"]\nurl = \"https://u:p@ghcr.io\"", "2:7: a URL with a user or password is not accepted here"),
        ("[upstream.\"ghcr.io\"]\nurl = \"https://ghcr.io:99999\"", "2:7: the URL's host or port is wrong"),
        ("[upstream.\"ghcr.io\"]\nurl = \"https://\"", "2:7: not a URL"),
        ("[upstream.\"ghcr.io\"]\nurl = \"https://ghcr.io/v2/\"", "2:7: `/v2` is added automatically"),
        ("[upstream.\"ghcr.io\"]\nurl = []", "2:7: an empty list of URLs"),
        ("[upstream.\"ghcr.io\"]\nurl = [\"https://a.io\", \"https://a.io/\"]", "2:24: `https://a.io` is listed twice"),
        ("[upstream.\"ghcr.io\"]\nurl = \"http://localhost:5000\"", "2:7: `http://localhost:5000` is an address of this cache: requests would loop"),
        ("[upstream.\"ghcr.io\"]\nproxy = \"ftp://proxy\"", "2:9: a proxy's URL begins with http://, https:// or socks5://"),
        ("[upstream.\"ghcr.io\"]\nproxy = \"http://u:p@proxy\"", "2:9: a URL with a user or password is not accepted here"),
        ("[upstream.\"ghcr.io\"]\nproxy = \"env\"", "2:9: `env` is none of \"environment\", \"none\""),
        ("[upstream.\"ghcr.io\"]\ntoken_hosts = [\"https://auth.example.org/token\"]", "2:16: `https://auth.example.org/token` is not a host name"),
        ("[upstream.\"ghcr.io\"]\ntoken_hosts = [\"auth.example.org\", \"*.example.org\"]", "2:36: `*.example.org` is not a host name"),
        ("[upstream.\"ghcr.io\"]\nrepository_prefix = \"Hub\"", "2:21: not the beginning of a repository's name: the character at byte 0 is not allowed in a name"),
        ("[upstream.\"ghcr.io\"]\nrepository_prefix = \"/hub/\"", "2:21: the prefix begins or ends with a slash"),
        ("[upstream.\"ghcr.io\"]\nrepository_prefix = \"https://h.example/hub\"", "2:21: the prefix is not a URL"),
        ("[upstream.\"ghcr.io\"]\nrepository_prefix = [\"a\", \"b\"]", "2:21: 2 prefixes for 1 URLs"),
        ("[upstream.\"ghcr.io\"]\nrepository_prefix = []", "2:21: 0 prefixes for 1 URLs"),
        ("[upstream.\"ghcr.io\"]\nredirects = [\"s3.example.org\", \"*\"]", "2:32: `*` is neither a host nor a network"),
        ("[upstream.\"ghcr.io\"]\nredirects = [\"http://minio.internal/bucket\"]", "2:14: `http://minio.internal/bucket` has a path"),
        ("[upstream.\"ghcr.io\"]\nredirects = [\"0.0.0.0/0\"]", "2:14: `0.0.0.0/0` includes every address"),
        ("[upstream.\"ghcr.io\"]\nredirects = [\"10.0.0.0/99\"]", "2:14: `10.0.0.0/99` has an invalid prefix length"),
        ("[upstream.\"ghcr.io\"]\nredirects = [\"ftp://minio\"]", "2:14: redirects are followed to http:// and https:// only"),
        ("[upstream.\"ghcr.io\"]\nredirects = \"http://minio\"", "2:13: expected a list, found a string"),
        ("[upstream.\"ghcr.io\"]\nclient_certificate = \"c.pem\"", "2:22: `client_certificate` without `client_key`"),
        ("[upstream.\"ghcr.io\"]\nclient_key = \"c.key\"", "2:14: `client_key` without `client_certificate`"),
        ("[upstream.\"ghcr.io\"]\nclient_certificate = \"/absent/c.pem\"\nclient_key = \"/absent/c.key\"", "2:22: cannot read /absent/c.pem: No such file or directory (os error 2)"),
        ("[upstream.\"ghcr.io\"]\nfirst_byte_timeout = \"0s\"", "2:22: a timeout of zero would fail every request"),
        ("[upstream.\"ghcr.io\"]\nfirst_byte_timeout = \"90\"", "2:22: the duration `90` has no unit"),
        ("[upstream.\"ghcr.io\"]\nhosts = [\"quay.io\"]", "2:10: `quay.io` already means the upstream `quay.io`"),
        ("[upstream.\"a.io\"]\nhosts = [\"x.io\"]\n[upstream.\"b.io\"]\nhosts = [\"x.io\"]", "4:10: `x.io` already means the upstream `a.io`"),
        ("[upstream.\"index.docker.io\"]", "1:11: `index.docker.io` is a host of the upstream `docker.io`"),
        ("[upstream.\"ghcr.io\"]\nusername = \"robot\"", "2:12: `username` without `password_file`"),
        ("[upstream.\"ghcr.io\"]\npassword_file = \"p\"", "2:17: `password_file` without `username`"),
        ("[upstream.\"ghcr.io\"]\nusername = \"a:b\"\npassword_file = \"p\"", "2:12: a user name cannot contain `:` or control characters"),
        ("[upstream.\"ghcr.io\"]\nusername = \"robot\"\npassword_file = \"p\"",
            "2:12: a credential of the cache would make this upstream's private images readable by every client"),
        ("[default]\ngrant_ttl = \"24h\"", "2:13: `grant_ttl` (1day) is longer than `grant_ttl_offline` (12h)"),
        ("[upstream.\"ghcr.io\"]\ngrant_ttl_offline = \"1m\"", "2:21: `grant_ttl` (5m) is longer than `grant_ttl_offline` (1m)"),
        // Minimum age.
        ("[default]\nmin_age = \"3\"", "2:11: the duration `3` has no unit"),
        ("[default]\nmin_age = \"forever\"", "2:11: `forever` is not valid here"),
        ("[default]\nmin_age = \"-1d\"", "2:11: `-1d` is not a duration"),
        ("[default]\nmin_age = \"366d\"", "2:11: a minimum age of 366d is too long"),
        ("[default]\nmin_age = 3", "2:11: expected a duration, found a number"),
        ("[default]\non_unknown_age = \"deny\"", "2:18: `deny` is none of \"refuse\", \"serve\""),
        ("[default]\npolicy = \"never\"\nmin_age = \"3d\"", "3:11: `min_age` with policy = \"never\", which forbids the requests that show an age"),
        ("[default]\npolicy = \"never\"\n[upstream.\"ghcr.io\"]\nmin_age = \"3d\"", "4:11: `min_age` with policy = \"never\", which forbids the requests that show an age"),
        ("[[rule]]\nimages = [\"ghcr.io/a/*\"]\npolicy = \"never\"\nmin_age = \"3d\"", "4:11: `min_age` with policy = \"never\", which forbids the requests that show an age"),
        ("[default]\nmin_age_by_digest = \"3d\"", "2:21: expected true or false, found a string"),
        ("[upstream.\"ghcr.io\"]\nmin_age_by_digest = 1", "2:21: expected true or false, found a number"),
        ("[[rule]]\nimages = [\"ghcr.io/a/*:1*\"]\nmin_age_by_digest = true", "3:21: `min_age_by_digest` for globs with a tag, which apply to no pull by digest"),
        // Scheduled refreshes.
        ("[default]\nrefresh = \"30s\"", "2:11: an interval of 30s is too short for a registry"),
        ("[default]\nrefresh = \"0s\"", "2:11: an interval of 0s is too short for a registry"),
        ("[default]\nrefresh = \"31d\"", "2:11: an interval of 31d is too long"),
        ("[default]\nrefresh = \"1\"", "2:11: the duration `1` has no unit"),
        ("[default]\nrefresh = true", "2:11: expected a duration or \"off\", found true or false"),
        ("[default]\npolicy = \"never\"\nrefresh = \"1h\"", "3:11: `refresh` with policy = \"never\", which forbids requests to the registry"),
        ("[default]\npolicy = \"never\"\n[upstream.\"ghcr.io\"]\nrefresh = \"1h\"", "4:11: `refresh` with policy = \"never\", which forbids requests to the registry"),
        ("[[rule]]\nimages = [\"ghcr.io/a/*\"]\npolicy = \"never\"\nrefresh = \"1h\"", "4:11: `refresh` with policy = \"never\", which forbids requests to the registry"),
        ("[upstream.\"ghcr.io\"]\npolicy = \"never\"\n[[rule]]\nimages = [\"ghcr.io/a/*\"]\nrefresh = \"1h\"", "5:11: `refresh` with policy = \"never\", which forbids requests to the registry"),
        ("[default]\nrefresh = \"10d\"", "2:11: `refresh_used_within` (7days) is shorter than `refresh` (10days): a tag would be out of use before its refresh"),
        ("[default]\nrefresh = \"1h\"\nrefresh_used_within = \"30m\"", "3:23: `refresh_used_within` (30m) is shorter than `refresh` (1h): a tag would be out of use before its refresh"),
        ("[default]\nrefresh_quota_floor = \"101%\"", "2:23: 101% is more than the quota"),
        ("[default]\nrefresh_quota_floor = \"99999999999%\"", "2:23: `99999999999%` is not a share in percent"),
        ("[default]\nrefresh_quota_floor = \"25\"", "2:23: `25` is not a share in percent"),
        ("[default]\nrefresh_quota_floor = \"-1%\"", "2:23: `-1%` is not a share in percent"),
        ("[default]\nrefresh_quota_floor = 25", "2:23: expected a share in percent, found a number"),
        ("[[rule]]\nimages = [\"*\"]\nrefresh_quota_floor = \"5%\"", "3:1: unknown key `refresh_quota_floor`"),
        // Rules.
        ("[[rule]]\npolicy = \"always\"", "1:1: a rule without images never applies"),
        ("[[rule]]\nimages = []", "2:10: a rule without images never applies"),
        ("[[rule]]\nimages = [\"ghcr.io/[\"]", "2:11: invalid glob: unclosed character class; missing ']'"),
        ("[[rule]]\nimages = [\"nginx:v1\"]", "2:11: the glob can match no image: an image is `upstream/repository`"),
        ("[[rule]]\nimages = [\"ghcr.io/a@sha256:00\"]", "2:11: a rule cannot name a digest, because content by digest never changes"),
        ("[[rule]]\nimages = [\"dcker.io/nginx\"]", "2:11: the upstream `dcker.io` is not configured"),
        ("[[rule]]\nimages = [\"registry-1.docker.io/library/nginx\"]", "2:11: the upstream `registry-1.docker.io` is not configured"),
        ("[[rule]]\nimages = [\"*:a\"]\n[[rule]]\nimages = [\"*:a\"]", "4:11: never reached: `*:a` is already in rule 1"),
    ];
    for (text, expected) in table {
        assert_eq!(first_lines(&faults(text)), [expected], "{text}");
    }
}

#[test]
fn token_service_needs_full_url_and_one_upstream() {
    #[rustfmt::skip]
    let table = [
        ("[upstream.\"ghcr.io\"]\nlocal_tokens = \"http://ghcr.io/token\"",
            "2:16: a token service URL needs https and a path, as in the upstream's challenges"),
        ("[upstream.\"ghcr.io\"]\nlocal_tokens = \"https://ghcr.io\"",
            "2:16: a token service URL needs https and a path, as in the upstream's challenges"),
        ("[upstream.\"ghcr.io\"]\nlocal_tokens = \"https://quay.io/v2/auth\"", "2:16: `quay.io` already means the upstream `quay.io`"),
        ("[upstream.\"a.io\"]\nlocal_tokens = \"https://x.io/t\"\n[upstream.\"b.io\"]\nlocal_tokens = \"https://x.io/t\"",
            "4:16: `x.io` already means the upstream `a.io`"),
        ("[upstream.\"ghcr.io\"]\nauth = \"shared\"\nlocal_tokens = \"https://ghcr.io/token\"", "3:16: with auth = \"shared\" no client needs a token"),
    ];
    for (text, expected) in table {
        assert_eq!(first_lines(&faults(text)), [expected], "{text}");
    }
}

#[test]
fn all_errors_are_reported_in_file_order() {
    let text = "
polcy = 1
[[rule]]
images = [\"dcker.io/*\"]
policy = \"if_newer\"
[store]
size = 5
free = \"lots\"
[upstream.\"ghcr.io\"]
url = \"ghcr.io\"
max_age = \"5\"
";
    let places: Vec<String> = first_lines(&faults(text))
        .iter()
        .map(|line| line.split(": ").next().unwrap_or("").to_owned())
        .collect();
    assert_eq!(places, ["2:1", "4:11", "5:10", "7:8", "8:8", "10:7", "11:11"]);
}

#[test]
fn invalid_variable_or_flag_is_named() {
    let table = [
        (
            ("IFNEWER_STROE_SIZE", "1 GiB"),
            "IFNEWER_STROE_SIZE: no setting has this name\nhelp: did you mean `IFNEWER_STORE_SIZE`?",
        ),
        (
            ("IFNEWER_STORE_SIZE", "50"),
            "IFNEWER_STORE_SIZE: 50 B is too small to hold an image\nhelp: did you mean \"50 GiB\"?",
        ),
        (
            ("IFNEWER_LIMITS_CONNECTIONS_MAX", "x"),
            "IFNEWER_LIMITS_CONNECTIONS_MAX: expected a whole number, found a string",
        ),
        (
            ("IFNEWER_LOG", "loud"),
            "IFNEWER_LOG: `loud` is none of \"off\", \"error\", \"warn\", \"info\", \"debug\", \"trace\"\nhelp: the choices are \"off\", \"error\", \"warn\", \"info\", \"debug\", \"trace\"",
        ),
        (
            ("IFNEWER_LISTEN_REGISTRY", ","),
            "IFNEWER_LISTEN_REGISTRY: without an address no client can reach the cache\nhelp: write [\"127.0.0.1:5000\"]",
        ),
        (
            ("IFNEWER_UPSTREAM_URL", "x"),
            "IFNEWER_UPSTREAM_URL: no setting has this name\nhelp: a variable is IFNEWER_SECTION_KEY, as in IFNEWER_STORE_SIZE",
        ),
    ];
    for (variable, expected) in table {
        assert_eq!(of_override(&[variable], &[]), expected);
    }
    let flag = ("--listen", "listen.registry", "localhost:5000");
    assert_eq!(
        of_override(&[], &[flag]),
        "--listen: `localhost:5000` is not an address with a port\nhelp: write \"127.0.0.1:5000\""
    );
}

#[test]
fn oversized_file_is_rejected_unread() {
    let text = "#".repeat(crate::config::TEXT_BYTES_MAX + 1);
    assert_eq!(first_lines(&faults(&text)), ["1:1: longer than 1048576 bytes"]);
}

#[test]
fn renamed_key_or_value_names_its_successor() {
    for (text, fault) in [
        ("[default]\nfresh = \"5m\"", "2:1: `fresh` is now `max_age`"),
        (
            "[[rule]]\nimages = [\"a/*\"]\nstale = \"1h\"",
            "3:1: `stale` is now `stale_if_error`",
        ),
        (
            "[upstream.\"ghcr.io\"]\nbudget = \"1s\"",
            "2:1: `budget` is now `revalidate_timeout`",
        ),
        (
            "[upstream.\"ghcr.io\"]\naccess = \"shared\"",
            "2:1: `access` is now `auth`",
        ),
        ("[listen]\nplain = \"any\"", "2:1: `plain` is now `plain_http`"),
        (
            "[limits]\nfetches_max = 5",
            "2:1: `fetches_max` is now `downloads_max`",
        ),
        (
            "[default]\non_not_found = \"serve\"",
            "2:16: `serve` is now `serve-stale`",
        ),
        (
            "[upstream.\"ghcr.io\"]\nauth = \"proven\"",
            "2:8: `proven` is now `per-client`",
        ),
        ("[listen]\nplain_http = \"nobody\"", "2:14: `nobody` is now `off`"),
    ] {
        let found = first_lines(&faults(text));
        assert!(
            found.iter().any(|line| line.ends_with(fault)),
            "{text}: {found:?}"
        );
    }
    let variable = ("IFNEWER_DEFAULT_OFFLINE_GRANT", "24h");
    assert_eq!(
        of_override(&[variable], &[]),
        "IFNEWER_DEFAULT_OFFLINE_GRANT: `IFNEWER_DEFAULT_OFFLINE_GRANT` is now `IFNEWER_DEFAULT_GRANT_TTL_OFFLINE`\n\
         help: set `IFNEWER_DEFAULT_GRANT_TTL_OFFLINE` instead"
    );
}
