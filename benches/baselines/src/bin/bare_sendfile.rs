//! Baseline of the benches: a `sendfile(2)` loop that answers every request with one file. It is the least that a large
//! response can cost on this runtime.
//!
//! `bare_sendfile FILE [STEP_BYTES]`: bytes of a system call at most, 512 KiB unless given. A connection does not yield after
//! a step, because that took 1.6 times as much CPU time.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::sync::Arc;

use rustix::fs::sendfile;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream};

const STEP_BYTES: usize = 512 * 1024;
const HEADER_BYTES_MAX: usize = 16 * 1024;

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let path = arguments.next().ok_or_else(|| invalid("no file is given"))?;
    let step_bytes = match arguments.next() {
        None => STEP_BYTES,
        Some(bytes) => bytes
            .to_str()
            .and_then(|bytes| bytes.parse().ok())
            .ok_or_else(|| invalid("the step is not a number of bytes"))?,
    };
    let file = File::open(path)?;
    let content = Content {
        file_bytes: file.metadata()?.len(),
        file,
        step_bytes,
    };
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(serve(Arc::new(content)))
}

struct Content {
    file: File,
    file_bytes: u64,
    step_bytes: usize,
}

async fn serve(content: Arc<Content>) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("listening on {}", listener.local_addr()?);
    loop {
        let (connection, _) = listener.accept().await?;
        connection.set_nodelay(true)?;
        let content = Arc::clone(&content);
        // A client that leaves ends its own connection only.
        tokio::spawn(async move { content.answer_all(connection).await });
    }
}

impl Content {
    async fn answer_all(&self, mut connection: TcpStream) -> Result<()> {
        while read_header(&mut connection).await? {
            let header = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", self.file_bytes);
            connection.write_all(header.as_bytes()).await?;
            let mut position = 0;
            while position < self.file_bytes {
                let sent = connection
                    .async_io(Interest::WRITABLE, || {
                        let mut offset = position;
                        Ok(sendfile(&connection, &self.file, Some(&mut offset), self.step_bytes)?)
                    })
                    .await?;
                if sent == 0 {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                position += sent as u64;
            }
        }
        Ok(())
    }
}

/// Reads one request. False at the end of the connection.
async fn read_header(connection: &mut TcpStream) -> Result<bool> {
    let mut header = Vec::new();
    while !header.ends_with(b"\r\n\r\n") {
        if header.len() > HEADER_BYTES_MAX {
            return Err(invalid("the request header is too long"));
        }
        if connection.read_buf(&mut header).await? == 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

fn invalid(reason: &'static str) -> Error {
    Error::new(ErrorKind::InvalidInput, reason)
}
