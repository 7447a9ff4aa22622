// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is known of the records in the arena, whoever's they are: accounts,
//! objects, domains, the catalogue, the budget and the counters, over the log.
//! Knows no space.

pub(crate) mod account;
pub(crate) mod alias;
pub(crate) mod catalogue;
pub(crate) mod domain;
pub(crate) mod ghosts;
pub(crate) mod hash;
pub(crate) mod objects;
pub(crate) mod replace;
pub(crate) mod stats;
pub(crate) mod sums;
pub(crate) mod twins;

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::arena::{
    Arena, Header, Kind, PAYLOAD_BYTES_MAX, Place, Record, SUPERBLOCK_BYTES, Urgency,
};
use crate::ledger::account::{Account, Accounts, Holder};
use crate::ledger::catalogue::{AccountRecord, Catalogue, EntryKey, OBJECT_BYTES, object_to_bytes};
use crate::ledger::domain::Domain;
use crate::ledger::ghosts::Ghosts;
use crate::ledger::hash::HashKeys;
use crate::ledger::objects::{Object, Objects};
use crate::ledger::stats::{Sizes, Tally};
use crate::ledger::sums::Sums;
use crate::ledger::twins::Twins;
use crate::log::{Log, Target};
use crate::machine::budget::{Budget, Shortage};
use crate::machine::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use crate::machine::sync::{Mutex, RwLock};
use crate::spec::config::StoreConfig;
use crate::spec::settings::Identity;

/// See the module's text.
pub(crate) struct Ledger {
    pub(crate) budget: Arc<Budget>,
    log: Log,
    pub(crate) sums: Sums,
    pub(crate) twins: Twins,
    pub(crate) shares_equal_pages: bool,
    ghosts: OnceLock<Ghosts>,
    pub(crate) accounts: Accounts,
    pub(crate) domains: RwLock<HashMap<u16, Arc<Domain>>>,
    pub(crate) objects: Objects,
    pub(crate) catalogue: Mutex<Catalogue>,
    /// What happened in accounts that are gone.
    pub(crate) retired: Tally,
    pub(crate) sizes: Sizes,
    /// What ephemeral pages are billed, in bytes.
    pub(crate) evictable_bytes: AtomicU64,
    /// Bytes of the catalogue's records.
    pub(crate) catalogue_bytes: AtomicU64,
    pub(crate) stripes: usize,
    pub(crate) shards_per_space: usize,
    /// A put was refused for want of room, and nothing was freed since.
    is_full: AtomicBool,
    /// A put tried to make room in vain, and nothing was freed since: so it would be in vain again.
    is_futile: AtomicBool,
}

fn twins_capacity(is_sharing: bool, capacity_bytes: u64) -> u64 {
    if is_sharing { capacity_bytes } else { 0 }
}

impl Deref for Ledger {
    type Target = Log;

    fn deref(&self) -> &Log {
        &self.log
    }
}

impl Ledger {
    /// A ledger of an empty arena. `None` when the capacity has no room for the fixed structures.
    pub(crate) fn new(config: &StoreConfig, arena: Arena, budget: Arc<Budget>) -> Option<Self> {
        let capacity_bytes = config.capacity_bytes;
        // Not by the capacity, which may change when the arena is opened again: which shard an object
        // has its number for must not.
        let is_small = arena.layout().span_shift < 17;
        let stripes = if is_small { 1 } else { 8 };
        let ledger = Self {
            budget,
            sums: Sums::new(&arena),
            log: Log::new(arena),
            shares_equal_pages: config.share_equal_pages,
            twins: Twins::new(twins_capacity(config.share_equal_pages, capacity_bytes)),
            ghosts: OnceLock::new(),
            accounts: Accounts::new(),
            domains: RwLock::default(),
            objects: Objects::default(),
            catalogue: Mutex::default(),
            retired: Tally::new(1),
            sizes: Sizes::new(stripes),
            evictable_bytes: AtomicU64::new(0),
            catalogue_bytes: AtomicU64::new(0),
            stripes,
            shards_per_space: if is_small { 4 } else { 16 },
            is_full: AtomicBool::new(false),
            is_futile: AtomicBool::new(false),
        };
        ledger.budget.reserve(ledger.fixed_bytes()).ok()?;
        Some(ledger)
    }

    /// Bytes of a store without clients.
    pub(crate) fn fixed_bytes(&self) -> u64 {
        let heads = self.log.heads_bytes();
        let ghosts = match self.ghosts.get() {
            Some(_) => Ghosts::bytes(self.budget.capacity_bytes()),
            None => 0,
        };
        (size_of::<Self>() + heads + Sizes::bytes(self.stripes) + Tally::bytes(1) + 512) as u64
            + self.arena.fixed_bytes()
            + Twins::bytes(twins_capacity(
                self.shares_equal_pages,
                self.budget.capacity_bytes(),
            ))
            + SUPERBLOCK_BYTES
            + ghosts
    }

    /// The memory of pages that are gone, if there ever was an ephemeral pool, and room for it.
    pub(crate) fn ghosts(&self) -> Option<&Ghosts> {
        self.ghosts.get()
    }

    pub(crate) fn make_ghosts(&self) {
        let bytes = Ghosts::bytes(self.budget.capacity_bytes());
        if self.ghosts.get().is_some() || self.budget.reserve(bytes).is_err() {
            return;
        }
        let ghosts = Ghosts::new(self.budget.capacity_bytes());
        if self.ghosts.set(ghosts).is_err() {
            // Another thread was quicker.
            self.budget.release(bytes);
        }
    }

    /// Whether a put could have another span.
    pub(crate) fn has_span(&self) -> bool {
        self.arena.has_span()
    }

    /// To be called, with no lock held, after pages were taken out: gives spans back to the host when
    /// too many are free, or has the background thread do so.
    pub(crate) fn relieve(&self) {
        let spans = self.arena.layout().spans as usize;
        let spare = spans / 64 + 1;
        if self.arena.spans().warm() > spare && !self.waker.call() {
            self.arena.trim(spare);
        }
    }

    pub(crate) fn note_full(&self) {
        self.is_full.store(true, Relaxed);
    }

    pub(crate) fn note_freed(&self) {
        for flag in [&self.is_full, &self.is_futile] {
            if flag.load(Relaxed) {
                flag.store(false, Relaxed);
            }
        }
    }

    pub(crate) fn is_futile(&self) -> bool {
        self.is_futile.load(Relaxed)
    }

    pub(crate) fn set_futile(&self, is_futile: bool) {
        self.is_futile.store(is_futile, Relaxed);
    }

    pub(crate) fn is_full(&self) -> bool {
        self.is_full.load(Relaxed)
    }

    /// What a record with so many bytes of payload takes in the arena.
    pub(crate) fn record_bytes(&self, payload: usize) -> u64 {
        self.arena.layout().record_bytes(payload)
    }

    /// Appends a record to the catalogue, `count` times.
    fn write_copies(
        &self,
        (kind, number, index): EntryKey,
        generation: u8,
        payload: &[u8],
        count: usize,
    ) -> Result<[Option<Place>; 2], Shortage> {
        debug_assert!(payload.len() <= PAYLOAD_BYTES_MAX);
        let header = Header {
            kind,
            number,
            index,
            len: payload.len(),
            is_zstd: false,
            check: self.sums.check(self.sums.bytes(payload), number, index),
            generation,
            is_used: false,
        };
        let mut copies = [None; 2];
        let mut missing = copies.iter_mut().enumerate().take(count);
        let written = missing.try_for_each(|(at, copy)| {
            *copy = Some(self.append(
                Target::Catalogue(at),
                Record { header, payload },
                None,
                Urgency::Normal,
            )?);
            self.catalogue_bytes
                .fetch_add(self.record_bytes(payload.len()), Relaxed);
            Ok(())
        });
        written
            .inspect_err(|_| self.kill_copies(copies))
            .map(|()| copies)
    }

    /// Declares records of the catalogue dead.
    pub(crate) fn kill_copies(&self, copies: [Option<Place>; 2]) {
        for place in copies.into_iter().flatten() {
            if let Ok(header) = self.arena.kill(place) {
                self.catalogue_bytes
                    .fetch_sub(self.record_bytes(header.len), Relaxed);
            }
        }
    }

    /// Writes an entry of the catalogue.
    pub(crate) fn write_entry(&self, key: EntryKey, payload: &[u8]) -> Result<(), Shortage> {
        let mut catalogue = self.catalogue.lock();
        let old = catalogue.get(&key);
        let known = old
            .iter()
            .flatten()
            .find_map(|place| self.arena.header(*place).ok());
        let generation = known.map_or(0, |header| header.generation.wrapping_add(1) & 3);
        let copies = self.write_copies(key, generation, payload, 2)?;
        catalogue.insert(key, copies);
        self.kill_copies(old);
        Ok(())
    }

    /// A number, not 0, that is drawn for one client only once.
    pub(crate) fn draw_generation(&self) -> u64 {
        static DRAWN: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let time = since.map_or(0, |since| since.as_nanos());
        let count = DRAWN.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let secret = self.arena.secret();
        HashKeys(secret.number(5), secret.number(6))
            .hash_one((time, count, std::process::id()))
            .max(1)
    }

    /// Takes an entry out of the catalogue.
    pub(crate) fn erase_entry(&self, key: &EntryKey) {
        let mut catalogue = self.catalogue.lock();
        let copies = catalogue.remove(key);
        self.kill_copies(copies);
    }

    /// Writes the records of an object.
    pub(crate) fn write_object(
        &self,
        number: u32,
        object: &Object,
        copies: usize,
    ) -> Result<[Option<Place>; 2], Shortage> {
        let payload: [u8; OBJECT_BYTES] = object_to_bytes(object);
        self.write_copies((Kind::Object, number, 0), 0, &payload, copies)
    }

    /// A domain for one account alone.
    pub(crate) fn own_domain(&self, account: &Arc<Account>) -> Arc<Domain> {
        let domain = Arc::new(Domain::new(account.clone()));
        self.domains.write().insert(account.number, domain.clone());
        domain
    }

    pub(crate) fn domain(&self, number: u16) -> Option<Arc<Domain>> {
        self.domains.read().get(&number).cloned()
    }

    /// Makes an account, charged and on record; `None` when there is no room.
    pub(crate) fn add_account(
        &self,
        holder: Holder,
        group: Option<u16>,
        name: &str,
        quota_bytes: Option<u64>,
        identity: Identity,
    ) -> Option<Arc<Account>> {
        self.sweep_accounts();
        let bytes = Account::fixed_bytes(name, self.stripes);
        self.accounts.add(|number| {
            let account = Account::new(number, holder, name, quota_bytes, self.stripes);
            account.reserve(bytes).ok()?;
            self.budget.reserve(bytes).ok()?;
            let mut record = AccountRecord::plain(holder, group, name);
            record.settings.quota_bytes = quota_bytes;
            record.identity = identity;
            let key = (Kind::Account, u32::from(number), 0);
            self.write_entry(key, &record.to_bytes())
                .inspect_err(|_| self.budget.release(bytes))
                .ok()?;
            Some(Arc::new(account))
        })
    }

    /// Forgets an account that nobody has any more.
    pub(crate) fn remove_account(&self, account: &Account) {
        let bytes = Account::fixed_bytes(&account.name, self.stripes);
        self.erase_entry(&(Kind::Account, u32::from(account.number), 0));
        for head in account.queue.heads() {
            self.arena.seal_head(head);
        }
        self.retired.absorb(&account.tally.sum());
        self.accounts.remove(account.number);
        account.release(bytes);
        self.budget.release(bytes);
    }

    /// Forgets removed clients whose last page in a shared pool is gone.
    pub(crate) fn sweep_accounts(&self) {
        for account in self.accounts.all() {
            // Of several that sweep, one.
            if account.tally.pages() == 0 && account.is_closed.swap(false, Relaxed) {
                self.remove_account(&account);
            }
        }
    }

    /// A page with this content and record came, or was moved.
    pub(crate) fn note_twin(&self, domain: Option<&Domain>, header: &Header, place: Place) {
        if let Some(domain) = domain
            && self.shares_equal_pages
            && is_comparable(header)
        {
            let content = self.sums.promised(header);
            self.twins.insert(domain.number(), content, place);
        }
    }

    /// The number of an alias's image. The record is alive, and stays so.
    pub(crate) fn image_number(&self, place: Place, header: &Header) -> Option<u32> {
        let pin = self.arena.pin(place);
        crate::ledger::alias::image_in(pin.payload(place, header))
    }

    /// An image lost one of the pages that need it.
    pub(crate) fn drop_image_ref(&self, domain: &Domain, number: u32) {
        let mut images = domain.images.lock();
        let Some(place) = images.drop_ref(number) else {
            return;
        };
        self.kill_image(domain, place);
        self.budget.release(images.free_if_empty());
    }

    /// An image that no page needs any more. The lock of the domain's images is held.
    pub(crate) fn kill_image(&self, domain: &Domain, place: Place) {
        let Ok(header) = self.arena.header(place) else {
            let _ = self.arena.kill(place);
            return;
        };
        let _ = self.arena.kill(place);
        self.count_image(domain, &header, false);
        domain.account.release(self.record_bytes(header.len));
    }

    /// Counts an image that came or went.
    pub(crate) fn count_image(&self, domain: &Domain, header: &Header, has_come: bool) {
        let bytes = self.record_bytes(header.len);
        let amounts = crate::ledger::stats::Amounts::of(header, bytes);
        if has_come {
            domain.account.tally.add(&amounts);
            domain.account.image_bytes.fetch_add(bytes, Relaxed);
            self.sizes.add(header.len);
        } else {
            domain.account.tally.sub(&amounts);
            domain.account.image_bytes.fetch_sub(bytes, Relaxed);
            self.sizes.sub(header.len);
        }
    }
}

/// Whether equal records of this kind are worth looking for.
fn is_comparable(header: &Header) -> bool {
    matches!(header.kind, Kind::Page | Kind::Image) && !crate::codec::is_filled(header.len)
}
