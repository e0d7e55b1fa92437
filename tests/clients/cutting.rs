//! Interrupted registry: forwards every request to UPSTREAM, sends at most BYTES_MAX bytes of each blob's body, then
//! closes. `Range` is forwarded, so a client that resumes gets everything in the end. One line per response:
//! `passed BYTES of GET /v2/… HTTP/1.1`, or `cut after BYTES …`. One connection carries one request.
//!
//! cutting UPSTREAM BYTES_MAX

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(upstream), Some(bytes_max)) = (arguments.next(), arguments.next()) else {
        return Err(io::Error::other("usage: cutting UPSTREAM BYTES_MAX"));
    };
    let bytes_max = bytes_max.parse().map_err(io::Error::other)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("listening on {}", listener.local_addr()?);
    for client in listener.incoming() {
        let (client, upstream) = (client?, upstream.clone());
        std::thread::spawn(move || {
            if let Err(error) = pass_on(&client, &upstream, bytes_max) {
                println!("failed: {error}");
            }
            let _ = client.shutdown(Shutdown::Both);
        });
    }
    Ok(())
}

fn pass_on(mut client: &TcpStream, upstream: &str, bytes_max: u64) -> io::Result<()> {
    let request = head_without_connection(&mut BufReader::new(client))?;
    let mut upstream = TcpStream::connect(upstream)?;
    upstream.write_all(request.as_bytes())?;
    let mut reply = BufReader::new(upstream);
    client.write_all(head_without_connection(&mut reply)?.as_bytes())?;
    let asked = request.lines().next().unwrap_or_default();
    let limit = if asked.starts_with("GET ") && asked.contains("/blobs/") {
        bytes_max
    } else {
        u64::MAX
    };
    let passed = io::copy(&mut reply.by_ref().take(limit), &mut client)?;
    let ended = reply.fill_buf()?.is_empty();
    println!(
        "{} {passed} of {asked}",
        if ended { "passed" } else { "cut after" }
    );
    Ok(())
}

/// The header with its empty line, with `Connection: close`, so that the end of the body is the end of the stream.
fn head_without_connection(from: &mut impl BufRead) -> io::Result<String> {
    let mut head = String::new();
    loop {
        let mut line = String::new();
        if from.read_line(&mut line)? == 0 {
            return Err(io::Error::other("closed within a head"));
        }
        if line == "\r\n" {
            return Ok(head + "Connection: close\r\n\r\n");
        }
        if !line.to_ascii_lowercase().starts_with("connection:") {
            head += &line;
        }
    }
}
