// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Metrics for Prometheus and its like, as OpenMetrics text over HTTP, on a unix socket or a port of
//! this host alone, if the operator asks for it.
//!
//! One scrape at a time, with bounds on what is read and on how long that takes; whoever is slow makes
//! other scrapes wait, and no guest.

mod families;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use crate::address::Address;
use crate::shared::Shared;
use crate::socket::{BoundSocket, Permissions, SocketError};
use crate::stop::Stop;

/// Longest head of a request.
const REQUEST_MAX: usize = 8 * 1024;
/// How long a scrape may take to ask, and to take its answer.
const TIME_MAX: Duration = Duration::from_secs(2);
/// What OpenMetrics calls itself.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Why nothing can be scraped.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The socket cannot be listened on.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The port cannot.
    #[error("metrics on {0}: {1}; choose another port, or stop what listens there")]
    Port(SocketAddr, io::Error),
}

/// What is listened on.
pub(crate) enum Listener {
    Unix(BoundSocket),
    Loopback(TcpListener),
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Unix(socket) => socket.listener().as_fd(),
            Listener::Loopback(listener) => listener.as_fd(),
        }
    }
}

impl Listener {
    pub(crate) fn bind(address: &Address, permissions: &Permissions) -> Result<Self, MetricsError> {
        match address {
            Address::Unix(path) => {
                let socket = BoundSocket::listen(path, Some(permissions))?;
                Ok(Listener::Unix(socket))
            }
            Address::Loopback(address) => {
                let wrong = |error| MetricsError::Port(*address, error);
                let listener = TcpListener::bind(address).map_err(wrong)?;
                // Who hangs up before he is accepted must not make us wait for the next one.
                listener.set_nonblocking(true).map_err(wrong)?;
                Ok(Listener::Loopback(listener))
            }
        }
    }

    /// The port, if it is one.
    pub(crate) fn local_address(&self) -> Option<SocketAddr> {
        match self {
            Listener::Unix(_) => None,
            Listener::Loopback(listener) => listener.local_addr().ok(),
        }
    }

    fn accept(&self) -> io::Result<Box<dyn Connection>> {
        Ok(match self {
            Listener::Unix(socket) => Box::new(socket.listener().accept()?.0),
            Listener::Loopback(listener) => Box::new(listener.accept()?.0),
        })
    }
}

trait Connection: Read + Write {
    /// A read or a write that takes longer fails.
    fn bound(&self, time: Duration) -> io::Result<()>;
}

impl Connection for UnixStream {
    fn bound(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))?;
        self.set_write_timeout(Some(time))
    }
}

impl Connection for TcpStream {
    fn bound(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))?;
        self.set_write_timeout(Some(time))
    }
}

/// Serves scrapes until the daemon stops.
pub(crate) fn serve(shared: &Arc<Shared>, listener: &Listener, stop: &Stop) {
    let mut registry = Registry::with_prefix("cram");
    registry.register_collector(Box::new(families::All(Arc::clone(shared))));
    while let Some(mut connection) = stop.accept(listener, || listener.accept()) {
        if let Err(error) = answer(connection.as_mut(), &registry) {
            log::debug!("scrape: {error}");
        }
    }
}

fn answer(connection: &mut dyn Connection, registry: &Registry) -> io::Result<()> {
    let until = Instant::now() + TIME_MAX;
    let reply = match read_request(connection, until)? {
        Asked::Metrics => {
            let mut body = String::new();
            match encode(&mut body, registry) {
                Ok(()) => response("200 OK", CONTENT_TYPE, &body),
                Err(_) => plain("500 Internal Server Error", "the metrics cannot be written"),
            }
        }
        Asked::Nothing => return Ok(()),
        Asked::Elsewhere => plain("404 Not Found", "there is nothing but /metrics"),
        Asked::Otherwise => plain(
            "405 Method Not Allowed",
            "there is nothing but GET /metrics",
        ),
        Asked::Nonsense => plain("400 Bad Request", "that is no request of HTTP/1"),
    };
    write_until(connection, reply.as_bytes(), until)
}

fn plain(status: &str, text: &str) -> String {
    response(status, "text/plain; charset=utf-8", &format!("{text}\n"))
}

fn response(status: &str, kind: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )
}

#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Metrics,
    Elsewhere,
    Otherwise,
    Nonsense,
    Nothing,
}

/// Bounds the next read or write by what is left of the time.
fn bound(connection: &dyn Connection, until: Instant) -> io::Result<()> {
    match until.checked_duration_since(Instant::now()) {
        Some(left) if !left.is_zero() => connection.bound(left),
        _ => Err(io::ErrorKind::TimedOut.into()),
    }
}

fn read_request(connection: &mut dyn Connection, until: Instant) -> io::Result<Asked> {
    let mut head = Vec::new();
    let mut chunk = [0; 1024];
    let is_whole = |head: &[u8]| head.windows(4).any(|end| end == b"\r\n\r\n");
    while !is_whole(&head) {
        if head.len() > REQUEST_MAX {
            return Ok(Asked::Nonsense);
        }
        bound(connection, until)?;
        match connection.read(&mut chunk)? {
            0 if head.is_empty() => return Ok(Asked::Nothing),
            0 => return Ok(Asked::Nonsense),
            n => head.extend_from_slice(chunk.get(..n).unwrap_or_default()),
        }
    }
    Ok(understand(&head))
}

fn understand(head: &[u8]) -> Asked {
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let Ok(line) = std::str::from_utf8(line) else {
        return Asked::Nonsense;
    };
    let words: Vec<_> = line.split(' ').collect();
    let [method, target, version] = words.as_slice() else {
        return Asked::Nonsense;
    };
    if !version.starts_with("HTTP/1.") {
        return Asked::Nonsense;
    }
    let path = target.split('?').next().unwrap_or_default();
    match (*method, path) {
        ("GET", "/metrics") => Asked::Metrics,
        ("GET", _) => Asked::Elsewhere,
        _ => Asked::Otherwise,
    }
}

fn write_until(
    connection: &mut dyn Connection,
    mut bytes: &[u8],
    until: Instant,
) -> io::Result<()> {
    while !bytes.is_empty() {
        bound(connection, until)?;
        let written = connection.write(bytes)?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = bytes.get(written..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_understood() {
        for (head, asked) in [
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", Asked::Metrics),
            ("GET /metrics?x=1 HTTP/1.0\r\n\r\n", Asked::Metrics),
            ("GET / HTTP/1.1\r\n\r\n", Asked::Elsewhere),
            ("POST /metrics HTTP/1.1\r\n\r\n", Asked::Otherwise),
            ("GET /metrics\r\n\r\n", Asked::Nonsense),
            ("GET /metrics HTTP/2\r\n\r\n", Asked::Nonsense),
            ("\r\n\r\n", Asked::Nonsense),
        ] {
            assert_eq!(understand(head.as_bytes()), asked, "{head}");
        }
        assert_eq!(understand(b"GET /\xff HTTP/1.1\r\n\r\n"), Asked::Nonsense);
    }
}
