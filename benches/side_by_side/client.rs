//! Cheap clients: one thread per connection that reads and discards.

use crate::Outcome;
use crate::connection::{Connection, Endpoint, Scheme};
use crate::content::{Image, Layered, blob, manifest_by_tag, named};
use crate::servers::Server;
use sha2::{Digest, Sha256};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Size of a client's buffer.
pub(crate) const STEP_BYTES: usize = 256 * 1024;
/// Some caches send nothing to most clients until one has everything.
const PULL_SILENCE_MAX: Duration = Duration::from_secs(120);
/// Excluded from a window, for connection setup.
const RAMP: Duration = Duration::from_millis(300);

/// Result of a measurement window.
pub(crate) struct Streamed {
    pub(crate) gigabytes: f64,
    pub(crate) seconds: f64,
    pub(crate) cpu_seconds: f64,
}

/// `connections` clients that fetch `path` repeatedly, measured over `window` after setup.
pub(crate) fn stream(
    server: &Server,
    scheme: Scheme,
    path: &str,
    connections: usize,
    window: Duration,
) -> Outcome<Streamed> {
    let endpoint = match scheme {
        Scheme::Plain => &server.plain,
        Scheme::Tls => &server.tls,
    };
    let (read, over, connected) = (
        AtomicU64::new(0),
        AtomicBool::new(false),
        Barrier::new(connections + 1),
    );
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..connections)
            .map(|_| {
                scope.spawn(|| -> Outcome<()> {
                    let connection = endpoint.connect();
                    connected.wait();
                    let (mut connection, mut buffer) = (connection?, vec![0; STEP_BYTES]);
                    while !over.load(Ordering::Relaxed) {
                        let count = |part: &[u8]| {
                            read.fetch_add(part.len() as u64, Ordering::Relaxed);
                        };
                        let mut left = connection.ask(path, &mut buffer, count)?.left;
                        while left > 0 && !over.load(Ordering::Relaxed) {
                            let part = connection.read_some(left, &mut buffer)?;
                            count(part);
                            left -= part.len() as u64;
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        connected.wait();
        std::thread::sleep(RAMP);
        let (began, bytes, cpu) = (Instant::now(), read.load(Ordering::Relaxed), server.cpu_seconds());
        std::thread::sleep(window);
        let (seconds, bytes, after) = (
            began.elapsed().as_secs_f64(),
            read.load(Ordering::Relaxed) - bytes,
            server.cpu_seconds(),
        );
        over.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().map_err(|_| "a client panicked")??;
        }
        Ok(Streamed {
            gigabytes: bytes as f64 / 1e9,
            seconds,
            cpu_seconds: after? - cpu?,
        })
    })
}

/// Result of one download.
pub(crate) struct Timed {
    pub(crate) first_byte: Duration,
    pub(crate) total: Duration,
}

/// One download on a connection of its own, its body discarded.
pub(crate) fn one(endpoint: &Endpoint, path: &str) -> Outcome<Timed> {
    timed(&mut endpoint.connect()?, path)
}

/// A connection on which a client has read the manifest and the configuration.
pub(crate) fn after_manifest(endpoint: &Endpoint, image: &Layered) -> Outcome<Connection> {
    let mut connection = endpoint.connect()?;
    connection.read_all(&manifest_by_tag(image.tag))?;
    connection.read_all(&blob(&image.config))?;
    Ok(connection)
}

/// One download on an open connection, its body discarded.
pub(crate) fn timed(connection: &mut Connection, path: &str) -> Outcome<Timed> {
    let mut buffer = vec![0; STEP_BYTES];
    let began = Instant::now();
    let mut first_byte = None;
    let mut left = connection
        .ask(path, &mut buffer, |part| {
            if !part.is_empty() {
                first_byte = Some(began.elapsed());
            }
        })?
        .left;
    while left > 0 {
        left -= connection.read_some(left, &mut buffer)?.len() as u64;
        first_byte.get_or_insert_with(|| began.elapsed());
    }
    let total = began.elapsed();
    Ok(Timed {
        first_byte: first_byte.unwrap_or(total),
        total,
    })
}

/// A small response of any status.
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
    pub(crate) took: Duration,
}

/// One request on a connection of its own.
pub(crate) fn reply(endpoint: &Endpoint, path: &str) -> Outcome<Reply> {
    let (began, mut buffer, mut body) = (Instant::now(), vec![0; STEP_BYTES], Vec::new());
    let mut connection = endpoint.connect()?;
    let mut response = connection.request(path, None, &mut buffer, |part| body.extend_from_slice(part))?;
    while response.left > 0 {
        let part = connection.read_some(response.left, &mut buffer)?;
        body.extend_from_slice(part);
        response.left -= part.len() as u64;
    }
    Ok(Reply {
        status: response.status,
        body,
        took: began.elapsed(),
    })
}

/// Many at once, one download each.
pub(crate) fn herd(endpoint: &Endpoint, path: &str, clients: usize) -> Outcome<()> {
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..clients)
            .map(|_| scope.spawn(|| one(endpoint, path)))
            .collect();
        all.into_iter()
            .try_for_each(|client| client.join().map_err(|_| "a client panicked")?.map(drop))
    })
}

/// One of many clients: connects, waits for the others, and pulls an image: manifest, config, layer. Returns the time
/// of completion and in `first_byte` the start of the layer, in microseconds from the common start. The length of the
/// layer is checked, and with `hashed` its bytes. Otherwise the bytes are not touched, because clients and server
/// share the machine.
pub(crate) fn pull(
    endpoint: &Endpoint,
    image: &Image,
    ready: &Barrier,
    hashed: bool,
    first_byte: &AtomicU64,
) -> Outcome<Duration> {
    let connection = endpoint.connect_for(PULL_SILENCE_MAX);
    ready.wait();
    let (mut connection, mut buffer) = (connection?, vec![0; STEP_BYTES]);
    let began = Instant::now();
    for path in [manifest_by_tag(image.tag), blob(&image.config)] {
        let mut left = connection.ask(&path, &mut buffer, |_| ())?.left;
        while left > 0 {
            left -= connection.read_some(left, &mut buffer)?.len() as u64;
        }
    }
    let (mut hash, mut received) = (Sha256::new(), 0);
    let mut seen = |part: &[u8]| {
        if received == 0 && !part.is_empty() {
            first_byte.store(
                u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX),
                Ordering::Relaxed,
            );
        }
        if hashed {
            hash.update(part);
        }
        received += part.len() as u64;
    };
    let mut left = connection.ask(&blob(&image.layer), &mut buffer, &mut seen)?.left;
    while left > 0 {
        let part = if hashed {
            connection.read_some(left, &mut buffer)?
        } else {
            connection.discard_some(left, &mut buffer)?
        };
        seen(part);
        left -= part.len() as u64;
    }
    let took = began.elapsed();
    if received != image.layer_bytes {
        return Err(format!("a layer of {received} bytes instead of {}", image.layer_bytes).into());
    }
    if hashed && named(&hash.finalize()) != image.layer {
        return Err("wrong bytes".into());
    }
    Ok(took)
}

/// One download whose every byte is checked.
pub(crate) fn expect_digest(endpoint: &Endpoint, path: &str, digest: &str) -> Outcome<()> {
    expect_digest_on(&mut endpoint.connect()?, path, digest)
        .map_err(|e| format!("{}: {e}", endpoint.address).into())
}

/// The same on an open connection.
pub(crate) fn expect_digest_on(connection: &mut Connection, path: &str, digest: &str) -> Outcome<()> {
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; STEP_BYTES]);
    let mut left = connection.ask(path, &mut buffer, |part| hash.update(part))?.left;
    while left > 0 {
        let part = connection.read_some(left, &mut buffer)?;
        hash.update(part);
        left -= part.len() as u64;
    }
    let got = named(&hash.finalize());
    if got == digest {
        Ok(())
    } else {
        Err(format!("{path}: wrong bytes: {got}").into())
    }
}

/// Result of a number of full TLS handshakes.
pub(crate) struct Handshakes {
    pub(crate) count: f64,
    pub(crate) cpu_seconds: f64,
}

/// TLS 1.3 handshakes without resumption, one after another on each of a few threads.
pub(crate) fn handshakes(server: &Server, window: Duration) -> Outcome<Handshakes> {
    const THREADS: usize = 4;
    let (count, over, before) = (AtomicU64::new(0), AtomicBool::new(false), server.cpu_seconds()?);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| -> Outcome<()> {
                    while !over.load(Ordering::Relaxed) {
                        server.tls.connect()?;
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        std::thread::sleep(window);
        over.store(true, Ordering::Relaxed);
        clients
            .into_iter()
            .try_for_each(|client| client.join().map_err(|_| "a client panicked")?)
    })?;
    Ok(Handshakes {
        count: count.into_inner() as f64,
        cpu_seconds: server.cpu_seconds()? - before,
    })
}
