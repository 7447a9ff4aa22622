// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control socket: JSON-RPC 2.0, one object per line.
//!
//! Whoever may connect may look, and root and the daemon's own user may change things ([`peer`]);
//! but nobody can hurt the guests by being slow: connections, lines and times are bounded, each connection has a
//! thread of its own, and no method holds a lock that a guest's request could wait for.

pub mod client;
pub mod methods;
pub mod peer;
pub mod rpc;

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::control::peer::Peer;
use crate::shared::Shared;
use crate::socket::BoundSocket;
use crate::stop::Stop;

/// Longest line of a request, its end not counted.
pub const LINE_MAX: usize = 64 * 1024;
/// Most connections at a time.
pub const CONNECTIONS_MAX: usize = 16;
/// A connection that sends no complete line for so long is closed.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// A connection that takes no answer for so long is closed.
const WRITE_MAX: Duration = Duration::from_secs(5);
/// How often a waiting connection looks whether the daemon ends.
const TICK: Duration = Duration::from_millis(500);

/// Serves the control socket until the daemon stops.
pub(crate) fn serve(shared: &Arc<Shared>, socket: &BoundSocket, stop: &Arc<Stop>) {
    let open = Arc::new(AtomicUsize::new(0));
    let accept = || socket.listener().accept().map(|(stream, _)| stream);
    while let Some(mut stream) = stop.accept(socket.listener(), accept) {
        if open.load(Ordering::Acquire) >= CONNECTIONS_MAX {
            let error = rpc::Error::new(rpc::BUSY, "too many control connections; try again later");
            let _ = stream.set_write_timeout(Some(TICK));
            let _ = stream.write_all(&rpc::failure(&serde_json::Value::Null, &error));
            continue;
        }
        open.fetch_add(1, Ordering::AcqRel);
        let count = Counted(Arc::clone(&open));
        let (shared, stop) = (Arc::clone(shared), Arc::clone(stop));
        let spawned = thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || {
                let _count = count;
                if let Err(error) = converse(&shared, &stop, stream) {
                    log::debug!("control connection: {error}");
                }
            });
        if let Err(error) = spawned {
            log::warn!("cannot serve a control connection: {error}");
        }
    }
}

/// One connection that is counted for as long as this lives.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn converse(shared: &Shared, stop: &Stop, mut stream: UnixStream) -> io::Result<()> {
    let peer = Peer::of(&stream)?;
    stream.set_read_timeout(Some(TICK))?;
    stream.set_write_timeout(Some(WRITE_MAX))?;
    let mut buffer = Vec::with_capacity(1024);
    let mut chunk = [0u8; 4096];
    let mut searched = 0;
    let mut since = Instant::now();
    loop {
        let end = buffer
            .get(searched..)
            .unwrap_or_default()
            .iter()
            .position(|&b| b == b'\n');
        if let Some(end) = end.map(|end| searched + end)
            && end <= LINE_MAX
        {
            let answer = rpc::answer(buffer.get(..end).unwrap_or_default(), |method, params| {
                methods::call(shared, &peer, method, params)
            });
            if let Some(answer) = answer {
                stream.write_all(&answer)?;
            }
            buffer.drain(..=end);
            searched = 0;
            since = Instant::now();
            continue;
        }
        searched = buffer.len();
        if buffer.len() > LINE_MAX {
            let error = rpc::Error::new(
                rpc::INVALID_REQUEST,
                format!("the line is longer than {LINE_MAX} bytes"),
            );
            return stream.write_all(&rpc::failure(&serde_json::Value::Null, &error));
        }
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(n) => buffer.extend_from_slice(chunk.get(..n).unwrap_or_default()),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if stop.is_stopping() || since.elapsed() > IDLE_MAX {
                    return Ok(());
                }
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        // A client that feeds a byte now and then is idle, too.
        if since.elapsed() > IDLE_MAX {
            return Ok(());
        }
    }
}
