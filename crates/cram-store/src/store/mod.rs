// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The store itself: its clients, its figures.

pub(crate) mod check;
pub(crate) mod client;
pub(crate) mod error;
pub(crate) mod pool;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::arena::{Arena, HEADER_BYTES, Opened, layout_for, now};
use crate::engine::Core;
use crate::engine::policy::ReclaimTarget;
use crate::engine::recompress::Repacker;
use crate::ledger::account::Holder;
use crate::ledger::domain::Domain;
use crate::ledger::stats::StoreStats;
use crate::machine::budget::Budget;
use crate::machine::sync::RwLock;
use crate::maintain::Keeper;
use crate::recover::{Found, Recovery, Refused, recover};
use crate::spec::NAME_BYTES_MAX;
use crate::spec::config::StoreConfig;
use crate::spec::settings::Identity;
use crate::store::client::Client;
use crate::store::error::StoreError;

/// One pool of compressed pages, for all guests of a host. See the crate's text.
pub struct Store {
    pub(crate) core: Arc<Core>,
    config: StoreConfig,
    generation: u64,
    recovery: Recovery,
    clients: RwLock<BTreeMap<String, Arc<Client>>>,
    /// Ends with the store. `None` inside: it is not wanted, or the system had no thread to give.
    keeper: OnceLock<Option<Keeper>>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// How many bytes of the store are how old.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AgeBytes {
    /// Seconds since the youngest of these pages was put, or got, at the most. Each bound is twice
    /// the one before.
    pub age_s_max: u64,
    /// Bytes of their records in the arena.
    pub bytes: u64,
}

impl Store {
    /// Opens a store: an empty one, or, if its arena is a file that holds one already, the one that
    /// is there, with every client, pool and page. Memory is taken from the host as pages come, not
    /// now.
    ///
    /// # Errors
    /// When the configuration asks for what cannot be, or the arena cannot be opened; the text says
    /// what can be done.
    pub fn new(config: StoreConfig) -> Result<Arc<Self>, StoreError> {
        let store = Self::open(config)?;
        store.start_background();
        Ok(store)
    }

    /// As [`Self::new`], but no thread is left running until [`Self::start_background`]: for who
    /// must first do to his process what is inherited by threads, and not given to them later.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn open(config: StoreConfig) -> Result<Arc<Self>, StoreError> {
        config.checked()?;
        let began = Instant::now();
        let capacity_bytes = config.capacity_bytes;
        let budget = Arc::new(Budget::new(capacity_bytes));
        let opened = Arena::open(&config.backing, layout_for(capacity_bytes), budget.clone())?;
        let does_not_fit = || StoreError::DoesNotFit { capacity_bytes };
        let Opened {
            arena,
            generation,
            found: spans,
            others,
            is_after_reboot,
            is_lost,
        } = opened;
        let found = Found {
            spans,
            others,
            is_after_reboot,
            is_lost,
        };
        let Some(core) = Core::new(&config, arena, budget) else {
            return Err(does_not_fit());
        };
        let recovered = recover(&core, &found, began);
        let (recovery, accounts) = recovered.map_err(|why| match why {
            Refused::TooLarge => does_not_fit(),
            Refused::Arena(error) => error.into(),
        })?;
        let core = Arc::new(core);
        let clients = accounts
            .into_iter()
            .map(|known| {
                let client = Client::recovered(core.clone(), known, &config);
                (client.name().to_owned(), Arc::new(client))
            })
            .collect();
        Ok(Arc::new(Self {
            core,
            config,
            generation,
            recovery,
            clients: RwLock::new(clients),
            keeper: OnceLock::new(),
        }))
    }

    /// Starts the background thread, if the configuration has one, and it does not run yet.
    pub fn start_background(&self) {
        self.keeper.get_or_init(|| {
            let background = self.config.background?;
            Keeper::start(&self.core, background)
        });
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
        self.add_client_to(name, quota_bytes, None)
    }

    /// Adds a client to a sharing group, which is made if there is none of that name: equal pages of
    /// all its clients are stored once. They must trust each other, since each can learn from how
    /// fast a page is stored whether another has it.
    ///
    /// # Errors
    /// As [`Self::add_client`].
    pub fn add_client_to_group(
        &self,
        name: &str,
        quota_bytes: Option<u64>,
        group: &str,
    ) -> Result<Arc<Client>, StoreError> {
        check_name(group)?;
        self.add_client_to(name, quota_bytes, Some(group))
    }

    fn add_client_to(
        &self,
        name: &str,
        quota_bytes: Option<u64>,
        group: Option<&str>,
    ) -> Result<Arc<Client>, StoreError> {
        check_name(name)?;
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
        let core = &self.core;
        let group = group.map(|group| self.group(group).ok_or(StoreError::NoRoom));
        let group = group.transpose()?;
        let number = group.as_ref().map(|group| group.number());
        let identity = Identity {
            generation: core.draw_generation(),
            ..Identity::default()
        };
        let account = core.add_account(Holder::Client, number, name, quota_bytes, identity);
        let account = account.ok_or(StoreError::NoRoom)?;
        let domain = group.unwrap_or_else(|| core.own_domain(&account));
        let client = Client::new(core.clone(), account, domain, identity, &self.config);
        let client = Arc::new(client);
        clients.insert(name.to_owned(), client.clone());
        Ok(client)
    }

    /// The sharing group of that name.
    fn group(&self, name: &str) -> Option<Arc<Domain>> {
        let core = &self.core;
        let is_it = |domain: &&Arc<Domain>| {
            domain.account.holder == Holder::SharingGroup && domain.account.name == name
        };
        if let Some(domain) = core.domains.read().values().find(is_it) {
            return Some(domain.clone());
        }
        let account =
            core.add_account(Holder::SharingGroup, None, name, None, Identity::default())?;
        Some(core.own_domain(&account))
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

    /// A random number, not 0, that differs from one arena to the next. A store that was opened again
    /// has the one that it had. (Guests have their client's: [`Client::generation`].)
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The addresses at which the arena is mapped, for whoever has to know whose memory a signal is
    /// about. Nothing else may be done with them.
    #[must_use]
    pub fn mapping(&self) -> std::ops::Range<usize> {
        self.core.arena.mapping()
    }

    /// What was found in the arena when the store was opened.
    #[must_use]
    pub fn recovery(&self) -> &Recovery {
        &self.recovery
    }

    /// How close the store is to refusing puts: 0 while less than three quarters of the capacity
    /// is taken by what cannot be evicted, 1000 when it is full, and also after a put was refused
    /// for want of room, until something is freed.
    #[must_use]
    pub fn pressure(&self) -> u32 {
        self.core.pressure()
    }

    /// What a client should take back so that the store comes below its low watermark: clients that
    /// use more than their share (by weight) give first, each in proportion to what is beyond it.
    /// A client that is over its quota gives back at least that.
    #[must_use]
    pub fn reclaim_target(&self, client: &Client) -> ReclaimTarget {
        self.core.reclaim_target(client.account())
    }

    /// Moves what lives together, and gives all that is free back to the host (as zram's `compact`).
    /// How many spans of the arena were emptied. Others go on meanwhile.
    pub fn compact(&self) -> u64 {
        self.core.compact_all()
    }

    /// Packs pages once more, with zstd, that were neither put nor got for so long (as zram's
    /// `recompress`). The background thread does the same when the store is idle.
    pub fn recompress(&self, cold_after: Duration) {
        self.core.seal_heads();
        let mut repacker = Repacker::new();
        // Each span is looked at once; the bound is for when others put and flush all the time.
        let most = 2 * self.core.arena.layout().spans;
        for _ in 0..most {
            if !self
                .core
                .recompress_some(&mut repacker, cold_after, usize::MAX)
            {
                break;
            }
        }
    }

    /// The store's figures. Takes no lock that puts or gets wait for.
    #[must_use]
    pub fn stats(&self) -> StoreStats {
        self.core.stats()
    }

    /// Bytes of what is held that is no page's image: the index, the other tables, and the records'
    /// headers.
    #[must_use]
    pub fn metadata_bytes(&self) -> u64 {
        let core = &self.core;
        // Both change meanwhile.
        let held = core.budget.held_bytes();
        let outside = held.saturating_sub(core.arena.spans().held_bytes());
        let stats = self.stats();
        outside + (stats.pages_stored + stats.pages_shared) * HEADER_BYTES as u64
    }

    /// How many images there are of each size: the greatest size of a bucket of 64 bytes, and the
    /// count; empty buckets are left out.
    #[must_use]
    pub fn size_histogram(&self) -> Vec<(u64, u64)> {
        self.core.sizes.read()
    }

    /// How cold is how much, the youngest first.
    #[must_use]
    pub fn age_distribution(&self) -> Vec<AgeBytes> {
        const BOUNDS: u32 = 24;
        let time = now();
        let mut ages: Vec<_> = (0..BOUNDS)
            .map(|bound| AgeBytes {
                age_s_max: 1 << bound,
                bytes: 0,
            })
            .collect();
        let layout = self.core.arena.layout();
        for info in self.core.arena.spans().in_use() {
            let age = if info.is_sealed {
                time.saturating_sub(info.born)
            } else {
                0
            };
            let entry = ages.iter().position(|entry| age <= entry.age_s_max);
            if let Some(entry) = ages.get_mut(entry.unwrap_or(BOUNDS as usize - 1)) {
                entry.bytes += layout.bytes_of(info.live);
            }
        }
        let used = ages.iter().rposition(|entry| entry.bytes > 0);
        ages.truncate(used.map_or(0, |last| last + 1));
        ages
    }

    /// Records that were found damaged beyond repair since the store was opened, and flipped bits of
    /// headers that were corrected.
    #[must_use]
    pub fn damage(&self) -> (u64, u64) {
        let arena = &self.core.arena;
        (arena.damaged_records(), arena.corrected_bits())
    }
}

fn check_name(name: &str) -> Result<(), StoreError> {
    if (1..=NAME_BYTES_MAX).contains(&name.len()) {
        Ok(())
    } else {
        Err(StoreError::BadName { bytes: name.len() })
    }
}
