//! The programs that are compared: started on free ports, measured through `/proc`, ended with the run.

use crate::Outcome;
use crate::client::{Door, trusting};
use crate::content::{Content, MANIFEST_TYPE};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::File;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The kernel's unit of CPU time in `/proc` (`USER_HZ`), 100 on every Linux we run on.
const TICKS_PER_SECOND: f64 = 100.0;
const START_MAX: Duration = Duration::from_secs(20);

/// Everything one run needs.
pub(crate) struct Sites {
    /// In front of the fast upstream.
    pub(crate) ifnewer: Server,
    /// In front of the slow one.
    pub(crate) ifnewer_slow: Server,
    /// Serves the same files from disk.
    pub(crate) nginx: Server,
    /// The same nginx with `sendfile_max_chunk 512k`: the fastest it was found to serve large files.
    pub(crate) nginx_in_small_steps: Server,
    /// 50 MB/s a connection.
    pub(crate) upstream_slow: Door,
    upstream_log: PathBuf,
    _upstream: Running,
}

/// One program under measurement.
pub(crate) struct Server {
    pub(crate) plain: Door,
    pub(crate) tls: Door,
    running: Arc<Running>,
}

/// A child that is asked to end when it is dropped: nginx takes its workers with it only if it is asked.
struct Running(Child);

impl Sites {
    pub(crate) fn start(scratch: &Path, content: &Content) -> Outcome<Self> {
        let (fast, slow) = (free_address()?, free_address()?);
        let log = scratch.join("upstream.log");
        let upstream = start_nginx(
            &scratch.join("upstream"),
            content,
            &format!(
                "access_log {} combined; {} {}",
                log.display(),
                site(content, &format!("listen {fast};"), ""),
                site(content, &format!("listen {slow};"), "limit_rate 50000000;")
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
            content,
            &format!(
                "access_log off; {} {}",
                site(content, &listen, ""),
                site(
                    content,
                    &format!("listen {small_steps};"),
                    "sendfile_max_chunk 512k;"
                )
            ),
            plain,
        )?);
        let trust = trusting(&certs.join("ca.pem"))?;
        let nginx_in_small_steps = Server {
            plain: Door::plain(small_steps),
            tls: Door::tls(tls, Arc::clone(&trust)),
            running: Arc::clone(&running),
        };
        let nginx = Server {
            plain: Door::plain(plain),
            tls: Door::tls(tls, trust),
            running,
        };
        Ok(Sites {
            ifnewer,
            ifnewer_slow,
            nginx,
            nginx_in_small_steps,
            upstream_slow: Door::plain(slow),
            upstream_log: log,
            _upstream: upstream,
        })
    }

    /// How many GETs for a blob the upstream answered so far.
    pub(crate) fn upstream_requests_for(&self, digest: &str) -> Outcome<usize> {
        let log = std::fs::read_to_string(&self.upstream_log)?;
        Ok(log
            .lines()
            .filter(|line| line.contains("\"GET ") && line.contains(digest))
            .count())
    }
}

impl Server {
    /// User and system time so far, of the program and its workers.
    pub(crate) fn cpu_seconds(&self) -> Outcome<f64> {
        let mut ticks = 0.0;
        for pid in self.processes()? {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
            // Fields are counted after the name, which may hold anything, blanks included.
            let (_, fields) = stat.rsplit_once(") ").ok_or("/proc/…/stat without a name")?;
            let times: Vec<f64> = fields
                .split(' ')
                .skip(11)
                .take(2)
                .map(str::parse)
                .collect::<Result<_, _>>()?;
            ticks += times.iter().sum::<f64>();
        }
        Ok(ticks / TICKS_PER_SECOND)
    }

    /// Makes the present memory the peak (`/proc/…/clear_refs`, 5).
    pub(crate) fn reset_peak_memory(&self) -> Outcome<()> {
        for pid in self.processes()? {
            std::fs::write(format!("/proc/{pid}/clear_refs"), "5")?;
        }
        Ok(())
    }

    /// The sum of the processes' `VmHWM`.
    pub(crate) fn peak_memory_mib(&self) -> Outcome<f64> {
        let mut kib = 0.0;
        for pid in self.processes()? {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("VmHWM:"))
                .ok_or("no VmHWM")?;
            kib += line.trim().trim_end_matches(" kB").parse::<f64>()?;
        }
        Ok(kib / 1024.0)
    }

    fn processes(&self) -> Outcome<Vec<u32>> {
        let pid = self.running.0.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        let workers = children
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<Vec<u32>, _>>()?;
        Ok([vec![pid], workers].concat())
    }
}

/// nginx as a registry of one repository: static files with the right headers.
fn site(content: &Content, listen: &str, blob_options: &str) -> String {
    format!(
        "server {{ {listen} root {root}; types {{ }}
           location = /v2/ {{ default_type application/json; return 200 '{{}}'; }}
           location /v2/library/bench/manifests/ {{ default_type {MANIFEST_TYPE}; add_header Docker-Content-Digest {manifest}; }}
           location /v2/library/bench/blobs/ {{ default_type application/octet-stream; {blob_options} }}
         }}",
        root = content.root.display(),
        manifest = content.manifest,
    )
}

/// Tuned: sendfile, full packets, kept-open files and connections, and large steps where sendfile cannot be (TLS).
fn start_nginx(folder: &Path, content: &Content, sites: &str, address: SocketAddr) -> Outcome<Running> {
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
    debug_assert!(content.root.exists());
    running.wait_until(folder, || TcpStream::connect(address).ok())?;
    Ok(running)
}

fn start_ifnewer(folder: &Path, upstream: SocketAddr) -> Outcome<Server> {
    std::fs::create_dir_all(folder)?;
    let file = folder.join("ifnewer.toml");
    std::fs::write(
        &file,
        format!(
            "data = \"{folder}/data\"\ndefault_upstream = \"docker.io\"\n\
             [listen]\nregistry = [\"127.0.0.1:0\"]\nadmin = \"127.0.0.1:0\"\n\
             [tls]\nfolder = \"{folder}/certs\"\n\
             [upstream.\"docker.io\"]\nurl = \"http://{upstream}\"\n",
            folder = folder.display()
        ),
    )?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_ifnewer"));
    command.arg("serve").arg("--config").arg(&file);
    let mut running = Running::start(&mut command, folder)?;
    let address = running.wait_until(folder, || announced(folder))?;
    let trust = trusting(&folder.join("certs").join("ca.pem"))?;
    Ok(Server {
        plain: Door::plain(address),
        tls: Door::tls(address, trust),
        running: Arc::new(running),
    })
}

/// The address in `registry listening on ADDRESS`.
fn announced(folder: &Path) -> Option<SocketAddr> {
    let said = said(folder);
    let (_, after) = said.split_once("registry listening on ")?;
    after
        .split(|c: char| c.is_whitespace() || c == '"')
        .next()?
        .parse()
        .ok()
}

fn said(folder: &Path) -> String {
    let read = |name| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
    [read("out.log"), read("err.log")].concat()
}

impl Running {
    fn start(command: &mut Command, folder: &Path) -> Outcome<Self> {
        let child = command
            .stdin(Stdio::null())
            .stdout(File::create(folder.join("out.log"))?)
            .stderr(File::create(folder.join("err.log"))?)
            .spawn()
            .map_err(|e| format!("{}: {e}", command.get_program().display()))?;
        Ok(Running(child))
    }

    fn wait_until<T>(&mut self, folder: &Path, ready: impl Fn() -> Option<T>) -> Outcome<T> {
        let began = Instant::now();
        loop {
            if let Some(answer) = ready() {
                return Ok(answer);
            }
            if let Some(status) = self.0.try_wait()? {
                return Err(format!(
                    "{} ended at start with {status}: {}",
                    folder.display(),
                    said(folder)
                )
                .into());
            }
            if began.elapsed() > START_MAX {
                return Err(format!("{} is not ready in time: {}", folder.display(), said(folder)).into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(5) {
            if matches!(self.0.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// nginx cannot be told "any port" and asked which; nobody else takes ports here between the two lines.
fn free_address() -> Outcome<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}
