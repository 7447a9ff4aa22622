// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon as a whole: one store, a thread for each guest's socket, the control socket.
//!
//! Each socket is listened on by a thread of its own, which serves one front-end after the
//! other. What a guest stored is kept outside of its connections.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use cram_store::{Background, Backing, Client, Store, StoreConfig, StoreError};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::announce::Announcer;
use crate::cli::Dedup;
use crate::client::{Guest, Offer};
use crate::control;
use crate::device::{self, Device};
use crate::first_touch;
use crate::sigbus;
use crate::socket::{BoundSocket, SocketError};
use crate::vhost::channel::{Channel, End};
use crate::vhost::session::{Refusal, Session};
use crate::worker::Workers;

/// What a daemon is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The guests.
    pub guests: Vec<GuestOptions>,
    /// How long a guest's pages are kept while nobody is connected; for ever when not given.
    pub keep: Option<Duration>,
    /// The control socket.
    pub control_socket: Option<PathBuf>,
    /// The store.
    pub store: StoreOptions,
    /// Bytes that each guest may hold; the whole capacity when not given.
    pub quota_bytes: Option<u64>,
    /// What each guest is offered.
    pub offer: Offer,
}

/// A guest that may connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestOptions {
    /// Its name, and its account's.
    pub name: String,
    /// Its vhost-user socket.
    pub socket: PathBuf,
    /// Whoever connects there is the virtual machine that was there before.
    pub trusts_socket: bool,
}

impl GuestOptions {
    /// A guest that is called what its socket is: `/run/vm1.sock` is `vm1`.
    pub fn of_socket(socket: PathBuf) -> Self {
        let stem = socket.file_stem().unwrap_or(socket.as_os_str());
        GuestOptions {
            name: stem.to_string_lossy().into_owned(),
            socket,
            trusts_socket: false,
        }
    }
}

/// What the store is made with.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Bytes that it may hold.
    pub capacity_bytes: u64,
    /// The file that pages are kept in; memory that ends with the daemon when not given.
    pub arena: Option<PathBuf>,
    /// Whose equal pages are stored once.
    pub dedup: Dedup,
    /// What its background thread may do.
    pub background: Background,
}

impl StoreOptions {
    /// Usual ones.
    pub fn with_capacity(capacity_bytes: u64) -> Self {
        Self {
            capacity_bytes,
            arena: None,
            dedup: Dedup::Guest,
            background: Background::default(),
        }
    }

    fn open(&self, max_pools_per_client: u32) -> Result<Arc<Store>, StoreError> {
        let backing = match &self.arena {
            Some(path) => Backing::File(path.clone()),
            None => Backing::Memory,
        };
        Store::open(StoreConfig {
            capacity_bytes: self.capacity_bytes,
            // The sockets are what limits them; and an arena may know more.
            max_clients: cram_store::CLIENTS_MAX,
            max_pools_per_client,
            backing,
            background: Some(self.background),
            share_equal_pages: self.dedup != Dedup::Off,
        })
    }

    /// The account of the guest with this name: the one that the arena knows, or a new one.
    fn account(
        &self,
        store: &Store,
        name: &str,
        quota_bytes: Option<u64>,
    ) -> Result<Arc<Client>, StoreError> {
        /// What the sharing group of all guests is called.
        const ALL_GUESTS: &str = "all guests";
        // Whatever the operator has set for it since is in the arena.
        if let Some(known) = store.client(name) {
            if self.dedup != Dedup::All && known.is_in_sharing_group() {
                log::warn!(
                    "{name}: the arena was made with --dedup all, and its equal pages are still stored \
                     once with those of other guests"
                );
            }
            return Ok(known);
        }
        match self.dedup {
            Dedup::All => store.add_client_to_group(name, quota_bytes, ALL_GUESTS),
            Dedup::Off | Dedup::Guest => store.add_client(name, quota_bytes),
        }
    }
}

/// Why a daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A socket cannot be listened on.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The store cannot be made.
    #[error("the store cannot be made: {0}")]
    Store(#[from] StoreError),
    /// The system refused something.
    #[error("cannot start: {0}")]
    System(#[from] io::Error),
}

/// What every thread of the daemon may look at.
pub struct Shared {
    /// The store.
    pub store: Arc<Store>,
    /// The guests, in the order of their sockets.
    pub guests: Vec<Arc<Guest>>,
    /// When the daemon started.
    pub started: Instant,
}

impl Shared {
    /// The guest of that name.
    pub fn guest(&self, name: &str) -> Option<&Arc<Guest>> {
        self.guests.iter().find(|guest| guest.name == name)
    }
}

/// The bell that ends every accepting thread.
pub(crate) struct Stop {
    stopping: AtomicBool,
    /// Becomes readable, and stays so.
    bell: OwnedFd,
}

impl Stop {
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Waits for so long. False when the daemon is to stop.
    fn pause(&self, time: Duration) -> bool {
        let time = Timespec::try_from(time).ok();
        let mut fds = [PollFd::new(&self.bell, PollFlags::IN)];
        // Woken early by whatever it is, it only looks early.
        let _ = poll(&mut fds, time.as_ref());
        !self.is_stopping()
    }

    fn ring(&self) {
        self.stopping.store(true, Ordering::Release);
        // It fails only when the counter is full, and then the bell is ringing.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// Waits for a connection. `None` when the daemon is to stop.
    pub(crate) fn accept(&self, socket: &BoundSocket) -> Option<UnixStream> {
        const BREATHE: Duration = Duration::from_millis(100);
        loop {
            let mut fds = [
                PollFd::new(&self.bell, PollFlags::IN),
                PollFd::new(socket.listener(), PollFlags::IN),
            ];
            let polled = poll(&mut fds, None);
            if self.is_stopping() {
                return None;
            }
            let accepted = match polled {
                Ok(_) => socket.listener().accept(),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => Err(error.into()),
            };
            match accepted {
                Ok((stream, _)) => return Some(stream),
                Err(error) => {
                    // Out of descriptors, most likely: others may give some back.
                    log::warn!("cannot accept a connection: {error}");
                    thread::sleep(BREATHE);
                }
            }
        }
    }
}

/// A daemon that has all that it needs, and runs no thread yet: the moment to confine the process,
/// since threads inherit that. Whoever connects waits until [`Ready::run`].
pub struct Ready {
    shared: Arc<Shared>,
    sockets: Vec<BoundSocket>,
    control: Option<BoundSocket>,
    stop: Arc<Stop>,
    announcer: Arc<Announcer>,
    keep: Option<Duration>,
}

/// A running daemon. Dropping it ends it as [`Daemon::stop`] does.
pub struct Daemon {
    shared: Arc<Shared>,
    stop: Arc<Stop>,
    announcer: Arc<Announcer>,
    /// The front-ends that are connected now, to hang up on them.
    lines: Vec<Arc<Mutex<Option<UnixStream>>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Ready {
    /// Opens the store and the sockets.
    pub fn new(options: &Options) -> Result<Self, StartError> {
        // Asked now, since it reads files, and those may be out of reach later.
        device::processors();
        sigbus::install()?;
        if let Err(error) = first_touch::descriptor() {
            log::warn!(
                "--first-touch-limit is not in force: this process may not use userfaultfd ({error}). Guests \
                 can have their memory charged to the daemon's control group"
            );
        }
        let store = options.store.open(options.offer.max_pools)?;
        let announcer = Arc::new(Announcer::default());
        let mut guests = Vec::new();
        for GuestOptions {
            name,
            socket,
            trusts_socket,
        } in &options.guests
        {
            let account = options.store.account(&store, name, options.quota_bytes)?;
            guests.push(Arc::new(Guest::new(
                name.clone(),
                socket.clone(),
                *trusts_socket,
                Arc::clone(&store),
                account,
                options.offer.clone(),
                Arc::clone(&announcer),
            )));
        }
        // All of them before any thread, so that an error leaves nothing behind.
        let sockets = options
            .guests
            .iter()
            .map(|guest| BoundSocket::listen(&guest.socket, false));
        let sockets = sockets.collect::<Result<Vec<_>, _>>()?;
        let control = options.control_socket.as_deref();
        let control = control
            .map(|path| BoundSocket::listen(path, true))
            .transpose()?;
        report_recovery(&store, &guests);
        let stop = Arc::new(Stop {
            stopping: AtomicBool::new(false),
            bell: eventfd(0, EventfdFlags::CLOEXEC).map_err(io::Error::from)?,
        });

        let shared = Arc::new(Shared {
            store,
            guests,
            started: Instant::now(),
        });
        Ok(Ready {
            shared,
            sockets,
            control,
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
            lines: Vec::new(),
            threads: Vec::new(),
        };
        let (sockets, control) = (self.sockets, self.control);
        for (guest, socket) in daemon.shared.guests.clone().into_iter().zip(sockets) {
            let line = Arc::new(Mutex::new(None));
            daemon.lines.push(Arc::clone(&line));
            let stop = Arc::clone(&daemon.stop);
            daemon.spawn("accept", move || serve_guest(&guest, &socket, &stop, &line))?;
        }
        if let Some(socket) = control {
            let (shared, stop) = (Arc::clone(&daemon.shared), Arc::clone(&daemon.stop));
            daemon.spawn("control", move || control::serve(&shared, &socket, &stop))?;
        }
        let (shared, announcer) = (Arc::clone(&daemon.shared), Arc::clone(&daemon.announcer));
        daemon.spawn("announce", move || {
            announcer.run(|| {
                shared
                    .guests
                    .iter()
                    .for_each(|guest| guest.announce_changes())
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
        for line in &self.lines {
            // Ends the session. The front-end is hung up on later, when the workers are gone.
            if let Some(front) = line.lock().as_ref() {
                let _ = front.shutdown(Shutdown::Read);
            }
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread of the daemon panicked");
            }
        }
    }
}

/// Says what was found in an arena.
fn report_recovery(store: &Store, guests: &[Arc<Guest>]) {
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
        let has_socket = guests.iter().any(|guest| guest.name == client.name());
        if !has_socket {
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
        for guest in &shared.guests {
            if let Err(error) = guest.forget_after(keep) {
                log::warn!("{}: pages cannot be dropped: {error}", guest.name);
            }
        }
    }
}

fn serve_guest(
    guest: &Arc<Guest>,
    socket: &BoundSocket,
    stop: &Stop,
    line: &Mutex<Option<UnixStream>>,
) {
    while let Some(front) = stop.accept(socket) {
        log::info!("{}: a front-end connected", guest.name);
        match front.try_clone() {
            Ok(copy) => *line.lock() = Some(copy),
            Err(error) => {
                // Without a copy it could not be hung up on when the daemon stops.
                log::warn!("{}: the front-end is not served: {error}", guest.name);
                continue;
            }
        }
        // The bell may have rung before there was a line to hang up on.
        if !stop.is_stopping() {
            // A defect of ours that shows in one connection shall not cost the guest its socket.
            let served = catch_unwind(AssertUnwindSafe(|| serve_connection(guest, &front)));
            guest.detach();
            match served {
                Ok(Ok(())) => log::info!("{}: the front-end disconnected", guest.name),
                Ok(Err(error)) => log::warn!("{}: the connection ended: {error}", guest.name),
                Err(_) => {
                    log::error!("{}: the connection ended in a panic", guest.name);
                    let _ = front.shutdown(Shutdown::Both);
                }
            }
        }
        line.lock().take();
    }
}

/// Why a connection ended, other than by the front-end's wish.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("{0}")]
    Channel(#[from] End),
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("{0}")]
    Failed(&'static str),
    #[error("{0}")]
    System(#[from] io::Error),
}

fn serve_connection(guest: &Arc<Guest>, front: &UnixStream) -> Result<(), ConnectionError> {
    let device = Arc::new(Device::new(Arc::clone(guest))?);
    let workers = Workers::start(&device)?;
    guest.attach(&device);
    let end = converse(&device, front);
    // The workers end here. Only then may the front-end see that it is over: it takes the used
    // indexes for final, and would have the next back-end execute again what is completed now.
    drop(workers);
    let _ = front.shutdown(Shutdown::Both);
    match end {
        // Whatever the front-end did about it meanwhile.
        _ if device.failure().is_some() => Err(ConnectionError::Failed(
            device.failure().unwrap_or_default(),
        )),
        ConnectionError::Channel(End::FrontEnd) => Ok(()),
        error => Err(error),
    }
}

/// Does what the front-end says, for as long as it makes sense.
fn converse(device: &Device, front: &UnixStream) -> ConnectionError {
    let channel = Channel::new(front, device.over());
    let mut session = Session::new(device);
    loop {
        let received = match channel.receive() {
            Ok(received) => received,
            Err(end) => return end.into(),
        };
        let (answer, verdict) = session.handle(received);
        let answered = answer.map_or(Ok(()), |answer| channel.answer(&answer));
        // A refusal says more than that nobody wanted to hear of it.
        if let Err(refusal) = verdict {
            return refusal.into();
        }
        if let Err(end) = answered {
            return end.into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_called_what_its_socket_is() {
        let name = |path| GuestOptions::of_socket(PathBuf::from(path)).name;
        assert_eq!(
            ["/run/a.sock", "c", "/tmp/b.c.sock"].map(name),
            ["a", "c", "b.c"]
        );
    }
}
