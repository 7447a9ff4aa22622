// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guests that may connect: who is there now, how one is added, changed and removed while the
//! daemon runs, and the thread that listens on the socket of each.
//!
//! The list is read by whoever shows or announces something and is locked for no longer than a copy
//! of it takes. Changes happen one at a time; each either takes effect as a whole or leaves
//! everything as it was.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use cram_store::{Client, Store, StoreError};
use parking_lot::{Mutex, RwLock};

use crate::announce::Announcer;
use crate::balance::Copies;
use crate::client::{Guest, Offer};
use crate::connection::serve_guest;
use crate::options::{GuestOptions, StoreOptions};
use crate::size;
use crate::socket::{BoundSocket, SocketError, directory_of};
use crate::stop::Stop;

/// The longest name that the store takes, in bytes.
const NAME_BYTES_MAX: usize = 255;
/// How long a guest that is removed may take to end its connection.
const END_MAX: Duration = Duration::from_secs(5);

/// Why a guest cannot be added, changed or removed. The text says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum RosterError {
    /// The name is empty, too long, or holds control characters.
    #[error(
        "\"{0}\" cannot be a guest's name; use 1 to {max} bytes without control characters",
        max = NAME_BYTES_MAX
    )]
    BadName(String),
    /// A guest of that name is there.
    #[error(
        "a guest is already called {name}, on {socket}; choose another name, or remove it first"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// The socket of the guest that has it.
        socket: PathBuf,
    },
    /// Another guest, or the control socket, has that socket.
    #[error("socket {socket} is already that of {owner}; choose another path")]
    SocketTaken {
        /// The socket.
        socket: PathBuf,
        /// Who has it.
        owner: String,
    },
    /// The daemon may not make sockets there.
    #[error(
        "socket {socket} is not in a folder in which guests can be added ({folders}); choose one of \
         them, or start the daemon with --guest-folder {folder}"
    )]
    Folder {
        /// The socket.
        socket: PathBuf,
        /// Its folder.
        folder: PathBuf,
        /// Where it would be possible.
        folders: String,
    },
    /// The quota is more than there is.
    #[error("{} is more than the store's capacity of {}", size::show(*quota), size::show(*capacity))]
    Quota {
        /// What was asked for, in bytes.
        quota: u64,
        /// All there is, in bytes.
        capacity: u64,
    },
    /// It is connected, and nobody said that this does not matter.
    #[error(
        "\"{0}\" is connected; detach its device first, or say \"force\" to hang up on it: pages that \
         it has here are then out of its reach"
    )]
    Connected(String),
    /// There is no such guest.
    #[error("there is no client \"{name}\"; there are: {names}")]
    Unknown {
        /// The name that was asked for.
        name: String,
        /// Those that there are.
        names: String,
    },
    /// Its connection does not end.
    #[error("{0} is removed, but its connection has not ended yet; its pages were kept")]
    Unended(String),
    /// The daemon is ending.
    #[error("the daemon is ending")]
    Ending,
    /// The socket cannot be listened on.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The store refused.
    #[error("the store refused: {0}")]
    Store(#[from] StoreError),
    /// The system refused.
    #[error("cannot listen for the guest: {0}")]
    System(#[from] io::Error),
}

/// What is to be different about a guest; what is not given stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Bytes that it may hold.
    pub quota_bytes: Option<u64>,
    /// What it counts for when the store is full.
    pub weight: Option<u32>,
    /// Whether its puts are refused.
    pub frozen: Option<bool>,
    /// What becomes of copies.
    pub copies: Option<Copies>,
    /// Whether it frees by itself what it does not use.
    pub auto_squeeze: Option<bool>,
}

/// What every guest is made from.
#[derive(Debug)]
pub(crate) struct Terms {
    pub(crate) store: Arc<Store>,
    pub(crate) store_options: StoreOptions,
    pub(crate) quota_bytes: Option<u64>,
    pub(crate) offer: Offer,
    pub(crate) announcer: Arc<Announcer>,
    /// A socket that no guest can have.
    pub(crate) control_socket: Option<PathBuf>,
    /// Where sockets can be made while the daemon runs.
    pub(crate) folders: Folders,
}

/// Folders in which sockets of guests may be made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Folders(BTreeSet<PathBuf>);

impl Folders {
    /// These, by the names given and by those that they really have. To be made before the process is
    /// confined, since it cannot ask afterwards.
    pub fn new<'a>(folders: impl IntoIterator<Item = &'a Path>) -> Self {
        let both = |folder: &'a Path| {
            let real = fs::canonicalize(folder).ok();
            [Some(folder.to_owned()), real].into_iter().flatten()
        };
        Folders(folders.into_iter().flat_map(both).collect())
    }

    fn has(&self, folder: &Path) -> bool {
        // As components, so that a trailing slash makes no difference.
        self.0.contains(folder)
    }

    fn show(&self) -> String {
        let names: Vec<_> = self
            .0
            .iter()
            .map(|folder| folder.display().to_string())
            .collect();
        names.join(", ")
    }
}

struct Seat {
    guest: Arc<Guest>,
    listening: Option<Listening>,
}

/// The thread that listens for a guest, and how to end it.
struct Listening {
    stop: Arc<Stop>,
    /// The front-end that is connected now, to hang up on it.
    line: Arc<Mutex<Option<UnixStream>>>,
    /// Says that the thread has ended, by being closed.
    ended: Mutex<mpsc::Receiver<()>>,
    thread: JoinHandle<()>,
}

impl Listening {
    fn start(guest: &Arc<Guest>, socket: BoundSocket) -> io::Result<Self> {
        let stop = Arc::new(Stop::new()?);
        let line = Arc::new(Mutex::new(None));
        let (end, ended) = mpsc::channel();
        let (guest, at, front) = (Arc::clone(guest), Arc::clone(&stop), Arc::clone(&line));
        let thread = thread::Builder::new()
            .name("accept".to_owned())
            .spawn(move || {
                serve_guest(&guest, &socket, &at, &front);
                // The socket's file goes first.
                drop(socket);
                drop(end);
            })?;
        Ok(Listening {
            stop,
            line,
            ended: Mutex::new(ended),
            thread,
        })
    }

    /// Ends the session. The front-end is hung up on later, when the workers are gone.
    fn hang_up(&self) {
        self.stop.ring();
        if let Some(front) = self.line.lock().as_ref() {
            let _ = front.shutdown(Shutdown::Read);
        }
    }

    /// Whether it has ended in time.
    fn wait(&self) -> bool {
        self.ended.lock().recv_timeout(END_MAX) == Err(RecvTimeoutError::Disconnected)
    }
}

/// The guests. See the text of the module.
pub struct Roster {
    terms: Terms,
    seats: RwLock<Vec<Seat>>,
    /// Held while something changes; whether nothing may change any more.
    closed: Mutex<bool>,
}

impl Roster {
    pub(crate) fn new(terms: Terms) -> Self {
        Roster {
            terms,
            seats: RwLock::default(),
            closed: Mutex::new(false),
        }
    }

    /// There may be room for the guests that were told that there is none.
    pub(crate) fn tell_of_room(&self) {
        self.terms.announcer.poke();
    }

    /// All of them, in the order in which they came.
    pub fn list(&self) -> Vec<Arc<Guest>> {
        let seats = self.seats.read();
        seats.iter().map(|seat| Arc::clone(&seat.guest)).collect()
    }

    /// The guest of that name.
    pub fn get(&self, name: &str) -> Option<Arc<Guest>> {
        let seats = self.seats.read();
        let seat = seats.iter().find(|seat| seat.guest.name == name)?;
        Some(Arc::clone(&seat.guest))
    }

    /// The guest of that name.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(&self, name: &str) -> Result<Arc<Guest>, RosterError> {
        self.get(name).ok_or_else(|| {
            let names: Vec<_> = self.list().iter().map(|guest| guest.name.clone()).collect();
            RosterError::Unknown {
                name: name.to_owned(),
                names: names.join(", "),
            }
        })
    }

    /// Makes the guest, and does not listen for it yet: for those that are there from the start.
    pub(crate) fn seat(&self, options: &GuestOptions) -> Result<(), RosterError> {
        self.check(options)?;
        let (account, _) = self.account(options)?;
        let guest = self.guest(options, account);
        self.seats.write().push(Seat {
            guest,
            listening: None,
        });
        Ok(())
    }

    /// Listens for a guest that is there from the start.
    pub(crate) fn listen(&self, name: &str, socket: BoundSocket) -> io::Result<()> {
        let mut seats = self.seats.write();
        if let Some(seat) = seats.iter_mut().find(|seat| seat.guest.name == name) {
            seat.listening = Some(Listening::start(&seat.guest, socket)?);
        }
        Ok(())
    }

    /// Adds a guest, and listens for it.
    ///
    /// # Errors
    /// What is in the way. Nothing was changed then.
    pub fn add(&self, options: &GuestOptions) -> Result<Arc<Guest>, RosterError> {
        let closed = self.closed.lock();
        if *closed {
            return Err(RosterError::Ending);
        }
        self.check(options)?;
        let folder = directory_of(&options.socket);
        if !self.terms.folders.has(&folder) {
            return Err(RosterError::Folder {
                socket: options.socket.clone(),
                folder,
                folders: self.terms.folders.show(),
            });
        }
        let socket = BoundSocket::listen_anew(&options.socket)?;
        let (account, is_new) = self.account(options)?;
        let guest = self.guest(options, account);
        let listening = Listening::start(&guest, socket).inspect_err(|_| {
            if is_new {
                self.terms.store.remove_client(&options.name);
            }
        })?;
        self.seats.write().push(Seat {
            guest: Arc::clone(&guest),
            listening: Some(listening),
        });
        log::info!("listening on {} for {}", guest.socket.display(), guest.name);
        Ok(guest)
    }

    /// Changes what the operator wants of a guest: all of it, or nothing.
    ///
    /// # Errors
    /// When there is no such guest, or it cannot have that.
    pub fn set(&self, name: &str, change: &Change) -> Result<Arc<Guest>, RosterError> {
        let _alone = self.closed.lock();
        let guest = self.find(name)?;
        self.check_quota(change.quota_bytes)?;
        let before = guest.account.settings();
        let mut settings = before.clone();
        settings.quota_bytes = change.quota_bytes.or(settings.quota_bytes);
        settings.weight = change.weight.unwrap_or(settings.weight);
        settings.is_frozen = change.frozen.unwrap_or(settings.is_frozen);
        if settings != before
            && let Err(error) = guest.account.set_settings(&settings)
        {
            // In force, and not kept: neither one thing nor the other.
            let _ = guest.account.set_settings(&before);
            return Err(error.into());
        }
        let mut policy = guest.balance.policy();
        policy.copies = change.copies.unwrap_or(policy.copies);
        policy.auto_squeeze = change.auto_squeeze.unwrap_or(policy.auto_squeeze);
        guest.balance.set_policy(policy);
        guest.announcer.poke();
        Ok(guest)
    }

    /// Listens no more for a guest, and hangs up on it if `force`. Its pages and settings stay in the
    /// store, for when it is added again, unless they are to be forgotten. The pages that it had.
    ///
    /// # Errors
    /// When there is no such guest, it is connected, or does not end.
    pub fn remove(&self, name: &str, force: bool, forget: bool) -> Result<u64, RosterError> {
        let closed = self.closed.lock();
        if *closed {
            return Err(RosterError::Ending);
        }
        let guest = self.find(name)?;
        if guest.is_connected() && !force {
            return Err(RosterError::Connected(guest.name.clone()));
        }
        let seat = {
            let mut seats = self.seats.write();
            let at = seats.iter().position(|seat| seat.guest.name == name);
            at.map(|at| seats.remove(at))
        };
        if let Some(listening) = seat.and_then(|seat| seat.listening) {
            listening.hang_up();
            if !listening.wait() {
                return Err(RosterError::Unended(guest.name.clone()));
            }
            join(listening.thread);
        }
        let pages = guest.account.stats().pages_stored;
        if forget {
            self.terms.store.remove_client(name);
        }
        Ok(pages)
    }

    /// Ends all of it.
    pub(crate) fn close(&self) {
        *self.closed.lock() = true;
        let ends: Vec<_> = {
            let mut seats = self.seats.write();
            let listening = seats.iter_mut().filter_map(|seat| seat.listening.take());
            listening.collect()
        };
        ends.iter().for_each(Listening::hang_up);
        for listening in ends {
            join(listening.thread);
        }
    }

    fn check(&self, options: &GuestOptions) -> Result<(), RosterError> {
        check_name(&options.name)?;
        self.check_quota(options.quota_bytes)?;
        if let Some(other) = self.get(&options.name) {
            return Err(RosterError::NameTaken {
                name: options.name.clone(),
                socket: other.socket.clone(),
            });
        }
        let taken = |owner: String| {
            Err(RosterError::SocketTaken {
                socket: options.socket.clone(),
                owner,
            })
        };
        let guests = self.list();
        if let Some(other) = guests.iter().find(|guest| guest.socket == options.socket) {
            return taken(other.name.clone());
        }
        if self.terms.control_socket.as_ref() == Some(&options.socket) {
            return taken("cramctl".to_owned());
        }
        Ok(())
    }

    fn check_quota(&self, quota: Option<u64>) -> Result<(), RosterError> {
        let capacity = self.terms.store.capacity_bytes();
        match quota {
            Some(quota) if quota > capacity => Err(RosterError::Quota { quota, capacity }),
            _ => Ok(()),
        }
    }

    /// The guest's account, and whether it is a new one. One that the arena knows has the settings that
    /// the operator gave it last; those of the command line are for new ones.
    fn account(&self, options: &GuestOptions) -> Result<(Arc<Client>, bool), RosterError> {
        let Terms {
            store,
            store_options,
            quota_bytes,
            ..
        } = &self.terms;
        let is_new = store.client(&options.name).is_none();
        let quota = options.quota_bytes.or(*quota_bytes);
        let account = store_options.account(store, &options.name, quota)?;
        if is_new {
            if let Some(weight) = options.weight {
                account.set_weight(weight);
            }
        } else {
            say_what_counts(options, &account);
        }
        Ok((account, is_new))
    }

    fn guest(&self, options: &GuestOptions, account: Arc<Client>) -> Arc<Guest> {
        let mut offer = self.terms.offer.clone();
        offer.policy.copies = options.copies.unwrap_or(offer.policy.copies);
        offer.policy.auto_squeeze = options.auto_squeeze.unwrap_or(offer.policy.auto_squeeze);
        Arc::new(Guest::new(
            options.name.clone(),
            options.socket.clone(),
            options.trusts_socket,
            Arc::clone(&self.terms.store),
            account,
            offer,
            Arc::clone(&self.terms.announcer),
        ))
    }
}

/// A name that can be shown in one line of a log.
///
/// # Errors
/// When it cannot, or is too short or too long for the store.
pub fn check_name(name: &str) -> Result<(), RosterError> {
    let fits = (1..=NAME_BYTES_MAX).contains(&name.len());
    if fits && !name.chars().any(char::is_control) {
        Ok(())
    } else {
        let shown: String = name.escape_debug().take(80).collect();
        Err(RosterError::BadName(shown))
    }
}

/// Warns when the command line asks for something else than the operator has set since.
fn say_what_counts(options: &GuestOptions, account: &Client) {
    let name = &options.name;
    if let Some(quota) = options.quota_bytes
        && account.quota_bytes() != Some(quota)
    {
        let kept = account.quota_bytes().map_or("none".to_owned(), size::show);
        let asked = size::show(quota);
        log::warn!(
            "{name}: its quota stays {kept}, as it was set last; \"cramctl quota {name} {asked}\" \
             changes that"
        );
    }
    if let Some(weight) = options.weight
        && account.weight() != weight
    {
        let kept = account.weight();
        log::warn!(
            "{name}: its weight stays {kept}, as it was set last; \"cramctl weight {name} {weight}\" \
             changes that"
        );
    }
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        log::error!("a thread of the daemon panicked");
    }
}
