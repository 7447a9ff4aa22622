// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The service manager: it is told when the daemon is ready, that it lives, and that it ends.
//!
//! A confined process makes no sockets to tell it by. So the daemon says that it is ready when all its
//! sockets are listened on and before it confines itself, and keeps a socket for what comes later.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{env, io};

use sd_notify::NotifyState;

use crate::shared::Shared;

/// The line to the service manager, if there is one.
pub struct Service {
    line: Option<Arc<UnixDatagram>>,
    /// How often it wants to hear that the daemon lives.
    watchdog: Option<Duration>,
}

/// Says that the daemon lives, until it is dropped.
pub struct Watchdog {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    /// Whoever started us, if he wants to be told. To be called before the process is confined.
    pub fn connect() -> Self {
        let line = line().unwrap_or_else(|error| {
            log::warn!("the service manager cannot be told anything: {error}");
            None
        });
        Service {
            line: line.map(Arc::new),
            watchdog: sd_notify::watchdog_enabled(),
        }
    }

    /// Says that everything is open.
    pub fn ready(&self) {
        if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
            log::warn!("the service manager cannot be told that all is ready: {error}");
        }
    }

    /// Says that it is about to end.
    pub fn stopping(&self) {
        if let Some(line) = &self.line {
            let _ = line.send(b"STOPPING=1");
        }
    }

    /// Says again and again that the daemon lives: that what everybody needs can be had.
    ///
    /// # Errors
    /// When there are no threads left.
    pub fn watch(&self, shared: &Arc<Shared>) -> io::Result<Option<Watchdog>> {
        let (Some(line), Some(limit)) = (&self.line, self.watchdog) else {
            return Ok(None);
        };
        let (line, shared) = (Arc::clone(line), Arc::clone(shared));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let work = move || {
            while !stopped.load(Ordering::Acquire) {
                // These wait for the locks of the list and of the store's tables.
                let clients = shared.store.clients().len();
                let held = shared.store.stats().mem_used_total;
                let guests = shared.guests.list().len();
                log::trace!("{guests} guests, {clients} clients, {held} bytes");
                if let Err(error) = line.send(b"WATCHDOG=1") {
                    log::warn!("the service manager cannot be told that we live: {error}");
                }
                thread::park_timeout(limit / 3);
            }
        };
        let thread = thread::Builder::new()
            .name("watchdog".to_owned())
            .spawn(work)?;
        Ok(Some(Watchdog {
            stop,
            thread: Some(thread),
        }))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

fn line() -> io::Result<Option<UnixDatagram>> {
    let Some(place) = env::var_os("NOTIFY_SOCKET") else {
        return Ok(None);
    };
    let address = match place.as_bytes().split_first() {
        Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(&place)?,
    };
    let line = UnixDatagram::unbound()?;
    line.connect_addr(&address)?;
    // It is better not to be heard than to wait.
    line.set_nonblocking(true)?;
    Ok(Some(line))
}
