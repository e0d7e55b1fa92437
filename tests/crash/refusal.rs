//! System call error injection into a running program.

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::NamedTempFile;

use crate::proxy::Program;
use crate::registry::within;

/// Injects errors until it is ended or dropped.
pub struct Refusal {
    tracer: Child,
    response: NamedTempFile,
}

impl Refusal {
    /// Makes `calls` of all threads of the program fail. Both arguments use strace's syntax, such as
    /// `pwrite64,fsync` and `EIO:when=3+7`.
    pub async fn of(program: &Program, calls: &str, error: &str) -> Result<Refusal, String> {
        let response = NamedTempFile::new().unwrap();
        let tracer = Command::new("strace")
            .args(["-f", "-qq", "-p", &program.id().to_string(), "-o"])
            .arg(response.path())
            .args(["-e", &format!("trace={calls}")])
            .args(["-e", &format!("inject={calls}:error={error}")])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("strace: {error}"))?;
        let mut refusal = Refusal { tracer, response };
        within("strace to attach to every thread", async {
            while !is_traced(program) {
                if let Some(status) = refusal.tracer.try_wait().unwrap() {
                    return Err(format!("strace is not permitted to attach: {status}"));
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Ok(())
        })
        .await?;
        Ok(refusal)
    }

    /// Ends the injection. Returns the number of calls by name.
    pub fn end(mut self) -> String {
        let process = self.tracer.id().to_string();
        let asked = Command::new("kill").args(["-INT", &process]).status();
        assert!(asked.unwrap().success());
        self.tracer.wait().unwrap();
        let response = std::fs::read_to_string(self.response.path()).unwrap();
        let mut refused = BTreeMap::new();
        for line in response.lines() {
            // `123   pwrite64(4, …) = -1 EIO (Input/output error) (INJECTED)`, or its end `<... pwrite64 resumed>…`
            let mut words = line
                .split(['(', ' '])
                .filter(|word| !matches!(*word, "" | "<..."));
            if let (Some(call), true) = (words.nth(1), line.ends_with("(INJECTED)")) {
                *refused.entry(call).or_insert(0) += 1;
            }
        }
        let refused: Vec<_> = refused
            .iter()
            .map(|(call, count)| format!("{count} {call}"))
            .collect();
        refused.join(", ")
    }
}

impl Drop for Refusal {
    fn drop(&mut self) {
        let _ = self.tracer.kill();
        let _ = self.tracer.wait();
    }
}

fn is_traced(program: &Program) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{}/task", program.id())).unwrap();
    let mut status = threads.map(|thread| std::fs::read_to_string(thread.unwrap().path().join("status")));
    status.all(|status| status.is_ok_and(|status| !status.contains("TracerPid:\t0\n")))
}
