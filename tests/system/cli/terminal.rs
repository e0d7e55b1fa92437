//! Commands at a terminal: a real pseudo-terminal, the real program, and the final screen.

use crate::proxy::Proxy;
use crate::registry::{Image, Upstream, noise, within};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::thread::JoinHandle;
use tokio::sync::watch;

/// A program with its own terminal.
struct Terminal {
    master: OwnedFd,
    child: Child,
    shown: watch::Sender<Vec<u8>>,
    reading: JoinHandle<()>,
}

impl Terminal {
    /// Runs a command against this cache at a terminal of this width.
    fn run(proxy: &Proxy, words: &[&str], columns: u16, environment: &[(&str, &str)]) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        resize(&master, columns);
        let name = ptsname(&master, Vec::new()).unwrap();
        let open = || {
            File::options()
                .read(true)
                .write(true)
                .open(name.to_str().unwrap())
                .unwrap()
        };
        // A new session with this controlling terminal, because Ctrl-C would reach no process otherwise. Background
        // jobs, as these tests may be, have their children ignore it.
        let child = Command::new("env")
            .args(["--default-signal=INT", "setsid", "--ctty", "--wait"])
            .arg(env!("CARGO_BIN_EXE_ifnewer"))
            .args(words)
            .args(["--admin", &proxy.admin_address().to_string()])
            .env_clear()
            .env("HOME", proxy.setup().folder())
            .env("PATH", "/usr/bin:/bin")
            .env("TERM", "xterm-256color")
            .envs(environment.iter().copied())
            .stdin(open())
            .stdout(open())
            .stderr(open())
            .spawn()
            .unwrap();
        let shown = watch::Sender::new(Vec::new());
        let (teller, mut terminal) = (shown.clone(), File::from(master.try_clone().unwrap()));
        let reading = std::thread::spawn(move || {
            let mut piece = [0; 4096];
            // A closed peer is an error here.
            while let Ok(count @ 1..) = terminal.read(&mut piece) {
                teller.send_modify(|shown| shown.extend_from_slice(&piece[..count]));
            }
        });
        Self {
            master,
            child,
            shown,
            reading,
        }
    }

    fn resize(&self, columns: u16) {
        resize(&self.master, columns);
    }

    /// Types a key.
    fn types(&self, key: u8) {
        File::from(self.master.try_clone().unwrap())
            .write_all(&[key])
            .unwrap();
    }

    /// Waits until the screen has shown this.
    async fn shows(&self, part: &str) {
        let mut shown = self.shown.subscribe();
        let has = |shown: &Vec<u8>| String::from_utf8_lossy(shown).contains(part);
        within(&format!("`{part}` on the terminal"), shown.wait_for(has))
            .await
            .unwrap();
    }

    /// Waits for exit. Returns the status and all output.
    async fn ends(self) -> (Option<i32>, String) {
        let (mut child, reading) = (self.child, self.reading);
        let waiting = tokio::task::spawn_blocking(move || {
            let status = child.wait().unwrap();
            // Its last output may still be in the terminal's buffer.
            reading.join().unwrap();
            status
        });
        let status = within("the command to end", waiting).await.unwrap();
        (
            status.code(),
            String::from_utf8_lossy(&self.shown.borrow()).into_owned(),
        )
    }
}

fn resize(master: &OwnedFd, columns: u16) {
    let size = Winsize {
        ws_row: 24,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(master, size).unwrap();
}

/// The screen of this width after all output: a terminal emulator sufficient for progress bars. A full line wraps.
fn screen(written: &str, columns: usize) -> Vec<String> {
    let (mut lines, mut row, mut column) = (vec![Vec::new()], 0_usize, 0_usize);
    let mut rest = written.chars().peekable();
    while let Some(c) = rest.next() {
        if lines.len() <= row {
            lines.resize(row + 1, Vec::new());
        }
        match c {
            '\r' => column = 0,
            '\n' => row += 1,
            '\x1b' => {
                assert_eq!(rest.next(), Some('['), "an escape that is no control sequence");
                let mut number = String::new();
                let end = loop {
                    match rest.next().expect("the end of a sequence") {
                        c if c.is_ascii_alphabetic() => break c,
                        c => number.push(c),
                    }
                };
                let count = number.parse().unwrap_or(1);
                match end {
                    'A' => row = row.saturating_sub(count),
                    'B' => row += count,
                    'G' => column = count - 1,
                    'K' if number == "2" => lines[row].clear(),
                    'K' => lines[row].truncate(column),
                    'J' => {
                        lines[row].truncate(column);
                        lines.truncate(row + 1);
                    }
                    // Colours and cursor visibility.
                    'm' | 'h' | 'l' => {}
                    other => panic!("a sequence that this screen does not know: {number}{other}"),
                }
            }
            c => {
                if column == columns {
                    (row, column) = (row + 1, 0);
                    lines.resize(lines.len().max(row + 1), Vec::new());
                }
                let line: &mut Vec<char> = &mut lines[row];
                line.resize(line.len().max(column + 1), ' ');
                line[column] = c;
                column += 1;
            }
        }
    }
    let text = lines
        .iter()
        .map(|line| line.iter().collect::<String>().trim_end().to_owned());
    text.filter(|line| !line.is_empty()).collect()
}

async fn upstream_with_demo() -> (Upstream, Image, Proxy) {
    let upstream = Upstream::start().await;
    let layers = [noise(1, 300_000), noise(2, 200_000)];
    let image = upstream.push("library/demo", "latest", Image::with_layers(&layers));
    let proxy = Proxy::over(&upstream).await;
    (upstream, image, proxy)
}

#[tokio::test]
async fn a_pull_shows_a_bar_for_each_layer_and_leaves_one_line() {
    let (upstream, image, proxy) = upstream_with_demo().await;
    let gate = upstream.holds_blob(&image.layer(1).digest, 100_000);
    let terminal = Terminal::run(&proxy, &["pull", "demo"], 100, &[]);
    gate.reached().await;
    for layer in 0..2 {
        terminal.shows(&image.layer(layer).digest[7..19]).await;
    }
    terminal.shows("fetching").await;
    gate.release();
    let (code, written) = terminal.ends().await;
    assert_eq!(code, Some(0), "{written}");
    let left = screen(&written, 100);
    assert_eq!(left.len(), 1, "{left:#?}");
    assert!(
        left[0].starts_with("docker.io/library/demo:latest sha256:") && left[0].contains("fetched"),
        "{left:#?}"
    );

    for blob in &image.blobs {
        proxy.until_kept(&blob.digest).await;
    }
    let (code, written) = Terminal::run(&proxy, &["pull", "demo"], 100, &[]).ends().await;
    assert_eq!((code, screen(&written, 100).len()), (Some(0), 1), "{written}");
    assert!(
        screen(&written, 100)[0].ends_with(": already cached"),
        "{written}"
    );
}

#[tokio::test]
async fn progress_bar_is_one_line_on_a_narrow_terminal() {
    let (upstream, image, proxy) = upstream_with_demo().await;
    let gate = upstream.holds_blob(&image.layer(1).digest, 100_000);
    let terminal = Terminal::run(&proxy, &["pull", "demo"], 44, &[]);
    gate.reached().await;
    for blob in &image.blobs {
        terminal.shows(&blob.digest[7..12]).await;
    }
    terminal.shows("fetching").await;
    let drawn = String::from_utf8_lossy(&terminal.shown.borrow()).into_owned();
    let seen = screen(&drawn, 44);
    for blob in &image.blobs {
        let lines = seen.iter().filter(|line| line.contains(&blob.digest[7..12]));
        assert_eq!(lines.count(), 1, "{seen:#?}");
    }
    assert!(
        seen.iter().all(|line| line.contains('B')),
        "each ends with its bytes: {seen:#?}"
    );
    gate.release();
    let (code, written) = terminal.ends().await;
    assert_eq!((code, written.contains("fetched")), (Some(0), true), "{written}");
}

#[tokio::test]
async fn a_terminal_that_becomes_narrower_meanwhile_ends_the_same() {
    let (upstream, image, proxy) = upstream_with_demo().await;
    let gate = upstream.holds_blob(&image.layer(1).digest, 100_000);
    let terminal = Terminal::run(&proxy, &["pull", "demo"], 100, &[]);
    gate.reached().await;
    terminal.shows("fetching").await;
    terminal.resize(44);
    // The digests are drawn at the new width, with the image name cut.
    terminal.shows("docker.io/library/de \x1b").await;
    gate.release();
    let (code, written) = terminal.ends().await;
    assert_eq!(code, Some(0), "{written}");
    let (_, last) = written
        .trim_end()
        .rsplit_once("docker.io/library/demo:latest sha256:")
        .unwrap();
    assert!(last.contains("fetched"), "{written}");
}

#[tokio::test]
async fn ctrl_c_ends_the_command_and_not_the_pull() {
    let (upstream, image, proxy) = upstream_with_demo().await;
    let gate = upstream.holds_blob(&image.layer(1).digest, 100_000);
    let terminal = Terminal::run(&proxy, &["pull", "demo"], 100, &[]);
    gate.reached().await;
    terminal.shows("fetching").await;
    terminal.types(3);
    let (_, written) = terminal.ends().await;
    assert!(!written.contains(" layers already cached"), "{written}");
    gate.release();
    for blob in &image.blobs {
        proxy.until_kept(&blob.digest).await;
    }
}

#[tokio::test]
async fn colours_are_for_terminals_that_want_them() {
    let (_upstream, _image, proxy) = upstream_with_demo().await;
    let stats = |environment: &[(&str, &str)]| Terminal::run(&proxy, &["stats"], 100, environment);
    let (code, coloured) = stats(&[]).ends().await;
    assert_eq!(code, Some(0), "{coloured}");
    assert!(coloured.contains("\x1b[32m"), "{coloured:?}");
    let (_, plain) = stats(&[("NO_COLOR", "1")]).ends().await;
    assert!(!plain.contains('\x1b'), "{plain:?}");
    let told = |text: &str| screen(text, 100).first().cloned();
    assert_eq!(told(&coloured), told(&plain));
}
