// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What all clients of a store have in common: the ledger, and the spaces over it.

pub(crate) mod compact;
pub(crate) mod evict;
pub(crate) mod policy;
pub(crate) mod recompress;
pub(crate) mod relocate;
pub(crate) mod share;

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::Arc;

use crate::arena::{Arena, Kind};
use crate::ledger::Ledger;
use crate::ledger::account::Account;
use crate::ledger::catalogue::{AccountRecord, SpaceRecord};
use crate::ledger::domain::Domain;
use crate::ledger::stats::{StoreStats, Sum};
use crate::log::queue::Visit;
use crate::machine::budget::{Budget, Shortage};
use crate::machine::sync::{Mutex, RwLock};
use crate::space::Space;
use crate::spec::Keeping;
use crate::spec::config::StoreConfig;

/// A shared space and how many pools are open on it.
pub(crate) struct SharedSpace {
    pub(crate) space: Arc<Space>,
    pub(crate) opened: u32,
}

/// Who compacts holds it. What it has learnt:
#[derive(Default)]
pub(crate) struct Compactor {
    /// Spans that could not be emptied, since a record in them is damaged.
    pub(crate) stuck: Vec<Visit>,
}

/// See the module's text.
///
/// Lock order, outermost first: the store's clients, a client's changes, its pools, what is kept of it, `shared`,
/// `making`, the compactor, a
/// space's shard, a domain's images, `objects`, `catalogue`, a head, a queue's order, the arena's
/// list of free spans. `accounts`, `spaces` and `domains` are locked for a look only, inside any of
/// them but the last three. No two locks of one rank at a time.
pub(crate) struct Core {
    ledger: Ledger,
    pub(crate) spaces: RwLock<Vec<Option<Arc<Space>>>>,
    pub(crate) shared: Mutex<HashMap<[u8; 16], SharedSpace>>,
    /// Held by the put that makes room, of those that find none.
    pub(crate) making: Mutex<()>,
    pub(crate) compactor: Mutex<Compactor>,
}

impl Deref for Core {
    type Target = Ledger;

    fn deref(&self) -> &Ledger {
        &self.ledger
    }
}

impl Core {
    /// A core over an arena. `None` when the capacity has no room for the fixed structures.
    pub(crate) fn new(config: &StoreConfig, arena: Arena, budget: Arc<Budget>) -> Option<Self> {
        Some(Self {
            ledger: Ledger::new(config, arena, budget)?,
            spaces: RwLock::default(),
            shared: Mutex::default(),
            making: Mutex::default(),
            compactor: Mutex::default(),
        })
    }

    /// Everything that was in the arena has been entered.
    pub(crate) fn recovered(&self) {
        self.budget.keep_margin();
        if self.all_spaces().iter().any(|space| space.is_evictable()) {
            self.make_ghosts();
        }
    }

    /// Writes what is to be known of an account from now on. Takes all kinds of locks.
    pub(crate) fn write_account(
        &self,
        number: u16,
        record: &AccountRecord,
    ) -> Result<(), Shortage> {
        let key = (Kind::Account, u32::from(number), 0);
        let bytes = record.to_bytes();
        let write = || self.write_entry(key, &bytes);
        write().or_else(|why| if self.make_span() { write() } else { Err(why) })
    }

    pub(crate) fn space(&self, number: u32) -> Option<Arc<Space>> {
        self.spaces.read().get(number as usize)?.clone()
    }

    /// Enters a space under the lowest number that is free.
    pub(crate) fn add_space(
        &self,
        make: impl FnOnce(u32) -> Result<Arc<Space>, Shortage>,
    ) -> Result<Arc<Space>, Shortage> {
        let mut spaces = self.spaces.write();
        let at = spaces
            .iter()
            .position(Option::is_none)
            .unwrap_or(spaces.len());
        let number = u32::try_from(at).map_err(|_| Shortage::Store)?;
        let space = make(number)?;
        match spaces.get_mut(at) {
            Some(entry) => *entry = Some(space.clone()),
            None => spaces.push(Some(space.clone())),
        }
        Ok(space)
    }

    /// At recovery: enters a space under its number.
    pub(crate) fn adopt_space(&self, space: Arc<Space>) {
        let mut spaces = self.spaces.write();
        let at = space.number as usize;
        if spaces.len() <= at {
            spaces.resize(at + 1, None);
        }
        if let Some(entry) = spaces.get_mut(at) {
            *entry = Some(space);
        }
    }

    /// At recovery: a shared space that one pool is open on.
    pub(crate) fn adopt_shared(&self, space: Arc<Space>) {
        let uuid = space.uuid;
        self.shared
            .lock()
            .insert(uuid, SharedSpace { space, opened: 1 });
    }

    /// Ends a space with all its pages; how many there were.
    pub(crate) fn destroy(&self, space: &Space) -> u64 {
        let removed = space.destroy(self);
        if let Some(entry) = self.spaces.write().get_mut(space.number as usize) {
            *entry = None;
        }
        removed
    }

    pub(crate) fn all_spaces(&self) -> Vec<Arc<Space>> {
        self.spaces.read().iter().flatten().cloned().collect()
    }

    /// A new space, on record.
    pub(crate) fn new_space(
        &self,
        keeping: Keeping,
        uuid: [u8; 16],
        payer: Arc<Account>,
        domain: Option<Arc<Domain>>,
    ) -> Result<Arc<Space>, Shortage> {
        let record = SpaceRecord {
            keeping,
            account: payer.number,
            uuid,
        };
        let space = self.add_space(|number| {
            Space::new(self, number, keeping, uuid, payer, domain).map(Arc::new)
        })?;
        let key = (Kind::Space, space.number, 0);
        self.write_entry(key, &record.to_bytes())
            .inspect_err(|_| _ = self.destroy(&space))?;
        if space.is_evictable() {
            self.make_ghosts();
        }
        Ok(space)
    }

    /// Sum over everything that ever was in the store.
    pub(crate) fn sum(&self) -> Sum {
        let accounts = self.accounts.all();
        let sum = accounts.iter().fold(self.retired.sum(), |sum, account| {
            sum.plus(&account.tally.sum())
        });
        let spaces = self.all_spaces();
        spaces
            .iter()
            .filter(|space| !space.is_shared())
            .fold(sum, |sum, space| sum.plus(&space.tally.sum()))
    }

    pub(crate) fn stats(&self) -> StoreStats {
        let budget = &self.budget;
        self.sum().read(
            budget.held_bytes(),
            budget.capacity_bytes(),
            budget.held_bytes_max(),
        )
    }
}
