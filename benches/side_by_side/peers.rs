//! The caches in the stampede, each started empty: ifnewer and its alternatives.

use crate::Outcome;
use crate::connection::Endpoint;
use crate::program::{Running, free_address};
use crate::servers::{run_ifnewer, start_nginx};
use std::fmt;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;

#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Ifnewer,
    /// nginx `proxy_cache` with a lock, so that one client fetches and the others wait.
    Nginx,
    /// Debian's docker-registry as a pull-through cache.
    DockerRegistry,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Ifnewer => "ifnewer",
            Kind::Nginx => "nginx",
            Kind::DockerRegistry => "docker-registry",
        })
    }
}

/// An empty cache. Its folder is deleted on drop.
pub(crate) struct Cache {
    pub(crate) endpoint: Endpoint,
    pub(crate) running: Running,
    _folder: tempfile::TempDir,
}

impl Kind {
    pub(crate) fn start(self, scratch: &Path, upstream: SocketAddr) -> Outcome<Cache> {
        let folder = tempfile::tempdir_in(scratch)?;
        let (running, address) = match self {
            Kind::Ifnewer => run_ifnewer(folder.path(), upstream),
            Kind::Nginx => run_nginx(folder.path(), upstream),
            Kind::DockerRegistry => run_docker_registry(folder.path(), upstream),
        }?;
        Ok(Cache {
            endpoint: Endpoint::plain(address),
            running,
            _folder: folder,
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
