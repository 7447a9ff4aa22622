// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The consistency check of the whole store.

use std::collections::HashMap;
use std::sync::Arc;

use crate::Store;
use crate::arena::{Place, cost_bytes};
use crate::budget::Account;
use crate::core::Core;
use crate::space::Space;

impl Store {
    /// Walks all structures and compares them with each other and with all accounts and counters.
    /// Meant for tests, and for times of rest: operations that run meanwhile look like faults.
    ///
    /// # Errors
    /// A text that names the first contradiction.
    pub fn check(&self) -> Result<(), String> {
        let clients = self.clients();
        let mut walk = Walk::default();
        for client in &clients {
            let account = client.account();
            walk.bill(account, client.fixed_bytes());
            walk.held += client.fixed_bytes();
            for (_, pool) in client.pools() {
                walk.space(&self.core, pool.space())?;
            }
        }
        if self
            .core
            .ephemeral
            .read()
            .iter()
            .any(|space| !walk.spaces.contains(&address(space)))
        {
            return Err("an ephemeral space belongs to no client".into());
        }
        walk.held += self.core.fixed_bytes() + self.core.arena.verify(&mut walk.images)?;
        let held = self.core.budget.held_bytes();
        if walk.held != held {
            return Err(format!(
                "{} bytes are held but {held} are counted",
                walk.held
            ));
        }
        if held > self.capacity_bytes() {
            return Err(format!("{held} bytes are held, above the capacity"));
        }
        if self.stats().pages_stored != walk.pages {
            return Err(format!(
                "{} pages are there but {:?}",
                walk.pages,
                self.stats()
            ));
        }
        walk.bills.values().try_for_each(Bill::verify)
    }
}

/// Stands for an object by where it is, to tell it from others.
fn address<T>(shared: &Arc<T>) -> usize {
    Arc::as_ptr(shared).addr()
}

/// What an account should say.
struct Bill {
    account: Arc<Account>,
    bytes: u64,
    pages: u64,
}

impl Bill {
    fn verify(&self) -> Result<(), String> {
        let (bytes, pages) = (self.account.used_bytes(), self.account.tally.pages_stored());
        if (self.bytes, self.pages) == (bytes, pages) {
            return Ok(());
        }
        let (true_bytes, true_pages) = (self.bytes, self.pages);
        Err(format!(
            "a client has {true_pages} pages of {true_bytes} bytes but is billed {pages} of {bytes}"
        ))
    }
}

/// What [`Store::check`] gathers.
#[derive(Default)]
struct Walk {
    spaces: Vec<usize>,
    images: Vec<(Place, usize)>,
    bills: HashMap<usize, Bill>,
    held: u64,
    pages: u64,
}

impl Walk {
    fn bill(&mut self, account: &Arc<Account>, bytes: u64) -> &mut Bill {
        let account = account.clone();
        let bill = self.bills.entry(address(&account)).or_insert(Bill {
            account,
            bytes: 0,
            pages: 0,
        });
        bill.bytes += bytes;
        bill
    }

    fn space(&mut self, core: &Core, space: &Arc<Space>) -> Result<(), String> {
        if self.spaces.contains(&address(space)) {
            return Ok(());
        }
        self.spaces.push(address(space));
        let (mut held, mut pages, mut packed) = (Space::fixed_bytes(core), 0, 0);
        let mut blocks = 0;
        for shard in space.shards() {
            let index = shard.lock();
            index.verify()?;
            held += index.held_bytes();
            if shard.oldest_stamp() != index.oldest_stamp() {
                return Err("a shard's age beside its lock is wrong".into());
            }
            for (_, slot) in index.pages() {
                self.images
                    .extend(slot.place().map(|place| (place, slot.len())));
                let owner = space.owner(slot.owner).ok_or("a page's owner is unknown")?;
                self.bill(&owner, space.bill_bytes(slot.len())).pages += 1;
                blocks += cost_bytes(slot.len());
                packed += slot.len() as u64;
                pages += 1;
            }
        }
        self.held += held;
        self.pages += pages;
        self.bill(&space.payer, held);
        let stats = space.stats(core);
        let found = (
            stats.pages_stored,
            stats.compr_data_size,
            stats.mem_used_total,
        );
        if found != (pages, packed, held + blocks) {
            return Err(format!(
                "a pool has {pages} pages, {packed} bytes packed, but {stats:?}"
            ));
        }
        Ok(())
    }
}
