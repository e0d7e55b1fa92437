//! A measured process: start, readiness, figures from `/proc`, and termination on drop.

use crate::Outcome;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::HashMap;
use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The kernel's unit of CPU time in `/proc` (`USER_HZ`), 100 on every supported Linux.
const TICKS_PER_SECOND: f64 = 100.0;
const START_MAX: Duration = Duration::from_secs(20);

/// A child that gets SIGTERM on drop, because nginx stops its workers only on SIGTERM.
pub(crate) struct Running(Child);

impl Running {
    /// Starts it with its output in `folder`.
    pub(crate) fn start(command: &mut Command, folder: &Path) -> Outcome<Self> {
        let child = command
            .stdin(Stdio::null())
            .stdout(File::create(folder.join("out.log"))?)
            .stderr(File::create(folder.join("err.log"))?)
            .spawn()
            .map_err(|e| format!("{}: {e}", command.get_program().display()))?;
        Ok(Running(child))
    }

    /// Suspends it and its workers: the kernel still accepts connections, and nothing answers.
    pub(crate) fn suspend(&self) -> Outcome<()> {
        self.signal(Signal::STOP)
    }

    fn signal(&self, signal: Signal) -> Outcome<()> {
        for pid in self.processes()? {
            let pid = i32::try_from(pid)
                .ok()
                .and_then(Pid::from_raw)
                .ok_or("no process id")?;
            kill_process(pid, signal)?;
        }
        Ok(())
    }

    /// Retries until there is a response.
    pub(crate) fn wait_until<T>(&mut self, folder: &Path, ready: impl Fn() -> Option<T>) -> Outcome<T> {
        let began = Instant::now();
        loop {
            if let Some(answer) = ready() {
                return Ok(answer);
            }
            if let Some(status) = self.0.try_wait()? {
                return Err(format!(
                    "{} ended at start with {status}: {}",
                    folder.display(),
                    program_output(folder)
                )
                .into());
            }
            if began.elapsed() > START_MAX {
                return Err(format!(
                    "{} is not ready in time: {}",
                    folder.display(),
                    program_output(folder)
                )
                .into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// User and system time so far, of the program and its workers.
    pub(crate) fn cpu_seconds(&self) -> Outcome<f64> {
        let mut ticks = 0.0;
        for pid in self.processes()? {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
            // Fields are counted after the name, which may contain spaces.
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

    /// Resets the peak to the current memory (`/proc/…/clear_refs`, 5).
    pub(crate) fn reset_peak_memory(&self) -> Outcome<()> {
        for pid in self.processes()? {
            std::fs::write(format!("/proc/{pid}/clear_refs"), "5")?;
        }
        Ok(())
    }

    /// The sum of the processes' `VmHWM`.
    pub(crate) fn peak_memory_mib(&self) -> Outcome<f64> {
        self.memory_mib("VmHWM:")
    }

    /// The sum of the processes' `VmRSS`.
    pub(crate) fn resident_memory_mib(&self) -> Outcome<f64> {
        self.memory_mib("VmRSS:")
    }

    /// CPU time of each thread so far, in nanoseconds. The kernel's ticks of 10 ms are too coarse for few requests. A
    /// thread that ended is missing, so this is for windows that are shorter than the life of an idle thread.
    pub(crate) fn thread_times(&self) -> Outcome<HashMap<String, u64>> {
        let mut times = HashMap::new();
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.0.id()))? {
            let thread = thread?;
            // A thread may end while the folder is read.
            if let Ok(text) = std::fs::read_to_string(thread.path().join("schedstat")) {
                let ran = text.split(' ').next().unwrap_or_default().parse()?;
                times.insert(thread.file_name().display().to_string(), ran);
            }
        }
        Ok(times)
    }

    fn memory_mib(&self, field: &str) -> Outcome<f64> {
        let mut kib = 0.0;
        for pid in self.processes()? {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix(field))
                .ok_or_else(|| format!("no {field}"))?;
            kib += line.trim().trim_end_matches(" kB").parse::<f64>()?;
        }
        Ok(kib / 1024.0)
    }

    fn processes(&self) -> Outcome<Vec<u32>> {
        let pid = self.0.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        let workers = children
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<Vec<u32>, _>>()?;
        Ok([vec![pid], workers].concat())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A suspended process would not notice the other signal.
        let _ = self.signal(Signal::CONT);
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

/// nginx cannot report a port chosen by the kernel. No other process takes ports here in between.
pub(crate) fn free_address() -> Outcome<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// All output of the program in a folder.
pub(crate) fn program_output(folder: &Path) -> String {
    let read = |name| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
    [read("out.log"), read("err.log")].concat()
}
