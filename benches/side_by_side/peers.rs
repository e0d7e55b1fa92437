//! Compared caches, each started empty: ifnewer, its alternatives, and no cache.

use crate::Outcome;
use crate::bottleneck::Bottleneck;
use crate::connection::Endpoint;
use crate::program::{Running, free_address};
use crate::servers::{ifnewer_program, run_ifnewer, start_nginx};
use std::ffi::OsStr;
use std::fmt;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;

#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Ifnewer,
    /// nginx `proxy_cache` with a lock, so that one client fetches and the others wait.
    Nginx,
    /// nginx with rules equivalent to those of rpardini/docker-registry-proxy, as it is shipped.
    Interception,
    /// Debian's docker-registry as a pull-through cache.
    DockerRegistry,
    Varnish,
    /// The client asks the upstream.
    Direct,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Ifnewer => "ifnewer",
            Kind::Nginx => "nginx",
            Kind::Interception => "nginx, interception rules",
            Kind::DockerRegistry => "docker-registry",
            Kind::Varnish => "varnish",
            Kind::Direct => "no cache",
        })
    }
}

/// An empty cache. It ends on drop, and its folder is deleted.
pub(crate) struct Cache {
    pub(crate) endpoint: Endpoint,
    program: Program,
    _folder: tempfile::TempDir,
}

enum Program {
    Process(Running),
    /// Without a cache: closes the connections on drop.
    Relay {
        _relay: Bottleneck,
    },
}

impl Cache {
    /// Zero without a cache.
    pub(crate) fn cpu_seconds(&self) -> Outcome<f64> {
        self.of_process(Running::cpu_seconds)
    }

    /// Zero without a cache.
    pub(crate) fn peak_memory_mib(&self) -> Outcome<f64> {
        self.of_process(Running::peak_memory_mib)
    }

    fn of_process(&self, figure: impl Fn(&Running) -> Outcome<f64>) -> Outcome<f64> {
        match &self.program {
            Program::Process(running) => figure(running),
            Program::Relay { .. } => Ok(0.0),
        }
    }
}

impl Kind {
    pub(crate) fn start(self, scratch: &Path, upstream: SocketAddr) -> Outcome<Cache> {
        let folder = tempfile::tempdir_in(scratch)?;
        let start = match self {
            Kind::Ifnewer => run_ifnewer,
            Kind::Nginx => run_nginx,
            Kind::Interception => run_interception,
            Kind::DockerRegistry => run_docker_registry,
            Kind::Varnish => run_varnish,
            Kind::Direct => {
                let relay = Bottleneck::before(upstream, f64::INFINITY)?;
                return Ok(Cache {
                    endpoint: Endpoint::plain(relay.address),
                    program: Program::Relay { _relay: relay },
                    _folder: folder,
                });
            }
        };
        let (running, address) = start(folder.path(), upstream)?;
        Ok(Cache {
            endpoint: Endpoint::plain(address),
            program: Program::Process(running),
            _folder: folder,
        })
    }

    /// The name with the version that the program states.
    pub(crate) fn with_version(self) -> Outcome<String> {
        let ifnewer;
        let (program, option) = match self {
            Kind::Ifnewer => {
                ifnewer = ifnewer_program()?;
                (ifnewer.as_os_str(), "--version")
            }
            Kind::Nginx | Kind::Interception => (OsStr::new("nginx"), "-v"),
            Kind::DockerRegistry => (OsStr::new("docker-registry"), "--version"),
            Kind::Varnish => (OsStr::new("varnishd"), "-V"),
            Kind::Direct => return Ok(self.to_string()),
        };
        let output = Command::new(program).arg(option).output()?;
        let stated = [output.stdout, output.stderr].concat();
        let stated = String::from_utf8_lossy(&stated);
        let mut words = stated.split(|c: char| c.is_whitespace() || "()-/".contains(c));
        let version = words.find(|word| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit()));
        let version = version.ok_or("a program that states no version")?;
        Ok(match self {
            Kind::Nginx => format!("nginx {version}, tuned"),
            Kind::Interception => format!("nginx {version}, interception rules"),
            _ => format!("{self} {version}"),
        })
    }
}

fn run_nginx(folder: &Path, upstream: SocketAddr) -> Outcome<(Running, SocketAddr)> {
    let address = free_address()?;
    let site = format!(
        "access_log off;
         proxy_cache_path {folder}/cache levels=1:2 keys_zone=all:10m max_size=50g inactive=1d use_temp_path=off;
         upstream registry {{ server {upstream}; keepalive 64; }}
         server {{
           listen {address};
           location / {{
             proxy_pass http://registry; proxy_http_version 1.1; proxy_set_header Connection \"\";
             proxy_cache all; proxy_cache_key $uri; proxy_cache_valid 200 1d;
             proxy_cache_lock on; proxy_cache_lock_timeout 1h; proxy_cache_lock_age 1h;
             proxy_buffer_size 16k; proxy_buffers 16 64k; proxy_busy_buffers_size 256k; proxy_read_timeout 1h;
           }}
         }}",
        folder = folder.display(),
    );
    Ok((start_nginx(folder, &site, address)?, address))
}

/// One request fetches and the others wait, for five seconds each at most (`proxy_cache_lock_age`). Only what is named by
/// a digest is cached, for all statuses without an error. Manifests by tag have no validity, so they are never stored.
fn run_interception(folder: &Path, upstream: SocketAddr) -> Outcome<(Running, SocketAddr)> {
    let address = free_address()?;
    let cached = format!(
        "proxy_pass http://{upstream}; proxy_cache layers; proxy_cache_key $content;
         proxy_cache_use_stale error timeout http_500 http_502 http_504 http_429;"
    );
    let site = format!(
        "access_log off;
         proxy_cache_path {folder}/cache levels=1:2 keys_zone=layers:10m max_size=32g inactive=60d use_temp_path=off;
         server {{
           listen {address};
           proxy_read_timeout 900; proxy_connect_timeout 60s; proxy_send_timeout 60s;
           proxy_cache_lock on; proxy_cache_lock_timeout 880s;
           proxy_cache_valid 200 206 60d; proxy_cache_revalidate on;
           proxy_force_ranges on; proxy_ignore_client_abort on;
           proxy_hide_header Set-Cookie; proxy_ignore_headers X-Accel-Expires Expires Cache-Control Set-Cookie;
           location ~ ^/v2/.+/blobs/sha256:(.+)$ {{ set $content $1; {cached} }}
           location ~ ^/v2/.+/manifests/sha256: {{ set $content $uri; {cached} }}
           location ~ ^/v2/.+/manifests/ {{ set $content $uri; {cached} proxy_cache_valid 0s; }}
           location / {{ proxy_pass http://{upstream}; }}
         }}",
        folder = folder.display(),
    );
    Ok((start_nginx(folder, &site, address)?, address))
}

/// Content by digest for a year. A tag is confirmed after a second, and used for a day while the upstream gives none.
fn run_varnish(folder: &Path, upstream: SocketAddr) -> Outcome<(Running, SocketAddr)> {
    let address = free_address()?;
    let file = folder.join("registry.vcl");
    std::fs::write(
        &file,
        format!(
            "vcl 4.1;
             backend registry {{ .host = \"{}\"; .port = \"{}\"; }}
             sub vcl_backend_response {{
               set beresp.do_esi = false;
               set beresp.grace = 1d;
               if (beresp.status >= 500 && bereq.is_bgfetch) {{ return (abandon); }}
               if (beresp.status == 200) {{
                 if (bereq.url ~ \"/sha256:\") {{ set beresp.ttl = 365d; }} else {{ set beresp.ttl = 1s; }}
               }}
             }}",
            upstream.ip(),
            upstream.port()
        ),
    )?;
    let mut command = Command::new("varnishd");
    command
        .args(["-F", "-j", "none", "-a", &address.to_string()])
        .arg("-f")
        .arg(&file)
        .arg("-n")
        .arg(folder.join("work"))
        .arg("-s")
        .arg(format!("file,{}/storage,1G", folder.display()));
    let mut running = Running::start(&mut command, folder)?;
    running.wait_until(folder, || TcpStream::connect(address).ok())?;
    Ok((running, address))
}

fn run_docker_registry(folder: &Path, upstream: SocketAddr) -> Outcome<(Running, SocketAddr)> {
    let address = free_address()?;
    let file = folder.join("config.yml");
    std::fs::write(
        &file,
        format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}/registry}}}}\n\
             http: {{addr: \"{address}\"}}\nproxy: {{remoteurl: \"http://{upstream}\"}}\n",
            folder.display()
        ),
    )?;
    let mut command = Command::new("docker-registry");
    command
        .arg("serve")
        .arg(&file)
        .env("OTEL_TRACES_EXPORTER", "none");
    let mut running = Running::start(&mut command, folder)?;
    running.wait_until(folder, || TcpStream::connect(address).ok())?;
    Ok((running, address))
}
