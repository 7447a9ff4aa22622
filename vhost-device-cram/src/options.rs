// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a daemon is started with: its guests, its store, its sockets.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cram_store::{Background, Backing, Client, Store, StoreConfig, StoreError};

use crate::address::Address;
use crate::balance::Copies;
use crate::client::Offer;
use crate::socket::{Permissions, directory_of};

/// Whose equal pages are stored once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dedup {
    /// Nobody's.
    Off,
    /// Each guest's own.
    Guest,
    /// All guests' together.
    All,
}

/// What a daemon is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The guests.
    pub guests: Vec<GuestOptions>,
    /// How long a guest's pages are kept while nobody is connected; for ever when not given.
    pub keep: Option<Duration>,
    /// The control socket.
    pub control_socket: Option<PathBuf>,
    /// Who may connect there.
    pub control_permissions: Permissions,
    /// Where metrics are to be had, if anywhere; who may connect to a socket is as for the control socket.
    pub metrics: Option<Address>,
    /// Folders in which sockets of guests can be made later, besides those of the guests above.
    pub guest_folders: Vec<PathBuf>,
    /// The store.
    pub store: StoreOptions,
    /// Bytes that each guest may hold; the whole capacity when not given.
    pub quota_bytes: Option<u64>,
    /// What each guest is offered.
    pub offer: Offer,
}

impl Options {
    /// Where sockets of guests can be made while the daemon runs: nowhere, if nobody can ask for it.
    pub fn folders(&self) -> BTreeSet<PathBuf> {
        if self.control_socket.is_none() {
            return BTreeSet::new();
        }
        let used = self.guests.iter().map(|guest| directory_of(&guest.socket));
        used.chain(self.guest_folders.iter().cloned()).collect()
    }
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
    /// Bytes that it may hold, if the arena does not know it yet.
    pub quota_bytes: Option<u64>,
    /// What it counts for when the store is full, if the arena does not know it yet.
    pub weight: Option<u32>,
    /// What becomes of copies; as all guests have it when not given.
    pub copies: Option<Copies>,
    /// Whether it frees by itself what it does not use; as all guests have it when not given.
    pub auto_squeeze: Option<bool>,
}

impl GuestOptions {
    /// A guest without wishes of its own.
    pub fn new(name: String, socket: PathBuf) -> Self {
        GuestOptions {
            name,
            socket,
            trusts_socket: false,
            quota_bytes: None,
            weight: None,
            copies: None,
            auto_squeeze: None,
        }
    }

    /// A guest that is called what its socket is: `/run/vm1.sock` is `vm1`.
    pub fn of_socket(socket: PathBuf) -> Self {
        let stem = socket.file_stem().unwrap_or(socket.as_os_str());
        Self::new(stem.to_string_lossy().into_owned(), socket)
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

    pub(crate) fn open(&self, max_pools_per_client: u32) -> Result<Arc<Store>, StoreError> {
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
    pub(crate) fn account(
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
