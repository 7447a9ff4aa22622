// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The consistency check of the whole store.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::arena::{Header, Kind, Place, Trust};
use crate::engine::Core;
use crate::ledger::account::Account;
use crate::ledger::stats::Amounts;
use crate::machine::sync::atomic::Ordering::Relaxed;
use crate::space::Space;
use crate::store::Store;

impl Store {
    /// Walks all structures and compares them with each other, with what is in the arena, and with
    /// all accounts and counters. Meant for tests, and for times of rest: operations that run
    /// meanwhile look like faults.
    ///
    /// # Errors
    /// A text that names the first contradiction.
    pub fn check(&self) -> Result<(), String> {
        let core = &*self.core;
        let mut walk = Walk::new(core);
        for account in core.accounts.all() {
            let bytes = Account::fixed_bytes(&account.name, core.stripes);
            walk.held += bytes;
            walk.bill(account.number).bytes += bytes;
        }
        let spaces = core.all_spaces();
        walk.pools(self, &spaces)?;
        spaces.iter().try_for_each(|space| walk.space(space))?;
        walk.objects()?;
        walk.images()?;
        walk.catalogue_entries()?;
        walk.arena()?;
        walk.totals()
    }
}

/// What an account should say.
#[derive(Default, Debug, PartialEq, Eq)]
struct Bill {
    bytes: u64,
    evictable: u64,
    images: u64,
    /// Pages in shared pools, and images.
    own: Amounts<u64>,
}

/// What [`Store::check`] gathers.
struct Walk<'a> {
    core: &'a Core,
    held: u64,
    catalogue: u64,
    pages: u64,
    bills: HashMap<u16, Bill>,
    /// Every record that something leads to.
    records: HashMap<Place, Header>,
    /// Numbers that objects have in the shards.
    numbers: HashSet<u32>,
    /// How many pages need each image, by domain and number.
    needed: HashMap<(u16, u32), u32>,
}

fn sum(mine: &mut Amounts<u64>, more: &Amounts<u64>) {
    mine.pages += more.pages;
    mine.image_bytes += more.image_bytes;
    mine.billed_bytes += more.billed_bytes;
    mine.same += more.same;
    mine.huge += more.huge;
    mine.shared += more.shared;
    mine.sharing += more.sharing;
    mine.recompressed += more.recompressed;
}

impl<'a> Walk<'a> {
    fn new(core: &'a Core) -> Self {
        Self {
            core,
            held: core.fixed_bytes(),
            catalogue: 0,
            pages: 0,
            bills: HashMap::new(),
            records: HashMap::new(),
            numbers: HashSet::new(),
            needed: HashMap::new(),
        }
    }

    fn bill(&mut self, account: u16) -> &mut Bill {
        self.bills.entry(account).or_default()
    }

    /// Notes a record that something leads to.
    fn record(&mut self, place: Place, kinds: &[Kind]) -> Result<Header, String> {
        let header = self.core.arena.header(place);
        let header = header.map_err(|_| format!("the record at {place:?} is damaged"))?;
        if !kinds.contains(&header.kind) {
            return Err(format!("the record at {place:?} is a {:?}", header.kind));
        }
        if self.records.insert(place, header).is_some() {
            return Err(format!("two things lead to the record at {place:?}"));
        }
        Ok(header)
    }

    /// Each space has pools, and each pool a space that is known.
    fn pools(&self, store: &Store, spaces: &[Arc<Space>]) -> Result<(), String> {
        let mut opened: HashMap<u32, u32> = HashMap::new();
        for client in store.clients() {
            for (_, pool) in client.pools() {
                *opened.entry(pool.space().number).or_default() += 1;
            }
        }
        for space in spaces {
            let pools = opened.remove(&space.number).unwrap_or(0);
            let shared = self.core.shared.lock();
            let expected = match shared.get(&space.uuid) {
                Some(entry) if space.is_shared() => entry.opened,
                _ => 1,
            };
            if pools != expected {
                return Err(format!(
                    "space {} has {pools} pools, not {expected}",
                    space.number
                ));
            }
        }
        if opened.is_empty() {
            Ok(())
        } else {
            Err(format!("pools have spaces that are unknown: {opened:?}"))
        }
    }

    fn space(&mut self, space: &Space) -> Result<(), String> {
        let core = self.core;
        let mut index_bill = Space::fixed_bytes(core);
        let mut amounts = Amounts::default();
        self.held += Space::fixed_bytes(core);
        let mut index_bytes = 0;
        for shard in space.shards() {
            let index = shard.lock();
            index.verify()?;
            index_bytes += index.held_bytes();
            index_bill += index.held_bytes();
            for (_, number) in index.numbers() {
                if !self.numbers.insert(number) {
                    return Err(format!("number {number} is two objects'"));
                }
            }
            for (key, number, place) in index.pages() {
                let header = self.record(place, &[Kind::Page, Kind::Alias])?;
                let object = core.objects.get(header.number);
                let is_its = (header.number == number || space.is_shared())
                    && header.index == key.index
                    && object.is_some_and(|object| {
                        (object.space, object.id) == (space.number, key.object)
                    });
                if !is_its {
                    return Err(format!("{key:?} leads to another page's record"));
                }
                let page = Amounts::of(&header, space.bill_bytes(core, header.len));
                sum(&mut amounts, &page);
                let owner = object.map_or(space.payer.number, |object| object.owner);
                self.page(space, owner, &header, &page, place)?;
            }
        }
        if index_bytes != space.index_bytes() {
            return Err("a shard's bytes beside its lock are wrong".into());
        }
        self.held += index_bytes;
        self.pages += amounts.pages;
        self.bill(space.payer.number).bytes += index_bill;
        let counted = space.tally.sum().stored;
        if counted != amounts {
            return Err(format!("a pool has {amounts:?} but counts {counted:?}"));
        }
        Ok(())
    }

    fn page(
        &mut self,
        space: &Space,
        owner: u16,
        header: &Header,
        amounts: &Amounts<u64>,
        place: Place,
    ) -> Result<(), String> {
        let core = self.core;
        let is_evictable = space.is_evictable();
        let bill = self.bill(owner);
        bill.bytes += amounts.billed_bytes;
        if is_evictable {
            bill.evictable += amounts.billed_bytes;
        }
        if space.is_shared() {
            sum(&mut bill.own, amounts);
        }
        if header.kind == Kind::Alias {
            let number = core.image_number(place, header);
            let number = number.ok_or("an alias names no image")?;
            let domain = space.domain.as_ref().ok_or("an alias in no domain")?;
            *self.needed.entry((domain.number(), number)).or_default() += 1;
        }
        Ok(())
    }

    fn objects(&mut self) -> Result<(), String> {
        self.held += self.core.objects.held_bytes();
        for (number, object, copies) in self.core.objects.all() {
            let is_shared = self
                .core
                .space(object.space)
                .is_some_and(|space| space.is_shared());
            if !self.numbers.remove(&number) && !is_shared {
                return Err(format!("number {number} is no object's"));
            }
            self.are_apart(&copies)?;
            for place in copies {
                let header = self.record(place, &[Kind::Object])?;
                if header.number != number {
                    return Err(format!("number {number} leads to that of another"));
                }
                self.catalogue += self.core.record_bytes(header.len);
                if let Some(space) = self.core.space(object.space) {
                    self.bill(space.payer.number).bytes += space.object_copy_bytes(self.core);
                }
            }
        }
        match self.numbers.iter().next() {
            None => Ok(()),
            Some(number) => Err(format!("number {number} was not given")),
        }
    }

    /// The records of one entry are in different spans.
    fn are_apart(&self, copies: &[Place]) -> Result<(), String> {
        let layout = self.core.arena.layout();
        match copies {
            [one, other] if layout.span_of(*one) == layout.span_of(*other) => {
                Err(format!("both copies are in one span: {copies:?}"))
            }
            _ => Ok(()),
        }
    }

    fn images(&mut self) -> Result<(), String> {
        let domains: Vec<_> = self.core.domains.read().values().cloned().collect();
        for domain in domains {
            let images = domain.images.lock();
            self.held += images.held_bytes();
            for (number, place, refs) in images.all() {
                let header = self.record(place, &[Kind::Image])?;
                let needed = self.needed.remove(&(domain.number(), number)).unwrap_or(0);
                let is_its = header.number == u32::from(domain.number()) && header.index == number;
                if !is_its || refs != needed {
                    return Err(format!(
                        "image {number} is needed by {needed} pages and counts {refs}: {header:?}"
                    ));
                }
                let bytes = self.core.record_bytes(header.len);
                let bill = self.bill(domain.number());
                bill.bytes += bytes;
                bill.images += bytes;
                sum(&mut bill.own, &Amounts::of(&header, bytes));
            }
        }
        if self.needed.is_empty() {
            Ok(())
        } else {
            Err(format!(
                "images are needed and not there: {:?}",
                self.needed
            ))
        }
    }

    fn catalogue_entries(&mut self) -> Result<(), String> {
        let catalogue = self.core.catalogue.lock();
        for copies in catalogue.all_copies() {
            self.are_apart(&copies.iter().flatten().copied().collect::<Vec<_>>())?;
        }
        for (key, place) in catalogue.all() {
            let header = self.record(place, &[Kind::Account, Kind::Space, Kind::Pool])?;
            if (header.kind, header.number, header.index) != key {
                return Err(format!("{key:?} leads to another's record"));
            }
            self.catalogue += self.core.record_bytes(header.len);
        }
        Ok(())
    }

    /// Exactly the records that something leads to are alive, and each span counts its own.
    fn arena(&mut self) -> Result<(), String> {
        let arena = &self.core.arena;
        let layout = arena.layout();
        let mut found = 0;
        for info in arena.spans().in_use() {
            let mut live = 0;
            let mut walk = arena.walk(info.span, info.filled);
            let mut end = layout.first_granule();
            while let Some(record) = walk.next() {
                if record.trust == Trust::Nothing {
                    let is_record = record.is_live && self.records.contains_key(&record.place);
                    walk.verified(&record, is_record);
                    if !is_record {
                        continue;
                    }
                }
                let at = layout.granule_of(record.place);
                if at != end && !arena.spans().is_damaged(info.span) {
                    return Err(format!("span {} has a gap at {end}", info.span));
                }
                end = at + layout.granules(record.header.record_bytes());
                if record.is_live {
                    if !self.records.contains_key(&record.place) {
                        return Err(format!("nothing leads to {record:?}"));
                    }
                    live += end - at;
                    found += 1;
                }
            }
            let is_whole = end == info.filled || arena.spans().is_damaged(info.span);
            if live != info.live || !is_whole {
                return Err(format!("{live} granules live and {end} filled of {info:?}"));
            }
        }
        if found == self.records.len() {
            Ok(())
        } else {
            let known = self.records.len();
            Err(format!(
                "{found} records are alive of {known} that are known"
            ))
        }
    }

    fn totals(&self) -> Result<(), String> {
        /// The background thread makes spans ready at any time. What is missing for good stays missing.
        const LOOKS: usize = 1000;
        let core = self.core;
        let mut looks = 0;
        let (found, held) = loop {
            let found = self.held + core.arena.spans().held_bytes();
            let held = core.budget.held_bytes();
            if found == held || looks == LOOKS {
                break (found, held);
            }
            looks += 1;
            std::thread::yield_now();
        };
        if found != held {
            return Err(format!("{found} bytes are held but {held} are counted"));
        }
        if held > core.budget.capacity_bytes() {
            return Err(format!("{held} bytes are held, above the capacity"));
        }
        let counted = core.catalogue_bytes.load(Relaxed);
        if counted != self.catalogue {
            return Err(format!(
                "{} bytes are in the catalogue but {counted} are counted",
                self.catalogue
            ));
        }
        let evictable: u64 = self.bills.values().map(|bill| bill.evictable).sum();
        if evictable != core.evictable_bytes.load(Relaxed) {
            return Err(format!(
                "{evictable} bytes are evictable, and not counted so"
            ));
        }
        let stats = core.stats();
        if stats.pages_stored != self.pages {
            return Err(format!("{} pages are there but {stats:?}", self.pages));
        }
        let sizes: u64 = core.sizes.read().iter().map(|(_, count)| count).sum();
        if sizes != self.pages + stats.pages_shared {
            return Err(format!("{sizes} images in the histogram, but {stats:?}"));
        }
        core.accounts
            .all()
            .iter()
            .try_for_each(|account| self.account(account))
    }

    fn account(&self, account: &Account) -> Result<(), String> {
        let none = Bill::default();
        let bill = self.bills.get(&account.number).unwrap_or(&none);
        let counted = Bill {
            bytes: account.used_bytes(),
            evictable: account.evictable_bytes.load(Relaxed),
            images: account.image_bytes.load(Relaxed),
            own: account.tally.sum().stored,
        };
        if *bill == counted {
            Ok(())
        } else {
            Err(format!(
                "account {} should say {bill:?} and says {counted:?}",
                account.number
            ))
        }
    }
}
