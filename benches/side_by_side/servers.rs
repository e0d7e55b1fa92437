//! The compared programs: the upstream, two ifnewer, and nginx with the same files.

use crate::Outcome;
use crate::connection::{Endpoint, trusting};
use crate::content::{Content, MANIFEST_TYPE, blob, manifest_by_digest, manifest_by_tag};
use crate::program::{Running, free_address, program_output};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

/// Everything one run needs.
pub(crate) struct Sites {
    /// The cache of the fast upstream.
    pub(crate) ifnewer: Server,
    /// The cache of the slow upstream.
    pub(crate) ifnewer_slow: Server,
    /// Serves the same files from the disk.
    pub(crate) nginx: Server,
    /// The same nginx with `sendfile_max_chunk 512k`, the fastest setting found for large files.
    pub(crate) nginx_in_small_steps: Server,
    /// hyper that serves 512 bytes, over plain HTTP.
    pub(crate) bare_hyper: Server,
    /// A loop of `sendfile` that serves the layer, over plain HTTP.
    pub(crate) bare_sendfile: Server,
    /// 50 MB/s a connection.
    pub(crate) upstream_slow: Endpoint,
    /// As fast as the machine, for other caches started in front of it.
    pub(crate) upstream: SocketAddr,
    upstream_log: PathBuf,
    _upstream: Running,
}

/// One measured program.
pub(crate) struct Server {
    pub(crate) plain: Endpoint,
    pub(crate) tls: Endpoint,
    running: Arc<Running>,
}

impl Sites {
    pub(crate) fn start(scratch: &Path, content: &Content) -> Outcome<Self> {
        let (fast, slow) = (free_address()?, free_address()?);
        let log = scratch.join("upstream.log");
        let images = [&content.image, &content.herd_image].map(|image| (image.tag, &*image.manifest));
        let site = |listen: &str, blob_options: &str| site(&content.root, &images, listen, blob_options);
        let upstream = start_nginx(
            &scratch.join("upstream"),
            &format!(
                "access_log {} combined; {} {}",
                log.display(),
                site(&format!("listen {fast};"), ""),
                site(&format!("listen {slow};"), "limit_rate 50000000;")
            ),
            fast,
        )?;
        let ifnewer = start_ifnewer(&scratch.join("ifnewer"), fast)?;
        let ifnewer_slow = start_ifnewer(&scratch.join("ifnewer-slow"), slow)?;

        let certs = scratch.join("ifnewer").join("certs");
        let (plain, tls, small_steps) = (free_address()?, free_address()?, free_address()?);
        let listen = format!(
            "listen {plain}; listen {tls} ssl; ssl_certificate {0}/server.pem; ssl_certificate_key {0}/server.key; ssl_protocols TLSv1.2 TLSv1.3;",
            certs.display()
        );
        let running = Arc::new(start_nginx(
            &scratch.join("nginx"),
            &format!(
                "access_log off; {} {}",
                site(&listen, ""),
                site(&format!("listen {small_steps};"), "sendfile_max_chunk 512k;")
            ),
            plain,
        )?);
        let trust = trusting(&certs.join("ca.pem"))?;
        let layer = content
            .root
            .join(blob(&content.image.layer).trim_start_matches('/'));
        let bare_hyper = start_baseline(&scratch.join("bare_hyper"), "bare_hyper", None)?;
        let bare_sendfile = start_baseline(&scratch.join("bare_sendfile"), "bare_sendfile", Some(&layer))?;
        let nginx_in_small_steps = Server {
            plain: Endpoint::plain(small_steps),
            tls: Endpoint::tls(tls, Arc::clone(&trust)),
            running: Arc::clone(&running),
        };
        let nginx = Server {
            plain: Endpoint::plain(plain),
            tls: Endpoint::tls(tls, trust),
            running,
        };
        Ok(Sites {
            ifnewer,
            ifnewer_slow,
            nginx,
            nginx_in_small_steps,
            bare_hyper,
            bare_sendfile,
            upstream_slow: Endpoint::plain(slow),
            upstream: fast,
            upstream_log: log,
            _upstream: upstream,
        })
    }

    /// Blob bytes sent by the upstream.
    pub(crate) fn upstream_bytes_for(&self, digest: &str) -> Outcome<u64> {
        // `… "GET /v2/… HTTP/1.1" STATUS BYTES …`
        let log = std::fs::read_to_string(&self.upstream_log)?;
        log.lines()
            .filter(|line| line.contains("\"GET ") && line.contains(digest))
            .map(|line| -> Outcome<u64> {
                let bytes = line.split("\" ").nth(1).and_then(|after| after.split(' ').nth(1));
                Ok(bytes.ok_or("an access log of another form")?.parse()?)
            })
            .sum()
    }
}

impl Server {
    /// User and system time so far.
    pub(crate) fn cpu_seconds(&self) -> Outcome<f64> {
        self.running.cpu_seconds()
    }

    /// Resets the peak to the current memory.
    pub(crate) fn reset_peak_memory(&self) -> Outcome<()> {
        self.running.reset_peak_memory()
    }

    /// Peak memory since then.
    pub(crate) fn peak_memory_mib(&self) -> Outcome<f64> {
        self.running.peak_memory_mib()
    }
}

/// nginx as a registry of one repository: static files with the right headers. `images`: tag and manifest of each.
pub(crate) fn site(root: &Path, images: &[(&str, &str)], listen: &str, blob_options: &str) -> String {
    let mut manifests = String::new();
    for (tag, manifest) in images {
        for path in [manifest_by_tag(tag), manifest_by_digest(manifest)] {
            let _ = write!(
                manifests,
                "location = {path} {{ default_type {MANIFEST_TYPE}; add_header Docker-Content-Digest {manifest}; }}",
            );
        }
    }
    format!(
        "server {{ {listen} root {root}; types {{ }}
           location = /v2/ {{ default_type application/json; return 200 '{{}}'; }}
           {manifests}
           location /v2/library/bench/blobs/ {{ default_type application/octet-stream; {blob_options} }}
         }}",
        root = root.display(),
    )
}

/// Tuned: sendfile, full packets, open file cache, keep-alive, and large chunks where sendfile is impossible (TLS).
pub(crate) fn start_nginx(folder: &Path, sites: &str, address: SocketAddr) -> Outcome<Running> {
    std::fs::create_dir_all(folder)?;
    let user = if rustix::process::getuid().is_root() {
        "user root;"
    } else {
        ""
    };
    let folder_name = folder.display();
    let configuration = format!(
        "{user} worker_processes 2; daemon off; pid {folder_name}/pid; error_log {folder_name}/error.log;
         events {{ worker_connections 4096; }}
         http {{
           sendfile on; tcp_nopush on; tcp_nodelay on; keepalive_timeout 300; keepalive_requests 1000000000;
           open_file_cache max=1000 inactive=600s; open_file_cache_valid 600s; output_buffers 2 512k;
           client_body_temp_path {folder_name}/t1; proxy_temp_path {folder_name}/t2; fastcgi_temp_path {folder_name}/t3;
           uwsgi_temp_path {folder_name}/t4; scgi_temp_path {folder_name}/t5;
           {sites}
         }}"
    );
    let file = folder.join("nginx.conf");
    std::fs::write(&file, configuration)?;
    let mut command = Command::new("nginx");
    command
        .arg("-p")
        .arg(folder)
        .arg("-c")
        .arg(&file)
        .arg("-e")
        .arg(folder.join("error.log"));
    let mut running = Running::start(&mut command, folder)?;
    running.wait_until(folder, || TcpStream::connect(address).ok())?;
    Ok(running)
}

fn start_ifnewer(folder: &Path, upstream: SocketAddr) -> Outcome<Server> {
    let (running, address) = run_ifnewer(folder, upstream)?;
    let trust = trusting(&folder.join("certs").join("ca.pem"))?;
    Ok(Server {
        plain: Endpoint::plain(address),
        tls: Endpoint::tls(address, trust),
        running: Arc::new(running),
    })
}

/// The same upstream with `auth = "shared"`.
pub(crate) const SHARED: &str = "shared.test";

/// The same upstream with a `max_age`.
pub(crate) const FRESH: &str = "fresh.test";

/// ifnewer with only its upstream and listen addresses configured.
pub(crate) fn run_ifnewer(folder: &Path, upstream: SocketAddr) -> Outcome<(Running, SocketAddr)> {
    start_configured(
        folder,
        &format!(
            "[upstream.\"docker.io\"]\nurl = \"http://{upstream}\"\n\
             [upstream.\"{SHARED}\"]\nurl = \"http://{upstream}\"\nauth = \"shared\"\n\
             [upstream.\"{FRESH}\"]\nurl = \"http://{upstream}\"\nmax_age = \"1h\"\n"
        ),
    )
}

/// ifnewer with these sections of its configuration in addition to its listen addresses.
pub(crate) fn start_configured(folder: &Path, sections: &str) -> Outcome<(Running, SocketAddr)> {
    std::fs::create_dir_all(folder)?;
    let file = folder.join("ifnewer.toml");
    std::fs::write(
        &file,
        format!(
            "data = \"{folder}/data\"\ndefault_upstream = \"docker.io\"\n\
             [listen]\nregistry = [\"127.0.0.1:0\"]\nadmin = \"127.0.0.1:0\"\n\
             [tls]\nfolder = \"{folder}/certs\"\n{sections}",
            folder = folder.display()
        ),
    )?;
    let mut command = Command::new(ifnewer_program()?);
    command.arg("serve").arg("--config").arg(&file);
    let mut running = Running::start(&mut command, folder)?;
    let address = running.wait_until(folder, || announced(folder, "registry listening on "))?;
    Ok((running, address))
}

pub(crate) fn ifnewer_program() -> Outcome<OsString> {
    Ok(std::env::var_os("IFNEWER").ok_or("IFNEWER names no program: see benches/run")?)
}

/// A program of `benches/baselines`.
fn start_baseline(folder: &Path, name: &str, file: Option<&Path>) -> Outcome<Server> {
    std::fs::create_dir_all(folder)?;
    let programs = std::env::var_os("BASELINES").ok_or("BASELINES names no folder: see benches/run")?;
    let mut command = Command::new(Path::new(&programs).join(name));
    command.args(file);
    let mut running = Running::start(&mut command, folder)?;
    let address = running.wait_until(folder, || announced(folder, "listening on "))?;
    Ok(Server {
        plain: Endpoint::plain(address),
        tls: Endpoint::plain(address),
        running: Arc::new(running),
    })
}

/// The address after this text in the output.
pub(crate) fn announced(folder: &Path, text: &str) -> Option<SocketAddr> {
    let output = program_output(folder);
    let (_, after) = output.split_once(text)?;
    after
        .split(|c: char| c.is_whitespace() || c == '"')
        .next()?
        .parse()
        .ok()
}
