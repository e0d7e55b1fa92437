//! A kernel that refuses: what a running program asks of it fails with a chosen error, at the system calls themselves.

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::NamedTempFile;

use crate::proxy::Program;
use crate::registry::within;

/// Refuses until it is ended or dropped.
pub struct Refusal {
    tracer: Child,
    told: NamedTempFile,
}

impl Refusal {
    /// Lets `calls` of every thread of the program fail so: `pwrite64,fsync` and `EIO:when=3+7`, as strace has it.
    pub async fn of(program: &Program, calls: &str, error: &str) -> Result<Refusal, String> {
        let told = NamedTempFile::new().unwrap();
        let tracer = Command::new("strace")
            .args(["-f", "-qq", "-p", &program.id().to_string(), "-o"])
            .arg(told.path())
            .args(["-e", &format!("trace={calls}")])
            .args(["-e", &format!("inject={calls}:error={error}")])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("strace: {error}"))?;
        let mut refusal = Refusal { tracer, told };
        within("strace to have every thread", async {
            while !is_traced(program) {
                if let Some(status) = refusal.tracer.try_wait().unwrap() {
                    return Err(format!("strace may not attach: {status}"));
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Ok(())
        })
        .await?;
        Ok(refusal)
    }

    /// From now on nothing is refused. Says how often each call was.
    pub fn end(mut self) -> String {
        let process = self.tracer.id().to_string();
        let asked = Command::new("kill").args(["-INT", &process]).status();
        assert!(asked.unwrap().success());
        self.tracer.wait().unwrap();
        let told = std::fs::read_to_string(self.told.path()).unwrap();
        let mut refused = BTreeMap::new();
        for line in told.lines() {
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
