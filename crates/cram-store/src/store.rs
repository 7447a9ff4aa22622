// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The store itself: its clients, its figures.

use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::client::Client;
use crate::config::{StoreConfig, StoreError};
use crate::core::Core;
use crate::stats::StoreStats;

/// One pool of compressed pages, for all guests of a host. See the crate's text.
pub struct Store {
    pub(crate) core: Arc<Core>,
    config: StoreConfig,
    generation: u64,
    clients: RwLock<BTreeMap<String, Arc<Client>>>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Makes an empty store. Memory is taken from the host as pages come, not now.
    ///
    /// # Errors
    /// When the configuration asks for what cannot be; the text says what can.
    pub fn new(config: StoreConfig) -> Result<Arc<Self>, StoreError> {
        config.checked()?;
        // The keys come from the operating system's random numbers.
        let generation = RandomState::new().hash_one("generation").max(1);
        let core = Arc::new(Core::new(config.capacity_bytes));
        Ok(Arc::new(Self {
            core,
            config,
            generation,
            clients: RwLock::default(),
        }))
    }

    /// Adds a client under the operator's name for it, limited to `quota_bytes` if given.
    ///
    /// # Errors
    /// When the name is taken, the configured number of clients is reached, or there is no room.
    pub fn add_client(
        &self,
        name: &str,
        quota_bytes: Option<u64>,
    ) -> Result<Arc<Client>, StoreError> {
        let mut clients = self.clients.write();
        if clients.contains_key(name) {
            return Err(StoreError::ClientExists {
                name: name.to_owned(),
            });
        }
        let limit = self.config.max_clients;
        if clients.len() >= limit as usize {
            return Err(StoreError::TooManyClients { limit });
        }
        let max_pools = self.config.max_pools_per_client;
        let client = Client::new(self.core.clone(), name, quota_bytes, max_pools);
        let client = Arc::new(client.ok_or(StoreError::NoRoom)?);
        clients.insert(name.to_owned(), client.clone());
        Ok(client)
    }

    /// Removes a client, with its pools and all pages in them; whether there was one of that name.
    /// Pages that it put into shared pools stay as long as another client has the pool open.
    pub fn remove_client(&self, name: &str) -> bool {
        let removed = self.clients.write().remove(name);
        removed.inspect(|client| client.close()).is_some()
    }

    /// The client of that name.
    #[must_use]
    pub fn client(&self, name: &str) -> Option<Arc<Client>> {
        self.clients.read().get(name).cloned()
    }

    /// All clients, by name.
    #[must_use]
    pub fn clients(&self) -> Vec<Arc<Client>> {
        self.clients.read().values().cloned().collect()
    }

    /// What the store was made with.
    #[must_use]
    pub fn config(&self) -> &StoreConfig {
        &self.config
    }

    /// The limit on what the store takes from the host, in bytes.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        self.core.budget.capacity_bytes()
    }

    /// A random number, not 0, that differs from one store's life to the next: by it a guest sees
    /// that its pages are gone.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// How close the store is to refusing puts: 0 while less than three quarters of the capacity
    /// is taken by what cannot be evicted, 1000 when it is full, and also after a put was refused
    /// for want of room, until something is freed.
    #[must_use]
    pub fn pressure(&self) -> u32 {
        self.core.pressure()
    }

    /// The store's figures. Takes no lock.
    #[must_use]
    pub fn stats(&self) -> StoreStats {
        self.core.stats()
    }
}
