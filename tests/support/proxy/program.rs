//! The process under test: start, output, signals and exit. Killed on drop.

use crate::registry::within;
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead as _, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use tokio::sync::watch;

/// The only certificate authority that the system trusts, one whose key is lost. To read those of the machine takes a
/// fifth of an unoptimized start.
const SYSTEM_ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/proxy/system_root.pem");

/// A running or ended process of the program.
pub struct Program {
    child: Child,
    stdout: Lines,
    stderr: Lines,
}

impl Program {
    /// Starts the binary with only `HOME`, `PATH` and the given variables in its environment.
    pub fn start(arguments: &[&str], home: &Path, environment: &[(String, String)]) -> Program {
        Program::start_by(&[], arguments, home, environment)
    }

    /// `start`, through a command to which the binary and its arguments are appended.
    pub fn start_by(
        starter: &[&str],
        arguments: &[&str],
        home: &Path,
        environment: &[(String, String)],
    ) -> Program {
        let mut words = starter
            .iter()
            .chain(&[env!("CARGO_BIN_EXE_ifnewer")])
            .chain(arguments);
        let mut command = Command::new(words.next().unwrap());
        command
            .args(words)
            .envs(environment.iter().map(|(name, value)| (name, value)));
        Program::spawn(command, home)
    }

    /// Starts a command that executes the binary.
    pub fn start_with(starter: &str, arguments: &[&str], home: &Path) -> Program {
        let mut command = Command::new(starter);
        command.args(arguments);
        Program::spawn(command, home)
    }

    fn spawn(mut command: Command, home: &Path) -> Program {
        let given: Vec<_> = command
            .get_envs()
            .filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())))
            .collect();
        let mut child = command
            .current_dir(home)
            .env_clear()
            .env("HOME", home)
            .env("PATH", "/usr/bin:/bin")
            .env("IFNEWER_LOG", "info,ifnewer=debug")
            .env("RUST_BACKTRACE", "1")
            .env("SSL_CERT_FILE", SYSTEM_ROOT)
            .envs(given)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = Lines::of(child.stdout.take().unwrap());
        let stderr = Lines::of(child.stderr.take().unwrap());
        Program {
            child,
            stdout,
            stderr,
        }
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The address on the line of standard output that starts so.
    pub async fn announced(&self, prefix: &str) -> SocketAddr {
        match self.stdout.find(prefix, |line| line.starts_with(prefix)).await {
            Some(line) => line[prefix.len()..].trim().parse().unwrap(),
            None => panic!("it ended before `{prefix}`"),
        }
    }

    /// Waits for this line on standard output.
    pub async fn prints(&self, part: &str) -> String {
        let line = self.stdout.find(part, |line| line.contains(part)).await;
        line.unwrap_or_else(|| panic!("it ended before it printed `{part}`"))
    }

    /// Waits for this text on standard error.
    pub async fn says(&self, part: &str) -> String {
        let line = self.stderr.find(part, |line| line.contains(part)).await;
        line.unwrap_or_else(|| panic!("it ended before it said `{part}`"))
    }

    /// Standard output so far.
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// Standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// SIGHUP.
    pub fn reload(&self) {
        self.signal(Signal::HUP);
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for exit. Returns the exit code, `None` if a signal ended it. All output is read then.
    pub async fn exit(&mut self) -> Option<i32> {
        self.stdout.ended().await;
        self.stderr.ended().await;
        self.child.wait().unwrap().code()
    }

    fn signal(&self, signal: Signal) {
        kill_process(
            Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap(),
            signal,
        )
        .unwrap();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!(
                "--- the program's standard output\n{}--- and standard error\n{}---",
                self.stdout(),
                self.stderr()
            );
        }
    }
}

/// The lines of a pipe as they arrive.
struct Lines {
    output: watch::Sender<Output>,
}

#[derive(Default)]
struct Output {
    lines: Vec<String>,
    ended: bool,
}

impl Lines {
    fn of(pipe: impl Read + Send + 'static) -> Lines {
        let output = watch::Sender::new(Output::default());
        let sender = output.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
                sender.send_modify(|output| output.lines.push(String::from_utf8_lossy(&line).into_owned()));
            }
            sender.send_modify(|output| output.ended = true);
        });
        Lines { output }
    }

    async fn find(&self, what: &str, matches: impl Fn(&str) -> bool) -> Option<String> {
        let mut output = self.output.subscribe();
        let found = |output: &Output| output.lines.iter().find(|line| matches(line)).cloned();
        let output = within(
            what,
            output.wait_for(|output| output.ended || found(output).is_some()),
        )
        .await
        .unwrap();
        found(&output)
    }

    async fn ended(&self) {
        let mut output = self.output.subscribe();
        within("the process to end", output.wait_for(|output| output.ended))
            .await
            .unwrap();
    }

    fn text(&self) -> String {
        self.output
            .borrow()
            .lines
            .iter()
            .fold(String::new(), |text, line| text + line + "\n")
    }
}
