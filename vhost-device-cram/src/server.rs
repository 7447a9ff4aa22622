// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon as a whole: one store, a thread for each guest's socket, the control socket.
//!
//! Each socket is listened on by a thread of its own, which serves one front-end after the
//! other. What a guest stored is kept outside of its connections.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use cram_store::{Store, StoreError};

use crate::announce::Announcer;
use crate::control;
use crate::device;
use crate::first_touch;
use crate::metrics::{self, MetricsError};
pub use crate::options::{GuestOptions, Options, StoreOptions};
use crate::roster::{Folders, Roster, RosterError, Terms};
pub use crate::shared::Shared;
use crate::sigbus;
use crate::socket::{BoundSocket, SocketError, sweep};
use crate::stop::Stop;

/// Why a daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A socket cannot be listened on.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The store cannot be made.
    #[error("the store cannot be made: {0}")]
    Store(#[from] StoreError),
    /// A guest cannot be.
    #[error(transparent)]
    Guest(#[from] RosterError),
    /// A folder for guests that are added cannot be read.
    #[error("guest folder {path}: {error}; create it first, or choose another one", path = path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Metrics cannot be served.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The system refused something.
    #[error("cannot start: {0}")]
    System(#[from] io::Error),
}

/// A daemon that has all that it needs, and runs no thread yet: the moment to confine the process,
/// since threads inherit that. Whoever connects waits until [`Ready::run`].
pub struct Ready {
    shared: Arc<Shared>,
    /// With the names of their guests.
    sockets: Vec<(String, BoundSocket)>,
    control: Option<BoundSocket>,
    metrics: Option<metrics::Listener>,
    stop: Arc<Stop>,
    announcer: Arc<Announcer>,
    keep: Option<Duration>,
}

/// A running daemon. Dropping it ends it as [`Daemon::stop`] does.
pub struct Daemon {
    shared: Arc<Shared>,
    stop: Arc<Stop>,
    announcer: Arc<Announcer>,
    /// The port of the metrics, if they have one.
    metrics_port: Option<SocketAddr>,
    threads: Vec<JoinHandle<()>>,
}

impl Ready {
    /// Opens the store and the sockets.
    pub fn new(options: &Options) -> Result<Self, StartError> {
        // Asked now, since it reads files, and those may be out of reach later.
        device::processors();
        control::peer::own_uid();
        sigbus::install()?;
        if let Err(error) = first_touch::descriptor() {
            log::warn!(
                "--first-touch-limit is not in force: this process may not use userfaultfd ({error}). Guests \
                 can have their memory charged to the daemon's control group"
            );
        }
        let store = options.store.open(options.offer.max_pools)?;
        let announcer = Arc::new(Announcer::default());
        for folder in &options.guest_folders {
            sweep(folder).map_err(|error| StartError::Folder {
                path: folder.clone(),
                error,
            })?;
        }
        let folders = options.folders();
        let guests = Roster::new(Terms {
            store: Arc::clone(&store),
            store_options: options.store.clone(),
            quota_bytes: options.quota_bytes,
            offer: options.offer.clone(),
            announcer: Arc::clone(&announcer),
            control_socket: options.control_socket.clone(),
            folders: Folders::new(folders.iter().map(|folder| folder.as_path())),
        });
        // All of them before any thread, so that an error leaves nothing behind.
        let mut sockets = Vec::new();
        for guest in &options.guests {
            guests.seat(guest)?;
            let socket = BoundSocket::listen(&guest.socket, None)?;
            sockets.push((guest.name.clone(), socket));
        }
        let control = options.control_socket.as_deref();
        let control = control
            .map(|path| BoundSocket::listen(path, Some(&options.control_permissions)))
            .transpose()?;
        let metrics = options.metrics.as_ref();
        let metrics = metrics
            .map(|address| metrics::Listener::bind(address, &options.control_permissions))
            .transpose()?;
        report_recovery(&store, &guests);
        let stop = Arc::new(Stop::new()?);
        let shared = Arc::new(Shared {
            store,
            guests,
            started: Instant::now(),
        });
        Ok(Ready {
            shared,
            sockets,
            control,
            metrics,
            stop,
            announcer,
            keep: options.keep,
        })
    }

    /// Starts the threads: from now on, connections are served.
    pub fn run(self) -> Result<Daemon, StartError> {
        self.shared.store.start_background();
        let mut daemon = Daemon {
            shared: self.shared,
            stop: self.stop,
            announcer: self.announcer,
            metrics_port: None,
            threads: Vec::new(),
        };
        let (sockets, control) = (self.sockets, self.control);
        for (name, socket) in sockets {
            daemon.shared.guests.listen(&name, socket)?;
        }
        if let Some(socket) = control {
            let (shared, stop) = (Arc::clone(&daemon.shared), Arc::clone(&daemon.stop));
            daemon.spawn("control", move || control::serve(&shared, &socket, &stop))?;
        }
        if let Some(listener) = self.metrics {
            daemon.metrics_port = listener.local_address();
            let (shared, stop) = (Arc::clone(&daemon.shared), Arc::clone(&daemon.stop));
            daemon.spawn("metrics", move || metrics::serve(&shared, &listener, &stop))?;
        }
        let (shared, announcer) = (Arc::clone(&daemon.shared), Arc::clone(&daemon.announcer));
        daemon.spawn("announce", move || {
            announcer.run(|| {
                let guests = shared.guests.list();
                guests.iter().for_each(|guest| guest.announce_changes());
            });
        })?;
        if let Some(keep) = self.keep {
            let (shared, stop) = (Arc::clone(&daemon.shared), Arc::clone(&daemon.stop));
            daemon.spawn("forget", move || forget(&shared, &stop, keep))?;
        }
        Ok(daemon)
    }
}

impl Daemon {
    /// Starts: afterwards every socket is being listened on.
    pub fn start(options: &Options) -> Result<Self, StartError> {
        Ready::new(options)?.run()
    }

    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.threads
            .push(thread::Builder::new().name(name.to_owned()).spawn(work)?);
        Ok(())
    }

    /// Where metrics are to be had, if that is a port: the one that the system chose for port 0.
    pub fn metrics_port(&self) -> Option<SocketAddr> {
        self.metrics_port
    }

    /// What the daemon's threads share.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Ends: hangs up on every front-end, and removes the sockets.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop.ring();
        self.announcer.stop();
        self.shared.guests.close();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread of the daemon panicked");
            }
        }
    }
}

/// Says what was found in an arena.
fn report_recovery(store: &Store, guests: &Roster) {
    let recovery = store.recovery();
    if recovery.pages > 0 || recovery.discarded > 0 {
        let verified = if recovery.is_verified {
            ", every one verified since the machine was started anew"
        } else {
            ""
        };
        log::info!(
            "{} pages found again in {:.3} s, {} torn or older records discarded{verified}",
            recovery.pages,
            recovery.took.as_secs_f64(),
            recovery.discarded,
        );
    }
    for client in store.clients() {
        if guests.get(client.name()).is_none() {
            log::warn!(
                "the arena has {} pages of {}, which has no socket: they stay until it has one, or \
                 \"cramctl remove {}\"",
                client.stats().pages_stored,
                client.name(),
                client.name(),
            );
        }
    }
}

/// Drops pages of guests that were away for longer than `keep`.
fn forget(shared: &Shared, stop: &Stop, keep: Duration) {
    /// Nobody needs it to the second.
    const LOOK: Duration = Duration::from_secs(1);
    while stop.pause(LOOK) {
        for guest in shared.guests.list() {
            if let Err(error) = guest.forget_after(keep) {
                log::warn!("{}: pages cannot be dropped: {error}", guest.name);
            }
        }
    }
}
